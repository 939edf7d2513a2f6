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

// What the packed weights of a model were made from: which objects its dictionaries hold, the version and the address
// of every tensor. Some thousand cache lines, which the weights of the last image have pushed out: asked for one after
// the other, as Python would, they take a tenth of the time of the whole network; fetched ahead of the reading, 3% to
// 7%.
//
// Everything is borrowed: the Python side keeps it alive, where the garbage collector sees it.
class Watch {
 public:
  Watch(const py::list& dicts, const py::list& sized, const py::list& parameters, const py::list& buffers) {
    for (const py::handle dict : dicts) {
      dicts_.push_back(dict.ptr());
      sizes_.push_back(PyDict_Size(dict.ptr()));
      each_value(dict.ptr(), [&](PyObject* value) { values_.push_back(value); });
    }
    for (const py::handle dict : sized) {
      sized_.push_back(dict.ptr());
      sizes_.push_back(PyDict_Size(dict.ptr()));
    }
    for (const py::list* tensors : {&parameters, &buffers}) {
      for (const py::handle tensor : *tensors) {
        tensors_.push_back(tensor.ptr());
        versions_.push_back(version_of(tensor.ptr()));
        // module.to() keeps a parameter and moves it to other memory; a buffer it replaces.
        if (tensors == &parameters) addresses_.push_back(address_of(tensor.ptr()));
      }
    }
  }

  bool unchanged() const {
    fetch_ahead();
    size_t next = 0;
    for (size_t i = 0; i < dicts_.size(); ++i) {
      if (PyDict_Size(dicts_[i]) != sizes_[i]) return false;
      bool same = true;
      each_value(dicts_[i], [&](PyObject* value) { same = same && values_[next++] == value; });
      if (!same) return false;
    }
    for (size_t i = 0; i < sized_.size(); ++i) {
      if (PyDict_Size(sized_[i]) != sizes_[dicts_.size() + i]) return false;
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (versions_[i] < 0 || version_of(tensors_[i]) != versions_[i]) return false;
    }
    for (size_t i = 0; i < addresses_.size(); ++i) {
      if (address_of(tensors_[i]) != addresses_[i]) return false;
    }
    return true;
  }

 private:
  // -1 for an inference tensor, which counts no versions.
  static long long version_of(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    return as_integer(PyObject_GetAttr(tensor, name));
  }

  static long long address_of(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    return as_integer(PyObject_CallMethodNoArgs(tensor, name));
  }

  static long long as_integer(PyObject* number) {
    const long long value = number ? PyLong_AsLongLong(number) : -1;
    Py_XDECREF(number);
    if (PyErr_Occurred()) PyErr_Clear();
    return value;
  }

  template <class F>
  static void each_value(PyObject* dict, const F& f) {
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(dict, &position, &key, &value)) f(value);
  }

  // First the objects, then what they point to: the tables of a dictionary, the implementation of a tensor. Where in
  // its object torch keeps that pointer is torch's affair: what looks like one is tried, since a prefetch cannot fault.
  void fetch_ahead() const {
    for (const auto* objects : {&dicts_, &sized_, &tensors_}) {
      for (PyObject* o : *objects) __builtin_prefetch(o);
    }
    for (PyObject* o : dicts_) {
      const auto* dict = reinterpret_cast<const PyDictObject*>(o);
      fetch_lines(dict->ma_keys);
      if (dict->ma_values) fetch_lines(dict->ma_values);
    }
    for (PyObject* o : tensors_) {
      const auto* words = reinterpret_cast<const uintptr_t*>(o);
      for (const uintptr_t word : {words[2], words[3]}) {  // behind the two of every Python object
        if (word > (1 << 20) && word % 16 == 0) fetch_lines(reinterpret_cast<const void*>(word));
      }
    }
  }

  static void fetch_lines(const void* begin) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(static_cast<const char*>(begin) + line * 64);
  }

  std::vector<PyObject*> dicts_, values_, sized_, tensors_;
  std::vector<Py_ssize_t> sizes_;
  std::vector<long long> versions_, addresses_;
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
  py::class_<Watch>(m, "Watch", "Whether dictionaries hold the same objects, and tensors the same values, as now.")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&>(), py::arg("dicts"),
           py::arg("sized"), py::arg("parameters"), py::arg("buffers"))
      .def("unchanged", &Watch::unchanged);
  m.def("build_report", [] {
    py::dict report;
    report["compiler"] = MNV2_FUSED_COMPILER;
    report["flags"] = MNV2_FUSED_FLAGS;
    report["torch"] = MNV2_FUSED_TORCH_VERSION;
    return report;
  });
}
