// Operations on vectors of floats, as wide as those of the CPU, that ATen's vectors lack.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace emax {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t V = Vec::size();

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Loads the first `count` floats, with zeros behind them.
inline Vec load(const float* from, int64_t count = V) { return Vec::loadu(from, count); }

inline void add_to(float* sums, const Vec& values, int64_t count) {
  (load(sums, count) + values).store(sums, count);
}

inline Vec fma(const Vec& a, const Vec& b, const Vec& c) { return at::vec::fmadd(a, b, c); }

inline Vec sigmoid(const Vec& x) { return Vec(1) / (Vec(1) + x.neg().exp()); }

// Calls f(place, count) for the vectors of a row, the last of which may be short.
template <typename F>
void along(int64_t length, F f) {
  int64_t at = 0;
  for (; at + V <= length; at += V) f(at, V);
  if (at < length) f(at, length - at);
}

// Calls f(begin, count) for pieces of COUNT, then for single elements; the count is a constant.
template <int COUNT, typename F>
void in_pieces(int64_t begin, int64_t end, F f) {
  for (; begin + COUNT <= end; begin += COUNT) f(begin, std::integral_constant<int, COUNT>());
  for (; begin < end; ++begin) f(begin, std::integral_constant<int, 1>());
}

inline float sum(const Vec& values) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, values);
}

// The sums over the lanes of V rows, added up pair by pair, which takes a third of the operations of
// single sums.
inline Vec lane_sums(const Vec (&rows)[V]) {
  Vec level[V / 2];
  const auto add = [](const Vec& a, const Vec& b) {
    const auto pair = at::vec::deinterleave2(a, b);
    return pair.first + pair.second;
  };
#pragma GCC unroll 16
  for (int i = 0; i < V / 2; ++i) level[i] = add(rows[2 * i], rows[2 * i + 1]);
#pragma GCC unroll 16
  for (int half = V / 4; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) level[i] = add(level[2 * i], level[2 * i + 1]);
  return level[0];
}

// Computes out[i] = factor * sum over the lanes of rows[i]. It also reads behind the last row, up to
// a multiple of V rows, so that memory must exist.
inline void lane_sums(const Vec* rows, int64_t count, float* out, float factor) {
  for (int64_t at = 0; at < count; at += V) {
    Vec some[V];
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) some[i] = rows[at + i];
    (lane_sums(some) * Vec(factor)).store(out + at, std::min(V, count - at));
  }
}

// Transposes a block of at most V x V floats.
inline void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns,
                      float* to, int64_t to_row) {
  if (rows == V && columns == V)
    at::vec::transpose_mxn<float, V, V>(from, from_row, to, to_row);
  else
    at::vec::transpose_mxn<float>(from, from_row, to, to_row, rows, columns);
}

// Computes the softmax of d logits and returns their logsumexp.
inline float softmax(int64_t d, const float* logits, float* out) {
  const float highest = *std::max_element(logits, logits + d);
  float total = 0;
  along(d, [&](int64_t at, int64_t count) {
    (load(logits + at, count) - Vec(highest)).exp().store(out + at, count);
    for (int64_t c = at; c < at + count; ++c) total += out[c];
  });
  along(d, [&](int64_t at, int64_t count) {
    (load(out + at, count) / Vec(total)).store(out + at, count);
  });
  return highest + std::log(total);
}

// Calls f with the number of vectors in a row as a constant where it is a common one, else with 0.
template <typename F>
void with_lines(int64_t lines, F f) {
  switch (lines) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 4: return f(std::integral_constant<int, 4>());
    case 7: return f(std::integral_constant<int, 7>());
    default: return f(std::integral_constant<int, 0>());
  }
}

}  // namespace emax
