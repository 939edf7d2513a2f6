// The forward pass of every layer, each algorithm written once over an `Isa` (vector type, register tile sizes).
// An ISA's file includes this inside its own anonymous namespace. No threads, no allocation, no torch in here.
//
// A block never holds its expanded tensor: for a stripe of output rows it expands the rows of h that are missing into
// a ring, a panel of channels at a time, filters that panel into d while it is in L1, and projects the stripe.
// The order in which an output element's products are added depends on its place in the tensor only, never on the tile
// or the thread that computes it.
//
// T is what is added up, biases, taps and h are; X is what x, y and d are, T itself or a type half as wide. Where it is
// narrower a slot, as wide as a T, holds two neighbours of a sum, in an activation and in a matrix alike, and
// Isa::dot(a, b, c) adds both products. Where Isa::kWide, which has no such instruction, only the matrix has slots:
// what tiles multiply them with is widened beforehand, once for all panels, and never narrowed in between.
#define MNV2_INLINE inline __attribute__((always_inline))
#define MNV2_UNROLL _Pragma("GCC unroll 32")

template <class Isa>
struct Forward {
  using T = typename Isa::T;
  using X = typename Isa::X;
  using V = typename Isa::V;
  static constexpr int kSlot = sizeof(T) / sizeof(X);  // values of X
  static constexpr bool kWide = Isa::kWide;
  using Operand = std::conditional_t<kWide, T, X>;  // what a matrix tile reads of activations
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kTileM = Isa::kTileM;  // pixels of a matrix tile
  static constexpr int kTileN = Isa::kTileN;  // vectors of output channels of a matrix tile
  static constexpr int kPanel = kTileN * kLanes;
  static constexpr int kLine = 64 / sizeof(T);             // elements of a cache line
  static constexpr int kRows = Isa::kDepthwiseRows;        // output rows and
  static constexpr int kColumns = Isa::kDepthwiseColumns;  // columns of a depthwise tile
  static constexpr Tiles kTiles = {kLanes, kPanel,      kTileM > Isa::kTileM1 ? kTileM : Isa::kTileM1,
                                   kSlot,  Isa::kPairs, kWide};

  static int ceil_div(int a, int b) { return (a + b - 1) / b; }
  static int min(int a, int b) { return a < b ? a : b; }
  static int max(int a, int b) { return a > b ? a : b; }
  static constexpr int slots(int values) { return (values + kSlot - 1) / kSlot; }
  static MNV2_INLINE V multiply_add(V a, V b, V c) {
    if constexpr (kSlot == 1) {
      return Isa::fmadd(a, b, c);
    } else {
      return Isa::dot(a, b, c);
    }
  }
  static V relu6(V v) { return Isa::min(Isa::broadcast(T(6)), Isa::max(Isa::broadcast(T(0)), v)); }

  // ---------------------------------------------------------------------------------------------- matrix tile

  // Pixels as rows: K is `segments` runs of `k` consecutive elements (one for a 1x1, channels x 3 for a dense 3x3),
  // run s of pixel m beginning at segment[s] + offset + m * pixel_stride.
  struct Pixels {
    const Operand* const* segment;
    int segments, k;
    int64_t offset, pixel_stride;
  };

  // Where and how a tile of outputs goes.
  template <class Y, class S = T>
  struct OutputsTo {
    Y* y;
    const int32_t* offset;  // of each pixel, for the ring of h
    int64_t pixel_stride;   // otherwise
    const X* residual;      // null, or x laid out as y
    const S* sums;          // null, or what is added to, laid out as y and maybe y itself
    bool relu6;
    int tail;  // elements of the last vector that exist, 0 for all
    // Weights that are read next and would come from far away: so many elements. Null where they are in cache.
    const T* ahead = nullptr;
    int64_t ahead_size = 0;
    // They are fetched along the way, so far for every slot of a tile: all at once they would fill the core's queue of
    // misses, and it would wait.
    int64_t ahead_step = 0;

    MNV2_INLINE void advance(int pixels) {
      if (offset) {
        offset += pixels;
      } else {
        y += pixels * pixel_stride;
        if (residual) residual += pixels * pixel_stride;
        if (sums) sums += pixels * pixel_stride;
      }
    }
  };
  using Outputs = OutputsTo<T>;
  static constexpr int64_t kNextLayer = (64 << 10) / sizeof(T);  // of its weights, all of them in the early layers

  template <int Value>
  struct Count {
    static constexpr int value = Value;
  };

  struct Nothing {
    void operator()(int) const {}
  };

  // Adds the products to acc and calls done(m) when the sums of pixel m are complete.
  template <int M, int N, class Out, class Done = Nothing>
  static MNV2_INLINE void multiply(V (&acc)[M][N], const Pixels& pixels, const T* w, const Out& out, Done done = {}) {
    if constexpr (kWide) {
      multiply_widened<M, N>(acc, pixels, w, out, done);
    } else {
      multiply_stored<M, N>(acc, pixels, w, out, done);
    }
  }

  // Stores of 512 bits can hold up both multiply-add units for a cycle each when the results of a whole tile come at
  // once, and cost a third of that among multiply-adds (measured on AMD Zen 5: 448 multiply-adds, 224 cycles, take 252
  // with 28 stores behind them and 232 with the same spread among them). So the last steps are done for the first
  // pixels of a whole tile, then for the others: the first are stored meanwhile.
  template <int M, int N, class Out, class Done>
  static MNV2_INLINE void multiply_stored(V (&acc)[M][N], const Pixels& pixels, const T* w, const Out& out, Done done) {
    constexpr int kPointers = (M + 2) / 3;  // [p], [p + stride], [p + 2 * stride]: 14 pixels need 5 registers
    constexpr bool kSpread = M == kTileM && N == kTileN && Isa::kLastSteps > 0 && !std::is_same_v<Done, Nothing>;
    const int last = Isa::kLastSteps * kSlot;  // where sums are long, stores are few
    const bool spread = kSpread && pixels.k % kSlot == 0 && pixels.k >= last && pixels.k < 8 * last;
    const int64_t stride = pixels.pixel_stride, ahead_step = out.ahead_step;
    const T* ahead = out.ahead;
    const Operand* p[kPointers];
    const auto slot = [](const Operand* x) __attribute__((always_inline)) { return Isa::broadcast_load(x); };
    for (int s = 0; s < pixels.segments; ++s) {
      MNV2_UNROLL for (int i = 0; i < kPointers; ++i) p[i] = pixels.segment[s] + pixels.offset + 3 * i * stride;
      const auto steps = [&](auto count, auto broadcast) __attribute__((always_inline)) {
        // Without this the compiler keeps a pointer for every pixel and spills them.
        MNV2_UNROLL for (int i = 0; i < kPointers; ++i) asm volatile("" : "+r"(p[i]));
        MNV2_UNROLL for (int j = 0; j < count.value; ++j) {
          V b[N];
          MNV2_UNROLL for (int n = 0; n < N; ++n) b[n] = Isa::load(w + n * kLanes);
          MNV2_UNROLL for (int m = 0; m < M; ++m) {
            const V a = broadcast(p[m / 3] + (m % 3) * stride + j * kSlot);
            MNV2_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = multiply_add(a, b[n], acc[m][n]);
          }
          w += N * kLanes;
          __builtin_prefetch(ahead);
          ahead += ahead_step;
        }
        MNV2_UNROLL for (int i = 0; i < kPointers; ++i) p[i] += count.value * kSlot;
      };
      int k = pixels.k;
      if (spread && s + 1 == pixels.segments) k -= last;
      for (; k >= 2 * kSlot; k -= 2 * kSlot) steps(Count<2>(), slot);  // 3% faster than one by one; four are no better
      if (k >= kSlot) steps(Count<1>(), slot);
      if constexpr (kSlot > 1) {  // half a slot: what follows in memory is not part of the sum
        if (k % kSlot)
          steps(Count<1>(), [](const X* x) __attribute__((always_inline)) { return Isa::broadcast_half(x); });
      }
    }
    if constexpr (kSpread) {
      if (spread) {
        MNV2_UNROLL for (int half = 0; half < 2; ++half) {
          const auto in_half = [&](int m) { return (m < Isa::kLastPixels) == (half == 0); };
          asm volatile("" : "+r"(w));
          MNV2_UNROLL for (int i = 0; i < kPointers; ++i) asm volatile("" : "+r"(p[i]));
          MNV2_UNROLL for (int j = 0; j < Isa::kLastSteps; ++j) {
            V b[N];
            MNV2_UNROLL for (int n = 0; n < N; ++n) {
              b[n] = Isa::load(w + (j * N + n) * kLanes);
              asm volatile("" : "+v"(b[n]));  // or the compiler loads it for every pixel
            }
            MNV2_UNROLL for (int m = 0; m < M; ++m) {
              if (!in_half(m)) continue;
              const V a = slot(p[m / 3] + (m % 3) * stride + j * kSlot);
              MNV2_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = multiply_add(a, b[n], acc[m][n]);
            }
            if (half == 0) {
              __builtin_prefetch(ahead);
              ahead += ahead_step;
            }
          }
          MNV2_UNROLL for (int m = 0; m < M; ++m) {
            if (in_half(m)) done(m);
          }
        }
        return;
      }
    }
    MNV2_UNROLL for (int m = 0; m < M; ++m) done(m);
  }

  // Of widened pixels: a slot's first value is the weight of one input, its second that of the next.
  template <int M, int N, class Out, class Done>
  static MNV2_INLINE void multiply_widened(V (&acc)[M][N], const Pixels& pixels, const T* w, const Out& out,
                                           Done done) {
    constexpr int kPointers = (M + 2) / 3;
    const int64_t stride = pixels.pixel_stride, ahead_step = out.ahead_step;
    const T* ahead = out.ahead;
    for (int s = 0; s < pixels.segments; ++s) {
      const T* p[kPointers];
      MNV2_UNROLL for (int i = 0; i < kPointers; ++i) p[i] = pixels.segment[s] + pixels.offset + 3 * i * stride;
      const auto step = [&](auto inputs) __attribute__((always_inline)) {
        MNV2_UNROLL for (int i = 0; i < kPointers; ++i) asm volatile("" : "+r"(p[i]));
        MNV2_UNROLL for (int j = 0; j < inputs.value; ++j) {
          V b[N];
          MNV2_UNROLL for (int n = 0; n < N; ++n) {
            b[n] = j == 0 ? Isa::low(Isa::load(w + n * kLanes)) : Isa::high(Isa::load(w + n * kLanes));
            asm volatile("" : "+x"(b[n]));
          }
          MNV2_UNROLL for (int m = 0; m < M; ++m) {
            const V a = Isa::broadcast_load(p[m / 3] + (m % 3) * stride + j);
            MNV2_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = Isa::fmadd(a, b[n], acc[m][n]);
          }
        }
        w += N * kLanes;
        __builtin_prefetch(ahead);
        ahead += ahead_step;
        MNV2_UNROLL for (int i = 0; i < kPointers; ++i) p[i] += inputs.value;
      };
      for (int k = pixels.k; k >= 2; k -= 2) step(Count<2>());
      if (pixels.k % 2) step(Count<1>());
    }
    MNV2_UNROLL for (int m = 0; m < M; ++m) done(m);
  }

  template <int M, int N>
  static MNV2_INLINE void begin(V (&acc)[M][N], const T* bias) {
    MNV2_UNROLL for (int n = 0; n < N; ++n) {
      const V b = Isa::load(bias + n * kLanes);
      MNV2_UNROLL for (int m = 0; m < M; ++m) acc[m][n] = b;
    }
  }

  // relu6 of the product into the ring of h.
  struct Hidden {
    using Out = Outputs;
    template <int M, int N>
    static void tile(const Pixels& pixels, const T* w, const T* bias, const Outputs& out) {
      V acc[M][N];
      begin<M, N>(acc, bias);
      multiply<M, N>(acc, pixels, w, out, [&](int m) __attribute__((always_inline)) {
        T* y = out.y + out.offset[m];
        MNV2_UNROLL for (int n = 0; n < N; ++n) Isa::store(y + n * kLanes, relu6(acc[m][n]));
      });
    }
  };

  // The product into a tensor: partial sums, residual and activation as asked for.
  template <class Y, class S = T>
  struct OutputTo {
    using Out = OutputsTo<Y, S>;
    template <int M, int N>
    static void tile(const Pixels& pixels, const T* w, const T* bias, const Out& out) {
      V acc[M][N];
      begin<M, N>(acc, bias);
      multiply<M, N>(acc, pixels, w, out);
      if constexpr (kWide && !std::is_same_v<Y, T>) {
        // By way of memory: what rounds needs registers, and the compiler would take them from the loop above.
        V sums[M][N];
        __builtin_memcpy(sums, acc, sizeof(sums));
        asm volatile("" : "+m"(sums));
        finish<M, N>(sums, out);
      } else {
        finish<M, N>(acc, out);
      }
    }

    template <int M, int N>
    static MNV2_INLINE void finish(V (&acc)[M][N], const Out& out) {
      if (out.sums) add<M, N>(acc, out.sums, out);
      if (out.residual) add<M, N>(acc, out.residual, out);
      if (out.relu6) {
        MNV2_UNROLL for (int m = 0; m < M; ++m) {
          MNV2_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = relu6(acc[m][n]);
        }
      }
      MNV2_UNROLL for (int m = 0; m < M; ++m) {
        Y* y = out.y + m * out.pixel_stride;
        MNV2_UNROLL for (int n = 0; n < N - 1; ++n) Isa::store(y + n * kLanes, acc[m][n]);
        if (out.tail) {
          Isa::store_n(y + (N - 1) * kLanes, acc[m][N - 1], out.tail);
        } else {
          Isa::store(y + (N - 1) * kLanes, acc[m][N - 1]);
        }
      }
    }

    template <int M, int N, class From>
    static MNV2_INLINE void add(V (&acc)[M][N], const From* from, const Out& out) {
      MNV2_UNROLL for (int m = 0; m < M; ++m) {
        const From* x = from + m * out.pixel_stride;
        MNV2_UNROLL for (int n = 0; n < N - 1; ++n) acc[m][n] = Isa::add(acc[m][n], Isa::load(x + n * kLanes));
        const From* last = x + (N - 1) * kLanes;
        acc[m][N - 1] = Isa::add(acc[m][N - 1], out.tail ? Isa::load_n(last, out.tail) : Isa::load(last));
      }
    }
  };

  using Output = OutputTo<X>;

  // The same from a paired panel: one and a half vectors of output channels, one run of inputs.
  template <class Y>
  struct PairedOutputTo {
    using Out = OutputsTo<Y>;
    template <int M, int N>
    static void tile(const Pixels& pixels, const T* w, const T* bias, const Out& out) {
      static_assert(M * 3 + 4 <= Isa::kRegisters);
      constexpr int kPointers = (M + 2) / 3;
      const int64_t stride = pixels.pixel_stride;
      const X* p[kPointers];
      const T* ahead = out.ahead;
      MNV2_UNROLL for (int i = 0; i < kPointers; ++i) p[i] = pixels.segment[0] + pixels.offset + 3 * i * stride;
      V sum[M][3];
      MNV2_UNROLL for (int m = 0; m < M; ++m) {
        MNV2_UNROLL for (int n = 0; n < 3; ++n) sum[m][n] = Isa::broadcast(T(0));
      }
      for (int k = pixels.k; k > 0; k -= 2 * kSlot) {
        MNV2_UNROLL for (int i = 0; i < kPointers; ++i) asm volatile("" : "+r"(p[i]));
        V b[3];
        MNV2_UNROLL for (int n = 0; n < 3; ++n) b[n] = Isa::load(w + n * kLanes);
        MNV2_UNROLL for (int m = 0; m < M; ++m) {
          const V a = Isa::broadcast_pair(p[m / 3] + (m % 3) * stride);
          MNV2_UNROLL for (int n = 0; n < 3; ++n) sum[m][n] = multiply_add(a, b[n], sum[m][n]);
        }
        MNV2_UNROLL for (int i = 0; i < kPointers; ++i) p[i] += 2 * kSlot;
        w += 3 * kLanes;
        __builtin_prefetch(ahead);
        ahead += out.ahead_step * 2;
      }
      V acc[M][2];
      MNV2_UNROLL for (int m = 0; m < M; ++m) {
        acc[m][0] = Isa::add(Isa::load(bias), Isa::add_pairs(sum[m][0], sum[m][1]));
        acc[m][1] = Isa::add(Isa::load(bias + kLanes), Isa::add_pairs(sum[m][2], sum[m][2]));
      }
      OutputTo<Y>::template finish<M, 2>(acc, out);
    }
  };

  // relu6 of the product, added over the pixels to the sums at y.
  struct Pooled {
    using Out = Outputs;
    template <int M, int N>
    static void tile(const Pixels& pixels, const T* w, const T* bias, const Outputs& out) {
      V acc[M][N];
      begin<M, N>(acc, bias);
      multiply<M, N>(acc, pixels, w, out);
      MNV2_UNROLL for (int n = 0; n < N; ++n) {
        V sum = Isa::load(out.y + n * kLanes);
        MNV2_UNROLL for (int m = 0; m < M; ++m) sum = Isa::add(sum, relu6(acc[m][n]));
        Isa::store(out.y + n * kLanes, sum);
      }
    }
  };

  // Kind::tile<m, n> for run-time m <= M and n <= N.
  template <class Kind, int M, int N>
  static decltype(&Kind::template tile<M, N>) tile_function(int m, int n) {
    if constexpr (N > 1) {
      if (n < N) return tile_function<Kind, M, N - 1>(m, n);
    }
    if constexpr (M > 1) {
      if (m < M) return tile_function<Kind, M - 1, N>(m, n);
    }
    return &Kind::template tile<M, N>;
  }

  // One panel of output channels for all pixels, M at a time.
  template <class Kind, int M = kTileM, int N = kTileN>
  static void panel(Pixels pixels, const T* w, const T* bias, typename Kind::Out out, int pixel_count, int channels) {
    const int n = N == 1 ? 1 : ceil_div(channels, kLanes);
    if constexpr (N > 1 && M < Isa::kTileM1) {
      if (n == 1) return panel<Kind, Isa::kTileM1, 1>(pixels, w, bias, out, pixel_count, channels);
    }
    out.tail = channels % kLanes;
    const int64_t steps = int64_t(pixels.segments) * slots(pixels.k);  // of a tile
    const int tiles = ceil_div(pixel_count, M);
    if (out.ahead) {
      const int64_t even = out.ahead_size / (steps * tiles) + 1;
      out.ahead_step = even < kLine ? even : kLine;
    } else {
      out.ahead = w;
    }
    const auto run = [&](int m, int count) __attribute__((always_inline)) {
      if (count == 0) return;
      const auto tile = tile_function<Kind, M, N>(m, n);
      for (; count > 0; --count) {
        tile(pixels, w, bias, out);
        pixels.offset += m * pixels.pixel_stride;
        out.advance(m);
        out.ahead += steps * out.ahead_step;
      }
    };
    if (Isa::kEvenTiles) {
      run(pixel_count / tiles + 1, pixel_count % tiles);
      run(pixel_count / tiles, tiles - pixel_count % tiles);
    } else {
      run(M, pixel_count / M);
      run(pixel_count % M, pixel_count % M > 0);
    }
  }

  // ------------------------------------------------------------------------------------------- depthwise tile

  template <class Y>
  struct FilterTo {
    const T* weight;  // [9][kLanes]
    const T* bias;
    Y* d;
    int64_t d_row, d_column;  // strides
    int dilation;
  };
  using Filter = FilterTo<Operand>;

  // The constants of one vector of channels, kept in registers along a row, where there are enough of them.
  struct Taps {
    V w[9], bias;
  };
  struct TapsInMemory {};

  // What becomes of a filtered value: d itself, or relu6(d).
  struct Raw {
    static V of(V v) { return v; }
  };
  struct Activated {
    static V of(V v) { return relu6(v); }
  };

  // R x C outputs of one vector of channels; row i of their inputs begins at rows[i] + start. With D (dilation 1) every
  // input is loaded once for all the outputs of the tile, and an output is stored after its last input, for what
  // `multiply` says of stores; one row of stride 1 is over too soon for that, and was measured slower.
  template <class Emit, int S, bool D, int R, int C, class Y>
  static MNV2_INLINE void filter(const Taps& t, const FilterTo<Y>& f, const T* const* rows, int64_t start, Y* d) {
    constexpr bool kAtOnce = D && (R > 1 || S > 1);
    V acc[R][C];
    MNV2_UNROLL for (int r = 0; r < R; ++r) { MNV2_UNROLL for (int c = 0; c < C; ++c) acc[r][c] = t.bias; }
    if constexpr (D) {
      MNV2_UNROLL for (int i = 0; i < (R - 1) * S + 3; ++i) {
        const T* row = rows[i] + start;
        // What the next tile reads is in L2 where rows are long, in as many streams as there are loads.
        MNV2_UNROLL for (int j = 2; j < C * S + 2; ++j) __builtin_prefetch(row + (C * S + j) * kPanel);
        asm volatile("" : "+r"(row));  // or the compiler keeps a register for every column instead of every row
        Y* out = d + max(i - 2, 0) / S * f.d_row;
        MNV2_UNROLL for (int j = 0; j < (C - 1) * S + 3; ++j) {
          const V v = Isa::load(row + j * kPanel);
          MNV2_UNROLL for (int r = 0; r < R; ++r) {
            const int ky = i - r * S;
            if (ky < 0 || ky > 2) continue;
            MNV2_UNROLL for (int c = 0; c < C; ++c) {
              const int kx = j - c * S;
              if (kx >= 0 && kx <= 2) acc[r][c] = Isa::fmadd(v, t.w[ky * 3 + kx], acc[r][c]);
              if (kAtOnce && ky == 2 && kx == 2) {
                Isa::store(out, Emit::of(acc[r][c]));
                out += f.d_column;
                asm volatile("" : "+r"(out));
              }
            }
          }
        }
      }
    } else {
      static_assert(R == 1, "dilated rows share no inputs");
      MNV2_UNROLL for (int ky = 0; ky < 3; ++ky) {
        const T* row = rows[ky * f.dilation] + start;
        MNV2_UNROLL for (int kx = 0; kx < 3; ++kx) {
          const T* x = row + kx * f.dilation * kPanel;
          asm volatile("" : "+r"(x));
          MNV2_UNROLL for (int c = 0; c < C; ++c) {
            acc[0][c] = Isa::fmadd(Isa::load(x + c * S * kPanel), t.w[ky * 3 + kx], acc[0][c]);
          }
        }
      }
    }
    if constexpr (!kAtOnce) {
      MNV2_UNROLL for (int c = 0; c < C; ++c) {
        Isa::store(d, Emit::of(acc[0][c]));
        d += f.d_column;
        asm volatile("" : "+r"(d));
      }
    }
  }

  // The same with the taps of one row of the kernel at a time in registers.
  template <class Emit, int S, bool D, int R, int C, class Y>
  static MNV2_INLINE void filter(TapsInMemory, const FilterTo<Y>& f, const T* const* rows, int64_t start, Y* d) {
    V acc[R][C];
    const V bias = Isa::load(f.bias);
    MNV2_UNROLL for (int r = 0; r < R; ++r) { MNV2_UNROLL for (int c = 0; c < C; ++c) acc[r][c] = bias; }
    MNV2_UNROLL for (int ky = 0; ky < 3; ++ky) {
      V w[3];
      MNV2_UNROLL for (int kx = 0; kx < 3; ++kx) {
        w[kx] = Isa::load(f.weight + (ky * 3 + kx) * kLanes);
        asm volatile("" : "+x"(w[kx]));  // or the compiler loads it for every product
      }
      MNV2_UNROLL for (int r = 0; r < R; ++r) {
        const T* row = rows[r * S + (D ? ky : ky * f.dilation)] + start;
        if constexpr (D) {
          MNV2_UNROLL for (int j = 0; j < (C - 1) * S + 3; ++j) {
            V v = Isa::load(row + j * kPanel);
            asm volatile("" : "+x"(v));
            MNV2_UNROLL for (int c = 0; c < C; ++c) {
              const int kx = j - c * S;
              if (kx >= 0 && kx <= 2) acc[r][c] = Isa::fmadd(v, w[kx], acc[r][c]);
            }
          }
        } else {
          MNV2_UNROLL for (int kx = 0; kx < 3; ++kx) {
            const T* x = row + kx * f.dilation * kPanel;
            MNV2_UNROLL for (int c = 0; c < C; ++c) {
              acc[r][c] = Isa::fmadd(Isa::load(x + c * S * kPanel), w[kx], acc[r][c]);
            }
          }
        }
      }
    }
    MNV2_UNROLL for (int r = 0; r < R; ++r) {
      MNV2_UNROLL for (int c = 0; c < C; ++c) Isa::store(d + r * f.d_row + c * f.d_column, Emit::of(acc[r][c]));
    }
  }

  // Output columns [column, end) of R rows: whole tiles, then ever smaller ones.
  template <class Emit, int S, bool D, int R, int C, class Taps, class Y>
  static MNV2_INLINE void filter_columns(const Taps& t, const FilterTo<Y>& f, const T* const* rows, int column,
                                         int end) {
    for (; column + C <= end; column += C) {
      filter<Emit, S, D, R, C>(t, f, rows, int64_t(column) * S * kPanel, f.d + column * f.d_column);
    }
    if constexpr (C > 1) filter_columns<Emit, S, D, R, C / 2>(t, f, rows, column, end);
  }

  template <class Emit, int S, bool D, int R, class Y>
  static __attribute__((noinline)) void filter_rows(const FilterTo<Y>& f, const T* const* rows, int column_count) {
    if constexpr (Isa::kTapsInRegisters) {
      Taps t;
      MNV2_UNROLL for (int i = 0; i < 9; ++i) t.w[i] = Isa::load(f.weight + i * kLanes);
      t.bias = Isa::load(f.bias);
      filter_columns<Emit, S, D, R, kColumns>(t, f, rows, 0, column_count);
    } else {
      filter_columns<Emit, S, D, R, kColumns>(TapsInMemory{}, f, rows, 0, column_count);
    }
  }

  // Rows in tiles of R, then in lower ones; four are two and two, since a single row has too few chains of sums.
  template <class Emit, int S, bool D, int R = D ? kRows : 1, class Y>
  static void filter_stripe(FilterTo<Y> f, const T* const* rows, int row_count, int column_count) {
    for (; row_count >= R && !(R == 3 && row_count == 4); row_count -= R) {
      filter_rows<Emit, S, D, R>(f, rows, column_count);
      f.d += R * f.d_row;
      rows += R * S;
    }
    if constexpr (R > 1) filter_stripe<Emit, S, D, R - 1>(f, rows, row_count, column_count);
  }

  template <class Emit, class Y>
  static void depthwise(const FilterTo<Y>& f, int stride, const T* const* rows, int row_count, int column_count) {
    if (stride == 1 && f.dilation == 1) return filter_stripe<Emit, 1, true>(f, rows, row_count, column_count);
    if (stride == 2 && f.dilation == 1) return filter_stripe<Emit, 2, true>(f, rows, row_count, column_count);
    if (stride == 1) return filter_stripe<Emit, 1, false>(f, rows, row_count, column_count);
    return filter_stripe<Emit, 2, false>(f, rows, row_count, column_count);
  }

  // ------------------------------------------------------------------------------------------------ dense 3x3

  // Rows of the image, planar and with their side padding, as far as the dense 3x3 needs them: each copied once.
  struct ImageRows {
    const Step& s;
    const Image& image;
    const Operand* zeros;
    Operand* ring;
    int length, filled = 0;
    static constexpr int kRing = 4;

    ImageRows(const Step& step, const Image& source, T* scratch, const T* zero)
        : s(step),
          image(source),
          zeros(reinterpret_cast<const Operand*>(zero)),
          ring(reinterpret_cast<Operand*>(scratch)),
          length(step.conv_pad_left + step.image_width + step.conv_pad_right) {}

    Operand* at(int channel, int row) { return ring + int64_t(channel * kRing + row % kRing) * length; }

    // The runs of the 3x3 for row `row` of its output.
    void segments(int row, const Operand** segment) {
      const int top = row * s.conv_stride - s.conv_pad_top;
      for (int y = max(max(top, 0), filled); y < min(top + 3, s.image_height); ++y) fill(y);
      filled = max(filled, top + 3);
      for (int c = 0; c < s.image_channels; ++c) {
        for (int ky = 0; ky < 3; ++ky) {
          const int y = top + ky;
          segment[c * 3 + ky] = y < 0 || y >= s.image_height ? zeros : at(c, y);
        }
      }
    }

    void fill(int row) {
      for (int c = 0; c < s.image_channels; ++c) {
        if constexpr (kSlot > 1) {
          if (image.wide) {
            fill(static_cast<const T*>(image.data), c, row);
            continue;
          }
        }
        fill(static_cast<const X*>(image.data), c, row);
      }
    }

    template <class From>
    void fill(const From* from, int c, int row) {
      from += c * image.stride_channel + row * image.stride_row;
      Operand* to = at(c, row);
      for (int i = 0; i < s.conv_pad_left; ++i) to[i] = Operand{};
      to += s.conv_pad_left;
      if (image.stride_column == 1) {
        copy(from, to);
      } else {
        for (int i = 0; i < s.image_width; ++i) to[i] = operand(narrowed(from[i * image.stride_column]));
      }
      for (int i = 0; i < s.conv_pad_right; ++i) to[s.image_width + i] = Operand{};
      if (row + s.conv_stride < s.image_height) fetch_row(from + s.conv_stride * image.stride_row);
    }

    template <class From>
    void copy(const From* from, Operand* to) const {
      if constexpr (std::is_same_v<From, Operand> && !kWide) {
        __builtin_memcpy(to, from, sizeof(From) * s.image_width);
      } else if constexpr (kWide) {
        for (int i = 0; i < s.image_width; ++i) to[i] = operand(narrowed(from[i]));
      } else {
        int i = 0;
        for (; i + kLanes <= s.image_width; i += kLanes) Isa::store(to + i, Isa::load(from + i));
        const int rest = s.image_width - i;
        if (rest > 0) Isa::store_n(to + i, Isa::load_n(from + i, rest), rest);
      }
    }
    static Operand operand(X value) {
      if constexpr (kWide) {
        return widen(value);
      } else {
        return value;
      }
    }
    static X narrowed(X value) { return value; }
    template <class Wide>
    static X narrowed(Wide value) {
      return round_to_bfloat16(value);
    }

    // The image comes from far away, and the next rows of it are read only when these have been multiplied.
    template <class From>
    void fetch_row(const From* from) const {
      constexpr int kElements = 64 / sizeof(From);
      if (image.stride_column > kElements || image.stride_column < 0) return;
      for (int64_t i = 0; i < s.image_width * image.stride_column; i += kElements) __builtin_prefetch(from + i);
    }
  };

  static void conv(const Step& s, const void* packed_, const Image& image, void* y_, void* scratch_, const void* zeros_,
                   int row0, int row1) {
    const T* packed = static_cast<const T*>(packed_);
    T* scratch = static_cast<T*>(scratch_);
    const Operand** segment = reinterpret_cast<const Operand**>(scratch + s.rows_offset);
    ImageRows rows(s, image, scratch + s.image_offset, static_cast<const T*>(zeros_));
    const int k = s.image_channels * 3 * slots(3);
    for (int row = row0; row < row1; ++row) {
      rows.segments(row, segment);
      X* y = static_cast<X*>(y_) + int64_t(row) * s.out_width * s.out_channels;
      for (int n = 0; n < s.out_channels; n += kPanel) {
        panel<Output>({segment, s.image_channels * 3, 3, 0, s.conv_stride}, packed + s.expand_weight + int64_t(n) * k,
                      packed + s.expand_bias + n, {y + n, nullptr, s.out_channels, nullptr, nullptr, s.relu6, 0},
                      s.out_width, min(kPanel, s.out_channels - n));
      }
    }
  }

  // ---------------------------------------------------------------------------------------------------- block

  static void block(const Step& s, const void* packed_, const void* x_, const Image& image, void* y_, void* scratch_,
                    const void* zeros_, int row0, int row1, int group0, int group1, void* partial_) {
    const T* packed = static_cast<const T*>(packed_);
    const X* x = static_cast<const X*>(x_);
    const T* zeros = static_cast<const T*>(zeros_);
    T* scratch = static_cast<T*>(scratch_);
    T* ring = scratch;
    Operand* d = reinterpret_cast<Operand*>(scratch + s.d_offset);
    T* sums = static_cast<T*>(partial_ ? partial_ : kSlot == 1 ? y_ : scratch + s.sums_offset);
    const Operand** segment = reinterpret_cast<const Operand**>(scratch + s.rows_offset);
    const T** rows = reinterpret_cast<const T**>(segment + s.image_channels * 3 + 1);
    const int ring_pixels = s.ring_rows * s.width;
    const int64_t ring_row = int64_t(s.row_length) * kPanel, ring_panel = s.ring_rows * ring_row;

    zero_sides(s, ring);
    for (int group = group0; group < group1; ++group) {
      const int c0 = group_panel(s, group) * kPanel, c1 = min(group_panel(s, group + 1) * kPanel, s.hidden_channels);
      ImageRows image_rows(s, image, scratch + s.image_offset, zeros);
      int filled = 0;  // rows of h before this one are in the ring, or no longer needed
      for (int o0 = row0; o0 < row1; o0 += s.stripe) {
        const int o1 = min(o0 + s.stripe, row1);
        const int top = o0 * s.stride - s.pad_top, bottom = (o1 - 1) * s.stride - s.pad_top + 2 * s.dilation + 1;
        const int h0 = max(max(top, 0), filled), h1 = max(h0, min(bottom, s.height));
        filled = h1;

        if (s.source == Step::kStem) {
          for (int h = h0; h < h1; ++h) {
            image_rows.segments(h, segment);
            for (int c = c0; c < c1; c += kPanel) {
              panel<Hidden>({segment, s.image_channels * 3, 3, 0, s.conv_stride},
                            packed + s.expand_weight + int64_t(c) * s.image_channels * 3 * slots(3),
                            packed + s.expand_bias + c,
                            {ring + (s.whole ? 0 : (c - c0) / kPanel * ring_panel),
                             s.pixel_offsets + h % s.ring_rows * s.width, 0, nullptr, nullptr, true, 0},
                            s.width, min(kPanel, c1 - c));
            }
            // With `whole` a second panel would overwrite the first: schedule.cpp gives the stem a ring of all panels.
          }
        }
        if (s.source == Step::kExpand) {
          segment[0] = operands(x + int64_t(h0) * s.width * s.in_channels, int64_t(h1 - h0) * s.width * s.in_channels,
                                scratch + s.operands_offset);
        }
        for (int c = c0; c < c1; c += kPanel) {
          T* h = ring + (s.whole ? 0 : (c - c0) / kPanel * ring_panel);
          const int channels = min(kPanel, c1 - c);
          if (s.source == Step::kExpand) {
            const bool more = c + kPanel < c1;
            const T* ahead = nullptr;
            int64_t ahead_size = 0;
            if (s.whole) {
              ahead = more ? packed + s.expand_weight + int64_t(c + kPanel) * slots(s.in_channels)
                           : packed + s.project_weight + int64_t(c0 / kSlot) * min(kPanel, s.out_channels);
              ahead_size = int64_t(kPanel) * slots(more ? s.in_channels : c1 - c0);
            } else if (!more) {  // what the next stripe reads
              ahead = reinterpret_cast<const T*>(x + int64_t(h1) * s.width * s.in_channels);
              ahead_size = int64_t(min(s.stripe * s.stride, s.height - h1)) * s.width * s.in_channels / kSlot;
            }
            if (s.whole) {
              const T* dw = packed + s.depthwise_weight + int64_t(c) * 9;
              for (int i = 0; i < channels * 9; i += kLine) __builtin_prefetch(dw + i);
              for (int i = 0; i < channels; i += kLine) __builtin_prefetch(packed + s.depthwise_bias + c + i);
            }
            expand(s, segment, packed + s.expand_weight + int64_t(c) * slots(s.in_channels), packed + s.expand_bias + c,
                   h, h0 % s.ring_rows * s.width, ring_pixels, (h1 - h0) * s.width, channels, ahead, ahead_size);
          } else if (s.source == Step::kCopy) {
            for (int row = h0; row < h1; ++row) copy_row(s, x, h, row, c, channels);
          }
          for (int i = 0; i < bottom - top; ++i) {
            const int row = top + i;
            rows[i] = row < 0 || row >= s.height ? zeros : h + row % s.ring_rows * ring_row;
          }
          for (int v = 0; v < channels; v += kLanes) {
            const Filter f = {packed + s.depthwise_weight + int64_t(c + v) * 9,
                              packed + s.depthwise_bias + c + v,
                              d + (c - c0) + v,
                              int64_t(s.out_width) * s.d_stride,
                              s.d_stride,
                              s.dilation};
            depthwise<Activated>(f, s.stride, rows, o1 - o0, s.out_width);
            for (int i = 0; i < bottom - top; ++i) rows[i] += kLanes;
          }
        }

        segment[0] = d;
        const bool last = !partial_ && group + 1 == s.groups;
        const int64_t pixel = int64_t(o0) * s.out_width;
        const auto project = [&](auto* to) __attribute__((always_inline)) {
          using Y = std::remove_pointer_t<decltype(to)>;
          for (int n = 0; n < s.out_channels; n += kPanel) {
            const int channels = min(kPanel, s.out_channels - n);
            const int width = ceil_div(channels, kLanes) * kLanes;
            const X* residual = last && s.residual ? x + pixel * s.in_channels + n : nullptr;
            const Pixels pixels = {segment, 1, c1 - c0, 0, s.d_stride};
            const T* w = packed + s.project_weight + int64_t(n) * slots(s.hidden_channels);
            const T* bias = group == 0 ? packed + s.project_bias + n : zeros;
            const int64_t at = pixel * s.out_channels + n;
            OutputsTo<Y> out = {
                to + at,         nullptr, s.out_channels, residual, !partial_ && group > 0 ? sums + at : nullptr,
                last && s.relu6, 0};
            if (s.whole && n + kPanel < s.out_channels) {
              out.ahead = w + int64_t(kPanel) * slots(s.hidden_channels) + int64_t(c0 / kSlot) * kPanel;
              out.ahead_size = int64_t(kPanel) * slots(c1 - c0);
            } else if (s.whole && c1 < s.hidden_channels) {
              out.ahead = packed + s.expand_weight + int64_t(c1) * slots(s.in_channels);
              out.ahead_size = int64_t(kPanel) * slots(s.in_channels);
            } else if (o1 == row1) {
              out.ahead = packed + s.project_bias + s.out_channels;  // the next layer's weights follow
              out.ahead_size = kNextLayer;
            }
            const int count = (o1 - o0) * s.out_width;
            if constexpr (Isa::kPairs) {
              if (paired_panel(kTiles, channels, s.hidden_channels)) {
                panel<PairedOutputTo<Y>, Isa::kPairsM, 1>(pixels, w + int64_t(c0 / kSlot) * kLanes * 3 / 2, bias, out,
                                                          count, channels);
                continue;
              }
            }
            panel<OutputTo<Y>>(pixels, w + int64_t(c0 / kSlot) * width, bias, out, count, channels);
          }
        };
        if constexpr (kSlot == 1) {
          project(sums);
        } else {
          last ? project(static_cast<X*>(y_)) : project(sums);
        }
      }
    }
  }

  // `count` values as tiles read them: where they are, or widened at `to`.
  static const Operand* operands(const X* x, int64_t count, T* to) {
    if constexpr (kWide) {
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) Isa::store(to + i, Isa::load(x + i));
      for (; i < count; ++i) to[i] = widen(x[i]);
      return to;
    } else {
      return x;
    }
  }

  // `count` pixels of h from ring pixel `first` on, around the end of the ring where they reach it.
  static void expand(const Step& s, const Operand* const* segment, const T* w, const T* bias, T* h, int first,
                     int ring_pixels, int count, int channels, const T* ahead, int64_t ahead_size) {
    // The offsets table goes a tile beyond the ring's end, so only whole runs up to there need a cut.
    Pixels pixels = {segment, 1, s.in_channels, 0, s.in_channels};
    while (count > 0) {
      const int to_end = ceil_div(ring_pixels - first, kTileM) * kTileM;
      const int now = min(count, to_end);
      panel<Hidden>(pixels, w, bias, {h, s.pixel_offsets + first, 0, nullptr, nullptr, true, 0, ahead, ahead_size}, now,
                    channels);
      pixels.offset += int64_t(now) * pixels.pixel_stride;
      first = (first + now) % ring_pixels;
      count -= now;
    }
  }

  static void copy_row(const Step& s, const X* x, T* h, int row, int c, int channels) {
    const X* from = x + int64_t(row) * s.width * s.in_channels + c;
    const int32_t* offset = s.pixel_offsets + row % s.ring_rows * s.width;
    for (int column = 0; column < s.width; ++column, from += s.in_channels) {
      for (int v = 0; v < channels; v += kLanes) {
        const int left = channels - v;
        Isa::store(h + offset[column] + v, left < kLanes ? Isa::load_n(from + v, left) : Isa::load(from + v));
      }
    }
  }

  static void zero_sides(const Step& s, T* ring) {
    const int panels = s.whole ? 1 : s.panels;
    const V zero = Isa::broadcast(T(0));
    for (int64_t row = 0; row < int64_t(panels) * s.ring_rows; ++row) {
      T* h = ring + row * s.row_length * kPanel;
      for (int i = 0; i < s.row_length; ++i) {
        if (i == s.pad_left) i += s.width;
        if (i >= s.row_length) break;
        for (int v = 0; v < kPanel; v += kLanes) Isa::store(h + i * kPanel + v, zero);
      }
    }
  }

  static void combine(const Step& s, const void* /*packed*/, const void* partials_, const void* x_, void* y_,
                      int pixel0, int pixel1) {
    const T* partials = static_cast<const T*>(partials_);
    const X* x = static_cast<const X*>(x_);
    X* y = static_cast<X*>(y_);
    const int64_t size = int64_t(s.out_height) * s.out_width * s.out_channels;
    const int64_t end = int64_t(pixel1) * s.out_channels;
    for (int64_t i = int64_t(pixel0) * s.out_channels; i < end; i += kLanes) {
      const int left = end - i < kLanes ? int(end - i) : 0;
      V sum = left ? Isa::load_n(partials + i, left) : Isa::load(partials + i);
      for (int g = 1; g < s.groups; ++g) {
        const T* p = partials + g * size + i;
        sum = Isa::add(left ? Isa::load_n(p, left) : Isa::load(p), sum);
      }
      if (s.residual) sum = Isa::add(sum, left ? Isa::load_n(x + i, left) : Isa::load(x + i));
      if (s.relu6) sum = relu6(sum);
      left ? Isa::store_n(y + i, sum, left) : Isa::store(y + i, sum);
    }
  }

  // ------------------------------------------------------------------------------------------ head, classifier

  static void pointwise(const Step& s, const void* packed_, const void* x_, void* y_, void* scratch, int panel0,
                        int panel1) {
    const T* packed = static_cast<const T*>(packed_);
    const int pixels = s.height * s.width;
    const Operand* segment[1] = {operands(static_cast<const X*>(x_), int64_t(pixels) * s.in_channels,
                                          static_cast<T*>(scratch) + s.operands_offset)};
    for (int n = panel0 * kPanel; n < min(panel1 * kPanel, s.out_channels); n += kPanel) {
      const int channels = min(kPanel, s.out_channels - n);
      X* y = static_cast<X*>(y_) + n;
      const T* w = packed + s.project_weight + int64_t(n) * slots(s.in_channels);
      const T* bias = packed + s.project_bias + n;
      const Pixels a = {segment, 1, s.in_channels, 0, s.in_channels};
      if (!s.pooled) {
        panel<Output>(a, w, bias, {y, nullptr, s.out_channels, nullptr, nullptr, s.relu6, 0}, pixels, channels);
        continue;
      }
      T sum[kPanel] = {};
      panel<Pooled>(a, w, bias,
                    {sum, nullptr, 0, nullptr, nullptr, true, 0, w + int64_t(kPanel) * slots(s.in_channels),
                     int64_t(kPanel) * slots(s.in_channels)},
                    pixels, channels);
      for (int v = 0; v < channels; v += kLanes) store_mean(sum + v, pixels, y + v, min(kLanes, channels - v));
    }
  }

  // Of the sums of a vector of channels; overwrites them.
  static void store_mean(T* sum, int pixels, X* y, int channels) {
    for (int i = 0; i < kLanes; ++i) sum[i] /= T(pixels);
    Isa::store_n(y, Isa::load(sum), channels);
  }

  static void pool(const Step& s, const void* /*packed*/, const void* x_, void* y_) {
    const int pixels = s.height * s.width;
    for (int c = 0; c < s.in_channels; c += kLanes) {
      const int left = s.in_channels - c;
      V sum = Isa::broadcast(T(0));
      for (int p = 0; p < pixels; ++p) {
        const X* x = static_cast<const X*>(x_) + int64_t(p) * s.in_channels + c;
        sum = Isa::add(sum, left < kLanes ? Isa::load_n(x, left) : Isa::load(x));
      }
      T buffer[kLanes];
      Isa::store(buffer, sum);
      store_mean(buffer, pixels, static_cast<X*>(y_) + c, min(left, kLanes));
    }
  }

  // A single row has too few accumulators to hide the latency of its chains, and is bound by reading the weights:
  // several panels at once. The order of every sum stays that of the tile.
  static constexpr int kStreams = Isa::kStreams;
  static void row_panels(const X* x, int k, const T* w, const T* bias, X* y, int64_t panel_size) {
    V acc[kStreams][kTileN];
    MNV2_UNROLL for (int i = 0; i < kStreams; ++i) {
      MNV2_UNROLL for (int n = 0; n < kTileN; ++n) acc[i][n] = Isa::load(bias + (i * kTileN + n) * kLanes);
    }
    const auto step = [&](V a) __attribute__((always_inline)) {
      MNV2_UNROLL for (int i = 0; i < kStreams; ++i) {
        MNV2_UNROLL for (int n = 0; n < kTileN; ++n) {
          acc[i][n] = multiply_add(a, Isa::load(w + i * panel_size + n * kLanes), acc[i][n]);
        }
      }
      w += kPanel;
    };
    for (int j = 0; j < k / kSlot; ++j) step(Isa::broadcast_load(x + j * kSlot));
    if constexpr (kSlot > 1) {
      if (k % kSlot) step(Isa::broadcast_half(x + k - 1));
    }
    MNV2_UNROLL for (int i = 0; i < kStreams; ++i) {
      MNV2_UNROLL for (int n = 0; n < kTileN; ++n) Isa::store(y + (i * kTileN + n) * kLanes, acc[i][n]);
    }
  }

  static void linear(const Step& s, const void* packed_, const void* x_, void* y_, int64_t rows, int panel0,
                     int panel1) {
    const T* packed = static_cast<const T*>(packed_);
    const X* segment[1] = {static_cast<const X*>(x_)};
    const int k = s.in_channels;
    for (int p = panel0; p < panel1; ++p) {
      const int n = p * kPanel;
      X* y = static_cast<X*>(y_) + n;
      const T* w = packed + s.project_weight + int64_t(n) * slots(k);
      const T* bias = packed + s.project_bias + n;
      if (rows == 1 && p + kStreams <= panel1 && n + kStreams * kPanel <= s.out_channels) {
        row_panels(segment[0], k, w, bias, y, int64_t(slots(k)) * kPanel);
        p += kStreams - 1;
        continue;
      }
      panel<Output>({segment, 1, k, 0, k}, w, bias, {y, nullptr, s.out_channels, nullptr, nullptr, false, 0}, int(rows),
                    min(kPanel, s.out_channels - n));
    }
  }

  // ----------------------------------------------------------------------------------------------------- peak

  static double fma_loop(int64_t iterations) {
    constexpr int kChains = Isa::kTileM * Isa::kTileN;
    V acc[kChains], a = Isa::broadcast(T(0.999)), b = Isa::broadcast(T(0.001));
    MNV2_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = Isa::broadcast(T(i));
    for (int64_t j = 0; j < iterations; ++j) {
      asm volatile("" ::: "memory");
      MNV2_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = multiply_add(a, b, acc[i]);
    }
    V sum = acc[0];
    MNV2_UNROLL for (int i = 1; i < kChains; ++i) sum = Isa::add(sum, acc[i]);
    T buffer[kLanes];
    Isa::store(buffer, sum);
    asm volatile("" ::"r"(buffer) : "memory");  // used, so that the loop is not dropped
    return double(iterations) * kChains * kLanes * kSlot;
  }

  static constexpr Kernel kernel(const char* name, Dtype dtype, const char* const* features) {
    Kernel k{};
    k.name = name;
    k.dtype = dtype;
    k.requires_features = features;
    k.tiles = kTiles;
    k.block = block;
    k.combine = combine;
    k.conv = conv;
    k.pointwise = pointwise;
    k.pool = pool;
    k.linear = linear;
    k.fma_loop = fma_loop;
    return k;
  }
};
