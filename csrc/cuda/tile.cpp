// How a block is cut into tiles: by a count of instructions, so that a test can read the choice.
#include <algorithm>
#include <cmath>

#include "launch.h"

namespace mnv2_fused::cuda {
namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Threads of a block of threads and warps that hide each other's latencies on a processor.
constexpr int kMaxWarps = 8, kBusyWarps = 12;

// Instructions of a warp for one tile and a chunk of hidden channels, roughly: from the kernel's inner loops.
double work(const Block& b, const Tile& t, const Packing& p) {
  const int rows = t.images * std::min((t.height - 1) * b.stride + 2 * b.dilation + 1, b.height) *
                   std::min((t.width - 1) * b.stride + 2 * b.dilation + 1, b.width);
  const bool exact = b.type == Type::kFloat;
  const int channels = Packing::kChunkBytes / element_size(b.type) / 8,
            steps = ceil_div(p.in_channels * element_size(b.type), 32);
  const double product = exact ? 40 : 1.5;  // two tiles of 8 columns, with what they load
  const double expand =
      b.expand ? ceil_div(rows, 32) * (steps * (2 + channels * product) + 2 * channels * 8 + 30) : rows / 4.0;
  const double project = t.m_warps * t.n_warps * 2.0 * (60 + t.n_tiles * product / 2);
  return expand + project + 20 * t.m_warps * t.n_warps;
}

double cost(const Block& b, const Tile& t, const Limits& limits) {
  const Packing p = packing(b.type, b.expand, b.in_channels, b.hidden_channels, b.out_channels);
  const int warps = t.m_warps * t.n_warps;
  const int resident =
      std::max(1, std::min({(limits.shared_bytes + 1024) * 1 / (t.shared_bytes + 1024), 32 / warps, 8}));
  const double waves = std::ceil(double(t.tiles) * t.splits / (double(limits.processors) * resident));
  const double busy = std::min(1.0, double(resident * warps) / kBusyWarps);
  const double chunks = double(p.chunks) / t.splits;
  const double latency = chunks * 600 + 2000;  // of one block of threads by itself, in the same unit
  const double each = work(b, t, p) * chunks / 4 + 200 * warps + (t.splits > 1 ? 100.0 * t.splits : 0);
  return waves * std::max(each * resident / busy, latency);
}

}  // namespace

bool fill_tile(const Block& b, const Limits& limits, Tile* t) {
  const Packing p = packing(b.type, b.expand, b.in_channels, b.hidden_channels, b.out_channels);
  const int size = element_size(b.type), pixels = t->height * t->width * t->images;
  const int h_height = (t->height - 1) * b.stride + 2 * b.dilation + 1,
            h_width = (t->width - 1) * b.stride + 2 * b.dilation + 1;
  t->m_warps = ceil_div(pixels, 16);
  const int columns = p.out_channels / 8;
  t->n_warps = ceil_div(columns, kMaxTiles);
  t->n_tiles = kMaxTiles;
  for (const int n : {12, 8, 4, 2}) {
    if (n * t->n_warps >= columns) t->n_tiles = n;
  }
  if (t->m_warps * t->n_warps > kMaxWarps) return false;
  const int rows = t->images * std::min(h_height, b.height) * std::min(h_width, b.width);
  const int64_t x = b.expand ? int64_t(round_up(rows, 16)) * odd_pitch(p.in_channels * size) : 0;
  const int64_t h = int64_t(t->images) * h_height * h_width * Packing::kPitch;
  const int64_t fixed = x + h + round_up(rows * 4 + 4, 16);
  t->splits = std::min(std::max(t->splits, 1), p.chunks);
  for (t->stages = p.chunks > t->splits ? 2 : 1; fixed + int64_t(t->stages) * p.blob_bytes > limits.shared_bytes;
       --t->stages) {
    if (t->stages == 1) return false;
  }
  t->shared_bytes = round_up(int(fixed + int64_t(t->stages) * p.blob_bytes), 128);
  if (t->shared_bytes > limits.shared_bytes) return false;
  t->tiles = ceil_div(b.batch, t->images) * ceil_div(b.out_height, t->height) * ceil_div(b.out_width, t->width);
  t->partial_bytes = t->splits > 1 ? int64_t(t->tiles) * t->splits * t->m_warps * t->n_warps * t->n_tiles * 512 : 0;
  return true;
}

Tile choose_tile(const Block& b, const Limits& limits) {
  Tile best{};
  double least = 0;
  const auto consider = [&](int height, int width, int images, int splits) {
    Tile tile{};
    tile.height = height, tile.width = width, tile.images = images, tile.splits = splits;
    if (!fill_tile(b, limits, &tile) || tile.splits != splits) return;
    const double now = cost(b, tile, limits);
    if (best.tiles && now >= least) return;
    best = tile;
    least = now;
  };
  for (int splits = 1; splits <= 16; splits *= 2) {
    for (int height = 1; height <= std::min(b.out_height, 16); ++height) {
      for (int width = 1; width <= std::min(b.out_width, 32); ++width) consider(height, width, 1, splits);
    }
    for (int images = 2; images <= std::min(b.batch, 8); ++images) consider(b.out_height, b.out_width, images, splits);
  }
  return best;
}

namespace {

const Launches& launches_of(Type type) {
  switch (type) {
    case Type::kHalf:
      return half;
    case Type::kBfloat16:
      return bfloat16;
    case Type::kTf32:
      return tf32;
    default:
      return single;
  }
}

}  // namespace

int pack(const Block& block, const Weights& weights, bool float_source, void* packed, void* stream) {
  return launches_of(block.type).pack(block, weights, float_source, packed, stream);
}

int block(const Block& block, const Tile& tile, const void* x, const void* packed, void* y, void* workspace,
          void* stream) {
  return launches_of(block.type).block(block, tile, x, packed, y, workspace, stream);
}

}  // namespace mnv2_fused::cuda
