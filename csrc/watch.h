// Noticing that what a model's weights were packed from has changed, and that a call is like one that was served.
#pragma once

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "direct.h"

// torch's stable C interface, whose headers pybind11's refuse. It takes the address of an at::Tensor, which is a
// pointer.
extern "C" {
int32_t aoti_torch_get_dim(void* const* tensor, int64_t* dim);
int32_t aoti_torch_get_sizes(void* const* tensor, int64_t** sizes);
int32_t aoti_torch_get_dtype(void* const* tensor, int32_t* dtype);
int32_t aoti_torch_get_device_type(void* const* tensor, int32_t* type);
bool aoti_torch_grad_mode_is_enabled();
int32_t aoti_torch_delete_tensor_object(void* const* tensor);
}

extern char** environ;

namespace mnv2_fused {

namespace py = pybind11;

inline long long as_integer(PyObject* number) {
  const long long value = number ? PyLong_AsLongLong(number) : -1;
  Py_XDECREF(number);
  if (PyErr_Occurred()) PyErr_Clear();
  return value;
}

// Where torch keeps what is compared here. Its headers promise nothing of it: all is found by looking at tensors of
// which it is known, and without it everything is asked for through Python.
class Layout {
 public:
  // What torch.Tensor's object holds is an at::Tensor, a pointer to an at::TensorImpl, of which these are words.
  size_t storage, version_counter, offset, keys;
  // Bytes into what the first two point to.
  size_t data, version;
  uint64_t plain_keys[2];  // of a dense tensor on the CPU: one of inference mode, another

  // Null where torch is not as expected; asked anew then, as it was perhaps but in an unusual mode.
  static const Layout* known() {
    static std::optional<Layout> found;
    if (!found) found = find();
    return found ? &*found : nullptr;
  }

  static void* const* tensor_of(PyObject* tensor) { return reinterpret_cast<void* const*>(tensor + 1); }
  static const uintptr_t* impl_of(PyObject* tensor) { return static_cast<const uintptr_t*>(*tensor_of(tensor)); }
  static uintptr_t cdata_of(const py::handle& o) { return o.attr("_cdata").cast<uintptr_t>(); }

 private:
  struct Inside {  // a context manager
    const py::object mode;
    explicit Inside(py::object m) : mode(std::move(m)) { mode.attr("__enter__")(); }
    ~Inside() { mode.attr("__exit__")(py::none(), py::none(), py::none()); }
  };

  static constexpr size_t kPointers = 8, kWords = 26;  // those that may be pointers come first

  static std::optional<Layout> find() try {
    const py::module_ torch = py::module_::import("torch");
    Layout l{};
    for (const bool inference : {true, false}) {
      const Inside mode(torch.attr("inference_mode")(inference));
      const py::object t = torch.attr("zeros")(5000, py::arg("device") = "cpu")[py::slice(4321, 4322, 1)];
      l.plain_keys[inference] = torch.attr("_C").attr("_dispatch_keys")(t).attr("raw_repr")().cast<uint64_t>();
      if (!inference) return find(t, l);
    }
    return std::nullopt;
  } catch (const py::error_already_set&) {
    return std::nullopt;
  }

  static std::optional<Layout> find(const py::object& t, Layout l) {
    const uintptr_t* const impl = impl_of(t.ptr());
    if (reinterpret_cast<uintptr_t>(impl) != cdata_of(t)) return std::nullopt;
    const py::object storage = t.attr("untyped_storage")();
    const uintptr_t data = storage.attr("data_ptr")().cast<uintptr_t>();
    const auto word = [](const uintptr_t* words, size_t end, uintptr_t value, size_t* at) {
      *at = std::find(words, words + end, value) - words;
      return *at < end;
    };
    if (!word(impl, kPointers, cdata_of(storage), &l.storage) || !word(impl, kWords, 4321, &l.offset) ||
        !word(impl, kWords, l.plain_keys[false], &l.keys) ||
        !word(reinterpret_cast<const uintptr_t*>(impl[l.storage]), 8, data, &l.data)) {
      return std::nullopt;
    }
    l.data *= sizeof(uintptr_t);
    // The version is the only number that grows with it. The words before are a table of functions and a count.
    constexpr size_t kFirst = 8, kLast = 24;
    std::vector<std::pair<size_t, size_t>> places;
    for (size_t i = 2; i < kPointers; ++i) {
      const bool pointer = impl[i] > (1 << 20) && impl[i] % sizeof(void*) == 0;
      for (size_t byte = kFirst; pointer && i != l.storage && byte <= kLast; byte += 4) places.push_back({i, byte});
    }
    for (const int changes : {0, 3, 1}) {
      for (int i = 0; i < changes; ++i) t.attr("zero_")();
      const auto version = t.attr("_version").cast<uint32_t>();
      const auto differs = [&](const std::pair<size_t, size_t>& p) {
        return *reinterpret_cast<const uint32_t*>(impl[p.first] + p.second) != version;
      };
      places.erase(std::remove_if(places.begin(), places.end(), differs), places.end());
    }
    if (places.size() != 1) return std::nullopt;
    l.version_counter = places[0].first;
    l.version = places[0].second;
    return l;
  }
};

// What the packed weights of a model were made from: which objects its dictionaries hold, the version and the address
// of every tensor. Between two images the weights of the last one have pushed all of it out of the caches. So it is
// written down as a list of words of memory and their values, all of which are asked for before the first is compared.
// Only where one differs is everything looked at again, one thing after the other.
//
// Everything is borrowed: the Python side keeps it alive, where the garbage collector sees it.
class Watch {
 public:
  // `plain`: only what every Python and every torch can be asked, as where their insides are not as expected.
  Watch(const py::list& dicts, const py::list& sized, const py::list& parameters, const py::list& buffers, bool plain)
      : plain_(plain) {
    for (const py::list* list : {&dicts, &sized}) {
      for (const py::handle dict : *list) {
        dicts_.push_back({dict.ptr(), PyDict_Size(dict.ptr()), values_.size(), list == &dicts});
        if (list == &dicts) each_value(dict.ptr(), [&](PyObject* value) { values_.push_back(value); });
      }
    }
    for (const py::list* list : {&parameters, &buffers}) {
      for (const py::handle tensor : *list) {
        PyObject* const o = tensor.ptr();
        // module.to() keeps a parameter and moves it to other memory; a buffer it replaces.
        tensors_.push_back({o, version_of(o), list == &parameters ? address_of(o) : 0});
      }
    }
    words_ = written_down();
  }

  size_t words() const { return words_ ? words_->size() : 0; }

  bool unchanged() {
    if (words_) words_->fetch();
    return same();
  }

  // Lets calls like root(x), which has just been found to be able to use the weights, be answered by `call`. `handles`
  // is how many hooks had been registered anywhere when none was found inside, `kernel` the row that was asked for.
  // The plan is one for all sizes of images or not, and computes in what autocast says or not. op(x, packed, plan) is
  // the call; where nothing `observes` the op, its kernels alone.
  void remember(const py::object& root, const py::handle& x, int64_t handles, std::optional<std::string> kernel,
                bool autocast, bool any_size, const py::object& op, const py::object& packed, const py::str& plan,
                bool observed) {
    autocast_ = autocast;
    any_size_ = any_size;
    like_ = Like{};
    const Layout* const layout = plain_ ? nullptr : Layout::known();
    like_ = like(root, x);
    like_.handles = handles;
    like_.kernel = kernel.value_or("");
    op_ = op;
    packed_ = packed;
    plan_ = plan;
    direct_.reset();
    if (like_.root && layout && !observed &&
        (like_.keys == layout->plain_keys[0] || like_.keys == layout->plain_keys[1]) && wrap_function() &&
        callbacks_function() && mode_function()) {
      direct_ = make_direct(Layout::tensor_of(packed.ptr()), plan);
    }
  }

  // The result of root(x), if it is like that call and nothing has changed since, else None. Between two images the
  // caches lose the interpreter and the dispatcher as well: asked for from Python, one thing after the other, and
  // called like any op, this took longer than all else around the kernels.
  py::object call(const py::handle& root, const py::handle& x) {
    if (!like_.root) return py::none();
    if (words_) words_->fetch();
    if (!(like(root, x) == like_) || !same()) return py::none();
    if (!direct_ || callbacks_function()() || mode_function()()) return op_(x, packed_, plan_);
    const std::shared_ptr<Direct> direct = direct_;
    void* const* y = nullptr;
    {
      const py::gil_scoped_release others_run;
      y = direct->run(Layout::tensor_of(x.ptr()));
    }
    PyObject* const result = wrap_function()(y);
    aoti_torch_delete_tensor_object(y);
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }

 private:
  // What decides whether a call may run as one op, beside what this class compares otherwise. The thread's dispatch
  // keys tell of autocast, tracing, function transforms and modes.
  struct Like {
    PyObject* root;  // null of a call that may not, or is not known to
    int64_t channels, height, width;
    int32_t dtype, device, autocast;
    uint64_t keys, included, excluded;
    int64_t handles, tangents;
    std::string kernel;
    bool operator==(const Like& o) const {
      return root == o.root && channels == o.channels && height == o.height && width == o.width && dtype == o.dtype &&
             device == o.device && autocast == o.autocast && keys == o.keys && included == o.included &&
             excluded == o.excluded && handles == o.handles && tangents == o.tangents && kernel == o.kernel;
    }
  };

  Like like(const py::handle& root, const py::handle& x) const {
    // c10::impl::raw_local_dispatch_key_set, two sets of 64 bits; null in a torch that has none.
    static thread_local const auto* const keys =
        static_cast<const uint64_t*>(dlsym(RTLD_DEFAULT, "_ZN3c104impl26raw_local_dispatch_key_setE"));
    // at::autocast::get_autocast_dtype(c10::DeviceType)
    static const auto autocast_dtype = reinterpret_cast<int8_t (*)(int8_t)>(
        dlsym(RTLD_DEFAULT, "_ZN2at8autocast18get_autocast_dtypeEN3c1010DeviceTypeE"));
    static PyObject* const tensor_type = attribute("torch", "Tensor");
    static PyObject* const handle_type = attribute("torch.utils.hooks", "RemovableHandle");
    static PyObject* const forward_ad = attribute("torch.autograd", "forward_ad");
    static PyObject* const next_id = PyUnicode_InternFromString("next_id");
    static PyObject* const level = PyUnicode_InternFromString("_current_level");
    Like like{};
    if (!keys || reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())) != tensor_type || aoti_torch_grad_mode_is_enabled()) {
      return like;
    }
    const Layout* const layout = plain_ ? nullptr : Layout::known();
    if (!layout) return like;
    void* const* const tensor = Layout::tensor_of(x.ptr());
    int64_t dim = 0, *sizes = nullptr;
    const bool image = aoti_torch_get_dim(tensor, &dim) == 0 && dim == 4 && aoti_torch_get_sizes(tensor, &sizes) == 0 &&
                       sizes[2] > 0 && sizes[3] > 0 && aoti_torch_get_dtype(tensor, &like.dtype) == 0 &&
                       aoti_torch_get_device_type(tensor, &like.device) == 0;
    if (!image) return like;
    like.channels = sizes[1];
    if (!any_size_) {
      like.height = sizes[2];
      like.width = sizes[3];
    }
    like.keys = Layout::impl_of(x.ptr())[layout->keys];
    like.included = keys[0];
    like.excluded = keys[1];
    if (autocast_) {
      if (!autocast_dtype) return like;
      like.autocast = autocast_dtype(int8_t(like.device));
    }
    like.handles = as_integer(PyObject_GetAttr(handle_type, next_id));
    like.tangents = as_integer(PyObject_GetAttr(forward_ad, level));
    if (std::getenv("MNV2_FUSED_DISABLE")) return like;  // the Python side reads what it says
    const char* const kernel = std::getenv("MNV2_FUSED_KERNEL");
    if (kernel) like.kernel = kernel;
    like.root = root.ptr();
    return like;
  }

  static PyObject* attribute(const char* module, const char* name) {
    return py::object(py::module_::import(module).attr(name)).release().ptr();
  }

  // THPVariable_Wrap(const at::TensorBase&), which makes the Python object of a tensor.
  using WrapFunction = PyObject* (*)(void* const* tensor);
  static WrapFunction wrap_function() {
    static const auto function = [] {
      void* const library = dlopen("libtorch_python.so", RTLD_LAZY | RTLD_NOLOAD);
      return library ? reinterpret_cast<WrapFunction>(dlsym(library, "_Z16THPVariable_WrapRKN2at10TensorBaseE"))
                     : nullptr;
    }();
    return function;
  }

  // Whether anything wants to see ops: at::hasCallbacks(), as a profiler does, and
  // at::impl::torch_function_mode_enabled().
  using AskFunction = bool (*)();
  static AskFunction callbacks_function() {
    static const auto function = reinterpret_cast<AskFunction>(dlsym(RTLD_DEFAULT, "_ZN2at12hasCallbacksEv"));
    return function;
  }
  static AskFunction mode_function() {
    static const auto function =
        reinterpret_cast<AskFunction>(dlsym(RTLD_DEFAULT, "_ZN2at4impl27torch_function_mode_enabledEv"));
    return function;
  }

  // A word of memory and what it held.
  template <class T>
  struct Word {
    const T* at;
    T value;
  };
  // What one list compares keeps alive what the next one reads.
  struct Words {
    std::vector<Word<uintptr_t>> objects, impls, storages;
    std::vector<Word<uint32_t>> versions;

    size_t size() const { return objects.size() + impls.size() + storages.size() + versions.size(); }
    void fetch() const {
      fetch(objects);
      fetch(impls);
      fetch(storages);
      fetch(versions);
    }
    bool same() const { return same(objects) && same(impls) && same(storages) && same(versions); }

   private:
    template <class T>
    static void fetch(const std::vector<Word<T>>& words) {
      // The compiler takes the builtin's loop for one that does nothing, and leaves it out.
      for (const Word<T>& word : words) asm volatile("prefetcht0 %0" ::"m"(*word.at));
    }
    template <class T>
    static bool same(const std::vector<Word<T>>& words) {
      bool same = true;
      for (const Word<T>& word : words) same = same & (*word.at == word.value);
      return same;
    }
  };

  bool same() {
    if (words_ && words_->same()) return kTags || same_dicts();
    if (!same_dicts()) return false;
    for (const Tensor& t : tensors_) {
      if (t.version < 0 || version_of(t.object) != t.version || (t.address && address_of(t.object) != t.address)) {
        return false;
      }
    }
    words_ = written_down();  // model.eval() once more, say: written to, but with what was there
    return true;
  }

  bool same_dicts() const {
    return std::all_of(dicts_.begin(), dicts_.end(), [this](const Dict& dict) { return same(dict); });
  }

  struct Dict {
    PyObject* object;
    Py_ssize_t size;
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

  struct Tensor {
    PyObject* object;
    long long version, address;  // -1: an inference tensor, which counts no versions; 0: not compared
  };

  // None where torch's insides are not as expected.
  std::optional<Words> written_down() const {
    const Layout* const layout = plain_ ? nullptr : Layout::known();
    if (!layout) return std::nullopt;
    Words words;
    const auto put = [](std::vector<Word<uintptr_t>>& list, const void* at) {
      const auto* word = static_cast<const uintptr_t*>(at);
      list.push_back({word, *word});
    };
#if PY_VERSION_HEX < 0x030C0000
    for (const Dict& dict : dicts_) {
      const auto* object = reinterpret_cast<const PyDictObject*>(dict.object);
      dict.compared ? put(words.objects, &object->ma_version_tag) : put(words.objects, &object->ma_used);
    }
#endif
    for (const Tensor& t : tensors_) {
      const uintptr_t* const impl = Layout::impl_of(t.object);
      if (t.version < 0 || reinterpret_cast<uintptr_t>(impl) != Layout::cdata_of(t.object)) return std::nullopt;
      put(words.objects, Layout::tensor_of(t.object));
      put(words.impls, impl + layout->version_counter);
      const auto* version = reinterpret_cast<const uint32_t*>(impl[layout->version_counter] + layout->version);
      if (*version != t.version) return std::nullopt;
      words.versions.push_back({version, *version});
      if (!t.address) continue;
      const py::object storage = py::handle(t.object).attr("untyped_storage")();
      if (impl[layout->storage] != Layout::cdata_of(storage)) return std::nullopt;
      put(words.impls, impl + layout->storage);
      put(words.impls, impl + layout->offset);
      put(words.storages, reinterpret_cast<const char*>(impl[layout->storage]) + layout->data);
      if (words.storages.back().value != storage.attr("data_ptr")().cast<uintptr_t>()) return std::nullopt;
    }
    for (auto* list : {&words.objects, &words.impls, &words.storages}) {
      std::sort(list->begin(), list->end(), [](const auto& a, const auto& b) { return a.at < b.at; });
    }
    return words;
  }

  // A number that every write to any dictionary sets anew (PEP 509), as long as Python had such a thing.
  static constexpr bool kTags = PY_VERSION_HEX < 0x030C0000;

  static long long version_of(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    return as_integer(PyObject_GetAttr(tensor, name));
  }

  static long long address_of(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    return as_integer(PyObject_CallMethodNoArgs(tensor, name));
  }

  template <class F>
  static void each_value(PyObject* dict, const F& f) {
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(dict, &position, &key, &value)) f(value);
  }

  std::vector<Dict> dicts_;
  std::vector<PyObject*> values_;
  std::vector<Tensor> tensors_;
  const bool plain_;
  std::optional<Words> words_;
  bool autocast_ = false, any_size_ = true;
  Like like_{};
  py::object op_, packed_, plan_;
  std::shared_ptr<Direct> direct_;
};

}  // namespace mnv2_fused
