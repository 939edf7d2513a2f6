// The device, emulated: every thread of a block is a fiber that runs until it waits for others, so that kernels run,
// and are tested, where there is no GPU. Part of device.h.
//
// What a kernel gets wrong shows: shared memory lies between pages that nothing may touch and arrives full of NaN, the
// threads run in the order that MNV2_EMULATION_ORDER names (a barrier that is missing shows in one of them), a
// copy_async arrives as early, or as late, as it may, and threads that wait for ones that never come end the process
// with a message. Blocks run one after the other.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace mnv2_fused::device {

namespace host {

constexpr int kLanes = 32;
constexpr size_t kStack = 128 << 10, kPage = 4096;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  enum State { kReady, kAtBarrier, kAtWarp, kDone } state = kReady;
  int index = 0;
  jmp_buf context;
  bool started = false;
  std::vector<std::vector<Copy>> copies;  // groups that are under way, the last one not yet committed
};

// What the 32 lanes of a warp exchange: slots of two meetings, since a lane may be at the next while another still
// reads.
struct Warp {
  static constexpr size_t kBytes = 64;
  alignas(16) unsigned char slots[2][kLanes][kBytes];
  int arrived = 0, expected = 0;
};

class Block {
 public:
  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

  Block(dim3 index, dim3 grid, int threads, int shared_bytes, void (*body)(const void*), const void* args)
      : index_(index),
        grid_(grid),
        body_(body),
        args_(args),
        fibers_(threads),
        warps_(size_t(threads + kLanes - 1) / kLanes) {
    const size_t bytes = (size_t(shared_bytes) + kPage - 1) / kPage * kPage;
    map_bytes_ = bytes + 2 * kPage;
    map_ = static_cast<char*>(mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED) fail("no memory");
    if (bytes && mprotect(map_ + kPage, bytes, PROT_READ | PROT_WRITE)) fail("no memory");
    if (bytes) std::memset(map_ + kPage, 0xff, bytes);
    shared_ = map_ + kPage + (bytes - size_t(shared_bytes));  // ends where the page does that must not be touched
    for (int i = 0; i < threads; ++i) {
      fibers_[i].index = i;
      fibers_[i].copies.emplace_back();
      ++warps_[i / kLanes].expected;
    }
    const char* order = std::getenv("MNV2_EMULATION_ORDER");
    const std::string name = order ? order : "forward";
    lazy_ = name != "forward";
    order_.resize(threads);
    for (int i = 0; i < threads; ++i) order_[i] = name == "backward" ? threads - 1 - i : i;
    random_ = name == "random";
  }
  ~Block() { munmap(map_, map_bytes_); }
  Block(const Block&) = delete;

  void run() {
    current() = this;
    while (done_ < threads()) {
      if (random_) shuffle_order();
      moved_ = false;
      for (const int i : order_) step(fibers_[i]);
      if (!moved_) fail("threads wait for others that have ended or wait elsewhere");
    }
    current() = nullptr;
  }

  Fiber& thread() { return *now_; }
  int threads() const { return int(fibers_.size()); }
  dim3 index() const { return index_; }
  dim3 grid() const { return grid_; }
  char* shared() const { return shared_; }
  bool lazy() const { return lazy_; }

  void sync() {
    if (++at_barrier_ < threads()) return wait(Fiber::kAtBarrier);
    at_barrier_ = 0;
    release(Fiber::kAtBarrier, 0, threads());
  }

  // Each lane's value, once all lanes of the warp have brought theirs.
  template <class T>
  void exchange(const T& mine, T (&all)[kLanes]) {
    static_assert(sizeof(T) <= Warp::kBytes);
    const int index = now_->index, lane = index % kLanes, first = index - lane;
    Warp& warp = warps_[index / kLanes];
    if (warp.expected != kLanes) fail("a warp that is not full does what all its lanes must do");
    unsigned char (&slots)[kLanes][Warp::kBytes] = warp.slots[warp_parity(index)];
    std::memcpy(slots[lane], &mine, sizeof(T));
    if (++warp.arrived < kLanes) {
      wait(Fiber::kAtWarp);
    } else {
      warp.arrived = 0;
      release(Fiber::kAtWarp, first, first + kLanes);
    }
    for (int i = 0; i < kLanes; ++i) std::memcpy(&all[i], slots[i], sizeof(T));
  }

 private:
  // Until it waits or ends. What lives across the jump is in members.
  void step(Fiber& fiber) {
    if (fiber.state != Fiber::kReady) return;
    moved_ = true;
    now_ = &fiber;
    if (!_setjmp(scheduler_)) resume(fiber);
    done_ += now_->state == Fiber::kDone;
  }

  int warp_parity(int index) {
    parities_.resize(fibers_.size());
    return parities_[index] ^= 1;
  }

  void wait(Fiber::State state) {
    now_->state = state;
    Fiber& fiber = *now_;
    if (!_setjmp(fiber.context)) _longjmp(scheduler_, 1);
  }
  void release(Fiber::State state, int first, int end) {
    for (int i = first; i < end; ++i) {
      if (fibers_[i].state == state) fibers_[i].state = Fiber::kReady;
    }
  }

  // Stacks are kept from launch to launch.
  static char* stack(int index) {
    static thread_local std::vector<std::unique_ptr<char[]>> stacks;
    while (int(stacks.size()) <= index) stacks.emplace_back(new char[kStack]);
    return stacks[index].get();
  }

  void resume(Fiber& fiber) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack(fiber.index);
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Block::begin, 0);
    setcontext(&context);
  }
  static void begin() {
    Block* const block = current();
    block->body_(block->args_);
    for (const auto& group : block->now_->copies) {
      if (!group.empty()) fail("a thread has ended before its copies arrived");
    }
    block->now_->state = Fiber::kDone;
    _longjmp(block->scheduler_, 1);
  }

  void shuffle_order() {
    for (size_t i = order_.size(); i > 1; --i) {
      seed_ = seed_ * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(order_[i - 1], order_[(seed_ >> 33) % i]);
    }
  }

  const dim3 index_, grid_;
  void (*const body_)(const void*);
  const void* const args_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<char> parities_;
  std::vector<int> order_;
  uint64_t seed_ = 1;
  bool random_ = false, lazy_ = false;
  Fiber* now_ = nullptr;
  jmp_buf scheduler_;
  int at_barrier_ = 0, done_ = 0;
  bool moved_ = false;
  char *map_ = nullptr, *shared_ = nullptr;
  size_t map_bytes_ = 0;
};

}  // namespace host

inline int thread_index() { return host::Block::current()->thread().index; }
inline int thread_count() { return host::Block::current()->threads(); }
inline int block_x() { return int(host::Block::current()->index().x); }
inline int block_y() { return int(host::Block::current()->index().y); }
inline int blocks_x() { return int(host::Block::current()->grid().x); }
inline int blocks_y() { return int(host::Block::current()->grid().y); }
inline int anew(int v) { return v; }
inline char* shared_memory() { return host::Block::current()->shared(); }
inline void sync() { host::Block::current()->sync(); }

inline float shuffle(float v, int lane) {
  float all[host::kLanes];
  host::Block::current()->exchange(v, all);
  return all[lane % host::kLanes];
}
inline float shuffle_xor(float v, int mask) { return shuffle(v, thread_index() % host::kLanes ^ mask); }

inline bool is_last(unsigned* counter, unsigned count, int* flag) {
  sync();
  if (thread_index() == 0) *flag = (*counter)++ == count - 1;
  sync();
  return *flag != 0;
}

inline uint32_t as_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

namespace host {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return as_float(sign | as_bits(as_float(magnitude << 13) * 0x1p112f));
}
inline uint16_t float_to_half(float v) {
  const uint32_t bits = as_bits(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more
  if (magnitude < 0x38800000) {                                 // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    return uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return uint16_t(sign | (rounded - 0x38000000) >> 13);
}
inline float bfloat16_to_float(uint16_t b) { return as_float(uint32_t(b) << 16); }
inline uint16_t float_to_bfloat16(float v) {
  const uint32_t bits = as_bits(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
float value(uint16_t bits);
template <>
inline float value<Half>(uint16_t bits) {
  return half_to_float(bits);
}
template <>
inline float value<Bfloat16>(uint16_t bits) {
  return bfloat16_to_float(bits);
}
template <class T>
uint16_t rounded(float v);
template <>
inline uint16_t rounded<Half>(float v) {
  return float_to_half(v);
}
template <>
inline uint16_t rounded<Bfloat16>(float v) {
  return float_to_bfloat16(v);
}

}  // namespace host

inline float to_float(Half v) { return host::half_to_float(v.bits); }
inline float to_float(Bfloat16 v) { return host::bfloat16_to_float(v.bits); }
inline void from_float(float v, Half* to) { to->bits = host::float_to_half(v); }
inline void from_float(float v, Bfloat16* to) { to->bits = host::float_to_bfloat16(v); }

inline float min_nan(float a, float b) { return a != a || b != b ? NAN : std::min(a, b); }
inline float max_nan(float a, float b) { return a != a || b != b ? NAN : std::max(a, b); }

template <class T>
uint32_t pack(float low, float high) {
  return host::rounded<T>(low) | uint32_t(host::rounded<T>(high)) << 16;
}
template <class T>
uint32_t pack_relu6(float low, float high) {
  const auto relu6 = [](float v) { return min_nan(max_nan(v, 0.0f), 6.0f); };
  return pack<T>(relu6(low), relu6(high));
}
// To nearest, ties away from 0.
inline float round_tf32(float v) { return std::isfinite(v) ? as_float((as_bits(v) + 0x1000) & ~0x1fffu) : v; }
inline uint32_t select_bytes(uint32_t word, uint32_t selector) {
  const uint64_t bytes = word;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) host::fail("a matrix's row is not aligned to 16 bytes");
  const void* rows[host::kLanes];
  host::Block::current()->exchange(row, rows);
  const int lane = thread_index() % host::kLanes;
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], static_cast<const char*>(rows[i * 8 + lane / 4]) + lane % 4 * 4, 4);
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) host::fail("a matrix's row is not aligned to 16 bytes");
  const void* rows[host::kLanes];
  host::Block::current()->exchange(row, rows);
  const int lane = thread_index() % host::kLanes, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) std::memcpy(&pair[j], static_cast<const char*>(rows[i * 8 + 2 * t + j]) + g * 2, 2);
    r[i] = pair[0] | uint32_t(pair[1]) << 16;
  }
}

namespace host {

// c += a . b from all lanes' fragments; a(row, k) and b(k, column) find an element in them.
template <int K, class Words, class A, class B>
void multiply_fragments(float (&c)[4], const Words& mine, const A& a, const B& b) {
  Words all[kLanes];
  Block::current()->exchange(mine, all);
  const int lane = thread_index() % kLanes, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < K; ++k) sum += double(a(all, row, k)) * double(b(all, k, column));
    c[i] = float(sum);
  }
}

template <int Words>
struct Operands {
  uint32_t a[2 * Words], b[Words];
};

// Of 16-bit numbers, K = 8 Words.
template <class T, int Words>
void multiply_halves(float (&c)[4], const Operands<Words>& mine) {
  const auto half = [](uint32_t word, int k) { return value<T>(uint16_t(word >> k % 2 * 16)); };
  multiply_fragments<8 * Words>(
      c, mine,
      [&](const auto& all, int row, int k) { return half(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k); },
      [&](const auto& all, int k, int column) { return half(all[column * 4 + k % 8 / 2].b[k / 8], k); });
}

}  // namespace host

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  host::multiply_halves<T, 2>(c, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
}
template <class T>
void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b, T) {
  host::multiply_halves<T, 1>(c, {{a0, a1}, {b}});
}
inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tf32) {
  const auto number = [](uint32_t word) { return as_float(word & ~0x1fffu); };  // the hardware reads no further
  host::multiply_fragments<8>(
      c, host::Operands<2>{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}},
      [&](const auto& all, int row, int k) { return number(all[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]); },
      [&](const auto& all, int k, int column) { return number(all[column * 4 + k % 4].b[k / 4]); });
}

inline void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (valid && reinterpret_cast<uintptr_t>(global) % 16)) {
    host::fail("a copy is not aligned to 16 bytes");
  }
  host::Block& block = *host::Block::current();
  if (!block.lazy()) valid ? std::memcpy(shared, global, 16) : std::memset(shared, 0, 16);
  block.thread().copies.back().push_back({shared, valid ? global : nullptr});
}
inline void commit_copies() { host::Block::current()->thread().copies.emplace_back(); }
template <int Pending>
void wait_copies() {
  host::Block& block = *host::Block::current();
  auto& groups = block.thread().copies;
  while (groups.size() > size_t(Pending) + 1) {
    for (const host::Copy& copy : groups.front()) {
      if (block.lazy()) copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

template <class Kernel>
int launch(const typename Kernel::Args& args, dim3 grid, int threads, int shared_bytes, void*) {
  if (threads > Kernel::kMaxThreads) host::fail("more threads than the kernel is compiled for");
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        const auto body = [](const void* a) { Kernel::run(*static_cast<const typename Kernel::Args*>(a)); };
        host::Block(dim3(x, y, z), grid, threads, shared_bytes, body, &args).run();
      }
    }
  }
  return 0;
}

}  // namespace mnv2_fused::device
