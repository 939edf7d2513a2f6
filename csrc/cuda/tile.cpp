// How a block is cut into tiles: by a count of instructions, so that a test can read the choice.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <mutex>

#include "launch.h"

namespace mnv2_fused::cuda {
namespace {

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
  const double expand = b.source != Source::kCopy
                            ? ceil_div(rows, 32) * (steps * (2 + channels * product) + 2 * channels * 8 + 30)
                            : rows / 4.0;
  const double project = t.m_warps * t.n_warps * 2.0 * (60 + t.n_tiles * product / 2);
  return expand + project + 20 * t.m_warps * t.n_warps;
}

double cost(const Block& b, const Tile& t, const Limits& limits) {
  const Packing p = packing(b.type, b.source != Source::kCopy, b.in_channels, b.hidden_channels, b.out_channels);
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

// Fills a tile whose extents are given; false where it does not fit.
constexpr bool fill(const Block& b, const Limits& limits, Tile* t) {
  const Packing p = packing(b.type, b.source != Source::kCopy, b.in_channels, b.hidden_channels, b.out_channels);
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
  const int64_t x = b.source != Source::kCopy ? int64_t(round_up(rows, 16)) * odd_pitch(p.in_channels * size) : 0;
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

// Every block of MobileNetV2 has a tile in the memory that all devices from compute capability 8.0 on give a block of
// threads, the widest too.
constexpr bool fits(Type type, int in, int hidden, int out, int size, int stride) {
  Block b{};
  b.type = type, b.source = in == hidden ? Source::kCopy : Source::kExpand;
  b.batch = 1, b.height = b.width = size, b.out_height = b.out_width = size / stride;
  b.in_channels = in, b.hidden_channels = hidden, b.out_channels = out, b.stride = stride, b.dilation = 1;
  Tile t{};
  t.height = type == Type::kFloat ? 1 : 4, t.width = 7, t.images = t.splits = 1;
  return fill(b, {1, kSharedBytes}, &t);
}
static_assert(kSharedBytes <= 99 << 10);
static_assert(fits(Type::kHalf, 32, 32, 16, 112, 1) && fits(Type::kHalf, 16, 96, 24, 112, 2));
static_assert(fits(Type::kHalf, 96, 576, 160, 14, 2) && fits(Type::kHalf, 160, 960, 320, 7, 1));
static_assert(fits(Type::kFloat, 96, 576, 160, 14, 2) && fits(Type::kFloat, 160, 960, 320, 7, 1));

Tile search(const Block& b, const Limits& limits) {
  Tile best{};
  double least = 0;
  const auto consider = [&](int height, int width, int images, int splits) {
    Tile tile{};
    tile.height = height, tile.width = width, tile.images = images, tile.splits = splits;
    if (!fill(b, limits, &tile) || tile.splits != splits) return;
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

}  // namespace

Tile choose_tile(const Block& b, const Limits& limits) {
  using Key = std::array<int, 15>;
  static std::mutex mutex;
  static std::map<Key, Tile> known;  // the search takes 100 us
  const Key key = {int(b.type),       int(b.source),       b.batch,      b.height,    b.width,  b.in_channels,
                   b.hidden_channels, b.out_channels,      b.out_height, b.out_width, b.stride, b.dilation,
                   limits.processors, limits.shared_bytes, b.residual};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() >= 1024) known.clear();
  return known[key] = search(b, limits);
}

namespace {

// As `cost` of a block.
double cost(const Dense& d, const DenseTile& t, const Limits& limits) {
  const int warps = t.m_warps * t.n_warps * t.k_warps,
            row_bytes = packing(d.type, d.in_channels, d.out_channels).row_bytes;
  const int slices = ceil_div(row_bytes, t.k_warps * Packing::kChunkBytes), turns = ceil_div(t.rows, t.m_warps * 32);
  const double product = d.type == Type::kFloat ? 80 : 5;  // 32 rows and 16 columns, with what they load
  const double slice = warps * (2 * (2 + t.n_tiles / 2 * product) +
                                2.0 * (32 * t.m_warps + t.n_tiles * 8 * t.n_warps) / (t.m_warps * t.n_warps) / 8 + 15);
  const double each = turns * (slices * slice + warps * t.n_tiles * (d.pool ? 20 : 10)) / 4;
  const int resident = std::max(1, std::min({(limits.shared_bytes + 1024) / (t.shared_bytes + 1024), 32 / warps, 8}));
  const double waves = std::ceil(double(t.blocks_m) * t.blocks_n / (double(limits.processors) * resident));
  const double busy = std::min(1.0, double(resident * warps) / kBusyWarps);
  return waves * std::max(each * resident / busy, turns * (slices * 250.0 + 500) + 2000);
}

}  // namespace

DenseTile choose_tile(const Dense& d, const Limits& limits) {
  DenseTile best{};
  double least = 0;
  const auto consider = [&](DenseTile t) {
    const int rows = t.m_warps * 32, columns = t.n_warps * t.n_tiles * 8;
    const int slices =
        ceil_div(packing(d.type, d.in_channels, d.out_channels).row_bytes, t.k_warps * Packing::kChunkBytes);
    t.stages = std::min(3, slices + 1);
    t.blocks_m = ceil_div(d.rows, t.rows), t.blocks_n = ceil_div(d.out_channels, columns);
    const int slice = (rows + columns) * odd_pitch(t.k_warps * Packing::kChunkBytes) * t.stages;
    const int parts = (t.k_warps - 1) * t.m_warps * t.n_warps * t.n_tiles * 8 * 32 * 4;
    const int means = d.pool ? rows * (columns + 4) * 4 : 0;
    const int64_t shared = round_up(std::max({slice, parts, means}), 16) + int64_t(sums_bytes(d, t));
    if (shared > limits.shared_bytes) return;
    t.shared_bytes = int(shared);
    const double now = cost(d, t, limits);
    if (best.blocks_m && now >= least) return;
    best = t;
    least = now;
  };
  for (const int n_tiles : kDenseTiles) {
    for (int m = 1; m <= kMaxWarps; m *= 2) {
      for (int n = 1; n * m <= kMaxWarps; n *= 2) {
        for (int k = 1; k * n * m <= kMaxWarps; k *= 2) {
          DenseTile t{m, n, k, n_tiles, 0, m * 32, 0, 0, 0};
          if (!d.pool) consider(t);
          for (int images = 1; d.pool && images <= std::min(d.rows / d.pool, 16); ++images) {
            t.rows = images * d.pool;
            consider(t);
          }
        }
      }
    }
  }
  return best;
}

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

}  // namespace mnv2_fused::cuda
