// Copies between a CUDA device and the host for ops that compute on the host: through pinned memory of
// torch's own, all of one call on their way at once, on the current stream.
//
// What waits: `arrived()`, until an event has passed that is recorded behind the copies. So the calling
// thread waits for what its stream was asked before and for the copies, and for nothing that is asked later;
// other streams and other threads go on, and torch has let go of Python's lock. Nothing else here waits: a
// result's copy to the device is only asked for, and torch lends the pinned memory again when the device has
// read it. Pinned memory that torch has not had before is the driver's to give, which may wait for the
// device; torch keeps it.
#pragma once

#include <cstring>
#include <utility>
#include <vector>

#include "on_device.h"

namespace xorz {

// A function of libcuda, which is loaded wherever there is a CUDA tensor. torch's stable ABI has no events.
template <class F>
F libcuda(const char* name) {
  void* found = torch_function("libcuda.so.1", name);
  if (found == nullptr) throw std::runtime_error(std::string("xorz: libcuda has no ") + name);
  return reinterpret_cast<F>(found);
}

// An event of the current device.
class Event {
 public:
  Event() {
    // Whoever waits sleeps (1), and no time is taken (2).
    static const auto create = libcuda<int (*)(void**, unsigned)>("cuEventCreate");
    check("cuEventCreate", create(&event_, 3));
  }
  ~Event() {
    static const auto destroy = libcuda<int (*)(void*)>("cuEventDestroy_v2");
    destroy(event_);
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(void* stream) const {
    static const auto record = libcuda<int (*)(void*, void*)>("cuEventRecord");
    check("cuEventRecord", record(event_, stream));
  }
  void wait() const {
    static const auto wait = libcuda<int (*)(void*)>("cuEventSynchronize");
    check("cuEventSynchronize", wait(event_));
  }

  static void check(const char* call, int code) {
    if (code != 0)
      throw std::runtime_error(std::string("xorz: ") + call + " gave error " + std::to_string(code));
  }

 private:
  void* event_ = nullptr;
};

// The copies of one call. Its device is the current one as long as it lives.
class Staging {
 public:
  // Refuses in the midst of a capture, before anything is asked that a graph would do again at each replay.
  explicit Staging(const Checks& checks) : guard_(checks.cuda), stream_(current_stream(checks.cuda)) {
    static const auto capturing = libcuda<int (*)(void*, int*)>("cuStreamIsCapturing");
    int status = 0;
    // A thread without a context, which is told so (201), has captured nothing.
    if (const int code = capturing(stream_, &status); code != 201) Event::check("cuStreamIsCapturing", code);
    if (status != 0)
      checks.refuse(
          "the current stream is captured in a CUDA graph, but this op waits for the device; call it before");
  }

  // The same words in pinned memory, once `arrived` has been called.
  Tensor fetch(const Tensor& t) {
    Tensor host = pinned(t);
    torch::stable::copy_(host, t, true);
    has_asked_ = has_asked_ || t.numel() > 0;
    return host;
  }
  std::vector<Tensor> fetch(const std::vector<Tensor>& all) {
    std::vector<Tensor> out;
    for (const Tensor& t : all) out.push_back(fetch(t));
    return out;
  }

  // Waits for all copies that were asked for; see above.
  void arrived() const {
    if (!has_asked_) return;
    const Event behind;
    behind.record(stream_);
    behind.wait();
  }

  // The same contiguous words of the host on the device, beside `there`, for whatever follows on the stream.
  static Tensor send(const Tensor& t, const Tensor& there) {
    const Tensor host = pinned(t);
    const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
    if (bytes > 0) std::memcpy(host.mutable_data_ptr(), t.const_data_ptr(), bytes);
    Tensor out = torch::stable::new_empty(there, host.sizes(), t.scalar_type());
    torch::stable::copy_(out, host, true);
    return out;
  }

 private:
  static Tensor pinned(const Tensor& like) {
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::empty(like.sizes(), like.scalar_type(), std::nullopt, cpu, true);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
  bool has_asked_ = false;
};

}  // namespace xorz
