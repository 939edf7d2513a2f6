#include "launches-inl.h"

const mnv2_fused::cuda::Launches mnv2_fused::cuda::single = mnv2_fused::cuda::launches<float>();
