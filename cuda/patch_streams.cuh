// A tile of W of an `exponent` tenant: its bit streams decoded, 32 columns of a row at a time.
//
// A tile's lanes go through it row after row, a product through all rows column after column. So:
//
//   once a tile column, a warp a tile of the panel: walk the tile by widths alone: for each row of the panel, where
//     in the stream it begins (or its column from which on words are wanted), and of each lane the unit it took last and how many bits of it are left -> shared memory
//   warp w: rows 8 w .. + 7 of the panel, a stream each from there on, in registers
//     step: eight rows' 32 words, each as in exponent.cuh; the eight do not wait for one another
//   differences (patch_differences.cuh), then exceptions (patch_exceptions.cuh)
//
// Each word is decoded once a block and tile of rows of x. The walk reads the panel's base words once more (L2) and
// is one chain of dependent instructions for a tile; it is the price of the stream's order, row after row.
// Shared memory: 8.25 KiB, only between steps. Registers: 16 (two a row), 6.
#pragma once

#include "exponent.cuh"
#include "patch_differences.cuh"
#include "patch_exceptions.cuh"

namespace xorz {

// A row's beginning, a lane: the unit it took last, from 1 on (0: none), and the bits left of it.
constexpr uint32_t kHeldBits = 5, kHeld = (1u << kHeldBits) - 1;

// The widths of a tile's words, lane by lane: how many units were taken, and what is held.
template <class W>
struct Walk {
  static constexpr uint32_t kBits = 8 * sizeof(W);
  uint32_t at, last, held;

  XORZ_DEVICE void step(uint32_t w) {
    const bool takes = held < w;
    const uint32_t takers = warp_ballot(takes);
    if (takes) {
      last = at + bit_count(takers & ((1u << (thread_index_anew() % 32)) - 1)) + 1;
      held += kBits;
    }
    held -= w;
    at += bit_count(takers);
  }
};

// 32s of columns that a walk has under way.
template <class W>
constexpr uint32_t kWalkAhead = sizeof(W) == 2 ? 8 : 4;

// Walk `tile` down to the panel's last row, and mark where column `start` of each is, a multiple of 32 kWalkAhead; false
// where its stream contradicts itself or the base. A warp calls.
template <class W>
XORZ_DEVICE bool walk_tile(Marks& marks, const View& v, uint32_t tile, const W* weight, uint64_t r0,
                           uint32_t panel, uint32_t start) {
  constexpr uint32_t kAhead = kWalkAhead<W>;
  const uint32_t lane = thread_index_anew() % 32;
  Span span;
  if (!units_of(v, tile, span)) return false;
  const Rect rect = rect_of(v, tile);
  const uint32_t width_of_class = load_once(v.widths() + lane);
  const uint32_t shift = mantissa_bits_of(v.dtype, sizeof(W));
  const uint64_t end = r0 + panel - rect.r0;
  const uint32_t rows = end < rect.rows ? static_cast<uint32_t>(end) : rect.rows;
  Walk<W> walk = {0, 0, 0};
  XORZ_NO_UNROLL
  for (uint32_t r = 0; r < rows; r++) {
    const uint64_t in_panel = rect.r0 + r - r0;  // beyond all rows where the row lies above
    const W* row = weight + (rect.r0 + r) * v.k + rect.c0;
    W ahead[kAhead];
    XORZ_UNROLL
    for (uint32_t i = 0; i < kAhead; i++)
      ahead[i] = i * 32 + lane < rect.cols ? load_once(row + i * 32 + lane) : W(0);
    XORZ_NO_UNROLL
    for (uint32_t c = 0; c < rect.cols; c += kAhead * 32) {
      if (c == start && in_panel < panel) {
        marks.lane[in_panel][lane] = walk.last << kHeldBits | walk.held;
        if (lane == 0) marks.at[in_panel] = walk.at;
      }
      W now[kAhead];
      XORZ_UNROLL
      for (uint32_t i = 0; i < kAhead; i++) {
        now[i] = ahead[i];
        const uint32_t next = c + (kAhead + i) * 32 + lane;
        ahead[i] = next < rect.cols ? load_once(row + next) : W(0);
      }
      XORZ_UNROLL
      for (uint32_t i = 0; i < kAhead; i++) {
        const uint32_t of_class =
            warp_shuffle(width_of_class, static_cast<uint32_t>(now[i] >> shift) & (kClasses - 1));
        walk.step(c + i * 32 + lane < rect.cols ? of_class : 0);  // hot: walk
      }
    }
  }
  const uint32_t units = span.to - span.from;
  return rows == rect.rows ? walk.at == units : walk.at <= units;
}

template <class D, bool kExceptions = sizeof(typename D::Word) == 4>
class PatchStreams {
  using W = typename D::Word;
  using Bits = typename InRegisters<W>::Bits;
  static constexpr uint32_t kBits = 8 * sizeof(W);

  DifferencesOfRow<D> differences_;
  ExceptionsOfRow<W, kExceptions> exceptions_;
  const W* units_;
  uint32_t count_;
  uint32_t cols_;  // of the tile
  uint32_t rows_;  // of the warp that there are
  uint32_t width_of_class_, shift_;
  // Of each of the warp's rows: the next unit, with how many bits the lane holds below it, and the lane's bits.
  uint32_t at_[kRowsOfWarp];
  W bits_[kRowsOfWarp];

  XORZ_DEVICE W unit(uint32_t i) const { return i < count_ ? load_once(units_ + i) : W(0); }

 public:
  // Whether there are registers for what could be computed again.
  static constexpr bool kRoom = false;

  // Before the first step of tile column `across`, at column `start` of it. The block calls.
  XORZ_DEVICE void begin(Marks& marks, uint32_t* corrupt, const View& v, const W* weight, uint64_t r0,
                         uint32_t panel, uint32_t across, uint32_t start) {
    const uint32_t lane = thread_index_anew() % 32, warp = thread_index_anew() / 32;
    mark_listed(marks, corrupt, v, exceptions_in(v), false, r0, panel, across);
    block_sync();
    exceptions_.begin(marks, v);
    mark_listed(marks, corrupt, v, differences_in(v), true, r0, panel, across);
    uint32_t number = 0;
    each_tile(v, r0, panel, across, [&](uint32_t tile) {
      if (number++ != warp) return;
      if (walk_tile(marks, v, tile, weight, r0, panel, start)) return;
      const Rect rect = rect_of(v, tile);
      if (lane == 0) shared_or(corrupt, sixteens(r0, rect.r0, rect.rows));
    });
    block_sync();
    differences_.begin(marks, v);
    const uint32_t row = warp * kRowsOfWarp;
    rows_ = row >= panel ? 0 : panel - row < kRowsOfWarp ? panel - row : kRowsOfWarp;
    width_of_class_ = load_once(v.widths() + lane);
    shift_ = mantissa_bits_of(v.dtype, sizeof(W));
    count_ = cols_ = 0;
    Span span;
    const uint32_t tile = static_cast<uint32_t>((r0 + row) >> v.rows_log2) * v.across + across;
    if (rows_ != 0 && units_of(v, tile, span) && (*corrupt >> (row / kTileLanes) & 1) == 0) {
      units_ = reinterpret_cast<const W*>(v.bytes + v.payload) + span.from;
      count_ = span.to - span.from;
      cols_ = rect_of(v, tile).cols;
    } else {
      rows_ = 0;
    }
    XORZ_UNROLL
    for (uint32_t i = 0; i < kRowsOfWarp; i++) {
      at_[i] = 0;
      bits_[i] = 0;
      if (i >= rows_) continue;
      const uint32_t mark = marks.lane[row + i][lane], held = mark & kHeld;
      at_[i] = marks.at[row + i] << kHeldBits | held;
      if (held != 0) bits_[i] = static_cast<W>(unit((mark >> kHeldBits) - 1) >> (kBits - held));
    }
  }

  // Columns `column` .. + 31 of the tile column, in `w`. The block calls; every warp has its own rows.
  XORZ_DEVICE void step(W* w, uint32_t column) { step_of_window<1>(w, column, 0); }

  // The same of step `step` of a window of `kSteps`, of which `column` is the first.
  template <uint32_t kSteps>
  XORZ_DEVICE void step_of_window(W* w, uint32_t column, uint32_t step) {
    column += step * kStepColumns;
    const uint32_t lane = thread_index_anew() % 32, row = thread_index_anew() / 32 * kRowsOfWarp;
    const bool live = column + lane < cols_;
    XORZ_UNROLL
    for (uint32_t i = 0; i < kRowsOfWarp; i++) {
      if (i >= rows_) continue;
      W* word = &w[Stages<W>::template word_of_window<kSteps>(row + i, step * kStepColumns + lane)];
      const W base = live ? *word : W(0);
      const uint32_t of_class =
          warp_shuffle(width_of_class_, static_cast<uint32_t>(base >> shift_) & (kClasses - 1));
      const uint32_t width = live ? of_class : 0;
      uint32_t held = at_[i] & kHeld;
      const uint32_t at = at_[i] >> kHeldBits;
      const bool takes = held < width;
      const uint32_t takers = warp_ballot(takes);
      Bits all = bits_[i];
      if (takes) {
        all |= static_cast<Bits>(unit(at + bit_count(takers & ((1u << lane) - 1)))) << held;
        held += kBits;
      }
      at_[i] = (at + bit_count(takers)) << kHeldBits | (held - width);
      if (width == 0) continue;
      const Bits mask = ~Bits(0) >> (8 * sizeof(Bits) - width);
      *word = static_cast<W>(base + static_cast<W>(all & mask) - static_cast<W>(Bits(1) << (width - 1)));
      bits_[i] = static_cast<W>(all >> width);
    }
    // Another lane may have written what a difference is added to.
    warp_sync();
    differences_.template step<kSteps>(w, column);
    // Another lane of the row may have added to what an exception overrides.
    warp_sync();
    exceptions_.template step<kSteps>(w, column);
  }

  // Streams are looked at as a whole before the first step.
  XORZ_DEVICE void pass_over(uint32_t) {}
  XORZ_DEVICE void end(uint32_t*) {}
};

}  // namespace xorz
