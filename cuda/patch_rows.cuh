// A tile of W of a `sparse` tenant, of words of 16 bits: base words + differences, a window of 64 columns at a time. The
// result is the fine-tuned word itself, so that the product is that of the fine-tuned weights whatever is summed.
//
//   two warps of the block, a lane a row, each holding the next four records of its row of the tile
//   window: the columns of the four, one after the other; those left of the window's end, a row's first 0 to 4: word = base +
//     difference, one f32 addition, a second entry of a column added to the unrounded sum of the first
//     a row whose four records are all taken gets the next four, and again
//
// No lane asks another. Where a quad of lanes shares a row (patch_entries.cuh), eight warps spend three times as much on finding out
// which lane has what; here a warp goes on as long as its fullest row of 32. The others multiply meanwhile. Blocks of the grid's
// second half leave it to warps of other schedulers, since the first one and the second one share a multiprocessor.
//
// Rows walk their records at their own pace, in order; the next four come from memory while the window before is multiplied.
// Gaps of one byte never go back, and no entry is used that lies beyond the tile: what is left is looked at after the last step.
// Exceptions are left out (patch_exceptions.cuh says why). Registers: 20.
#pragma once

#include "patch_marks.cuh"
#include "sparse.cuh"

namespace xorz {

template <class D>
class PatchRows {
  using W = typename D::Word;
  static constexpr uint32_t kAtOnce = 4;
  static constexpr uint32_t kNoColumn = ~0u;
  // Of records that there are not: beyond all columns.
  static constexpr uint32_t kNoGap = 1u << 20;

  const uint8_t* gaps_;  // of the row
  const W* differences_;
  uint32_t left_;    // records of the row from the first one that is held on
  uint32_t column_;  // of the record before it; kNoColumn if there is none
  uint32_t cols_;    // of the tile
  uint32_t place_;   // of the row's first word
  float sum_;        // base + differences of column `column_`
  uint32_t gap_[kAtOnce];
  W difference_[kAtOnce];
  bool columns_;  // gaps are of two bytes, and columns
  bool sound_;

  // A warp of the two, and which.
  static XORZ_DEVICE uint32_t number() {
    return thread_index_anew() / 32 - (2 * block_x() >= blocks_x() ? 2 : 0);
  }

  XORZ_DEVICE void fetch() {
    XORZ_UNROLL
    for (uint32_t i = 0; i < kAtOnce; i++) {
      gap_[i] = kNoGap;
      if (i >= left_) continue;
      gap_[i] = load_once(gaps_ + i * kTileLanes);
      difference_[i] = load_once(differences_ + i * kTileLanes);
    }
  }

  // Use the records whose columns lie left of `end`, in a window of `kSteps` steps. Gaps are of one byte. Padding is -0.0, which leaves
  // the word, or the sum, as it is.
  template <uint32_t kSteps>
  XORZ_DEVICE void use(W* w, uint32_t end) {
    uint32_t taken;
    XORZ_NO_UNROLL
    do {
      uint32_t at[kAtOnce];
      W* place[kAtOnce];
      float word[kAtOnce];
      taken = 0;
      XORZ_UNROLL
      for (uint32_t i = 0; i < kAtOnce; i++) {
        at[i] = (i == 0 ? column_ : at[i - 1]) + gap_[i];
        place[i] = &w[place_ ^ at[i] % (kSteps * kStepColumns)];
        // Of the lane's row of the window, wherever the column is.
        word[i] = D::value(*place[i]);
        taken += at[i] < end;
      }
      XORZ_UNROLL
      for (uint32_t i = 0; i < kAtOnce; i++) {
        // A column's second entry is taken with the first, or begins the next four: `sum_` is the fourth's.
        sum_ = (gap_[i] == 0 ? sum_ : word[i]) + D::value(difference_[i]);
        column_ = at[i] < end ? at[i] : column_;
        if (at[i] < end) *place[i] = D::narrow(sum_);
      }
      left_ -= taken;
      gaps_ += taken * kTileLanes;
      differences_ += taken * kTileLanes;
      fetch();
    } while (taken == kAtOnce);  // hot: entries_taken
  }

  // The same, from `column` on, where gaps are of two bytes, and columns: padding has none. One record after the other: there
  // are few.
  template <uint32_t kSteps>
  XORZ_DEVICE void use_columns(W* w, uint32_t column, uint32_t end) {
    XORZ_NO_UNROLL
    for (; left_ != 0; left_--, gaps_ += 2 * kTileLanes, differences_ += kTileLanes) {
      const W difference = load_once(differences_);
      if (difference == no_op<W>(D::kCode)) continue;
      const uint32_t at = load_once(reinterpret_cast<const uint16_t*>(gaps_));
      if (at >= end) break;
      if (at < column || (at < column_ && column_ != kNoColumn)) {
        sound_ = false;
        continue;
      }
      W* word = &w[place_ ^ at % (kSteps * kStepColumns)];
      sum_ = (at == column_ ? sum_ : D::value(*word)) + D::value(difference);
      *word = D::narrow(sum_);
      column_ = at;
    }
  }

  template <uint32_t kSteps>
  XORZ_DEVICE void patch(W* w, uint32_t column) {
    const uint32_t past = column + kSteps * kStepColumns, end = held(past < cols_ ? past : cols_);
    if (columns_)
      use_columns<kSteps>(w, column, end);  // cold: columns
    else
      use<kSteps>(w, end);
  }

 public:
  // Whether there are registers for what could be computed again.
  static constexpr bool kRoom = true;

  // Before the first step of tile column `across`. The block calls.
  XORZ_DEVICE void begin(Marks& marks, uint32_t* corrupt, const View& v, const W*, uint64_t r0,
                         uint32_t panel, uint32_t across, uint32_t) {
    mark_listed(marks, corrupt, v, exceptions_in(v), false, r0, panel, across);
    columns_ = v.gap_bytes == 2;
    left_ = cols_ = place_ = 0;
    column_ = kNoColumn;
    sum_ = 0;
    gaps_ = nullptr;
    differences_ = nullptr;
    XORZ_UNROLL
    for (uint32_t i = 0; i < kAtOnce; i++) gap_[i] = difference_[i] = 0;
    sound_ = true;
    const uint32_t row = number() * 32 + thread_index_anew() % 32;
    if (number() >= kRowsOfW / 32 || row >= panel) return;
    place_ = Stages<W>::template place_of_row<Stages<W>::kSteps>(row);
    const uint32_t tile = static_cast<uint32_t>((r0 + row) >> v.rows_log2) * v.across + across;
    cols_ = rect_of(v, tile).cols;
    Records<W> records;
    sound_ = records_of(v, tile, records);
    if (!sound_) return;
    left_ = records.count;
    gaps_ = records.gaps + row % kTileLanes * v.gap_bytes;
    differences_ = records.differences + row % kTileLanes;
    if (columns_) return;
    fetch();
    column_ = 0;
    if (gap_[0] != 0) return;
    // The first window takes it, and no gap of it is none: its column has no entry yet.
    gap_[0] = 1;
    column_ = kNoColumn;
  }

  // The first of a window's `kSteps` steps patches all of it. The block calls.
  template <uint32_t kSteps>
  XORZ_DEVICE void step_of_window(W* w, uint32_t column, uint32_t step) {
    if (step != 0 || left_ == 0) return;
    patch<kSteps>(w, column);  // each: patchers
  }

  // After the last step. The block calls.
  XORZ_DEVICE void end(uint32_t* corrupt) {
    // What is left lies beyond the tile, where only padding may.
    XORZ_NO_UNROLL
    for (; left_ != 0; left_--, differences_ += kTileLanes)
      if (load_once(differences_) != no_op<W>(D::kCode)) sound_ = false;
    if (!sound_) shared_or(corrupt, 1u << ((number() * 32 + thread_index_anew() % 32) / kTileLanes));
  }
};

}  // namespace xorz
