// tcur::core_grad_tokens, CPU: ∂U [n3, rank, rank] from tokens, no n1 x n2 gradient in between.
//
// With p = dy Ĉ and z = x R̂ᵀ in the real packed basis only the diagonal blocks of pᵀz are needed.
// For a pair of planes the block is [[rr, ri], [ir, ii]], and slice l adds
// e^{-2πikl/n3} ((rr - ii) - i (ri + ir)) to ∂Û_k.
#include "host.h"

namespace tcur {
namespace {

// Tokens per partial sum: short enough that fp32 sums keep their digits, fixed so that the result
// does not depend on the number of threads.
constexpr int64_t kTokenChunk = 512;

// Turns one block by the phase of its slice and adds it to the packed ∂Û.
template <class T>
void add_block(
    const CoreBlock& block,
    const UnitRoots& roots,
    int64_t n3,
    int64_t rank,
    int64_t slice,
    const T* products,
    T* core_hat) {
  const int64_t plane = block.offset / rank, square = rank * rank;
  T* re = core_hat + plane * square;
  if (block.width == rank) {
    const T sign = plane > 0 && slice % 2 != 0 ? T(-1) : T(1);
    for (int64_t i = 0; i < square; ++i) {
      re[i] += sign * products[i];
    }
    return;
  }
  T* im = re + square;
  const int64_t k = (plane + 1) / 2;
  const T c = static_cast<T>(roots.cos(k * slice)), s = static_cast<T>(roots.sin(k * slice));
  for (int64_t a = 0; a < rank; ++a) {
    for (int64_t b = 0; b < rank; ++b) {
      const T* top = products + a * block.width;
      const T* bottom = products + (rank + a) * block.width;
      const T x = top[b] - bottom[rank + b];
      const T y = -(top[rank + b] + bottom[b]);
      re[a * rank + b] += c * x + s * y;
      im[a * rank + b] += c * y - s * x;
    }
  }
}

template <class T>
void run(
    const Sizes& sizes,
    const Tensor& x,
    const Tensor& grad_y,
    const Tensor& lateral_hat,
    const Tensor& horizontal_hat,
    int64_t slice_index,
    int64_t slices,
    const Tensor& out) {
  const int64_t tokens = x.size(0), q = sizes.n3 * sizes.rank, square = sizes.rank * sizes.rank;
  const Tensor z_tensor = torch::stable::matmul(x, torch::stable::transpose(horizontal_hat, 0, 1));
  const Tensor p_tensor = torch::stable::matmul(
      torch::stable::reshape(grad_y, {tokens * slices, sizes.n1}), lateral_hat);
  const T* z = z_tensor.const_data_ptr<T>();  // [tokens, q]
  const T* p = p_tensor.const_data_ptr<T>();  // [tokens, slices, q]

  const std::vector<CoreBlock> blocks = core_blocks(sizes.n3, sizes.rank);
  const int64_t n_blocks = static_cast<int64_t>(blocks.size()), size = blocks_size(blocks);
  const int64_t chunks = std::max<int64_t>(1, (tokens + kTokenChunk - 1) / kTokenChunk);
  const Kernels<T>& k = kernels<T>();
  std::vector<T> partial(chunks * slices * size);
  torch::stable::parallel_for(0, chunks * slices * n_blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const CoreBlock& block = blocks[task % n_blocks];
      const int64_t slice = task / n_blocks % slices, chunk = task / n_blocks / slices;
      const int64_t first = chunk * kTokenChunk;
      k.core_products(
          block,
          p + slice * q,
          slices * q,
          z,
          q,
          first,
          std::min(first + kTokenChunk, tokens),
          partial.data() + (chunk * slices + slice) * size + block.start);
    }
  });

  const UnitRoots roots(sizes.n3);
  std::vector<T> core_hat(sizes.n3 * square, T(0));
  for (int64_t slice = 0; slice < slices; ++slice) {
    T* total = partial.data() + slice * size;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const T* part = partial.data() + (chunk * slices + slice) * size;
      for (int64_t i = 0; i < size; ++i) {
        total[i] += part[i];
      }
    }
    for (const CoreBlock& block : blocks) {
      add_block(
          block,
          roots,
          sizes.n3,
          sizes.rank,
          slice_index + slice,
          total + block.start,
          core_hat.data());
    }
  }
  core_from_spectrum(
      FoldedDft<T>(sizes.n3), core_hat.data(), sizes.rank, out.mutable_data_ptr<T>());
}

Tensor core_grad_tokens(
    Tensor x,
    Tensor grad_y,
    Tensor lateral_hat,
    Tensor horizontal_hat,
    int64_t n3,
    int64_t slice_index,
    int64_t slices) {
  const Sizes sizes = check_factors(lateral_hat, horizontal_hat, n3);
  STD_TORCH_CHECK(
      slice_index >= 0 && slices >= 1 && slice_index + slices <= n3,
      "tcur: slice_index out of range");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == sizes.n2, "tcur: x must be [..., n2]");
  STD_TORCH_CHECK(
      grad_y.dim() >= 1 && grad_y.size(grad_y.dim() - 1) == slices * sizes.n1,
      "tcur: grad_y must be [..., slices*n1]");
  const int64_t tokens = sizes.n2 == 0 ? 0 : x.numel() / sizes.n2;
  STD_TORCH_CHECK(
      grad_y.numel() == tokens * slices * sizes.n1, "tcur: x and grad_y must have the same tokens");
  const ScalarType compute = lateral_hat.scalar_type();
  const Tensor l = torch::stable::contiguous(lateral_hat);
  const Tensor h = torch::stable::contiguous(horizontal_hat);
  const Tensor xs = torch::stable::reshape(cast(x, compute), {tokens, sizes.n2});
  const Tensor ys = torch::stable::contiguous(
      torch::stable::reshape(cast(grad_y, compute), {tokens, slices * sizes.n1}));
  Tensor out = torch::stable::new_empty(l, {n3, sizes.rank, sizes.rank});
  if (compute == ScalarType::Double) {
    run<double>(sizes, xs, ys, l, h, slice_index, slices, out);
  } else {
    run<float>(sizes, xs, ys, l, h, slice_index, slices, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, CPU, m) {
  m.impl("core_grad_tokens", TORCH_BOX(&core_grad_tokens));
}

}  // namespace tcur
