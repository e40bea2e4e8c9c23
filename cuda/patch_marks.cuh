// What patches of a panel's tile of W (patch_*.cuh) know of its rows before the steps of a tile column.
//
//   once a tile column, the block: every position of a list of the panel's tiles is looked at, once: in order? in the
//     tile? where a row's begin and end -> shared memory
//
// Shared memory: 8.75 KiB, only between steps.
#pragma once

#include "differences.cuh"
#include "stages.cuh"

namespace xorz {

constexpr uint32_t kRowsOfWarp = 8;  // of the panel
constexpr uint32_t kQuad = 4;        // lanes of a row

// What is known of a panel's rows before the steps of a tile column; it lies where the stages do.
struct Marks {
  // What is listed of a row: first, and one past the last.
  uint32_t first[kRowsOfW], past[kRowsOfW];
  // Streams (patch_streams.cuh).
  uint32_t at[kRowsOfW], lane[kRowsOfW][kStreamLanes];
};

// Rows r0 .. of a panel, by sixteens: which of them a tile from `row` on, of `rows` rows, has.
XORZ_DEVICE uint32_t sixteens(uint64_t r0, uint64_t row, uint32_t rows) {
  uint32_t bits = 0;
  XORZ_UNROLL
  for (uint32_t i = 0; i < kRowsOfW / kTileLanes; i++) {
    const uint64_t from = r0 + i * kTileLanes;
    if (from + kTileLanes > row && from < row + rows) bits |= 1u << i;
  }
  return bits;
}

// f(tile) for each tile of tile column `across` that has rows of the panel.
template <class F>
XORZ_DEVICE void each_tile(const View& v, uint64_t r0, uint32_t panel, uint32_t across, F f) {
  const uint32_t first = static_cast<uint32_t>(r0 >> v.rows_log2),
                 last = static_cast<uint32_t>((r0 + panel - 1) >> v.rows_log2);
  XORZ_NO_UNROLL
  for (uint32_t i = first; i <= last; i++) f(i * v.across + across);
}

// Where what is listed of the panel's rows is; with `twice`, a word may be listed twice. The block calls, and must meet
// before it reads the marks.
XORZ_DEVICE void mark_listed(Marks& marks, uint32_t* corrupt, const View& v, const Listing list, bool twice,
                             uint64_t r0, uint32_t panel, uint32_t across) {
  block_sync();
  if (thread_index_anew() < kRowsOfW) marks.first[thread_index_anew()] = marks.past[thread_index_anew()] = 0;
  if (list.count == 0) return;
  block_sync();
  const uint16_t* positions = reinterpret_cast<const uint16_t*>(v.bytes + list.positions);
  each_tile(v, r0, panel, across, [&](uint32_t tile) {  // cold: listed
    const Rect rect = rect_of(v, tile);
    Span span;
    bool sound = listed_of(v, list, tile, span);
    if (!sound) span = {0, 0};
    for (uint32_t e = span.from + thread_index_anew(); e < span.to; e += kLargeThreads) {
      const uint32_t position = load_once(positions + e), row = position >> v.cols_log2;
      const uint32_t before = e > span.from ? load_once(positions + e - 1) : ~0u;
      const uint32_t after = e + 1 < span.to ? load_once(positions + e + 1) : ~0u;
      bool second;
      if (row >= rect.rows || (position & (v.tile_cols() - 1)) >= rect.cols ||
          out_of_order(positions, span, e, position, second) || (second && !twice)) {
        sound = false;
        continue;
      }
      const uint64_t in_panel = rect.r0 + row - r0;  // beyond all rows where the row lies above
      if (in_panel >= panel) continue;
      if (before == ~0u || before >> v.cols_log2 != row) marks.first[in_panel] = e;
      if (after == ~0u || after >> v.cols_log2 != row) marks.past[in_panel] = e + 1;
    }
    if (!sound) shared_or(corrupt, sixteens(r0, rect.r0, rect.rows));
  });
}

// W as it is.
struct NoPatch {
  // Whether there are registers for what could be computed again.
  static constexpr bool kRoom = true;

  template <class W>
  XORZ_DEVICE void begin(Marks&, uint32_t*, const View&, const W*, uint64_t, uint32_t, uint32_t, uint32_t) {}
  XORZ_DEVICE void pass_over(uint32_t) {}
  template <class W>
  XORZ_DEVICE void step(W*, uint32_t) {}
  template <uint32_t kSteps, class W>
  XORZ_DEVICE void step_of_window(W*, uint32_t, uint32_t) {}
  XORZ_DEVICE void end(uint32_t*) {}
};

// How many of a row's lanes, from its first on, vote yes.
XORZ_DEVICE uint32_t leading_votes(uint32_t votes) {
  return first_bit(~(votes >> (thread_index_anew() % 32 / kQuad * kQuad) & 15));
}

}  // namespace xorz
