#include "caches.h"

#include <atomic>
#include <fstream>
#include <string>

#if defined(__APPLE__)
#include <sys/sysctl.h>
#else
#include <unistd.h>
#endif

namespace tcur {
namespace {

constexpr int64_t kUsual = 512 * 1024;  // where nothing tells

// What Linux lists for the first processor: "1024K" in the folder of a unified cache of level 2.
int64_t from_files() {
  const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index";
  for (int index = 0; index < 8; ++index) {
    const std::string cache = folder + std::to_string(index);
    int level = 0;
    int64_t size = 0;
    char unit = ' ';
    std::ifstream(cache + "/level") >> level;
    std::ifstream(cache + "/size") >> size >> unit;
    if (level == 2 && size > 0) {
      return size * (unit == 'K' ? 1024 : unit == 'M' ? 1024 * 1024 : 1);
    }
  }
  return 0;
}

int64_t found() {
  int64_t bytes = 0;
#if defined(__APPLE__)
  size_t size = sizeof(bytes);
  if (sysctlbyname("hw.perflevel0.l2cachesize", &bytes, &size, nullptr, 0) != 0) {
    sysctlbyname("hw.l2cachesize", &bytes, &size, nullptr, 0);
  }
#elif defined(_SC_LEVEL2_CACHE_SIZE)
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);  // on x86, glibc reads cpuid
#endif
  if (bytes <= 0) {
    bytes = from_files();
  }
  return bytes > 0 ? bytes : kUsual;
}

std::atomic<int64_t>& current() {
  static std::atomic<int64_t> bytes{found()};
  return bytes;
}

}  // namespace

int64_t second_level_cache() {
  return current().load();
}

void use_second_level_cache(int64_t bytes) {
  current().store(bytes);
}

}  // namespace tcur
