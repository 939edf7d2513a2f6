// float32 with AVX-512. Included by the files of its rows, each inside its own anonymous namespace.
struct Float32 {
  using T = float;
  using X = float;
  using V = __m512;
  using Pair = double __attribute__((may_alias, aligned(4)));  // two floats that travel together
  static constexpr int kLanes = 16;
  // 28 accumulators, 2 weight vectors and the broadcast pixel: 31 of 32 registers, 16 loads for 28 multiply-adds.
  static constexpr int kTileM = 14, kTileN = 2;
  static constexpr int kTileM1 = kTileM;  // of a tile of one vector
  static constexpr bool kEvenTiles = false;
  // 21 accumulators, 9 weights, the bias, an input: all 32 registers, 45 loads for 189 multiply-adds at stride 1.
  static constexpr int kDepthwiseRows = 3, kDepthwiseColumns = 7;
  static constexpr bool kTapsInRegisters = true;
  static constexpr int kStreams = 4;
  static constexpr int kLastSteps = 12, kLastPixels = 8;  // of multiply
  // 21 accumulators, 3 weight vectors and the broadcast pair of inputs.
  static constexpr bool kPairs = true, kWide = false;
  static constexpr int kPairsM = 7, kRegisters = 32;
  static constexpr int kDoubles = 8, kDoublesM = 8, kDoublesN = 2;  // 16 accumulators, 2 vectors, the broadcast
  static_assert(kTileM * kTileN + kTileN + 1 <= 32 && kDepthwiseRows * kDepthwiseColumns + 11 <= 32);

  static V load(const T* p) { return _mm512_loadu_ps(p); }
  static V load_n(const T* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
  static void store(T* p, V v) { _mm512_storeu_ps(p, v); }
  static void store_n(T* p, V v, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }
  static V broadcast(T v) { return _mm512_set1_ps(v); }
  static V broadcast_load(const T* p) { return _mm512_set1_ps(*p); }
  // p[0], p[1], p[0], p[1], ...
  static V broadcast_pair(const T* p) { return _mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const Pair*>(p))); }
  // The sums of neighbours in a, then those in b.
  static V add_pairs(V a, V b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
  }
  static V fmadd(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  // v, but 0 where u <= low or u >= high: as hardtanh's gradient, which passes where u is NaN.
  static V between(V u, V low, V high, V v) {
    const __mmask16 above = _mm512_cmp_ps_mask(u, low, _CMP_NLE_UQ);
    return _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(above, u, high, _CMP_NGE_UQ), v);
  }
  // Both return their second operand when either is NaN: a NaN stays one as long as it comes second.
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
};
