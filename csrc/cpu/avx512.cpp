// The AVX-512 row of the kernel table: only what this ISA changes.
#include <immintrin.h>

// GCC 12 sees the deliberately undefined pass-through operand of the AVX-512 min and max as a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "../inverted_residual.h"

namespace mnv2_fused::avx512 {
namespace {

#include "avx512-inl.h"
#include "forward-inl.h"
#include "training-inl.h"

const char* const kFeatures[] = {"avx512f", "avx512bw", "avx512dq", "avx512vl", nullptr};

}  // namespace

extern const Kernel kernel_f32;
const Kernel kernel_f32 = Training<Float32>::kernel("avx512_f32", Dtype::kFloat32, kFeatures);

}  // namespace mnv2_fused::avx512
