// Feature maps, cut into tiles: one per sample and fine group.
//
// Letters: b batch, F fine groups, d channels of one, h and w height and width.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "vectors.h"

namespace emax {

using at::Tensor;
constexpr int TAPS = 9;

// Sizes of a problem and of its scratch memory.
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
  int64_t strip() const { return h + w; }
  // In the last vector of a row.
  int64_t rest() const { return w - (lines - 1) * V; }
  int64_t in_line(int64_t line) const { return line + 1 < lines ? V : rest(); }
  // Tiles that a thread is worth waking for.
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
    next_ += round_up(size, 16) + 16;  // what is loaded behind the last one is ours
    return taken;
  }
  float* all() { return next_; }

 private:
  std::vector<float> memory_;
  float* next_;
};

// A tensor [b, c, h, w] with any strides, by tiles.
template <typename T>
struct Tiles {
  T* data;
  int64_t sample, channel, line, pixel;

  explicit Tiles(const Tensor& x)
      : data(x.data_ptr<std::remove_const_t<T>>()),
        sample(x.stride(0)),
        channel(x.stride(1)),
        line(x.stride(2)),
        pixel(x.stride(3)) {}

  T* at(const Shape& s, int64_t tile) const {
    return data + tile / s.F * sample + tile % s.F * s.d * channel;
  }

  // Calls copy(element of a tile, element of images in scratch memory), in the order of the tile's
  // memory.
  template <typename Copy>
  void each(const Shape& s, int64_t tile, float* images, Copy copy) const {
    T* const from = at(s, tile);
    if (pixel == 1) {
      for (int64_t c = 0; c < s.d; ++c)
        for (int64_t i = 0; i < s.h; ++i) {
          T* const row = from + c * channel + i * line;
          float* const scratch = images + c * s.plane + i * s.w;
          for (int64_t j = 0; j < s.w; ++j) copy(row[j], scratch[j]);
        }
      return;
    }
    for (int64_t i = 0; i < s.h; ++i)
      for (int64_t j = 0; j < s.w; ++j) {
        T* const values = from + i * line + j * pixel;
        float* const scratch = images + i * s.w + j;
        for (int64_t c = 0; c < s.d; ++c) copy(values[c * channel], scratch[c * s.plane]);
      }
  }
};

// Tiles as float32 images, each one piece of memory: where they are if they are, else in scratch
// memory of `scratch()` floats.
template <typename T>
class Images {
 public:
  Images(const Shape& s, const Tensor& x) : s_(s), tiles_(x) {
    in_place_ = std::is_same_v<std::remove_const_t<T>, float> && tiles_.pixel == 1 &&
                (s.h == 1 || tiles_.line == s.w);
  }
  int64_t scratch() const { return in_place_ ? 0 : s_.d * s_.plane; }
  // From one image to the next.
  int64_t channel() const { return in_place_ ? tiles_.channel : s_.plane; }

  const float* read(int64_t tile, float* scratch) const {
    if (!in_place_)
      tiles_.each(s_, tile, scratch,
                  [](const T& image, float& out) { out = static_cast<float>(image); });
    return place(tile, scratch);
  }
  // Where to write a tile; `write` must follow.
  float* place(int64_t tile, float* scratch) const {
    if constexpr (std::is_same_v<std::remove_const_t<T>, float>)
      if (in_place_) return const_cast<float*>(tiles_.at(s_, tile));
    return scratch;
  }
  void write(int64_t tile, float* scratch) const {
    if constexpr (!std::is_const_v<T>)
      if (!in_place_)
        tiles_.each(s_, tile, scratch,
                    [](T& image, float& value) { image = static_cast<T>(value); });
  }
  // Where a tile is that will be read soon.
  const float* ahead(int64_t tile) const {
    return reinterpret_cast<const float*>(tiles_.at(s_, std::min(tile, s_.tiles() - 1)));
  }

 private:
  const Shape& s_;
  Tiles<T> tiles_;
  bool in_place_;
};

}  // namespace emax
