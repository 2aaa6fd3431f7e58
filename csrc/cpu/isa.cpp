// Choice of the instruction set: the best one this processor has, decided when it is first needed.
#include "isa.h"

#include <atomic>
#include <cstring>

namespace tcur {
namespace {

std::vector<const IsaVariant*> variants() {  // best first
#if defined(__x86_64__)
  return {&kAvx512Variant, &kAvx2Variant, &kBaselineVariant};
#else
  return {&kBaselineVariant};
#endif
}

const IsaVariant* best_variant() {
  for (const IsaVariant* variant : variants()) {
    if (variant->runs_here()) {
      return variant;
    }
  }
  return &kBaselineVariant;
}

std::atomic<const IsaVariant*>& current() {
  static std::atomic<const IsaVariant*> chosen{best_variant()};
  return chosen;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *current().load()->f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return *current().load()->f64;
}

std::vector<const char*> compiled_isas() {
  std::vector<const char*> names;
  for (const IsaVariant* variant : variants()) {
    names.push_back(variant->name);
  }
  return names;
}

std::vector<const char*> runnable_isas() {
  std::vector<const char*> names;
  for (const IsaVariant* variant : variants()) {
    if (variant->runs_here()) {
      names.push_back(variant->name);
    }
  }
  return names;
}

const char* chosen_isa() {
  return current().load()->name;
}

bool use_isa(const char* name) {
  for (const IsaVariant* variant : variants()) {
    if (std::strcmp(variant->name, name) == 0 && variant->runs_here()) {
      current().store(variant);
      return true;
    }
  }
  return false;
}

}  // namespace tcur
