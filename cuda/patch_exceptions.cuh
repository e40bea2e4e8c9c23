// The exceptions of a panel's words, put into its tile of W step by step: words that no sum of f32 numbers gives.
//
//   once a tile column, the block: mark_listed (patch_marks.cuh)
//   warp w: rows 8 w .. + 7 of the panel, four lanes a row, each holding one exception
//     step: those left of its end are stored; a row whose four are all taken gets the next four, and again
//
// Every exception's word is read once. Registers: 5.
#pragma once

#include "patch_marks.cuh"

namespace xorz {

// Without `kWanted` there are none: words of 16 bits in products of which outputs that are not finite are computed again. A
// sum of f32 numbers gives every such word that has a difference at all. Where it has none, the difference is NaN, and the
// decode path follows; or it is the other zero, which no product tells from this one.
template <class W, bool kWanted>
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
    const Listing list = exceptions_in(v);
    positions_ = reinterpret_cast<const uint16_t*>(v.bytes + list.positions);
    words_ = reinterpret_cast<const W*>(v.bytes + list.words);
    mask_ = v.tile_cols() - 1;
    at_ = marks.first[row];
    past_ = marks.past[row];
    fetch();
    any_ = warp_ballot(at_ < past_) != 0;
  }

  // Those of columns `column` .. `column` + 31 of the tile column. The warp calls; `w` is its rows' only, a
  // window of `kSteps` steps.
  template <uint32_t kSteps>
  XORZ_DEVICE void step(W* w, uint32_t column) {
    if (!any_) return;
    const uint32_t row = thread_index_anew() / kQuad, quad = thread_index_anew() % kQuad;
    uint32_t votes;
    do {
      const bool takes = column_ < column + kStepColumns;
      votes = warp_ballot(takes);
      if (takes && column_ >= column)
        w[Stages<W>::template word_of_window<kSteps>(row, column_)] = load_once(words_ + at_ + quad);
      const uint32_t taken = leading_votes(votes);
      at_ += taken;
      if (taken != 0) fetch();
    } while (warp_ballot(leading_votes(votes) == kQuad) != 0);
  }
};

template <class W>
class ExceptionsOfRow<W, false> {
 public:
  XORZ_DEVICE void begin(const Marks&, const View&) {}
  template <uint32_t kSteps>
  XORZ_DEVICE void step(W*, uint32_t) {}
};

}  // namespace xorz
