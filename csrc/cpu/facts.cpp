// Facts about the library, and the choice of the instruction set and of the cache, as plain C
// functions: Python calls them by ctypes (operators/native.py), so no version of Python is in the
// library. No tensors pass through here; the other files register the operators with torch.
//
// No function throws. Python checks what it hands over, and words the errors.
#include "caches.h"
#include "isa.h"
#include "plans.h"

#include <string>

#define TCUR_EXPORT extern "C" __attribute__((visibility("default")))

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

// Names with a space between them, as tcur_cuda_architectures has them.
std::string in_one(const std::vector<const char*>& names) {
  std::string all;
  for (const char* name : names) {
    all += all.empty() ? name : std::string(" ") + name;
  }
  return all;
}

}  // namespace

TCUR_EXPORT const char* tcur_cpu_compiler() {
  static const std::string text = compiler();
  return text.c_str();
}

// The oldest torch that the library is made for.
TCUR_EXPORT const char* tcur_cpu_torch_target() {
  static const std::string text = torch_target();
  return text.c_str();
}

// Variants compiled into the library, best first, and those of them that this processor runs.
TCUR_EXPORT const char* tcur_cpu_compiled_isas() {
  static const std::string text = in_one(tcur::compiled_isas());
  return text.c_str();
}
TCUR_EXPORT const char* tcur_cpu_runnable_isas() {
  static const std::string text = in_one(tcur::runnable_isas());
  return text.c_str();
}

// Why no variant is in use, or null if one is.
TCUR_EXPORT const char* tcur_cpu_absence() {
  return tcur::absence();
}

// The variant in use; null if there is none.
TCUR_EXPORT const char* tcur_cpu_chosen_isa() {
  return tcur::absence() == nullptr ? tcur::chosen_isa() : nullptr;
}

// Columns that its kernels for numbers of so many bytes, 4 or 8, work on together; 0 if there is
// none.
TCUR_EXPORT int64_t tcur_cpu_strip_columns(int64_t bytes) {
  return tcur::absence() == nullptr ? tcur::strip_columns(bytes) : 0;
}

// Uses another variant, one of the runnable ones. For tests and benchmarks.
TCUR_EXPORT void tcur_cpu_use_isa(const char* name) {
  tcur::use_isa(name);
}

// Tables of transforms made so far; for tests.
TCUR_EXPORT int64_t tcur_cpu_plans_made() {
  return tcur::plans_made();
}

// Bytes of the second-level cache of a core, which tiles are sized for.
TCUR_EXPORT int64_t tcur_cpu_second_level_cache() {
  return tcur::second_level_cache();
}

// Sizes tiles for another cache, of a positive number of bytes. For tests and benchmarks.
TCUR_EXPORT void tcur_cpu_use_second_level_cache(int64_t bytes) {
  tcur::use_second_level_cache(bytes);
}
