// CPU kernel of delta_embedding: check the arguments, hand their memory to the core.
#include "aten.h"
#include "grouped.h"
#include "ops.h"

namespace xorz {
namespace {

const TorchThreads threads;

}  // namespace

Tensor delta_embedding_cpu(const Tensor& indices, const Tensor& weight, const Tensor& arena,
                           const Tensor& slots, const Tensor& tenant_of_row) {
  const Checks checks{"delta_embedding"};
  checks.known("indices", indices);
  if (indices.scalar_type() != ScalarType::Long && indices.scalar_type() != ScalarType::Int)
    checks.refuse("indices must be int64 or int32, but is " + text(indices));
  checks.known("weight", weight);
  if (weight.dim() != 2) checks.refuse("weight must be 2-D [V, k], but is " + text(weight));
  const Words words = checks.words("weight", weight);
  const auto m = static_cast<size_t>(indices.numel());
  const Tenancy t =
      tenancy(checks, arena, slots, tenant_of_row, m, "element of indices, which is " + text(indices));
  const NoGrad guard;
  const Tensor rows = plain(torch::stable::to(indices, ScalarType::Long));
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(weight.size(1));
  const Tensor out = torch::stable::empty(sizes, weight.scalar_type());
  const rust::Slice<uint8_t> bytes(static_cast<uint8_t*>(out.mutable_data_ptr()), bytes_of(out).size());
  core(checks, [&] {
    delta_embedding({static_cast<const int64_t*>(rows.const_data_ptr()), m}, words, t.batch, bytes, threads);
  });
  return out;
}

}  // namespace xorz
