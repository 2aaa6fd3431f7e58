// Tells `build_info` for which architectures the library was compiled.
extern "C" __attribute__((visibility("default"))) const char* tcur_cuda_architectures() {
  return TCUR_ARCHITECTURES;
}
