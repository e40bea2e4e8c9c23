// CPU kernels of the ops on many tenants at once: check the arguments, hand their memory to the core.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "aten.h"
#include "grouped.h"
#include "ops.h"

namespace xorz {
namespace {

const TorchThreads threads;

// What the two ops share, checked as far as it can be without reading a slot.
struct Operands {
  Tensor rows;
  const DtypeRow* type;
  Words weight;
  size_t m, s;
  Tenancy tenancy;
  std::vector<int64_t> out_sizes;
};

// The left operand is `rows`, which `name` calls it; `columns` is the dimension of weight that it multiplies.
Operands grouped(const Checks& checks, const char* name, const Tensor& rows, int columns,
                 const Tensor& weight, const Tensor& arena, const Tensor& slots,
                 const Tensor& tenant_of_row) {
  Operands g;
  g.type = &checks.known(name, rows);
  if (g.type->code > 3)
    checks.refuse(std::string(name) + " is " + text(rows) + "; only float32, bfloat16 and float16 compute");
  checks.known("weight", weight);
  if (weight.dim() != 2) checks.refuse("weight must be 2-D [n, k], but is " + text(weight));
  g.weight = checks.words("weight", weight);
  const bool bits = weight.scalar_type() == ScalarType::Short || weight.scalar_type() == ScalarType::Int;
  if (bits && static_cast<uint8_t>(weight.element_size()) == g.type->bytes) g.weight.dtype = g.type->code;
  if (g.weight.dtype != g.type->code)
    checks.refuse(std::string(name) + " is " + text(rows) + ", but weight is " + text(weight));
  const int64_t size = weight.size(columns);
  if (rows.dim() < 1 || rows.size(rows.dim() - 1) != size)
    checks.refuse(std::string(name) + " is " + text(rows) + ", but its last dimension must be weight.shape[" +
                  std::to_string(columns) + "] = " + std::to_string(size));
  g.out_sizes.assign(rows.sizes().begin(), rows.sizes().end());
  g.out_sizes.back() = weight.size(1 - columns);
  g.m = 1;
  for (int64_t i = 0; i + 1 < rows.dim(); ++i) g.m *= static_cast<size_t>(rows.size(i));
  g.tenancy = tenancy(checks, arena, slots, tenant_of_row, g.m, std::string("row of ") + name);
  g.rows = in_a_row(rows);
  g.s = static_cast<size_t>(slots.size(0));
  return g;
}

// One bias per slot and the base's: any distance from row to row.
void check_biases(const Checks& checks, const Tensor& biases, const Operands& g) {
  checks.known("biases", biases);
  const auto rows = static_cast<int64_t>(g.s + 1), n = static_cast<int64_t>(g.weight.n);
  if (biases.dim() != 2 || biases.size(0) != rows || biases.size(1) != n ||
      biases.scalar_type() != g.type->torch)
    checks.refuse("biases is " + text(biases) + ", but must be " + g.type->name + " [" +
                  std::to_string(rows) + ", " + std::to_string(n) +
                  "]: one for each slot, then the base's own");
  if (n > 1 && biases.stride(1) != 1)
    checks.refuse("biases has a stride of " + std::to_string(biases.stride(1)) +
                  " along its last dimension, but must have 1");
}

// Each tenant's rows gathered, multiplied as delta_linear does (the base's as torch does), and put back.
Tensor exact_grouped(const Checks& checks, const Operands& g, const Tensor& weight, const Tensor& arena,
                     const std::optional<Tensor>& biases) {
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
  if (mode != "fast" && mode != "deterministic" && mode != "exact")
    checks.refuse("mode must be \"fast\", \"deterministic\" or \"exact\", but is \"" + mode + "\"");
  const Operands g = grouped(checks, "input", input, 1, weight, arena, slots, tenant_of_row);
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
  const Operands g = grouped(checks, "grad", grad, 0, weight, arena, slots, tenant_of_row);
  const Tensor out = torch::stable::empty(g.out_sizes, g.type->torch);
  rust::Slice<uint8_t> bytes(static_cast<uint8_t*>(out.mutable_data_ptr()), g.m * g.weight.k * g.type->bytes);
  core(checks, [&] {
    delta_linear_grouped_grad_input(bytes_of(g.rows), g.m, g.weight, g.tenancy.batch, bytes, threads);
  });
  return out;
}

}  // namespace xorz
