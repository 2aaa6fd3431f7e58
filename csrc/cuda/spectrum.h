// The core and its packed half spectrum, and the table that other kernels read.
#pragma once

#include "launch.h"

namespace tcur {

// What one launch of `make_spectrum` leaves for the kernels after it, in device memory: cos and sin
// of 2πm/n3 for m = 0 … n3-1.
struct Tables {
  float* data;
  int n3;

  static int64_t size(int n3) {
    return 2 * static_cast<int64_t>(n3);
  }
  // cos and sin of 2πm/n3, 0 <= m < n3.
  TCUR_DEVICE float2 root(int m) const {
    return reinterpret_cast<const float2*>(data)[m];
  }
};

// Some of several cores: entry i stands for core ids[i], or for core i without ids. An id out of
// range stands for a core of NaN: nothing is read past the end, and the result tells.
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
  int64_t count;    // entries; 0: tables alone
  int rank;
  double scale;
  Tables tables;
};

void make_spectrum(const SpectrumArgs& args, Stream stream);

struct CoreArgs {
  const float* parts;  // [rows, parts_per_row, n3, rank, rank], packed ∂Û, to be summed in order
  int64_t rows, parts_per_row;
  CoreIds ids;  // the core that a row belongs to; all rows belong to core 0 without ids
  int n3, rank;
  float* core;  // [cores, n3, rank, rank]
};

void make_core(const CoreArgs& args, Stream stream);

}  // namespace tcur
