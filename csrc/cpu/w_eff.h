// The arguments of the kernels that compute tiles of W_eff = W + scale * C*U*R.
#pragma once

#include "../common/slice_places.h"
#include "host.h"

namespace tcur {

// Weights in the form that the kernels read: contiguous.
inline std::vector<Tensor> contiguous_weights(const std::vector<Tensor>& weights) {
  std::vector<Tensor> contiguous;
  for (const Tensor& weight : weights) {
    check_element("weights", weight);
    contiguous.push_back(torch::stable::contiguous(weight));
  }
  return contiguous;
}

// The arguments of the tiles, and the memory that they point into.
template <class T>
class WEff {
 public:
  // wanted: the number of tasks, though there is at least one for every block of rows. A caller
  // that sums over tasks must not let it depend on the number of threads.
  WEff(
      const Sizes& sizes,
      const SlicePlaces& places,
      const Tensor& lateral_hat,
      const Tensor& horizontal_hat,
      const std::optional<Tensor>& panels,
      const Tensor& core,
      double scale,
      int64_t wanted)
      : dft_(tube_dft<T>(sizes.n3)), factors_(sizes, lateral_hat, horizontal_hat, panels, *dft_) {
    for (const SlicePlace& place : places.all) {
      base_.push_back({place.base, place.count * sizes.n2});
    }
    const int64_t stride = round_up(sizes.rank, kernels<T>().lanes);
    core_hat_ = weighted_core_spectrum(*dft_, core.const_data_ptr<T>(), sizes.rank, scale, stride);
    const TileBlocks tile = w_eff_tile<T>(sizes);
    const int64_t tile_rows = ceil_div(sizes.n1, tile.rows * tile.row_block);
    const int64_t tiles = ceil_div(sizes.n2, tile.columns * kColumnBlock);
    const int64_t chunks = std::min(tiles, ceil_div(wanted, tile_rows));
    args_ = {factors_.view(), core_hat_.data(), stride, base_.data(), places.element, tile, chunks};
    tasks_ = tile_rows * chunks;
  }
  WEff(const WEff&) = delete;
  WEff& operator=(const WEff&) = delete;

  const WEffArgs<T>& args() const {
    return args_;
  }
  int64_t tasks() const {
    return tasks_;
  }

 private:
  std::shared_ptr<const TubeDft<T>> dft_;
  PackedFactors<T> factors_;
  std::vector<BaseSlice> base_;
  std::vector<T> core_hat_;
  WEffArgs<T> args_;
  int64_t tasks_;
};

}  // namespace tcur
