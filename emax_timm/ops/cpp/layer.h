// The parameters of a layer, and what is small enough for ATen: the choice of group counts and the
// gates, as in `portable/forward.py`.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <vector>

#include "fine_maps.h"

namespace emax {

// The tensors of a layer in the order of the fields of `EMAXWeights`; nullopt is a missing part.
using TensorFields = c10::List<std::optional<Tensor>>;

// The same tensors by parts, in float32; a part that the layer does not have is an empty list.
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

// The candidate that each sample takes.
struct Choice {
  Tensor soft;                          // [b, K]; without a controller undefined
  std::vector<int64_t> members;         // fine groups in a coarse one, by candidate
  std::vector<int64_t> taken;           // candidate, by sample
  float warmup = 1;

  int64_t members_of(int64_t sample) const { return members[taken[sample]]; }
  // Returns the tile that holds the map of a tile: a coarse group has one map for all of its fine
  // groups, unless the warm-up keeps a part of each fine map.
  int64_t holder(int64_t tile, int64_t groups) const {
    const int64_t n = members_of(tile / groups);
    return warmup == 1 ? tile / n * n : tile;
  }
};

// Chooses for the samples of `mean`; those of a chunk are numbered from `first` on.
Choice choose_groups(const Layer& layer, const Tensor& mean, const std::optional<Tensor>& noise,
                     int64_t first = 0);

// The gates from the means of x and of x * S, [b, c]; those of a missing part are undefined.
struct Gates {
  Tensor channel, channel_hidden, fused, global, global_hidden;
  Tensor scale, offset;  // of the factor scale * S + offset on x
};

Gates mean_gates(const Layer& layer, const Tensor& mean, const Tensor& pooled);

// Calls run(begin, end, together) for ranges of samples, of which as many as `together` stay in the
// cache from one pass to the next. Each thread takes whole samples if that gives all of them equal
// work, and never waits for another one. Otherwise `run` shares the tiles among the threads.
template <typename F>
void by_samples(const Shape& s, const Layer& layer, F run) {
  constexpr int64_t CACHE = 400'000;  // floats per thread, about the second-level cache
  const int64_t threads = at::get_num_threads(), sample = s.F * s.d * s.plane;
  const int64_t idle = round_up(s.b, threads) - s.b;
  if (layer.batch_vote) return run(0, s.b, s.b);
  if (8 * idle > s.b) return run(0, s.b, std::max<int64_t>(1, threads * CACHE / sample));
  at::parallel_for(0, s.b, 1 + 65536 / sample, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;  // the guard of the caller does not hold in other threads
    run(begin, end, std::min(end - begin, std::max<int64_t>(1, CACHE / sample)));
  });
}

}  // namespace emax
