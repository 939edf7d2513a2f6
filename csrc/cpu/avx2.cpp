// The AVX2 + FMA row of the kernel table: only what this ISA changes.
#include <immintrin.h>

#include "../inverted_residual.h"

namespace mnv2_fused::avx2 {
namespace {

#include "forward-inl.h"
#include "training-inl.h"

struct Float32 {
  using T = float;
  using V = __m256;
  static constexpr int kLanes = 8;
  // 12 accumulators, 3 weight vectors and the broadcast pixel: all 16 registers. 24 divides every expanded width.
  static constexpr int kTileM = 4, kTileN = 3;
  // 4 accumulators, 9 weights, the bias and an input: 15 registers.
  static constexpr int kDepthwiseRows = 1, kDepthwiseColumns = 4;
  static constexpr bool kPairs = false;
  static constexpr int kStreams = 4;
  static constexpr int kDoubles = 4, kDoublesM = 4, kDoublesN = 3;  // as the tile, in doubles
  static_assert(kTileM * kTileN + kTileN + 1 <= 16 && kDepthwiseRows * kDepthwiseColumns + 11 <= 16);

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

const char* const kFeatures[] = {"avx2", "fma", nullptr};

}  // namespace

extern const Kernel kernel_f32;
const Kernel kernel_f32 = Training<Float32>::kernel("avx2_f32", Dtype::kFloat32, kFeatures);

}  // namespace mnv2_fused::avx2
