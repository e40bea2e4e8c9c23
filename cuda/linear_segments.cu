// Sorts the rows of x by tenant and opens every tenant's delta, once a product: the first of the two launches
// of a product of many rows. One block.
//
//   key of a row: its slot; s for the base; s + 1 for a tenant that there is not
//   count rows by key: the lanes of a warp that share a key add once (ballots, one atomic)
//   256 keys at a time: scan rows, tiles and segments
//     a thread with rows writes its key's tiles and opens its delta
//   place rows by key, as they were counted
//
// Which row of a tenant comes first depends on the order of threads; no bit of the product does: a row's sums
// do not depend on where in a tile it is.
// Bytes: the map twice, the counts three times (L2), 128 bytes a segment, 16 a tile, 4 a row.
// Shared memory: 0.1 KiB. Time: s / 256 + m / 128 steps of one block; nothing of it grows with n or k.
#include "segments.cuh"

namespace xorz {
namespace {

constexpr uint32_t kSorters = 256;

// What is scanned: rows, tiles, segments.
struct Counts {
  uint32_t part[3];
};

struct SegmentsShared {
  Counts of_warp[kSorters / 32];
};

template <class W>
XORZ_DEVICE uint32_t key_of(const Product<W>& p, uint64_t row) {
  const uint32_t slots = slots_of(p);
  const int32_t slot = p.tenant_of_row == nullptr ? 0 : load_once(p.tenant_of_row + row);
  if (slot == -1) return slots;
  if (slot >= 0 && static_cast<uint32_t>(slot) < slots) return static_cast<uint32_t>(slot);
  report(p.status, kNoTenant, p.slots == nullptr ? 0 : static_cast<uint32_t>(slot));
  return slots + 1;
}

// Take as many places at `counters[key]` as live lanes of the warp have that key; the lane's own place.
XORZ_DEVICE uint32_t take_places(uint32_t* counters, uint32_t key, bool live) {
  const uint32_t lane = thread_index() % 32;
  uint32_t place = 0;
  for (uint32_t left = warp_ballot(live); left != 0;) {
    const uint32_t head = first_bit(left), shared_key = warp_shuffle(key, head);
    const bool mine = live && key == shared_key;
    const uint32_t same = warp_ballot(mine);
    uint32_t from = 0;
    if (lane == head) from = add_to(counters + key, bit_count(same));
    from = warp_shuffle(from, head);
    if (mine) place = from + bit_count(same & ((1u << lane) - 1));
    left &= ~same;
  }
  return place;
}

// What the threads before this one have, and in `all` what the block has. The block calls.
XORZ_DEVICE Counts scan(SegmentsShared& shared, const Counts& mine, Counts& all) {
  const uint32_t lane = thread_index() % 32, warp = thread_index() / 32;
  Counts before = mine;
  XORZ_UNROLL
  for (uint32_t by = 1; by < 32; by *= 2) {
    XORZ_UNROLL
    for (uint32_t i = 0; i < 3; i++) {
      const uint32_t other = warp_shuffle(before.part[i], lane < by ? lane : lane - by);
      if (lane >= by) before.part[i] += other;
    }
  }
  block_sync();
  if (lane == 31) shared.of_warp[warp] = before;
  block_sync();
  XORZ_UNROLL
  for (uint32_t i = 0; i < 3; i++) {
    before.part[i] -= mine.part[i];
    all.part[i] = 0;
    for (uint32_t w = 0; w < kSorters / 32; w++) {
      if (w == warp) before.part[i] += all.part[i];
      all.part[i] += shared.of_warp[w].part[i];
    }
  }
  return before;
}

template <class D>
XORZ_DEVICE void write_segment(const Product<typename D::Word>& p, const Workspace& work, uint32_t key,
                               uint32_t rows, const Counts& at) {
  using W = typename D::Word;
  constexpr uint32_t kRows = kRowsOfX<W>;
  const uint32_t slots = slots_of(p);
  TenantRows segment = {};
  segment.slot = key < slots ? static_cast<int32_t>(key) : -1;
  segment.way = key == slots + 1 ? static_cast<uint32_t>(kRefused)
                                 : open_tenant(p, segment.slot, D::kCode, segment.view);
  if (segment.way == kOnEntries || segment.way == kOnStream || segment.way == kOnOwnWords)
    segment.offset = static_cast<uint64_t>(segment.view.bytes - p.arena);
  segment.view.bytes = nullptr;
  store_record(work.tenants + at.part[2], segment);
  for (uint32_t from = 0, tile = at.part[1]; from < rows; from += kRows, tile++)
    store_record(work.tiles + tile,
                 RowTile{at.part[2], at.part[0] + from, rows - from < kRows ? rows - from : kRows, 0});
}

template <class D>
XORZ_DEVICE void linear_segments(SegmentsShared& shared, const Product<typename D::Word>& p,
                                 uint8_t* workspace) {
  using W = typename D::Word;
  const uint32_t thread = thread_index();
  const Workspace work = workspace_of(p, workspace);
  const uint32_t keys = slots_of(p) + 2, m = static_cast<uint32_t>(p.m);
  if (block_x() != 0 || block_y() != 0) return;
  for (uint32_t key = thread; key < keys; key += kSorters) store(work.rows_of + key, 0u);
  block_sync();
  XORZ_NO_UNROLL
  for (uint32_t i = 0; i < m; i += kSorters) {
    const bool live = i + thread < m;
    take_places(work.rows_of, live ? key_of(p, i + thread) : 0, live);
  }
  block_sync();
  Counts done = {};
  XORZ_NO_UNROLL
  for (uint32_t i = 0; i < keys; i += kSorters) {
    const uint32_t key = i + thread, rows = key < keys ? load(work.rows_of + key) : 0;
    Counts all, at = scan(shared, {{rows, (rows + kRowsOfX<W> - 1) / kRowsOfX<W>, rows != 0}}, all);
    XORZ_UNROLL
    for (uint32_t c = 0; c < 3; c++) {
      at.part[c] += done.part[c];
      done.part[c] += all.part[c];
    }
    if (rows == 0) continue;
    store(work.rows_of + key, at.part[0]);
    write_segment<D>(p, work, key, rows, at);
  }
  if (thread == 0) store(work.tile_count, done.part[1]);
  block_sync();
  XORZ_NO_UNROLL
  for (uint32_t i = 0; i < m; i += kSorters) {
    const bool live = i + thread < m;
    const uint32_t place = take_places(work.rows_of, live ? key_of(p, i + thread) : 0, live);
    if (live) store(work.order + place, i + thread);
  }
}

}  // namespace
}  // namespace xorz

// See README.md for the parameters.
#define XORZ_LINEAR_SEGMENTS(name, D)                                                                      \
  XORZ_KERNEL(256, 1)                                                                                      \
  xorz_linear_segments_##name(const xorz::D::Word* x, const xorz::D::Word* weight,                         \
                              const xorz::D::Word* biases, uint64_t bias_stride, const uint8_t* arena,     \
                              uint64_t arena_bytes, const int64_t* slots, uint64_t slot_count,             \
                              const int32_t* tenant_of_row, xorz::D::Word* out, uint64_t m, uint64_t n,    \
                              uint64_t k, uint32_t* status, uint8_t* workspace) {                          \
    XORZ_SHARED xorz::SegmentsShared shared;                                                               \
    xorz::linear_segments<xorz::D>(shared,                                                                 \
                                   {x, weight, biases, bias_stride, arena, arena_bytes, slots, slot_count, \
                                    tenant_of_row, out, m, n, k, status},                                  \
                                   workspace);                                                             \
  }

XORZ_LINEAR_SEGMENTS(bf16, Bf16)
XORZ_LINEAR_SEGMENTS(f16, F16)
XORZ_LINEAR_SEGMENTS(f32, F32)
