// What the ops on one delta ask of their arguments, on any device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
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

// Where a range of sizes begins and ends.
struct Range {
  size_t first;
  size_t end;
};

using MaybeRange = std::optional<std::vector<int64_t>>;

// `given` is (first, end) along dimension `dim` of `base`; none is all of it.
inline Range check_range(const Checks& checks, const char* name, const MaybeRange& given, const Tensor& base,
                         int64_t dim, size_t size) {
  if (!given) return {0, size};
  if (given->size() != 2)
    checks.refuse(std::string(name) + " must be a pair (first, end), but holds " +
                  std::to_string(given->size()) + " numbers");
  const int64_t first = (*given)[0], end = (*given)[1];
  if (first < 0 || end < first || end > static_cast<int64_t>(size))
    checks.refuse(std::string(name) + " = (" + std::to_string(first) + ", " + std::to_string(end) +
                  ") must lie within 0 to " + std::to_string(size) + ", the size of base " + text(base) +
                  " along dim " + std::to_string(dim));
  return {static_cast<size_t>(first), static_cast<size_t>(end)};
}

// The rows and columns of `base` that delta_restore gives, as the core counts them, and the sizes of the
// result.
struct Cut {
  Region region;
  std::vector<int64_t> sizes;
};

inline Cut check_cut(const Checks& checks, const Tensor& base, const HostMatrix& words,
                     const MaybeRange& rows, const MaybeRange& columns) {
  const int64_t dims = base.dim();
  if (rows && dims < 2)
    checks.refuse("rows are along dim 0 of a base of two dimensions or more, but base is " + text(base));
  if (columns && dims != 1 && dims != 2)
    checks.refuse("columns are along the last dim of a base of one dimension or two, but base is " +
                  text(base));
  const Range r = check_range(checks, "rows", rows, base, 0, words.n);
  const Range c = check_range(checks, "columns", columns, base, dims - 1, words.k);
  Cut cut{{r.first, r.end, c.first, c.end}, {base.sizes().begin(), base.sizes().end()}};
  if (rows) cut.sizes.front() = static_cast<int64_t>(r.end - r.first);
  if (columns) cut.sizes.back() = static_cast<int64_t>(c.end - c.first);
  return cut;
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
