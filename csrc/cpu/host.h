// What the operators do before and after their kernels, on the CPU side.
#pragma once

#include "../common/check.h"
#include "caches.h"
#include "kernels.h"
#include "plans.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
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

// Tiles as wide as possible make the longest runs of memory, though from here on nothing is gained.
constexpr int64_t kWidestTile = 32;

// How many blocks of all slices take no more than these bytes.
template <class T>
int64_t blocks_in(int64_t bytes, const Sizes& s) {
  return bytes / (s.n3 * kernels<T>().row_block * kColumnBlock * static_cast<int64_t>(sizeof(T)));
}

// `rows` x as many columns as make no more than these blocks, in tiles of about one width.
template <class T>
TileBlocks tile_of(const Sizes& s, int64_t rows, int64_t blocks) {
  const int64_t most = std::max<int64_t>(1, std::min(blocks / rows, kWidestTile));
  const int64_t columns = ceil_div(s.n2, kColumnBlock);
  return {rows, ceil_div(columns, ceil_div(columns, most)), kernels<T>().row_block};
}

// Chooses a tile that stays in the second-level cache beside as many bytes of something else. With
// all its slices it takes at most this much of it, or this many bytes, because larger ones have not
// been faster. What is left is for R̂.
//
// Each row of tiles reads all of R̂. If R̂ does not stay in the cache meanwhile, tiles have several
// rows of blocks, so that for each number at most some two bytes of R̂ come from the cache that the
// cores share, as long as a tile keeps a few blocks of columns. On a core with 1 MiB that made no
// difference, so there R̂ may be twice as large as the cache.
template <class T>
TileBlocks tile_in_cache(const Sizes& s) {
  constexpr int64_t most_bytes = 160 * 1024, fewest_columns = 3;
  const int64_t cache = second_level_cache(), bytes = std::min(most_bytes, cache * 5 / 16);
  const int64_t row_blocks = ceil_div(s.n1, kernels<T>().row_block);
  const int64_t blocks = blocks_in<T>(bytes, s);
  int64_t rows = 1;
  const int64_t limit = cache < 1024 * 1024 ? cache : 2 * cache;
  if ((s.q() * s.n2) * static_cast<int64_t>(sizeof(T)) + 2 * bytes > limit) {
    while (2 * rows <= row_blocks && 4 * rows <= s.rank && 2 * rows * fewest_columns <= blocks) {
      rows *= 2;
    }
  }
  return tile_of<T>(s, rows, blocks);
}

// Chooses the tile of W_eff. Where its base waits in the second-level cache, both have to fit
// there. Where the sweep reads the base from memory, long runs of memory matter most: a tile is one
// row of blocks, and what of it does not stay in that cache waits in the next.
template <class T>
TileBlocks w_eff_tile(const Sizes& s) {
  if (kernels<T>().fetches_base) {
    return tile_in_cache<T>(s);
  }
  return tile_of<T>(s, 1, blocks_in<T>(2 * second_level_cache(), s));
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

// Calls run(task, scratch) for all tasks. A thread that is done takes the next one, so that it
// never waits for a thread whose core is busy with something else, but for its last task.
template <class T, class Run>
void for_each_task(int64_t tasks, int64_t scratch_size, const Run& run) {
  const int64_t threads =
      std::min<int64_t>(tasks, static_cast<int64_t>(torch::stable::get_num_threads()));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Scratch<T> scratch(scratch_size);
    for (int64_t task = next++; task < tasks; task = next++) {
      run(task, scratch.data());
    }
  });
}

// The factors in the form that kernels take, and the memory of the panels.
template <class T>
class PackedFactors {
 public:
  // panels: those of R̂, if the caller has kept them. Panels for another instruction set have
  // another shape; they are made anew then.
  PackedFactors(
      const Sizes& sizes,
      const Tensor& lateral_hat,
      const Tensor& horizontal_hat,
      const std::optional<Tensor>& panels,
      const TubeDft<T>& dft)
      : sizes_(sizes), dft_(dft), lateral_hat_(lateral_hat.const_data_ptr<T>()) {
    const int64_t strip = kernels<T>().strip, q = sizes.q(), count = ceil_div(sizes.n2, strip);
    if (panels.has_value() && has_shape(*panels, {count, q, strip})) {
      check_dtype("panels", *panels, scalar_type<T>);
      STD_TORCH_CHECK(panels->is_contiguous(), "tcur: panels must be contiguous");
      panels_ = panels->const_data_ptr<T>();
      return;
    }
    made_ = std::make_unique<Scratch<T>>(count * q * strip);
    panels_ = made_->data();
    make(horizontal_hat.const_data_ptr<T>(), count, strip);
  }
  Factors<T> view() const {
    return {sizes_.n1, sizes_.n2, sizes_.n3, sizes_.rank, lateral_hat_, panels_, &dft_};
  }

 private:
  void make(const T* horizontal_hat, int64_t count, int64_t strip) {
    const int64_t n2 = sizes_.n2, q = sizes_.q();
    T* const all = made_->data();
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t col = index * strip, valid = std::min(strip, n2 - col);
        for (int64_t row = 0; row < q; ++row) {
          T* target = all + (index * q + row) * strip;
          std::copy_n(horizontal_hat + row * n2 + col, valid, target);
          std::fill_n(target + valid, strip - valid, T(0));
        }
      }
    });
  }

  const Sizes sizes_;
  const TubeDft<T>& dft_;
  const T* lateral_hat_;
  const T* panels_;
  std::unique_ptr<Scratch<T>> made_;
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

// The turns of slices first … first+slices, [slices, n3]: e^{2πikl/n3}, or its conjugate, times a
// factor of each plane.
template <class T, class Factor>
std::vector<T> slice_turns(
    int64_t n3, int64_t first, int64_t slices, bool conjugate, const Factor& factor) {
  const std::shared_ptr<const UnitRoots> roots = unit_roots(n3);
  std::vector<T> turns(slices * n3);
  for (int64_t s = 0; s < slices; ++s) {
    for (Bin bin(n3); bin.is_there(); bin.next()) {
      const int64_t angle = bin_of(bin.plane) * (first + s);
      T* turn = turns.data() + s * n3 + bin.plane;
      turn[0] = static_cast<T>(factor(bin.plane) * roots->cos(angle));
      if (bin.is_pair) {
        const double sine = roots->sin(angle);
        turn[1] = static_cast<T>(factor(bin.plane) * (conjugate ? -sine : sine));
      }
    }
  }
  return turns;
}

}  // namespace tcur
