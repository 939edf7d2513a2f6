#include "training-inl.h"

const mnv2_fused::cuda::TrainingLaunches mnv2_fused::cuda::half_training =
    mnv2_fused::cuda::training_launches<mnv2_fused::device::Half>();
