// From the layers of a plan to launches: which kernels, where their weights lie, how they are cut up, what memory they
// share. No torch, no CUDA header.
#pragma once

#include <vector>

#include "../inverted_residual.h"
#include "launch.h"

namespace mnv2_fused::cuda {

// A launch. A stem whose block has no expansion is that block's; a head takes the mean behind it.
struct Step {
  enum Kind { kBlock, kDense, kPool } kind;
  Type type;
  Block block;
  Dense dense;  // also of kPool
  Tile tile;
  DenseTile dense_tile;
  int pad_right, pad_bottom;        // of the block
  Layer stem;                       // of patches
  int weights;                      // how many tensors, weights and biases, it takes
  int64_t packed;                   // where they lie
  int64_t out_channels, out_bytes;  // of a row of the result, and of all of it
};

struct Program {
  std::vector<Step> steps;
  int out_channels, out_height, out_width;
  bool flat;  // the result is [N, out_channels]
  // Results in turns in two places, the counters and partial sums of the block that is running.
  int64_t activation_bytes, counter_bytes, partial_bytes;
  int64_t workspace_bytes() const { return 2 * activation_bytes + counter_bytes + partial_bytes; }
};

// The launches, without what depends on the image, and the size of all weights packed.
std::vector<Step> steps_of(Type type, const std::vector<Layer>& layers, int64_t* packed_bytes);
// Throws std::length_error where a size is beyond what kernels count in, or a layer fits in no tile. out_height is 0
// where the result would be empty.
Program schedule(const std::vector<Step>& steps, int64_t batch, int64_t height, int64_t width, const Limits& limits);

// `weights` are those of all steps, weight, bias, weight, ... Both return a cudaError_t.
int pack(const std::vector<Step>& steps, const Numbers* weights, void* packed, void* stream);
// `image` has the strides of x where the first step takes patches; else x is NHWC.
int run(const Program& program, const void* x, const Patches& image, const void* packed, void* y, void* workspace,
        void* stream);

}  // namespace mnv2_fused::cuda
