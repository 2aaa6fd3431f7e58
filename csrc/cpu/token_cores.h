// Finds the tokens of each core, on the host.
#pragma once

#include "../common/token_cores.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace tcur {

// Numbers the tokens by positions, in which the tokens of one core are neighbours. Code that works
// along the positions prepares each core only once. The order, and with it every sum over the
// tokens, depends on the ids alone.
class TokensByCore {
 public:
  explicit TokensByCore(const TokenCores& cores)
      : ids_(cores.rows(), 0), order_(cores.rows()), row_length_(cores.row_length()) {
    if (cores.ids() != nullptr) {
      std::copy_n(cores.ids(), cores.rows(), ids_.begin());
    }
    for (const int64_t id : ids_) {
      STD_TORCH_CHECK(
          cores.ids() == nullptr || (id >= 0 && id < cores.cores()),
          "tcur: adapter_ids out of range");
    }
    std::iota(order_.begin(), order_.end(), int64_t(0));
    std::stable_sort(
        order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return ids_[a] < ids_[b]; });
  }

  // Calls run(core, first token, token after the last) for the positions begin … end.
  template <class Run>
  void visit(int64_t begin, int64_t end, const Run& run) const {
    while (begin < end) {
      const int64_t row = order_[begin / row_length_], offset = begin % row_length_;
      const int64_t count = std::min(row_length_ - offset, end - begin);
      const int64_t first = row * row_length_ + offset;
      run(ids_[row], first, first + count);
      begin += count;
    }
  }

  struct Chunk {
    int64_t core, begin, end;  // positions
  };

  // Cuts the positions into chunks of at most `longest` tokens of one core, ordered by core.
  std::vector<Chunk> chunks(int64_t longest) const {
    std::vector<Chunk> all;
    for (int64_t row = 0, next; row < static_cast<int64_t>(order_.size()); row = next) {
      const int64_t core = ids_[order_[row]];
      for (next = row; next < static_cast<int64_t>(order_.size()); ++next) {
        if (ids_[order_[next]] != core) {
          break;
        }
      }
      const int64_t last = next * row_length_;
      for (int64_t begin = row * row_length_; begin < last; begin += longest) {
        all.push_back({core, begin, std::min(begin + longest, last)});
      }
    }
    return all;
  }

 private:
  std::vector<int64_t> ids_, order_;  // of rows
  int64_t row_length_;
};

}  // namespace tcur
