// The geometry of every layer for one image size, its place in the packed weights, and the order of its work.
#include <algorithm>
#include <stdexcept>

#include "network.h"

namespace mnv2_fused {
namespace {

// Up to this many pixels of h a block runs a whole plane at once, so that its weights are read once; and its hidden
// channels are cut into groups, which is what threads share where rows are few. At 24 x 24 pixels that was measured 4%
// to 14% a block better than stripes; at 28 x 28 up to 4% better on one thread, and 7% to 15% worse on two.
constexpr int64_t kPlanePixels = 576;
// Of the int8 rows, which gained nothing from larger ones.
constexpr int64_t kPlanePixels8 = 256;
constexpr int64_t kMaxGroups = 4, kMinGroupChannels = 96;
// A stripe's rows of one panel of h stay in cache between the expansion and the depthwise stage. More rows at once read
// fewer of them twice: up to 160 KB, in L2, was measured better than what fits into L1 (112 wide: 8% and 4% a block).
constexpr int64_t kPanelBytes = 160 << 10;
// Those of all panels together, which narrow panels on large maps would let grow (the network at 224 needs 0.7 MB).
constexpr int64_t kRingBytes = 3 << 19;
constexpr int kMaxStripe = 8;
// The same of the int8 rows, of a quad of rows of one panel.
constexpr int64_t kPanelBytes8 = 64 << 10;

struct Resolver {
  const Kernel& kernel;
  const Tiles& tiles;
  Program program;
  int64_t packed = 0;  // offset of the next weights

  int64_t element_size() const { return sum_size(kernel.dtype); }
  bool int8() const { return kernel.dtype == Dtype::kInt8; }

  // That many values of an activation, or of a sum, in elements of sums.
  int64_t slots(int64_t values) const { return ceil_div(values, tiles.slot); }
  // The same of an activation that tiles multiply.
  int64_t operands(int64_t values) const { return tiles.wide ? values : slots(values); }

  // Claims a convolution's place: weight, k slots for each output, then bias.
  void place(int64_t n, int64_t k, int64_t* weight, int64_t* bias) {
    *weight = packed;
    if (int8()) {
      *bias = packed + round_up(round_up(n, tiles.lanes) * k, kLine);
      packed = *bias + round_up(2 * round_up(n, tiles.lanes), kLine);
      return;
    }
    *bias = packed + round_up(n, tiles.lanes) * k;
    packed = *bias + round_up(n, tiles.lanes);
  }

  // Of a layer of an int8 row.
  void place_constants(int64_t* constants) {
    if (!int8()) return;
    *constants = packed;
    packed += kLine;
  }

  static void set_conv(Step& step, const Layer& layer, int64_t height, int64_t width) {
    step.image_channels = int(layer.in_channels);
    step.image_height = int(height);
    step.image_width = int(width);
    step.conv_stride = int(layer.stride);
    step.conv_pad_left = int(layer.pad_left);
    step.conv_pad_right = int(layer.pad_right);
    step.conv_pad_top = int(layer.pad_top);
  }

  // A row of zeros that long stands in for rows outside the image.
  void need_zeros(int64_t size) { program.zeros_size = std::max(program.zeros_size, size); }

  static void check_count(int64_t n) {
    if (n > INT32_MAX) throw std::length_error("x is too large: its rows or its pixels do not fit into 2^31 elements");
  }

  // Scratch: ring of h | d | row pointers | image rows | sums | x widened, `x` values of it at once.
  void lay_out_scratch(Step& step, int64_t ring, int64_t d, int64_t pointers, int64_t x = 0) {
    step.d_offset = round_up(ring, tiles.lanes);
    step.rows_offset = step.d_offset + round_up(operands(d), 16);
    step.image_offset = step.rows_offset + round_up(pointers * 8 / element_size() + 1, 16);
    const int64_t image_row = step.conv_pad_left + step.image_width + step.conv_pad_right;
    need_zeros(operands(image_row));
    step.sums_offset = round_up(step.image_offset + operands(step.image_channels * 4 * image_row), 16);
    const bool sums = tiles.slot > 1 && step.groups > 1;
    step.operands_offset = step.sums_offset;
    if (sums) step.operands_offset += round_up(int64_t(step.out_height) * step.out_width * step.out_channels, 16);
    step.scratch_size = step.operands_offset + (tiles.wide ? round_up(x, 16) : 0);
    program.scratch_size = std::max(program.scratch_size, step.scratch_size);
  }

  // Bytes of an activation of an int8 row in scratch.
  int64_t scratch_bytes() const { return tiles.wide ? 2 : 1; }

  // Scratch: ring of quads | d | pointers to quads | image rows | rows of x, of which sizes are in activations.
  void lay_out_scratch_s8(Step& step, int64_t ring, int64_t d, int64_t pointers, int64_t x) {
    step.d_offset = round_up(ceil_div(ring, 4), kLine);
    step.rows_offset = step.d_offset + round_up(ceil_div(d * scratch_bytes(), 4), kLine);
    step.image_offset = step.rows_offset + round_up(pointers * 2, kLine);
    step.scratch_size = step.image_offset;
    if (step.image_channels) {
      const int64_t image_row = step.conv_pad_left + step.image_width + step.conv_pad_right;
      check_count(image_row * round_up(step.image_channels, 4));
      step.scratch_size +=
          round_up((1 + step.image_ring) * image_row * slots(step.image_channels) * scratch_bytes(), kLine);
    }
    step.operands_offset = step.scratch_size;
    if (tiles.wide) step.scratch_size += round_up(ceil_div(x * scratch_bytes(), 4), kLine);
    program.scratch_size = std::max(program.scratch_size, step.scratch_size);
  }

  void conv_s8(Step& step) {
    step.image_ring = std::min(step.image_height, 3);
    lay_out_scratch_s8(step, 0, 0, 0, 0);
  }

  // Runs it as a whole plane or by stripes; and cuts its hidden channels.
  void cut(Step& step) const {
    const int64_t pixels = int64_t(step.height) * step.width;
    step.whole = step.source != Step::kStem && pixels <= (int8() ? kPlanePixels8 : kPlanePixels);
    step.panels = int(ceil_div(step.hidden_channels, tiles.panel));
    step.groups = step.whole ? int(std::clamp<int64_t>(step.hidden_channels / kMinGroupChannels, 1, kMaxGroups)) : 1;
  }

  void block_s8(Step& step) {
    const int64_t panel = tiles.panel, hidden = step.hidden_channels;
    step.row_length = step.pad_left + step.width + step.pad_right;
    const int64_t quad = step.row_length * panel * 4;
    // Rows of h as the filter takes them, see Stream in int8-inl.h.
    const int common = step.stride == 2 && step.dilation % 2 == 0 ? 2 : 1;
    const int64_t stride = step.stride / common, streams = step.dilation / common;
    const auto quads = [&](int64_t stripe) { return ((stripe - 1) * stride + 2) / 4 + 1; };
    const int64_t rows = ceil_div(step.out_height, std::min<int64_t>(streams, step.out_height));

    cut(step);
    step.stripe = int(round_up(rows, 4));
    if (!step.whole) {
      const int64_t least = 4 / stride;
      int64_t stripe = kMaxStripe;
      while (stripe > least && quads(stripe) * quad > kPanelBytes8) stripe -= least;
      step.stripe = int(std::min<int64_t>(stripe, step.stripe));
    }
    step.ring_rows = int(quads(step.stripe));
    step.d_stride = int(round_up(hidden, tiles.lanes));
    if (step.d_stride * scratch_bytes() % 1024 == 0) step.d_stride += 64;  // pixels would share cache sets
    if (step.image_channels) {
      const int64_t reach = 4 * step.ring_rows * int64_t(step.dilation) * step.conv_stride + 3;
      step.image_ring = int(std::min<int64_t>(step.image_height, reach));
    }

    check_count(quad);
    check_count(int64_t(step.out_height) * step.out_width);
    const int64_t panels = step.whole ? 1 : step.panels;
    check_count(step.ring_rows * quad);
    const int64_t x = step.source == Step::kExpand ? step.width * round_up(step.in_channels, 4) : 0;
    lay_out_scratch_s8(step, panels * step.ring_rows * quad,
                       std::min<int64_t>(step.stripe, rows) * step.out_width * step.d_stride, step.ring_rows + 1,
                       4 * step.ring_rows * x);
    need_zeros(quad / 4);
    if (step.groups > 1) {
      const int64_t out = int64_t(step.out_height) * step.out_width * step.out_channels;
      program.partial_size = std::max(program.partial_size, round_up(out * step.groups, 16));
    }
  }

  void block(Step& step) {
    if (int8()) return block_s8(step);
    const int64_t panel = tiles.panel, hidden = step.hidden_channels;
    step.row_length = step.pad_left + step.width + step.pad_right;
    const int64_t reach = 2 * step.dilation + 1;
    const auto rows = [&](int64_t stripe) { return (stripe - 1) * step.stride + reach; };

    cut(step);
    step.stripe = step.out_height;
    if (!step.whole) {
      const int64_t row_bytes = step.row_length * panel * element_size();
      step.stripe = kMaxStripe;
      const int64_t most = std::min(kPanelBytes, kRingBytes / step.panels);
      while (step.stripe > 1 && rows(step.stripe) * row_bytes > most) --step.stripe;
      if (step.stripe > 1) step.stripe = step.stripe / 2 * 2;
      step.stripe = std::min(step.stripe, step.out_height);
    }
    step.ring_rows = int(std::min<int64_t>(rows(step.stripe), step.height));
    const int64_t group_channels = ceil_div(step.panels, step.groups) * panel;
    step.d_stride = int(round_up(std::min(group_channels, hidden), tiles.lanes));
    // Pixels would share cache sets.
    if (step.d_stride * element_size() / tiles.slot % 4096 == 0) step.d_stride += tiles.lanes;

    check_count(step.row_length * panel);
    check_count(int64_t(step.out_height) * step.out_width);
    const int64_t panels = step.whole ? 1 : step.panels;
    const int64_t ring = panels * step.ring_rows * step.row_length * panel;
    const int64_t d = int64_t(step.stripe) * step.out_width * step.d_stride;
    const int64_t x = step.source == Step::kExpand ? step.ring_rows * int64_t(step.width) * step.in_channels : 0;
    lay_out_scratch(step, ring, d, step.image_channels * 3 + 1 + rows(step.stripe), x);
    need_zeros(step.row_length * panel);
    check_count(int64_t(step.ring_rows) * step.row_length * panel);
    if (step.groups > 1) {
      const int64_t out = int64_t(step.out_height) * step.out_width * step.out_channels;
      program.partial_size = std::max(program.partial_size, round_up(out * step.groups, 16));
    }

    program.pixel_offsets.push_back(pixel_offsets(step.ring_rows, step.row_length, step.pad_left, step.width, tiles));
    step.pixel_offsets = program.pixel_offsets.back().data();
  }
};

}  // namespace

Slice slice_of(const Step& s, const Tiles& tiles, int group, int slice, int slices) {
  if (s.kind != Layer::kBlock) {
    const int64_t total = s.kind == Layer::kConv3x3 ? s.out_height : ceil_div(s.out_channels, tiles.panel);
    return {int(total * slice / slices), int(total * (slice + 1) / slices)};
  }
  const int64_t first = group_panel(s, group), panels = group_panel(s, group + 1) - first;
  const auto nearest_row = [&](int64_t cut) {  // to the slice's end, which is a fraction of `slices`
    const int64_t beyond = (s.panels * cut - first * slices) * s.out_height, row = panels * slices;
    return int(std::clamp<int64_t>((2 * beyond + row) / (2 * row), 0, s.out_height));
  };
  return {nearest_row(slice), nearest_row(slice + 1)};
}

std::vector<int32_t> pixel_offsets(int64_t rows, int64_t row_length, int64_t left, int64_t width, const Tiles& tiles) {
  std::vector<int32_t> offsets;
  offsets.reserve(size_t(rows * width + tiles.tile_m));
  for (int64_t pixel = 0; pixel < rows * width + tiles.tile_m; ++pixel) {
    const int64_t row = pixel / width % rows, column = pixel % width;
    offsets.push_back(int32_t((row * row_length + left + column) * tiles.panel));
  }
  return offsets;
}

Program schedule(const Kernel& kernel, const std::vector<Layer>& layers, int64_t height, int64_t width) {
  Resolver resolver{kernel, kernel.tiles, {}};
  Program& program = resolver.program;
  program.kernel = &kernel;
  program.map_channels = resolver.int8() ? 4 : 1;
  const auto map_size = [&](int64_t channels) { return height * width * round_up(channels, program.map_channels); };
  program.image_size = map_size(layers[0].in_channels);
  program.pixel_offsets.reserve(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    Resolver::check_count(height * width);
    const Layer* layer = &layers[i];
    Step step{};
    step.kind = Layer::Kind(layer->kind);
    const bool next_pools = i + 1 < layers.size() && layers[i + 1].kind == Layer::kPool;
    if (layer->kind == Layer::kConv3x3) {
      Resolver::set_conv(step, *layer, height, width);
      const int64_t in = layer->in_channels;
      resolver.place(layer->out_channels, resolver.int8() ? resolver.slots(in) * 9 : in * 3 * resolver.slots(3),
                     &step.expand_weight, &step.expand_bias);
      resolver.place_constants(&step.constants);
      step.image_constants = step.constants;
      height = out_extent(height, layer->pad_top + layer->pad_bottom, layer->stride, 1);
      width = out_extent(width, layer->pad_left + layer->pad_right, layer->stride, 1);
      if (height == 0 || width == 0) return std::move(program);
      // A block without an expansion reads the stem's rows as its h: the stem is the expansion.
      const Layer* next = i + 1 < layers.size() ? &layers[i + 1] : nullptr;
      if (layer->relu6 && next && next->kind == Layer::kBlock && !next->expand && !next->residual) {
        step.kind = Layer::kBlock;
        step.source = Step::kStem;
        layer = next;
        ++i;
      }
    } else if (layer->kind == Layer::kBlock) {
      step.source = layer->expand ? Step::kExpand : Step::kCopy;
    }
    step.relu6 = layer->relu6;
    step.in_channels = int(layer->in_channels);
    step.hidden_channels = int(layer->hidden_channels);
    step.out_channels = int(layer->out_channels);
    step.height = step.out_height = int(height);
    step.width = step.out_width = int(width);

    switch (step.kind) {
      case Layer::kBlock:
        step.stride = int(layer->stride);
        step.dilation = int(layer->dilation);
        step.pad_left = int(layer->pad_left);
        step.pad_right = int(layer->pad_right);
        step.pad_top = int(layer->pad_top);
        step.residual = layer->residual;
        if (step.source == Step::kExpand) {
          resolver.place(step.hidden_channels, resolver.slots(step.in_channels), &step.expand_weight,
                         &step.expand_bias);
        }
        resolver.place(step.hidden_channels, resolver.int8() ? 3 : 9, &step.depthwise_weight, &step.depthwise_bias);
        resolver.place(step.out_channels, resolver.slots(step.hidden_channels), &step.project_weight,
                       &step.project_bias);
        resolver.place_constants(&step.constants);
        height = out_extent(height, layer->pad_top + layer->pad_bottom, layer->stride, layer->dilation);
        width = out_extent(width, layer->pad_left + layer->pad_right, layer->stride, layer->dilation);
        step.out_height = int(height);
        step.out_width = int(width);
        if (height == 0 || width == 0) return std::move(program);
        resolver.block(step);
        break;
      case Layer::kConv3x3:
        resolver.int8() ? resolver.conv_s8(step) : resolver.lay_out_scratch(step, 0, 0, step.image_channels * 3);
        break;
      case Layer::kPointwise:
        resolver.place(step.out_channels, resolver.slots(step.in_channels), &step.project_weight, &step.project_bias);
        resolver.place_constants(&step.constants);
        resolver.int8() ? resolver.lay_out_scratch_s8(step, 0, 0, 0, height * width * round_up(step.in_channels, 4))
                        : resolver.lay_out_scratch(step, 0, 0, 0, height * width * step.in_channels);
        if (next_pools && layer->relu6) {
          step.pooled = true;
          resolver.place_constants(&step.pool_constants);
          ++i;
        }
        break;
      case Layer::kPool:
        resolver.place_constants(&step.pool_constants);
        break;
      case Layer::kLinear:
        resolver.place(step.out_channels, resolver.slots(step.in_channels), &step.project_weight, &step.project_bias);
        resolver.place_constants(&step.constants);
        break;
    }
    if (step.kind == Layer::kPool || step.pooled) {
      if (resolver.int8() && height * width > INT32_MAX / 255) {
        throw std::length_error("x is too large: the sum of so many bytes does not fit into 32 bits");
      }
      height = width = 1;
      program.flat = true;
      program.features = round_up(step.out_channels, program.map_channels);
      step.to_float = i + 1 == layers.size();
    } else if (step.kind != Layer::kLinear && i + 1 < layers.size()) {
      program.activation_size = std::max(program.activation_size, map_size(step.out_channels));
    }
    program.out_channels = step.out_channels;
    program.steps.push_back(step);
    program.last_layer.push_back(int(i));
  }
  program.out_height = height;
  program.out_width = width;
  program.activation_size = round_up(program.activation_size, 64);
  resolver.need_zeros(kernel.tiles.panel);
  program.zeros_size = round_up(program.zeros_size, 16);
  return std::move(resolver.program);
}

}  // namespace mnv2_fused
