// The consumer that rounds tiles of W_eff (w_eff_tiles_kernel.h) and writes them to memory. Only
// the result itself is as large as W.
#pragma once

#include "w_eff_tiles_kernel.h"

namespace tcur::TCUR_ISA {

// Writes numbers of type O from an address on.
template <class T, class O>
struct StoreNumbers {
  O* to;

  TCUR_TARGET void put(int64_t at, Vec<T> v) const {
    tcur::TCUR_ISA::put<false, O, T>(to + at, v);
  }
  TCUR_TARGET void put(int64_t at, T value) const {
    to[at] = Narrow<O, T>::from(value);
  }
};

// STREAM: blocks whose rows begin at cache lines are written without caching.
template <class T, class O, bool STREAM>
struct StoreTile {
  void* const* out;

  struct Sink {
    O* to;
    bool is_aligned;

    TCUR_TARGET bool takes_whole_blocks() const {
      return is_aligned || !STREAM;
    }
    TCUR_TARGET void put_whole(int64_t at, Vec<T> v) const {
      tcur::TCUR_ISA::put<STREAM, O, T>(to + at, v);
    }
    TCUR_TARGET StoreNumbers<T, O> row(int64_t at) const {
      return {to + at};
    }
  };

  TCUR_TARGET Sink sink(int64_t slice, int64_t first, int64_t stride) const {
    O* to = static_cast<O*>(out[slice]) + first;
    // If the distance between rows is a multiple of a cache line, all rows of a block are aligned
    // like its first. A tile always begins at a multiple of the block.
    return {to, is_aligned(to, 64) && stride * sizeof(O) % 64 == 0};
  }
  TCUR_TARGET void finish() const {
    if (STREAM) {
      stream_fence();
    }
  }
};

template <class T>
TCUR_TARGET int64_t materialize_scratch(const MaterializeArgs<T>& m) {
  return w_eff_scratch(m.w_eff);
}

template <class T, class O, bool STREAM>
TCUR_TARGET void store_tiles(const MaterializeArgs<T>& m, int64_t task, T* scratch) {
  w_eff_tiles(m.w_eff, task, scratch, StoreTile<T, O, STREAM>{m.out});
}

template <class T>
using StoreTiles = void (*)(const MaterializeArgs<T>&, int64_t, T*);

template <class T>
TCUR_TARGET void materialize(const MaterializeArgs<T>& m, int64_t task, T* scratch) {
  const auto store = with_any_element(m.out_element, [&m](auto element) -> StoreTiles<T> {
    using O = NumberOfConstant<decltype(element)>;
    return m.stream ? &store_tiles<T, O, true> : &store_tiles<T, O, false>;
  });
  store(m, task, scratch);
}

template int64_t materialize_scratch(const MaterializeArgs<float>&);
template int64_t materialize_scratch(const MaterializeArgs<double>&);
template void materialize(const MaterializeArgs<float>&, int64_t, float*);
template void materialize(const MaterializeArgs<double>&, int64_t, double*);

}  // namespace tcur::TCUR_ISA
