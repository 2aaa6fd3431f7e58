// tcur::core_grad_tokens, CPU: ∂U [n3, rank, rank] from tokens, without an n1 x n2 gradient.
//
// With p = dy Ĉ and z = x R̂ᵀ in the packed basis, p of slice l turned by e^{2πikl/n3}:
//
//     ∂Û_k = conj(Σ_tokens (Σ_l e^{2πikl/n3} p_lk) z_kᵀ)
//
// Without R̂, x is already z. Without dy, the tokens are the rows of G = dyᵀx, and p = Ĉ. With
// adapter_ids, the tokens of each core are summed separately. With `packed`, the result is ∂Û
// itself, not transformed back.
#include "../common/token_products.h"
#include "host.h"
#include "token_cores.h"

namespace tcur {
namespace {

// Tokens per partial sum. They are so few that fp32 sums stay exact enough. The number is fixed, so
// that the result does not depend on the number of threads.
constexpr int64_t kTokenChunk = 256;

template <class T>
void run(
    const CoreGradTokensArguments& a,
    const Sizes& sizes,
    const Tensor& p,  // [tokens, slices * q]
    const Tensor& z,  // [tokens, q]
    const TokensByCore& cores,
    const Tensor& out) {  // [..., n3, rank, rank]
  const int64_t n3 = sizes.n3, rank = sizes.rank, q = sizes.q(), core_size = q * rank;
  const Kernels<T>& k = kernels<T>();
  const std::shared_ptr<const TubeDft<T>> dft = tube_dft<T>(n3);
  const std::vector<T> turns =
      slice_turns<T>(n3, a.slice_index, a.slices, false, [](int64_t) { return 1.0; });
  const TokenBasis<T> basis{n3, rank, a.slices, k.lanes, turns.data(), dft.get()};
  const TokenRows p_rows = token_rows(p, 0, a.slices * q), z_rows = token_rows(z, 0, q);
  const std::vector<TokensByCore::Chunk> chunks = cores.chunks(kTokenChunk);
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<int64_t> starts;  // of the chunks of one core
  for (int64_t chunk = 0; chunk < count; ++chunk) {
    if (chunk == 0 || chunks[chunk].core != chunks[chunk - 1].core) {
      starts.push_back(chunk);
    }
  }
  const int64_t used = static_cast<int64_t>(starts.size());
  starts.push_back(count);
  T* grads = out.mutable_data_ptr<T>();
  if (used * core_size < out.numel()) {
    std::fill_n(grads, out.numel(), T(0));  // a core without tokens keeps these zeros
  }

  // The first chunk of a core goes where its gradient belongs, and the others are added later.
  Scratch<T> others((count - used) * core_size);
  std::vector<T*> sums(count);
  for (int64_t i = 0, other = 0; i < used; ++i) {
    sums[starts[i]] = grads + chunks[starts[i]].core * core_size;
    for (int64_t chunk = starts[i] + 1; chunk < starts[i + 1]; ++chunk) {
      sums[chunk] = others.data() + other++ * core_size;
    }
  }
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const int64_t stride = basis.padded_rank();
    Scratch<T> scratch(basis.scratch()), products(q * stride);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      bool accumulate = false;
      cores.visit(
          chunks[chunk].begin, chunks[chunk].end, [&](int64_t, int64_t first, int64_t last) {
            T* target = products.data();
            k.core_products(basis, p_rows, z_rows, first, last, accumulate, target, scratch.data());
            accumulate = true;
          });
      for (int64_t row = 0; row < q; ++row) {
        std::copy_n(products.data() + row * stride, rank, sums[chunk] + row * rank);
      }
    }
  });
  torch::stable::parallel_for(0, used, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* total = sums[starts[i]];
      for (int64_t chunk = starts[i] + 1; chunk < starts[i + 1]; ++chunk) {
        for (int64_t j = 0; j < core_size; ++j) {
          total[j] += sums[chunk][j];
        }
      }
      if (!a.packed) {
        core_from_spectrum(*dft, total, rank, total);
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
