// The algebra of training between its passes over pixels: steps, each what is done for one channel or one element of a
// small matrix, in double. training_ops.cpp chains them, a loop runs them where the tensors are on the CPU, a launch
// where they are on a GPU: nothing here waits for a device, or is written twice. Plain C++ for g++ and nvcc alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define MNV2_STEP __host__ __device__ __forceinline__
#else
#define MNV2_STEP inline
#endif

namespace mnv2_fused::algebra {

// ------------------------------------------------------------------------------------------------------- numbers

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// How numbers are stored, and to what they are rounded before; kTf32 is stored as kFloat.
enum class Element : int { kDouble, kFloat, kTf32, kHalf, kBfloat16 };

template <class To, class From>
MNV2_STEP To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
MNV2_STEP double power_of_2(int exponent) { return as<double>(uint64_t(exponent + 1023) << 52); }

MNV2_STEP double value(double v) { return v; }
MNV2_STEP double value(float v) { return double(v); }
MNV2_STEP double value(Bfloat16 v) { return double(as<float>(uint32_t(v.bits) << 16)); }
MNV2_STEP double value(Half v) {
  const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  double magnitude = (1024 + mantissa) * power_of_2(exponent - 25);
  if (exponent == 0) magnitude = mantissa * 0x1p-24;
  if (exponent == 31) magnitude = mantissa ? double(NAN) : double(INFINITY);
  return v.bits & 0x8000 ? -magnitude : magnitude;
}

// The nearest number of a type, of two the even one.
MNV2_STEP double rounded(double v, Element type) {
  if (type == Element::kDouble) return v;
  if (type == Element::kFloat) return double(float(v));
  const int digits = type == Element::kBfloat16 ? 8 : 11, least = type == Element::kHalf ? -14 : -126;
  const double limit = type == Element::kHalf ? 0x1p16 : 0x1p128;
  if (!(std::abs(v) < limit)) return v * double(INFINITY);  // a NaN stays one
  const int exponent = int(as<uint64_t>(v) >> 52 & 0x7ff) - 1023;
  // A sum with it has no room for more digits.
  const double large = 1.5 * power_of_2((exponent > least ? exponent : least) + 53 - digits);
  const double nearest = (v + large) - large;
  return std::abs(nearest) < limit ? nearest : v * double(INFINITY);
}

MNV2_STEP void store(double* to, double v) { *to = v; }
MNV2_STEP void store(float* to, double v) { *to = float(v); }
MNV2_STEP void store(Bfloat16* to, double v) {
  to->bits = uint16_t(as<uint32_t>(float(rounded(v, Element::kBfloat16))) >> 16);
}
MNV2_STEP void store(Half* to, double v) {
  const double nearest = rounded(v, Element::kHalf), magnitude = std::abs(nearest);
  int bits = 0x7e00;
  if (magnitude < 0x1p-14) {
    bits = int(magnitude * 0x1p24);
  } else if (magnitude < 0x1p16) {
    bits = int((as<uint64_t>(magnitude) >> 42) - (uint64_t(1023 - 15) << 10));
  } else if (magnitude == magnitude) {
    bits = 0x7c00;
  }
  to->bits = uint16_t(bits | (as<uint64_t>(nearest) >> 63 << 15));
}

// Vectors of a few channels, of whichever type: a parameter or buffer to read, which there may be none of, and results
// to write, which may not be asked for. What weighs is a template over its type instead.
struct Numbers {
  const void* data = nullptr;
  Element type = Element::kDouble;

  MNV2_STEP double at(int64_t i, double otherwise = 0) const {
    if (!data) return otherwise;
    switch (type) {
      case Element::kDouble:
        return static_cast<const double*>(data)[i];
      case Element::kHalf:
        return value(static_cast<const Half*>(data)[i]);
      case Element::kBfloat16:
        return value(static_cast<const Bfloat16*>(data)[i]);
      default:
        return double(static_cast<const float*>(data)[i]);
    }
  }
};

struct Results {
  void* data = nullptr;
  Element type = Element::kDouble;

  MNV2_STEP void put(int64_t i, double v) const {
    if (!data) return;
    switch (type) {
      case Element::kDouble:
        return store(static_cast<double*>(data) + i, v);
      case Element::kHalf:
        return store(static_cast<Half*>(data) + i, v);
      case Element::kBfloat16:
        return store(static_cast<Bfloat16*>(data) + i, v);
      default:
        return store(static_cast<float*>(data) + i, v);
    }
  }
};

// What the passes take beside tensors of x's dtype and parameters of this one: double among doubles, else float.
template <class T>
using Passed = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ------------------------------------------------------------------------------------------------ how steps are run

// One after the other for each channel or element; the second may read what the first has written for it.
template <class A, class B>
struct Then {
  A first;
  B second;
  MNV2_STEP void operator()(int64_t c) const { first(c), second(c); }
  MNV2_STEP void operator()(int64_t i, int64_t j) const { first(i, j), second(i, j); }
  template <int kBlock>
  MNV2_STEP void run(int64_t c) const {
    first.template run<kBlock>(c);
    for (int i = 0; i < kBlock; ++i) second(c + i);
  }
};
template <class A, class B>
Then(A, B) -> Then<A, B>;

// A step for each of `count` channels: step(c).
template <class Step>
struct Channels {
  int64_t count;
  Step step;
  MNV2_STEP int64_t size() const { return count; }
  MNV2_STEP void operator()(int64_t c) const { step(c); }
};
template <class Step>
Channels(int64_t, Step) -> Channels<Step>;

// The same by blocks of neighbours, step.run<kBlock>(first of them), shared out to threads on the CPU: those with a
// loop over a weight, whose sums for a block stay in registers.
template <class Step>
struct Blocks {
  int64_t count;
  Step step;
  MNV2_STEP int64_t size() const { return count; }
  MNV2_STEP void operator()(int64_t c) const { step.template run<1>(c); }
};
template <class Step>
Blocks(int64_t, Step) -> Blocks<Step>;

// A step for each element of a matrix: step(i, j).
template <class Step>
struct Elements {
  int64_t rows, columns;
  Step step;
  MNV2_STEP int64_t size() const { return rows * columns; }
  MNV2_STEP void operator()(int64_t at) const { step(at / columns, at % columns); }
};
template <class Step>
Elements(int64_t, int64_t, Step) -> Elements<Step>;

// Any two of these that do not depend on each other, in one launch.
template <class A, class B>
struct Beside {
  A a;
  B b;
  MNV2_STEP int64_t size() const { return a.size() > b.size() ? a.size() : b.size(); }
  MNV2_STEP void operator()(int64_t at) const {
    if (at < a.size()) a(at);
    if (at < b.size()) b(at);
  }
};
template <class A, class B>
Beside(A, B) -> Beside<A, B>;

// ---------------------------------------------------------------------------------------------------- statistics

struct Counts {
  double values[2], *to;
  MNV2_STEP void operator()(int64_t i) const { to[i] = values[i]; }
};

// Zeros where there is nothing to copy.
struct Copy {
  Numbers from;
  Results to;
  MNV2_STEP void operator()(int64_t i) const { to.put(i, from.at(i)); }
};

struct Scaled {
  double factor;
  const double* from;
  double* to;
  MNV2_STEP void operator()(int64_t c) const { to[c] = factor * from[c]; }
};

// Of a sum over all pixels their mean; nothing where it is not asked for.
struct Mean {
  const double *sum, *count;
  double* to;
  MNV2_STEP void operator()(int64_t c) const {
    if (to) to[c] = sum[c] / *count;
  }
};

// Products of deviations of `count` pixels, or the squares alone, from their mean `own` to the mean `joint` of more.
struct Moved {
  double count;
  const double *own, *joint;
  double* products;
  int64_t channels;
  MNV2_STEP double of(int64_t i, int64_t j) const { return count * (own[i] - joint[i]) * (own[j] - joint[j]); }
  MNV2_STEP void operator()(int64_t c) const { products[c] += of(c, c); }
  MNV2_STEP void operator()(int64_t i, int64_t j) const { products[i * channels + j] += of(i, j); }
};

// ----------------------------------------------------------------------------------------------------- BatchNorm

// One channel of a BatchNorm as the affine map v -> scale v + shift that it is in this call.
struct Affine {
  double mean, rstd, scale, shift;
};

// A BatchNorm of v. The bias is that of the convolution before it where it is not in v: the batch's mean takes it away,
// running statistics do not.
struct Norm {
  const double *batch_mean, *batch_var;  // null: it is frozen, and these are taken
  Numbers mean, var, scale, shift, bias;
  double eps;

  MNV2_STEP bool batch() const { return batch_mean; }
  MNV2_STEP Affine at(int64_t c) const {
    Affine a;
    a.mean = batch() ? batch_mean[c] : mean.at(c) - bias.at(c);
    a.rstd = 1 / std::sqrt((batch() ? batch_var[c] : var.at(c)) + eps);
    a.scale = scale.at(c, 1) * a.rstd;
    a.shift = shift.at(c) - a.scale * a.mean;
    return a;
  }
};

// The norm as coefficients [3][channels] of the pass affine, of v and what is added to it.
struct NormTable {
  Norm norm;
  Results table;
  int64_t channels;
  MNV2_STEP void operator()(int64_t c) const {
    const Affine a = norm.at(c);
    table.put(c, a.scale);
    table.put(channels + c, 1);
    table.put(2 * channels + c, a.shift);
  }
};

// a + b - center as such coefficients.
struct SumTable {
  const double* center;  // null: 0
  Results table;
  int64_t channels;
  MNV2_STEP void operator()(int64_t c) const {
    table.put(c, 1);
    table.put(channels + c, 1);
    table.put(2 * channels + c, center ? -center[c] : 0);
  }
};

// What channel_products needs of a norm of v: a center near the mean, and where relu6 follows its gate [2][channels].
struct NormBounds {
  Norm norm;
  Results center, gate;
  int64_t channels;
  MNV2_STEP void operator()(int64_t c) const {
    const Affine a = norm.at(c);
    center.put(c, a.mean);
    gate.put(c, a.scale);
    gate.put(channels + c, a.shift);
  }
};

// Gradients of a norm and of the bias of the convolution before it.
struct NormGradients {
  Results bias, scale, shift;
  // From the sums over the pixels of g and of g (v - mean), g being the gradient of the norm of v.
  MNV2_STEP void put(int64_t c, const Norm& norm, const Affine& a, double total, double product) const {
    bias.put(c, norm.batch() ? 0 : a.scale * total);
    scale.put(c, a.rstd * product);
    shift.put(c, total);
  }
};

// These sums [2][channels] from a pass's, which are about the mean as it was rounded for it.
struct NormSums {
  Norm norm;
  const double* found;
  Numbers center;
  double* sums;
  int64_t channels;
  NormGradients gradients;
  MNV2_STEP void operator()(int64_t c) const {
    const Affine a = norm.at(c);
    const double total = found[c], product = found[channels + c] + total * (center.at(c) - a.mean);
    sums[c] = total;
    sums[channels + c] = product;
    gradients.put(c, norm, a, total, product);
  }
};

// p, q, r of the gradient p g + q v + r of v, [3][channels], from the sums over all processes.
struct NormBackward {
  Norm norm;
  const double *sums, *count;
  Results table;
  int64_t channels;
  MNV2_STEP void operator()(int64_t c) const {
    const Affine a = norm.at(c);
    double q = 0, r = 0;
    if (norm.batch()) {
      q = -a.scale * a.rstd * a.rstd * sums[channels + c] / *count;
      r = -a.scale * sums[c] / *count - q * a.mean;
    }
    table.put(c, a.scale);
    table.put(channels + c, q);
    table.put(2 * channels + c, r);
  }
};

// ----------------------------------------------------------------------------------------- through the depthwise one

// A depthwise convolution with its BatchNorm in it.
template <class T>
struct DepthwiseFold {
  Norm norm;
  const T* from;  // [channels][9]
  Passed<T>* weight;
  Results bias;
  MNV2_STEP void operator()(int64_t c) const {
    const Affine a = norm.at(c);
    for (int64_t i = 9 * c; i < 9 * c + 9; ++i) store(weight + i, a.scale * value(from[i]));
    bias.put(c, a.shift);
  }
};

// Coefficients [6][channels] of the pass block_gradients: those of the norm, and for the gradient through it, which
// NormBackward puts in their place, as if it were frozen.
struct DepthwiseTable {
  Norm norm;
  Results table;
  int64_t channels;
  MNV2_STEP void operator()(int64_t c) const {
    const Affine a = norm.at(c);
    const double rows[6] = {a.scale, a.shift, a.mean, a.scale, 0, 0};
    for (int i = 0; i < 6; ++i) table.put(i * channels + c, rows[i]);
  }
};

// A weight's gradient [columns][rows] from sums [rows][columns].
template <class T>
struct Transposed {
  const double* from;
  T* to;
  int64_t rows, columns;
  MNV2_STEP void operator()(int64_t i, int64_t j) const { store(to + j * rows + i, from[i * columns + j]); }
};
template <class T>
Transposed(double*, T*, int64_t, int64_t) -> Transposed<T>;

// --------------------------------------------------------------------------------------------- through the expansion

// The weight [hidden][in] of an expansion.
template <class T>
struct Expansion {
  const T* data;
  int64_t in, hidden;

  MNV2_STEP double at(int64_t h, int64_t i) const { return value(data[h * in + i]); }
  // body(i, c, w) for every weight of the hidden channels first + c, c from 0 to kBlock.
  template <int kBlock, class Body>
  MNV2_STEP void each(int64_t first, const Body& body) const {
    for (int64_t i = 0; i < in; ++i) {
      for (int c = 0; c < kBlock; ++c) body(i, c, at(first + c, i));
    }
  }
};

// C W^T [in][hidden], of a covariance C [in][in], where it is asked for. On the CPU a kernel does it.
template <class T>
struct CovarianceTimes {
  Expansion<T> expansion;
  const double* covariance;
  double* product;
  MNV2_STEP void operator()(int64_t i, int64_t h) const {
    if (!product) return;
    double sum = 0;
    for (int64_t j = 0; j < expansion.in; ++j) sum += covariance[i * expansion.in + j] * expansion.at(h, j);
    product[i * expansion.hidden + h] = sum;
  }
};

// Mean and variance of e = W x, W m and diag(W C W^T), from the mean m and the products of deviations count C of x.
template <class T>
struct ExpandStatistics {
  Expansion<T> expansion;
  const double *x_mean, *product, *count;  // count C W^T; null: `var` has the diagonal already, times the count
  double *mean, *var;
  template <int kBlock>
  MNV2_STEP void run(int64_t first) const {
    double m[kBlock] = {}, v[kBlock] = {};
    expansion.template each<kBlock>(first, [&](int64_t i, int c, double w) {
      m[c] += w * x_mean[i];
      if (product) v[c] += w * product[i * expansion.hidden + first + c];
    });
    for (int c = 0; c < kBlock; ++c) {
      const double sum = product ? v[c] : var[first + c];
      mean[first + c] = m[c];
      var[first + c] = sum < 0 ? 0 : sum / *count;  // below 0 by rounding, where terms cancel; a NaN stays one
    }
  }
};

// The expansion with its BatchNorm in it, of x less a center: W' = scale W, rounded, and the bias with which
// W' (x - center) + bias is scale W x + shift for an x that is given, exactly: for the batch's mean, about which the
// rounding of W' would shift all values alike.
template <class T>
struct ExpandFold {
  Expansion<T> expansion;
  Norm norm;
  const double *center, *exact;  // null: both are 0
  Element type;                  // to which W' is rounded
  Passed<T>*weight, *bias;
  template <int kBlock>
  MNV2_STEP void run(int64_t first) const {
    for (int64_t h = first; h < first + kBlock; ++h) fold(h);
  }
  MNV2_STEP void fold(int64_t h) const {
    const Affine a = norm.at(h);
    const T* const from = expansion.data + h * expansion.in;
    Passed<T>* const to = weight + h * expansion.in;
    for (int64_t i = 0; i < expansion.in; ++i) store(to + i, rounded(a.scale * value(from[i]), type));
    double offset = 0;
    for (int64_t i = 0; exact && i < expansion.in; ++i) {
      offset += a.scale * value(from[i]) * exact[i] - value(to[i]) * (exact[i] - center[i]);
    }
    store(bias + h, a.shift + offset);
  }
};

// Mean and size of x, less its center, as the kernels had it.
struct ExpandInputs {
  const double *x_mean, *products, *center;  // the first two null where the norm is frozen
  double pixels;
  int64_t in;
  double *mean, *size;
  MNV2_STEP void operator()(int64_t i) const {
    mean[i] = (x_mean ? x_mean[i] : 0) - center[i];
    size[i] = products ? std::sqrt(products[i * (in + 1)] / pixels) : 0;
  }
};

// The sums over the pixels of ge and of ge (e - mean of e), in two ways. Where ge is not 0, h is the affine map of e,
// so the sum of ge h gives it, unless the map is flat. So does G, the sum of ge x^T, whose large terms cancel where
// channels are correlated: worse than those of h, if it is not their mean that is large.
template <class T>
struct ExpandSums {
  Expansion<T> expansion;
  Norm norm;
  const double *g, *found;    // G [in][hidden]; sums of ge and of ge h, [2][hidden]
  const double *mean, *size;  // of x, by ExpandInputs
  double *sums, *scale;
  NormGradients gradients;
  template <int kBlock>
  MNV2_STEP void run(int64_t first) const {
    const int64_t hidden = expansion.hidden;
    double through_g[kBlock] = {}, gap[kBlock] = {}, deviation[kBlock] = {}, offset[kBlock] = {};
    expansion.template each<kBlock>(first, [&](int64_t i, int c, double w) {
      through_g[c] += g[i * hidden + first + c] * w;
      gap[c] += mean[i] * w;
      deviation[c] += size[i] * std::abs(w);
      offset[c] += std::abs(mean[i] * w);
    });
    for (int c = 0; c < kBlock; ++c) {
      const int64_t h = first + c;
      const Affine a = norm.at(h);
      const double total = found[h], e_mean = norm.batch() ? gap[c] : a.mean + gap[c];
      const bool through_h = std::abs(a.scale) > 1e-3 * a.rstd && (!norm.batch() || deviation[c] > offset[c]);
      const double product = through_h ? (found[hidden + h] - total * (a.shift + a.scale * a.mean)) / a.scale
                                       : through_g[c] - total * e_mean;
      sums[h] = total;
      sums[hidden + h] = product;
      scale[h] = a.scale;
      gradients.put(h, norm, a, total, product);
    }
  }
};

// From those of all processes: what is taken from the gradient of e, q (e - mean) + constant.
struct ExpandBackward {
  Norm norm;
  const double *sums, *count;
  double *minus_q, *constant;
  Results rounded;  // minus_q for the kernel
  int64_t hidden;
  MNV2_STEP void operator()(int64_t h) const {
    const Affine a = norm.at(h);
    minus_q[h] = -a.scale * a.rstd * a.rstd * sums[hidden + h] / *count;
    constant[h] = a.scale * sums[h] / *count;
    rounded.put(h, minus_q[h]);
  }
};

// Of one process alone, the deviations of x and those of the gradient do not add up to 0: what is left of either.
struct Deviation {
  double pixels;
  const double *own, *x_mean;  // means of x
  double* to;
  MNV2_STEP void operator()(int64_t i) const { to[i] = pixels * (own[i] - x_mean[i]); }
};
template <class T>
struct Rest {
  Expansion<T> expansion;
  double pixels;
  const double *deviation, *scale, *total, *minus_q, *constant;
  double* rest;
  template <int kBlock>
  MNV2_STEP void run(int64_t first) const {
    double moved[kBlock] = {};
    expansion.template each<kBlock>(first, [&](int64_t i, int c, double w) { moved[c] += w * deviation[i]; });
    for (int c = 0; c < kBlock; ++c) {
      const int64_t h = first + c;
      rest[h] = scale[h] * total[h] - constant[h] * pixels + minus_q[h] * moved[c];
    }
  }
};

// The gradient of the expansion's weight.
template <class T>
struct ExpandGradient {
  int64_t in, hidden;
  const double *g, *scale, *total, *mean;
  const double *product, *minus_q;                     // products C W^T; null where the norm is frozen
  const double *x_mean, *deviation, *rest, *constant;  // null where all pixels are of this process
  T* to;
  MNV2_STEP void operator()(int64_t i, int64_t h) const {
    double v = scale[h] * (g[i * hidden + h] - mean[i] * total[h]);
    if (product) v += minus_q[h] * product[i * hidden + h];
    if (rest) v += x_mean[i] * rest[h] - deviation[i] * constant[h];
    store(to + h * in + i, v);
  }
};

// W^T diag(q) W, rounded: what of x the gradient of x has through e's variance. On the CPU a kernel does it.
template <class T>
struct Gram {
  Expansion<T> expansion;
  const double* q;
  Element type;
  Passed<T>* to;
  MNV2_STEP void operator()(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t h = 0; h < expansion.hidden; ++h) sum += expansion.at(h, i) * q[h] * expansion.at(h, j);
    store(to + i * expansion.in + j, rounded(sum, type));
  }
};

// And what is constant: the gradient of x has matrix (x - mean) - W^T constant.
template <class T>
struct ExpandShift {
  Expansion<T> expansion;
  const double *constant, *mean;
  const Passed<T>* matrix;
  Passed<T>* to;
  template <int kBlock>
  MNV2_STEP void run(int64_t first) const {
    double sum[kBlock] = {};
    for (int64_t h = 0; h < expansion.hidden; ++h) {
      for (int c = 0; c < kBlock; ++c) sum[c] -= expansion.at(h, first + c) * constant[h];
    }
    for (int64_t j = 0; j < expansion.in; ++j) {
      for (int c = 0; c < kBlock; ++c) sum[c] -= value(matrix[(first + c) * expansion.in + j]) * mean[j];
    }
    for (int c = 0; c < kBlock; ++c) store(to + first + c, sum[c]);
  }
};

}  // namespace mnv2_fused::algebra

namespace mnv2_fused::cuda {

// Runs Channels, Blocks, Elements or Beside on a stream, a thread for each index below n; a cudaError_t (0: success).
// algebra.cu has those that training_ops.cpp uses.
template <class Steps>
int each(const Steps& steps, int64_t n, void* stream);

const char* error_text(int error);

}  // namespace mnv2_fused::cuda
