// The AVX-512 BF16 row of the kernel table: only what this ISA changes.
#include <immintrin.h>

// GCC 12 sees the deliberately undefined pass-through operand of the AVX-512 min and max as a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "../inverted_residual.h"

namespace mnv2_fused::avx512_bf16 {
namespace {

#include "avx512-inl.h"
#include "forward-inl.h"
#include "training-inl.h"

// Tiles as those of float32, whose every multiply-add becomes two.
struct Bf16 : Float32 {
  using X = BFloat16;
  static constexpr int kLastSteps = 8;
  using Slots = double __attribute__((may_alias, aligned(2)));  // two of them, which travel together
  using Slot = float __attribute__((may_alias, aligned(2)));
  using Float32::broadcast_load, Float32::load, Float32::load_n, Float32::store, Float32::store_n;

  static V widened(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
  static V load(const X* p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static V load_n(const X* p, int n) { return widened(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p)); }
  static __m256i rounded(V v) { return (__m256i)_mm512_cvtneps_pbh(v); }
  static void store(X* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(v)); }
  static void store_n(X* p, V v, int n) { _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), rounded(v)); }
  // A slot, the first value in its low half.
  static V broadcast_load(const X* p) { return _mm512_set1_ps(*reinterpret_cast<const Slot*>(p)); }
  static V broadcast_half(const X* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(p->bits)); }
  static V broadcast_pair(const X* p) { return _mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const Slots*>(p))); }
  // The values of two rows of pixels in slots, those of the first in the low halves.
  static V pairs(const X* a, const X* b) {
    return interleaved(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)),
                       _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  }
  static V pairs_n(const X* a, const X* b, int n) {
    const __mmask16 some = __mmask16((1u << n) - 1);
    return interleaved(_mm256_maskz_loadu_epi16(some, a), _mm256_maskz_loadu_epi16(some, b));
  }
  static V interleaved(__m256i a, __m256i b) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both));
  }
  static V dot(V a, V b, V c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};

const char* const kFeatures[] = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", nullptr};

}  // namespace

extern const Kernel kernel_bf16;
const Kernel kernel_bf16 = Training<Bf16>::kernel("avx512_bf16", Dtype::kBFloat16, kFeatures);

}  // namespace mnv2_fused::avx512_bf16
