// The torch-facing side, and the only one: schemas, checks, allocation, torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/network.h"

namespace mnv2_fused {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << "]";
  return out.str();
}

Dtype dtype_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name,
                  " must be float32 or float64; these kernels compute in no other dtype");
  return type == ScalarType::Float ? Dtype::kFloat32 : Dtype::kFloat64;
}

void check_shape(const Tensor& t, const char* name, const Tensor& x, const std::vector<int64_t>& expected) {
  bool fits = t.dim() == int64_t(expected.size());
  for (size_t i = 0; fits && i < expected.size(); ++i) fits = t.size(i) == expected[i];
  if (!fits) {
    std::ostringstream shape;
    for (size_t i = 0; i < expected.size(); ++i) shape << (i ? ", " : "") << expected[i];
    STD_TORCH_CHECK(false, name, " must have shape [", shape.str(), "], got ", shape_of(t));
  }
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the device of x");
}

// A dense copy where the tensor is not dense, in the order in which its weights are packed.
Tensor weight_of(const Tensor& t, const char* name, const Tensor& x, const std::vector<int64_t>& expected) {
  check_shape(t, name, x, expected);
  return torch::stable::contiguous(t);
}

struct Plan {
  const Kernel* kernel;
  std::vector<Layer> layers;

  int64_t packed_size() const {
    int64_t size = 0;
    for (const Layer& layer : layers) size += mnv2_fused::packed_size(layer, kernel->tiles);
    return size;
  }
};

Plan parse(const std::vector<int64_t>& plan) {
  const int64_t fields = Layer::kFields, count = int64_t(plan.size()) - 1;
  STD_TORCH_CHECK(count >= fields && count % fields == 0, "plan must be a kernel's index and ", fields,
                  " integers for each layer, got ", plan.size(), " integers");
  STD_TORCH_CHECK(plan[0] >= 0 && plan[0] < int64_t(kernels().size()), "plan names kernel ", plan[0], " of ",
                  kernels().size());
  STD_TORCH_CHECK(count / fields <= 4096, "plan has ", count / fields, " layers, at most 4096 are allowed");
  Plan parsed{kernels()[plan[0]], {}};
  const std::string reason = why_unsupported(*parsed.kernel);
  STD_TORCH_CHECK(reason.empty(), parsed.kernel->name, " cannot run: ", reason);
  int64_t channels = -1;
  bool pooled = false;
  for (int64_t at = 1; at < int64_t(plan.size()); at += fields) {
    const int64_t* f = &plan[at];
    const Layer l = {f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8], f[9], f[10], f[11], f[12]};
    const int64_t index = (at - 1) / fields;
    const auto check = [&](bool ok, const char* what) { STD_TORCH_CHECK(ok, "layer ", index, " of the plan: ", what); };
    const auto size = [](int64_t n) { return n >= 1 && n <= (1 << 20); };
    const auto pad = [](int64_t n) { return n >= 0 && n <= (1 << 20); };
    check(l.kind >= Layer::kConv3x3 && l.kind <= Layer::kLinear, "unknown kind");
    check(size(l.in_channels) && size(l.out_channels), "channels must be 1 to 2^20");
    check(channels < 0 || l.in_channels == channels, "in_channels differ from the layer before");
    check(l.kind != Layer::kConv3x3 || index == 0, "a dense 3x3 must be the first layer");
    check(l.kind != Layer::kLinear || (pooled && at + fields == int64_t(plan.size())),
          "a linear layer must follow the pooling and be the last");
    check(!pooled || l.kind == Layer::kLinear, "only a linear layer may follow the pooling");
    check(l.kind != Layer::kPool || l.in_channels == l.out_channels, "pooling keeps the channels");
    if (l.kind == Layer::kBlock || l.kind == Layer::kConv3x3) {
      check(l.stride == 1 || l.stride == 2, "stride must be 1 or 2");
      check(size(l.dilation) && (l.kind == Layer::kBlock || l.dilation == 1),
            "dilation must be 1 to 2^20, and 1 of a dense 3x3");
      check(pad(l.pad_left) && pad(l.pad_right) && pad(l.pad_top) && pad(l.pad_bottom), "padding must be 0 to 2^20");
    }
    if (l.kind == Layer::kBlock) {
      check(size(l.hidden_channels), "hidden_channels must be 1 to 2^20");
      check(l.expand || l.hidden_channels == l.in_channels, "without expansion hidden_channels are in_channels");
      check(!l.residual || (l.stride == 1 && l.in_channels == l.out_channels &&
                            l.pad_left + l.pad_right == 2 * l.dilation && l.pad_top + l.pad_bottom == 2 * l.dilation),
            "a residual needs an output of the input's shape");
    }
    pooled = l.kind == Layer::kPool;
    channels = l.out_channels;
    parsed.layers.push_back(l);
  }
  return parsed;
}

Tensor new_tensor(const std::vector<int64_t>& shape, const Tensor& like, MemoryFormat format) {
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

// A plan and its schedule for one image size. The last few are kept: to make them anew takes 20 us a call.
struct Prepared {
  std::vector<int64_t> integers;
  int64_t height, width;
  Plan plan;
  Program program;
};

std::shared_ptr<const Prepared> prepare(const std::vector<int64_t>& integers, const Tensor& x) {
  static std::mutex mutex;
  static std::deque<std::shared_ptr<const Prepared>> recent;
  constexpr size_t kKept = 16;
  STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W], got ", shape_of(x));
  const int64_t height = x.size(2), width = x.size(3);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& p : recent) {
      if (p->height == height && p->width == width && p->integers == integers) return p;
    }
  }
  Plan plan = parse(integers);
  STD_TORCH_CHECK(height > 0 && width > 0 && height < (1 << 30) && width < (1 << 30),
                  "x must have a height and a width of at least 1, got ", shape_of(x));
  Program program = schedule(*plan.kernel, plan.layers, height, width);
  STD_TORCH_CHECK(program.out_height > 0 && program.out_width > 0, "x of shape ", shape_of(x),
                  " is smaller than the dilated 3x3 kernel with this padding: the output would be empty");
  const auto made =
      std::make_shared<const Prepared>(Prepared{integers, height, width, std::move(plan), std::move(program)});
  const std::lock_guard<std::mutex> lock(mutex);
  recent.push_front(made);
  if (recent.size() > kKept) recent.pop_back();
  return made;
}

void on_torch_threads(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

Tensor execute(const Prepared& prepared, const Tensor& input, const void* packed) {
  const Plan& plan = prepared.plan;
  const Program& program = prepared.program;
  STD_TORCH_CHECK(input.size(1) == plan.layers[0].in_channels, "x must have ", plan.layers[0].in_channels,
                  " channels, got ", shape_of(input));
  STD_TORCH_CHECK(dtype_of(input, "x") == plan.kernel->dtype, "x must be ", dtype_name(plan.kernel->dtype), ", which ",
                  plan.kernel->name, " computes in");
  const bool any_strides = plan.layers[0].kind == Layer::kConv3x3;
  const Tensor x = any_strides ? input : torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const Tensor y = program.flat ? new_tensor({x.size(0), program.out_channels}, x, MemoryFormat::Contiguous)
                                : new_tensor({x.size(0), program.out_channels, program.out_height, program.out_width},
                                             x, MemoryFormat::ChannelsLast);
  if (x.size(0) == 0) return y;
  Call call{};
  call.packed = packed;
  call.x = x.data_ptr();
  call.batch = x.size(0);
  call.stride_batch = any_strides ? x.stride(0) : program.image_size;
  call.image = {nullptr, x.stride(1), x.stride(2), x.stride(3)};
  call.y = y.data_ptr();
  run(program, call, int(torch::stable::get_num_threads()), on_torch_threads);
  return y;
}

Tensor pack_plan(const Tensor& weights, std::vector<int64_t> integers) {
  const Plan plan = parse(integers);
  STD_TORCH_CHECK(weights.dim() == 1 && weights.is_cpu() && weights.is_contiguous(),
                  "weights must be one dense row on the CPU, got ", shape_of(weights));
  STD_TORCH_CHECK(dtype_of(weights, "weights") == plan.kernel->dtype, "weights must be ",
                  dtype_name(plan.kernel->dtype));
  const int64_t element = int64_t(weights.element_size());
  int64_t size = 0;
  for (const Layer& layer : plan.layers) {
    for (const int64_t n : weight_sizes(layer)) size += n;
  }
  STD_TORCH_CHECK(weights.numel() == size, "weights must have ", size, " elements for this plan, got ",
                  weights.numel());
  const int64_t packed_size = plan.packed_size();
  const Tensor packed = new_tensor({packed_size}, weights, MemoryFormat::Contiguous);
  const char* from = static_cast<const char*>(weights.data_ptr());
  char* to = static_cast<char*>(packed.data_ptr());
  advise_huge_pages(to, size_t(packed_size * element));
  for (const Layer& layer : plan.layers) {
    std::vector<const void*> pointers;
    for (const int64_t n : weight_sizes(layer)) {
      pointers.push_back(from);
      from += n * element;
    }
    pack(layer, plan.kernel->tiles, plan.kernel->dtype, pointers.data(), to);
    to += mnv2_fused::packed_size(layer, plan.kernel->tiles) * element;
  }
  return packed;
}

Tensor network(const Tensor& x, const Tensor& packed, std::vector<int64_t> integers) {
  const auto prepared = prepare(integers, x);
  const Plan& plan = prepared->plan;
  const int64_t size = plan.packed_size();
  STD_TORCH_CHECK(packed.dim() == 1 && packed.numel() == size && packed.is_contiguous() && packed.is_cpu() &&
                      dtype_of(packed, "packed") == plan.kernel->dtype,
                  "packed must be what mnv2_fused::pack returned for this plan: ", size, " elements of ",
                  dtype_name(plan.kernel->dtype));
  return execute(*prepared, x, packed.data_ptr());
}

Tensor inverted_residual(const Tensor& x, const std::optional<Tensor>& expand_weight,
                         const std::optional<Tensor>& expand_bias, const Tensor& depthwise_weight,
                         const Tensor& depthwise_bias, const Tensor& project_weight, const Tensor& project_bias,
                         int64_t stride, int64_t dilation, std::vector<int64_t> padding, bool residual,
                         bool project_relu6) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W], got ", shape_of(x));
  STD_TORCH_CHECK(padding.size() == 4, "padding must be (left, right, top, bottom), got ", padding.size(), " integers");
  STD_TORCH_CHECK(expand_weight.has_value() == expand_bias.has_value(),
                  "expand_weight and expand_bias go together: give both or neither");
  STD_TORCH_CHECK(depthwise_weight.dim() == 4 && project_weight.dim() == 4,
                  "depthwise_weight and project_weight must have 4 dimensions");
  const int64_t in = x.size(1), hidden = depthwise_weight.size(0), out = project_weight.size(0);
  std::vector<Tensor> weights;
  if (expand_weight) {
    weights.push_back(weight_of(*expand_weight, "expand_weight", x, {hidden, in, 1, 1}));
    weights.push_back(weight_of(*expand_bias, "expand_bias", x, {hidden}));
  }
  weights.push_back(weight_of(depthwise_weight, "depthwise_weight", x, {hidden, 1, 3, 3}));
  weights.push_back(weight_of(depthwise_bias, "depthwise_bias", x, {hidden}));
  weights.push_back(weight_of(project_weight, "project_weight", x, {out, hidden, 1, 1}));
  weights.push_back(weight_of(project_bias, "project_bias", x, {out}));

  const Dtype dtype = dtype_of(x, "x");
  const Kernel& kernel = select_kernel(dtype);
  int64_t index = 0;
  while (kernels()[index] != &kernel) ++index;
  const auto prepared = prepare({index, Layer::kBlock, in, hidden, out, stride, dilation, padding[0], padding[1],
                                 padding[2], padding[3], expand_weight.has_value(), residual, project_relu6},
                                x);
  const Layer& layer = prepared->plan.layers[0];
  const Tensor packed = new_tensor({packed_size(layer, kernel.tiles)}, x, MemoryFormat::Contiguous);
  std::vector<const void*> pointers;
  for (const Tensor& weight : weights) pointers.push_back(weight.data_ptr());
  pack(layer, kernel.tiles, dtype, pointers.data(), packed.data_ptr());
  return execute(*prepared, x, packed.data_ptr());
}

// --------------------------------------------------------------------------------------------------- training

Tensor doubles(const std::vector<int64_t>& shape, const Tensor& like) {
  return torch::stable::empty(shape, ScalarType::Double, std::nullopt, like.device(), std::nullopt, std::nullopt);
}

double* data_of(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

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
    int64_t index = 0;
    while (kernels()[index] != kernel) ++index;
    layer = prepare({index, Layer::kBlock, input.size(1), hidden, out, stride, dilation, padding[0], padding[1],
                     padding[2], padding[3], expand, 0, 0},
                    input)
                ->plan.layers[0];
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
    mnv2_fused::run(*kernel, layer, x.size(2), x.size(3), pass, int(torch::stable::get_num_threads()),
                    on_torch_threads);
  }
};

std::tuple<Tensor, Tensor> moments_of(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 4 && input.is_cpu() && input.size(1) > 0, "x must be [N, C, H, W] on the CPU, got ",
                  shape_of(input));
  const Kernel& kernel = select_kernel(dtype_of(input, "x"));
  const Tensor x = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const int64_t channels = x.size(1);
  const Tensor mean = doubles({channels}, x), products = doubles({channels, channels}, x);
  moments(kernel, x.data_ptr(), x.numel() / channels, channels, data_of(mean), data_of(products),
          int(torch::stable::get_num_threads()), on_torch_threads);
  return {mean, products};
}

std::tuple<Tensor, Tensor> filter_moments(const Tensor& x, const std::optional<Tensor>& expand_weight,
                                          const std::optional<Tensor>& expand_bias, const Tensor& depthwise_weight,
                                          int64_t stride, int64_t dilation, std::vector<int64_t> padding) {
  const int64_t hidden = depthwise_weight.size(0);
  const TrainingBlock block(x, expand_weight.has_value(), hidden, 1, stride, dilation, padding);
  BlockPass pass = block.pass();
  std::optional<Tensor> weight, bias;
  if (expand_weight) {
    weight = weight_of(*expand_weight, "expand_weight", x, {hidden, x.size(1), 1, 1});
    bias = weight_of(expand_bias.value(), "expand_bias", x, {hidden});
    pass.expand_weight = weight->data_ptr();
    pass.expand_bias = bias->data_ptr();
  }
  const Tensor depthwise = weight_of(depthwise_weight, "depthwise_weight", x, {hidden, 1, 3, 3});
  pass.depthwise_weight = depthwise.data_ptr();
  const Tensor mean = doubles({hidden}, x), square = doubles({hidden}, x);
  pass.mean = data_of(mean);
  pass.square = data_of(square);
  block.run(pass, {mean, square});
  return {mean, square};
}

// What of the results is wanted: bits, in their order.
enum Wanted : int64_t { kDx = 1, kExpandGradient = 2, kDepthwiseGradient = 4, kProjectGradient = 8 };

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> block_gradients(
    const Tensor& dz, const Tensor& x, const std::optional<Tensor>& expand_weight,
    const std::optional<Tensor>& expand_bias, const Tensor& depthwise_weight, const Tensor& project_weight,
    const Tensor& coefficients, int64_t stride, int64_t dilation, std::vector<int64_t> padding, int64_t wanted) {
  const int64_t in = x.size(1), hidden = depthwise_weight.size(0), out = project_weight.size(0);
  const TrainingBlock block(x, expand_weight.has_value(), hidden, out, stride, dilation, padding);
  check_shape(dz, "dz", x, {x.size(0), out, block.out_height, block.out_width});
  const Tensor gradient = torch::stable::contiguous(dz, MemoryFormat::ChannelsLast);
  BlockPass pass = block.pass();
  pass.dz = gradient.data_ptr();
  std::optional<Tensor> weight, bias;
  if (expand_weight) {
    weight = weight_of(*expand_weight, "expand_weight", x, {hidden, in, 1, 1});
    bias = weight_of(expand_bias.value(), "expand_bias", x, {hidden});
    pass.expand_weight = weight->data_ptr();
    pass.expand_bias = bias->data_ptr();
  }
  const Tensor depthwise = weight_of(depthwise_weight, "depthwise_weight", x, {hidden, 1, 3, 3});
  const Tensor project = weight_of(project_weight, "project_weight", x, {out, hidden, 1, 1});
  const Tensor dense = weight_of(coefficients, "coefficients", x, {6, hidden});
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
  block.run(pass, {expand_gradient, depthwise_gradient, project_gradient, sums});
  return {dx, expand_gradient, depthwise_gradient, project_gradient, sums};
}

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

int thread_count() { return int(torch::stable::get_num_threads()); }

std::tuple<Tensor, Tensor> channel_moments_of(const Tensor& input) {
  const Rows x(input, "x");
  const Tensor mean = doubles({x.channels}, input), square = doubles({x.channels}, input);
  channel_moments(*x.kernel, x.data(), x.pixels, x.channels, data_of(mean), data_of(square), thread_count(),
                  on_torch_threads);
  return {mean, square};
}

Tensor channel_products_of(const Tensor& input, const Tensor& other, const Tensor& center) {
  const Rows a(input, "a");
  const Tensor b = a.like(other, "b"), dense = weight_of(center, "center", input, {a.channels});
  const Tensor sums = doubles({2, a.channels}, input);
  channel_products(*a.kernel, a.data(), b.data_ptr(), dense.data_ptr(), a.pixels, a.channels, data_of(sums),
                   thread_count(), on_torch_threads);
  return sums;
}

Tensor affine_of(const Tensor& input, const std::optional<Tensor>& other, const Tensor& coefficients) {
  const Rows a(input, "a");
  std::optional<Tensor> b;
  if (other) b = a.like(*other, "b");
  const Tensor dense = weight_of(coefficients, "coefficients", input, {3, a.channels});
  const Tensor y =
      new_tensor({input.size(0), a.channels, input.size(2), input.size(3)}, input, MemoryFormat::ChannelsLast);
  affine(*a.kernel, a.data(), b ? b->data_ptr() : nullptr, dense.data_ptr(), y.data_ptr(), a.pixels, a.channels,
         thread_count(), on_torch_threads);
  return y;
}

void matrix_add_to(Tensor y, const Tensor& input, const Tensor& matrix, const Tensor& bias,
                   const std::optional<Tensor>& residual) {
  const Rows x(input, "x");
  STD_TORCH_CHECK(x.like(y, "y").data_ptr() == y.data_ptr(), "y must be dense in channels_last");
  std::optional<Tensor> r;
  if (residual) r = x.like(*residual, "residual");
  const Tensor dense = weight_of(matrix, "matrix", input, {x.channels, x.channels});
  const Tensor constant = weight_of(bias, "bias", input, {x.channels});
  matrix_add(*x.kernel, x.data(), dense.data_ptr(), constant.data_ptr(), r ? r->data_ptr() : nullptr, y.data_ptr(),
             x.pixels, x.channels, thread_count(), on_torch_threads);
}

}  // namespace
}  // namespace mnv2_fused

STABLE_TORCH_LIBRARY(mnv2_fused, m) {
  m.def(
      "inverted_residual(Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, "
      "Tensor depthwise_bias, Tensor project_weight, Tensor project_bias, int stride, int dilation, int[] padding, "
      "bool residual, bool project_relu6) -> Tensor");
  m.def("pack(Tensor weights, int[] plan) -> Tensor");
  m.def("network(Tensor x, Tensor packed, int[] plan) -> Tensor");
  m.def("moments(Tensor x) -> (Tensor, Tensor)");
  m.def("channel_moments(Tensor x) -> (Tensor, Tensor)");
  m.def("channel_products(Tensor a, Tensor b, Tensor center) -> Tensor");
  m.def("affine(Tensor a, Tensor? b, Tensor coefficients) -> Tensor");
  m.def("matrix_add_(Tensor(a!) y, Tensor x, Tensor matrix, Tensor bias, Tensor? residual) -> ()");
  m.def(
      "filter_moments(Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, int stride, "
      "int dilation, int[] padding) -> (Tensor, Tensor)");
  m.def(
      "block_gradients(Tensor dz, Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, "
      "Tensor project_weight, Tensor coefficients, int stride, int dilation, int[] padding, int wanted) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("inverted_residual", TORCH_BOX(&mnv2_fused::inverted_residual));
  m.impl("pack", TORCH_BOX(&mnv2_fused::pack_plan));
  m.impl("network", TORCH_BOX(&mnv2_fused::network));
  m.impl("moments", TORCH_BOX(&mnv2_fused::moments_of));
  m.impl("filter_moments", TORCH_BOX(&mnv2_fused::filter_moments));
  m.impl("channel_moments", TORCH_BOX(&mnv2_fused::channel_moments_of));
  m.impl("channel_products", TORCH_BOX(&mnv2_fused::channel_products_of));
  m.impl("affine", TORCH_BOX(&mnv2_fused::affine_of));
  m.impl("matrix_add_", TORCH_BOX(&mnv2_fused::matrix_add_to));
  m.impl("block_gradients", TORCH_BOX(&mnv2_fused::block_gradients));
}
