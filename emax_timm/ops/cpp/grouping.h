// The mixture of the fine maps of a sample over group counts.
#pragma once

#include "layer.h"

namespace emax {

// Computes S, [b, F, h, w], from the fine maps: the sigmoid of the mixture of the two terms that the
// choices of `count` samples make, from `first_sample` on. `Choice::holder` says where a map goes.
void mix(const Shape& s, const Choice& choice, int64_t first_sample, int64_t count,
         const float* first, const float* second, const float* score, float* out);

// Computes from the gradient of the mixture, [b, F, h, w], those of the two terms, of the scores,
// [b, F], and of the weights of the candidates, [count, K].
void mix_backward(const Shape& s, const Choice& choice, int64_t first_sample, int64_t count,
                  const float* first, const float* second, const float* score, const float* grad,
                  float* grad_first, float* grad_second, float* grad_score, float* grad_choice);

}  // namespace emax
