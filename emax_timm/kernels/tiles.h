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

  // Whether the channels of a pixel stand together, and its pixels too: channels_last.
  bool by_pixels(const Shape& s) const {
    return channel == 1 && pixel > 1 && (s.h == 1 || line == s.w * pixel);
  }
};

// Copies of a row, between floats and what a tensor holds.
inline void copy(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
inline void copy(const at::BFloat16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}
inline void copy(const float* from, int64_t count, at::BFloat16* to) {
  at::vec::convert(from, to, count);
}

// A block of at most V x V floats, mirrored at its diagonal.
inline void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                      int64_t to_row) {
  if (rows == V && columns == V)
    at::vec::transpose_mxn<float, V, V>(from, from_row, to, to_row);
  else
    at::vec::transpose_mxn<float>(from, from_row, to, to_row, rows, columns);
}

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
    if (!in_place_) to_scratch(tiles_.at(s_, tile), scratch);
    return place(tile, scratch);
  }
  // Where to write a tile; `write` must follow.
  float* place(int64_t tile, float* scratch) const {
    if constexpr (std::is_same_v<std::remove_const_t<T>, float>)
      if (in_place_) return const_cast<float*>(tiles_.at(s_, tile));
    return scratch;
  }
  void write(int64_t tile, const float* scratch) const {
    if constexpr (!std::is_const_v<T>)
      if (!in_place_) from_scratch(scratch, tiles_.at(s_, tile));
  }
  // Where a tile is that will be read soon, or what is in the cache if it is not one piece.
  const float* ahead(int64_t tile, const float* here) const {
    if (tiles_.pixel != 1) return here;
    return reinterpret_cast<const float*>(tiles_.at(s_, std::min(tile, s_.tiles() - 1)));
  }

 private:
  // Calls f(pixels from, count, channels from, count) for blocks of V x V.
  template <typename F>
  void blocks(F f) const {
    for (int64_t at = 0; at < s_.pixels(); at += V)
      for (int64_t c = 0; c < s_.d; c += V)
        f(at, std::min(V, s_.pixels() - at), c, std::min(V, s_.d - c));
  }

  // Calls f(place in the tensor, place in the images) for rows.
  template <typename F>
  void rows(F f) const {
    for (int64_t c = 0; c < s_.d; ++c)
      for (int64_t i = 0; i < s_.h; ++i)
        f(c * tiles_.channel + i * tiles_.line, c * s_.plane + i * s_.w);
  }

  void to_scratch(T* from, float* images) const {
    if (!tiles_.by_pixels(s_))
      return rows([&](int64_t place, int64_t image) {
        if (tiles_.pixel == 1) return copy(from + place, s_.w, images + image);
        for (int64_t j = 0; j < s_.w; ++j)
          copy(from + place + j * tiles_.pixel, 1, images + image + j);
      });
    blocks([&](int64_t at, int64_t pixels, int64_t c, int64_t channels) {
      T* const block = from + at * tiles_.pixel + c;
      float* const to = images + c * s_.plane + at;
      if constexpr (std::is_same_v<std::remove_const_t<T>, float>) {
        transpose(block, tiles_.pixel, pixels, channels, to, s_.plane);
      } else {
        float floats[V * V];
        for (int64_t i = 0; i < pixels; ++i)
          copy(block + i * tiles_.pixel, channels, floats + i * V);
        transpose(floats, V, pixels, channels, to, s_.plane);
      }
    });
  }

  void from_scratch(const float* images, T* to) const {
    if (!tiles_.by_pixels(s_))
      return rows([&](int64_t place, int64_t image) {
        if (tiles_.pixel == 1) return copy(images + image, s_.w, to + place);
        for (int64_t j = 0; j < s_.w; ++j)
          copy(images + image + j, 1, to + place + j * tiles_.pixel);
      });
    blocks([&](int64_t at, int64_t pixels, int64_t c, int64_t channels) {
      const float* const from = images + c * s_.plane + at;
      T* const block = to + at * tiles_.pixel + c;
      if constexpr (std::is_same_v<T, float>) {
        transpose(from, s_.plane, channels, pixels, block, tiles_.pixel);
      } else {
        float floats[V * V];
        transpose(from, s_.plane, channels, pixels, floats, V);
        for (int64_t i = 0; i < pixels; ++i)
          copy(floats + i * V, channels, block + i * tiles_.pixel);
      }
    });
  }

  const Shape& s_;
  Tiles<T> tiles_;
  bool in_place_;
};

}  // namespace emax
