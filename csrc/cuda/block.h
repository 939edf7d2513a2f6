// The inverted residual of inverted_residual.h on a GPU: one block of threads makes a tile of the output. It keeps the
// tile's part of x in shared memory, and for a chunk of hidden channels at a time
//
//     h = relu6(x . We + be)   tensor cores, into shared memory: the pixels of the tile and those around it; of the
//                              stem, x are patches of the image
//     d = relu6(h * Wd + bd)   tensor cores, in registers: nine products with the taps as diagonal matrices, one for
//                              each tap, whose rows ldmatrix gathers; the fragment that comes out is the one that
//     y += d . Wp              takes, so d goes nowhere
//
// with y in registers until the last chunk. A diagonal matrix wastes seven multiplications of eight, on units that
// have them to spare: on the CUDA cores the filter would take four times the instructions of the whole rest.
// Weights come in blobs, a chunk each (Packing), copied ahead of their use. Where tiles are few, the chunks are shared
// out over `splits` blocks, and the last to finish adds up the parts in their order.
#pragma once

#include "launch.h"
#include "matrix.h"

namespace mnv2_fused::cuda {

using namespace device;

// The tile's geometry in elements, for the host to choose and the kernel to walk.
struct BlockArgs {
  const char* x;
  const char* weights;  // Packing
  char* y;
  float* partial;      // [tiles][splits][warps][NT][4][32]
  unsigned* counters;  // [tiles], 0 before and after
  int batch, height, width, in_channels, hidden_channels, out_channels, out_height, out_width;
  int stride, dilation, pad_left, pad_top;
  bool residual, relu6, x_aligned;
  Patches patches;
  int tile_height, tile_width, images;  // of a tile of outputs
  int tiles_y, tiles_x, splits;
  int h_height, h_width;  // of the rectangle of h that a tile reads
  int m_warps, n_warps;   // 16 pixels and NT * 8 output channels each
  int stages;             // blobs in shared memory
  Packing packing;
  int x_pitch, x_offset, h_offset, blob_offset, row_offset, shared_bytes;  // in bytes of shared memory
};

template <class T, Source S, int NT>
struct BlockKernel {
  using Args = BlockArgs;
  using M = Math<T>;
  static constexpr int kMaxThreads = 256, kMinBlocks = 1;
  static constexpr int kChunk = Packing::kChunkBytes / M::kSize;  // hidden channels
  static constexpr int kPitch = Packing::kPitch;                  // bytes from pixel to pixel of h
  static constexpr int kSteps = Packing::kChunkBytes / 32;
  static constexpr int kTiles = kChunk / 8;

  static MNV2_DEVICE void run(const BlockArgs& a) {
    const int thread = thread_index(), threads = thread_count(), lane = thread % kWarp, warp = thread / kWarp;
    const int warps = threads / kWarp, g = lane / 4, t = lane % 4;
    char* const memory = shared_memory();
    char *const xs = memory + a.x_offset, *const hs = memory + a.h_offset, *const blobs = memory + a.blob_offset;
    int* const rows = reinterpret_cast<int*>(memory + a.row_offset);  // of h, by the pixel of x; then a flag

    // The tile, and the part of the image under its rectangle of h.
    const int tile = block_x();
    const int tx = tile % a.tiles_x, ty = tile / a.tiles_x % a.tiles_y,
              image0 = tile / a.tiles_x / a.tiles_y * a.images;
    const int images = min_of(a.images, a.batch - image0);
    const Part part(image0, images, ty * a.tile_height * a.stride - a.pad_top,
                    tx * a.tile_width * a.stride - a.pad_left, a.h_height, a.h_width, a.height, a.width);
    const int count = part.count, h_area = a.h_height * a.h_width;

    const int chunks = a.packing.chunks;
    const int chunk0 = int(int64_t(chunks) * block_y() / a.splits),
              chunk1 = int(int64_t(chunks) * (block_y() + 1) / a.splits);
    const auto fetch = [&](int chunk) {
      const char* from = a.weights + int64_t(chunk) * a.packing.blob_bytes;
      char* to = blobs + (chunk - chunk0) % a.stages * a.packing.blob_bytes;
      for (int i = thread * 16; i < a.packing.blob_bytes; i += threads * 16) copy_async(to + i, from + i, true);
    };

    // Outside the image h is 0, in every chunk; the pixels inside are written anew in each.
    const int h_bytes = a.images * h_area * kPitch;
    for (int i = thread * 16; i < h_bytes; i += threads * 16) {
      *reinterpret_cast<Vector*>(hs + i) = Vector{0, 0, 0, 0};
    }
    for (int i = thread; i < count; i += threads) {
      int image, y, x;
      part.locate(i, &image, &y, &x);
      rows[i] = part.at(image, y, x);
    }
    const auto pixel = [&](int i) { return part.pixel(i, a.height, a.width); };
    if constexpr (S != Source::kCopy) {
      const auto to = [&](int i) { return xs + i * a.x_pitch; };
      if constexpr (S == Source::kPatches) {
        const auto locate = [&](int i, int* image, int* y, int* x) {
          part.locate(i, image, y, x);
          *image += image0;
        };
        copy_patches<T>(a.x, a.patches, 0, a.packing.in_channels, count, locate, to);
      } else {
        copy_rows<T>(a.x, a.in_channels, 0, a.packing.in_channels, a.x_aligned, count, pixel, to);
      }
    }
    fetch(chunk0);
    commit_copies();

    // The pixels of the tile whose rows this lane's warp makes.
    const int m = warp % a.m_warps, n0 = warp / a.m_warps * NT * 8;
    const int tile_area = a.tile_height * a.tile_width;
    const auto place = [&](int i, int* image, int* y, int* x) {  // of the i-th pixel of the tile; false: there is none
      *image = i / tile_area, *y = i % tile_area / a.tile_width, *x = i % a.tile_width;
      return *image < images && ty * a.tile_height + *y < a.out_height && tx * a.tile_width + *x < a.out_width;
    };
    const auto h_of = [&](int i) {
      int image, y, x;
      if (!place(i, &image, &y, &x)) return static_cast<const char*>(hs);
      return static_cast<const char*>(hs) + (image * h_area + y * a.stride * a.h_width + x * a.stride) * kPitch;
    };
    const typename M::Gather gather(lane, [&](int i) { return h_of(m * 16 + i); });
    const int tap_row = a.dilation * a.h_width * kPitch, tap_column = a.dilation * kPitch;

    float acc[NT][4];
    MNV2_UNROLL for (int n = 0; n < NT; ++n) { MNV2_UNROLL for (int i = 0; i < 4; ++i) acc[n][i] = 0; }

    for (int chunk = chunk0; chunk < chunk1; ++chunk) {
      wait_copies<0>();
      sync();  // the blob of this chunk is there; h and the blob of the last one are no longer read
      if (a.stages > 1 && chunk + 1 < chunk1) {
        fetch(chunk + 1);
        commit_copies();
      }
      const char* const blob = blobs + (chunk - chunk0) % a.stages * a.packing.blob_bytes;
      if constexpr (S != Source::kCopy) {
        expand(a, xs, blob, hs, rows, count, warp, warps, lane);
      } else {
        copy_rows<T>(a.x, a.in_channels, chunk * kChunk, kChunk, a.x_aligned, count, pixel,
                     [&](int i) { return hs + rows[i] * kPitch; });
        commit_copies();
        wait_copies<0>();
      }
      sync();  // h is there
      const char* const taps = blob + a.packing.taps;
      const float* const bias = reinterpret_cast<const float*>(blob + a.packing.depthwise_bias);
      const char* const project = blob + a.packing.project + n0 * kPitch;
      MNV2_UNROLL for (int step = 0; step < kSteps; ++step) {
        float sum[M::kStep / 8][4];
        MNV2_UNROLL for (int j = 0; j < M::kStep / 8; ++j) {
          sum[j][0] = sum[j][2] = bias[step * M::kStep + j * 8 + 2 * t];
          sum[j][1] = sum[j][3] = bias[step * M::kStep + j * 8 + 2 * t + 1];
        }
        M::filter(sum, gather, step * 32, tap_row, tap_column, taps + step * M::kStep * M::kTapBytes, lane);
        const auto d = M::relu6_as_a(sum, lane);
        MNV2_UNROLL for (int n = 0; n < NT; n += 2) {
          if (n0 + n * 8 >= a.packing.out_channels) break;
          const auto w = M::load_b(project + n * 8 * kPitch + step * 32, kPitch, lane);
          M::multiply(acc[n], acc[n + 1], d, w);
        }
      }
      if (a.stages == 1 && chunk + 1 < chunk1) {
        sync();
        fetch(chunk + 1);
        commit_copies();
      }
    }
    wait_copies<0>();

    if (a.splits > 1 && !reduce(a, acc, tile, warp, warps, lane, rows)) return;
    const float* const bias = reinterpret_cast<const float*>(a.weights + int64_t(chunks) * a.packing.blob_bytes);
    MNV2_UNROLL for (int half = 0; half < 2; ++half) {
      int image, y, x;
      if (!place(m * 16 + g + half * 8, &image, &y, &x)) continue;
      const int64_t at =
          ((int64_t(image0 + image) * a.out_height + ty * a.tile_height + y) * a.out_width + tx * a.tile_width + x) *
          a.out_channels;
      MNV2_UNROLL for (int n = 0; n < NT; ++n) {
        const int column = n0 + n * 8 + 2 * t;
        float value[2];
        MNV2_UNROLL for (int i = 0; i < 2; ++i) {
          if (column + i >= a.out_channels) continue;
          value[i] = acc[n][half * 2 + i] + bias[column + i];
          if (a.residual) value[i] += M::load(a.x, at + column + i);
          if (a.relu6) value[i] = relu6(value[i]);
          if (a.out_channels % 2) M::store(a.y, at + column + i, value[i]);
        }
        if (a.out_channels % 2 == 0 && column < a.out_channels) M::store_pair(a.y, at + column, value[0], value[1]);
      }
    }
  }

 private:
  // h of one chunk: 16 pixels at a time, two such at once, so that weights are read for both.
  static MNV2_DEVICE void expand(const BlockArgs& a, const char* xs, const char* blob, char* hs, const int* rows,
                                 int count, int warp, int warps, int lane) {
    const int g = lane / 4, t = lane % 4, tiles = (count + 15) / 16, pitch = a.packing.expand_pitch;
    const float* const bias = reinterpret_cast<const float*>(blob + a.packing.expand_bias);
    for (int first = warp * 2; first < tiles; first += warps * 2) {
      const int second = min_of(first + 1, tiles - 1);
      float acc[2][kTiles][4];
      MNV2_UNROLL for (int n = 0; n < kTiles; ++n) {
        const float low = bias[n * 8 + 2 * t], high = bias[n * 8 + 2 * t + 1];
        MNV2_UNROLL for (int m = 0; m < 2; ++m) {
          acc[m][n][0] = acc[m][n][2] = low;
          acc[m][n][1] = acc[m][n][3] = high;
        }
      }
      const char *const x0 = xs + first * 16 * a.x_pitch, *const x1 = xs + second * 16 * a.x_pitch;
      const int bytes = a.packing.in_channels * M::kSize;
      for (int k = 0; k + 32 <= bytes; k += 32) {
        const auto m0 = M::load_a(x0 + k, a.x_pitch, lane), m1 = M::load_a(x1 + k, a.x_pitch, lane);
        MNV2_UNROLL for (int n = 0; n < kTiles; n += 2) {
          const auto w = M::load_b(blob + n * 8 * pitch + k, pitch, lane);
          M::multiply(acc[0][n], acc[0][n + 1], m0, w);
          M::multiply(acc[1][n], acc[1][n + 1], m1, w);
        }
      }
      if constexpr (M::kSize == 2) {
        if (bytes % 32) {  // eight channels are left
          const int k = bytes - 16;
          const auto m0 = M::load_half_a(x0 + k, a.x_pitch, lane), m1 = M::load_half_a(x1 + k, a.x_pitch, lane);
          MNV2_UNROLL for (int n = 0; n < kTiles; n += 2) {
            const auto w = M::load_half_b(blob + n * 8 * pitch + k, pitch, lane);
            M::multiply_half(acc[0][n], acc[0][n + 1], m0, w);
            M::multiply_half(acc[1][n], acc[1][n + 1], m1, w);
          }
        }
      }
      MNV2_UNROLL for (int m = 0; m < 2; ++m) {
        MNV2_UNROLL for (int half = 0; half < 2; ++half) {
          const int row = (m ? second : first) * 16 + g + half * 8;
          if (row >= count) continue;
          char* const to = hs + rows[row] * kPitch + 2 * t * M::kSize;
          MNV2_UNROLL for (int n = 0; n < kTiles; ++n) {
            M::store_relu6(to + n * 8 * M::kSize, acc[m][n][half * 2], acc[m][n][half * 2 + 1]);
          }
        }
      }
    }
  }

  // Adds up what the blocks that share a tile have; true in the one that holds the sum.
  static MNV2_DEVICE bool reduce(const BlockArgs& a, float (&acc)[NT][4], int tile, int warp, int warps, int lane,
                                 int* flag) {
    const int64_t part = int64_t(warps) * NT * 4 * kWarp;
    float* const mine =
        a.partial + (int64_t(tile) * a.splits + block_y()) * part + int64_t(warp) * NT * 4 * kWarp + lane;
    MNV2_UNROLL for (int n = 0; n < NT; ++n) {
      MNV2_UNROLL for (int i = 0; i < 4; ++i) mine[(n * 4 + i) * kWarp] = acc[n][i];
    }
    if (!is_last(a.counters + tile, unsigned(a.splits), flag)) return false;
    if (thread_index() == 0) a.counters[tile] = 0;
    const float* from = a.partial + int64_t(tile) * a.splits * part + int64_t(warp) * NT * 4 * kWarp + lane;
    MNV2_UNROLL for (int n = 0; n < NT; ++n) {
      MNV2_UNROLL for (int i = 0; i < 4; ++i) acc[n][i] = from[(n * 4 + i) * kWarp];
    }
    for (int split = 1; split < a.splits; ++split) {
      from += part;
      MNV2_UNROLL for (int n = 0; n < NT; ++n) {
        MNV2_UNROLL for (int i = 0; i < 4; ++i) acc[n][i] += from[(n * 4 + i) * kWarp];
      }
    }
    return true;
  }
};

}  // namespace mnv2_fused::cuda
