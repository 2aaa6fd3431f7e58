// Which core each token uses: one core for all, or the core that adapter_ids names for each row.
#pragma once

#include "dtypes.h"

#include <optional>

namespace tcur {

// Rows of tokens. The tokens of a row share a core, and all rows are equally long.
class TokenCores {
 public:
  // adapter_ids: int64 [rows], or none for one core
  TokenCores(int64_t tokens, const std::optional<Tensor>& adapter_ids, int64_t adapters)
      : cores_(adapter_ids.has_value() ? adapters : 1), row_length_(tokens) {
    if (!adapter_ids.has_value()) {
      return;
    }
    STD_TORCH_CHECK(
        adapter_ids->dim() == 1 && adapter_ids->scalar_type() == ScalarType::Long,
        "tcur: adapter_ids must be int64 [rows]");
    rows_ = adapter_ids->numel();
    STD_TORCH_CHECK(
        rows_ == 0 ? tokens == 0 : tokens % rows_ == 0,
        "tcur: adapter_ids must have one entry for each of the rows that the tokens divide into");
    row_length_ = rows_ == 0 ? 0 : tokens / rows_;
    ids_ = torch::stable::contiguous(*adapter_ids);
  }

  int64_t cores() const {
    return cores_;
  }
  int64_t rows() const {
    return rows_;
  }
  int64_t row_length() const {
    return row_length_;
  }
  // The number of the core of each row, on the device of adapter_ids. Null means that all rows use
  // core 0.
  const int64_t* ids() const {
    return ids_.has_value() ? ids_->const_data_ptr<int64_t>() : nullptr;
  }

 private:
  std::optional<Tensor> ids_;
  int64_t cores_, rows_ = 1, row_length_;
};

}  // namespace tcur
