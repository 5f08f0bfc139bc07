// The gradients, as `attention/analytic.py` writes them out and `docs/emax.md` derives them.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "backward_tiles.h"
#include "grouping.h"
#include "linear.h"

namespace emax {

namespace {

// Adds to a gradient, which is undefined as long as it is zero.
void accumulate(Tensor& total, const Tensor& grad) {
  total = total.defined() ? total + grad : grad;
}

// Gradients of the small things, [b, c]; `mean` and `pooled` are those of a chunk's rows.
struct GateGrads {
  Tensor mean, pooled;
};

// From the gradient of a gate to that of the means that it is made from.
Tensor squeeze_excite_backward(const Tensor& grad, const Tensor& mean, const Tensor& gate,
                               const Tensor& hidden, const std::vector<Tensor>& weights,
                               Tensor* grads) {
  const Tensor inner = (grad * gate * (1 - gate)).contiguous();
  const Tensor grad_hidden = linear_backward(inner, weights[2].flatten(1)) * (hidden > 0);
  accumulate(grads[0], outer_product(grad_hidden, mean));
  accumulate(grads[1], grad_hidden.sum(0));
  accumulate(grads[2], outer_product(inner, hidden));
  accumulate(grads[3], inner.sum(0));
  return linear_backward(grad_hidden, weights[0].flatten(1));
}

// `grads` are those of the channel gate (4), gamma, the global gate (4) and the residual gate.
GateGrads gates_backward(const Layer& layer, const Gates& gates, const Tensor& mean,
                         Tensor grad_scale, const Tensor& grad_offset, Tensor* grads) {
  // offset = 1 - alpha + scale * branch, with branch = gamma * w_c; scale = alpha * w_g
  const bool has_branch = !layer.gamma.empty();
  const Tensor branch = has_branch ? gates.channel * layer.gamma[0] : Tensor();
  if (has_branch) grad_scale = at::addcmul(grad_scale, grad_offset, branch);
  Tensor grad_global = grad_scale, grad_fused;
  if (!layer.residual_gate.empty()) {
    grad_global = grad_scale * layer.residual_gate[0];
    accumulate(grads[9], (gates.global.defined() ? grad_scale * gates.global - grad_offset : grad_scale - grad_offset).sum(0));
  }
  GateGrads out;
  if (!layer.global.empty())
    grad_fused = squeeze_excite_backward(grad_global, gates.fused, gates.global,
                                         gates.global_hidden, layer.global, grads + 5);
  else
    grad_fused = at::zeros_like(mean);
  out.pooled = grad_fused;
  if (!has_branch) {
    out.mean = at::zeros_like(mean);
    return out;
  }
  // fused = pooled + branch * mean
  const Tensor grad_branch = at::addcmul(grad_offset * gates.scale, grad_fused, mean);
  accumulate(grads[4], (grad_branch * gates.channel).sum().view(1));
  out.mean = squeeze_excite_backward(grad_branch * layer.gamma[0], mean, gates.channel,
                                     gates.channel_hidden, layer.channel, grads);
  out.mean = at::addcmul(out.mean, grad_fused, branch);
  return out;
}

// Sums of x * grad over the image, with and without S, and over d with `scale` ([tiles, pixels]).
template <typename T>
void products(const Shape& s, const Tensor& x, const Tensor& grad, const float* maps,
              const Choice& choice, const float* scales, int64_t begin_tile, int64_t end_tile,
              float* grad_scale, float* grad_offset, float* weighted) {
  const Images<const T> xs(s, x), grads(s, grad);
  at::parallel_for(begin_tile, end_tile, s.grain(), [&](int64_t begin, int64_t end) {
    Scratch x_scratch(xs.scratch()), grad_scratch(grads.scratch());
    std::vector<Vec> totals(s.d + V), with_map(s.d + V);
    for (int64_t tile = begin; tile < end; ++tile) {
      const float* const map = maps + choice.holder(tile, s.F) * s.pixels();
      float* const sums = weighted + tile * s.pixels();
      const float* const x = xs.read(tile, x_scratch.all());
      const float* const g = grads.read(tile, grad_scratch.all());
      const auto run = [&](int64_t c, auto channels) {  // that share the maps
        Vec total[channels], mapped[channels], scale[channels];
        for (int k = 0; k < channels; ++k) scale[k] = Vec(scales[tile * s.d + c + k]);
        along(s.pixels(), [&](int64_t at, int64_t count) {
          const Vec value = load(map + at, count);
          Vec sum = c == 0 ? Vec(0) : load(sums + at, count);
          for (int k = 0; k < channels; ++k) {
            const Vec product = load(x + (c + k) * xs.channel() + at, count) *
                                load(g + (c + k) * grads.channel() + at, count);
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
      };
      int64_t c = 0;
      for (; c + 4 <= s.d; c += 4) run(c, std::integral_constant<int, 4>());
      for (; c < s.d; ++c) run(c, std::integral_constant<int, 1>());
      lane_sums(totals.data(), s.d, grad_offset + tile * s.d, 1);
      lane_sums(with_map.data(), s.d, grad_scale + tile * s.d, 1);
    }
  });
}

// The gradient of the map before its sigmoid: (weighted + sum over d of x * grad_pooled) * S'.
template <typename T>
void map_gradient(const Shape& s, const Tensor& x, const float* maps, const Choice& choice,
                  const float* grad_pooled, int64_t begin_tile, int64_t end_tile,
                  float* weighted) {
  const Images<const T> tiles(s, x);
  at::parallel_for(begin_tile, end_tile, s.grain(), [&](int64_t begin, int64_t end) {
    Scratch scratch(tiles.scratch());
    for (int64_t tile = begin; tile < end; ++tile) {
      const float* const map = maps + choice.holder(tile, s.F) * s.pixels();
      const float* const weights = grad_pooled + tile * s.d;
      const float* const x = tiles.read(tile, scratch.all());
      float* const out = weighted + tile * s.pixels();
      along(s.pixels(), [&](int64_t at, int64_t count) {
        Vec even = load(out + at, count), odd(0);
        int64_t c = 0;
        for (; c + 2 <= s.d; c += 2) {
          even = fma(Vec(weights[c]), load(x + c * tiles.channel() + at, count), even);
          odd = fma(Vec(weights[c + 1]), load(x + (c + 1) * tiles.channel() + at, count), odd);
        }
        if (c < s.d) even = fma(Vec(weights[c]), load(x + c * tiles.channel() + at, count), even);
        const Vec attention = load(map + at, count);
        ((even + odd) * attention * (Vec(1) - attention)).store(out + at, count);
      });
    }
  });
}

// The gradients of x and of the parameters, in the parameters' shapes; undefined ones are those of an
// empty batch.
std::vector<Tensor> in_order(const Layer& layer, const Tensor& x, std::vector<Tensor> grads) {
  size_t at = 0;
  std::vector<Tensor> out{x};
  for (const auto* part : {&layer.spatial, &layer.controller, &layer.channel, &layer.gamma,
                           &layer.global, &layer.residual_gate})
    for (const Tensor& weight : *part) {
      const Tensor& grad = grads[at++];
      out.push_back(grad.defined() ? grad.contiguous().view(weight.sizes()) : at::zeros_like(weight));
    }
  return out;
}

template <typename T>
std::vector<Tensor> backward_of(const Shape& s, const Tensor& x, const Tensor& grad,
                                const Layer& layer, const std::optional<Tensor>& noise,
                                at::TensorList kept) {
  const Weights weights = weights_of(layer.spatial, layer.eps);
  const Tensor &mean = kept[0], &first = kept[1], &second = kept[2], &conv_means = kept[3];
  const auto options = mean.options();
  const int64_t c = s.F * s.d;
  const bool pools = !layer.global.empty();
  Tensor small[10];  // as in `gates_backward`
  Tensor controller[2];
  TileGrads tile_grads(s, x, options);
  const Choice choice = choose_groups(layer, mean.view({s.b, c}), noise);
  // Of the fine groups' second terms; their softmax weighs the maps.
  const Tensor score = conv_means.logsumexp(-1).contiguous();
  const int64_t together = std::min(s.b, std::max<int64_t>(1, at::get_num_threads() * 400000 / (s.F * s.d * s.plane)));
  const Tensor spatial = at::empty({together, s.F, s.h, s.w}, options);
  const Tensor grad_map = at::empty_like(spatial);
  const Tensor grad_maps = at::empty({2, together, s.F, s.h, s.w}, options);
  const Tensor grad_scale = at::empty({together, c}, options);
  const Tensor grad_offset = at::empty_like(grad_scale);
  const Tensor grad_score = at::empty({together, s.F}, options);
  const Tensor grad_choice =
      at::empty({together, static_cast<int64_t>(choice.members.size())}, options);
  for (int64_t sample = 0; sample < s.b; sample += together) {
    const int64_t count = std::min(together, s.b - sample);
    const int64_t begin = sample * s.F, end = begin + count * s.F;
    // Tiles have their numbers in the batch; memory is that of a chunk.
    const auto chunk = [&](const Tensor& values, int64_t size) {
      return values.data_ptr<float>() - begin * size;
    };
    const auto rows = [&](const Tensor& values) {
      return values.view({s.b, c}).narrow(0, sample, count);
    };
    float* const maps = chunk(spatial, s.pixels());
    mix(s, choice, sample, count, first.const_data_ptr<float>(), second.const_data_ptr<float>(),
        score.const_data_ptr<float>(), maps);
    const Tensor chunk_mean = rows(mean);
    const Gates gates = mean_gates(layer, chunk_mean, pools ? rows(kept[6]) : chunk_mean);
    float* const grad_before = chunk(grad_map, s.pixels());
    products<T>(s, x, grad, maps, choice, chunk(gates.scale, s.d), begin, end,
                chunk(grad_scale, s.d), chunk(grad_offset, s.d), grad_before);
    GateGrads gate_grads =
        gates_backward(layer, gates, chunk_mean, grad_scale.narrow(0, 0, count),
                       grad_offset.narrow(0, 0, count), small);
    const Tensor grad_pooled = gate_grads.pooled / s.pixels();
    map_gradient<T>(s, x, maps, choice, chunk(grad_pooled, s.d), begin, end, grad_before);
    float* const grad_first = chunk(grad_maps[0], s.pixels());
    float* const grad_second = chunk(grad_maps[1], s.pixels());
    mix_backward(s, choice, sample, count, first.const_data_ptr<float>(),
                 second.const_data_ptr<float>(), score.const_data_ptr<float>(), grad_before,
                 grad_first, grad_second, chunk(grad_score, 1), grad_choice.data_ptr<float>());
    if (!layer.controller.empty()) {
      const Tensor soft = choice.soft.narrow(0, sample, count);
      const Tensor to_choice = grad_choice.narrow(0, 0, count);
      const Tensor inner = (soft * to_choice).sum(1, true);
      const Tensor logits = (soft * (to_choice - inner) / layer.grouping[2]).contiguous();
      accumulate(controller[0], outer_product(logits, chunk_mean));
      accumulate(controller[1], logits.sum(0));
      gate_grads.mean = gate_grads.mean + linear_backward(logits, layer.controller[0]);
    }
    const TileInputs inputs{maps, chunk(gates.scale, s.d), chunk(gates.offset, s.d),
                            chunk(grad_pooled, s.d), chunk(gate_grads.mean, s.d), grad_first,
                            grad_second, chunk(grad_score, 1)};
    fine_maps_backward<T>(s, x, grad, weights, choice, inputs, kept, begin, end, tile_grads);
  }
  std::vector<Tensor> grads = tile_grads.weights(weights);
  if (!layer.controller.empty()) grads.insert(grads.end(), controller, controller + 2);
  if (!layer.channel.empty()) grads.insert(grads.end(), small, small + 4);
  if (!layer.gamma.empty()) grads.push_back(small[4]);
  if (!layer.global.empty()) grads.insert(grads.end(), small + 5, small + 9);
  if (!layer.residual_gate.empty()) grads.push_back(small[9]);
  return in_order(layer, tile_grads.x, std::move(grads));
}

std::vector<Tensor> backward(const Tensor& x, const Tensor& grad, at::TensorList grouping,
                             at::TensorList spatial, at::TensorList controller,
                             at::TensorList channel, at::TensorList gamma, at::TensorList global,
                             at::TensorList residual_gate, const std::optional<Tensor>& noise,
                             at::TensorList kept, int64_t groups, bool batch_vote, double eps) {
  const Layer layer(grouping, spatial, controller, channel, gamma, global, residual_gate,
                    batch_vote, eps);
  layer.check(x, groups);
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(),
              "the gradient must be like the input");
  const Shape s(x, groups);
  return x.scalar_type() == at::kBFloat16
             ? backward_of<at::BFloat16>(s, x, grad, layer, noise, kept)
             : backward_of<float>(s, x, grad, layer, noise, kept);
}

}  // namespace

}  // namespace emax

TORCH_LIBRARY_FRAGMENT(emax_timm, library) {
  library.def("backward(Tensor x, Tensor grad, Tensor[] grouping, Tensor[] spatial, "
              "Tensor[] controller, Tensor[] channel, Tensor[] gamma, Tensor[] global_, "
              "Tensor[] residual_gate, Tensor? noise, Tensor[] kept, int groups, bool batch_vote, "
              "float eps) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(emax_timm, CPU, library) { library.impl("backward", emax::backward); }
