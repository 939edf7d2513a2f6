// Runs a program: images one per thread, depth first, and what is left over shared by all threads.
#include "network.h"

#include <xmmintrin.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "workspace.h"

namespace mnv2_fused {

namespace {

// Workers that go through the same phases. A phase is over when its tasks are done, not when all workers have come:
// whoever runs takes what is left, so that no worker waits for one that the thread pool has not started.
class Team {
 public:
  Team(int size, int phases) : size_(size), counters_(size_t(phases) * (size + 1)) {}
  int size() const { return size_; }

  struct Worker {
    Team* team;
    int index;
    int phase = 0;

    template <class Task>
    void run(int tasks, const Task& task) {
      const int size = team->size_;
      Counter* next = &team->counters_[size_t(phase++) * (size + 1)];
      std::atomic<int>& done = next[size].value;
      for (int i = 0; i < size; ++i) {  // one's own share first: its data is in this core's cache
        const int owner = (index + i) % size;
        const int begin = int(int64_t(tasks) * owner / size), end = int(int64_t(tasks) * (owner + 1) / size);
        for (;;) {
          if (begin + next[owner].value.load(std::memory_order_relaxed) >= end) break;
          const int t = begin + next[owner].value.fetch_add(1, std::memory_order_relaxed);
          if (t >= end) break;
          task(t);
          done.fetch_add(1, std::memory_order_release);
        }
      }
      for (int spins = 0; done.load(std::memory_order_acquire) < tasks; ++spins) {
        spins < 4096 ? _mm_pause() : std::this_thread::yield();
      }
    }
  };

 private:
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };
  int size_;
  std::vector<Counter> counters_;
};

// Tells where the time of a call goes: to the step that has just been done.
class Stopwatch {
 public:
  explicit Stopwatch(double* seconds) : seconds_(seconds) { lap(-1); }
  void lap(int step) {
    if (!seconds_) return;
    const auto now = std::chrono::steady_clock::now();
    if (step >= 0) seconds_[step] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  double* seconds_;
  std::chrono::steady_clock::time_point last_;
};

struct Runner {
  const Program& program;
  const Call& call;
  const int threads;
  const int64_t element = element_size(program.kernel->dtype), sum = sum_size(program.kernel->dtype);
  const int64_t x_element = call.image.wide ? sum : program.x_element(), y_element = program.y_element();
  const bool linear = program.steps.back().kind == Layer::kLinear;
  char *zeros = nullptr, *features = nullptr, *partials = nullptr, *workers = nullptr;

  // In bytes, multiples of a cache line.
  int64_t features_size() const { return linear ? round_up(call.batch * program.features, 64) * element : 0; }
  int64_t worker_size() const { return 2 * program.activation_size * element + program.scratch_size * sum; }
  int64_t arena_size() const {
    return (program.zeros_size + program.partial_size) * sum + features_size() + threads * worker_size();
  }
  void use(char* arena) {
    zeros = arena;
    features = zeros + program.zeros_size * sum;
    partials = features + features_size();
    workers = partials + program.partial_size * sum;
    std::memset(zeros, 0, program.zeros_size * sum);
  }
  char* activation(int worker, int which) const {
    return workers + worker * worker_size() + which * program.activation_size * element;
  }
  char* scratch(int worker) const { return activation(worker, 2); }

  // One image through all layers but the classifier. `run(tasks, task)` runs a phase; activations are `owner`'s.
  template <class Phase>
  void image(int64_t index, int owner, int worker, bool shared, const Phase& phase) const {
    const Kernel& kernel = *program.kernel;
    Image image = call.image;
    const char* x = static_cast<const char*>(call.x) + index * call.stride_batch * x_element;
    image.data = x;
    const size_t count = program.steps.size() - linear;
    const int slices = shared ? threads : 1;
    Stopwatch watch(worker == 0 ? call.seconds : nullptr);
    for (size_t i = 0; i < count; ++i) {
      const Step& s = program.steps[i];
      char* y = activation(owner, i % 2);
      if (i + 1 == count) {
        const int64_t size = program.flat ? (linear ? program.features : program.out_channels) : program.map_size();
        y = linear ? features + index * size * element : static_cast<char*>(call.y) + index * size * y_element;
      }
      switch (s.kind) {
        case Layer::kConv3x3:
          phase(slices, [&](int t) {
            const Slice rows = slice_of(s, kernel.tiles, 0, t, slices);
            kernel.conv(s, call.packed, image, y, scratch(worker), zeros, rows.begin, rows.end);
          });
          break;
        case Layer::kBlock:
          if (!shared) {
            kernel.block(s, call.packed, x, image, y, scratch(worker), zeros, 0, s.out_height, 0, s.groups, nullptr);
            break;
          }
          phase(slices, [&](int t) {
            for (int g = 0; g < s.groups; ++g) {
              const Slice rows = slice_of(s, kernel.tiles, g, t, slices);
              if (rows.begin == rows.end) continue;
              const int64_t size = int64_t(s.out_height) * s.out_width * s.out_channels;
              kernel.block(s, call.packed, x, image, y, scratch(worker), zeros, rows.begin, rows.end, g, g + 1,
                           s.groups > 1 ? partials + g * size * sum : nullptr);
            }
          });
          if (s.groups > 1) {
            phase(slices, [&](int t) {
              const int64_t pixels = int64_t(s.out_height) * s.out_width;
              kernel.combine(s, call.packed, partials, x, y, int(pixels * t / slices), int(pixels * (t + 1) / slices));
            });
          }
          break;
        case Layer::kPointwise:
          phase(slices, [&](int t) {
            const Slice panels = slice_of(s, kernel.tiles, 0, t, slices);
            kernel.pointwise(s, call.packed, x, y, scratch(worker), panels.begin, panels.end);
          });
          break;
        case Layer::kPool:
          phase(1, [&](int) { kernel.pool(s, call.packed, x, y); });
          break;
        case Layer::kLinear:
          break;
      }
      x = y;
      watch.lap(int(i));
    }
  }

  int panel_count(const Step& s) const {
    const int panel = program.kernel->tiles.panel;
    return (s.out_channels + panel - 1) / panel;
  }

  void classify(int slice, int slices) const {
    const Step& s = program.steps.back();
    const int panels = panel_count(s);
    program.kernel->linear(s, call.packed, features, call.y, call.batch, int(int64_t(panels) * slice / slices),
                           int(int64_t(panels) * (slice + 1) / slices));
  }

  void work(Team::Worker worker) const {
    const FlushDenormals flush;
    const int w = worker.index;
    const int64_t whole = call.batch / threads * threads;
    const auto alone = [](int tasks, const auto& task) {
      for (int t = 0; t < tasks; ++t) task(t);
    };
    worker.run(int(whole), [&](int i) { image(i, w, w, false, alone); });
    for (int64_t i = whole; i < call.batch; ++i) {
      image(i, 0, w, true, [&](int tasks, const auto& task) { worker.run(tasks, task); });
    }
    Stopwatch watch(w == 0 ? call.seconds : nullptr);
    if (linear) worker.run(threads, [&](int t) { classify(t, threads); });
    watch.lap(int(program.steps.size()) - 1);
  }
};

}  // namespace

void run(const Program& program, const Call& call, int threads, Parallel parallel) {
  Runner runner{program, call, threads};
  const Arena arena(runner.arena_size());
  runner.use(arena.data());
  const int phases = 2 + (threads - 1) * 2 * int(program.steps.size());
  Team team(threads, phases);
  if (threads == 1) return runner.work({&team, 0});
  struct Context {
    Runner* runner;
    Team* team;
  } context = {&runner, &team};
  parallel(
      threads,
      [](int64_t begin, int64_t end, void* c) {
        auto* context = static_cast<Context*>(c);
        for (int64_t i = begin; i < end; ++i) context->runner->work({context->team, int(i)});
      },
      &context);
}

}  // namespace mnv2_fused
