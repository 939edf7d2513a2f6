// The AVX2 row of the kernel table, in 8-bit integers: only what this ISA changes.
#include <immintrin.h>

#include "../inverted_residual.h"

namespace mnv2_fused::avx2 {
namespace {

#include "int8-inl.h"

// AVX2's product of unsigned and signed bytes, vpmaddubsw, saturates its sums of two. Here bytes are widened to 16 bits
// and multiplied by vpmaddwd, whose sums of two are exact. A tile takes the first two bytes of a slot, then the last
// two; the depthwise filter the even bytes of each lane and the odd ones, which two shifts make of a lane's four.
struct Int8Avx2 {
  struct Halves {
    __m256i even, odd;
  };
  using V = __m256i;
  using F = __m256;
  using A = Halves;
  using W = Halves;
  using X = uint16_t;
  using Interleave = __m256i;
  static constexpr int kLanes = 8;
  // 12 accumulators, 2 vectors of weights, the broadcast pixel and a product: all 16 registers.
  static constexpr int kTileM = 6;
  // Pixels that are widened in the tile: 8 accumulators, and an order of bytes beside the above.
  static constexpr int kByteTileM = 4;
  static_assert(2 * kTileM + 2 + 2 <= 16 && 2 * kByteTileM + 2 + 3 <= 16);
  static constexpr int kQuadColumns = 1;
  static constexpr int kDepthwiseColumns = 2;
  static constexpr int kStreams = 4;

  static V load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static V load_n(const int32_t* p, int n) { return _mm256_maskload_epi32(p, mask(n)); }
  static void store(int32_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static void store_n(int32_t* p, V v, int n) { _mm256_maskstore_epi32(p, mask(n), v); }
  static F load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store_floats(float* p, F v, int n) { _mm256_maskstore_ps(p, mask(n), v); }
  static V load_bytes(const uint8_t* p, int n) {
    uint64_t bytes = 0;
    n == kLanes ? __builtin_memcpy(&bytes, p, 8) : __builtin_memcpy(&bytes, p, size_t(n));
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes)));
  }
  static F floats_of(const uint8_t* p, int n) { return _mm256_cvtepi32_ps(load_bytes(p, n)); }
  static V zero() { return _mm256_setzero_si256(); }
  static V broadcast(int v) { return _mm256_set1_epi32(v); }
  static F broadcast_float(float v) { return _mm256_set1_ps(v); }

  static A activations(V bytes) {
    return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
  }
  static __m256i broadcast(const uint16_t* p) {
    int32_t two;
    __builtin_memcpy(&two, p, 4);
    return _mm256_set1_epi32(two);
  }
  static __m256i broadcast(const uint8_t* p) {
    int16_t two;
    __builtin_memcpy(&two, p, 2);
    return _mm256_shuffle_epi8(_mm256_set1_epi16(two), _mm256_set1_epi32(int(0x80018000)));
  }
  static V quad_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static A quads(const uint8_t* p) { return activations(quad_bytes(p)); }
  // The lower two rows of each quad at q0 with the upper two of that at q1, which stay where they are: before them.
  static A quads_between(const uint8_t* q0, const uint8_t* q1) {
    return activations(_mm256_blend_epi16(quad_bytes(q1), quad_bytes(q0), 0xaa));
  }
  static W halves(V bytes) { return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)}; }
  static W taps(const uint32_t* p) { return halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  // From (w0, w2) and (w1, 0) to (0, w1) and (w0, w2): 9 vectors for two rows of outputs, with 4 sums, a quad's halves
  // and a product all 16 registers.
  static W taps_below(const uint32_t* p) {
    const W above = taps(p);
    return {_mm256_slli_epi32(above.odd, 16), above.even};
  }
  // In the order of quads_between.
  static W between(W w) { return {swapped(w.even), swapped(w.odd)}; }
  static __m256i weights(const uint32_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // Not the intrinsics: GCC 12 adds the products of a sum to each other first, and has no registers left for them.
  static V dot(V sum, __m256i a, __m256i w) {
    __m256i product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "xm"(w));
    return sum;
  }
  static V dot(V sum, A a, W w) { return dot(dot(sum, a.even, w.even), a.odd, w.odd); }

  static V add(V a, V b) { return _mm256_add_epi32(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F scaled(V v, F m) { return _mm256_mul_ps(_mm256_cvtepi32_ps(v), m); }
  static V round(F v) { return _mm256_cvtps_epi32(v); }
  static V clamp(V v) { return _mm256_min_epi32(_mm256_max_epi32(v, zero()), broadcast(255)); }
  // max and min return their second operand when the first is NaN.
  static V quantized(const float* p, float inverse_scale, float zero_point) {
    F t = _mm256_add_ps(_mm256_mul_ps(load_floats(p), broadcast_float(inverse_scale)), broadcast_float(zero_point));
    t = _mm256_min_ps(_mm256_max_ps(t, _mm256_setzero_ps()), broadcast_float(255));
    return round(t);
  }
  static void store_bytes(uint8_t* p, V v, int n) {
    const V order = _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0);
    const V words = _mm256_packs_epi32(v, v);
    const V bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, words), order);
    const int64_t eight = _mm_cvtsi128_si64(_mm256_castsi256_si128(bytes));
    n == kLanes ? __builtin_memcpy(p, &eight, 8) : __builtin_memcpy(p, &eight, size_t(n));
  }

  // Four vectors as bytes, in each 128 bits four lanes of the first, then of the second, ...
  static V pack(const V (&v)[4]) {
    return _mm256_packus_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
  }
  // For each lane four bytes, of which `rows` from byte `begin` on are v[0], v[1], ... and the others 0.
  static Interleave interleave(int begin, int rows) {
    const InterleaveBytes index(begin, rows);
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(index.of)));
  }
  static void store_quad(uint8_t* p, const V (&v)[4], Interleave interleave) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shuffle_epi8(pack(v), interleave));
  }
  // Of each lane a slot of v[0], v[1], ...
  static void store_slots(uint16_t* p, const V (&v)[4]) {
    uint8_t bytes[4 * kLanes];
    store_quad(bytes, v, interleave(0, 4));
    widen(bytes, 4 * kLanes, p);
  }
  // Each vector as values of 16 bits to its own place, the first n of them.
  static MNV2_INLINE void store_pixels(uint16_t* const (&to)[4], const V (&v)[4], int n) {
    MNV2_UNROLL for (int i = 0; i < n; i += 2) {
      const V packed = _mm256_min_epu16(_mm256_packus_epi32(v[i], v[i + 1]), _mm256_set1_epi16(255));
      const V words = _mm256_permute4x64_epi64(packed, 0xd8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to[i]), _mm256_castsi256_si128(words));
      if (n > i + 1) _mm_storeu_si128(reinterpret_cast<__m128i*>(to[i + 1]), _mm256_extracti128_si256(words, 1));
    }
  }
  // A multiple of 4 activations.
  static void widen(const uint8_t* from, int64_t count, uint16_t* to) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_cvtepu8_epi16(bytes));
    }
    for (; i < count; ++i) to[i] = from[i];
  }

 private:
  // The 16-bit halves of each lane.
  static __m256i swapped(__m256i v) { return _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(v, 0xb1), 0xb1); }
  // The first n lanes: eight from the middle of eight ones and eight zeros.
  static __m256i mask(int n) {
    alignas(32) static const int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - n));
  }
};

const char* const kFeatures[] = {"avx2", nullptr};

}  // namespace

extern const Kernel kernel_s8;
const Kernel kernel_s8 = Int8<Int8Avx2>::kernel("avx2_s8", kFeatures);

}  // namespace mnv2_fused::avx2
