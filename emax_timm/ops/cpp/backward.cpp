// The backward pass, as in `portable/backward.py`; `docs/emax.md` derives the gradients.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "backward_tiles.h"
#include "grouping.h"
#include "images.h"
#include "linear.h"

namespace emax {

namespace {

// The gradients of the parameters of the gates, in the order of `Layer`, and of the means that the
// gates follow from, [b, c].
struct GateGrads {
  std::vector<Tensor> channel, gamma, global, residual_gate;
  Tensor mean, pooled;
};

// Computes from the gradient of a gate that of the means it follows from, and those of its weights.
Tensor squeeze_excite_backward(const Tensor& grad, const Tensor& mean, const Tensor& gate,
                               const Tensor& hidden, const std::vector<Tensor>& weights,
                               std::vector<Tensor>& grads) {
  const Tensor inner = (grad * gate * (1 - gate)).contiguous();
  const Tensor grad_hidden = linear_backward(inner, weights[2]) * (hidden > 0);
  grads = {outer_product(grad_hidden, mean), grad_hidden.sum(0), outer_product(inner, hidden),
           inner.sum(0)};
  return linear_backward(grad_hidden, weights[0]);
}

GateGrads gates_backward(const Layer& layer, const Gates& gates, const Tensor& mean,
                         Tensor grad_scale, const Tensor& grad_offset) {
  GateGrads grads;
  // offset = 1 - alpha + scale * branch, with branch = gamma * w_c; scale = alpha * w_g
  const bool has_branch = !layer.gamma.empty(), has_global = !layer.global.empty();
  const Tensor branch = has_branch ? gates.channel * layer.gamma[0] : Tensor();
  if (has_branch) grad_scale = at::addcmul(grad_scale, grad_offset, branch);
  Tensor grad_global = grad_scale;
  if (!layer.residual_gate.empty()) {
    if (has_global) grad_global = grad_scale * layer.residual_gate[0];
    const Tensor through_scale = has_global ? grad_scale * gates.global : grad_scale;
    grads.residual_gate = {(through_scale - grad_offset).sum(0)};
  }
  grads.pooled = has_global ? squeeze_excite_backward(grad_global, gates.fused, gates.global,
                                                      gates.global_hidden, layer.global, grads.global)
                            : at::zeros_like(mean);
  if (!has_branch) {
    grads.mean = at::zeros_like(mean);
    return grads;
  }
  // fused = pooled + branch * mean
  const Tensor grad_branch = at::addcmul(grad_offset * gates.scale, grads.pooled, mean);
  grads.gamma = {(grad_branch * gates.channel).sum()};
  grads.mean = squeeze_excite_backward(grad_branch * layer.gamma[0], mean, gates.channel,
                                       gates.channel_hidden, layer.channel, grads.channel);
  grads.mean = at::addcmul(grads.mean, grads.pooled, branch);
  return grads;
}

// Sums x * grad over the image, with and without S, and over d with `scale` ([tiles, pixels]).
void products(const Shape& s, const float* x, const float* grad, const float* maps,
              const Choice& choice, const float* scales, int64_t begin_tile, int64_t end_tile,
              float* grad_scale, float* grad_offset, float* weighted) {
  at::parallel_for(begin_tile, end_tile, s.grain(), [&](int64_t begin, int64_t end) {
    std::vector<Vec> totals(s.d + V), with_map(s.d + V);
    for (int64_t tile = begin; tile < end; ++tile) {
      const float* const map = maps + choice.holder(tile, s.F) * s.pixels();
      float* const sums = weighted + tile * s.pixels();
      in_pieces<4>(0, s.d, [&](int64_t c, auto channels) {  // these channels share the loads of the maps
        const float *const image = x + tile * s.tile() + c * s.pixels(),
                    *const g = grad + tile * s.tile() + c * s.pixels();
        Vec total[channels], mapped[channels], scale[channels];
        for (int k = 0; k < channels; ++k) scale[k] = Vec(scales[tile * s.d + c + k]);
        along(s.pixels(), [&](int64_t at, int64_t count) {
          const Vec value = load(map + at, count);
          Vec sum = c == 0 ? Vec(0) : load(sums + at, count);
          for (int k = 0; k < channels; ++k) {
            const int64_t place = k * s.pixels() + at;
            const Vec product = load(image + place, count) * load(g + place, count);
            mapped[k] = fma(product, value, mapped[k]);
            total[k] = total[k] + product;
            sum = fma(scale[k], product, sum);
          }
          sum.store(sums + at, count);
        });
        for (int k = 0; k < channels; ++k) {
          totals[c + k] = total[k];
          with_map[c + k] = mapped[k];
        }
      });
      lane_sums(totals.data(), s.d, grad_offset + tile * s.d, 1);
      lane_sums(with_map.data(), s.d, grad_scale + tile * s.d, 1);
    }
  });
}

// Computes the gradient of the map before its sigmoid: (weighted + sum over d of x * grad_pooled) * S'.
void map_gradient(const Shape& s, const float* x, const float* maps, const Choice& choice,
                  const float* grad_pooled, int64_t begin_tile, int64_t end_tile,
                  float* weighted) {
  at::parallel_for(begin_tile, end_tile, s.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const float* const map = maps + choice.holder(tile, s.F) * s.pixels();
      const float* const weights = grad_pooled + tile * s.d;
      const float* const images = x + tile * s.tile();
      float* const out = weighted + tile * s.pixels();
      along(s.pixels(), [&](int64_t at, int64_t count) {
        Vec even = load(out + at, count), odd(0);
        int64_t c = 0;
        for (; c + 2 <= s.d; c += 2) {
          even = fma(Vec(weights[c]), load(images + c * s.pixels() + at, count), even);
          odd = fma(Vec(weights[c + 1]), load(images + (c + 1) * s.pixels() + at, count), odd);
        }
        if (c < s.d) even = fma(Vec(weights[c]), load(images + c * s.pixels() + at, count), even);
        const Vec attention = load(map + at, count);
        ((even + odd) * attention * (Vec(1) - attention)).store(out + at, count);
      });
    }
  });
}

// Adds sums to the totals, which may be empty at first.
void add_up(std::vector<Tensor>& total, const std::vector<Tensor>& more) {
  if (total.empty()) total = more;
  else
    for (size_t i = 0; i < more.size(); ++i) total[i] += more[i];
}

// Computes from the gradients of the weights of the candidates, [count, K], those of the output of the
// controller, which replace them, and adds those of the mean of x, [count, c].
void controller_backward(const Layer& layer, const float* soft, int64_t count, int64_t c,
                         float* grad, float* grad_mean) {
  const int64_t candidates = layer.members.size();
  const auto* const weights = layer.controller[0].const_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    float *const row = grad + i * candidates, *const mean = grad_mean + i * c;
    const float* const share = soft + i * candidates;
    float inner = 0;
    for (int64_t k = 0; k < candidates; ++k) inner += share[k] * row[k];
    for (int64_t k = 0; k < candidates; ++k) {
      row[k] = share[k] * (row[k] - inner) / layer.temperature;
      along(c, [&](int64_t at, int64_t length) {
        fma(Vec(row[k]), load(weights + k * c + at, length), load(mean + at, length))
            .store(mean + at, length);
      });
    }
  }
}

// Returns the gradients of x and of the parameters, in the shapes of the parameters.
std::vector<Tensor> in_order(const Layer& layer, const Tensor& x, const std::vector<Tensor>& grads) {
  size_t at = 0;
  std::vector<Tensor> out{x};
  for (const auto* part : {&layer.spatial, &layer.controller, &layer.channel, &layer.gamma,
                           &layer.global, &layer.residual_gate})
    for (const Tensor& weight : *part) out.push_back(grads[at++].contiguous().view(weight.sizes()));
  return out;
}

std::vector<Tensor> backward_of(const Shape& s, const Tensor& x, const Tensor& grad,
                                const Layer& layer, const std::optional<Tensor>& noise,
                                at::TensorList kept) {
  const Weights weights = weights_of(layer.spatial, layer.eps);
  const int64_t c = s.F * s.d, candidates = layer.members.size();
  const Tensor mean = kept[0].view({s.b, c}), score = kept[3].logsumexp(-1).contiguous();
  const auto *const first = kept[1].const_data_ptr<float>(),
                    *const second = kept[2].const_data_ptr<float>(),
                    *const scores = score.const_data_ptr<float>();
  const Choice choice = choose_groups(layer, mean, noise);
  const Gates gates =
      mean_gates(layer, mean, layer.global.empty() ? Tensor() : kept[6].view({s.b, c}));
  const auto* const scale = gates.scale.const_data_ptr<float>();

  // The gradients of the gates need all samples, before anything goes back through the gates.
  const Tensor spatial = at::empty_like(kept[1]), grad_map = at::empty_like(kept[1]);
  const Tensor grad_scale = at::empty_like(mean), grad_offset = at::empty_like(mean);
  float *const maps = spatial.data_ptr<float>(), *const map_grads = grad_map.data_ptr<float>();
  by_samples(s, layer, [&](int64_t first_sample, int64_t last_sample, int64_t together) {
    const Images features(s, x, together), gradients(s, grad, together);
    for (int64_t sample = first_sample; sample < last_sample; sample += together) {
      const int64_t count = std::min(together, last_sample - sample), begin = sample * s.F;
      mix(s, choice, sample, count, first, second, scores, maps);
      products(s, features.read(sample, count), gradients.read(sample, count), maps, choice, scale,
               begin, begin + count * s.F, grad_scale.data_ptr<float>(),
               grad_offset.data_ptr<float>(), map_grads);
    }
  });
  const GateGrads gate_grads = gates_backward(layer, gates, mean, grad_scale, grad_offset);

  const Tensor grad_pooled = gate_grads.pooled / s.pixels();
  const Tensor grad_choice = at::empty({s.b, candidates}, mean.options());
  float *const grad_mean = gate_grads.mean.data_ptr<float>(),
               *const choice_grads = grad_choice.data_ptr<float>();
  const Tensor grad_x = at::empty_like(x);
  std::vector<std::vector<Tensor>> sums(at::get_num_threads());  // by thread
  by_samples(s, layer, [&](int64_t first_sample, int64_t last_sample, int64_t together) {
    const Images features(s, x, together), gradients(s, grad, together), out(s, grad_x, together);
    std::vector<Tensor>& sum = sums[at::get_thread_num()];
    const TileGrads tile_grads(s, together * s.F, mean.options());
    const Tensor grad_maps = at::empty({2, together, s.F, s.h, s.w}, mean.options());
    const Tensor grad_score = at::empty({together, s.F}, mean.options());
    for (int64_t sample = first_sample; sample < last_sample; sample += together) {
      const int64_t count = std::min(together, last_sample - sample);
      const int64_t begin = sample * s.F, end = begin + count * s.F;
      // Tiles are indexed by their number in the batch; the memory is that of a chunk.
      const auto chunk = [&](const Tensor& values, int64_t size) {
        return values.data_ptr<float>() - begin * size;
      };
      const float* const images = features.read(sample, count);
      map_gradient(s, images, maps, choice, grad_pooled.const_data_ptr<float>(), begin, end,
                   map_grads);
      const TileInputs inputs{maps, scale, gates.offset.const_data_ptr<float>(),
                              grad_pooled.const_data_ptr<float>(), grad_mean,
                              chunk(grad_maps[0], s.pixels()), chunk(grad_maps[1], s.pixels()),
                              chunk(grad_score, 1)};
      mix_backward(s, choice, sample, count, first, second, scores, map_grads, inputs.grad_first,
                   inputs.grad_second, inputs.grad_score, choice_grads + sample * candidates);
      if (choice.soft.defined())
        controller_backward(layer, choice.soft.const_data_ptr<float>() + sample * candidates, count,
                            c, choice_grads + sample * candidates, grad_mean + sample * c);
      fine_maps_backward(s, images, gradients.read(sample, count), weights, choice, inputs, kept,
                         begin, end, tile_grads, out.place(sample));
      out.write(sample, count);
      add_up(sum, tile_grads.sums(end - begin));
    }
  });

  std::vector<Tensor> total;
  for (const auto& sum : sums) add_up(total, sum);
  if (total.empty()) total = TileGrads(s, 0, mean.options()).sums(0);

  std::vector<Tensor> grads = weight_gradients(weights, total);
  if (choice.soft.defined())
    grads.insert(grads.end(), {outer_product(grad_choice, mean), grad_choice.sum(0)});
  for (const auto* part : {&gate_grads.channel, &gate_grads.gamma, &gate_grads.global,
                           &gate_grads.residual_gate})
    grads.insert(grads.end(), part->begin(), part->end());
  return in_order(layer, grad_x, grads);
}

std::vector<Tensor> backward(const Tensor& x, const Tensor& grad, const TensorFields& fields,
                             const std::optional<Tensor>& noise, at::TensorList kept,
                             int64_t groups, at::IntArrayRef candidates, bool batch_vote,
                             double eps) {
  const Layer layer(fields, groups, candidates, batch_vote, eps);
  layer.check(x, groups);
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(),
              "the gradient must be like the input");
  const Tensor dense = readable(x);
  std::vector<Tensor> grads =
      backward_of(Shape(x, groups), dense, readable(grad), layer, noise, kept);
  if (!dense.is_same(x)) grads[0] = at::empty_like(x).copy_(grads[0]);
  return grads;
}

}  // namespace

}  // namespace emax

TORCH_LIBRARY_FRAGMENT(emax_timm, library) {
  library.def("backward(Tensor x, Tensor grad, Tensor?[] fields, Tensor? noise, Tensor[] kept, "
              "int groups, int[] candidates, bool batch_vote, float eps) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(emax_timm, CPU, library) { library.impl("backward", emax::backward); }
