// The Python interface of the compiled library: facts about the build, and the choice of the
// instruction set. No tensors pass through it; the files in cpu/ register the operators with torch.
#include "cpu/caches.h"
#include "cpu/isa.h"
#include "cpu/plans.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#elif defined(__GNUC__)
  return "gcc " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__);
#else
  return "unknown";
#endif
}

std::string torch_target() {
  constexpr uint64_t version = TORCH_TARGET_VERSION;
  return std::to_string(version >> 56) + "." + std::to_string((version >> 48) & 0xFF);
}

void use_isa(const std::string& name) {
  if (!tcur::use_isa(name.c_str())) {
    std::string runnable;
    for (const char* isa : tcur::runnable_isas()) {
      runnable += runnable.empty() ? isa : std::string(", ") + isa;
    }
    throw py::value_error("name: expected one of " + runnable + ", got " + name);
  }
}

void use_second_level_cache(int64_t bytes) {
  if (bytes <= 0) {
    throw py::value_error("bytes: expected a positive number, got " + std::to_string(bytes));
  }
  tcur::use_second_level_cache(bytes);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of tcur_kernels: build facts and the choice of the instruction set.";
  m.attr("compiler") = compiler();
  m.attr("torch_target") = torch_target();
  m.def("compiled_isas", &tcur::compiled_isas, "Variants compiled into the library, best first.");
  m.def("runnable_isas", &tcur::runnable_isas, "Those of them that this processor runs.");
  m.def("chosen_isa", &tcur::chosen_isa, "The variant in use.");
  m.def(
      "strip_columns",
      &tcur::strip_columns,
      py::arg("bytes"),
      "Columns that its kernels for numbers of so many bytes, 4 or 8, work on together.");
  m.def("plans_made", &tcur::plans_made, "Tables of transforms made so far; for tests.");
  m.def(
      "second_level_cache",
      &tcur::second_level_cache,
      "Bytes of the second-level cache of a core, which tiles are sized for.");
  m.def(
      "use_second_level_cache",
      &use_second_level_cache,
      py::arg("bytes"),
      "Size tiles for another cache; for tests and benchmarks.");
  m.def("use_isa", &use_isa, py::arg("name"), "Use another variant; for tests and benchmarks.");
}
