// The gradients of what `fine_maps` computes from a tile.
#pragma once

#include "layer.h"

namespace emax {

// The inputs of the backward pass of the tiles: the factors of `out = x * (scale * S + offset)`, and
// the gradients of the mean of x, of x * S (the same for all pixels), of the fine maps and the score.
struct TileInputs {
  const float *maps, *scale, *offset;
  const float *grad_pooled, *grad_mean;
  float *grad_first, *grad_second, *grad_score;
};

// The values of a few tiles that the gradients of the weights follow from. `strips` holds the pooled
// rows and columns, transposed, and `grad_strips` the gradients of what conv1x1 makes of them.
struct TileGrads {
  Tensor means;                // gradients of the means of conv3x3(x), [tiles, d]
  Tensor borders;              // [tiles, d * 9]
  Tensor strips, grad_strips;  // [tiles, h + w, d]
  Tensor kernel, gn;           // [tiles, d * 9] and [tiles, 2 * d]
  Tensor first;                // the gradient of the first map, summed over the image, [tiles]

  TileGrads(const Shape& s, int64_t tiles, const at::TensorOptions& options);
  // Sums over the first tiles that the gradients of the weights follow from.
  std::vector<Tensor> sums(int64_t tiles) const;
};

// The gradients in the order of `Layer::spatial`, from the sums over all tiles.
std::vector<Tensor> weight_gradients(const Weights& weights, const std::vector<Tensor>& sums);

// `out` is the gradient of x; `grads` begins with the first tile.
void fine_maps_backward(const Shape& s, const float* x, const float* grad, const Weights& weights,
                        const Choice& choice, const TileInputs& inputs, at::TensorList kept,
                        int64_t begin_tile, int64_t end_tile, const TileGrads& grads, float* out);

}  // namespace emax
