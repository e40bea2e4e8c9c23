// The device that an op runs on, and torch's current stream there. Nothing of CUDA is linked: functions
// that only a torch with CUDA has are looked up when they are needed.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "aten.h"
#include "checks.h"

namespace xorz {

// The device of the first CUDA tensor. There is one, or the dispatcher would not have called a CUDA kernel.
inline int32_t cuda_device_of(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors)
    if (t != nullptr && t->defined() && t->is_cuda()) return t->get_device_index();
  return -1;
}

// A function of a library that torch has loaded, or null.
inline void* torch_function(const char* library, const char* name) {
  if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
  // torch loads its libraries with local symbols, so that RTLD_DEFAULT does not find them.
  void* loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return loaded ? dlsym(loaded, name) : nullptr;
}

// The address of torch's current stream: from torch 2.13 on by its stable ABI, before by a function of the
// library that torch loads where it has CUDA.
inline void* current_stream(int32_t device) {
  using Native = AOTITorchError (*)(StreamHandle, void**);
  using OfCuda = AOTITorchError (*)(int32_t, void**);
  static const auto native =
      reinterpret_cast<Native>(torch_function("libtorch_cpu.so", "torch_stream_native_handle"));
  void* stream = nullptr;
  if (native != nullptr) {
    StreamHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &handle));
    const AOTITorchError error = native(handle, &stream);
    aoti_torch_delete_stream(handle);
    STABLE_TORCH_ERROR_CODE_CHECK(error);
    return stream;
  }
  static const auto of_cuda =
      reinterpret_cast<OfCuda>(torch_function("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"));
  if (of_cuda == nullptr) throw std::runtime_error("xorz: this torch does not tell its current CUDA stream");
  STABLE_TORCH_ERROR_CODE_CHECK(of_cuda(device, &stream));
  return stream;
}

// Makes the device of an op's tensors the current one, so that torch allocates there, and says on which
// stream to launch. What is wrong with the device is said by the op before torch is asked for anything there.
class OnDevice {
 public:
  explicit OnDevice(const Checks& checks)
      : guard_(opened(checks)), place_{checks.cuda, reinterpret_cast<size_t>(current_stream(checks.cuda))} {}

  const CudaPlace& place() const { return place_; }

 private:
  static int32_t opened(const Checks& checks) {
    core(checks, [&] { cuda_open(checks.cuda); });
    return checks.cuda;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  CudaPlace place_;
};

}  // namespace xorz
