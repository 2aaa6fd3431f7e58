// Chooses the instruction set when it is first needed: the best one that this processor has.
#include "isa.h"

#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

namespace tcur {
namespace {

// The variants that were linked. Each registers itself when the library is loaded, in any order.
std::vector<IsaVariant>& variants() {
  static std::vector<IsaVariant> all;  // best first
  return all;
}

const IsaVariant* best_variant() {
  for (const IsaVariant& variant : variants()) {
    if (variant.runs_here()) {
      return &variant;
    }
  }
  return nullptr;
}

std::atomic<const IsaVariant*>& current() {
  static std::atomic<const IsaVariant*> chosen{best_variant()};
  return chosen;
}

const IsaVariant& chosen() {
  if (const char* reason = absence()) {
    throw std::runtime_error(reason);
  }
  return *current().load();
}

}  // namespace

bool register_variant(const IsaVariant& variant) {
  const auto is_wider = [](const IsaVariant& a, const IsaVariant& b) {
    return a.vector_bytes > b.vector_bytes;
  };
  variants().insert(
      std::upper_bound(variants().begin(), variants().end(), variant, is_wider), variant);
  return true;
}

template <>
const Kernels<float>& kernels<float>() {
  return *chosen().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return *chosen().f64;
}

std::vector<const char*> compiled_isas() {
  std::vector<const char*> names;
  for (const IsaVariant& variant : variants()) {
    names.push_back(variant.name);
  }
  return names;
}

std::vector<const char*> runnable_isas() {
  std::vector<const char*> names;
  for (const IsaVariant& variant : variants()) {
    if (variant.runs_here()) {
      names.push_back(variant.name);
    }
  }
  return names;
}

const char* absence() {
  return current().load() != nullptr
             ? nullptr
             : "tcur: this processor runs none of the instruction sets that the CPU library was "
               "built for; build it for all of them";
}

const char* chosen_isa() {
  return chosen().name;
}

int64_t strip_columns(int64_t bytes) {
  return bytes == sizeof(float) ? kernels<float>().strip : kernels<double>().strip;
}

bool use_isa(const char* name) {
  for (const IsaVariant& variant : variants()) {
    if (std::strcmp(variant.name, name) == 0 && variant.runs_here()) {
      current().store(&variant);
      return true;
    }
  }
  return false;
}

}  // namespace tcur
