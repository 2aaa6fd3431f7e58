// For a length of two short factors that is known at compile time: the tile, and how threads share
// the two steps of the transform. All offsets within a tile are then constants.
//
// The rows of a tile in shared memory are its packed planes (dft.h). The inner step includes the
// rank-r product: for one k1, a few rows and four columns, a thread holds the INNER bins
// outer * k2 + k1 in registers. In the outer step, for one l0 and a few columns, a thread holds the
// OUTER slices inner * l1 + l0. Between the two steps, each number passes once through shared
// memory.
#pragma once

#include "../common/codelets.h"
#include "lanes.h"
#include "spectrum.h"

namespace tcur {

// Up to this rank, fp32 registers compute the products of the factors. On an H100 the kernels on
// tensor cores took 4 to 6 times as long at rank 32 as these kernels at rank 16.
constexpr int kShortRank = 32;

// Whether a length has a kernel of its own. Lengths of two short factors do, if they are likely
// numbers of layers: up to 16, or a multiple of 4. Each takes some seconds to compile for every
// architecture.
TCUR_HOST_DEVICE constexpr bool has_tubes(int64_t n3) {
#ifdef TCUR_LENGTHS  // of builds that are made many times, or of one kernel
  for (const int64_t one : {TCUR_LENGTHS}) {
    if (n3 == one) {
      return true;
    }
  }
  return false;
#else
  return dft_factors(n3).outer > 0 && (n3 <= 16 || n3 % 4 == 0);
#endif
}

// Whether these kernels take such sizes. Rows must start at multiples of four numbers (`vector`).
// 32 bits must suffice to index every number of a slice, every fourth number of as many slices as
// lie between two that a thread writes, and every quad of R̂ in the layout of `prepare`.
inline bool fits_tubes(int64_t n1, int64_t n2, int64_t n3, int64_t rank, bool vector) {
  return rank <= kShortRank && has_tubes(n3) && vector && n1 * n2 <= UINT32_MAX &&
         n1 * n2 / 4 * kLongestInner <= UINT32_MAX && n2 * n3 * kShortRank <= UINT32_MAX;
}

// The kernels are compiled in this many sources. The sources take turns by n3/4, so that all
// compile in about the same time.
constexpr int kTubesParts = 4;
constexpr int kTubesLengths = kLongestOuter * kLongestInner + 1;
TCUR_HOST_DEVICE constexpr int tubes_part(int64_t n3) {
  return static_cast<int>(n3 / 4 % kTubesParts);
}

// FORWARD: the transform goes from slices to bins, and the sums of `core_grad_dense` are in
// registers too.
template <int N3, bool FORWARD = false>
struct Tubes {
  static constexpr int kLength = N3;
  static constexpr int kInner = dft_factors(N3).inner, kOuter = dft_factors(N3).outer;

  // Rows of a thread in the inner step, with four columns each.
  static constexpr int kTall = kInner == 1 || (kInner == 2 && !FORWARD) ? 4
                               : kInner <= (FORWARD ? 3 : 4)            ? 2
                                                                        : 1;
  // Some warps work on each k1, and their threads share its positions. The warps of k1 = 0 also
  // take k1 = outer/2: the tubes of both are real, so each is half as much work.
  static constexpr int kTurns = (kOuter + 1) / 2;

  // As many positions as leave room for two blocks per multiprocessor and their operands, but
  // enough to give work to four warps.
  static constexpr int positions() {
    int count = FORWARD && kTall == 1 ? 128 : 512;
    while (count * N3 * 4 > 68 * 1024) {
      count /= 2;
    }
    while (count < 128 * kTall || kTurns * count / (128 * kTall) < 4) {
      count *= 2;
    }
    return count;
  }
  static constexpr int kPositions = positions();
  static constexpr int kColumns = kPositions >= 1024 ? 64 : kPositions >= 256 ? 32 : 16;
  static constexpr int kRows = kPositions / kColumns;
  static constexpr int kTileFloats = N3 * kPositions;
  static constexpr int kParts = kPositions / (128 * kTall);  // warps for each k1
  static constexpr int kWarps = kTurns * kParts, kThreads = 32 * kWarps;
  static_assert(kParts > 0 && kParts * 128 * kTall == kPositions, "whole warps for each k1");

  // Columns of a thread in the outer step.
  static constexpr int kWide = kOuter > 8 ? 2 : 4;
  static constexpr int kVectors = kPositions / kWide;
  static_assert(kVectors % 32 == 0, "a warp works on one l0");

  // Blocks per multiprocessor. A quarter of a multiprocessor has registers for four or five of
  // these warps.
  static constexpr int most_blocks() {
    if (kWarps > 8 || kInner > (FORWARD ? 5 : 8) || (kOuter == 15 && kInner > 1) ||
        (FORWARD && kOuter == 16 && kInner == 5)) {
      return 1;
    }
    if (kInner == 2 && !FORWARD) {
      return kWarps > 6 ? 1 : 2;
    }
    if (kWarps == 6 && kInner == 1 && !FORWARD) {
      return 3;
    }
    return kWarps > 5 ? 2 : kWarps > 4 ? 3 : 4;
  }
  static constexpr int kBlocks = most_blocks();
  // The most shared memory that each of so many blocks can have.
  static constexpr int kMostBytes = (228 / kBlocks - 1) * 1024;

  // The share of this thread in the inner step: its k1, and its first row and column. Its other
  // rows follow, kRowStep apart.
  static constexpr int kRowStep = kRows / kTall;
  TCUR_DEVICE static int turn() {
    return static_cast<int>(threadIdx.x / (32 * kParts));
  }
  TCUR_DEVICE static unsigned group() {
    return threadIdx.x % (32 * kParts);
  }
  TCUR_DEVICE static int inner_row() {
    return static_cast<int>(group() / (kColumns / 4));
  }
  TCUR_DEVICE static int inner_column() {
    return static_cast<int>(4 * (group() % (kColumns / 4)));
  }

  // Calls f(l0, row, column) for each share of this thread in the outer step. CONCEALED keeps the
  // compiler from computing before the loop what depends on l0 alone, since no registers are left
  // to hold it.
  template <bool CONCEALED = false, class F>
  TCUR_DEVICE static void for_outer(F&& f) {
    constexpr unsigned kInRow = kColumns / kWide, kShares = kVectors / 32;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto share = [&](unsigned l0, unsigned vector) __attribute__((always_inline)) {
      f(CONCEALED ? concealed(static_cast<int>(l0)) : static_cast<int>(l0),
        static_cast<int>(vector / kInRow),
        static_cast<int>(kWide * (vector % kInRow)));
    };
    if constexpr (kWarps % kShares == 0) {  // the place stays, and is computed once
#pragma unroll 1
      for (unsigned l0 = warp / kShares; l0 < kInner; l0 += kWarps / kShares) {
        share(l0, warp % kShares * 32 + lane);
      }
    } else {
#pragma unroll 1
      for (unsigned i = warp; i < kInner * kShares; i += kWarps) {
        share(i / kShares, i % kShares * 32 + lane);
      }
    }
  }
};

template <int N3>
using ForwardTubes = Tubes<N3, true>;

// Operands of a tile in shared memory, some quads of the rank at a time, in the layout of
// `prepare`: R̂ [n3, 4, kColumns] and P [n3, kRows, 4]. They are copied while threads do other work.
template <class T, bool WITH_P>
struct Staged {
  static constexpr int kRight = T::kLength * 4 * T::kColumns;
  static constexpr int kLeft = WITH_P ? T::kLength * 4 * T::kRows : 0;
  static constexpr int kFloats = kRight + kLeft;  // of one quad

  // Starts to copy `count` quads, which follow each other in the tiles `right` and `left`.
  TCUR_DEVICE static void ask(const float* right, const float* left, int count, float* to) {
    const unsigned own = 4 * threadIdx.x;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      copy<kRight>(to + own, right + own);
      right += kRight;
      if constexpr (WITH_P) {
        copy<kLeft>(to + kRight + own, left + own);
        left += kLeft;
      }
      to += kFloats;
    }
  }

 private:
  // Starts the copies of this thread, whose first number is at both pointers.
  template <int FLOATS>
  TCUR_DEVICE static void copy(float* to, const float* from) {
    constexpr int kTogether = 4 * T::kThreads, kWhole = FLOATS / kTogether * kTogether;
    static_for<kWhole / kTogether>(
        [&](auto i) __attribute__((always_inline)) { copy_later<i * kTogether>(to, from); });
    if (FLOATS > kWhole && 4 * threadIdx.x < FLOATS - kWhole) {
      copy_later<kWhole>(to, from);
    }
  }
};

// Four columns of R̂ in a staged quad, as a thread reads them. Planes are counted from the plane of
// some bin. Their distances are constants, so no instruction is spent on them.
template <class T>
struct HorizontalQuad {
  static constexpr int kColumns = T::kColumns;
  const float* at;

  TCUR_DEVICE HorizontalQuad from_bin(int bin) const {
    return {at + bin * (2 * 4 * kColumns)};
  }
  // The row of rank index i of the quad.
  template <int PLANE>
  TCUR_DEVICE Quad row(int i) const {
    return load_lanes<4>(at + (PLANE * 4 + i) * kColumns);
  }
};

// For number i of a thread whose tubes are real, k1 = 0 (FIRST) or outer/2: whether it is a real
// bin, or the real part of a pair, whose imaginary part follows.
template <int N3, bool FIRST>
TCUR_HOST_DEVICE constexpr bool is_real_bin(int i) {
  constexpr int last = dft_factors(N3).inner - 1;
  return FIRST ? i == 0 || (i == last && last % 2 != 0) : i == last && last % 2 == 0;
}
template <int N3, bool FIRST>
TCUR_HOST_DEVICE constexpr bool is_real_part(int i) {
  return !is_real_bin<N3, FIRST>(i) && i % 2 == (FIRST ? 1 : 0);
}

}  // namespace tcur
