// CUDA threads on the host, for tests. Every thread of a block is a fiber, and blocks run one after
// another. A fiber runs until it reaches a barrier. So what a thread sees of another thread's work
// before the barrier depends only on the order of the fibers. If results differ between orders, or
// show the NaN that shared memory starts with, a barrier is missing.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// As CUDA declares them.
struct Index {
  unsigned x;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace tcur::fibers {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

// The order in which the fibers of a block, and the blocks of a grid, take turns.
enum : int64_t { kForward = -1, kReverse = -2 };  // other values seed a shuffle
inline int64_t order = kForward;

// Bytes of shared memory that a block may use.
inline int64_t shared_limit = 227 * 1024;

inline std::vector<unsigned> permutation(size_t size) {
  std::vector<unsigned> indices(size);
  std::iota(indices.begin(), indices.end(), 0U);
  if (order == kReverse) {
    std::reverse(indices.begin(), indices.end());
  } else if (order != kForward) {
    std::shuffle(indices.begin(), indices.end(), std::mt19937_64(static_cast<uint64_t>(order)));
  }
  return indices;
}

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "tcur: host build of a CUDA kernel: %s\n", why);
  std::abort();
}

enum class State { ready, at_block_barrier, in_warp_operation, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::ready;
  void* operands = nullptr;  // of the warp operation it waits in
};

class Machine {
 public:
  void run_block(unsigned threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    while (fibers_.size() < threads) {
      fibers_.emplace_back();
    }
    threads_ = threads;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers_[t];
      fiber.state = State::ready;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Machine::enter, 0);
    }
    const std::vector<unsigned> turns = permutation(threads);
    // In forward and reverse order, a warp runs to its next barrier before the next warp starts, so
    // that it is as far ahead as it can be. Shuffled threads take turns at every operation of their
    // warps.
    const unsigned together = order == kForward || order == kReverse ? kWarp : threads;
    while (!is_over()) {
      bool progress = false;
      for (unsigned first = 0; first < threads; first += together) {
        const unsigned last = std::min(first + together, threads);
        while (resume_ready(&turns[first], &turns[0] + last)) {
          progress = true;
        }
      }
      if (!progress && !release_barrier()) {
        fail("threads of a block wait for each other at different barriers");
      }
    }
  }

  void block_barrier() {
    wait(State::at_block_barrier);
  }

  // The last lane to arrive runs `operation` on the operands of all 32 lanes.
  template <class Operands>
  void warp_operation(Operands& operands, void (*operation)(Operands* const*)) {
    const unsigned first = current_ / kWarp * kWarp;
    fibers_[current_].operands = &operands;
    Operands* all[kWarp];
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const Fiber& other = fibers_[first + lane];
      if (first + lane != current_ && other.state != State::in_warp_operation) {
        if (first + kWarp > threads_ || other.state == State::done) {
          fail("a warp operation without all 32 lanes");
        }
        wait(State::in_warp_operation);
        return;
      }
      all[lane] = static_cast<Operands*>(other.operands);
    }
    operation(all);
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      fibers_[first + lane].state = State::ready;
    }
  }

  std::vector<unsigned char> shared;

 private:
  static void enter();

  bool is_over() const {
    return std::all_of(fibers_.begin(), fibers_.begin() + threads_, [](const Fiber& fiber) {
      return fiber.state == State::done;
    });
  }

  bool release_barrier() {
    bool released = false;
    for (unsigned t = 0; t < threads_; ++t) {
      if (fibers_[t].state == State::in_warp_operation) {
        return false;
      }
      if (fibers_[t].state == State::at_block_barrier) {
        fibers_[t].state = State::ready;
        released = true;
      }
    }
    return released;
  }

  bool resume_ready(const unsigned* turn, const unsigned* end) {
    bool any = false;
    for (; turn != end; ++turn) {
      if (fibers_[*turn].state == State::ready) {
        resume(*turn);
        any = true;
      }
    }
    return any;
  }

  void resume(unsigned t) {
    current_ = t;
    threadIdx.x = t;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&own_stack_, fibers_[t].stack.get(), kStack);
#endif
    swapcontext(&scheduler_, &fibers_[t].context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(own_stack_, nullptr, nullptr);
#endif
  }

  void wait(State state) {
    Fiber& fiber = fibers_[current_];
    fiber.state = state;
#ifdef __SANITIZE_ADDRESS__
    void* kept = nullptr;
    __sanitizer_start_switch_fiber(
        state == State::done ? nullptr : &kept, scheduler_stack_, scheduler_stack_size_);
#endif
    swapcontext(&fiber.context, &scheduler_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(kept, &scheduler_stack_, &scheduler_stack_size_);
#endif
  }

  ucontext_t scheduler_;
  std::vector<Fiber> fibers_;
  unsigned threads_ = 0, current_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  void* own_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
};

inline Machine machine;

inline void Machine::enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(
      nullptr, &machine.scheduler_stack_, &machine.scheduler_stack_size_);
#endif
  (*machine.kernel_)();
  machine.wait(State::done);
}

inline unsigned char* shared_memory() {
  return machine.shared.data();
}

inline void run(
    int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  for (const unsigned block : permutation(static_cast<size_t>(blocks))) {
    blockIdx.x = block;
    // Shared memory is exactly as long as the launch says, and starts full of NaN.
    std::vector<unsigned char>(static_cast<size_t>(shared_bytes), 0xFF).swap(machine.shared);
    machine.run_block(static_cast<unsigned>(threads), kernel);
  }
}

}  // namespace tcur::fibers

inline void __syncthreads() {
  tcur::fibers::machine.block_barrier();
}
