// The gradients of what `fine_maps` computes of a tile.
#pragma once

#include "layer.h"

namespace emax {

// What meets in a tile: `out = x * (scale * S + offset)`, and the gradients of the mean of x, of
// x * S (the same for all pixels), of the fine maps and of the score. By tiles.
struct TileInputs {
  const float *maps, *scale, *offset;
  const float *grad_pooled, *grad_mean;
  float *grad_first, *grad_second, *grad_score;
};

// What the gradients of the weights are made from, of the tiles of a few samples. Strips, whose values
// are rows here, go with the gradients of what conv1x1 makes of them.
struct TileGrads {
  Tensor means;                // of the means of conv3x3(x), [tiles, d]
  Tensor borders;              // [tiles, d * 9]
  Tensor strips, grad_strips;  // [tiles, h + w, d]
  Tensor kernel, gn;           // [tiles, d * 9] and [tiles, 2 * d]
  Tensor first;                // total of that of the first map, [tiles]

  TileGrads(const Shape& s, int64_t tiles, const at::TensorOptions& options);
  // What the weights' gradients need, added up over the first tiles.
  std::vector<Tensor> sums(int64_t tiles) const;
};

// The gradients in the order of `Layer::spatial`, from the sums over all tiles.
std::vector<Tensor> weight_gradients(const Weights& weights, const std::vector<Tensor>& sums);

// `out` is the gradient of x; `grads` begins with the first tile.
void fine_maps_backward(const Shape& s, const float* x, const float* grad, const Weights& weights,
                        const Choice& choice, const TileInputs& inputs, at::TensorList kept,
                        int64_t begin_tile, int64_t end_tile, const TileGrads& grads, float* out);

}  // namespace emax
