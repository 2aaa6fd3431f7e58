// tcur::core_grad_dense, CPU: ∂U [n3, rank, rank] = Cᵀ * G * Rᵀ from G [n3, n1, n2].
#include "host.h"

namespace tcur {
namespace {

// Partial sums are kept per task and added in order; their number is bounded so that they stay
// small beside G, and it depends on the shape alone so that the bits do not depend on the threads.
constexpr int64_t kMaxTasks = 64;

template <class T>
void run(
    const Sizes& sizes,
    const Tensor& grad,
    const Tensor& lateral_hat,
    const Tensor& horizontal_hat,
    const Tensor& out) {
  const TubeDft<T> dft(sizes.n3);
  const PackedFactors<T> factors(sizes, lateral_hat, horizontal_hat, dft);
  const int64_t row_blocks = (sizes.n1 + kRowBlock - 1) / kRowBlock;
  const int64_t per_task = (row_blocks + kMaxTasks - 1) / kMaxTasks;
  const int64_t tasks = (row_blocks + per_task - 1) / per_task;
  const CoreGradDenseArgs<T> args{
      factors.view(),
      grad.const_data_ptr(),
      element_of(grad.scalar_type()),
      tile_blocks<T>(sizes.n2, sizes.n3),
      per_task};
  const Kernels<T>& k = kernels<T>();
  const int64_t size = sizes.n3 * sizes.rank * sizes.rank;
  const int64_t scratch_size = k.core_grad_dense_scratch(args);
  std::vector<T> partial(tasks * size, T(0));
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(scratch_size);
    for (int64_t task = begin; task < end; ++task) {
      k.core_grad_dense(args, task, scratch.data(), partial.data() + task * size);
    }
  });
  for (int64_t task = 1; task < tasks; ++task) {
    for (int64_t i = 0; i < size; ++i) {
      partial[i] += partial[task * size + i];
    }
  }
  partial.resize(std::max<size_t>(partial.size(), size), T(0));  // n1 == 0: no task, no gradient
  core_from_spectrum(dft, partial.data(), sizes.rank, out.mutable_data_ptr<T>());
}

Tensor core_grad_dense(Tensor grad, Tensor lateral_hat, Tensor horizontal_hat) {
  STD_TORCH_CHECK(grad.dim() == 3, "tcur: grad must be [n3, n1, n2]");
  const Sizes sizes = check_factors(lateral_hat, horizontal_hat, grad.size(0));
  check_shape("grad", grad, {sizes.n3, sizes.n1, sizes.n2});
  STD_TORCH_CHECK(element_of(grad.scalar_type()) != Element::none, "tcur: grad has no known dtype");
  const Tensor g = torch::stable::contiguous(grad);
  const Tensor l = torch::stable::contiguous(lateral_hat);
  const Tensor h = torch::stable::contiguous(horizontal_hat);
  Tensor out = torch::stable::new_empty(l, {sizes.n3, sizes.rank, sizes.rank});
  if (l.scalar_type() == ScalarType::Double) {
    run<double>(sizes, g, l, h, out);
  } else {
    run<float>(sizes, g, l, h, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, CPU, m) {
  m.impl("core_grad_dense", TORCH_BOX(&core_grad_dense));
}

}  // namespace tcur
