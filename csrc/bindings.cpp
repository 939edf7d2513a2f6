// Python bindings of what is not a tensor operation: the kernel table, CPU features, the peak, the build report.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>

#include "cpu/network.h"
#ifdef MNV2_FUSED_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace py = pybind11;

// torch's stable C interface, whose headers pybind11's refuse: an at::Tensor's address and where to put its data's.
extern "C" int32_t aoti_torch_get_data_ptr(void* const* tensor, void** data);

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

// What the packed weights of a model were made from: which objects its dictionaries hold, the version and the address
// of every tensor. Some three thousand cache lines, which the weights of the last image have pushed out: missed one
// after the other they take a tenth of the time of the whole network, so all are asked for before the first is read.
//
// Everything is borrowed: the Python side keeps it alive, where the garbage collector sees it.
class Watch {
 public:
  // `plain`: only what every Python and every torch can be asked, as where their insides are not as expected.
  Watch(const py::list& dicts, const py::list& sized, const py::list& parameters, const py::list& buffers, bool plain)
      : tags_(!plain), direct_(!plain && version_function()) {
    for (const py::list* list : {&dicts, &sized}) {
      for (const py::handle dict : *list) {
        dicts_.push_back({dict.ptr(), PyDict_Size(dict.ptr()), tag_of(dict.ptr()), values_.size(), list == &dicts});
        if (list == &dicts) each_value(dict.ptr(), [&](PyObject* value) { values_.push_back(value); });
        will_read_dict(dicts_.back());
      }
    }
    for (const py::list* list : {&parameters, &buffers}) {
      for (const py::handle tensor : *list) {
        PyObject* const o = tensor.ptr();
        // module.to() keeps a parameter and moves it to other memory; a buffer it replaces.
        tensors_.push_back({o, impl_of(o), version_of(o), list == &parameters ? address_of(o) : 0});
        const long long cdata = as_integer(PyObject_GetAttrString(o, "_cdata"));
        direct_ = direct_ && reinterpret_cast<long long>(tensors_.back().impl) == cdata;
        will_read_tensor(tensors_.back());
      }
    }
    std::sort(lines_.begin(), lines_.end());
    lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
  }

  bool unchanged() {
    for (const uintptr_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line));
    for (Dict& dict : dicts_) {
      const uint64_t tag = tag_of(dict.object);
      if (tag == dict.tag && tag != kNoTag) continue;
      if (!same(dict)) return false;
      dict.tag = tag;  // model.eval() once more, say: written to, but with what was there
    }
    for (const Tensor& tensor : tensors_) {
      if (tensor.version < 0 || !(direct_ ? same_directly(tensor) : same(tensor))) return false;
    }
    return true;
  }

 private:
  struct Dict {
    PyObject* object;
    Py_ssize_t size;
    uint64_t tag;
    size_t first_value;  // in values_
    bool compared;       // or only its size
  };

  bool same(const Dict& dict) const {
    if (PyDict_Size(dict.object) != dict.size) return false;
    bool same = true;
    size_t next = dict.first_value;
    if (dict.compared) each_value(dict.object, [&](PyObject* value) { same = same && values_[next++] == value; });
    return same;
  }

  // A number that every write to any dictionary sets anew (PEP 509), as long as Python had such a thing.
  static constexpr uint64_t kNoTag = 0;
  uint64_t tag_of(PyObject* dict) const {
#if PY_VERSION_HEX < 0x030C0000
    if (tags_) return reinterpret_cast<const PyDictObject*>(dict)->ma_version_tag;
#endif
    return kNoTag;
  }

  struct Tensor {
    PyObject* object;
    void* impl;
    long long version, address;  // -1: an inference tensor, which counts no versions; 0: not compared
  };

  static bool same(const Tensor& t) {
    return version_of(t.object) == t.version && (!t.address || address_of(t.object) == t.address);
  }

  // The same without going through Python: what torch.Tensor's object holds is an at::Tensor, a pointer, which torch's
  // own functions take. Only where both are found to be so.
  static bool same_directly(const Tensor& t) {
    if (impl_of(t.object) != t.impl) return false;
    try {
      if (version_function()(&t.impl) != t.version) return false;
    } catch (...) {
      return false;  // became an inference tensor
    }
    void* data = nullptr;
    return !t.address ||
           (aoti_torch_get_data_ptr(&t.impl, &data) == 0 && reinterpret_cast<long long>(data) == t.address);
  }

  // at::TensorBase::_version() const; null in a torch that has none.
  using VersionFunction = int64_t (*)(void* const* tensor);
  static VersionFunction version_function() {
    static const auto function =
        reinterpret_cast<VersionFunction>(dlsym(RTLD_DEFAULT, "_ZNK2at10TensorBase8_versionEv"));
    return function;
  }

  static void* impl_of(PyObject* tensor) { return reinterpret_cast<void* const*>(tensor + 1)[0]; }

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

  // Lines to fetch ahead. They are a hint: what moved since, or what is laid out otherwise in another version of
  // Python or torch, is read all the same, only later.
  void will_read(const void* begin, size_t bytes) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(begin) / kLine;
    for (uintptr_t line = first; line * kLine < reinterpret_cast<uintptr_t>(begin) + bytes; ++line) {
      lines_.push_back(line * kLine);
    }
  }

  void will_read_dict(const Dict& dict) {
    const auto* object = reinterpret_cast<const PyDictObject*>(dict.object);
    will_read(object, sizeof(PyDictObject));
    if (dict.tag != kNoTag || !dict.compared) return;
    const size_t entries = dict.size * 3 * sizeof(PyObject*);  // hash, key, value
    will_read(object->ma_keys, 2 * kLine + entries);
    if (object->ma_values) will_read(object->ma_values, kLine + entries);
  }

  // The object, its at::TensorImpl, and what that points to: the storage, the counter of versions.
  void will_read_tensor(const Tensor& t) {
    will_read(t.object, sizeof(PyObject) + sizeof(void*));
    if (!direct_) return;
    will_read(t.impl, t.address ? 192 : 64);
    const auto* words = static_cast<const uintptr_t*>(t.impl);
    for (size_t i = 1; i < 8; ++i) {
      if (words[i] > (1 << 20) && words[i] % sizeof(void*) == 0) will_read(reinterpret_cast<const void*>(words[i]), 32);
    }
  }

  static constexpr size_t kLine = 64;

  std::vector<Dict> dicts_;
  std::vector<PyObject*> values_;
  std::vector<Tensor> tensors_;
  const bool tags_;
  bool direct_;
  std::vector<uintptr_t> lines_;
};

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
      .def("unchanged", &Watch::unchanged);
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
