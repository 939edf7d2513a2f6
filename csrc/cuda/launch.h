// What the CUDA side offers to the rest, in plain C++: no torch, no CUDA header. Every function launches on the stream
// it is given and returns a cudaError_t (0: success).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MNV2_ANYWHERE __host__ __device__
#else
#define MNV2_ANYWHERE
#endif

namespace mnv2_fused::cuda {

// How a layer's numbers are stored and multiplied. Sums are float in all of them.
enum class Type : int { kHalf, kBfloat16, kTf32, kFloat };
constexpr int element_size(Type type) { return type == Type::kHalf || type == Type::kBfloat16 ? 2 : 4; }

// Packed weights of a block: for every chunk of 64 bytes of hidden channels one blob, as it lies in shared memory,
//
//     [chunk][in]  expansion, rows `expand_pitch` apart (none without an expansion)
//     [out][chunk] projection, rows `kPitch` apart
//     [chunk][..]  taps of the filter, 9 numbers and a rest that fills 32 bytes (16-bit) or 48
//     [chunk]      float: bias of the expansion
//     [chunk]      float: bias of the filter
//
// and after the last the projection's bias, float. Channels that do not exist are zeros. Pitches are odd multiples of
// 16 bytes, so that eight rows lie in eight different banks.
struct Packing {
  static constexpr int kChunkBytes = 64, kPitch = 80;
  int chunks, in_channels, out_channels;  // channels padded, to 8 and 16
  int expand_pitch;
  int project, taps, expand_bias, depthwise_bias, blob_bytes;  // offsets in a blob
  int64_t bytes;
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
MNV2_ANYWHERE constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }
// Bytes from row to row of `bytes`: an odd number of 16.
MNV2_ANYWHERE constexpr int odd_pitch(int bytes) {
  return (bytes / 16 | 1) * 16 < bytes ? (bytes / 16 | 1) * 16 + 32 : (bytes / 16 | 1) * 16;
}

constexpr Packing packing(Type type, bool expand, int in_channels, int hidden_channels, int out_channels) {
  const int size = element_size(type), chunk = Packing::kChunkBytes / size;
  Packing p{};
  p.chunks = (hidden_channels + chunk - 1) / chunk;
  p.in_channels = round_up(in_channels, 8);
  p.out_channels = round_up(out_channels, 16);
  p.expand_pitch = odd_pitch(p.in_channels * size);
  p.project = expand ? chunk * p.expand_pitch : 0;
  p.taps = p.project + p.out_channels * Packing::kPitch;
  p.expand_bias = p.taps + chunk * (size == 2 ? 32 : 48);
  p.depthwise_bias = p.expand_bias + chunk * 4;
  p.blob_bytes = round_up(p.depthwise_bias + chunk * 4, 16);
  p.bytes = int64_t(p.chunks) * p.blob_bytes + p.out_channels * 4;
  return p;
}

// Where the rows of a product come from: a tensor, NHWC, or the 3x3 patches of an image with any strides, whose values
// stand in the order (channel, ky, kx), as in PyTorch's weight.
struct Patches {
  int channels, height, width, out_height, out_width, stride, pad_left, pad_top;
  int64_t stride_batch, stride_channel, stride_row, stride_column;  // in elements
};

// What makes a block's h: x as it is, its expansion, or the stem before the block, whose expansion is the dense 3x3.
enum class Source : int { kCopy, kExpand, kPatches };

// A block and the tensors' sizes, as inverted_residual.h has them. With patches, height and width are those of h, and
// in_channels the values of a patch.
struct Block {
  Type type;
  Source source;
  int batch, height, width, in_channels, hidden_channels, out_channels, out_height, out_width;
  int stride, dilation, pad_left, pad_top;
  bool residual, relu6;
  Patches patches;
};

// A tensor as PyTorch has it, float or of 16-bit numbers as the Type says.
struct Numbers {
  const void* data;
  bool single;  // float
};

// The first two null without an expansion.
struct Weights {
  Numbers expand, expand_bias, depthwise, depthwise_bias, project, project_bias;
};

// y = x . W^T + bias of rows of x: a 1x1 convolution, the classifier, or of patches a dense 3x3.
struct Dense {
  Type type;
  bool of_patches;
  int rows, in_channels, out_channels;
  bool relu6;
  int pool;  // so many rows, an image's, make one row of y, their mean; 0: every row is one
  bool add;  // to what is in y, and to a residual, where there is one
  Patches patches;
};

// Its packed weight: rows `row_bytes` long, the rest of which is 0, and then the bias, float.
struct DensePacking {
  int row_bytes;
  int64_t bias, bytes;  // offset and size
};

constexpr DensePacking packing(Type type, int in_channels, int out_channels) {
  DensePacking p{};
  p.row_bytes = round_up(in_channels * element_size(type), Packing::kChunkBytes);
  p.bias = int64_t(p.row_bytes) * out_channels;
  p.bytes = p.bias + round_up(out_channels * 4, 16);
  return p;
}

// What of a device the choice of tiles depends on.
struct Limits {
  int processors, shared_bytes;  // shared memory that a block of threads may have
};
// Of it, what the kernels use: as much as devices of compute capability 8.6 and 8.9 give a block of threads.
constexpr int kSharedBytes = 99 << 10;

// How a block is cut up: a block of threads makes `images` x `height` x `width` pixels of the output, a part `splits`
// of the hidden channels each.
struct Tile {
  int height, width, images;
  int m_warps, n_warps, n_tiles;  // warps by pixels and by channels; 8 channels each, a warp's
  int stages, splits;             // blobs of weights in shared memory
  int tiles, shared_bytes;
  int64_t
      partial_bytes;  // of partial sums, where there are splits; and `tiles` counters of 4 bytes, 0 before and after
};

// The largest n_tiles that there are kernels for.
constexpr int kMaxTiles = 20;

// How a product is cut up: a block of threads takes `rows` rows, 32 a warp at a time, and n_tiles * 8 columns a warp;
// the warps along k share out the sums, which are added in their order.
struct DenseTile {
  int m_warps, n_warps, k_warps, n_tiles, stages;
  int rows, blocks_m, blocks_n, shared_bytes;  // blocks_m is 0 where none fits
};

// The n_tiles of a product that there are kernels for, and the shared memory that holds the sums of its means.
constexpr int kDenseTiles[] = {2, 8};
constexpr int sums_bytes(const Dense& d, const DenseTile& t) {
  return d.pool ? t.rows / d.pool * t.n_warps * t.n_tiles * 8 * 4 : 0;
}

// The tile with the least work for the busiest processor. `tiles` is 0 where no tile fits in shared memory.
Tile choose_tile(const Block& block, const Limits& limits);
DenseTile choose_tile(const Dense& dense, const Limits& limits);

// --- training: the passes of training.h

// Packed weights of the passes: of every chunk its rows of the expansion [chunk][in] and of the projection transposed
// [chunk][out], and the constants, taps as in Packing, bias of the expansion and six rows of coefficients, float; and
// the expansion transposed, [in][hidden].
struct TrainingPacking {
  int chunks, expand_bytes, project_bytes, constant_bytes;  // of a row, a row, a chunk
  int64_t project, constants, expand_back, bytes;           // the expansion is at 0
  static constexpr int64_t expand = 0;
};

constexpr TrainingPacking training_packing(Type type, int in_channels, int hidden_channels, int out_channels) {
  const int size = element_size(type), chunk = Packing::kChunkBytes / size;
  TrainingPacking p{};
  p.chunks = (hidden_channels + chunk - 1) / chunk;
  p.expand_bytes = round_up(in_channels * size, Packing::kChunkBytes);
  p.project_bytes = round_up(out_channels * size, Packing::kChunkBytes);
  p.constant_bytes = chunk * (size == 2 ? 32 : 48) + 7 * chunk * 4;
  p.project = int64_t(p.chunks) * chunk * p.expand_bytes;
  p.constants = p.project + int64_t(p.chunks) * chunk * p.project_bytes;
  p.expand_back = p.constants + int64_t(p.chunks) * p.constant_bytes;
  p.bytes = p.expand_back + int64_t(round_up(in_channels, 16)) * p.chunks * Packing::kChunkBytes;
  return p;
}

// The largest n_tiles of the gradient of x.
constexpr int kMaxInputTiles = 8;

enum class Pass : int { kMoments, kProject, kBelow, kInput, kCovariance };

// How a pass is cut up; tiles are of outputs, or where it goes back below the filter of pixels of x.
struct TrainingTile {
  static constexpr int kWarps = 16, kRows = 256;  // pixels of which a tile has at most so many, of h too
  int height, width, images, tiles_y, tiles_x, tiles;
  int out_height, out_width, h_height, h_width, spread_height, spread_width;  // of the rectangles that belong to it
  int x_slice, dz_slice;                                                      // bytes of a row that are loaded at once
  int splits, parts;                                                          // blocks of a chunk; warps of a sum
  int product_rows, product_floats, tap_floats;
  int m_warps, n_warps, n_tiles;  // of the gradient of x
  int stage_offset, h_offset, spread_offset, rows_offset, products_offset, taps_offset, zeros_offset, weights_offset;
  int shared_bytes;
};

// What the passes take beside a Block, whose residual and relu6 they do not know.
struct TrainingCall {
  Block block;
  const void *x, *dz, *packed;
  void* dx;
  float* products;
  double* sums;
  bool wants_products, wants_taps;
};

// `tiles` is 0 where none fits. Of kCovariance the block's in_channels and batch, pixels, are all that counts.
TrainingTile choose_tile(Pass pass, const Block& block, bool wants_products, const Limits& limits);

// Over the pixels of a narrow tensor: ChannelArgs.
struct ChannelCall {
  const void *a, *b;
  const float *center, *gate, *coefficients;
  void* y;
  double *partial, *first, *second;  // [kMaxChannelBlocks][2][channels]; two rows of sums
  float* rounded;                    // the first row once more, or null
  int64_t pixels;
  int channels;
  bool relu6;
};
constexpr int kMaxChannelBlocks = 256;
enum class ChannelOp : int {
  kMoments,   // mean and squared deviations of a
  kProducts,  // sums of a and of a (b - center)
  kAffine,    // y = coefficients[0] a + coefficients[1] b + coefficients[2], or relu6 of it
};

// [splits][chunks][stored_rows][chunk], float or double, to rows of doubles [rows][channels], those from first_row on.
// Rows of number, mean and squared deviations become two, the second one apart. Of products of `count` deviations from
// a center (null: 0) those from the mean are made where it is given.
struct SumCall {
  const void* from;
  double *to, *second;
  int splits, chunks, rows, channels, first_row, stored_rows;
  const double* mean;
  const float* center;
  double count;
};

// The launches of one type, each compiled by itself.
struct Launches {
  int (*pack)(const Block&, const Weights&, void* packed, void* stream);
  int (*pack_dense)(const Dense&, const Numbers& weight, const Numbers& bias, void* packed, void* stream);
  int (*block)(const Block&, const Tile&, const void* x, const void* packed, void* y, void* counters, void* partial,
               void* stream);
  int (*dense)(const Dense&, const DenseTile&, const void* x, const void* packed, const void* residual, void* y,
               void* stream);
  int (*pool)(const void* x, int batch, int pixels, int channels, void* y, void* stream);
};
struct TrainingLaunches {
  int (*pack)(const Block&, const Weights&, const float* coefficients, void* packed, void* stream);
  int (*pass)(Pass, const TrainingCall&, const TrainingTile&, void* stream);
  int (*covariance)(const void* x, const float* center, int64_t pixels, int channels, const TrainingTile&,
                    float* products, void* stream);
  int (*channels)(ChannelOp, const ChannelCall&, void* stream);
  int (*sum_products)(const SumCall&, void* stream);
  int (*sum_sums)(const SumCall&, bool moments, void* stream);
};
extern const Launches half, bfloat16, tf32, single;
extern const TrainingLaunches half_training, bfloat16_training, tf32_training, single_training;
const Launches& launches_of(Type type);
const TrainingLaunches& training_of(Type type);

// --- runtime.cu

int limits_of(int device, Limits* limits);
// Whether a device runs what was compiled, and the driver knows this runtime.
int try_device(int device);
int clear(void* memory, int64_t bytes, void* stream);
const char* error_text(int error);

}  // namespace mnv2_fused::cuda
