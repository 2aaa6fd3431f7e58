// Computes Ĝ_k R̂_kᴴ for a length of two short factors and a short rank. It is the adjoint of
// materialize_tubes.h, and everything happens in fp32 registers.
//
// A thread reads OUTER slices of a few columns of G and does the outer step on them. The numbers
// then pass through shared memory to other threads. There a thread does the inner step for the bins
// of one k1, a few rows and four columns, and immediately multiplies the results with R̂. The
// threads of a row divide the sums over its columns among them. Each keeps some of the sums in
// registers until the block has walked over all of its tiles.
#pragma once

#include "core_grad_dense.h"
#include "dft.h"
#include "tubes_in_registers.h"

namespace tcur {

// Quads of the rank that one launch takes. There are few, because each thread keeps its sums in
// registers.
constexpr int kQuadsOfLaunch = 2;

// Sums over the columns of a tile. Each of the LANES threads of a row has eight sums over its own
// columns. Together they add these up, and each thread keeps kKept of the eight totals.
template <int LANES>
struct RowSums {
  static constexpr int kSums = 8, kKept = LANES < kSums ? kSums / LANES : 1;

  // Index of the first total that this thread keeps.
  TCUR_DEVICE static int first() {
    int first = 0;
    static_for<3>([&](auto step) __attribute__((always_inline)) {
      constexpr int bit = 1 << step;
      first += bit < LANES && (threadIdx.x & bit) != 0 ? kSums / 2 >> step : 0;
    });
    return first;
  }

  // At each step two threads exchange halves of the sums that are left.
  TCUR_DEVICE static void add(float (&s)[kSums], float (&kept)[kKept]) {
    static_for<4>([&](auto step) __attribute__((always_inline)) {
      constexpr int bit = 1 << step, left = kSums >> (step + 1);
      if constexpr (bit < LANES && left > 0) {
        const bool is_upper = (threadIdx.x & bit) != 0;
#pragma unroll
        for (int i = 0; i < left; ++i) {
          const float sent = is_upper ? s[i] : s[i + left];
          s[i] = (is_upper ? s[i + left] : s[i]) + exchange(sent, bit);
        }
      } else if constexpr (bit < LANES) {
        s[0] += exchange(s[0], bit);
      }
    });
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      kept[i] += s[i];
    }
  }
};

// What a thread holds: Ĝ_k for the bins of one k1 at its rows and four columns, and its share of
// the sums Ĝ_k R̂_kᴴ over all columns that the block walks over.
template <int N3>
class Projected {
  using T = ForwardTubes<N3>;
  static constexpr int kInner = T::kInner, kOuter = T::kOuter, kTall = T::kTall;
  using Row = RowSums<T::kColumns / 4>;

 public:
  // Reads from `rows` what the outer step wrote there, and does the inner step.
  TCUR_DEVICE void transform(int k1, const Tables& tables, const float* rows) {
    const float* from = rows + T::inner_row() * T::kColumns + T::inner_column();
    if (k1 == 0) {
      transform_real_tubes<true>(from, re_);
      if constexpr (kOuter % 2 == 0) {
        transform_real_tubes<false>(from, im_);
      }
    } else {
      transform_pairs(k1, tables, from);
    }
  }

  // Adds the products with one staged quad of the rank, which is number QUAD of this launch.
  template <int QUAD>
  TCUR_DEVICE void add(int k1, const float* staged) {
    const HorizontalQuad<T> r{staged + T::inner_column()};
    if (k1 == 0) {
      add_real_tubes<true>(r, re_, sums_[QUAD]);
      if constexpr (kOuter % 2 == 0) {
        add_real_tubes<false>(r, im_, sums_[QUAD]);
      }
    } else {
      const HorizontalQuad<T> forward = r.from_bin(k1), backward = r.from_bin(-k1);
      static_for<kInner>([&](auto k2) __attribute__((always_inline)) {
        constexpr int plane = pair_plane(N3, kOuter * k2);
        const HorizontalQuad<T>& rows = 2 * k2 >= kInner ? backward : forward;
        static_for<kTall>([&](auto m) __attribute__((always_inline)) {
          add_pair<plane>(rows, re_[k2][m], im_[k2][m], sums_[QUAD][k2][m]);
        });
      });
    }
  }

  // Writes the sums to z [n1, n3*rank]. `z` points to the first row of the tile, `rows` rows remain
  // from there, and `first` is the first rank index of this launch.
  TCUR_DEVICE void store(int k1, float* z, int64_t rows, int rank, int first) const {
    static_for<kQuadsOfLaunch>([&](auto quad) __attribute__((always_inline)) {
      const auto store_bin = [&](int slot, int plane, bool is_pair) __attribute__((always_inline)) {
        static_for<kTall>([&](auto m) __attribute__((always_inline)) {
          const int row = T::inner_row() + m * T::kRowStep;
#pragma unroll
          for (int i = 0; i < Row::kKept; ++i) {
            const int sum = Row::first() + i, part = sum / 4, b = first + 4 * quad + sum % 4;
            if (row < rows && b < rank && (is_pair || part == 0)) {
              z[(static_cast<int64_t>(row) * N3 + plane + part) * rank + b] =
                  sums_[quad][slot][m][i];
            }
          }
        });
      };
      if (k1 == 0) {
        static_for<kInner>([&](auto i) __attribute__((always_inline)) {
          constexpr bool is_real = is_real_bin<N3, true>(i);
          if constexpr (is_real || is_real_part<N3, true>(i)) {
            store_bin(slot_of<true>(i), plane_of<true>(i), !is_real);
          }
          if constexpr (kOuter % 2 == 0) {
            constexpr bool is_last = is_real_bin<N3, false>(i);
            if constexpr (is_last || is_real_part<N3, false>(i)) {
              store_bin(slot_of<false>(i), plane_of<false>(i), !is_last);
            }
          }
        });
      } else {
        static_for<kInner>([&](auto k2) __attribute__((always_inline)) {
          store_bin(k2, pair_plane(N3, kOuter * k2 + k1), true);
        });
      }
    });
  }

 private:
  // For number i of a real tube, k1 = 0 (FIRST) or outer/2: its plane, and the slot of its sums.
  template <bool FIRST>
  TCUR_DEVICE static constexpr int plane_of(int i) {
    return FIRST ? first_plane(kOuter, i) : last_plane(kOuter, i);
  }
  template <bool FIRST>
  TCUR_DEVICE static constexpr int slot_of(int i) {
    return FIRST ? (i + 1) / 2 : kInner / 2 + 1 + i / 2;
  }

  template <bool FIRST>
  TCUR_DEVICE static void transform_real_tubes(const float* from, Quad (&x)[kInner][kTall]) {
    static_for<kTall>([&](auto m) __attribute__((always_inline)) {
      static_for<kInner>([&](auto i) __attribute__((always_inline)) {
        constexpr int at = plane_of<FIRST>(i) * T::kPositions + m * T::kRowStep * T::kColumns;
        x[i][m] = load_lanes<4>(from + at);
      });
      static_for<2>([&](auto half) __attribute__((always_inline)) {
        Pair y[kInner];
        static_for<kInner>(
            [&](auto i) __attribute__((always_inline)) { y[i] = x[i][m].template half<half>(); });
        FIRST ? real_forward<kInner, float>(y) : shifted_forward<kInner, float>(y);
        static_for<kInner>(
            [&](auto i) __attribute__((always_inline)) { x[i][m].template half<half>(y[i]); });
      });
    });
  }

  TCUR_DEVICE void transform_pairs(int k1, const Tables& tables, const float* from) {
    const float* forward = from + k1 * (2 * T::kPositions);
    const float* backward = from - k1 * (2 * T::kPositions);
    static_for<kTall>([&](auto m) __attribute__((always_inline)) {
      static_for<kInner>([&](auto l0) __attribute__((always_inline)) {
        constexpr int at =
            pair_plane(N3, kOuter * l0) * T::kPositions + m * T::kRowStep * T::kColumns;
        const float* plane = (2 * l0 >= kInner ? backward : forward) + at;
        re_[l0][m] = load_lanes<4>(plane);
        im_[l0][m] = load_lanes<4>(plane + T::kPositions);
      });
      static_for<2>([&](auto half) __attribute__((always_inline)) {
        Pair a[kInner], b[kInner];
        static_for<kInner>([&](auto l0) __attribute__((always_inline)) {
          a[l0] = re_[l0][m].template half<half>();
          b[l0] = im_[l0][m].template half<half>();
          if constexpr (l0 > 0) {
            const float2 root = tables.root(k1 * l0);
            const Pair x = a[l0], y = b[l0];
            a[l0] = root.x * x + root.y * y;
            b[l0] = root.x * y - root.y * x;
          }
        });
        complex_inverse<kInner, float>(b, a);  // exchanging re and im: the forward transform
        static_for<kInner>([&](auto k2) __attribute__((always_inline)) {
          re_[k2][m].template half<half>(a[k2]);
          // Bins of the second half are stored as n3 - bin, conjugate.
          im_[k2][m].template half<half>(2 * k2 >= kInner ? -b[k2] : b[k2]);
        });
      });
    });
  }

  TCUR_DEVICE static float dot(const Quad& x, const Quad& y, float sum) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum += x.v[i] * y.v[i];
    }
    return sum;
  }

  // The conjugate of Ĝ_k R̂_kᴴ: re = G_re R_reᵀ + G_im R_imᵀ, im = G_re R_imᵀ - G_im R_reᵀ.
  template <int PLANE>
  TCUR_DEVICE static void add_pair(
      const HorizontalQuad<T>& r, const Quad& re, const Quad& im, float (&kept)[Row::kKept]) {
    float s[Row::kSums];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Quad r_re = r.template row<PLANE>(i), r_im = r.template row<PLANE + 1>(i);
      s[i] = dot(im, r_im, dot(re, r_re, 0.0f));
      s[4 + i] = dot(re, r_im, -dot(im, r_re, 0.0f));
    }
    Row::add(s, kept);
  }
  template <int PLANE>
  TCUR_DEVICE static void add_real(
      const HorizontalQuad<T>& r, const Quad& x, float (&kept)[Row::kKept]) {
    float s[Row::kSums] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] = dot(x, r.template row<PLANE>(i), 0.0f);
    }
    Row::add(s, kept);
  }
  template <bool FIRST>
  TCUR_DEVICE static void add_real_tubes(
      const HorizontalQuad<T>& r,
      const Quad (&x)[kInner][kTall],
      float (&sums)[kInner + 1][kTall][Row::kKept]) {
    static_for<kTall>([&](auto m) __attribute__((always_inline)) {
      static_for<kInner>([&](auto i) __attribute__((always_inline)) {
        constexpr int plane = plane_of<FIRST>(i), slot = slot_of<FIRST>(i);
        if constexpr (is_real_bin<N3, FIRST>(i)) {
          add_real<plane>(r, x[i][m], sums[slot][m]);
        } else if constexpr (is_real_part<N3, FIRST>(i)) {
          add_pair<plane>(r, x[i][m], x[i + 1][m], sums[slot][m]);
        }
      });
    });
  }

  // Ĝ of the bins outer * k2 + k1. For k1 = 0, re_ holds the real tubes of k1 = 0, and im_ those of
  // k1 = outer/2.
  Quad re_[kInner][kTall], im_[kInner][kTall];
  float sums_[kQuadsOfLaunch][kInner + 1][kTall][Row::kKept] = {};
};

// Reads a few columns of OUTER slices of G, does the outer step on them, and writes the results to
// shared memory. `from` is their first number in slice l0, or null if it is not inside the slice.
template <int BYTES, int N3>
TCUR_DEVICE void read_slices(
    const ProjectArgs& args, Element element, int l0, const char* from, float* to) {
  using T = ForwardTubes<N3>;
  using Several = Raw<BYTES, T::kWide>;
  Lanes<T::kWide> x[T::kOuter] = {};
  if (from != nullptr) {
    // In units of four numbers, the distance of two slices of a thread fits into 32 bits.
    const unsigned slice = static_cast<unsigned>(args.n1) * static_cast<unsigned>(args.n2) / 4;
    from = behind<4 * BYTES>(from, l0 * slice);
    typename Several::Type raw[T::kOuter];
#pragma unroll
    for (int j = 0; j < T::kOuter; ++j) {
      raw[j] = Several::load(from);
      from = behind<4 * BYTES>(from, T::kInner * slice);
    }
#pragma unroll
    for (int j = 0; j < T::kOuter; ++j) {
      x[j] = Several::widened(raw[j], element);
    }
  }
  real_forward<T::kOuter, float>(x);
  for_middle_rows<T::kOuter>(N3, l0, [&](int j, int plane) __attribute__((always_inline)) {
    store_lanes(to + plane * T::kPositions, x[j]);
  });
}

// Prefetches a tile of all slices.
template <int BYTES, int N3>
TCUR_DEVICE void prefetch_slices(const ProjectArgs& args, unsigned row, unsigned column) {
  using T = ForwardTubes<N3>;
  constexpr unsigned kLine = 128 / BYTES, kInRow = ceil_div(T::kColumns, 128 / BYTES);
  constexpr unsigned kInSlice = T::kRows * kInRow;
  const auto n1 = static_cast<unsigned>(args.n1), n2 = static_cast<unsigned>(args.n2);
  const unsigned slice = static_cast<unsigned>(args.n1) * static_cast<unsigned>(args.n2) / 4;
#pragma unroll
  for (unsigned i = threadIdx.x; i < N3 * kInSlice; i += T::kThreads) {
    const unsigned l = i / kInSlice, at = i % kInSlice;
    const unsigned r = row + at / kInRow, c = column + at % kInRow * kLine;
    if (r < n1 && c < n2) {
      const char* place = behind<BYTES>(args.grad, r * n2 + c);
      prefetch(place + l * (static_cast<uint64_t>(slice) * (4 * BYTES)));
    }
  }
}

// Shared memory of a block: a tile, and the quads of R̂ that a launch takes.
template <int N3>
struct ProjectStages {
  using T = ForwardTubes<N3>;
  static constexpr int kQuad = Staged<T, false>::kFloats;
  static constexpr int kBytes = 4 * (T::kTileFloats + kQuadsOfLaunch * kQuad);
  static_assert(kBytes <= T::kMostBytes, "a tile leaves room for the quads of a launch");
};

template <int N3>
TCUR_KERNEL(ForwardTubes<N3>::kThreads, ForwardTubes<N3>::kBlocks)
project_tubes_kernel(const TCUR_PARAMETER ProjectArgs args) {
  using T = ForwardTubes<N3>;
  constexpr int kQuad = ProjectStages<N3>::kQuad;
  float* rows = shared_memory<float>();
  float* staged = rows + T::kTileFloats;
  const auto n1 = static_cast<unsigned>(args.n1), n2 = static_cast<unsigned>(args.n2);
  const unsigned row_tile = args.splits.quotient(static_cast<int>(blockIdx.x));
  const unsigned split = blockIdx.x - row_tile * args.splits.value;
  const unsigned first_row = row_tile * T::kRows;
  const int k1 = T::turn();
  const unsigned tiles = args.tiles_per_split;
  const auto prefetch_tile = [&](unsigned first_column) __attribute__((always_inline)) {
    with_bytes(args.element, [&](auto bytes) __attribute__((always_inline)) {
      prefetch_slices<bytes, N3>(args, first_row, first_column);
    });
  };
  prefetch_tile(split * tiles * T::kColumns);
  wait_for_launch_before();  // the previous launch lays out R̂
  const int left = args.quads - args.first_quad;
  const int quads = left < kQuadsOfLaunch ? left : kQuadsOfLaunch;
  Projected<N3> projected;
  for (unsigned tile = split * tiles; tile < (split + 1) * tiles; ++tile) {
    const unsigned first_column = tile * T::kColumns;
    if (first_column >= n2) {
      break;  // all threads leave together
    }
    const int64_t quad = static_cast<int64_t>(tile) * args.quads + args.first_quad;
    Staged<T, false>::ask(args.horizontal_hat + quad * kQuad, nullptr, quads, staged);
    T::for_outer([&](int l0, int row, int column) __attribute__((always_inline)) {
      const unsigned r = first_row + row, c = first_column + column;
      float* to = rows + row * T::kColumns + column;
      with_number(args.element, [&](auto bytes, Element element) __attribute__((always_inline)) {
        const char* from = r < n1 && c < n2 ? behind<bytes>(args.grad, r * n2 + c) : nullptr;
        read_slices<bytes, N3>(args, element, l0, from, to);
      });
    });
    if (tile + 1 < (split + 1) * tiles) {
      prefetch_tile(first_column + T::kColumns);
    }
    wait_for_copies();
    __syncthreads();
    projected.transform(k1, args.tables, rows);
    projected.template add<0>(k1, staged);
    if (quads > 1) {
      projected.template add<1>(k1, staged + kQuad);
    }
    __syncthreads();
  }
  projected.store(
      k1,
      args.z + (static_cast<int64_t>(split) * args.n1 + first_row) * N3 * args.rank,
      args.n1 - first_row,
      args.rank,
      4 * args.first_quad);
}

template <int PART, int N3>
ProjectTubesKernel project_tubes_kernel_of_length() {
  if constexpr (has_tubes(N3) && tubes_part(N3) == PART) {
    using T = ForwardTubes<N3>;
    return {
        &project_tubes_kernel<N3>,
        T::kRows,
        T::kColumns,
        kQuadsOfLaunch,
        T::kThreads,
        ProjectStages<N3>::kBytes};
  } else {
    return {};
  }
}

template <int PART, int... I>
ProjectTubesKernel project_tubes_of(int64_t n3, std::integer_sequence<int, I...>) {
  static constexpr ProjectTubesKernel (*all[])() = {&project_tubes_kernel_of_length<PART, I>...};
  return all[n3]();
}

}  // namespace tcur
