// A network that is called without torch's dispatcher. No headers of torch and of Python here: ops.cpp has the ones,
// watch.h the others.
#pragma once

#include <memory>
#include <string>

namespace mnv2_fused {

// A plan over its packed weights, run without torch's dispatcher (ops.cpp). Images and results are the addresses of
// at::Tensors, the latter owned by the caller.
class Direct {
 public:
  virtual ~Direct() = default;
  virtual void* const* run(void* const* x) = 0;
};
std::shared_ptr<Direct> make_direct(void* const* packed, const std::string& plan);

}  // namespace mnv2_fused
