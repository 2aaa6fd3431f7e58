// Executes a part of this process step by step, counts every instruction of one library, and feeds
// the addresses that it reads and writes to a model of two levels of caches.
//
// The trap flag makes the processor raise SIGTRAP after each instruction. The handler sees the
// registers as the next instruction will find them.
#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <vector>

namespace {

// How an instruction uses memory. `stepping.py` has the same structure.
struct Access {
  int64_t offset;
  int32_t base, index, scale;  // registers as ucontext numbers them; -1: none, -2: the library
  int32_t bytes;
  int32_t how;  // a sum of the following
};
enum : int32_t {
  kLoads = 1, kStores = 2, kPastCaches = 4, kFetchesFirst = 8, kFetchesSecond = 16, kVector = 32
};

constexpr int kLine = 64, kLinesOfPage = 4096 / kLine;

// Lines of one level, those of a set in the order of their last use. It writes lines back.
class Level {
 public:
  struct Line {
    int64_t number;
    bool is_dirty;
  };
  // has_pages: pages of 4 KiB lie anywhere in memory, so that long strides do not meet in few sets,
  // as they do where the address that the program sees chooses the set.
  void resize(int64_t bytes, int ways, bool has_pages) {
    has_pages_ = has_pages;
    sets_ = bytes / kLine / ways;
    ways_ = ways;
    lines_.assign(sets_ * ways, {-1, false});
  }
  // Whether the line is there; it is the last used then.
  bool touch(int64_t number, bool writes) {
    Line* set = set_of(number);
    for (int way = 0; way < ways_; ++way) {
      if (set[way].number == number) {
        const Line found{number, set[way].is_dirty || writes};
        std::memmove(set + 1, set, way * sizeof(Line));
        set[0] = found;
        return true;
      }
    }
    return false;
  }
  // Takes a line in and returns the one that had to leave.
  Line insert(int64_t number, bool is_dirty) {
    Line* set = set_of(number);
    const Line leaves = set[ways_ - 1];
    std::memmove(set + 1, set, (ways_ - 1) * sizeof(Line));
    set[0] = {number, is_dirty};
    return leaves;
  }
  // Drops a line; whether it was changed.
  bool drop(int64_t number) {
    Line* set = set_of(number);
    for (int way = 0; way < ways_; ++way) {
      if (set[way].number == number) {
        const bool was_dirty = set[way].is_dirty;
        std::memmove(set + way, set + way + 1, (ways_ - 1 - way) * sizeof(Line));
        set[ways_ - 1] = {-1, false};
        return was_dirty;
      }
    }
    return false;
  }

 private:
  Line* set_of(int64_t number) {
    if (has_pages_) {
      const uint64_t page = number / kLinesOfPage * 0x9E3779B97F4A7C15u >> 40;
      number = page * kLinesOfPage + number % kLinesOfPage;
    }
    return lines_.data() + number % sets_ * ways_;
  }
  int64_t sets_ = 1;
  int ways_ = 1;
  bool has_pages_ = false;
  std::vector<Line> lines_;
};

// Lines that cross between the levels.
struct Crossed {
  int64_t to_first, from_first, to_second, from_second;
};

Level first, second;
Crossed crossed;

// The second level holds every line of the first, as in AMD's processors.
void into_second(int64_t line, bool is_dirty) {
  if (second.touch(line, is_dirty)) {
    return;
  }
  ++crossed.to_second;
  const Level::Line leaves = second.insert(line, is_dirty);
  if (leaves.number >= 0) {
    const bool was_dirty = first.drop(leaves.number);
    crossed.from_second += leaves.is_dirty || was_dirty;
  }
}

void use(int64_t line, bool writes) {
  if (first.touch(line, writes)) {
    return;
  }
  into_second(line, false);
  ++crossed.to_first;
  const Level::Line leaves = first.insert(line, writes);
  if (leaves.number >= 0 && leaves.is_dirty) {
    ++crossed.from_first;
    second.touch(leaves.number, true);
  }
}

const int32_t* numbers;  // of the instruction at each byte of the library, or -1
const Access* accesses;
int64_t size, library, entry, outside, entries, warm, last;
std::vector<int64_t> times, on_stack;

void reset() {
  std::fill(times.begin(), times.end(), 0);
  std::fill(on_stack.begin(), on_stack.end(), 0);
  crossed = {};
  outside = 0;
}

void access(const Access& a, const greg_t* registers, int32_t number) {
  int64_t address = a.offset;
  address += a.base == -2 ? library : a.base >= 0 ? registers[a.base] : 0;
  address += a.index >= 0 ? registers[a.index] * a.scale : 0;
  const int64_t above = address - registers[REG_RSP];
  on_stack[number] += a.how & kVector && above >= -128 && above < 65536;
  const int64_t end = a.how & (kFetchesFirst | kFetchesSecond) ? address + 1 : address + a.bytes;
  for (int64_t line = address / kLine; line * kLine < end; ++line) {
    if (a.how & kFetchesSecond) {
      into_second(line, false);
    } else if (a.how & kPastCaches) {
      first.drop(line);
      second.drop(line);
    } else {
      use(line, a.how & kStores);
    }
  }
}

void on_trap(int, siginfo_t*, void* context) {
  mcontext_t& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
  const int64_t at = machine.gregs[REG_RIP] - library;
  const int32_t number = at >= 0 && at < size ? numbers[at] : -1;
  if (number < 0) {
    outside += entries > 0;
    return;
  }
  if (at == entry) {
    ++entries;
    if (entries == warm + 1) {
      reset();
    } else if (entries > last) {
      machine.gregs[REG_EFL] &= ~int64_t{0x100};  // the rest runs as usual
      return;
    }
  }
  if (entries > 0) {
    ++times[number];
    if (accesses[number].how & ~kVector) {
      access(accesses[number], machine.gregs, number);
    }
  }
}

}  // namespace

extern "C" {

// What the registers are called here, in the order that their names have in stepping.py.
void registers(int32_t* out) {
  const int32_t all[] = {REG_RAX, REG_RBX, REG_RCX, REG_RDX, REG_RSI, REG_RDI, REG_RBP, REG_RSP,
                         REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  std::memcpy(out, all, sizeof(all));
}

void caches(int64_t bytes1, int32_t ways1, int64_t bytes2, int32_t ways2) {
  first.resize(bytes1, ways1, false);
  second.resize(bytes2, ways2, true);
}

// From here on this thread goes step by step. Counting begins when the function at `entry_at` is
// entered; its first `warm_calls` calls fill the caches, the following `calls` are counted.
void start(
    int64_t library_at,
    int64_t library_size,
    const int32_t* numbers_at,
    const Access* all,
    int64_t count,
    int64_t entry_at,
    int64_t warm_calls,
    int64_t calls) {
  library = library_at, size = library_size, numbers = numbers_at, accesses = all;
  entry = entry_at, warm = warm_calls, last = warm_calls + calls, entries = 0;
  times.assign(count, 0);
  on_stack.assign(count, 0);
  reset();
  struct sigaction action = {};
  action.sa_sigaction = &on_trap;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGTRAP, &action, nullptr);
  asm volatile("pushfq; orq $0x100, (%%rsp); popfq" ::: "memory", "cc");
}

// Ends it, also where the function was not called often enough; how often it was.
int64_t stop(int64_t* times_out, int64_t* stack_out, int64_t* crossed_out) {
  asm volatile("pushfq; andq $~0x100, (%%rsp); popfq" ::: "memory", "cc");
  signal(SIGTRAP, SIG_DFL);
  std::memcpy(times_out, times.data(), times.size() * sizeof(int64_t));
  std::memcpy(stack_out, on_stack.data(), on_stack.size() * sizeof(int64_t));
  std::memcpy(crossed_out, &crossed, sizeof(crossed));
  crossed_out[4] = outside;
  return entries;
}

}  // extern "C"
