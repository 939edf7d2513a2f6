// Inference on CUDA tensors: plans, their programs and checks. Where the kernels are compiled for the host
// (MNV2_EMULATED) these are ops of a library of their own, on CPU tensors, for the tests.
#include "ops.h"

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <mutex>

#include "../plan.h"
#include "network.h"

namespace mnv2_fused {
namespace {

using cuda::Type;

// What a plan begins with, which says how numbers are stored and multiplied, in the order of Type.
constexpr const char* kTypeNames[] = {"float16", "bfloat16", "tf32", "float32"};

ScalarType scalar_type(Type type) {
  if (type == Type::kHalf) return ScalarType::Half;
  return type == Type::kBfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
}

struct Plan {
  Type type;
  std::vector<Layer> layers;
  std::vector<cuda::Step> steps;
  int64_t packed_bytes;

  explicit Plan(const std::string& text) {
    std::string name;
    layers = parse_layers(text, &name);
    const auto found = std::find(std::begin(kTypeNames), std::end(kTypeNames), name);
    STD_TORCH_CHECK(found != std::end(kTypeNames),
                    "a plan for CUDA begins with float16, bfloat16, tf32 or float32, got ", name);
    type = Type(found - std::begin(kTypeNames));
    steps = cuda::steps_of(type, layers, &packed_bytes);
  }
};

// A plan's program for one size of x on one device; the last few are kept.
struct Prepared {
  std::string text;
  std::array<int64_t, 4> size;  // of x, and its device
  Plan plan;
  cuda::Program program;
};

std::shared_ptr<const Prepared> prepare(const std::string& text, const Tensor& x, const Device& device) {
  static std::mutex mutex;
  static std::deque<std::shared_ptr<const Prepared>> recent;
  constexpr size_t kKept = 64;
  const std::array<int64_t, 4> size = {x.size(0), x.size(2), x.size(3), device.index()};
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& p : recent) {
      if (p->size == size && p->text == text) return p;
    }
  }
  Plan plan(text);
  cuda::Program program;
  const auto in_range = [](int64_t n) { return n > 0 && n < (1 << 30); };
  STD_TORCH_CHECK(in_range(size[1]) && in_range(size[2]), "x must have a height and a width of at least 1, got ",
                  shape_of(x));
  if (size[0] == 0) {  // only the shape of the result
    program = cuda::schedule(plan.steps, 1, size[1], size[2], limits_of(device));
  } else {
    program = cuda::schedule(plan.steps, size[0], size[1], size[2], limits_of(device));
  }
  STD_TORCH_CHECK(program.out_height > 0 && program.out_width > 0, "x of shape ", shape_of(x),
                  " is smaller than the dilated 3x3 kernel with this padding: the output would be empty");
  const auto made = std::make_shared<const Prepared>(Prepared{text, size, std::move(plan), std::move(program)});
  const std::lock_guard<std::mutex> lock(mutex);
  recent.push_front(made);
  if (recent.size() > kKept) recent.pop_back();
  return made;
}

Tensor execute(const Prepared& prepared, const Tensor& input, const void* packed, const Device& device) {
  const Plan& plan = prepared.plan;
  const cuda::Program& program = prepared.program;
  STD_TORCH_CHECK(input.size(1) == plan.layers[0].in_channels, "x must have ", plan.layers[0].in_channels,
                  " channels, got ", shape_of(input));
  const bool any_strides = plan.layers[0].kind == Layer::kConv3x3;
  const Tensor x = any_strides ? input : torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const Tensor y = program.flat ? new_tensor({x.size(0), program.out_channels}, x, MemoryFormat::Contiguous)
                                : new_tensor({x.size(0), program.out_channels, program.out_height, program.out_width},
                                             x, MemoryFormat::ChannelsLast);
  if (x.size(0) == 0) return y;
  const Tensor workspace = bytes(program.workspace_bytes(), x);
  cuda::Patches image{};
  image.stride_batch = x.stride(0), image.stride_channel = x.stride(1);
  image.stride_row = x.stride(2), image.stride_column = x.stride(3);
  check(cuda::run(program, x.data_ptr(), image, packed, y.data_ptr(), workspace.data_ptr(), device.stream()));
  return y;
}

// Weights are float32, and rounded here, or already what the plan computes in.
Tensor pack_plan(const Tensor& weights, std::string text) {
  const Plan plan(text);
  check_weights(weights, plan.layers);
  STD_TORCH_CHECK(on_device(weights), "weights must be on the device");
  const ScalarType type = weights.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == scalar_type(plan.type),
                  "weights must be float32 or of the dtype that the plan computes in");
  const Device device(weights);
  const Tensor packed = bytes(plan.packed_bytes, weights);
  std::vector<cuda::Numbers> numbers;
  const char* from = static_cast<const char*>(weights.data_ptr());
  for (const Layer& layer : plan.layers) {
    for (const int64_t n : weight_sizes(layer)) {
      numbers.push_back({from, type == ScalarType::Float});
      from += n * int64_t(weights.element_size());
    }
  }
  check(cuda::pack(plan.steps, numbers.data(), packed.data_ptr(), device.stream()));
  return packed;
}

Tensor network(const Tensor& x, const Tensor& packed, std::string text) {
  STD_TORCH_CHECK(on_device(x), "x must be on the device on which packed is");
  STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W], got ", shape_of(x));
  const Device device(x);
  const auto prepared = prepare(text, x, device);
  const Plan& plan = prepared->plan;
  STD_TORCH_CHECK(x.scalar_type() == scalar_type(plan.type), "x must be of the dtype that the plan computes in");
  STD_TORCH_CHECK(packed.dim() == 1 && packed.numel() == plan.packed_bytes && packed.is_contiguous() &&
                      packed.scalar_type() == ScalarType::Byte && packed.device() == x.device(),
                  "packed must be what mnv2_fused::pack returned for this plan: ", plan.packed_bytes,
                  " bytes on the device of x");
  return execute(*prepared, x, packed.data_ptr(), device);
}

Tensor inverted_residual(const Tensor& x, const std::optional<Tensor>& expand_weight,
                         const std::optional<Tensor>& expand_bias, const Tensor& depthwise_weight,
                         const Tensor& depthwise_bias, const Tensor& project_weight, const Tensor& project_bias,
                         int64_t stride, int64_t dilation, std::vector<int64_t> padding, bool residual,
                         bool project_relu6, bool tf32) {
  const Type type = type_of(x, tf32);
  const BlockWeights w(x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
                       padding);
  check_options(w.in, w.hidden, w.out, stride, dilation, padding);
  const Device device(x);
  const auto prepared =
      prepare(plan_of(kTypeNames[int(type)], {Layer::kBlock, w.in, w.hidden, w.out, stride, dilation, padding[0],
                                              padding[1], padding[2], padding[3], w.expand, residual, project_relu6}),
              x, device);
  const Plan& plan = prepared->plan;
  const Tensor packed = bytes(plan.packed_bytes, x);
  std::vector<cuda::Numbers> numbers;
  for (const Tensor& t : w.tensors) numbers.push_back(numbers_of(t));
  check(cuda::pack(plan.steps, numbers.data(), packed.data_ptr(), device.stream()));
  return execute(*prepared, x, packed.data_ptr(), device);
}

}  // namespace
}  // namespace mnv2_fused

#ifdef MNV2_EMULATED
STABLE_TORCH_LIBRARY(mnv2_emulated, m) {
  m.def(MNV2_INVERTED_RESIDUAL);
  m.def(MNV2_PACK);
  m.def(MNV2_NETWORK);
}
STABLE_TORCH_LIBRARY_IMPL(mnv2_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CUDA, m) {
#endif
  m.impl("inverted_residual", TORCH_BOX(&mnv2_fused::inverted_residual));
  m.impl("pack", TORCH_BOX(&mnv2_fused::pack_plan));
  m.impl("network", TORCH_BOX(&mnv2_fused::network));
}
