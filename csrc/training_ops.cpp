// Training with batch statistics as ops: a block that keeps its input and its projection, nothing in between, and the
// BatchNorm + ReLU6 after any other convolution.
//
// With W the expansion, m and C the mean and the covariance of x, the statistics of e = W x are W m and diag(W C W^T):
// they need no pass over e, and e's BatchNorm goes into W. Those of d, the filtered h, take a pass (filter_moments);
// then the block runs as at inference, up to its projection z. Backward recomputes h and d twice: once for the sums
// that the gradient of d's BatchNorm needs and the gradient of the projection, once for everything below. The gradient
// through e's BatchNorm closes again: with G the sum of ge x^T over the pixels and g that of ge, everything follows
// from G, g, m and C. (Ioffe and Szegedy 2015 for the BatchNorm.)
//
// What is per channel is computed here, in double; what is per pixel, by the passes of training_passes.cpp.
#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "tensors.h"

// What an op that was called has thrown; from torch 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace mnv2_fused {
namespace {

using Doubles = std::vector<double>;
using MaybeTensor = std::optional<Tensor>;

// ----------------------------------------------------------------------------------------- arguments and results

// A convolution and its BatchNorm, in the order of ConvNorm in training.py.
struct ConvNorm {
  MaybeTensor weight;  // none: there is no expansion
  MaybeTensor bias;
  MaybeTensor scale, shift;  // the BatchNorm's weight and bias; none: it is not affine
  MaybeTensor mean, var;     // its running statistics where it is frozen; none: those of the batch are taken
  double eps;
};

// The arguments of a boxed op, each to be taken once.
class Arguments {
 public:
  explicit Arguments(const StableIValue* stack) : at_(stack) {}
  template <class T>
  T next() {
    return torch::stable::detail::to<T>(*at_++);
  }
  ConvNorm next_stage() {
    return {next<MaybeTensor>(), next<MaybeTensor>(), next<MaybeTensor>(), next<MaybeTensor>(),
            next<MaybeTensor>(), next<MaybeTensor>(), next<double>()};
  }

 private:
  const StableIValue* at_;
};

// Each value taken once.
template <class... Results, size_t... I>
std::tuple<Results...> taken(const StableIValue* stack, std::index_sequence<I...>) {
  return {torch::stable::detail::to<Results>(stack[I])...};
}

// An op by its name: it runs where its tensors are, and profilers see it.
template <class... Results, class... Args>
std::tuple<Results...> call(const char* op, const Args&... arguments) {
  std::array<StableIValue, std::max(sizeof...(Args), sizeof...(Results))> stack = {
      torch::stable::detail::from(arguments)...};
  if (torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
    const char* what = torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : "";
    STD_TORCH_CHECK(false, op, " failed: ", what);
  }
  return taken<Results...>(stack.data(), std::index_sequence_for<Results...>());
}

std::tuple<Tensor, Tensor> moments(const Tensor& x) { return call<Tensor, Tensor>("mnv2_fused::moments", x); }

std::tuple<Tensor, Tensor> channel_moments(const Tensor& x) {
  return call<Tensor, Tensor>("mnv2_fused::channel_moments", x);
}

Tensor affine(const Tensor& a, const MaybeTensor& b, const Tensor& coefficients, const MaybeTensor& gate, bool relu6) {
  return std::get<0>(call<Tensor>("mnv2_fused::affine", a, b, coefficients, gate, relu6));
}

// f(pointer to the tensor's elements).
template <class F>
auto with_data(const Tensor& t, const F& f) {
  dtype_of(t, "every tensor");
  return t.scalar_type() == ScalarType::Float ? f(static_cast<float*>(t.data_ptr()))
                                              : f(static_cast<double*>(t.data_ptr()));
}

Doubles values(const Tensor& t) {
  Doubles out(t.numel());
  with_data(t, [&](const auto* from) { std::copy_n(from, out.size(), out.begin()); });
  return out;
}

// A parameter or buffer per channel; `otherwise` where there is none.
Doubles values(const MaybeTensor& t, const char* name, const Tensor& x, int64_t channels, double otherwise) {
  return t ? values(weight_of(*t, name, x, {channels})) : Doubles(channels, otherwise);
}

Tensor statistic(const Doubles& from, const Tensor& like) {
  const Tensor t = doubles({int64_t(from.size())}, like);
  std::copy(from.begin(), from.end(), data_of(t));
  return t;
}

Tensor nothing(const Tensor& like) { return doubles({0}, like); }

// A statistic as forward gave it.
Tensor statistic_of(const Tensor& t, const char* name, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.is_cpu(), name, " must be float64 on the CPU");
  check_size(t, name, shape);
  return torch::stable::contiguous(t);
}

// An activation, dense.
Tensor dense(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), name, " must be [N, C, H, W] on the CPU, got ", shape_of(x));
  dtype_of(x, name);
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

// Rows of values per channel in the dtype of `like`; one row alone is [channels].
Tensor rows(const Tensor& like, std::initializer_list<const Doubles*> from) {
  const int64_t channels = int64_t((*from.begin())->size()), count = int64_t(from.size());
  const std::vector<int64_t> shape =
      count == 1 ? std::vector<int64_t>{channels} : std::vector<int64_t>{count, channels};
  const Tensor t = new_tensor(shape, like, MemoryFormat::Contiguous);
  with_data(t, [&](auto* to) {
    for (const Doubles* row : from) to = std::copy(row->begin(), row->end(), to);
  });
  return t;
}

// body(first, count) for blocks of a few of `n` hidden channels, whose sums stay in registers.
constexpr int64_t kBlock = 8;

template <class Body>
void on_channels(int64_t n, const Body& body) {
  torch::stable::parallel_for(0, (n + kBlock - 1) / kBlock, 8, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b * kBlock, std::min(kBlock, n - b * kBlock));
  });
}

// Sums over the processes of a torch.distributed group, by its name (training.py); nothing where there is none.
void sum_over(const std::string& group, const Tensor& like, std::initializer_list<Doubles*> parts) {
  if (group.empty()) return;
  Doubles all;
  for (const Doubles* part : parts) all.insert(all.end(), part->begin(), part->end());
  const auto [reduced] = call<Tensor>("mnv2_fused::all_reduce", statistic(all, like), group);
  const double* at = data_of(reduced);
  for (Doubles* part : parts) {
    std::copy_n(at, part->size(), part->begin());
    at += part->size();
  }
}

// From mean and squared deviations over `count` pixels of this process: mean and variance over the `total` of all.
void join(const std::string& group, double count, double total, const Tensor& mean, const Tensor& squares) {
  Doubles joint = values(mean), deviations = values(squares);
  if (!group.empty()) {
    const Doubles own = joint;
    for (double& m : joint) m *= count;
    sum_over(group, mean, {&joint});
    for (size_t c = 0; c < own.size(); ++c) {
      joint[c] /= total;
      deviations[c] += count * (own[c] - joint[c]) * (own[c] - joint[c]);
    }
    sum_over(group, mean, {&deviations});
  }
  for (double& s : deviations) s /= total;
  std::copy(joint.begin(), joint.end(), data_of(mean));
  std::copy(deviations.begin(), deviations.end(), data_of(squares));
}

// ---------------------------------------------------------------------------------------------------- BatchNorm

// Sums over the pixels of g and of g (v - mean), g being the gradient of a norm of v.
struct Sums {
  Doubles total, product;
};

// A BatchNorm as the affine map that it is in this call, and back through it.
struct Norm {
  bool batch;
  double count;
  Doubles mean, rstd, scale, shift;

  // Mean and variance are the batch's. The convolution's bias is given where it is not in v: the batch's mean takes it
  // away, running statistics do not.
  Norm(const ConvNorm& s, const MaybeTensor& bias, const Tensor& batch_mean, const Tensor& batch_var, double n,
       const Tensor& x, int64_t channels)
      : batch(!s.mean), count(n) {
    STD_TORCH_CHECK(s.mean.has_value() == s.var.has_value(), "running mean and var go together: give both or neither");
    mean = batch ? values(batch_mean) : values(s.mean, "running mean", x, channels, 0);
    rstd = batch ? values(batch_var) : values(s.var, "running var", x, channels, 0);
    scale = values(s.scale, "scale", x, channels, 1);
    shift = values(s.shift, "shift", x, channels, 0);
    const Doubles b = values(bias, "bias", x, channels, 0);
    STD_TORCH_CHECK(int64_t(mean.size()) == channels && int64_t(rstd.size()) == channels, "statistics must be of ",
                    channels, " channels, got ", mean.size());
    for (int64_t c = 0; c < channels; ++c) {
      if (!batch) mean[c] -= b[c];
      rstd[c] = 1 / std::sqrt(rstd[c] + s.eps);
      scale[c] *= rstd[c];
      shift[c] -= scale[c] * mean[c];
    }
  }

  // The norm of v plus the residual, or relu6 of the norm.
  Tensor of(const Tensor& v, const MaybeTensor& residual, bool relu6) const {
    const Doubles one(scale.size(), 1);
    return affine(v, residual, rows(v, {&scale, &one, &shift}), std::nullopt, relu6);
  }

  // From a kernel's, which are about the mean as it was rounded for it.
  Sums sums(const double* found, const Tensor& rounded) const {
    const Doubles center = values(rounded);
    Sums s{Doubles(found, found + mean.size()), Doubles(found + mean.size(), found + 2 * mean.size())};
    for (size_t c = 0; c < mean.size(); ++c) s.product[c] += s.total[c] * (center[c] - mean[c]);
    return s;
  }

  // p, q, r of the gradient p g + q v + r of v, from the sums over all processes.
  std::array<Doubles, 3> backward(const Sums& s) const {
    Doubles q(scale.size(), 0), r = q;
    for (size_t c = 0; batch && c < scale.size(); ++c) {
      q[c] = -scale[c] * rstd[c] * rstd[c] * s.product[c] / count;
      r[c] = -scale[c] * s.total[c] / count - q[c] * mean[c];
    }
    return {scale, q, r};
  }
};

// Back through a norm of v, and through the relu6 after it where there is one: the gradient of v and the sums of this
// process.
std::pair<Tensor, Sums> norm_backward(const Norm& norm, const Tensor& dy, const Tensor& v, bool relu6,
                                      const std::string& group) {
  MaybeTensor gate;
  if (relu6) gate = rows(v, {&norm.scale, &norm.shift});
  const Tensor center = rows(v, {&norm.mean});
  const Sums own =
      norm.sums(data_of(std::get<0>(call<Tensor>("mnv2_fused::channel_products", dy, v, center, gate))), center);
  Sums all = own;
  if (norm.batch) sum_over(group, v, {&all.total, &all.product});
  const auto [p, q, r] = norm.backward(all);
  const MaybeTensor other = norm.batch || relu6 ? MaybeTensor(v) : std::nullopt;
  return {affine(dy, other, rows(v, {&p, &q, &r}), gate, false), own};
}

Doubles times(const Doubles& a, const Doubles& b) {
  Doubles out(a.size());
  for (size_t i = 0; i < a.size(); ++i) out[i] = a[i] * b[i];
  return out;
}

// Of the bias of the convolution before the norm.
Doubles bias_gradient(const Norm& norm, const Doubles& total) {
  return norm.batch ? Doubles(total.size(), 0) : times(norm.scale, total);
}

int64_t pixels_of(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

Doubles total_count(const std::string& group, const Tensor& like, Doubles counts) {
  sum_over(group, like, {&counts});
  return counts;
}

// relu6 of the norm of e [N, C, H, W], the count of pixels, the batch's mean and variance.
void batch_norm_relu6(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor input = in.next<Tensor>();
  const ConvNorm stage{std::nullopt,           std::nullopt,           in.next<MaybeTensor>(), in.next<MaybeTensor>(),
                       in.next<MaybeTensor>(), in.next<MaybeTensor>(), in.next<double>()};
  const std::string group = in.next<std::string>();
  const Tensor e = dense(input, "e");
  const double local = double(pixels_of(e));
  const Doubles count = total_count(group, e, {local});
  Tensor mean = nothing(e), var = nothing(e);
  if (!stage.mean) {
    std::tie(mean, var) = channel_moments(e);
    join(group, local, count[0], mean, var);
  }
  const Norm norm(stage, std::nullopt, mean, var, count[0], e, e.size(1));
  const std::array<Tensor, 4> results = {norm.of(e, std::nullopt, true), statistic(count, e), mean, var};
  for (size_t i = 0; i < results.size(); ++i) stack[i] = torch::stable::detail::from(results[i]);
}

// The gradients of e, of the norm's scale and shift, and of the bias of the convolution that made e.
void batch_norm_relu6_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor gradient = in.next<Tensor>(), input = in.next<Tensor>(), pixels = in.next<Tensor>();
  const Tensor batch_mean = in.next<Tensor>(), batch_var = in.next<Tensor>();
  const ConvNorm stage{std::nullopt,           std::nullopt,           in.next<MaybeTensor>(), in.next<MaybeTensor>(),
                       in.next<MaybeTensor>(), in.next<MaybeTensor>(), in.next<double>()};
  const std::string group = in.next<std::string>();
  const Tensor dy = dense(gradient, "dy"), e = dense(input, "e"), count = statistic_of(pixels, "count", {1});
  const std::vector<int64_t> channels = {stage.mean ? 0 : e.size(1)};
  const Tensor mean = statistic_of(batch_mean, "e_mean", channels), var = statistic_of(batch_var, "e_var", channels);
  const Norm norm(stage, std::nullopt, mean, var, data_of(count)[0], e, e.size(1));
  const auto [de, sums] = norm_backward(norm, dy, e, true, group);
  const Doubles scale = times(norm.rstd, sums.product), bias = bias_gradient(norm, sums.total);
  const std::array<Tensor, 4> results = {de, rows(e, {&scale}), rows(e, {&sums.total}), rows(e, {&bias})};
  for (size_t i = 0; i < results.size(); ++i) stack[i] = torch::stable::detail::from(results[i]);
}

// ------------------------------------------------------------------------------------------------------- a block

// What forward finds and backward needs, in the order of _STATISTICS in training.py.
struct Statistics {
  Tensor counts;      // pixels of e and of z, over all processes
  Tensor x_center;    // what x is less by in the kernels
  Tensor x_mean;      // of all processes
  Tensor x_products;  // deviations of this process's x from that mean
  Tensor e_mean, e_var, d_mean, d_var, z_mean, z_var;
};

// What forward and backward both begin with: the weights as the passes take them.
struct Block {
  ConvNorm expand, depthwise, project;
  int64_t stride, dilation;
  std::vector<int64_t> padding;
  bool residual;
  std::string group;
  Tensor x, centered;
  int64_t in, hidden, out;
  MaybeTensor weight, bias;  // of the expansion with its BatchNorm in it

  Block(const Tensor& input, Arguments& a)
      : expand(a.next_stage()),
        depthwise(a.next_stage()),
        project(a.next_stage()),
        stride(a.next<int64_t>()),
        dilation(a.next<int64_t>()),
        padding(a.next<std::vector<int64_t>>()),
        residual(a.next<bool>()),
        group(a.next<std::string>()),
        x(input),
        centered(input) {
    x = centered = dense(input, "x");
    STD_TORCH_CHECK(depthwise.weight && project.weight, "depthwise_weight and project_weight must be given");
    STD_TORCH_CHECK(depthwise.weight->dim() == 4 && project.weight->dim() == 4,
                    "depthwise_weight and project_weight must have 4 dimensions");
    in = x.size(1);
    hidden = depthwise.weight->size(0);
    out = project.weight->size(0);
    check_options(in, hidden, out, stride, dilation, padding);
    if (expand.weight) expand.weight = weight_of(*expand.weight, "expand_weight", x, {hidden, in, 1, 1});
    depthwise.weight = weight_of(*depthwise.weight, "depthwise_weight", x, {hidden, 1, 3, 3});
    project.weight = weight_of(*project.weight, "project_weight", x, {out, hidden, 1, 1});
    const int64_t height = out_extent(x.size(2), padding[2] + padding[3], stride, dilation);
    const int64_t width = out_extent(x.size(3), padding[0] + padding[1], stride, dilation);
    STD_TORCH_CHECK(!residual || (in == out && height == x.size(2) && width == x.size(3)),
                    "a residual needs an output of the shape of x, ", shape_of(x));
  }

  // Which of Gradients' places there is an argument for.
  int64_t differentiable() const {
    int64_t bits = 1, place = 1;
    for (const ConvNorm* s : {&expand, &depthwise, &project}) {
      for (const MaybeTensor* t : {&s->weight, &s->bias, &s->scale, &s->shift})
        bits |= int64_t(t->has_value()) << place++;
    }
    return bits;
  }

  double pixels() const { return double(pixels_of(x)); }

  // body(row h of the expansion, w): every weight of a block of hidden channels, input channel by input channel.
  template <class Body>
  void for_weights(int64_t first, int64_t count, const Body& body) const {
    with_data(*expand.weight, [&](const auto* w) {
      for (int64_t i = 0; i < in; ++i) {
        for (int64_t c = 0; c < count; ++c) body(i, c, double(w[(first + c) * in + i]));
      }
    });
  }

  // weight . v for v per input channel.
  Doubles expanded(const Doubles& v) const {
    Doubles result(hidden, 0);
    on_channels(hidden, [&](int64_t first, int64_t count) {
      for_weights(first, count, [&](int64_t i, int64_t c, double w) { result[first + c] += w * v[i]; });
    });
    return result;
  }

  // x_center, x_mean, x_products, e_mean, e_var. A large mean leaves x first, or e, and g summed over the pixels, would
  // lose their last digits to it.
  void expand_moments(Statistics* s) const {
    const Doubles total = values(s->counts);
    const bool batch = !expand.mean;
    Tensor mean = nothing(x), products = mean;
    std::tie(mean, products) = batch ? moments(x) : channel_moments(x);
    const Doubles m = values(mean);
    double* p = data_of(products);
    const int64_t step = batch ? in + 1 : 1;
    bool large = false;
    for (int64_t i = 0; i < in; ++i) large |= m[i] * m[i] * pixels() > 16 * p[i * step];
    s->x_center = statistic(large ? values(rows(x, {&m})) : Doubles(in, 0), x);
    if (!batch) return;
    Doubles joint = m;
    if (!group.empty()) {
      for (double& v : joint) v *= pixels();
      sum_over(group, x, {&joint});
      for (double& v : joint) v /= total[0];
      for (int64_t i = 0; i < in; ++i) {
        for (int64_t j = 0; j < in; ++j) p[i * in + j] += pixels() * (m[i] - joint[i]) * (m[j] - joint[j]);
      }
    }
    s->x_mean = statistic(joint, x);
    s->x_products = products;
    Doubles all = values(products);
    sum_over(group, x, {&all});
    s->e_mean = statistic(expanded(joint), x);
    s->e_var = doubles({hidden}, x);
    double* var = data_of(s->e_var);
    covariance_times(select_kernel(dtype_of(x, "x")), all.data(), expand.weight->data_ptr(), in, hidden, nullptr, var,
                     thread_count(), on_torch_threads);
    // Below 0 by rounding, where terms cancel; a NaN stays one.
    for (int64_t c = 0; c < hidden; ++c) var[c] = var[c] < 0 ? 0 : var[c] / total[0];
  }

  Norm expand_norm(const Statistics& s) const {
    return Norm(expand, expand.bias, s.e_mean, s.e_var, data_of(s.counts)[0], x, hidden);
  }
  Norm depthwise_norm(const Statistics& s) const {
    return Norm(depthwise, depthwise.bias, s.d_mean, s.d_var, data_of(s.counts)[1], x, hidden);
  }
  Norm project_norm(const Statistics& s) const {  // the bias is in z
    return Norm(project, std::nullopt, s.z_mean, s.z_var, data_of(s.counts)[1], x, out);
  }

  // The expansion with its BatchNorm in it.
  void fold_expand(const Statistics& s) {
    if (!expand.weight) return;
    const Norm norm = expand_norm(s);
    Doubles shift = norm.shift, center = values(s.x_center);
    if (std::any_of(center.begin(), center.end(), [](double c) { return c != 0; })) {
      const Doubles moved = expanded(center), one(in, 1);
      for (int64_t c = 0; c < hidden; ++c) shift[c] += norm.scale[c] * moved[c];
      for (double& c : center) c = -c;
      centered = affine(x, std::nullopt, rows(x, {&one, &one, &center}), std::nullopt, false);
    }
    weight = scaled(*expand.weight, norm.scale);
    bias = rows(x, {&shift});
  }

  // A weight with each output channel times its scale.
  Tensor scaled(const Tensor& w, const Doubles& scale) const {
    const Tensor t = new_tensor({w.size(0), w.size(1), w.size(2), w.size(3)}, w, MemoryFormat::Contiguous);
    const int64_t row = w.numel() / w.size(0);
    with_data(w, [&](const auto* from) {
      auto* to = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(from)>>*>(t.data_ptr());
      for (size_t c = 0; c < scale.size(); ++c) {
        for (int64_t i = 0; i < row; ++i) to[c * row + i] = scale[c] * double(from[c * row + i]);
      }
    });
    return t;
  }
};

// As forward gave them for this block.
Statistics checked(const Block& b, const Statistics& s) {
  const int64_t x = b.expand.weight ? b.in : 0, e = b.expand.weight && !b.expand.mean ? 1 : 0;
  const int64_t d = b.depthwise.mean ? 0 : b.hidden, z = b.project.mean ? 0 : b.out;
  const std::vector<int64_t> products = e ? std::vector<int64_t>{b.in, b.in} : std::vector<int64_t>{0};
  return {statistic_of(s.counts, "counts", {2}),
          statistic_of(s.x_center, "x_center", {x}),
          statistic_of(s.x_mean, "x_mean", {e * b.in}),
          statistic_of(s.x_products, "x_products", products),
          statistic_of(s.e_mean, "e_mean", {e * b.hidden}),
          statistic_of(s.e_var, "e_var", {e * b.hidden}),
          statistic_of(s.d_mean, "d_mean", {d}),
          statistic_of(s.d_var, "d_var", {d}),
          statistic_of(s.z_mean, "z_mean", {z}),
          statistic_of(s.z_var, "z_var", {z})};
}

// y, z and the statistics.
void block_train(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor input = in.next<Tensor>();
  Block b(input, in);
  const Tensor& x = b.x;
  const int64_t height = out_extent(x.size(2), b.padding[2] + b.padding[3], b.stride, b.dilation);
  const int64_t width = out_extent(x.size(3), b.padding[0] + b.padding[1], b.stride, b.dilation);
  const double count = double(x.size(0) * height * width);
  const Tensor none = nothing(x);
  Statistics s{none, none, none, none, none, none, none, none, none, none};
  const Doubles counts = total_count(b.group, x, {b.pixels(), count});
  s.counts = statistic(counts, x);
  if (b.expand.weight) b.expand_moments(&s);
  b.fold_expand(s);
  if (!b.depthwise.mean) {
    std::tie(s.d_mean, s.d_var) = call<Tensor, Tensor>("mnv2_fused::filter_moments", b.centered, b.weight, b.bias,
                                                       *b.depthwise.weight, b.stride, b.dilation, b.padding);
    join(b.group, count, counts[1], s.d_mean, s.d_var);
  }
  const Norm depthwise = b.depthwise_norm(s);
  const Doubles zero(b.out, 0);
  const Tensor bias = b.project.bias ? *b.project.bias : rows(x, {&zero});
  const Tensor z = std::get<0>(call<Tensor>(
      "mnv2_fused::inverted_residual", b.centered, b.weight, b.bias, b.scaled(*b.depthwise.weight, depthwise.scale),
      rows(x, {&depthwise.shift}), *b.project.weight, bias, b.stride, b.dilation, b.padding, false, false, false));
  if (!b.project.mean) {
    std::tie(s.z_mean, s.z_var) = channel_moments(z);
    join(b.group, count, counts[1], s.z_mean, s.z_var);
  }
  const Tensor y = b.project_norm(s).of(z, b.residual ? MaybeTensor(x) : std::nullopt, false);
  const std::array<Tensor, 12> results = {y,        z,       s.counts, s.x_center, s.x_mean, s.x_products,
                                          s.e_mean, s.e_var, s.d_mean, s.d_var,    s.z_mean, s.z_var};
  // Empty ones are told apart: an op's results must not share memory.
  for (size_t i = 0; i < results.size(); ++i) {
    stack[i] = torch::stable::detail::from(i > 1 && !results[i].numel() ? nothing(x) : results[i]);
  }
}

// The gradients, in the order of the arguments that have one: x, then weight, bias, scale and shift of each stage.
struct Gradients {
  static constexpr int kCount = 13;
  enum Place { kX, kExpand, kDepthwise = 5, kProject = 9 };
  enum Field { kWeight, kBias, kScale, kShift };

  const Tensor& like;
  int64_t wanted;  // bits
  std::vector<Tensor> results;

  Gradients(const Tensor& x, int64_t bits) : like(x), wanted(bits) {
    for (int i = 0; i < kCount; ++i) results.push_back(new_tensor({0}, x, MemoryFormat::Contiguous));
  }
  bool wants(int place) const { return wanted >> place & 1; }
  bool wants_any(int place) const { return wanted >> place & 15; }
  void set(int place, const Tensor& t) {
    if (wants(place)) results[place] = t;
  }
  void set(int place, const Doubles& from) {
    if (wants(place)) results[place] = rows(like, {&from});
  }
  void set_norm(int place, const Norm& norm, const Sums& sums) {
    set(place + kBias, bias_gradient(norm, sums.total));
    set(place + kScale, times(norm.rstd, sums.product));
    set(place + kShift, sums.total);
  }
  // A weight's, from rows [k][channels] to [channels][k], or where `rows_first` as it is.
  void set_weight(int place, const Tensor& weight, const Tensor& from, bool rows_first) {
    if (!wants(place)) return;
    const std::vector<int64_t> shape = {weight.size(0), weight.size(1), weight.size(2), weight.size(3)};
    const Tensor t = new_tensor(shape, weight, MemoryFormat::Contiguous);
    const int64_t rows_ = from.size(0), columns = from.size(1);
    const double* source = data_of(from);
    with_data(t, [&](auto* to) {
      for (int64_t i = 0; i < rows_; ++i) {
        for (int64_t j = 0; j < columns; ++j)
          to[rows_first ? i * columns + j : j * rows_ + i] = source[i * columns + j];
      }
    });
    results[place] = t;
  }
};

// Through e's BatchNorm, from G (`gradient`, [in][hidden], over x less its center, as the kernel had it) and the sums
// of ge and of ge h. Adds to dx what came through the statistics.
void expand_backward(const Block& b, const Statistics& s, const Tensor& dx, const Tensor& dy, const Tensor& gradient,
                     const double* sums, Gradients* result) {
  const Norm norm = b.expand_norm(s);
  const int64_t in = b.in, hidden = b.hidden;
  const double *g = data_of(gradient), *with_h = sums + hidden;
  const Doubles center = values(s.x_center), x_mean = values(s.x_mean);
  Doubles mean(in), size(in, 0);
  for (int64_t i = 0; i < in; ++i) {
    mean[i] = norm.batch ? x_mean[i] - center[i] : -center[i];
    if (norm.batch) size[i] = std::sqrt(data_of(s.x_products)[i * (in + 1)] / b.pixels());
  }
  // The sum of ge (e - mean of e), in two ways. Where ge is not 0, h is the affine map of e, so the sum of ge h gives
  // it, unless the map is flat. So does G, whose large terms cancel where channels are correlated: worse than those of
  // h, if it is not their mean that is large.
  Sums found{Doubles(sums, sums + hidden), Doubles(hidden)};
  on_channels(hidden, [&](int64_t first, int64_t count) {
    double product[kBlock] = {}, gap[kBlock] = {}, deviation[kBlock] = {}, offset[kBlock] = {};
    b.for_weights(first, count, [&](int64_t i, int64_t c, double w) {
      product[c] += g[i * hidden + first + c] * w;
      gap[c] += mean[i] * w;
      deviation[c] += size[i] * std::abs(w);
      offset[c] += std::abs(mean[i] * w);
    });
    for (int64_t c = 0; c < count; ++c) {
      const int64_t h = first + c;
      const double scale = norm.scale[h], e_mean = norm.batch ? gap[c] : norm.mean[h] + gap[c];
      const bool through_h = std::abs(scale) > 1e-3 * norm.rstd[h] && (!norm.batch || deviation[c] > offset[c]);
      found.product[h] = through_h ? (with_h[h] - sums[h] * (norm.shift[h] + scale * norm.mean[h])) / scale
                                   : product[c] - sums[h] * e_mean;
    }
  });
  result->set_norm(Gradients::kExpand, norm, found);
  const bool want_weight = result->wants(Gradients::kExpand);
  const Tensor weight = new_tensor({want_weight ? hidden : 0, in, 1, 1}, b.x, MemoryFormat::Contiguous);
  // Row h of the weight's gradient: scale G, and what value(i, h) says.
  const auto set_weight = [&](const auto& value) {
    if (!want_weight) return;
    with_data(weight, [&](auto* to) {
      on_channels(hidden, [&](int64_t first, int64_t count) {
        for (int64_t i = 0; i < in; ++i) {
          for (int64_t h = first; h < first + count; ++h) {
            to[h * in + i] = norm.scale[h] * g[i * hidden + h] + value(i, h);
          }
        }
      });
    });
    result->set(Gradients::kExpand, weight);
  };
  if (!norm.batch) {
    return set_weight([&](int64_t i, int64_t h) { return center[i] * norm.scale[h] * found.total[h]; });
  }

  Sums joint = found;
  sum_over(b.group, b.x, {&joint.total, &joint.product});
  Doubles minus_q(hidden), constant(hidden);
  for (int64_t h = 0; h < hidden; ++h) {
    minus_q[h] = -norm.scale[h] * norm.rstd[h] * norm.rstd[h] * joint.product[h] / norm.count;
    constant[h] = norm.scale[h] * joint.total[h] / norm.count;
  }
  const Kernel& kernel = select_kernel(dtype_of(b.x, "x"));
  if (want_weight) {
    const Tensor products = doubles({in, hidden}, b.x);
    const double* p = data_of(products);
    covariance_times(kernel, data_of(s.x_products), b.expand.weight->data_ptr(), in, hidden, data_of(products), nullptr,
                     thread_count(), on_torch_threads);
    // Of one process alone, the deviations of x and those of the gradient do not add up to 0.
    Doubles deviation(in, 0), rest(hidden, 0);
    if (!b.group.empty()) {
      const Doubles own = values(std::get<0>(channel_moments(b.x)));
      for (int64_t i = 0; i < in; ++i) deviation[i] = b.pixels() * (own[i] - x_mean[i]);
      const Doubles moved = b.expanded(deviation);
      for (int64_t h = 0; h < hidden; ++h) {
        rest[h] = norm.scale[h] * found.total[h] - constant[h] * b.pixels() + minus_q[h] * moved[h];
      }
    }
    set_weight([&](int64_t i, int64_t h) {
      return minus_q[h] * p[i * hidden + h] - mean[i] * norm.scale[h] * found.total[h] + x_mean[i] * rest[h] -
             deviation[i] * constant[h];
    });
  }
  if (!result->wants(Gradients::kX)) return;
  const Tensor matrix = new_tensor({in, in}, b.x, MemoryFormat::Contiguous);
  gram(kernel, b.expand.weight->data_ptr(), rows(b.x, {&minus_q}).data_ptr(), in, hidden, matrix.data_ptr(),
       thread_count(), on_torch_threads);
  Doubles shift(in, 0);
  b.for_weights(0, hidden, [&](int64_t i, int64_t h, double w) { shift[i] -= w * constant[h]; });
  with_data(matrix, [&](const auto* m) {
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t j = 0; j < in; ++j) shift[i] -= double(m[i * in + j]) * mean[j];
    }
  });
  const MaybeTensor residual = b.residual ? MaybeTensor(dy) : std::nullopt;
  call<>("mnv2_fused::matrix_add_", dx, b.centered, matrix, rows(b.x, {&shift}), residual);
}

// The gradients that are wanted; the others are empty.
void block_train_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor gradient = in.next<Tensor>(), projection = in.next<Tensor>();
  const auto next = [&] { return in.next<Tensor>(); };
  const Statistics given{next(), next(), next(), next(), next(), next(), next(), next(), next(), next()};
  const int64_t wanted = in.next<int64_t>();
  const Tensor input = in.next<Tensor>();
  Block b(input, in);
  const Tensor dy = dense(gradient, "dy"), z = dense(projection, "z");
  const Statistics s = checked(b, given);
  Gradients result(b.x, wanted & b.differentiable());
  using G = Gradients;

  // z's BatchNorm, over narrow tensors.
  const Norm project = b.project_norm(s);
  const auto [dz_, project_sums] = norm_backward(project, dy, z, false, b.group);
  const Tensor dz = dz_;
  result.set_norm(G::kProject, project, project_sums);

  // The recomputed part: with batch statistics once for d's sums, once more for what is below; else once for all.
  const bool want_x = result.wants(G::kX),
             below = want_x || result.wants_any(G::kExpand) || result.wants(G::kDepthwise);
  if (below || result.wants_any(G::kDepthwise) || result.wants(G::kProject)) {
    b.fold_expand(s);
    const Norm norm = b.depthwise_norm(s);
    const bool through_e = b.expand.weight && (result.wants_any(G::kExpand) || (want_x && !b.expand.mean));
    const int64_t bits = kDx * want_x | kExpandGradient * through_e | kDepthwiseGradient * result.wants(G::kDepthwise);
    const auto gradients = [&](const std::array<Doubles, 3>& pqr, int64_t which) {
      const Tensor table = rows(b.x, {&norm.scale, &norm.shift, &norm.mean, &pqr[0], &pqr[1], &pqr[2]});
      return call<Tensor, Tensor, Tensor, Tensor, Tensor>("mnv2_fused::block_gradients", dz, b.centered, b.weight,
                                                          b.bias, *b.depthwise.weight, *b.project.weight, table,
                                                          b.stride, b.dilation, b.padding, which);
    };
    const Doubles zero(b.hidden, 0);
    const bool once = !norm.batch;
    auto [dx, expand, depthwise, project_gradient, sums] =
        gradients({norm.scale, zero, zero}, (once ? bits : 0) | kProjectGradient * result.wants(G::kProject));
    Sums found = norm.sums(data_of(sums), rows(b.x, {&norm.mean}));
    result.set_norm(G::kDepthwise, norm, found);
    result.set_weight(G::kProject, *b.project.weight, project_gradient, true);
    if (below && !once) {
      sum_over(b.group, b.x, {&found.total, &found.product});
      std::tie(dx, expand, depthwise, std::ignore, sums) = gradients(norm.backward(found), bits);
    }
    if (below) {
      result.set_weight(G::kDepthwise, *b.depthwise.weight, depthwise, false);
      if (through_e) expand_backward(b, s, dx, dy, expand, data_of(sums) + 2 * b.hidden, &result);
      if (want_x && b.residual && (!b.expand.weight || b.expand.mean)) {
        const Doubles one(b.in, 1), none(b.in, 0);
        dx = affine(dx, dy, rows(b.x, {&one, &one, &none}), std::nullopt, false);
      }
      result.set(G::kX, dx);
    }
  }
  for (int i = 0; i < G::kCount; ++i) stack[i] = torch::stable::detail::from(result.results[i]);
}

#define MNV2_STAGE(name)                                                                                          \
  "Tensor? " name "_weight, Tensor? " name "_bias, Tensor? " name "_scale, Tensor? " name "_shift, Tensor? " name \
  "_mean, Tensor? " name "_var, float " name "_eps, "
#define MNV2_BLOCK                                          \
  "Tensor x, " MNV2_STAGE("expand") MNV2_STAGE("depthwise") \
      MNV2_STAGE("project") "int stride, int dilation, int[] padding, bool residual, str group"
#define MNV2_STATISTICS                                                                                            \
  "Tensor counts, Tensor x_center, Tensor x_mean, Tensor x_products, Tensor e_mean, Tensor e_var, Tensor d_mean, " \
  "Tensor d_var, Tensor z_mean, Tensor z_var"
#define MNV2_TENSORS_4 "Tensor, Tensor, Tensor, Tensor"

}  // namespace
}  // namespace mnv2_fused

STABLE_TORCH_LIBRARY_FRAGMENT(mnv2_fused, m) {
  m.def("block_train(" MNV2_BLOCK ") -> (" MNV2_TENSORS_4 ", " MNV2_TENSORS_4 ", " MNV2_TENSORS_4 ")");
  m.def("block_train_backward(Tensor dy, Tensor z, " MNV2_STATISTICS ", int wanted, " MNV2_BLOCK
        ") -> (Tensor, " MNV2_TENSORS_4 ", " MNV2_TENSORS_4 ", " MNV2_TENSORS_4 ")");
  m.def(
      "batch_norm_relu6(Tensor e, Tensor? scale, Tensor? shift, Tensor? mean, Tensor? var, float eps, str group) -> "
      "(" MNV2_TENSORS_4 ")");
  m.def(
      "batch_norm_relu6_backward(Tensor dy, Tensor e, Tensor count, Tensor e_mean, Tensor e_var, Tensor? scale, "
      "Tensor? shift, Tensor? mean, Tensor? var, float eps, str group) -> (" MNV2_TENSORS_4 ")");
}

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("block_train", &mnv2_fused::block_train);
  m.impl("block_train_backward", &mnv2_fused::block_train_backward);
  m.impl("batch_norm_relu6", &mnv2_fused::batch_norm_relu6);
  m.impl("batch_norm_relu6_backward", &mnv2_fused::batch_norm_relu6_backward);
}
