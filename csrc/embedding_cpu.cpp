// CPU kernel of delta_embedding: check the arguments, hand their memory to the core.
#include "embedding.h"
#include "ops.h"

namespace xorz {
namespace {

const TorchThreads threads;

}  // namespace

Tensor delta_embedding_cpu(const Tensor& indices, const Tensor& weight, const Tensor& arena,
                           const Tensor& slots, const Tensor& tenant_of_row) {
  const Checks checks{"delta_embedding"};
  const EmbeddingOperands l = embedding_operands(checks, indices, weight, arena, slots, tenant_of_row);
  const NoGrad guard;
  const Tensor out = torch::stable::empty(l.out_sizes, weight.scalar_type());
  const rust::Slice<uint8_t> bytes(static_cast<uint8_t*>(out.mutable_data_ptr()), bytes_of(out).size());
  core(checks, [&] {
    delta_embedding({static_cast<const int64_t*>(l.indices.const_data_ptr()), l.m}, l.weight, l.tenancy.batch,
                    bytes, threads);
  });
  return out;
}

}  // namespace xorz
