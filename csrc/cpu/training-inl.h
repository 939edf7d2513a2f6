// The training passes of a block (inverted_residual.h: TrainingStep), each algorithm written once over an `Isa`;
// included after forward-inl.h, whose tiles and filters it uses. One image, one thread.
//
// A pass goes through the image once for each panel of hidden channels, a stripe of output rows at a time: h and dd are
// rings of rows, so that no row is computed twice, and everything a stripe touches stays in L2. A row of ge is complete
// when the last output row that reads the row of h has been filtered back.

template <class Isa>
struct Training : Forward<Isa> {
  using F = Forward<Isa>;
  using F::ceil_div;
  using F::kLanes;
  using F::kPanel;
  using F::kTileM;
  using F::kTileN;
  using F::max;
  using F::min;
  using typename F::Pixels;
  using typename F::T;
  using typename F::V;

  // ------------------------------------------------------------------------------------------ g, relu6(u) and dd

  struct Backward {
    T* d;  // [pixel][kPanel]: d, overwritten by relu6(u)
    T* dd;
    const int32_t* offset;  // of each pixel in dd
    T* sums;                // [2][kPanel]: of g, of g (d - center)
    int tail = 0;
    const T* ahead = nullptr;
    int64_t ahead_size = 0, ahead_step = 0;

    MNV2_INLINE void advance(int pixels) {
      d += pixels * kPanel;
      if (dd) offset += pixels;
    }
  };

  // dz . Wp^T and what follows from it for each pixel; Below: dd is asked for.
  template <bool Below>
  struct ProjectBack {
    template <int M, int N>
    static void tile(const Pixels& pixels, const T* w, const T* coefficients, const Backward& out) {
      V acc[M][N];
      MNV2_UNROLL for (int m = 0; m < M; ++m) {
        MNV2_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = Isa::broadcast(T(0));
      }
      F::template multiply<M, N>(acc, pixels, w, out);
      MNV2_UNROLL for (int n = 0; n < N; ++n) {
        const auto coefficient = [&](int i) { return Isa::load(coefficients + i * kPanel + n * kLanes); };
        V sum = Isa::load(out.sums + n * kLanes), sum_d = Isa::load(out.sums + kPanel + n * kLanes);
        MNV2_UNROLL for (int m = 0; m < M; ++m) {
          T* at = out.d + m * kPanel + n * kLanes;
          const V d = Isa::load(at), u = Isa::fmadd(coefficient(0), d, coefficient(1));
          const V g = Isa::between(u, Isa::broadcast(T(0)), Isa::broadcast(T(6)), acc[m][n]);
          sum = Isa::add(sum, g);
          sum_d = Isa::fmadd(g, Isa::sub(d, coefficient(2)), sum_d);
          Isa::store(at, F::relu6(u));
          if constexpr (Below) {
            const V dd = Isa::fmadd(coefficient(3), g, Isa::fmadd(coefficient(4), d, coefficient(5)));
            Isa::store(out.dd + out.offset[m] + n * kLanes, dd);
          }
        }
        Isa::store(out.sums + n * kLanes, sum);
        Isa::store(out.sums + kPanel + n * kLanes, sum_d);
      }
    }
  };

  // dd of `count` pixels from ring pixel `first` on, around the end of the ring.
  static void project_back(const TrainingStep& t, const T* dz, const T* w, const T* coefficients, Backward out,
                           int first, int count, int channels) {
    const T* segment[1] = {dz};
    Pixels pixels = {segment, 1, t.step.out_channels, 0, t.step.out_channels};
    if (!out.dd) return F::template panel<ProjectBack<false>>(pixels, w, coefficients, out, count, channels);
    const int ring_pixels = t.d_ring_rows * t.step.out_width;
    while (count > 0) {
      const int now = min(count, ceil_div(ring_pixels - first, kTileM) * kTileM);
      out.offset = t.d_pixel_offsets + first;
      F::template panel<ProjectBack<true>>(pixels, w, coefficients, out, now, channels);
      out.d += int64_t(now) * kPanel;
      pixels.offset += int64_t(now) * pixels.pixel_stride;
      first = (first + now) % ring_pixels;
      count -= now;
    }
  }

  // ---------------------------------------------------------------------------------------- gradients of weights

  // to[m][n] += sum over k of a[k][m] b[k][n]: a matrix product over the pixels, b a panel, a with any row length.
  struct Outer {
    template <int M, int N>
    static void tile(const T* a, int64_t a_stride, const T* b, int64_t k, T* to) {
      V acc[M][N];
      MNV2_UNROLL for (int m = 0; m < M; ++m) {
        MNV2_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = Isa::load(to + m * kPanel + n * kLanes);
      }
      for (; k > 0; --k) {
        V w[N];
        MNV2_UNROLL for (int n = 0; n < N; ++n) w[n] = Isa::load(b + n * kLanes);
        MNV2_UNROLL for (int m = 0; m < M; ++m) {
          const V v = Isa::broadcast_load(a + m);
          MNV2_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = Isa::fmadd(v, w[n], acc[m][n]);
        }
        a += a_stride;
        b += kPanel;
      }
      MNV2_UNROLL for (int m = 0; m < M; ++m) {
        MNV2_UNROLL for (int n = 0; n < N; ++n) Isa::store(to + m * kPanel + n * kLanes, acc[m][n]);
      }
    }
  };

  static void outer(const T* a, int a_count, int64_t a_stride, const T* b, int channels, int64_t k, T* to) {
    const int n = ceil_div(channels, kLanes);
    for (int m = 0, tiles = ceil_div(a_count, kTileM); tiles > 0; --tiles) {  // of equal height: low ones are slow
      const int now = ceil_div(a_count - m, tiles);
      F::template tile_function<Outer, kTileM, kTileN>(now, n)(a + m, a_stride, b, k, to + m * kPanel);
      m += now;
    }
  }

  // [9][kPanel] += over a row of outputs, dd times what each tap read.
  static void filter_gradient(const Step& s, const T* const* rows, const T* dd, T* to) {
    V acc[9];
    MNV2_UNROLL for (int i = 0; i < 9; ++i) acc[i] = Isa::load(to + i * kPanel);
    const int64_t step = int64_t(s.stride) * kPanel, reach = int64_t(s.dilation) * kPanel;
    const T* row[3] = {rows[0], rows[s.dilation], rows[2 * s.dilation]};
    for (int x = 0; x < s.out_width; ++x) {
      const V g = Isa::load(dd);
      MNV2_UNROLL for (int i = 0; i < 9; ++i) { acc[i] = Isa::fmadd(Isa::load(row[i / 3] + i % 3 * reach), g, acc[i]); }
      dd += kPanel;
      MNV2_UNROLL for (int i = 0; i < 3; ++i) row[i] += step;
    }
    MNV2_UNROLL for (int i = 0; i < 9; ++i) Isa::store(to + i * kPanel, acc[i]);
  }

  // ------------------------------------------------------------------------------------------------ filtered back

  // ge of `count` pixels of a row that the same taps reach, `step` elements apart: the sum over the taps of weight and
  // dd, where h lies between 0 and 6 (everywhere when it is null). Returns their sum.
  template <int Taps>
  static V gather(const T* const* dd, const V* w, const T* h, T* ge, int count, int64_t step) {
    constexpr int kColumns = 4;
    V sum = Isa::broadcast(T(0));
    const auto columns = [&](auto width, int j) __attribute__((always_inline)) {
      V acc[width.value];
      MNV2_UNROLL for (int c = 0; c < width.value; ++c) acc[c] = Isa::broadcast(T(0));
      MNV2_UNROLL for (int i = 0; i < Taps; ++i) {
        MNV2_UNROLL for (int c = 0; c < width.value; ++c) {
          acc[c] = Isa::fmadd(Isa::load(dd[i] + int64_t(j + c) * kPanel), w[i], acc[c]);
        }
      }
      MNV2_UNROLL for (int c = 0; c < width.value; ++c) {
        const int64_t at = (j + c) * step;
        const V g = h ? Isa::between(Isa::load(h + at), Isa::broadcast(T(0)), Isa::broadcast(T(6)), acc[c]) : acc[c];
        sum = Isa::add(sum, g);
        Isa::store(ge + at, g);
      }
    };
    int j = 0;
    for (; j + kColumns <= count; j += kColumns) columns(typename F::template Count<kColumns>(), j);
    for (; j < count; ++j) columns(typename F::template Count<1>(), j);
    return sum;
  }

  using Gather = V (*)(const T* const*, const V*, const T*, T*, int, int64_t);
  static constexpr Gather kGather[10] = {gather<0>, gather<1>, gather<2>, gather<3>, gather<4>,
                                         gather<5>, gather<6>, gather<7>, gather<8>, gather<9>};

  // One row of ge, [width][kPanel], for one vector of channels. h is null where there is no expansion; what it holds
  // does not matter where no output reads the row.
  static void filter_back_row(const TrainingStep& t, const T* weight, const T* dd_ring, const T* h, T* ge, int row,
                              T* sum) {
    const Step& s = t.step;
    const int64_t dd_row = int64_t(t.d_row_length) * kPanel;
    V total = Isa::load(sum);
    for (int first = 0; first < s.stride && first < s.width; ++first) {  // columns that the same taps reach
      const T* dd[9];
      V w[9];
      int taps = 0;
      for (int ky = 0; ky < 3; ++ky) {
        const int y = row + s.pad_top - ky * s.dilation;
        if (y < 0 || y % s.stride || y / s.stride >= s.out_height) continue;
        for (int kx = 0; kx < 3; ++kx) {
          const int x = first + s.pad_left - kx * s.dilation + t.d_pad_left * s.stride;  // never negative
          if (x % s.stride) continue;
          dd[taps] = dd_ring + y / s.stride % t.d_ring_rows * dd_row + int64_t(x / s.stride) * kPanel;
          w[taps++] = Isa::load(weight + (ky * 3 + kx) * kLanes);
        }
      }
      const int64_t at = int64_t(first) * kPanel;
      total = Isa::add(total, kGather[taps](dd, w, h ? h + at : nullptr, ge + at, ceil_div(s.width - first, s.stride),
                                            int64_t(s.stride) * kPanel));
    }
    Isa::store(sum, total);
  }

  // ----------------------------------------------------------------------------------------------------- moments

  static V load_channels(const T* from, int left) { return left < kLanes ? Isa::load_n(from, left) : Isa::load(from); }

  // Mean and sum of squared deviations of `count` pixels `stride` apart, merged into those of `before` values.
  // Deviations from their own mean: large means cost no precision.
  static void merge_moments(const T* d, int count, int channels, int64_t stride, double before, double* mean,
                            double* square) {
    for (int v = 0; v < channels; v += kLanes) {
      const int left = channels - v;
      V sum = Isa::broadcast(T(0)), squares = Isa::broadcast(T(0)), rest = Isa::broadcast(T(0));
      for (int i = 0; i < count; ++i) sum = Isa::add(sum, load_channels(d + i * stride + v, left));
      const V center = Isa::mul(sum, Isa::broadcast(T(1) / T(count)));
      for (int i = 0; i < count; ++i) {
        const V e = Isa::sub(load_channels(d + i * stride + v, left), center);
        squares = Isa::fmadd(e, e, squares);
        rest = Isa::add(rest, e);
      }
      T centers[kLanes], rests[kLanes], local[kLanes];
      Isa::store(centers, center);
      Isa::store(rests, rest);
      Isa::store(local, squares);
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

  // Scratch: mean and products of a chunk, its pixels in panels: [panels][kMomentPixels][kPanel].
  static void moments(const void* x_, int64_t pixels, int channels, double count, double* mean, double* products,
                      void* scratch_) {
    const int panels = ceil_div(channels, kPanel), size = panels * kPanel;
    T* center = static_cast<T*>(scratch_);
    T* rest = center + size;
    T* product = rest + size;
    T* centered = product + kPanel * kPanel;
    for (int64_t p0 = 0; p0 < pixels; p0 += kMomentPixels) {
      const int now = pixels - p0 < kMomentPixels ? int(pixels - p0) : kMomentPixels;
      const T* x = static_cast<const T*>(x_) + p0 * channels;
      for (int v = 0; v < size; v += kLanes) {
        T* panel = centered + int64_t(v / kPanel) * kMomentPixels * kPanel + v % kPanel;
        const int left = channels - v;
        const auto load = [&](int i) {
          const T* from = x + int64_t(i) * channels + v;
          return left >= kLanes ? Isa::load(from) : left > 0 ? Isa::load_n(from, left) : Isa::broadcast(T(0));
        };
        V sum = Isa::broadcast(T(0)), left_over = Isa::broadcast(T(0));
        for (int i = 0; i < now; ++i) sum = Isa::add(sum, load(i));
        const V c = Isa::mul(sum, Isa::broadcast(T(1) / T(now)));
        for (int i = 0; i < now; ++i) {
          const V e = Isa::sub(load(i), c);
          left_over = Isa::add(left_over, e);
          Isa::store(panel + int64_t(i) * kPanel, e);
        }
        Isa::store(center + v, c);
        Isa::store(rest + v, left_over);
      }
      const double total = count + now, weight = count * now / total;
      for (int i = 0; i < panels; ++i) {
        for (int j = i; j < panels; ++j) {
          for (int k = 0; k < kPanel * kPanel; ++k) product[k] = 0;
          const int64_t panel = int64_t(kMomentPixels) * kPanel;
          outer(centered + i * panel, kPanel, kPanel, centered + j * panel, kPanel, now, product);
          for (int m = 0; m < kPanel; ++m) {
            const int row = i * kPanel + m;
            const double rest_m = double(rest[row]) / now, delta_m = double(center[row]) + rest_m - mean[row];
            double* to = products + int64_t(row) * size + j * kPanel;
            for (int n = 0; n < kPanel; ++n) {
              const int column = j * kPanel + n;
              const double rest_n = double(rest[column]) / now;
              const double delta_n = double(center[column]) + rest_n - mean[column];
              to[n] += double(product[m * kPanel + n]) - rest_m * rest_n * now + delta_m * delta_n * weight;
            }
          }
        }
      }
      for (int i = 0; i < size; ++i) {
        mean[i] += (double(center[i]) + double(rest[i]) / now - mean[i]) * (now / total);
      }
      count = total;
    }
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
      merge_moments(static_cast<const T*>(x) + first * channels, count, channels, channels, double(first), mean,
                    square);
    });
  }

  static void channel_products(const void* a_, const void* b_, const void* center_, int64_t pixels, int channels,
                               double* sums) {
    const T* center = static_cast<const T*>(center_);
    for_chunks(pixels, channels, [&](int64_t first, int count) {
      const T *a = static_cast<const T*>(a_) + first * channels, *b = static_cast<const T*>(b_) + first * channels;
      for (int v = 0; v < channels; v += kLanes) {
        const int left = channels - v;
        const V c = load_channels(center + v, left);
        V sum = Isa::broadcast(T(0)), product = sum;
        for (int i = 0; i < count; ++i) {
          const int64_t at = int64_t(i) * channels + v;
          const V g = load_channels(a + at, left);
          sum = Isa::add(sum, g);
          product = Isa::fmadd(g, Isa::sub(load_channels(b + at, left), c), product);
        }
        T totals[2][kLanes];
        Isa::store(totals[0], sum);
        Isa::store(totals[1], product);
        for (int i = 0; i < min(kLanes, left); ++i) {
          sums[v + i] += double(totals[0][i]);
          sums[channels + v + i] += double(totals[1][i]);
        }
      }
    });
  }

  static void affine(const void* a_, const void* b_, const void* coefficients, void* y_, int64_t pixels, int channels) {
    const T* p = static_cast<const T*>(coefficients);
    for_chunks(pixels, channels, [&](int64_t first, int count) {
      const T *a = static_cast<const T*>(a_) + first * channels, *b = static_cast<const T*>(b_) + first * channels;
      T* y = static_cast<T*>(y_) + first * channels;
      for (int v = 0; v < channels; v += kLanes) {
        const int left = channels - v;
        const V scale_a = load_channels(p + v, left), scale_b = load_channels(p + channels + v, left);
        const V shift = load_channels(p + 2 * channels + v, left);
        for (int i = 0; i < count; ++i) {
          const int64_t at = int64_t(i) * channels + v;
          V sum = Isa::fmadd(scale_a, load_channels(a + at, left), shift);
          if (b_) sum = Isa::fmadd(scale_b, load_channels(b + at, left), sum);
          left < kLanes ? Isa::store_n(y + at, sum, left) : Isa::store(y + at, sum);
        }
      }
    });
  }

  static void matrix_add(const void* x, const void* w_, const void* bias_, const void* residual_, void* y_,
                         int64_t pixels, int channels) {
    const T* bias = static_cast<const T*>(bias_);
    constexpr int kPixels = 1024;
    for (int64_t first = 0; first < pixels; first += kPixels) {
      const int count = pixels - first < kPixels ? int(pixels - first) : kPixels;
      const T* segment[1] = {static_cast<const T*>(x) + first * channels};
      for (int n = 0; n < channels; n += kPanel) {
        const T* residual = residual_ ? static_cast<const T*>(residual_) + first * channels + n : nullptr;
        F::template panel<typename F::Output>(
            {segment, 1, channels, 0, channels}, static_cast<const T*>(w_) + int64_t(n) * channels, bias + n,
            {static_cast<T*>(y_) + first * channels + n, nullptr, channels, residual, true, false, 0}, count,
            min(kPanel, channels - n));
      }
    }
  }

  // ----------------------------------------------------------------------------------------------------- a pass

  static void train(const TrainingStep& t, const TrainingPass& a, void* scratch_, const void* zeros_) {
    const Step& s = t.step;
    T* scratch = static_cast<T*>(scratch_);
    const T* zeros = static_cast<const T*>(zeros_);
    T *ring = scratch, *d = scratch + t.d_offset, *dd = scratch + t.dd_offset, *ge = scratch + t.ge_offset;
    const T** rows = reinterpret_cast<const T**>(scratch + t.rows_offset);
    const int64_t ring_row = int64_t(s.row_length) * kPanel, dd_row = int64_t(t.d_row_length) * kPanel;
    const T *x = static_cast<const T*>(a.x), *dz = static_cast<const T*>(a.dz);
    const bool expands = s.source == Step::kExpand;
    const bool below = a.dx || a.expand_gradient || a.depthwise_gradient;  // what dd is needed for
    const bool back = a.dx || a.expand_gradient;                           // what ge is needed for
    for (int64_t i = 0; i < s.ring_rows * ring_row; ++i) ring[i] = 0;
    for (int64_t i = 0; below && i < t.d_ring_rows * dd_row; ++i) dd[i] = 0;

    for (int c = 0; c < s.hidden_channels; c += kPanel) {
      const int channels = min(kPanel, s.hidden_channels - c), panel = c / kPanel;
      const int width = ceil_div(channels, kLanes) * kLanes;
      const T* coefficients = static_cast<const T*>(a.coefficients) + int64_t(panel) * 6 * kPanel;
      double count = a.count;
      int filled = 0, emitted = 0;
      for (int o0 = 0; o0 < s.out_height; o0 += s.stripe) {
        const int o1 = min(o0 + s.stripe, s.out_height), pixels = (o1 - o0) * s.out_width;
        const int top = o0 * s.stride - s.pad_top, bottom = (o1 - 1) * s.stride - s.pad_top + 2 * s.dilation + 1;
        const int h0 = max(max(top, 0), filled), h1 = max(h0, min(bottom, s.height));
        filled = h1;
        if (expands && h1 > h0) {
          const T* segment[1] = {x + int64_t(h0) * s.width * s.in_channels};
          F::expand(s, segment, static_cast<const T*>(a.expand) + int64_t(c) * s.in_channels,
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
          F::template depthwise<typename F::Raw>({static_cast<const T*>(a.depthwise) + int64_t(c + v) * 9, zeros, d + v,
                                                  int64_t(s.out_width) * kPanel, kPanel, s.dilation},
                                                 s.stride, rows, o1 - o0, s.out_width);
        }
        if (a.mean) {
          merge_moments(d, pixels, channels, kPanel, count, a.mean + c, a.square + c);
          count += pixels;
        }
        if (!dz) continue;

        T sums[3 * kPanel] = {};
        const T* dz_rows = dz + int64_t(o0) * s.out_width * s.out_channels;
        project_back(t, dz_rows, static_cast<const T*>(a.project_back) + int64_t(c) * s.out_channels, coefficients,
                     {d, below ? dd : nullptr, nullptr, sums}, o0 % t.d_ring_rows * s.out_width, pixels, channels);
        if (a.project_gradient) {
          outer(dz_rows, s.out_channels, s.out_channels, d, channels, pixels,
                static_cast<T*>(a.project_gradient) + int64_t(panel) * s.out_channels * kPanel);
        }
        if (a.depthwise_gradient) {
          T* to = static_cast<T*>(a.depthwise_gradient) + int64_t(panel) * 9 * kPanel;
          for (int o = o0; o < o1; ++o) {
            for (int v = 0; v < width; v += kLanes) {
              for (int i = 0; i < 3; ++i) {
                const int row = o * s.stride - s.pad_top + i * s.dilation;
                rows[i * s.dilation] = row < 0 || row >= s.height ? zeros : ring + row % s.ring_rows * ring_row + v;
              }
              filter_gradient(s, rows, dd + o % t.d_ring_rows * dd_row + t.d_pad_left * kPanel + v, to + v);
            }
          }
        }
        const int complete = o1 == s.out_height ? s.height : max(0, min(s.height, o1 * s.stride - s.pad_top));
        for (; back && emitted < complete; emitted = min(emitted + t.chunk_rows, complete)) {
          const int end = min(emitted + t.chunk_rows, complete), count = (end - emitted) * s.width;
          for (int row = emitted; row < end; ++row) {
            for (int v = 0; v < width; v += kLanes) {
              const T* h = ring + row % s.ring_rows * ring_row + s.pad_left * kPanel + v;
              filter_back_row(t, static_cast<const T*>(a.depthwise) + int64_t(c + v) * 9, dd + v, expands ? h : nullptr,
                              ge + int64_t(row - emitted) * s.width * kPanel + v, row, sums + 2 * kPanel + v);
            }
          }
          const int64_t at = int64_t(emitted) * s.width * s.in_channels;
          if (a.expand_gradient) {
            outer(x + at, s.in_channels, s.in_channels, ge, channels, count,
                  static_cast<T*>(a.expand_gradient) + int64_t(panel) * s.in_channels * kPanel);
          }
          if (a.dx && expands) {
            const T* segment[1] = {ge};
            for (int n = 0; n < s.in_channels; n += kPanel) {
              const int now = min(kPanel, s.in_channels - n);
              const T* w = static_cast<const T*>(a.expand_back) + int64_t(n) * s.hidden_channels;
              F::template panel<typename F::Output>(
                  {segment, 1, channels, 0, kPanel}, w + int64_t(c) * ceil_div(now, kLanes) * kLanes, zeros,
                  {static_cast<T*>(a.dx) + at + n, nullptr, s.in_channels, nullptr, c > 0, false, 0}, count, now);
            }
          } else if (a.dx) {
            for (int i = 0; i < count; ++i) {
              T* to = static_cast<T*>(a.dx) + at + int64_t(i) * s.in_channels + c;
              for (int v = 0; v < channels; v += kLanes) {
                const V g = Isa::load(ge + int64_t(i) * kPanel + v);
                channels - v < kLanes ? Isa::store_n(to + v, g, channels - v) : Isa::store(to + v, g);
              }
            }
          }
        }
        for (int i = 0; i < 3 * kPanel; ++i) a.sums[int64_t(panel) * 3 * kPanel + i] += double(sums[i]);
      }
    }
  }

  static constexpr Kernel kernel(const char* name, Dtype dtype, const char* const* features) {
    Kernel k = F::kernel(name, dtype, features);
    k.train = train;
    k.moments = moments;
    k.channel_moments = channel_moments;
    k.channel_products = channel_products;
    k.affine = affine;
    k.matrix_add = matrix_add;
    return k;
  }
};
