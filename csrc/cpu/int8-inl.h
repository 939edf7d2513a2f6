// The forward pass of every layer in 8-bit integers, each algorithm written once over an `Isa`. An ISA's file includes
// this inside its own anonymous namespace. What is computed, to the bit, stands in mnv2_fused/quantization.py; as all
// sums are integers, no order of work changes a result. No threads, no allocation, no torch in here.
//
// As in forward-inl.h a block never holds its expanded tensor, but the ring of h is made for the dot product of four
// bytes: a quad of rows is stored interleaved, so that the 32 bits of a channel and a column are four neighbouring
// rows. One dot product with the weights (w0, w1, w2, 0) then does a column of the filter for one output row, with (0,
// w0, w1, w2) for the next; and the quad two rows further down is the upper half of one and the lower half of the next.
// Four rows at once come for free out of the expansion: its tile is of four rows, and the packing of their sums to
// bytes leaves them in one vector.
//
// An ISA without a dot product of four bytes multiplies in 16 bits, and takes a slot in two steps of two values. Its
// tiles read activations that are that wide already, Isa::X, so that no tile widens what another one has widened
// before: d and the rows of the image are written so, and x is copied for the rows that a stripe needs.
#define MNV2_INLINE inline __attribute__((always_inline))
#define MNV2_UNROLL _Pragma("GCC unroll 32")

// For vpshufb on 16 bytes that are four of a first row, four of a second, ...: of each column four bytes, of which
// `rows` from byte `begin` on are the first rows' and the others 0.
struct alignas(16) InterleaveBytes {
  int8_t of[16];
  InterleaveBytes(int begin, int rows) {
    for (int column = 0; column < 4; ++column) {
      for (int i = 0; i < 4; ++i) {
        const int row = i - begin;
        of[column * 4 + i] = int8_t(row >= 0 && row < rows ? row * 4 + column : -1);
      }
    }
  }
};

template <class Isa>
struct Int8 {
  using V = typename Isa::V;                  // 32-bit sums
  using F = typename Isa::F;                  // float32
  using A = typename Isa::A;                  // activations, four bytes for each lane
  using W = typename Isa::W;                  // taps of a depthwise filter, likewise
  using B = decltype(Isa::weights(nullptr));  // weights of a step of a tile
  using X = typename Isa::X;                  // an activation in scratch
  static constexpr int kLanes = Isa::kLanes;
  static constexpr bool kWide = sizeof(X) > 1;
  static constexpr int kSteps = kWide ? 2 : 1;        // of a tile for a slot
  static constexpr int kStep = 4 / kSteps;            // activations of one
  static constexpr int kStepLanes = kLanes / kSteps;  // slots of weights of one
  static constexpr int kTileM = Isa::kTileM;          // pixels of a matrix tile
  static constexpr int kTileN = 2;                    // vectors of output channels of a matrix tile
  static constexpr int kPanel = kTileN * kLanes;
  static constexpr int kQuad = 4;  // rows
  static constexpr Tiles kTiles = {kLanes, kPanel, kTileM, 4, false, kWide};

  static int ceil_div(int a, int b) { return (a + b - 1) / b; }
  static int round_up(int a, int b) { return ceil_div(a, b) * b; }
  static int min(int a, int b) { return a < b ? a : b; }
  static int max(int a, int b) { return a > b ? a : b; }

  // Weights, biases and multipliers of a convolution: the multipliers follow the biases.
  struct Convolution {
    const uint32_t* w;
    const int32_t* bias;
    const float* multiplier;
  };
  static Convolution convolution(const uint32_t* packed, int64_t weight, int64_t bias, int64_t channels) {
    const int32_t* b = reinterpret_cast<const int32_t*>(packed + bias);
    return {packed + weight, b, reinterpret_cast<const float*>(b + (channels + kLanes - 1) / kLanes * kLanes)};
  }
  static Convolution from(Convolution c, int64_t first, int64_t slots) {
    return {c.w + first * slots, c.bias + first, c.multiplier + first};
  }
  static const float* constants(const uint32_t* packed, int64_t at) {
    return reinterpret_cast<const float*>(packed + at);
  }
  static uint8_t as_byte(float v) { return uint8_t(int(v)); }

  template <int Value>
  struct Count {
    static constexpr int value = Value;
  };

  // ------------------------------------------------------------------------------------------ tile of a quad of h

  // The inputs of a quad: `segments` runs of k slots (one for a 1x1, three for a dense 3x3), run s of column c of the
  // quad's i-th row beginning at row[s][i] + c * column_stride.
  struct QuadRows {
    const X* row[3][kQuad];
    int segments, k;
    int64_t column_stride;
    typename Isa::Interleave interleave;  // which of the quad's rows they are
  };

  template <int R, int C, int N>
  static MNV2_INLINE void quad_tile(const QuadRows& rows, int64_t offset, const Convolution& conv, uint8_t* h) {
    V acc[R][C][N];
    MNV2_UNROLL for (int n = 0; n < N; ++n) {
      const V b = Isa::load(conv.bias + n * kLanes);
      MNV2_UNROLL for (int r = 0; r < R; ++r) { MNV2_UNROLL for (int c = 0; c < C; ++c) acc[r][c][n] = b; }
    }
    const int64_t stride = rows.column_stride;
    const uint32_t* w = conv.w;
    for (int s = 0; s < rows.segments; ++s) {
      const X* p[R];
      MNV2_UNROLL for (int r = 0; r < R; ++r) p[r] = rows.row[s][r] + offset;
      int64_t at = 0;  // beside the pointers where kWide: GCC would add to them in memory
      const auto steps = [&](auto count) __attribute__((always_inline)) {
        if constexpr (kWide) {
          asm volatile("" : "+r"(at));
        } else {
          MNV2_UNROLL for (int r = 0; r < R; ++r) asm volatile("" : "+r"(p[r]));
        }
        MNV2_UNROLL for (int j = 0; j < count.value; ++j) {
          B b[N];
          MNV2_UNROLL for (int n = 0; n < N; ++n) b[n] = Isa::weights(w + n * kStepLanes);
          MNV2_UNROLL for (int r = 0; r < R; ++r) {
            MNV2_UNROLL for (int c = 0; c < C; ++c) {
              const auto a = Isa::broadcast(p[r] + at + c * stride + kStep * j);
              MNV2_UNROLL for (int n = 0; n < N; ++n) acc[r][c][n] = Isa::dot(acc[r][c][n], a, b[n]);
            }
          }
          w += N * kStepLanes;
        }
        if constexpr (kWide) {
          at += kStep * count.value;
        } else {
          MNV2_UNROLL for (int r = 0; r < R; ++r) p[r] += kStep * count.value;
        }
      };
      int k = rows.k;
      for (; k >= 2; k -= 2) steps(Count<2 * kSteps>());
      if (k) steps(Count<kSteps>());
    }
    MNV2_UNROLL for (int n = 0; n < N; ++n) {
      const F m = Isa::load_floats(conv.multiplier + n * kLanes);
      MNV2_UNROLL for (int c = 0; c < C; ++c) {
        V row[kQuad];
        MNV2_UNROLL for (int r = 0; r < kQuad; ++r) {
          row[r] = r < R ? Isa::round(Isa::scaled(acc[min(r, R - 1)][c][n], m)) : Isa::zero();
        }
        Isa::store_quad(h + (c * kPanel + n * kLanes) * 4, row, rows.interleave);
      }
    }
  }

  // All columns of a quad, from column `column` of the ring's row on.
  template <int R, int N>
  static void quad_columns(const QuadRows& rows, const Convolution& conv, uint8_t* h, int width) {
    int64_t offset = 0;
    const auto tiles = [&](auto columns, int least) __attribute__((always_inline)) {
      constexpr int C = columns.value;
      // A rest of C + 1 columns is better halved than cut into C and 1.
      for (; width >= C && (width > least || width == C); width -= C) {
        quad_tile<R, C, N>(rows, offset, conv, h);
        offset += C * rows.column_stride;
        h += C * kPanel * 4;
      }
    };
    if constexpr (Isa::kQuadColumns >= 3) tiles(Count<3>(), 4);
    if constexpr (Isa::kQuadColumns >= 2) tiles(Count<2>(), 1);
    tiles(Count<1>(), 0);
  }

  static void quad(const QuadRows& rows, int row_count, const Convolution& conv, uint8_t* h, int width, int channels) {
    const auto run = [&](auto n) {
      constexpr int N = n.value;
      switch (row_count) {
        case 1:
          return quad_columns<1, N>(rows, conv, h, width);
        case 2:
          return quad_columns<2, N>(rows, conv, h, width);
        case 3:
          return quad_columns<3, N>(rows, conv, h, width);
        default:
          return quad_columns<4, N>(rows, conv, h, width);
      }
    };
    channels > kLanes ? run(Count<2>()) : run(Count<1>());
  }

  // ------------------------------------------------------------------------------------------------- matrix tile

  // Pixels as rows: K is `segments` runs of k slots, run s of pixel m beginning at segment[s] + m * pixel_stride. T is
  // X, or uint8_t of a narrow tensor that is read only here.
  template <class T>
  struct Pixels {
    const T* segment[3];
    int segments, k;
    int64_t pixel_stride;
  };

  // Where a tile of outputs goes, and for bytes how they get there: see `narrow`.
  struct Outputs {
    void* y;
    int64_t pixel_stride;  // in elements of y
    const uint8_t* residual;
    int64_t residual_stride;
    const float* constants;
    int tail;  // channels of the last vector
  };

  template <int M, int N, class T>
  static MNV2_INLINE void multiply(V (&acc)[M][N], const Pixels<T>& pixels, const Convolution& conv) {
    constexpr int kPointers = (M + 2) / 3;  // [p], [p + stride], [p + 2 * stride]: 14 pixels need 5 registers
    MNV2_UNROLL for (int n = 0; n < N; ++n) {
      const V b = Isa::load(conv.bias + n * kLanes);
      MNV2_UNROLL for (int m = 0; m < M; ++m) acc[m][n] = b;
    }
    const int64_t stride = pixels.pixel_stride;
    const uint32_t* w = conv.w;
    for (int s = 0; s < pixels.segments; ++s) {
      const T* p[kPointers];
      MNV2_UNROLL for (int i = 0; i < kPointers; ++i) p[i] = pixels.segment[s] + 3 * i * stride;
      const auto steps = [&](auto count) __attribute__((always_inline)) {
        MNV2_UNROLL for (int i = 0; i < kPointers; ++i) asm volatile("" : "+r"(p[i]));
        MNV2_UNROLL for (int j = 0; j < count.value; ++j) {
          B b[N];
          MNV2_UNROLL for (int n = 0; n < N; ++n) b[n] = Isa::weights(w + n * kStepLanes);
          MNV2_UNROLL for (int m = 0; m < M; ++m) {
            const auto a = Isa::broadcast(p[m / 3] + (m % 3) * stride + kStep * j);
            MNV2_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = Isa::dot(acc[m][n], a, b[n]);
          }
          w += N * kStepLanes;
        }
        MNV2_UNROLL for (int i = 0; i < kPointers; ++i) {
          p[i] += kStep * count.value;
          if constexpr (kWide) asm volatile("" : "+r"(p[i]));
        }
      };
      int k = pixels.k;
      for (; k >= 2; k -= 2) steps(Count<2 * kSteps>());
      if (k) steps(Count<kSteps>());
    }
  }

  // A sum as a byte of the output: its product with the multiplier, plus the residual's with its own, plus the offset,
  // rounded once.
  static MNV2_INLINE V narrow(V sum, F multiplier, const uint8_t* residual, const float* constants, int n) {
    F t = Isa::scaled(sum, multiplier);
    if (residual) t = Isa::add(t, Isa::mul(Isa::floats_of(residual, n), Isa::broadcast_float(constants[1])));
    return Isa::round(Isa::add(t, Isa::broadcast_float(constants[2])));
  }

  // Bytes of a narrow tensor.
  struct Narrow {
    template <int M, int N, class T>
    static void tile(const Pixels<T>& pixels, const Convolution& conv, const Outputs& out) {
      V acc[M][N];
      multiply<M, N>(acc, pixels, conv);
      uint8_t* y = static_cast<uint8_t*>(out.y);
      MNV2_UNROLL for (int n = 0; n < N; ++n) {
        const F m = Isa::load_floats(conv.multiplier + n * kLanes);
        const int count = n + 1 < N ? kLanes : out.tail;
        MNV2_UNROLL for (int p = 0; p < M; ++p) {
          const uint8_t* residual = out.residual ? out.residual + p * out.residual_stride + n * kLanes : nullptr;
          Isa::store_bytes(y + p * out.pixel_stride + n * kLanes, narrow(acc[p][n], m, residual, out.constants, count),
                           count);
        }
      }
    }
  };

  // The sums themselves.
  struct Partial {
    template <int M, int N, class T>
    static void tile(const Pixels<T>& pixels, const Convolution& conv, const Outputs& out) {
      V acc[M][N];
      multiply<M, N>(acc, pixels, conv);
      int32_t* y = static_cast<int32_t*>(out.y);
      MNV2_UNROLL for (int p = 0; p < M; ++p) {
        MNV2_UNROLL for (int n = 0; n < N; ++n) {
          Isa::store_n(y + p * out.pixel_stride + n * kLanes, acc[p][n], n + 1 < N ? kLanes : out.tail);
        }
      }
    }
  };

  // What would be bytes, added over the pixels to the sums at y.
  struct Pooled {
    template <int M, int N, class T>
    static void tile(const Pixels<T>& pixels, const Convolution& conv, const Outputs& out) {
      V acc[M][N];
      multiply<M, N>(acc, pixels, conv);
      int32_t* y = static_cast<int32_t*>(out.y);
      MNV2_UNROLL for (int n = 0; n < N; ++n) {
        const F multiplier = Isa::load_floats(conv.multiplier + n * kLanes);
        V sum = Isa::load(y + n * kLanes);
        MNV2_UNROLL for (int m = 0; m < M; ++m) {
          sum = Isa::add(sum, Isa::clamp(narrow(acc[m][n], multiplier, nullptr, out.constants, kLanes)));
        }
        Isa::store(y + n * kLanes, sum);
      }
    }
  };

  struct Logits {
    template <int M, int N, class T>
    static void tile(const Pixels<T>& pixels, const Convolution& conv, const Outputs& out) {
      V acc[M][N];
      multiply<M, N>(acc, pixels, conv);
      float* y = static_cast<float*>(out.y);
      MNV2_UNROLL for (int p = 0; p < M; ++p) {
        MNV2_UNROLL for (int n = 0; n < N; ++n) {
          const F m = Isa::load_floats(conv.multiplier + n * kLanes);
          Isa::store_floats(y + p * out.pixel_stride + n * kLanes, Isa::scaled(acc[p][n], m),
                            n + 1 < N ? kLanes : out.tail);
        }
      }
    }
  };

  // Kind::tile<m, n, T> for run-time m <= M and n <= N.
  template <class Kind, int M, int N, class T>
  static decltype(&Kind::template tile<M, N, T>) tile_function(int m, int n) {
    if constexpr (N > 1) {
      if (n < N) return tile_function<Kind, M, N - 1, T>(m, n);
    }
    if constexpr (M > 1) {
      if (m < M) return tile_function<Kind, M - 1, N, T>(m, n);
    }
    return &Kind::template tile<M, N, T>;
  }

  // One panel of output channels for all pixels. `element` is the size of y's.
  template <class Kind, class T>
  static void panel(Pixels<T> pixels, const Convolution& conv, Outputs out, int element, int pixel_count,
                    int channels) {
    constexpr int kM = sizeof(T) > 1 ? kTileM : Isa::kByteTileM;
    const int n = ceil_div(channels, kLanes);
    out.tail = channels - (n - 1) * kLanes;
    for (int left = pixel_count; left > 0;) {
      // Two tiles of like size in place of a whole one and a sliver, whose few chains would wait for each other.
      const int m = left >= 2 * kM || left <= kM ? min(left, kM) : ceil_div(left, 2);
      tile_function<Kind, kM, kTileN, T>(m, n)(pixels, conv, out);
      for (int s = 0; s < pixels.segments; ++s) pixels.segment[s] += m * pixels.pixel_stride;
      out.y = static_cast<char*>(out.y) + m * out.pixel_stride * element;
      if (out.residual) out.residual += m * out.residual_stride;
      left -= m;
    }
  }

  // --------------------------------------------------------------------------------------------- depthwise tile

  struct Filter {
    const uint32_t* w;  // [3][kLanes]: a column's three taps and a zero
    const int32_t* bias;
    const float* multiplier;
    X* d;
    int64_t d_row, d_pixel;
    int dilation;
  };

  // R rows x C columns of outputs of one vector of channels. Rows two by two: with stride 1 both read the same quad, or
  // where H the one between it and the next; with stride 2 the first reads the quad, the second the one between. S is
  // the stride of the columns, of the rows too but in a stream of a dilated filter (D).
  template <int Rows, int S, bool H, bool D, int R, int C>
  static MNV2_INLINE void filter(const W (&w)[R][3], V bias, F multiplier, const Filter& f, const uint8_t* q0,
                                 const uint8_t* q1, X* d) {
    V acc[R][C];
    MNV2_UNROLL for (int r = 0; r < R; ++r) { MNV2_UNROLL for (int c = 0; c < C; ++c) acc[r][c] = bias; }
    const auto column = [&](int64_t at, auto taps) __attribute__((always_inline)) {
      A v[2];
      if constexpr (Rows == 2 || !H) v[0] = Isa::quads(q0 + at);
      if constexpr (Rows == 2 ? R == 2 : H) v[1] = Isa::quads_between(q0 + at, q1 + at);
      MNV2_UNROLL for (int r = 0; r < R; ++r) taps(r, v[Rows == 1 ? H : r]);
    };
    if constexpr (!D) {
      MNV2_UNROLL for (int j = 0; j < (C - 1) * S + 3; ++j) {
        column(j * kPanel * 4, [&](int r, const A& v) __attribute__((always_inline)) {
          MNV2_UNROLL for (int c = 0; c < C; ++c) {
            const int kx = j - c * S;
            if (kx >= 0 && kx <= 2) acc[r][c] = Isa::dot(acc[r][c], v, w[r][kx]);
          }
        });
      }
    } else {
      MNV2_UNROLL for (int kx = 0; kx < 3; ++kx) {
        MNV2_UNROLL for (int c = 0; c < C; ++c) {
          column((c * S + int64_t(kx) * f.dilation) * kPanel * 4,
                 [&](int r, const A& v)
                     __attribute__((always_inline)) { acc[r][c] = Isa::dot(acc[r][c], v, w[r][kx]); });
        }
      }
    }
    constexpr int kOutputs = R * C;
    MNV2_UNROLL for (int i = 0; i < kOutputs; i += 4) {
      V v[4];
      X* to[4];
      MNV2_UNROLL for (int j = 0; j < 4; ++j) {
        const int e = min(i + j, kOutputs - 1);
        v[j] = i + j < kOutputs ? Isa::round(Isa::scaled(acc[e / C][e % C], multiplier)) : Isa::zero();
        to[j] = d + e / C * f.d_row + e % C * f.d_pixel;
      }
      Isa::store_pixels(to, v, min(kOutputs - i, 4));
    }
  }

  template <int Rows, int S, bool H, bool D, int R, int C>
  static MNV2_INLINE void filter_columns(const W (&w)[R][3], V bias, F multiplier, const Filter& f, const uint8_t* q0,
                                         const uint8_t* q1, int column, int end) {
    for (; column + C <= end; column += C) {
      const int64_t at = int64_t(column) * S * kPanel * 4;
      filter<Rows, S, H, D, R, C>(w, bias, multiplier, f, q0 + at, q1 + at, f.d + column * f.d_pixel);
    }
    if constexpr (C > 1) filter_columns<Rows, S, H, D, R, C / 2>(w, bias, multiplier, f, q0, q1, column, end);
  }

  template <int Rows, int S, bool H, bool D, int R>
  static __attribute__((noinline)) void filter_rows(const Filter& f, const uint8_t* q0, const uint8_t* q1,
                                                    int columns) {
    W w[R][3];
    MNV2_UNROLL for (int kx = 0; kx < 3; ++kx) {
      w[0][kx] = Isa::taps(f.w + kx * kLanes);
      if constexpr (R == 2) w[1][kx] = Rows == 1 ? Isa::taps_below(f.w + kx * kLanes) : w[0][kx];
      if constexpr (H) w[0][kx] = Isa::between(w[0][kx]);
      if constexpr (R == 2 && (H || Rows == 2)) w[1][kx] = Isa::between(w[1][kx]);
    }
    const V bias = Isa::load(f.bias);
    const F multiplier = Isa::load_floats(f.multiplier);
    filter_columns<Rows, S, H, D, R, Isa::kDepthwiseColumns>(w, bias, multiplier, f, q0, q1, 0, columns);
  }

  template <int Rows, int S, bool D>
  static void depthwise(Filter f, const uint8_t* const* quads, int rows, int columns) {
    for (int i = 0; i < rows; i += 2) {
      const uint8_t *q0 = quads[i * Rows / kQuad], *q1 = quads[i * Rows / kQuad + 1];
      const bool between = Rows == 1 && i % kQuad == 2;
      if (rows - i == 1) {
        between ? filter_rows<Rows, S, Rows == 1, D, 1>(f, q0, q1, columns)
                : filter_rows<Rows, S, false, D, 1>(f, q0, q1, columns);
      } else {
        between ? filter_rows<Rows, S, Rows == 1, D, 2>(f, q0, q1, columns)
                : filter_rows<Rows, S, false, D, 2>(f, q0, q1, columns);
      }
      f.d += 2 * f.d_row;
    }
  }

  static decltype(&depthwise<1, 1, false>) depthwise_function(int row_stride, int column_stride, int dilation) {
    if (dilation == 1) return column_stride == 1 ? depthwise<1, 1, false> : depthwise<2, 2, false>;
    if (column_stride == 1) return depthwise<1, 1, true>;
    return row_stride == 1 ? depthwise<1, 2, true> : depthwise<2, 2, true>;
  }

  // ---------------------------------------------------------------------------------------------- image's rows

  // Rows of the quantised image, a pixel's channels rounded up to slots, with the padding at their sides, kept in a
  // ring.
  class ImageRows {
   public:
    ImageRows(const Step& s, const Image& image, const float* constants, X* memory)
        : s_(s), image_(image), inverse_scale_(constants[0]), zero_(constants[1]), memory_(memory) {
      pixel_ = round_up(s.image_channels, 4);
      row_ = int64_t(s.conv_pad_left + s.image_width + s.conv_pad_right) * pixel_;
      for (int64_t i = 0; i < row_; ++i) memory_[i] = as_byte(zero_);
    }
    int pixel() const { return pixel_; }
    // To be called with ever larger rows, or with 0 again.
    const X* row(int row) {
      if (row < 0 || row >= s_.image_height) return memory_;
      X* to = memory_ + (1 + row % s_.image_ring) * row_;
      if (row >= from_ && row < until_) return to;
      if (row != until_) from_ = row;
      until_ = row + 1;
      from_ = max(from_, until_ - s_.image_ring);
      quantize(row, to);
      return to;
    }

   private:
    void quantize(int row, X* to) {
      const float* from = static_cast<const float*>(image_.data) + row * image_.stride_row;
      for (int i = 0; i < s_.conv_pad_left * pixel_; ++i) to[i] = memory_[0];
      to += s_.conv_pad_left * pixel_;
      const int64_t step = image_.stride_column;
      int column = 0;
      if (s_.image_channels <= 4) {
        const int last = s_.image_channels - 1;
        float apart[4][kLanes];
        for (; column + kLanes <= s_.image_width; column += kLanes) {
          V v[4];
          MNV2_UNROLL for (int c = 0; c < 4; ++c) {
            const float* plane = from + min(c, last) * image_.stride_channel + column * step;
            if (step != 1) {
              for (int i = 0; i < kLanes; ++i) apart[c][i] = plane[i * step];
              plane = apart[c];
            }
            v[c] = Isa::quantized(plane, inverse_scale_, zero_);
          }
          Isa::store_slots(to + column * 4, v);
        }
      }
      for (; column < s_.image_width; ++column) {
        for (int c = 0; c < pixel_; ++c) {
          const bool exists = c < s_.image_channels;
          to[column * pixel_ + c] = exists ? byte_of(from[column * step + c * image_.stride_channel]) : memory_[0];
        }
      }
      to += int64_t(s_.image_width) * pixel_;
      for (int i = 0; i < s_.conv_pad_right * pixel_; ++i) to[i] = memory_[0];
    }
    // NaN becomes 0.
    uint8_t byte_of(float v) const {
      float t = v * inverse_scale_;
      t = t + zero_;
      t = t > 0 ? t : 0;
      t = t < 255 ? t : 255;
      return uint8_t(__builtin_lrintf(t));
    }

    const Step& s_;
    const Image& image_;
    float inverse_scale_, zero_;
    X* memory_;  // a row of padding, then the ring
    int pixel_;
    int64_t row_;
    int from_ = 0, until_ = 0;  // the rows in the ring
  };

  static void conv(const Step& s, const void* packed_, const Image& image, void* y_, void* scratch_, const void*,
                   int row0, int row1) {
    const uint32_t* packed = static_cast<const uint32_t*>(packed_);
    const float* k = constants(packed, s.constants);
    uint8_t* y = static_cast<uint8_t*>(y_);
    ImageRows image_rows(s, image, k, reinterpret_cast<X*>(static_cast<uint32_t*>(scratch_) + s.image_offset));
    const int slots = 3 * image_rows.pixel() / 4, y_stride = round_up(s.out_channels, 4);
    const Convolution all = convolution(packed, s.expand_weight, s.expand_bias, s.out_channels);
    for (int row = row0; row < row1; ++row) {
      Pixels<X> pixels = {{}, 3, slots, int64_t(s.conv_stride) * image_rows.pixel()};
      for (int ky = 0; ky < 3; ++ky) pixels.segment[ky] = image_rows.row(row * s.conv_stride - s.conv_pad_top + ky);
      for (int n = 0; n < s.out_channels; n += kPanel) {
        panel<Narrow>(pixels, from(all, n, 3 * slots),
                      {y + int64_t(row) * s.out_width * y_stride + n, y_stride, nullptr, 0, k, 0}, 1, s.out_width,
                      min(kPanel, s.out_channels - n));
      }
    }
  }

  // ------------------------------------------------------------------------------------------------------ block

  // Output rows whose taps are a subset of the same rows of h, `row_step` apart: all of them, or where the filter is
  // dilated every so many. In terms of these rows the filter is not dilated, and has the stride `stride`.
  struct Stream {
    int first, step, count;                    // output rows
    int top, row_step, stride;                 // row j is h's row top + j * row_step
    int height;                                // of h
    int first_valid(int j, int* rows) const {  // of the quad that begins at row j
      int begin = 0, end = kQuad;
      while (begin < end && top + int64_t(j + begin) * row_step < 0) ++begin;
      while (end > begin && top + int64_t(j + end - 1) * row_step >= height) --end;
      *rows = end - begin;
      return begin;
    }
  };

  static void block(const Step& s, const void* packed_, const void* x_, const Image& image, void* y_, void* scratch_,
                    const void* zeros_, int row0, int row1, int group0, int group1, void* partial_) {
    const uint32_t* packed = static_cast<const uint32_t*>(packed_);
    const uint8_t* x = static_cast<const uint8_t*>(x_);
    const float* k = constants(packed, s.constants);
    const uint8_t* zeros = static_cast<const uint8_t*>(zeros_);
    uint32_t* scratch = static_cast<uint32_t*>(scratch_);
    uint8_t* ring = reinterpret_cast<uint8_t*>(scratch);
    X* d = reinterpret_cast<X*>(scratch + s.d_offset);
    const uint8_t** quads = reinterpret_cast<const uint8_t**>(scratch + s.rows_offset);
    const int x_stride = round_up(s.in_channels, 4), y_stride = round_up(s.out_channels, 4);
    const int64_t ring_quad = int64_t(s.row_length) * kPanel * 4, ring_panel = s.ring_rows * ring_quad;
    const int c0 = group_panel(s, group0) * kPanel, c1 = min(group_panel(s, group1) * kPanel, s.hidden_channels);
    const int project_slots = ceil_div(s.hidden_channels, 4);
    const bool stem = s.source == Step::kStem;
    const int image_slots = 3 * ceil_div(s.image_channels, 4);
    const int expand_slots = stem ? 3 * image_slots : x_stride / 4;
    const Convolution expand = convolution(packed, s.expand_weight, s.expand_bias, s.hidden_channels);
    const Convolution depth = convolution(packed, s.depthwise_weight, s.depthwise_bias, s.hidden_channels);
    const Convolution project = convolution(packed, s.project_weight, s.project_bias, s.out_channels);
    ImageRows image_rows(s, image, stem ? constants(packed, s.image_constants) : k,
                         reinterpret_cast<X*>(scratch + s.image_offset));

    // Outside the image h is 0; without an expansion h is x, whose zero is a byte of its own.
    fill_sides(s, ring, s.whole ? 1 : ceil_div(c1 - c0, kPanel), s.source == Step::kCopy ? as_byte(k[0]) : 0);
    const int common = s.stride == 2 && s.dilation % 2 == 0 ? 2 : 1, streams = s.dilation / common;
    for (int o = row0; o < min(row0 + streams, row1); ++o) {
      const Stream stream = {
          o, streams, ceil_div(row1 - o, streams), o * s.stride - s.pad_top, s.dilation, s.stride / common, s.height};
      const auto filter = depthwise_function(stream.stride, s.stride, s.dilation);
      int filled = 0;  // quads before this one are in the ring, or no longer needed
      for (int i0 = 0; i0 < stream.count; i0 += s.stripe) {
        const int i1 = min(i0 + s.stripe, stream.count);
        const int q0 = i0 * stream.stride / kQuad, q1 = ((i1 - 1) * stream.stride + 2) / kQuad + 1;
        if constexpr (kWide) {
          const int64_t x_row = int64_t(s.width) * x_stride;
          X* wide = reinterpret_cast<X*>(scratch + s.operands_offset);
          for (int q = max(q0, filled); s.source == Step::kExpand && q < q1; ++q) {
            int rows;
            const int begin = stream.first_valid(q * kQuad, &rows);
            for (int r = 0; r < rows; ++r) {
              const int row = stream.top + (q * kQuad + begin + r) * stream.row_step;
              Isa::widen(x + row * x_row, x_row, wide + ((q - q0) * kQuad + r) * x_row);
            }
          }
        }
        for (int c = c0; c < c1; c += kPanel) {
          uint8_t* h = ring + (s.whole ? 0 : (c - c0) / kPanel * ring_panel);
          const int channels = min(kPanel, c1 - c);
          for (int q = q0; q < q1; ++q) {
            uint8_t* to = h + q % s.ring_rows * ring_quad + s.pad_left * kPanel * 4;
            int rows;
            const int begin = stream.first_valid(q * kQuad, &rows);
            const int row = stream.top + (q * kQuad + begin) * stream.row_step;
            if (s.source == Step::kCopy) {
              quads[q - q0] = to - s.pad_left * kPanel * 4;
              if (q >= filled) copy_quad(s, x, x_stride, stream, q, c, channels, as_byte(k[0]), to);
              continue;
            }
            quads[q - q0] = rows ? to - s.pad_left * kPanel * 4 : zeros;
            if (rows == 0 || q < filled) continue;
            QuadRows from_rows;
            from_rows.interleave = Isa::interleave(begin, rows);
            if (stem) {
              from_rows.segments = 3;
              from_rows.k = image_slots;
              from_rows.column_stride = int64_t(s.conv_stride) * image_rows.pixel();
              for (int r = 0; r < rows; ++r) {
                for (int ky = 0; ky < 3; ++ky) {
                  const int image_row = (row + r * stream.row_step) * s.conv_stride - s.conv_pad_top + ky;
                  from_rows.row[ky][r] = image_rows.row(image_row);
                }
              }
            } else {
              from_rows.segments = 1;
              from_rows.k = expand_slots;
              from_rows.column_stride = x_stride;
              for (int r = 0; r < rows; ++r) {
                if constexpr (kWide) {
                  const X* wide = reinterpret_cast<const X*>(scratch + s.operands_offset);
                  from_rows.row[0][r] = wide + int64_t((q - q0) * kQuad + r) * s.width * x_stride;
                } else {
                  from_rows.row[0][r] = x + int64_t(row + r * stream.row_step) * s.width * x_stride;
                }
              }
            }
            quad(from_rows, rows, from(expand, c, expand_slots), to, s.width, channels);
          }
          // The last row of a stripe may stand in a quad's upper half, and be read with a next one that has no tap.
          quads[q1 - q0] = zeros;
          for (int v = 0; v < channels; v += kLanes) {
            const Convolution taps = from(depth, c + v, 3);
            const Filter f = {
                taps.w,     taps.bias, taps.multiplier, d + (c - c0) + v, int64_t(s.out_width) * s.d_stride,
                s.d_stride, s.dilation};
            filter(f, quads, i1 - i0, s.out_width);
            for (int q = 0; q <= q1 - q0; ++q) quads[q] += kLanes * 4;
          }
        }
        filled = q1;

        // Rows that follow each other in the output are one run of pixels.
        const int run = stream.step == 1 ? i1 - i0 : 1;
        for (int i = i0; i < i1; i += run) {
          const int64_t pixel = int64_t(stream.first + i * stream.step) * s.out_width;
          for (int n = 0; n < s.out_channels; n += kPanel) {
            const int channels = min(kPanel, s.out_channels - n), width = round_up(channels, kLanes);
            Convolution w = from(project, n, project_slots);
            w.w += int64_t(c0 / 4) * width;
            const Pixels<X> pixels = {
                {d + int64_t(i - i0) * s.out_width * s.d_stride}, 1, ceil_div(c1 - c0, 4), s.d_stride};
            if (partial_) {
              if (group0 > 0) w.bias = reinterpret_cast<const int32_t*>(zeros);
              int32_t* y = static_cast<int32_t*>(partial_) + pixel * s.out_channels + n;
              panel<Partial>(pixels, w, {y, s.out_channels, nullptr, 0, k, 0}, 4, run * s.out_width, channels);
            } else {
              const uint8_t* residual = s.residual ? x + pixel * x_stride + n : nullptr;
              uint8_t* y = static_cast<uint8_t*>(y_) + pixel * y_stride + n;
              panel<Narrow>(pixels, w, {y, y_stride, residual, x_stride, k, 0}, 1, run * s.out_width, channels);
            }
          }
        }
      }
    }
  }

  static void fill_sides(const Step& s, uint8_t* ring, int panels, uint8_t byte) {
    for (int64_t quad = 0; quad < int64_t(panels) * s.ring_rows; ++quad) {
      uint8_t* h = ring + quad * s.row_length * kPanel * 4;
      for (int i = 0; i < s.row_length; ++i) {
        if (i == s.pad_left) i += s.width;
        if (i >= s.row_length) break;
        __builtin_memset(h + int64_t(i) * kPanel * 4, byte, kPanel * 4);
      }
    }
  }

  static void copy_quad(const Step& s, const uint8_t* x, int x_stride, const Stream& stream, int q, int c, int channels,
                        uint8_t outside, uint8_t* h) {
    const uint8_t* row[kQuad];
    for (int r = 0; r < kQuad; ++r) {
      const int64_t i = stream.top + (int64_t(q) * kQuad + r) * stream.row_step;
      row[r] = i < 0 || i >= s.height ? nullptr : x + i * s.width * x_stride + c;
    }
    for (int column = 0; column < s.width; ++column, h += kPanel * 4) {
      for (int v = 0; v < channels; v += kLanes) {
        V bytes[kQuad];
        for (int r = 0; r < kQuad; ++r) {
          bytes[r] = row[r] ? Isa::load_bytes(row[r] + int64_t(column) * x_stride + v, min(kLanes, channels - v))
                            : Isa::broadcast(outside);
        }
        Isa::store_quad(h + v * 4, bytes, Isa::interleave(0, kQuad));
      }
    }
  }

  static void combine(const Step& s, const void* packed_, const void* partials_, const void* x_, void* y_, int pixel0,
                      int pixel1) {
    const uint32_t* packed = static_cast<const uint32_t*>(packed_);
    const float* k = constants(packed, s.constants);
    const Convolution project = convolution(packed, s.project_weight, s.project_bias, s.out_channels);
    const int64_t size = int64_t(s.out_height) * s.out_width * s.out_channels;
    const int x_stride = round_up(s.in_channels, 4), y_stride = round_up(s.out_channels, 4);
    for (int pixel = pixel0; pixel < pixel1; ++pixel) {
      const int32_t* partials = static_cast<const int32_t*>(partials_) + int64_t(pixel) * s.out_channels;
      const uint8_t* x = static_cast<const uint8_t*>(x_) + int64_t(pixel) * x_stride;
      uint8_t* y = static_cast<uint8_t*>(y_) + int64_t(pixel) * y_stride;
      for (int n = 0; n < s.out_channels; n += kLanes) {
        const int count = min(kLanes, s.out_channels - n);
        V sum = Isa::load_n(partials + n, count);
        for (int g = 1; g < s.groups; ++g) sum = Isa::add(sum, Isa::load_n(partials + g * size + n, count));
        const F m = Isa::load_floats(project.multiplier + n);
        Isa::store_bytes(y + n, narrow(sum, m, s.residual ? x + n : nullptr, k, count), count);
      }
    }
  }

  // ------------------------------------------------------------------------------------------ head, classifier

  static void pointwise(const Step& s, const void* packed_, const void* x, void* y, void* scratch, int panel0,
                        int panel1) {
    const uint32_t* packed = static_cast<const uint32_t*>(packed_);
    const float* k = constants(packed, s.constants);
    const int pixel_count = s.height * s.width, x_stride = round_up(s.in_channels, 4);
    const Convolution all = convolution(packed, s.project_weight, s.project_bias, s.out_channels);
    const X* operands;
    if constexpr (kWide) {
      X* wide = reinterpret_cast<X*>(static_cast<uint32_t*>(scratch) + s.operands_offset);
      Isa::widen(static_cast<const uint8_t*>(x), int64_t(pixel_count) * x_stride, wide);
      operands = wide;
    } else {
      operands = static_cast<const uint8_t*>(x);
    }
    const Pixels<X> pixels = {{operands}, 1, x_stride / 4, x_stride};
    for (int n = panel0 * kPanel; n < min(panel1 * kPanel, s.out_channels); n += kPanel) {
      const int channels = min(kPanel, s.out_channels - n);
      const Convolution w = from(all, n, x_stride / 4);
      if (!s.pooled) {
        const int y_stride = round_up(s.out_channels, 4);
        panel<Narrow>(pixels, w, {static_cast<uint8_t*>(y) + n, y_stride, nullptr, 0, k, 0}, 1, pixel_count, channels);
        continue;
      }
      int32_t sum[kPanel] = {};
      panel<Pooled>(pixels, w, {sum, 0, nullptr, 0, k, 0}, 4, pixel_count, channels);
      for (int v = 0; v < channels; v += kLanes) {
        store_mean(s, packed, Isa::load(sum + v), y, n + v, min(kLanes, channels - v));
      }
    }
  }

  static void pool(const Step& s, const void* packed_, const void* x_, void* y) {
    const uint32_t* packed = static_cast<const uint32_t*>(packed_);
    const int pixels = s.height * s.width, x_stride = round_up(s.in_channels, 4);
    for (int c = 0; c < s.in_channels; c += kLanes) {
      const int count = min(kLanes, s.in_channels - c);
      const uint8_t* x = static_cast<const uint8_t*>(x_) + c;
      V sum = Isa::zero();
      for (int p = 0; p < pixels; ++p) sum = Isa::add(sum, Isa::load_bytes(x + int64_t(p) * x_stride, count));
      store_mean(s, packed, sum, y, c, count);
    }
  }

  // The mean of pixels from their sum: to bytes for a classifier, or as the result.
  static void store_mean(const Step& s, const uint32_t* packed, V sum, void* y, int channel, int count) {
    const float* k = constants(packed, s.pool_constants);
    const int pixels = s.height * s.width;
    const F multiplier = Isa::broadcast_float(k[1] / float(pixels));
    const F mean = Isa::scaled(Isa::add(sum, Isa::broadcast(-pixels * int(k[0]))), multiplier);
    if (s.to_float) {
      Isa::store_floats(static_cast<float*>(y) + channel, mean, count);
    } else {
      const V byte = Isa::round(Isa::add(mean, Isa::broadcast_float(k[2])));
      Isa::store_bytes(static_cast<uint8_t*>(y) + channel, byte, count);
    }
  }

  // A single row has too few accumulators to hide the latency of its chains, and is bound by reading the weights:
  // several panels at once.
  static constexpr int kStreams = Isa::kStreams;
  static void row_panels(const uint8_t* x, int k, const Convolution& conv, int64_t panel_size, float* y) {
    V acc[kStreams * kTileN];
    MNV2_UNROLL for (int i = 0; i < kStreams * kTileN; ++i) acc[i] = Isa::load(conv.bias + i * kLanes);
    const uint32_t* w = conv.w;
    for (int j = 0; j < k * kSteps; ++j) {
      const auto a = Isa::broadcast(x + kStep * j);
      MNV2_UNROLL for (int i = 0; i < kStreams; ++i) {
        MNV2_UNROLL for (int n = 0; n < kTileN; ++n) {
          V& sum = acc[i * kTileN + n];
          sum = Isa::dot(sum, a, Isa::weights(w + i * panel_size + n * kStepLanes));
        }
      }
      w += kTileN * kStepLanes;
    }
    MNV2_UNROLL for (int i = 0; i < kStreams * kTileN; ++i) {
      Isa::store_floats(y + i * kLanes, Isa::scaled(acc[i], Isa::load_floats(conv.multiplier + i * kLanes)), kLanes);
    }
  }

  static void linear(const Step& s, const void* packed, const void* x_, void* y_, int64_t rows, int panel0,
                     int panel1) {
    const uint8_t* x = static_cast<const uint8_t*>(x_);
    const int x_stride = round_up(s.in_channels, 4), k = x_stride / 4;
    const Convolution all =
        convolution(static_cast<const uint32_t*>(packed), s.project_weight, s.project_bias, s.out_channels);
    for (int p = panel0; p < panel1; ++p) {
      const int n = p * kPanel;
      float* y = static_cast<float*>(y_) + n;
      const Convolution w = from(all, n, k);
      if (rows == 1 && p + kStreams <= panel1 && n + kStreams * kPanel <= s.out_channels) {
        row_panels(x, k, w, int64_t(k) * kPanel, y);
        p += kStreams - 1;
        continue;
      }
      panel<Logits>(Pixels<uint8_t>{{x}, 1, k, x_stride}, w, {y, s.out_channels, nullptr, 0, nullptr, 0}, 4, int(rows),
                    min(kPanel, s.out_channels - n));
    }
  }

  // ----------------------------------------------------------------------------------------------------- peak

  // As forward-inl.h's, of multiply-adds of bytes.
  static double fma_loop(int64_t iterations) {
    constexpr int kChains = Isa::kTileM * kTileN;
    const uint32_t ones[kLanes] = {0x01010101};
    const B w = Isa::weights(ones);
    const auto a = Isa::broadcast(reinterpret_cast<const uint8_t*>(ones));
    V acc[kChains];
    MNV2_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = Isa::broadcast(i);
    for (int64_t j = 0; j < iterations; ++j) {
      asm volatile("" ::: "memory");
      MNV2_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = Isa::dot(acc[i], a, w);
    }
    V sum = acc[0];
    MNV2_UNROLL for (int i = 1; i < kChains; ++i) sum = Isa::add(sum, acc[i]);
    int32_t buffer[kLanes];
    Isa::store(buffer, sum);
    asm volatile("" ::"r"(buffer) : "memory");  // used, so that the loop is not dropped
    return double(iterations) * kChains * kLanes * kStep;
  }

  static constexpr Kernel kernel(const char* name, const char* const* features) {
    Kernel k{};
    k.name = name;
    k.dtype = Dtype::kInt8;
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
