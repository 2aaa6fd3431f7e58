// The codelets of csrc/common/codelets.h for Python, by pybind11: tests/test_codelets.py compiles
// this, and nothing of it is shipped.
#include "common/codelets.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

namespace {

template <class T>
using Numbers = std::vector<T>;

// One codelet of one length: numbers in, as many numbers out.
template <class T, int N, class F>
Numbers<T> real(const Numbers<T>& x, F&& transform) {
  T values[N];
  std::copy_n(x.begin(), N, values);
  transform(values);
  return Numbers<T>(values, values + N);
}

// The real parts come first, then the imaginary parts.
template <class T, int N>
Numbers<T> complex(const Numbers<T>& x) {
  T re[N], im[N];
  std::copy_n(x.begin(), N, re);
  std::copy_n(x.begin() + N, N, im);
  tcur::complex_inverse<N, T>(re, im);
  Numbers<T> y(re, re + N);
  y.insert(y.end(), im, im + N);
  return y;
}

// Complex and shifted transforms are steps within another transform, and shorter.
template <class T, int N>
Numbers<T> of_length(const std::string& name, const Numbers<T>& x) {
  const size_t wanted = name == "complex_inverse" ? 2 * N : N;
  if (x.size() != wanted) {
    throw pybind11::value_error("x: expected " + std::to_string(wanted) + " numbers");
  }
  if (name == "real_inverse") {
    return real<T, N>(x, [](T(&v)[N]) { tcur::real_inverse<N, T>(v); });
  } else if (name == "real_forward") {
    return real<T, N>(x, [](T(&v)[N]) { tcur::real_forward<N, T>(v); });
  }
  if constexpr (N <= tcur::kLongestInner) {
    if (name == "shifted_inverse") {
      return real<T, N>(x, [](T(&v)[N]) { tcur::shifted_inverse<N, T>(v); });
    } else if (name == "shifted_forward") {
      return real<T, N>(x, [](T(&v)[N]) { tcur::shifted_forward<N, T>(v); });
    } else if (name == "complex_inverse") {
      return complex<T, N>(x);
    }
  }
  throw pybind11::value_error("name: expected a codelet of that length, got " + name);
}

template <class T, int... I>
Numbers<T> of_any_length(
    const std::string& name, int n, const Numbers<T>& x, std::integer_sequence<int, I...>) {
  Numbers<T> y;
  const bool is_known = ((n == I + 1 && (y = of_length<T, I + 1>(name, x), true)) || ...);
  if (!is_known) {
    throw pybind11::value_error("n: expected 1 … " + std::to_string(sizeof...(I)));
  }
  return y;
}

template <class T>
Numbers<T> transform(const std::string& name, int n, const Numbers<T>& x) {
  return of_any_length<T>(
      name, n, x, std::make_integer_sequence<int, static_cast<int>(tcur::kLongestOuter)>());
}

}  // namespace

PYBIND11_MODULE(codelets, m) {
  m.attr("longest") = pybind11::make_tuple(tcur::kLongestOuter, tcur::kLongestInner);
  m.def("transform32", &transform<float>);
  m.def("transform64", &transform<double>);
}
