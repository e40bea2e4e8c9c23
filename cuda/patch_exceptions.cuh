// The words of a panel that are stored apart, put into its tile of W step by step.
//
//   once a tile column, the block: every position of the panel's tiles is looked at, once: in order? in the tile?
//     where a row's begin and end -> shared memory
//   warp w: rows 8 w .. + 7 of the panel, four lanes a row, each holding one exception
//     step: those left of its end are stored; a row whose four are all taken gets the next four, and again
//
// Every exception's word is read once. Shared memory: 512 bytes, only between steps. Registers: 5.
#pragma once

#include "stages.cuh"

namespace xorz {

constexpr uint32_t kRowsOfWarp = 8;  // of the panel
constexpr uint32_t kQuad = 4;        // lanes of a row

// What is known of a panel's rows before the steps of a tile column; it lies where the stages do.
struct Marks {
  // Exceptions of a row: first, and one past the last.
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

// Where the exceptions of the panel's rows are. The block calls, and must meet before it reads them.
XORZ_DEVICE void mark_exceptions(Marks& marks, uint32_t* corrupt, const View& v, uint64_t r0, uint32_t panel,
                                 uint32_t across) {
  block_sync();
  if (thread_index_anew() < kRowsOfW) marks.first[thread_index_anew()] = marks.past[thread_index_anew()] = 0;
  if (v.exceptions == 0) return;
  block_sync();
  const uint16_t* positions = reinterpret_cast<const uint16_t*>(v.bytes + v.exception_positions);
  each_tile(v, r0, panel, across, [&](uint32_t tile) {
    const Rect rect = rect_of(v, tile);
    Span span;
    bool sound = exceptions_of(v, tile, span);
    if (!sound) span = {0, 0};
    for (uint32_t e = span.from + thread_index_anew(); e < span.to; e += kLargeThreads) {
      const uint32_t position = load_once(positions + e), row = position >> v.cols_log2;
      const uint32_t before = e > span.from ? load_once(positions + e - 1) : ~0u;
      const uint32_t after = e + 1 < span.to ? load_once(positions + e + 1) : ~0u;
      if (row >= rect.rows || (position & (v.tile_cols() - 1)) >= rect.cols ||
          (before != ~0u && before >= position)) {
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

// How many of a row's lanes, from its first on, vote yes.
XORZ_DEVICE uint32_t leading_votes(uint32_t votes) {
  return first_bit(~(votes >> (thread_index_anew() % 32 / kQuad * kQuad) & 15));
}

template <class W>
class ExceptionsOfRow {
  const uint16_t* positions_;
  const W* words_;
  uint32_t mask_;
  uint32_t at_, past_;
  uint32_t column_;  // of exception `at_` + the lane's number in its quad
  bool any_;         // in any row of the warp

  XORZ_DEVICE void fetch() {
    const uint32_t e = at_ + thread_index_anew() % kQuad;
    column_ = e < past_ ? load_once(positions_ + e) & mask_ : ~0u;
  }

 public:
  // At the first exception of each row of the warp, as marked. The warp calls.
  XORZ_DEVICE void begin(const Marks& marks, const View& v) {
    const uint32_t row = thread_index_anew() / kQuad;
    positions_ = reinterpret_cast<const uint16_t*>(v.bytes + v.exception_positions);
    words_ = reinterpret_cast<const W*>(v.bytes + v.exception_words);
    mask_ = v.tile_cols() - 1;
    at_ = marks.first[row];
    past_ = marks.past[row];
    fetch();
    any_ = warp_ballot(at_ < past_) != 0;
  }

  // Those of columns `column` .. `column` + 31 of the tile column. The warp calls; `w` is its rows' only.
  XORZ_DEVICE void step(W* w, uint32_t column) {
    if (!any_) return;
    const uint32_t row = thread_index_anew() / kQuad, quad = thread_index_anew() % kQuad;
    uint32_t votes;
    do {
      const bool takes = column_ < column + kStepColumns;
      votes = warp_ballot(takes);
      if (takes && column_ >= column)
        w[Stages<W>::word_at(row, column_ - column)] = load_once(words_ + at_ + quad);
      const uint32_t taken = leading_votes(votes);
      at_ += taken;
      if (taken != 0) fetch();
    } while (warp_ballot(leading_votes(votes) == kQuad) != 0);
  }
};

}  // namespace xorz
