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
// What is per pixel is computed by the passes of training_passes.cpp, what is per channel by the steps of algebra.h.
// This file chains them, and looks at no value on the way where tensors are on a GPU: nothing waits for it.
#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "algebra.h"
#include "tensors.h"

// What an op that was called has thrown; from torch 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace mnv2_fused {
namespace {

using namespace algebra;
using MaybeTensor = std::optional<Tensor>;

// ----------------------------------------------------------------------------------------- arguments and results

// An activation, dense.
Tensor dense(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must be [N, C, H, W], got ", shape_of(x));
  if (on_cpu(x)) {
    dtype_of(x, name);
  } else {
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float, name,
                    " must be float16, bfloat16 or float32, which there are CUDA kernels for");
  }
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

// A parameter or buffer, dense. Beside 16-bit numbers it may be float32, as autocast keeps weights, and as norms are
// kept.
Tensor parameter(const Tensor& t, const char* name, const Tensor& x, const std::vector<int64_t>& shape) {
  if (on_cpu(x)) return weight_of(t, name, x, shape);
  check_size(t, name, shape);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == x.scalar_type(), name,
                  " must be float32 or have the dtype of x");
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on the device of x");
  return torch::stable::contiguous(t);
}

// A statistic as forward gave it.
Tensor statistic(const Tensor& t, const char* name, const Tensor& x, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.device() == x.device(), name,
                  " must be float64 on the device of x");
  check_size(t, name, shape);
  return torch::stable::contiguous(t);
}

// A convolution and its BatchNorm, in the order of ConvNorm in training.py.
struct ConvNorm {
  MaybeTensor weight;  // none: there is no expansion
  MaybeTensor bias;
  MaybeTensor scale, shift;  // the BatchNorm's weight and bias; none: it is not affine
  MaybeTensor mean, var;     // its running statistics where it is frozen; none: those of the batch are taken
  double eps;

  // What is per channel, checked.
  void check(const Tensor& x, int64_t channels) {
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "running mean and var go together: give both or neither");
    const auto vector = [&](MaybeTensor* t, const char* name) {
      if (*t) *t = parameter(**t, name, x, {channels});
    };
    vector(&bias, "bias");
    vector(&scale, "scale");
    vector(&shift, "shift");
    vector(&mean, "running mean");
    vector(&var, "running var");
  }
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
  ConvNorm next_norm() {
    return {std::nullopt,        std::nullopt,        next<MaybeTensor>(), next<MaybeTensor>(),
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

void give(StableIValue* stack, const std::vector<Tensor>& results) {
  for (const Tensor& t : results) *stack++ = torch::stable::detail::from(t);
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

std::tuple<Tensor, Tensor> channel_moments(const Tensor& x) {
  return call<Tensor, Tensor>(MNV2_OPS "channel_moments", x);
}

Tensor affine(const Tensor& a, const MaybeTensor& b, const Tensor& coefficients, const MaybeTensor& gate, bool relu6) {
  return std::get<0>(call<Tensor>(MNV2_OPS "affine", a, b, coefficients, gate, relu6));
}

// The sum over the processes of a torch.distributed group, by its name (training.py); of one process where there is
// none.
Tensor sum_over(const std::string& group, const Tensor& own) {
  return group.empty() ? own : std::get<0>(call<Tensor>("mnv2_fused::all_reduce", own, group));
}

// ------------------------------------------------------------------------------------------- tensors as steps see them

// f(pointer to the tensor's elements).
template <class F>
void with_elements(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(static_cast<double*>(t.data_ptr()));
    case ScalarType::Half:
      return f(static_cast<Half*>(t.data_ptr()));
    case ScalarType::BFloat16:
      return f(static_cast<Bfloat16*>(t.data_ptr()));
    default:
      return f(static_cast<float*>(t.data_ptr()));
  }
}

Element element_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBfloat16;
    default:
      return Element::kFloat;
  }
}

// From its element `first` on.
Results results(const Tensor& t, int64_t first = 0) {
  return {static_cast<char*>(t.data_ptr()) + first * t.element_size(), element_of(t)};
}
Numbers numbers(const Tensor& t, int64_t first = 0) {
  const Results all = results(t, first);
  return {all.data, all.type};
}
Numbers numbers(const MaybeTensor& t) { return t ? numbers(*t) : Numbers{}; }

Tensor nothing(const Tensor& like) { return doubles({0}, like); }

// What passes take beside activations.
Tensor passed(const std::vector<int64_t>& shape, const Tensor& x) {
  return new_tensor(shape, x, MemoryFormat::Contiguous, sum_type(x));
}
Tensor passed(const Tensor& weight, const Tensor& x) {
  return weight.scalar_type() == sum_type(x) ? weight : torch::stable::to(weight, sum_type(x));
}

// A norm of v; mean and variance are the batch's. The convolution's bias is given where it is not in v.
Norm norm_of(const ConvNorm& s, const MaybeTensor& bias, const Tensor& mean, const Tensor& var) {
  return {.batch_mean = s.mean ? nullptr : data_of(mean),
          .batch_var = s.mean ? nullptr : data_of(var),
          .mean = numbers(s.mean),
          .var = numbers(s.var),
          .scale = numbers(s.scale),
          .shift = numbers(s.shift),
          .bias = numbers(bias),
          .eps = s.eps};
}

// ------------------------------------------------------------------------------------------------- where steps run

// On the CPU one after the other, and where they have loops of their own on torch's threads.
template <class Step>
void loop(const Channels<Step>& steps) {
  for (int64_t c = 0; c < steps.count; ++c) steps.step(c);
}

constexpr int64_t kBlock = 8;

template <class Step>
void loop(const Blocks<Step>& steps) {
  torch::stable::parallel_for(0, ceil_div(steps.count, kBlock), 8, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kBlock; first < std::min(end * kBlock, steps.count); first += kBlock) {
      if (first + kBlock <= steps.count) {
        steps.step.template run<kBlock>(first);
      } else {
        for (int64_t c = first; c < steps.count; ++c) steps.step.template run<1>(c);
      }
    }
  });
}

// By panels of columns, which a transposed matrix has as rows.
template <class Step>
void loop(const Elements<Step>& steps) {
  if (!steps.rows) return;
  constexpr int64_t kWorth = 4096;
  const int64_t grain = 1 + kWorth / (kBlock * steps.rows);
  torch::stable::parallel_for(0, ceil_div(steps.columns, kBlock), grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kBlock; first < end * kBlock; first += kBlock) {
      const int64_t past = std::min(first + kBlock, steps.columns);
      for (int64_t i = 0; i < steps.rows; ++i) {
        for (int64_t j = first; j < past; ++j) steps.step(i, j);
      }
    }
  });
}

template <class A, class B>
void loop(const Beside<A, B>& steps) {
  loop(steps.a);
  loop(steps.b);
}

// One call of an op: runs its steps where its tensors are, and has memory for what is between them.
class Work {
 public:
  // `size` doubles are allocated at once; more where they do not suffice.
  Work(const Tensor& x, int64_t size) : x_(x), size_(size) {
    if (!on_cpu(x)) device_.emplace(x);
  }

  double* take(int64_t n) {
    if (pieces_.empty() || used_ + n > pieces_.back().numel()) {
      pieces_.push_back(doubles({std::max(n, size_)}, x_));
      used_ = 0;
    }
    used_ += n;
    return data_of(pieces_.back()) + used_ - n;
  }

  template <class Steps>
  void run(const Steps& steps) const {
    if constexpr (!kEmulated) {
      if (on_cpu(x_)) return loop(steps);
    }
#if defined(MNV2_FUSED_WITH_CUDA) || defined(MNV2_EMULATED)
    if (!steps.size()) return;
    const int error = cuda::each(steps, steps.size(), device_->stream());
    STD_TORCH_CHECK(error == 0, "CUDA: ", cuda::error_text(error));
#endif
  }

 private:
  const Tensor x_;
  const int64_t size_;
  std::vector<Tensor> pieces_;
  int64_t used_ = 0;
  std::optional<Device> device_;
};

// ---------------------------------------------------------------------------------------------------- BatchNorm

int64_t pixels_of(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

// The mean over the pixels of all processes, from that of the `count` of this one.
Tensor joint_mean(const Work& work, const std::string& group, double count, const double* total, const Tensor& own) {
  if (group.empty()) return own;
  const int64_t n = own.numel();
  const Tensor share = doubles({n}, own), joint = doubles({n}, own);
  work.run(Channels{n, Scaled{count, data_of(own), data_of(share)}});
  work.run(Channels{n, Mean{data_of(sum_over(group, share)), total, data_of(joint)}});
  return joint;
}

// From mean and squared deviations over the `count` pixels of this process to those over the pixels of all.
void join(const Work& work, const std::string& group, double count, const double* total, Tensor* mean,
          Tensor* squares) {
  if (group.empty()) return;
  const Tensor joint = joint_mean(work, group, count, total, *mean);
  const int64_t n = joint.numel();
  work.run(Channels{n, Moved{count, data_of(*mean), data_of(joint), data_of(*squares), n}});
  *mean = joint;
  *squares = sum_over(group, *squares);
}

// The variance from such squares, in their place; nothing of a norm that is frozen.
Mean variance(const Norm& norm, const Tensor& squares, const double* total) {
  return norm.batch() ? Mean{data_of(squares), total, data_of(squares)} : Mean{};
}

// From the sums that a pass has `found`, about `center`: the gradients of a norm's parameters, and into `table` p, q,
// r. Where these are `wanted`, processes that take their statistics together add up their sums.
void norm_backward(const Work& work, const std::string& group, const Norm& norm, const Tensor& found, Numbers center,
                   const NormGradients& gradients, const double* count, Results table, bool wanted) {
  const int64_t channels = found.size(1);
  const Tensor sums = doubles({2, channels}, found);
  const NormSums own{norm, data_of(found), center, data_of(sums), channels, gradients};
  NormBackward back{norm, data_of(sums), count, table, channels};
  if (group.empty() || !norm.batch() || !wanted) return work.run(Channels{channels, Then{own, back}});
  work.run(Channels{channels, own});
  const Tensor all = sum_over(group, sums);
  back.sums = data_of(all);
  work.run(Channels{channels, back});
}

// Back through a norm of v, and through the relu6 after it where there is a gate.
Tensor norm_backward(const Work& work, const std::string& group, const Norm& norm, const Tensor& dy, const Tensor& v,
                     const Tensor& center, const MaybeTensor& gate, const NormGradients& gradients,
                     const double* count) {
  const auto [found] = call<Tensor>(MNV2_OPS "channel_products", dy, v, center, gate);
  const Tensor table = passed({3, v.size(1)}, v);
  norm_backward(work, group, norm, found, numbers(center), gradients, count, results(table), true);
  return affine(dy, norm.batch() || gate ? MaybeTensor(v) : std::nullopt, table, gate, false);
}

// relu6 of the norm of e [N, C, H, W], the count of pixels, the batch's mean and variance.
void batch_norm_relu6(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor input = in.next<Tensor>();
  ConvNorm stage = in.next_norm();
  const std::string group = in.next<std::string>();
  const Tensor e = dense(input, "e");
  const int64_t channels = e.size(1);
  stage.check(e, channels);
  const Work work(e, 0);
  const double local = double(pixels_of(e));
  const Tensor own = doubles({1}, e);
  work.run(Channels{1, Counts{{local, 0}, data_of(own)}});
  const Tensor count = sum_over(group, own);
  Tensor mean = nothing(e), var = nothing(e);
  if (!stage.mean) {
    std::tie(mean, var) = channel_moments(e);
    join(work, group, local, data_of(count), &mean, &var);
  }
  const Norm norm = norm_of(stage, std::nullopt, mean, var);
  const Tensor table = passed({3, channels}, e);
  work.run(Channels{channels, Then{variance(norm, var, data_of(count)), NormTable{norm, results(table), channels}}});
  give(stack, {affine(e, std::nullopt, table, std::nullopt, true), count, mean, var});
}

// The gradients of e, of the norm's scale and shift, and of the bias of the convolution that made e.
void batch_norm_relu6_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor gradient = in.next<Tensor>(), input = in.next<Tensor>(), pixels = in.next<Tensor>();
  const Tensor batch_mean = in.next<Tensor>(), batch_var = in.next<Tensor>();
  ConvNorm stage = in.next_norm();
  const std::string group = in.next<std::string>();
  const Tensor dy = dense(gradient, "dy"), e = dense(input, "e"), count = statistic(pixels, "count", e, {1});
  const int64_t channels = e.size(1);
  stage.check(e, channels);
  const std::vector<int64_t> shape = {stage.mean ? 0 : channels};
  const Tensor mean = statistic(batch_mean, "e_mean", e, shape), var = statistic(batch_var, "e_var", e, shape);
  const Norm norm = norm_of(stage, std::nullopt, mean, var);
  const Work work(e, 0);
  const Tensor center = passed({channels}, e), gate = passed({2, channels}, e);
  work.run(Channels{channels, NormBounds{norm, results(center), results(gate), channels}});
  const auto gradient_of = [&](const MaybeTensor& t) {
    return new_tensor({channels}, t.value_or(e), MemoryFormat::Contiguous);
  };
  const Tensor scale = gradient_of(stage.scale), shift = gradient_of(stage.shift), bias = gradient_of(std::nullopt);
  const NormGradients gradients{results(bias), results(scale), results(shift)};
  const Tensor de = norm_backward(work, group, norm, dy, e, center, gate, gradients, data_of(count));
  give(stack, {de, scale, shift, bias});
}

// ------------------------------------------------------------------------------------------------------- a block

// What forward finds and backward needs, in the order of _STATISTICS in training.py.
struct Statistics {
  Tensor counts;      // pixels of e and of z, over all processes
  Tensor x_center;    // what x is less by in the kernels
  Tensor x_mean;      // of all processes
  Tensor x_products;  // deviations of this process's x from that mean
  Tensor e_mean, e_var, d_mean, d_var, z_mean, z_var;

  const double* e_count() const { return data_of(counts); }
  const double* z_count() const { return data_of(counts) + 1; }
};

// What forward and backward both begin with: the weights as the passes take them.
struct Block {
  ConvNorm expand, depthwise, project;
  int64_t stride, dilation;
  std::vector<int64_t> padding;
  bool residual, tf32;
  std::string group;
  Tensor x, centered;
  int64_t in, hidden, out;
  double x_pixels, z_pixels;  // of this process
  MaybeTensor weight, bias;   // of the expansion with its BatchNorm in it

  Block(const Tensor& input, Arguments& a)
      : expand(a.next_stage()),
        depthwise(a.next_stage()),
        project(a.next_stage()),
        stride(a.next<int64_t>()),
        dilation(a.next<int64_t>()),
        padding(a.next<std::vector<int64_t>>()),
        residual(a.next<bool>()),
        tf32(a.next<bool>()),
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
    const ScalarType type = depthwise.weight->scalar_type();
    const auto check = [&](MaybeTensor* t, const char* name, const std::vector<int64_t>& shape) {
      *t = parameter(**t, name, x, shape);
      STD_TORCH_CHECK((*t)->scalar_type() == type, name, " must have the dtype of depthwise_weight");
    };
    check(&depthwise.weight, "depthwise_weight", {hidden, 1, 3, 3});
    check(&project.weight, "project_weight", {out, hidden, 1, 1});
    if (expand.weight) {
      check(&expand.weight, "expand_weight", {hidden, in, 1, 1});
      expand.check(x, hidden);
    } else {
      expand = {};
    }
    depthwise.check(x, hidden);
    project.check(x, out);
    const int64_t height = out_extent(x.size(2), padding[2] + padding[3], stride, dilation);
    const int64_t width = out_extent(x.size(3), padding[0] + padding[1], stride, dilation);
    STD_TORCH_CHECK(!residual || (in == out && height == x.size(2) && width == x.size(3)),
                    "a residual needs an output of the shape of x, ", shape_of(x));
    x_pixels = double(pixels_of(x));
    z_pixels = double(x.size(0) * height * width);
  }

  // The parameters that have a gradient, x before them.
  std::array<MaybeTensor, 13> differentiable() const {
    return {x,
            expand.weight,
            expand.bias,
            expand.scale,
            expand.shift,
            depthwise.weight,
            depthwise.bias,
            depthwise.scale,
            depthwise.shift,
            project.weight,
            project.bias,
            project.scale,
            project.shift};
  }

  // To what the passes round the matrices that they multiply x by.
  Element matrix_type() const { return tf32 && x.scalar_type() == ScalarType::Float ? Element::kTf32 : element_of(x); }

  template <class T>
  Expansion<T> expansion(const T* w) const {
    return {w, in, hidden};
  }
  Norm expand_norm(const Statistics& s) const { return norm_of(expand, expand.bias, s.e_mean, s.e_var); }
  Norm depthwise_norm(const Statistics& s) const { return norm_of(depthwise, depthwise.bias, s.d_mean, s.d_var); }
  Norm project_norm(const Statistics& s) const {  // the bias is in z
    return norm_of(project, std::nullopt, s.z_mean, s.z_var);
  }

  // On the CPU a large mean leaves x first, or e, and g summed over the pixels, would lose their last digits to it.
  // Elsewhere x stays as it is, since to choose is to wait, and so do 16-bit numbers, to which the difference would be
  // rounded; the fold takes care of the mean.
  bool chooses_center() const { return on_cpu(x) && x.element_size() > 2; }
  void choose_center(const Tensor& mean, const Tensor& products, const Tensor& center) const {
    if (!chooses_center()) return;
    const double *m = data_of(mean), *p = data_of(products);
    const int64_t step = products.numel() == in ? 1 : in + 1;
    bool large = false;
    for (int64_t i = 0; i < in; ++i) large |= m[i] * m[i] * x_pixels > 16 * p[i * step];
    for (int64_t i = 0; i < in; ++i) data_of(center)[i] = large ? rounded(m[i], element_of(x)) : 0;
  }

  // x_center, x_mean, x_products, e_mean, e_var.
  void expand_moments(const Work& work, Statistics* s) const {
    if (expand.mean) {
      if (!chooses_center()) return;
      const auto [mean, squares] = channel_moments(x);
      return choose_center(mean, squares, s->x_center);
    }
    const auto [mean, products] = call<Tensor, Tensor>(MNV2_OPS "moments", x, tf32);
    choose_center(mean, products, s->x_center);
    s->x_mean = joint_mean(work, group, x_pixels, s->e_count(), mean);
    s->x_products = products;
    if (!group.empty()) {
      work.run(Elements{in, in, Moved{x_pixels, data_of(mean), data_of(s->x_mean), data_of(products), in}});
    }
    const Tensor all = sum_over(group, products);
    s->e_mean = doubles({hidden}, x);
    s->e_var = doubles({hidden}, x);
    const bool kernel = on_cpu(x);
    const Tensor product = kernel ? nothing(x) : doubles({in, hidden}, x);
    with_elements(*expand.weight, [&](const auto* w) {
      if (kernel) {
        kernel_covariance_times(all, nullptr, data_of(s->e_var));
      } else {
        work.run(Elements{in, hidden, CovarianceTimes{expansion(w), data_of(all), data_of(product)}});
      }
      work.run(Blocks{hidden, ExpandStatistics{expansion(w), data_of(s->x_mean), kernel ? nullptr : data_of(product),
                                               s->e_count(), data_of(s->e_mean), data_of(s->e_var)}});
    });
  }

  // The two products of the expansion's weight that the kernels of the CPU do.
  void kernel_covariance_times(const Tensor& covariance, double* product, double* variance) const {
    if constexpr (!kEmulated) {
      covariance_times(select_kernel(dtype_of(x, "x")), data_of(covariance), passed(*expand.weight, x).data_ptr(), in,
                       hidden, product, variance, thread_count(), on_torch_threads);
    }
  }
  void kernel_gram(const Tensor& q, const Tensor& matrix) const {
    if constexpr (!kEmulated) {
      gram(select_kernel(dtype_of(x, "x")), passed(*expand.weight, x).data_ptr(), q.data_ptr(), in, hidden,
           matrix.data_ptr(), thread_count(), on_torch_threads);
    }
  }

  // The step that puts the BatchNorm into the expansion; takes the center from x.
  template <class T>
  ExpandFold<T> fold(const T* w, const Work& work, const Statistics& s) {
    const double *center = data_of(s.x_center), *exact = nullptr;
    if (!chooses_center()) {
      exact = expand.mean ? nullptr : data_of(s.x_mean);
    } else if (std::any_of(center, center + in, [](double c) { return c != 0; })) {
      exact = center;
      const Tensor table = passed({3, in}, x);
      work.run(Channels{in, SumTable{center, results(table), in}});
      centered = affine(x, std::nullopt, table, std::nullopt, false);
    }
    weight = passed({hidden, in, 1, 1}, x);
    bias = passed({hidden}, x);
    return {.expansion = expansion(w),
            .norm = expand_norm(s),
            .center = center,
            .exact = exact,
            .type = matrix_type(),
            .weight = static_cast<Passed<T>*>(weight->data_ptr()),
            .bias = static_cast<Passed<T>*>(bias->data_ptr())};
  }
};

// As forward gave them for this block.
Statistics checked(const Block& b, const Statistics& s) {
  const int64_t x = b.expand.weight ? b.in : 0, e = b.expand.weight && !b.expand.mean ? 1 : 0;
  const int64_t d = b.depthwise.mean ? 0 : b.hidden, z = b.project.mean ? 0 : b.out;
  const std::vector<int64_t> products = e ? std::vector<int64_t>{b.in, b.in} : std::vector<int64_t>{0};
  return {statistic(s.counts, "counts", b.x, {2}),
          statistic(s.x_center, "x_center", b.x, {x}),
          statistic(s.x_mean, "x_mean", b.x, {e * b.in}),
          statistic(s.x_products, "x_products", b.x, products),
          statistic(s.e_mean, "e_mean", b.x, {e * b.hidden}),
          statistic(s.e_var, "e_var", b.x, {e * b.hidden}),
          statistic(s.d_mean, "d_mean", b.x, {d}),
          statistic(s.d_var, "d_var", b.x, {d}),
          statistic(s.z_mean, "z_mean", b.x, {z}),
          statistic(s.z_var, "z_var", b.x, {z})};
}

// y, z and the statistics.
void block_train(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor input = arguments.next<Tensor>();
  Block b(input, arguments);
  const Tensor& x = b.x;
  const int64_t in = b.in, hidden = b.hidden, out = b.out;
  const Work work(x, 0);
  const Tensor counts = doubles({2}, x), project_bias = passed({out}, x);
  const auto none = [&] { return nothing(x); };  // each its own: an op's results must not share memory
  Statistics s{counts, doubles({b.expand.weight ? in : 0}, x), none(), none(), none(), none(), none(), none(), none(),
               none()};
  work.run(Beside{Channels{2, Counts{{b.x_pixels, b.z_pixels}, data_of(counts)}},
                  Beside{Channels{s.x_center.numel(), Copy{{}, results(s.x_center)}},
                         Channels{out, Copy{numbers(b.project.bias), results(project_bias)}}}});
  s.counts = sum_over(b.group, counts);

  if (b.expand.weight) {
    b.expand_moments(work, &s);
    with_elements(*b.expand.weight, [&](const auto* w) { work.run(Blocks{hidden, b.fold(w, work, s)}); });
  }
  if (!b.depthwise.mean) {
    std::tie(s.d_mean, s.d_var) =
        call<Tensor, Tensor>(MNV2_OPS "filter_moments", b.centered, b.weight, b.bias, passed(*b.depthwise.weight, x),
                             b.stride, b.dilation, b.padding, b.tf32);
    join(work, b.group, b.z_pixels, s.z_count(), &s.d_mean, &s.d_var);
  }
  const Norm depthwise = b.depthwise_norm(s);
  const Tensor filter = passed({hidden, 1, 3, 3}, x), shift = passed({hidden}, x);
  with_elements(*b.depthwise.weight, [&](const auto* w) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(w)>>;
    auto* const to = static_cast<Passed<T>*>(filter.data_ptr());
    work.run(Channels{
        hidden, Then{variance(depthwise, s.d_var, s.z_count()), DepthwiseFold<T>{depthwise, w, to, results(shift)}}});
  });
  const auto [z] =
      call<Tensor>(MNV2_OPS "inverted_residual", b.centered, b.weight, b.bias, filter, shift,
                   passed(*b.project.weight, x), project_bias, b.stride, b.dilation, b.padding, false, false, b.tf32);
  if (!b.project.mean) {
    std::tie(s.z_mean, s.z_var) = channel_moments(z);
    join(work, b.group, b.z_pixels, s.z_count(), &s.z_mean, &s.z_var);
  }
  const Norm project = b.project_norm(s);
  const Tensor table = passed({3, out}, x);
  work.run(Channels{out, Then{variance(project, s.z_var, s.z_count()), NormTable{project, results(table), out}}});
  const Tensor y = affine(z, b.residual ? MaybeTensor(x) : std::nullopt, table, std::nullopt, false);
  give(stack,
       {y, z, s.counts, s.x_center, s.x_mean, s.x_products, s.e_mean, s.e_var, s.d_mean, s.d_var, s.z_mean, s.z_var});
}

// The gradients, in the order of the arguments that have one: x, then weight, bias, scale and shift of each stage.
// Those that are not wanted are empty, and x's until a pass gives it.
struct Gradients {
  static constexpr int kCount = 13;
  enum Place { kX, kExpand, kDepthwise = 5, kProject = 9 };
  enum Field { kWeight, kBias, kScale, kShift };

  std::vector<Tensor> tensors;

  Gradients(const Block& b, int64_t wanted) {
    const std::array<MaybeTensor, kCount> like = b.differentiable();
    for (int i = 0; i < kCount; ++i) {
      bits_ |= int64_t(like[i] && wanted >> i & 1) << i;
      const bool filled = i != kX && wants(i);
      std::vector<int64_t> shape = {0};
      if (filled) shape.assign(like[i]->sizes().begin(), like[i]->sizes().end());
      tensors.push_back(new_tensor(shape, filled ? *like[i] : b.x, MemoryFormat::Contiguous));
    }
  }
  bool wants(int place) const { return bits_ >> place & 1; }
  bool wants_any(int place) const { return bits_ >> place & 15; }
  NormGradients norm(int place) const { return {at(place + kBias), at(place + kScale), at(place + kShift)}; }

 private:
  Results at(int place) const { return wants(place) ? results(tensors[place]) : Results{}; }
  int64_t bits_ = 0;
};

// Through e's BatchNorm, from G (`g`, over x less its center, as the kernel had it) and the sums of ge and of ge h.
// Adds to dx what came through the statistics.
template <class T>
void expand_backward(const Block& b, Work* work, const Statistics& s, const T* w, const ExpandInputs& inputs,
                     const Tensor& dx, const Tensor& dy, const Tensor& g, const double* found, Gradients* result) {
  const Norm norm = b.expand_norm(s);
  const Expansion<T> expansion = b.expansion(w);
  const int64_t in = b.in, hidden = b.hidden;
  const bool batch = norm.batch(), kernel = on_cpu(b.x);
  const bool want_x = batch && result->wants(Gradients::kX), want_weight = result->wants(Gradients::kExpand);
  const Tensor sums = doubles({2, hidden}, b.x);
  double *const scale = work->take(hidden), *const minus_q = work->take(hidden), *const constant = work->take(hidden);
  const Tensor q = passed({kernel ? hidden : 0}, b.x);
  const ExpandSums<T> own{.expansion = expansion,
                          .norm = norm,
                          .g = data_of(g),
                          .found = found,
                          .mean = inputs.mean,
                          .size = inputs.size,
                          .sums = data_of(sums),
                          .scale = scale,
                          .gradients = result->norm(Gradients::kExpand)};
  ExpandBackward back{.norm = norm,
                      .sums = data_of(sums),
                      .count = s.e_count(),
                      .minus_q = minus_q,
                      .constant = constant,
                      .rounded = kernel ? results(q) : Results{},
                      .hidden = hidden};
  if (batch && b.group.empty()) {
    work->run(Blocks{hidden, Then{own, back}});
  } else {
    work->run(Blocks{hidden, own});
  }
  const double *deviation = nullptr, *rest = nullptr;
  if (batch && !b.group.empty()) {
    const Tensor all = sum_over(b.group, sums);
    back.sums = data_of(all);
    work->run(Channels{hidden, back});
    if (want_weight) {
      const auto [x_mean, squares] = channel_moments(b.x);
      double *const moved = work->take(in), *const left = work->take(hidden);
      work->run(Channels{in, Deviation{b.x_pixels, data_of(x_mean), inputs.x_mean, moved}});
      work->run(Blocks{hidden, Rest<T>{expansion, b.x_pixels, moved, scale, data_of(sums), minus_q, constant, left}});
      deviation = moved, rest = left;
    }
  }

  const int64_t gradient_rows = want_weight ? in : 0, product_rows = batch ? gradient_rows : 0;
  const int64_t matrix_rows = want_x ? in : 0;
  const Tensor product = doubles({product_rows, hidden}, b.x), matrix = passed({matrix_rows, in}, b.x);
  auto* const matrix_at = static_cast<Passed<T>*>(matrix.data_ptr());
  const ExpandGradient<T> gradient{.in = in,
                                   .hidden = hidden,
                                   .g = data_of(g),
                                   .scale = scale,
                                   .total = data_of(sums),
                                   .mean = inputs.mean,
                                   .product = product_rows ? data_of(product) : nullptr,
                                   .minus_q = minus_q,
                                   .x_mean = inputs.x_mean,
                                   .deviation = deviation,
                                   .rest = rest,
                                   .constant = constant,
                                   .to = static_cast<T*>(result->tensors[Gradients::kExpand].data_ptr())};
  if (kernel) {
    if (product_rows) b.kernel_covariance_times(s.x_products, data_of(product), nullptr);
    work->run(Elements{gradient_rows, hidden, gradient});
    if (matrix_rows) b.kernel_gram(q, matrix);
  } else {
    const CovarianceTimes<T> times{expansion, inputs.products, product_rows ? data_of(product) : nullptr};
    const Gram<T> gram{expansion, minus_q, b.matrix_type(), matrix_at};
    work->run(Beside{Elements{gradient_rows, hidden, Then{times, gradient}}, Elements{matrix_rows, in, gram}});
  }
  if (!want_x) return;
  const Tensor shift = passed({in}, b.x);
  auto* const shift_at = static_cast<Passed<T>*>(shift.data_ptr());
  work->run(Blocks{in, ExpandShift<T>{expansion, constant, inputs.mean, matrix_at, shift_at}});
  call<>(MNV2_OPS "matrix_add_", dx, b.centered, matrix, shift, b.residual ? MaybeTensor(dy) : std::nullopt, b.tf32);
}

// The gradients that are wanted; the others are empty.
void block_train_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor gradient = arguments.next<Tensor>(), projection = arguments.next<Tensor>();
  const auto next = [&] { return arguments.next<Tensor>(); };
  const Statistics given{next(), next(), next(), next(), next(), next(), next(), next(), next(), next()};
  const int64_t wanted = arguments.next<int64_t>();
  const Tensor input = arguments.next<Tensor>();
  Block b(input, arguments);
  const Tensor dy = dense(gradient, "dy"), z = dense(projection, "z");
  const Statistics s = checked(b, given);
  const int64_t in = b.in, hidden = b.hidden, out = b.out;
  Gradients result(b, wanted);
  using G = Gradients;
  const bool want_x = result.wants(G::kX);
  const bool below = want_x || result.wants_any(G::kExpand) || result.wants(G::kDepthwise);
  const bool through_e = b.expand.weight && (result.wants_any(G::kExpand) || (want_x && !b.expand.mean));
  Work work(b.x, 2 * in + 4 * hidden);

  // z's BatchNorm, over narrow tensors.
  const Norm project = b.project_norm(s), depthwise = b.depthwise_norm(s);
  const Tensor center = passed({out}, b.x);
  const bool batch = through_e && !b.expand.mean;
  const ExpandInputs inputs{.x_mean = batch ? data_of(s.x_mean) : nullptr,
                            .products = batch ? data_of(s.x_products) : nullptr,
                            .center = data_of(s.x_center),
                            .pixels = b.x_pixels,
                            .in = in,
                            .mean = work.take(in),
                            .size = work.take(in)};
  work.run(Beside{Channels{out, NormBounds{project, results(center), {}, out}}, Channels{through_e ? in : 0, inputs}});
  const Tensor dz =
      norm_backward(work, b.group, project, dy, z, center, std::nullopt, result.norm(G::kProject), s.z_count());

  // The recomputed part: with batch statistics once for d's sums, once more for what is below; else once for all.
  if (below || result.wants_any(G::kDepthwise) || result.wants(G::kProject)) {
    const Tensor table = passed({6, hidden}, b.x);
    const DepthwiseTable frozen{depthwise, results(table), hidden};
    if (b.expand.weight) {
      with_elements(*b.expand.weight,
                    [&](const auto* w) { work.run(Blocks{hidden, Then{b.fold(w, work, s), frozen}}); });
    } else {
      work.run(Channels{hidden, frozen});
    }
    const Tensor depthwise_weight = passed(*b.depthwise.weight, b.x), project_weight = passed(*b.project.weight, b.x);
    const auto gradients = [&](int64_t which) {
      return call<Tensor, Tensor, Tensor, Tensor, Tensor>(MNV2_OPS "block_gradients", dz, b.centered, b.weight, b.bias,
                                                          depthwise_weight, project_weight, table, b.stride, b.dilation,
                                                          b.padding, which, b.tf32);
    };
    const int64_t bits = kDx * want_x | kExpandGradient * through_e | kDepthwiseGradient * result.wants(G::kDepthwise);
    const bool once = !depthwise.batch();
    auto [dx, expand_sums, depthwise_sums, project_sums, sums] =
        gradients((once ? bits : 0) | kProjectGradient * result.wants(G::kProject) | kSums);
    // A weight's, from sums [rows][columns] to [columns][rows].
    const auto weight_gradient = [&](int place, const Tensor& from, int64_t rows, int64_t columns) {
      if (!result.wants(place)) return;
      with_elements(result.tensors[place],
                    [&](auto* to) { work.run(Elements{rows, columns, Transposed{data_of(from), to, rows, columns}}); });
    };
    weight_gradient(G::kProject, project_sums, 1, out * hidden);
    norm_backward(work, b.group, depthwise, sums, numbers(table, 2 * hidden), result.norm(G::kDepthwise), s.z_count(),
                  results(table, 3 * hidden), below);
    if (below && !once) std::tie(dx, expand_sums, depthwise_sums, std::ignore, sums) = gradients(bits);
    if (through_e) {
      with_elements(*b.expand.weight, [&](const auto* w) {
        expand_backward(b, &work, s, w, inputs, dx, dy, expand_sums, data_of(sums) + 2 * hidden, &result);
      });
    }
    weight_gradient(G::kDepthwise, depthwise_sums, 9, hidden);
    if (want_x && b.residual && (!b.expand.weight || b.expand.mean)) {
      const Tensor ones = passed({3, in}, b.x);
      work.run(Channels{in, SumTable{nullptr, results(ones), in}});
      dx = affine(dx, dy, ones, std::nullopt, false);
    }
    if (want_x) result.tensors[G::kX] = dx;
  }
  give(stack, result.tensors);
}

#define MNV2_STAGE(name)                                                                                          \
  "Tensor? " name "_weight, Tensor? " name "_bias, Tensor? " name "_scale, Tensor? " name "_shift, Tensor? " name \
  "_mean, Tensor? " name "_var, float " name "_eps, "
#define MNV2_BLOCK                                          \
  "Tensor x, " MNV2_STAGE("expand") MNV2_STAGE("depthwise") \
      MNV2_STAGE("project") "int stride, int dilation, int[] padding, bool residual, bool tf32, str group"
#define MNV2_STATISTICS                                                                                            \
  "Tensor counts, Tensor x_center, Tensor x_mean, Tensor x_products, Tensor e_mean, Tensor e_var, Tensor d_mean, " \
  "Tensor d_var, Tensor z_mean, Tensor z_var"
#define MNV2_TENSORS_4 "Tensor, Tensor, Tensor, Tensor"

}  // namespace
}  // namespace mnv2_fused

STABLE_TORCH_LIBRARY_FRAGMENT(MNV2_LIBRARY, m) {
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

#define MNV2_IMPLEMENTATIONS                                         \
  m.impl("block_train", &mnv2_fused::block_train);                   \
  m.impl("block_train_backward", &mnv2_fused::block_train_backward); \
  m.impl("batch_norm_relu6", &mnv2_fused::batch_norm_relu6);         \
  m.impl("batch_norm_relu6_backward", &mnv2_fused::batch_norm_relu6_backward)

STABLE_TORCH_LIBRARY_IMPL(MNV2_LIBRARY, CPU, m) { MNV2_IMPLEMENTATIONS; }
#ifdef MNV2_FUSED_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(MNV2_LIBRARY, CUDA, m) { MNV2_IMPLEMENTATIONS; }
#endif
