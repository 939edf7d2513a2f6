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
// With 16-bit activations everything is added up in float32, and so are biases, taps and h; x, d, y and the matrices
// are 16 bits wide, and rounded once. Two neighbours of a sum then share a slot of 32 bits, and the last one of an odd
// number has a zero beside it in the matrix. Offsets and sizes of weights and of working memory count float32s. A row
// without an instruction for slots (`wide`) keeps the image's rows and d as float32s, d unrounded, and widens x.
//
// Packed weights. A 1x1 or dense 3x3 convolution K -> N is cut into panels of `panel` output channels, each stored
// [K][panel] (the last one narrower, a multiple of `lanes`), so that panel n0 begins at n0 * K and a register tile
// reads it front to back; K runs over (channel, ky, kx) as in PyTorch's weight, and counts slots: a 3x3 has whole ones
// in each of its rows. A depthwise one is [C / lanes][9][lanes]. The bias follows. Channels are padded with zeros to a
// multiple of `lanes`. A block's projection may end in a panel of one and a half vectors, which would waste a quarter
// of its multiply-adds: see paired_panel.
#pragma once

#include <cstdint>
#include <type_traits>

namespace mnv2_fused {

// One layer of a network, in the order and with the meaning of the integers of a plan (ops.py writes them).
struct Layer {
  enum Kind : int64_t {
    kConv3x3,    // dense 3x3 over the image (the stem)
    kBlock,      // inverted residual
    kPointwise,  // 1x1 (the head)
    kPool,       // global mean
    kLinear,     // fully connected (the classifier)
  };
  static constexpr int kFields = 13;
  int64_t kind, in_channels, hidden_channels, out_channels, stride, dilation;
  int64_t pad_left, pad_right, pad_top, pad_bottom;
  int64_t expand, residual, relu6;  // 0 or 1; the first two only of a block, relu6 after any convolution
};

// A layer with its geometry resolved for one image size, its place in the packed weights and its schedule.
struct Step {
  Layer::Kind kind;
  enum Source { kExpand, kCopy, kStem } source;  // where a block's h comes from; kStem: the 3x3 before it, fused
  bool residual, relu6, pooled;                  // pooled: a kPointwise with ReLU6 whose only reader is the global mean

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
  // again stay in a ring. Groups cut the hidden channels, in panels: the partial outputs of the groups are added in
  // their order, whoever computes them, so that a result never depends on the number of threads.
  int stripe, ring_rows, row_length;  // row_length: pixels of a ring row with its side padding
  bool whole;                         // one stripe holds all rows: the ring is needed for one panel at a time
  int groups, panels, d_stride;
  const int32_t* pixel_offsets;  // of each pixel of the ring rows, row-major, in elements; tile_m entries wrap around

  // In a worker's scratch (ring at 0). `sums` are of the groups so far, where y is narrower than they; `operands` is x
  // widened.
  int64_t d_offset, rows_offset, image_offset, sums_offset, operands_offset, scratch_size;

  // Of an int8 row, see there: ring_rows counts quads of rows.
  int image_ring;                                      // rows of the quantised image that are kept
  int64_t constants, image_constants, pool_constants;  // offsets in the packed weights
  bool to_float;                                       // the mean is the result
};

// The first panel of a group: groups are as even as panels allow, and so is each half of them. Static, as the linker
// must not share it between ISAs.
static constexpr int group_panel(const Step& s, int group) { return s.panels * group / s.groups; }

// The image as the caller has it, in elements: of the row's dtype, or where `wide` of what it adds up in, which are to
// be rounded.
struct Image {
  const void* data;
  int64_t stride_channel, stride_row, stride_column;
  bool wide = false;
};

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kInt8 };

struct BFloat16 {
  uint16_t bits;
};

// To the nearest, of two as near to the even one; NaN stays NaN. Static too. Without a branch, for vectors.
static inline BFloat16 round_to_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t nearest = bits + 0x7fff + (bits >> 16 & 1), quiet = bits | 0x400000;
  return {uint16_t((value != value ? quiet : nearest) >> 16)};
}

static inline float widen(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, 4);
  return wide;
}

// What an ISA fixes about layouts and register tiles.
struct Tiles {
  int lanes, panel, tile_m;
  int slot;    // values of a sum in one slot
  bool pairs;  // has the tile for paired panels
  bool wide;   // multiplies widened activations, float32 or of an int8 row 16 bits
};

// Whether the last panel of a projection is stored as [k / 2][3][lanes / 2 channels][2]: three vectors that each hold
// half as many channels for two inputs (or slots of them), whose sums are added at the end. The same channels in two
// vectors, the second one half empty, would take four multiply-adds for every two inputs instead of three.
static constexpr bool paired_panel(const Tiles& tiles, int64_t channels, int64_t k) {
  return tiles.pairs && channels > tiles.lanes && channels <= tiles.lanes * 3 / 2 && k % (2 * tiles.slot) == 0;
}

// A block in training. Nothing of the expanded size exists beyond a few rows of one panel of hidden channels: every
// pass goes down an image once for each panel and computes h, d and their gradients anew,
//
//     h = relu6(x . We + be)        e's BatchNorm, whose statistics are known from x alone, is folded into We and be
//     d = depthwise3x3(h; Wd)       raw, since its statistics are what a pass may be asked for
//     u = scale d + shift           d's BatchNorm
//     z = relu6(u) . Wp             and for the gradient dz of z
//     g = (dz . Wp^T) where 0 < u < 6, else 0
//     dd = p g + q d + r            the gradient through d's BatchNorm, whose coefficients follow from sums of g and g
//     d gh = what dd gives h back     ge = gh where 0 < h < 6, else 0        dx = ge . We^T
struct TrainingStep {
  Step step;  // the geometry; its ring of h is of one panel, its stripe serves all buffers
  // A ring of rows of dd, with the columns that the taps reach beyond its sides, and d of one stripe, ge of some rows.
  int d_ring_rows, d_row_length, d_pad_left, chunk_rows;
  const int32_t* d_pixel_offsets;  // of each pixel in the ring of dd, as Step::pixel_offsets
  // relu6(u) is kept in the place of d where it is as wide. Sums of dx where they are wider than it; pixels in slots.
  int64_t d_offset, kept_offset, dd_offset, ge_offset, dx_offset, slots_offset, rows_offset, scratch_size;
};

// So many products are added up in the row's own type before they are added to doubles.
constexpr int kPixelsPerFlush = 1024;

// Sums over pixels, [panels][rows][panel], in the row's own type until they are added to doubles.
struct Accumulator {
  void* rounded;          // null where they are not asked for
  double* exact;          // null where there are less than kPixelsPerFlush
  int64_t rows, pending;  // pixels in `rounded`
};

// Everything a pass reads and adds to, for one image. Panels are those of the hidden channels; hidden channels that do
// not exist have zeros. What is null is not computed. Accumulators grow from image to image. x, dz and dx are of the
// row's dtype, all else of what it adds up in; so it is with the narrow tensors of Kernel, and what is beside them.
struct TrainingPass {
  const void *x, *dz;                // [H][W][in_channels], [out H][out W][out_channels]
  const void *expand, *expand_bias;  // packed as a 1x1 convolution in_channels -> hidden_channels
  const void* expand_back;           // hidden_channels -> in_channels
  const void* project_back;          // out_channels -> hidden_channels
  const void* depthwise;             // packed
  const void* coefficients;          // [panels][6][panel]: scale, shift, center, p, q, r
  bool batch;                        // q is not all 0: dd depends on d beyond its sign
  double *mean, *square;             // of d: [panels * panel]; of the `count` values of images before
  double count;
  double* sums;  // [panels][4][panel]: of g, g (d - center), ge, ge h
  bool g_sums;   // the first two are asked for, as they are with the gradient of the projection
  Accumulator expand_gradient, depthwise_gradient, project_gradient;  // rows: in, 9, out
  void* dx;                                                           // [H][W][in_channels], overwritten
};

// Kernel::moments takes so many pixels at once, less their mean.
constexpr int kMomentPixels = 256;

// The int8 rows; mnv2_fused/quantization.py defines what they compute, to the bit. Images, logits and means are
// float32, activations bytes, weights signed bytes, sums int32; a pixel's channels are rounded up to slots of 4 bytes,
// in which offsets and sizes of weights and of working memory count. A convolution is packed as above with a slot for 4
// inputs, the rest of the last one 0; that of a 3x3 over the image for up to 4 channels of a tap, K running over (ky,
// kx, channel); a depthwise one is [C / lanes][kx][lanes] slots (w0, w1, w2, 0). Where tiles are wide, a slot of a
// panel is cut into two of two inputs; and activations in working memory, the ring of h excepted, have 16 bits. The
// biases follow, then as many float32 multipliers. All of them begin at cache lines. After those of a layer come four
// float32 constants:
//   dense 3x3: 1 / scale and zero point of the image, offset of y (0 with a ReLU6)
//   block: zero point of x, the residual's multiplier, offset of y        1x1: -, -, offset of y
//   mean: zero point of x, multiplier, zero point of y
constexpr int kConstants = 4;

// One row of the kernel table. Every pointer is to the row's dtype, those to weights, scratch, zeros and partial sums
// to what it adds up in; sizes and offsets are in elements. A row without `train` is for inference alone.
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
  void (*combine)(const Step&, const void* packed, const void* partials, const void* x, void* y, int pixel0,
                  int pixel1);
  void (*conv)(const Step&, const void* packed, const Image& image, void* y, void* scratch, const void* zeros, int row0,
               int row1);
  // Output channels of panels [panel0, panel1): the map, or where the step is pooled its mean.
  void (*pointwise)(const Step&, const void* packed, const void* x, void* y, void* scratch, int panel0, int panel1);
  void (*pool)(const Step&, const void* packed, const void* x, void* y);
  void (*linear)(const Step&, const void* packed, const void* x, void* y, int64_t rows, int panel0, int panel1);

  // One image of a training pass: moments of d where `mean` is given, gradients where `dz` is.
  void (*train)(const TrainingStep&, TrainingPass&, void* scratch, const void* zeros);
  // Mean [panels * panel] and centred products [panels * panel][panels * panel] (those at or right of the diagonal
  // panel) of the channels of `pixels` pixels, added to those of the `count` before.
  void (*moments)(const void* x, int64_t pixels, int channels, double count, double* mean, double* products,
                  double* scratch);

  // Products with a panel: of a symmetric matrix [channels][rows] and w [channels][panel], [rows][panel], where rows
  // are the channels rounded up to panels; and of w [rows][channels] weighted by q [rows] with columns [first, first +
  // panel) of itself, [channels][panel], which takes [rows][panel] of scratch.
  void (*covariance_times)(const double* matrix, const double* w, int channels, double* to);
  void (*gram)(const void* w, const void* q, int rows, int channels, int first, void* to, void* scratch);

  // Over the pixels of narrow tensors [pixels][channels]. Moments from nothing; sums [2][channels] of a and of
  // a (b - center); y = coefficients[0] a + coefficients[1] b + coefficients[2], b may be null; y += x . w + bias
  // (+ residual), w packed as a 1x1 convolution. With a gate, a is 0 where gate[0] b + gate[1] lies outside 0 to 6;
  // relu6 is for an affine map of a alone.
  void (*channel_moments)(const void* x, int64_t pixels, int channels, double* mean, double* square);
  void (*channel_products)(const void* a, const void* b, const void* center, const void* gate, int64_t pixels,
                           int channels, double* sums);
  void (*affine)(const void* a, const void* b, const void* coefficients, const void* gate, bool relu6, void* y,
                 int64_t pixels, int channels);
  void (*matrix_add)(const void* x, const void* w, const void* bias, const void* residual, void* y, int64_t pixels,
                     int channels);

  // Independent multiply-adds in registers, for measuring the peak; returns how many multiply-adds it did.
  double (*fma_loop)(int64_t iterations);
};

}  // namespace mnv2_fused
