// The last tile of columns, which is narrower than the others.

namespace tcur::TCUR_ISA {

// edge: [q, tile] = columns col … col+n of R̂, zeros after them.
template <class T>
TCUR_TARGET void pad_columns(const Factors<T>& f, int64_t col, int64_t n, int64_t tile, T* edge) {
  for (int64_t row = 0; row < f.q(); ++row) {
    for (int64_t j = 0; j < tile; ++j) {
      edge[row * tile + j] = j < n ? f.horizontal_hat[row * f.n2 + col + j] : T(0);
    }
  }
}

}  // namespace tcur::TCUR_ISA
