// The rows of the kernel table that every machine runs: plain C++, float, double and bfloat16.
#include "../inverted_residual.h"

namespace mnv2_fused::scalar {
namespace {

#include "forward-inl.h"
#include "training-inl.h"

template <class Element>
struct Plain {
  using T = Element;
  using X = Element;
  static constexpr int kLanes = 4;
  struct V {
    T lane[kLanes];
  };
  static constexpr int kTileM = 2, kTileN = 2;
  static constexpr int kTileM1 = kTileM;  // of a tile of one vector
  static constexpr bool kEvenTiles = false;
  static constexpr int kDepthwiseRows = 1, kDepthwiseColumns = 2;
  static constexpr bool kTapsInRegisters = true;
  static constexpr bool kPairs = false, kWide = false;
  static constexpr int kRegisters = 16;
  static constexpr int kStreams = 2;
  static constexpr int kLastSteps = 0;
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

struct PlainBf16 : Plain<float> {
  using X = BFloat16;
  using Plain::broadcast_load, Plain::load, Plain::load_n, Plain::store, Plain::store_n;

  static V load(const X* p) {
    return each([=](int i) { return widen(p[i]); });
  }
  static V load_n(const X* p, int n) {
    return each([=](int i) { return i < n ? widen(p[i]) : 0; });
  }
  static void store(X* p, V v) { store_n(p, v, kLanes); }
  static void store_n(X* p, V v, int n) {
    for (int i = 0; i < n; ++i) p[i] = round_to_bfloat16(v.lane[i]);
  }
  // A slot, the first value in its low half.
  static V broadcast_load(const X* p) { return slot(p[0].bits | uint32_t(p[1].bits) << 16); }
  static V broadcast_half(const X* p) { return slot(p[0].bits); }
  static V slot(uint32_t bits) {
    T both;
    __builtin_memcpy(&both, &bits, 4);
    return broadcast(both);
  }
  // The values of two rows of pixels in slots, those of the first in the low halves.
  static V pairs(const X* a, const X* b) { return pairs_n(a, b, kLanes); }
  static V pairs_n(const X* a, const X* b, int n) {
    return each([=](int i) { return i < n ? slot(a[i].bits | uint32_t(b[i].bits) << 16).lane[0] : 0; });
  }
  static T half(T slot, int high) {
    uint32_t bits;
    __builtin_memcpy(&bits, &slot, 4);
    return widen({uint16_t(bits >> 16 * high)});
  }
  static V dot(V a, V b, V c) {
    return each([=](int i) {
      return half(a.lane[i], 1) * half(b.lane[i], 1) + (half(a.lane[i], 0) * half(b.lane[i], 0) + c.lane[i]);
    });
  }
};

const char* const kFeatures[] = {nullptr};

}  // namespace

extern const Kernel kernel_f32, kernel_f64, kernel_bf16;
const Kernel kernel_f32 = Training<Plain<float>>::kernel("scalar_f32", Dtype::kFloat32, kFeatures);
const Kernel kernel_f64 = Training<Plain<double>>::kernel("scalar_f64", Dtype::kFloat64, kFeatures);
const Kernel kernel_bf16 = Training<PlainBf16>::kernel("scalar_bf16", Dtype::kBFloat16, kFeatures);

}  // namespace mnv2_fused::scalar
