// What the ops on many tenants at once share: the arena with the deltas, its slots, and the tenant of each
// row.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>

#include "aten.h"
#include "checks.h"

namespace xorz {

// The same tensor, contiguous and aligned to its elements, which a view of foreign memory need not be.
inline Tensor plain(const Tensor& t) {
  const Tensor c = in_a_row(t);
  const auto at = reinterpret_cast<uintptr_t>(c.const_data_ptr());
  return at % t.element_size() == 0 ? c : torch::stable::clone(c);
}

inline rust::Slice<const uint8_t> bytes_of(const Tensor& t) {
  return {static_cast<const uint8_t*>(t.const_data_ptr()), static_cast<size_t>(t.numel()) * t.element_size()};
}

// The tenants of a batch, checked as far as that is possible without reading a slot. The core checks the
// slots that a row uses. The tensors keep alive what `batch` points to, except for the arena.
struct Tenancy {
  Tensor slots, tenant_of_row;
  Batch batch;
};

// `rows` names, for messages, the things of which there are `m`: "row of input" or "element of indices".
inline Tenancy tenancy(const Checks& checks, const Tensor& arena, const Tensor& slots,
                       const Tensor& tenant_of_row, size_t m, const std::string& rows) {
  checks.known("arena", arena);
  if (arena.scalar_type() != ScalarType::Byte || arena.dim() != 1)
    checks.refuse("arena must be a 1-D uint8 tensor, but is " + text(arena));
  checks.contiguous("arena", arena);
  checks.known("slots", slots);
  if (slots.scalar_type() != ScalarType::Long || slots.dim() != 2 || slots.size(1) != 2)
    checks.refuse("slots must be int64 [s, 2], an offset and a length each, but is " + text(slots));
  checks.known("tenant_of_row", tenant_of_row);
  if (tenant_of_row.scalar_type() != ScalarType::Int || tenant_of_row.dim() != 1 ||
      tenant_of_row.size(0) != static_cast<int64_t>(m))
    checks.refuse("tenant_of_row is " + text(tenant_of_row) + ", but must be int32 [" + std::to_string(m) +
                  "], one for each " + rows);
  Tenancy t{plain(slots), plain(tenant_of_row), {}};
  t.batch =
      Batch{bytes_of(arena),
            {static_cast<const int64_t*>(t.slots.const_data_ptr()), 2 * static_cast<size_t>(slots.size(0))},
            {static_cast<const int32_t*>(t.tenant_of_row.const_data_ptr()), m}};
  return t;
}

// The arguments of a product of many tenants, checked as far as that is possible without reading a slot.
struct GroupedOperands {
  Tensor rows;
  const DtypeRow* type;
  HostMatrix weight;
  size_t m, s;
  Tenancy tenancy;
  std::vector<int64_t> out_sizes;
};

// `rows` is the left operand, which the caller knows as `name`; its columns meet dimension `columns` of
// weight.
inline GroupedOperands grouped_operands(const Checks& checks, const char* name, const Tensor& rows,
                                        int columns, const Tensor& weight, const Tensor& arena,
                                        const Tensor& slots, const Tensor& tenant_of_row) {
  GroupedOperands g;
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

// One row per slot, then the base's own. Rows may be any distance apart.
inline void check_biases(const Checks& checks, const Tensor& biases, const GroupedOperands& g) {
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

}  // namespace xorz
