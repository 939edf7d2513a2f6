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

// at(n, k) for n outputs and k inputs to panels [k][width]. What is read next is a neighbour of the output, where
// `transposed`, or else of the input: then blocks of 16 inputs keep both sides in L1. `projected` is the number of
// values, not slots, that a projection adds up; 0 of anything else.
template <class T, class At>
void pack_panels(const At& at, int64_t n_count, int64_t k_count, bool transposed, const Tiles& tiles, int64_t projected,
                 T* packed) {
  for (int64_t n0 = 0; n0 < n_count; n0 += tiles.panel) {
    const int64_t n1 = std::min<int64_t>(n0 + tiles.panel, n_count), width = round_up(n1 - n0, tiles.lanes);
    T* out = packed + n0 * k_count;
    if (projected && paired_panel(tiles, n1 - n0, projected)) {
      for (int64_t k0 = 0; k0 < k_count; k0 += 2) {
        for (int64_t i = 0; i < tiles.lanes * 3; ++i) {
          const int64_t n = n0 + i / 2, k = k0 + i % 2;
          *out++ = n < n1 ? at(n, k) : T(0);
        }
      }
      continue;
    }
    if (transposed) {
      for (int64_t k = 0; k < k_count; ++k, out += width) {
        for (int64_t n = n0; n < n1; ++n) out[n - n0] = at(n, k);
        std::fill(out + n1 - n0, out + width, T(0));
      }
      continue;
    }
    for (int64_t k0 = 0; k0 < k_count; k0 += 16) {
      const int64_t k1 = std::min<int64_t>(k0 + 16, k_count);
      for (int64_t n = n0; n < n1; ++n) {
        T values[16];  // what is computed of them goes by vectors
        for (int64_t k = k0; k < k1; ++k) values[k - k0] = at(n, k);
        for (int64_t k = k0; k < k1; ++k) out[k * width + n - n0] = values[k - k0];
      }
      for (int64_t k = k0; k < k1; ++k) std::fill(out + k * width + n1 - n0, out + (k + 1) * width, T(0));
    }
  }
}

// Two values rounded into one slot, the first in its low half.
uint32_t slot_of(float low, float high) {
  return uint32_t(round_to_bfloat16(high).bits) << 16 | round_to_bfloat16(low).bits;
}

template <class T>
void pack_taps(const T* w, int64_t channels, const Tiles& tiles, T* packed) {
  for (int64_t i = 0; i < round_up(channels, tiles.lanes); ++i) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      packed[(i / tiles.lanes * 9 + tap) * tiles.lanes + i % tiles.lanes] = i < channels ? w[i * 9 + tap] : T(0);
    }
  }
}

// A convolution as PyTorch has it. A slot has neighbours of a run, and zero beside the last one of an odd number.
template <class T>
void pack_convolution(const T* w, const Convolution& c, const Tiles& tiles, T* packed) {
  const int64_t projected = c.projection ? c.k : 0;
  if constexpr (sizeof(T) == 4) {
    if (tiles.slot > 1) {
      const int64_t slots = ceil_div(c.run, 2);
      const auto at = [&](int64_t n, int64_t k) {
        const int64_t i = k % slots * 2;
        const T* values = w + n * c.k + k / slots * c.run + i;
        return slot_of(values[0], i + 1 < c.run ? values[1] : 0);
      };
      const auto even = [&](int64_t n, int64_t k) { return slot_of(w[n * c.k + 2 * k], w[n * c.k + 2 * k + 1]); };
      auto* to = reinterpret_cast<uint32_t*>(packed);
      return c.run % 2 ? pack_panels(at, c.n, c.slots(tiles), false, tiles, projected, to)
                       : pack_panels(even, c.n, c.slots(tiles), false, tiles, projected, to);
    }
  }
  pack_panels([&](int64_t n, int64_t k) { return w[n * c.k + k]; }, c.n, c.k, false, tiles, projected, packed);
}

template <class T>
void pack_layer(const Layer& layer, const Tiles& tiles, const void* const* weights, T* packed) {
  for (const Convolution& c : convolutions(layer)) {
    const T *w = static_cast<const T*>(*weights++), *bias = static_cast<const T*>(*weights++);
    const int64_t n = round_up(c.n, tiles.lanes);
    if (c.depthwise) {
      pack_taps(w, c.n, tiles, packed);
    } else {
      pack_convolution(w, c, tiles, packed);
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
    const int64_t together = tiles.wide && !c.depthwise ? 2 : 4;
    for (int64_t n = 0; n < c.n; ++n) {
      const int64_t width = c.depthwise ? tiles.lanes : tiles.panel;
      const int64_t n0 = n / width * width, columns = std::min(width, padded - n0);
      uint8_t* panel = reinterpret_cast<uint8_t*>(packed + n0 * slots);
      for (int64_t k = 0; k < c.k; ++k) {
        const int64_t channel = k / taps, ky = k % taps / 3, kx = k % 3;
        const int64_t slot = c.depthwise ? kx : k % taps * ceil_div(channels, 4) + channel / 4;
        const int64_t value = slot * 4 + (c.depthwise ? ky : channel % 4);
        panel[value / together * together * columns + (n - n0) * together + value % together] = *bytes++;
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
  const auto typed = [&](const auto* w, auto* to) {
    const auto pack_as = [&](const auto& at) { pack_panels(at, n, k, transposed, tiles, 0, to); };
    transposed ? pack_as([=](int64_t i, int64_t j) { return w[j * n + i]; })
               : pack_as([=](int64_t i, int64_t j) { return w[i * k + j]; });
  };
  if (dtype == Dtype::kFloat64) return typed(static_cast<const double*>(w), static_cast<double*>(packed));
  const float* values = static_cast<const float*>(w);
  if (dtype == Dtype::kFloat32) return typed(values, static_cast<float*>(packed));
  const int64_t slots = ceil_div(k, 2);
  uint32_t* to = static_cast<uint32_t*>(packed);
  const int64_t n_stride = transposed ? 1 : k, k_stride = transposed ? n : 1;
  const auto pack_as = [&](const auto& at) { pack_panels(at, n, slots, transposed, tiles, 0, to); };
  if (k % 2) {
    return pack_as([=](int64_t i, int64_t j) {
      const float* value = values + i * n_stride + 2 * j * k_stride;
      return slot_of(*value, 2 * j + 1 < k ? value[k_stride] : 0);
    });
  }
  transposed
      ? pack_as([=](int64_t i, int64_t j) { return slot_of(values[2 * j * n + i], values[(2 * j + 1) * n + i]); })
      : pack_as([=](int64_t i, int64_t j) { return slot_of(values[i * k + 2 * j], values[i * k + 2 * j + 1]); });
}

void pack_depthwise(const Tiles& tiles, Dtype dtype, const void* w, int64_t channels, void* packed) {
  if (dtype == Dtype::kFloat64) {
    pack_taps(static_cast<const double*>(w), channels, tiles, static_cast<double*>(packed));
  } else {
    pack_taps(static_cast<const float*>(w), channels, tiles, static_cast<float*>(packed));
  }
}

}  // namespace mnv2_fused
