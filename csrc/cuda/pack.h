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

// An element of a tensor; 0 where there is none.
template <class T>
MNV2_DEVICE float get(const Numbers& from, int64_t at) {
  const char* const data = static_cast<const char*>(from.data);
  return data == nullptr ? 0 : from.single ? Math<float>::load(data, at) : Math<T>::load(data, at);
}
template <class T>
MNV2_DEVICE void put(char* to, int64_t at, float v) {
  if constexpr (Math<T>::kRounds) v = round_tf32(v);
  Math<T>::store(to, at, v);
}
// Which channel of a chunk stands at a place of a row that a filter's result is multiplied with.
template <class T>
MNV2_DEVICE int channel_at(int place) {
  if constexpr (Math<T>::kRounds) return place / 8 * 8 + place % 4 * 2 + place % 8 / 4;
  return place;
}
// body(i) for i below `count`, by all threads.
template <class Body>
MNV2_DEVICE void each(int count, const Body& body) {
  for (int i = thread_index(); i < count; i += thread_count()) body(i);
}

template <class T>
struct PackKernel {
  using Args = PackArgs;
  using M = Math<T>;
  static constexpr int kMaxThreads = 256, kMinBlocks = 1, kChunk = Packing::kChunkBytes / M::kSize;

  static MNV2_DEVICE void run(const PackArgs& a) {
    const Packing& p = a.packing;
    char* const to = a.to + int64_t(block_x()) * p.blob_bytes;
    if (block_x() == p.chunks) return bias(to, a.weights.project_bias, 0, p.out_channels, a.out_channels);
    const int c0 = block_x() * kChunk;
    if (a.weights.expand.data) {
      const int row = p.expand_pitch / M::kSize;
      each(kChunk * row, [&](int i) {
        const int c = c0 + i / row, k = i % row;
        const bool there = c < a.hidden_channels && k < a.in_channels;
        put<T>(to, i, there ? get<T>(a.weights.expand, int64_t(c) * a.in_channels + k) : 0);
      });
    }
    const int row = Packing::kPitch / M::kSize;
    each(p.out_channels * row, [&](int i) {
      const int n = i / row, c = c0 + channel_at<T>(i % row);
      const bool there = n < a.out_channels && i % row < kChunk && c < a.hidden_channels;
      put<T>(to + p.project, i, there ? get<T>(a.weights.project, int64_t(n) * a.hidden_channels + c) : 0);
    });
    constexpr int kTaps = M::kTapBytes / M::kSize;
    each(kChunk * kTaps, [&](int i) {
      const int c = c0 + i / kTaps, tap = i % kTaps;
      M::store(to + p.taps, i,
               tap < 9 && c < a.hidden_channels ? get<T>(a.weights.depthwise, int64_t(c) * 9 + tap) : 0);
    });
    bias(to + p.expand_bias, a.weights.expand_bias, c0, kChunk, a.hidden_channels);
    bias(to + p.depthwise_bias, a.weights.depthwise_bias, c0, kChunk, a.hidden_channels);
  }

 private:
  static MNV2_DEVICE void bias(char* to, const Numbers& from, int first, int count, int channels) {
    each(count, [&](int i) { reinterpret_cast<float*>(to)[i] = first + i < channels ? get<T>(from, first + i) : 0; });
  }
};

struct PackDenseArgs {
  Numbers weight, bias;
  char* to;
  DensePacking packing;
  int in_channels, out_channels;
};

// Of a Dense: a block of threads for 32 rows.
template <class T>
struct PackDenseKernel {
  using Args = PackDenseArgs;
  using M = Math<T>;
  static constexpr int kMaxThreads = 256, kMinBlocks = 1;

  static MNV2_DEVICE void run(const PackDenseArgs& a) {
    const int row_values = a.packing.row_bytes / M::kSize, first = block_x() * 32;
    const int rows = min_of(32, a.out_channels - first);
    each(rows * row_values, [&](int i) {
      const int row = first + i / row_values, k = i % row_values;
      put<T>(a.to, int64_t(row) * row_values + k,
             k < a.in_channels ? get<T>(a.weight, int64_t(row) * a.in_channels + k) : 0);
    });
    float* const bias = reinterpret_cast<float*>(a.to + a.packing.bias);
    each(rows, [&](int i) { bias[first + i] = get<T>(a.bias, first + i); });
  }
};

struct PackTrainingArgs {
  Weights weights;
  const float* coefficients;  // [6][hidden], may be null
  char* to;
  TrainingPacking packing;
  int in_channels, hidden_channels, out_channels;
};

// Of the passes of training: a block of threads a chunk.
template <class T>
struct PackTrainingKernel {
  using Args = PackTrainingArgs;
  using M = Math<T>;
  static constexpr int kMaxThreads = 256, kMinBlocks = 1, kChunk = Packing::kChunkBytes / M::kSize;

  static MNV2_DEVICE void run(const PackTrainingArgs& a) {
    const TrainingPacking& p = a.packing;
    const int chunk = block_x(), c0 = chunk * kChunk, in = a.in_channels, out = a.out_channels;
    const auto there = [&](int c) { return c0 + c < a.hidden_channels; };
    if (a.weights.expand.data) {
      const int row = p.expand_bytes / M::kSize;
      each(kChunk * row, [&](int i) {
        const int c = i / row, k = i % row;
        const float v = there(c) && k < in ? get<T>(a.weights.expand, int64_t(c0 + c) * in + k) : 0;
        put<T>(a.to, int64_t(c0) * row + i, v);
      });
      each(round_up(in, 16) * kChunk, [&](int i) {
        const int k = i / kChunk, c = channel_at<T>(i % kChunk);
        const float v = there(c) && k < in ? get<T>(a.weights.expand, int64_t(c0 + c) * in + k) : 0;
        put<T>(a.to + p.expand_back, int64_t(k) * p.chunks * kChunk + c0 + i % kChunk, v);
      });
    }
    const int row = p.project_bytes / M::kSize;
    each(kChunk * row, [&](int i) {
      const int c = i / row, n = i % row;
      const bool inside = there(c) && n < out && a.weights.project.data;
      const float v = inside ? get<T>(a.weights.project, int64_t(n) * a.hidden_channels + c0 + c) : 0;
      put<T>(a.to + p.project, int64_t(c0) * row + i, v);
    });
    char* const constants = a.to + p.constants + int64_t(chunk) * p.constant_bytes;
    constexpr int kTaps = M::kTapBytes / M::kSize;
    each(kChunk * kTaps, [&](int i) {
      const int c = i / kTaps, tap = i % kTaps;
      M::store(constants, i, tap < 9 && there(c) ? get<T>(a.weights.depthwise, int64_t(c0 + c) * 9 + tap) : 0);
    });
    float* const numbers = reinterpret_cast<float*>(constants + kChunk * M::kTapBytes);
    each(7 * kChunk, [&](int i) {
      const int which = i / kChunk, c = i % kChunk;
      float v = 0;
      if (there(c) && which == 0) v = get<T>(a.weights.expand_bias, c0 + c);
      if (there(c) && which > 0 && a.coefficients) v = a.coefficients[int64_t(which - 1) * a.hidden_channels + c0 + c];
      numbers[i] = v;
    });
  }
};

}  // namespace mnv2_fused::cuda
