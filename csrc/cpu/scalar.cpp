// The rows of the kernel table that every machine runs: plain C++, float and double.
#include "../inverted_residual.h"

namespace mnv2_fused::scalar {
namespace {

#include "forward-inl.h"
#include "training-inl.h"

template <class Element>
struct Plain {
  using T = Element;
  static constexpr int kLanes = 4;
  struct V {
    T lane[kLanes];
  };
  static constexpr int kTileM = 2, kTileN = 2;
  static constexpr int kDepthwiseRows = 1, kDepthwiseColumns = 2;
  static constexpr bool kPairs = false;
  static constexpr int kStreams = 2;
  static constexpr int kDoubles = 2, kDoublesM = 4, kDoublesN = 2;

  template <class F>
  static MNV2_INLINE V each(F f) {
    V v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = f(i);
    return v;
  }
  static V load(const T* p) {
    return each([=](int i) { return p[i]; });
  }
  static V load_n(const T* p, int n) {
    return each([=](int i) { return i < n ? p[i] : T(0); });
  }
  static void store(T* p, V v) { store_n(p, v, kLanes); }
  static void store_n(T* p, V v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v.lane[i];
  }
  static V broadcast(T t) {
    return each([=](int) { return t; });
  }
  static V broadcast_load(const T* p) { return broadcast(*p); }
  static V fmadd(V a, V b, V c) {
    return each([=](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static V add(V a, V b) {
    return each([=](int i) { return a.lane[i] + b.lane[i]; });
  }
  static V sub(V a, V b) {
    return each([=](int i) { return a.lane[i] - b.lane[i]; });
  }
  static V mul(V a, V b) {
    return each([=](int i) { return a.lane[i] * b.lane[i]; });
  }
  // v, but 0 where u <= low or u >= high: as hardtanh's gradient, which passes where u is NaN.
  static V between(V u, V low, V high, V v) {
    return each([=](int i) { return u.lane[i] <= low.lane[i] || u.lane[i] >= high.lane[i] ? T(0) : v.lane[i]; });
  }
  // As the vector instructions: the second operand when either is NaN.
  static V max(V a, V b) {
    return each([=](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static V min(V a, V b) {
    return each([=](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
};

const char* const kFeatures[] = {nullptr};

}  // namespace

extern const Kernel kernel_f32, kernel_f64;
const Kernel kernel_f32 = Training<Plain<float>>::kernel("scalar_f32", Dtype::kFloat32, kFeatures);
const Kernel kernel_f64 = Training<Plain<double>>::kernel("scalar_f64", Dtype::kFloat64, kFeatures);

}  // namespace mnv2_fused::scalar
