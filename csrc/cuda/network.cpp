// Programs: see network.h.
#include "network.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../cpu/network.h"

namespace mnv2_fused::cuda {
namespace {

constexpr int64_t kAlign = 256;
int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

void set_patches(Patches* p, const Layer& stem, int64_t height, int64_t width) {
  p->channels = int(stem.in_channels), p->height = int(height), p->width = int(width);
  p->out_height = int(out_extent(height, stem.pad_top + stem.pad_bottom, stem.stride, 1));
  p->out_width = int(out_extent(width, stem.pad_left + stem.pad_right, stem.stride, 1));
  p->stride = int(stem.stride), p->pad_left = int(stem.pad_left), p->pad_top = int(stem.pad_top);
}

Step block_step(Type type, const Layer& layer, const Layer* stem) {
  Step step{};
  step.kind = Step::kBlock;
  step.type = type;
  Block& b = step.block;
  b.type = type;
  b.source = stem ? Source::kPatches : layer.expand ? Source::kExpand : Source::kCopy;
  b.in_channels = int(stem ? stem->in_channels * 9 : layer.in_channels);
  b.hidden_channels = int(layer.hidden_channels), b.out_channels = int(layer.out_channels);
  b.stride = int(layer.stride), b.dilation = int(layer.dilation);
  b.pad_left = int(layer.pad_left), b.pad_top = int(layer.pad_top);
  b.residual = layer.residual, b.relu6 = layer.relu6;
  step.pad_right = int(layer.pad_right), step.pad_bottom = int(layer.pad_bottom);
  if (stem) step.stem = *stem;
  step.weights = b.source == Source::kCopy ? 4 : 6;
  return step;
}

Step dense_step(Type type, const Layer& layer) {
  Step step{};
  step.kind = layer.kind == Layer::kPool ? Step::kPool : Step::kDense;
  step.type = step.dense.type = type;
  step.dense.of_patches = layer.kind == Layer::kConv3x3;
  step.dense.in_channels = int(layer.in_channels) * (step.dense.of_patches ? 9 : 1);
  step.dense.out_channels = int(layer.out_channels);
  step.dense.relu6 = layer.relu6;
  step.dense.pool = layer.kind == Layer::kPool;  // the pixels of an image, once they are known
  step.stem = layer;
  step.weights = step.kind == Step::kPool ? 0 : 2;
  return step;
}

int64_t packed_bytes(const Step& step) {
  if (step.kind == Step::kPool) return 0;
  if (step.kind == Step::kDense) {
    return packing(step.type, step.dense.in_channels, step.dense.out_channels).bytes;
  }
  const Block& b = step.block;
  return packing(step.type, b.source != Source::kCopy, b.in_channels, b.hidden_channels, b.out_channels).bytes;
}

}  // namespace

std::vector<Step> steps_of(Type type, const std::vector<Layer>& layers, int64_t* bytes) {
  std::vector<Step> steps;
  int64_t at = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const Layer* next = i + 1 < layers.size() ? &layers[i + 1] : nullptr;
    Step step{};
    if (layer.kind == Layer::kConv3x3 && layer.relu6 && next && next->kind == Layer::kBlock && !next->expand &&
        !next->residual) {
      step = block_step(type, *next, &layer);
      ++i;
    } else if (layer.kind == Layer::kBlock) {
      step = block_step(type, layer, nullptr);
    } else {
      step = dense_step(type, layer);
      if (layer.kind == Layer::kPointwise && next && next->kind == Layer::kPool) {
        step.dense.pool = 1;
        ++i;
      }
    }
    step.out_channels = layers[i].out_channels;
    step.packed = at;
    at += aligned(packed_bytes(step));
    steps.push_back(step);
  }
  *bytes = at;
  return steps;
}

Program schedule(const std::vector<Step>& steps, int64_t batch, int64_t height, int64_t width, const Limits& limits) {
  Program program{};
  const auto count = [&](int64_t h, int64_t w) {
    if (batch * h * w > INT32_MAX) throw std::length_error("a layer has 2^31 pixels or more");
    return int(batch * h * w);
  };
  for (const Step& from : steps) {
    Step step = from;
    count(height, width);
    if (step.kind == Step::kBlock) {
      Block& b = step.block;
      if (b.source == Source::kPatches) {
        set_patches(&b.patches, step.stem, height, width);
        height = b.patches.out_height, width = b.patches.out_width;
        count(height, width);
      }
      b.batch = int(batch), b.height = int(height), b.width = int(width);
      height = out_extent(height, b.pad_top + step.pad_bottom, b.stride, b.dilation);
      width = out_extent(width, b.pad_left + step.pad_right, b.stride, b.dilation);
      b.out_height = int(height), b.out_width = int(width);
      if (!b.height || !b.width || !height || !width) return {};
      step.tile = choose_tile(b, limits);
      if (!step.tile.tiles) {
        throw std::length_error("no tile of a block with " + std::to_string(b.in_channels) + ", " +
                                std::to_string(b.hidden_channels) + " and " + std::to_string(b.out_channels) +
                                " channels, dilation " + std::to_string(b.dilation) + ", fits in " +
                                std::to_string(limits.shared_bytes) + " bytes of shared memory");
      }
      if (step.tile.splits > 1) {
        program.counter_bytes = std::max(program.counter_bytes, aligned(int64_t(step.tile.tiles) * 4));
        program.partial_bytes = std::max(program.partial_bytes, aligned(step.tile.partial_bytes));
      }
    } else {
      Dense& d = step.dense;
      if (d.of_patches) {
        set_patches(&d.patches, step.stem, height, width);
        height = d.patches.out_height, width = d.patches.out_width;
        if (!height || !width) return {};
      }
      d.rows = count(height, width);
      if (d.pool) {
        d.pool = int(height * width);
        height = width = 1;
        program.flat = true;
      }
      if (step.kind == Step::kDense) step.dense_tile = choose_tile(d, limits);
      if (step.kind == Step::kDense && !step.dense_tile.blocks_m)
        throw std::length_error("no tile of the head fits in shared memory");
    }
    program.out_channels = int(step.out_channels);
    step.out_bytes = int64_t(count(height, width)) * step.out_channels * element_size(step.type);
    program.steps.push_back(step);
  }
  for (size_t i = 0; i + 1 < steps.size(); ++i) {
    program.activation_bytes = std::max(program.activation_bytes, aligned(program.steps[i].out_bytes));
  }
  program.out_height = int(height), program.out_width = int(width);
  return program;
}

int pack(const std::vector<Step>& steps, const Numbers* weights, void* packed, void* stream) {
  for (const Step& step : steps) {
    char* const to = static_cast<char*>(packed) + step.packed;
    const Launches& launches = launches_of(step.type);
    int error = 0;
    if (step.kind == Step::kBlock) {
      const bool expand = step.weights == 6;
      const Numbers* const rest = weights + 2 * expand;
      const Numbers none{};
      error = launches.pack(
          step.block, {expand ? weights[0] : none, expand ? weights[1] : none, rest[0], rest[1], rest[2], rest[3]}, to,
          stream);
    } else if (step.kind == Step::kDense) {
      error = launches.pack_dense(step.dense, weights[0], weights[1], to, stream);
    }
    if (error) return error;
    weights += step.weights;
  }
  return 0;
}

int run(const Program& program, const void* x, const Patches& image, const void* packed, void* y, void* workspace,
        void* stream) {
  char* const memory = static_cast<char*>(workspace);
  char* const counters = memory + 2 * program.activation_bytes;
  if (program.counter_bytes) {
    if (const int error = clear(counters, program.counter_bytes, stream)) return error;
  }
  const auto strided = [&](Patches p) {
    p.stride_batch = image.stride_batch, p.stride_channel = image.stride_channel;
    p.stride_row = image.stride_row, p.stride_column = image.stride_column;
    return p;
  };
  const void* from = x;
  for (size_t i = 0; i < program.steps.size(); ++i) {
    Step step = program.steps[i];
    step.block.patches = strided(step.block.patches);
    step.dense.patches = strided(step.dense.patches);
    void* const to = i + 1 == program.steps.size() ? y : memory + i % 2 * program.activation_bytes;
    const char* const weights = static_cast<const char*>(packed) + step.packed;
    const Launches& launches = launches_of(step.type);
    int error = 0;
    if (step.kind == Step::kBlock) {
      char* const partial = counters + program.counter_bytes;
      error = launches.block(step.block, step.tile, from, weights, to, counters, partial, stream);
    } else if (step.kind == Step::kDense) {
      error = launches.dense(step.dense, step.dense_tile, from, weights, nullptr, to, stream);
    } else {
      const Dense& d = step.dense;
      error = launches.pool(from, d.rows / d.pool, d.pool, d.in_channels, to, stream);
    }
    if (error) return error;
    from = to;
  }
  return 0;
}

}  // namespace mnv2_fused::cuda
