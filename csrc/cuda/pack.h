// Weights as PyTorch has them into the blobs of a Packing: a block of threads a chunk, and one for the last bias.
#pragma once

#include "launch.h"
#include "matrix.h"

namespace mnv2_fused::cuda {

struct PackArgs {
  Weights weights;
  char* to;
  Packing packing;
  int in_channels, hidden_channels, out_channels;
};

template <class T, class Source>
struct PackKernel {
  using Args = PackArgs;
  using M = Math<T>;
  using S = Math<Source>;
  static constexpr int kMaxThreads = 256, kMinBlocks = 1, kChunk = Packing::kChunkBytes / M::kSize;

  static MNV2_DEVICE void run(const PackArgs& a) {
    const Packing& p = a.packing;
    char* const to = a.to + int64_t(block_x()) * p.blob_bytes;
    if (block_x() == p.chunks) return bias(to, a.weights.project_bias, 0, p.out_channels, a.out_channels);
    const int c0 = block_x() * kChunk;
    if (a.weights.expand) {
      const int row = p.expand_pitch / M::kSize;
      each(kChunk * row, [&](int i) {
        const int c = c0 + i / row, k = i % row;
        const bool there = c < a.hidden_channels && k < a.in_channels;
        put(to, i, there ? get(a.weights.expand, int64_t(c) * a.in_channels + k) : 0);
      });
    }
    const int row = Packing::kPitch / M::kSize;
    each(p.out_channels * row, [&](int i) {
      const int n = i / row, c = c0 + channel(i % row);
      const bool there = n < a.out_channels && i % row < kChunk && c < a.hidden_channels;
      put(to + p.project, i, there ? get(a.weights.project, int64_t(n) * a.hidden_channels + c) : 0);
    });
    constexpr int kTaps = M::kTapBytes / M::kSize;
    each(kChunk * kTaps, [&](int i) {
      const int c = c0 + i / kTaps, tap = i % kTaps;
      M::store(to + p.taps, i, tap < 9 && c < a.hidden_channels ? get(a.weights.depthwise, int64_t(c) * 9 + tap) : 0);
    });
    bias(to + p.expand_bias, a.weights.expand_bias, c0, kChunk, a.hidden_channels);
    bias(to + p.depthwise_bias, a.weights.depthwise_bias, c0, kChunk, a.hidden_channels);
  }

 private:
  template <class Body>
  static MNV2_DEVICE void each(int count, const Body& body) {
    for (int i = thread_index(); i < count; i += thread_count()) body(i);
  }
  static MNV2_DEVICE float get(const void* from, int64_t at) { return S::load(static_cast<const char*>(from), at); }
  static MNV2_DEVICE void put(char* to, int at, float v) {
    if constexpr (M::kRounds) v = round_tf32(v);
    M::store(to, at, v);
  }
  // Which channel of the chunk stands at a place of a projection's row.
  static MNV2_DEVICE int channel(int place) {
    if constexpr (M::kRounds) return place / 8 * 8 + place % 4 * 2 + place % 8 / 4;
    return place;
  }
  static MNV2_DEVICE void bias(char* to, const void* from, int first, int count, int channels) {
    each(count,
         [&](int i) { reinterpret_cast<float*>(to)[i] = from && first + i < channels ? get(from, first + i) : 0; });
  }
};

struct PackDenseArgs {
  const void *weight, *bias;
  char* to;
  DensePacking packing;
  int in_channels, out_channels;
};

// Of a Dense: a block of threads for 32 rows.
template <class T, class Source>
struct PackDenseKernel {
  using Args = PackDenseArgs;
  using M = Math<T>;
  using S = Math<Source>;
  static constexpr int kMaxThreads = 256, kMinBlocks = 1;

  static MNV2_DEVICE void run(const PackDenseArgs& a) {
    const int row_values = a.packing.row_bytes / M::kSize, first = block_x() * 32;
    const int rows = min_of(32, a.out_channels - first);
    for (int i = thread_index(); i < rows * row_values; i += thread_count()) {
      const int row = first + i / row_values, k = i % row_values;
      float v = k < a.in_channels ? S::load(static_cast<const char*>(a.weight), int64_t(row) * a.in_channels + k) : 0;
      if constexpr (M::kRounds) v = round_tf32(v);
      M::store(a.to, int64_t(row) * row_values + k, v);
    }
    float* const bias = reinterpret_cast<float*>(a.to + a.packing.bias);
    for (int i = thread_index(); i < rows; i += thread_count()) {
      bias[first + i] = a.bias ? S::load(static_cast<const char*>(a.bias), first + i) : 0;
    }
  }
};

}  // namespace mnv2_fused::cuda
