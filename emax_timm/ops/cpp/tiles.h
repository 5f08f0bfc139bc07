// Feature maps in tiles: one tile per sample and fine group.
//
// Letters: b batch, F fine groups, d channels of one, h and w height and width.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "vectors.h"

namespace emax {

using at::Tensor;
constexpr int TAPS = 9;

// The sizes of a problem and of its scratch memory.
struct Shape {
  int64_t b, F, d, h, w;
  int64_t lines;     // vectors in a row
  int64_t plane;     // of an image in scratch memory
  int64_t together;  // tiles that read a large weight matrix together

  Shape(const Tensor& x, int64_t groups)
      : b(x.size(0)), F(groups), d(x.size(1) / groups), h(x.size(2)), w(x.size(3)) {
    lines = (w + V - 1) / V;
    plane = round_up(h * w, V);
    together = d >= 32 ? 4 : 1;
  }

  int64_t tiles() const { return b * F; }
  int64_t pixels() const { return h * w; }
  int64_t tile() const { return d * pixels(); }
  int64_t sample() const { return F * tile(); }
  int64_t strip() const { return h + w; }
  // The number of pixels in the last vector of a row.
  int64_t rest() const { return w - (lines - 1) * V; }
  int64_t in_line(int64_t line) const { return line + 1 < lines ? V : rest(); }
  // The number of tiles that are worth waking a thread for.
  int64_t grain() const { return 1 + 16384 / (d * plane); }
};

// Zeroed, aligned scratch memory of one thread.
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(size + 64 * V, 0.f) {
    next_ = reinterpret_cast<float*>(round_up(reinterpret_cast<intptr_t>(memory_.data()), 64));
  }
  float* take(int64_t size) {
    float* const taken = next_;
    next_ += round_up(size, 16) + 16;  // vectors may be loaded behind the end
    return taken;
  }

 private:
  std::vector<float> memory_;
  float* next_;
};

}  // namespace emax
