// What the ops on one delta ask of their arguments, on any device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "aten.h"
#include "checks.h"

namespace xorz {

inline std::vector<int64_t> sizes_with_last(const Tensor& t, size_t last) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = static_cast<int64_t>(last);
  return sizes;
}

inline void check_mode(const Checks& checks, const std::string& mode) {
  if (mode != "fast" && mode != "deterministic" && mode != "exact")
    checks.refuse("mode must be \"fast\", \"deterministic\" or \"exact\", but is \"" + mode + "\"");
}

// Checks the left operand, [..., columns] of the weight's dtype, and gives its number of rows.
inline size_t check_rows(const Checks& checks, const char* name, const Tensor& t, const DtypeRow& type,
                         size_t columns, const char* columns_name) {
  const DtypeRow& have = checks.known(name, t);
  if (t.dim() < 1 || t.size(t.dim() - 1) != static_cast<int64_t>(columns))
    checks.refuse(std::string(name) + " is " + text(t) + ", but its last dimension must be " + columns_name +
                  " = " + std::to_string(columns));
  if (have.torch != type.torch)
    checks.refuse(std::string(name) + " is " + text(t) + ", but the delta's dtype is " + type.name);
  size_t m = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) m *= static_cast<size_t>(t.size(i));
  return m;
}

inline void check_bias(const Checks& checks, const Tensor& bias, const DtypeRow& type, size_t n) {
  const DtypeRow& have = checks.known("bias", bias);
  if (bias.dim() != 1 || bias.size(0) != static_cast<int64_t>(n) || have.torch != type.torch)
    checks.refuse("bias is " + text(bias) + ", but must be " + type.name + " [" + std::to_string(n) + "]");
}

inline void check_apart(const Checks& checks, rust::Slice<const uint8_t> weight,
                        rust::Slice<const uint8_t> delta) {
  if (weight.data() < delta.data() + delta.size() && delta.data() < weight.data() + weight.size())
    checks.refuse("weight and delta share memory");
}

inline bool is_leaf(const Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_leaf", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

// To be called before an op writes to `weight` without torch's knowledge; does what torch's in-place ops do.
inline void mark_written(const Checks& checks, const Tensor& weight) {
  // A view of a tensor that requires grad is no leaf in grad mode: torch then forbids writing to a leaf.
  Tensor rows = call_aten("aten::view", "", weight, std::vector<int64_t>{-1});
  if (is_leaf(weight) && !is_leaf(rows))
    checks.refuse("weight is a leaf that requires grad; use torch.no_grad() or weight.detach()");
  // An in-place aten op on no element bumps the version counter, which tells autograd that saved values are
  // stale.
  Tensor none = torch::stable::narrow(rows, 0, 0, 0);
  torch::stable::zero_(none);
}

}  // namespace xorz
