// The launches of one type in training; a .cu file for each.
#pragma once

#include "channels.h"
#include "pack.h"
#include "training.h"

namespace mnv2_fused::cuda {

constexpr int kTrainingThreads = TrainingTile::kWarps * kWarp;

template <class T>
int pack_training_as(const Block& b, const Weights& weights, const float* coefficients, void* packed, void* stream) {
  const TrainingPacking p = training_packing(b.type, b.in_channels, b.hidden_channels, b.out_channels);
  const PackTrainingArgs args{weights,           coefficients,  static_cast<char*>(packed), p, b.in_channels,
                              b.hidden_channels, b.out_channels};
  return launch<PackTrainingKernel<T>>(args, dim3(unsigned(p.chunks)), 256, 0, stream);
}

template <class T, Source S, int NT>
int input_of(const TrainingArgs& a, void* stream) {
  const dim3 grid(unsigned(a.tile.tiles));
  return launch<InputKernel<T, S, NT>>(a, grid, kTrainingThreads, a.tile.shared_bytes, stream);
}
template <class T>
int input_of_expanded(const TrainingArgs& a, void* stream) {
  constexpr Source S = Source::kExpand;
  switch (a.tile.n_tiles) {
    case 2:
      return input_of<T, S, 2>(a, stream);
    case 4:
      return input_of<T, S, 4>(a, stream);
    case 6:
      return input_of<T, S, 6>(a, stream);
    default:
      return input_of<T, S, kMaxInputTiles>(a, stream);
  }
}

template <class T, Source S>
int pass_from(Pass pass, const TrainingArgs& a, void* stream) {
  const dim3 grid(unsigned(a.tile.splits), unsigned(a.packing.chunks));
  const int shared = a.tile.shared_bytes;
  switch (pass) {
    case Pass::kMoments:
      return launch<MomentsKernel<T, S>>(a, grid, kTrainingThreads, shared, stream);
    case Pass::kProject:
      return launch<ProjectKernel<T, S>>(a, grid, kTrainingThreads, shared, stream);
    case Pass::kBelow:
      return launch<BelowKernel<T, S>>(a, grid, kTrainingThreads, shared, stream);
    default:
      if constexpr (S == Source::kExpand) return input_of_expanded<T>(a, stream);
      return input_of<T, S, 2>(a, stream);
  }
}

inline bool is_aligned(const void* x, int channels, Type type) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && channels * element_size(type) % 16 == 0;
}

template <class T>
int pass_as(Pass pass, const TrainingCall& call, const TrainingTile& tile, void* stream) {
  const Block& b = call.block;
  TrainingArgs a{};
  a.x = static_cast<const char*>(call.x), a.dz = static_cast<const char*>(call.dz);
  a.weights = static_cast<const char*>(call.packed);
  a.dx = static_cast<char*>(call.dx);
  a.products = call.products, a.sums = call.sums;
  a.batch = b.batch, a.height = b.height, a.width = b.width;
  a.in_channels = b.in_channels, a.hidden_channels = b.hidden_channels, a.out_channels = b.out_channels;
  a.out_height = b.out_height, a.out_width = b.out_width;
  a.stride = b.stride, a.dilation = b.dilation, a.pad_left = b.pad_left, a.pad_top = b.pad_top;
  a.x_aligned = is_aligned(call.x, b.in_channels, b.type), a.dz_aligned = is_aligned(call.dz, b.out_channels, b.type);
  a.wants_products = call.wants_products, a.wants_taps = call.wants_taps;
  a.tile = tile;
  a.packing = training_packing(b.type, b.in_channels, b.hidden_channels, b.out_channels);
  if (b.source == Source::kCopy) return pass_from<T, Source::kCopy>(pass, a, stream);
  return pass_from<T, Source::kExpand>(pass, a, stream);
}

template <class T>
int covariance_as(const void* x, const float* center, int64_t pixels, int channels, const TrainingTile& tile,
                  float* products, void* stream) {
  constexpr int kChunk = Packing::kChunkBytes / Math<T>::kSize;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && channels * Math<T>::kSize % 16 == 0;
  const CovarianceArgs args{static_cast<const char*>(x), center, products, pixels, channels, aligned, tile};
  const dim3 grid(unsigned(tile.splits), unsigned(channels + kChunk - 1) / kChunk);
  return launch<CovarianceKernel<T>>(args, grid, kTrainingThreads, tile.shared_bytes, stream);
}

template <class T, ChannelOp Op, int Unit>
int channels_of(const ChannelCall& c, void* stream) {
  ChannelArgs a{};
  a.a = static_cast<const char*>(c.a), a.b = static_cast<const char*>(c.b), a.y = static_cast<char*>(c.y);
  a.center = c.center, a.gate = c.gate, a.coefficients = c.coefficients;
  a.partial = c.partial, a.pixels = c.pixels, a.channels = c.channels, a.relu6 = c.relu6;
  const int groups = c.channels / Unit, threads = 256;
  a.groups = groups < threads ? groups : threads;
  a.pixels_at_once = threads / a.groups;
  const int64_t all = (c.pixels + a.pixels_at_once - 1) / a.pixels_at_once;
  // Sums: few blocks, whose results are to be added; maps: some pixels a thread.
  const int64_t most = Op == ChannelOp::kAffine ? (all + 3) / 4 : kMaxChannelBlocks;
  const dim3 grid(unsigned(all < most ? all : most), unsigned((groups + a.groups - 1) / a.groups));
  const int shared = Op == ChannelOp::kAffine ? 0 : a.pixels_at_once * a.groups * Unit * 2 * int(sizeof(double));
  if (const int error = launch<ChannelKernel<T, Op, Unit>>(a, grid, threads, shared, stream)) return error;
  if constexpr (Op == ChannelOp::kAffine) return 0;
  const ChannelSumArgs sum{c.partial, c.first,    c.second,    c.rounded,
                           c.pixels,  c.channels, int(grid.x), a.pixels_at_once};
  return launch<ChannelSumKernel<Op>>(sum, dim3(unsigned(c.channels + 127) / 128), 128, 0, stream);
}

template <class T, ChannelOp Op>
int channels_op(const ChannelCall& c, void* stream) {
  constexpr int kUnit = 16 / Math<T>::kSize;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool units = c.channels % kUnit == 0 && aligned(c.a) && aligned(c.b) && aligned(c.y);
  return units ? channels_of<T, Op, kUnit>(c, stream) : channels_of<T, Op, 1>(c, stream);
}

template <class T>
int channels_as(ChannelOp op, const ChannelCall& call, void* stream) {
  switch (op) {
    case ChannelOp::kMoments:
      return channels_op<T, ChannelOp::kMoments>(call, stream);
    case ChannelOp::kProducts:
      return channels_op<T, ChannelOp::kProducts>(call, stream);
    default:
      return channels_op<T, ChannelOp::kAffine>(call, stream);
  }
}

template <class From, int kChunk, bool Moments>
int sum_of(const SumCall& c, void* stream) {
  const dim3 grid(unsigned(c.channels + 127) / 128, unsigned(Moments ? 1 : c.rows));
  return launch<SumKernel<From, kChunk, Moments>>(c, grid, 128, 0, stream);
}
template <class T>
int sum_products_as(const SumCall& call, void* stream) {
  return sum_of<float, Packing::kChunkBytes / Math<T>::kSize, false>(call, stream);
}
template <class T>
int sum_sums_as(const SumCall& call, bool moments, void* stream) {
  constexpr int kChunk = Packing::kChunkBytes / Math<T>::kSize;
  return moments ? sum_of<double, kChunk, true>(call, stream) : sum_of<double, kChunk, false>(call, stream);
}

template <class T>
constexpr TrainingLaunches training_launches() {
  return {pack_training_as<T>, pass_as<T>, covariance_as<T>, channels_as<T>, sum_products_as<T>, sum_sums_as<T>};
}

}  // namespace mnv2_fused::cuda
