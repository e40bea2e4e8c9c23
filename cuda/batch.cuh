// Whose rows are whose: the rows of x of one block, tenant by tenant, and every tenant's delta opened.
// Everything here comes from a caller who may be wrong: rows of a tenant that does not exist, or whose slot
// or delta is refused, come out as NaN and are reported; the others are computed as if those were not there.
#pragma once

#include "resident.cuh"

namespace xorz {

constexpr uint32_t kWarps = 8;  // of a block

// What the kernels of products take; see README.md.
template <class W>
struct Product {
  const W* x;
  const W* weight;
  const W* biases;
  uint64_t bias_stride;
  const uint8_t* arena;
  uint64_t arena_bytes;
  const int64_t* slots;
  uint64_t slot_count;
  const int32_t* tenant_of_row;
  W* out;
  uint64_t m, n, k;
  uint32_t* status;
};

// Where the biases of a slot's tenant begin; those of the base (-1) come last.
template <class W>
XORZ_DEVICE uint64_t bias_row(const Product<W>& p, int32_t slot) {
  if (p.slots == nullptr) return 0;
  return (slot < 0 ? p.slot_count : static_cast<uint64_t>(slot)) * p.bias_stride;
}

// How a tenant's rows are computed.
enum Way : uint32_t { kOnBase = 0, kOnEntries = 1, kOnStream = 2, kOnOwnWords = 3, kRefused = 4 };

template <uint32_t M>
struct Batch {
  // Rows of x of the block, tenant after tenant, and where each tenant's begin.
  uint32_t order[M];
  uint32_t owner[M];  // the tenant of each, in that order
  uint32_t first[M + 1];
  uint32_t tenants;
  int32_t slot[M];
  uint32_t way[M];
  // Set where a tile was found corrupt on the way.
  uint32_t corrupt[M];
  View view[M];

  XORZ_DEVICE uint32_t rows(uint32_t tenant) const { return first[tenant + 1] - first[tenant]; }
};

// Where a slot's delta lies; `bytes` stays null where the slot is empty. A delta on its own is never empty: no bytes are
// no delta, and not the base.
template <class W>
XORZ_DEVICE uint32_t place_of(const Product<W>& p, int32_t slot, const uint8_t*& bytes, uint64_t& length) {
  if (p.slots == nullptr) {
    bytes = p.arena;
    length = p.arena_bytes;
    return bytes == nullptr ? kNotADelta : kOk;
  }
  const int64_t offset = load_once(p.slots + 2 * static_cast<uint64_t>(slot));
  const int64_t size = load_once(p.slots + 2 * static_cast<uint64_t>(slot) + 1);
  if (size == 0) return kOk;
  const uint64_t from = static_cast<uint64_t>(offset);
  if (offset < 0 || size < 0 || from % kArenaAlign != 0 || from > p.arena_bytes ||
      static_cast<uint64_t>(size) > p.arena_bytes - from)
    return kBadSlot;
  bytes = p.arena + from;
  length = static_cast<uint64_t>(size);
  return kOk;
}

// How the rows of a slot's tenant are computed; its delta, of dtype `dtype`, where it has one; what is
// refused is reported.
template <class W>
XORZ_DEVICE uint32_t open_tenant(const Product<W>& p, int32_t slot, uint32_t dtype, View& view) {
  const uint64_t slots = p.slots == nullptr ? 1 : p.slot_count;
  const uint8_t* bytes = nullptr;
  uint64_t length = 0;
  uint32_t code = kOk;
  if (slot < -1 || (slot >= 0 && static_cast<uint64_t>(slot) >= slots)) code = kNoTenant;
  if (code == kOk && slot >= 0) code = place_of(p, slot, bytes, length);
  uint32_t way = kOnBase;
  if (code == kOk && bytes != nullptr) {
    code = open_delta(bytes, length, p.n, p.k, dtype, view);
    // Where any dtype is accepted, it is still one of words of this size.
    if (code == kOk && dtype == 0 && word_bytes_of(view.dtype) != sizeof(W)) code = kMismatch;
    if (code == kOk) {
      way = view.encoding == kSparse     ? kOnEntries
            : view.encoding == kExponent ? kOnStream
            : view.encoding == kRaw      ? kOnOwnWords
                                         : kOnBase;
    }
  }
  if (code == kOk) return way;
  report(p.status, code, p.slots == nullptr ? 0 : static_cast<uint32_t>(slot));
  return kRefused;
}

// Sort the block's `rows` rows of x, the first of them row `m0`, by tenant. One warp calls.
template <uint32_t M, class W>
XORZ_DEVICE void sort_rows(Batch<M>& batch, const Product<W>& p, uint64_t m0, uint32_t rows) {
  const uint32_t thread = thread_index();
  const bool live = thread < rows;
  const int32_t slot = !live || p.tenant_of_row == nullptr ? 0 : load_once(p.tenant_of_row + m0 + thread);
  uint32_t count = 0, placed = 0;
  XORZ_NO_UNROLL
  for (uint32_t left = warp_ballot(live); left != 0;) {
    const uint32_t head = first_bit(left);
    const int32_t its = warp_shuffle(slot, head);
    const uint32_t same = warp_ballot(live && slot == its);  // hot: gather
    if (same >> thread & 1) {
      const uint32_t at = placed + bit_count(same & ((1u << thread) - 1));
      batch.order[at] = thread;
      batch.owner[at] = count;
    }
    if (thread == head) {
      batch.slot[count] = slot;
      batch.first[count] = placed;
    }
    placed += bit_count(same);
    count++;
    left &= ~same;
  }
  if (thread == 0) {
    batch.first[count] = placed;
    batch.tenants = count;
  }
}

// Sort the block's `rows` rows of x, the first of them row `m0`, and open what they need; `sorted` is called in between, where
// whose rows they are is known. The block calls.
template <class D, uint32_t M, class Sorted>
XORZ_DEVICE void gather_batch(Batch<M>& batch, const Product<typename D::Word>& p, uint64_t m0, uint32_t rows,
                              Sorted sorted) {
  const uint32_t thread = thread_index();
  if (thread < 32) sort_rows(batch, p, m0, rows);  // each: one_warp
  block_sync();
  sorted();
  if (thread < batch.tenants) {
    batch.way[thread] = open_tenant(p, batch.slot[thread], D::kCode, batch.view[thread]);  // each: one_warp
    batch.corrupt[thread] = 0;
  }
  block_sync();
}

}  // namespace xorz
