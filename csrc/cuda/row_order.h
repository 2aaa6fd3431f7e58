// Rows of tokens in the order of the cores that they go by.
#pragma once

#include "operators.h"

namespace tcur {

// For every core the rows that belong to it, in their order. A row whose id is out of range belongs
// to none. Nothing is launched where all rows go by one core.
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
