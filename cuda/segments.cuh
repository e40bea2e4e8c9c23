// The rows of x by tenant, for products of many rows: what `xorz_linear_segments_*` leaves in the workspace and
// `xorz_linear_large_*` takes from it. A segment is the rows of one tenant; a row tile up to R of them.
//
// The workspace, whose sections follow one another (m rows of x, s slots, t = min(m, s + 2) segments at most):
//   64 bytes     u32: row tiles
//   t x 128      segments
//   (floor(m / R) + t) x 16   row tiles
//   (s + 2) x 4  rows of each slot, of the base, of tenants that there are not; then where the next one goes
//   m x 4        rows of x in the order of their tenants
// It holds no address, so that it means the same wherever the arena lies.
#pragma once

#include <string.h>

#include "batch.cuh"

namespace xorz {

// Rows of x of a tile.
template <class W>
constexpr uint32_t kRowsOfX = sizeof(W) == 2 ? 128 : 64;

// The tenant of a segment.
struct alignas(16) TenantRows {
  View view;  // `bytes` is not kept: `offset` in the arena is
  uint64_t offset;
  int32_t slot;
  uint32_t way;
};
static_assert(sizeof(TenantRows) == 128, "the workspace's size follows from it");

// `count` rows of segment `segment`, from `first` on in the order.
struct alignas(16) RowTile {
  uint32_t segment, first, count, unused;
};

struct Workspace {
  uint32_t* tile_count;
  TenantRows* tenants;
  RowTile* tiles;
  uint32_t* rows_of;
  uint32_t* order;
};

// Slots, without the base and those that there are not.
template <class W>
XORZ_DEVICE uint32_t slots_of(const Product<W>& p) {
  return p.slots == nullptr ? 1 : static_cast<uint32_t>(p.slot_count);
}

template <class W>
XORZ_DEVICE Workspace workspace_of(const Product<W>& p, uint8_t* at) {
  const uint64_t keys = static_cast<uint64_t>(slots_of(p)) + 2, segments = p.m < keys ? p.m : keys;
  Workspace w;
  w.tile_count = reinterpret_cast<uint32_t*>(at);
  w.tenants = reinterpret_cast<TenantRows*>(at + 64);
  w.tiles = reinterpret_cast<RowTile*>(w.tenants + segments);
  w.rows_of = reinterpret_cast<uint32_t*>(w.tiles + (p.m / kRowsOfX<W> + segments));
  w.order = w.rows_of + keys;
  return w;
}

// A record of whole vectors to device memory.
template <class T>
XORZ_DEVICE void store_record(T* to, const T& record) {
  XORZ_UNROLL
  for (uint32_t i = 0; i < sizeof(T) / 16; i++) {
    Vector part;
    memcpy(&part, reinterpret_cast<const char*>(&record) + 16 * i, 16);
    store_vector(reinterpret_cast<char*>(to) + 16 * i, part);
  }
}

}  // namespace xorz
