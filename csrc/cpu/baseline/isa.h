// The variant that every processor of the architecture runs: 16-byte vectors, no target attribute.
#pragma once

#define TCUR_ISA baseline
#define TCUR_TARGET
#define TCUR_VECTOR_BYTES 16
#define TCUR_REGISTERS 16
#define TCUR_RUNS_HERE true
