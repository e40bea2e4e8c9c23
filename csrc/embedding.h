// What delta_embedding asks of its arguments, on any device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "aten.h"
#include "grouped.h"

namespace xorz {

// `indices` are int64 and contiguous. The tensors keep alive what `tenancy` points to, except for the arena.
struct EmbeddingOperands {
  Tensor indices;
  HostMatrix weight;
  size_t m;
  Tenancy tenancy;
  std::vector<int64_t> out_sizes;
};

inline EmbeddingOperands embedding_operands(const Checks& checks, const Tensor& indices, const Tensor& weight,
                                            const Tensor& arena, const Tensor& slots,
                                            const Tensor& tenant_of_row) {
  checks.known("indices", indices);
  if (indices.scalar_type() != ScalarType::Long && indices.scalar_type() != ScalarType::Int)
    checks.refuse("indices must be int64 or int32, but is " + text(indices));
  checks.known("weight", weight);
  if (weight.dim() != 2) checks.refuse("weight must be 2-D [V, k], but is " + text(weight));
  const HostMatrix words = checks.words("weight", weight);
  const auto m = static_cast<size_t>(indices.numel());
  Tenancy t =
      tenancy(checks, arena, slots, tenant_of_row, m, "element of indices, which is " + text(indices));
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(weight.size(1));
  const NoGrad guard;
  const bool is_long = indices.scalar_type() == ScalarType::Long;
  return {plain(is_long ? indices : torch::stable::to(indices, ScalarType::Long)), words, m, t, sizes};
}

}  // namespace xorz
