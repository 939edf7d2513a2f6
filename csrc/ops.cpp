// The ops of inference on the CPU: schemas, plans and their checks.
#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>

#include "direct.h"
#include "plan.h"

namespace mnv2_fused {
namespace {

struct Plan {
  const Kernel* kernel;
  std::vector<Layer> layers;

  int64_t packed_size() const {
    int64_t size = 0;
    for (const Layer& layer : layers) {
      size += int8() ? 4 * packed_size_s8(layer, kernel->tiles) : mnv2_fused::packed_size(layer, kernel->tiles);
    }
    return size;
  }
  // Its weights, packed or not, are bytes.
  bool int8() const { return kernel->dtype == Dtype::kInt8; }
};

Plan parse(const std::string& plan) {
  std::string name;
  Plan parsed{nullptr, parse_layers(plan, &name)};
  for (const Kernel* kernel : kernels()) {
    if (name == kernel->name) parsed.kernel = kernel;
  }
  STD_TORCH_CHECK(parsed.kernel, "plan names the kernel ", name, ", of which there is none");
  const std::string reason = why_unsupported(*parsed.kernel);
  STD_TORCH_CHECK(reason.empty(), parsed.kernel->name, " cannot run: ", reason);
  return parsed;
}

// A plan and its schedule for one image size. The last few are kept: to make them anew takes 20 us a call.
struct Prepared {
  std::string text;
  int64_t height, width;
  Plan plan;
  Program program;
};

std::shared_ptr<const Prepared> prepare(const std::string& text, const Tensor& x) {
  static std::mutex mutex;
  static std::deque<std::shared_ptr<const Prepared>> recent;
  constexpr size_t kKept = 16;
  STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W], got ", shape_of(x));
  const int64_t height = x.size(2), width = x.size(3);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& p : recent) {
      if (p->height == height && p->width == width && p->text == text) return p;
    }
  }
  Plan plan = parse(text);
  STD_TORCH_CHECK(height > 0 && width > 0 && height < (1 << 30) && width < (1 << 30),
                  "x must have a height and a width of at least 1, got ", shape_of(x));
  Program program = schedule(*plan.kernel, plan.layers, height, width);
  STD_TORCH_CHECK(program.out_height > 0 && program.out_width > 0, "x of shape ", shape_of(x),
                  " is smaller than the dilated 3x3 kernel with this padding: the output would be empty");
  const auto made =
      std::make_shared<const Prepared>(Prepared{text, height, width, std::move(plan), std::move(program)});
  const std::lock_guard<std::mutex> lock(mutex);
  recent.push_front(made);
  if (recent.size() > kKept) recent.pop_back();
  return made;
}

// Bytes between a tensor in channels_last and maps whose pixels begin at slots.
void copy_pixels(const Tensor& from, int64_t from_channels, const Tensor& to, int64_t to_channels, int64_t pixels) {
  const auto* a = static_cast<const uint8_t*>(from.data_ptr());
  auto* b = static_cast<uint8_t*>(to.data_ptr());
  const size_t count = size_t(std::min(from_channels, to_channels));
  for (int64_t i = 0; i < pixels; ++i) std::memcpy(b + i * to_channels, a + i * from_channels, count);
}

// A plan of int8: images to logits or means in float32, or where it begins or ends between them from or to bytes.
Tensor execute_s8(const Prepared& prepared, const Tensor& input, const void* packed, double* seconds) {
  const Program& program = prepared.program;
  const bool image = program.x_element() == 4, map = program.y_element() == 1;
  STD_TORCH_CHECK(input.scalar_type() == (image ? ScalarType::Float : ScalarType::Byte), "x must be ",
                  image ? "float32, an image" : "uint8, as the first layer is no 3x3 over an image");
  const int64_t batch = input.size(0), channels = input.size(1), pixels = batch * prepared.height * prepared.width;
  Tensor x = input;
  if (!image) {
    const Tensor dense = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
    const int64_t padded = round_up(channels, program.map_channels);
    x = torch::stable::empty({pixels, padded}, ScalarType::Byte);
    copy_pixels(dense, channels, x, padded, pixels);
  }
  Tensor y = program.flat
                 ? new_tensor({batch, program.out_channels}, input, MemoryFormat::Contiguous, ScalarType::Float)
                 : torch::stable::empty({batch, program.map_size()}, ScalarType::Byte);
  if (batch > 0) {
    Call call{};
    call.packed = packed;
    call.x = x.data_ptr();
    call.batch = batch;
    call.stride_batch = image ? x.stride(0) : program.image_size;
    if (image) call.image = {nullptr, x.stride(1), x.stride(2), x.stride(3)};
    call.y = y.data_ptr();
    call.seconds = seconds;
    run(program, call, int(torch::stable::get_num_threads()), on_torch_threads);
  }
  if (!map) return y;
  const int64_t out_pixels = batch * program.out_height * program.out_width;
  const Tensor result =
      torch::stable::empty({batch, program.out_channels, program.out_height, program.out_width}, ScalarType::Byte,
                           std::nullopt, std::nullopt, std::nullopt, MemoryFormat::ChannelsLast);
  copy_pixels(y, round_up(program.out_channels, program.map_channels), result, program.out_channels, out_pixels);
  return result;
}

Tensor execute(const Prepared& prepared, const Tensor& input, const void* packed, double* seconds = nullptr) {
  const Plan& plan = prepared.plan;
  const Program& program = prepared.program;
  STD_TORCH_CHECK(input.size(1) == plan.layers[0].in_channels, "x must have ", plan.layers[0].in_channels,
                  " channels, got ", shape_of(input));
  if (plan.int8()) return execute_s8(prepared, input, packed, seconds);
  const bool any_strides = plan.layers[0].kind == Layer::kConv3x3;
  const Dtype dtype = plan.kernel->dtype, given = dtype_of(input, "x");
  // Under autocast the image is float32: it is rounded as the 3x3 reads it.
  const bool wide = any_strides && dtype == Dtype::kBFloat16 && given == Dtype::kFloat32;
  STD_TORCH_CHECK(wide || given == dtype, "x must be ", dtype_name(dtype), ", which ", plan.kernel->name,
                  " computes in", dtype == Dtype::kBFloat16 ? ", or an image in float32" : "");
  const ScalarType type = wide ? ScalarType::BFloat16 : input.scalar_type();
  const Tensor x = any_strides ? input : torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const Tensor y = program.flat ? new_tensor({x.size(0), program.out_channels}, x, MemoryFormat::Contiguous, type)
                                : new_tensor({x.size(0), program.out_channels, program.out_height, program.out_width},
                                             x, MemoryFormat::ChannelsLast, type);
  if (x.size(0) == 0) return y;
  Call call{};
  call.packed = packed;
  call.x = x.data_ptr();
  call.batch = x.size(0);
  call.stride_batch = any_strides ? x.stride(0) : program.image_size;
  call.image = {nullptr, x.stride(1), x.stride(2), x.stride(3), wide};
  call.y = y.data_ptr();
  call.seconds = seconds;
  run(program, call, int(torch::stable::get_num_threads()), on_torch_threads);
  return y;
}

// Weights in what a row adds up in: those of 16 bits widened, which the second argument keeps.
const void* widened(const Tensor& t, std::deque<std::vector<float>>& kept) {
  if (t.scalar_type() != ScalarType::BFloat16) return t.data_ptr();
  const auto* from = static_cast<const BFloat16*>(t.data_ptr());
  std::vector<float>& wide = kept.emplace_back(size_t(t.numel()));
  std::transform(from, from + t.numel(), wide.begin(), widen);
  return wide.data();
}

// Of packed weights, by what a row adds up in; a slot of two 16-bit numbers goes as one of these.
ScalarType packed_type(Dtype dtype) { return dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float; }

Tensor new_packed(int64_t size, Dtype dtype, const Tensor& like) {
  return new_tensor({size}, like, MemoryFormat::Contiguous, packed_type(dtype));
}

Tensor pack_bytes(const Tensor& weights, const Plan& plan) {
  int64_t size = 0;
  for (const Layer& layer : plan.layers) size += byte_size_s8(layer);
  STD_TORCH_CHECK(weights.is_cpu() && weights.scalar_type() == ScalarType::Byte && weights.dim() == 1 &&
                      weights.is_contiguous() && weights.numel() == size,
                  "weights must be one dense row of ", size, " bytes (uint8) for this plan, got ", shape_of(weights));
  const int64_t packed_size = plan.packed_size();
  const Tensor packed = torch::stable::empty({packed_size}, ScalarType::Byte);
  const auto* from = static_cast<const uint8_t*>(weights.data_ptr());
  auto* to = static_cast<uint32_t*>(packed.data_ptr());
  advise_huge_pages(to, size_t(packed_size));
  for (const Layer& layer : plan.layers) {
    pack_s8(layer, plan.kernel->tiles, from, to);
    from += byte_size_s8(layer);
    to += packed_size_s8(layer, plan.kernel->tiles);
  }
  return packed;
}

Tensor pack_plan(const Tensor& weights, std::string text) {
  const Plan plan = parse(text);
  if (plan.int8()) return pack_bytes(weights, plan);
  check_weights(weights, plan.layers);
  STD_TORCH_CHECK(weights.is_cpu(), "weights must be on the CPU");
  const Dtype dtype = plan.kernel->dtype, given = dtype_of(weights, "weights");
  STD_TORCH_CHECK(given == dtype || (dtype == Dtype::kBFloat16 && given == Dtype::kFloat32), "weights must be ",
                  dtype_name(dtype), dtype == Dtype::kBFloat16 ? " or float32" : "");
  const int64_t element = sum_size(dtype);
  const int64_t packed_size = plan.packed_size();
  const Tensor packed = new_packed(packed_size, dtype, weights);
  std::deque<std::vector<float>> kept;
  const char* from = static_cast<const char*>(widened(weights, kept));
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

void check_packed(const Tensor& packed, const Plan& plan) {
  const int64_t size = plan.packed_size();
  const Dtype dtype = plan.kernel->dtype;
  const ScalarType type = plan.int8() ? ScalarType::Byte : packed_type(dtype);
  STD_TORCH_CHECK(packed.dim() == 1 && packed.numel() == size && packed.is_contiguous() && packed.is_cpu() &&
                      packed.scalar_type() == type,
                  "packed must be what mnv2_fused::pack returned for this plan: ", size, " elements of ",
                  plan.int8()                ? "uint8"
                  : dtype == Dtype::kFloat64 ? "float64"
                                             : "float32");
}

Tensor network(const Tensor& x, const Tensor& packed, std::string plan) {
  const auto prepared = prepare(plan, x);
  check_packed(packed, prepared->plan);
  return execute(*prepared, x, packed.data_ptr());
}

class DirectNetwork : public Direct {
 public:
  DirectNetwork(Tensor packed, std::string plan) : packed_(std::move(packed)), plan_(std::move(plan)) {
    check_packed(packed_, parse(plan_));
  }

  void* const* run(void* const* x) override {
    const Tensor image = borrowed(x);
    const Tensor y = execute(*prepared(image), image, packed_.data_ptr());
    return reinterpret_cast<void* const*>(new_handle(y.get()));
  }

  static Tensor borrowed(void* const* tensor) {
    return Tensor(new_handle(reinterpret_cast<AtenTensorHandle>(const_cast<void**>(tensor))));
  }

 private:
  static AtenTensorHandle new_handle(AtenTensorHandle of) {
    AtenTensorHandle handle;
    STD_TORCH_CHECK(aoti_torch_new_tensor_handle(of, &handle) == AOTI_TORCH_SUCCESS,
                    "torch made no handle of a tensor");
    return handle;
  }

  // For images of one size that of the last call.
  std::shared_ptr<const Prepared> prepared(const Tensor& x) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!last_ || x.size(2) != last_->height || x.size(3) != last_->width) last_ = prepare(plan_, x);
    return last_;
  }

  const Tensor packed_;
  const std::string plan_;
  std::mutex mutex_;
  std::shared_ptr<const Prepared> last_;
};

// What `network` takes for each layer, in seconds on the first thread; of layers that are computed as one, with the
// last.
Tensor network_seconds(const Tensor& x, const Tensor& packed, std::string plan) {
  const auto prepared = prepare(plan, x);
  check_packed(packed, prepared->plan);
  const Program& program = prepared->program;
  std::vector<double> of_steps(program.steps.size());
  execute(*prepared, x, packed.data_ptr(), of_steps.data());
  const Tensor seconds = doubles({int64_t(prepared->plan.layers.size())}, x);
  double* of_layers = data_of(seconds);
  std::fill_n(of_layers, seconds.numel(), 0.0);
  for (size_t i = 0; i < of_steps.size(); ++i) of_layers[program.last_layer[i]] += of_steps[i];
  return seconds;
}

Tensor inverted_residual(const Tensor& x, const std::optional<Tensor>& expand_weight,
                         const std::optional<Tensor>& expand_bias, const Tensor& depthwise_weight,
                         const Tensor& depthwise_bias, const Tensor& project_weight, const Tensor& project_bias,
                         int64_t stride, int64_t dilation, std::vector<int64_t> padding, bool residual,
                         bool project_relu6, bool /*tf32*/) {
  const BlockWeights w(x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
                       padding);
  const Dtype dtype = dtype_of(x, "x");
  const Kernel& kernel = select_kernel(dtype);
  const auto prepared =
      prepare(plan_of(kernel.name, {Layer::kBlock, w.in, w.hidden, w.out, stride, dilation, padding[0], padding[1],
                                    padding[2], padding[3], w.expand, residual, project_relu6}),
              x);
  const Layer& layer = prepared->plan.layers[0];
  const Tensor packed = new_packed(packed_size(layer, kernel.tiles), dtype, x);
  std::deque<std::vector<float>> kept;
  std::vector<const void*> weights;
  for (const Tensor& t : w.tensors) weights.push_back(widened(t, kept));
  pack(layer, kernel.tiles, dtype, weights.data(), packed.data_ptr());
  return execute(*prepared, x, packed.data_ptr());
}

}  // namespace

std::shared_ptr<Direct> make_direct(void* const* packed, const std::string& plan) {
  return std::make_shared<DirectNetwork>(DirectNetwork::borrowed(packed), plan);
}

Layer block_layer(const Kernel& kernel, const Tensor& x, bool expand, int64_t hidden, int64_t out, int64_t stride,
                  int64_t dilation, const std::vector<int64_t>& padding) {
  return prepare(plan_of(kernel.name, {Layer::kBlock, x.size(1), hidden, out, stride, dilation, padding[0], padding[1],
                                       padding[2], padding[3], expand, 0, 0}),
                 x)
      ->plan.layers[0];
}

}  // namespace mnv2_fused

STABLE_TORCH_LIBRARY(mnv2_fused, m) {
  m.def(MNV2_INVERTED_RESIDUAL);
  m.def(MNV2_PACK);
  m.def(MNV2_NETWORK);
  m.def("network_seconds(Tensor x, Tensor packed, str plan) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("inverted_residual", TORCH_BOX(&mnv2_fused::inverted_residual));
  m.impl("pack", TORCH_BOX(&mnv2_fused::pack_plan));
  m.impl("network", TORCH_BOX(&mnv2_fused::network));
  m.impl("network_seconds", TORCH_BOX(&mnv2_fused::network_seconds));
}
