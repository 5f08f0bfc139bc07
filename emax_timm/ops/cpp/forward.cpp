// The forward pass. The samples go through the passes below a few at a time, so that the data that one
// pass has read are still in the cache for the next.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "grouping.h"
#include "images.h"
#include "layer.h"

namespace emax {

namespace {

// What the backward pass needs: `FineMaps` in its order, and with a global gate the means of x * S. If
// it is not to be kept, the memory for the samples of one chunk serves all chunks.
struct Fine {
  std::vector<Tensor> kept;
  Tensor scores;
  float *mean, *first, *second, *conv_means, *centre, *rstd, *score;
  float* pooled = nullptr;

  Fine(const Shape& s, const Layer& layer, int64_t samples, const at::TensorOptions& options)
      : scores(at::empty({samples, s.F}, options)) {
    const std::vector<int64_t> vector{samples, s.F, s.d}, map{samples, s.F, s.h, s.w};
    for (const auto& sizes : {vector, map, map, vector, vector, vector})
      kept.push_back(at::empty(sizes, options));
    if (!layer.global.empty()) kept.push_back(at::empty(vector, options));
  }

  // Makes tiles indexed by their number in the batch; the first one in memory is that of `sample`.
  void start(const Shape& s, int64_t sample) {
    const int64_t vector = sample * s.F * s.d, map = sample * s.F * s.pixels();
    const auto data = [&](int number) { return kept[number].data_ptr<float>(); };
    mean = data(0) - vector;
    first = data(1) - map;
    second = data(2) - map;
    conv_means = data(3) - vector;
    centre = data(4) - vector;
    rstd = data(5) - vector;
    if (kept.size() > 6) pooled = data(6) - vector;
    score = scores.data_ptr<float>() - sample * s.F;
  }
};

// conv3x3 with an input's weights for all outputs, [d * 9, width], and its bias, [width], padded by
// zeros to whole vectors.
std::pair<Tensor, Tensor> conv_by_input(const Weights& weights) {
  const int64_t d = weights.conv.size(0), size = d * TAPS, width = round_up(d, V);
  const Tensor out = at::zeros({size, width}, weights.conv.options());
  const auto* const from = weights.conv.const_data_ptr<float>();
  float* const to = out.data_ptr<float>();
  for (int64_t k = 0; k < size; k += V)
    for (int64_t o = 0; o < d; o += V)
      transpose(from + o * size + k, size, std::min(V, d - o), std::min(V, size - k),
                to + k * width + o, width);
  return {out, at::constant_pad_nd(weights.conv_bias, {0, width - d})};
}

// means[t][o] = sum over c of (sum over offsets k of borders[t][c, k] * conv[c, k, o]) + bias[o]. It
// sums per channel first, because one long sum would round more. Rows of `conv` and the bias are
// `width` long.
template <int TILES>
void conv_means(const Shape& s, const float* borders, const float* conv, const float* bias,
                int64_t width, float* means) {
  const int64_t size = s.d * TAPS;
  for (int64_t o = 0; o < width; o += V) {
    Vec total[TILES];
    for (int t = 0; t < TILES; ++t) total[t] = load(bias + o);
    for (int64_t c = 0; c < s.d; ++c) {
      Vec channel[TILES];
      for (int64_t k = c * TAPS; k < (c + 1) * TAPS; ++k) {
        const Vec weight = load(conv + k * width + o);
        for (int t = 0; t < TILES; ++t)
          channel[t] = fma(Vec(borders[t * size + k]), weight, channel[t]);
      }
      for (int t = 0; t < TILES; ++t) total[t] = total[t] + channel[t];
    }
    for (int t = 0; t < TILES; ++t)
      total[t].store(means + t * s.d + o, std::min(V, s.d - o));
  }
}

// The images of the nine kernel offsets, and the weighted sum of U on top of `level`, of BLOCK vectors.
// It computes more than it reads, so a part of `next` is fetched into the cache meanwhile.
template <int BLOCK>
void weigh_block(const Shape& s, const float* images, const float* U, const float* kernel,
                 const float* scale, float level, int64_t at, int64_t count,
                 float* taps, int64_t tap_stride, float* second, const float* next) {
  Vec tap[TAPS][BLOCK], weighted[BLOCK];
  for (int k = 0; k < BLOCK; ++k) weighted[k] = Vec(level);
  const float *x = images + at, *u = U + at;
  for (int64_t c = 0; c < s.d; ++c, x += s.pixels(), u += s.pixels()) {
    Vec value[BLOCK];
    const Vec a(scale[c]);
    for (int k = 0; k < BLOCK; ++k) __builtin_prefetch(next + (at * s.d + (c * BLOCK + k) * V), 0, 2);
    for (int k = 0; k < BLOCK; ++k) {
      value[k] = load(x + k * V, count);
      weighted[k] = fma(a, load(u + k * V, count), weighted[k]);
    }
    for (int t = 0; t < TAPS; ++t) {
      const Vec weight(kernel[c * TAPS + t]);
      for (int k = 0; k < BLOCK; ++k) tap[t][k] = fma(weight, value[k], tap[t][k]);
    }
  }
#pragma GCC unroll 2
  for (int k = 0; k < BLOCK; ++k) {
    weighted[k].store(second + at + k * V, count);
#pragma GCC unroll 9
    for (int t = 0; t < TAPS; ++t) tap[t][k].store(taps + t * tap_stride + at + k * V, count);
  }
}

// The two terms of a tile's fine map.
class MapWork {
 public:
  static int64_t tap_stride(const Shape& s) { return s.plane + 2 * halo(s); }
  static int64_t halo(const Shape& s) { return round_up(s.w + 1, V); }
  static int64_t size(const Shape& s) { return 2 * s.d + TAPS * tap_stride(s) + 32 * 4; }
  MapWork(const Shape& s, Scratch& scratch) : tap_stride_(tap_stride(s)) {
    softmax_ = scratch.take(s.d);
    scale_ = scratch.take(s.d);
    taps_ = scratch.take(TAPS * tap_stride_) + halo(s);
  }

  void run(const Shape& s, const Weights& weights, const float* images,
           const Work& work, const float* conv_means, const float* centre, float* rstd,
           float* score, float* first, float* second, const float* next) {
    *score = softmax(s.d, conv_means, softmax_);
    const float level = channel_scales(s, weights, work, centre, rstd);
    const float* const kernel = weights.kernel.const_data_ptr<float>();
    const auto weigh = [&](int64_t at, int64_t count, auto block) {
      weigh_block<block>(s, images, work.U, kernel, scale_, level, at, count, taps_,
                         tap_stride_, second, next);
    };
    constexpr int BLOCK = V == 16 ? 2 : 1;  // as many as the registers hold
    int64_t at = 0;
    for (; at + BLOCK * V <= s.pixels(); at += BLOCK * V)
      weigh(at, V, std::integral_constant<int, BLOCK>());
    for (; at < s.pixels(); at += V)
      weigh(at, std::min(V, s.pixels() - at), std::integral_constant<int, 1>());
    add_taps(s, weights.offset, first);
  }

 private:
  // second = sum over d of scale * U + level
  float channel_scales(const Shape& s, const Weights& weights, const Work& work,
                       const float* centre, float* rstd) {
    const auto* const gn_weight = weights.gn_weight.const_data_ptr<float>();
    const auto* const gn_bias = weights.gn_bias.const_data_ptr<float>();
    Vec level(0);
    along(s.d, [&](int64_t at, int64_t count) {
      const Vec mean = load(centre + at, count);
      const Vec variance = at::vec::maximum(load(work.square + at, count) - mean * mean, Vec(0));
      const Vec inverse = Vec(1) / (variance + Vec(weights.eps)).sqrt();
      const Vec share = load(softmax_ + at, count);
      const Vec scale = share * load(gn_weight + at, count) * inverse;
      inverse.store(rstd + at, count);
      scale.store(scale_ + at, count);
      level = level + share * load(gn_bias + at, count) - scale * mean;
    });
    return sum(level);
  }

  // first = the sum of the images of the kernel offsets, each moved by its offset. They move as long
  // rows, without the columns that would come in from the row above or below.
  void add_taps(const Shape& s, float offset, float* first) {
    for (int t = 0; t < TAPS; t += 3)
      for (int64_t i = 0; i < s.h; ++i) {
        taps_[t * tap_stride_ + i * s.w + s.w - 1] = 0;
        taps_[(t + 2) * tap_stride_ + i * s.w] = 0;
      }
    along(s.pixels(), [&](int64_t at, int64_t count) {
      Vec even(offset), odd(0);
      for (int t = 0; t < TAPS; ++t) {
        const Vec tap = load(taps_ + t * tap_stride_ + at + (t / 3 - 1) * s.w + t % 3 - 1);
        if (t % 2) odd = odd + tap;
        else even = even + tap;
      }
      (even + odd).store(first + at, count);
    });
  }

  int64_t tap_stride_;
  float *softmax_, *scale_, *taps_;
};

void fine_maps(const Shape& s, const float* x, const Weights& weights,
               const std::pair<Tensor, Tensor>& by_input, int64_t begin_tile, int64_t end_tile,
               const Fine& fine) {
  const int64_t width = round_up(s.d, V);
  const auto* const conv = by_input.first.const_data_ptr<float>();
  const auto* const bias = by_input.second.const_data_ptr<float>();
  at::parallel_for(begin_tile, end_tile, s.grain(), [&](int64_t begin, int64_t end) {
    Scratch scratch(Work::size(s) + MapWork::size(s));
    Work work(s, scratch);
    MapWork map(s, scratch);
    for (int64_t tile = begin; tile < end; tile += s.together) {
      const int64_t count = std::min(s.together, end - tile);
      begin_tiles(s, weights, x + tile * s.tile(), count, work, fine.mean + tile * s.d);
      float* const conv_out = fine.conv_means + tile * s.d;
      if (count == 4)
        conv_means<4>(s, work.borders, conv, bias, width, conv_out);
      else
        for (int64_t t = 0; t < count; ++t)
          conv_means<1>(s, work.borders + t * s.d * TAPS, conv, bias, width, conv_out + t * s.d);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t one = tile + t, vector = one * s.d, map_at = one * s.pixels();
        const float* const image = x + one * s.tile();
        const int64_t soon = std::min(one + s.together, s.tiles() - 1);
        with_lines(s.lines, [&](auto n) {
          deviations<n>(s, image, work.gates + t * s.strip(), fine.mean + vector, work,
                        fine.centre + vector);
        });
        map.run(s, weights, image, work, fine.conv_means + vector, fine.centre + vector,
                fine.rstd + vector, fine.score + one, fine.first + map_at, fine.second + map_at,
                x + soon * s.tile());
      }
    }
  });
}

// The means of x * S over the image.
void pool(const Shape& s, const float* x, const float* maps, const Choice& choice,
          int64_t begin_tile, int64_t end_tile, float* pooled) {
  at::parallel_for(begin_tile, end_tile, s.grain(), [&](int64_t begin, int64_t end) {
    std::vector<Vec> totals(s.d + V);
    for (int64_t tile = begin; tile < end; ++tile) {
      const float* const map = maps + choice.holder(tile, s.F) * s.pixels();
      const float* const images = x + tile * s.tile();
      in_pieces<4>(0, s.d, [&](int64_t c, auto channels) {  // these channels share the loads of the map
        Vec total[channels];
        along(s.pixels(), [&](int64_t at, int64_t count) {
          const Vec value = load(map + at, count);
          for (int k = 0; k < channels; ++k)
            total[k] = fma(load(images + (c + k) * s.pixels() + at, count), value, total[k]);
        });
        for (int k = 0; k < channels; ++k) totals[c + k] = total[k];
      });
      lane_sums(totals.data(), s.d, pooled + tile * s.d, 1.f / s.pixels());
    }
  });
}

// out = x * (scale * S + offset)
void apply(const Shape& s, const float* x, const float* maps, const Choice& choice,
           const float* scales, const float* offsets, int64_t begin_tile, int64_t end_tile,
           float* out) {
  at::parallel_for(begin_tile, end_tile, s.grain(), [&](int64_t begin, int64_t end) {
    // It begins with the last tile, which is the likeliest to be in the cache.
    for (int64_t tile = end - 1; tile >= begin; --tile) {
      const float* const map = maps + choice.holder(tile, s.F) * s.pixels();
      for (int64_t c = tile * s.d; c < (tile + 1) * s.d; ++c) {
        const float* const image = x + c * s.pixels();
        float* const to = out + c * s.pixels();
        const Vec a(scales[c]), b(offsets[c]);
        along(s.pixels(), [&](int64_t at, int64_t count) {
          (load(image + at, count) * fma(a, load(map + at, count), b)).store(to + at, count);
        });
      }
    }
  });
}

std::vector<Tensor> forward_of(const Shape& s, const Tensor& x, const Layer& layer,
                               const std::optional<Tensor>& noise, bool keep) {
  const auto options = x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  const Weights weights = weights_of(layer.spatial, layer.eps);
  const auto by_input = conv_by_input(weights);
  const int64_t c = s.F * s.d;
  const Tensor out = at::empty_like(x);
  std::optional<Fine> kept;
  if (keep) kept.emplace(s, layer, s.b, options);
  by_samples(s, layer, [&](int64_t first_sample, int64_t last_sample, int64_t together) {
    Fine fine = keep ? *kept : Fine(s, layer, together, options);
    const Images features(s, x, together), outputs(s, out, together);
    const Tensor spatial = at::empty({together, s.F, s.h, s.w}, options);
    for (int64_t sample = first_sample; sample < last_sample; sample += together) {
      const int64_t count = std::min(together, last_sample - sample), base = keep ? 0 : sample;
      const int64_t begin = sample * s.F, end = begin + count * s.F;
      const auto rows = [&](const Tensor& values) {
        return values.view({-1, c}).narrow(0, sample - base, count);
      };
      fine.start(s, base);
      const float* const images = features.read(sample, count);
      fine_maps(s, images, weights, by_input, begin, end, fine);
      std::optional<Tensor> drawn;
      if (noise) drawn = noise->narrow(0, sample, count);
      const Tensor mean = rows(fine.kept[0]);
      const Choice choice = choose_groups(layer, mean, drawn, sample);
      float* const maps = spatial.data_ptr<float>() - begin * s.pixels();
      mix(s, choice, sample, count, fine.first, fine.second, fine.score, maps);
      if (fine.pooled) pool(s, images, maps, choice, begin, end, fine.pooled);
      const Gates gates = mean_gates(layer, mean, fine.pooled ? rows(fine.kept[6]) : Tensor());
      apply(s, images, maps, choice, gates.scale.const_data_ptr<float>() - begin * s.d,
            gates.offset.const_data_ptr<float>() - begin * s.d, begin, end,
            outputs.place(sample));
      outputs.write(sample, count);
    }
  });
  std::vector<Tensor> outputs{out};
  if (keep) outputs.insert(outputs.end(), kept->kept.begin(), kept->kept.end());
  return outputs;
}

std::vector<Tensor> forward(const Tensor& x, const TensorFields& fields,
                            const std::optional<Tensor>& noise, int64_t groups,
                            at::IntArrayRef candidates, bool batch_vote, double eps, bool keep) {
  const Layer layer(fields, groups, candidates, batch_vote, eps);
  layer.check(x, groups);
  const Tensor dense = readable(x);
  std::vector<Tensor> outputs = forward_of(Shape(x, groups), dense, layer, noise, keep);
  if (!dense.is_same(x)) outputs[0] = at::empty_like(x).copy_(outputs[0]);
  return outputs;
}

}  // namespace

}  // namespace emax

TORCH_LIBRARY_FRAGMENT(emax_timm, library) {
  library.def("forward(Tensor x, Tensor?[] fields, Tensor? noise, int groups, int[] candidates, "
              "bool batch_vote, float eps, bool keep) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(emax_timm, CPU, library) { library.impl("forward", emax::forward); }
