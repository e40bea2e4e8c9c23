// What the shim asks of torch about CUDA, where torch has no GPU: to be preloaded, so that it comes before
// libtorch_cpu.so. Devices and streams are those that the test says; aten ops on CUDA tensors go to the test,
// all others to torch. tests/python/cuda_tensors.py is the other side.
//
// Copies to the host arrive as late as they may: when somebody waits for an event that was recorded behind them.
// Until then the memory holds what it held. Events and captures of libcuda are therefore here, too.
#include <dlfcn.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <vector>

using torch::stable::Tensor;

namespace {

// An aten op on a CUDA tensor: its name, the tensor, the sizes and dtype of what it gives. Gives an owning
// handle.
using Aten = AtenTensorHandle (*)(const char* name, AtenTensorHandle self, int64_t dims, const int64_t* sizes,
                                  int32_t dtype);
Aten aten = nullptr;
void* streams[4];
int32_t current = 0;
// Copies to the host that nobody has waited for, and how many there were before.
struct Copy {
  Tensor from;
  void* to;
};
std::vector<Copy> on_their_way;
size_t have_arrived = 0;
std::set<const void*> pinned;
int32_t waits = 0, pageable = 0, capturing = 0;

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

void copy_to_host(const Copy& copy) {
  int32_t dtype = 0;
  aoti_torch_get_dtype(copy.from.get(), &dtype);
  std::vector<int64_t> sizes(copy.from.sizes().begin(), copy.from.sizes().end());
  sizes.push_back(reinterpret_cast<int64_t>(copy.to));
  AtenTensorHandle none =
      aten("copy_to_host", copy.from.get(), static_cast<int64_t>(sizes.size()), sizes.data(), dtype);
  if (none == nullptr) std::abort();
  aoti_torch_delete_tensor_object(none);
}

// `aten::copy_` between the host and a device, which is asked for and not awaited.
AOTITorchError copied(StableIValue* stack) {
  const Tensor to = torch::stable::detail::to<Tensor>(stack[0]);
  const Tensor from = torch::stable::detail::to<Tensor>(stack[1]);
  const bool goes_to_host = from.is_cuda();
  const void* host = goes_to_host ? to.const_data_ptr() : from.const_data_ptr();
  if (!torch::stable::detail::to<bool>(stack[2]) || (to.numel() > 0 && pinned.count(host) == 0)) ++pageable;
  if (goes_to_host) {
    on_their_way.push_back({from, to.mutable_data_ptr()});
  } else {
    int32_t dtype = 0;
    aoti_torch_get_dtype(to.get(), &dtype);
    std::vector<int64_t> sizes(to.sizes().begin(), to.sizes().end());
    sizes.push_back(reinterpret_cast<int64_t>(host));
    AtenTensorHandle none =
        aten("copy_to_device", to.get(), static_cast<int64_t>(sizes.size()), sizes.data(), dtype);
    if (none == nullptr) return 1;
    aoti_torch_delete_tensor_object(none);
  }
  stack[0] = torch::stable::detail::from(to);
  return 0;
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

// Of libcuda: an event is how many copies were asked for before it.
API int cuEventCreate(void** event, unsigned flags) {
  *event = new size_t{0};
  return flags == 3 ? 0 : 1;
}
API int cuEventDestroy_v2(void* event) {
  delete static_cast<size_t*>(event);
  return 0;
}
API int cuEventRecord(void* event, void* stream) {
  *static_cast<size_t*>(event) = have_arrived + on_their_way.size();
  return stream == streams[current] ? 0 : 400;
}
API int cuEventSynchronize(void* event) {
  ++waits;
  while (have_arrived < *static_cast<size_t*>(event)) {
    copy_to_host(on_their_way.front());
    on_their_way.erase(on_their_way.begin());
    ++have_arrived;
  }
  return 0;
}
API int cuStreamIsCapturing(void*, int* status) {
  *status = capturing;
  return 0;
}
API void torch_double_capture(int32_t status) { capturing = status; }
// How often somebody has waited, and copies that were not of pinned memory or not without a wait.
API int32_t torch_double_waits() { return waits; }
API int32_t torch_double_pageable() { return pageable; }

API AOTITorchError torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack,
                                         uint64_t version) {
  static const auto torch =
      real<AOTITorchError (*)(const char*, const char*, StableIValue*, uint64_t)>("torch_call_dispatcher");
  if (!std::strcmp(name, "aten::empty")) {
    const bool pins = torch::stable::detail::to<std::optional<bool>>(stack[4]).value_or(false);
    stack[4] = torch::stable::detail::from(std::optional<bool>(false));
    const AOTITorchError error = torch(name, overload, stack, version);
    if (error == 0 && pins) {
      void* at = nullptr;
      aoti_torch_get_data_ptr(torch::stable::detail::to<AtenTensorHandle>(stack[0]), &at);
      pinned.insert(at);
    }
    return error;
  }
  const auto handle = torch::stable::detail::to<AtenTensorHandle>(stack[0]);
  if (!std::strcmp(name, "aten::copy_")) {
    int32_t to = 0, from = 0;
    aoti_torch_get_device_type(handle, &to);
    aoti_torch_get_device_type(torch::stable::detail::to<AtenTensorHandle>(stack[1]), &from);
    if (to != from) return copied(stack);
    if (to != aoti_torch_device_type_cuda()) return torch(name, overload, stack, version);
    // Between matrices on the device: rows, columns, how far apart the target's rows are, where the words come from.
    const Tensor target = torch::stable::detail::to<Tensor>(stack[0]);
    const Tensor source = torch::stable::detail::to<Tensor>(stack[1]);
    const int64_t sizes[] = {target.size(0), target.size(1), target.stride(0),
                             reinterpret_cast<int64_t>(source.const_data_ptr())};
    int32_t dtype = 0;
    aoti_torch_get_dtype(target.get(), &dtype);
    AtenTensorHandle none = aten("copy_on_device", target.get(), 4, sizes, dtype);
    if (none == nullptr) return 1;
    aoti_torch_delete_tensor_object(none);
    stack[0] = torch::stable::detail::from(target);
    return 0;
  }
  // Ops whose first argument is no tensor are not asked for CUDA memory here.
  const bool asks = !std::strcmp(name, "aten::new_empty") || !std::strcmp(name, "aten::clone") ||
                    !std::strcmp(name, "aten::contiguous") || !std::strcmp(name, "aten::zero_") ||
                    !std::strcmp(name, "aten::to") || !std::strcmp(name, "aten::linear") ||
                    !std::strcmp(name, "aten::view") || !std::strcmp(name, "aten::index_select") ||
                    !std::strcmp(name, "aten::index_copy_");
  int32_t type = 0;
  if (!asks || aoti_torch_get_device_type(handle, &type) != 0) return torch(name, overload, stack, version);
  if (type != aoti_torch_device_type_cuda()) return torch(name, overload, stack, version);
  const Tensor self = torch::stable::detail::to<Tensor>(stack[0]);
  std::vector<int64_t> sizes(self.sizes().begin(), self.sizes().end());
  int32_t dtype = 0;
  aoti_torch_get_dtype(self.get(), &dtype);
  if (!std::strcmp(name, "aten::new_empty")) {
    sizes = torch::stable::detail::to<std::vector<int64_t>>(stack[1]);
    if (const auto other = torch::stable::detail::to<std::optional<torch::headeronly::ScalarType>>(stack[2]))
      dtype = static_cast<int32_t>(*other);
  }
  if (!std::strcmp(name, "aten::view") && !std::strcmp(overload, "")) {
    const auto asked = torch::stable::detail::to<std::vector<int64_t>>(stack[1]);
    if (std::count(asked.begin(), asked.end(), -1) == 0) sizes = asked;
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
