#include "launches-inl.h"

const mnv2_fused::cuda::Launches mnv2_fused::cuda::tf32 = mnv2_fused::cuda::launches<mnv2_fused::device::Tf32>();
