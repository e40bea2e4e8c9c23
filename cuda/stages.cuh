// Tiles of x and of W on their way through shared memory, 32 columns a step.
//
//   turn t, of B buffers for x and B + 1 for W:
//     wait for the copies of turn t - B + 1; block_sync: what all have copied or patched is there, and what was
//       multiplied in turn t - 1 is free
//     copy W of step t, x of step t - 1
//     patch W of step t - B + 1; multiply step t - B
//
// 16 bytes a copy (cp.async); where an address or the end of a row does not allow that, words through
// registers, and zeros beyond the last column. Rows that the matrices do not have are left as they are: their
// products are not stored.
// A row's pieces of 16 bytes are permuted, so that eight rows of one piece, and eight pieces of one row, lie in
// different banks. Shared memory: bf16, f16: 3 x 128 and 4 x 64 rows of 64 bytes; f32: 2 x 64 and 3 x 64 rows of 128; 40 KiB.
#pragma once

#include "product.cuh"
#include "segments.cuh"

namespace xorz {

constexpr uint32_t kRowsOfW = 64;      // of a block
constexpr uint32_t kStepColumns = 32;  // of a step
constexpr uint32_t kLargeThreads = 256;

template <class W>
struct Stages {
  static constexpr uint32_t kOfX = sizeof(W) == 2 ? 3 : 2, kOfW = kOfX + 1;
  static constexpr uint32_t kPer = 16 / sizeof(W);          // words of a piece
  static constexpr uint32_t kPieces = kStepColumns / kPer;  // of a row
  alignas(16) W x[kOfX][kRowsOfX<W> * kStepColumns];
  alignas(16) W w[kOfW][kRowsOfW * kStepColumns];

  // Where in a buffer piece `piece` of row `row` begins.
  static XORZ_DEVICE uint32_t piece_at(uint32_t row, uint32_t piece) {
    const uint32_t turn = sizeof(W) == 2 ? row / 2 : row;
    return row * kStepColumns + (piece ^ (turn & (kPieces - 1))) * kPer;
  }
  static XORZ_DEVICE uint32_t word_at(uint32_t row, uint32_t column) {
    return piece_at(row, column / kPer) + column % kPer;
  }
};

// A thread's share of the copies: the same piece of some rows.
template <class W>
class Copier {
  using S = Stages<W>;
  static constexpr uint32_t kApart = kLargeThreads / S::kPieces;  // rows
  static constexpr uint32_t kEachX = kRowsOfX<W> / kApart, kEachW = kRowsOfW / kApart;
  // The piece's place in column 0 of each of the thread's rows; which of them there are, those of W first.
  const W* x_[kEachX];
  const W* w_[kEachW];
  uint32_t live_;
  uint32_t at_;   // where in a buffer the first one's piece goes
  uint32_t end_;  // columns; 0 where all steps are whole, and all pieces aligned

  template <uint32_t kEach>
  XORZ_DEVICE void copy_parts(const W* const (&rows)[kEach], uint32_t live, uint32_t column, W* to) const {
    const uint32_t from = column + thread_index_anew() % S::kPieces * S::kPer;
    XORZ_UNROLL
    for (uint32_t i = 0; i < kEach; i++) {
      if ((live >> i & 1) == 0) continue;
      W* at = to + at_ + i * kApart * kStepColumns;
      if (from + S::kPer <= end_ && aligned(rows[i] + column, 16)) {
        copy_async(at, rows[i] + column);
        continue;
      }
      XORZ_NO_UNROLL
      for (uint32_t c = 0; c < S::kPer; c++) at[c] = from + c < end_ ? load_once(rows[i] + column + c) : W(0);
    }
  }

  // Columns `column` .. + 31 of the thread's rows to a buffer.
  template <uint32_t kEach>
  XORZ_DEVICE void copy(const W* const (&rows)[kEach], uint32_t live, uint32_t column, W* to) const {
    if (end_ != 0) {
      copy_parts(rows, live, column, to);  // cold: pieces
      return;
    }
    XORZ_UNROLL
    for (uint32_t i = 0; i < kEach; i++)
      if (live >> i & 1) copy_async(to + at_ + i * kApart * kStepColumns, rows[i] + column);
  }

 public:
  // Row i of the tile of x is row `rows[i]` of x; `count` of them, and `panel` rows of `words`, of `k` columns.
  XORZ_DEVICE void begin(const W* x, const uint32_t* rows, uint32_t count, const W* words, uint32_t panel,
                         uint64_t k) {
    const uint32_t row = thread_index_anew() / S::kPieces, piece = thread_index_anew() % S::kPieces;
    static_assert(kApart % (2 * S::kPieces) == 0, "rows of a thread lie alike in their buffers");
    at_ = S::piece_at(row, piece);
    end_ = k % kStepColumns == 0 && aligned(x, 16) && aligned(words, 16) ? 0 : static_cast<uint32_t>(k);
    live_ = 0;
    XORZ_UNROLL
    for (uint32_t i = 0; i < kEachW; i++) {
      const bool live = row + i * kApart < panel;
      w_[i] = words + (live ? row + i * kApart : 0) * k + piece * S::kPer;
      live_ |= static_cast<uint32_t>(live) << i;
    }
    XORZ_UNROLL
    for (uint32_t i = 0; i < kEachX; i++) {
      const bool live = row + i * kApart < count;
      x_[i] = x + (live ? rows[row + i * kApart] : 0) * k + piece * S::kPer;
      live_ |= static_cast<uint32_t>(live) << (kEachW + i);
    }
  }

  XORZ_DEVICE void copy_x(uint32_t column, W* to) const { copy(x_, live_ >> kEachW, column, to); }
  XORZ_DEVICE void copy_w(uint32_t column, W* to) const { copy(w_, live_, column, to); }
};

// The buffer after buffer `at` of `of`.
XORZ_DEVICE uint32_t next_of(uint32_t at, uint32_t of) { return at + 1 == of ? 0 : at + 1; }

// Steps from column `from` to column `to`: patch(w, column) for each, one step ahead of multiply(x, w). The
// block calls; what it wrote to the stages' memory before may be gone.
template <class W, class Patch, class Multiply>
XORZ_DEVICE void run_steps(Stages<W>& stages, const Copier<W>& copier, uint32_t from, uint32_t to,
                           Patch& patch, Multiply& multiply) {
  using S = Stages<W>;
  // Turn t copies W of step t and x of step t - 1, patches step t - L + 1, and multiplies step t - L.
  constexpr uint32_t kLate = S::kOfX;
  const uint32_t steps = (to - from + kStepColumns - 1) / kStepColumns;
  uint32_t fill_x = S::kOfX - 1, fill_w = 0;
  XORZ_NO_UNROLL
  for (uint32_t turn = 0; turn < steps + kLate; turn++) {
    wait_for_copies<kLate - 2>();
    block_sync();
    if (turn < steps) copier.copy_w(from + turn * kStepColumns, stages.w[fill_w]);
    if (turn - 1 < steps) copier.copy_x(from + (turn - 1) * kStepColumns, stages.x[fill_x]);
    copies_end_group();
    // The buffers that are filled next are those of step t - L: of W, of which there is one more, the one that was patched a turn
    // ago.
    fill_x = next_of(fill_x, S::kOfX);
    fill_w = next_of(fill_w, S::kOfW);
    if (turn + 1 < kLate) continue;
    const uint32_t patched = turn + 1 - kLate;
    if (patched < steps) patch(stages.w[next_of(fill_w, S::kOfW)], from + patched * kStepColumns);
    if (turn >= kLate) multiply(stages.x[fill_x], stages.w[fill_w]);  // hot: step
  }
}

}  // namespace xorz
