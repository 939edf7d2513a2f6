// The AVX-512 VNNI row of the kernel table, in 8-bit integers: only what this ISA changes.
#include <immintrin.h>

// GCC 12 sees the deliberately undefined pass-through operand of many AVX-512 intrinsics as a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "../inverted_residual.h"

namespace mnv2_fused::avx512_vnni {
namespace {

#include "int8-inl.h"

struct Vnni {
  using V = __m512i;
  using F = __m512;
  using A = __m512i;
  using W = __m512i;
  using X = uint8_t;
  using Interleave = __m512i;
  static constexpr int kLanes = 16;
  // 28 accumulators, 2 weight vectors and the broadcast pixel, whose bytes must come in a register of their own: 31.
  static constexpr int kTileM = 14, kByteTileM = kTileM;
  // 4 rows x 3 columns x 2 vectors: 24 accumulators.
  static constexpr int kQuadColumns = 3;
  // 2 rows x 8 columns: 16 accumulators, 6 weights, a quad, bias and multiplier.
  static constexpr int kDepthwiseColumns = 8;
  static constexpr int kStreams = 4;

  static V load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static V load_n(const int32_t* p, int n) { return _mm512_maskz_loadu_epi32(mask(n), p); }
  static void store(int32_t* p, V v) { _mm512_storeu_si512(p, v); }
  static void store_n(int32_t* p, V v, int n) { _mm512_mask_storeu_epi32(p, mask(n), v); }
  static F load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, F v, int n) { _mm512_mask_storeu_ps(p, mask(n), v); }
  static V load_bytes(const uint8_t* p, int n) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask(n), p)); }
  static F floats_of(const uint8_t* p, int n) { return _mm512_cvtepi32_ps(load_bytes(p, n)); }
  static V zero() { return _mm512_setzero_si512(); }
  static V broadcast(int v) { return _mm512_set1_epi32(v); }
  static F broadcast_float(float v) { return _mm512_set1_ps(v); }

  static A broadcast(const uint8_t* p) { return _mm512_set1_epi32(*reinterpret_cast<const Slot*>(p)); }
  static A quads(const uint8_t* p) { return _mm512_loadu_si512(p); }
  // The lower two rows of each quad at q0 with the upper two of that at q1.
  static A quads_between(const uint8_t* q0, const uint8_t* q1) {
    return _mm512_or_si512(_mm512_srli_epi32(quads(q0), 16), _mm512_slli_epi32(quads(q1), 16));
  }
  static W weights(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static W taps(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static W taps_below(const uint32_t* p) { return _mm512_slli_epi32(taps(p), 8); }
  static W between(W w) { return w; }
  // Not the intrinsic: GCC 12 takes its sums for other vectors than those of a loop, and stores and loads them at every
  // step.
  static V dot(V sum, A a, W w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w));
    return sum;
  }

  static V add(V a, V b) { return _mm512_add_epi32(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F scaled(V v, F m) { return _mm512_mul_ps(_mm512_cvtepi32_ps(v), m); }
  static V round(F v) { return _mm512_cvtps_epi32(v); }
  static V clamp(V v) { return _mm512_min_epi32(_mm512_max_epi32(v, zero()), broadcast(255)); }
  // max and min return their second operand when the first is NaN.
  static V quantized(const float* p, float inverse_scale, float zero_point) {
    F t = _mm512_add_ps(_mm512_mul_ps(load_floats(p), broadcast_float(inverse_scale)), broadcast_float(zero_point));
    t = _mm512_min_ps(_mm512_max_ps(t, _mm512_setzero_ps()), broadcast_float(255));
    return round(t);
  }
  static void store_bytes(uint8_t* p, V v, int n) {
    _mm512_mask_cvtusepi32_storeu_epi8(p, mask(n), _mm512_max_epi32(v, zero()));
  }

  // Four vectors as bytes, in each 128 bits four lanes of the first, then of the second, ...
  static V pack(const V (&v)[4]) {
    return _mm512_packus_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
  }
  // For each lane four bytes, of which `rows` from byte `begin` on are v[0], v[1], ... and the others 0.
  static Interleave interleave(int begin, int rows) {
    const InterleaveBytes index(begin, rows);
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(index.of)));
  }
  static void store_quad(uint8_t* p, const V (&v)[4], Interleave interleave) {
    _mm512_storeu_si512(p, _mm512_shuffle_epi8(pack(v), interleave));
  }
  // Of each lane a slot of v[0], v[1], ...
  static void store_slots(uint8_t* p, const V (&v)[4]) { store_quad(p, v, interleave(0, 4)); }
  // Each vector as bytes to its own place, the first n of them.
  static MNV2_INLINE void store_pixels(uint8_t* const (&to)[4], const V (&v)[4], int n) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_permutexvar_epi32(order, pack(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to[0]), _mm512_castsi512_si128(bytes));
    if (n > 1) _mm_storeu_si128(reinterpret_cast<__m128i*>(to[1]), _mm512_extracti32x4_epi32(bytes, 1));
    if (n > 2) _mm_storeu_si128(reinterpret_cast<__m128i*>(to[2]), _mm512_extracti32x4_epi32(bytes, 2));
    if (n > 3) _mm_storeu_si128(reinterpret_cast<__m128i*>(to[3]), _mm512_extracti32x4_epi32(bytes, 3));
  }

 private:
  using Slot = int32_t __attribute__((may_alias, aligned(1)));
  static __mmask16 mask(int n) { return __mmask16((1u << n) - 1); }
};

const char* const kFeatures[] = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", nullptr};

}  // namespace

extern const Kernel kernel_s8;
const Kernel kernel_s8 = Int8<Vnni>::kernel("avx512_vnni_s8", kFeatures);

}  // namespace mnv2_fused::avx512_vnni
