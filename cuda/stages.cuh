// Tiles of x and of W on their way through shared memory: x by steps of 32 columns, W by windows of two steps (f32: one).
//
//   turn t, of two buffers for x and three for W; its steps are those of window t - 1 (the first turn has none to multiply):
//     for each step s of the turn:
//       wait for the copies that step s needs (the first: for window t of W, too); block_sync: what all have copied or patched is
//         there, and what was multiplied before is free
//       copy x of step s + 1; the first: W of window t + 1
//       patch W of window t: the first step all of it, or each step its share; multiply step s
//
// 16 bytes a copy (cp.async); where an address or the end of a row does not allow that, words through
// registers, and zeros beyond the last column. Rows that the matrices do not have are left as they are: their
// products are not stored.
// A row's pieces of 16 bytes are permuted, so that eight rows of one piece, and eight pieces of one row, lie in
// different banks. Shared memory: bf16, f16: 2 x 128 rows of 64 bytes and 3 x 64 of 128; f32: 2 x 64 and 3 x 64 of 128; 40 KiB.
#pragma once

#include "product.cuh"
#include "segments.cuh"

namespace xorz {

constexpr uint32_t kRowsOfW = 64;      // of a block
constexpr uint32_t kStepColumns = 32;  // of a step
constexpr uint32_t kLargeThreads = 256;

template <class W>
struct Stages {
  static constexpr uint32_t kOfX = 2, kOfW = 3;
  static constexpr uint32_t kSteps = sizeof(W) == 2 ? 2 : 1;  // of a window
  static constexpr uint32_t kPer = 16 / sizeof(W);            // words of a piece
  static constexpr uint32_t kPieces = kStepColumns / kPer;    // of a row
  alignas(16) W x[kOfX][kRowsOfX<W> * kStepColumns];
  alignas(16) W w[kOfW][kSteps * kRowsOfW * kStepColumns];

  // Where in a buffer piece `piece` of row `row` begins.
  static XORZ_DEVICE uint32_t piece_at(uint32_t row, uint32_t piece) {
    const uint32_t turn = sizeof(W) == 2 ? row / 2 : row;
    return row * kStepColumns + (piece ^ (turn & (kPieces - 1))) * kPer;
  }
  static XORZ_DEVICE uint32_t word_at(uint32_t row, uint32_t column) {
    return piece_at(row, column / kPer) + column % kPer;
  }
  // The same of a window of W of `kOf` steps, whose rows are that much longer; of which only the columns' lower bits are looked at.
  template <uint32_t kOf>
  static XORZ_DEVICE uint32_t word_of_window(uint32_t row, uint32_t column) {
    return place_of_row<kOf>(row) ^ column % (kOf * kStepColumns);
  }
  // Where the row begins: its column c is at this ^ c.
  template <uint32_t kOf>
  static XORZ_DEVICE uint32_t place_of_row(uint32_t row) {
    static_assert(kOf == 1 || kOf * kPieces == 8, "eight pieces lie in different banks");
    if (kOf == 1) return piece_at(row, 0);
    return row * (kOf * kStepColumns) + row % 8 * kPer;
  }
};

// A thread's share of the copies: the same piece of some rows.
// With `kHeld` the places are kept in registers, instead of being computed again for each copy.
template <class W, bool kHeld>
class Copier {
  using S = Stages<W>;
  static constexpr uint32_t kApart = kLargeThreads / S::kPieces;  // rows
  static constexpr uint32_t kEachX = kRowsOfX<W> / kApart, kEachW = kRowsOfW / kApart;
  // The piece's place in column 0 of each of the thread's rows; which of them there are, those of W first.
  const W* x_[kEachX];
  const W* w_[kEachW];
  uint32_t live_;
  uint32_t x_at_, w_at_;  // where in a buffer the first one's piece goes
  uint32_t end_;          // columns; 0 where all windows are whole, and all pieces aligned

  XORZ_DEVICE uint32_t w_at() const { return S::kSteps == 1 ? x_at_ : w_at_; }

  static XORZ_DEVICE const W* kept(const W* at) { return kHeld ? held(at) : at; }

  template <uint32_t kEach>
  XORZ_DEVICE void copy_parts(const W* const (&rows)[kEach], uint32_t live, uint32_t column, W* to,
                              uint32_t apart) const {
    const uint32_t from = column + thread_index_anew() % S::kPieces * S::kPer;
    XORZ_UNROLL
    for (uint32_t i = 0; i < kEach; i++) {
      if ((live >> i & 1) == 0) continue;
      W* at = to + i * apart;
      if (from < end_ && from + S::kPer <= end_ && aligned(rows[i] + column, 16)) {
        copy_async(at, rows[i] + column);
        continue;
      }
      XORZ_NO_UNROLL
      for (uint32_t c = 0; c < S::kPer; c++) at[c] = from + c < end_ ? load_once(rows[i] + column + c) : W(0);
    }
  }

  // The same where all pieces are whole.
  template <uint32_t kEach>
  XORZ_DEVICE void copy_whole(const W* const (&rows)[kEach], uint32_t live, uint32_t column, W* to,
                              uint32_t apart) const {
    XORZ_UNROLL
    for (uint32_t i = 0; i < kEach; i++)
      if (live >> i & 1) copy_async(to + i * apart, rows[i] + column);
  }

 public:
  // Row i of the tile of x is row `rows[i]` of x; `count` of them, and `panel` rows of `words`, of `k` columns.
  XORZ_DEVICE void begin(const W* x, const uint32_t* rows, uint32_t count, const W* words, uint32_t panel,
                         uint64_t k) {
    const uint32_t row = thread_index_anew() / S::kPieces, piece = thread_index_anew() % S::kPieces;
    static_assert(kApart % (2 * S::kPieces) == 0, "rows of a thread lie alike in their buffers");
    x_at_ = S::piece_at(row, piece);
    w_at_ = S::template word_of_window<S::kSteps>(row, piece * S::kPer);
    end_ = k % (S::kSteps * kStepColumns) == 0 && aligned(x, 16) && aligned(words, 16)
               ? 0
               : static_cast<uint32_t>(k);
    live_ = 0;
    XORZ_UNROLL
    for (uint32_t i = 0; i < kEachW; i++) {
      const bool live = row + i * kApart < panel;
      w_[i] = kept(words + (live ? row + i * kApart : 0) * k + piece * S::kPer);
      live_ |= static_cast<uint32_t>(live) << i;
    }
    XORZ_UNROLL
    for (uint32_t i = 0; i < kEachX; i++) {
      const bool live = row + i * kApart < count;
      x_[i] = kept(x + (live ? rows[row + i * kApart] : 0) * k + piece * S::kPer);
      live_ |= static_cast<uint32_t>(live) << (kEachW + i);
    }
  }

  // A step of x and, with `kOfW`, a window of W, each a group, to buffers. What lies beyond column `end` is something.
  template <bool kOfW>
  XORZ_DEVICE void copy(uint32_t x_column, W* x, uint32_t w_column, W* w, uint32_t end) const {
    constexpr uint32_t kXApart = kApart * kStepColumns, kWApart = kXApart * S::kSteps;
    x += x_at_;
    if (end_ == 0) {
      const uint32_t last = end - kStepColumns, last_of_w = end - S::kSteps * kStepColumns;
      copy_whole(x_, live_ >> kEachW, x_column < last ? x_column : last, x, kXApart);
      copies_end_group();
      if constexpr (kOfW) {
        XORZ_UNROLL
        for (uint32_t s = 0; s < S::kSteps; s++)
          copy_whole(w_, live_, (w_column < last_of_w ? w_column : last_of_w) + s * kStepColumns,
                     w + (w_at() ^ s * kStepColumns), kWApart);
        copies_end_group();
      }
      return;
    }
    copy_parts(x_, live_ >> kEachW, x_column, x, kXApart);  // cold: pieces
    copies_end_group();                                     // cold: pieces
    if constexpr (kOfW) {
      XORZ_NO_UNROLL
      for (uint32_t s = 0; s < S::kSteps; s++)
        copy_parts(w_, live_, w_column + s * kStepColumns, w + (w_at() ^ s * kStepColumns),
                   kWApart);  // cold: pieces
      copies_end_group();     // cold: pieces
    }
  }
};

// Steps from column `from` to column `to`: patch(w, column, step of the window) for each step of a window, a window ahead of
// sums.step(x, w, step, counts). The block calls; what it wrote to the stages' memory before may be gone. Zeros follow the last column of
// rows that do not fill a window.
template <class W, bool kHeld, class Patch, class Sums>
XORZ_DEVICE void run_steps(Stages<W>& stages, const Copier<W, kHeld>& copier, uint32_t from, uint32_t to,
                           Patch& patch, Sums& sums) {
  using S = Stages<W>;
  constexpr uint32_t kSteps = S::kSteps, kWindow = kSteps * kStepColumns;
  // Buffers of the windows that are multiplied, patched and copied.
  uint32_t multiplied = 1, patched = 2, copied = 0;
  sums.stop();
  block_sync();
  copier.template copy<true>(from, stages.x[1], from, stages.w[copied], to);
  XORZ_NO_UNROLL
  for (uint32_t column = from; column < to + kWindow; column += kWindow) {
    // `column` is that of the window that is patched; before the first one there is none to be multiplied.
    const uint32_t free = multiplied;
    multiplied = patched;
    patched = copied;
    copied = free;
    XORZ_UNROLL
    for (uint32_t s = 0; s < kSteps; s++) {
      // What was asked for last is the next window of W, but for the first step, which patches the one before.
      if (s == 0)
        wait_for_copies<0>();
      else
        wait_for_copies<1>();
      block_sync();  // hot: step
      const uint32_t now = kSteps == 1 ? column / kWindow & 1 : s & 1;
      // Of the first turn, this is before the first column in all steps but the last, and something is copied.
      const uint32_t next = column - kWindow + (s + 1) * kStepColumns;
      if (s == 0)
        copier.template copy<true>(next, stages.x[1 - now], column + kWindow, stages.w[copied], to);
      else
        copier.template copy<false>(next, stages.x[1 - now], 0, nullptr, to);
      patch(stages.w[patched], column, s);
      // Lanes may leave a patch at different times, and matrix instructions want the warp together.
      warp_sync();
      sums.step(stages.x[now], stages.w[multiplied], s, column != from);
    }
    sums.start();
  }
  // What was copied for nothing, too: other things lie there next.
  wait_for_copies<0>();
}

}  // namespace xorz
