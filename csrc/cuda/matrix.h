// Matrix products of a warp for each way of storing and multiplying numbers: fragments, how they are loaded from shared
// memory, and what a depthwise filter makes of them. All have the same shape, so that kernels are written once: A is
// 16 rows and B two times 8 columns of 32 bytes of K (a step), C[16][8] is four floats a lane (device.h).
#pragma once

#include "device.h"
#include "launch.h"

namespace mnv2_fused::cuda {

using namespace device;
static_assert(kMostShared == kSharedBytes);

MNV2_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
MNV2_DEVICE int max_of(int a, int b) { return a > b ? a : b; }

struct alignas(16) Vector {
  uint32_t word[4];
};
struct alignas(8) Pair {
  float first, second;
};

MNV2_DEVICE float relu6(float v) { return min_nan(max_nan(v, 0.0f), 6.0f); }

template <class T>
struct Math;

// Half and Bfloat16: tensor cores.
template <class T>
struct Math16 {
  static constexpr int kSize = 2, kStep = 16, kTapBytes = 32;
  static constexpr bool kRounds = false;
  struct A {
    uint32_t word[4];
  };
  struct B {
    uint32_t word[4];
  };

  static MNV2_DEVICE A load_a(const char* rows, int pitch, int lane) {
    A a;
    load_matrices(a.word, rows + lane % 16 * pitch + lane / 16 * 16);
    return a;
  }
  // Rows are columns of the product.
  static MNV2_DEVICE B load_b(const char* rows, int pitch, int lane) {
    B b;
    load_matrices(b.word, rows + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 16);
    return b;
  }
  static MNV2_DEVICE void multiply(float (&c0)[4], float (&c1)[4], const A& a, const B& b) {
    const uint32_t b0[2] = {b.word[0], b.word[1]}, b1[2] = {b.word[2], b.word[3]};
    device::multiply(c0, a.word, b0, T());
    device::multiply(c1, a.word, b1, T());
  }

  // The same for half a step, 8 values of K.
  static MNV2_DEVICE A load_half_a(const char* rows, int pitch, int lane) {
    A a;
    load_matrices(a.word, rows + lane % 16 * pitch);
    return a;
  }
  static MNV2_DEVICE B load_half_b(const char* rows, int pitch, int lane) {
    B b;
    load_matrices(b.word, rows + lane % 16 * pitch);
    return b;
  }
  static MNV2_DEVICE void multiply_half(float (&c0)[4], float (&c1)[4], const A& a, const B& b) {
    device::multiply(c0, a.word[0], a.word[1], b.word[0], T());
    device::multiply(c1, a.word[0], a.word[1], b.word[1], T());
  }

  // Where the 16 pixels of a tile begin in h.
  struct Gather {
    const char* row;
    template <class H>
    MNV2_DEVICE Gather(int lane, const H& h_of) : row(h_of(lane % 16) + lane / 16 * 16) {}
  };

  // d += h * taps of 16 pixels and 16 channels, `bytes` into h, as C. A tap is a diagonal matrix: the lane that holds
  // rows 2t and 2t + 1 of column g has the tap of channel g if it is one of the two, and 0 else.
  static MNV2_DEVICE void filter(float (&d)[2][4], const Gather& gather, int bytes, int tap_row, int tap_column,
                                 const char* taps, int lane) {
    const int g = lane / 4, t = lane % 4;
    const uint32_t place = t != g / 2 ? 0x4444u : g % 2 ? 0x1044u : 0x4410u;  // of the word's first tap, in the result
    const uint32_t second = t != g / 2 ? 0x4444u : g % 2 ? 0x3244u : 0x4432u;
    Vector tap[2];
    uint32_t last[2];
    MNV2_UNROLL for (int j = 0; j < 2; ++j) {
      const char* const from = taps + (j * 8 + g) * kTapBytes;
      tap[j] = *reinterpret_cast<const Vector*>(from);
      last[j] = *reinterpret_cast<const uint32_t*>(from + 16);
    }
    MNV2_UNROLL for (int i = 0; i < 9; ++i) {
      uint32_t h[4];
      load_matrices(h, gather.row + bytes + i / 3 * tap_row + i % 3 * tap_column);
      MNV2_UNROLL for (int j = 0; j < 2; ++j) {
        const uint32_t word = i < 8 ? tap[j].word[i / 2 % 4] : last[j];
        device::multiply(d[j], h[2 * j], h[2 * j + 1], select_bytes(word, i % 2 ? second : place), T());
      }
    }
  }
  // C as the A of the next product, as it is or its relu6.
  static MNV2_DEVICE A as_a(const float (&d)[2][4], int) {
    return {{device::pack<T>(d[0][0], d[0][1]), device::pack<T>(d[0][2], d[0][3]), device::pack<T>(d[1][0], d[1][1]),
             device::pack<T>(d[1][2], d[1][3])}};
  }
  static MNV2_DEVICE A relu6_as_a(const float (&d)[2][4], int) {
    return {{pack_relu6<T>(d[0][0], d[0][1]), pack_relu6<T>(d[0][2], d[0][3]), pack_relu6<T>(d[1][0], d[1][1]),
             pack_relu6<T>(d[1][2], d[1][3])}};
  }

  // A and B from rows of K, whose columns are rows and columns of the product.
  static MNV2_DEVICE A load_transposed_a(const char* rows, int pitch, int lane) {
    A a;
    load_matrices_transposed(a.word, rows + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 16);
    return a;
  }
  static MNV2_DEVICE B load_transposed_b(const char* rows, int pitch, int lane) {
    B b;
    load_matrices_transposed(b.word, rows + lane % 16 * pitch + lane / 16 * 16);
    return b;
  }

  static MNV2_DEVICE void store_relu6(char* to, float first, float second) {
    *reinterpret_cast<uint32_t*>(to) = pack_relu6<T>(first, second);
  }
  static MNV2_DEVICE float element(const Vector& v, int i) {
    return to_float(T{uint16_t(v.word[i / 2] >> i % 2 * 16)});
  }
  static MNV2_DEVICE Vector vector(const float (&v)[8]) {
    return {{device::pack<T>(v[0], v[1]), device::pack<T>(v[2], v[3]), device::pack<T>(v[4], v[5]),
             device::pack<T>(v[6], v[7])}};
  }
  static MNV2_DEVICE Pair load_pair(const char* from) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
    return {to_float(T{uint16_t(word)}), to_float(T{uint16_t(word >> 16)})};
  }
  static MNV2_DEVICE float load(const char* from, int64_t at) { return to_float(reinterpret_cast<const T*>(from)[at]); }
  static MNV2_DEVICE void store(char* to, int64_t at, float v) { from_float(v, reinterpret_cast<T*>(to) + at); }
  static MNV2_DEVICE void store_pair(char* to, int64_t at, float first, float second) {
    reinterpret_cast<uint32_t*>(to)[at / 2] = device::pack<T>(first, second);
  }
};

template <>
struct Math<Half> : Math16<Half> {};
template <>
struct Math<Bfloat16> : Math16<Bfloat16> {};

// Numbers of 32 bits: the filter is computed in float.
struct Math32 {
  static constexpr int kSize = 4, kStep = 8, kTapBytes = 48;

  struct Gather {
    const char *row0, *row8;  // of the pixels g and g + 8
    template <class H>
    MNV2_DEVICE Gather(int lane, const H& h_of) : row0(h_of(lane / 4)), row8(h_of(lane / 4 + 8)) {}
  };

  // d += h * taps of 16 pixels and 8 channels, as C.
  static MNV2_DEVICE void filter(float (&d)[1][4], const Gather& gather, int bytes, int tap_row, int tap_column,
                                 const char* taps, int lane) {
    const int channel = lane % 4 * 2;
    const float* const w = reinterpret_cast<const float*>(taps + channel * kTapBytes);
    MNV2_UNROLL for (int i = 0; i < 9; ++i) {
      const int at = bytes + i / 3 * tap_row + i % 3 * tap_column + channel * 4;
      const Pair h0 = *reinterpret_cast<const Pair*>(gather.row0 + at);
      const Pair h8 = *reinterpret_cast<const Pair*>(gather.row8 + at);
      const float first = w[i], second = w[kTapBytes / 4 + i];
      d[0][0] += h0.first * first;
      d[0][1] += h0.second * second;
      d[0][2] += h8.first * first;
      d[0][3] += h8.second * second;
    }
  }
  static MNV2_DEVICE void relu6_of(float (&to)[1][4], const float (&d)[1][4]) {
    MNV2_UNROLL for (int i = 0; i < 4; ++i) to[0][i] = relu6(d[0][i]);
  }

  static MNV2_DEVICE void store_relu6(char* to, float first, float second) {
    *reinterpret_cast<Pair*>(to) = {relu6(first), relu6(second)};
  }
  static MNV2_DEVICE float element(const Vector& v, int i) { return as_float(v.word[i]); }
  static MNV2_DEVICE Vector vector(const float (&v)[4]) {
    return {{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])}};
  }
  static MNV2_DEVICE Pair load_pair(const char* from) { return *reinterpret_cast<const Pair*>(from); }
  static MNV2_DEVICE float load(const char* from, int64_t at) { return reinterpret_cast<const float*>(from)[at]; }
  static MNV2_DEVICE void store(char* to, int64_t at, float v) { reinterpret_cast<float*>(to)[at] = v; }
  static MNV2_DEVICE void store_pair(char* to, int64_t at, float first, float second) {
    reinterpret_cast<Pair*>(to)[at / 2] = {first, second};
  }
};

// Tensor cores on floats rounded to 19 bits. Weights are rounded when they are packed. Packed projections have the
// channels of a step in the order 0, 2, 4, 6, 1, 3, 5, 7, which is that in which the filter's C becomes an A.
template <>
struct Math<Tf32> : Math32 {
  static constexpr bool kRounds = true;  // what the tensor cores read is rounded beforehand
  struct A {
    uint32_t word[4];
  };
  struct B {
    uint32_t word[4];
  };

  static MNV2_DEVICE A load_a(const char* rows, int pitch, int lane) {
    A a;
    load_matrices(a.word, rows + lane % 16 * pitch + lane / 16 * 16);
    MNV2_UNROLL for (int i = 0; i < 4; ++i) a.word[i] = as_bits(round_tf32(as_float(a.word[i])));
    return a;
  }
  static MNV2_DEVICE B load_b(const char* rows, int pitch, int lane) {
    B b;
    load_matrices(b.word, rows + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 16);
    return b;
  }
  static MNV2_DEVICE void multiply(float (&c0)[4], float (&c1)[4], const A& a, const B& b) {
    const uint32_t b0[2] = {b.word[0], b.word[1]}, b1[2] = {b.word[2], b.word[3]};
    device::multiply(c0, a.word, b0, Tf32());
    device::multiply(c1, a.word, b1, Tf32());
  }
  static MNV2_DEVICE A as_a(const float (&d)[1][4], int) {
    A a;
    MNV2_UNROLL for (int i = 0; i < 4; ++i) a.word[i] = as_bits(round_tf32(d[0][i % 2 * 2 + i / 2]));
    return a;
  }
  static MNV2_DEVICE A relu6_as_a(const float (&d)[1][4], int lane) {
    float r[1][4];
    relu6_of(r, d);
    return as_a(r, lane);
  }
  static MNV2_DEVICE uint32_t rounded(const char* rows, int pitch, int k, int column) {
    return as_bits(round_tf32(reinterpret_cast<const float*>(rows + k * pitch)[column]));
  }
  static MNV2_DEVICE A load_transposed_a(const char* rows, int pitch, int lane) {
    A a;
    MNV2_UNROLL for (int i = 0; i < 4; ++i) a.word[i] =
        rounded(rows, pitch, lane % 4 + i / 2 * 4, lane / 4 + i % 2 * 8);
    return a;
  }
  static MNV2_DEVICE B load_transposed_b(const char* rows, int pitch, int lane) {
    B b;
    MNV2_UNROLL for (int i = 0; i < 4; ++i) b.word[i] =
        rounded(rows, pitch, lane % 4 + i % 2 * 4, lane / 4 + i / 2 * 8);
    return b;
  }
};

// Plain float arithmetic, with rows and columns on the lanes as the tensor cores have them.
template <>
struct Math<float> : Math32 {
  static constexpr bool kRounds = false;
  struct A {
    float value[2][8];  // of rows g and g + 8
  };
  struct B {
    float value[2][2][8];  // of columns 2t and 2t + 1
  };

  static MNV2_DEVICE void load_row(const char* from, float (&to)[8]) {
    MNV2_UNROLL for (int i = 0; i < 2; ++i) {
      const Vector v = reinterpret_cast<const Vector*>(from)[i];
      MNV2_UNROLL for (int k = 0; k < 4; ++k) to[i * 4 + k] = as_float(v.word[k]);
    }
  }
  static MNV2_DEVICE A load_a(const char* rows, int pitch, int lane) {
    A a;
    load_row(rows + lane / 4 * pitch, a.value[0]);
    load_row(rows + (lane / 4 + 8) * pitch, a.value[1]);
    return a;
  }
  static MNV2_DEVICE B load_b(const char* rows, int pitch, int lane) {
    B b;
    MNV2_UNROLL for (int i = 0; i < 4; ++i)
        load_row(rows + (i / 2 * 8 + lane % 4 * 2 + i % 2) * pitch, b.value[i / 2][i % 2]);
    return b;
  }
  static MNV2_DEVICE void multiply(float (&c0)[4], float (&c1)[4], const A& a, const B& b) {
    MNV2_UNROLL for (int k = 0; k < 8; ++k) {
      MNV2_UNROLL for (int i = 0; i < 4; ++i) {
        c0[i] += a.value[i / 2][k] * b.value[0][i % 2][k];
        c1[i] += a.value[i / 2][k] * b.value[1][i % 2][k];
      }
    }
  }
  static MNV2_DEVICE A as_a(const float (&d)[1][4], int lane) {
    A a;
    MNV2_UNROLL for (int k = 0; k < 8; ++k) {
      const int from = lane / 4 * 4 + k / 2;
      a.value[0][k] = shuffle(d[0][k % 2], from);
      a.value[1][k] = shuffle(d[0][2 + k % 2], from);
    }
    return a;
  }
  static MNV2_DEVICE A relu6_as_a(const float (&d)[1][4], int lane) {
    float r[1][4];
    relu6_of(r, d);
    return as_a(r, lane);
  }
  static MNV2_DEVICE float at(const char* rows, int pitch, int k, int column) {
    return reinterpret_cast<const float*>(rows + k * pitch)[column];
  }
  static MNV2_DEVICE A load_transposed_a(const char* rows, int pitch, int lane) {
    A a;
    MNV2_UNROLL for (int k = 0; k < 8; ++k) {
      a.value[0][k] = at(rows, pitch, k, lane / 4);
      a.value[1][k] = at(rows, pitch, k, lane / 4 + 8);
    }
    return a;
  }
  static MNV2_DEVICE B load_transposed_b(const char* rows, int pitch, int lane) {
    B b;
    MNV2_UNROLL for (int i = 0; i < 4; ++i) {
      MNV2_UNROLL for (int k = 0; k < 8; ++k) b.value[i / 2][i % 2][k] =
          at(rows, pitch, k, i / 2 * 8 + lane % 4 * 2 + i % 2);
    }
    return b;
  }
};

// The part of a plane under a rectangle, of some images.
struct Part {
  int image0, images, top, left, height, width;  // the rectangle, in the plane's coordinates
  int y0, x0, tall, wide, area, count;           // what of it lies in the plane

  MNV2_DEVICE Part(int image0, int images, int top, int left, int height, int width, int plane_height, int plane_width)
      : image0(image0), images(images), top(top), left(left), height(height), width(width) {
    y0 = max_of(top, 0), x0 = max_of(left, 0);
    tall = max_of(min_of(top + height, plane_height) - y0, 0), wide = max_of(min_of(left + width, plane_width) - x0, 0);
    area = tall * wide, count = images * area;
  }
  // Image (of the part), row and column of a pixel.
  MNV2_DEVICE void locate(int i, int* image, int* y, int* x) const {
    *image = i / area, *y = y0 + i % area / wide, *x = x0 + i % wide;
  }
  // A pixel's place in a tensor of whole planes.
  MNV2_DEVICE int64_t pixel(int i, int plane_height, int plane_width) const {
    int image, y, x;
    locate(i, &image, &y, &x);
    return (int64_t(image0 + image) * plane_height + y) * plane_width + x;
  }
  // A place in the rectangle.
  MNV2_DEVICE int at(int image, int y, int x) const { return (image * height + y - top) * width + x - left; }
};

// Channels [first, first + channels) of `count` pixels of an NHWC tensor into shared memory, by all threads; zeros
// beyond the tensor's own. pixel(i) says which pixel, to(i) where it goes. Where the tensor is `aligned` to 16 bytes,
// by copy_async, which the caller waits for.
template <class T, class Pixel, class To>
MNV2_DEVICE void copy_rows(const char* x, int tensor_channels, int first, int channels, bool aligned, int count,
                           const Pixel& pixel, const To& to) {
  using M = Math<T>;
  constexpr int kUnit = 16 / M::kSize;
  const int units = channels / kUnit;
  for (int i = thread_index(); i < count * units; i += thread_count()) {
    const int row = i / units, channel = i % units * kUnit;
    const int64_t at = pixel(row) * tensor_channels + first + channel;
    char* const target = to(row) + channel * M::kSize;
    if (aligned) {
      copy_async(target, x + at * M::kSize, first + channel < tensor_channels);
      continue;
    }
    MNV2_UNROLL for (int j = 0; j < kUnit; ++j) {
      M::store(target, j, first + channel + j < tensor_channels ? M::load(x, at + j) : 0);
    }
  }
}

// Values [first, first + values) of `count` patches of an image; zeros around it. locate(i) gives a patch's image, row
// and column, to(i) its place.
template <class T, class Locate, class To>
MNV2_DEVICE void copy_patches(const char* image, const Patches& p, int first, int values, int count,
                              const Locate& locate, const To& to) {
  using M = Math<T>;
  for (int i = thread_index(); i < count; i += thread_count()) {
    int n, y, x;
    locate(i, &n, &y, &x);
    const int top = y * p.stride - p.pad_top, left = x * p.stride - p.pad_left;
    char* const target = to(i);
    for (int channel = first / 9; channel * 9 < first + values; ++channel) {
      const int64_t at = n * p.stride_batch + channel * p.stride_channel;
      MNV2_UNROLL for (int j = 0; j < 9; ++j) {
        const int value = channel * 9 + j - first, row = top + j / 3, column = left + j % 3;
        if (value < 0 || value >= values) continue;
        const bool inside = channel < p.channels && row >= 0 && row < p.height && column >= 0 && column < p.width;
        M::store(target, value, inside ? M::load(image, at + row * p.stride_row + column * p.stride_column) : 0);
      }
    }
  }
}

}  // namespace mnv2_fused::cuda
