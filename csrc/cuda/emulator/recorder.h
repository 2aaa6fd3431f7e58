// What a launch asks for, recorded instead of run.
#pragma once

#include <cstdint>
#include <vector>

namespace tcur {

// With `recorded` set, launches are written there and not run: what a counter of machine code needs
// to know of them. The arguments are in the order and at the places where a GPU has them.
struct LaunchRecord {
  const void* kernel;
  int64_t blocks, threads, shared_bytes;
  std::vector<unsigned char> arguments;

  template <class Arg>
  void append(const Arg& arg) {
    arguments.resize((arguments.size() + alignof(Arg) - 1) / alignof(Arg) * alignof(Arg));
    const auto* bytes = reinterpret_cast<const unsigned char*>(&arg);
    arguments.insert(arguments.end(), bytes, bytes + sizeof arg);
  }
};
inline std::vector<LaunchRecord>* recorded = nullptr;

}  // namespace tcur
