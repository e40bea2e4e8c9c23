// What the shim asks of torch about CUDA, where torch has no GPU: to be preloaded, so that it comes before
// libtorch_cpu.so. Devices and streams are those that the test says; aten ops on CUDA tensors go to the test,
// all others to torch. tests/python/cuda_child.py is the other side.
#include <dlfcn.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

using torch::stable::Tensor;

namespace {

// An aten op on a CUDA tensor: its name, the tensor, the sizes and dtype of what it gives. Gives an owning
// handle.
using Aten = AtenTensorHandle (*)(const char* name, AtenTensorHandle self, int64_t dims, const int64_t* sizes,
                                  int32_t dtype);
Aten aten = nullptr;
void* streams[4];
int32_t current = 0;

template <class F>
F real(const char* name) {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = torch ? dlsym(torch, name) : nullptr;
  if (found == nullptr) {
    std::fprintf(stderr, "torch has no %s\n", name);
    std::abort();
  }
  return reinterpret_cast<F>(found);
}

// Whether `aten::to` goes to a CUDA device.
bool moves_to_cuda(StableIValue* stack) {
  const auto device = torch::stable::detail::to<std::optional<torch::stable::Device>>(stack[3]);
  stack[3] = torch::stable::detail::from(device);
  return device && device->type() == torch::headeronly::DeviceType::CUDA;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API void torch_double_set(Aten op, int32_t device, void* stream) {
  aten = op;
  streams[device] = stream;
}
// The device whose turn it is, as device guards leave it.
API int32_t torch_double_device() { return current; }

API AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(static_cast<intptr_t>(current + 1));
  current = device;
  return 0;
}
API AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  current = static_cast<int32_t>(reinterpret_cast<intptr_t>(guard)) - 1;
  return 0;
}
API AOTITorchError aoti_torch_get_current_stream(int32_t device, StreamHandle* stream) {
  *stream = reinterpret_cast<StreamHandle>(static_cast<intptr_t>(device + 1));
  return 0;
}
API AOTITorchError aoti_torch_delete_stream(StreamHandle) { return 0; }
API AOTITorchError torch_stream_native_handle(StreamHandle stream, void** native) {
  *native = streams[reinterpret_cast<intptr_t>(stream) - 1];
  return 0;
}

API AOTITorchError torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack,
                                         uint64_t version) {
  static const auto torch =
      real<AOTITorchError (*)(const char*, const char*, StableIValue*, uint64_t)>("torch_call_dispatcher");
  const auto handle = torch::stable::detail::to<AtenTensorHandle>(stack[0]);
  // Ops whose first argument is no tensor are not asked for CUDA memory here.
  const bool asks = !std::strcmp(name, "aten::new_empty") || !std::strcmp(name, "aten::clone") ||
                    !std::strcmp(name, "aten::contiguous") || !std::strcmp(name, "aten::zero_") ||
                    !std::strcmp(name, "aten::to") || !std::strcmp(name, "aten::linear") ||
                    !std::strcmp(name, "aten::view") || !std::strcmp(name, "aten::index_select") ||
                    !std::strcmp(name, "aten::index_copy_");
  int32_t type = 0;
  if (!asks || aoti_torch_get_device_type(handle, &type) != 0) return torch(name, overload, stack, version);
  if (type != aoti_torch_device_type_cuda()) {
    if (std::strcmp(name, "aten::to") || !moves_to_cuda(stack)) return torch(name, overload, stack, version);
    name = "aten::to_cuda";
  }
  const Tensor self = torch::stable::detail::to<Tensor>(stack[0]);
  std::vector<int64_t> sizes(self.sizes().begin(), self.sizes().end());
  int32_t dtype = 0;
  aoti_torch_get_dtype(self.get(), &dtype);
  if (!std::strcmp(name, "aten::new_empty")) {
    sizes = torch::stable::detail::to<std::vector<int64_t>>(stack[1]);
    if (const auto other = torch::stable::detail::to<std::optional<torch::headeronly::ScalarType>>(stack[2]))
      dtype = static_cast<int32_t>(*other);
  }
  if (!std::strcmp(name, "aten::linear")) {
    // Of 2-D operands: where the weight is, n, k, m, and where the bias is, or 0.
    const Tensor weight = torch::stable::detail::to<Tensor>(stack[1]);
    const auto bias = torch::stable::detail::to<std::optional<Tensor>>(stack[2]);
    sizes = {reinterpret_cast<int64_t>(weight.data_ptr()), weight.size(0), weight.size(1), self.size(0),
             bias ? reinterpret_cast<int64_t>(bias->data_ptr()) : 0};
  }
  if (!std::strcmp(name, "aten::index_select") || !std::strcmp(name, "aten::index_copy_")) {
    // Of rows: the matrix's sizes, where the index is and how long, and where the rows are that are copied.
    const Tensor index = torch::stable::detail::to<Tensor>(stack[2]);
    sizes.insert(sizes.end(), {reinterpret_cast<int64_t>(index.data_ptr()), index.numel()});
    if (!std::strcmp(name, "aten::index_copy_"))
      sizes.push_back(reinterpret_cast<int64_t>(torch::stable::detail::to<Tensor>(stack[3]).data_ptr()));
  }
  if (!std::strcmp(name, "aten::to") &&
      torch::stable::detail::to<std::optional<torch::headeronly::ScalarType>>(stack[1]) ==
          torch::headeronly::ScalarType::Long)
    name = "aten::to_int64";
  // Views and the bump of a version give the tensor itself; the rest is the test's to make.
  AtenTensorHandle result = aten(name, self.get(), static_cast<int64_t>(sizes.size()), sizes.data(), dtype);
  if (result == nullptr) return 1;
  stack[0] = torch::stable::detail::from(Tensor(result));
  return 0;
}
