// What was compiled, for `build_info`; no tensor passes here.
extern "C" __attribute__((visibility("default"))) const char* tcur_cuda_architectures() {
  return TCUR_ARCHITECTURES;
}
