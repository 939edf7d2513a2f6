// Over the pixels of a narrow tensor [pixels][channels]: sums of each channel, affine maps. A thread has `Unit`
// channels, 16 bytes of them where they lie so, and goes from pixel to pixel; so many sums in float are short, and what
// threads and blocks of threads have found is added up in double.
#pragma once

#include "launch.h"
#include "matrix.h"

namespace mnv2_fused::cuda {

struct ChannelArgs {
  const char *a, *b;          // b may be null
  const float* center;        // [channels]
  const float* gate;          // [2][channels]; null: none. a is 0 where gate[0] b + gate[1] lies outside 0 to 6
  const float* coefficients;  // [3][channels]
  char* y;
  double* partial;  // [blocks][2][channels]
  int64_t pixels;
  int channels, groups, pixels_at_once;  // Unit channels each, of a block; threads by pixels
  bool relu6;
};

template <class T, ChannelOp Op, int Unit>
struct ChannelKernel {
  using Args = ChannelArgs;
  using M = Math<T>;
  static constexpr int kMaxThreads = 256, kMinBlocks = 2;

  static MNV2_DEVICE void run(const ChannelArgs& a) {
    const int group = thread_index() % a.groups, row = thread_index() / a.groups;
    const int channel = (block_y() * a.groups + group) * Unit;
    const bool active = row < a.pixels_at_once && channel < a.channels;
    const int64_t step = int64_t(blocks_x()) * a.pixels_at_once, first = int64_t(block_x()) * a.pixels_at_once + row;
    float own[3][Unit], bounds[2][Unit];  // center, or coefficients
    MNV2_UNROLL for (int u = 0; u < Unit; ++u) {
      if (!active) break;
      if (Op == ChannelOp::kProducts) own[0][u] = a.center[channel + u];
      MNV2_UNROLL for (int i = 0; i < 3; ++i) {
        if (Op == ChannelOp::kAffine) own[i][u] = a.coefficients[i * a.channels + channel + u];
        if (i < 2 && a.gate) bounds[i][u] = a.gate[i * a.channels + channel + u];
      }
    }

    float sums[2][Unit];
    MNV2_UNROLL for (int u = 0; u < Unit; ++u) sums[0][u] = sums[1][u] = 0;
    int64_t count = 0;
    for (int64_t pixel = first; active && pixel < a.pixels; pixel += step, ++count) {
      const int64_t at = pixel * a.channels + channel;
      float v[Unit], w[Unit] = {};
      load(a.a, at, v);
      if (a.b) load(a.b, at, w);
      MNV2_UNROLL for (int u = 0; u < Unit; ++u) {
        if (a.gate) {
          const float gate = bounds[0][u] * w[u] + bounds[1][u];
          if (!(gate > 0 && gate < 6)) v[u] = 0;
        }
        if (Op == ChannelOp::kMoments) {
          if (count == 0) own[0][u] = v[u];  // near enough to the mean
          sums[0][u] += v[u] - own[0][u];
          sums[1][u] += (v[u] - own[0][u]) * (v[u] - own[0][u]);
        } else if (Op == ChannelOp::kProducts) {
          sums[0][u] += v[u];
          sums[1][u] += v[u] * (w[u] - own[0][u]);
        } else {
          v[u] = own[0][u] * v[u] + own[2][u];
          if (a.b && own[1][u] != 0) v[u] += own[1][u] * w[u];  // b may be infinite where nothing of it is wanted
          if (a.relu6) v[u] = relu6(v[u]);
        }
      }
      if (Op == ChannelOp::kAffine) store(a.y, at, v);
    }
    if (Op == ChannelOp::kAffine) return;

    // Over the block's threads: [pixels_at_once][groups * Unit][2], then by channel.
    double* const shared = reinterpret_cast<double*>(shared_memory());
    const int width = a.groups * Unit;
    MNV2_UNROLL for (int u = 0; u < Unit; ++u) {
      if (!active) break;
      double* const to = shared + (row * width + group * Unit + u) * 2;
      to[0] = sums[0][u];
      to[1] = sums[1][u];
      if (Op != ChannelOp::kMoments) continue;
      const double shift = count ? double(sums[0][u]) / double(count) : 0;
      to[0] = count ? own[0][u] + shift : 0;
      to[1] = sums[1][u] - shift * sums[0][u];
    }
    sync();
    for (int i = thread_index(); i < width; i += thread_count()) {
      const int c = block_y() * width + i;
      if (c >= a.channels) continue;
      double total[2] = {0, 0}, seen = 0;
      for (int r = 0; r < a.pixels_at_once; ++r) {
        const double* const from = shared + (r * width + i) * 2;
        const int64_t start = int64_t(block_x()) * a.pixels_at_once + r;
        const double n = start < a.pixels ? double((a.pixels - start - 1) / step + 1) : 0;
        add<Op>(total, &seen, from, n);
      }
      a.partial[(int64_t(block_x()) * 2) * a.channels + c] = total[0];
      a.partial[(int64_t(block_x()) * 2 + 1) * a.channels + c] = total[1];
    }
  }

  // Sums, or mean and squared deviations of `n` values to those of `seen` before (Chan, Golub and LeVeque).
  template <ChannelOp Kind>
  static MNV2_DEVICE void add(double (&total)[2], double* seen, const double* from, double n) {
    if (n == 0) return;
    if (Kind == ChannelOp::kMoments) {
      const double gap = from[0] - total[0], all = *seen + n;
      total[0] += gap * n / all;
      total[1] += from[1] + gap * gap * *seen * n / all;
      *seen = all;
    } else {
      total[0] += from[0];
      total[1] += from[1];
    }
  }

 private:
  static MNV2_DEVICE void load(const char* from, int64_t at, float (&v)[Unit]) {
    if constexpr (Unit == 1) {
      v[0] = M::load(from, at);
    } else {
      const Vector all = *reinterpret_cast<const Vector*>(from + at * M::kSize);
      MNV2_UNROLL for (int u = 0; u < Unit; ++u) v[u] = M::element(all, u);
    }
  }
  static MNV2_DEVICE void store(char* to, int64_t at, const float (&v)[Unit]) {
    if constexpr (Unit == 1) {
      M::store(to, at, v[0]);
    } else {
      *reinterpret_cast<Vector*>(to + at * M::kSize) = M::vector(v);
    }
  }
};

// What the blocks of threads have found, in their order: [blocks][2][channels] to two rows.
struct ChannelSumArgs {
  const double* partial;
  double *first, *second;
  float* rounded;
  int64_t pixels;
  int channels, blocks, pixels_at_once;
};

template <ChannelOp Op>
struct ChannelSumKernel {
  using Args = ChannelSumArgs;
  static constexpr int kMaxThreads = 128, kMinBlocks = 1;

  static MNV2_DEVICE void run(const ChannelSumArgs& a) {
    const int c = block_x() * thread_count() + thread_index();
    if (c >= a.channels) return;
    double total[2] = {0, 0}, seen = 0;
    for (int block = 0; block < a.blocks; ++block) {
      double n = 0;  // pixels that the block has seen
      const int64_t start = int64_t(block) * a.pixels_at_once, step = int64_t(a.blocks) * a.pixels_at_once;
      if (start < a.pixels) {
        const int64_t rounds = (a.pixels - start) / step, rest = (a.pixels - start) % step;
        n = double(rounds * a.pixels_at_once + (rest < a.pixels_at_once ? rest : a.pixels_at_once));
      }
      const double from[2] = {a.partial[int64_t(block) * 2 * a.channels + c],
                              a.partial[(int64_t(block) * 2 + 1) * a.channels + c]};
      ChannelKernel<float, Op, 1>::template add<Op>(total, &seen, from, n);
    }
    if (a.rounded) a.rounded[c] = float(total[0]);
    a.first[c] = total[0];
    a.second[c] = total[1];
  }
};

}  // namespace mnv2_fused::cuda
