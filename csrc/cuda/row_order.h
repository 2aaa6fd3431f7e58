// Sorts rows of tokens by the core that each row uses.
#pragma once

#include "operators.h"

namespace tcur {

// Lists the rows of every core, in their original order. A row whose id is out of range belongs to
// no core. If all rows use one core, nothing is launched.
class SortedRows {
 public:
  SortedRows(const Call& call, const TokenCores& cores);
  RowOrder order() const {
    return order_;
  }

 private:
  std::optional<Tensor> memory_;
  RowOrder order_{nullptr, nullptr, nullptr};
};

}  // namespace tcur
