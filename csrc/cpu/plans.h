// Tables that depend on the length of tubes alone. Calls share them: they are made once for a
// length, and those of the lengths that were used last are kept.
#pragma once

#include "../common/tubes.h"

#include <cstdint>
#include <memory>

namespace tcur {

template <class T>
std::shared_ptr<const TubeDft<T>> tube_dft(int64_t n3);
template <>
std::shared_ptr<const TubeDft<float>> tube_dft(int64_t n3);
template <>
std::shared_ptr<const TubeDft<double>> tube_dft(int64_t n3);

std::shared_ptr<const UnitRoots> unit_roots(int64_t n3);

// How many tables this process has made so far.
int64_t plans_made();

}  // namespace tcur
