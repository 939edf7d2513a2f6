// y = x . W^T + bias on a GPU: the 1x1 head with its ReLU6 and the mean over each image, the classifier, a dense 3x3
// over its patches. A block of threads goes along k in slices, copied ahead of their use; a slice is 64 bytes of k for
// each warp along k. Its rows of x may be more than its warps hold at once: then it takes them in turns, and of a mean
// keeps the sums in shared memory.
#pragma once

#include "launch.h"
#include "matrix.h"

namespace mnv2_fused::cuda {

struct DenseArgs {
  const char *x, *weights, *residual;
  char* y;
  int rows, in_channels, out_channels, pool;
  bool x_aligned, relu6, add;
  Patches patches;
  DenseTile tile;
  DensePacking packing;
  int slice_bytes, pitch, sums_offset;  // of k; from row to row of shared memory; of the sums of a mean
};

template <class T, bool OfPatches, int NT>
struct DenseKernel {
  using Args = DenseArgs;
  using M = Math<T>;
  static constexpr int kMaxThreads = 256, kMinBlocks = 1;
  static constexpr int kWarpRows = 32, kColumns = NT * 8;  // of a warp
  static constexpr int kValues = NT * 8;                   // of a lane

  static MNV2_DEVICE void run(const DenseArgs& a) {
    const DenseTile& tile = a.tile;
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, g = lane / 4, t = lane % 4;
    const int m = warp % tile.m_warps, n = warp / tile.m_warps % tile.n_warps, k = warp / tile.m_warps / tile.n_warps;
    const int tile_rows = tile.m_warps * kWarpRows, tile_columns = tile.n_warps * kColumns;
    const int begin = block_x() * tile.rows, end = min_of(begin + tile.rows, a.rows),
              column0 = block_y() * tile_columns;
    float* const buffer = reinterpret_cast<float*>(shared_memory());
    float* const sums = reinterpret_cast<float*>(shared_memory() + a.sums_offset);
    const int sums_count = a.pool ? tile.rows / a.pool * tile_columns : 0;
    for (int i = thread_index(); i < sums_count; i += thread_count()) sums[i] = 0;
    const float* const bias = reinterpret_cast<const float*>(a.weights + a.packing.bias);

    for (int row0 = begin; row0 < end; row0 += tile_rows) {
      float acc[2][NT][4];
      product(a, row0, end, column0, m, n, k, lane, acc);
      if (tile.k_warps > 1) add_parts(tile, acc, k, lane, buffer);
      if (a.pool) {
        sum_images(a, acc, row0 - begin, min_of(end - row0, tile_rows), column0, m, n, k, lane, buffer, sums);
        continue;
      }
      if (k) continue;
      MNV2_UNROLL for (int r = 0; r < 4; ++r) {
        const int row = row0 + m * kWarpRows + r * 8 + g;
        if (row >= end) continue;
        const int64_t at = int64_t(row) * a.out_channels;
        MNV2_UNROLL for (int j = 0; j < NT; ++j) {
          const int column = column0 + n * kColumns + j * 8 + 2 * t;
          float value[2];
          MNV2_UNROLL for (int i = 0; i < 2; ++i) {
            if (column + i >= a.out_channels) continue;
            value[i] = acc[r / 2][j][r % 2 * 2 + i] + bias[column + i];
            if (a.relu6) value[i] = relu6(value[i]);
            if (a.add) value[i] += M::load(a.y, at + column + i);
            if (a.residual) value[i] += M::load(a.residual, at + column + i);
            if (a.out_channels % 2) M::store(a.y, at + column + i, value[i]);
          }
          if (a.out_channels % 2 == 0 && column < a.out_channels) M::store_pair(a.y, at + column, value[0], value[1]);
        }
      }
    }
    if (a.pool) sync();
    for (int i = thread_index(); i < sums_count; i += thread_count()) {
      const int image = begin / a.pool + i / tile_columns, column = column0 + i % tile_columns;
      if (image >= a.rows / a.pool || column >= a.out_channels) continue;
      M::store(a.y, int64_t(image) * a.out_channels + column, sums[i] / a.pool);
    }
  }

 private:
  // Rows [row0, end), as far as the warps reach, times the columns from column0 on: each warp's part.
  static MNV2_DEVICE void product(const DenseArgs& a, int row0, int end, int column0, int m, int n, int k, int lane,
                                  float (&acc)[2][NT][4]) {
    const DenseTile& tile = a.tile;
    const int tile_rows = tile.m_warps * kWarpRows, tile_columns = tile.n_warps * kColumns;
    const int slices = (a.packing.row_bytes + a.slice_bytes - 1) / a.slice_bytes;
    const int stage_bytes = (tile_rows + tile_columns) * a.pitch;
    const auto fetch = [&](int slice) {
      char* const to = shared_memory() + slice % tile.stages * stage_bytes;
      char* const weights = to + tile_rows * a.pitch;
      const int first = slice * a.slice_bytes / M::kSize, channels = a.slice_bytes / M::kSize;
      const auto target = [&](int i) { return to + i * a.pitch; };
      if constexpr (OfPatches) {
        const auto locate = [&](int i, int* image, int* y, int* x) {
          const int row = min_of(row0 + i, end - 1), width = a.patches.out_width, height = a.patches.out_height;
          *image = row / width / height, *y = row / width % height, *x = row % width;
        };
        copy_patches<T>(a.x, a.patches, first, channels, tile_rows, locate, target);
      } else {
        copy_rows<T>(
            a.x, a.in_channels, first, channels, a.x_aligned, tile_rows,
            [&](int i) { return int64_t(min_of(row0 + i, end - 1)); }, target);
      }
      copy_rows<T>(
          a.weights, a.packing.row_bytes / M::kSize, first, channels, true, tile_columns,
          [&](int i) { return int64_t(min_of(column0 + i, a.out_channels - 1)); },
          [&](int i) { return weights + i * a.pitch; });
    };

    MNV2_UNROLL for (int i = 0; i < 2; ++i) {
      MNV2_UNROLL for (int j = 0; j < NT; ++j) { MNV2_UNROLL for (int v = 0; v < 4; ++v) acc[i][j][v] = 0; }
    }
    sync();  // what was in shared memory is no longer read
    for (int slice = 0; slice < tile.stages - 1; ++slice) {
      if (slice < slices) fetch(slice);
      commit_copies();
    }
    for (int slice = 0; slice < slices; ++slice) {
      if (tile.stages == 3) {
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      sync();  // this slice is there, and that which the next one to be fetched takes the place of is no longer read
      if (slice + tile.stages - 1 < slices) fetch(slice + tile.stages - 1);
      commit_copies();
      const char* const xs = shared_memory() + slice % tile.stages * stage_bytes + k * Packing::kChunkBytes;
      const char* const rows = xs + m * kWarpRows * a.pitch;
      const char* const columns = xs + (tile_rows + n * kColumns) * a.pitch;
      MNV2_UNROLL for (int step = 0; step < Packing::kChunkBytes; step += 32) {
        const auto m0 = M::load_a(rows + step, a.pitch, lane),
                   m1 = M::load_a(rows + 16 * a.pitch + step, a.pitch, lane);
        MNV2_UNROLL for (int j = 0; j < NT; j += 2) {
          const auto w = M::load_b(columns + j * 8 * a.pitch + step, a.pitch, lane);
          M::multiply(acc[0][j], acc[0][j + 1], m0, w);
          M::multiply(acc[1][j], acc[1][j + 1], m1, w);
        }
      }
    }
    wait_copies<0>();
  }

  // The sum over the warps along k, into the first of them.
  static MNV2_DEVICE void add_parts(const DenseTile& tile, float (&acc)[2][NT][4], int k, int lane, float* buffer) {
    const int warp = thread_index() / kWarp, mn = tile.m_warps * tile.n_warps;
    sync();  // the last slice is no longer read
    if (k) {
      float* const to = buffer + (warp - mn) * kValues * kWarp + lane;
      each_value([&](int i, int j, int v) { to[(i * NT * 4 + j * 4 + v) * kWarp] = acc[i][j][v]; });
    }
    sync();
    if (k) return;
    for (int part = 0; part < tile.k_warps - 1; ++part) {
      const float* const from = buffer + (part * mn + warp) * kValues * kWarp + lane;
      each_value([&](int i, int j, int v) { acc[i][j][v] += from[(i * NT * 4 + j * 4 + v) * kWarp]; });
    }
  }

  // Adds relu6 of the first `count` rows to the sums of their images; the first of them is the `first`th of the block.
  static MNV2_DEVICE void sum_images(const DenseArgs& a, const float (&acc)[2][NT][4], int first, int count,
                                     int column0, int m, int n, int k, int lane, float* buffer, float* sums) {
    const int g = lane / 4, t = lane % 4, tile_columns = a.tile.n_warps * kColumns, pitch = tile_columns + 4;
    const float* const bias = reinterpret_cast<const float*>(a.weights + a.packing.bias);
    sync();  // what is in the buffer is no longer read
    if (k == 0) {
      each_value([&](int i, int j, int v) {
        const int row = m * kWarpRows + i * 16 + v / 2 * 8 + g, column = n * kColumns + j * 8 + 2 * t + v % 2;
        const float value = acc[i][j][v] + (column0 + column < a.out_channels ? bias[column0 + column] : 0);
        buffer[row * pitch + column] = a.relu6 ? relu6(value) : value;
      });
    }
    sync();
    const int image0 = first / a.pool, images = (first + count - 1) / a.pool - image0 + 1;
    for (int i = thread_index(); i < images * tile_columns; i += thread_count()) {
      const int image = image0 + i / tile_columns, column = i % tile_columns;
      const int from = max_of(image * a.pool - first, 0), to = min_of((image + 1) * a.pool - first, count);
      float sum = 0;
      for (int row = from; row < to; ++row) sum += buffer[row * pitch + column];
      sums[image * tile_columns + column] += sum;
    }
  }

  template <class Body>
  static MNV2_DEVICE void each_value(const Body& body) {
    MNV2_UNROLL for (int i = 0; i < 2; ++i) {
      MNV2_UNROLL for (int j = 0; j < NT; ++j) { MNV2_UNROLL for (int v = 0; v < 4; ++v) body(i, j, v); }
    }
  }
};

// The mean over the pixels of each image: a thread a channel.
struct PoolArgs {
  const char* x;
  char* y;
  int pixels, channels;
};

template <class T>
struct PoolKernel {
  using Args = PoolArgs;
  using M = Math<T>;
  static constexpr int kMaxThreads = 128, kMinBlocks = 1;

  static MNV2_DEVICE void run(const PoolArgs& a) {
    const int channel = block_x() * thread_count() + thread_index();
    if (channel >= a.channels) return;
    const int64_t first = int64_t(block_y()) * a.pixels * a.channels;
    float sum = 0;
    for (int i = 0; i < a.pixels; ++i) sum += M::load(a.x, first + int64_t(i) * a.channels + channel);
    M::store(a.y, int64_t(block_y()) * a.channels + channel, sum / a.pixels);
  }
};

}  // namespace mnv2_fused::cuda
