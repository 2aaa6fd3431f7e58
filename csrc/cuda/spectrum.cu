// The DFT of a core, forwards and back. Sums are short but few: they are formed in fp64, so that
// what is left is one rounding, and the kernels after them start from the exact spectrum.
//
// make_spectrum: one thread per number of core_hat. make_core: one thread per number of the core.
// Both are small beside the kernels they serve: n3 * n3 * rank * rank products.
// Planned: 256 threads, up to 64 registers, 4 blocks per multiprocessor.
#include "spectrum.h"

#include <cmath>

namespace tcur {
namespace {

constexpr int kThreads = 256;
constexpr int kEntries =
    8;  // of a core, worked on by one block of make_core: 32 bytes side by side

TCUR_DEVICE double2 unit_root(int m, int n3) {
  double2 root;
#ifdef __CUDACC__
  sincospi(2.0 * m / n3, &root.y, &root.x);
#else
  const double angle = 2.0 * 3.14159265358979323846 * m / n3;
  root = {std::cos(angle), std::sin(angle)};
#endif
  return root;
}

// Part of a complex number that a packed plane holds.
struct Plane {
  int bin;
  bool is_imaginary;
};
TCUR_DEVICE Plane plane_of(int plane, int n3) {
  return {(plane + 1) / 2, plane > 0 && plane % 2 == 0 && plane <= 2 * pairs(n3)};
}

TCUR_KERNEL(kThreads, 4) spectrum_kernel(const TCUR_PARAMETER SpectrumArgs args) {
  double2* roots = shared_memory<double2>();
  const int n3 = args.tables.n3, square = args.rank * args.rank;
  for (int m = threadIdx.x; m < n3; m += kThreads) {
    roots[m] = unit_root(m, n3);
  }
  __syncthreads();
  for (int m = blockIdx.x * kThreads + threadIdx.x; m < n3; m += gridDim.x * kThreads) {
    args.tables.data[2 * m] = static_cast<float>(roots[m].x);
    args.tables.data[2 * m + 1] = static_cast<float>(roots[m].y);
  }
  const int64_t size = static_cast<int64_t>(n3) * square;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < args.count * size;
       i += gridDim.x * static_cast<int64_t>(kThreads)) {
    const int64_t which = i / size;
    const int rest = static_cast<int>(i - which * size), j = rest / square;
    const int64_t id = args.ids[which];
    if (!args.ids.is_valid(id)) {
      args.core_hat[i] = NAN;
      continue;
    }
    const float* core = args.core + id * size + (rest - j * square);
    const Plane plane = plane_of(j, n3);
    double sum = 0.0;
    int m = 0;
    for (int l = 0; l < n3; ++l) {
      sum +=
          core[static_cast<int64_t>(l) * square] * (plane.is_imaginary ? -roots[m].y : roots[m].x);
      m += plane.bin;
      m -= m >= n3 ? n3 : 0;
    }
    args.core_hat[i] = static_cast<float>(args.scale * inverse_weight(j, n3) * sum);
  }
}

TCUR_KERNEL(kThreads, 4) core_kernel(const TCUR_PARAMETER CoreArgs args) {
  double2* roots = shared_memory<double2>();
  const int n3 = args.n3, square = args.rank * args.rank;
  double* planes = reinterpret_cast<double*>(roots + n3);  // [n3, kEntries]
  const int in_core = (square + kEntries - 1) / kEntries;
  const int64_t core = blockIdx.x / in_core;
  const int first = static_cast<int>(blockIdx.x - core * in_core) * kEntries;
  for (int m = threadIdx.x; m < n3; m += kThreads) {
    roots[m] = unit_root(m, n3);
  }
  for (int i = threadIdx.x; i < n3 * kEntries; i += kThreads) {
    const int plane = i / kEntries, entry = first + i % kEntries;
    double sum = 0.0;
    if (entry < square) {
      const float* part = args.parts + static_cast<int64_t>(plane) * square + entry;
      for (int64_t row = 0; row < args.rows; ++row) {
        if (args.ids.ids != nullptr && args.ids[row] != core) {
          continue;
        }
        for (int64_t p = row * args.parts_per_row; p < (row + 1) * args.parts_per_row; ++p) {
          sum += part[p * n3 * square];
        }
      }
    }
    planes[i] = inverse_weight(plane, n3) * sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n3 * kEntries; i += kThreads) {
    const int l = i / kEntries, entry = first + i % kEntries;
    double sum = 0.0;
    for (int j = 0; j < n3; ++j) {
      const Plane plane = plane_of(j, n3);
      const double2 root = roots[static_cast<int64_t>(plane.bin) * l % n3];
      sum += planes[j * kEntries + i % kEntries] * (plane.is_imaginary ? -root.y : root.x);
    }
    if (entry < square) {
      args.core[(core * n3 + l) * square + entry] = static_cast<float>(sum);
    }
  }
}

}  // namespace

void make_spectrum(const SpectrumArgs& args, Stream stream) {
  const int n3 = args.tables.n3;
  const int64_t work = args.count * n3 * args.rank * args.rank;
  const int64_t wanted = (work + kThreads - 1) / kThreads;
  const int64_t blocks = wanted < 1 ? 1 : wanted < 4096 ? wanted : 4096;
  launch(
      spectrum_kernel, blocks, kThreads, n3 * static_cast<int64_t>(sizeof(double2)), stream, args);
}

void make_core(const CoreArgs& args, Stream stream) {
  const int64_t in_core = (static_cast<int64_t>(args.rank) * args.rank + kEntries - 1) / kEntries;
  const int64_t blocks = args.ids.cores * in_core;
  if (blocks == 0) {
    return;
  }
  const int64_t shared =
      args.n3 * static_cast<int64_t>(sizeof(double2) + kEntries * sizeof(double));
  launch(core_kernel, blocks, kThreads, shared, stream, args);
}

}  // namespace tcur
