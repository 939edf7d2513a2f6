// Python bindings of what is not a tensor operation: the kernel table, CPU features, the peak, the build report.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
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
