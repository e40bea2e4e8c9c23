// How this library calls aten through the stable ABI, and how it runs tasks on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "executor.h"
#include "xorz/src/ffi/bridge.rs.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // headers before torch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace xorz {

// The same words, contiguous. Asking first saves a microsecond of the dispatcher where they are so already.
inline torch::stable::Tensor in_a_row(const torch::stable::Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Calls any aten op with one result. All arguments of its schema have to be given, even those with defaults.
template <class... A>
torch::stable::Tensor call_aten(const char* name, const char* overload, const A&... args) {
  std::array<StableIValue, sizeof...(A)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// Kernels only compute; gradients are registered in Python. Without this guard a gradient would flow through
// the aten ops that a kernel calls.
class NoGrad {
 public:
  NoGrad() : was_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(was_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool was_;
};

// torch's own thread pool. A second pool would have to wait for the first one's workers, which spin.
class TorchThreads final : public Executor {
 public:
  std::size_t threads() const override { return torch::stable::get_num_threads(); }

  void run(std::size_t tasks, const Task& task) const override {
    if (tasks == 1) return task.call(0);
    torch::stable::parallel_for(0, static_cast<int64_t>(tasks), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task.call(static_cast<std::size_t>(i));
    });
  }
};

}  // namespace xorz
