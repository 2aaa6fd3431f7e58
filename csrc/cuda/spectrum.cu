// The DFT of a core and its inverse, and the table of roots.
//
// The sums are computed in fp64 and rounded once, so that the kernels after them start from an
// exact spectrum. Both directions are the same two sums, E_l = Σ_k cos(2πkl/n3) A_k and
// O_l = Σ_k sin(2πkl/n3) B_k for l, k = 0 … n3/2. A and B are rows in the order of a packed
// spectrum (A_0, A_1, B_1, …). A block holds these rows in shared memory for some entries of one
// core. Few cores make latency matter, so a block then takes eight entries, which is one sector of
// memory; with many cores it takes up to 64. A thread computes L lines of an entry. With L = 4 it
// uses each number that it reads four times, which makes 8 fp64 multiplications per 8 reads. 4096
// cores of 48 slices at rank 8 take 1.3e9 multiplications for both sums, which is 40 µs on a GPU
// with 132 multiprocessors that do 64 a cycle.
//
// When the parts are only added and not transformed, a block takes some of their numbers: 128 if
// there are 16 parts or more, which makes 24 blocks for 48 slices at rank 8.
// Planned: 512 threads, up to 64 registers, 2 blocks per multiprocessor.
#include "spectrum.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace tcur {
namespace {

constexpr int kThreads = 512;
constexpr int kLines = 4;               // lines of a thread, if there are many
constexpr int BATCH = 4;                // parts that a thread loads at a time
constexpr int64_t kShared = 96 * 1024;  // at most, so that it fits every architecture

// A block transforms 2^log_count entries of one core.
struct Entries {
  int log_count, blocks;  // blocks: how many all entries of a core take

  TCUR_HOST_DEVICE int count() const {
    return 1 << log_count;
  }
};

// Rows of A and B in shared memory, [n3, entries.count()], and the roots, which lie before them.
struct Rows {
  double* data;
  const double2* roots;
  int n3, log_count;

  TCUR_DEVICE double& at(int row, int entry) const {
    return data[(row << log_count) + entry];
  }
};

TCUR_DEVICE void load_roots(const Tables& tables, double2* roots) {
  for (int m = threadIdx.x; m < tables.n3; m += kThreads) {
    roots[m] = tables.exact[m];
  }
}

// Calls f(l, entry, E_l, O_l) for every line and entry.
template <int L, class F>
TCUR_DEVICE void transform(const Rows& rows, F&& f) {
  const int n3 = rows.n3, half = n3 / 2, last_pair = static_cast<int>(pairs(n3));
  const int items = ((half + L) / L) << rows.log_count;
  for (int item = threadIdx.x; item < items; item += kThreads) {
    const int entry = item & ((1 << rows.log_count) - 1), first = (item >> rows.log_count) * L;
    double even[L], odd[L];
    int turn[L];
#pragma unroll
    for (int u = 0; u < L; ++u) {
      even[u] = rows.at(0, entry);
      odd[u] = 0.0;
      turn[u] = first + u <= half ? first + u : 0;
    }
#pragma unroll L == 1 ? 4 : 1
    for (int k = 1; k <= last_pair; ++k) {
      const double a = rows.at(2 * k - 1, entry), b = rows.at(2 * k, entry);
#pragma unroll
      for (int u = 0; u < L; ++u) {
        const double2 root = rows.roots[turn[u]];
        even[u] += a * root.x;
        odd[u] += b * root.y;
        const int step = first + u <= half ? first + u : 0, next = turn[u] + step;
        turn[u] = next >= n3 ? next - n3 : next;
      }
    }
    const double middle = n3 % 2 == 0 ? rows.at(n3 - 1, entry) : 0.0;
#pragma unroll
    for (int u = 0; u < L; ++u) {
      const int l = first + u;
      if (l <= half) {
        f(l, entry, even[u] + (l % 2 == 0 ? middle : -middle), odd[u]);
      }
    }
  }
}

struct SpectrumBlock {
  SpectrumArgs args;
  Entries entries;
  double weight;  // of a real bin; a pair has twice as much
};

template <int L>
TCUR_KERNEL(kThreads, 2)
spectrum_kernel(const TCUR_PARAMETER SpectrumBlock block) {
  const SpectrumArgs& args = block.args;
  const int n3 = args.tables.n3, square = args.rank * args.rank;
  const int log_count = block.entries.log_count, count = block.entries.count();
  const int which = blockIdx.x / block.entries.blocks;
  const int first = (blockIdx.x - which * block.entries.blocks) * count;
  const int64_t size = static_cast<int64_t>(n3) * square, id = args.ids[which];
  float* out = args.core_hat + which * size + first;
  if (!args.ids.is_valid(id)) {
    for (int i = threadIdx.x; i < n3 << log_count; i += kThreads) {
      const int entry = i & (count - 1);
      if (first + entry < square) {
        out[static_cast<int64_t>(i >> log_count) * square + entry] = NAN;
      }
    }
    return;
  }
  double2* roots = shared_memory<double2>();
  const Rows rows{reinterpret_cast<double*>(roots + n3), roots, n3, log_count};
  const float* core = args.core + id * size + first;
#pragma unroll 4
  for (int i = threadIdx.x; i < (n3 / 2 + 1) << log_count; i += kThreads) {
    const int l = i >> log_count, entry = i & (count - 1);
    const bool is_there = first + entry < square, is_pair = tcur::is_pair(l, n3);
    const float* from = core + static_cast<int64_t>(l) * square + entry;
    const double x = is_there ? *from : 0.0f;
    const double mirrored =
        is_there && is_pair ? from[static_cast<int64_t>(n3 - 2 * l) * square] : 0.0f;
    rows.at(plane_of(l), entry) = x + mirrored;
    if (is_pair) {
      rows.at(2 * l, entry) = x - mirrored;
    }
  }
  load_roots(args.tables, roots);
  __syncthreads();
  transform<L>(rows, [&](int k, int entry, double even, double odd) __attribute__((always_inline)) {
    if (first + entry < square) {
      const int plane = plane_of(k);
      const bool is_pair = tcur::is_pair(k, n3);
      const double weight = is_pair ? 2.0 * block.weight : block.weight;
      out[static_cast<int64_t>(plane) * square + entry] = static_cast<float>(weight * even);
      if (is_pair) {
        out[static_cast<int64_t>(plane + 1) * square + entry] = static_cast<float>(-weight * odd);
      }
    }
  });
}

struct CoreBlock {
  CoreArgs args;
  Entries entries;
  double weight;  // of a real bin; a pair has twice as much
  int groups;     // groups of threads among which the parts of a core are divided
};

// Reads W neighbouring numbers of a part at once.
template <int W>
TCUR_DEVICE void load_entries(const float* from, float (&to)[W]) {
  if constexpr (W == 4) {
    const float4 raw = *reinterpret_cast<const float4*>(from);
    to[0] = raw.x;
    to[1] = raw.y;
    to[2] = raw.z;
    to[3] = raw.w;
  } else {
    to[0] = *from;
  }
}

// Sums the parts of a core into sums [groups, n3, entries]. A thread takes W entries of a plane at
// a time. Each group of threads takes every groups-th part, and loads BATCH of them at a time.
template <int BATCH, int W>
TCUR_DEVICE void sum_parts(const CoreBlock& block, int core, int first, double* sums) {
  const CoreArgs& args = block.args;
  const int n3 = args.tables.n3, square = args.rank * args.rank;
  const int log_columns = block.entries.log_count - (W == 4 ? 2 : 0);
  const int columns = n3 << log_columns, per_row = static_cast<int>(args.parts_per_row);
  const int groups = block.groups;
  const bool is_ordered = args.order.rows != nullptr;
  const int first_row = is_ordered ? args.order.begin[core] : 0;
  const int last_row = is_ordered ? args.order.end[core] : static_cast<int>(args.rows);
  const int row_step = per_row > 0 ? groups / per_row : 0;
  const int part_step = groups - row_step * per_row;
  const int64_t size = static_cast<int64_t>(n3) * square;
#pragma unroll 1
  for (int i = threadIdx.x; i < columns * groups; i += kThreads) {
    const int group = i / columns, column = i - group * columns;
    const int plane = column >> log_columns;
    const int entry = (column & ((1 << log_columns) - 1)) * W;
    const float* parts = args.parts + static_cast<int64_t>(plane) * square + first + entry;
    double sum[W] = {};
    int row = per_row > 0 ? first_row + group / per_row : last_row;
    int part = per_row > 0 ? group % per_row : 0;
    while (first + entry < square && row < last_row) {
      float values[BATCH][W];
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
#pragma unroll
        for (int w = 0; w < W; ++w) {
          values[u][w] = 0.0f;
        }
        if (row < last_row) {
          const int64_t at = is_ordered ? args.order.rows[row] : row;
          load_entries<W>(parts + (at * per_row + part) * size, values[u]);
        }
        part += part_step;
        row += row_step;
        if (part >= per_row) {
          part -= per_row;
          ++row;
        }
      }
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
#pragma unroll
        for (int w = 0; w < W; ++w) {
          sum[w] += values[u][w];
        }
      }
    }
#pragma unroll
    for (int w = 0; w < W; ++w) {
      sums[((group * n3 + plane) << block.entries.log_count) + entry + w] = sum[w];
    }
  }
}

template <int L, int W>
TCUR_KERNEL(kThreads, 2)
core_kernel(const TCUR_PARAMETER CoreBlock block) {
  const CoreArgs& args = block.args;
  const int n3 = args.tables.n3, square = args.rank * args.rank;
  const int log_count = block.entries.log_count, count = n3 << log_count;
  const int core = blockIdx.x / block.entries.blocks;
  const int first = (blockIdx.x - core * block.entries.blocks) << log_count;
  double2* roots = shared_memory<double2>();
  const Rows rows{reinterpret_cast<double*>(roots + n3), roots, n3, log_count};
  load_roots(args.tables, roots);
  // With many cores, a smaller batch is enough: many blocks wait for memory at once, and each core
  // has few parts.
  sum_parts<L == 1 ? 4 : 2, W>(block, core, first, rows.data);
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    double sum = rows.data[i];
    for (int group = 1; group < block.groups; ++group) {
      sum += rows.data[group * count + i];
    }
    const int plane = i >> log_count;
    rows.data[i] = sum * (is_real_plane(plane, n3) ? block.weight : 2.0 * block.weight);
  }
  __syncthreads();
  float* out = args.core + core * static_cast<int64_t>(n3) * square + first;
  transform<L>(rows, [&](int l, int entry, double even, double odd) __attribute__((always_inline)) {
    if (first + entry < square) {
      out[static_cast<int64_t>(l) * square + entry] = static_cast<float>(even - odd);
      if (l > 0 && 2 * l < n3) {
        out[static_cast<int64_t>(n3 - l) * square + entry] = static_cast<float>(even + odd);
      }
    }
  });
}

struct PackedBlock {
  PackedArgs args;
  int groups, columns;  // a block has `columns` threads in each of `groups`, W numbers a thread
};

template <int W>
TCUR_KERNEL(kThreads, 2)
packed_kernel(const TCUR_PARAMETER PackedBlock block) {
  const PackedArgs& args = block.args;
  const int groups = block.groups, columns = block.columns, width = columns * W;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * width;
  double* sums = shared_memory<double>();  // [groups, width]
  const int group = threadIdx.x / columns, at = (threadIdx.x - group * columns) * W;
  if (group < groups) {
    double sum[W] = {};
    const int64_t last = begin + at < args.size ? args.count : 0;
    for (int64_t part = group; part < last; part += BATCH * groups) {
      float values[BATCH][W] = {};
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        if (part + u * groups < last) {
          load_entries<W>(args.parts + (part + u * groups) * args.size + begin + at, values[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
#pragma unroll
        for (int w = 0; w < W; ++w) {
          sum[w] += values[u][w];
        }
      }
    }
#pragma unroll
    for (int w = 0; w < W; ++w) {
      sums[group * width + at + w] = sum[w];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < width && begin + i < args.size; i += kThreads) {
    double sum = sums[i];
    for (int other = 1; other < groups; ++other) {
      sum += sums[other * width + i];
    }
    args.packed[begin + i] = static_cast<float>(sum);
  }
}

// Depends on the shape alone, because a sum must not depend on the device.
Entries choose_entries(int64_t cores, int n3, int rank) {
  constexpr int64_t enough = 264;
  const int square = rank * rank;
  int log_count = n3 <= 256 ? 3 : n3 <= 1024 ? 2 : 1;
  const auto blocks = [&] { return (square + (1 << log_count) - 1) >> log_count; };
  while (log_count < 6 && cores * blocks() > enough && 1 << log_count < square &&
         (static_cast<int64_t>(n3) << log_count) * 16 <= kShared / 2) {
    ++log_count;
  }
  return {log_count, blocks()};
}

int64_t shared_bytes(const Entries& entries, int n3, int groups) {
  return n3 * static_cast<int64_t>(sizeof(double2)) +
         (static_cast<int64_t>(groups) * n3 << entries.log_count) *
             static_cast<int64_t>(sizeof(double));
}

// Whether there are so many lines that each thread computes several anyway.
bool has_many_lines(const Entries& entries, int n3) {
  return (n3 / 2 + 1) << entries.log_count > 2 * kThreads;
}

// Makes the roots in fp64, followed by the same roots in fp32. Angles are first reduced to an
// eighth of a turn, so that roots of 0 and ±1 are exact.
std::vector<double> make_roots(int n3) {
  std::vector<double> made(3 * static_cast<size_t>(n3));
  for (int64_t m = 0; m < n3; ++m) {
    const int64_t quarter = (8 * m + n3) / (2 * n3), rest = 4 * m - quarter * n3;
    const double angle = kPi * static_cast<double>(rest) / (2.0 * n3);
    const double x = std::cos(angle), y = std::sin(angle);
    const double cosines[] = {x, -y, -x, y}, sines[] = {y, x, -y, -x};
    const double root[] = {cosines[quarter % 4], sines[quarter % 4]};
    std::memcpy(&made[2 * m], root, sizeof root);
    const float rounded[] = {static_cast<float>(root[0]), static_cast<float>(root[1])};
    std::memcpy(&made[2 * n3 + m], rounded, sizeof rounded);
  }
  return made;
}

#ifdef __CUDACC__

// While this thread or another one captures a CUDA graph, calls that may wait for the whole device
// are forbidden. This object allows them to its thread; the capture does not record them.
class OutsideOfCapture {
 public:
  OutsideOfCapture() {
    check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
  }
  ~OutsideOfCapture() {
    cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  OutsideOfCapture(const OutsideOfCapture&) = delete;
  OutsideOfCapture& operator=(const OutsideOfCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The memory comes from the driver and not from torch: during a capture, torch would take it from
// the pool of the graph, which is freed with the graph. The copy has a stream of its own, because
// the stream of a capture would record the copy instead of doing it.
double* copy_to_device(const std::vector<double>& numbers) {
  const OutsideOfCapture guard;
  const size_t bytes = numbers.size() * sizeof(double);
  void* memory = nullptr;
  cudaStream_t stream = nullptr;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  check(
      cudaMemcpyAsync(memory, numbers.data(), bytes, cudaMemcpyHostToDevice, stream),
      "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return static_cast<double*>(memory);
}

#else

double* copy_to_device(const std::vector<double>& numbers) {
  auto* kept = new double[numbers.size()];
  std::copy(numbers.begin(), numbers.end(), kept);
  return kept;
}

#endif

}  // namespace

Tables root_tables(int device, int n3) {
  static std::mutex mutex;
  // The map is never destroyed, because its memory is never freed.
  static auto& kept = *new std::map<std::pair<int, int>, const double*>;
  const std::lock_guard<std::mutex> lock(mutex);
  const double*& data = kept[{device, n3}];
  if (data == nullptr) {
    data = copy_to_device(make_roots(n3));
  }
  return {
      reinterpret_cast<const float*>(data + 2 * static_cast<size_t>(n3)),
      reinterpret_cast<const double2*>(data),
      n3};
}

void make_spectrum(const SpectrumArgs& args, Stream stream) {
  const int n3 = args.tables.n3;
  const Entries entries = choose_entries(args.count, n3, args.rank);
  if (args.count == 0) {
    return;
  }
  launch(
      has_many_lines(entries, n3) ? spectrum_kernel<kLines> : spectrum_kernel<1>,
      args.count * entries.blocks,
      kThreads,
      shared_bytes(entries, n3, 1),
      stream,
      SpectrumBlock{args, entries, args.scale / n3});
}

void make_core(const CoreArgs& args, Stream stream) {
  const int n3 = args.tables.n3;
  const Entries entries = choose_entries(args.cores, n3, args.rank);
  if (args.cores == 0) {
    return;
  }
  // If a core may have several parts, as many threads as possible share them.
  const bool by_four =
      entries.log_count >= 2 && args.rank % 2 == 0 && is_aligned(args.parts, sizeof(float4));
  const int columns = n3 << (by_four ? entries.log_count - 2 : entries.log_count);
  const int64_t parts = std::max<int64_t>(1, args.rows * args.parts_per_row / args.cores);
  int groups = static_cast<int>(std::clamp<int64_t>(kThreads / columns, 1, parts));
  while (groups > 1 && shared_bytes(entries, n3, groups) > kShared) {
    --groups;
  }
  const bool many = has_many_lines(entries, n3);
  launch(
      by_four ? (many ? core_kernel<kLines, 4> : core_kernel<1, 4>)
              : (many ? core_kernel<kLines, 1> : core_kernel<1, 1>),
      args.cores * entries.blocks,
      kThreads,
      shared_bytes(entries, n3, groups),
      stream,
      CoreBlock{args, entries, args.scale / n3, groups});
}

void sum_packed(const PackedArgs& args, Stream stream) {
  const int groups = static_cast<int>(std::clamp<int64_t>(args.count, 1, 16));
  const int columns = kThreads / groups;
  const bool by_four = args.size % 4 == 0 && is_aligned(args.parts, sizeof(float4));
  const int64_t width = columns * (by_four ? 4 : 1);
  launch(
      by_four ? packed_kernel<4> : packed_kernel<1>,
      ceil_div(args.size, width),
      kThreads,
      groups * width * static_cast<int64_t>(sizeof(double)),
      stream,
      PackedBlock{args, groups, columns});
}

}  // namespace tcur
