// What tests and counters set and read in a host build, through a C interface.
#include "fibers.h"
#include "recorder.h"

#define TCUR_EXPORTED extern "C" __attribute__((visibility("default")))

namespace {
std::vector<tcur::LaunchRecord> launches;
}

// The order in which threads take turns (fibers.h).
TCUR_EXPORTED void tcur_host_order(int64_t order) {
  tcur::fibers::order = order;
}

// Bytes of shared memory that a block may use.
TCUR_EXPORTED void tcur_host_shared(int64_t bytes) {
  tcur::fibers::shared_limit = bytes;
}

// From now on launches are recorded and not run, or run again. Forgets those that were recorded.
TCUR_EXPORTED void tcur_host_record(bool records) {
  launches.clear();
  tcur::recorded = records ? &launches : nullptr;
}

TCUR_EXPORTED int64_t tcur_host_recorded() {
  return static_cast<int64_t>(launches.size());
}

// Fills in one of them: the kernel's address relative to this function's, blocks, threads, bytes of
// shared memory, and address and bytes of the arguments.
TCUR_EXPORTED void tcur_host_launch(int64_t index, int64_t* numbers) {
  const tcur::LaunchRecord& launch = launches[static_cast<size_t>(index)];
  numbers[0] = reinterpret_cast<intptr_t>(launch.kernel) -
               reinterpret_cast<intptr_t>(reinterpret_cast<const void*>(&tcur_host_launch));
  numbers[1] = launch.blocks;
  numbers[2] = launch.threads;
  numbers[3] = launch.shared_bytes;
  numbers[4] = reinterpret_cast<intptr_t>(launch.arguments.data());
  numbers[5] = static_cast<int64_t>(launch.arguments.size());
}
