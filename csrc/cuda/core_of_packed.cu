// tcur::core_of_packed, CUDA: packed ∂Û of several layers -> scale times the gradient of the core.
//
// One launch does it: make_core of spectrum.h sums the parts in order and transforms the sums.
#include "operators.h"

namespace tcur {
namespace {

Tensor core_of_packed(const CoreOfPackedArguments& a) {
  const PackedSizes sizes = check_core_of_packed(a);
  const Call call(a.packed);
  call.check("packed", a.packed, ScalarType::Float);
  check_slices(sizes.n3);
  const Tensor parts = torch::stable::contiguous(a.packed);
  const Tensor out = call.floats({sizes.n3, sizes.rank, sizes.rank});
  const Spectrum tables(call, sizes.n3);
  const CoreArgs args{
      parts.const_data_ptr<float>(),
      1,
      sizes.count,
      {},
      1,
      static_cast<int>(sizes.rank),
      out.mutable_data_ptr<float>(),
      a.scale,
      tables.tables()};
  make_core(args, call.stream());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, TCUR_DISPATCH_KEY, m) {
  m.impl("core_of_packed" TCUR_LANGUAGE, TORCH_BOX(&positional::core_of_packed<&core_of_packed>));
  m.impl(
      "core_of_packed" TCUR_LANGUAGE_TF32, TORCH_BOX(&positional::core_of_packed<&core_of_packed>));
}

}  // namespace tcur
