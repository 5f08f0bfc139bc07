// A layer's parameters, and all that is small enough for ATen: the choice of groups and the gates.
// As in `portable/forward.py`, which says what each computes.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <vector>

#include "fine_maps.h"

namespace emax {

// A layer's tensors, in the order of the fields of `EMAXWeights`; nothing for a missing part.
using TensorFields = c10::List<std::optional<Tensor>>;

// In float32; an empty list is a part that the layer does not have.
struct Layer {
  std::vector<Tensor> spatial, controller, channel, gamma, global, residual_gate;
  bool batch_vote;
  double eps;
  std::vector<int64_t> members = {1};  // fine groups in a coarse one, by candidate
  float warmup = 1, temperature = 1;

  Layer(const TensorFields& fields, int64_t groups, at::IntArrayRef candidates, bool batch_vote,
        double eps);
  void check(const Tensor& x, int64_t groups) const;
};

// Which candidate each sample takes.
struct Choice {
  Tensor soft;                          // [b, K]; without a controller undefined
  std::vector<int64_t> members;         // fine groups in a coarse one, by candidate
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

// Gates from the means of x and of x * S, [b, c], as undefined tensors where they are not there.
struct Gates {
  Tensor channel, channel_hidden, fused, global, global_hidden;
  Tensor scale, offset;  // of the factor scale * S + offset on x
};

Gates mean_gates(const Layer& layer, const Tensor& mean, const Tensor& pooled);

// Calls run(begin, end, together) for ranges of samples, of which as many as `together` stay in the
// cache from one pass to the next. Threads take samples each if that gives them equal work: they
// never wait for each other then. Else they share the tiles of all samples, within `run`.
template <typename F>
void by_samples(const Shape& s, const Layer& layer, F run) {
  constexpr int64_t CACHE = 400'000;  // floats per thread: about the second level
  const int64_t threads = at::get_num_threads(), sample = s.F * s.d * s.plane;
  const int64_t idle = round_up(s.b, threads) - s.b;
  if (layer.batch_vote) return run(0, s.b, s.b);
  if (8 * idle > s.b) return run(0, s.b, std::max<int64_t>(1, threads * CACHE / sample));
  at::parallel_for(0, s.b, 1 + 65536 / sample, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;  // other threads do not know of the caller's
    run(begin, end, std::min(end - begin, std::max<int64_t>(1, CACHE / sample)));
  });
}

}  // namespace emax
