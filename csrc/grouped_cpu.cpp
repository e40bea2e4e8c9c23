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

// Some rows of a matrix in a row: copied out of it, and back into one with rows of another length.
Tensor gathered(const Tensor& matrix, const rust::Vec<int64_t>& rows, size_t columns, ScalarType type) {
  const size_t bytes = columns * matrix.element_size();
  const Tensor some =
      torch::stable::empty({static_cast<int64_t>(rows.size()), static_cast<int64_t>(columns)}, type);
  const auto* from = static_cast<const uint8_t*>(matrix.const_data_ptr());
  auto* to = static_cast<uint8_t*>(some.mutable_data_ptr());
  for (size_t i = 0; bytes > 0 && i < rows.size(); ++i)
    std::memcpy(to + i * bytes, from + rows[i] * bytes, bytes);
  return some;
}

void put_back(const Tensor& some, const rust::Vec<int64_t>& rows, size_t columns, const Tensor& out) {
  const Tensor plain = in_a_row(some);
  const size_t bytes = columns * out.element_size();
  const auto* from = static_cast<const uint8_t*>(plain.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  for (size_t i = 0; bytes > 0 && i < rows.size(); ++i)
    std::memcpy(to + rows[i] * bytes, from + i * bytes, bytes);
}

// A call's operands, and one tenant's part of them.
struct GroupedCall {
  const GroupedOperands& g;
  const Tensor &weight, &arena;
  const std::optional<Tensor>& biases;

  Tensor rows(const Tenant& tenant) const { return gathered(g.rows, tenant.rows, g.weight.k, g.type->torch); }

  std::optional<Tensor> bias(const Tenant& tenant) const {
    if (!biases) return std::nullopt;
    Tensor all = *biases;
    return torch::stable::select(all, 0, static_cast<int64_t>(tenant.bias));
  }

  rust::Slice<const uint8_t> delta(const Tenant& tenant) const {
    return {static_cast<const uint8_t*>(arena.const_data_ptr()) + tenant.offset, tenant.length};
  }

  // The base's rows, as torch multiplies them. Of autocast's dtype where that is on.
  Tensor base(const Tenant& tenant) const {
    Tensor w = weight;
    if (w.scalar_type() != g.type->torch) w = call_aten("aten::view", "dtype", weight, g.type->torch);
    return call_aten("aten::linear", "", rows(tenant), w, bias(tenant));
  }
};

// Each tenant's rows gathered, multiplied as delta_linear does (the base's as torch does), and put back.
Tensor exact_grouped(const Checks& checks, const GroupedCall& call) {
  const NoGrad guard;
  const GroupedOperands& g = call.g;
  const Tensor out = torch::stable::empty(g.out_sizes, g.type->torch);
  for (const Tenant& tenant : core(checks, [&] { return grouped_tenants(g.m, g.weight, g.tenancy.batch); })) {
    const Tensor part = tenant.length == 0 ? call.base(tenant) : core(checks, [&] {
      return exact_linear(checks, call.rows(tenant), tenant.rows.size(), g.weight, call.bias(tenant),
                          call.delta(tenant), g.type->torch);
    });
    check_not_autocast(checks, part, g.type->torch);
    put_back(part, tenant.rows, g.weight.n, out);
  }
  return out;
}

// The core's product of `m` rows of x, of the tenants of `tenant_of_row`.
void grouped(const Checks& checks, const GroupedCall& call, const std::string& mode, const Tensor& x,
             size_t m, rust::Slice<const int32_t> tenant_of_row, const Tensor& out) {
  const GroupedOperands& g = call.g;
  Batch batch = g.tenancy.batch;
  batch.tenant_of_row = tenant_of_row;
  Grouped args{bytes_of(x), m, g.weight, call.biases.has_value(), {}, 0, batch, rust::Str(mode)};
  if (call.biases && g.weight.n > 0) {
    args.bias_stride = static_cast<size_t>(call.biases->stride(0)) * g.type->bytes;
    args.biases = {static_cast<const uint8_t*>(call.biases->const_data_ptr()),
                   g.s * args.bias_stride + g.weight.n * g.type->bytes};
  }
  rust::Slice<uint8_t> bytes(static_cast<uint8_t*>(out.mutable_data_ptr()), m * g.weight.n * g.type->bytes);
  core(checks, [&] { delta_linear_grouped(args, bytes, threads); });
}

// The rows of tenants that have many, multiplied by torch on panels of restored weights as in delta_linear,
// put into `out`. Gives the rows that are left.
rust::Vec<int64_t> by_torch(const Checks& checks, const GroupedCall& call, const Tensor& out) {
  const NoGrad guard;
  const GroupedOperands& g = call.g;
  rust::Vec<int64_t> left;
  for (const Tenant& tenant : core(checks, [&] { return grouped_tenants(g.m, g.weight, g.tenancy.batch); })) {
    std::optional<Tensor> part;
    if (torch_multiplies(tenant.rows.size()))
      part = tenant.length == 0 ? call.base(tenant) : core(checks, [&] {
        return panels_linear(call.rows(tenant), tenant.rows.size(), g.weight, call.bias(tenant),
                             call.delta(tenant));
      });
    if (part && part->scalar_type() == g.type->torch) {
      put_back(*part, tenant.rows, g.weight.n, out);
      continue;
    }
    for (const int64_t row : tenant.rows) left.push_back(row);
  }
  return left;
}

// A product of which torch multiplies some tenants' rows, and the core the others'.
Tensor shared_grouped(const Checks& checks, const GroupedCall& call, const std::string& mode) {
  const GroupedOperands& g = call.g;
  const Tensor out = torch::stable::empty(g.out_sizes, g.type->torch);
  const rust::Vec<int64_t> left = by_torch(checks, call, out);
  if (left.empty()) return out;
  const Tensor x = gathered(g.rows, left, g.weight.k, g.type->torch);
  std::vector<int32_t> tenant_of_row;
  for (const int64_t row : left) tenant_of_row.push_back(g.tenancy.batch.tenant_of_row[row]);
  const Tensor some = torch::stable::empty(
      {static_cast<int64_t>(left.size()), static_cast<int64_t>(g.weight.n)}, g.type->torch);
  grouped(checks, call, mode, x, left.size(), {tenant_of_row.data(), tenant_of_row.size()}, some);
  put_back(some, left, g.weight.n, out);
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
  const GroupedCall call{g, weight, arena, biases};
  if (mode == "exact") return exact_grouped(checks, call);
  // No tenant has more rows than all of them together.
  if (mode == "fast" && g.type->torch == ScalarType::BFloat16 && g.m >= least_torch_rows())
    return shared_grouped(checks, call, mode);
  const Tensor out = torch::stable::empty(g.out_sizes, g.type->torch);
  grouped(checks, call, mode, g.rows, g.m, g.tenancy.batch.tenant_of_row, out);
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
