// The contract between the op, the schedule and the kernels: what is computed, in which layout, from which packed
// weights. No torch, no STL container: the files built for one ISA include this header.
//
// An inverted residual (BN folded into weights and biases) is
//
//     h = relu6(x . We + be)             1x1, in_channels -> hidden_channels; h = x when there is no expansion
//     d = relu6(depthwise3x3(h; Wd) + bd)   outside the image h is 0, not relu6(be)
//     y = d . Wp + bp  (+ x)             1x1, hidden_channels -> out_channels; optionally relu6
//
// Activations are NHWC, rows of a tensor without gaps. h and d exist for a few rows, or a few channels, at a time.
//
// Packed weights. A 1x1 or dense 3x3 convolution K -> N is cut into panels of `panel` output channels, each stored
// [K][panel] (the last one narrower, a multiple of `lanes`), so that panel n0 begins at n0 * K and a register tile
// reads it front to back; K runs over (channel, ky, kx) as in PyTorch's weight. A depthwise one is [C /
// lanes][9][lanes]. The bias follows. Channels are padded with zeros to a multiple of `lanes`. A block's projection may
// end in a panel of one and a half vectors, which would waste a quarter of its multiply-adds: see paired_panel.
#pragma once

#include <cstdint>

namespace mnv2_fused {

// One layer of a network, in the order and with the meaning of the integers of a plan (ops.py writes them).
struct Layer {
  enum Kind : int64_t {
    kConv3x3,    // dense 3x3 + ReLU6 over the image (the stem)
    kBlock,      // inverted residual
    kPointwise,  // 1x1 + ReLU6 (the head)
    kPool,       // global mean
    kLinear,     // fully connected (the classifier)
  };
  static constexpr int kFields = 13;
  int64_t kind, in_channels, hidden_channels, out_channels, stride, dilation;
  int64_t pad_left, pad_right, pad_top, pad_bottom;
  int64_t expand, residual, relu6;  // 0 or 1; only of a block
};

// A layer with its geometry resolved for one image size, its place in the packed weights and its schedule.
struct Step {
  Layer::Kind kind;
  enum Source { kExpand, kCopy, kStem } source;  // where a block's h comes from; kStem: the 3x3 before it, fused
  bool residual, relu6, pooled;                  // pooled: a kPointwise whose only reader is the global mean

  int in_channels, hidden_channels, out_channels;
  int height, width;          // of h (of the input for other kinds than kBlock)
  int out_height, out_width;  // of y
  int stride, dilation, pad_left, pad_right, pad_top;

  int image_channels, image_height, image_width;  // the dense 3x3's input (kStem, kConv3x3)
  int conv_stride, conv_pad_left, conv_pad_right, conv_pad_top;

  int64_t expand_weight, expand_bias;  // offsets in the packed weights, in elements; also of the dense 3x3
  int64_t depthwise_weight, depthwise_bias;
  int64_t project_weight, project_bias;  // of the 1x1 head and of the classifier

  // The schedule. A stripe is the number of output rows computed at once; the rows of h that the next stripe needs
  // again stay in a ring. Groups cut the hidden channels: the partial outputs of the groups are added in their order,
  // whoever computes them, so that a result never depends on the number of threads.
  int stripe, ring_rows, row_length;  // row_length: pixels of a ring row with its side padding
  bool whole;                         // one stripe holds all rows: the ring is needed for one panel at a time
  int groups, group_channels, d_stride;
  const int32_t* pixel_offsets;  // of each pixel of the ring rows, row-major, in elements; tile_m entries wrap around

  int64_t d_offset, rows_offset, image_offset, scratch_size;  // in a worker's scratch, in elements (ring at 0)
};

// The image as the caller has it, in elements.
struct Image {
  const void* data;
  int64_t stride_channel, stride_row, stride_column;
};

enum class Dtype : int { kFloat32, kFloat64 };

// What an ISA fixes about layouts and register tiles.
struct Tiles {
  int lanes, panel, tile_m;
  bool pairs;  // has the tile for paired panels
};

// Whether the last panel of a projection is stored as [k / 2][3][lanes / 2 channels][2]: three vectors that each hold
// half as many channels for two inputs, whose sums are added at the end. The same channels in two vectors, the second
// one half empty, would take four multiply-adds for every two inputs instead of three.
static constexpr bool paired_panel(const Tiles& tiles, int64_t channels, int64_t k) {
  return tiles.pairs && channels > tiles.lanes && channels <= tiles.lanes * 3 / 2 && k % 2 == 0;
}

// One row of the kernel table. Every pointer is to the row's dtype; sizes and offsets are in elements.
struct Kernel {
  const char* name;
  Dtype dtype;
  const char* const* requires_features;  // names of cpu features, ended by nullptr
  Tiles tiles;

  // Rows [row0, row1) of a block's output from the hidden channels of groups [group0, group1). Into y when
  // `partial` is null (then all groups, here or in an earlier call), else the one group's partial sums into it.
  void (*block)(const Step&, const void* packed, const void* x, const Image& image, void* y, void* scratch,
                const void* zeros, int row0, int row1, int group0, int group1, void* partial);
  // y of pixels [pixel0, pixel1) from the partial sums of all groups, each [pixels][out_channels].
  void (*combine)(const Step&, const void* partials, const void* x, void* y, int pixel0, int pixel1);
  void (*conv)(const Step&, const void* packed, const Image& image, void* y, void* scratch, const void* zeros, int row0,
               int row1);
  // Output channels of panels [panel0, panel1): the map, or where the step is pooled its mean.
  void (*pointwise)(const Step&, const void* packed, const void* x, void* y, int panel0, int panel1);
  void (*pool)(const Step&, const void* x, void* y);
  void (*linear)(const Step&, const void* packed, const void* x, void* y, int64_t rows, int panel0, int panel1);

  // Independent multiply-adds in registers, for measuring the peak; returns how many multiply-adds it did.
  double (*fma_loop)(int64_t iterations);
};

}  // namespace mnv2_fused
