// Weights from PyTorch's layouts to the packed one described in inverted_residual.h.
#include <algorithm>
#include <cstring>

#include "network.h"

namespace mnv2_fused {
namespace {

// The convolutions of a layer in order: outputs, and the inputs of each output (9 of a depthwise one), which are read
// in runs: no slot holds inputs of two of them.
struct Convolution {
  int64_t n, k, run;
  bool depthwise = false, projection = false;

  int64_t slots(const Tiles& tiles) const { return depthwise ? k : k / run * ceil_div(run, tiles.slot); }
};

std::vector<Convolution> convolutions(const Layer& layer) {
  switch (layer.kind) {
    case Layer::kConv3x3:
      return {{layer.out_channels, layer.in_channels * 9, 3}};
    case Layer::kPointwise:
    case Layer::kLinear:
      return {{layer.out_channels, layer.in_channels, layer.in_channels}};
    case Layer::kBlock: {
      std::vector<Convolution> all;
      if (layer.expand) all.push_back({layer.hidden_channels, layer.in_channels, layer.in_channels});
      all.push_back({layer.hidden_channels, 9, 9, true});
      all.push_back({layer.out_channels, layer.hidden_channels, layer.hidden_channels, false, true});
      return all;
    }
    default:
      return {};
  }
}

// w [n][k], with any strides, to panels [k][width]; blocks of 16 inputs keep both sides in L1. `projected` is the
// number of values, not slots, that a projection adds up; 0 of anything else.
template <class T>
void pack_panels(const T* w, int64_t n_count, int64_t k_count, int64_t n_stride, int64_t k_stride, const Tiles& tiles,
                 int64_t projected, T* packed) {
  for (int64_t n0 = 0; n0 < n_count; n0 += tiles.panel) {
    const int64_t n1 = std::min<int64_t>(n0 + tiles.panel, n_count), width = round_up(n1 - n0, tiles.lanes);
    T* out = packed + n0 * k_count;
    if (projected && paired_panel(tiles, n1 - n0, projected)) {
      for (int64_t k0 = 0; k0 < k_count; k0 += 2) {
        for (int64_t i = 0; i < tiles.lanes * 3; ++i) {
          const int64_t n = n0 + i / 2, k = k0 + i % 2;
          *out++ = n < n1 ? w[n * n_stride + k * k_stride] : T(0);
        }
      }
      continue;
    }
    for (int64_t k0 = 0; k0 < k_count; k0 += 16) {
      const int64_t k1 = std::min<int64_t>(k0 + 16, k_count);
      for (int64_t n = n0; n < n0 + width; ++n) {
        const T* row = w + n * n_stride;
        for (int64_t k = k0; k < k1; ++k) out[k * width + n - n0] = n < n1 ? row[k * k_stride] : T(0);
      }
    }
  }
}

template <class T>
void pack_taps(const T* w, int64_t channels, const Tiles& tiles, T* packed) {
  for (int64_t i = 0; i < round_up(channels, tiles.lanes); ++i) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      packed[(i / tiles.lanes * 9 + tap) * tiles.lanes + i % tiles.lanes] = i < channels ? w[i * 9 + tap] : T(0);
    }
  }
}

// Of w [n][run], with any strides, neighbours of each run rounded into one slot, zero beside the last one of an odd
// number.
std::vector<uint32_t> slots_of(const float* w, int64_t n, int64_t run, int64_t n_stride, int64_t stride) {
  std::vector<uint32_t> slots;
  slots.reserve(size_t(n * ceil_div(run, 2)));
  for (int64_t i = 0; i < n; ++i, w += n_stride) {
    for (int64_t j = 0; j < run; j += 2) {
      const uint32_t high = j + 1 < run ? round_to_bfloat16(w[(j + 1) * stride]).bits : 0;
      slots.push_back(high << 16 | round_to_bfloat16(w[j * stride]).bits);
    }
  }
  return slots;
}

template <class T>
void pack_layer(const Layer& layer, const Tiles& tiles, const void* const* weights, T* packed) {
  for (const Convolution& c : convolutions(layer)) {
    const T *w = static_cast<const T*>(*weights++), *bias = static_cast<const T*>(*weights++);
    const int64_t n = round_up(c.n, tiles.lanes);
    if (c.depthwise) {
      pack_taps(w, c.n, tiles, packed);
    } else if constexpr (sizeof(T) == 4) {
      const int64_t projected = c.projection ? c.k : 0, k = c.slots(tiles);
      if (tiles.slot == 1) {
        pack_panels(w, c.n, k, k, 1, tiles, projected, packed);
      } else {
        const std::vector<uint32_t> slots = slots_of(w, c.n * (c.k / c.run), c.run, c.run, 1);
        pack_panels(slots.data(), c.n, k, k, 1, tiles, projected, reinterpret_cast<uint32_t*>(packed));
      }
    } else {
      pack_panels(w, c.n, c.k, c.k, 1, tiles, c.projection ? c.k : 0, packed);
    }
    packed += n * c.slots(tiles);
    std::copy_n(bias, c.n, packed);
    std::fill(packed + c.n, packed + n, T(0));
    packed += n;
  }
}

// Of an output of an int8 row.
int64_t slots_s8(const Layer& layer, const Convolution& c) {
  if (c.depthwise) return 3;
  return layer.kind == Layer::kConv3x3 ? 9 * ceil_div(c.k / 9, 4) : ceil_div(c.k, 4);
}

}  // namespace

std::vector<int64_t> weight_sizes(const Layer& layer) {
  std::vector<int64_t> sizes;
  for (const Convolution& c : convolutions(layer)) sizes.insert(sizes.end(), {c.n * c.k, c.n});
  return sizes;
}

int64_t packed_size(const Layer& layer, const Tiles& tiles) {
  int64_t size = 0;
  for (const Convolution& c : convolutions(layer)) size += round_up(c.n, tiles.lanes) * (c.slots(tiles) + 1);
  return size;
}

void pack(const Layer& layer, const Tiles& tiles, Dtype dtype, const void* const* weights, void* packed) {
  if (dtype == Dtype::kFloat64) {
    pack_layer(layer, tiles, weights, static_cast<double*>(packed));
  } else {
    pack_layer(layer, tiles, weights, static_cast<float*>(packed));
  }
}

int64_t byte_size_s8(const Layer& layer) {
  int64_t size = 4 * kConstants;
  for (const Convolution& c : convolutions(layer)) size += c.n * (c.k + 8);
  return size;
}

int64_t packed_size_s8(const Layer& layer, const Tiles& tiles) {
  int64_t size = kLine;
  for (const Convolution& c : convolutions(layer)) {
    const int64_t n = round_up(c.n, tiles.lanes);
    size += round_up(n * slots_s8(layer, c), kLine) + round_up(2 * n, kLine);
  }
  return size;
}

void pack_s8(const Layer& layer, const Tiles& tiles, const uint8_t* bytes, uint32_t* packed) {
  std::fill_n(packed, packed_size_s8(layer, tiles), 0);
  for (const Convolution& c : convolutions(layer)) {
    const int64_t padded = round_up(c.n, tiles.lanes), slots = slots_s8(layer, c);
    // A tap's channels begin at a slot.
    const int64_t taps = layer.kind == Layer::kConv3x3 || c.depthwise ? 9 : 1, channels = c.k / taps;
    for (int64_t n = 0; n < c.n; ++n) {
      const int64_t width = c.depthwise ? tiles.lanes : tiles.panel;
      const int64_t n0 = n / width * width, columns = std::min(width, padded - n0);
      uint8_t* out = reinterpret_cast<uint8_t*>(packed + n0 * slots + n - n0);
      for (int64_t k = 0; k < c.k; ++k) {
        const int64_t channel = k / taps, ky = k % taps / 3, kx = k % 3;
        const int64_t slot = c.depthwise ? kx : k % taps * ceil_div(channels, 4) + channel / 4;
        out[slot * columns * 4 + (c.depthwise ? ky : channel % 4)] = *bytes++;
      }
    }
    packed += round_up(padded * slots, kLine);
    std::memcpy(packed, bytes, size_t(4 * c.n));
    std::memcpy(packed + padded, bytes + 4 * c.n, size_t(4 * c.n));
    bytes += 8 * c.n;
    packed += round_up(2 * padded, kLine);
  }
  std::memcpy(packed, bytes, 4 * kConstants);
}

void pack_matrix(const Tiles& tiles, Dtype dtype, const void* w, int64_t n, int64_t k, bool transposed, void* packed) {
  const int64_t n_stride = transposed ? 1 : k, k_stride = transposed ? n : 1;
  if (dtype == Dtype::kBFloat16) {
    const std::vector<uint32_t> slots = slots_of(static_cast<const float*>(w), n, k, n_stride, k_stride);
    const int64_t count = ceil_div(k, tiles.slot);
    pack_panels(slots.data(), n, count, count, 1, tiles, 0, static_cast<uint32_t*>(packed));
  } else if (dtype == Dtype::kFloat32) {
    pack_panels(static_cast<const float*>(w), n, k, n_stride, k_stride, tiles, 0, static_cast<float*>(packed));
  } else {
    pack_panels(static_cast<const double*>(w), n, k, n_stride, k_stride, tiles, 0, static_cast<double*>(packed));
  }
}

void pack_depthwise(const Tiles& tiles, Dtype dtype, const void* w, int64_t channels, void* packed) {
  if (dtype == Dtype::kFloat64) {
    pack_taps(static_cast<const double*>(w), channels, tiles, static_cast<double*>(packed));
  } else {
    pack_taps(static_cast<const float*>(w), channels, tiles, static_cast<float*>(packed));
  }
}

}  // namespace mnv2_fused
