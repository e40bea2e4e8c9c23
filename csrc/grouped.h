// What ops on many tenants at once share: the deltas' arena, its slots and whose each row is, as tensors.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>

#include "checks.h"

namespace xorz {

// Contiguous, and aligned to its elements, which a view of foreign memory may not be.
inline Tensor plain(const Tensor& t) {
  const Tensor c = in_a_row(t);
  const auto at = reinterpret_cast<uintptr_t>(c.const_data_ptr());
  return at % t.element_size() == 0 ? c : torch::stable::clone(c);
}

inline rust::Slice<const uint8_t> bytes_of(const Tensor& t) {
  return {static_cast<const uint8_t*>(t.const_data_ptr()), static_cast<size_t>(t.numel()) * t.element_size()};
}

// A batch's tenants, checked as far as it can be without reading a slot; the core checks those that are used.
// The tensors keep alive what `batch` points to, the arena apart.
struct Tenancy {
  Tensor slots, tenant_of_row;
  Batch batch;
};

// `rows` says of what there are `m`.
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

}  // namespace xorz
