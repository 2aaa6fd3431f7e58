// The cache that tiles are sized for.
#pragma once

#include <cstdint>

namespace tcur {

// Bytes of the second-level cache of a core. The operating system is asked once, at the first call.
int64_t second_level_cache();
// Makes later calls size their tiles for another cache; for tests and benchmarks.
void use_second_level_cache(int64_t bytes);

}  // namespace tcur
