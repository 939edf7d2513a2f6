// The training passes of a block (inverted_residual.h: TrainingStep), each algorithm written once over an `Isa`;
// included after forward-inl.h, whose tiles and filters it uses. One image, one thread.
//
// A pass goes through the image once for each panel of hidden channels, a stripe of output rows at a time: h and dd are
// rings of rows, so that no row is computed twice, and everything a stripe touches stays in L2. A row of ge is complete
// when the last output row that reads the row of h has been filtered back.
//
// Sums over pixels go by slots too where those hold two values: of two neighbouring pixels then. h, d and dd are of T,
// relu6(u) and ge of X, since they are multiplied by matrices only.

template <class Isa>
struct Training : Forward<Isa> {
  using F = Forward<Isa>;
  using F::ceil_div;
  using F::kLanes;
  using F::kPanel;
  using F::kSlot;
  using F::kTileM;
  using F::kTileN;
  using F::max;
  using F::min;
  using F::slots;
  using typename F::Pixels;
  using typename F::T;
  using typename F::V;
  using typename F::X;

  // ------------------------------------------------------------------------------------------ g, relu6(u) and dd

  struct Backward {
    const T* d;  // [pixel][kPanel]
    X* kept;     // relu6(u), as d
    T* dd;
    const int32_t* offset;  // of each pixel in dd
    T* sums;                // [2][kPanel]: of g, of g (d - center)
    int tail = 0;
    const T* ahead = nullptr;
    int64_t ahead_size = 0, ahead_step = 0;

    MNV2_INLINE void advance(int pixels) {
      d += pixels * kPanel;
      kept += pixels * kPanel;
      if (dd) offset += pixels;
    }
  };

  // dz . Wp^T and what follows from it for each pixel. Sums: relu6(u) and the sums are asked for; Below: dd is; Batch:
  // with the part through d's statistics.
  template <bool Sums, bool Below, bool Batch>
  struct ProjectBack {
    using Out = Backward;
    template <int M, int N>
    static void tile(const Pixels& pixels, const T* w, const T* coefficients, const Backward& out) {
      V acc[M][N];
      MNV2_UNROLL for (int m = 0; m < M; ++m) {
        MNV2_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = Isa::broadcast(T(0));
      }
      F::template multiply<M, N>(acc, pixels, w, out);
      MNV2_UNROLL for (int n = 0; n < N; ++n) {
        const auto coefficient = [&](int i) { return Isa::load(coefficients + i * kPanel + n * kLanes); };
        V sum, sum_d;
        if constexpr (Sums) {
          sum = Isa::load(out.sums + n * kLanes);
          sum_d = Isa::load(out.sums + kPanel + n * kLanes);
        }
        MNV2_UNROLL for (int m = 0; m < M; ++m) {
          const V d = Isa::load(out.d + m * kPanel + n * kLanes), u = Isa::fmadd(coefficient(0), d, coefficient(1));
          const V g = Isa::between(u, Isa::broadcast(T(0)), Isa::broadcast(T(6)), acc[m][n]);
          if constexpr (Sums) {
            sum = Isa::add(sum, g);
            sum_d = Isa::fmadd(g, Isa::sub(d, coefficient(2)), sum_d);
            Isa::store(out.kept + m * kPanel + n * kLanes, F::relu6(u));
          }
          if constexpr (Below) {
            const V dd = Batch ? Isa::fmadd(coefficient(3), g, Isa::fmadd(coefficient(4), d, coefficient(5)))
                               : Isa::mul(coefficient(3), g);
            Isa::store(out.dd + out.offset[m] + n * kLanes, dd);
          }
        }
        if constexpr (Sums) {
          Isa::store(out.sums + n * kLanes, sum);
          Isa::store(out.sums + kPanel + n * kLanes, sum_d);
        }
      }
    }
  };

  // Of `count` pixels what is asked for: dd where there is a place for it, from ring pixel `first` on, around the end
  // of the ring; relu6(u) and the sums, where `sums`.
  static void project_back(const TrainingStep& t, const X* dz, const T* w, const T* coefficients, bool sums, bool batch,
                           Backward out, int first, int count, int channels) {
    const X* segment[1] = {dz};
    Pixels pixels = {segment, 1, t.step.out_channels, 0, t.step.out_channels};
    if (!out.dd) {
      if (sums) F::template panel<ProjectBack<true, false, false>>(pixels, w, coefficients, out, count, channels);
      return;
    }
    const auto below = sums    ? batch ? F::template panel<ProjectBack<true, true, true>>
                                       : F::template panel<ProjectBack<true, true, false>>
                       : batch ? F::template panel<ProjectBack<false, true, true>>
                               : F::template panel<ProjectBack<false, true, false>>;
    const int ring_pixels = t.d_ring_rows * t.step.out_width;
    while (count > 0) {
      const int now = min(count, ceil_div(ring_pixels - first, kTileM) * kTileM);
      out.offset = t.d_pixel_offsets + first;
      below(pixels, w, coefficients, out, now, channels);
      out.d += int64_t(now) * kPanel;
      out.kept += int64_t(now) * kPanel;
      pixels.offset += int64_t(now) * pixels.pixel_stride;
      first = (first + now) % ring_pixels;
      count -= now;
    }
  }

  // ---------------------------------------------------------------------------------------- gradients of weights

  // to[m][n] += sum over k of a[k][m] b[k][n]: a matrix product over the pixels, b a panel of values B, a with any row
  // length; of b's narrower than T a row of slots is made of two rows (of one and of zeros at the end), as a has it.
  template <class B>
  struct Outer {
    static constexpr int kRows = sizeof(T) / sizeof(B);

    template <int M, int N>
    static void tile(const T* a, int64_t a_stride, const B* b, const B* zeros, int64_t k, T* to) {
      V acc[M][N];
      MNV2_UNROLL for (int m = 0; m < M; ++m) {
        MNV2_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = Isa::load(to + m * kPanel + n * kLanes);
      }
      for (; k > 0; k -= kRows) {
        V w[N];
        if constexpr (kRows == 1) {
          MNV2_UNROLL for (int n = 0; n < N; ++n) w[n] = Isa::load(b + n * kLanes);
        } else {
          const B* next = k > 1 ? b + kPanel : zeros;
          MNV2_UNROLL for (int n = 0; n < N; ++n) w[n] = Isa::pairs(b + n * kLanes, next + n * kLanes);
        }
        MNV2_UNROLL for (int m = 0; m < M; ++m) {
          const V v = Isa::broadcast_load(a + m);
          MNV2_UNROLL for (int n = 0; n < N; ++n) {
            if constexpr (kRows == 1) {
              acc[m][n] = Isa::fmadd(v, w[n], acc[m][n]);
            } else {
              acc[m][n] = Isa::dot(v, w[n], acc[m][n]);
            }
          }
        }
        a += a_stride;
        asm volatile("" : "+r"(a));  // or GCC 12 reads two rows at once in plain C++, one of them beyond the end
        b += kRows * kPanel;
      }
      MNV2_UNROLL for (int m = 0; m < M; ++m) {
        MNV2_UNROLL for (int n = 0; n < N; ++n) Isa::store(to + m * kPanel + n * kLanes, acc[m][n]);
      }
    }
  };

  template <class B>
  static void outer(const T* a, int a_count, int64_t a_stride, const B* b, const B* zeros, int channels, int64_t k,
                    T* to) {
    const int n = ceil_div(channels, kLanes);
    for (int m = 0, tiles = ceil_div(a_count, kTileM); tiles > 0; --tiles) {  // of equal height: low ones are slow
      const int now = ceil_div(a_count - m, tiles);
      F::template tile_function<Outer<B>, kTileM, kTileN>(now, n)(a + m, a_stride, b, zeros, k, to + m * kPanel);
      m += now;
    }
  }

  // Pixels [count][channels] as `outer` takes them for a: as they are, or in slots of two, which are put at `to`.
  static const T* slot_rows(const X* x, int count, int channels, const X* zeros, T* to) {
    if constexpr (kSlot == 1) {
      return x;
    } else {
      T* row = to;
      for (int i = 0; i < count; i += kSlot, row += channels) {
        const X* first = x + int64_t(i) * channels;
        const bool paired = i + 1 < count;
        for (int c = 0; c < channels; c += kLanes) {
          const int left = channels - c;
          const X *low = first + c, *high = paired ? low + channels : zeros;
          left < kLanes ? Isa::store_n(row + c, Isa::pairs_n(low, high, left), left)
                        : Isa::store(row + c, Isa::pairs(low, high));
        }
      }
      return to;
    }
  }

  // ------------------------------------------------------------------------------------------------ filtered back

  // Pixels of a row that the same taps reach, `step` elements apart, for one vector of channels.
  struct Gathered {
    const T *dd, *weight, *h;  // of the taps, [9][kLanes]
    X* ge;
    T* sums;          // [2][kPanel]: of ge, of ge h
    T* gradient;      // [9][kPanel], of the taps; or null
    bool gated;       // ge is 0 where h is not between 0 and 6
    int64_t from[9];  // where in dd each tap leads from the first pixel
    int tap[9];
    int count;
    int64_t step;
  };

  // ge, the sum over the taps of weight and dd; its sums; and where Weighed the gradients of the taps, the sums of dd
  // and h, from the same loads.
  template <int Taps, bool Weighed>
  static void gather(const Gathered& g) {
    // Of 32 registers 9 weights, 9 gradients, 4 accumulators, 4 of h and the sums; of 16 the gradients and one each.
    constexpr int kColumns = Weighed && Isa::kRegisters < 32 ? 1 : 4;
    V sum = Isa::load(g.sums), sum_h = Isa::load(g.sums + kPanel), w[Taps + 1], gradient[Taps + 1];
    MNV2_UNROLL for (int i = 0; i < Taps; ++i) w[i] = Isa::load(g.weight + g.tap[i] * kLanes);
    if constexpr (Weighed) {
      MNV2_UNROLL for (int i = 0; i < Taps; ++i) gradient[i] = Isa::load(g.gradient + g.tap[i] * kPanel);
    }
    const T* h = g.h;
    X* to = g.ge;
    const int64_t step = g.step;
    const bool gated = g.gated;
    const auto columns = [&](auto width, int j) __attribute__((always_inline)) {
      V acc[width.value], value[width.value];
      MNV2_UNROLL for (int c = 0; c < width.value; ++c) {
        acc[c] = Isa::broadcast(T(0));
        value[c] = Isa::load(h + c * step);
      }
      MNV2_UNROLL for (int i = 0; i < Taps; ++i) {
        const T* from = g.dd + g.from[i] + int64_t(j) * kPanel;
        MNV2_UNROLL for (int c = 0; c < width.value; ++c) {
          const V dd = Isa::load(from + c * kPanel);
          acc[c] = Isa::fmadd(dd, w[i], acc[c]);
          if constexpr (Weighed) gradient[i] = Isa::fmadd(dd, value[c], gradient[i]);
        }
      }
      MNV2_UNROLL for (int c = 0; c < width.value; ++c) {
        V ge = acc[c];
        if (gated) {
          ge = Isa::between(value[c], Isa::broadcast(T(0)), Isa::broadcast(T(6)), ge);
          sum_h = Isa::fmadd(ge, value[c], sum_h);
        }
        sum = Isa::add(sum, ge);
        Isa::store(to + c * step, ge);
      }
      h += width.value * step;
      to += width.value * step;
    };
    int j = 0;
    for (; j + kColumns <= g.count; j += kColumns) columns(typename F::template Count<kColumns>(), j);
    for (; j < g.count; ++j) columns(typename F::template Count<1>(), j);
    Isa::store(g.sums, sum);
    Isa::store(g.sums + kPanel, sum_h);
    if constexpr (Weighed) {
      MNV2_UNROLL for (int i = 0; i < Taps; ++i) Isa::store(g.gradient + g.tap[i] * kPanel, gradient[i]);
    }
  }

  template <bool Weighed>
  static constexpr void (*kGather[10])(const Gathered&) = {
      gather<0, Weighed>, gather<1, Weighed>, gather<2, Weighed>, gather<3, Weighed>, gather<4, Weighed>,
      gather<5, Weighed>, gather<6, Weighed>, gather<7, Weighed>, gather<8, Weighed>, gather<9, Weighed>};

  // Columns [x0, x1) of a row of ge, [x1 - x0][kPanel], as `all` says for the first vector of channels. h, from x0 on,
  // does not matter where no output reads the row.
  static void filter_back_row(const TrainingStep& t, const Gathered& all, int channels, int row, int x0, int x1) {
    const Step& s = t.step;
    const int shift = s.stride - 1;  // strides are 1 and 2, and divisions slow
    // Columns [first, end) with the taps of the first; or it alone, with those whose output exists.
    const auto columns = [&](int first, int end, bool alone) {
      Gathered g = all;
      int taps = 0;
      for (int ky = 0; ky < 3; ++ky) {
        const int y = row + s.pad_top - ky * s.dilation;
        if (y < 0 || y & shift || y >> shift >= s.out_height) continue;
        const int64_t dd_row = int64_t((y >> shift) % t.d_ring_rows) * t.d_row_length + t.d_pad_left;
        for (int kx = 0; kx < 3; ++kx) {
          const int x = first + s.pad_left - kx * s.dilation;
          if (x & shift || (alone && (x < 0 || x >> shift >= s.out_width))) continue;
          g.from[taps] = (dd_row + (x >> shift)) * kPanel;
          g.tap[taps++] = ky * 3 + kx;
        }
      }
      g.h += int64_t(first - x0) * kPanel;
      g.ge += int64_t(first - x0) * kPanel;
      g.count = (end - first + shift) >> shift;
      g.step = int64_t(s.stride) * kPanel;
      const auto gathers = (g.gradient ? kGather<true> : kGather<false>)[taps];
      for (int v = 0; v < channels; v += kLanes) {
        gathers(g);
        g.dd += kLanes;
        g.weight += 9 * kLanes;
        g.h += kLanes;
        g.ge += kLanes;
        g.sums += kLanes;
        if (g.gradient) g.gradient += kLanes;
      }
    };
    // The zeros beside the rows of dd add nothing to ge. Nor do they to the gradients, but where h is NaN.
    int inner = x0, outer = x1;
    if (all.gradient) {
      inner = max(x0, min(x1, 2 * s.dilation - s.pad_left));
      outer = max(inner, min(x1, (s.out_width - 1) * s.stride - s.pad_left + 1));
    }
    for (int x = x0; x < inner; ++x) columns(x, x + 1, true);
    for (int x = inner; x < inner + s.stride && x < outer; ++x) columns(x, outer, false);
    for (int x = outer; x < x1; ++x) columns(x, x + 1, true);
  }

  // ----------------------------------------------------------------------------------------------------- moments

  template <class Value>
  static V load_channels(const Value* from, int left) {
    return left < kLanes ? Isa::load_n(from, left) : Isa::load(from);
  }

  // body(i, sums) for i from 0 to `count`, each of which adds to `Sums` sums. So many i go side by side, each with sums
  // of its own: one after the other they would wait for their additions.
  template <int Sums, class Body>
  static MNV2_INLINE void add_up(int count, V (&to)[Sums], const Body& body) {
    constexpr int kSide = 4;
    V side[kSide][Sums];
    MNV2_UNROLL for (int j = 0; j < kSide; ++j) {
      MNV2_UNROLL for (int n = 0; n < Sums; ++n) side[j][n] = Isa::broadcast(T(0));
    }
    int i = 0;
    for (; i + kSide <= count; i += kSide) {
      MNV2_UNROLL for (int j = 0; j < kSide; ++j) body(i + j, side[j]);
    }
    for (; i < count; ++i) body(i, side[0]);
    MNV2_UNROLL for (int n = 0; n < Sums; ++n) {
      to[n] = Isa::add(Isa::add(side[0][n], side[1][n]), Isa::add(side[2][n], side[3][n]));
    }
  }

  // Mean and sum of squared deviations of `count` pixels `stride` apart, merged into those of `before` values.
  // Deviations from their own mean: large means cost no precision.
  template <class Value>
  static void merge_moments(const Value* d, int count, int channels, int64_t stride, double before, double* mean,
                            double* square) {
    for (int v = 0; v < channels; v += kLanes) {
      const int left = channels - v;
      V sum[1], moments[2];
      add_up(count, sum, [&](int i, V* to) __attribute__((always_inline)) {
        to[0] = Isa::add(to[0], load_channels(d + i * stride + v, left));
      });
      const V center = Isa::mul(sum[0], Isa::broadcast(T(1) / T(count)));
      add_up(count, moments, [&](int i, V* to) __attribute__((always_inline)) {
        const V e = Isa::sub(load_channels(d + i * stride + v, left), center);
        to[0] = Isa::fmadd(e, e, to[0]);
        to[1] = Isa::add(to[1], e);
      });
      T centers[kLanes], rests[kLanes], local[kLanes];
      Isa::store(centers, center);
      Isa::store(rests, moments[1]);
      Isa::store(local, moments[0]);
      for (int i = 0; i < min(kLanes, left); ++i) {
        const double offset = double(rests[i]) / count;  // what rounding left between the center and the mean
        merge(before, count, double(centers[i]) + offset, double(local[i]) - offset * offset * count, mean + v + i,
              square + v + i);
      }
    }
  }

  static void merge(double before, double count, double mean, double square, double* to_mean, double* to_square) {
    const double delta = mean - *to_mean, total = before + count;
    *to_mean += delta * (count / total);
    *to_square += square + delta * delta * (before * count / total);
  }

  // Doubles that fill a vector register: products of floats are exact in them.
  typedef double Doubles __attribute__((vector_size(8 * Isa::kDoubles), aligned(8), may_alias));

  // to[m][n] += sum over `count` rows k of a[k][m] b[k][n]; rows of a are `a_stride` apart, b is a panel.
  static void products(const double* a, int64_t a_stride, const double* b, int count, double* to, int64_t stride,
                       int rows) {
    constexpr int kM = Isa::kDoublesM, kN = Isa::kDoublesN;
    static_assert(kPanel % kM == 0 && kPanel % (kN * Isa::kDoubles) == 0);
    for (int m0 = 0; m0 < rows; m0 += kM) {
      for (int n0 = 0; n0 < kPanel; n0 += kN * Isa::kDoubles) {
        Doubles acc[kM][kN];
        const auto at = [&](int m, int n) __attribute__((always_inline)) {
          return reinterpret_cast<Doubles*>(to + (m0 + m) * stride + n0 + n * Isa::kDoubles);
        };
        MNV2_UNROLL for (int m = 0; m < kM; ++m) { MNV2_UNROLL for (int n = 0; n < kN; ++n) acc[m][n] = *at(m, n); }
        for (int k = 0; k < count; ++k) {
          Doubles w[kN];
          MNV2_UNROLL for (int n = 0; n < kN; ++n) {
            w[n] = *reinterpret_cast<const Doubles*>(b + k * kPanel + n0 + n * Isa::kDoubles);
          }
          MNV2_UNROLL for (int m = 0; m < kM; ++m) {
            MNV2_UNROLL for (int n = 0; n < kN; ++n) acc[m][n] += a[k * a_stride + m0 + m] * w[n];
          }
        }
        MNV2_UNROLL for (int m = 0; m < kM; ++m) { MNV2_UNROLL for (int n = 0; n < kN; ++n) * at(m, n) = acc[m][n]; }
      }
    }
  }

  // Deviations from a center of a chunk of pixels, multiplied and added up in double: where channels are correlated,
  // most of these sums cancel in the variances that are made of them. The center is the chunk's mean; of 16-bit
  // numbers 0, as their products are exact in T, and so are sums of equal ones over a chunk. Scratch: the center, what
  // the mean is beside it, and the deviations in panels, [panels][kMomentPixels][kPanel], or the values in slots.
  static void moments(const void* x_, int64_t pixels, int channels, double count, double* mean, double* sums,
                      double* scratch) {
    const int panels = ceil_div(channels, kPanel), size = panels * kPanel;
    constexpr int64_t kChunk = int64_t(kMomentPixels) * kPanel;
    double *center = scratch, *rest = center + size, *deviations = rest + size;
    for (int64_t p0 = 0; p0 < pixels; p0 += kMomentPixels) {
      const int now = pixels - p0 < kMomentPixels ? int(pixels - p0) : kMomentPixels;
      const X* x = static_cast<const X*>(x_) + p0 * channels;
      for (int v = 0; v < size; v += kLanes) {
        double* panel = deviations + v / kPanel * kChunk + v % kPanel;
        const int left = channels - v;
        const auto load = [&](int i) {
          const X* from = x + int64_t(i) * channels + v;
          return left >= kLanes ? Isa::load(from) : left > 0 ? Isa::load_n(from, left) : Isa::broadcast(T(0));
        };
        V sum[1];
        add_up(now, sum, [&](int i, V* to) __attribute__((always_inline)) { to[0] = Isa::add(to[0], load(i)); });
        T lanes[kLanes];
        if constexpr (kSlot > 1) {
          Isa::store(lanes, sum[0]);
          for (int j = 0; j < kLanes; ++j) {
            center[v + j] = 0;
            rest[v + j] = double(lanes[j]) / now;
          }
          continue;
        }
        const V c = Isa::mul(sum[0], Isa::broadcast(T(1) / T(now)));
        double left_over[kLanes] = {};
        for (int i = 0; i < now; ++i) {
          Isa::store(lanes, Isa::sub(load(i), c));
          for (int j = 0; j < kLanes; ++j) {
            panel[int64_t(i) * kPanel + j] = double(lanes[j]);
            left_over[j] += double(lanes[j]);
          }
        }
        Isa::store(lanes, c);
        for (int j = 0; j < kLanes; ++j) center[v + j] = double(lanes[j]);
        for (int j = 0; j < kLanes; ++j) rest[v + j] = left_over[j] / now;
      }
      const double total = count + now, weight = count * now / total;
      for (int i = 0; i < panels; ++i) {
        for (int j = i; j < panels; ++j) {
          double* to = sums + int64_t(i) * kPanel * size + j * kPanel;
          for (int m = 0; m < kPanel; ++m) {
            const int row = i * kPanel + m;
            const double delta = center[row] + rest[row] - mean[row];
            for (int n = 0; n < kPanel; ++n) {
              const int column = j * kPanel + n;
              to[int64_t(m) * size + n] +=
                  delta * (center[column] + rest[column] - mean[column]) * weight - rest[row] * rest[column] * now;
            }
          }
          if constexpr (kSlot == 1) {
            products(deviations + i * kChunk, kPanel, deviations + j * kChunk, now, to, size, kPanel);
          }
        }
      }
      if constexpr (kSlot > 1) slot_products(x, now, channels, sums, size, reinterpret_cast<T*>(deviations));
      for (int i = 0; i < size; ++i) mean[i] += (center[i] + rest[i] - mean[i]) * (now / total);
      count = total;
    }
  }

  // Adds to the sums [size][size] the products of up to kMomentPixels pixels.
  static void slot_products(const X* x, int count, int channels, double* sums, int size, T* scratch) {
    const X zeros[kPanel] = {};
    X* panel = reinterpret_cast<X*>(scratch + kMomentPixels / kSlot * channels);
    T* product = reinterpret_cast<T*>(panel + kMomentPixels * kPanel);
    const T* rows = slot_rows(x, count, channels, zeros, scratch);
    for (int n = 0; n < channels; n += kPanel) {
      const int width = min(kPanel, channels - n), height = n + width;
      for (int i = 0; i < count; ++i) {
        for (int v = 0; v < width; v += kLanes) {
          Isa::store(panel + i * kPanel + v, load_channels(x + int64_t(i) * channels + n + v, width - v));
        }
      }
      for (int i = 0; i < height * kPanel; ++i) product[i] = 0;
      outer<X>(rows, height, channels, panel, zeros, width, count, product);
      for (int m = 0; m < height; ++m) {
        for (int i = 0; i < width; ++i) sums[int64_t(m) * size + n + i] += double(product[m * kPanel + i]);
      }
    }
  }

  // Of a symmetric matrix [channels][size] and a panel of weights [channels][kPanel] the product, [size][kPanel].
  static void covariance_times(const double* matrix, const double* w, int channels, double* to) {
    const int size = ceil_div(channels, kPanel) * kPanel;
    for (int i = 0; i < size * kPanel; ++i) to[i] = 0;
    products(matrix, size, w, channels, to, kPanel, size);
  }

  static void gram(const void* w_, const void* q_, int rows, int channels, int first, void* to_, void* scratch_) {
    const T *w = static_cast<const T*>(w_), *q = static_cast<const T*>(q_);
    T *to = static_cast<T*>(to_), *weighted = static_cast<T*>(scratch_);
    const int width = min(kPanel, channels - first);
    for (int64_t r = 0; r < rows; ++r) {
      for (int n = 0; n < kPanel; ++n) weighted[r * kPanel + n] = n < width ? q[r] * w[r * channels + first + n] : T(0);
    }
    for (int i = 0; i < channels * kPanel; ++i) to[i] = 0;
    outer<T>(w, channels, channels, weighted, nullptr, width, rows, to);
  }

  // ------------------------------------------------------------------------------------------------ narrow tensors

  // Pixels that are passed over at once: in L1 while a channel's constants are in registers.
  static int chunk_pixels(int channels) { return max(16, 2048 / channels); }

  template <class Body>
  static void for_chunks(int64_t pixels, int channels, const Body& body) {
    const int chunk = chunk_pixels(channels);
    for (int64_t p = 0; p < pixels; p += chunk) body(p, pixels - p < chunk ? int(pixels - p) : chunk);
  }

  static void channel_moments(const void* x, int64_t pixels, int channels, double* mean, double* square) {
    for_chunks(pixels, channels, [&](int64_t first, int count) {
      merge_moments(static_cast<const X*>(x) + first * channels, count, channels, channels, double(first), mean,
                    square);
    });
  }

  // a where relu6 passes a gradient to scale b + shift.
  struct Gate {
    V scale, shift;

    Gate(const T* gate, int v, int channels)
        : scale(load_channels(gate + v, channels - v)), shift(load_channels(gate + channels + v, channels - v)) {}
    MNV2_INLINE V operator()(V a, V b) const {
      return Isa::between(Isa::fmadd(scale, b, shift), Isa::broadcast(T(0)), Isa::broadcast(T(6)), a);
    }
  };

  static void channel_products(const void* a_, const void* b_, const void* center_, const void* gate_, int64_t pixels,
                               int channels, double* sums) {
    const T *center = static_cast<const T*>(center_), *gate = static_cast<const T*>(gate_);
    for_chunks(pixels, channels, [&](int64_t first, int count) {
      const X *a = static_cast<const X*>(a_) + first * channels, *b = static_cast<const X*>(b_) + first * channels;
      for (int v = 0; v < channels; v += kLanes) {
        const int left = channels - v;
        const V c = load_channels(center + v, left);
        V found[2];  // of g and of g (b - center)
        const auto add = [&](const auto& gated) __attribute__((always_inline)) {
          add_up(count, found, [&](int i, V* to) __attribute__((always_inline)) {
            const int64_t at = int64_t(i) * channels + v;
            const V value = load_channels(b + at, left), g = gated(load_channels(a + at, left), value);
            to[0] = Isa::add(to[0], g);
            to[1] = Isa::fmadd(g, Isa::sub(value, c), to[1]);
          });
        };
        gate ? add(Gate(gate, v, channels)) : add([](V g, V) { return g; });
        T totals[2][kLanes];
        Isa::store(totals[0], found[0]);
        Isa::store(totals[1], found[1]);
        for (int i = 0; i < min(kLanes, left); ++i) {
          sums[v + i] += double(totals[0][i]);
          sums[channels + v + i] += double(totals[1][i]);
        }
      }
    });
  }

  static void affine(const void* a_, const void* b_, const void* coefficients, const void* gate_, bool relu6, void* y_,
                     int64_t pixels, int channels) {
    const T *p = static_cast<const T*>(coefficients), *gate = static_cast<const T*>(gate_);
    bool adds_b = false;  // 0 times infinity would be NaN
    for (int c = 0; b_ && c < channels; ++c) adds_b |= p[channels + c] != 0;
    for_chunks(pixels, channels, [&](int64_t first, int count) {
      const X *a = static_cast<const X*>(a_) + first * channels, *b = static_cast<const X*>(b_) + first * channels;
      X* y = static_cast<X*>(y_) + first * channels;
      for (int v = 0; v < channels; v += kLanes) {
        const int left = channels - v;
        const V scale_a = load_channels(p + v, left), scale_b = load_channels(p + channels + v, left);
        const V shift = load_channels(p + 2 * channels + v, left);
        const auto each = [&](const auto& value) __attribute__((always_inline)) {
          for (int i = 0; i < count; ++i) {
            const int64_t at = int64_t(i) * channels + v;
            const V sum = value(load_channels(a + at, left), at);
            left < kLanes ? Isa::store_n(y + at, sum, left) : Isa::store(y + at, sum);
          }
        };
        const auto add_b = [&](V value, V to) { return Isa::fmadd(scale_b, value, to); };
        if (gate) {
          const Gate gated(gate, v, channels);
          each([&](V value, int64_t at) {
            const V other = load_channels(b + at, left);
            return Isa::fmadd(scale_a, gated(value, other), adds_b ? add_b(other, shift) : shift);
          });
        } else if (b_) {
          each([&](V value, int64_t at) {
            return add_b(load_channels(b + at, left), Isa::fmadd(scale_a, value, shift));
          });
        } else if (relu6) {
          each([&](V value, int64_t) { return F::relu6(Isa::fmadd(scale_a, value, shift)); });
        } else {
          each([&](V value, int64_t) { return Isa::fmadd(scale_a, value, shift); });
        }
      }
    });
  }

  static void matrix_add(const void* x, const void* w_, const void* bias_, const void* residual_, void* y_,
                         int64_t pixels, int channels) {
    const T *w = static_cast<const T*>(w_), *bias = static_cast<const T*>(bias_);
    constexpr int kPixels = 1024;
    for (int64_t first = 0; first < pixels; first += kPixels) {
      const int count = pixels - first < kPixels ? int(pixels - first) : kPixels;
      const X* segment[1] = {static_cast<const X*>(x) + first * channels};
      for (int n = 0; n < channels; n += kPanel) {
        const X* residual = residual_ ? static_cast<const X*>(residual_) + first * channels + n : nullptr;
        X* y = static_cast<X*>(y_) + first * channels + n;
        F::template panel<typename F::template OutputTo<X, X>>(
            {segment, 1, channels, 0, channels}, w + int64_t(n) * slots(channels), bias + n,
            {y, nullptr, channels, residual, y, false, 0}, count, min(kPanel, channels - n));
      }
    }
  }

  // ----------------------------------------------------------------------------------------------------- a pass

  // A panel's part of an Accumulator.
  struct Sum {
    T* to;  // null where the accumulator is
    double* exact;
    int64_t size, pending;

    Sum(const Accumulator& a, int panel) : to(nullptr), exact(nullptr), size(a.rows * kPanel), pending(a.pending) {
      if (!a.rounded) return;
      to = static_cast<T*>(a.rounded) + panel * size;
      if (a.exact) exact = a.exact + panel * size;
    }
    // After so many pixels more have been added.
    void added(int pixels) {
      pending += pixels;
      if (pending < kPixelsPerFlush) return;
      for (int64_t i = 0; i < size; ++i) {
        exact[i] += double(to[i]);
        to[i] = 0;
      }
      pending = 0;
    }
  };

  // body(first, count) for pieces of `count` pixels that one flush allows.
  template <class Body>
  static void for_pieces(int count, const Body& body) {
    for (int first = 0; first < count; first += kPixelsPerFlush) body(first, min(kPixelsPerFlush, count - first));
  }

  static void train(const TrainingStep& t, TrainingPass& a, void* scratch_, const void* zeros_) {
    const Step& s = t.step;
    T* scratch = static_cast<T*>(scratch_);
    const T* zeros = static_cast<const T*>(zeros_);
    const X* no_pixel = static_cast<const X*>(zeros_);
    T *ring = scratch, *d = scratch + t.d_offset, *dd = scratch + t.dd_offset, *slot = scratch + t.slots_offset;
    X *kept = reinterpret_cast<X*>(scratch + t.kept_offset), *ge = reinterpret_cast<X*>(scratch + t.ge_offset);
    const T** rows = reinterpret_cast<const T**>(scratch + t.rows_offset);
    const int64_t ring_row = int64_t(s.row_length) * kPanel, dd_row = int64_t(t.d_row_length) * kPanel;
    const X *x = static_cast<const X*>(a.x), *dz = static_cast<const X*>(a.dz);
    const bool expands = s.source == Step::kExpand;
    const bool below = a.dx || a.expand_gradient.rounded || a.depthwise_gradient.rounded;  // what dd is needed for
    for (int64_t i = 0; i < s.ring_rows * ring_row; ++i) ring[i] = 0;
    for (int64_t i = 0; below && i < t.d_ring_rows * dd_row; ++i) dd[i] = 0;

    for (int c = 0; c < s.hidden_channels; c += kPanel) {
      const int channels = min(kPanel, s.hidden_channels - c), panel = c / kPanel;
      const T* coefficients = static_cast<const T*>(a.coefficients) + int64_t(panel) * 6 * kPanel;
      const T* filters = static_cast<const T*>(a.depthwise) + int64_t(c) * 9;
      Sum expand(a.expand_gradient, panel), taps(a.depthwise_gradient, panel), project(a.project_gradient, panel);
      double count = a.count;
      int filled = 0, emitted = 0;
      for (int o0 = 0; o0 < s.out_height; o0 += s.stripe) {
        const int o1 = min(o0 + s.stripe, s.out_height), pixels = (o1 - o0) * s.out_width;
        const int top = o0 * s.stride - s.pad_top, bottom = (o1 - 1) * s.stride - s.pad_top + 2 * s.dilation + 1;
        const int h0 = max(max(top, 0), filled), h1 = max(h0, min(bottom, s.height));
        filled = h1;
        if (expands && h1 > h0) {
          const X* segment[1] = {x + int64_t(h0) * s.width * s.in_channels};
          F::expand(s, segment, static_cast<const T*>(a.expand) + int64_t(c) * slots(s.in_channels),
                    static_cast<const T*>(a.expand_bias) + c, ring, h0 % s.ring_rows * s.width, s.ring_rows * s.width,
                    (h1 - h0) * s.width, channels, nullptr, 0);
        } else if (!expands) {
          for (int row = h0; row < h1; ++row) F::copy_row(s, x, ring, row, c, channels);
        }
        for (int v = 0; v < channels; v += kLanes) {
          for (int i = 0; i < bottom - top; ++i) {
            const int row = top + i;
            rows[i] = row < 0 || row >= s.height ? zeros : ring + row % s.ring_rows * ring_row + v;
          }
          const typename F::template FilterTo<T> filter = {
              filters + v * 9, zeros, d + v, int64_t(s.out_width) * kPanel, kPanel, s.dilation};
          F::template depthwise<typename F::Raw>(filter, s.stride, rows, o1 - o0, s.out_width);
        }
        if (a.mean) {
          for_pieces(pixels, [&](int first, int now) {
            merge_moments(d + int64_t(first) * kPanel, now, channels, kPanel, count, a.mean + c, a.square + c);
            count += now;
          });
        }
        if (!dz) continue;

        T sums[4 * kPanel] = {};
        const auto flush_sums = [&] {
          for (int i = 0; i < 4 * kPanel; ++i) {
            a.sums[int64_t(panel) * 4 * kPanel + i] += double(sums[i]);
            sums[i] = 0;
          }
        };
        for_pieces(pixels, [&](int first, int now) {
          const X* dz_rows = dz + (int64_t(o0) * s.out_width + first) * s.out_channels;
          X* kept_rows = kept + int64_t(first) * kPanel;
          project_back(t, dz_rows, static_cast<const T*>(a.project_back) + int64_t(c) * slots(s.out_channels),
                       coefficients, a.g_sums, a.batch,
                       {d + int64_t(first) * kPanel, kept_rows, below ? dd : nullptr, nullptr, sums},
                       (o0 * s.out_width + first) % (t.d_ring_rows * s.out_width), now, channels);
          flush_sums();
          if (!project.to) return;
          outer<X>(slot_rows(dz_rows, now, s.out_channels, no_pixel, slot), s.out_channels, s.out_channels, kept_rows,
                   no_pixel, channels, now, project.to);
          project.added(now);
        });
        const int complete = o1 == s.out_height ? s.height : max(0, min(s.height, o1 * s.stride - s.pad_top));
        for (; below && emitted < complete; emitted = min(emitted + t.chunk_rows, complete)) {
          const int end = min(emitted + t.chunk_rows, complete);
          for (int row = emitted; row < end; ++row) {
            for_pieces(s.width, [&](int first, int now) {
              const T* h = ring + row % s.ring_rows * ring_row + int64_t(s.pad_left + first) * kPanel;
              X* to = ge + (int64_t(row - emitted) * s.width + first) * kPanel;
              Gathered g{};
              g.dd = dd;
              g.weight = filters;
              g.h = h;
              g.ge = to;
              g.sums = sums + 2 * kPanel;
              g.gradient = taps.to;
              g.gated = expands;
              filter_back_row(t, g, channels, row, first, first + now);
              if (taps.to) taps.added(now);
              if (now == kPixelsPerFlush) flush_sums();
            });
          }
          flush_sums();
          for_pieces((end - emitted) * s.width, [&](int first, int now) {
            const int64_t at = (int64_t(emitted) * s.width + first) * s.in_channels;
            const X* ge_rows = ge + int64_t(first) * kPanel;
            if (expand.to) {
              outer<X>(slot_rows(x + at, now, s.in_channels, no_pixel, slot), s.in_channels, s.in_channels, ge_rows,
                       no_pixel, channels, now, expand.to);
              expand.added(now);
            }
            if (!a.dx) return;
            X* dx = static_cast<X*>(a.dx) + at;
            if (expands) {
              const bool last = c + kPanel >= s.hidden_channels;
              T* sum = kSlot == 1 ? reinterpret_cast<T*>(dx) : scratch + t.dx_offset + at;
              const auto back_to = [&](auto* to) {
                const X* segment[1] = {ge_rows};
                for (int n = 0; n < s.in_channels; n += kPanel) {
                  const int part = min(kPanel, s.in_channels - n), across = ceil_div(part, kLanes) * kLanes;
                  const T* w = static_cast<const T*>(a.expand_back) + int64_t(n) * slots(s.hidden_channels);
                  F::template panel<typename F::template OutputTo<std::remove_pointer_t<decltype(to)>>>(
                      {segment, 1, channels, 0, kPanel}, w + int64_t(c / kSlot) * across, zeros,
                      {to + n, nullptr, s.in_channels, nullptr, c > 0 ? sum + n : nullptr, false, 0}, now, part);
                }
              };
              if constexpr (kSlot == 1) {
                back_to(dx);
              } else {
                last ? back_to(dx) : back_to(sum);
              }
              return;
            }
            for (int i = 0; i < now; ++i) {
              const X* from = ge_rows + int64_t(i) * kPanel;
              X* to = dx + int64_t(i) * s.in_channels + c;
              for (int v = 0; v < channels; v += kLanes) {
                const V g = Isa::load(from + v);
                channels - v < kLanes ? Isa::store_n(to + v, g, channels - v) : Isa::store(to + v, g);
              }
            }
          });
        }
      }
      if (c + kPanel < s.hidden_channels) continue;
      a.expand_gradient.pending = expand.pending;  // alike for all panels
      a.depthwise_gradient.pending = taps.pending;
      a.project_gradient.pending = project.pending;
    }
  }

  static constexpr Kernel kernel(const char* name, Dtype dtype, const char* const* features) {
    Kernel k = F::kernel(name, dtype, features);
    k.train = train;
    k.moments = moments;
    k.covariance_times = covariance_times;
    k.gram = gram;
    k.channel_moments = channel_moments;
    k.channel_products = channel_products;
    k.affine = affine;
    k.matrix_add = matrix_add;
    return k;
  }
};
