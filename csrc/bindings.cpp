// What Python calls: the functions of kernels.h, with the fields of their structs as keyword arguments. A matrix is a
// tuple (data pointer, row stride, column stride, dtype) or None, another array its pointer as an int, 0 being none, and
// a precision is whether one TF32 product will do. Nothing here knows PyTorch.
//
// A Sequence keeps launches whose arguments are known but for what a call brings: addresses, weights and the stream. All
// of them are then one call, in which Python hands over a few numbers.
//
// The functions return as soon as their kernels are launched. They keep Python's lock: letting go of it and taking it
// again would cost as much as a launch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#ifdef BARLOW_EMULATION
#include "gpu/device.h"
#endif

namespace py = pybind11;
using namespace barlow;

namespace {

// The keyword arguments of a call, copied by name into the fields of a struct.
class Arguments {
 public:
  explicit Arguments(const py::kwargs& given) : given_(given) {}

  template <class T>
  Arguments& operator()(const char* name, T& field) {
    PyObject* value = PyDict_GetItemString(given_.ptr(), name);  // borrowed
    if (value == nullptr) throw py::type_error("missing argument " + std::string(name));
    read(value, field);
    if (PyErr_Occurred()) throw py::error_already_set();
    ++used_;
    return *this;
  }

  void no_more() const {
    if (used_ != given_.size()) throw py::type_error("more arguments than are known");
  }

  // The fields that hold an address, other than null.
  const std::vector<void*>& addresses() const { return addresses_; }

 private:
  static void read(PyObject* value, int& field) {
    const long number = PyLong_AsLong(value);
    field = static_cast<int>(number);
    if (field != number) throw py::value_error(std::to_string(number) + " is not a 32-bit integer");
  }
  static void read(PyObject* value, int64_t& field) { field = PyLong_AsLongLong(value); }
  static void read(PyObject* value, float& field) { field = static_cast<float>(PyFloat_AsDouble(value)); }
  static void read(PyObject* value, bool& field) { field = PyObject_IsTrue(value); }
  static void read(PyObject* value, Precision& field) {
    field = PyObject_IsTrue(value) ? Precision::tf32 : Precision::float32;
  }
  template <class T>
  void read(PyObject* value, T*& field) {
    field = static_cast<T*>(PyLong_AsVoidPtr(value));
    if (field != nullptr) addresses_.push_back(&field);
  }
  void read(PyObject* value, Matrix& field) {
    if (value == Py_None) return;
    if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 4) throw py::type_error("a matrix is a tuple of four");
    read(PyTuple_GET_ITEM(value, 0), field.data);
    field.row_stride = PyLong_AsLongLong(PyTuple_GET_ITEM(value, 1));
    field.column_stride = PyLong_AsLongLong(PyTuple_GET_ITEM(value, 2));
    const long dtype = PyLong_AsLong(PyTuple_GET_ITEM(value, 3));
    if (dtype < 0 || dtype > static_cast<long>(DType::float16)) throw py::value_error("no such dtype");
    field.dtype = static_cast<DType>(dtype);
  }

  const py::kwargs& given_;
  size_t used_ = 0;
  std::vector<void*> addresses_;
};

void fill(Normalize& p, Arguments& take) {
  take("z_a", p.z_a)("z_b", p.z_b)("a_hat", p.a_hat)("b_hat", p.b_hat)("stats", p.stats)("sums", p.sums);
  take("counters", p.counters)("partials", p.partials)("counter_count", p.counter_count);
  take("slabs", p.slabs)("chunks", p.chunks)("n", p.n)("d", p.d)("eps", p.eps)("correction", p.correction);
  take("normalized", p.normalized)("eps_in_root", p.eps_in_root);
}

void fill(Gram& p, Arguments& take) {
  take("a_hat", p.a_hat)("b_hat", p.b_hat)("k", p.k)("partials", p.partials)("inner", p.inner)("sums", p.sums);
  take("counters", p.counters)("loss", p.loss)("on_diag", p.on_diag)("off_diag", p.off_diag);
  take("n", p.n)("d", p.d)("slabs", p.slabs)("block", p.block)("split", p.split)("steps", p.steps);
  take("shift", p.shift)("tf32", p.precision);
}

void fill(Correlate& p, Arguments& take) {
  take("z_a", p.z_a)("z_b", p.z_b)("a_hat", p.a_hat)("b_hat", p.b_hat)("c", p.c)("stats", p.stats);
  take("row_sums", p.row_sums)("counters", p.counters)("off_sums", p.off_sums)("sums", p.sums);
  take("loss", p.loss)("on_diag", p.on_diag)("off_diag", p.off_diag);
  take("n", p.n)("d", p.d)("slabs", p.slabs)("block", p.block);
  take("raw_limit", p.raw_limit)("tf32", p.precision);
}

void fill(PartialGram& p, Arguments& take) {
  take("x", p.x)("partials", p.partials)("size", p.size)("n", p.n)("d", p.d)("panel", p.panel);
  take("block", p.block)("split", p.split)("steps", p.steps)("tf32", p.precision);
}

void fill(InputGrad& p, Arguments& take) {
  take("own_a", p.own[0])("own_b", p.own[1])("a_hat", p.hat[0])("b_hat", p.hat[1])("product", p.product);
  take("grad_a", p.grad[0])("grad_b", p.grad[1])("stats", p.stats);
  take("g_loss", p.g_loss)("g_on", p.g_on)("g_off", p.g_off)("n", p.n)("d", p.d)("k_divisor", p.k_divisor);
  take("normalized", p.normalized)("raw", p.raw)("tf32", p.precision);
}

template <class Params>
void weigh(Params& p, float lambd, float scale) {
  p.lambd = lambd;
  p.scale = scale;
}
void weigh(Normalize&, float, float) {}
void weigh(PartialGram&, float, float) {}

class Sequence {
 public:
  // An address is, where a launch is added, (slot + 1) << slot_bits plus an offset in bytes, or 0 for none. A slot is one
  // of the addresses that a call brings.
  Sequence(int device, int slot_bits) : device_(device), slot_bits_(slot_bits) {}

  template <class Params>
  void add(const py::kwargs& given, void (*launch)(const Params&, Stream)) {
    Params params{};
    Arguments take(given);
    fill(params, take);
    take.no_more();
    std::vector<Address> addresses;
    for (void* field : take.addresses()) {
      uintptr_t value;
      std::memcpy(&value, field, sizeof value);
      addresses.push_back({static_cast<char*>(field) - reinterpret_cast<char*>(&params), (value >> slot_bits_) - 1,
                           value & ((uintptr_t{1} << slot_bits_) - 1)});
    }
    launches_.push_back([=, addresses = std::move(addresses)](const Call& call) {
      Params p = params;
      for (const Address& address : addresses) {
        const uintptr_t value = call.at(address);
        std::memcpy(reinterpret_cast<char*>(&p) + address.field, &value, sizeof value);
      }
      weigh(p, call.lambd, call.scale);
      launch(p, call.stream);
    });
  }

  // `tensors` are what the addresses are of: unused here, as a Triton launch may want them.
  void launch(const py::tuple& addresses, const py::object&, float lambd, float scale, uintptr_t stream) const {
    Call call{addresses.ptr(), lambd, scale, {device_, reinterpret_cast<void*>(stream)}};
    for (const auto& launch : launches_) launch(call);
  }

 private:
  struct Address {
    std::ptrdiff_t field;  // of the params, in bytes from their beginning
    uintptr_t slot, offset;
  };
  struct Call {
    PyObject* addresses;
    float lambd, scale;
    Stream stream;

    // What is null stays null: a gradient that is not wanted.
    uintptr_t at(const Address& address) const {
      if (static_cast<Py_ssize_t>(address.slot) >= PyTuple_GET_SIZE(addresses)) throw py::value_error("no such slot");
      const uintptr_t base = PyLong_AsSize_t(PyTuple_GET_ITEM(addresses, address.slot));
      if (PyErr_Occurred()) throw py::error_already_set();
      return base == 0 ? 0 : base + address.offset;
    }
  };

  int device_, slot_bits_;
  std::vector<std::function<void(const Call&)>> launches_;
};

// `name` launches at once in the module, and adds a launch in a Sequence.
template <class Params>
void bind(py::module_& module, py::class_<Sequence>& sequence, const char* name,
          void (*launch)(const Params&, Stream)) {
  module.def(name, [launch](const py::kwargs& given) {
    Params p{};
    Stream stream;
    float lambd, scale;
    Arguments take(given);
    fill(p, take);
    take("lambd", lambd)("scale", scale)("device", stream.device)("stream", stream.handle);
    take.no_more();
    weigh(p, lambd, scale);
    launch(p, stream);
  });
  sequence.def(name, [launch](Sequence& self, const py::kwargs& given) { self.add(given, launch); });
}

}  // namespace

PYBIND11_MODULE(BARLOW_MODULE, module) {
  module.doc() = "The CUDA kernels of barlow_fused; barlow_fused/backends/cuda_backend.py calls them.";
  module.attr("sources") = BARLOW_SOURCES;  // a hash of csrc/
#ifdef BARLOW_EMULATION
  module.attr("emulated") = true;
  // 90: a device of compute capability 9.0; clusters: how many of a size it holds at once, where that is known
  module.def(
      "emulate",
      [](int capability, int multiprocessors, int shared_bytes, const std::map<int, int>& clusters) {
        emulated_device() = {multiprocessors, shared_bytes, capability, clusters};
      },
      py::arg("capability"), py::arg("multiprocessors"), py::arg("shared_bytes") = DeviceInfo().shared_bytes,
      py::arg("clusters") = std::map<int, int>());
  module.def("watch", emulation::races::watch);  // whether launches are searched for races, where built for that
  module.def("reached_sites", [] {               // "blocks/reduce.h:21", where threads were ordered since the last call
    py::set sites;
    for (const auto& [file, line] : emulation::reached_sites()) sites.add(file + ":" + std::to_string(line));
    emulation::reached_sites().clear();
    emulation::drop().last_file = nullptr;
    return sites;
  });
#else
  module.attr("emulated") = false;
  module.attr("cuda_version") = BARLOW_CUDA_VERSION;    // of nvcc and of the runtime library inside, "13.0.88"
  module.attr("architectures") = BARLOW_ARCHITECTURES;  // "sm_80 sm_90 sm_90a sm_100 compute_80"
#endif

  py::class_<NormalizePlan>(module, "NormalizePlan", py::module_local())
      .def_readonly("slabs", &NormalizePlan::slabs)
      .def_readonly("chunks", &NormalizePlan::chunks);
  py::class_<GramPlan>(module, "GramPlan", py::module_local())
      .def_readonly("block", &GramPlan::block)
      .def_readonly("tiles", &GramPlan::tiles)
      .def_readonly("split", &GramPlan::split)
      .def_readonly("steps", &GramPlan::steps)
      .def_readonly("partials", &GramPlan::partials)
      .def_readonly("longest", &GramPlan::longest);
  py::class_<GramGradPlan>(module, "GramGradPlan", py::module_local())
      .def_readonly("cluster", &GramGradPlan::cluster)
      .def_readonly("parts", &GramGradPlan::parts)
      .def_readonly("rounds", &GramGradPlan::rounds);
  py::class_<CorrelatePlan>(module, "CorrelatePlan", py::module_local())
      .def_readonly("block", &CorrelatePlan::block)
      .def_readonly("tiles", &CorrelatePlan::tiles);
  module.def("plan_normalize", [](int n, int d, int dtype, int device) {
    return plan_normalize(n, d, static_cast<DType>(dtype), device);
  });
  module.def("plan_gram", [](int n, int d, int dtype, bool tf32, int device) {
    return plan_gram(n, d, static_cast<DType>(dtype), tf32 ? Precision::tf32 : Precision::float32, device);
  });
  module.def("plan_partial_gram", [](int n, int d, int dtype, int device) {
    return plan_partial_gram(n, d, static_cast<DType>(dtype), device);
  });
  module.def("plan_gram_grad", plan_gram_grad);
  module.def("plan_correlate", [](int n, int d, int dtype, bool tf32, int device) {
    return plan_correlate(n, d, static_cast<DType>(dtype), tf32 ? Precision::tf32 : Precision::float32, device);
  });

  module.def("warm_up", warm_up);
  module.def("kernels", [] {  // all, by type
    py::list list;
    for (const ListedKernel& k : list_kernels()) {
      using namespace py::literals;
      list.append(py::dict("name"_a = k.name, "type"_a = k.type, "threads"_a = k.threads,
                           "shared_bytes"_a = k.shared_bytes, "hopper"_a = k.hopper));
    }
    return list;
  });
  py::class_<Sequence> sequence(module, "Sequence", py::module_local());
  sequence.def(py::init<int, int>()).def("launch", &Sequence::launch);
  bind(module, sequence, "normalize", normalize);
  bind(module, sequence, "gram", gram);
  bind(module, sequence, "partial_gram", partial_gram);
  bind(module, sequence, "correlate", correlate);
  bind(module, sequence, "gram_grad", gram_grad);
  bind(module, sequence, "direct_grad", direct_grad);
}
