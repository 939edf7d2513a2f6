// What the kernels need of the device, twice: as CUDA and PTX for nvcc, and as plain C++ that runs the threads of a
// block one after the other, each until it waits for others (host.h). A kernel is a struct with `Args`, `kMaxThreads`,
// `kMinBlocks` and a static `run(const Args&)`; `launch<Kernel>` starts it either way.
//
// Fragments are those of mma.sync (PTX ISA, "Matrix Fragments for mma.m16n8k16"): with g = lane / 4 and t = lane % 4, a
// lane holds of C rows g and g + 8 and columns 2t, 2t + 1; of A those rows, of B column g, and k pairs 2t, 2t + 1 (and
// 8 on), two 16-bit values to a word.
#pragma once

#include <cstdint>

namespace mnv2_fused::device {

constexpr int kWarp = 32;
// Bytes of shared memory that a block of threads may have: what devices of compute capability 8.6 and 8.9 give it.
constexpr int kMostShared = 99 << 10;

// Storage of 16-bit numbers; arithmetic is done in float or by the tensor cores.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};
// A float of which the tensor cores read the first 19 bits.
struct Tf32 {
  float value;
};

}  // namespace mnv2_fused::device

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MNV2_DEVICE __device__ __forceinline__
#define MNV2_UNROLL _Pragma("unroll")
#define MNV2_NO_UNROLL _Pragma("unroll 1")
#else
#include "host.h"
#define MNV2_DEVICE inline
#define MNV2_UNROLL
#define MNV2_NO_UNROLL
#endif

#ifdef __CUDACC__

namespace mnv2_fused::device {

// ------------------------------------------------------------------------------------------------------------- CUDA

MNV2_DEVICE int thread_index() { return int(threadIdx.x); }
MNV2_DEVICE int thread_count() { return int(blockDim.x); }
MNV2_DEVICE int block_x() { return int(blockIdx.x); }
MNV2_DEVICE int block_y() { return int(blockIdx.y); }
MNV2_DEVICE int blocks_x() { return int(gridDim.x); }
MNV2_DEVICE int blocks_y() { return int(gridDim.y); }
// The same number, of which the compiler does not know that it is.
MNV2_DEVICE int anew(int v) {
  asm volatile("" : "+r"(v));
  return v;
}
MNV2_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
MNV2_DEVICE void sync() { __syncthreads(); }
MNV2_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
MNV2_DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
// Adds one to a counter in global memory, after all this block wrote; true in all threads of the block that was the
// `count`th, which sees what the others wrote. `flag` is a word of shared memory.
MNV2_DEVICE bool is_last(unsigned* counter, unsigned count, int* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(counter, 1u) == count - 1;
  __syncthreads();
  if (*flag) __threadfence();
  return *flag;
}

MNV2_DEVICE float to_float(Half v) { return __half2float(__ushort_as_half(v.bits)); }
MNV2_DEVICE float to_float(Bfloat16 v) { return __bfloat162float(__ushort_as_bfloat16(v.bits)); }
MNV2_DEVICE void from_float(float v, Half* to) { to->bits = __half_as_ushort(__float2half_rn(v)); }
MNV2_DEVICE void from_float(float v, Bfloat16* to) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
MNV2_DEVICE float round_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
}
MNV2_DEVICE uint32_t as_bits(float v) { return __float_as_uint(v); }
MNV2_DEVICE float as_float(uint32_t v) { return __uint_as_float(v); }

// min and max that give NaN where either is one.
MNV2_DEVICE float min_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
MNV2_DEVICE float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// Two 16-bit numbers in a word, the first in its lower half; relu6 of both on the way.
template <class T>
MNV2_DEVICE uint32_t pack(float low, float high);
template <class T>
MNV2_DEVICE uint32_t pack_relu6(float low, float high);
template <>
MNV2_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
MNV2_DEVICE uint32_t pack<Bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
MNV2_DEVICE uint32_t pack_relu6<Half>(float low, float high) {
  uint32_t r;
  asm("{ .reg .b32 v, six; mov.b32 six, 0x46004600; cvt.rn.relu.f16x2.f32 v, %1, %2; min.NaN.f16x2 %0, v, six; }"
      : "=r"(r)
      : "f"(high), "f"(low));
  return r;
}
template <>
MNV2_DEVICE uint32_t pack_relu6<Bfloat16>(float low, float high) {
  uint32_t r;
  asm("{ .reg .b32 v, six; mov.b32 six, 0x40c040c0; cvt.rn.relu.bf16x2.f32 v, %1, %2; min.NaN.bf16x2 %0, v, six; }"
      : "=r"(r)
      : "f"(high), "f"(low));
  return r;
}
// Bytes of `word` and of 0 by the selector's four digits: 0 to 3 those of the word from its lowest on, 4 a zero.
MNV2_DEVICE uint32_t select_bytes(uint32_t word, uint32_t selector) { return __byte_perm(word, 0, selector); }

MNV2_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit (8x4 of 32-bit) numbers: lane i gives the address of row i % 8 of matrix i / 8, 16 bytes.
MNV2_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of 16-bit numbers, each matrix transposed.
MNV2_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a . b, [16 x 16] . [16 x 8], or with half as many words of a and b [16 x 8] . [8 x 8].
MNV2_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
MNV2_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
MNV2_DEVICE void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b, Half) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}
MNV2_DEVICE void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b, Bfloat16) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}
// The same [16 x 8] . [8 x 8] of 32-bit numbers: of A columns t and t + 4, of B rows t and t + 4.
MNV2_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tf32) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from global to shared memory, both aligned to 16; zeros where not `valid` (nothing is read then). In shared
// memory after wait_copies and a sync.
MNV2_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
MNV2_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` of the thread's committed groups are under way.
template <int Pending>
MNV2_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kMaxThreads, Kernel::kMinBlocks)
    entry(const __grid_constant__ typename Kernel::Args args) {
  Kernel::run(args);
}

// Returns a cudaError_t.
template <class Kernel>
int launch(const typename Kernel::Args& args, dim3 grid, int threads, int shared_bytes, void* stream) {
  if (shared_bytes > 48 << 10) {
    // Always the same number: the attribute is the function's, on a device, whoever launches it next.
    static thread_local int known_device = -1;
    int device = 0;
    if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return int(error);
    if (device != known_device) {
      const auto error = cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared);
      if (error != cudaSuccess) return int(error);
      known_device = device;
    }
  }
  entry<Kernel><<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
  return int(cudaGetLastError());
}

}  // namespace mnv2_fused::device

#endif
