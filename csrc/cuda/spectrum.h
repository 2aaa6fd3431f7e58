// The core and its packed half spectrum, and the table of roots that other kernels read.
#pragma once

#include "../common/tubes.h"
#include "launch.h"

namespace tcur {

// cos and sin of 2πm/n3 for m = 0 … n3-1, in device memory, in fp32 and in fp64.
struct Tables {
  const float* data;
  const double2* exact;
  int n3;

  // cos and sin of 2πm/n3, 0 <= m < n3.
  TCUR_DEVICE float2 root(int m) const {
    return reinterpret_cast<const float2*>(data)[m];
  }
};

// The tables of a length on the current device, whose number is `device`. The first call creates
// them. They live as long as the process, because a CUDA graph may keep pointers to them.
Tables root_tables(int device, int n3);

// A selection of cores: entry i means core ids[i], or core i if there are no ids. An id that is out
// of range means a core of NaN: the kernels read nothing past the end, and the NaN in the result
// shows the mistake.
struct CoreIds {
  const int64_t* ids;
  int64_t cores;

  TCUR_DEVICE int64_t operator[](int64_t i) const {
    return ids == nullptr ? i : ids[i];
  }
  TCUR_DEVICE bool is_valid(int64_t id) const {
    return id >= 0 && id < cores;
  }
};

struct SpectrumArgs {
  const float* core;  // [cores, n3, rank, rank]
  CoreIds ids;
  float* core_hat;  // [count, n3, rank, rank], weighted by scale * inverse_weight
  int64_t count;
  int rank;
  double scale;
  Tables tables;
};

void make_spectrum(const SpectrumArgs& args, Stream stream);

// Rows sorted by their cores, as row_order.h sorts them: rows[begin[c]] … rows[end[c]-1] belong to
// core c.
struct RowOrder {
  const int *rows, *begin, *end;
};

struct CoreArgs {
  const float* parts;  // [rows, parts_per_row, n3, rank, rank], packed ∂Û, to be summed in order
  int64_t rows, parts_per_row;
  RowOrder order;  // null: all rows belong to core 0
  int64_t cores;
  int rank;
  float* core;  // [cores, n3, rank, rank], scale times the inverse transform of the sums
  double scale;
  Tables tables;
};

void make_core(const CoreArgs& args, Stream stream);

struct PackedArgs {
  const float* parts;  // [count, size], of packed ∂Û
  int64_t count, size;
  float* packed;  // [size], their sum in order, not transformed
};

void sum_packed(const PackedArgs& args, Stream stream);

}  // namespace tcur
