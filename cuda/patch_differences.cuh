// The differences of a panel's words, added to what their streams gave, step by step.
//
//   once a tile column, the block: mark_listed (patch_marks.cuh)
//   warp w: rows 8 w .. + 7 of the panel, four lanes a row, each holding one difference
//     step: those left of its end: the first one of a word adds the second one, too; a row whose four are all taken gets the
//       next four, and again
//
// Every difference's word is read once, a second one's twice (L1). Registers: 6.
#pragma once

#include "patch_marks.cuh"

namespace xorz {

template <class D>
class DifferencesOfRow {
  using W = typename D::Word;
  const uint16_t* positions_;
  const W* words_;
  uint32_t mask_;
  uint32_t at_, past_, first_;
  uint32_t column_;  // of difference `at_` + the lane's number in its quad
  bool second_;      // it is the second one of its word
  bool pair_;        // it is the first one of two
  bool any_;         // in any row of the warp

  XORZ_DEVICE uint32_t column_of(uint32_t e) const { return load_once(positions_ + e) & mask_; }

  XORZ_DEVICE void fetch() {
    const uint32_t e = at_ + thread_index_anew() % kQuad;
    column_ = e < past_ ? column_of(e) : ~0u;
    second_ = e > first_ && e < past_ && column_of(e - 1) == column_;
    pair_ = e + 1 < past_ && column_of(e + 1) == column_;
  }

 public:
  // At the first difference of each row of the warp, as marked. The warp calls.
  XORZ_DEVICE void begin(const Marks& marks, const View& v) {
    const uint32_t row = thread_index_anew() / kQuad;
    const Listing list = differences_in(v);
    positions_ = reinterpret_cast<const uint16_t*>(v.bytes + list.positions);
    words_ = reinterpret_cast<const W*>(v.bytes + list.words);
    mask_ = v.tile_cols() - 1;
    at_ = first_ = marks.first[row];
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
      if (takes && column_ >= column && !second_) {
        W* word = &w[Stages<W>::template word_of_window<kSteps>(row, column_)];
        const W second = pair_ ? load_once(words_ + at_ + quad + 1) : W(0);
        *word = word_after(D::kCode, *word, load_once(words_ + at_ + quad), pair_, second);
      }
      const uint32_t taken = leading_votes(votes);
      at_ += taken;
      if (taken != 0) fetch();
    } while (warp_ballot(leading_votes(votes) == kQuad) != 0);
  }
};

}  // namespace xorz
