// The steps of the algebra of training on the device, a thread for each channel or element.
#include "../algebra.h"
#include "device.h"

namespace mnv2_fused::cuda {

template <class Steps>
struct Each {
  struct Args {
    Steps steps;
    int64_t n;
  };
  static constexpr int kMaxThreads = 128, kMinBlocks = 1;

  static MNV2_DEVICE void run(const Args& a) {
    const int64_t i = int64_t(device::block_x()) * device::thread_count() + device::thread_index();
    if (i < a.n) a.steps(i);
  }
};

template <class Steps>
int each(const Steps& steps, int64_t n, void* stream) {
  constexpr int kThreads = Each<Steps>::kMaxThreads;
  return device::launch<Each<Steps>>({steps, n}, dim3(unsigned((n + kThreads - 1) / kThreads)), kThreads, 0, stream);
}

using namespace algebra;

#define MNV2_EACH(...) template int each(const __VA_ARGS__&, int64_t, void*)

// What does not depend on the type of the weights.
MNV2_EACH(Channels<Counts>);
MNV2_EACH(Beside<Channels<Counts>, Beside<Channels<Copy>, Channels<Copy>>>);
MNV2_EACH(Channels<Scaled>);
MNV2_EACH(Channels<Mean>);
MNV2_EACH(Channels<Moved>);
MNV2_EACH(Elements<Moved>);
MNV2_EACH(Channels<Then<Mean, NormTable>>);
MNV2_EACH(Channels<NormBounds>);
MNV2_EACH(Beside<Channels<NormBounds>, Channels<ExpandInputs>>);
MNV2_EACH(Channels<Then<NormSums, NormBackward>>);
MNV2_EACH(Channels<NormSums>);
MNV2_EACH(Channels<NormBackward>);
MNV2_EACH(Channels<SumTable>);
MNV2_EACH(Channels<DepthwiseTable>);
MNV2_EACH(Channels<ExpandBackward>);
MNV2_EACH(Channels<Deviation>);

#define MNV2_EACH_OF(T)                                                                        \
  MNV2_EACH(Elements<CovarianceTimes<T>>);                                                     \
  MNV2_EACH(Blocks<ExpandStatistics<T>>);                                                      \
  MNV2_EACH(Blocks<ExpandFold<T>>);                                                            \
  MNV2_EACH(Channels<Then<Mean, DepthwiseFold<T>>>);                                           \
  MNV2_EACH(Blocks<Then<ExpandFold<T>, DepthwiseTable>>);                                      \
  MNV2_EACH(Blocks<Then<ExpandSums<T>, ExpandBackward>>);                                      \
  MNV2_EACH(Blocks<ExpandSums<T>>);                                                            \
  MNV2_EACH(Blocks<Rest<T>>);                                                                  \
  MNV2_EACH(Elements<ExpandGradient<T>>);                                                      \
  MNV2_EACH(Beside<Elements<Then<CovarianceTimes<T>, ExpandGradient<T>>>, Elements<Gram<T>>>); \
  MNV2_EACH(Blocks<ExpandShift<T>>);                                                           \
  MNV2_EACH(Elements<Transposed<T>>)

MNV2_EACH_OF(double);
MNV2_EACH_OF(float);
MNV2_EACH_OF(Half);
MNV2_EACH_OF(Bfloat16);

}  // namespace mnv2_fused::cuda
