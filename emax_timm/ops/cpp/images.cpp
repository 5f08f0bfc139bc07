#include "images.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

namespace emax {

namespace {

void copy(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
void copy(const at::BFloat16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}
void copy(const float* from, int64_t count, at::BFloat16* to) {
  at::vec::convert(from, to, count);
}

// Copies a block of at most V x V values between channels_last pixels and images, in either direction.
void block_to_images(const float* from, int64_t c, int64_t pixels, int64_t channels, float* to,
                     int64_t image) {
  transpose(from, c, pixels, channels, to, image);
}
void block_to_images(const at::BFloat16* from, int64_t c, int64_t pixels, int64_t channels,
                     float* to, int64_t image) {
  float floats[V * V];
  for (int64_t i = 0; i < pixels; ++i) copy(from + i * c, channels, floats + i * V);
  transpose(floats, V, pixels, channels, to, image);
}
void block_to_pixels(const float* from, int64_t image, int64_t pixels, int64_t channels, float* to,
                     int64_t c) {
  transpose(from, image, channels, pixels, to, c);
}
void block_to_pixels(const float* from, int64_t image, int64_t pixels, int64_t channels,
                     at::BFloat16* to, int64_t c) {
  float floats[V * V];
  transpose(from, image, channels, pixels, floats, V);
  for (int64_t i = 0; i < pixels; ++i) copy(floats + i * V, channels, to + i * c);
}

// Calls rows(place) for the channels of contiguous samples, and for channels_last samples
// block(place among pixels, place among images, pixels, channels) for blocks of V x V.
template <typename Rows, typename Block>
void by_parts(const Shape& s, bool contiguous, int64_t count, Rows rows, Block block) {
  const int64_t c = s.F * s.d, pixels = s.pixels();
  if (contiguous) {
    at::parallel_for(0, count * c, 1 + 16384 / pixels, [&](int64_t begin, int64_t end) {
      rows(begin * pixels, (end - begin) * pixels);
    });
    return;
  }
  const int64_t columns = (pixels + V - 1) / V;
  at::parallel_for(0, count * columns, 1 + 16384 / (c * V), [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; ++column) {
      const int64_t sample = column / columns * c * pixels, at = column % columns * V;
      for (int64_t channel = 0; channel < c; channel += V)
        block(sample + at * c + channel, sample + channel * pixels + at, std::min(V, pixels - at),
              std::min(V, c - channel));
    }
  });
}

template <typename T>
void to_images(const Shape& s, const T* from, bool contiguous, int64_t count, float* images) {
  by_parts(
      s, contiguous, count,
      [&](int64_t at, int64_t length) { copy(from + at, length, images + at); },
      [&](int64_t place, int64_t image, int64_t pixels, int64_t channels) {
        block_to_images(from + place, s.F * s.d, pixels, channels, images + image, s.pixels());
      });
}

template <typename T>
void from_images(const Shape& s, const float* images, bool contiguous, int64_t count, T* to) {
  by_parts(
      s, contiguous, count,
      [&](int64_t at, int64_t length) { copy(images + at, length, to + at); },
      [&](int64_t place, int64_t image, int64_t pixels, int64_t channels) {
        block_to_pixels(images + image, s.pixels(), pixels, channels, to + place, s.F * s.d);
      });
}

}  // namespace

Images::Images(const Shape& s, const Tensor& tensor, int64_t together) : s_(s), tensor_(tensor) {
  if (tensor.scalar_type() == at::kFloat && tensor.is_contiguous()) return;
  copies_ = at::empty({together, s.F * s.d, s.h, s.w},
                      tensor.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
}

float* Images::place(int64_t sample) const {
  if (!copies_.defined()) return tensor_.data_ptr<float>();
  return copies_.data_ptr<float>() - sample * s_.sample();
}

const float* Images::read(int64_t sample, int64_t count) const {
  if (copies_.defined()) {
    const bool contiguous = tensor_.is_contiguous();
    const int64_t at = sample * s_.sample();
    float* const images = copies_.data_ptr<float>();
    if (tensor_.scalar_type() == at::kFloat)
      to_images(s_, tensor_.const_data_ptr<float>() + at, contiguous, count, images);
    else
      to_images(s_, tensor_.const_data_ptr<at::BFloat16>() + at, contiguous, count, images);
  }
  return place(sample);
}

void Images::write(int64_t sample, int64_t count) const {
  if (!copies_.defined()) return;
  const bool contiguous = tensor_.is_contiguous();
  const int64_t at = sample * s_.sample();
  const float* const images = copies_.const_data_ptr<float>();
  if (tensor_.scalar_type() == at::kFloat)
    from_images(s_, images, contiguous, count, tensor_.data_ptr<float>() + at);
  else
    from_images(s_, images, contiguous, count, tensor_.data_ptr<at::BFloat16>() + at);
}

}  // namespace emax
