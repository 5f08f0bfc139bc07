// A layer's parameters, and all that is small enough for ATen: the choice of groups and the gates.
// As in `attention/functional.py`, which says what each computes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "fine_maps.h"

namespace emax {

// In float32; an empty list is a part that the layer does not have.
struct Layer {
  std::vector<Tensor> grouping, spatial, controller, channel, gamma, global, residual_gate;
  bool batch_vote;
  double eps;
  std::vector<int64_t> members;  // fine groups in a coarse one, by candidate

  Layer(at::TensorList grouping, at::TensorList spatial, at::TensorList controller,
        at::TensorList channel, at::TensorList gamma, at::TensorList global,
        at::TensorList residual_gate, bool batch_vote, double eps);
  void check(const Tensor& x, int64_t groups) const;
};

// Which candidate each sample takes.
struct Choice {
  Tensor soft;                          // [b, K]; without a controller undefined
  std::vector<int64_t> members = {1};   // fine groups in a coarse one, by candidate
  std::vector<int64_t> taken;           // candidate, by sample
  float warmup = 1;

  int64_t members_of(int64_t sample) const { return members[taken[sample]]; }
  // Where the map of a tile is: coarse groups have one for all of their fine groups, unless each
  // keeps something of its own.
  int64_t holder(int64_t tile, int64_t groups) const {
    const int64_t n = members_of(tile / groups);
    return warmup == 1 ? tile / n * n : tile;
  }
};

// For the samples of `mean`; numbered from `first` on, if they are a chunk's.
Choice choose_groups(const Layer& layer, const Tensor& mean, const std::optional<Tensor>& noise,
                     int64_t first = 0);

// Gates from the means of x and of x * S, [b, c]; an undefined tensor is a part that is not there.
struct Gates {
  Tensor channel, channel_hidden, fused, global, global_hidden;
  Tensor scale, offset;  // of the factor scale * S + offset on x
};

Gates mean_gates(const Layer& layer, const Tensor& mean, const Tensor& pooled);

// Samples whose features stay in the cache from one pass to the next.
int64_t samples_together(const Shape& s, const Layer& layer);

}  // namespace emax
