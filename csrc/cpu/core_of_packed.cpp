// tcur::core_of_packed, CPU: packed ∂Û of several layers -> scale times the gradient of the core.
//
// The sums are computed in fp64, in order, and rounded once before the transform.
#include "host.h"

namespace tcur {
namespace {

template <class T>
void run(
    const PackedSizes& sizes,
    const Tensor& packed,  // [m, n3, rank, rank]
    double scale,
    const Tensor& out) {  // [n3, rank, rank]
  const int64_t size = sizes.n3 * sizes.rank * sizes.rank;
  const T* parts = packed.const_data_ptr<T>();
  std::vector<double> sums(size);
  for (int64_t part = 0; part < sizes.count; ++part) {
    for (int64_t i = 0; i < size; ++i) {
      sums[i] += parts[part * size + i];
    }
  }
  std::vector<T> core_hat(size);
  for (int64_t i = 0; i < size; ++i) {
    core_hat[i] = static_cast<T>(scale * sums[i]);
  }
  core_from_spectrum(
      *tube_dft<T>(sizes.n3), core_hat.data(), sizes.rank, out.mutable_data_ptr<T>());
}

Tensor core_of_packed(const CoreOfPackedArguments& a) {
  const PackedSizes sizes = check_core_of_packed(a);
  const ScalarType dtype = a.packed.scalar_type();
  STD_TORCH_CHECK(is_compute_dtype(dtype), "tcur: packed must be fp32 or fp64");
  const Tensor parts = torch::stable::contiguous(a.packed);
  Tensor out = torch::stable::new_empty(parts, {sizes.n3, sizes.rank, sizes.rank});
  with_compute_type(dtype, [&](auto number) { run<decltype(number)>(sizes, parts, a.scale, out); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, CPU, m) {
  m.impl("core_of_packed", TORCH_BOX(&positional::core_of_packed<&core_of_packed>));
}

}  // namespace tcur
