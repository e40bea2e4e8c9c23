// A tile of W of a `sparse` tenant: base words + differences, step by step. The result is the fine-tuned word
// itself, so that the product is that of the fine-tuned weights whatever is summed.
//
//   warp w: rows 8 w .. + 7 of the panel, four lanes a row, each holding one record of its row of the tile
//   step: a record's column is the row's last column + the gaps of the lanes up to it (two shuffles)
//     those left of the step's end, a row's first 0 to 4: word = base + difference, one f32 addition
//     a second entry of a column is added to the unrounded sum of the first (one lane of the row, one by one)
//     a row whose four records are all taken gets the next four, and again
//   exceptions (patch_exceptions.cuh)
//
// Rows walk their records at their own pace, in order; each record is used once a block and tile of rows of x,
// and loaded again only where a step ends within four of them (L1). Registers: 12.
#pragma once

#include "patch_exceptions.cuh"
#include "sparse.cuh"

namespace xorz {

template <class D, bool kExceptions = sizeof(typename D::Word) == 4>
class PatchEntries {
  using W = typename D::Word;
  Records<W> records_;
  ExceptionsOfRow<W, kExceptions> exceptions_;
  uint32_t lane_;    // the row's lane in its tile's records
  uint32_t next_;    // record of the row's first lane
  uint32_t column_;  // of the record before it
  uint32_t last_;    // column of the entry before it; kNoColumn if there is none
  uint32_t cols_;    // of the tile
  float sum_;        // base + differences of that column
  uint32_t gap_;     // of this lane's record
  W difference_;
  bool sound_;

  static constexpr uint32_t kNoColumn = ~0u;

  XORZ_DEVICE void fetch() {
    const uint32_t j = next_ + thread_index_anew() % kQuad;
    gap_ = 0;
    difference_ = no_op<W>(D::kCode);
    if (j >= records_.count) return;
    gap_ = records_.column_at(j, lane_, 0);
    difference_ = records_.difference_at(j, lane_);
  }

  // The column of this lane's record. With gaps of two bytes, which are columns, padding has none.
  XORZ_DEVICE uint32_t column_here() const {
    const uint32_t lane = thread_index_anew() % 32, quad = thread_index_anew() % kQuad;
    uint32_t gaps = gap_;
    XORZ_UNROLL
    for (uint32_t by = 1; by < kQuad; by *= 2) {
      const uint32_t other = warp_shuffle(gaps, quad < by ? lane : lane - by);
      if (quad >= by) gaps += other;
    }
    if (records_.gap_bytes == 1) return column_ + gaps;
    return difference_ == no_op<W>(D::kCode) ? 0 : gap_;
  }

  // The quad's entries that are `live`, one after the other, by its first lane. Without `kStores` they are passed over.
  template <bool kStores>
  XORZ_DEVICE void add_in_order(W* w, uint32_t column, uint32_t at, bool live) {
    const uint32_t row = thread_index_anew() / kQuad, head = thread_index_anew() % 32 / kQuad * kQuad;
    // The column's first entry may have been another lane's.
    warp_sync();
    XORZ_UNROLL
    for (uint32_t q = 0; q < kQuad; q++) {
      const uint32_t there = warp_shuffle(at, head + q);
      const W difference = warp_shuffle(difference_, head + q);
      const bool adds = warp_shuffle(static_cast<uint32_t>(live), head + q) != 0;
      if (!adds || thread_index_anew() % kQuad != 0) continue;
      if (last_ != kNoColumn && there < last_) sound_ = false;
      if constexpr (kStores) {
        W* word = &w[Stages<W>::word_at(row, there - column)];
        sum_ = (there == last_ ? sum_ : D::value(*word)) + D::value(difference);
        *word = D::narrow(sum_);
      }
      last_ = there;
    }
    last_ = warp_shuffle(last_, head);
    sum_ = warp_shuffle(sum_, head);
  }

  // The quad's entries that are `live`, all at once: their columns differ.
  template <bool kStores>
  XORZ_DEVICE void add_at_once(W* w, uint32_t column, uint32_t at, bool live, uint32_t lives) {
    const uint32_t row = thread_index_anew() / kQuad, head = thread_index_anew() % 32 / kQuad * kQuad;
    float sum = 0;
    if (kStores && live) {
      W* word = &w[Stages<W>::word_at(row, at - column)];
      sum = D::value(*word) + D::value(difference_);
      *word = D::narrow(sum);
    }
    const uint32_t mine = lives >> head & 15;
    const uint32_t latest = head + (mine >= 8 ? 3 : mine >= 4 ? 2 : mine >= 2 ? 1 : 0);
    const uint32_t last = warp_shuffle(at, latest);
    sum = warp_shuffle(sum, latest);
    if (mine == 0) return;
    last_ = last;
    sum_ = sum;
  }

  // Use the records whose columns lie left of `end`. False if that may be said of more of them.
  template <bool kStores>
  XORZ_DEVICE bool use(W* w, uint32_t column, uint32_t end) {
    const uint32_t lane = thread_index_anew() % 32, quad = lane % kQuad, head = lane / kQuad * kQuad;
    const W nothing = no_op<W>(D::kCode);
    const uint32_t at = column_here();
    const uint32_t taken = leading_votes(warp_ballot(next_ + quad < records_.count && at < end));
    bool live = quad < taken && difference_ != nothing;
    if (live && (at < column || at >= cols_)) {
      // Back, or beyond the tile, where the last call looks.
      live = sound_ = false;
    }
    const uint32_t lives = warp_ballot(live);
    // What the entry before this one has for a column; where that is not known at once, one by one.
    const uint32_t before = warp_shuffle(at, quad == 0 ? lane : lane - 1);
    const bool padded =
        warp_shuffle(static_cast<uint32_t>(difference_ == nothing), quad == 0 ? lane : lane - 1);
    const bool close = live && (quad == 0 ? last_ != kNoColumn && at <= last_
                                          : at <= before || (padded && records_.gap_bytes == 2));
    if (warp_ballot(close) != 0)
      add_in_order<kStores>(w, column, at, live);  // cold: close
    else if (lives != 0)
      add_at_once<kStores>(w, column, at, live, lives);
    const uint32_t reached = warp_shuffle(at, head + (taken == 0 ? 0 : taken - 1));
    if (taken != 0) {
      column_ = reached;
      next_ += taken;
      fetch();
    }
    return warp_ballot(taken == kQuad) == 0;
  }

 public:
  // Whether there are registers for what could be computed again.
  static constexpr bool kRoom = false;

  // Before the first step of tile column `across`, at column `start` of it. The block calls.
  XORZ_DEVICE void begin(Marks& marks, uint32_t* corrupt, const View& v, const W*, uint64_t r0,
                         uint32_t panel, uint32_t across, uint32_t start) {
    mark_listed(marks, corrupt, v, exceptions_in(v), false, r0, panel, across);
    block_sync();
    exceptions_.begin(marks, v);
    const uint32_t row = thread_index_anew() / kQuad;
    lane_ = row % kTileLanes;
    next_ = column_ = 0;
    last_ = kNoColumn;
    sum_ = 0;
    sound_ = true;
    records_.count = 0;
    records_.gap_bytes = v.gap_bytes;
    cols_ = 0;
    if (row < panel) {
      const uint32_t tile = static_cast<uint32_t>((r0 + row) >> v.rows_log2) * v.across + across;
      cols_ = rect_of(v, tile).cols;
      sound_ = records_of(v, tile, records_);
      if (!sound_) records_.count = 0;
    }
    fetch();
    if (start != 0) pass_over(start);
  }

  // The records whose columns lie left of `end`, as if they were used. The warp calls.
  XORZ_DEVICE void pass_over(uint32_t end) {
    while (!use<false>(nullptr, 0, end)) {
    }
  }

  // Columns `column` .. + 31 of the tile column, in `w`. The block calls; every warp has its own rows.
  XORZ_DEVICE void step(W* w, uint32_t column) {
    while (!use<true>(w, column, column + kStepColumns)) {
    }
    // Another lane of the row may have written what an exception overrides.
    warp_sync();
    exceptions_.template step<1>(w, column);
  }

  // The same of step `step_at` of a window of one.
  template <uint32_t kSteps>
  XORZ_DEVICE void step_of_window(W* w, uint32_t column, uint32_t) {
    static_assert(kSteps == 1, "patch_rows.cuh has wider ones");
    step(w, column);
  }

  // After the last step. The block calls.
  XORZ_DEVICE void end(uint32_t* corrupt) {
    while (!use<false>(nullptr, kMaxTileCols, ~0u)) {
    }
    if (!sound_) shared_or(corrupt, 1u << (thread_index_anew() / kQuad / kTileLanes));
  }
};

}  // namespace xorz
