// The threads of torch's parallel_for, by std::thread, for tests/sanitizers.py.
//
// ThreadSanitizer sees that these begin and end, and so what happens before what. It cannot see into
// libgomp. As in torch, a range that is no longer than a grain is computed by the caller.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kThreads = 3;

}  // namespace

extern "C" AOTITorchError torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func, void* ctx) {
  const int64_t grain = std::max<int64_t>(1, grain_size), range = end - begin;
  const int64_t parts = std::min(kThreads, (range + grain - 1) / grain);
  std::atomic<bool> has_failed{false};
  const auto run = [&](int64_t part) {
    const int64_t length = (range + parts - 1) / parts, first = begin + part * length;
    try {
      if (first < end) {
        func(first, std::min(end, first + length), ctx);
      }
    } catch (...) {
      has_failed = true;
    }
  };
  std::vector<std::thread> threads;
  for (int64_t part = 1; part < parts; ++part) {
    threads.emplace_back(run, part);
  }
  if (range > 0) {
    run(0);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return has_failed ? AOTI_TORCH_FAILURE : AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError torch_get_num_threads(uint32_t* out_num_threads) {
  *out_num_threads = kThreads;
  return AOTI_TORCH_SUCCESS;
}
