// What a call needs beside its kernels: working memory, and the way denormals are treated.
#pragma once

#include <sys/mman.h>
#include <xmmintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace mnv2_fused {

// Asks for 2 MB pages in freshly allocated memory. The 14 MB of weights that every image reads are 3,400 small pages,
// more than a TLB holds beside the rest; and to touch a page for the first time costs a microsecond.
inline void advise_huge_pages(void* data, size_t bytes) {
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  // Only a wish: where the system has no huge pages to give, everything works as before.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Working memory is kept between calls, one block for each call that runs at the same time: a few MB whose pages
// the system would otherwise zero anew for every image. What an unusually large image took is given back.
class Arena {
 public:
  explicit Arena(size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex());
      const auto largest = std::max_element(idle().begin(), idle().end(),
                                            [](const Block& a, const Block& b) { return a.size < b.size; });
      if (largest != idle().end()) {
        std::swap(*largest, idle().back());
        block_ = std::move(idle().back());
        idle().pop_back();
      }
    }
    if (block_.size < bytes) {
      block_.data.reset();
      block_.data.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      if (!block_.data) throw std::bad_alloc();
      advise_huge_pages(block_.data.get(), bytes);
      block_.size = bytes;
    }
  }
  ~Arena() {
    if (block_.size > kKept) return;
    std::lock_guard<std::mutex> lock(mutex());
    if (idle().size() < idle().capacity()) idle().push_back(std::move(block_));
  }
  char* data() const { return block_.data.get(); }

  // Frees what no call is using: bytes.
  static int64_t release() {
    std::lock_guard<std::mutex> lock(mutex());
    int64_t bytes = 0;
    for (const Block& block : idle()) bytes += int64_t(block.size);
    idle().clear();
    return bytes;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Block {
    std::unique_ptr<char, Free> data;
    size_t size = 0;
  };
  static std::mutex& mutex() {
    static std::mutex m;
    return m;
  }
  static std::vector<Block>& idle() {
    static std::vector<Block> blocks = [] {
      std::vector<Block> v;
      v.reserve(64);  // and no more: a destructor must not allocate
      return v;
    }();
    return blocks;
  }
  static constexpr size_t kKept = 64 << 20;
  Block block_;
};

// Denormals as zero, for the kernels only: they would slow them down a hundredfold on some CPUs.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

}  // namespace mnv2_fused
