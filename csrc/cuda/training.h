// A block in training on a GPU: the passes of inverted_residual.h's TrainingStep. Every pass computes h and d anew, for
// a tile of pixels and a chunk of 64 bytes of hidden channels at a time, in shared memory. Three of them have sums over
// the pixels as results: there a block of threads keeps its chunk and goes from tile to tile, with the sums in
// registers and shared memory; what the blocks have found is added up in their order, in double, by SumKernel. The
// gradient of x is a sum over the hidden channels: there a block keeps its tile and goes from chunk to chunk.
//
// dd is kept spread out by the stride, with zeros between the outputs: then what it gives h back is a filter of stride
// 1 with its taps reversed, and so is, from h and dd, the gradient of the taps.
#pragma once

#include "launch.h"
#include "matrix.h"

namespace mnv2_fused::cuda {

struct TrainingArgs {
  const char *x, *dz, *weights;  // TrainingPacking
  char* dx;
  float* products;  // [splits][chunks][product_rows][chunk]
  double* sums;     // [splits][chunks][sum rows][chunk]
  int batch, height, width, in_channels, hidden_channels, out_channels, out_height, out_width;
  int stride, dilation, pad_left, pad_top;
  bool x_aligned, dz_aligned, wants_products, wants_taps;
  TrainingTile tile;
  TrainingPacking packing;
};

template <class T, Source S>
struct TrainingBlock {
  using M = Math<T>;
  static constexpr int kWarps = TrainingTile::kWarps;
  static constexpr int kChunk = Packing::kChunkBytes / M::kSize;  // hidden channels
  static constexpr int kPitch = Packing::kPitch;
  static constexpr int kSteps = Packing::kChunkBytes / 32, kPairs = M::kStep / 8, kTiles = kChunk / 8;
  static constexpr int kColumns = kChunk / 16;  // pairs of tiles
  // C fragments of a warp: 16 pixels, those from 16 warp on, and kTiles times 8 channels. One such and not two, as the
  // warps of a block with 128 registers each: of 16 warps a processor has enough to do while some wait.
  using Fragments = float[kTiles][4];
  static_assert(16 * kWarps == TrainingTile::kRows);

  const TrainingArgs& a;
  const int thread, lane, warp, g, t;

  explicit MNV2_DEVICE TrainingBlock(const TrainingArgs& a)
      : a(a),
        thread(thread_index()),
        lane(thread_index() % kWarp),
        warp(thread_index() / kWarp),
        g(lane / 4),
        t(lane % 4) {}

  MNV2_DEVICE char* stage() const { return shared_memory() + a.tile.stage_offset; }
  MNV2_DEVICE char* h() const { return shared_memory() + a.tile.h_offset; }
  MNV2_DEVICE char* spread() const { return shared_memory() + a.tile.spread_offset; }
  MNV2_DEVICE char* rows() const { return shared_memory() + a.tile.rows_offset; }
  MNV2_DEVICE const char* taps() const { return shared_memory(); }
  MNV2_DEVICE const float* expand_bias() const {
    return reinterpret_cast<const float*>(shared_memory() + kChunk * M::kTapBytes);
  }
  MNV2_DEVICE const float* coefficients(int which) const { return expand_bias() + (1 + which) * kChunk; }

  // What of a chunk is in shared memory all the time: taps, bias and coefficients.
  MNV2_DEVICE void load_constants(int chunk) const {
    const char* const from = a.weights + a.packing.constants + int64_t(chunk) * a.packing.constant_bytes;
    for (int i = thread * 16; i < a.packing.constant_bytes; i += kWarps * kWarp * 16) {
      copy_async(shared_memory() + i, from + i, true);
    }
    commit_copies();
    wait_copies<0>();
  }

  // The tiles: of outputs, or of pixels of x.
  MNV2_DEVICE int image0(int tile) const { return tile / a.tile.tiles_x / a.tile.tiles_y * a.tile.images; }
  MNV2_DEVICE int images(int tile) const { return min_of(a.tile.images, a.batch - image0(tile)); }
  MNV2_DEVICE int tile_top(int tile) const { return tile / a.tile.tiles_x % a.tile.tiles_y * a.tile.height; }
  MNV2_DEVICE int tile_left(int tile) const { return tile % a.tile.tiles_x * a.tile.width; }
  static MNV2_DEVICE int floor_div(int n, int by) { return n >= 0 ? n / by : -((by - 1 - n) / by); }

  MNV2_DEVICE Part outputs_of_tile(int tile) const {
    return Part(image0(tile), images(tile), tile_top(tile), tile_left(tile), a.tile.height, a.tile.width, a.out_height,
                a.out_width);
  }
  MNV2_DEVICE Part pixels_of_tile(int tile) const {
    return Part(image0(tile), images(tile), tile_top(tile), tile_left(tile), a.tile.height, a.tile.width, a.height,
                a.width);
  }
  // The outputs that see a tile of pixels, and as they lie spread out.
  MNV2_DEVICE Part outputs_over(int tile) const {
    const int y = tile_top(tile) + a.pad_top, x = tile_left(tile) + a.pad_left, s = a.stride;
    const int top = floor_div(y - 2 * a.dilation + s - 1, s), left = floor_div(x - 2 * a.dilation + s - 1, s);
    const int height = floor_div(y + a.tile.height - 1, s) + 1 - top,
              width = floor_div(x + a.tile.width - 1, s) + 1 - left;
    return Part(image0(tile), images(tile), top, left, height, width, a.out_height, a.out_width);
  }
  MNV2_DEVICE Part spread_of(int tile) const {
    return Part(image0(tile), images(tile), tile_top(tile) + a.pad_top - 2 * a.dilation,
                tile_left(tile) + a.pad_left - 2 * a.dilation, a.tile.spread_height, a.tile.spread_width, INT32_MAX / 2,
                INT32_MAX / 2);
  }
  // The pixels of h that outputs see.
  MNV2_DEVICE Part under(const Part& outputs) const {
    return Part(outputs.image0, outputs.images, outputs.top * a.stride - a.pad_top,
                outputs.left * a.stride - a.pad_left, a.tile.h_height, a.tile.h_width, a.height, a.width);
  }

  // Rows of a tensor [pixels][channels], `bytes` of them from the `slice`th on, and rows of weights beside them, into
  // the stage. They are there after a sync.
  template <class Pixel>
  MNV2_DEVICE void load_slice(const char* x, int channels, bool aligned, int count, const Pixel& pixel,
                              const char* weights, int row_bytes, int bytes, int slice) const {
    const int first = slice * bytes / M::kSize, pitch = odd_pitch(bytes);
    char *const to = stage(), *const after = to + round_up(count, 16) * pitch;
    copy_rows<T>(
        x, channels, first, bytes / M::kSize, aligned, round_up(count, 16),
        [&](int i) { return pixel(min_of(i, count - 1)); }, [&](int i) { return to + i * pitch; });
    if (weights) {
      copy_rows<T>(
          weights, row_bytes / M::kSize, first, bytes / M::kSize, true, kChunk, [](int i) { return int64_t(i); },
          [&](int i) { return after + i * pitch; });
    }
    commit_copies();
    wait_copies<0>();
  }

  // acc += the stage's rows . weights^T of a slice that has `left` bytes of numbers that are not 0.
  MNV2_DEVICE void multiply_slice(Fragments& acc, int count, int bytes, int left) const {
    const int pitch = odd_pitch(bytes);
    const char *const from = stage() + warp * 16 * pitch, *const weights = stage() + round_up(count, 16) * pitch;
    if (warp * 16 >= count) return;
    MNV2_NO_UNROLL for (int k = 0; k < min_of(bytes, left); k += 32) {
      const auto m = M::load_a(from + k, pitch, lane);
      MNV2_UNROLL for (int n = 0; n < kTiles; n += 2) {
        const auto w = M::load_b(weights + n * 8 * pitch + k, pitch, lane);
        M::multiply(acc[n], acc[n + 1], m, w);
      }
    }
  }

  static MNV2_DEVICE void clear(Fragments& acc) {
    MNV2_UNROLL for (int n = 0; n < kTiles; ++n) { MNV2_UNROLL for (int i = 0; i < 4; ++i) acc[n][i] = 0; }
  }

  // h of a chunk over `part`, 0 outside the image. In shared memory after a sync.
  MNV2_DEVICE void make_h(const Part& part, int chunk) const {
    for (int i = thread * 16; i < part.images * part.height * part.width * kPitch; i += kWarps * kWarp * 16) {
      *reinterpret_cast<Vector*>(h() + i) = Vector{0, 0, 0, 0};
    }
    if (part.count == 0) return;
    const auto pixel = [&](int i) { return part.pixel(i, a.height, a.width); };
    if constexpr (S == Source::kCopy) {
      sync();
      copy_rows<T>(a.x, a.in_channels, chunk * kChunk, kChunk, a.x_aligned, part.count, pixel, [&](int i) {
        int image, y, x;
        part.locate(i, &image, &y, &x);
        return h() + part.at(image, y, x) * kPitch;
      });
      commit_copies();
      wait_copies<0>();
    } else {
      expand(part, chunk, pixel);
    }
  }
  template <class Pixel>
  MNV2_DEVICE void expand(const Part& part, int chunk, const Pixel& pixel) const {
    Fragments acc;
    MNV2_UNROLL for (int n = 0; n < kTiles; ++n) {
      const float* const bias = expand_bias() + n * 8 + 2 * t;
      acc[n][0] = acc[n][2] = bias[0];
      acc[n][1] = acc[n][3] = bias[1];
    }
    const char* const weights = a.weights + a.packing.expand + int64_t(chunk) * kChunk * a.packing.expand_bytes;
    const int bytes = a.tile.x_slice;
    for (int slice = 0; slice * bytes < a.packing.expand_bytes; ++slice) {
      sync();
      load_slice(a.x, a.in_channels, a.x_aligned, part.count, pixel, weights, a.packing.expand_bytes, bytes, slice);
      sync();
      multiply_slice(acc, part.count, bytes, a.in_channels * M::kSize - slice * bytes);
    }
    MNV2_UNROLL for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      if (row >= part.count) continue;
      int image, y, x;
      part.locate(row, &image, &y, &x);
      char* const to = h() + part.at(image, y, x) * kPitch + 2 * t * M::kSize;
      MNV2_UNROLL for (int n = 0; n < kTiles; ++n) {
        M::store_relu6(to + n * 8 * M::kSize, acc[n][half * 2], acc[n][half * 2 + 1]);
      }
    }
  }

  // Whether this warp has rows among `count`, and which it holds in C fragments.
  MNV2_DEVICE bool busy(int count) const { return warp * 16 < count; }
  MNV2_DEVICE int row_of(int half) const { return warp * 16 + g + half * 8; }
  // The first channel, in the chunk, of two that a C fragment holds.
  MNV2_DEVICE int channel_of(int step, int n) const { return (step * kPairs + n) * 8 + 2 * t; }

  // d of this warp's outputs, from h over `part`: body(step, d) for 32 bytes of channels at a time.
  template <class Body>
  MNV2_DEVICE void filter(const Part& outputs, const Part& part, const Body& body) const {
    if (!busy(outputs.count)) return;
    const typename M::Gather gather(lane, [&](int i) {
      if (warp * 16 + i >= outputs.count) return static_cast<const char*>(h());
      int image, y, x;
      outputs.locate(warp * 16 + i, &image, &y, &x);
      const int at = part.at(image, y * a.stride - a.pad_top, x * a.stride - a.pad_left);
      return static_cast<const char*>(h()) + at * kPitch;
    });
    each_step(gather, a.dilation * part.width * kPitch, a.dilation * kPitch, body);
  }
  template <class Body>
  MNV2_DEVICE void each_step(const typename M::Gather& gather, int tap_row, int tap_column, const Body& body) const {
    MNV2_UNROLL for (int step = 0; step < kSteps; ++step) {
      float d[kPairs][4];
      MNV2_UNROLL for (int n = 0; n < kPairs; ++n) { MNV2_UNROLL for (int i = 0; i < 4; ++i) d[n][i] = 0; }
      M::filter(d, gather, step * 32, tap_row, tap_column, taps() + step * M::kStep * M::kTapBytes, lane);
      body(step, d);
    }
  }

  // (dz . Wp^T) of this warp's outputs, without the mask. `use` is called for every slice that is in the stage.
  template <class Use>
  MNV2_DEVICE void multiply_back(Fragments& acc, const Part& outputs, int chunk, const Use& use) const {
    clear(acc);
    if (outputs.count == 0) return;
    const char* const weights = a.weights + a.packing.project + int64_t(chunk) * kChunk * a.packing.project_bytes;
    const int bytes = a.tile.dz_slice;
    for (int slice = 0; slice * bytes < a.packing.project_bytes; ++slice) {
      sync();
      load_slice(
          a.dz, a.out_channels, a.dz_aligned, outputs.count,
          [&](int i) { return outputs.pixel(i, a.out_height, a.out_width); }, weights, a.packing.project_bytes, bytes,
          slice);
      sync();
      multiply_slice(acc, outputs.count, bytes, a.out_channels * M::kSize - slice * bytes);
      use(slice);
    }
  }

  // g from the product and d: 0 where u lies outside 0 to 6.
  MNV2_DEVICE float masked(float product, float d, int channel) const {
    const float u = coefficients(0)[channel] * d + coefficients(1)[channel];
    return u > 0 && u < 6 ? product : 0;
  }

  // dd of the outputs over a tile, spread out. In shared memory after a sync.
  MNV2_DEVICE void make_dd(int tile, int chunk) const {
    const Part outputs = outputs_over(tile), part = under(outputs), to = spread_of(tile);
    for (int i = thread * 16; i < to.images * to.height * to.width * kPitch; i += kWarps * kWarp * 16) {
      *reinterpret_cast<Vector*>(spread() + i) = Vector{0, 0, 0, 0};
    }
    make_h(part, chunk);
    sync();
    Fragments product;
    multiply_back(product, outputs, chunk, [](int) {});
    char* at[2];
    MNV2_UNROLL for (int half = 0; half < 2; ++half) {
      if (row_of(half) >= outputs.count) continue;
      int image, y, x;
      outputs.locate(row_of(half), &image, &y, &x);
      at[half] = spread() + to.at(image, y * a.stride, x * a.stride) * kPitch;
    }
    filter(outputs, part, [&](int step, const float (&d)[kPairs][4]) {
      MNV2_UNROLL for (int n = 0; n < kPairs; ++n) {
        const int channel = channel_of(step, n);
        MNV2_UNROLL for (int half = 0; half < 2; ++half) {
          float dd[2];
          MNV2_UNROLL for (int i = 0; i < 2; ++i) {
            const float v = d[n][half * 2 + i];
            dd[i] = coefficients(3)[channel + i] * masked(product[step * kPairs + n][half * 2 + i], v, channel + i) +
                    coefficients(4)[channel + i] * v + coefficients(5)[channel + i];
          }
          if (row_of(half) < outputs.count) M::store_pair(at[half] + channel * M::kSize, 0, dd[0], dd[1]);
        }
      }
    });
  }

  // Where the taps of pixels from the `first`th on begin in the spread dd, to be gone through backwards.
  MNV2_DEVICE const char* spread_at(const Part& pixels, const Part& from, int i) const {
    if (i >= pixels.count) return spread() + from.at(0, from.top + 2 * a.dilation, from.left + 2 * a.dilation) * kPitch;
    int image, y, x;
    pixels.locate(i, &image, &y, &x);
    return spread() + from.at(image, y + a.pad_top, x + a.pad_left) * kPitch;
  }
  // What dd gives back to h, of 16 pixels from the `first`th on: body(step, gh) as in `filter`.
  template <class Body>
  MNV2_DEVICE void filter_back(const Part& pixels, const Part& from, int first, const Body& body) const {
    const typename M::Gather gather(lane, [&](int i) { return spread_at(pixels, from, first + i); });
    each_step(gather, -a.dilation * from.width * kPitch, -a.dilation * kPitch, body);
  }
  // h of a pixel, or zeros where there is none.
  MNV2_DEVICE const char* h_at(const Part& pixels, const Part& part, int i, const char* zeros) const {
    if (i >= pixels.count) return zeros;
    int image, y, x;
    pixels.locate(i, &image, &y, &x);
    return h() + part.at(image, y, x) * kPitch;
  }
  // ge: gh where the ReLU6 lets it through.
  static MNV2_DEVICE float gated(float gh, float h) { return S == Source::kCopy || (h > 0 && h < 6) ? gh : 0; }

  // sums [m][n] += the sum over `count` pixels of from[pixel][m] with[pixel][n], for `tiles` times 16 m from m_tile on.
  // `parts` share out the pixels; each sum has its one lane, always. [parts][all tiles][kColumns][8][32].
  MNV2_DEVICE void outer(float* sums, int m_tile, int tiles, int all_tiles, const char* from, int pitch,
                         const char* with, int count) const {
    const int parts = a.tile.parts, items = parts * tiles * kColumns;
    for (int item = warp; item < items; item += kWarps) {
      const int part = item / (tiles * kColumns), m = item / kColumns % tiles, n = item % kColumns;
      float acc[2][4];
      MNV2_UNROLL for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0;
      for (int k = part * M::kStep; k < count; k += parts * M::kStep) {
        const auto left = M::load_transposed_a(from + k * pitch + m * 16 * M::kSize, pitch, lane);
        const auto right = M::load_transposed_b(with + k * kPitch + n * 16 * M::kSize, kPitch, lane);
        M::multiply(acc[0], acc[1], left, right);
      }
      float* const to = sums + int64_t((part * all_tiles + m_tile + m) * kColumns + n) * 8 * kWarp + lane;
      MNV2_UNROLL for (int i = 0; i < 8; ++i) to[i * kWarp] += acc[i / 4][i % 4];
    }
  }
  // Those of all parts to rows of `to`, [rows][kChunk]. After a sync.
  MNV2_DEVICE void store_outer(const float* sums, int all_tiles, int rows, float* to) const {
    const int size = all_tiles * kColumns * 8 * kWarp;
    for (int i = thread; i < size; i += kWarps * kWarp) {
      const int of = i % kWarp, v = i / kWarp % 8, n = i / kWarp / 8 % kColumns, m = i / kWarp / 8 / kColumns;
      const int row = m * 16 + of / 4 + v % 4 / 2 * 8, column = n * 16 + v / 4 * 8 + of % 4 * 2 + v % 2;
      float sum = 0;
      for (int part = 0; part < a.tile.parts; ++part) sum += sums[part * size + i];
      if (row < rows) to[row * kChunk + column] = sum;
    }
  }

  // The sum over the lanes that hold the same channels.
  static MNV2_DEVICE float sum_of_rows(float v) {
    MNV2_UNROLL for (int mask = 4; mask < kWarp; mask *= 2) v += shuffle_xor(v, mask);
    return v;
  }
  // [2][kChunk] of the block's, in double, from those of its warps, [kWarps][2][kChunk]. After a sync.
  MNV2_DEVICE void store_sums(const float* of_warps, double* to) const {
    for (int i = thread; i < 2 * kChunk; i += kWarps * kWarp) {
      double sum = 0;
      for (int of = 0; of < kWarps; ++of) sum += of_warps[of * 2 * kChunk + i];
      to[i] = sum;
    }
  }
};

#define MNV2_TRAINING_KERNEL(T, min_blocks) \
  using Args = TrainingArgs;                \
  using M = Math<T>;                        \
  static constexpr int kMaxThreads = TrainingTile::kWarps * kWarp, kMinBlocks = min_blocks

// Mean and squared deviations of d: sums [3][chunk] are their number, the mean and the deviations.
template <class T, Source S>
struct MomentsKernel {
  MNV2_TRAINING_KERNEL(T, 1);
  using B = TrainingBlock<T, S>;

  static MNV2_DEVICE void run(const TrainingArgs& a) {
    const B b(a);
    const int chunk = block_y();
    b.load_constants(chunk);
    // Of the rows that this lane has seen, less the first of them.
    float origin[B::kTiles][2], sum[B::kTiles][2], square[B::kTiles][2];
    int seen = 0;
    MNV2_UNROLL for (int n = 0; n < B::kTiles; ++n) {
      MNV2_UNROLL for (int i = 0; i < 2; ++i) origin[n][i] = sum[n][i] = square[n][i] = 0;
    }
    for (int tile = block_x(); tile < a.tile.tiles; tile += blocks_x()) {
      const Part outputs = b.outputs_of_tile(tile), part = b.under(outputs);
      sync();
      b.make_h(part, chunk);
      sync();
      b.filter(outputs, part, [&](int step, const float (&d)[B::kPairs][4]) {
        MNV2_UNROLL for (int half = 0; half < 2; ++half) {
          if (b.row_of(half) >= outputs.count) continue;
          MNV2_UNROLL for (int n = 0; n < B::kPairs; ++n) {
            MNV2_UNROLL for (int i = 0; i < 2; ++i) {
              const int of = step * B::kPairs + n;
              const float v = d[n][half * 2 + i];
              if (!seen && !half) origin[of][i] = v;
              sum[of][i] += v - origin[of][i];
              square[of][i] += (v - origin[of][i]) * (v - origin[of][i]);
            }
          }
        }
      });
      MNV2_UNROLL for (int half = 0; half < 2; ++half) seen += b.row_of(half) < outputs.count;
    }
    float* const all = reinterpret_cast<float*>(b.stage());  // [kWarps][3][kChunk]
    sync();
    MNV2_UNROLL for (int n = 0; n < B::kTiles; ++n) {
      MNV2_UNROLL for (int i = 0; i < 2; ++i) {
        const float shift = seen ? sum[n][i] / float(seen) : 0;
        float found[3] = {float(seen), origin[n][i] + shift, square[n][i] - shift * sum[n][i]};
        MNV2_UNROLL for (int mask = 4; mask < kWarp; mask *= 2) {
          float more[3];
          MNV2_UNROLL for (int v = 0; v < 3; ++v) more[v] = shuffle_xor(found[v], mask);
          join(found, more);
        }
        if (b.g) continue;
        MNV2_UNROLL for (int v = 0; v < 3; ++v) all[(b.warp * 3 + v) * B::kChunk + n * 8 + 2 * b.t + i] = found[v];
      }
    }
    sync();
    if (b.thread >= B::kChunk) return;
    double total[3] = {0, 0, 0};
    for (int warp = 0; warp < B::kWarps; ++warp) {
      const float* const at = all + warp * 3 * B::kChunk + b.thread;
      const double more[3] = {at[0], at[B::kChunk], at[2 * B::kChunk]};
      join(total, more);
    }
    double* const to = a.sums + (int64_t(block_x()) * a.packing.chunks + chunk) * 3 * B::kChunk + b.thread;
    MNV2_UNROLL for (int i = 0; i < 3; ++i) to[i * B::kChunk] = total[i];
  }

  // Number, mean and squared deviations of more values to those before (Chan, Golub and LeVeque).
  template <class Real>
  static MNV2_DEVICE void join(Real (&total)[3], const Real (&more)[3]) {
    if (more[0] == 0) return;
    const Real count = total[0] + more[0], gap = more[1] - total[1];
    total[1] += gap * more[0] / count;
    total[2] += more[2] + gap * gap * total[0] * more[0] / count;
    total[0] = count;
  }
};

// The sums of g and of g (d - center), and the gradient of the projection: products [out][chunk].
template <class T, Source S>
struct ProjectKernel {
  MNV2_TRAINING_KERNEL(T, 1);
  using B = TrainingBlock<T, S>;

  static MNV2_DEVICE void run(const TrainingArgs& a) {
    const B b(a);
    const int chunk = block_y(), tiles = (a.out_channels + 15) / 16;
    float* const products = reinterpret_cast<float*>(shared_memory() + a.tile.products_offset);
    b.load_constants(chunk);
    for (int i = b.thread; i < a.tile.product_floats; i += kMaxThreads) products[i] = 0;
    float total[B::kTiles][2], product[B::kTiles][2];
    MNV2_UNROLL for (int n = 0; n < B::kTiles; ++n) {
      MNV2_UNROLL for (int i = 0; i < 2; ++i) total[n][i] = product[n][i] = 0;
    }
    for (int tile = block_x(); tile < a.tile.tiles; tile += blocks_x()) {
      const Part outputs = b.outputs_of_tile(tile), part = b.under(outputs);
      sync();
      b.make_h(part, chunk);
      sync();
      if (a.wants_products) store_relu6(b, outputs, part);
      typename B::Fragments back;
      b.multiply_back(back, outputs, chunk, [&](int slice) {
        if (!a.wants_products) return;
        const int first = slice * a.tile.dz_slice / M::kSize;
        const int of_slice = min_of(a.tile.dz_slice / M::kSize / 16, tiles - first / 16);
        b.outer(products, first / 16, of_slice, tiles, b.stage(), odd_pitch(a.tile.dz_slice), b.rows(), outputs.count);
      });
      // d once more: to keep it takes registers that there are not.
      b.filter(outputs, part, [&](int step, const float (&d)[B::kPairs][4]) {
        MNV2_UNROLL for (int half = 0; half < 2; ++half) {
          if (b.row_of(half) >= outputs.count) continue;
          MNV2_UNROLL for (int n = 0; n < B::kPairs; ++n) {
            MNV2_UNROLL for (int i = 0; i < 2; ++i) {
              const int of = step * B::kPairs + n, channel = b.channel_of(step, n) + i;
              const float v = d[n][half * 2 + i], gradient = b.masked(back[of][half * 2 + i], v, channel);
              total[of][i] += gradient;
              product[of][i] += gradient * (v - b.coefficients(2)[channel]);
            }
          }
        }
      });
    }
    const int64_t place = int64_t(block_x()) * a.packing.chunks + chunk;
    float* const all = reinterpret_cast<float*>(b.stage());
    sync();
    MNV2_UNROLL for (int n = 0; n < B::kTiles; ++n) {
      MNV2_UNROLL for (int i = 0; i < 2; ++i) {
        const float sums[2] = {B::sum_of_rows(total[n][i]), B::sum_of_rows(product[n][i])};
        float* const to = all + b.warp * 2 * B::kChunk + n * 8 + 2 * b.t + i;
        if (b.g == 0) to[0] = sums[0], to[B::kChunk] = sums[1];
      }
    }
    sync();
    b.store_sums(all, a.sums + place * 2 * B::kChunk);
    if (a.wants_products) {
      b.store_outer(products, tiles, a.out_channels, a.products + place * a.out_channels * B::kChunk);
    }
  }

 private:
  // relu6(u) of the outputs, as rows; zeros beyond the last.
  static MNV2_DEVICE void store_relu6(const B& b, const Part& outputs, const Part& part) {
    b.filter(outputs, part, [&](int step, const float (&d)[B::kPairs][4]) {
      MNV2_UNROLL for (int n = 0; n < B::kPairs; ++n) {
        const int channel = b.channel_of(step, n);
        MNV2_UNROLL for (int half = 0; half < 2; ++half) {
          float u[2];
          MNV2_UNROLL for (int i = 0; i < 2; ++i) {
            u[i] = b.coefficients(0)[channel + i] * d[n][half * 2 + i] + b.coefficients(1)[channel + i];
            if (b.row_of(half) >= outputs.count) u[i] = 0;
          }
          M::store_relu6(b.rows() + b.row_of(half) * B::kPitch + channel * M::kSize, u[0], u[1]);
        }
      }
    });
  }
};

// The sums of ge and of ge h, and products: the gradients of the expansion [in][chunk] and of the taps [9][chunk].
template <class T, Source S>
struct BelowKernel {
  MNV2_TRAINING_KERNEL(T, 1);
  using B = TrainingBlock<T, S>;

  static MNV2_DEVICE void run(const TrainingArgs& a) {
    const B b(a);
    const int chunk = block_y(), tiles = (a.in_channels + 15) / 16;
    float* const products = reinterpret_cast<float*>(shared_memory() + a.tile.products_offset);
    float* const of_taps = reinterpret_cast<float*>(shared_memory() + a.tile.taps_offset);
    b.load_constants(chunk);
    for (int i = b.thread; i < a.tile.product_floats; i += kMaxThreads) products[i] = 0;
    float* const of_sums = of_taps + a.tile.tap_floats;  // [kWarps][2][kChunk], without and with h
    for (int i = b.thread; i < a.tile.tap_floats + B::kWarps * 2 * B::kChunk; i += kMaxThreads) of_taps[i] = 0;
    if (b.thread < B::kPitch / 16) reinterpret_cast<Vector*>(zeros(a))[b.thread] = Vector{0, 0, 0, 0};
    for (int tile = block_x(); tile < a.tile.tiles; tile += blocks_x()) {
      sync();
      b.make_dd(tile, chunk);
      sync();
      const Part pixels = b.pixels_of_tile(tile), spread = b.spread_of(tile), part = b.under(b.outputs_over(tile));
      if (b.busy(pixels.count)) {
        const char* h[2];
        MNV2_UNROLL for (int half = 0; half < 2; ++half) h[half] = b.h_at(pixels, part, b.row_of(half), zeros(a));
        b.filter_back(pixels, spread, b.warp * 16, [&](int step, const float (&gh)[B::kPairs][4]) {
          MNV2_UNROLL for (int n = 0; n < B::kPairs; ++n) {
            const int channel = b.channel_of(step, n);
            float sum[4] = {0, 0, 0, 0};  // of two channels, without and with h
            MNV2_UNROLL for (int half = 0; half < 2; ++half) {
              const int row = b.row_of(half);
              const Pair v = M::load_pair(h[half] + channel * M::kSize);
              Pair ge = {B::gated(gh[n][half * 2], v.first), B::gated(gh[n][half * 2 + 1], v.second)};
              if (row >= pixels.count) ge = {0, 0};
              sum[0] += ge.first, sum[1] += ge.second;
              sum[2] += ge.first * v.first, sum[3] += ge.second * v.second;
              M::store_pair(b.rows() + row * B::kPitch + channel * M::kSize, 0, ge.first, ge.second);
            }
            float* const to = of_sums + b.warp * 2 * B::kChunk + channel;
            MNV2_UNROLL for (int i = 0; i < 4; ++i) {
              sum[i] = B::sum_of_rows(sum[i]);
              if (b.g == 0) to[i / 2 * B::kChunk + i % 2] += sum[i];
            }
          }
        });
      }
      if (a.wants_taps) add_taps(b, pixels, part, spread, of_taps);
      const int bytes = a.tile.x_slice;
      for (int slice = 0; a.wants_products && slice * bytes < a.packing.expand_bytes; ++slice) {
        sync();
        b.load_slice(
            a.x, a.in_channels, a.x_aligned, pixels.count, [&](int i) { return pixels.pixel(i, a.height, a.width); },
            nullptr, 0, bytes, slice);
        sync();
        const int first = slice * bytes / M::kSize, of_slice = min_of(bytes / M::kSize / 16, tiles - first / 16);
        b.outer(products, first / 16, of_slice, tiles, b.stage(), odd_pitch(bytes), b.rows(), pixels.count);
      }
    }
    const int64_t place = int64_t(block_x()) * a.packing.chunks + chunk;
    sync();
    b.store_sums(of_sums, a.sums + place * 2 * B::kChunk);
    float* const to = a.products + place * a.tile.product_rows * B::kChunk;
    if (a.wants_products) b.store_outer(products, tiles, a.in_channels, to);
    if (!a.wants_taps) return;
    const int rows = a.wants_products ? a.in_channels : 0, size = 9 * B::kChunk;
    for (int i = b.thread; i < size; i += kMaxThreads) {
      float sum = 0;
      for (int from = i; from < a.tile.tap_floats; from += size) sum += of_taps[from];
      to[rows * B::kChunk + i] = sum;
    }
  }

 private:
  static MNV2_DEVICE char* zeros(const TrainingArgs& a) { return shared_memory() + a.tile.zeros_offset; }

  // h transposed times dd moved by each tap: of 16-bit numbers on tensor cores, which compute 16 x 16 channels, of
  // which the diagonal is what is wanted; it lies in the lanes whose column is their row.
  static MNV2_DEVICE void add_taps(const B& b, const Part& pixels, const Part& part, const Part& spread, float* sums) {
    const TrainingArgs& a = b.a;
    const int tap_row = -a.dilation * spread.width * B::kPitch, tap_column = -a.dilation * B::kPitch;
    if constexpr (M::kSize == 2) {
      const int lane = b.lane, groups = (pixels.count + 15) / 16;
      for (int item = b.warp; item < B::kSteps * groups; item += B::kWarps) {
        const int step = item % B::kSteps, first = item / B::kSteps * 16;
        typename M::A left;
        load_matrices_transposed(left.word, b.h_at(pixels, part, first + lane % 8 + lane / 16 * 8, zeros(a)) +
                                                step * 32 + lane / 8 % 2 * 16);
        const char* const from = b.spread_at(pixels, spread, first + lane % 16) + step * 32 + lane / 16 * 16;
        float* const to = sums + b.warp * 9 * B::kChunk + step * 16 + b.g;
        MNV2_UNROLL for (int tap = 0; tap < 9; ++tap) {
          typename M::B right;
          load_matrices_transposed(right.word, from + tap / 3 * tap_row + tap % 3 * tap_column);
          float acc[2][4];
          MNV2_UNROLL for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0;
          M::multiply(acc[0], acc[1], left, right);
          if (b.t == b.g / 2) {
            to[tap * B::kChunk] += b.g % 2 ? acc[0][1] : acc[0][0];
            to[tap * B::kChunk + 8] += b.g % 2 ? acc[1][3] : acc[1][2];
          }
        }
      }
    } else {
      for (int item = b.thread; item < 9 * B::kChunk; item += kMaxThreads) {
        const int tap = item / B::kChunk, channel = item % B::kChunk;
        float sum = 0;
        for (int i = 0; i < pixels.count; ++i) {
          const char* const dd = b.spread_at(pixels, spread, i) + tap / 3 * tap_row + tap % 3 * tap_column;
          sum += M::load(b.h_at(pixels, part, i, zeros(a)), channel) * M::load(dd, channel);
        }
        sums[item] += sum;
      }
    }
  }
};

// dx = ge . We^T, or without an expansion what h is given back.
template <class T, Source S, int NT>
struct InputKernel {
  MNV2_TRAINING_KERNEL(T, 1);
  using B = TrainingBlock<T, S>;

  static MNV2_DEVICE void run(const TrainingArgs& a) {
    const B b(a);
    const int m_warps = a.tile.m_warps, m = b.warp % m_warps, n0 = b.warp / m_warps * NT * 8;
    char* const weights = shared_memory() + a.tile.weights_offset;
    float acc[NT][4];
    MNV2_UNROLL for (int n = 0; n < NT; ++n) { MNV2_UNROLL for (int i = 0; i < 4; ++i) acc[n][i] = 0; }
    for (int chunk = 0; chunk < a.packing.chunks; ++chunk) {
      sync();  // constants, weights, h and dd of the chunk before are no longer read
      b.load_constants(chunk);
      if (S != Source::kCopy) {
        const char* const from = a.weights + a.packing.expand_back + chunk * Packing::kChunkBytes;
        const int rows = round_up(a.in_channels, 16);
        for (int i = b.thread; i < rows * 4; i += kMaxThreads) {
          copy_async(weights + i / 4 * B::kPitch + i % 4 * 16,
                     from + int64_t(i / 4) * a.packing.chunks * Packing::kChunkBytes + i % 4 * 16, true);
        }
        commit_copies();
        wait_copies<0>();
      }
      sync();
      b.make_dd(block_x(), chunk);
      sync();
      const int tile = anew(block_x());  // what follows from it is not kept over make_dd, whose registers it would take
      const Part pixels = b.pixels_of_tile(tile), spread = b.spread_of(tile), part = b.under(b.outputs_over(tile));
      if (b.warp >= m_warps * a.tile.n_warps || m * 16 >= pixels.count) continue;
      int h[2];  // places
      MNV2_UNROLL for (int half = 0; half < 2; ++half) {
        h[half] = int(b.h_at(pixels, part, m * 16 + b.g + half * 8, b.h()) - b.h());
      }
      b.filter_back(pixels, spread, m * 16, [&](int step, const float (&gh)[B::kPairs][4]) {
        float ge[B::kPairs][4];
        MNV2_UNROLL for (int n = 0; n < B::kPairs; ++n) {
          const int channel = b.channel_of(step, n);
          MNV2_UNROLL for (int half = 0; half < 2; ++half) {
            if constexpr (S == Source::kCopy) {
              const int row = m * 16 + b.g + half * 8;
              if (row >= pixels.count) continue;
              store(a, pixels.pixel(row, a.height, a.width) * a.in_channels, chunk * B::kChunk + channel,
                    gh[n][half * 2], gh[n][half * 2 + 1]);
            } else {
              const Pair v = M::load_pair(b.h() + h[half] + channel * M::kSize);
              ge[n][half * 2] = B::gated(gh[n][half * 2], v.first);
              ge[n][half * 2 + 1] = B::gated(gh[n][half * 2 + 1], v.second);
            }
          }
        }
        if constexpr (S != Source::kCopy) {
          const auto left = M::as_a(ge, b.lane);
          MNV2_UNROLL for (int n = 0; n < NT; n += 2) {
            if (n0 + n * 8 >= round_up(a.in_channels, 16)) break;
            const auto right = M::load_b(weights + (n0 + n * 8) * B::kPitch + step * 32, B::kPitch, b.lane);
            M::multiply(acc[n], acc[n + 1], left, right);
          }
        }
      });
    }
    if (b.warp >= m_warps * a.tile.n_warps || S == Source::kCopy) return;
    const Part pixels = b.pixels_of_tile(anew(block_x()));
    MNV2_UNROLL for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + b.g + half * 8;
      if (row >= pixels.count) continue;
      const int64_t at = pixels.pixel(row, a.height, a.width) * a.in_channels;
      MNV2_UNROLL for (int n = 0; n < NT; ++n) {
        store(a, at, n0 + n * 8 + 2 * b.t, acc[n][half * 2], acc[n][half * 2 + 1]);
      }
    }
  }

 private:
  static MNV2_DEVICE void store(const TrainingArgs& a, int64_t at, int channel, float first, float second) {
    if (a.in_channels % 2 == 0 && channel < a.in_channels) return M::store_pair(a.dx, at + channel, first, second);
    if (channel < a.in_channels) M::store(a.dx, at + channel, first);
    if (channel + 1 < a.in_channels) M::store(a.dx, at + channel + 1, second);
  }
};

// Sums of products of the channels' deviations from a center: x^T x, a block of threads the columns of a chunk.
struct CovarianceArgs {
  const char* x;
  const float* center;  // null: 0
  float* products;      // [splits][chunks][channels][chunk]
  int64_t pixels;
  int channels;
  bool x_aligned;
  TrainingTile tile;
};

template <class T>
struct CovarianceKernel {
  using Args = CovarianceArgs;
  using M = Math<T>;
  using B = TrainingBlock<T, Source::kCopy>;
  static constexpr int kMaxThreads = TrainingTile::kWarps * kWarp, kMinBlocks = 1;

  static MNV2_DEVICE void run(const CovarianceArgs& a) {
    TrainingArgs shared{};
    shared.tile = a.tile;
    const B b(shared);
    const int chunk = block_y(), tiles = (a.channels + 15) / 16, bytes = a.tile.x_slice, pitch = odd_pitch(bytes);
    float* const products = reinterpret_cast<float*>(shared_memory() + a.tile.products_offset);
    for (int i = b.thread; i < a.tile.product_floats; i += kMaxThreads) products[i] = 0;
    for (int tile = block_x(); tile < a.tile.tiles; tile += blocks_x()) {
      const int64_t first = int64_t(tile) * TrainingTile::kRows;
      const int count = int(a.pixels - first < TrainingTile::kRows ? a.pixels - first : TrainingTile::kRows);
      const auto pixel = [&](int i) { return first + min_of(i, count - 1); };
      sync();
      copy_rows<T>(a.x, a.channels, chunk * B::kChunk, B::kChunk, a.x_aligned, round_up(count, 16), pixel,
                   [&](int i) { return b.rows() + i * B::kPitch; });
      for (int slice = 0; slice * bytes < round_up(a.channels * M::kSize, 32); ++slice) {
        const int from = slice * bytes / M::kSize;
        if (slice) sync();
        b.load_slice(a.x, a.channels, a.x_aligned, count, pixel, nullptr, 0, bytes, slice);
        sync();
        if (slice == 0) center(a, b.rows(), B::kPitch, B::kChunk, chunk * B::kChunk, count);
        if (a.center) center(a, b.stage(), pitch, bytes / M::kSize, from, count);
        sync();
        b.outer(products, from / 16, min_of(bytes / M::kSize / 16, tiles - from / 16), tiles, b.stage(), pitch,
                b.rows(), count);
      }
    }
    sync();
    const int64_t place = int64_t(block_x()) * blocks_y() + chunk;
    b.store_outer(products, tiles, a.channels, a.products + place * a.channels * B::kChunk);
  }

 private:
  // Rows less the center; 0 from the `count`th on.
  static MNV2_DEVICE void center(const CovarianceArgs& a, char* rows, int pitch, int channels, int first, int count) {
    for (int i = thread_index(); i < round_up(count, 16) * channels; i += kMaxThreads) {
      const int row = i / channels, channel = i % channels;
      const bool inside = row < count && first + channel < a.channels;
      if (inside && !a.center) continue;
      const float v = inside ? M::load(rows + row * pitch, channel) - a.center[first + channel] : 0;
      M::store(rows + row * pitch, channel, v);
    }
  }
};

template <class T, int kChunk, bool Moments>
struct SumKernel {
  using Args = SumCall;
  static constexpr int kMaxThreads = 128, kMinBlocks = 1;

  static MNV2_DEVICE void run(const SumCall& a) {
    const int channel = block_x() * kMaxThreads + thread_index(), row = block_y();
    if (channel >= a.channels) return;
    const T* from =
        static_cast<const T*>(a.from) + int64_t(channel / kChunk) * a.stored_rows * kChunk + channel % kChunk;
    const int64_t step = int64_t(a.chunks) * a.stored_rows * kChunk;
    if constexpr (Moments) {
      double total[3] = {0, 0, 0};
      for (int split = 0; split < a.splits; ++split, from += step) {
        const double more[3] = {from[0], from[kChunk], from[2 * kChunk]};
        MomentsKernel<float, Source::kCopy>::join(total, more);
      }
      a.to[channel] = total[1];
      a.second[channel] = total[2];
    } else {
      from += int64_t(a.first_row + row) * kChunk;
      double sum = 0;
      for (int split = 0; split < a.splits; ++split, from += step) sum += from[0];
      if (a.mean) {
        const double gap_row = a.mean[row] - (a.center ? a.center[row] : 0);
        const double gap = a.mean[channel] - (a.center ? a.center[channel] : 0);
        sum -= a.count * gap_row * gap;
      }
      a.to[int64_t(row) * a.channels + channel] = sum;
    }
  }
};

}  // namespace mnv2_fused::cuda
