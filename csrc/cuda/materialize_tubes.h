// Computes W_eff for a length of two short factors and a short rank, all in fp32 registers.
//
// A thread computes S_k = P_k R̂_k for the bins of one k1, some rows and four columns. This takes
// 2*rank fp32 multiplications for each number of W_eff. The thread immediately does the inner step
// on the results. The numbers then pass once through shared memory to other threads. These do the
// outer step, add the base to its outputs in registers, and write W_eff. While they wait for
// memory, other blocks of the multiprocessor compute. When a block begins, it can prefetch its base
// into the second-level cache.
#pragma once

#include "dft.h"
#include "materialize.h"
#include "tubes_in_registers.h"

#include <utility>

namespace tcur {

// A position of a slice. Its row and column fit into 32 bits, and so does its offset in a slice
// with a matrix of its own (`fits_tubes`).
struct Spot {
  unsigned row_start, column;

  // The offset within slice l. BESIDE: slices may lie side by side in a matrix.
  template <bool BESIDE>
  TCUR_DEVICE unsigned within(const MaterializeArgs& args, int l) const {
    return (BESIDE ? row_start * args.beside[l].count : row_start) + column;
  }
};

// Which tile the block computes.
struct TilePlace {
  unsigned row, column;  // counted in tiles

  TCUR_DEVICE explicit TilePlace(const MaterializeArgs& args) {
    const int block = concealed(static_cast<int>(blockIdx.x));
    row = args.tiles_in_row.quotient(block);
    column = block - row * args.tiles_in_row.value;
  }
};

// Prefetches a tile of all bases.
template <int BYTES, bool BESIDE, int N3>
TCUR_DEVICE void prefetch_bases(const MaterializeArgs& args, const TilePlace& tile) {
  using T = Tubes<N3>;
  constexpr unsigned kLine = 128 / BYTES, kInRow = ceil_div(T::kColumns, 128 / BYTES);
  constexpr unsigned kInBase = T::kRows * kInRow;
  const auto n1 = static_cast<unsigned>(args.n1), n2 = static_cast<unsigned>(args.n2);
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < N3 * kInBase; i += T::kThreads) {
    const unsigned l = i / kInBase, at = i % kInBase;
    const unsigned r = tile.row * T::kRows + at / kInRow;
    const unsigned c = tile.column * T::kColumns + at % kInRow * kLine;
    if (r < n1 && c < n2) {
      const Spot spot{r * n2, c};
      prefetch(behind<BYTES>(args.base[l], spot.within<BESIDE>(args, l)));
    }
  }
}

// What a thread holds: S_k = P_k R̂_k for the bins of one k1 at its rows and four columns. It
// computes them first, and then does the inner step on them.
template <int N3>
class Formed {
  using T = Tubes<N3>;
  static constexpr int kInner = T::kInner, kOuter = T::kOuter, kTall = T::kTall;

 public:
  // Adds the products of one staged quad of the rank.
  TCUR_DEVICE void add(int k1, const float* staged) {
    const Operands operands{
        {staged + T::inner_column()},
        staged + Staged<Tubes<N3>, true>::kRight + 4 * T::inner_row()};
    if (k1 == 0) {
      add_real_tubes<true>(operands, re_);
      if constexpr (kOuter % 2 == 0) {
        add_real_tubes<false>(operands, im_);
      }
    } else {
      // Planes are counted from the plane of bin k1, or from that of bin -k1.
      const Operands forward = operands.from_bin(k1), backward = operands.from_bin(-k1);
      static_for<kInner>([&](auto k2) __attribute__((always_inline)) {
        constexpr int plane = pair_plane(N3, kOuter * k2);
        add_pair<plane>(2 * k2 >= kInner ? backward : forward, re_[k2], im_[k2]);
      });
    }
  }

  // Does the inner step and writes the planes to `rows`, the shared memory of the tile.
  TCUR_DEVICE void transform(int k1, const Tables& tables, float* rows) {
    float* to = rows + T::inner_row() * T::kColumns + T::inner_column();
    if (k1 == 0) {
      transform_real_tubes<true>(to, re_);
      if constexpr (kOuter % 2 == 0) {
        transform_real_tubes<false>(to, im_);
      }
    } else {
      transform_pairs(k1, tables, to);
    }
  }

 private:
  struct Operands {
    HorizontalQuad<T> r;
    const float* p;

    TCUR_DEVICE Operands from_bin(int bin) const {
      return {r.from_bin(bin), p + bin * (2 * 4 * T::kRows)};
    }
    template <int PLANE>
    TCUR_DEVICE Quad left(int m) const {
      return load_lanes<4>(p + (PLANE * T::kRows + m * T::kRowStep) * 4);
    }
  };

  // re + i im += P_k R̂_k for the pair of planes of a bin.
  template <int PLANE>
  TCUR_DEVICE static void add_pair(const Operands& operands, Quad (&re)[kTall], Quad (&im)[kTall]) {
    Quad p_re[kTall], p_im[kTall];
    static_for<kTall>([&](auto m) __attribute__((always_inline)) {
      p_re[m] = operands.template left<PLANE>(m);
      p_im[m] = operands.template left<PLANE + 1>(m);
    });
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Quad r_re = operands.r.template row<PLANE>(i);
      const Quad r_im = operands.r.template row<PLANE + 1>(i);
#pragma unroll
      for (int m = 0; m < kTall; ++m) {
        re[m] = re[m] + p_re[m].v[i] * r_re - p_im[m].v[i] * r_im;
        im[m] = im[m] + p_re[m].v[i] * r_im + p_im[m].v[i] * r_re;
      }
    }
  }
  // The same for a real bin.
  template <int PLANE>
  TCUR_DEVICE static void add_real(const Operands& operands, Quad (&x)[kTall]) {
    Quad p_re[kTall];
    static_for<kTall>(
        [&](auto m) __attribute__((always_inline)) { p_re[m] = operands.template left<PLANE>(m); });
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Quad r_re = operands.r.template row<PLANE>(i);
#pragma unroll
      for (int m = 0; m < kTall; ++m) {
        x[m] = x[m] + p_re[m].v[i] * r_re;
      }
    }
  }

  // For k1 = 0 (FIRST) and k1 = outer/2 the tubes are real, and x holds their packed half spectra.
  template <bool FIRST>
  TCUR_DEVICE static constexpr int plane_of(int i) {
    return FIRST ? first_plane(kOuter, i) : last_plane(kOuter, i);
  }
  template <bool FIRST>
  TCUR_DEVICE static void add_real_tubes(const Operands& operands, Quad (&x)[kInner][kTall]) {
    static_for<kInner>([&](auto i) __attribute__((always_inline)) {
      if constexpr (is_real_bin<N3, FIRST>(i)) {
        add_real<plane_of<FIRST>(i)>(operands, x[i]);
      } else if constexpr (is_real_part<N3, FIRST>(i)) {
        add_pair<plane_of<FIRST>(i)>(operands, x[i], x[i + 1]);
      }
    });
  }
  template <bool FIRST>
  TCUR_DEVICE static void transform_real_tubes(float* to, Quad (&x)[kInner][kTall]) {
    static_for<kTall>([&](auto m) __attribute__((always_inline)) {
      static_for<2>([&](auto half) __attribute__((always_inline)) {
        Pair y[kInner];
        static_for<kInner>(
            [&](auto i) __attribute__((always_inline)) { y[i] = x[i][m].template half<half>(); });
        FIRST ? real_inverse<kInner, float>(y) : shifted_inverse<kInner, float>(y);
        static_for<kInner>(
            [&](auto i) __attribute__((always_inline)) { x[i][m].template half<half>(y[i]); });
      });
      static_for<kInner>([&](auto i) __attribute__((always_inline)) {
        constexpr int at = plane_of<FIRST>(i) * T::kPositions + m * T::kRowStep * T::kColumns;
        store_lanes(to + at, x[i][m]);
      });
    });
  }

  TCUR_DEVICE void transform_pairs(int k1, const Tables& tables, float* to) {
    float *forward = to + k1 * (2 * T::kPositions), *backward = to - k1 * (2 * T::kPositions);
    static_for<kTall>([&](auto m) __attribute__((always_inline)) {
      static_for<2>([&](auto half) __attribute__((always_inline)) {
        Pair a[kInner], b[kInner];
        static_for<kInner>([&](auto k2) __attribute__((always_inline)) {
          a[k2] = re_[k2][m].template half<half>();
          b[k2] = im_[k2][m].template half<half>();
          b[k2] = 2 * k2 >= kInner ? -b[k2] : b[k2];  // stored as n3 - bin, conjugate
        });
        complex_inverse<kInner, float>(a, b);
        static_for<kInner>([&](auto l0) __attribute__((always_inline)) {
          if constexpr (l0 > 0) {
            const float2 root = tables.root(k1 * l0);
            const Pair x = a[l0], y = b[l0];
            a[l0] = root.x * x - root.y * y;
            b[l0] = root.x * y + root.y * x;
          }
          re_[l0][m].template half<half>(a[l0]);
          im_[l0][m].template half<half>(b[l0]);
        });
      });
      static_for<kInner>([&](auto k2) __attribute__((always_inline)) {
        constexpr int at =
            pair_plane(N3, kOuter * k2) * T::kPositions + m * T::kRowStep * T::kColumns;
        float* plane = (2 * k2 >= kInner ? backward : forward) + at;
        store_lanes(plane, re_[k2][m]);
        store_lanes(plane + T::kPositions, im_[k2][m]);
      });
    });
  }

  // S of the bins outer * k2 + k1. For k1 = 0, re_ holds the real tubes of k1 = 0, and im_ those of
  // k1 = outer/2.
  Quad re_[kInner][kTall] = {}, im_[kInner][kTall] = {};
};

// x += the bases of slices l0, l0 + inner, … The thread loads all of them before it uses the first.
template <int BYTES, bool BESIDE, int N3>
TCUR_DEVICE void add_bases(
    const MaterializeArgs& args,
    Element element,
    int l0,
    const Spot& spot,
    Lanes<Tubes<N3>::kWide> (&x)[Tubes<N3>::kOuter]) {
  using T = Tubes<N3>;
  using Several = Raw<BYTES, T::kWide>;
  typename Several::Type raw[T::kOuter];
#pragma unroll
  for (int j = 0; j < T::kOuter; ++j) {
    const int l = l0 + T::kInner * j;
    raw[j] = Several::load(behind<BYTES>(args.base[l], spot.within<BESIDE>(args, l)));
  }
#pragma unroll
  for (int j = 0; j < T::kOuter; ++j) {
    x[j] = x[j] + Several::widened(raw[j], element);
  }
}

template <int BYTES, bool BESIDE, int N3>
TCUR_DEVICE void store_slices_of(
    const MaterializeArgs& args,
    Element element,
    int l0,
    const Spot& spot,
    const Lanes<Tubes<N3>::kWide> (&x)[Tubes<N3>::kOuter]) {
  using T = Tubes<N3>;
  using Several = Raw<BYTES, T::kWide>;
  // In units of four numbers, the distance of two slices of a thread fits into 32 bits.
  const unsigned slice = static_cast<unsigned>(args.n1) * static_cast<unsigned>(args.n2) / 4;
  char* to = behind<BYTES>(behind<4 * BYTES>(args.out, l0 * slice), spot.within<false>(args, l0));
#pragma unroll
  for (int j = 0; j < T::kOuter; ++j) {
    const int l = l0 + T::kInner * j;
    if constexpr (BESIDE) {
      char* first = static_cast<char*>(args.out) + args.first(l, l) * BYTES;
      to = behind<BYTES>(first, spot.within<true>(args, l));
    }
    Several::store(to, Several::narrowed(x[j], element));
    to = behind<4 * BYTES>(to, T::kInner * slice);
  }
}

// Does the outer step: reads the middle planes of a tile from shared memory and writes W_eff.
template <bool BESIDE, int N3>
TCUR_DEVICE void write_tile(const MaterializeArgs& args, const float* rows) {
  using T = Tubes<N3>;
  const auto n1 = static_cast<unsigned>(args.n1), n2 = static_cast<unsigned>(args.n2);
  const TilePlace tile(args);
  T::template for_outer<BESIDE>([&](int l0, int row, int column) __attribute__((always_inline)) {
    const unsigned r = tile.row * T::kRows + row, c = tile.column * T::kColumns + column;
    if (r >= n1 || c >= n2) {
      return;
    }
    Lanes<T::kWide> x[T::kOuter];
    const float* from = rows + row * T::kColumns + column;
    for_middle_rows<T::kOuter>(N3, l0, [&](int j, int plane) __attribute__((always_inline)) {
      x[j] = load_lanes<T::kWide>(from + plane * T::kPositions);
    });
    real_inverse<T::kOuter, float>(x);
    const Spot spot{r * n2, c};
    if (args.base_element != Element::none) {
      with_number(
          args.base_element, [&](auto bytes, Element element) __attribute__((always_inline)) {
            add_bases<bytes, BESIDE, N3>(args, element, l0, spot, x);
          });
    }
    with_number(args.out_element, [&](auto bytes, Element element) __attribute__((always_inline)) {
      store_slices_of<bytes, BESIDE, N3>(args, element, l0, spot, x);
    });
  });
}

// How many quads of the rank are staged at a time.
template <int N3>
struct Stages {
  using T = Tubes<N3>;
  static constexpr int kQuad = Staged<Tubes<N3>, true>::kFloats;
  static constexpr int kQuads = 4 * (T::kTileFloats + 2 * kQuad) <= T::kMostBytes ? 2 : 1;
  static constexpr int kBytes = 4 * (T::kTileFloats + kQuads * kQuad);
};

template <int N3>
TCUR_KERNEL(Tubes<N3>::kThreads, Tubes<N3>::kBlocks)
materialize_tubes_kernel(const TCUR_PARAMETER MaterializeArgs args) {
  using T = Tubes<N3>;
  constexpr int kQuads = Stages<N3>::kQuads, kQuad = Stages<N3>::kQuad;
  float* rows = shared_memory<float>();
  float* staged = rows + T::kTileFloats;
  if (args.prefetches) {
    const TilePlace tile(args);
    with_bytes(args.base_element, [&](auto bytes) __attribute__((always_inline)) {
      if (args.side_by_side) {
        prefetch_bases<bytes, true, N3>(args, tile);
      } else {
        prefetch_bases<bytes, false, N3>(args, tile);
      }
    });
  }
  using Quads = Staged<Tubes<N3>, true>;
  wait_for_launch_before();  // the previous launch makes P and R̂
  const int k1 = T::turn();
  {
    Formed<N3> planes;
#pragma unroll 1
    for (int quad = 0; quad < args.quads; ++quad) {
      if (quad % kQuads == 0) {
        const TilePlace tile(args);
        const unsigned first_left = tile.row * args.quads + quad;
        const unsigned first_right = tile.column * args.quads + quad;
        if (quad > 0) {
          __syncthreads();
        }
        Quads::ask(
            args.horizontal_hat + static_cast<uint64_t>(first_right) * Quads::kRight,
            args.mixed + static_cast<uint64_t>(first_left) * Quads::kLeft,
            args.quads - quad < kQuads ? args.quads - quad : kQuads,
            staged);
        wait_for_copies();
        __syncthreads();
      }
      planes.add(k1, staged + quad % kQuads * kQuad);
    }
    planes.transform(k1, args.tables, rows);
  }
  __syncthreads();
  if (args.side_by_side) {  // compiled separately, so that other stacks pay nothing for it
    write_tile<true, N3>(args, rows);
  } else {
    write_tile<false, N3>(args, rows);
  }
}

template <int PART, int N3>
TubesKernel tubes_kernel() {
  if constexpr (has_tubes(N3) && tubes_part(N3) == PART) {
    using T = Tubes<N3>;
    return {&materialize_tubes_kernel<N3>, T::kRows, T::kColumns, T::kThreads, Stages<N3>::kBytes};
  } else {
    return {};
  }
}

template <int PART, int... I>
TubesKernel tubes_kernel_of(int64_t n3, std::integer_sequence<int, I...>) {
  static constexpr TubesKernel (*all[])() = {&tubes_kernel<PART, I>...};
  return all[n3]();
}

}  // namespace tcur
