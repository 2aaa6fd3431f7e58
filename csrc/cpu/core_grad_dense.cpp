// tcur::core_grad_dense, CPU: ∂U [n3, rank, rank] = Cᵀ * G * Rᵀ from G [n3, n1, n2].
#include "host.h"

namespace tcur {
namespace {

// Each task keeps a partial sum, and these are added in order. The number of tasks is bounded so
// that the sums stay small compared with G. It depends on the shape and the cache, so that the bits
// of the result do not depend on the number of threads.
constexpr int64_t kMaxTasks = 64;

template <class T>
void run(
    const Sizes& sizes,
    const Tensor& grad,
    const Tensor& lateral_hat,
    const Tensor& horizontal_hat,
    const std::optional<Tensor>& panels,
    const Tensor& out) {
  const std::shared_ptr<const TubeDft<T>> dft = tube_dft<T>(sizes.n3);
  const PackedFactors<T> factors(sizes, lateral_hat, horizontal_hat, panels, *dft);
  const TileBlocks tile = tile_in_cache<T>(sizes);
  const int64_t tile_rows = ceil_div(sizes.n1, tile.rows * tile.row_block);
  const int64_t per_task = ceil_div(tile_rows, kMaxTasks);
  const int64_t tasks = ceil_div(tile_rows, per_task);
  const CoreGradDenseArgs<T> args{
      factors.view(), grad.const_data_ptr(), element_of(grad), tile, per_task};
  const Kernels<T>& k = kernels<T>();
  const int64_t size = sizes.n3 * sizes.rank * sizes.rank;
  std::vector<T> partial(tasks * size, T(0));
  for_each_task<T>(tasks, k.core_grad_dense_scratch(args), [&](int64_t task, T* scratch) {
    k.core_grad_dense(args, task, scratch, partial.data() + task * size);
  });
  for (int64_t task = 1; task < tasks; ++task) {
    for (int64_t i = 0; i < size; ++i) {
      partial[i] += partial[task * size + i];
    }
  }
  core_from_spectrum(*dft, partial.data(), sizes.rank, out.mutable_data_ptr<T>());
}

Tensor core_grad_dense(const CoreGradDenseArguments& a) {
  const Sizes sizes = check_core_grad_dense(a);
  check_factors(a.lateral_hat);
  check_element("grad", a.grad);
  const Tensor g = torch::stable::contiguous(a.grad);
  const Tensor l = torch::stable::contiguous(a.lateral_hat);
  const Tensor h = torch::stable::contiguous(a.horizontal_hat);
  Tensor out = torch::stable::new_empty(l, {sizes.n3, sizes.rank, sizes.rank});
  with_compute_type(
      l.scalar_type(), [&](auto number) { run<decltype(number)>(sizes, g, l, h, a.panels, out); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, CPU, m) {
  m.impl("core_grad_dense", TORCH_BOX(&positional::core_grad_dense<&core_grad_dense>));
}

}  // namespace tcur
