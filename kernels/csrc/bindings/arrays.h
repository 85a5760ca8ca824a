// Checks of the arrays that cross the Python boundary. A mistake raises ValueError with one sentence.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

namespace ktd {

namespace nb = nanobind;

// Any CPU array (numpy, torch, …) of type T, whatever its strides; read-only memory is accepted for const T.
template <class T>
using Array = nb::ndarray<T, nb::device::cpu>;

inline std::string shape_text(const int64_t* shape, size_t dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

[[noreturn]] inline void reject(const std::string& sentence) { throw nb::value_error(sentence.c_str()); }

// Dimension sizes must match; -1 accepts any. The last dimension must be contiguous; with `strided` the outer
// ones may have gaps, otherwise the whole array must be contiguous.
template <class T>
void check_array(const Array<T>& a, const char* name, std::initializer_list<int64_t> shape,
                 bool strided = false) {
  bool fits = a.ndim() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    const int64_t want = shape.begin()[i];
    fits = want < 0 || want == static_cast<int64_t>(a.shape(i));
  }
  if (!fits) {
    std::string got = "[";
    for (size_t i = 0; i < a.ndim(); ++i) got += (i ? ", " : "") + std::to_string(a.shape(i));
    reject(std::string(name) + " has shape " + got + "], but this call needs " +
           shape_text(shape.begin(), shape.size()) + " (-1 = any size).");
  }
  if (a.size() == 0) return;
  int64_t expected = 1;
  for (size_t i = a.ndim(); i-- > 0;) {
    if (a.shape(i) <= 1) continue;
    const bool last = i + 1 == a.ndim();
    if ((last || !strided) && a.stride(i) != expected)
      reject(std::string(name) +
             (last ? " must be contiguous in its last dimension." : " must be contiguous."));
    expected *= static_cast<int64_t>(a.shape(i));
  }
}

inline int64_t size_of(const auto& array, size_t dim) { return static_cast<int64_t>(array.shape(dim)); }

// Every value of `values` must lie in [0, limit).
template <class T>
void check_range(const T* values, int64_t n, int64_t limit, const char* name, const char* of) {
  for (int64_t i = 0; i < n; ++i)
    if (values[i] < 0 || values[i] >= limit)
      reject(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(values[i]) + ", but " +
             of + " has " + std::to_string(limit) + " entries.");
}

}  // namespace ktd
