// The AVX2 + FMA rows of the kernel table: only what this ISA changes.
#include <immintrin.h>

#include "../inverted_residual.h"

namespace mnv2_fused::avx2 {
namespace {

#include "forward-inl.h"
#include "training-inl.h"

struct Float32 {
  using T = float;
  using X = float;
  using V = __m256;
  static constexpr int kLanes = 8;
  // 12 accumulators, 2 weight vectors and the broadcast pixel: 15 of 16 registers, 8 loads for 12 multiply-adds. With 4
  // x 3 all 16 are taken, and the compiler loads weights for every pixel: 13 loads, 15% to 25% slower on AMD Zen 3.
  static constexpr int kTileM = 6, kTileN = 2;
  static constexpr int kTileM1 = 12;  // of a tile of one vector, for as many chains
  static constexpr bool kEvenTiles = true;
  // 7 accumulators, the 3 taps of a row of the kernel and an input: 36 loads for 63 multiply-adds at stride 1. 7
  // divides every width of the network.
  static constexpr int kDepthwiseRows = 1, kDepthwiseColumns = 7;
  static constexpr bool kTapsInRegisters = false;
  static constexpr bool kPairs = false, kWide = false;
  static constexpr int kRegisters = 16;
  static constexpr int kStreams = 4;
  static constexpr int kLastSteps = 0;                              // too few accumulators to halve
  static constexpr int kDoubles = 4, kDoublesM = 4, kDoublesN = 2;  // 8 accumulators, 2 vectors, the broadcast
  static_assert(kTileM * kTileN + kTileN + 1 <= 16 && kDepthwiseRows * kDepthwiseColumns + 4 <= 16);

  // The first n lanes: eight from the middle of eight ones and eight zeros.
  static __m256i mask(int n) {
    alignas(32) static const int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - n));
  }
  static V load(const T* p) { return _mm256_loadu_ps(p); }
  static V load_n(const T* p, int n) { return _mm256_maskload_ps(p, mask(n)); }
  static void store(T* p, V v) { _mm256_storeu_ps(p, v); }
  static void store_n(T* p, V v, int n) { _mm256_maskstore_ps(p, mask(n), v); }
  static V broadcast(T v) { return _mm256_set1_ps(v); }
  static V broadcast_load(const T* p) { return _mm256_broadcast_ss(p); }
  static V fmadd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  // v, but 0 where u <= low or u >= high: as hardtanh's gradient, which passes where u is NaN.
  static V between(V u, V low, V high, V v) {
    return _mm256_and_ps(_mm256_and_ps(_mm256_cmp_ps(u, low, _CMP_NLE_UQ), _mm256_cmp_ps(u, high, _CMP_NGE_UQ)), v);
  }
  // Both return their second operand when either is NaN: a NaN stays one as long as it comes second.
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
};

// bfloat16 in memory, widened in registers.
struct Bf16 : Float32 {
  using X = BFloat16;
  // 8 accumulators, two halves of 2 weight vectors and of the broadcast slot: 14 registers.
  static constexpr int kTileM = 4;
  using Float32::broadcast_load, Float32::load, Float32::load_n, Float32::store, Float32::store_n;

  static __m256i bits(V v) { return _mm256_castps_si256(v); }
  static V widened(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
  // To the nearest, of two as near to the even one; of NaN the quiet one with its upper bits.
  static __m128i rounded(V v) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits(v), 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits(v), _mm256_set1_epi32(0x7fff)), odd);
    const V quiet = _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));
    const V value = _mm256_blendv_ps(_mm256_castsi256_ps(up), quiet, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(bits(value), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  static V load(const X* p) { return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static V load_n(const X* p, int n) {
    X all[kLanes] = {};
    __builtin_memcpy(all, p, n * sizeof(X));
    return load(all);
  }
  static void store(X* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rounded(v)); }
  static void store_n(X* p, V v, int n) {
    X all[kLanes];
    store(all, v);
    __builtin_memcpy(p, all, n * sizeof(X));
  }
  // A slot, the first value in its low half.
  static V broadcast_load(const X* p) {
    int32_t slot;
    __builtin_memcpy(&slot, p, 4);
    return _mm256_castsi256_ps(_mm256_set1_epi32(slot));
  }
  static V broadcast_half(const X* p) { return _mm256_castsi256_ps(_mm256_set1_epi32(p->bits)); }
  // The values of two rows of pixels in slots, those of the first in the low halves.
  static V pairs(const X* a, const X* b) {
    return _mm256_or_ps(load(b), _mm256_castsi256_ps(_mm256_srli_epi32(bits(load(a)), 16)));
  }
  static V pairs_n(const X* a, const X* b, int n) {
    return _mm256_or_ps(load_n(b, n), _mm256_castsi256_ps(_mm256_srli_epi32(bits(load_n(a, n)), 16)));
  }
  static V low(V slots) { return _mm256_castsi256_ps(_mm256_slli_epi32(bits(slots), 16)); }
  static V high(V slots) {
    return _mm256_castsi256_ps(_mm256_and_si256(bits(slots), _mm256_set1_epi32(int(0xffff0000))));
  }
  static V dot(V a, V b, V c) { return _mm256_fmadd_ps(high(a), high(b), _mm256_fmadd_ps(low(a), low(b), c)); }
};

const char* const kFeatures[] = {"avx2", "fma", nullptr};

// For inference widened beforehand: 12 accumulators, 2 halves of weights and the broadcast, as in float32.
struct WideBf16 : Bf16 {
  static constexpr int kTileM = Float32::kTileM;
  static constexpr bool kWide = true;
  // The compiler would keep the mask in a register, and an accumulator in memory.
  static V high(V slots) {
    alignas(32) static const uint16_t kMask[16] = {0, 65535, 0, 65535, 0, 65535, 0, 65535,
                                                   0, 65535, 0, 65535, 0, 65535, 0, 65535};
    asm("vandps %1, %0, %0" : "+x"(slots) : "m"(kMask));
    return slots;
  }
};

constexpr Kernel bf16() {
  using F = Forward<WideBf16>;
  Kernel k = Training<Bf16>::kernel("avx2_bf16", Dtype::kBFloat16, kFeatures);
  k.tiles = F::kTiles;
  k.block = F::block;
  k.conv = F::conv;
  k.pointwise = F::pointwise;
  return k;
}

}  // namespace

extern const Kernel kernel_f32, kernel_bf16;
const Kernel kernel_f32 = Training<Float32>::kernel("avx2_f32", Dtype::kFloat32, kFeatures);
const Kernel kernel_bf16 = bf16();

}  // namespace mnv2_fused::avx2
