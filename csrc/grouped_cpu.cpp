// CPU kernels of the ops on many tenants at once: check the arguments, hand their memory to the core.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "arguments.h"
#include "aten.h"
#include "grouped.h"
#include "ops.h"

namespace xorz {
namespace {

const TorchThreads threads;

// Each tenant's rows gathered, multiplied as delta_linear does (the base's as torch does), and put back.
Tensor exact_grouped(const Checks& checks, const GroupedOperands& g, const Tensor& weight,
                     const Tensor& arena, const std::optional<Tensor>& biases) {
  const NoGrad guard;
  const Tensor out = torch::stable::empty(g.out_sizes, g.type->torch);
  const size_t row = g.weight.k * g.type->bytes, out_row = g.weight.n * g.type->bytes;
  const auto tenants = core(checks, [&] { return grouped_tenants(g.m, g.weight, g.tenancy.batch); });
  for (const Tenant& tenant : tenants) {
    const size_t m = tenant.rows.size();
    const Tensor x =
        torch::stable::empty({static_cast<int64_t>(m), static_cast<int64_t>(g.weight.k)}, g.type->torch);
    const auto* from = static_cast<const uint8_t*>(g.rows.const_data_ptr());
    auto* gathered = static_cast<uint8_t*>(x.mutable_data_ptr());
    for (size_t i = 0; row > 0 && i < m; ++i)
      std::memcpy(gathered + i * row, from + tenant.rows[i] * row, row);
    std::optional<Tensor> bias;
    if (biases) {
      Tensor all = *biases;
      bias = torch::stable::select(all, 0, static_cast<int64_t>(tenant.bias));
    }
    Tensor part = x;
    if (tenant.length > 0) {
      const rust::Slice<const uint8_t> delta(
          static_cast<const uint8_t*>(arena.const_data_ptr()) + tenant.offset, tenant.length);
      part = core(checks, [&] { return exact_linear(checks, x, m, g.weight, bias, delta, g.type->torch); });
    } else {
      Tensor w = weight;
      if (w.scalar_type() != g.type->torch) w = call_aten("aten::view", "dtype", weight, g.type->torch);
      part = call_aten("aten::linear", "", x, w, bias);
      check_not_autocast(checks, part, g.type->torch);
    }
    part = in_a_row(part);
    const auto* results = static_cast<const uint8_t*>(part.const_data_ptr());
    auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
    for (size_t i = 0; out_row > 0 && i < m; ++i)
      std::memcpy(to + tenant.rows[i] * out_row, results + i * out_row, out_row);
  }
  return out;
}

}  // namespace

Tensor delta_linear_grouped_cpu(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& biases, const Tensor& arena, const Tensor& slots,
                                const Tensor& tenant_of_row, const std::string& mode) {
  const Checks checks{"delta_linear_grouped"};
  check_mode(checks, mode);
  const GroupedOperands g = grouped_operands(checks, "input", input, 1, weight, arena, slots, tenant_of_row);
  if (biases) check_biases(checks, *biases, g);
  if (mode == "exact") return exact_grouped(checks, g, weight, arena, biases);
  const Tensor out = torch::stable::empty(g.out_sizes, g.type->torch);
  Grouped args{bytes_of(g.rows), g.m, g.weight, biases.has_value(), {}, 0, g.tenancy.batch, rust::Str(mode)};
  if (biases) {
    args.bias_stride = static_cast<size_t>(biases->stride(0)) * g.type->bytes;
    args.biases = {static_cast<const uint8_t*>(biases->const_data_ptr()),
                   g.weight.n == 0 ? 0 : g.s * args.bias_stride + g.weight.n * g.type->bytes};
    if (g.weight.n == 0) args.bias_stride = 0;
  }
  rust::Slice<uint8_t> bytes(static_cast<uint8_t*>(out.mutable_data_ptr()), g.m * g.weight.n * g.type->bytes);
  core(checks, [&] { delta_linear_grouped(args, bytes, threads); });
  return out;
}

Tensor delta_linear_grouped_grad_input_cpu(const Tensor& grad, const Tensor& weight, const Tensor& arena,
                                           const Tensor& slots, const Tensor& tenant_of_row) {
  const Checks checks{"delta_linear_grouped_grad_input"};
  const GroupedOperands g = grouped_operands(checks, "grad", grad, 0, weight, arena, slots, tenant_of_row);
  const Tensor out = torch::stable::empty(g.out_sizes, g.type->torch);
  rust::Slice<uint8_t> bytes(static_cast<uint8_t*>(out.mutable_data_ptr()), g.m * g.weight.k * g.type->bytes);
  core(checks, [&] {
    delta_linear_grouped_grad_input(bytes_of(g.rows), g.m, g.weight, g.tenancy.batch, bytes, threads);
  });
  return out;
}

}  // namespace xorz
