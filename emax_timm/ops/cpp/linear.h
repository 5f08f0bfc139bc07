// Products of a few rows [b, in] with large matrices [out, in], for the gates and the controller. The
// BLAS in PyTorch's wheels leaves the wide vectors of some CPUs unused for them.
#pragma once

#include <ATen/core/Tensor.h>

namespace emax {

using at::Tensor;

// Returns in @ matrix.T + bias, [b, out]. Trailing dimensions of size 1 are ignored.
Tensor linear(const Tensor& in, const Tensor& matrix, const Tensor& bias);
// Returns grad @ matrix, [b, in] from [b, out].
Tensor linear_backward(const Tensor& grad, const Tensor& matrix);
// Returns grad.T @ in, [out, in].
Tensor outer_product(const Tensor& grad, const Tensor& in);

}  // namespace emax
