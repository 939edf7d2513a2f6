// The training passes over a batch: their schedule, images on threads, and the sums of what the threads found.
//
// Each thread has the same images at every run and sums of its own, which are added in the order of the threads:
// results are the same from run to run at the same number of threads. A thread's sums take three times the weights of
// the block (float, and double to which they are moved every thousand pixels), whatever the batch.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "network.h"
#include "workspace.h"

namespace mnv2_fused {
namespace {

// The buffers of a pass through one panel of an image; what does not fit takes single rows.
constexpr int64_t kBufferBytes = 256 << 10;

int64_t element_size(const Kernel& kernel) { return mnv2_fused::element_size(kernel.dtype); }
int64_t sum_size(const Kernel& kernel) { return mnv2_fused::sum_size(kernel.dtype); }

struct Schedule {
  TrainingStep t{};
  std::vector<int32_t> h_offsets, d_offsets;
  int64_t zeros_size = 0;

  Schedule(const Kernel& kernel, const Layer& layer, int64_t height, int64_t width) {
    const Tiles& tiles = kernel.tiles;
    Step& s = t.step;
    s.kind = Layer::kBlock;
    s.source = layer.expand ? Step::kExpand : Step::kCopy;
    s.in_channels = int(layer.in_channels);
    s.hidden_channels = int(layer.hidden_channels);
    s.out_channels = int(layer.out_channels);
    s.stride = int(layer.stride);
    s.dilation = int(layer.dilation);
    s.pad_left = int(layer.pad_left);
    s.pad_right = int(layer.pad_right);
    s.pad_top = int(layer.pad_top);
    const int64_t out_height = out_extent(height, layer.pad_top + layer.pad_bottom, s.stride, s.dilation);
    const int64_t out_width = out_extent(width, layer.pad_left + layer.pad_right, s.stride, s.dilation);
    s.height = int(height);
    s.width = int(width);
    s.out_height = int(out_height);
    s.out_width = int(out_width);
    const int64_t row_length = layer.pad_left + width + layer.pad_right, reach = 2 * layer.dilation;
    const int64_t d_pad_left = ceil_div(std::max<int64_t>(0, reach - layer.pad_left), s.stride);
    const int64_t d_row_length = d_pad_left + std::max(out_width, (width - 1 + layer.pad_left) / s.stride + 1);
    s.row_length = int(row_length);
    t.d_pad_left = int(d_pad_left);
    t.d_row_length = int(d_row_length);

    const auto ring_rows = [&](int64_t stripe) { return std::min((stripe - 1) * s.stride + reach + 1, height); };
    const auto d_ring_rows = [&](int64_t stripe) { return std::min(stripe + reach / s.stride, out_height); };
    // Of so many values of an activation, in elements of sums.
    const auto slots = [&](int64_t values) { return ceil_div(values, tiles.slot); };
    const auto kept = [&](int64_t stripe) { return tiles.slot > 1 ? slots(stripe * out_width * tiles.panel) : 0; };
    const auto size = [&](int64_t stripe) {
      return tiles.panel * (ring_rows(stripe) * row_length + stripe * out_width + d_ring_rows(stripe) * d_row_length) +
             kept(stripe) + slots(stripe * s.stride * width * tiles.panel);
    };
    int64_t stripe = out_height;
    while (stripe > 1 && size(stripe) * sum_size(kernel) > kBufferBytes) --stripe;
    if (size(stripe) > INT32_MAX) throw std::length_error("x is too large: its rows do not fit into 2^31 elements");
    s.stripe = int(stripe);
    s.ring_rows = int(ring_rows(stripe));
    t.d_ring_rows = int(d_ring_rows(stripe));
    t.chunk_rows = int(stripe * s.stride);
    t.d_offset = s.ring_rows * row_length * tiles.panel;
    t.kept_offset = t.d_offset + (kept(stripe) ? stripe * out_width * tiles.panel : 0);
    t.dd_offset = t.d_offset + stripe * out_width * tiles.panel + kept(stripe);
    t.ge_offset = t.dd_offset + t.d_ring_rows * d_row_length * tiles.panel;
    t.dx_offset = t.ge_offset + slots(t.chunk_rows * width * tiles.panel);
    t.slots_offset = t.dx_offset;
    int64_t slot_rows = 0;
    if (tiles.slot > 1) {
      const int64_t pixels = std::max(stripe * out_width, t.chunk_rows * width);
      slot_rows = slots(std::min<int64_t>(pixels, kPixelsPerFlush));
      if (layer.expand && s.hidden_channels > tiles.panel) t.slots_offset += height * width * s.in_channels;
    }
    t.rows_offset = round_up(t.slots_offset + slot_rows * std::max(s.in_channels, s.out_channels), 16);
    const int64_t pointers = (stripe - 1) * s.stride + reach + 1;
    t.scratch_size = round_up(t.rows_offset + pointers * 8 / sum_size(kernel) + 1, 16);
    zeros_size = round_up((row_length + 1) * tiles.panel, 16);

    h_offsets = pixel_offsets(s.ring_rows, row_length, s.pad_left, width, tiles);
    d_offsets = pixel_offsets(t.d_ring_rows, d_row_length, d_pad_left, out_width, tiles);
    s.pixel_offsets = h_offsets.data();
    t.d_pixel_offsets = d_offsets.data();
  }
  Schedule(const Schedule&) = delete;
};

// Where a worker's memory holds an Accumulator.
struct Place {
  int64_t rows = 0;     // of each panel; 0: not asked for
  int64_t exact = 0;    // offset of the doubles
  int64_t rounded = 0;  // offset of what the row adds up in
};

// Merges mean and squared deviations of `now` values into those of `count`.
void merge(double* count, double* mean, double* square, double now, double new_mean, double new_square) {
  const double delta = new_mean - *mean, total = *count + now;
  *mean += delta * (now / total);
  *square += new_square + delta * delta * (*count * now / total);
  *count = total;
}

// T is what the row adds up in.
template <class T>
struct Runner {
  const Kernel& kernel;
  const TrainingStep& t;
  const BlockPass& pass;
  const int64_t panel = kernel.tiles.panel, panels = ceil_div(t.step.hidden_channels, panel), hidden = panels * panel;
  const int workers;
  bool flushes = false;  // whether a worker has so many pixels that it needs the doubles
  Place expand, depthwise, project;
  int64_t moments_offset = 0, sums_offset = 0, scratch_offset = 0, worker_bytes = 0;
  int64_t expand_offset = 0, bias_offset = 0, expand_back_offset = 0, depthwise_offset = 0, project_back_offset = 0,
          coefficients_offset = 0, zeros_offset = 0, shared_bytes = 0;
  int64_t padded_bytes = 0;  // where what the weights leave is 0
  char* memory = nullptr;

  Runner(const Kernel& k, const Schedule& schedule, const BlockPass& p, int threads)
      : kernel(k), t(schedule.t), pass(p), workers(int(std::min<int64_t>(threads, p.batch))) {
    const Step& s = t.step;
    const auto claim = [](int64_t* total, int64_t bytes) {
      const int64_t at = *total;
      *total += round_up(bytes, 64);
      return at;
    };
    const int64_t pixels = std::max(int64_t(s.height) * s.width, int64_t(s.out_height) * s.out_width);
    flushes = ceil_div(p.batch, workers) * pixels >= kPixelsPerFlush;
    const auto place = [&](const double* wanted, int64_t rows) {
      Place a;
      if (!wanted) return a;
      a.rows = rows;
      if (flushes) a.exact = claim(&worker_bytes, hidden * rows * 8);
      a.rounded = claim(&worker_bytes, hidden * rows * int64_t(sizeof(T)));
      return a;
    };
    expand = place(pass.expand_gradient, s.in_channels);
    depthwise = place(pass.depthwise_gradient, 9);
    project = place(pass.project_gradient, s.out_channels);
    moments_offset = claim(&worker_bytes, 2 * hidden * 8);
    sums_offset = claim(&worker_bytes, 4 * hidden * 8);
    scratch_offset = claim(&worker_bytes, t.scratch_size * int64_t(sizeof(T)));

    const auto weights = [&](int64_t n) { return claim(&shared_bytes, n * int64_t(sizeof(T))); };
    const int64_t slot = kernel.tiles.slot;
    bias_offset = weights(hidden);
    coefficients_offset = weights(hidden * 6);
    zeros_offset = weights(schedule.zeros_size);
    padded_bytes = shared_bytes;
    depthwise_offset = weights(hidden * 9);
    expand_offset = weights(hidden * ceil_div(s.in_channels, slot));
    expand_back_offset = weights(round_up(s.in_channels, panel) * ceil_div(s.hidden_channels, slot));
    project_back_offset = weights(hidden * ceil_div(s.out_channels, slot));
  }

  int64_t bytes() const { return shared_bytes + workers * worker_bytes; }
  template <class U>
  U* shared(int64_t offset) const {
    return reinterpret_cast<U*>(memory + offset);
  }
  template <class U>
  U* own(int worker, int64_t offset) const {
    return reinterpret_cast<U*>(memory + shared_bytes + worker * worker_bytes + offset);
  }

  // In two parts that take about as long.
  static constexpr int kParts = 2;
  void pack(int part) const {
    const Step& s = t.step;
    const auto matrix = [&](const void* w, int64_t n, int64_t k, bool transposed, int64_t offset) {
      pack_matrix(kernel.tiles, kernel.dtype, w, n, k, transposed, shared<T>(offset));
    };
    if (part == 0) {
      if (pass.expand_weight) matrix(pass.expand_weight, s.hidden_channels, s.in_channels, false, expand_offset);
      return;
    }
    if (pass.expand_weight && pass.dx) {
      matrix(pass.expand_weight, s.in_channels, s.hidden_channels, true, expand_back_offset);
    }
    if (pass.dz) matrix(pass.project_weight, s.hidden_channels, s.out_channels, true, project_back_offset);
    pack_depthwise(kernel.tiles, kernel.dtype, pass.depthwise_weight, s.hidden_channels, shared<T>(depthwise_offset));
    std::memset(memory, 0, padded_bytes);
    if (pass.expand_weight) {
      std::copy_n(static_cast<const T*>(pass.expand_bias), s.hidden_channels, shared<T>(bias_offset));
    }
    for (int64_t i = 0; pass.dz && i < 6; ++i) {
      for (int64_t c = 0; c < s.hidden_channels; ++c) {
        shared<T>(coefficients_offset)[(c / panel * 6 + i) * panel + c % panel] =
            static_cast<const T*>(pass.coefficients)[i * s.hidden_channels + c];
      }
    }
  }

  void work(int worker) const {
    const FlushDenormals denormals;
    const Step& s = t.step;
    std::memset(own<char>(worker, 0), 0, scratch_offset);
    TrainingPass a{};
    a.expand = shared<T>(expand_offset);
    a.expand_bias = shared<T>(bias_offset);
    a.expand_back = shared<T>(expand_back_offset);
    a.project_back = shared<T>(project_back_offset);
    a.depthwise = shared<T>(depthwise_offset);
    a.coefficients = shared<T>(coefficients_offset);
    a.mean = pass.mean ? own<double>(worker, moments_offset) : nullptr;
    a.square = pass.mean ? a.mean + hidden : nullptr;
    a.sums = own<double>(worker, sums_offset);
    a.g_sums = pass.g_sums;
    a.batch = through_statistics();
    const auto accumulator = [&](const Place& at) {
      if (!at.rows) return Accumulator{nullptr, nullptr, 0, 0};
      return Accumulator{own<T>(worker, at.rounded), flushes ? own<double>(worker, at.exact) : nullptr, at.rows, 0};
    };
    a.expand_gradient = accumulator(expand);
    a.depthwise_gradient = accumulator(depthwise);
    a.project_gradient = accumulator(project);
    const int64_t pixels = int64_t(s.out_height) * s.out_width, element = element_size(kernel);
    const int64_t in = int64_t(s.height) * s.width * s.in_channels * element, out = pixels * s.out_channels * element;
    for (int64_t i = image_begin(worker); i < image_begin(worker + 1); ++i) {
      a.x = static_cast<const char*>(pass.x) + i * in;
      a.dz = pass.dz ? static_cast<const char*>(pass.dz) + i * out : nullptr;
      a.dx = pass.dx ? static_cast<char*>(pass.dx) + i * in : nullptr;
      a.count = double(i - image_begin(worker)) * double(pixels);
      kernel.train(t, a, own<T>(worker, scratch_offset), shared<T>(zeros_offset));
    }
  }

  // Whether dd depends on d: the coefficients q are 0 where d's BatchNorm is frozen.
  bool through_statistics() const {
    const T* q = static_cast<const T*>(pass.coefficients) + 4 * t.step.hidden_channels;
    return pass.dz && std::any_of(q, q + t.step.hidden_channels, [](T v) { return v != 0; });
  }

  int64_t image_begin(int worker) const { return pass.batch * worker / workers; }

  // What the workers found for the hidden channels of panel `p`.
  void collect(int64_t p) const {
    const Step& s = t.step;
    const int64_t first = p * panel, width = std::min<int64_t>(panel, s.hidden_channels - first);
    const auto gather = [&](const Place& from, double* to) {
      for (int64_t i = 0; i < from.rows; ++i) {
        double* row = to + i * s.hidden_channels + first;
        for (int w = 0; w < workers; ++w) {
          const int64_t at = (p * from.rows + i) * panel;
          const T* rounded = own<T>(w, from.rounded) + at;
          const double* exact = own<double>(w, from.exact) + at;
          for (int64_t j = 0; j < width; ++j) {
            row[j] = (w ? row[j] : 0) + ((flushes ? exact[j] : 0) + double(rounded[j]));
          }
        }
      }
    };
    gather(expand, pass.expand_gradient);
    gather(depthwise, pass.depthwise_gradient);
    gather(project, pass.project_gradient);
    for (int64_t c = first; c < first + width; ++c) {
      for (int i = 0; pass.sums && i < 4; ++i) {
        double sum = 0;
        for (int w = 0; w < workers; ++w) sum += own<double>(w, sums_offset)[(p * 4 + i) * panel + c - first];
        pass.sums[i * s.hidden_channels + c] = sum;
      }
      if (!pass.mean) continue;
      double count = 0;
      pass.mean[c] = pass.square[c] = 0;
      for (int w = 0; w < workers; ++w) {
        const double now = double(image_begin(w + 1) - image_begin(w)) * s.out_height * s.out_width;
        const double* found = own<double>(w, moments_offset) + c;
        merge(&count, pass.mean + c, pass.square + c, now, found[0], found[hidden]);
      }
    }
  }
};

// body(worker) for each worker, on the caller's threads.
template <class Body>
void on_workers(int workers, Parallel parallel, const Body& body) {
  if (workers == 1) return body(0);
  parallel(
      workers,
      [](int64_t begin, int64_t end, void* b) {
        for (int64_t w = begin; w < end; ++w) (*static_cast<const Body*>(b))(int(w));
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// body(panel, worker) for `panels` panels shared out to the workers.
template <class Body>
void on_panels(int64_t panels, int threads, Parallel parallel, const Body& body) {
  const int workers = int(std::min<int64_t>(threads, panels));
  on_workers(workers, parallel, [&](int w) {
    for (int64_t p = panels * w / workers; p < panels * (w + 1) / workers; ++p) body(p, w);
  });
}

template <class T>
void run_typed(const Kernel& kernel, const Schedule& schedule, const BlockPass& pass, int threads, Parallel parallel) {
  Runner<T> runner(kernel, schedule, pass, threads);
  const Arena arena(runner.bytes());
  runner.memory = arena.data();
  on_panels(runner.kParts, threads, parallel, [&](int64_t part, int) { runner.pack(int(part)); });
  on_workers(runner.workers, parallel, [&](int worker) { runner.work(worker); });
  on_panels(runner.panels, threads, parallel, [&](int64_t p, int) { runner.collect(p); });
}

}  // namespace

void run(const Kernel& kernel, const Layer& layer, int64_t height, int64_t width, const BlockPass& pass, int threads,
         Parallel parallel) {
  const Schedule schedule(kernel, layer, height, width);
  if (kernel.dtype == Dtype::kFloat64) {
    run_typed<double>(kernel, schedule, pass, threads, parallel);
  } else {
    run_typed<float>(kernel, schedule, pass, threads, parallel);
  }
}

void moments(const Kernel& kernel, const void* x, int64_t pixels, int64_t channels, double* mean, double* products,
             int threads, Parallel parallel) {
  const int64_t panel = kernel.tiles.panel, size = round_up(channels, panel), chunks = ceil_div(pixels, kMomentPixels);
  const int workers = int(std::min<int64_t>(threads, chunks));
  const auto begin = [&](int w) { return std::min(chunks * w / workers * kMomentPixels, pixels); };
  const int64_t results = size + size * size, scratch = 2 * size + size * kMomentPixels;
  const int64_t worker_bytes = round_up((results + scratch) * 8, 64);
  const Arena arena(workers * worker_bytes);
  on_workers(workers, parallel, [&](int w) {
    const FlushDenormals denormals;
    double* own = reinterpret_cast<double*>(arena.data() + w * worker_bytes);
    std::fill_n(own, results, 0.0);
    const char* from = static_cast<const char*>(x) + begin(w) * channels * element_size(kernel);
    kernel.moments(from, begin(w + 1) - begin(w), int(channels), 0, own, own + size, own + results);
  });
  double count = 0;
  std::fill_n(mean, channels, 0.0);
  std::fill_n(products, channels * channels, 0.0);
  for (int w = 0; w < workers; ++w) {
    const double* own = reinterpret_cast<const double*>(arena.data() + w * worker_bytes);
    const double now = double(begin(w + 1) - begin(w)), total = count + now;
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = 0; j < channels; ++j) {
        const bool stored = i / panel <= j / panel;
        const double product = own[size + (stored ? i * size + j : j * size + i)];
        products[i * channels + j] += product + (own[i] - mean[i]) * (own[j] - mean[j]) * (count * now / total);
      }
    }
    for (int64_t i = 0; i < channels; ++i) mean[i] += (own[i] - mean[i]) * (now / total);
    count = total;
  }
}

namespace {

template <class T>
void covariance_times_typed(const Kernel& kernel, const double* covariance, const T* weight, int64_t channels,
                            int64_t hidden, double* product, double* variance, int threads, Parallel parallel) {
  const int64_t panel = kernel.tiles.panel, rows = round_up(channels, panel);
  const int64_t own = (channels + rows) * panel, padded = channels * rows;
  const Arena arena((padded + threads * own) * 8);
  double* matrix = reinterpret_cast<double*>(arena.data());
  for (int64_t i = 0; i < channels; ++i) {
    std::copy_n(covariance + i * channels, channels, matrix + i * rows);
    std::fill_n(matrix + i * rows + channels, rows - channels, 0.0);
  }
  on_panels(ceil_div(hidden, panel), threads, parallel, [&](int64_t p, int worker) {
    double *w = matrix + padded + worker * own, *to = w + channels * panel;
    const int64_t first = p * panel, width = std::min(panel, hidden - first);
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t c = 0; c < panel; ++c) w[i * panel + c] = c < width ? double(weight[(first + c) * channels + i]) : 0;
    }
    kernel.covariance_times(matrix, w, int(channels), to);
    for (int64_t i = 0; product && i < channels; ++i) std::copy_n(to + i * panel, width, product + i * hidden + first);
    if (!variance) return;
    std::fill_n(variance + first, width, 0.0);
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t c = 0; c < width; ++c) variance[first + c] += w[i * panel + c] * to[i * panel + c];
    }
  });
}

}  // namespace

void covariance_times(const Kernel& kernel, const double* covariance, const void* weight, int64_t channels,
                      int64_t hidden, double* product, double* variance, int threads, Parallel parallel) {
  const auto typed = [&](const auto* w) {
    covariance_times_typed(kernel, covariance, w, channels, hidden, product, variance, threads, parallel);
  };
  kernel.dtype == Dtype::kFloat64 ? typed(static_cast<const double*>(weight))
                                  : typed(static_cast<const float*>(weight));
}

void gram(const Kernel& kernel, const void* weight, const void* q, int64_t channels, int64_t hidden, void* result,
          int threads, Parallel parallel) {
  const int64_t panel = kernel.tiles.panel, element = sum_size(kernel), own = (channels + hidden) * panel * element;
  const Arena arena(threads * own);
  on_panels(ceil_div(channels, panel), threads, parallel, [&](int64_t p, int worker) {
    char *to = arena.data() + worker * own, *scratch = to + channels * panel * element;
    const int64_t first = p * panel, width = std::min(panel, channels - first);
    kernel.gram(weight, q, int(hidden), int(channels), int(first), to, scratch);
    for (int64_t i = 0; i < channels; ++i) {
      std::memcpy(static_cast<char*>(result) + (i * channels + first) * element, to + i * panel * element,
                  width * element);
    }
  });
  if (kernel.dtype != Dtype::kBFloat16) return;
  float* matrix = static_cast<float*>(result);
  for (int64_t i = 0; i < channels * channels; ++i) matrix[i] = widen(round_to_bfloat16(matrix[i]));
}

namespace {

// body(first, count, worker) for each worker's share of the pixels; few pixels are not worth a thread.
template <class Body>
int on_pixels(int64_t pixels, int threads, Parallel parallel, const Body& body) {
  const int workers = int(std::clamp<int64_t>(pixels / 256, 1, threads));
  on_workers(workers, parallel, [&](int w) {
    const FlushDenormals denormals;
    const int64_t begin = pixels * w / workers;
    body(begin, pixels * (w + 1) / workers - begin, w);
  });
  return workers;
}

}  // namespace

void channel_moments(const Kernel& kernel, const void* x, int64_t pixels, int64_t channels, double* mean,
                     double* square, int threads, Parallel parallel) {
  std::vector<double> found(size_t(threads) * 2 * channels);
  const int workers = on_pixels(pixels, threads, parallel, [&](int64_t first, int64_t count, int w) {
    double* own = &found[size_t(w) * 2 * channels];
    kernel.channel_moments(static_cast<const char*>(x) + first * channels * element_size(kernel), count, int(channels),
                           own, own + channels);
  });
  for (int64_t c = 0; c < channels; ++c) {
    double count = 0;
    mean[c] = square[c] = 0;
    for (int w = 0; w < workers && pixels; ++w) {
      const double* own = &found[size_t(w) * 2 * channels + c];
      const double now = double(pixels * (w + 1) / workers - pixels * w / workers);
      merge(&count, mean + c, square + c, now, own[0], own[channels]);
    }
  }
}

void channel_products(const Kernel& kernel, const void* a, const void* b, const void* center, const void* gate,
                      int64_t pixels, int64_t channels, double* sums, int threads, Parallel parallel) {
  std::vector<double> found(size_t(threads) * 2 * channels);
  const int workers = on_pixels(pixels, threads, parallel, [&](int64_t first, int64_t count, int w) {
    const int64_t at = first * channels * element_size(kernel);
    kernel.channel_products(static_cast<const char*>(a) + at, static_cast<const char*>(b) + at, center, gate, count,
                            int(channels), &found[size_t(w) * 2 * channels]);
  });
  for (int64_t i = 0; i < 2 * channels; ++i) {
    sums[i] = 0;
    for (int w = 0; w < workers; ++w) sums[i] += found[size_t(w) * 2 * channels + i];
  }
}

void affine(const Kernel& kernel, const void* a, const void* b, const void* coefficients, const void* gate, bool relu6,
            void* y, int64_t pixels, int64_t channels, int threads, Parallel parallel) {
  on_pixels(pixels, threads, parallel, [&](int64_t first, int64_t count, int) {
    const int64_t at = first * channels * element_size(kernel);
    kernel.affine(static_cast<const char*>(a) + at, b ? static_cast<const char*>(b) + at : nullptr, coefficients, gate,
                  relu6, static_cast<char*>(y) + at, count, int(channels));
  });
}

void matrix_add(const Kernel& kernel, const void* x, const void* matrix, const void* bias, const void* residual,
                void* y, int64_t pixels, int64_t channels, int threads, Parallel parallel) {
  const int64_t size = round_up(channels, kernel.tiles.panel);
  const int64_t packed = size * ceil_div(channels, kernel.tiles.slot), element = sum_size(kernel);
  const Arena arena((packed + size) * element);
  char* padded = arena.data() + packed * element;
  pack_matrix(kernel.tiles, kernel.dtype, matrix, channels, channels, false, arena.data());
  std::memset(padded, 0, size * element);
  std::memcpy(padded, bias, channels * element);
  on_pixels(pixels, threads, parallel, [&](int64_t first, int64_t count, int) {
    const int64_t at = first * channels * element_size(kernel);
    kernel.matrix_add(static_cast<const char*>(x) + at, arena.data(), padded,
                      residual ? static_cast<const char*>(residual) + at : nullptr, static_cast<char*>(y) + at, count,
                      int(channels));
  });
}

}  // namespace mnv2_fused
