// tcur::materialize, CPU: W_eff [n3, n1, n2] = W + scale * C*U*R.
#include "../common/slice_places.h"
#include "host.h"

namespace tcur {
namespace {

// Results of this size leave no room for themselves in a last-level cache that is shared; smaller
// ones may still be there when the linear layers read them.
constexpr int64_t kStreamBytes = 4 << 20;

// First numbers of the slices of W_eff.
std::vector<void*> slices_of(const SlicePlaces& places, const Sizes& s, const Tensor& out) {
  std::vector<void*> slices;
  char* matrix = static_cast<char*>(out.mutable_data_ptr());
  for (const SlicePlace& place : places.all) {
    const int64_t bytes = s.n2 * static_cast<int64_t>(out.element_size());  // of a row of a slice
    slices.push_back(matrix + place.index * bytes);
    if (place.index == place.count - 1) {
      matrix += place.count * s.n1 * bytes;
    }
  }
  return slices;
}

std::vector<BaseSlice> base_of(const SlicePlaces& places, const Sizes& s) {
  std::vector<BaseSlice> base;
  for (const SlicePlace& place : places.all) {
    base.push_back({place.base, place.count * s.n2});
  }
  return base;
}

template <class T>
void run(
    const Sizes& sizes,
    const SlicePlaces& places,
    const Tensor& lateral_hat,
    const Tensor& horizontal_hat,
    const Tensor& core,
    double scale,
    const Tensor& out) {
  const TubeDft<T> dft(sizes.n3);
  const PackedFactors<T> factors(sizes, lateral_hat, horizontal_hat, dft);
  const std::vector<void*> slices = slices_of(places, sizes, out);
  const std::vector<BaseSlice> base = base_of(places, sizes);
  const Kernels<T>& k = kernels<T>();
  const int64_t core_stride = round_up(sizes.rank, k.lanes);
  const std::vector<T> core_hat =
      weighted_core_spectrum(dft, core.const_data_ptr<T>(), sizes.rank, scale, core_stride);
  const int64_t row_blocks = ceil_div(sizes.n1, kRowBlock);
  const int64_t blocks = tile_blocks<T>(sizes.n2, sizes.n3);
  const int64_t tiles = ceil_div(sizes.n2, blocks * kColumnBlock);
  // Enough tasks to balance the threads; more would form P of a row block again for nothing.
  const int64_t wanted = 8 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t chunks = std::min(tiles, ceil_div(wanted, row_blocks));
  const MaterializeArgs<T> args{
      {factors.view(), core_hat.data(), core_stride, base.data(), places.element, blocks, chunks},
      slices.data(),
      element_of(out),
      out.numel() * static_cast<int64_t>(out.element_size()) >= kStreamBytes};
  const int64_t scratch_size = k.materialize_scratch(args);
  torch::stable::parallel_for(0, row_blocks * chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(scratch_size);
    for (int64_t task = begin; task < end; ++task) {
      k.materialize(args, task, scratch.data());
    }
  });
}

void materialize(const MaterializeArguments& a) {
  const Sizes sizes = check_materialize(a);
  check_factors(a.lateral_hat);
  check_dtype("core", a.core, a.lateral_hat.scalar_type());
  check_element("out", a.out);
  std::vector<Tensor> weights;
  for (const Tensor& weight : a.weights) {
    check_element("weights", weight);
    weights.push_back(torch::stable::contiguous(weight));
  }
  const SlicePlaces places = place_slices(weights, sizes, a.out);
  if (a.out.numel() == 0) {
    return;
  }
  const Tensor l = torch::stable::contiguous(a.lateral_hat);
  const Tensor h = torch::stable::contiguous(a.horizontal_hat);
  const Tensor c = torch::stable::contiguous(a.core);
  with_compute_type(l.scalar_type(), [&](auto number) {
    run<decltype(number)>(sizes, places, l, h, c, a.scale, a.out);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, CPU, m) {
  m.impl("materialize", TORCH_BOX(&positional::materialize<&materialize>));
  m.impl("materialize_out", TORCH_BOX(&positional::materialize_out<&materialize>));
}

}  // namespace tcur
