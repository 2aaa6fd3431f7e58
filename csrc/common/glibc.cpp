// What keeps the library loadable with a C library as old as manylinux_2_28 promises.
//
// The reference counts of std::shared_ptr ask glibc whether the process has one thread alone, by
// this variable. glibc has it from 2.32 on, and a library that was compiled with a later one would
// refuse to load with an earlier one. This definition stays within the library. It says that there
// may be several threads, so counts are always atomic; torch has threads anyway.
#if defined(__linux__)
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
