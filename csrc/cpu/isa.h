// The instruction sets that were compiled, and the choice among them.
#pragma once

#include <vector>

namespace tcur {

// Names of the variants compiled into the library, best first, and of those this processor runs.
std::vector<const char*> compiled_isas();
std::vector<const char*> runnable_isas();
// The one in use: the best one that runs here, or that of use_isa. Throws where none runs.
const char* chosen_isa();
// Selects a variant by name; false if it was not compiled or this processor lacks it.
bool use_isa(const char* name);

}  // namespace tcur
