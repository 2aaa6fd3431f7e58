// Reads and writes numbers in memory, mostly four neighbours at a time.
#pragma once

#include "../common/codelets.h"
#include "../common/elements.h"
#include "launch.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#else
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#endif

#include <cstring>
#include <type_traits>

namespace tcur {

// W neighbouring numbers in registers, read and written at once. The codelets compute with them.
template <int W>
struct alignas(4 * W) Lanes {
  float v[W];

  template <class F>
  TCUR_HOST_DEVICE static Lanes of(F&& f) {
    Lanes made;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      made.v[i] = f(i);
    }
    return made;
  }
  TCUR_HOST_DEVICE friend Lanes operator+(const Lanes& x, const Lanes& y) {
    return of([&](int i) __attribute__((always_inline)) { return x.v[i] + y.v[i]; });
  }
  TCUR_HOST_DEVICE friend Lanes operator-(const Lanes& x, const Lanes& y) {
    return of([&](int i) __attribute__((always_inline)) { return x.v[i] - y.v[i]; });
  }
  TCUR_HOST_DEVICE friend Lanes operator*(float factor, const Lanes& x) {
    return of([&](int i) __attribute__((always_inline)) { return factor * x.v[i]; });
  }
  TCUR_HOST_DEVICE Lanes operator-() const {
    return of([&](int i) __attribute__((always_inline)) { return -v[i]; });
  }

  // Its first (0) or second (1) half.
  template <int WHICH>
  TCUR_HOST_DEVICE Lanes<W / 2> half() const {
    return Lanes<W / 2>::of([&](int i)
                                __attribute__((always_inline)) { return v[WHICH * (W / 2) + i]; });
  }
  template <int WHICH>
  TCUR_HOST_DEVICE void half(const Lanes<W / 2>& x) {
#pragma unroll
    for (int i = 0; i < W / 2; ++i) {
      v[WHICH * (W / 2) + i] = x.v[i];
    }
  }
};
using Pair = Lanes<2>;
using Quad = Lanes<4>;

// CUDA's vector of W numbers, which one instruction reads or writes.
template <int W>
struct VectorOf;
template <>
struct VectorOf<1> {
  using Type = float;
};
template <>
struct VectorOf<2> {
  using Type = float2;
};
template <>
struct VectorOf<4> {
  using Type = float4;
};

// Reads W numbers of shared memory. They start at a multiple of W.
template <int W>
TCUR_DEVICE Lanes<W> load_lanes(const float* from) {
  const auto vector = *reinterpret_cast<const typename VectorOf<W>::Type*>(from);
  Lanes<W> lanes;
  memcpy(&lanes, &vector, sizeof lanes);
  return lanes;
}

template <int W>
TCUR_DEVICE void store_lanes(float* to, const Lanes<W>& lanes) {
  typename VectorOf<W>::Type vector;
  memcpy(&vector, &lanes, sizeof lanes);
  *reinterpret_cast<typename VectorOf<W>::Type*>(to) = vector;
}

// Reads four aligned numbers of device memory. No kernel may write them meanwhile.
TCUR_DEVICE Quad load_constant(const float* from) {
  const auto* vector = reinterpret_cast<const float4*>(from);
#ifdef __CUDACC__
  const float4 x = __ldg(vector);
#else
  const float4 x = *vector;
#endif
  return {x.x, x.y, x.z, x.w};
}

// Bytes of a number. Kernels take numbers of 4 and of 2 bytes, and no others. The compiler must
// know that: where kernels divide by the bytes, a third choice took registers that are not there.
TCUR_HOST_DEVICE constexpr int bytes_of(Element element) {
  return element == Element::f32 ? 4 : 2;
}
// Calls f with them as a constant.
template <class F>
TCUR_DEVICE void with_bytes(Element element, F&& f) {
  if (element == Element::f32) {
    f(Constant<4>{});
  } else {
    f(Constant<2>{});
  }
}

// Calls f with the bytes as a constant and with the element itself, which the compiler then knows.
// What widens and narrows numbers of 2 bytes is compiled for each type, and does not decide again
// for every number.
template <class F>
TCUR_DEVICE void with_number(Element element, F&& f) {
  if (element == Element::f32) {
    f(Constant<4>{}, Element::f32);
  } else if (element == Element::bf16) {
    f(Constant<2>{}, Element::bf16);
  } else {
    f(Constant<2>{}, Element::f16);
  }
}

TCUR_DEVICE float widen(unsigned short bits, Element element) {
#ifdef __CUDACC__
  return element == Element::bf16 ? __bfloat162float(__ushort_as_bfloat16(bits))
                                  : __half2float(__ushort_as_half(bits));
#else
  return element == Element::bf16 ? c10::detail::f32_from_bits(bits)
                                  : c10::detail::fp16_ieee_to_fp32_value(bits);
#endif
}

TCUR_DEVICE unsigned short narrow(float value, Element element) {
#ifdef __CUDACC__
  return element == Element::bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                  : __half_as_ushort(__float2half_rn(value));
#else
  return element == Element::bf16 ? c10::detail::round_to_nearest_even(value)
                                  : c10::detail::fp16_ieee_from_fp32_value(value);
#endif
}

// Narrows two numbers into one word, which takes one instruction on a GPU.
TCUR_DEVICE unsigned narrow_pair(float first, float second, Element element) {
#ifdef __CUDACC__
  unsigned bits;
  if (element == Element::bf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
#else
  return narrow(first, element) | static_cast<unsigned>(narrow(second, element)) << 16;
#endif
}

// Reads one number of 4 or of 2 bytes.
TCUR_DEVICE float load_number(const void* data, int64_t at, Element element) {
  return element == Element::f32 ? static_cast<const float*>(data)[at]
                                 : widen(static_cast<const unsigned short*>(data)[at], element);
}

TCUR_DEVICE void store_number(void* data, int64_t at, float value, Element element) {
  if (element == Element::f32) {
    static_cast<float*>(data)[at] = value;
  } else {
    static_cast<unsigned short*>(data)[at] = narrow(value, element);
  }
}

// Four neighbouring numbers of BYTES each, as they lie in memory.
template <int BYTES>
struct Four;
template <>
struct Four<4> {
  using Raw = Quad;
  using Scalar = float;
  TCUR_DEVICE static Quad widened(const Raw& raw, Element) {
    return raw;
  }
  TCUR_DEVICE static Raw narrowed(const Quad& value, Element) {
    return value;
  }
};
template <>
struct Four<2> {
  using Raw = uint2;
  using Scalar = unsigned short;
  TCUR_DEVICE static Quad widened(const Raw& raw, Element element) {
    return Quad::of([&](int i) __attribute__((always_inline)) {
      return widen(static_cast<unsigned short>((i < 2 ? raw.x : raw.y) >> (i % 2 * 16)), element);
    });
  }
  TCUR_DEVICE static Raw narrowed(const Quad& value, Element element) {
    unsigned bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits[i] = narrow(value.v[i], element);
    }
    return {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
  }
};

// Returns the address of number `index` behind another address, numbers of BYTES each. This takes
// one instruction. The compiler alone would take two, to compute index * BYTES once for many
// addresses.
template <int BYTES>
TCUR_DEVICE const char* behind(const void* address, unsigned index) {
#ifdef __CUDACC__
  const char* result;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(index), "n"(BYTES), "l"(address));
  return result;
#else
  return static_cast<const char*>(address) + static_cast<uint64_t>(index) * BYTES;
#endif
}
template <int BYTES>
TCUR_DEVICE char* behind(void* address, unsigned index) {
  return const_cast<char*>(behind<BYTES>(static_cast<const void*>(address), index));
}

// W neighbouring numbers of BYTES each, as they lie in memory, aligned together. They are read or
// written only once, so loads and stores mark them as the first to leave the caches.
template <int BYTES, int W>
struct Raw {
  using Type = std::conditional_t<
      BYTES == 4,
      typename VectorOf<W>::Type,
      std::conditional_t<W == 4, uint2, unsigned>>;

  TCUR_DEVICE static Type load(const void* data) {
    const auto* from = static_cast<const Type*>(data);
#ifdef __CUDACC__
    return __ldcs(from);
#else
    return *from;
#endif
  }
  TCUR_DEVICE static void store(void* data, const Type& raw) {
    auto* to = static_cast<Type*>(data);
#ifdef __CUDACC__
    __stcs(to, raw);
#else
    *to = raw;
#endif
  }

  TCUR_DEVICE static Lanes<W> widened(const Type& raw, Element element) {
    Lanes<W> lanes;
    if constexpr (BYTES == 4) {
      memcpy(&lanes, &raw, sizeof lanes);
    } else {
      unsigned words[W / 2];
      memcpy(words, &raw, sizeof words);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        lanes.v[i] = widen(static_cast<unsigned short>(words[i / 2] >> (i % 2 * 16)), element);
      }
    }
    return lanes;
  }
  TCUR_DEVICE static Type narrowed(const Lanes<W>& lanes, Element element) {
    Type raw;
    if constexpr (BYTES == 4) {
      memcpy(&raw, &lanes, sizeof raw);
    } else {
      unsigned words[W / 2];
#pragma unroll
      for (int i = 0; i < W / 2; ++i) {
        words[i] = narrow_pair(lanes.v[2 * i], lanes.v[2 * i + 1], element);
      }
      memcpy(&raw, words, sizeof raw);
    }
    return raw;
  }
};

// Reads four numbers, of which only `count` exist; the others become zero. With `vector`, which
// promises alignment and that all four exist or none, it reads them at once.
template <int BYTES>
TCUR_DEVICE typename Four<BYTES>::Raw load_four(
    const void* data, int64_t index, int64_t count, bool vector) {
  typename Four<BYTES>::Raw raw{};
  const auto* from = static_cast<const typename Four<BYTES>::Scalar*>(data) + index;
  if (vector) {
    if (count > 0) {
      raw = *reinterpret_cast<const typename Four<BYTES>::Raw*>(from);
    }
    return raw;
  }
  unsigned bits[4] = {0, 0, 0, 0};
  for (int i = 0; i < 4; ++i) {
    if (i < count) {
      if constexpr (BYTES == 4) {
        raw.v[i] = from[i];
      } else {
        bits[i] = from[i];
      }
    }
  }
  if constexpr (BYTES == 2) {
    raw = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
  }
  return raw;
}

template <int BYTES>
TCUR_DEVICE void store_four(
    void* data, int64_t index, int64_t count, bool vector, const typename Four<BYTES>::Raw& raw) {
  auto* to = static_cast<typename Four<BYTES>::Scalar*>(data) + index;
  if (vector) {
    if (count > 0) {
      *reinterpret_cast<typename Four<BYTES>::Raw*>(to) = raw;
    }
    return;
  }
  for (int i = 0; i < 4; ++i) {
    if (i < count) {
      if constexpr (BYTES == 4) {
        to[i] = raw.v[i];
      } else {
        to[i] = static_cast<unsigned short>((i < 2 ? raw.x : raw.y) >> (i % 2 * 16));
      }
    }
  }
}

}  // namespace tcur
