// tcur::core_of_packed, CPU: packed ∂Û of several layers -> scale times the core's gradient.
//
// The sums are formed in fp64, in order, so that one rounding is left before the transform.
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
  core_from_spectrum(TubeDft<T>(sizes.n3), core_hat.data(), sizes.rank, out.mutable_data_ptr<T>());
}

Tensor core_of_packed(Tensor packed, double scale) {
  const PackedSizes sizes = check_packed_gradients(packed);
  const ScalarType dtype = packed.scalar_type();
  STD_TORCH_CHECK(is_compute_dtype(dtype), "tcur: packed must be fp32 or fp64");
  const Tensor parts = torch::stable::contiguous(packed);
  Tensor out = torch::stable::new_empty(packed, {sizes.n3, sizes.rank, sizes.rank});
  if (dtype == ScalarType::Double) {
    run<double>(sizes, parts, scale, out);
  } else {
    run<float>(sizes, parts, scale, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, CPU, m) {
  m.impl("core_of_packed", TORCH_BOX(&core_of_packed));
}

}  // namespace tcur
