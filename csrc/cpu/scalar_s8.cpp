// The row of the kernel table that computes in 8-bit integers on every machine: plain C++.
#include "../inverted_residual.h"

namespace mnv2_fused::scalar {
namespace {

#include "int8-inl.h"

struct Plain {
  static constexpr int kLanes = 4;
  template <class T>
  struct Vector {
    T lane[kLanes];
  };
  struct Quads {
    uint8_t byte[kLanes][4];
  };
  struct Weights {
    int8_t byte[kLanes][4];
  };
  struct Interleave {
    int begin, rows;
  };
  using V = Vector<int32_t>;
  using F = Vector<float>;
  using A = Quads;
  using W = Weights;
  using X = uint8_t;
  static constexpr int kTileM = 2, kByteTileM = kTileM;
  static constexpr int kQuadColumns = 1;
  static constexpr int kDepthwiseColumns = 2;
  static constexpr int kStreams = 2;

  template <class T, class Function>
  static MNV2_INLINE Vector<T> each(Function f) {
    Vector<T> v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = f(i);
    return v;
  }
  static V load(const int32_t* p) { return load_n(p, kLanes); }
  static V load_n(const int32_t* p, int n) {
    return each<int32_t>([=](int i) { return i < n ? p[i] : 0; });
  }
  static void store(int32_t* p, V v) { store_n(p, v, kLanes); }
  static void store_n(int32_t* p, V v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v.lane[i];
  }
  static F load_floats(const float* p) {
    return each<float>([=](int i) { return p[i]; });
  }
  static void store_floats(float* p, F v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v.lane[i];
  }
  static V load_bytes(const uint8_t* p, int n) {
    return each<int32_t>([=](int i) { return i < n ? p[i] : 0; });
  }
  static F floats_of(const uint8_t* p, int n) {
    return each<float>([=](int i) { return i < n ? float(p[i]) : 0.0f; });
  }
  static V zero() { return broadcast(0); }
  static V broadcast(int v) {
    return each<int32_t>([=](int) { return v; });
  }
  static F broadcast_float(float v) {
    return each<float>([=](int) { return v; });
  }

  static A broadcast(const uint8_t* p) {
    A a;
    for (int i = 0; i < kLanes; ++i) __builtin_memcpy(a.byte[i], p, 4);
    return a;
  }
  static A quads(const uint8_t* p) {
    A a;
    __builtin_memcpy(a.byte, p, sizeof a.byte);
    return a;
  }
  // The lower two rows of each quad at q0 with the upper two of that at q1.
  static A quads_between(const uint8_t* q0, const uint8_t* q1) {
    A a;
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < 4; ++j) a.byte[i][j] = j < 2 ? q0[i * 4 + 2 + j] : q1[i * 4 + j - 2];
    }
    return a;
  }
  static W weights(const uint32_t* p) { return taps(p); }
  static W taps(const uint32_t* p) {
    W w;
    __builtin_memcpy(w.byte, p, sizeof w.byte);
    return w;
  }
  static W taps_below(const uint32_t* p) {
    const W above = taps(p);
    W w;
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < 4; ++j) w.byte[i][j] = j ? above.byte[i][j - 1] : 0;
    }
    return w;
  }
  static W between(W w) { return w; }
  static V dot(V sum, A a, W w) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < 4; ++j) sum.lane[i] += a.byte[i][j] * w.byte[i][j];
    }
    return sum;
  }

  static V add(V a, V b) {
    return each<int32_t>([=](int i) { return a.lane[i] + b.lane[i]; });
  }
  static F add(F a, F b) {
    return each<float>([=](int i) { return a.lane[i] + b.lane[i]; });
  }
  static F mul(F a, F b) {
    return each<float>([=](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F scaled(V v, F m) {
    return each<float>([=](int i) { return float(v.lane[i]) * m.lane[i]; });
  }
  static V round(F v) {
    return each<int32_t>([=](int i) { return int32_t(__builtin_lrintf(v.lane[i])); });
  }
  static uint8_t byte(int v) { return uint8_t(v < 0 ? 0 : v > 255 ? 255 : v); }
  static V clamp(V v) {
    return each<int32_t>([=](int i) { return byte(v.lane[i]); });
  }
  static V quantized(const float* p, float inverse_scale, float zero_point) {
    F t = add(mul(load_floats(p), broadcast_float(inverse_scale)), broadcast_float(zero_point));
    for (float& lane : t.lane) {  // NaN becomes 0
      lane = lane > 0 ? lane : 0;
      lane = lane < 255 ? lane : 255;
    }
    return round(t);
  }
  static void store_bytes(uint8_t* p, V v, int n) {
    for (int i = 0; i < n; ++i) p[i] = byte(v.lane[i]);
  }
  // For each lane four bytes, of which `rows` from byte `begin` on are v[0], v[1], ... and the others 0.
  static Interleave interleave(int begin, int rows) { return {begin, rows}; }
  static void store_quad(uint8_t* p, const V (&v)[4], Interleave which) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < 4; ++j) {
        const int row = j - which.begin;
        p[i * 4 + j] = row >= 0 && row < which.rows ? byte(v[row].lane[i]) : 0;
      }
    }
  }
  // Of each lane a slot of v[0], v[1], ...
  static void store_slots(uint8_t* p, const V (&v)[4]) { store_quad(p, v, interleave(0, 4)); }
  // Each vector as bytes to its own place, the first n of them.
  static MNV2_INLINE void store_pixels(uint8_t* const (&to)[4], const V (&v)[4], int n) {
    for (int i = 0; i < n; ++i) store_bytes(to[i], v[i], kLanes);
  }
};

const char* const kFeatures[] = {nullptr};

}  // namespace

extern const Kernel kernel_s8;
const Kernel kernel_s8 = Int8<Plain>::kernel("scalar_s8", kFeatures);

}  // namespace mnv2_fused::scalar
