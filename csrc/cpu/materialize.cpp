// tcur::materialize, CPU: W_eff [n3, n1, n2] = W + scale * C*U*R.
#include "host.h"

namespace tcur {
namespace {

// Results of this size leave no room for themselves in a last-level cache that is shared; smaller
// ones may still be there when the linear layers read them.
constexpr int64_t kStreamBytes = 4 << 20;

std::vector<MaterializeSlice> slices_of(
    const std::vector<SlicePlace>& places, const Sizes& s, const Tensor& out) {
  std::vector<MaterializeSlice> slices;
  char* matrix = static_cast<char*>(out.mutable_data_ptr());
  for (const SlicePlace& place : places) {
    const int64_t bytes = s.n2 * static_cast<int64_t>(out.element_size());  // of a row of a slice
    slices.push_back({place.base, matrix + place.index * bytes, place.count * s.n2});
    if (place.index == place.count - 1) {
      matrix += place.count * s.n1 * bytes;
    }
  }
  return slices;
}

template <class T>
void run(
    const Sizes& sizes,
    const std::vector<SlicePlace>& places,
    Element base_element,
    const Tensor& lateral_hat,
    const Tensor& horizontal_hat,
    const Tensor& core,
    double scale,
    const Tensor& out) {
  const TubeDft<T> dft(sizes.n3);
  const PackedFactors<T> factors(sizes, lateral_hat, horizontal_hat, dft);
  const std::vector<MaterializeSlice> slices = slices_of(places, sizes, out);
  const Kernels<T>& k = kernels<T>();
  const int64_t core_stride = round_up(sizes.rank, k.lanes);
  const std::vector<T> core_hat =
      weighted_core_spectrum(dft, core.const_data_ptr<T>(), sizes.rank, scale, core_stride);
  const int64_t row_blocks = (sizes.n1 + kRowBlock - 1) / kRowBlock;
  const int64_t blocks = tile_blocks<T>(sizes.n2, sizes.n3);
  const int64_t tiles = (sizes.n2 + blocks * kColumnBlock - 1) / (blocks * kColumnBlock);
  // Enough tasks to balance the threads; more would form P of a row block again for nothing.
  const int64_t wanted = 8 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t chunks = std::min(tiles, (wanted + row_blocks - 1) / row_blocks);
  const MaterializeArgs<T> args{
      factors.view(),
      core_hat.data(),
      core_stride,
      slices.data(),
      base_element,
      element_of(out.scalar_type()),
      blocks,
      chunks,
      out.numel() * static_cast<int64_t>(out.element_size()) >= kStreamBytes};
  const int64_t scratch_size = k.materialize_scratch(args);
  torch::stable::parallel_for(0, row_blocks * chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(scratch_size);
    for (int64_t task = begin; task < end; ++task) {
      k.materialize(args, task, scratch.data());
    }
  });
}

void materialize_out(
    std::vector<Tensor> weights,
    Tensor lateral_hat,
    Tensor horizontal_hat,
    Tensor core,
    double scale,
    Tensor out) {
  STD_TORCH_CHECK(core.dim() == 3, "tcur: core must be [n3, rank, rank]");
  const Sizes sizes = check_factors(lateral_hat, horizontal_hat, core.size(0));
  check_shape("core", core, {sizes.n3, sizes.rank, sizes.rank});
  check_dtype("core", core, lateral_hat.scalar_type());
  STD_TORCH_CHECK(element_of(out.scalar_type()) != Element::none, "tcur: out has no known dtype");
  for (Tensor& weight : weights) {
    STD_TORCH_CHECK(
        element_of(weight.scalar_type()) != Element::none, "tcur: weights have no known dtype");
    weight = torch::stable::contiguous(weight);
  }
  const std::vector<SlicePlace> places = place_slices(weights, sizes, out);
  const Element base = weights.empty() ? Element::none : element_of(weights[0].scalar_type());
  if (out.numel() == 0) {
    return;
  }
  const Tensor l = torch::stable::contiguous(lateral_hat);
  const Tensor h = torch::stable::contiguous(horizontal_hat);
  const Tensor c = torch::stable::contiguous(core);
  if (l.scalar_type() == ScalarType::Double) {
    run<double>(sizes, places, base, l, h, c, scale, out);
  } else {
    run<float>(sizes, places, base, l, h, c, scale, out);
  }
}

Tensor materialize(
    std::vector<Tensor> weights,
    Tensor lateral_hat,
    Tensor horizontal_hat,
    Tensor core,
    double scale,
    ScalarType out_dtype) {
  Tensor out = empty_w_eff(lateral_hat, horizontal_hat, core, out_dtype);
  materialize_out(std::move(weights), lateral_hat, horizontal_hat, core, scale, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, CPU, m) {
  m.impl("materialize", TORCH_BOX(&materialize));
  m.impl("materialize_out", TORCH_BOX(&materialize_out));
}

}  // namespace tcur
