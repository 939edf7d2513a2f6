// The launches of one type; a .cu file for each, so that they compile side by side.
#pragma once

#include "block.h"
#include "dense.h"
#include "pack.h"

namespace mnv2_fused::cuda {

template <class T>
int pack_as(const Block& b, const Weights& weights, void* packed, void* stream) {
  const Packing p = packing(b.type, b.source != Source::kCopy, b.in_channels, b.hidden_channels, b.out_channels);
  const PackArgs args{weights, static_cast<char*>(packed), p, b.in_channels, b.hidden_channels, b.out_channels};
  return launch<PackKernel<T>>(args, dim3(unsigned(p.chunks + 1)), 256, 0, stream);
}

template <class T>
int pack_dense_as(const Dense& d, const Numbers& weight, const Numbers& bias, void* packed, void* stream) {
  const DensePacking p = packing(d.type, d.in_channels, d.out_channels);
  const PackDenseArgs args{weight, bias, static_cast<char*>(packed), p, d.in_channels, d.out_channels};
  return launch<PackDenseKernel<T>>(args, dim3(unsigned(d.out_channels + 31) / 32), 256, 0, stream);
}

template <class T, Source S>
int launch_tiles(const BlockArgs& args, int n_tiles, dim3 grid, int threads, void* stream) {
  switch (n_tiles) {
    case 2:
      return launch<BlockKernel<T, S, 2>>(args, grid, threads, args.shared_bytes, stream);
    case 4:
      return launch<BlockKernel<T, S, 4>>(args, grid, threads, args.shared_bytes, stream);
    case 8:
      return launch<BlockKernel<T, S, 8>>(args, grid, threads, args.shared_bytes, stream);
    case 12:
      return launch<BlockKernel<T, S, 12>>(args, grid, threads, args.shared_bytes, stream);
    default:
      return launch<BlockKernel<T, S, kMaxTiles>>(args, grid, threads, args.shared_bytes, stream);
  }
}

template <class T>
int block_as(const Block& b, const Tile& tile, const void* x, const void* packed, void* y, void* counters,
             void* partial, void* stream) {
  BlockArgs a{};
  a.x = static_cast<const char*>(x);
  a.weights = static_cast<const char*>(packed);
  a.y = static_cast<char*>(y);
  a.counters = static_cast<unsigned*>(counters);
  a.partial = static_cast<float*>(partial);
  a.batch = b.batch, a.height = b.height, a.width = b.width;
  a.in_channels = b.in_channels, a.hidden_channels = b.hidden_channels, a.out_channels = b.out_channels;
  a.out_height = b.out_height, a.out_width = b.out_width;
  a.stride = b.stride, a.dilation = b.dilation, a.pad_left = b.pad_left, a.pad_top = b.pad_top;
  a.residual = b.residual, a.relu6 = b.relu6, a.patches = b.patches;
  a.x_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && b.in_channels * element_size(b.type) % 16 == 0;
  a.tile_height = tile.height, a.tile_width = tile.width, a.images = tile.images;
  a.tiles_y = (b.out_height + tile.height - 1) / tile.height;
  a.tiles_x = (b.out_width + tile.width - 1) / tile.width;
  a.splits = tile.splits;
  a.h_height = (tile.height - 1) * b.stride + 2 * b.dilation + 1;
  a.h_width = (tile.width - 1) * b.stride + 2 * b.dilation + 1;
  a.m_warps = tile.m_warps, a.n_warps = tile.n_warps, a.stages = tile.stages;
  a.packing = packing(b.type, b.source != Source::kCopy, b.in_channels, b.hidden_channels, b.out_channels);

  const int rows =
      tile.images * (a.h_height < b.height ? a.h_height : b.height) * (a.h_width < b.width ? a.h_width : b.width);
  a.x_pitch = odd_pitch(a.packing.in_channels * element_size(b.type));
  a.x_offset = 0;
  a.h_offset = b.source != Source::kCopy ? round_up(rows, 16) * a.x_pitch : 0;
  a.blob_offset = a.h_offset + tile.images * a.h_height * a.h_width * Packing::kPitch;
  a.row_offset = a.blob_offset + tile.stages * a.packing.blob_bytes;
  a.shared_bytes = tile.shared_bytes;
  const dim3 grid(unsigned(tile.tiles), unsigned(tile.splits));
  const int threads = tile.m_warps * tile.n_warps * kWarp;
  switch (b.source) {
    case Source::kCopy:
      return launch_tiles<T, Source::kCopy>(a, tile.n_tiles, grid, threads, stream);
    case Source::kExpand:
      return launch_tiles<T, Source::kExpand>(a, tile.n_tiles, grid, threads, stream);
    default:
      return launch_tiles<T, Source::kPatches>(a, tile.n_tiles, grid, threads, stream);
  }
}

template <class T>
int dense_as(const Dense& d, const DenseTile& tile, const void* x, const void* packed, const void* residual, void* y,
             void* stream) {
  DenseArgs a{};
  a.residual = static_cast<const char*>(residual);
  a.x = static_cast<const char*>(x);
  a.weights = static_cast<const char*>(packed);
  a.y = static_cast<char*>(y);
  a.rows = d.rows, a.in_channels = d.in_channels, a.out_channels = d.out_channels, a.pool = d.pool;
  a.x_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && d.in_channels * element_size(d.type) % 16 == 0;
  a.relu6 = d.relu6, a.add = d.add, a.patches = d.patches, a.tile = tile;
  a.packing = packing(d.type, d.in_channels, d.out_channels);
  a.slice_bytes = tile.k_warps * Packing::kChunkBytes;
  a.pitch = odd_pitch(a.slice_bytes);
  a.sums_offset = tile.shared_bytes - sums_bytes(d, tile);
  const dim3 grid(unsigned(tile.blocks_m), unsigned(tile.blocks_n));
  const int threads = tile.m_warps * tile.n_warps * tile.k_warps * kWarp, shared = tile.shared_bytes;
  const bool wide = tile.n_tiles == kDenseTiles[1];
  if (d.of_patches) {
    return wide ? launch<DenseKernel<T, true, kDenseTiles[1]>>(a, grid, threads, shared, stream)
                : launch<DenseKernel<T, true, kDenseTiles[0]>>(a, grid, threads, shared, stream);
  }
  return wide ? launch<DenseKernel<T, false, kDenseTiles[1]>>(a, grid, threads, shared, stream)
              : launch<DenseKernel<T, false, kDenseTiles[0]>>(a, grid, threads, shared, stream);
}

template <class T>
int pool_as(const void* x, int batch, int pixels, int channels, void* y, void* stream) {
  const PoolArgs args{static_cast<const char*>(x), static_cast<char*>(y), pixels, channels};
  return launch<PoolKernel<T>>(args, dim3(unsigned(channels + 127) / 128, unsigned(batch)), 128, 0, stream);
}

template <class T>
constexpr Launches launches() {
  return {pack_as<T>, pack_dense_as<T>, block_as<T>, dense_as<T>, pool_as<T>};
}

}  // namespace mnv2_fused::cuda
