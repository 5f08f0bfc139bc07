#include "backward_tiles.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "linear.h"

namespace emax {

namespace {

float total(int64_t length, const float* values) {
  Vec lanes(0);
  along(length, [&](int64_t at, int64_t count) { lanes = lanes + load(values + at, count); });
  return sum(lanes);
}

// A map [h, w] with zeros around it, so that a 3x3 kernel can move over it.
class PaddedMap {
 public:
  static int64_t size(const Shape& s) { return (s.h + 2) * row(s) + 2 * V; }
  PaddedMap(const Shape& s, Scratch& scratch) : row_(row(s)), data_(scratch.take(size(s)) + row_ + 1) {}

  void read(const Shape& s, const float* map) {
    for (int64_t i = 0; i < s.h; ++i)
      along(s.w, [&](int64_t j, int64_t count) {
        load(map + i * s.w + j, count).store(data_ + i * row_ + j, count);
      });
  }
  // The neighbours of the pixels from (i, j) on: [a][b] is at (i + a - 1, j + b - 1).
  void line(int64_t i, int64_t j, Vec* values) const {
    for (int b = 0; b < 3; ++b) values[b] = load(data_ + i * row_ + j + b - 1);
  }

 private:
  static int64_t row(const Shape& s) { return s.lines * V + 2; }
  int64_t row_;
  float* data_;
};

// Calls f(i, near) for the rows of a column of vectors, where near[a][b] is as in `PaddedMap::line`.
template <typename F>
inline void down(const Shape& s, const PaddedMap& map, int64_t j, F f) {
  Vec near[3][3];
  map.line(-1, j, near[0]);
  map.line(0, j, near[1]);
  for (int64_t i = 0; i < s.h; ++i) {
    map.line(i + 1, j, near[2]);
    f(i, near);
    for (int b = 0; b < 3; ++b) {
      near[0][b] = near[1][b];
      near[1][b] = near[2][b];
    }
  }
}

// The kernel offset (dy, dx) took x there to the output here, so its gradient goes the other way.
inline const Vec& seen_by(int tap, const Vec (&near)[3][3]) {
  return near[2 - tap / 3][2 - tap % 3];
}

// The memory of one thread, and the steps for a tile. `x`, `g` and `U` are the images of the tile: the
// input, the gradient of the output, and the gated features, which their gradient replaces.
class TileWork {
 public:
  static int64_t size(const Shape& s) {
    const int64_t length = round_up(s.strip(), V);
    return Work::size(s) + PaddedMap::size(s) + 2 * s.d * length + s.d * (TAPS + 8) +
           s.plane + ((TAPS + 1) * s.d + 2 * V) * V + (s.h + V) * V + 32 * 16;
  }
  TileWork(const Shape& s, Scratch& scratch) : s_(s), work_(s, scratch), first_(s, scratch) {
    grad_strips_ = scratch.take(s.d * work_.length);
    back_ = scratch.take(s.d * work_.length);
    grad_borders_ = scratch.take(s.d * TAPS);
    second_ = scratch.take(s.plane);
    mean_ = scratch.take(s.d);
    centre_ = scratch.take(s.d);
    softmax_ = scratch.take(s.d);
    scale_ = scratch.take(s.d);
    curve_ = scratch.take(s.d);
    with_u_ = scratch.take(s.d);
    sums_ = reinterpret_cast<Vec*>(scratch.take(((TAPS + 1) * s.d + 2 * V) * V));
    rows_ = reinterpret_cast<Vec*>(scratch.take((s.h + V) * V));
  }

  // Computes the values of the forward pass again, and reads the gradients of the two maps.
  void begin(const Weights& weights, const float* x, const float* conv_means,
             const float* first, const float* second, float* borders) {
    begin_tiles(s_, weights, x, 1, work_, mean_);
    std::copy_n(work_.borders, s_.d * TAPS, borders);
    softmax(s_.d, conv_means, softmax_);
    with_lines(s_.lines, [&](auto n) {
      deviations<n>(s_, x, work_.gates, mean_, work_, centre_);
    });
    first_.read(s_, first);
    // Without its mean, so that a mean of U that is far above its deviation cancels exactly.
    total_second_ = total(s_.pixels(), second);
    const Vec mean(total_second_ / s_.pixels());
    along(s_.pixels(), [&](int64_t at, int64_t count) {
      (load(second + at, count) - mean).store(second_ + at, count);
    });
  }

  // Sums over the image x times what each kernel offset sees, [d, 9], and U times the second map.
  void correlate(const float* x, float* grad_kernel) {
    for (int64_t c = 0; c < s_.d; ++c) {
      const float *const image = x + c * s_.pixels(), *const u = work_.U + c * s_.pixels();
      Vec taps[TAPS], with_u(0);
      for (int64_t v = 0; v < s_.lines; ++v) {
        const int64_t count = s_.in_line(v);
        down(s_, first_, v * V, [&](int64_t i, const Vec(&near)[3][3]) {
          const int64_t at = i * s_.w + v * V;
          const Vec value = load(image + at, count);
          with_u = fma(load(u + at, count), load(second_ + at, count), with_u);
          for (int t = 0; t < TAPS; ++t) taps[t] = fma(value, seen_by(t, near), taps[t]);
        });
      }
      for (int t = 0; t < TAPS; ++t) sums_[c * TAPS + t] = taps[t];
      sums_[s_.d * TAPS + V + c] = with_u;
    }
    lane_sums(sums_, s_.d * TAPS, grad_kernel, 1);
    lane_sums(sums_ + s_.d * TAPS + V, s_.d, with_u_, 1);
  }

  // second = sum over d of scale * (U - centre) + softmax * gn_bias, and the softmax is over the
  // border means' products with conv3x3.
  void channels(const Weights& weights, const float* centre, const float* rstd, float grad_score,
                float* grad_means, float* grad_gn) {
    const auto* const gn_weight = weights.gn_weight.const_data_ptr<float>();
    const auto* const gn_bias = weights.gn_bias.const_data_ptr<float>();
    const auto* const conv = weights.conv.const_data_ptr<float>();
    const int64_t size = s_.d * TAPS;
    float inner = 0;
    for (int64_t c = 0; c < s_.d; ++c) {
      const float share = softmax_[c], slope = gn_weight[c] * rstd[c];
      scale_[c] = share * slope;
      grad_means[c] = with_u_[c] * slope + gn_bias[c] * total_second_;
      inner += share * grad_means[c];
      grad_gn[c] = with_u_[c] * share * rstd[c];
      grad_gn[s_.d + c] = share * total_second_;
      curve_[c] = -with_u_[c] * scale_[c] * rstd[c] * rstd[c] / s_.pixels();
      centre_[c] = centre[c];
    }
    for (int64_t c = 0; c < s_.d; ++c)
      grad_means[c] = softmax_[c] * (grad_means[c] - inner + grad_score);
    const Vec per_pixel(1.f / s_.pixels());
    // Several vectors at once, so that their sums do not wait for each other.
    in_pieces<8>(0, (size + V - 1) / V, [&](int64_t first, auto vectors) {
      const int64_t at = first * V, last = vectors - 1;
      const int64_t rest = std::min(V, size - at - last * V);
      Vec total[vectors];
      for (int64_t o = 0; o < s_.d; ++o) {
        const Vec grad(grad_means[o]);
        const float* const row = conv + o * size + at;
        for (int k = 0; k < last; ++k) total[k] = fma(grad, load(row + k * V), total[k]);
        total[last] = fma(grad, load(row + last * V, rest), total[last]);
      }
      for (int k = 0; k < last; ++k) (total[k] * per_pixel).store(grad_borders_ + at + k * V);
      (total[last] * per_pixel).store(grad_borders_ + at + last * V, rest);
    });
  }

  // U becomes the gradient of the gated features times their gates; the gradients of the row and
  // column gates are sums of the gradient of the gated features times x.
  void gates(const Weights& weights, const float* x) {
    const int64_t h = s_.h, w = s_.w;
    for (int64_t c = 0; c < s_.d; ++c) {
      const float *const image = x + c * s_.pixels(), *const gate = work_.gates + c * work_.length;
      float *const u = work_.U + c * s_.pixels(), *const out = grad_strips_ + c * work_.length;
      const Vec a(scale_[c]), b(curve_[c]), mean(centre_[c]);
      for (int64_t v = 0; v < s_.lines; ++v) {
        const int64_t count = s_.in_line(v);
        const Vec gate_w = load(gate + h + v * V, count);
        Vec column(0);
        for (int64_t i = 0; i < h; ++i) {
          const int64_t at = i * w + v * V;
          const Vec gate_h(gate[i]);
          const Vec grad = fma(a, load(second_ + at, count), b * (load(u + at, count) - mean));
          const Vec product = grad * load(image + at, count);
          column = fma(product, gate_h, column);
          rows_[i] = fma(product, gate_w, v == 0 ? Vec(0) : rows_[i]);
          (grad * gate_h * gate_w).store(u + at, count);
        }
        column.store(out + h + v * V, count);
      }
      for (int64_t i = 0; i < h; i += V) {
        float sums[V];
        lane_sums(rows_ + i, std::min(V, h - i), sums, 1);
        std::copy_n(sums, std::min(V, h - i), out + i);
      }
      along(h + w, [&](int64_t at, int64_t count) {
        const Vec value = load(gate + at, count);
        (load(out + at, count) * value * (Vec(1) - value)).store(out + at, count);
      });
    }
    mix_strips(s_, weights.mixing.const_data_ptr<float>(), 1, s_.d, nullptr, grad_strips_, back_,
               work_.length, [](const Vec& value) { return value; });
  }

  // Pooled rows and columns, and their gradients, transposed to rows of d.
  void write_strips(float* strips, float* grad_strips) const {
    for (int64_t at = 0; at < s_.strip(); at += V)
      for (int64_t c = 0; c < s_.d; c += V) {
        const int64_t from = c * work_.length + at, to = at * s_.d + c;
        const int64_t rows = std::min(V, s_.d - c), columns = std::min(V, s_.strip() - at);
        transpose(work_.strips + from, work_.length, rows, columns, strips + to, s_.d);
        transpose(grad_strips_ + from, work_.length, rows, columns, grad_strips + to, s_.d);
      }
  }

  // The gradient of x through all parts of the output that depend on x.
  void finish(const Weights& weights, const TileInputs& inputs, int64_t tile, const float* map,
              const float* g, float* out) {
    const int64_t h = s_.h, w = s_.w;
    const auto* const kernel = weights.kernel.const_data_ptr<float>();
    for (int64_t c = 0; c < s_.d; ++c) {
      const int64_t vector = tile * s_.d + c;
      const float *const taps = grad_borders_ + c * TAPS, *const image = g + c * s_.pixels();
      const float* const u = work_.U + c * s_.pixels();
      float *const strip = back_ + c * work_.length, *const to = out + c * s_.pixels();
      spread(taps, inputs.grad_mean[vector] / s_.pixels(), strip);
      const Vec a(inputs.scale[vector]), b(inputs.offset[vector]);
      const Vec pooled(inputs.grad_pooled[vector]);
      Vec weight[TAPS];
      for (int t = 0; t < TAPS; ++t) weight[t] = Vec(kernel[c * TAPS + t]);
      for (int64_t v = 0; v < s_.lines; ++v) {
        const int64_t count = s_.in_line(v);
        const Vec column = load(strip + h + v * V, count);
        down(s_, first_, v * V, [&](int64_t i, const Vec(&near)[3][3]) {
          const int64_t at = i * w + v * V;
          const Vec attention = load(map + at, count);
          Vec even = fma(load(image + at, count), fma(a, attention, b), pooled * attention);
          Vec odd = load(u + at, count) + (column + Vec(strip[i]));
          for (int t = 0; t < TAPS; ++t) {
            if (t % 2) odd = fma(weight[t], seen_by(t, near), odd);
            else even = fma(weight[t], seen_by(t, near), even);
          }
          (even + odd).store(to + at, count);
        });
      }
      to[0] += taps[8];
      to[w - 1] += taps[6];
      to[(h - 1) * w] += taps[2];
      to[(h - 1) * w + w - 1] += taps[0];
    }
  }

 private:
  // The gradients of the pooled rows and columns go to their pixels, with those of the mean and of
  // the nine border means.
  void spread(const float* taps, float every, float* strip) const {
    const int64_t h = s_.h, w = s_.w;
    for (int t = 0; t < TAPS; ++t) every += taps[t];
    const Vec per_row(1.f / w), per_column(1.f / h), all(every);
    along(h, [&](int64_t at, int64_t count) {
      fma(load(strip + at, count), per_row, all).store(strip + at, count);
    });
    along(w, [&](int64_t at, int64_t count) {
      (load(strip + h + at, count) * per_column).store(strip + h + at, count);
    });
    strip[0] -= taps[6] + taps[7] + taps[8];
    strip[h - 1] -= taps[0] + taps[1] + taps[2];
    strip[h] -= taps[2] + taps[5] + taps[8];
    strip[h + w - 1] -= taps[0] + taps[3] + taps[6];
  }

  const Shape& s_;
  Work work_;
  PaddedMap first_;  // the gradient of the first map
  float* second_;    // the gradient of the second map, less its mean
  float total_second_;
  float *grad_strips_, *back_, *grad_borders_;
  float *mean_, *centre_, *softmax_, *scale_, *curve_, *with_u_;
  Vec *sums_, *rows_;
};

}  // namespace

TileGrads::TileGrads(const Shape& s, int64_t tiles, const at::TensorOptions& options)
    : means(at::empty({tiles, s.d}, options)),
      borders(at::empty({tiles, s.d * TAPS}, options)),
      strips(at::empty({tiles, s.strip(), s.d}, options)),
      grad_strips(at::empty_like(strips)),
      kernel(at::empty_like(borders)),
      gn(at::empty({tiles, 2 * s.d}, options)),
      first(at::empty({tiles}, options)) {}

std::vector<Tensor> TileGrads::sums(int64_t tiles) const {
  const auto some = [&](const Tensor& values) { return values.narrow(0, 0, tiles); };
  const auto rows = [&](const Tensor& values) { return some(values).flatten(0, 1); };
  return {outer_product(rows(grad_strips), rows(strips)), rows(grad_strips).sum(0),
          outer_product(some(means), some(borders)),      some(means).sum(0),
          some(kernel).sum(0),                            some(gn).sum(0),
          some(first).sum()};
}

std::vector<Tensor> weight_gradients(const Weights& weights, const std::vector<Tensor>& sums) {
  const Tensor &grad_kernel = sums[4], grad_gn = sums[5].view({2, -1}), &total = sums[6];
  // The kernel is conv3x3, weighted with softmax(gn_bias).
  const Tensor to_constant = at::mv(weights.conv, grad_kernel) + total * weights.conv_bias;
  const Tensor grad_constant =
      weights.constant * (to_constant - at::dot(weights.constant, to_constant));
  return {sums[0],
          sums[1],
          at::addr(sums[2], weights.constant, grad_kernel),
          sums[3] + weights.constant * total,
          grad_gn[0],
          grad_gn[1] + grad_constant};
}

void fine_maps_backward(const Shape& shape, const float* x, const float* grad,
                        const Weights& weights, const Choice& choice, const TileInputs& inputs,
                        at::TensorList kept, int64_t begin_tile, int64_t end_tile,
                        const TileGrads& grads, float* out) {
  Shape s = shape;
  s.together = 1;
  const auto* const conv_means = kept[3].const_data_ptr<float>();
  const auto* const centres = kept[4].const_data_ptr<float>();
  const auto* const rstds = kept[5].const_data_ptr<float>();
  const auto of = [&](const Tensor& values, int64_t size) {
    return values.data_ptr<float>() - begin_tile * size;
  };
  float *const means = of(grads.means, s.d), *const borders = of(grads.borders, s.d * TAPS),
               *const strips = of(grads.strips, s.d * s.strip()),
               *const grad_strips = of(grads.grad_strips, s.d * s.strip()),
               *const kernels = of(grads.kernel, s.d * TAPS), *const gn = of(grads.gn, 2 * s.d),
               *const firsts = of(grads.first, 1);
  at::parallel_for(begin_tile, end_tile, s.grain(), [&](int64_t begin, int64_t end) {
    Scratch scratch(TileWork::size(s));
    TileWork work(s, scratch);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t vector = tile * s.d, map = tile * s.pixels(), strip = vector * s.strip();
      const float* const images = x + tile * s.tile();
      work.begin(weights, images, conv_means + vector, inputs.grad_first + map,
                 inputs.grad_second + map, borders + vector * TAPS);
      work.correlate(images, kernels + vector * TAPS);
      work.channels(weights, centres + vector, rstds + vector, inputs.grad_score[tile],
                    means + vector, gn + 2 * vector);
      work.gates(weights, images);
      work.write_strips(strips + strip, grad_strips + strip);
      work.finish(weights, inputs, tile, inputs.maps + choice.holder(tile, s.F) * s.pixels(),
                  grad + tile * s.tile(), out + tile * s.tile());
      firsts[tile] = total(s.pixels(), inputs.grad_first + map);
    }
  });
}

}  // namespace emax
