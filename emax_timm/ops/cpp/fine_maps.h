// The pass over a tile that its fine maps follow from, in the steps of `fine_maps` in
// `portable/fine_maps.py`; the backward pass begins with it as well.
#pragma once

#include "tiles.h"

namespace emax {

// The weights of the convolutions and the norm, float32 and contiguous.
struct Weights {
  Tensor mixing, shift;         // conv1x1: [d, d], [d]
  Tensor conv, conv_bias;       // conv3x3: [d, d * 9], [d]
  Tensor gn_weight, gn_bias;    // [d]
  Tensor constant, kernel;      // softmax(gn_bias) [d], and its product with conv3x3 [d, 9]
  float offset;                 // the product of softmax(gn_bias) with conv3x3's bias
  float eps;
};

Weights weights_of(const std::vector<Tensor>& spatial, double eps);

// Scratch memory of one thread for a few tiles. A strip holds the pooled rows of a channel, then its
// pooled columns; the strips of all tiles stand in one row per channel.
struct Work {
  int64_t length;   // of a row of strips
  float* strips;    // pooled rows and columns [d, length]
  float* gates;     // their gates in (0, 1) [d, length]
  float* borders;   // [together, d * 9]
  float* U;         // gated features of a tile less a constant near their mean, [d, pixels]
  float* mask;      // ones [w]
  float *shift, *square;  // [d]
  Vec* vectors;     // vectors whose lanes are to be added up

  static int64_t vector_count(const Shape& s) { return 2 * s.d + V; }
  static int64_t size(const Shape& s) {
    return 2 * s.d * round_up(s.together * s.strip(), V) + s.together * s.d * TAPS +
           s.d * s.pixels() + s.lines * V + 2 * s.d + vector_count(s) * V +
           32 * 10;
  }
  Work(const Shape& s, Scratch& scratch)
      : length(round_up(s.together * s.strip(), V)) {
    strips = scratch.take(s.d * length);
    gates = scratch.take(s.d * length);
    borders = scratch.take(s.together * s.d * TAPS);
    U = scratch.take(s.d * s.pixels());
    mask = scratch.take(s.lines * V);
    shift = scratch.take(s.d);
    square = scratch.take(s.d);
    vectors = reinterpret_cast<Vec*>(scratch.take(vector_count(s) * V));
    std::fill_n(mask, s.w, 1.f);
  }
};

// The pooled rows and columns, and the means, of the images of a tile. The rows of CHANNELS images are
// added up together, V at a time.
template <int N, int CHANNELS>
void strip_means(const Shape& s, const float* images, Work& work, float* strips,
                 float* mean) {
  constexpr int ROWS = V / CHANNELS;
  const int64_t lines = N ? N : s.lines, rest = s.rest(), h = s.h, w = s.w, length = work.length;
  const Vec per_row(1.f / w), per_column(1.f / h);
  Vec* const totals = work.vectors;
  for (int64_t c = 0; c < s.d; c += CHANNELS) {
    const int64_t channels = std::min<int64_t>(CHANNELS, s.d - c);
    const float* const image = images + c * s.pixels();
    float* const strip = strips + c * length;
    Vec column[CHANNELS][N ? N : 1], total(0);
    if (!N) std::fill_n(strip + h, w, 0.f);
    for (int64_t begin = 0; begin < h; begin += ROWS) {
      Vec row[V];
#pragma GCC unroll 16
      for (int k = 0; k < V; ++k) {
        const int64_t i = begin + k % ROWS;
        if (k / ROWS >= channels || i >= h) continue;
        const float* const from = image + k / ROWS * s.pixels() + i * w;
        for (int64_t v = 0; v < lines; ++v) {
          const Vec value = load(from + v * V, v + 1 < lines ? V : rest);
          row[k] = row[k] + value;
          if constexpr (N) column[k / ROWS][v] = column[k / ROWS][v] + value;
          else add_to(strip + h + v * V, value, v + 1 < lines ? V : rest);
        }
      }
      const Vec means = lane_sums(row) * per_row;
      total = total + means;
      if constexpr (CHANNELS == 1) {
        means.store(strip + begin, std::min(V, h - begin));
      } else {
        float all[V];
        means.store(all);
        for (int64_t k = 0; k < channels; ++k)
          load(all + k * ROWS, h).store(strip + k * length, h);
      }
    }
    for (int64_t k = 0; k < channels; ++k) {
      float* const columns = strip + k * length + h;
      if constexpr (N)
        for (int64_t v = 0; v < N; ++v)
          (column[k][v] * per_column).store(columns + v * V, v + 1 < N ? V : rest);
      else
        along(w, [&](int64_t at, int64_t count) {
          (load(columns + at, count) * per_column).store(columns + at, count);
        });
      if constexpr (CHANNELS == 1) totals[c] = total;
      else totals[c + k] = load(strip + k * length, h);
    }
  }
  lane_sums(totals, s.d, mean, 1.f / h);
}

// Computes out[o] = f(sum over c of matrix[o, c] * in[c] + bias[o]) on rows of strips; `matrix` has
// strides.
template <int OUT, int VECTORS, typename F>
void mix_block(const Shape& s, const float* matrix, int64_t out_stride, int64_t in_stride,
               const float* bias, const float* in, float* out, int64_t length, F f) {
  Vec total[OUT][VECTORS];
  for (int k = 0; k < OUT; ++k)
    for (int v = 0; v < VECTORS; ++v) total[k][v] = Vec(bias ? bias[k] : 0.f);
  for (int64_t c = 0; c < s.d; ++c) {
    Vec value[VECTORS];
    for (int v = 0; v < VECTORS; ++v) value[v] = load(in + c * length + v * V);
    for (int k = 0; k < OUT; ++k) {
      const Vec weight(matrix[k * out_stride + c * in_stride]);
      for (int v = 0; v < VECTORS; ++v) total[k][v] = fma(weight, value[v], total[k][v]);
    }
  }
  for (int k = 0; k < OUT; ++k)
    for (int v = 0; v < VECTORS; ++v) f(total[k][v]).store(out + k * length + v * V);
}
template <int OUT, typename F>
void mix_outputs(const Shape& s, const float* matrix, int64_t out_stride, int64_t in_stride,
                 const float* bias, const float* in, float* out, int64_t length, F f) {
  constexpr int TWO = V == 16 ? 2 : 1;  // as many as the registers hold
  int64_t at = 0;
  for (; at + TWO * V <= length; at += TWO * V)
    mix_block<OUT, TWO>(s, matrix, out_stride, in_stride, bias, in + at, out + at, length, f);
  for (; at < length; at += V)
    mix_block<OUT, 1>(s, matrix, out_stride, in_stride, bias, in + at, out + at, length, f);
}
template <typename F>
void mix_strips(const Shape& s, const float* matrix, int64_t out_stride, int64_t in_stride,
                const float* bias, const float* in, float* out, int64_t length, F f) {
  int64_t o = 0;
  const auto run = [&](auto outputs) {
    mix_outputs<outputs>(s, matrix + o * out_stride, out_stride, in_stride, bias ? bias + o : bias,
                         in, out + o * length, length, f);
  };
  for (; o + 8 <= s.d; o += 8) run(std::integral_constant<int, 8>());
  for (; o < s.d; ++o) run(std::integral_constant<int, 1>());
}

// The means of a channel that each of the nine kernel offsets sees, over the output: [d, 9].
inline void border_means(const Shape& s, const float* images, const float* strips,
                         int64_t length, const float* mean, float* borders) {
  const float per_row = 1.f / s.h, per_column = 1.f / s.w, per_pixel = 1.f / s.pixels();
  for (int64_t c = 0; c < s.d; ++c) {
    const float *const x = images + c * s.pixels(), *const end = x + (s.h - 1) * s.w;
    const float* const strip = strips + c * length;
    float* const taps = borders + c * TAPS;
    // The upper offsets miss the last row, the lower ones the first; the columns likewise.
    const float above = strip[s.h - 1] * per_row, below = strip[0] * per_row;
    const float left = strip[s.h + s.w - 1] * per_column, right = strip[s.h] * per_column;
    const float upper = mean[c] - above, lower = mean[c] - below;
    taps[0] = upper - left + end[s.w - 1] * per_pixel;
    taps[1] = upper;
    taps[2] = upper - right + end[0] * per_pixel;
    taps[3] = mean[c] - left;
    taps[4] = mean[c];
    taps[5] = mean[c] - right;
    taps[6] = lower - left + x[s.w - 1] * per_pixel;
    taps[7] = lower;
    taps[8] = lower - right + x[0] * per_pixel;
  }
}

// For each channel, minus a constant that is near the mean of the gated features.
inline void find_shifts(const Shape& s, const float* gates, const float* mean, Work& work) {
  for (int64_t c = 0; c < s.d; ++c) {
    const float* const gate = gates + c * work.length;
    Vec h(0), w(0);
    along(s.h, [&](int64_t at, int64_t count) { h = h + load(gate + at, count); });
    along(s.w, [&](int64_t at, int64_t count) { w = w + load(gate + s.h + at, count); });
    work.vectors[c] = h;
    work.vectors[s.d + c] = w;
  }
  lane_sums(work.vectors, s.d, work.shift, 1.f / s.h);
  lane_sums(work.vectors + s.d, s.d, work.square, 1.f / s.w);
  along(s.d, [&](int64_t at, int64_t count) {
    const Vec gate = load(work.shift + at, count) * load(work.square + at, count);
    (gate * load(mean + at, count).neg()).store(work.shift + at, count);
  });
}

// The gated features less a constant near their mean, and their first two moments. Rows are stored
// in whole vectors; the next row overwrites the values behind the end of one.
template <int N>
void deviations(const Shape& s, const float* images, const float* gates,
                const float* mean, Work& work, float* centre) {
  const int64_t lines = N ? N : s.lines, rest = s.rest(), h = s.h, w = s.w;
  find_shifts(s, gates, mean, work);
  Vec mask[N ? N : 1];
  for (int64_t v = 0; v < N; ++v) mask[v] = load(work.mask + v * V);
  Vec *const totals = work.vectors, *const squares = work.vectors + s.d;
  for (int64_t c = 0; c < s.d; ++c) {
    const float *x = images + c * s.pixels(), *const gate_h = gates + c * work.length;
    const float* const gate_w = gate_h + h;
    float* u = work.U + c * s.pixels();
    const Vec shift(work.shift[c]);
    Vec column[N ? N : 1], shifts[N ? N : 1], total[N ? N : 1], square[N ? N : 1];
    for (int64_t v = 0; v < N; ++v) {
      column[v] = load(gate_w + v * V, v + 1 < N ? V : rest);
      shifts[v] = shift * mask[v];
    }
    for (int64_t i = 0; i < h; ++i, x += w, u += w) {
      const Vec row(gate_h[i]);
      for (int64_t v = 0; v < lines; ++v) {
        const int64_t k = N ? v : 0, count = v + 1 < lines ? V : rest;
        if constexpr (!N) {
          column[0] = load(gate_w + v * V, count);
          shifts[0] = shift * load(work.mask + v * V);
        }
        const Vec value = fma(load(x + v * V, count) * column[k], row, shifts[k]);
        value.store(u + v * V);
        total[k] = total[k] + value;
        square[k] = fma(value, value, square[k]);
      }
    }
    for (int64_t v = 1; v < N; ++v) {
      total[0] = total[0] + total[v];
      square[0] = square[0] + square[v];
    }
    totals[c] = total[0];
    squares[c] = square[0];
  }
  lane_sums(totals, s.d, centre, 1.f / s.pixels());
  lane_sums(squares, s.d, work.square, 1.f / s.pixels());
}

// What both passes need of `count` tiles: the pooled rows and columns, their gates, the border means,
// and the means [count, d].
inline void begin_tiles(const Shape& s, const Weights& weights, const float* images, int64_t count,
                        Work& work, float* mean) {
  for (int64_t t = 0; t < count; ++t)
    with_lines(s.lines, [&](auto n) {
      float *const strips = work.strips + t * s.strip(), *const means = mean + t * s.d;
      if constexpr (n == 1)
        if (s.h <= V / 2) return strip_means<n, 2>(s, images + t * s.tile(), work, strips, means);
      strip_means<n, 1>(s, images + t * s.tile(), work, strips, means);
    });
  mix_strips(s, weights.mixing.const_data_ptr<float>(), s.d, 1,
             weights.shift.const_data_ptr<float>(), work.strips, work.gates, work.length, sigmoid);
  for (int64_t t = 0; t < count; ++t)
    border_means(s, images + t * s.tile(), work.strips + t * s.strip(), work.length, mean + t * s.d,
                 work.borders + t * s.d * TAPS);
}

}  // namespace emax
