// What the operators do before and after their kernels, on the CPU side.
#pragma once

#include "../common/check.h"
#include "kernels.h"

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

namespace tcur {

// Checks that these kernels can multiply the factors: both fp32, or both fp64.
inline void check_factors(const Tensor& lateral_hat) {
  STD_TORCH_CHECK(
      is_compute_dtype(lateral_hat.scalar_type()), "tcur: lateral_hat must be fp32 or fp64");
}

// A tensor that kernels read or write.
inline void check_element(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(element_of(tensor) != Element::none, "tcur: ", name, " has no known dtype");
}

// Calls f with a number of the type of the arithmetic: fp64 for fp64, and fp32 for all others.
template <class F>
auto with_compute_type(ScalarType dtype, F&& f) {
  return compute_dtype(dtype) == ScalarType::Double ? f(double()) : f(float());
}

template <class T>
constexpr ScalarType scalar_type =
    std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Number of blocks in a tile. All slices of the tile, and as much of the base, should leave half of
// a 512 KiB second-level cache to the panels. Tiles should be about equally wide.
template <class T>
int64_t tile_blocks(int64_t n2, int64_t n3) {
  constexpr int64_t budget = 160 * 1024 / (kBlock * sizeof(T)), widest = 32;
  const int64_t needed = ceil_div(n2, kColumnBlock);
  const int64_t most = std::max<int64_t>(1, std::min(budget / n3, widest));
  const int64_t tiles = ceil_div(needed, most);
  return ceil_div(needed, tiles);
}

// 64-byte aligned memory, not initialised, that lives as long as the operator call.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(allocate(size)) {
  }
  T* data() {
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const {
      ::operator delete(data, kAlignment);
    }
  };
  static T* allocate(int64_t size) {
    return static_cast<T*>(::operator new(size * sizeof(T), kAlignment));
  }
  std::unique_ptr<T, Free> data_;
};

// The factors in the form that kernels take, and the memory of the panels.
template <class T>
class PackedFactors {
 public:
  PackedFactors(
      const Sizes& sizes,
      const Tensor& lateral_hat,
      const Tensor& horizontal_hat,
      const TubeDft<T>& dft)
      : panels_(round_up(sizes.n2, kColumnBlock) * sizes.q()) {
    const int64_t q = sizes.q(), n2 = sizes.n2;
    const T* rows = horizontal_hat.const_data_ptr<T>();
    T* panels = panels_.data();
    torch::stable::parallel_for(0, q, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t col = 0; col < n2; col += kColumnBlock) {
          T* panel = panels + col * q + row * kColumnBlock;
          const int64_t n = std::min<int64_t>(kColumnBlock, n2 - col);
          std::copy_n(rows + row * n2 + col, n, panel);
          std::fill_n(panel + n, kColumnBlock - n, T(0));
        }
      }
    });
    view_ = {sizes.n1, n2, sizes.n3, sizes.rank, lateral_hat.const_data_ptr<T>(), panels, &dft};
  }
  const Factors<T>& view() const {
    return view_;
  }

 private:
  Scratch<T> panels_;
  Factors<T> view_;
};

// Packed spectrum [n3, rank, row_stride] of the core [n3, rank, rank], with rows padded with zeros.
// Plane j is multiplied by scale * inverse_weight(j), so that the kernels need no weights.
template <class T>
std::vector<T> weighted_core_spectrum(
    const TubeDft<T>& dft, const T* core, int64_t rank, double scale, int64_t row_stride) {
  const Kernels<T>& k = kernels<T>();
  const int64_t square = rank * rank, n3 = dft.n3;
  const int64_t width = round_up(square, k.lanes);
  Scratch<T> tubes(n3 * width), planes(n3 * width);
  for (int64_t l = 0; l < n3; ++l) {
    std::copy_n(core + l * square, square, tubes.data() + l * width);
  }
  k.forward_dft(dft, tubes.data(), width, planes.data(), width, width);
  std::vector<T> core_hat(n3 * rank * row_stride);
  for (int64_t plane = 0; plane < n3; ++plane) {
    const T weight = static_cast<T>(scale * inverse_weight(plane, n3));
    for (int64_t i = 0; i < square; ++i) {
      core_hat[(plane * rank + i / rank) * row_stride + i % rank] =
          weight * planes.data()[plane * width + i];
    }
  }
  return core_hat;
}

// The inverse transform: computes the gradient of the core [n3, rank, rank] from the packed ∂Û.
template <class T>
void core_from_spectrum(const TubeDft<T>& dft, const T* core_hat, int64_t rank, T* core) {
  const Kernels<T>& k = kernels<T>();
  const int64_t square = rank * rank, n3 = dft.n3;
  const int64_t width = round_up(square, k.lanes);
  Scratch<T> tubes(n3 * width), planes(n3 * width);
  for (int64_t plane = 0; plane < n3; ++plane) {
    const T weight = static_cast<T>(inverse_weight(plane, n3));
    for (int64_t i = 0; i < square; ++i) {
      planes.data()[plane * width + i] = weight * core_hat[plane * square + i];
    }
  }
  k.inverse_dft(dft, planes.data(), width, tubes.data(), width, width);
  for (int64_t l = 0; l < n3; ++l) {
    std::copy_n(tubes.data() + l * width, square, core + l * square);
  }
}

// The diagonal blocks of the core in the packed basis: one per bin.
inline CoreBlocks core_blocks(int64_t n3, int64_t rank, int64_t lanes) {
  CoreBlocks blocks;
  for (Bin bin(n3); bin.is_there(); bin.next()) {
    const int64_t width = bin.planes() * rank, stride = round_up(width, lanes);
    blocks.all.push_back({bin.plane * rank, width, stride, blocks.size});
    blocks.size += width * stride;
    blocks.widest = std::max(blocks.widest, stride);
  }
  return blocks;
}

}  // namespace tcur
