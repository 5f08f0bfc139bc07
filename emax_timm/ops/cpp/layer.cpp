#include "layer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "linear.h"

namespace emax {

namespace {

// Returns the tensors in the fields from `begin` to `end`, in float32, without missing ones.
std::vector<Tensor> plain(const TensorFields& fields, int64_t begin, int64_t end) {
  std::vector<Tensor> out;
  for (int64_t i = begin; i < end; ++i)
    if (const std::optional<Tensor> field = fields.get(i))
      out.push_back(field->to(at::kFloat).contiguous());
  return out;
}

// Calls f(place, count) for the vectors of all values of a tensor.
template <typename F>
void each(const Tensor& values, F f) {
  float* const data = values.data_ptr<float>();
  along(values.numel(), [&](int64_t at, int64_t count) { f(data + at, count); });
}

// Returns the gate in (0, 1), [b, c], and its hidden units.
std::pair<Tensor, Tensor> squeeze_excite(const Tensor& mean, const std::vector<Tensor>& weights) {
  const Tensor hidden = linear(mean, weights[0], weights[1]);
  each(hidden, [](float* at, int64_t count) {
    at::vec::maximum(load(at, count), Vec(0)).store(at, count);
  });
  const Tensor gate = linear(hidden, weights[2], weights[3]);
  each(gate, [](float* at, int64_t count) { sigmoid(load(at, count)).store(at, count); });
  return {gate, hidden};
}

}  // namespace

Layer::Layer(const TensorFields& fields, int64_t groups, at::IntArrayRef candidates,
             bool batch_vote, double eps)
    : spatial(plain(fields, 0, 6)),
      controller(plain(fields, 6, 8)),
      channel(plain(fields, 8, 12)),
      gamma(plain(fields, 12, 13)),
      global(plain(fields, 13, 17)),
      residual_gate(plain(fields, 17, 18)),
      batch_vote(batch_vote),
      eps(eps) {
  if (candidates.size() == 1 && candidates[0] == groups) return;
  members.clear();
  for (const int64_t count : candidates) members.push_back(groups / count);
  const std::optional<Tensor> s = fields.get(18), tau = fields.get(19);
  warmup = s ? s->item<float>() : 0;
  if (tau) temperature = tau->item<float>();
}

void Layer::check(const Tensor& x, int64_t groups) const {
  const int64_t c = x.size(1), d = spatial[1].numel();
  TORCH_CHECK(c == groups * d, "the layer is for ", groups * d, " channels, the input has ", c);
  TORCH_CHECK(spatial[0].numel() == d * d && spatial[2].numel() == d * d * TAPS &&
                  spatial[3].numel() == d && spatial[4].numel() == d && spatial[5].numel() == d &&
                  (residual_gate.empty() || residual_gate[0].numel() == c),
              "the layer's parameters do not fit each other");
}

Weights weights_of(const std::vector<Tensor>& spatial, double eps) {
  const int64_t d = spatial[1].numel();
  const Tensor matrix = spatial[2].view({d, d * TAPS}), constant = spatial[5].softmax(0);
  return {spatial[0].view({d, d}), spatial[1], matrix, spatial[3], spatial[4], spatial[5], constant,
          at::mv(matrix.t(), constant), at::dot(constant, spatial[3]).item<float>(),
          static_cast<float>(eps)};
}

Choice choose_groups(const Layer& layer, const Tensor& mean, const std::optional<Tensor>& noise,
                     int64_t first) {
  const int64_t b = mean.size(0), candidates = layer.members.size();
  Choice choice{{}, layer.members, std::vector<int64_t>(first + b, 0), layer.warmup};
  if (layer.controller.empty()) return choice;
  choice.soft = linear(mean, layer.controller[0], layer.controller[1]);
  std::vector<int64_t> votes(candidates, 0);
  for (int64_t i = 0; i < b; ++i) {
    float* const row = choice.soft.data_ptr<float>() + i * candidates;
    const float* const drawn = noise ? noise->const_data_ptr<float>() + i * candidates : nullptr;
    for (int64_t k = 0; k < candidates; ++k)
      row[k] = (row[k] + (drawn ? drawn[k] : 0)) / layer.temperature;
    softmax(candidates, row, row);
    choice.taken[first + i] = std::max_element(row, row + candidates) - row;  // the first of equal ones
    ++votes[choice.taken[first + i]];
  }
  if (layer.batch_vote)
    choice.taken.assign(first + b, std::max_element(votes.begin(), votes.end()) - votes.begin());
  return choice;
}

Gates mean_gates(const Layer& layer, const Tensor& mean, const Tensor& pooled) {
  Gates gates;
  const bool has_branch = !layer.gamma.empty(), has_global = !layer.global.empty();
  const float gamma = has_branch ? *layer.gamma[0].const_data_ptr<float>() : 0;
  const int64_t rows = mean.size(0), c = mean.size(1);
  gates.fused = pooled;
  if (has_branch)
    std::tie(gates.channel, gates.channel_hidden) = squeeze_excite(mean, layer.channel);
  const auto data = [](const Tensor& values) {
    return values.defined() ? values.const_data_ptr<float>() : nullptr;
  };
  const float *const channel = data(gates.channel), *const means = data(mean);
  if (has_branch && has_global) {
    gates.fused = at::empty_like(mean);
    const float* const from = data(pooled);
    float* const fused = gates.fused.data_ptr<float>();
    along(rows * c, [&](int64_t at, int64_t count) {
      const Vec branch = Vec(gamma) * load(channel + at, count);
      fma(branch, load(means + at, count), load(from + at, count)).store(fused + at, count);
    });
  }
  if (has_global)
    std::tie(gates.global, gates.global_hidden) = squeeze_excite(gates.fused, layer.global);
  gates.scale = at::empty_like(mean);
  gates.offset = at::empty_like(mean);
  const float* const global = data(gates.global);
  const float* const gate = layer.residual_gate.empty() ? nullptr : data(layer.residual_gate[0]);
  float *const scale = gates.scale.data_ptr<float>(), *const offset = gates.offset.data_ptr<float>();
  for (int64_t row = 0; row < rows; ++row)
    along(c, [&](int64_t channel_at, int64_t count) {
      const int64_t at = row * c + channel_at;
      const Vec alpha = gate ? load(gate + channel_at, count) : Vec(1);
      const Vec a = global ? alpha * load(global + at, count) : alpha;
      const Vec branch = channel ? Vec(gamma) * load(channel + at, count) : Vec(0);
      a.store(scale + at, count);
      fma(a, branch, Vec(1) - alpha).store(offset + at, count);
    });
  return gates;
}

}  // namespace emax
