// Sorts rows by core: one block does a radix sort of the ids, four bits at a time. The sort is
// stable and uses no atomics, so the gradient of a core sums its rows in the same order at every
// run. Each thread counts the digits of neighbouring rows. Then the counts are summed, digit by
// digit and within a digit thread by thread, and each thread moves its rows to their places. The
// work grows with the rows and with the cores, but not with their product: 4096 rows of 4096 cores
// take four turns of about 2 µs.
// Planned: 512 threads, up to 128 registers, 1 blocks per multiprocessor, with 38 KiB of shared
// memory.
#include "row_order.h"

namespace tcur {
namespace {

constexpr int kThreads = 512;
constexpr int kBits = 4, kDigits = 1 << kBits;
constexpr int kBatch = 8;  // rows that a thread loads at a time
constexpr int kCounters = kDigits * kThreads;

struct OrderArgs {
  CoreIds ids;
  int rows, turns;
  int* sorted[2];  // the rows after an even and after an odd number of turns
  int *begin, *end;
};

// The place of counter i in shared memory. Each thread sums 16 neighbouring counters, so one place
// is left out after every 16 to avoid bank conflicts.
TCUR_DEVICE int place_of(int i) {
  return i + i / kDigits;
}

TCUR_DEVICE int64_t key_of(const OrderArgs& args, int row) {
  const int64_t id = args.ids[row];
  return args.ids.is_valid(id) ? id : args.ids.cores;
}

// Calls f(row, digit) for the rows of this thread, in order.
template <class F>
TCUR_DEVICE void for_rows(const OrderArgs& args, int turn, F&& f) {
  const int* from = args.sorted[turn % 2];
  const int per_thread = ceil_div(args.rows, kThreads);
  const int64_t first = static_cast<int64_t>(threadIdx.x) * per_thread;
  const int64_t end = first + per_thread < args.rows ? first + per_thread : args.rows;
  for (int64_t i = first; i < end; i += kBatch) {
    int row[kBatch], digit[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      row[u] = i + u >= end ? 0 : turn == 0 ? static_cast<int>(i) + u : from[i + u];
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      digit[u] = static_cast<int>(key_of(args, row[u]) >> (kBits * turn)) & (kDigits - 1);
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (i + u < end) {
        f(row[u], digit[u]);
      }
    }
  }
}

TCUR_KERNEL(kThreads, 1) order_kernel(const TCUR_PARAMETER OrderArgs args) {
  int* counters = shared_memory<int>();
  int* sums = counters + place_of(kCounters);  // [2, kThreads]
  const int thread = threadIdx.x;
  for (int64_t core = thread; core < args.ids.cores; core += kThreads) {
    args.begin[core] = 0;
    args.end[core] = 0;
  }
  for (int turn = 0; turn < args.turns; ++turn) {
    for (int digit = 0; digit < kDigits; ++digit) {
      counters[place_of(digit * kThreads + thread)] = 0;
    }
    for_rows(args, turn, [&](int, int digit) __attribute__((always_inline)) {
      ++counters[place_of(digit * kThreads + thread)];
    });
    __syncthreads();
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kDigits; ++i) {
      sum += counters[place_of(thread * kDigits) + i];
    }
    sums[thread] = sum;
    int side = 0;
    for (int step = 1; step < kThreads; step *= 2, side = 1 - side) {
      __syncthreads();
      const int* from = sums + side * kThreads;
      sums[(1 - side) * kThreads + thread] =
          from[thread] + (thread >= step ? from[thread - step] : 0);
    }
    int before = sums[side * kThreads + thread] - sum;
#pragma unroll
    for (int i = 0; i < kDigits; ++i) {
      int& counter = counters[place_of(thread * kDigits) + i];
      const int count = counter;
      counter = before;
      before += count;
    }
    __syncthreads();
    int* to = args.sorted[1 - turn % 2];
    for_rows(args, turn, [&](int row, int digit) __attribute__((always_inline)) {
      to[counters[place_of(digit * kThreads + thread)]++] = row;
    });
    __syncthreads();
  }
  const int* rows = args.sorted[args.turns % 2];
  for (int i = thread; i < args.rows; i += kThreads) {
    const int64_t key = key_of(args, rows[i]);
    if (key < args.ids.cores) {
      if (i == 0 || key_of(args, rows[i - 1]) != key) {
        args.begin[key] = i;
      }
      if (i + 1 == args.rows || key_of(args, rows[i + 1]) != key) {
        args.end[key] = i + 1;
      }
    }
  }
}

}  // namespace

SortedRows::SortedRows(const Call& call, const TokenCores& cores) {
  const CoreIds ids = core_ids(cores);
  if (ids.ids == nullptr) {
    return;
  }
  STD_TORCH_CHECK(cores.rows() < INT32_MAX, "tcur: too many rows");
  memory_ = call.floats({2 * cores.rows() + 2 * ids.cores});  // ints have as many bytes
  int* data = static_cast<int*>(memory_->mutable_data_ptr());
  int* ends = data + 2 * cores.rows();
  OrderArgs args{
      ids, static_cast<int>(cores.rows()), 1, {data, data + cores.rows()}, ends, ends + ids.cores};
  while (ids.cores >> (kBits * args.turns) > 0) {
    ++args.turns;
  }
  order_ = {args.sorted[args.turns % 2], args.begin, args.end};
  constexpr int64_t shared = (kCounters + kCounters / kDigits + 2 * kThreads) * sizeof(int);
  launch(order_kernel, 1, kThreads, shared, call.stream(), args);
}

}  // namespace tcur
