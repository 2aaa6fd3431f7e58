// tcur::materialize, CPU: W_eff [n3, n1, n2] = W + scale * C*U*R.
#include "w_eff.h"

namespace tcur {
namespace {

// Results of this size do not fit into a shared last-level cache. Smaller ones may still be there
// when the linear layers read them.
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

template <class T>
void run(
    const Sizes& sizes,
    const SlicePlaces& places,
    const Tensor& lateral_hat,
    const Tensor& horizontal_hat,
    const std::optional<Tensor>& panels,
    const Tensor& core,
    double scale,
    const Tensor& out) {
  // These are enough tasks to balance the threads. More would only compute P of a row block more
  // often.
  const int64_t wanted = 8 * static_cast<int64_t>(torch::stable::get_num_threads());
  const WEff<T> w_eff(sizes, places, lateral_hat, horizontal_hat, panels, core, scale, wanted);
  const std::vector<void*> slices = slices_of(places, sizes, out);
  const Kernels<T>& k = kernels<T>();
  const MaterializeArgs<T> args{
      w_eff.args(),
      slices.data(),
      element_of(out),
      out.numel() * static_cast<int64_t>(out.element_size()) >= kStreamBytes};
  for_each_task<T>(w_eff.tasks(), k.materialize_scratch(args), [&](int64_t task, T* scratch) {
    k.materialize(args, task, scratch);
  });
}

void materialize(const MaterializeArguments& a) {
  const Sizes sizes = check_materialize(a);
  check_factors(a.lateral_hat);
  check_dtype("core", a.core, a.lateral_hat.scalar_type());
  check_element("out", a.out);
  const std::vector<Tensor> weights = contiguous_weights(a.weights);
  const SlicePlaces places = place_slices(weights, sizes, a.out);
  if (a.out.numel() == 0) {
    return;
  }
  const Tensor l = torch::stable::contiguous(a.lateral_hat);
  const Tensor h = torch::stable::contiguous(a.horizontal_hat);
  const Tensor c = torch::stable::contiguous(a.core);
  with_compute_type(l.scalar_type(), [&](auto number) {
    run<decltype(number)>(sizes, places, l, h, a.panels, c, a.scale, a.out);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, CPU, m) {
  m.impl("materialize", TORCH_BOX(&positional::materialize<&materialize>));
  m.impl("materialize_out", TORCH_BOX(&positional::materialize_out<&materialize>));
}

}  // namespace tcur
