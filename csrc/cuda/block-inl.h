// The launches of one type; a .cu file for each, so that they compile side by side.
#pragma once

#include "block.h"
#include "pack.h"

namespace mnv2_fused::cuda {

template <class T>
int pack_as(const Block& b, const Weights& weights, bool float_source, void* packed, void* stream) {
  const Packing p = packing(b.type, b.expand, b.in_channels, b.hidden_channels, b.out_channels);
  const PackArgs args{weights, static_cast<char*>(packed), p, b.in_channels, b.hidden_channels, b.out_channels};
  if (float_source) return launch<PackKernel<T, float>>(args, dim3(p.chunks + 1), 256, 0, stream);
  return launch<PackKernel<T, T>>(args, dim3(p.chunks + 1), 256, 0, stream);
}

template <class T, bool Expand>
int launch_tiles(const BlockArgs& args, int n_tiles, dim3 grid, int threads, void* stream) {
  switch (n_tiles) {
    case 2:
      return launch<BlockKernel<T, Expand, 2>>(args, grid, threads, args.shared_bytes, stream);
    case 4:
      return launch<BlockKernel<T, Expand, 4>>(args, grid, threads, args.shared_bytes, stream);
    case 8:
      return launch<BlockKernel<T, Expand, 8>>(args, grid, threads, args.shared_bytes, stream);
    case 12:
      return launch<BlockKernel<T, Expand, 12>>(args, grid, threads, args.shared_bytes, stream);
    default:
      return launch<BlockKernel<T, Expand, kMaxTiles>>(args, grid, threads, args.shared_bytes, stream);
  }
}

template <class T>
int block_as(const Block& b, const Tile& tile, const void* x, const void* packed, void* y, void* workspace,
             void* stream) {
  BlockArgs a{};
  a.x = static_cast<const char*>(x);
  a.weights = static_cast<const char*>(packed);
  a.y = static_cast<char*>(y);
  a.counters = static_cast<unsigned*>(workspace);
  a.partial = reinterpret_cast<float*>(static_cast<char*>(workspace) + round_up(tile.tiles * 4, 128));
  a.batch = b.batch, a.height = b.height, a.width = b.width;
  a.in_channels = b.in_channels, a.hidden_channels = b.hidden_channels, a.out_channels = b.out_channels;
  a.out_height = b.out_height, a.out_width = b.out_width;
  a.stride = b.stride, a.dilation = b.dilation, a.pad_left = b.pad_left, a.pad_top = b.pad_top;
  a.residual = b.residual, a.relu6 = b.relu6;
  a.x_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && b.in_channels * element_size(b.type) % 16 == 0;
  a.tile_height = tile.height, a.tile_width = tile.width, a.images = tile.images;
  a.tiles_y = (b.out_height + tile.height - 1) / tile.height;
  a.tiles_x = (b.out_width + tile.width - 1) / tile.width;
  a.splits = tile.splits;
  a.h_height = (tile.height - 1) * b.stride + 2 * b.dilation + 1;
  a.h_width = (tile.width - 1) * b.stride + 2 * b.dilation + 1;
  a.m_warps = tile.m_warps, a.n_warps = tile.n_warps, a.stages = tile.stages;
  a.packing = packing(b.type, b.expand, b.in_channels, b.hidden_channels, b.out_channels);

  const int rows =
      tile.images * (a.h_height < b.height ? a.h_height : b.height) * (a.h_width < b.width ? a.h_width : b.width);
  a.x_pitch = odd_pitch(a.packing.in_channels * element_size(b.type));
  a.x_offset = 0;
  a.h_offset = b.expand ? round_up(rows, 16) * a.x_pitch : 0;
  a.blob_offset = a.h_offset + tile.images * a.h_height * a.h_width * Packing::kPitch;
  a.row_offset = a.blob_offset + tile.stages * a.packing.blob_bytes;
  a.shared_bytes = tile.shared_bytes;
  const dim3 grid(unsigned(tile.tiles), unsigned(tile.splits));
  const int threads = tile.m_warps * tile.n_warps * kWarp;
  return b.expand ? launch_tiles<T, true>(a, tile.n_tiles, grid, threads, stream)
                  : launch_tiles<T, false>(a, tile.n_tiles, grid, threads, stream);
}

template <class T>
constexpr Launches launches() {
  return {pack_as<T>, block_as<T>};
}

}  // namespace mnv2_fused::cuda
