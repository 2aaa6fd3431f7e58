// Real DFT along tubes, folded: with E_l = Σ_k cos(2πkl/n3) A_k and O_l = Σ_k sin(2πkl/n3) B_k the
// inverse transform is x_l = E_l - O_l, x_{n3-l} = E_l + O_l, and the forward transform is the same
// two sums over x_l + x_{n3-l} and x_l - x_{n3-l}. That is n3/2 multiplications per output for any
// n3, primes included. `width` tubes lie side by side, a multiple of the vector length.

namespace tcur::TCUR_ISA {

// Rows A_k = a + (k-1)*a_step and B_k = b + (k-1)*b_step, k = 1 … size.
template <class T>
struct FoldedRows {
  const T* a;
  const T* b;
  int64_t a_step, b_step;
};

// LINES outputs l at COLUMNS vectors from column c. Accumulators stay in registers.
template <class T, bool INVERSE, int LINES, int COLUMNS>
TCUR_TARGET inline void dft_lines(
    const FoldedDft<T>& dft,
    const FoldedRows<T>& rows,
    const T* zero,     // the row of l = 0 (forward) or of bin 0 (inverse)
    const T* nyquist,  // the row of l = n3/2 or of bin n3/2; null if n3 is odd
    int64_t l,
    int64_t c,
    int64_t width,
    T* out) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> even[LINES][COLUMNS], odd[LINES][COLUMNS];
  for (int i = 0; i < LINES; ++i) {
    const T sign = (l + i) % 2 == 0 ? T(1) : T(-1);
    for (int v = 0; v < COLUMNS; ++v) {
      even[i][v] = load(zero + c + v * lanes);
      if (nyquist != nullptr) {
        even[i][v] += sign * load(nyquist + c + v * lanes);
      }
      odd[i][v] = Vec<T>{};
    }
  }
  const T* cos = dft.cos.data() + (l - 1) * dft.size;
  const T* sin = dft.sin.data() + (l - 1) * dft.size;
  for (int64_t k = 0; k < dft.size; ++k) {
    const T* a = rows.a + k * rows.a_step + c;
    const T* b = rows.b + k * rows.b_step + c;
    for (int v = 0; v < COLUMNS; ++v) {
      const Vec<T> av = load(a + v * lanes), bv = load(b + v * lanes);
      for (int i = 0; i < LINES; ++i) {
        even[i][v] += cos[i * dft.size + k] * av;
        odd[i][v] += sin[i * dft.size + k] * bv;
      }
    }
  }
  for (int i = 0; i < LINES; ++i) {
    const int64_t first = INVERSE ? l + i : 2 * (l + i) - 1;
    const int64_t second = INVERSE ? dft.n3 - l - i : 2 * (l + i);
    for (int v = 0; v < COLUMNS; ++v) {
      const Vec<T> e = even[i][v], o = odd[i][v];
      store(out + first * width + c + v * lanes, INVERSE ? Vec<T>(e - o) : e);
      store(out + second * width + c + v * lanes, INVERSE ? Vec<T>(e + o) : Vec<T>(-o));
    }
  }
}

// The outputs that need no sine: l = 0 and, for even n3, l = n3/2.
template <class T>
TCUR_TARGET inline void dft_ends(
    const FoldedDft<T>& dft,
    const FoldedRows<T>& rows,
    const T* zero,
    const T* nyquist,
    int64_t c,
    T* first,
    T* middle) {
  const Vec<T> start = load(zero + c);
  Vec<T> all = start, alternating = start;
  for (int64_t k = 1; k <= dft.size; ++k) {
    const Vec<T> a = load(rows.a + (k - 1) * rows.a_step + c);
    all += a;
    alternating += k % 2 == 0 ? a : Vec<T>(-a);
  }
  if (nyquist != nullptr) {
    const Vec<T> last = load(nyquist + c);
    all += last;
    alternating += (dft.n3 / 2) % 2 == 0 ? last : Vec<T>(-last);
    store(middle + c, alternating);
  }
  store(first + c, all);
}

template <class T, bool INVERSE>
TCUR_TARGET inline void dft_folded(
    const FoldedDft<T>& dft,
    const FoldedRows<T>& rows,
    const T* zero,
    const T* nyquist,
    int64_t width,
    T* out) {
  // With 32 registers 3 x 4 x 2 accumulators leave room for the operands, with 16 only 2 x 2 x 2.
  constexpr int lines = TCUR_REGISTERS == 32 ? 3 : 2;
  constexpr int columns = TCUR_REGISTERS == 32 ? 4 : 2;
  constexpr int lanes = Simd<T>::lanes;
  const int64_t middle = INVERSE ? dft.n3 / 2 : dft.n3 - 1;
  for (int64_t c = 0; c < width; c += lanes) {
    dft_ends(dft, rows, zero, nyquist, c, out, out + middle * width);
  }
  int64_t l = 1;
  for (; l + lines <= dft.size + 1; l += lines) {
    int64_t c = 0;
    for (; c + columns * lanes <= width; c += columns * lanes) {
      dft_lines<T, INVERSE, lines, columns>(dft, rows, zero, nyquist, l, c, width, out);
    }
    for (; c < width; c += lanes) {
      dft_lines<T, INVERSE, lines, 1>(dft, rows, zero, nyquist, l, c, width, out);
    }
  }
  for (; l <= dft.size; ++l) {
    for (int64_t c = 0; c < width; c += lanes) {
      dft_lines<T, INVERSE, 1, 1>(dft, rows, zero, nyquist, l, c, width, out);
    }
  }
}

// planes: [n3, width] packed spectrum -> tubes: [n3, width]; unscaled, the weights 1/n3 and 2/n3
// are already in the planes.
template <class T>
TCUR_TARGET void inverse_dft(const FoldedDft<T>& dft, const T* planes, int64_t width, T* tubes) {
  const T* nyquist = has_nyquist(dft.n3) ? planes + (dft.n3 - 1) * width : nullptr;
  const FoldedRows<T> rows{planes + width, planes + 2 * width, 2 * width, 2 * width};
  dft_folded<T, true>(dft, rows, planes, nyquist, width, tubes);
}

// tubes: [n3, width] -> planes: [n3, width] packed spectrum. Overwrites tubes.
template <class T>
TCUR_TARGET void forward_dft(const FoldedDft<T>& dft, T* tubes, int64_t width, T* planes) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t l = 1; l <= dft.size; ++l) {
    T* low = tubes + l * width;
    T* high = tubes + (dft.n3 - l) * width;
    for (int64_t c = 0; c < width; c += lanes) {
      const Vec<T> a = load(low + c), b = load(high + c);
      store(low + c, Vec<T>(a + b));
      store(high + c, Vec<T>(a - b));
    }
  }
  const T* nyquist = has_nyquist(dft.n3) ? tubes + dft.n3 / 2 * width : nullptr;
  const FoldedRows<T> rows{tubes + width, tubes + (dft.n3 - 1) * width, width, -width};
  dft_folded<T, false>(dft, rows, tubes, nyquist, width, planes);
}

}  // namespace tcur::TCUR_ISA
