// EMAX's passes over feature maps, for CPUs. `attention/functional.py` and `attention/analytic.py`
// have the same in PyTorch and say what each computes; `docs/emax.md` derives it.
//
// The work is cut into tiles, one per sample and fine group. A tile is read once, whatever its
// dtype and memory format, and stays in the cache for all that is done with it. What moves along
// rows and columns reads it into float32 scratch memory with a zero behind each row and rows of
// zeros behind the last, so that a shift by a row or a column is a shift of the pointer. All else
// takes an image for one long row, and reads it where it is if it can.
//
// Letters: b batch, F fine groups, d channels of one, h and w height and width.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t V = Vec::size();
constexpr int TAPS = 9;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

Vec load(const float* from, int64_t count = V) { return Vec::loadu(from, count); }

Vec fma(const Vec& a, const Vec& b, const Vec& c) { return at::vec::fmadd(a, b, c); }

float sum(const Vec& values) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, values);
}

Vec sigmoid(const Vec& x) { return Vec(1) / (Vec(1) + x.neg().exp()); }

// Sizes of a problem and of its scratch memory.
struct Shape {
  int64_t b, F, d, h, w;
  int64_t row;    // length of a row
  int64_t plane;  // of a channel
  int64_t strip;  // of its values per row, then per column
  int64_t halo;   // zeros that a plane needs before and behind it to be shifted

  explicit Shape(const Tensor& x)
      : b(x.size(0)), F(x.size(1)), d(x.size(2)), h(x.size(3)), w(x.size(4)) {
    row = w + 1;
    plane = round_up(h * row, V);
    strip = round_up(h + w, V);
    halo = round_up(row + 1, V);
  }

  int64_t tiles() const { return b * F; }
  int64_t pixels() const { return h * w; }
  // Tiles that a thread is worth waking for.
  int64_t grain() const { return 1 + at::internal::GRAIN_SIZE / (d * plane); }
};

// Zeroed, aligned scratch memory of one thread.
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(size + 64 * V, 0.f) {
    next_ = reinterpret_cast<float*>(round_up(reinterpret_cast<intptr_t>(memory_.data()), 64));
  }
  float* take(int64_t size) {
    float* const taken = next_;
    next_ += round_up(size, 16);
    return taken;
  }

  float* all() { return next_; }

 private:
  std::vector<float> memory_;
  float* next_;
};

// A tensor [b, F, d, h, w] with any strides, by tiles.
template <typename T>
struct Tiles {
  T* data;
  int64_t sample, group, channel, line, pixel;

  explicit Tiles(const Tensor& x)
      : data(x.data_ptr<std::remove_const_t<T>>()),
        sample(x.stride(0)),
        group(x.stride(1)),
        channel(x.stride(2)),
        line(x.stride(3)),
        pixel(x.stride(4)) {}

  T* at(const Shape& s, int64_t tile) const {
    return data + tile / s.F * sample + tile % s.F * group;
  }

  // Whether a channel's image is one piece of memory.
  bool dense(const Shape& s) const { return pixel == 1 && (s.h == 1 || line == s.w); }

  // Calls copy(element of a tile, element of scratch memory), in the order of the tile's memory.
  template <typename Copy>
  void each(const Shape& s, int64_t tile, float* planes, int64_t row, int64_t plane,
            Copy copy) const {
    T* const from = at(s, tile);
    if (pixel == 1) {
      for (int64_t c = 0; c < s.d; ++c)
        for (int64_t i = 0; i < s.h; ++i) {
          T* const image = from + c * channel + i * line;
          float* const scratch = planes + c * plane + i * row;
          for (int64_t j = 0; j < s.w; ++j) copy(image[j], scratch[j]);
        }
      return;
    }
    for (int64_t i = 0; i < s.h; ++i)
      for (int64_t j = 0; j < s.w; ++j) {
        T* const image = from + i * line + j * pixel;
        float* const scratch = planes + i * row + j;
        for (int64_t c = 0; c < s.d; ++c) copy(image[c * channel], scratch[c * plane]);
      }
  }

  // Into padded planes, which are zero but for what earlier tiles left in the place of pixels.
  void read(const Shape& s, int64_t tile, float* planes) const {
    if constexpr (std::is_same_v<std::remove_const_t<T>, float>) {
      if (pixel == 1) {
        for (int64_t c = 0; c < s.d; ++c)
          read_image(s, at(s, tile) + c * channel, line, planes + c * s.plane);
        return;
      }
    }
    each(s, tile, planes, s.row, s.plane,
         [](const T& image, float& scratch) { scratch = static_cast<float>(image); });
  }
  void write(const Shape& s, int64_t tile, float* planes) const {
    if constexpr (std::is_same_v<T, float>) {
      if (pixel == 1) {
        for (int64_t c = 0; c < s.d; ++c)
          for (int64_t i = 0; i < s.h; ++i)
            copy_row(s, planes + c * s.plane + i * s.row, at(s, tile) + c * channel + i * line);
        return;
      }
    }
    each(s, tile, planes, s.row, s.plane,
         [](T& image, float& scratch) { image = static_cast<T>(scratch); });
  }

  static void copy_row(const Shape& s, const float* from, float* to) {
    int64_t j = 0;
    for (; j + V <= s.w; j += V) load(from + j).store(to + j);
    if (j < s.w) load(from + j, s.w - j).store(to + j, s.w - j);
  }
  static void read_image(const Shape& s, const float* image, int64_t line, float* plane) {
    for (int64_t i = 0; i < s.h; ++i) copy_row(s, image + i * line, plane + i * s.row);
  }
};

// A float map [h, w] of a tile, to and from a padded plane.
void read_map(const Shape& s, const float* map, float* plane) {
  Tiles<float>::read_image(s, map, s.w, plane);
}
void write_map(const Shape& s, const float* plane, float* map) {
  for (int64_t i = 0; i < s.h; ++i) Tiles<float>::copy_row(s, plane + i * s.row, map + i * s.w);
}

// Tiles as rows of pixels, where they are if they are dense and float32, else in scratch memory.
template <typename T>
class Rows {
 public:
  Rows(const Shape& s, const Tensor& x) : s_(s), tiles_(x) {
    in_place_ = std::is_same_v<std::remove_const_t<T>, float> && tiles_.dense(s);
    stride_ = in_place_ ? tiles_.channel : round_up(s.pixels(), V);
  }
  int64_t scratch() const { return in_place_ ? 0 : s_.d * stride_; }
  int64_t stride() const { return stride_; }

  const float* read(int64_t tile, float* scratch) const {
    float* const rows = place(tile, scratch);
    if (!in_place_)
      tiles_.each(s_, tile, rows, s_.w, stride_,
                  [](const T& image, float& row) { row = static_cast<float>(image); });
    return rows;
  }
  // Where to write a tile, and what to call thereafter.
  float* place(int64_t tile, float* scratch) const {
    if constexpr (std::is_same_v<std::remove_const_t<T>, float>)
      if (in_place_) return const_cast<float*>(tiles_.at(s_, tile));
    return scratch;
  }
  void write(int64_t tile, float* rows) const {
    if (!in_place_)
      tiles_.each(s_, tile, rows, s_.w, stride_,
                  [](T& image, float& row) { image = static_cast<T>(row); });
  }

 private:
  const Shape& s_;
  Tiles<T> tiles_;
  bool in_place_;
  int64_t stride_;
};

// Calls f(place, count) for the vectors of a row, of which the last may be short.
template <typename F>
void along(int64_t length, F f) {
  int64_t at = 0;
  for (; at + V <= length; at += V) f(at, V);
  if (at < length) f(at, length - at);
}

float mean_of(const float* values, int64_t length) {
  Vec total(0);
  along(length, [&](int64_t at, int64_t count) { total = total + load(values + at, count); });
  return sum(total) / length;
}

// Ones where a plane has pixels, zeros elsewhere.
void fill_mask(const Shape& s, float* mask) {
  for (int64_t i = 0; i < s.h; ++i) std::fill_n(mask + i * s.row, s.w, 1.f);
}

// Row and column means of each channel, and its mean.
void strip_means(const Shape& s, const float* X, float* strips, float* mean) {
  for (int64_t c = 0; c < s.d; ++c) {
    const float* const x = X + c * s.plane;
    float* const strip = strips + c * s.strip;
    for (int64_t i = 0; i < s.h; ++i) strip[i] = mean_of(x + i * s.row, s.w);
    along(s.w, [&](int64_t j, int64_t count) {
      Vec column(0);
      for (int64_t i = 0; i < s.h; ++i) column = column + load(x + i * s.row + j, count);
      (column / Vec(s.h)).store(strip + s.h + j, count);
    });
    mean[c] = mean_of(strip, s.h);
  }
}

// out[o] = f(sum over c of matrix[o, c] * in[c] + bias[o]) on strips; `matrix` has strides.
template <int BLOCK, typename F>
void mix_block(const Shape& s, const float* matrix, int64_t out_stride, int64_t in_stride,
               const float* bias, const float* in, float* out, int64_t o, F f) {
  for (int64_t l = 0; l < s.strip; l += V) {
    Vec total[BLOCK];
    for (int k = 0; k < BLOCK; ++k) total[k] = Vec(bias ? bias[o + k] : 0.f);
    for (int64_t c = 0; c < s.d; ++c) {
      const Vec value = load(in + c * s.strip + l);
      const float* const weight = matrix + o * out_stride + c * in_stride;
      for (int k = 0; k < BLOCK; ++k) total[k] = fma(Vec(weight[k * out_stride]), value, total[k]);
    }
    for (int k = 0; k < BLOCK; ++k) f(total[k]).store(out + (o + k) * s.strip + l);
  }
}
template <typename F>
void mix_strips(const Shape& s, const float* matrix, int64_t out_stride, int64_t in_stride,
                const float* bias, const float* in, float* out, F f) {
  int64_t o = 0;
  for (; o + 8 <= s.d; o += 8) mix_block<8>(s, matrix, out_stride, in_stride, bias, in, out, o, f);
  for (; o < s.d; ++o) mix_block<1>(s, matrix, out_stride, in_stride, bias, in, out, o, f);
}

// What each tap of a zero-padded 3x3 kernel sees of a channel, averaged over the output: [d, 9].
void border_means(const Shape& s, const float* X, const float* strips, const float* mean,
                  float* borders) {
  for (int64_t c = 0; c < s.d; ++c) {
    const float* const x = X + c * s.plane;
    const float* const strip = strips + c * s.strip;
    // The upper taps miss the last row, the lower ones the first; likewise the columns.
    const float rows[3] = {strip[s.h - 1] / s.h, 0, strip[0] / s.h};
    const float columns[3] = {strip[s.h + s.w - 1] / s.w, 0, strip[s.h] / s.w};
    const float* const lines[3] = {x + (s.h - 1) * s.row, nullptr, x};
    const int64_t places[3] = {s.w - 1, 0, 0};
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) {
        const float corner = i == 1 || j == 1 ? 0 : lines[i][places[j]] / s.pixels();
        borders[c * TAPS + i * 3 + j] = mean[c] - rows[i] - columns[j] + corner;
      }
  }
}

// A channel's product of gates, gate_h * gate_w, zero where there are no pixels: an infinity that
// an earlier tile left there would reach this one.
void gate_plane(const Shape& s, const float* gate, float* plane) {
  for (int64_t i = 0; i < s.h; ++i) {
    const Vec gate_row(gate[i]);
    along(s.w, [&](int64_t j, int64_t count) {
      (gate_row * load(gate + s.h + j, count)).store(plane + i * s.row + j, count);
    });
    plane[i * s.row + s.w] = 0;
  }
  std::fill(plane + s.h * s.row, plane + s.plane, 0.f);
}

// The gated features less a constant near their mean, and their first two moments.
void gated_deviations(const Shape& s, const float* X, const float* gates, const float* mean,
                      const float* mask, float* U, float* centre, float* square) {
  for (int64_t c = 0; c < s.d; ++c) {
    const float *const x = X + c * s.plane, *const gate = gates + c * s.strip;
    float* const u = U + c * s.plane;
    const Vec shift(mean[c] * mean_of(gate, s.h) * mean_of(gate + s.h, s.w));
    gate_plane(s, gate, u);
    Vec first(0), second(0);
    for (int64_t at = 0; at < s.plane; at += V) {
      const Vec value = load(x + at) * load(u + at) - shift * load(mask + at);
      value.store(u + at);
      first = first + value;
      second = fma(value, value, second);
    }
    centre[c] = sum(first) / s.pixels();
    square[c] = sum(second) / s.pixels();
  }
}

// means[o] = sum over c of (sum over taps of borders[c, tap] * conv[c, tap, o]) + bias[o]. A sum
// per channel first: one long sum would round more. Rows of `conv` and the bias are `width` long.
void conv_means_of(const Shape& s, const float* borders, const float* conv, const float* bias,
                   int64_t width, float* means) {
  for (int64_t o = 0; o < width; o += V) {
    Vec total = load(bias + o);
    for (int64_t c = 0; c < s.d; ++c) {
      Vec channel(0);
      for (int64_t k = c * TAPS; k < (c + 1) * TAPS; ++k)
        channel = fma(Vec(borders[k]), load(conv + k * width + o), channel);
      total = total + channel;
    }
    total.store(means + o, std::min(V, s.d - o));
  }
}

void softmax(int64_t d, const float* logits, float* out) {
  const float highest = *std::max_element(logits, logits + d);
  float total = 0;
  for (int64_t c = 0; c < d; ++c) total += out[c] = std::exp(logits[c] - highest);
  for (int64_t c = 0; c < d; ++c) out[c] /= total;
}

// The images of the nine taps and the weighted sum of U, BLOCK vectors at once.
template <int BLOCK>
void weigh_block(const Shape& s, const float* X, const float* U, const float* kernel,
                 const float* scale, int64_t at, float* taps, int64_t tap_stride, float* second) {
  Vec images[TAPS][BLOCK], weighted[BLOCK];
  for (int k = 0; k < BLOCK; ++k) {
    weighted[k] = Vec(0);
    for (int t = 0; t < TAPS; ++t) images[t][k] = Vec(0);
  }
  for (int64_t c = 0; c < s.d; ++c) {
    Vec x[BLOCK];
    const Vec a(scale[c]);
    for (int k = 0; k < BLOCK; ++k) {
      x[k] = load(X + c * s.plane + at + k * V);
      weighted[k] = fma(a, load(U + c * s.plane + at + k * V), weighted[k]);
    }
    for (int t = 0; t < TAPS; ++t) {
      const Vec weight(kernel[c * TAPS + t]);
      for (int k = 0; k < BLOCK; ++k) images[t][k] = fma(weight, x[k], images[t][k]);
    }
  }
  for (int k = 0; k < BLOCK; ++k) {
    weighted[k].store(second + at + k * V);
    for (int t = 0; t < TAPS; ++t) images[t][k].store(taps + t * tap_stride + at + k * V);
  }
}

int64_t tap_offset(const Shape& s, int t) { return (t / 3 - 1) * s.row + t % 3 - 1; }

// -------------------------------------------------------------------------------------------------

using FineMaps = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
FineMaps fine_maps_of(const Tensor& x, const Tensor& mixing, const Tensor& shift,
                      const Tensor& conv, const Tensor& conv_bias, const Tensor& kernel,
                      const Tensor& offset, const Tensor& gn_weight, const Tensor& gn_bias,
                      double eps) {
  const Shape s(x);
  const auto options = x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  const Tensor mean_out = at::empty({s.b, s.F, s.d}, options);
  const Tensor conv_mean_out = at::empty_like(mean_out);
  const Tensor centre_out = at::empty_like(mean_out);
  const Tensor rstd_out = at::empty_like(mean_out);
  const Tensor first = at::empty({s.b, s.F, s.h, s.w}, options);
  const Tensor second = at::empty_like(first);
  // Its rows are read for all outputs at once.
  const int64_t width = round_up(s.d, V);
  const Tensor conv_by_input =  // [d * 9, width]
      at::constant_pad_nd(conv.t(), {0, width - s.d}).contiguous();
  const Tensor padded_bias = at::constant_pad_nd(conv_bias, {0, width - s.d});
  const Tiles<const T> tiles(x);
  const auto* const mixing_data = mixing.const_data_ptr<float>();
  const auto* const shift_data = shift.const_data_ptr<float>();
  const auto* const conv_data = conv_by_input.const_data_ptr<float>();
  const auto* const conv_bias_data = padded_bias.const_data_ptr<float>();
  const auto* const kernel_data = kernel.const_data_ptr<float>();
  const float constant = *offset.const_data_ptr<float>();
  const auto* const gn_weight_data = gn_weight.const_data_ptr<float>();
  const auto* const gn_bias_data = gn_bias.const_data_ptr<float>();
  float* const means = mean_out.data_ptr<float>();
  float* const conv_means = conv_mean_out.data_ptr<float>();
  float* const centres = centre_out.data_ptr<float>();
  float* const rstds = rstd_out.data_ptr<float>();
  float* const firsts = first.data_ptr<float>();
  float* const seconds = second.data_ptr<float>();

  at::parallel_for(0, s.tiles(), s.grain(), [&](int64_t begin, int64_t end) {
    const int64_t tap_stride = s.plane + 2 * s.halo;
    Scratch scratch(2 * s.d * s.plane + 2 * s.d * s.strip + s.plane + s.d * (TAPS + 3) +
                    TAPS * tap_stride + 2 * s.plane + 1024);
    float* const X = scratch.take(s.d * s.plane);
    float* const U = scratch.take(s.d * s.plane);
    float* const strips = scratch.take(s.d * s.strip);
    float* const gates = scratch.take(s.d * s.strip);
    float* const mask = scratch.take(s.plane);
    float* const borders = scratch.take(s.d * TAPS);
    float* const weights = scratch.take(s.d);
    float* const square = scratch.take(s.d);
    float* const scale = scratch.take(s.d);
    float* const taps = scratch.take(TAPS * tap_stride) + s.halo;
    float* const weighted = scratch.take(s.plane);
    float* const correlated = scratch.take(s.plane);
    fill_mask(s, mask);
    for (int64_t tile = begin; tile < end; ++tile) {
      float* const mean = means + tile * s.d;
      float* const conv_mean = conv_means + tile * s.d;
      float* const centre = centres + tile * s.d;
      float* const rstd = rstds + tile * s.d;
      tiles.read(s, tile, X);
      strip_means(s, X, strips, mean);
      mix_strips(s, mixing_data, s.d, 1, shift_data, strips, gates, sigmoid);
      border_means(s, X, strips, mean, borders);
      conv_means_of(s, borders, conv_data, conv_bias_data, width, conv_mean);
      softmax(s.d, conv_mean, weights);
      gated_deviations(s, X, gates, mean, mask, U, centre, square);
      float level = 0;
      for (int64_t c = 0; c < s.d; ++c) {
        const float variance = std::max(0.f, square[c] - centre[c] * centre[c]);
        rstd[c] = 1 / std::sqrt(variance + static_cast<float>(eps));
        scale[c] = weights[c] * gn_weight_data[c] * rstd[c];
        level += weights[c] * gn_bias_data[c] - scale[c] * centre[c];
      }
      int64_t at = 0;
      for (; at + 2 * V <= s.plane; at += 2 * V)
        weigh_block<2>(s, X, U, kernel_data, scale, at, taps, tap_stride, weighted);
      for (; at < s.plane; at += V)
        weigh_block<1>(s, X, U, kernel_data, scale, at, taps, tap_stride, weighted);
      for (at = 0; at < s.plane; at += V) {
        Vec even(constant), odd(0);
        for (int t = 0; t < TAPS; ++t) {
          const Vec tap = load(taps + t * tap_stride + at + tap_offset(s, t));
          if (t % 2) odd = odd + tap;
          else even = even + tap;
        }
        (even + odd).store(correlated + at);
        (load(weighted + at) + Vec(level)).store(weighted + at);
      }
      write_map(s, correlated, firsts + tile * s.pixels());
      write_map(s, weighted, seconds + tile * s.pixels());
    }
  });
  return {mean_out, first, second, conv_mean_out, centre_out, rstd_out};
}

// -------------------------------------------------------------------------------------------------

// S of the fine maps [b, F, h, w] and the matrices that mix them, [b, F, F]: sigmoid of the sum of
// the two products. The fine groups of one coarse group have the same row in each, and few weights
// in it that are not zero, so this is not left to matrix products.
Tensor mix(const Tensor& first, const Tensor& second, const Tensor& first_weights,
           const Tensor& second_weights) {
  constexpr int64_t LENGTH = 32 * V;  // of a piece of a map
  const int64_t b = first.size(0), F = first.size(1), pixels = first.size(2) * first.size(3);
  TORCH_CHECK(first.sizes() == second.sizes() && first_weights.numel() == b * F * F &&
                  second_weights.numel() == b * F * F,
              "the maps have ", F, " groups, the matrices others");
  const Tensor mixed = at::empty_like(first);
  const float* const maps[2] = {first.const_data_ptr<float>(), second.const_data_ptr<float>()};
  const float* const matrices[2] = {first_weights.const_data_ptr<float>(),
                                    second_weights.const_data_ptr<float>()};
  float* const out = mixed.data_ptr<float>();
  const int64_t pieces = (pixels + LENGTH - 1) / LENGTH;
  const int64_t grain = 1 + at::internal::GRAIN_SIZE / (F * LENGTH);
  at::parallel_for(0, b * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t sample = piece / pieces, start = piece % pieces * LENGTH;
      const int64_t length = std::min(LENGTH, pixels - start);
      const auto map = [&](int64_t group) { return (sample * F + group) * pixels + start; };
      for (int64_t group = 0; group < F; ++group) {
        float* const to = out + map(group);
        const int64_t row = (sample * F + group) * F;
        const auto as_above = [&](const float* matrix) {
          return std::equal(matrix + row, matrix + row + F, matrix + row - F);
        };
        if (group > 0 && as_above(matrices[0]) && as_above(matrices[1])) {
          std::copy_n(out + map(group - 1), length, to);
          continue;
        }
        float total[LENGTH] = {};
        for (int which = 0; which < 2; ++which)
          for (int64_t other = 0; other < F; ++other) {
            const float weight = matrices[which][row + other];
            if (weight == 0) continue;
            const float* const from = maps[which] + map(other);
            along(length, [&](int64_t at, int64_t count) {
              fma(Vec(weight), load(from + at, count), load(total + at)).store(total + at);
            });
          }
        along(length, [&](int64_t at, int64_t count) {
          sigmoid(load(total + at)).store(to + at, count);
        });
      }
    }
  });
  return mixed;
}

// -------------------------------------------------------------------------------------------------

template <typename T>
Tensor pool_of(const Tensor& x, const Tensor& spatial) {
  const Shape s(x);
  const Tensor pooled = at::empty({s.b, s.F, s.d}, spatial.options());
  const Rows<const T> xs(s, x);
  const auto* const maps = spatial.const_data_ptr<float>();
  float* const out = pooled.data_ptr<float>();
  at::parallel_for(0, s.tiles(), s.grain(), [&](int64_t begin, int64_t end) {
    Scratch scratch(xs.scratch());
    for (int64_t tile = begin; tile < end; ++tile) {
      const float* const map = maps + tile * s.pixels();
      const float* x = xs.read(tile, scratch.all());
      for (int64_t c = 0; c < s.d; ++c, x += xs.stride()) {
        Vec total(0);
        along(s.pixels(), [&](int64_t at, int64_t count) {
          total = fma(load(x + at, count), load(map + at, count), total);
        });
        out[tile * s.d + c] = sum(total) / s.pixels();
      }
    }
  });
  return pooled;
}

template <typename T>
Tensor apply_of(const Tensor& x, const Tensor& spatial, const Tensor& scale, const Tensor& offset) {
  const Shape s(x);
  const Tensor y = at::empty_like(x);
  const Rows<const T> xs(s, x);
  const Rows<T> ys(s, y);
  const auto* const maps = spatial.const_data_ptr<float>();
  const auto* const scales = scale.const_data_ptr<float>();
  const auto* const offsets = offset.const_data_ptr<float>();
  at::parallel_for(0, s.tiles(), s.grain(), [&](int64_t begin, int64_t end) {
    Scratch from(xs.scratch()), to(ys.scratch());
    for (int64_t tile = begin; tile < end; ++tile) {
      const float* const map = maps + tile * s.pixels();
      const float* x = xs.read(tile, from.all());
      float* const rows = ys.place(tile, to.all());
      float* y = rows;
      for (int64_t c = 0; c < s.d; ++c, x += xs.stride(), y += ys.stride()) {
        const Vec a(scales[tile * s.d + c]), b(offsets[tile * s.d + c]);
        along(s.pixels(), [&](int64_t at, int64_t count) {
          (load(x + at, count) * fma(a, load(map + at, count), b)).store(y + at, count);
        });
      }
      ys.write(tile, rows);
    }
  });
  return y;
}

// -------------------------------------------------------------------------------------------------

template <typename T>
std::tuple<Tensor, Tensor, Tensor> products_of(const Tensor& x, const Tensor& grad,
                                               const Tensor& spatial, const Tensor& scale) {
  const Shape s(x);
  const Tensor grad_scale_out = at::empty_like(scale);
  const Tensor grad_offset_out = at::empty_like(scale);
  const Tensor weighted = at::empty_like(spatial);
  const Rows<const T> xs(s, x), grads(s, grad);
  const auto* const maps = spatial.const_data_ptr<float>();
  const auto* const scales = scale.const_data_ptr<float>();
  float* const grad_scale = grad_scale_out.data_ptr<float>();
  float* const grad_offset = grad_offset_out.data_ptr<float>();
  float* const out = weighted.data_ptr<float>();
  at::parallel_for(0, s.tiles(), s.grain(), [&](int64_t begin, int64_t end) {
    Scratch x_scratch(xs.scratch()), grad_scratch(grads.scratch());
    for (int64_t tile = begin; tile < end; ++tile) {
      const float* const map = maps + tile * s.pixels();
      float* const sums = out + tile * s.pixels();
      const float* x = xs.read(tile, x_scratch.all());
      const float* g = grads.read(tile, grad_scratch.all());
      std::fill_n(sums, s.pixels(), 0.f);
      for (int64_t c = 0; c < s.d; ++c, x += xs.stride(), g += grads.stride()) {
        const Vec a(scales[tile * s.d + c]);
        Vec with_map(0), alone(0);
        along(s.pixels(), [&](int64_t at, int64_t count) {
          const Vec product = load(x + at, count) * load(g + at, count);
          with_map = fma(product, load(map + at, count), with_map);
          alone = alone + product;
          fma(a, product, load(sums + at, count)).store(sums + at, count);
        });
        grad_scale[tile * s.d + c] = sum(with_map);
        grad_offset[tile * s.d + c] = sum(alone);
      }
    }
  });
  return {grad_scale_out, grad_offset_out, weighted};
}

template <typename T>
Tensor weigh_of(const Tensor& x, const Tensor& weights) {
  const Shape s(x);
  const Tensor weighted = at::empty({s.b, s.F, s.h, s.w}, weights.options());
  const Rows<const T> xs(s, x);
  const auto* const weight = weights.const_data_ptr<float>();
  float* const out = weighted.data_ptr<float>();
  at::parallel_for(0, s.tiles(), s.grain(), [&](int64_t begin, int64_t end) {
    Scratch scratch(xs.scratch());
    for (int64_t tile = begin; tile < end; ++tile) {
      const float* const rows = xs.read(tile, scratch.all());
      along(s.pixels(), [&](int64_t at, int64_t count) {
        Vec total(0);
        for (int64_t c = 0; c < s.d; ++c)
          total = fma(Vec(weight[tile * s.d + c]), load(rows + c * xs.stride() + at, count), total);
        total.store(out + tile * s.pixels() + at, count);
      });
    }
  });
  return weighted;
}

// -------------------------------------------------------------------------------------------------

// What of the gradients of the parameters is left to matrix products over all tiles.
//   grad_x; grad_means [b, F, d]; borders [b, F, d * 9]; grad_strips and strips [b, F, d, strip];
//   grad_kernel [d, 9]; grad_gn [2, d]; and the total of grad_first is not needed from here.
using FineGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
FineGrads fine_maps_backward_of(const Tensor& x, const Tensor& grad, const Tensor& spatial,
                                const Tensor& out_scale, const Tensor& out_offset,
                                const Tensor& grad_pooled, const Tensor& grad_first,
                                const Tensor& grad_second, const Tensor& grad_score,
                                const Tensor& grad_mean, const Tensor& conv_means,
                                const Tensor& centres, const Tensor& rstds, const Tensor& mixing,
                                const Tensor& shift, const Tensor& conv, const Tensor& kernel,
                                const Tensor& gn_weight, const Tensor& gn_bias) {
  const Shape s(x);
  const auto options = spatial.options();
  const Tensor grad_x = at::empty_like(x);
  const Tensor grad_means = at::empty({s.b, s.F, s.d}, options);
  const Tensor all_borders = at::empty({s.b, s.F, s.d * TAPS}, options);
  const Tensor all_strips = at::empty({s.b, s.F, s.d, s.strip}, options);
  const Tensor grad_strips = at::empty_like(all_strips);
  const Tensor grad_kernel = at::empty({s.tiles(), s.d, TAPS}, options);
  const Tensor grad_gn = at::empty({s.tiles(), 2, s.d}, options);
  const Tiles<const T> xs(x), grads(grad);
  const Tiles<T> grad_xs(grad_x);
  const auto data = [](const Tensor& tensor) { return tensor.const_data_ptr<float>(); };
  const float *const maps = data(spatial), *const out_scales = data(out_scale),
                     *const out_offsets = data(out_offset), *const pooled_grads = data(grad_pooled),
                     *const firsts = data(grad_first), *const seconds = data(grad_second),
                     *const scores = data(grad_score), *const mean_grads = data(grad_mean),
                     *const conv_mean = data(conv_means), *const centre_data = data(centres),
                     *const rstd_data = data(rstds), *const mixing_data = data(mixing),
                     *const shift_data = data(shift), *const conv_data = data(conv),
                     *const kernel_data = data(kernel), *const gn_weight_data = data(gn_weight),
                     *const gn_bias_data = data(gn_bias);
  float* const means_out = grad_means.data_ptr<float>();
  float* const borders_out = all_borders.data_ptr<float>();
  float* const strips_out = all_strips.data_ptr<float>();
  float* const grad_strips_out = grad_strips.data_ptr<float>();
  float* const kernel_out = grad_kernel.data_ptr<float>();
  float* const gn_out = grad_gn.data_ptr<float>();
  const float pixels = s.pixels();

  at::parallel_for(0, s.tiles(), s.grain(), [&](int64_t begin, int64_t end) {
    Scratch scratch(3 * s.d * s.plane + 2 * s.d * s.strip + s.plane + s.d * (TAPS + 8) +
                    3 * (s.plane + 2 * s.halo) + 1024);
    float* const X = scratch.take(s.d * s.plane);
    float* const D = scratch.take(s.d * s.plane);
    float* const U = scratch.take(s.d * s.plane);
    float* const gates = scratch.take(s.d * s.strip);
    float* const back = scratch.take(s.d * s.strip);
    float* const mask = scratch.take(s.plane);
    float* const mean = scratch.take(s.d);
    float* const unused = scratch.take(2 * s.d);
    float* const weights = scratch.take(s.d);
    float* const scale = scratch.take(s.d);
    float* const curve = scratch.take(s.d);
    float* const grad_borders = scratch.take(s.d * TAPS);
    float* const S = scratch.take(s.plane);
    float* const first = scratch.take(s.plane + 2 * s.halo) + s.halo;
    float* const second = scratch.take(s.plane);
    fill_mask(s, mask);
    for (int64_t tile = begin; tile < end; ++tile) {
      float* const strips = strips_out + tile * s.d * s.strip;
      float* const grad_strip = grad_strips_out + tile * s.d * s.strip;
      float* const borders = borders_out + tile * s.d * TAPS;
      const float* const centre = centre_data + tile * s.d;
      const float* const rstd = rstd_data + tile * s.d;
      xs.read(s, tile, X);
      grads.read(s, tile, D);
      read_map(s, maps + tile * s.pixels(), S);
      read_map(s, firsts + tile * s.pixels(), first);
      read_map(s, seconds + tile * s.pixels(), second);
      std::fill_n(strips, s.d * s.strip, 0.f);
      strip_means(s, X, strips, mean);
      mix_strips(s, mixing_data, s.d, 1, shift_data, strips, gates, sigmoid);
      border_means(s, X, strips, mean, borders);
      softmax(s.d, conv_mean + tile * s.d, weights);
      gated_deviations(s, X, gates, mean, mask, U, unused, unused + s.d);

      // second = sum over d of scale * (U - centre) + weights * gn_bias
      // Centred, so that a mean of U that is far above its deviation cancels exactly.
      Vec all(0);
      for (int64_t at = 0; at < s.plane; at += V) all = all + load(second + at);
      const float total = sum(all);
      const Vec second_mean(total / pixels);
      for (int64_t i = 0; i < s.h; ++i)
        along(s.w, [&](int64_t j, int64_t count) {
          float* const at = second + i * s.row + j;
          (load(at, count) - second_mean).store(at, count);
        });
      float* const grad_weights = means_out + tile * s.d;
      float inner = 0;
      for (int64_t c = 0; c < s.d; ++c) {
        const float *const x = X + c * s.plane, *const u = U + c * s.plane;
        Vec taps[TAPS], with_u(0);
        for (int t = 0; t < TAPS; ++t) taps[t] = Vec(0);
        for (int64_t at = 0; at < s.plane; at += V) {
          const Vec value = load(x + at);
          with_u = fma(load(u + at), load(second + at), with_u);
          for (int t = 0; t < TAPS; ++t)
            taps[t] = fma(value, load(first + at - tap_offset(s, t)), taps[t]);
        }
        for (int t = 0; t < TAPS; ++t) kernel_out[(tile * s.d + c) * TAPS + t] = sum(taps[t]);
        const float grad_scale = sum(with_u);
        scale[c] = weights[c] * gn_weight_data[c] * rstd[c];
        grad_weights[c] = grad_scale * gn_weight_data[c] * rstd[c] + gn_bias_data[c] * total;
        inner += weights[c] * grad_weights[c];
        gn_out[tile * 2 * s.d + c] = grad_scale * weights[c] * rstd[c];
        gn_out[(tile * 2 + 1) * s.d + c] = weights[c] * total;
        const float grad_rstd = grad_scale * weights[c] * gn_weight_data[c];
        curve[c] = -grad_rstd * rstd[c] * rstd[c] * rstd[c] / pixels;
      }
      std::fill_n(grad_borders, s.d * TAPS, 0.f);
      for (int64_t o = 0; o < s.d; ++o) {
        grad_weights[o] = weights[o] * (grad_weights[o] - inner + scores[tile]);
        const float weight = grad_weights[o] / pixels;
        for (int64_t k = 0; k < s.d * TAPS; ++k)
          grad_borders[k] += weight * conv_data[o * s.d * TAPS + k];
      }

      // U becomes the gradient of the gated features.
      for (int64_t c = 0; c < s.d; ++c) {
        const float *const x = X + c * s.plane, *const gate = gates + c * s.strip;
        float *const u = U + c * s.plane, *const out = grad_strip + c * s.strip;
        const Vec a(scale[c]), b(curve[c]), u_mean(centre[c]);
        for (int64_t at = 0; at < s.plane; at += V)
          fma(a, load(second + at), b * (load(u + at) - u_mean)).store(u + at);
        for (int64_t i = 0; i < s.h; ++i) {
          Vec row(0);
          along(s.w, [&](int64_t j, int64_t count) {
            const int64_t at = i * s.row + j;
            row = fma(load(u + at) * load(x + at, count), load(gate + s.h + j, count), row);
          });
          out[i] = sum(row);
        }
        along(s.w, [&](int64_t j, int64_t count) {
          Vec column(0);
          for (int64_t i = 0; i < s.h; ++i) {
            const int64_t at = i * s.row + j;
            column = fma(load(u + at) * load(x + at, count), Vec(gate[i]), column);
          }
          column.store(out + s.h + j, count);
        });
        for (int64_t l = 0; l < s.strip; l += V) {
          const Vec value = load(gate + l);
          (load(out + l) * value * (Vec(1) - value)).store(out + l);
        }
        std::fill(out + s.h + s.w, out + s.strip, 0.f);  // gates of nothing
      }
      mix_strips(s, mixing_data, 1, s.d, nullptr, grad_strip, back, [](const Vec& v) { return v; });

      for (int64_t c = 0; c < s.d; ++c) {
        const float *const taps = grad_borders + c * TAPS, *const gate = gates + c * s.strip;
        const float *const x = D + c * s.plane, *const u = U + c * s.plane;
        float* const strip = back + c * s.strip;
        float every = mean_grads[tile * s.d + c] / pixels;
        for (int t = 0; t < TAPS; ++t) every += taps[t];
        for (int64_t i = 0; i < s.h; ++i) strip[i] = strip[i] / s.w + every;
        strip[0] -= taps[6] + taps[7] + taps[8];
        strip[s.h - 1] -= taps[0] + taps[1] + taps[2];
        for (int64_t j = 0; j < s.w; ++j) strip[s.h + j] /= s.h;
        strip[s.h] -= taps[2] + taps[5] + taps[8];
        strip[s.h + s.w - 1] -= taps[0] + taps[3] + taps[6];
        const Vec a(out_scales[tile * s.d + c]), b(out_offsets[tile * s.d + c]),
            p(pooled_grads[tile * s.d + c]);
        Vec weights9[TAPS];
        for (int t = 0; t < TAPS; ++t) weights9[t] = Vec(kernel_data[c * TAPS + t]);
        float* const out = X + c * s.plane;
        for (int64_t i = 0; i < s.h; ++i) {
          const Vec gate_row(gate[i]), row(strip[i]);
          along(s.w, [&](int64_t j, int64_t count) {
            const int64_t at = i * s.row + j;
            const Vec map = load(S + at);
            Vec even = fma(load(x + at), fma(a, map, b), p * map);
            Vec odd = fma(load(u + at), gate_row * load(gate + s.h + j, count),
                          row + load(strip + s.h + j, count));
            for (int t = 0; t < TAPS; ++t) {
              const Vec tap = load(first + at - tap_offset(s, t));
              if (t % 2) odd = fma(weights9[t], tap, odd);
              else even = fma(weights9[t], tap, even);
            }
            (even + odd).store(out + at, count);
          });
        }
        out[0] += taps[8];
        out[s.w - 1] += taps[6];
        out[(s.h - 1) * s.row] += taps[2];
        out[(s.h - 1) * s.row + s.w - 1] += taps[0];
      }
      grad_xs.write(s, tile, X);
    }
  });
  // Without what pads them.
  const auto compact = [&](const Tensor& strips) {
    return strips.narrow(3, 0, s.h + s.w).contiguous();
  };
  return {grad_x,
          grad_means,
          all_borders,
          compact(grad_strips),
          compact(all_strips),
          grad_kernel.sum(0),
          grad_gn.sum(0)};
}

// -------------------------------------------------------------------------------------------------

// Calls FUNCTION<T>(x, ...) for the dtype of x.
#define FOR_DTYPE(x, function, ...)                                           \
  ((x).scalar_type() == at::kBFloat16 ? function<at::BFloat16>(__VA_ARGS__) \
                                      : function<float>(__VA_ARGS__))

FineMaps fine_maps(const Tensor& x, const Tensor& mixing, const Tensor& shift, const Tensor& conv,
                   const Tensor& conv_bias, const Tensor& kernel,
                   const Tensor& offset, const Tensor& gn_weight, const Tensor& gn_bias,
                   double eps) {
  const int64_t d = x.size(2);
  TORCH_CHECK(mixing.size(0) == d && mixing.size(1) == d && conv.size(1) == d * TAPS &&
                  gn_weight.size(0) == d,
              "the input has ", d, " channels in a group, the layer ", gn_weight.size(0));
  return FOR_DTYPE(x, fine_maps_of, x, mixing, shift, conv, conv_bias, kernel, offset,
                   gn_weight, gn_bias, eps);
}

Tensor pool(const Tensor& x, const Tensor& spatial) { return FOR_DTYPE(x, pool_of, x, spatial); }

Tensor apply(const Tensor& x, const Tensor& spatial, const Tensor& scale, const Tensor& offset) {
  TORCH_CHECK(scale.numel() == x.size(0) * x.size(1) * x.size(2) && offset.numel() == scale.numel(),
              "the input has ", x.size(1) * x.size(2), " channels, the layer other gates");
  return FOR_DTYPE(x, apply_of, x, spatial, scale, offset);
}

std::tuple<Tensor, Tensor, Tensor> products(const Tensor& x, const Tensor& grad,
                                            const Tensor& spatial, const Tensor& scale) {
  return FOR_DTYPE(x, products_of, x, grad, spatial, scale);
}

Tensor weigh(const Tensor& x, const Tensor& weights) { return FOR_DTYPE(x, weigh_of, x, weights); }

FineGrads fine_maps_backward(const Tensor& x, const Tensor& grad, const Tensor& spatial,
                             const Tensor& out_scale, const Tensor& out_offset,
                             const Tensor& grad_pooled, const Tensor& grad_first,
                             const Tensor& grad_second, const Tensor& grad_score,
                             const Tensor& grad_mean, const Tensor& conv_means,
                             const Tensor& centres, const Tensor& rstds, const Tensor& mixing,
                             const Tensor& shift, const Tensor& conv, const Tensor& kernel,
                             const Tensor& gn_weight, const Tensor& gn_bias) {
  return FOR_DTYPE(x, fine_maps_backward_of, x, grad, spatial, out_scale, out_offset, grad_pooled,
                   grad_first, grad_second, grad_score, grad_mean, conv_means, centres, rstds,
                   mixing, shift, conv, kernel, gn_weight, gn_bias);
}

}  // namespace

TORCH_LIBRARY(emax_timm, library) {
  library.def("fine_maps(Tensor x, Tensor mixing, Tensor shift, Tensor conv, "
              "Tensor conv_bias, Tensor kernel, Tensor offset, Tensor gn_weight, Tensor gn_bias, "
              "float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("mix(Tensor first, Tensor second, Tensor first_weights, Tensor second_weights) "
              "-> Tensor");
  library.def("pool(Tensor x, Tensor spatial) -> Tensor");
  library.def("apply(Tensor x, Tensor spatial, Tensor scale, Tensor offset) -> Tensor");
  library.def("products(Tensor x, Tensor grad, Tensor spatial, Tensor scale) "
              "-> (Tensor, Tensor, Tensor)");
  library.def("weigh(Tensor x, Tensor weights) -> Tensor");
  library.def("fine_maps_backward(Tensor x, Tensor grad, Tensor spatial, Tensor out_scale, "
              "Tensor out_offset, Tensor grad_pooled, Tensor grad_first, Tensor grad_second, "
              "Tensor grad_score, Tensor grad_mean, Tensor conv_means, Tensor centres, "
              "Tensor rstds, Tensor mixing, Tensor shift, Tensor conv, Tensor kernel, "
              "Tensor gn_weight, Tensor gn_bias) "
              "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(emax_timm, CPU, library) {
  library.impl("fine_maps", fine_maps);
  library.impl("mix", mix);
  library.impl("pool", pool);
  library.impl("apply", apply);
  library.impl("products", products);
  library.impl("weigh", weigh);
  library.impl("fine_maps_backward", fine_maps_backward);
}
