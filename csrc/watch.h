// Noticing that what a model's weights were packed from has changed, and that a call is like one that was served.
#pragma once

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

// torch's stable C interface, whose headers pybind11's refuse. It takes the address of an at::Tensor, which is a
// pointer.
extern "C" {
int32_t aoti_torch_get_data_ptr(void* const* tensor, void** data);
int32_t aoti_torch_get_dim(void* const* tensor, int64_t* dim);
int32_t aoti_torch_get_sizes(void* const* tensor, int64_t** sizes);
int32_t aoti_torch_get_dtype(void* const* tensor, int32_t* dtype);
int32_t aoti_torch_get_device_type(void* const* tensor, int32_t* type);
bool aoti_torch_grad_mode_is_enabled();
}

namespace mnv2_fused {

namespace py = pybind11;

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
    fetch();
    return same();
  }

  // Lets calls like root(x), which has just been found to be able to use the weights, ask by `serves` alone. `handles`
  // is how many hooks had been registered anywhere when none was found inside, `kernel` the row that was asked for.
  void remember(const py::handle& root, const py::handle& x, int64_t handles, std::optional<std::string> kernel) {
    like_ = direct_ ? like(root, x) : Like{};
    like_.handles = handles;
    like_.kernel = kernel.value_or("");
  }

  // Whether root(x) is like that call and nothing has changed since. Between two images the caches lose the interpreter
  // as well: asked for from Python, one thing after the other, this took longer than all else around the kernels.
  bool serves(const py::handle& root, const py::handle& x) {
    if (!like_.root) return false;
    fetch();
    return like(root, x) == like_ && same();
  }

 private:
  // What decides whether a call may run as one op, beside what this class compares otherwise. The thread's dispatch
  // keys tell of autocast, tracing, function transforms and modes.
  struct Like {
    PyObject* root;  // null of a call that may not, or is not known to
    int64_t channels;
    int32_t dtype, device;
    uint64_t included, excluded;
    int64_t handles, tangents;
    std::string kernel;
    bool operator==(const Like& o) const {
      return root == o.root && channels == o.channels && dtype == o.dtype && device == o.device &&
             included == o.included && excluded == o.excluded && handles == o.handles && tangents == o.tangents &&
             kernel == o.kernel;
    }
  };

  static Like like(const py::handle& root, const py::handle& x) {
    // c10::impl::raw_local_dispatch_key_set, two sets of 64 bits; null in a torch that has none.
    static thread_local const auto* const keys =
        static_cast<const uint64_t*>(dlsym(RTLD_DEFAULT, "_ZN3c104impl26raw_local_dispatch_key_setE"));
    static PyObject* const tensor_type = attribute("torch", "Tensor");
    static PyObject* const handle_type = attribute("torch.utils.hooks", "RemovableHandle");
    static PyObject* const forward_ad = attribute("torch.autograd", "forward_ad");
    static PyObject* const next_id = PyUnicode_InternFromString("next_id");
    static PyObject* const level = PyUnicode_InternFromString("_current_level");
    Like like{};
    if (!keys || reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())) != tensor_type || aoti_torch_grad_mode_is_enabled()) {
      return like;
    }
    void* const impl = impl_of(x.ptr());
    int64_t dim = 0, *sizes = nullptr;
    const bool image = aoti_torch_get_dim(&impl, &dim) == 0 && dim == 4 && aoti_torch_get_sizes(&impl, &sizes) == 0 &&
                       sizes[2] > 0 && sizes[3] > 0 && aoti_torch_get_dtype(&impl, &like.dtype) == 0 &&
                       aoti_torch_get_device_type(&impl, &like.device) == 0;
    if (!image) return like;
    like.channels = sizes[1];
    like.included = keys[0];
    like.excluded = keys[1];
    like.handles = as_integer(PyObject_GetAttr(handle_type, next_id));
    like.tangents = as_integer(PyObject_GetAttr(forward_ad, level));
    const char* const kernel = std::getenv("MNV2_FUSED_KERNEL");
    if (kernel) like.kernel = kernel;
    like.root = root.ptr();
    return like;
  }

  static PyObject* attribute(const char* module, const char* name) {
    return py::object(py::module_::import(module).attr(name)).release().ptr();
  }

  void fetch() const {
    for (const uintptr_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line));
  }

  bool same() {
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
    will_read(object, 4 * sizeof(void*));  // up to the tag
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
  Like like_{};
};

}  // namespace mnv2_fused
