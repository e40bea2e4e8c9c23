// delta_embedding: row i of the output is row `indices[i]` of the table of row i's tenant, bit for bit, words
// of 1, 2, 4 and 8 bytes. No table is restored: of a delta only the tiles of the row's own band are read.
//
//   block (i, s): row i of the batch, 4096 columns from 4096 s on; further ones if the grid has fewer
//     thread 0: index, slot, delta; refused: NaN
//     base, unchanged, raw: copy the row, 16 bytes a load
//     sparse, tile after tile:
//       copy the row's base words
//       64 runs of the tile's records, the row's lane of 16:
//         a thread sums its run's gaps, then walks the run (words.cuh)
//       exceptions of the row
//     exponent, a tile a warp:
//       decode down from the tile's top, keep the last row
//       differences of the row (differences.cuh), then exceptions
//
// `sparse`: a lane lies among 15 others, so the whole band's sectors come for one row. `exponent`: lanes
// carry bits from row to row, so a row costs the rows of its tile above it: at worst all 16 of base and delta
// (32 or more in narrow tiles), and rows of one band are decoded each alone.
//
// Where a tile contradicts itself in what the row needs, its part of the row is NaN (all bits set), and
// reported. 256 threads; shared memory: see gate.txt. Registers: one lane's run, or one stream.
#include "batch.cuh"
#include "decode.cuh"
#include "differences.cuh"
#include "words.cuh"

namespace xorz {
namespace {

constexpr uint32_t kLookupThreads = 256;
constexpr uint32_t kLookupRuns = 64;

struct EmbeddingShared {
  View view;
  uint32_t way;
  uint32_t sums[kLookupRuns];
  uint32_t corrupt;
};

// Row `row` of a tile: what its exceptions say of it. Threads `i` of `of` take part.
template <class W>
XORZ_DEVICE bool patch_row_exceptions(const View& v, uint32_t tile, const Rect& rect, uint32_t row, W* out,
                                      uint32_t i, uint32_t of) {
  Span span;
  if (!listed_of(v, exceptions_in(v), tile, span)) return false;
  const uint16_t* positions = reinterpret_cast<const uint16_t*>(v.bytes + v.exception_positions);
  const W* words = reinterpret_cast<const W*>(v.bytes + v.exception_words);
  bool sound = true;
  for (uint32_t e = span.from + i; e < span.to; e += of) {
    const uint32_t position = load_once(positions + e);
    const uint32_t r = position >> v.cols_log2, c = position & (v.tile_cols() - 1);
    if (r >= rect.rows || c >= rect.cols || (e > span.from && load_once(positions + e - 1) >= position))
      sound = false;
    else if (r == row)
      store(out + c, load_once(words + e));
  }
  return sound;
}

// `base` and `out` are the row's, from the tile's first column on. The block calls.
template <class W>
XORZ_DEVICE bool look_up_entries(EmbeddingShared& shared, uint32_t tile, const Rect& rect, uint32_t row,
                                 const W* base, W* out) {
  const View& v = shared.view;
  const uint32_t thread = thread_index();
  copy_words(out, base, rect.cols, thread, kLookupThreads);
  Records<W> records;
  const bool listed = records_of(v, tile, records);
  if (!listed) records.count = 0;
  const Span run = run_of(records.count, thread % kLookupRuns, kLookupRuns);
  const bool live = thread < kLookupRuns && run.from < run.to;
  if (thread < kLookupRuns) shared.sums[thread] = live ? gap_sum(records, row, run) : 0;
  if (thread == 0) shared.corrupt = 0;
  block_sync();
  bool sound = listed;
  if (live) {
    uint32_t column = 0;
    for (uint32_t before = 0; before < thread; before++) column += shared.sums[before];
    sound = patch_run(records, v.dtype, row, run, column, rect.cols, base, out);
  }
  if (!sound) shared.corrupt = 1;
  block_sync();
  if (!patch_row_exceptions(v, tile, rect, row, out, thread, kLookupThreads)) shared.corrupt = 1;
  block_sync();
  const bool corrupt = shared.corrupt != 0;
  if (corrupt) fill_nan(out, rect.cols, thread, kLookupThreads);
  block_sync();
  return !corrupt;
}

// As above. A warp calls.
template <class W>
XORZ_DEVICE bool look_up_stream(const View& v, uint32_t tile, const Rect& rect, uint32_t row, const W* weight,
                                W* out) {
  const uint32_t lane = thread_index() % 32;
  bool sound = decode_row(v, tile, rect, row, weight, [out](uint32_t c, W word) { store(out + c, word); });
  warp_sync();
  const auto edit = [&](uint32_t r, uint32_t c, auto after) {
    if (r == row) store(out + c, after(load(out + c)));
  };
  sound = add_differences<W>(v, tile, rect, lane, 32, edit) && sound;
  warp_sync();
  sound = patch_row_exceptions(v, tile, rect, row, out, lane, 32) && sound;
  const bool all = warp_ballot(!sound) == 0;
  warp_sync();
  if (!all) fill_nan(out, rect.cols, lane, 32);
  return all;
}

// Columns c0 .. of row `index` of the table to `out`, which begins there. The block calls.
template <class W>
XORZ_DEVICE void look_up(EmbeddingShared& shared, const Product<W>& p, uint32_t slot, uint64_t index,
                         uint64_t c0, W* out) {
  const View& v = shared.view;
  const uint32_t thread = thread_index(), warp = thread / 32;
  const uint32_t cols = p.k - c0 < kMaxTileCols ? static_cast<uint32_t>(p.k - c0) : kMaxTileCols;
  const W* base = p.weight + index * p.k + c0;
  if (shared.way == kOnBase || shared.way == kOnOwnWords) {
    if (shared.way == kOnOwnWords) base = reinterpret_cast<const W*>(v.bytes + v.payload) + index * p.k + c0;
    copy_words(out, base, cols, thread, kLookupThreads);
    return;
  }
  const uint32_t band = static_cast<uint32_t>(index >> v.rows_log2) * v.across;
  const uint32_t first = band + static_cast<uint32_t>(c0 >> v.cols_log2);
  const uint32_t tiles = (cols + v.tile_cols() - 1) >> v.cols_log2;
  const bool streams = shared.way == kOnStream;
  XORZ_NO_UNROLL
  for (uint32_t t = streams ? warp : 0; t < tiles; t += streams ? kLookupThreads / 32 : 1) {
    const Rect rect = rect_of(v, first + t);
    const uint32_t row = static_cast<uint32_t>(index - rect.r0);
    W* to = out + (static_cast<uint64_t>(t) << v.cols_log2);
    const bool sound = streams ? look_up_stream(v, first + t, rect, row, p.weight, to)
                               : look_up_entries(shared, first + t, rect, row, base + (to - out), to);
    if (!sound && thread % 32 == 0) report(p.status, kTileCorrupt, slot);
  }
}

template <class W>
XORZ_DEVICE void embedding(EmbeddingShared& shared, const int64_t* indices, const Product<W>& p,
                           uint32_t dtype) {
  const uint32_t thread = thread_index();
  XORZ_NO_UNROLL
  for (uint64_t i = block_x(); i < p.m; i += blocks_x()) {
    const int32_t slot = p.tenant_of_row == nullptr ? 0 : load_once(p.tenant_of_row + i);
    const uint64_t index = static_cast<uint64_t>(load_once(indices + i));
    if (thread == 0) {
      const bool there = index < p.n;
      if (!there) report(p.status, kNoRow, static_cast<uint32_t>(i));
      shared.way = there ? open_tenant(p, slot, dtype, shared.view) : kRefused;
    }
    block_sync();
    XORZ_NO_UNROLL
    for (uint64_t c0 = static_cast<uint64_t>(block_y()) * kMaxTileCols; c0 < p.k;
         c0 += static_cast<uint64_t>(blocks_y()) * kMaxTileCols) {
      W* out = p.out + i * p.k + c0;
      if (shared.way == kRefused)
        fill_nan(out, p.k - c0 < kMaxTileCols ? p.k - c0 : kMaxTileCols, thread, kLookupThreads);
      else
        look_up(shared, p, p.slots == nullptr ? 0 : static_cast<uint32_t>(slot), index, c0, out);
    }
    block_sync();
  }
}

}  // namespace
}  // namespace xorz

// See README.md for the parameters.
#define XORZ_EMBEDDING(bits)                                                                              \
  XORZ_KERNEL(256, 2)                                                                                     \
  xorz_delta_embedding_##bits(const int64_t* indices, const uint##bits##_t* weight, const uint8_t* arena, \
                              uint64_t arena_bytes, const int64_t* slots, uint64_t slot_count,            \
                              const int32_t* tenant_of_row, uint##bits##_t* out, uint64_t m, uint64_t n,  \
                              uint64_t k, uint32_t dtype, uint32_t* status) {                             \
    XORZ_SHARED xorz::EmbeddingShared shared;                                                             \
    xorz::embedding<uint##bits##_t>(shared, indices,                                                      \
                                    {nullptr, weight, nullptr, 0, arena, arena_bytes, slots, slot_count,  \
                                     tenant_of_row, out, m, n, k, status},                                \
                                    dtype);                                                               \
  }

XORZ_EMBEDDING(8)
XORZ_EMBEDDING(16)
XORZ_EMBEDDING(32)
XORZ_EMBEDDING(64)
