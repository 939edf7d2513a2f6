#include "training-inl.h"

const mnv2_fused::cuda::TrainingLaunches mnv2_fused::cuda::single_training =
    mnv2_fused::cuda::training_launches<float>();
