// The passes of training on CUDA tensors: checks, memory, launches. training_ops.cpp makes a block of them.
#include <tuple>

#include "ops.h"

namespace mnv2_fused {
namespace {

using cuda::ChannelOp;
using cuda::Pass;
using cuda::Type;

Tensor floats(int64_t count, const Tensor& like) {
  return torch::stable::empty({count}, ScalarType::Float, std::nullopt, like.device(), std::nullopt, std::nullopt);
}
float* floats_of(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// What the passes take per channel is float, whatever x is.
Tensor single(const Tensor& t, const char* name, const Tensor& x, const std::vector<int64_t>& expected) {
  check_size(t, name, expected);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.device() == x.device(), name,
                  " must be float32 on the device of x");
  return torch::stable::contiguous(t);
}

Tensor dense(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && on_device(x) && x.size(1) > 0, name, " must be [N, C, H, W] on the device, got ",
                  shape_of(x));
  STD_TORCH_CHECK(x.numel() / x.size(1) <= INT32_MAX && x.size(1) <= 1 << 20, name,
                  " must have less than 2^31 pixels, of at most 2^20 channels, got ", shape_of(x));
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}
Tensor dense_like(const Tensor& t, const char* name, const Tensor& x) {
  check_shape(t, name, x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  return torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}
int64_t pixels_of(const Tensor& x) { return x.numel() / x.size(1); }

void zero(std::initializer_list<Tensor> tensors) {
  for (Tensor t : tensors) torch::stable::zero_(t);
}

// ----------------------------------------------------------------------------------------------- narrow tensors

// Two rows of sums over the pixels of x.
void channel_sums(ChannelOp op, const Tensor& x, const Tensor* other, const Tensor* center, const Tensor* gate,
                  double* first, double* second, float* rounded, const Device& device) {
  cuda::ChannelCall call{};
  call.a = x.data_ptr();
  call.b = other ? other->data_ptr() : nullptr;
  call.center = center ? floats_of(*center) : nullptr;
  call.gate = gate ? floats_of(*gate) : nullptr;
  call.pixels = pixels_of(x);
  call.channels = int(x.size(1));
  const Tensor partial = doubles({2 * cuda::kMaxChannelBlocks, x.size(1)}, x);
  call.partial = data_of(partial);
  call.first = first, call.second = second, call.rounded = rounded;
  check(cuda::training_of(type_of(x, false)).channels(op, call, device.stream()));
}

std::tuple<Tensor, Tensor> channel_moments_of(const Tensor& input) {
  const Tensor x = dense(input, "x");
  const Device device(x);
  const Tensor mean = doubles({x.size(1)}, x), square = doubles({x.size(1)}, x);
  if (pixels_of(x) == 0) {
    zero({mean, square});
  } else {
    channel_sums(ChannelOp::kMoments, x, nullptr, nullptr, nullptr, data_of(mean), data_of(square), nullptr, device);
  }
  return {mean, square};
}

Tensor channel_products_of(const Tensor& input, const Tensor& other, const Tensor& center,
                           const std::optional<Tensor>& gate) {
  const Tensor a = dense(input, "a"), b = dense_like(other, "b", a);
  const Device device(a);
  const int64_t channels = a.size(1);
  const Tensor middle = single(center, "center", a, {channels}), sums = doubles({2, channels}, a);
  std::optional<Tensor> bounds;
  if (gate) bounds = single(*gate, "gate", a, {2, channels});
  if (pixels_of(a) == 0) {
    zero({sums});
  } else {
    channel_sums(ChannelOp::kProducts, a, &b, &middle, bounds ? &*bounds : nullptr, data_of(sums),
                 data_of(sums) + channels, nullptr, device);
  }
  return sums;
}

Tensor affine_of(const Tensor& input, const std::optional<Tensor>& other, const Tensor& coefficients,
                 const std::optional<Tensor>& gate, bool relu6) {
  const Tensor a = dense(input, "a");
  STD_TORCH_CHECK(!gate || other, "a gate is over b, which is not given");
  STD_TORCH_CHECK(!relu6 || !other, "relu6 is of an affine map of a alone, without b");
  const Device device(a);
  const int64_t channels = a.size(1);
  std::optional<Tensor> b, bounds;
  if (other) b = dense_like(*other, "b", a);
  if (gate) bounds = single(*gate, "gate", a, {2, channels});
  const Tensor table = single(coefficients, "coefficients", a, {3, channels});
  const Tensor y = new_tensor({a.size(0), channels, a.size(2), a.size(3)}, a, MemoryFormat::ChannelsLast);
  if (pixels_of(a) == 0) return y;
  cuda::ChannelCall call{};
  call.a = a.data_ptr();
  call.b = b ? b->data_ptr() : nullptr;
  call.gate = bounds ? floats_of(*bounds) : nullptr;
  call.coefficients = floats_of(table);
  call.y = y.data_ptr();
  call.pixels = pixels_of(a), call.channels = int(channels), call.relu6 = relu6;
  check(cuda::training_of(type_of(a, false)).channels(ChannelOp::kAffine, call, device.stream()));
  return y;
}

std::tuple<Tensor, Tensor> moments_of(const Tensor& input, bool tf32) {
  const Tensor x = dense(input, "x");
  const Device device(x);
  const Type type = type_of(x, tf32);
  const int64_t channels = x.size(1), pixels = pixels_of(x);
  const Tensor mean = doubles({channels}, x), products = doubles({channels, channels}, x);
  if (pixels == 0) {
    zero({mean, products});
    return {mean, products};
  }
  // Products of 16-bit numbers are exact as they are; floats less their mean lose less.
  const bool centered = x.element_size() == 4;
  const Tensor squares = doubles({channels}, x), center = floats(centered ? channels : 0, x);
  float* const middle = centered ? floats_of(center) : nullptr;
  channel_sums(ChannelOp::kMoments, x, nullptr, nullptr, nullptr, data_of(mean), data_of(squares), middle, device);
  cuda::Block block{};
  block.type = type, block.in_channels = int(channels), block.batch = int(pixels);
  const cuda::TrainingTile tile = cuda::choose_tile(Pass::kCovariance, block, true, limits_of(device));
  STD_TORCH_CHECK(tile.tiles, "the products of ", channels, " channels do not fit in shared memory");
  const int chunk = cuda::Packing::kChunkBytes / cuda::element_size(type), chunks = int(channels + chunk - 1) / chunk;
  const Tensor partial = floats(int64_t(tile.splits) * chunks * channels * chunk, x);
  const cuda::TrainingLaunches& launches = cuda::training_of(type);
  check(launches.covariance(x.data_ptr(), middle, pixels, int(channels), tile, floats_of(partial), device.stream()));
  const cuda::SumCall sum{
      floats_of(partial), data_of(products), nullptr, tile.splits,   chunks, int(channels), int(channels), 0,
      int(channels),      data_of(mean),     middle,  double(pixels)};
  check(launches.sum_products(sum, device.stream()));
  return {mean, products};
}

void matrix_add_of(Tensor y, const Tensor& input, const Tensor& matrix, const Tensor& bias,
                   const std::optional<Tensor>& residual, bool tf32) {
  const Tensor x = dense(input, "x");
  STD_TORCH_CHECK(dense_like(y, "y", x).data_ptr() == y.data_ptr(), "y must be dense in channels_last");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(y.data_ptr()) % 8 == 0, "y must begin at a multiple of 8 bytes");
  std::optional<Tensor> r;
  if (residual) r = dense_like(*residual, "residual", x);
  const Device device(x);
  const int channels = int(x.size(1));
  const Tensor w = single(matrix, "matrix", x, {channels, channels}), constant = single(bias, "bias", x, {channels});
  if (pixels_of(x) == 0) return;
  cuda::Dense dense{};
  dense.type = type_of(x, tf32);
  dense.rows = int(pixels_of(x)), dense.in_channels = dense.out_channels = channels, dense.add = true;
  const cuda::DenseTile tile = cuda::choose_tile(dense, limits_of(device));
  STD_TORCH_CHECK(tile.blocks_m, "no tile of a matrix of ", channels, " channels fits in shared memory");
  const cuda::Launches& launches = cuda::launches_of(dense.type);
  const Tensor packed = bytes(cuda::packing(dense.type, channels, channels).bytes, x);
  check(launches.pack_dense(dense, numbers_of(w), numbers_of(constant), packed.data_ptr(), device.stream()));
  check(launches.dense(dense, tile, x.data_ptr(), packed.data_ptr(), r ? r->data_ptr() : nullptr, y.data_ptr(),
                       device.stream()));
}

// ------------------------------------------------------------------------------------------------------- blocks

// A block as its passes take it, with its weights packed for them.
struct Passes {
  Tensor x, packed;
  Device device;
  cuda::Block block{};
  cuda::Limits limits;
  const cuda::TrainingLaunches& launches;
  void* stream;
  int chunk, chunks;

  Passes(const Tensor& input, const std::optional<Tensor>& expand_weight, const std::optional<Tensor>& expand_bias,
         const Tensor& depthwise_weight, const Tensor* project_weight, const Tensor* coefficients, int64_t stride,
         int64_t dilation, const std::vector<int64_t>& padding, bool tf32)
      : x(dense(input, "x")),
        packed(x),
        device(x),
        limits(limits_of(device)),
        launches(cuda::training_of(type_of(x, tf32))),
        stream(device.stream()) {
    STD_TORCH_CHECK(depthwise_weight.dim() == 4 && (!project_weight || project_weight->dim() == 4),
                    "depthwise_weight and project_weight must have 4 dimensions");
    STD_TORCH_CHECK(expand_weight.has_value() == expand_bias.has_value(),
                    "expand_weight and expand_bias go together: give both or neither");
    const int64_t in = x.size(1), hidden = depthwise_weight.size(0), out = project_weight ? project_weight->size(0) : 1;
    check_options(in, hidden, out, stride, dilation, padding);
    STD_TORCH_CHECK(expand_weight || hidden == in, "without an expansion there are as many hidden channels as x has");
    const int64_t height = out_extent(x.size(2), padding[2] + padding[3], stride, dilation);
    const int64_t width = out_extent(x.size(3), padding[0] + padding[1], stride, dilation);
    STD_TORCH_CHECK(height > 0 && width > 0, "x of shape ", shape_of(x),
                    " is smaller than the dilated 3x3 kernel with this padding: the output would be empty");
    STD_TORCH_CHECK(x.size(0) * height * width <= INT32_MAX, "z must have less than 2^31 pixels");
    block.type = type_of(x, tf32);
    block.source = expand_weight ? cuda::Source::kExpand : cuda::Source::kCopy;
    block.batch = int(x.size(0)), block.height = int(x.size(2)), block.width = int(x.size(3));
    block.in_channels = int(in), block.hidden_channels = int(hidden), block.out_channels = int(out);
    block.out_height = int(height), block.out_width = int(width);
    block.stride = int(stride), block.dilation = int(dilation);
    block.pad_left = int(padding[0]), block.pad_top = int(padding[2]);
    chunk = cuda::Packing::kChunkBytes / cuda::element_size(block.type);
    chunks = int(hidden + chunk - 1) / chunk;

    std::vector<Tensor> held;
    const auto numbers = [&](const Tensor& t, const char* name, const std::vector<int64_t>& shape) {
      held.push_back(weight_of(t, name, x, shape));
      return numbers_of(held.back());
    };
    cuda::Weights weights{};
    if (expand_weight) {
      weights.expand = numbers(*expand_weight, "expand_weight", {hidden, in, 1, 1});
      weights.expand_bias = numbers(*expand_bias, "expand_bias", {hidden});
    }
    weights.depthwise = numbers(depthwise_weight, "depthwise_weight", {hidden, 1, 3, 3});
    if (project_weight) weights.project = numbers(*project_weight, "project_weight", {out, hidden, 1, 1});
    const float* table = nullptr;
    if (coefficients) {
      held.push_back(single(*coefficients, "coefficients", x, {6, hidden}));
      table = floats_of(held.back());
    }
    if (x.size(0) == 0) return;
    packed = bytes(
        cuda::training_packing(block.type, block.in_channels, block.hidden_channels, block.out_channels).bytes, x);
    check(launches.pack(block, weights, table, packed.data_ptr(), stream));
  }

  cuda::TrainingTile tile(Pass pass, bool products) const {
    const cuda::TrainingTile found = cuda::choose_tile(pass, block, products, limits);
    STD_TORCH_CHECK(found.tiles, "no tile of a block with ", block.in_channels, ", ", block.hidden_channels, " and ",
                    block.out_channels, " channels, dilation ", block.dilation, ", fits in ", limits.shared_bytes,
                    " bytes of shared memory in training");
    return found;
  }

  // A pass and the sums of what its blocks of threads have found: `sum_rows` of them per channel.
  struct Found {
    cuda::TrainingTile tile;
    Tensor products, sums;
  };
  Found run(Pass pass, int sum_rows, bool wants_products, bool wants_taps, int product_rows, const Tensor* dz) const {
    Found found{tile(pass, wants_products), x, x};
    found.tile.product_rows = product_rows;
    const int64_t places = int64_t(found.tile.splits) * chunks * chunk;
    found.products = floats(places * product_rows, x);
    found.sums = doubles({places * sum_rows}, x);
    cuda::TrainingCall call{};
    call.block = block;
    call.x = x.data_ptr(), call.packed = packed.data_ptr();
    call.dz = dz ? dz->data_ptr() : nullptr;
    call.products = floats_of(found.products), call.sums = data_of(found.sums);
    call.wants_products = wants_products, call.wants_taps = wants_taps;
    check(launches.pass(pass, call, found.tile, stream));
    return found;
  }
  void add_up(const Tensor& from, const Found& found, int rows, int first_row, int stored_rows,
              const Tensor& to) const {
    const cuda::SumCall sum{from.data_ptr(),       data_of(to), nullptr,     found.tile.splits, chunks,  rows,
                            block.hidden_channels, first_row,   stored_rows, nullptr,           nullptr, 0};
    const bool exact = from.scalar_type() == ScalarType::Double;
    check(exact ? launches.sum_sums(sum, false, stream) : launches.sum_products(sum, stream));
  }
};

std::tuple<Tensor, Tensor> filter_moments(const Tensor& x, const std::optional<Tensor>& expand_weight,
                                          const std::optional<Tensor>& expand_bias, const Tensor& depthwise_weight,
                                          int64_t stride, int64_t dilation, std::vector<int64_t> padding, bool tf32) {
  const Passes p(x, expand_weight, expand_bias, depthwise_weight, nullptr, nullptr, stride, dilation, padding, tf32);
  const int64_t hidden = p.block.hidden_channels;
  const Tensor mean = doubles({hidden}, x), square = doubles({hidden}, x);
  if (p.block.batch == 0) {
    zero({mean, square});
    return {mean, square};
  }
  const auto found = p.run(Pass::kMoments, 3, false, false, 0, nullptr);
  const cuda::SumCall sum{data_of(found.sums),
                          data_of(mean),
                          data_of(square),
                          found.tile.splits,
                          p.chunks,
                          3,
                          int(hidden),
                          0,
                          3,
                          nullptr,
                          nullptr,
                          0};
  check(p.launches.sum_sums(sum, true, p.stream));
  return {mean, square};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> block_gradients(
    const Tensor& dz, const Tensor& x, const std::optional<Tensor>& expand_weight,
    const std::optional<Tensor>& expand_bias, const Tensor& depthwise_weight, const Tensor& project_weight,
    const Tensor& coefficients, int64_t stride, int64_t dilation, std::vector<int64_t> padding, int64_t wanted,
    bool tf32) {
  const Passes p(x, expand_weight, expand_bias, depthwise_weight, &project_weight, &coefficients, stride, dilation,
                 padding, tf32);
  const cuda::Block& b = p.block;
  check_shape(dz, "dz", p.x, {b.batch, b.out_channels, b.out_height, b.out_width});
  const Tensor gradient = torch::stable::contiguous(dz, MemoryFormat::ChannelsLast);
  const bool project = wanted & kProjectGradient, expand = expand_weight && wanted & kExpandGradient,
             depthwise = wanted & kDepthwiseGradient;
  const auto want = [&](bool wants, int64_t rows) { return doubles({wants ? rows : 0, b.hidden_channels}, x); };
  const Tensor dx = wanted & kDx
                        ? new_tensor({b.batch, b.in_channels, b.height, b.width}, p.x, MemoryFormat::ChannelsLast)
                        : new_tensor({0}, p.x, MemoryFormat::Contiguous);
  const Tensor expand_gradient = want(expand, b.in_channels), depthwise_gradient = want(depthwise, 9);
  const Tensor project_gradient = want(project, b.out_channels), sums = doubles({4, b.hidden_channels}, x);
  zero({sums});
  if (b.batch == 0) {
    zero({expand_gradient, depthwise_gradient, project_gradient});
    return {dx, expand_gradient, depthwise_gradient, project_gradient, sums};
  }
  Tensor first = sums, second = sums;
  first = torch::stable::narrow(first, 0, 0, 2);
  second = torch::stable::narrow(second, 0, 2, 2);
  if (project || wanted & kSums) {
    const auto found = p.run(Pass::kProject, 2, project, false, project ? b.out_channels : 0, &gradient);
    p.add_up(found.sums, found, 2, 0, 2, first);
    if (project) p.add_up(found.products, found, b.out_channels, 0, b.out_channels, project_gradient);
  }
  if (expand || depthwise) {
    const int of_expand = expand ? b.in_channels : 0, rows = of_expand + 9 * depthwise;
    const auto found = p.run(Pass::kBelow, 2, expand, depthwise, rows, &gradient);
    p.add_up(found.sums, found, 2, 0, 2, second);
    if (expand) p.add_up(found.products, found, of_expand, 0, rows, expand_gradient);
    if (depthwise) p.add_up(found.products, found, 9, of_expand, rows, depthwise_gradient);
  }
  if (wanted & kDx) {
    cuda::TrainingCall call{};
    call.block = b;
    call.x = p.x.data_ptr(), call.dz = gradient.data_ptr(), call.packed = p.packed.data_ptr(), call.dx = dx.data_ptr();
    check(p.launches.pass(Pass::kInput, call, p.tile(Pass::kInput, false), p.stream));
  }
  return {dx, expand_gradient, depthwise_gradient, project_gradient, sums};
}

}  // namespace
}  // namespace mnv2_fused

#ifdef MNV2_EMULATED
STABLE_TORCH_LIBRARY_FRAGMENT(mnv2_emulated, m) { MNV2_DEFINE_PASSES(m); }
STABLE_TORCH_LIBRARY_IMPL(mnv2_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CUDA, m) {
#endif
  m.impl("moments", TORCH_BOX(&mnv2_fused::moments_of));
  m.impl("channel_moments", TORCH_BOX(&mnv2_fused::channel_moments_of));
  m.impl("channel_products", TORCH_BOX(&mnv2_fused::channel_products_of));
  m.impl("affine", TORCH_BOX(&mnv2_fused::affine_of));
  m.impl("matrix_add_", TORCH_BOX(&mnv2_fused::matrix_add_of));
  m.impl("filter_moments", TORCH_BOX(&mnv2_fused::filter_moments));
  m.impl("block_gradients", TORCH_BOX(&mnv2_fused::block_gradients));
}
