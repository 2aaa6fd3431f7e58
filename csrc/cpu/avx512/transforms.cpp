#include "isa.h"

#ifdef TCUR_ISA
#include "../transforms_kernel.h"
#endif
