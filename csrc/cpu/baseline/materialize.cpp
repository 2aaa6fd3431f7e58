#include "isa.h"

#ifdef TCUR_ISA
#include "../materialize_kernel.h"
#endif
