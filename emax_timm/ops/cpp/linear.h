// Products of a few rows with large matrices, [b, in] and [out, in]: the gates' and the controller's.
// The BLAS in PyTorch's wheels leaves most of the instructions of some CPUs unused for them.
#pragma once

#include <ATen/core/Tensor.h>

namespace emax {

using at::Tensor;

// in @ matrix.T + bias: [b, out]. Dimensions of 1 behind those of a matrix do not count.
Tensor linear(const Tensor& in, const Tensor& matrix, const Tensor& bias);
// grad @ matrix: [b, in] from [b, out].
Tensor linear_backward(const Tensor& grad, const Tensor& matrix);
// grad.T @ in: [out, in].
Tensor outer_product(const Tensor& grad, const Tensor& in);

}  // namespace emax
