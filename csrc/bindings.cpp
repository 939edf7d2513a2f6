// Python bindings of what is not a tensor operation: the kernel table, CPU features, the peak, the build report.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>

#include "cpu/network.h"
#include "watch.h"
#ifdef MNV2_FUSED_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace py = pybind11;

namespace mnv2_fused {

int64_t empty_cache();  // of pool.cpp

namespace {

std::string cpu_name() {
  unsigned registers[13] = {};
  for (unsigned leaf = 0; leaf < 3; ++leaf) {
    unsigned* r = registers + leaf * 4;
    asm volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(0x80000002u + leaf), "c"(0));
  }
  return reinterpret_cast<const char*>(registers);
}

const Kernel& kernel_named(const std::string& name) {
  for (const Kernel* kernel : kernels()) {
    if (name != kernel->name) continue;
    const std::string reason = why_unsupported(*kernel);
    if (!reason.empty()) throw std::invalid_argument(name + " cannot run: " + reason);
    return *kernel;
  }
  throw std::invalid_argument(name + " is no kernel");
}

py::list table() {
  py::list rows;
  for (const Kernel* kernel : kernels()) {
    py::list features;
    for (const char* const* name = kernel->requires_features; *name; ++name) features.append(*name);
    const std::string reason = why_unsupported(*kernel);
    rows.append(py::make_tuple(kernel->name, dtype_name(kernel->dtype), py::tuple(features), reason.empty(), reason));
  }
  return rows;
}

std::string selected(const std::string& dtype) {
  for (const Dtype d : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kInt8}) {
    if (dtype == dtype_name(d)) return select_kernel(d).name;
  }
  throw std::invalid_argument("no kernel computes in " + dtype +
                              "; there are kernels for float32, float64, bfloat16 and int8");
}

double fma_peak(const std::string& name, double seconds) {
  const Kernel& kernel = kernel_named(name);
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  double done = 0, elapsed = 0;
  while (elapsed < seconds) {
    done += kernel.fma_loop(10000);
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  }
  return done / elapsed * 1e-9;
}

// (first channel, end, first row, end) of everything that each thread makes of a step: a block's hidden channels and
// the rows of its output, or for a 1x1 output channels.
using Piece = std::array<int64_t, 4>;
py::list slices(const std::string& name, const std::vector<std::array<int64_t, Layer::kFields>>& plan, int64_t height,
                int64_t width, int threads) {
  const Kernel& kernel = kernel_named(name);
  std::vector<Layer> layers;
  for (const auto& f : plan) {
    layers.push_back({f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8], f[9], f[10], f[11], f[12]});
  }
  const Program program = schedule(kernel, layers, height, width);
  py::list steps;
  for (size_t i = 0; i < program.steps.size(); ++i) {
    const Step& s = program.steps[i];
    if (s.kind == Layer::kPool || s.kind == Layer::kLinear) continue;
    std::vector<std::vector<Piece>> of_threads(threads);
    for (int t = 0; t < threads; ++t) {
      for (int g = 0; g < (s.kind == Layer::kBlock ? s.groups : 1); ++g) {
        const Slice slice = slice_of(s, kernel.tiles, g, t, threads);
        const int64_t panel = kernel.tiles.panel, out = s.out_channels, hidden = s.hidden_channels;
        Piece piece = {0, out, slice.begin, slice.end};
        if (s.kind == Layer::kPointwise) {
          piece = {slice.begin * panel, std::min(slice.end * panel, out), 0, s.out_height};
        } else if (s.kind == Layer::kBlock) {
          piece = {group_panel(s, g) * panel, std::min(group_panel(s, g + 1) * panel, hidden), slice.begin, slice.end};
        }
        if (piece[0] < piece[1] && piece[2] < piece[3]) of_threads[t].push_back(piece);
      }
    }
    steps.append(py::make_tuple(program.last_layer[i], of_threads));
  }
  return steps;
}

}  // namespace
}  // namespace mnv2_fused

PYBIND11_MODULE(_C, m) {
  using namespace mnv2_fused;
  m.def("kernels", table, "Rows of the kernel table: (name, dtype, required features, supported, reason).");
  m.def("select", selected, py::arg("dtype"), "Name of the row that serves a dtype now.");
  m.def("empty_cache", mnv2_fused::empty_cache);
  m.def("cpu_name", cpu_name);
  m.def("cpu_features", [] {
    py::dict features;
    for (const auto& [name, present] : cpu_features()) features[name.c_str()] = present;
    return features;
  });
  m.def("fma_peak", fma_peak, py::arg("kernel"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
        "Multiply-adds of one thread in registers with a row's vectors, in 10^9 a second.");
  m.def("slices", slices, py::arg("kernel"), py::arg("layers"), py::arg("height"), py::arg("width"), py::arg("threads"),
        "How threads share one image, for each step before the mean: (last of the layers that it computes, of each "
        "thread [(first channel, end, first row, end)]), hidden channels and output rows of a block.");
  py::class_<Watch>(m, "Watch", "Whether dictionaries hold the same objects, and tensors the same values, as now.")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&, bool>(), py::arg("dicts"),
           py::arg("sized"), py::arg("parameters"), py::arg("buffers"), py::arg("plain") = false)
      .def("unchanged", &Watch::unchanged)
      .def("remember", &Watch::remember)
      .def("call", &Watch::call)
      .def_property_readonly("words", &Watch::words, "How many words of memory it compares; 0 where it asks Python.");
  m.def(
      "cuda_error",
      [](int device) -> std::string {
#ifdef MNV2_FUSED_WITH_CUDA
        const int error = cuda::try_device(device);
        return error ? cuda::error_text(error) : "";
#else
        return "no CUDA in this build, asked about device " + std::to_string(device);
#endif
      },
      py::arg("device"), "What a CUDA device says when a kernel of ours is loaded on it; \"\" when it can be.");
  m.def("build_report", [] {
    py::dict report;
    report["compiler"] = MNV2_FUSED_COMPILER;
    report["flags"] = MNV2_FUSED_FLAGS;
    report["torch"] = MNV2_FUSED_TORCH_VERSION;
    const bool cuda = *MNV2_FUSED_HAS_CUDA;  // else MNV2_FUSED_CUDA says why not
    report["cuda"] = cuda ? MNV2_FUSED_CUDA : "";
    report["no_cuda"] = cuda ? "" : MNV2_FUSED_CUDA;
    return report;
  });
}
