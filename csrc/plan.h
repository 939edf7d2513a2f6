// The layers of a plan, checked; all that runs a plan begins here. A plan is a text, which ops.py writes: one word, for
// what runs the layers, and the integers of each. A list of as many integers would cost a call more than all the rest
// of what lies between Python and the kernels.
#pragma once

#include <initializer_list>
#include <sstream>
#include <string>

#include "tensors.h"

namespace mnv2_fused {

#define MNV2_PACK "pack(Tensor weights, str plan) -> Tensor"
#define MNV2_NETWORK "network(Tensor x, Tensor packed, str plan) -> Tensor"

inline std::string plan_of(const std::string& runs, std::initializer_list<int64_t> integers) {
  std::string plan = runs;
  for (const int64_t n : integers) plan += ' ' + std::to_string(n);
  return plan;
}

// Puts the first word into `runs`.
inline std::vector<Layer> parse_layers(const std::string& plan, std::string* runs) {
  std::istringstream words(plan);
  words >> *runs;
  std::vector<int64_t> integers;
  for (int64_t n; words >> n;) integers.push_back(n);
  const int64_t fields = Layer::kFields, count = int64_t(integers.size());
  STD_TORCH_CHECK(words.eof() && count >= fields && count % fields == 0, "plan must be a kernel's name and ", fields,
                  " integers for each layer, got ", count, " integers", words.eof() ? "" : " and what is none");
  STD_TORCH_CHECK(count / fields <= 4096, "plan has ", count / fields, " layers, at most 4096 are allowed");
  std::vector<Layer> layers;
  int64_t channels = -1;
  bool pooled = false;
  for (int64_t at = 0; at < count; at += fields) {
    const int64_t* f = &integers[at];
    const Layer l = {f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8], f[9], f[10], f[11], f[12]};
    const int64_t index = at / fields;
    const auto check = [&](bool ok, const char* what) { STD_TORCH_CHECK(ok, "layer ", index, " of the plan: ", what); };
    const auto size = [](int64_t n) { return n >= 1 && n <= (1 << 20); };
    const auto pad = [](int64_t n) { return n >= 0 && n <= (1 << 20); };
    check(l.kind >= Layer::kConv3x3 && l.kind <= Layer::kLinear, "unknown kind");
    check(size(l.in_channels) && size(l.out_channels), "channels must be 1 to 2^20");
    check(channels < 0 || l.in_channels == channels, "in_channels differ from the layer before");
    check(l.kind != Layer::kConv3x3 || index == 0, "a dense 3x3 must be the first layer");
    check(l.kind != Layer::kLinear || (pooled && at + fields == count),
          "a linear layer must follow the pooling and be the last");
    check(!pooled || l.kind == Layer::kLinear, "only a linear layer may follow the pooling");
    check(l.kind != Layer::kPool || l.in_channels == l.out_channels, "pooling keeps the channels");
    if (l.kind == Layer::kBlock || l.kind == Layer::kConv3x3) {
      check(l.stride == 1 || l.stride == 2, "stride must be 1 or 2");
      check(size(l.dilation) && (l.kind == Layer::kBlock || l.dilation == 1),
            "dilation must be 1 to 2^20, and 1 of a dense 3x3");
      check(pad(l.pad_left) && pad(l.pad_right) && pad(l.pad_top) && pad(l.pad_bottom), "padding must be 0 to 2^20");
    }
    if (l.kind == Layer::kBlock) {
      check(size(l.hidden_channels), "hidden_channels must be 1 to 2^20");
      check(l.expand || l.hidden_channels == l.in_channels, "without expansion hidden_channels are in_channels");
      check(!l.residual || (l.stride == 1 && l.in_channels == l.out_channels &&
                            l.pad_left + l.pad_right == 2 * l.dilation && l.pad_top + l.pad_bottom == 2 * l.dilation),
            "a residual needs an output of the input's shape");
    }
    pooled = l.kind == Layer::kPool;
    channels = l.out_channels;
    layers.push_back(l);
  }
  return layers;
}

// `weights`, dense, must hold what the layers take, one after the other.
inline void check_weights(const Tensor& weights, const std::vector<Layer>& layers) {
  int64_t size = 0;
  for (const Layer& layer : layers) {
    for (const int64_t n : weight_sizes(layer)) size += n;
  }
  STD_TORCH_CHECK(weights.dim() == 1 && weights.is_contiguous() && weights.numel() == size,
                  "weights must be one dense row of ", size, " elements for this plan, got ", shape_of(weights));
}

}  // namespace mnv2_fused
