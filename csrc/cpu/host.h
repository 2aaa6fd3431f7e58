// What the four operators do before and after their kernels, on the CPU side.
#pragma once

#include "../check.h"
#include "kernels.h"

#include <algorithm>
#include <type_traits>

namespace tcur {

inline Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::Double:
      return Element::f64;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::f16;
    default:
      return Element::none;
  }
}

template <class T>
constexpr ScalarType scalar_type =
    std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A tile of kRowBlock rows for all slices, its spectrum beside it, should fit half of a 512 KiB
// second-level cache, and wide tiles make long runs for the sweep.
template <class T>
int64_t tile_columns(int64_t n2, int64_t n3) {
  constexpr int64_t budget = 256 * 1024 / (2 * kRowBlock * sizeof(T));
  const int64_t step = kernels<T>().tile_step;
  const int64_t columns = std::min<int64_t>(budget / n3, 256) / step * step;
  return std::min(std::max(columns, step), round_up(n2, step));
}

// 64-byte aligned memory that lives as long as the operator call.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : storage_(size + kAlignment / sizeof(T)) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    data_ = storage_.data() + (kAlignment - address % kAlignment) % kAlignment / sizeof(T);
  }
  T* data() {
    return data_;
  }

 private:
  static constexpr size_t kAlignment = 64;
  std::vector<T> storage_;
  T* data_;
};

template <class T>
Factors<T> factors_of(
    const Sizes& sizes,
    const Tensor& lateral_hat,
    const Tensor& horizontal_hat,
    const FoldedDft<T>& dft) {
  return {
      sizes.n1,
      sizes.n2,
      sizes.n3,
      sizes.rank,
      lateral_hat.const_data_ptr<T>(),
      horizontal_hat.const_data_ptr<T>(),
      &dft};
}

// Packed spectrum of the core [n3, rank, rank]; plane j multiplied by scale * inverse_weight(j), so
// that the kernels need no weights.
template <class T>
std::vector<T> weighted_core_spectrum(
    const FoldedDft<T>& dft, const T* core, int64_t rank, double scale) {
  const Kernels<T>& k = kernels<T>();
  const int64_t square = rank * rank, n3 = dft.n3;
  const int64_t width = round_up(square, k.tile_step);
  Scratch<T> tubes(n3 * width), planes(n3 * width);
  for (int64_t l = 0; l < n3; ++l) {
    std::copy_n(core + l * square, square, tubes.data() + l * width);
  }
  k.forward_dft(dft, tubes.data(), width, planes.data());
  std::vector<T> core_hat(n3 * square);
  for (int64_t plane = 0; plane < n3; ++plane) {
    const T weight = static_cast<T>(scale * inverse_weight(plane, n3));
    for (int64_t i = 0; i < square; ++i) {
      core_hat[plane * square + i] = weight * planes.data()[plane * width + i];
    }
  }
  return core_hat;
}

// The inverse: core gradient [n3, rank, rank] from the packed ∂Û.
template <class T>
void core_from_spectrum(const FoldedDft<T>& dft, const T* core_hat, int64_t rank, T* core) {
  const Kernels<T>& k = kernels<T>();
  const int64_t square = rank * rank, n3 = dft.n3;
  const int64_t width = round_up(square, k.tile_step);
  Scratch<T> tubes(n3 * width), planes(n3 * width);
  for (int64_t plane = 0; plane < n3; ++plane) {
    const T weight = static_cast<T>(inverse_weight(plane, n3));
    for (int64_t i = 0; i < square; ++i) {
      planes.data()[plane * width + i] = weight * core_hat[plane * square + i];
    }
  }
  k.inverse_dft(dft, planes.data(), width, tubes.data());
  for (int64_t l = 0; l < n3; ++l) {
    std::copy_n(tubes.data() + l * width, square, core + l * square);
  }
}

// The diagonal blocks of the core in the packed basis: one per bin.
inline std::vector<CoreBlock> core_blocks(int64_t n3, int64_t rank) {
  std::vector<CoreBlock> blocks;
  int64_t start = 0;
  for (int64_t plane = 0; plane < n3;) {
    const bool pair = plane > 0 && plane <= 2 * pairs(n3);
    const int64_t width = pair ? 2 * rank : rank;
    blocks.push_back({plane * rank, width, start});
    start += width * width;
    plane += pair ? 2 : 1;
  }
  return blocks;
}

inline int64_t blocks_size(const std::vector<CoreBlock>& blocks) {
  return blocks.back().start + blocks.back().width * blocks.back().width;
}

}  // namespace tcur
