// How the passes of training are cut into tiles: as tile.cpp does it for inference.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <mutex>

#include "launch.h"

namespace mnv2_fused::cuda {
namespace {

constexpr int kMaxSlice = 384;                            // bytes
constexpr int kScratchFloats = TrainingTile::kWarps * 3;  // a channel, where sums of warps are added up

struct Plan {
  Pass pass;
  const Block& b;
  bool products;
  const Limits& limits;

  constexpr int size() const { return element_size(b.type); }
  constexpr int chunk() const { return Packing::kChunkBytes / size(); }
  constexpr int columns() const { return chunk() / 16; }
  constexpr bool over_pixels() const { return pass == Pass::kBelow || pass == Pass::kInput; }

  // Bytes of a row of `channels` at once, when they come in `slices`.
  constexpr int slice(int channels, int slices) const {
    const int bytes = round_up(channels * size(), Packing::kChunkBytes);
    return round_up(ceil_div(bytes, slices), Packing::kChunkBytes);
  }
  constexpr int slices(int channels) const {
    return ceil_div(round_up(channels * size(), Packing::kChunkBytes), kMaxSlice);
  }

  // Fills a tile whose extents are given; false where it does not fit. `time` is roughly that of a chunk of it, in
  // instructions of a warp, of which the warps wait for each other between the steps.
  constexpr bool fill(TrainingTile* t, double* time) const {
    const TrainingPacking p = training_packing(b.type, b.in_channels, b.hidden_channels, b.out_channels);
    const int d2 = 2 * b.dilation;
    const auto outputs = [&](int n) { return over_pixels() ? (n + d2 - 1) / b.stride + 1 : n; };
    const auto under = [&](int n) { return (n - 1) * b.stride + d2 + 1; };
    t->out_height = outputs(t->height), t->out_width = outputs(t->width);
    t->h_height = under(t->out_height), t->h_width = under(t->out_width);
    t->spread_height = t->height + d2, t->spread_width = t->width + d2;
    const int64_t area = int64_t(t->h_height) * t->h_width;
    if (area * t->images > 4096) return false;
    const int h_rows = t->images * std::min(t->h_height, b.height) * std::min(t->h_width, b.width);
    const int out_rows = t->images * std::min(t->out_height, b.out_height) * std::min(t->out_width, b.out_width);
    const int rows = t->images * t->height * t->width;
    if (std::max({h_rows, out_rows, rows}) > TrainingTile::kRows) return false;
    t->tiles_y = ceil_div(over_pixels() ? b.height : b.out_height, t->height);
    t->tiles_x = ceil_div(over_pixels() ? b.width : b.out_width, t->width);
    t->tiles = ceil_div(b.batch, t->images) * t->tiles_y * t->tiles_x;

    t->m_warps = ceil_div(rows, 16), t->n_warps = 1, t->n_tiles = 2;
    if (pass == Pass::kInput && b.source == Source::kExpand) {
      const int columns = round_up(b.in_channels, 16) / 8;
      t->n_warps = ceil_div(columns, kMaxInputTiles), t->n_tiles = kMaxInputTiles;
      for (const int n : {6, 4, 2}) {
        if (n * t->n_warps >= columns) t->n_tiles = n;
      }
    }
    if (pass == Pass::kInput && t->m_warps * t->n_warps > TrainingTile::kWarps) return false;

    const bool reads_dz = pass != Pass::kMoments, expands = b.source == Source::kExpand;
    const int sum_channels = pass == Pass::kProject ? b.out_channels : pass == Pass::kBelow ? b.in_channels : 0;
    const int of_x = expands ? slices(b.in_channels) : 1, of_dz = reads_dz ? slices(b.out_channels) : 1;
    for (int more = 0; more < 6; ++more) {
      t->x_slice = slice(b.in_channels, of_x + more), t->dz_slice = slice(b.out_channels, of_dz + more);
      int stage = chunk() * kScratchFloats * 4;
      const auto stages = [&](int count, int bytes) {
        stage = std::max(stage, (round_up(count, 16) + chunk()) * odd_pitch(bytes));
      };
      if (expands) stages(std::max(h_rows, rows), t->x_slice);
      if (reads_dz) stages(out_rows, t->dz_slice);
      if (lay_out(t, p.constant_bytes, stage, rows, out_rows, sum_channels)) {
        const auto turns = [](int count) { return ceil_div(ceil_div(count, 16), TrainingTile::kWarps); };
        const double product = b.type == Type::kFloat ? 40 : 1.5, filter = size() == 2 ? 110 : 250;
        const int x_steps = expands ? ceil_div(b.in_channels * size(), 32) : 0,
                  dz_steps = ceil_div(b.out_channels * size(), 32);
        double all =
            400 + turns(h_rows) * (x_steps * (2 + chunk() / 8 * product) + 60) + turns(out_rows) * (filter + 40);
        if (reads_dz) all += 200 + turns(out_rows) * dz_steps * (2 + chunk() / 8 * product);
        if (over_pixels()) all += 100 + turns(rows) * (filter + 60 + (pass == Pass::kBelow ? 2 * filter : 0));
        if (products)
          all += double(ceil_div(sum_channels, 16)) * columns() * (rows / (8.0 * size()) * (2 + product)) / 8 + 60;
        *time = all;
        return true;
      }
    }
    return false;
  }

  constexpr bool lay_out(TrainingTile* t, int constants, int stage, int rows, int out_rows, int sum_channels) const {
    int at = round_up(constants, 16);
    const auto take = [&](int64_t bytes) {
      const int from = at;
      at = bytes > limits.shared_bytes ? limits.shared_bytes + 1 : at + round_up(int(bytes), 16);
      return from;
    };
    t->stage_offset = take(stage);
    t->h_offset = take(int64_t(t->images) * t->h_height * t->h_width * Packing::kPitch);
    if (over_pixels())
      t->spread_offset = take(int64_t(t->images) * t->spread_height * t->spread_width * Packing::kPitch);
    const int kept = pass == Pass::kProject ? out_rows : pass == Pass::kBelow || pass == Pass::kCovariance ? rows : 0;
    t->rows_offset = take(int64_t(round_up(kept, 16)) * Packing::kPitch);
    t->parts = 1;
    t->product_floats = t->tap_floats = 0;
    if (sum_channels) {
      const int of_slice = (pass == Pass::kProject ? t->dz_slice : t->x_slice) / size() / 16;
      const int tiles = ceil_div(sum_channels, 16);
      // As many as give every warp a sum, in a memory that grows no further than those of all channels take.
      t->parts = std::min(TrainingTile::kWarps / (std::min(of_slice, tiles) * columns()),
                          TrainingTile::kWarps / (tiles * columns()));
      t->parts = std::max(1, t->parts);
      if (products) t->product_floats = t->parts * tiles * columns() * 8 * 32;
    }
    t->products_offset = take(int64_t(t->product_floats) * 4);
    if (pass == Pass::kBelow) {
      t->tap_floats = (size() == 2 ? TrainingTile::kWarps : 1) * 9 * chunk();
      t->taps_offset = take((t->tap_floats + TrainingTile::kWarps * 2 * chunk()) * 4);
      t->zeros_offset = take(Packing::kPitch);
    }
    if (pass == Pass::kInput) t->weights_offset = take(int64_t(round_up(b.in_channels, 16)) * Packing::kPitch);
    t->shared_bytes = round_up(at, 128);
    return t->shared_bytes <= limits.shared_bytes;
  }

  // Blocks of threads that a processor holds.
  int resident(const TrainingTile& t) const {
    return std::max(1, std::min(2, (limits.shared_bytes + 1024) * (limits.shared_bytes > 100 << 10 ? 1 : 2) /
                                       (t.shared_bytes + 1024)));
  }

  TrainingTile search() const {
    TrainingTile best{};
    double least = 0;
    const int chunks = ceil_div(b.hidden_channels, chunk());
    const auto consider = [&](int height, int width, int images) {
      TrainingTile t{};
      t.height = height, t.width = width, t.images = images;
      double time = 0;
      if (!fill(&t, &time)) return;
      const int places = limits.processors * resident(t);
      t.splits = std::min(t.tiles, std::max(1, places / chunks));
      const double all = pass == Pass::kInput
                             ? double(ceil_div(t.tiles, places)) * chunks * time
                             : double(ceil_div(t.tiles, t.splits)) * ceil_div(t.splits * chunks, places) * time;
      if (best.tiles && all >= least) return;
      best = t;
      least = all;
    };
    const int height = over_pixels() ? b.height : b.out_height, width = over_pixels() ? b.width : b.out_width;
    for (int h = 1; h <= std::min(height, 16); ++h) {
      for (int w = 1; w <= std::min(width, 32); ++w) consider(h, w, 1);
    }
    for (int images = 2; images <= std::min(b.batch, 8); ++images) consider(height, width, images);
    return best;
  }

  // Pixels in their order, as many as a tile may have.
  TrainingTile covariance() const {
    TrainingTile t{};
    t.tiles = ceil_div(b.batch, TrainingTile::kRows);
    const int chunks = ceil_div(b.in_channels, chunk());
    t.splits = std::min(t.tiles, std::max(1, 2 * limits.processors / chunks));
    for (int slices = 1; slices <= 16; ++slices) {
      t.x_slice = slice(b.in_channels, slices);
      const int stage = TrainingTile::kRows * odd_pitch(t.x_slice);
      if (lay_out(&t, 0, stage, TrainingTile::kRows, 0, b.in_channels)) return t;
    }
    return {};
  }
};

// Every pass over every block of MobileNetV2 has a tile in the memory that all devices from compute capability 8.0 on
// give a block of threads, the widest too.
constexpr bool fits(Pass pass, Type type, int in, int hidden, int out, int size, int stride) {
  Block b{};
  b.type = type, b.source = in == hidden ? Source::kCopy : Source::kExpand;
  b.batch = 1, b.height = b.width = size, b.out_height = b.out_width = size / stride;
  b.in_channels = in, b.hidden_channels = hidden, b.out_channels = out, b.stride = stride, b.dilation = 1;
  const Limits limits{1, kSharedBytes};
  TrainingTile t{};
  t.height = t.width = 4, t.images = 1;
  double time = 0;
  return Plan{pass, b, pass != Pass::kInput, limits}.fill(&t, &time);
}
constexpr bool all_fit(Type type, int in, int hidden, int out, int size, int stride) {
  bool found = true;
  for (const Pass pass : {Pass::kMoments, Pass::kProject, Pass::kBelow, Pass::kInput}) {
    found = found && fits(pass, type, in, hidden, out, size, stride);
  }
  return found;
}
static_assert(all_fit(Type::kHalf, 32, 32, 16, 112, 1) && all_fit(Type::kHalf, 16, 96, 24, 112, 2));
static_assert(all_fit(Type::kHalf, 96, 576, 160, 14, 2) && all_fit(Type::kHalf, 160, 960, 320, 7, 1));
static_assert(all_fit(Type::kFloat, 96, 576, 160, 14, 2) && all_fit(Type::kFloat, 160, 960, 320, 7, 1));

}  // namespace

TrainingTile choose_tile(Pass pass, const Block& b, bool products, const Limits& limits) {
  using Key = std::array<int, 16>;
  static std::mutex mutex;
  static std::map<Key, TrainingTile> known;
  const Key key = {int(pass), int(b.type),   int(b.source),     products,           b.batch,      b.height,
                   b.width,   b.in_channels, b.hidden_channels, b.out_channels,     b.out_height, b.out_width,
                   b.stride,  b.dilation,    limits.processors, limits.shared_bytes};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() >= 4096) known.clear();
  const Plan plan{pass, b, products, limits};
  return known[key] = pass == Pass::kCovariance ? plan.covariance() : plan.search();
}

const TrainingLaunches& training_of(Type type) {
  switch (type) {
    case Type::kHalf:
      return half_training;
    case Type::kBfloat16:
      return bfloat16_training;
    case Type::kTf32:
      return tf32_training;
    default:
      return single_training;
  }
}

}  // namespace mnv2_fused::cuda
