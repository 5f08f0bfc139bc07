#include "grouping.h"

#include <ATen/Parallel.h>

namespace emax {

namespace {

constexpr int64_t PIECE = 32 * V;  // pixels of a map that are mixed at once

// The weights of the second terms within the coarse groups of a sample, [F]: a softmax of the scores.
// It is normalised by the maximum of each group; one for all would give 0 / 0 in groups far below it.
void group_weights(int64_t groups, int64_t members, const float* score, float* weights) {
  for (int64_t g = 0; g < groups; g += members) softmax(members, score + g, weights + g);
}

}  // namespace

void mix(const Shape& s, const Choice& choice, int64_t first_sample, int64_t count,
         const float* first, const float* second, const float* score, float* out) {
  std::vector<float> weights(count * s.F);
  for (int64_t i = 0; i < count; ++i)
    group_weights(s.F, choice.members_of(first_sample + i), score + (first_sample + i) * s.F,
                  weights.data() + i * s.F);
  const int64_t pieces = (s.pixels() + PIECE - 1) / PIECE;
  const int64_t grain = 1 + 16384 / (s.F * std::min(PIECE, s.pixels()));
  const Vec warmup(choice.warmup), rest(1 - choice.warmup);
  at::parallel_for(0, count * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t i = piece / pieces, start = piece % pieces * PIECE;
      const int64_t sample = first_sample + i, members = choice.members_of(sample);
      const int64_t length = std::min(PIECE, s.pixels() - start);
      const Vec equal(1.f / members);
      for (int64_t group = 0; group < s.F; group += members) {
        const int64_t place = (sample * s.F + group) * s.pixels() + start;
        const float *const a = first + place, *const b = second + place;
        const float* const weight = weights.data() + i * s.F + group;
        float* const to = out + place;
        along(length, [&](int64_t at, int64_t width) {
          Vec firsts(0), seconds(0);
          for (int64_t j = 0; j < members; ++j) {
            firsts = firsts + load(a + j * s.pixels() + at, width);
            seconds = fma(Vec(weight[j]), load(b + j * s.pixels() + at, width), seconds);
          }
          const Vec coarse = fma(firsts, equal, seconds);
          if (choice.warmup == 1) return sigmoid(coarse).store(to + at, width);
          for (int64_t j = 0; j < members; ++j) {
            const int64_t place = j * s.pixels() + at;
            const Vec fine = load(a + place, width) + load(b + place, width);
            sigmoid(fma(fine, rest, coarse * warmup)).store(to + place, width);
          }
        });
      }
    }
  });
}

namespace {

// The gradients of one sample through one candidate. `totals` is memory for a map.
class CandidateGrads {
 public:
  CandidateGrads(const Shape& s, int64_t members, const float* first, const float* second,
                 const float* score, const float* grad)
      : s_(s), members_(members), first_(first), second_(second), grad_(grad), weights_(s.F),
        to_first_(s.F), to_second_(s.F), totals_(s.plane) {
    group_weights(s.F, members, score, weights_.data());
  }

  // The gradient of the weight of the candidate.
  float choice() {
    float total = 0;
    for (int64_t group = 0; group < s_.F; group += members_) {
      add_up(group);
      for (int64_t j = group; j < group + members_; ++j)
        total += to_first_[j] / members_ + weights_[j] * to_second_[j];
    }
    return total;
  }

  // The gradients of the terms and the scores, if the sample has taken this candidate.
  void terms(float warmup, float* grad_first, float* grad_second, float* grad_score) {
    for (int64_t group = 0; group < s_.F; group += members_) {
      add_up(group);
      float inner = 0;
      for (int64_t j = group; j < group + members_; ++j) inner += weights_[j] * to_second_[j];
      for (int64_t j = group; j < group + members_; ++j) {
        grad_score[j] = warmup * weights_[j] * (to_second_[j] - inner);
        const Vec rest(1 - warmup), equal(warmup / members_), weight(warmup * weights_[j]);
        along(s_.pixels(), [&](int64_t at, int64_t count) {
          const int64_t place = j * s_.pixels() + at;
          const Vec own = load(grad_ + place, count) * rest, all = load(totals_.data() + at, count);
          fma(all, equal, own).store(grad_first + place, count);
          fma(all, weight, own).store(grad_second + place, count);
        });
      }
    }
  }

 private:
  // The sum of the gradients of the fine maps of a group, and its products with the two terms of each.
  void add_up(int64_t group) {
    along(s_.pixels(), [&](int64_t at, int64_t count) {
      Vec total(0);
      for (int64_t j = group; j < group + members_; ++j)
        total = total + load(grad_ + j * s_.pixels() + at, count);
      total.store(totals_.data() + at, count);
    });
    for (int64_t j = group; j < group + members_; ++j) {
      Vec with_first(0), with_second(0);
      along(s_.pixels(), [&](int64_t at, int64_t count) {
        const int64_t place = j * s_.pixels() + at;
        const Vec total = load(totals_.data() + at, count);
        with_first = fma(total, load(first_ + place, count), with_first);
        with_second = fma(total, load(second_ + place, count), with_second);
      });
      to_first_[j] = sum(with_first);
      to_second_[j] = sum(with_second);
    }
  }

  const Shape& s_;
  int64_t members_;
  const float *first_, *second_, *grad_;
  std::vector<float> weights_, to_first_, to_second_, totals_;
};

}  // namespace

void mix_backward(const Shape& s, const Choice& choice, int64_t first_sample, int64_t count,
                  const float* first, const float* second, const float* score, const float* grad,
                  float* grad_first, float* grad_second, float* grad_score, float* grad_choice) {
  const int64_t candidates = choice.members.size();
  at::parallel_for(0, count * candidates, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t sample = first_sample + at / candidates, candidate = at % candidates;
      const bool taken = choice.taken[sample] == candidate;
      if (!taken && !choice.soft.defined()) continue;
      const int64_t map = sample * s.F * s.pixels();
      CandidateGrads grads(s, choice.members[candidate], first + map, second + map,
                           score + sample * s.F, grad + map);
      if (choice.soft.defined()) grad_choice[at] = choice.warmup * grads.choice();
      if (taken)
        grads.terms(choice.warmup, grad_first + map, grad_second + map,
                    grad_score + sample * s.F);
    }
  });
}

}  // namespace emax
