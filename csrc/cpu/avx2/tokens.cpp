#include "isa.h"

#ifdef TCUR_ISA
#include "../tokens_kernel.h"
#endif
