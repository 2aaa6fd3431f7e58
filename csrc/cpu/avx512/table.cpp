#include "isa.h"

#ifdef TCUR_ISA
#include "../kernel_table.h"
#endif
