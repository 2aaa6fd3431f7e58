// What the operators do before and after their kernels, on the CUDA side. The operators are
// registered for CUDA tensors. The host build registers the same functions for CPU tensors, as the
// language "cudahost" of the tests. Languages that end in "_tf32" round the operands of rank-r
// products.
#pragma once

#include "../common/check.h"
#include "../common/token_cores.h"
#include "fragments.h"
#include "lanes.h"
#include "spectrum.h"
#include "tile.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <utility>

#ifdef __CUDACC__
#define TCUR_DISPATCH_KEY CUDA
#define TCUR_LANGUAGE ""
#define TCUR_LANGUAGE_TF32 "_cuda_tf32"
#else
#define TCUR_DISPATCH_KEY CPU
#define TCUR_LANGUAGE "_cudahost"
#define TCUR_LANGUAGE_TF32 "_cudahost_tf32"
#endif

namespace tcur {

// One call of an operator. It makes the device of the tensors the current one, and knows the
// current stream of that device.
class Call {
 public:
  explicit Call(const Tensor& any)
      : like_(any),
        device_(any.get_device_index())
#ifdef __CUDACC__
        ,
        guard_(device_)
#endif
  {
  }

  Stream stream() const {
#ifdef __CUDACC__
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<Stream>(stream);
#else
    return {};
#endif
  }
  int device() const {
    return device_;
  }
  SharedLimits limits() const {
    return shared_limits(device_);
  }
  // A new fp32 tensor on the device, not initialised.
  Tensor floats(std::initializer_list<int64_t> shape) const {
    return torch::stable::new_empty(like_, shape, ScalarType::Float);
  }
  // These checks keep memory of another device, and numbers of a type that kernels do not read, out
  // of the kernels.
  void check_device(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(
        tensor.get_device_index() == device_ && tensor.is_cuda() == like_.is_cuda(),
        "tcur: ",
        name,
        " is on another device");
  }
  void check(const char* name, const Tensor& tensor) const {
    check_device(name, tensor);
    const Element element = element_of(tensor);
    STD_TORCH_CHECK(
        element != Element::none && element != Element::f64,
        "tcur: ",
        name,
        " must be fp32, bf16 or fp16 for CUDA kernels");
  }
  void check(const char* name, const Tensor& tensor, ScalarType dtype) const {
    check(name, tensor);
    check_dtype(name, tensor, dtype);
  }
  // The precision of rank-r products for these factors, which must be both fp32 or both bf16.
  Precision precision(const Tensor& lateral_hat, const Tensor& horizontal_hat, bool tf32) const {
    const bool is_bf16 = lateral_hat.scalar_type() == ScalarType::BFloat16;
    const ScalarType dtype = is_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
    check("lateral_hat", lateral_hat, dtype);
    check("horizontal_hat", horizontal_hat, dtype);
    return is_bf16 ? Precision::bf16 : tf32 ? Precision::tf32 : Precision::ieee;
  }

 private:
  Tensor like_;
  int32_t device_;
#ifdef __CUDACC__
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// A GPU has units for bf16: factors come in that dtype.
inline void check_bf16_in_bf16(bool bf16_operands) {
  STD_TORCH_CHECK(!bf16_operands, "tcur: bf16_operands are for CPUs; give factors in bf16");
}

inline void check_slices(int64_t n3) {
  STD_TORCH_CHECK(
      n3 <= kMaxSlices, "tcur: CUDA kernels take at most ", kMaxSlices, " slices, got ", n3);
}

inline CoreIds core_ids(const TokenCores& cores) {
  return {cores.ids(), cores.cores()};
}

// The tables of a length, which are kept, and weighted spectra of cores, which one launch computes.
class Spectrum {
 public:
  // Gives the tables alone and launches nothing.
  Spectrum(const Call& call, int64_t n3)
      : tables_(root_tables(call.device(), static_cast<int>(n3))) {
  }
  // Computes `count` spectra of the cores that `ids` names. core: [..., n3, rank, rank].
  Spectrum(const Call& call, const Tensor& core, double scale, CoreIds ids, int64_t count)
      : Spectrum(call, core.size(core.dim() - 3)) {
    const int64_t rank = core.size(core.dim() - 1);
    core_hat_ = call.floats({count, tables_.n3, rank, rank});
    const SpectrumArgs args{
        core.const_data_ptr<float>(),
        ids,
        core_hat_->mutable_data_ptr<float>(),
        count,
        static_cast<int>(rank),
        scale,
        tables_};
    make_spectrum(args, call.stream());
  }
  const Tables& tables() const {
    return tables_;
  }
  const float* core_hat() const {
    return core_hat_->const_data_ptr<float>();
  }

 private:
  Tables tables_;
  std::optional<Tensor> core_hat_;
};

}  // namespace tcur
