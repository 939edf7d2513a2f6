// Python bindings of what is not a tensor operation: the kernel table, CPU features, the peak, the build report.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>

#include "cpu/network.h"

namespace py = pybind11;

namespace mnv2_fused {
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
  for (const Dtype d : {Dtype::kFloat32, Dtype::kFloat64}) {
    if (dtype == dtype_name(d)) return select_kernel(d).name;
  }
  throw std::invalid_argument("no kernel computes in " + dtype + "; there are kernels for float32 and float64");
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

// The values of some dictionaries, to tell in microseconds whether any of them has been rebound, added or removed
// since: the same loop in Python takes a tenth of the time of a whole forward pass.
class Watch {
 public:
  explicit Watch(const py::list& dicts) {
    for (const py::handle dict : dicts) {
      dicts_.push_back(py::cast<py::dict>(dict));
      each(dicts_.back(), [&](PyObject* value) { values_.push_back(py::reinterpret_borrow<py::object>(value)); });
      sizes_.push_back(PyDict_Size(dict.ptr()));
    }
  }

  bool unchanged() const {
    size_t next = 0;
    bool same = true;
    for (size_t i = 0; same && i < dicts_.size(); ++i) {
      same = PyDict_Size(dicts_[i].ptr()) == sizes_[i];
      if (same) each(dicts_[i], [&](PyObject* value) { same = same && values_[next++].ptr() == value; });
    }
    return same;
  }

 private:
  template <class F>
  static void each(const py::dict& dict, const F& f) {
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(dict.ptr(), &position, &key, &value)) f(value);
  }
  std::vector<py::dict> dicts_;
  std::vector<Py_ssize_t> sizes_;
  std::vector<py::object> values_;  // kept alive, so that none is replaced by another at its address
};

}  // namespace
}  // namespace mnv2_fused

PYBIND11_MODULE(_C, m) {
  using namespace mnv2_fused;
  m.def("kernels", table, "Rows of the kernel table: (name, dtype, required features, supported, reason).");
  m.def("select", selected, py::arg("dtype"), "Name of the row that serves a dtype now.");
  m.def("cpu_name", cpu_name);
  m.def("cpu_features", [] {
    py::dict features;
    for (const auto& [name, present] : cpu_features()) features[name.c_str()] = present;
    return features;
  });
  m.def("fma_peak", fma_peak, py::arg("kernel"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
        "Multiply-adds of one thread in registers with a row's vectors, in 10^9 a second.");
  py::class_<Watch>(m, "Watch", "Whether the values of dictionaries are still the objects that they were.")
      .def(py::init<const py::list&>(), py::arg("dicts"))
      .def("unchanged", &Watch::unchanged);
  m.def("build_report", [] {
    py::dict report;
    report["compiler"] = MNV2_FUSED_COMPILER;
    report["flags"] = MNV2_FUSED_FLAGS;
    report["torch"] = MNV2_FUSED_TORCH_VERSION;
    return report;
  });
}
