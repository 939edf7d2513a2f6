// From a plan to a result: packing the weights, resolving the schedule for an image size, running it on threads.
// Plain C++ that knows no ISA and no torch; the kernels it calls are rows of the table in dispatch.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../inverted_residual.h"

namespace mnv2_fused {

constexpr int64_t kLine = 16;  // slots of 32 bits of a cache line, at which an int8 row's weights and memory begin

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t out_extent(int64_t in, int64_t pad, int64_t stride, int64_t dilation) {
  const int64_t room = in + pad - 2 * dilation - 1;
  return room < 0 ? 0 : room / stride + 1;
}

// --- dispatch.cpp

// The rows of the table, best first.
const std::vector<const Kernel*>& kernels();
// "" when this CPU can run the row, else why not.
std::string why_unsupported(const Kernel& kernel);
// The row that serves a dtype: the best supported, or the one that MNV2_FUSED_KERNEL names. Throws
// std::invalid_argument when the override is impossible.
const Kernel& select_kernel(Dtype dtype);
// Bytes of an element of activations, and of what their products are added up in.
int64_t element_size(Dtype dtype);
int64_t sum_size(Dtype dtype);
std::vector<std::pair<std::string, bool>> cpu_features();
const char* dtype_name(Dtype dtype);

// --- pack.cpp

// Elements of a layer's weight, bias, weight, bias, ... as PyTorch has them, and of all of them packed.
std::vector<int64_t> weight_sizes(const Layer& layer);
int64_t packed_size(const Layer& layer, const Tiles& tiles);
// `weights` points to each of them in that order, of the dtype that sums have.
void pack(const Layer& layer, const Tiles& tiles, Dtype dtype, const void* const* weights, void* packed);

// The same of an int8 row: bytes of a layer as they come in, weights [n][k], biases and multipliers of each convolution
// and the constants, one after the other; slots of them packed; and from the one to the other.
int64_t byte_size_s8(const Layer& layer);
int64_t packed_size_s8(const Layer& layer, const Tiles& tiles);
void pack_s8(const Layer& layer, const Tiles& tiles, const uint8_t* bytes, uint32_t* packed);

// One matrix [n][k], or where transposed [k][n], as a 1x1 convolution k -> n is packed; and depthwise taps
// [channels][9].
void pack_matrix(const Tiles& tiles, Dtype dtype, const void* w, int64_t n, int64_t k, bool transposed, void* packed);
void pack_depthwise(const Tiles& tiles, Dtype dtype, const void* w, int64_t channels, void* packed);

// --- schedule.cpp

struct Program {
  const Kernel* kernel;
  std::vector<Step> steps;
  std::vector<int> last_layer;                      // of the plan's, that each step computes
  std::vector<std::vector<int32_t>> pixel_offsets;  // what the steps point to
  int64_t image_size;                               // elements of an image at the input
  int64_t map_channels;                             // a pixel's are a multiple of them
  int64_t out_channels, out_height, out_width;      // of the result; 1 x 1 once pooled
  bool flat;                                        // the result is [N, out_channels]
  int64_t activation_size, features;                // in elements
  int64_t scratch_size, partial_size, zeros_size;   // in elements of sums

  int64_t map_size() const { return round_up(out_channels, map_channels) * out_height * out_width; }
  // Bytes of an element of what comes in and what goes out. An int8 row takes an image and gives means or logits in
  // float32; between them there are bytes.
  int64_t x_element() const { return bytes() && steps[0].image_channels ? 4 : element_size(kernel->dtype); }
  int64_t y_element() const { return bytes() && flat ? 4 : element_size(kernel->dtype); }
  bool bytes() const { return kernel->dtype == Dtype::kInt8; }
};

// Of each pixel of a ring of rows, row-major, in elements; tile_m entries wrap around.
std::vector<int32_t> pixel_offsets(int64_t rows, int64_t row_length, int64_t left, int64_t width, const Tiles& tiles);
// The program's out_height is 0 where some layer's output would be empty. Throws std::length_error for sizes beyond
// what the kernels count in 32 bits.
Program schedule(const Kernel& kernel, const std::vector<Layer>& layers, int64_t height, int64_t width);

// How threads share a step of one image: each has one of `slices`. Of a dense 3x3 that is a run of output rows, of a
// 1x1 a run of panels of output channels. The rows that a block's groups make are put one group after the other, as
// wide as the group has panels, and cut into equal parts: a slice is some rows of one group or of several, here of one
// and maybe none. Only where two slices meet within a group are the rows of h that both read computed twice.
struct Slice {
  int begin, end;
};
Slice slice_of(const Step& step, const Tiles& tiles, int group, int slice, int slices);

// --- network.cpp

struct Call {
  const void* packed;
  const void* x;  // NHWC images, or where the first layer is a dense 3x3 anything with these strides
  int64_t batch, stride_batch;
  Image image;  // strides of x
  void* y;
  double* seconds;  // that the first worker takes for each step, added to; null where they are not asked for
};

// parallel(n, body, context) runs body(begin, end, context) over [0, n) on the caller's thread pool.
using Parallel = void (*)(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);

void run(const Program& program, const Call& call, int threads, Parallel parallel);

// --- training.cpp

// A pass over a batch for one block. Tensors are dense; weights as PyTorch has them, e's BatchNorm folded in. Results
// that are null are not computed. Here and below activations are of the kernel's dtype; weights, coefficients and what
// else is beside them of what it adds up in, to be rounded while they are packed.
struct BlockPass {
  const void *x, *dz;  // NHWC
  int64_t batch;
  const void *expand_weight, *expand_bias;  // null where the block has no expansion
  const void *depthwise_weight, *project_weight;
  const void* coefficients;  // [6][hidden_channels], see TrainingPass; null without dz
  double *mean, *square;     // [hidden_channels], of d: mean and sum of squared deviations
  double* sums;              // [4][hidden_channels], see TrainingPass
  bool g_sums;               // the first two are asked for, as the projection's gradient asks for them
  double *expand_gradient, *depthwise_gradient, *project_gradient;  // [in], [9], [out] rows of [hidden_channels]
  void* dx;                                                         // NHWC
};

void run(const Kernel& kernel, const Layer& layer, int64_t height, int64_t width, const BlockPass& pass, int threads,
         Parallel parallel);
// Mean [channels] and sums of products of deviations [channels][channels] over `pixels` pixels of an NHWC tensor.
void moments(const Kernel& kernel, const void* x, int64_t pixels, int64_t channels, double* mean, double* products,
             int threads, Parallel parallel);

// Of the covariance [channels][channels] of x and the weights [hidden][channels] of an expansion: covariance . weight^T
// [channels][hidden], and what they make of each hidden channel, diag(weight . covariance . weight^T). Either may be
// null.
void covariance_times(const Kernel& kernel, const double* covariance, const void* weight, int64_t channels,
                      int64_t hidden, double* product, double* variance, int threads, Parallel parallel);
// weight^T . diag(q) . weight [channels][channels], of a weight [hidden][channels]; rounded to the kernel's dtype, as
// matrix_add will have it.
void gram(const Kernel& kernel, const void* weight, const void* q, int64_t channels, int64_t hidden, void* result,
          int threads, Parallel parallel);

// Kernel's functions over narrow tensors, on threads; results are the same at the same number of threads.
void channel_moments(const Kernel& kernel, const void* x, int64_t pixels, int64_t channels, double* mean,
                     double* square, int threads, Parallel parallel);
void channel_products(const Kernel& kernel, const void* a, const void* b, const void* center, const void* gate,
                      int64_t pixels, int64_t channels, double* sums, int threads, Parallel parallel);
void affine(const Kernel& kernel, const void* a, const void* b, const void* coefficients, const void* gate, bool relu6,
            void* y, int64_t pixels, int64_t channels, int threads, Parallel parallel);
// `matrix` [out channel][in channel] as PyTorch has a 1x1 convolution's weight.
void matrix_add(const Kernel& kernel, const void* x, const void* matrix, const void* bias, const void* residual,
                void* y, int64_t pixels, int64_t channels, int threads, Parallel parallel);

}  // namespace mnv2_fused
