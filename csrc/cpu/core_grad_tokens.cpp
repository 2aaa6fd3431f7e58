// tcur::core_grad_tokens, CPU: ∂U [n3, rank, rank] from tokens, without an n1 x n2 gradient.
//
// With p = dy Ĉ and z = x R̂ᵀ in the real packed basis, only the diagonal blocks of pᵀz are needed.
// Without R̂, x is already z. Without dy, the tokens are the rows of G = dyᵀx, and p = Ĉ.
// For a pair of planes the block is [[rr, ri], [ir, ii]], and slice l adds
// e^{-2πikl/n3} ((rr - ii) - i (ri + ir)) to ∂Û_k. With adapter_ids, the tokens of each core are
// summed separately. With `packed`, the result is ∂Û itself, not transformed back.
#include "../common/token_products.h"
#include "host.h"
#include "token_cores.h"

namespace tcur {
namespace {

// Tokens per partial sum. They are so few that fp32 sums stay exact enough. The number is fixed, so
// that the result does not depend on the number of threads.
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
  const int64_t k = bin_of(plane);
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
    const CoreGradTokensArguments& a,
    const Sizes& sizes,
    const Tensor& p,  // [tokens, slices * q]
    const Tensor& z,  // [tokens, q]
    const TokensByCore& cores,
    const Tensor& out) {  // [..., n3, rank, rank]
  const int64_t q = sizes.q(), core_size = q * sizes.rank, slices = a.slices;
  const Kernels<T>& k = kernels<T>();
  const CoreBlocks blocks = core_blocks(sizes.n3, sizes.rank, k.lanes);
  const std::vector<TokensByCore::Chunk> chunks = cores.chunks(kTokenChunk);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const TokenRows z_rows = token_rows(z, 0, q);
  std::vector<T> partial(count * slices * blocks.size);
  torch::stable::parallel_for(0, count * slices, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(2 * kTokenGroup * blocks.widest);
    for (int64_t task = begin; task < end; ++task) {
      const TokenRows p_rows = token_rows(p, task % slices * q, slices * q);
      const TokensByCore::Chunk& chunk = chunks[task / slices];
      T* products = partial.data() + task * blocks.size;
      cores.visit(chunk.begin, chunk.end, [&](int64_t, int64_t first, int64_t last) {
        k.core_products(blocks, p_rows, z_rows, first, last, products, scratch.data());
      });
    }
  });

  std::vector<int64_t> starts;  // of the chunks of one core
  for (int64_t chunk = 0; chunk < count; ++chunk) {
    if (chunk == 0 || chunks[chunk].core != chunks[chunk - 1].core) {
      starts.push_back(chunk);
    }
  }
  starts.push_back(count);
  T* grads = out.mutable_data_ptr<T>();
  std::fill_n(grads, out.numel(), T(0));  // a core without tokens keeps these zeros
  const TubeDft<T> dft(sizes.n3);
  const UnitRoots roots(sizes.n3);
  const int64_t used = static_cast<int64_t>(starts.size()) - 1;
  torch::stable::parallel_for(0, used, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> core_hat(core_size);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(core_hat.begin(), core_hat.end(), T(0));
      for (int64_t slice = 0; slice < slices; ++slice) {
        T* total = partial.data() + (starts[i] * slices + slice) * blocks.size;
        for (int64_t chunk = starts[i] + 1; chunk < starts[i + 1]; ++chunk) {
          const T* part = partial.data() + (chunk * slices + slice) * blocks.size;
          for (int64_t j = 0; j < blocks.size; ++j) {
            total[j] += part[j];
          }
        }
        for (const CoreBlock& block : blocks.all) {
          const T* products = total + block.start;
          const int64_t at = a.slice_index + slice;
          add_block(block, roots, sizes.n3, sizes.rank, at, products, core_hat.data());
        }
      }
      T* grad = grads + chunks[starts[i]].core * core_size;
      if (a.packed) {
        std::copy(core_hat.begin(), core_hat.end(), grad);
      } else {
        core_from_spectrum(dft, core_hat.data(), sizes.rank, grad);
      }
    }
  });
}

Tensor core_grad_tokens(const CoreGradTokensArguments& a) {
  const TokenSizes sizes = check_core_grad_tokens(a);
  const Tensor z = torch::stable::contiguous(project_tokens(a, sizes));
  check_element("x", z);
  const Tensor p = project_gradient(a, sizes);
  const TokensByCore cores(TokenCores(sizes.tokens, a.adapter_ids, a.adapters));
  Tensor out = empty_gradient(a, sizes);
  with_compute_type(
      out.scalar_type(), [&](auto number) { run<decltype(number)>(a, sizes, p, z, cores, out); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcur, CPU, m) {
  m.impl("core_grad_tokens", TORCH_BOX(&positional::core_grad_tokens<&core_grad_tokens>));
}

}  // namespace tcur
