#include "linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <vector>

#include "vectors.h"

namespace emax {

namespace {

// The number of indices that are worth waking a thread for.
int64_t grain(int64_t work) { return 1 + 32768 / std::max<int64_t>(1, work); }

}  // namespace

Tensor linear(const Tensor& in, const Tensor& matrix, const Tensor& bias) {
  const int64_t rows = in.size(0), width = in.size(1), outputs = matrix.size(0);
  const Tensor out = at::empty({rows, outputs}, in.options());
  const auto *const x = in.const_data_ptr<float>(), *const weights = matrix.const_data_ptr<float>(),
                    *const shift = bias.const_data_ptr<float>();
  float* const y = out.data_ptr<float>();
  at::parallel_for(0, outputs, grain(rows * width), [&](int64_t begin, int64_t end) {
    in_pieces<4>(begin, end, [&](int64_t o, auto some) {
      in_pieces<4>(0, rows, [&](int64_t row, auto count) {
        Vec total[some * count];
        along(width, [&](int64_t at, int64_t length) {
          Vec value[count];
          for (int i = 0; i < count; ++i) value[i] = load(x + (row + i) * width + at, length);
          for (int k = 0; k < some; ++k) {
            const Vec weight = load(weights + (o + k) * width + at, length);
            for (int i = 0; i < count; ++i)
              total[k * count + i] = fma(value[i], weight, total[k * count + i]);
          }
        });
        Vec lanes[V + some * count];
        std::copy_n(total, some * count, lanes);
        float products[some * count];
        lane_sums(lanes, some * count, products, 1);
        for (int i = 0; i < count; ++i)
          for (int k = 0; k < some; ++k)
            y[(row + i) * outputs + o + k] = products[k * count + i] + shift[o + k];
      });
    });
  });
  return out;
}

Tensor linear_backward(const Tensor& grad, const Tensor& matrix) {
  const int64_t rows = grad.size(0), outputs = matrix.size(0), width = matrix.numel() / outputs;
  const Tensor out = at::empty({rows, width}, grad.options());
  const auto *const g = grad.const_data_ptr<float>(),
                    *const weights = matrix.const_data_ptr<float>();
  float* const y = out.data_ptr<float>();
  const int64_t pieces = (width + V - 1) / V;
  at::parallel_for(0, pieces, grain(rows * outputs * V), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * V; at < std::min(end * V, width); at += V) {
      const int64_t length = std::min(V, width - at);
      in_pieces<8>(0, rows, [&](int64_t row, auto count) {
        Vec total[count];
        for (int64_t o = 0; o < outputs; ++o) {
          const Vec weight = load(weights + o * width + at, length);
          for (int i = 0; i < count; ++i)
            total[i] = fma(Vec(g[(row + i) * outputs + o]), weight, total[i]);
        }
        for (int i = 0; i < count; ++i) total[i].store(y + (row + i) * width + at, length);
      });
    }
  });
  return out;
}

Tensor outer_product(const Tensor& grad, const Tensor& in) {
  const int64_t rows = grad.size(0), outputs = grad.size(1), width = in.size(1);
  const Tensor out = at::empty({outputs, width}, grad.options());
  const auto *const g = grad.const_data_ptr<float>(), *const x = in.const_data_ptr<float>();
  float* const y = out.data_ptr<float>();
  at::parallel_for(0, outputs, grain(rows * width), [&](int64_t begin, int64_t end) {
    in_pieces<4>(begin, end, [&](int64_t o, auto some) {
      along(width, [&](int64_t at, int64_t length) {
        Vec total[some];
        for (int64_t i = 0; i < rows; ++i) {
          const Vec value = load(x + i * width + at, length);
          for (int k = 0; k < some; ++k)
            total[k] = fma(Vec(g[i * outputs + o + k]), value, total[k]);
        }
        for (int k = 0; k < some; ++k) total[k].store(y + (o + k) * width + at, length);
      });
    });
  });
  return out;
}

}  // namespace emax
