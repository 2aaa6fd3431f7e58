// tcur::core_grad_tokens, CPU: ∂U [n3, rank, rank] from tokens, no n1 x n2 gradient in between.
//
// With p = dy Ĉ and z = x R̂ᵀ in the real packed basis only the diagonal blocks of pᵀz are needed.
// No R̂: x is z already. No dy: the tokens are the rows of G = dyᵀx, and p = Ĉ.
// For a pair of planes the block is [[rr, ri], [ir, ii]], and slice l adds
// e^{-2πikl/n3} ((rr - ii) - i (ri + ir)) to ∂Û_k.
#include "host.h"

namespace tcur {
namespace {

// Tokens per partial sum: short enough that fp32 sums keep their digits, fixed so that the result
// does not depend on the number of threads.
constexpr int64_t kTokenChunk = 256;

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
      re[i] += sign * products[i / rank * block.stride + i % rank];
    }
    return;
  }
  T* im = re + square;
  const int64_t k = (plane + 1) / 2;
  const T c = static_cast<T>(roots.cos(k * slice)), s = static_cast<T>(roots.sin(k * slice));
  for (int64_t a = 0; a < rank; ++a) {
    for (int64_t b = 0; b < rank; ++b) {
      const T* top = products + a * block.stride;
      const T* bottom = products + (rank + a) * block.stride;
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
    const Tensor& p,  // [tokens, slices * q]
    const Tensor& z,  // [tokens, q]
    int64_t slice_index,
    int64_t slices,
    const Tensor& out) {
  const int64_t tokens = z.size(0), q = sizes.n3 * sizes.rank, square = sizes.rank * sizes.rank;
  const Kernels<T>& k = kernels<T>();
  const CoreBlocks blocks = core_blocks(sizes.n3, sizes.rank, k.lanes);
  const int64_t chunks = std::max<int64_t>(1, (tokens + kTokenChunk - 1) / kTokenChunk);
  const TokenRows z_rows = token_rows(z, 0, q);
  std::vector<T> partial(chunks * slices * blocks.size);
  torch::stable::parallel_for(0, chunks * slices, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(2 * kTokenGroup * blocks.widest);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task % slices, first = task / slices * kTokenChunk;
      k.core_products(
          blocks,
          token_rows(p, slice * q, slices * q),
          z_rows,
          first,
          std::min(first + kTokenChunk, tokens),
          partial.data() + task * blocks.size,
          scratch.data());
    }
  });

  const UnitRoots roots(sizes.n3);
  std::vector<T> core_hat(sizes.n3 * square, T(0));
  for (int64_t slice = 0; slice < slices; ++slice) {
    T* total = partial.data() + slice * blocks.size;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const T* part = partial.data() + (chunk * slices + slice) * blocks.size;
      for (int64_t i = 0; i < blocks.size; ++i) {
        total[i] += part[i];
      }
    }
    for (const CoreBlock& block : blocks.all) {
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
    std::optional<Tensor> grad_y,
    Tensor lateral_hat,
    std::optional<Tensor> horizontal_hat,
    int64_t n3,
    int64_t slice_index,
    int64_t slices) {
  const Sizes sizes = check_token_factors(lateral_hat, horizontal_hat, n3);
  STD_TORCH_CHECK(
      slice_index >= 0 && slices >= 1 && slice_index + slices <= n3,
      "tcur: slice_index out of range");
  STD_TORCH_CHECK(
      x.dim() >= 1 && x.size(x.dim() - 1) == sizes.n2, "tcur: x must be [..., n2], or [..., q]");
  const int64_t tokens = sizes.n2 == 0 ? 0 : x.numel() / sizes.n2;
  const ScalarType precision = lateral_hat.scalar_type();
  Tensor z = torch::stable::reshape(x, {tokens, sizes.n2});
  if (horizontal_hat.has_value()) {
    z = torch::stable::matmul(cast(z, precision), torch::stable::transpose(*horizontal_hat, 0, 1));
  }
  z = torch::stable::contiguous(z);
  Tensor p = torch::stable::contiguous(lateral_hat);
  if (grad_y.has_value()) {
    STD_TORCH_CHECK(
        grad_y->dim() >= 1 && grad_y->size(grad_y->dim() - 1) == slices * sizes.n1,
        "tcur: grad_y must be [..., slices*n1]");
    STD_TORCH_CHECK(
        grad_y->numel() == tokens * slices * sizes.n1,
        "tcur: x and grad_y must have the same tokens");
    p = torch::stable::contiguous(
        torch::stable::matmul(
            cast(torch::stable::reshape(*grad_y, {tokens * slices, sizes.n1}), precision),
            lateral_hat));
  } else {
    STD_TORCH_CHECK(
        slices == 1 && tokens == sizes.n1, "tcur: without grad_y, x must be one slice of G");
  }
  const ScalarType compute = compute_dtype(precision);
  Tensor out = torch::stable::new_empty(lateral_hat, {n3, sizes.rank, sizes.rank}, compute);
  if (compute == ScalarType::Double) {
    run<double>(sizes, p, z, slice_index, slices, out);
  } else {
    run<float>(sizes, p, z, slice_index, slices, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, CPU, m) {
  m.impl("core_grad_tokens", TORCH_BOX(&core_grad_tokens));
}

}  // namespace tcur
