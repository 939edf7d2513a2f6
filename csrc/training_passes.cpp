// The passes of training over pixels, each an op of its own: checks and allocation. training_ops.cpp makes a block of
// them. `tf32` is for CUDA.
#include <tuple>

#include "tensors.h"

namespace mnv2_fused {
namespace {

// As weight_of, of the type that passes take.
Tensor passed(const Tensor& t, const char* name, const Tensor& x, const std::vector<int64_t>& shape) {
  const Tensor dense = weight_of(t, name, x, shape);
  return dense.scalar_type() == sum_type(x) ? dense : torch::stable::to(dense, sum_type(x));
}

// An expanding or plain block whose output is not asked about; checked as every plan is.
struct TrainingBlock {
  const Kernel* kernel;
  Layer layer;
  Tensor x;
  int64_t out_height, out_width;

  TrainingBlock(const Tensor& input, bool expand, int64_t hidden, int64_t out, int64_t stride, int64_t dilation,
                const std::vector<int64_t>& padding)
      : kernel(&select_kernel(dtype_of(input, "x"))) {
    STD_TORCH_CHECK(padding.size() == 4, "padding must be (left, right, top, bottom), got ", padding.size(),
                    " integers");
    STD_TORCH_CHECK(input.dim() == 4 && input.is_cpu(), "x must be [N, C, H, W] on the CPU, got ", shape_of(input));
    layer = block_layer(*kernel, input, expand, hidden, out, stride, dilation, padding);
    x = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
    out_height = out_extent(x.size(2), padding[2] + padding[3], stride, dilation);
    out_width = out_extent(x.size(3), padding[0] + padding[1], stride, dilation);
  }

  BlockPass pass() const {
    BlockPass p{};
    p.x = x.data_ptr();
    p.batch = x.size(0);
    return p;
  }
  // Into `results`, to which the pass points.
  void run(const BlockPass& pass, std::initializer_list<Tensor> results) const {
    if (pass.batch == 0) {
      for (Tensor t : results) torch::stable::zero_(t);
      return;
    }
    mnv2_fused::run(*kernel, layer, x.size(2), x.size(3), pass, thread_count(), on_torch_threads);
  }
};

// A narrow tensor as dense rows of pixels.
struct Rows {
  Tensor tensor;
  const Kernel* kernel;
  int64_t channels, pixels;

  Rows(const Tensor& x, const char* name)
      : tensor(x), kernel(&select_kernel(dtype_of(x, name))), channels(0), pixels(0) {
    STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu() && x.size(1) > 0, name, " must be [N, C, H, W] on the CPU, got ",
                    shape_of(x));
    tensor = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
    channels = x.size(1);
    pixels = x.numel() / channels;
  }
  Tensor like(const Tensor& other, const char* name) const {
    check_shape(other, name, tensor, {tensor.size(0), channels, tensor.size(2), tensor.size(3)});
    return torch::stable::contiguous(other, MemoryFormat::ChannelsLast);
  }
  const void* data() const { return tensor.data_ptr(); }
};

std::tuple<Tensor, Tensor> moments_of(const Tensor& input, bool) {
  STD_TORCH_CHECK(input.dim() == 4 && input.is_cpu() && input.size(1) > 0, "x must be [N, C, H, W] on the CPU, got ",
                  shape_of(input));
  const Kernel& kernel = select_kernel(dtype_of(input, "x"));
  const Tensor x = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const int64_t channels = x.size(1);
  const Tensor mean = doubles({channels}, x), products = doubles({channels, channels}, x);
  moments(kernel, x.data_ptr(), x.numel() / channels, channels, data_of(mean), data_of(products), thread_count(),
          on_torch_threads);
  return {mean, products};
}

std::tuple<Tensor, Tensor> filter_moments(const Tensor& x, const std::optional<Tensor>& expand_weight,
                                          const std::optional<Tensor>& expand_bias, const Tensor& depthwise_weight,
                                          int64_t stride, int64_t dilation, std::vector<int64_t> padding, bool) {
  const int64_t hidden = depthwise_weight.size(0);
  const TrainingBlock block(x, expand_weight.has_value(), hidden, 1, stride, dilation, padding);
  BlockPass pass = block.pass();
  std::optional<Tensor> weight, bias;
  if (expand_weight) {
    weight = passed(*expand_weight, "expand_weight", x, {hidden, x.size(1), 1, 1});
    bias = passed(expand_bias.value(), "expand_bias", x, {hidden});
    pass.expand_weight = weight->data_ptr();
    pass.expand_bias = bias->data_ptr();
  }
  const Tensor depthwise = passed(depthwise_weight, "depthwise_weight", x, {hidden, 1, 3, 3});
  pass.depthwise_weight = depthwise.data_ptr();
  const Tensor mean = doubles({hidden}, x), square = doubles({hidden}, x);
  pass.mean = data_of(mean);
  pass.square = data_of(square);
  block.run(pass, {mean, square});
  return {mean, square};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> block_gradients(
    const Tensor& dz, const Tensor& x, const std::optional<Tensor>& expand_weight,
    const std::optional<Tensor>& expand_bias, const Tensor& depthwise_weight, const Tensor& project_weight,
    const Tensor& coefficients, int64_t stride, int64_t dilation, std::vector<int64_t> padding, int64_t wanted, bool) {
  const int64_t in = x.size(1), hidden = depthwise_weight.size(0), out = project_weight.size(0);
  const TrainingBlock block(x, expand_weight.has_value(), hidden, out, stride, dilation, padding);
  check_shape(dz, "dz", x, {x.size(0), out, block.out_height, block.out_width});
  const Tensor gradient = torch::stable::contiguous(dz, MemoryFormat::ChannelsLast);
  BlockPass pass = block.pass();
  pass.dz = gradient.data_ptr();
  std::optional<Tensor> weight, bias;
  if (expand_weight) {
    weight = passed(*expand_weight, "expand_weight", x, {hidden, in, 1, 1});
    bias = passed(expand_bias.value(), "expand_bias", x, {hidden});
    pass.expand_weight = weight->data_ptr();
    pass.expand_bias = bias->data_ptr();
  }
  const Tensor depthwise = passed(depthwise_weight, "depthwise_weight", x, {hidden, 1, 3, 3});
  const Tensor project = passed(project_weight, "project_weight", x, {out, hidden, 1, 1});
  const Tensor dense = passed(coefficients, "coefficients", x, {6, hidden});
  pass.depthwise_weight = depthwise.data_ptr();
  pass.project_weight = project.data_ptr();
  pass.coefficients = dense.data_ptr();

  const auto want = [&](int64_t bit, int64_t rows) { return doubles({wanted & bit ? rows : 0, hidden}, x); };
  const Tensor dx = wanted & kDx ? new_tensor({x.size(0), in, x.size(2), x.size(3)}, x, MemoryFormat::ChannelsLast)
                                 : new_tensor({0}, x, MemoryFormat::Contiguous);
  const Tensor expand_gradient = want(expand_weight ? int64_t(kExpandGradient) : 0, in);
  const Tensor depthwise_gradient = want(kDepthwiseGradient, 9), project_gradient = want(kProjectGradient, out);
  const Tensor sums = doubles({4, hidden}, x);
  const auto target = [](const Tensor& t) { return t.numel() ? data_of(t) : nullptr; };
  pass.dx = wanted & kDx ? dx.data_ptr() : nullptr;
  pass.expand_gradient = target(expand_gradient);
  pass.depthwise_gradient = target(depthwise_gradient);
  pass.project_gradient = target(project_gradient);
  pass.sums = data_of(sums);
  pass.g_sums = wanted & (kProjectGradient | kSums);
  block.run(pass, {expand_gradient, depthwise_gradient, project_gradient, sums});
  return {dx, expand_gradient, depthwise_gradient, project_gradient, sums};
}

std::tuple<Tensor, Tensor> channel_moments_of(const Tensor& input) {
  const Rows x(input, "x");
  const Tensor mean = doubles({x.channels}, input), square = doubles({x.channels}, input);
  channel_moments(*x.kernel, x.data(), x.pixels, x.channels, data_of(mean), data_of(square), thread_count(),
                  on_torch_threads);
  return {mean, square};
}

Tensor channel_products_of(const Tensor& input, const Tensor& other, const Tensor& center,
                           const std::optional<Tensor>& gate) {
  const Rows a(input, "a");
  const Tensor b = a.like(other, "b"), dense = passed(center, "center", input, {a.channels});
  std::optional<Tensor> bounds;
  if (gate) bounds = passed(*gate, "gate", input, {2, a.channels});
  const Tensor sums = doubles({2, a.channels}, input);
  channel_products(*a.kernel, a.data(), b.data_ptr(), dense.data_ptr(), bounds ? bounds->data_ptr() : nullptr, a.pixels,
                   a.channels, data_of(sums), thread_count(), on_torch_threads);
  return sums;
}

Tensor affine_of(const Tensor& input, const std::optional<Tensor>& other, const Tensor& coefficients,
                 const std::optional<Tensor>& gate, bool relu6) {
  const Rows a(input, "a");
  STD_TORCH_CHECK(!gate || other, "a gate is over b, which is not given");
  STD_TORCH_CHECK(!relu6 || !other, "relu6 is of an affine map of a alone, without b");
  std::optional<Tensor> b, bounds;
  if (other) b = a.like(*other, "b");
  if (gate) bounds = passed(*gate, "gate", input, {2, a.channels});
  const Tensor dense = passed(coefficients, "coefficients", input, {3, a.channels});
  const Tensor y =
      new_tensor({input.size(0), a.channels, input.size(2), input.size(3)}, input, MemoryFormat::ChannelsLast);
  affine(*a.kernel, a.data(), b ? b->data_ptr() : nullptr, dense.data_ptr(), bounds ? bounds->data_ptr() : nullptr,
         relu6, y.data_ptr(), a.pixels, a.channels, thread_count(), on_torch_threads);
  return y;
}

void matrix_add_to(Tensor y, const Tensor& input, const Tensor& matrix, const Tensor& bias,
                   const std::optional<Tensor>& residual, bool) {
  const Rows x(input, "x");
  STD_TORCH_CHECK(x.like(y, "y").data_ptr() == y.data_ptr(), "y must be dense in channels_last");
  std::optional<Tensor> r;
  if (residual) r = x.like(*residual, "residual");
  const Tensor dense = passed(matrix, "matrix", input, {x.channels, x.channels});
  const Tensor constant = passed(bias, "bias", input, {x.channels});
  matrix_add(*x.kernel, x.data(), dense.data_ptr(), constant.data_ptr(), r ? r->data_ptr() : nullptr, y.data_ptr(),
             x.pixels, x.channels, thread_count(), on_torch_threads);
}

}  // namespace
}  // namespace mnv2_fused

STABLE_TORCH_LIBRARY_FRAGMENT(mnv2_fused, m) { MNV2_DEFINE_PASSES(m); }

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("moments", TORCH_BOX(&mnv2_fused::moments_of));
  m.impl("filter_moments", TORCH_BOX(&mnv2_fused::filter_moments));
  m.impl("channel_moments", TORCH_BOX(&mnv2_fused::channel_moments_of));
  m.impl("channel_products", TORCH_BOX(&mnv2_fused::channel_products_of));
  m.impl("affine", TORCH_BOX(&mnv2_fused::affine_of));
  m.impl("matrix_add_", TORCH_BOX(&mnv2_fused::matrix_add_to));
  m.impl("block_gradients", TORCH_BOX(&mnv2_fused::block_gradients));
}
