// Samples as contiguous float32 images, which all passes work on.
#pragma once

#include "tiles.h"

namespace emax {

// Returns the tensor, or a contiguous copy if it is neither contiguous nor channels_last.
inline Tensor readable(const Tensor& x) {
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) ? x : x.contiguous();
}

// The images of a float32 or bfloat16 tensor [b, c, h, w], contiguous or channels_last. Samples that
// are contiguous float32 are used in place; others are copied, a few at a time, and written back.
class Images {
 public:
  Images(const Shape& s, const Tensor& tensor, int64_t together);

  // The pointer is such that tiles are indexed by their number in the batch.
  const float* read(int64_t sample, int64_t count) const;
  // Returns where to write samples; `write` must follow.
  float* place(int64_t sample) const;
  void write(int64_t sample, int64_t count) const;

 private:
  const Shape& s_;
  Tensor tensor_, copies_;  // copies are undefined where none are needed
};

}  // namespace emax
