// Samples as contiguous float32 images, which is what all passes work on.
#pragma once

#include "tiles.h"

namespace emax {

// The tensor, or a copy of it that is contiguous, if it is neither that nor channels_last.
inline Tensor readable(const Tensor& x) {
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) ? x : x.contiguous();
}

// Of a float32 or bfloat16 tensor [b, c, h, w], contiguous or channels_last. Samples stay where they
// are if they can; else copies of a few at a time are made, and written back.
class Images {
 public:
  Images(const Shape& s, const Tensor& tensor, int64_t together);

  // Pointers are such that tiles have their numbers in the batch.
  const float* read(int64_t sample, int64_t count) const;
  // Where to write samples; `write` must follow.
  float* place(int64_t sample) const;
  void write(int64_t sample, int64_t count) const;

 private:
  const Shape& s_;
  Tensor tensor_, copies_;  // copies are undefined where none are needed
};

}  // namespace emax
