#include "isa.h"

#ifdef TCUR_ISA
#include "../core_grad_dense_kernel.h"
#endif
