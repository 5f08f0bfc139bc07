// How the fine maps of a sample are put together.
#pragma once

#include "layer.h"

namespace emax {

// S of the fine maps, [b, F, h, w]: sigmoid of the mixture that the samples' choice makes of the two
// terms. For `count` samples from `first_sample` on; where each map goes says `Choice::holder`.
void mix(const Shape& s, const Choice& choice, int64_t first_sample, int64_t count,
         const float* first, const float* second, const float* score, float* out);

// From the gradient of the mixture, [b, F, h, w], those of the two terms, of the scores, [b, F], and
// of the weights of the candidates, [count, K].
void mix_backward(const Shape& s, const Choice& choice, int64_t first_sample, int64_t count,
                  const float* first, const float* second, const float* score, const float* grad,
                  float* grad_first, float* grad_second, float* grad_score, float* grad_choice);

}  // namespace emax
