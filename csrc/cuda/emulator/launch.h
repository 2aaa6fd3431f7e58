// The host's version of what launch.h gives the kernels on a GPU. It is for tests of their source
// and is never shipped. Only launch.h includes it.
#pragma once

#include "fibers.h"
#include "recorder.h"

#include <algorithm>
#include <stdexcept>

namespace tcur {

#define TCUR_DEVICE inline
#define TCUR_KERNEL(threads, blocks) void
#define TCUR_PARAMETER

struct Stream {};

template <int AHEAD>
void copy_later(float* to_shared, const float* from) {
  std::copy_n(from + AHEAD, 4, to_shared + AHEAD);
}
inline void wait_for_copies() {
}

struct Exchange {
  float sent, received;
  int bits;
};
inline float exchange(float x, int bits) {
  Exchange own{x, 0.0f, bits};
  fibers::machine.warp_operation(
      own, +[](Exchange* const* lanes) {
        for (int lane = 0; lane < fibers::kWarp; ++lane) {
          lanes[lane]->received = lanes[lane ^ lanes[lane]->bits]->sent;
        }
      });
  return own.received;
}
inline int concealed(int number) {
  return number;
}
inline void prefetch(const void*) {
}
inline void wait_for_launch_before() {
}
inline void let_next_launch_begin() {
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(fibers::shared_memory());
}

inline bool can_launch_early(int) {
  return false;
}

inline SharedLimits shared_limits(int) {
  return {fibers::shared_limit + 1024, fibers::shared_limit};
}

template <class... Params, class... Args>
void launch_kernel(
    bool,
    void (*kernel)(Params...),
    int64_t blocks,
    int threads,
    int64_t shared_bytes,
    Stream,
    const Args&... args) {
  if (shared_bytes > fibers::shared_limit) {
    throw std::runtime_error("tcur: a block asks for more shared memory than there is");
  }
  if (recorded != nullptr) {
    recorded->push_back({reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, {}});
    (recorded->back().append(static_cast<const Params&>(args)), ...);
    return;
  }
  fibers::run(blocks, threads, shared_bytes, [&] { kernel(args...); });
}

// The product of fragments.h. Each lane holds its parts of a, b and d as fragments.h describes.
struct WarpProduct {
  const float *a, *b;
  float* d;
};

inline void multiply_lanes(WarpProduct* const* lanes) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < fibers::kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[g + 8 * (i % 2)][t + 4 * (i / 2)] = lanes[lane]->a[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[t + 4 * i][g] = lanes[lane]->b[i];
    }
  }
  for (int lane = 0; lane < fibers::kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = lanes[lane]->d[i];
      for (int k = 0; k < 8; ++k) {
        sum += a[row][k] * b[k][column];
      }
      lanes[lane]->d[i] = sum;
    }
  }
}
inline void multiply_on_host(const float (&a)[4], const float (&b)[2], float (&d)[4]) {
  WarpProduct operands{a, b, d};
  fibers::machine.warp_operation(operands, &multiply_lanes);
}

}  // namespace tcur
