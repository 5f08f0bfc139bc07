#include "layer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "linear.h"

namespace emax {

namespace {

std::vector<Tensor> plain(at::TensorList tensors) {
  std::vector<Tensor> out;
  out.reserve(tensors.size());
  for (const Tensor& tensor : tensors)
    out.push_back(tensor.is_floating_point() ? tensor.to(at::kFloat).contiguous() : tensor);
  return out;
}

// The gate in (0, 1), [b, c], and its hidden units.
std::pair<Tensor, Tensor> squeeze_excite(const Tensor& mean, const std::vector<Tensor>& weights) {
  const Tensor hidden = linear(mean, weights[0].flatten(1), weights[1]).relu_();
  return {linear(hidden, weights[2].flatten(1), weights[3]).sigmoid_(), hidden};
}

}  // namespace

Layer::Layer(at::TensorList grouping, at::TensorList spatial, at::TensorList controller,
             at::TensorList channel, at::TensorList gamma, at::TensorList global,
             at::TensorList residual_gate, bool batch_vote, double eps)
    : grouping(plain(grouping)),
      spatial(plain(spatial)),
      controller(plain(controller)),
      channel(plain(channel)),
      gamma(plain(gamma)),
      global(plain(global)),
      residual_gate(plain(residual_gate)),
      batch_vote(batch_vote),
      eps(eps) {
  if (this->grouping.empty()) return;
  const Tensor& same_group = this->grouping[0];  // [K, F, F]
  for (int64_t k = 0; k < same_group.size(0); ++k)
    members.push_back(same_group[k][0].sum().item<int64_t>());
}

void Layer::check(const Tensor& x, int64_t groups) const {
  const int64_t c = x.size(1), d = spatial[1].numel();
  TORCH_CHECK(c == groups * d, "the layer is for ", groups * d, " channels, the input has ", c);
  TORCH_CHECK(spatial[0].numel() == d * d && spatial[2].numel() == d * d * TAPS &&
                  spatial[3].numel() == d && spatial[4].numel() == d && spatial[5].numel() == d &&
                  (grouping.empty() || grouping[0].size(1) == groups) &&
                  (residual_gate.empty() || residual_gate[0].numel() == c),
              "the layer's parameters do not fit each other");
}

Weights weights_of(const std::vector<Tensor>& spatial, double eps) {
  const int64_t d = spatial[1].numel(), padding = round_up(d, V) - d;
  const Tensor matrix = spatial[2].flatten(1), constant = spatial[5].softmax(0);
  return {spatial[0].flatten(1), spatial[1], matrix, spatial[3], spatial[4], spatial[5], constant,
          at::mv(matrix.t(), constant), at::dot(constant, spatial[3]).item<float>(),
          at::constant_pad_nd(matrix.t(), {0, padding}).contiguous(),
          at::constant_pad_nd(spatial[3], {0, padding}), static_cast<float>(eps)};
}

Choice choose_groups(const Layer& layer, const Tensor& mean, const std::optional<Tensor>& noise,
                     int64_t first) {
  const int64_t b = mean.size(0);
  Choice choice;
  choice.taken.assign(first + b, 0);
  if (layer.grouping.empty()) return choice;
  choice.members = layer.members;
  choice.warmup = layer.grouping[1].item<float>();
  if (layer.controller.empty()) return choice;
  const int64_t candidates = choice.members.size();
  choice.soft = linear(mean, layer.controller[0], layer.controller[1]);
  if (noise) choice.soft += *noise;
  choice.soft /= layer.grouping[2].item<float>();
  std::vector<int64_t> votes(candidates, 0);
  for (int64_t i = 0; i < b; ++i) {
    float* const row = choice.soft.data_ptr<float>() + i * candidates;
    softmax(candidates, row, row);
    choice.taken[first + i] = std::max_element(row, row + candidates) - row;  // of equal ones the first
    ++votes[choice.taken[first + i]];
  }
  if (layer.batch_vote)
    choice.taken.assign(first + b, std::max_element(votes.begin(), votes.end()) - votes.begin());
  return choice;
}

Gates mean_gates(const Layer& layer, const Tensor& mean, const Tensor& pooled) {
  Gates gates;
  gates.fused = pooled;
  if (!layer.gamma.empty()) {
    std::tie(gates.channel, gates.channel_hidden) = squeeze_excite(mean, layer.channel);
    gates.fused = at::addcmul(pooled, gates.channel * layer.gamma[0], mean);
  }
  if (!layer.global.empty())
    std::tie(gates.global, gates.global_hidden) = squeeze_excite(gates.fused, layer.global);
  else
    gates.global = at::ones_like(mean);
  gates.scale = gates.global;
  if (!layer.residual_gate.empty()) {
    gates.scale = gates.global * layer.residual_gate[0];
    gates.offset = (1 - layer.residual_gate[0]).expand_as(mean);
  }
  if (!layer.gamma.empty()) {
    const Tensor branch = gates.scale * gates.channel * layer.gamma[0];
    gates.offset = gates.offset.defined() ? gates.offset + branch : branch;
  }
  if (!gates.offset.defined()) gates.offset = at::zeros_like(mean);
  gates.scale = gates.scale.contiguous();
  gates.offset = gates.offset.contiguous();
  return gates;
}

int64_t samples_together(const Shape& s, const Layer& layer) {
  constexpr int64_t CACHE = 400'000;  // floats per thread: about the second level
  const int64_t sample = s.F * s.d * s.pixels();
  return layer.batch_vote ? s.b : std::max<int64_t>(1, at::get_num_threads() * CACHE / sample);
}

}  // namespace emax
