// The instruction sets that were compiled, and the choice among them.
#pragma once

#include <cstdint>
#include <vector>

namespace tcur {

// Names of the variants that are compiled into the library, best first, and of those that this
// processor can run.
std::vector<const char*> compiled_isas();
std::vector<const char*> runnable_isas();
// Why none of them is in use, because this processor runs none; else null.
const char* absence();
// The variant in use: the best one that runs here, or the one that use_isa selected. Throws if none
// runs here.
const char* chosen_isa();
// Columns of a strip (kernels.h) of that variant, for numbers of 4 or of 8 bytes.
int64_t strip_columns(int64_t bytes);
// Selects a variant by name; false if it was not compiled or this processor lacks it.
bool use_isa(const char* name);

}  // namespace tcur
