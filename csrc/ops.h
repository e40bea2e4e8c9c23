// The ops' kernels, declared for the registrar.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "xorz/src/ffi/bridge.rs.h"

namespace xorz {

using torch::stable::Tensor;

Tensor delta_linear_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                        const Tensor& delta, const std::string& mode);
Tensor delta_linear_grad_input_cpu(const Tensor& grad, const Tensor& weight, const Tensor& delta);
Tensor delta_linear_grouped_cpu(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& biases, const Tensor& arena, const Tensor& slots,
                                const Tensor& tenant_of_row, const std::string& mode);
Tensor delta_linear_grouped_grad_input_cpu(const Tensor& grad, const Tensor& weight, const Tensor& arena,
                                           const Tensor& slots, const Tensor& tenant_of_row);
Tensor delta_embedding_cpu(const Tensor& indices, const Tensor& weight, const Tensor& arena,
                           const Tensor& slots, const Tensor& tenant_of_row);
Tensor delta_restore_cpu(const Tensor& base, const Tensor& delta,
                         const std::optional<std::vector<int64_t>>& rows,
                         const std::optional<std::vector<int64_t>>& columns);
void delta_apply_cpu(const Tensor& weight, const Tensor& delta);
Tensor delta_encode_cpu(const Tensor& base, const Tensor& fine_tuned, const std::string& prefer);
Tensor delta_slice_cpu(const Tensor& delta, const Tensor& base, int64_t dim, int64_t start, int64_t end);
Tensor delta_concat_cpu(const std::vector<Tensor>& deltas, const std::vector<Tensor>& bases, int64_t dim);
void delta_check_cpu(const Tensor& delta, const Tensor& base);
Tensor delta_digest_cpu(const Tensor& base);

// On a CUDA device; see ops_cuda.cpp and via_host_cuda.cpp.
Tensor delta_linear_cuda(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Tensor& delta, const std::string& mode);
Tensor delta_linear_grad_input_cuda(const Tensor& grad, const Tensor& weight, const Tensor& delta);
Tensor delta_linear_grouped_grad_input_cuda(const Tensor& grad, const Tensor& weight, const Tensor& arena,
                                            const Tensor& slots, const Tensor& tenant_of_row);
Tensor delta_linear_grouped_cuda(const Tensor& input, const Tensor& weight,
                                 const std::optional<Tensor>& biases, const Tensor& arena,
                                 const Tensor& slots, const Tensor& tenant_of_row, const std::string& mode);
Tensor delta_embedding_cuda(const Tensor& indices, const Tensor& weight, const Tensor& arena,
                            const Tensor& slots, const Tensor& tenant_of_row);
Tensor delta_restore_cuda(const Tensor& base, const Tensor& delta,
                          const std::optional<std::vector<int64_t>>& rows,
                          const std::optional<std::vector<int64_t>>& columns);
void delta_apply_cuda(const Tensor& weight, const Tensor& delta);
Tensor delta_encode_cuda(const Tensor& base, const Tensor& fine_tuned, const std::string& prefer);
Tensor delta_slice_cuda(const Tensor& delta, const Tensor& base, int64_t dim, int64_t start, int64_t end);
Tensor delta_concat_cuda(const std::vector<Tensor>& deltas, const std::vector<Tensor>& bases, int64_t dim);
void delta_check_cuda(const Tensor& delta, const Tensor& base);
Tensor delta_digest_cuda(const Tensor& base);

// mode="exact" of delta_linear: `input` [..., k] as the caller gave it, `m` its rows, `weight` the base of
// `delta`.
Tensor exact_linear(const Checks& checks, const Tensor& input, size_t m, const HostMatrix& weight,
                    const std::optional<Tensor>& bias, rust::Slice<const uint8_t> delta,
                    torch::headeronly::ScalarType type);

// mode="fast" on processors whose matrix units torch uses: aten::linear on panels of 512 to 1023 restored
// rows of bf16, fewer where k is above 4096. Arguments as of exact_linear. Nothing under an autocast to
// another dtype.
std::optional<Tensor> panels_linear(const Tensor& input, size_t m, const HostMatrix& weight,
                                    const std::optional<Tensor>& bias, rust::Slice<const uint8_t> delta);

// Refuses the result of aten::linear if autocast gave it another dtype.
void check_not_autocast(const Checks& checks, const Tensor& product, torch::headeronly::ScalarType type);

}  // namespace xorz
