// Memory of large CPU tensors, kept for the next ones of about their size. A step of training makes a hundred of them;
// glibc gives memory of that size back to the system as soon as it is free, and to fault its pages in again takes a
// tenth to a half of the step.
#include <algorithm>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "tensors.h"

// torch's own from 2.11 on; before that nothing is kept.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace mnv2_fused {
namespace {

constexpr int64_t kSmallest = 1 << 20;  // bytes; what is smaller is left to torch

// Holds at most half as much again as was ever in use at once since it was last emptied. What it holds comes from
// torch's allocator, so that torch's profiler sees it.
class Pool {
 public:
  struct Block {
    Tensor memory;
    int64_t bytes;
  };

  // Never destroyed: tensors may outlive whatever is destroyed when a process ends.
  static Pool& instance() {
    static Pool* const pool = new Pool;
    return *pool;
  }

  Block take(int64_t bytes) {
    std::unique_lock<std::mutex> lock(mutex_);
    auto best = idle_.end();
    for (auto b = idle_.begin(); b != idle_.end(); ++b) {
      const bool fits = b->bytes >= bytes && b->bytes <= bytes + bytes / 4;
      if (fits && (best == idle_.end() || b->bytes < best->bytes)) best = b;
    }
    if (best != idle_.end()) {
      Block block = std::move(*best);
      idle_.erase(best);
      idle_bytes_ -= block.bytes;
      use(block.bytes);
      return block;
    }
    lock.unlock();
    const std::vector<int64_t> size = {bytes};
    Block block{torch::stable::empty(size, ScalarType::Byte), bytes};
    advise_huge_pages(block.memory.data_ptr(), size_t(bytes));
    lock.lock();
    use(bytes);
    return block;
  }

  void give(Block&& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= block.bytes;
    idle_bytes_ += block.bytes;
    idle_.push_front(std::move(block));
    trim();
  }

  int64_t empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.clear();
    most_used_ = used_;
    return std::exchange(idle_bytes_, 0);
  }

 private:
  void use(int64_t bytes) {
    used_ += bytes;
    most_used_ = std::max(most_used_, used_);
    trim();
  }

  void trim() {  // what has been idle for the longest first
    while (!idle_.empty() && used_ + idle_bytes_ > most_used_ + most_used_ / 2) {
      idle_bytes_ -= idle_.back().bytes;
      idle_.pop_back();
    }
  }

  std::mutex mutex_;
  std::deque<Block> idle_;  // the last to come first
  int64_t used_ = 0, most_used_ = 0, idle_bytes_ = 0;
};

std::vector<int64_t> strides_of(const std::vector<int64_t>& shape, MemoryFormat format) {
  if (format == MemoryFormat::ChannelsLast) {
    return {shape[1] * shape[2] * shape[3], 1, shape[1] * shape[3], shape[1]};
  }
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return strides;
}

}  // namespace

Tensor new_cpu_tensor(const std::vector<int64_t>& shape, ScalarType dtype, MemoryFormat format) {
  int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  for (const int64_t n : shape) bytes *= n;
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::vector<int64_t> strides = strides_of(shape, format);
  const int32_t type = to<int32_t>(from(dtype));
  AtenTensorHandle handle;
  if (bytes < kSmallest || !torch_from_blob) {
    // Not torch::stable::empty, which looks the op up by its name and goes through boxes.
    const auto code = aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), type,
                                               aoti_torch_device_type_cpu(), -1, &handle);
    STD_TORCH_CHECK(code == AOTI_TORCH_SUCCESS, "torch made no tensor");
    return Tensor(handle);
  }
  auto block = std::make_unique<Pool::Block>(Pool::instance().take(bytes));
  const auto code = torch_from_blob(
      block->memory.data_ptr(), int64_t(shape.size()), shape.data(), strides.data(), 0, type,
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* context) {
        const std::unique_ptr<Pool::Block> done(static_cast<Pool::Block*>(context));
        Pool::instance().give(std::move(*done));
      },
      block.get());
  STD_TORCH_CHECK(code == AOTI_TORCH_SUCCESS, "torch made no tensor of memory that it gave");
  block.release();
  return Tensor(handle);
}

int64_t empty_cache() { return Pool::instance().empty() + Arena::release(); }

}  // namespace mnv2_fused
