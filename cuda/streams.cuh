// Rows of x of `exponent` tenants: the panel's base words are staged row by row and every tenant's warp
// decodes them from there, multiplying each word as soon as it is known. The fine-tuned matrix is nowhere.
//
//   for up to 8 tenants on one grid of tiles, for each tile column:
//     for each row of the tile down to the panel's last: (rows above the panel are decoded and thrown away)
//       the block: base row -> shared memory, 16-byte loads, the next row's on their way; block_sync
//       warp t: steps of 32 columns: word = decode (exponent.cuh); for each row of x an FMA of the word, and one of
//         each of its differences
//       lanes by a butterfly -> total
//
// A base word is read once for 8 tenants of a grid, and again, from L2, where rows on the base's own words or
// more grids are in the batch.
//
// Exceptions are never looked at: where products would need them a difference is NaN, and the decode path follows.
//
// Order of one output: a lane's columns from left to right, one FMA for the word and one for each of its
// differences; lanes by a butterfly (16, 8, 4, 2, 1); added to the total, tile column after tile column. Longest
// chain: a tile's columns / 32, the differences of a lane's columns, 5, and one a tile.
// Shared memory: 16 KiB (f32: 32). Registers: M sums, the stream's 11 to
// 16, 4 x 2 (f32: 4 x 4) of the next row.
#pragma once

#include "batch.cuh"
#include "exponent.cuh"

namespace xorz {

constexpr uint32_t kWarps = 8;

template <class W>
struct StagedRows {
  alignas(16) W row[2][kMaxTileCols];
};

// Differences of a tile in the order of their positions, for a warp that passes by; a window of 32 in its
// lanes.
template <class W>
class Differences {
  const uint16_t* positions_ = nullptr;
  const W* words_ = nullptr;
  Span span_ = {0, 0};
  uint32_t next_ = 0;  // position of the one at `span_.from` + `used_`
  uint32_t held_position_ = 0;
  W held_word_ = 0;
  uint32_t used_ = 0;  // of the window

  XORZ_DEVICE void fetch() {
    const uint32_t lane = thread_index() % 32, i = span_.from + lane;
    held_position_ = i < span_.to ? load_once(positions_ + i) : ~0u;
    held_word_ = i < span_.to ? load_once(words_ + i) : W(0);
  }

 public:
  // Those of the lane's word in the step just made: how many, and which.
  uint32_t count = 0;
  W first = 0, second = 0;

  XORZ_DEVICE bool begin(const View& v, uint32_t tile) {
    const Listing list = differences_in(v);
    positions_ = reinterpret_cast<const uint16_t*>(v.bytes + list.positions);
    words_ = reinterpret_cast<const W*>(v.bytes + list.words);
    used_ = count = 0;
    if (!listed_of(v, list, tile, span_)) return false;
    fetch();
    next_ = warp_shuffle(held_position_, 0u);
    return true;
  }

  // The step at `position`, the tile's position of lane 0. False where they are out of order, or out of the
  // tile: one was passed over, or lies where no column is. The whole warp calls.
  XORZ_DEVICE bool step(uint32_t position, bool live) {
    count = 0;
    while (next_ < position + 32) {
      const uint32_t here = next_;
      if (here < position) return false;
      const W fresh = warp_shuffle(held_word_, used_);
      const bool mine = here - position == thread_index() % 32;
      if (warp_ballot(mine && (!live || count == 2)) != 0) return false;
      if (mine) {
        if (count == 0)
          first = fresh;
        else
          second = fresh;
        count++;
      }
      if (++used_ == 32) {
        span_.from += 32;
        used_ = 0;
        fetch();
      }
      next_ = warp_shuffle(held_position_, used_);
      if (next_ < here) return false;
    }
    return true;
  }

  XORZ_DEVICE bool none_left() const { return next_ == ~0u; }
};

// A row of the tile on its way to shared memory, a share of it in each thread's registers.
template <class W>
struct RowLoads {
  static constexpr uint32_t kPer = 16 / sizeof(W);
  static constexpr uint32_t kEach = kMaxTileCols / kPer / (kWarps * 32);
  Vector held[kEach];

  XORZ_DEVICE void fetch(const W* row, uint32_t cols) {
    if (!aligned(row, 16)) return;
    XORZ_UNROLL
    for (uint32_t i = 0; i < kEach; i++) {
      const uint32_t c = (i * kWarps * 32 + thread_index()) * kPer;
      if (c + kPer <= cols) held[i] = load_vector_once(row + c);
    }
  }
  XORZ_DEVICE void put(W* stage, const W* row, uint32_t cols) const {
    uint32_t whole = 0;
    if (aligned(row, 16)) {
      whole = cols / kPer * kPer;
      XORZ_UNROLL
      for (uint32_t i = 0; i < kEach; i++) {
        const uint32_t c = (i * kWarps * 32 + thread_index()) * kPer;
        if (c + kPer <= cols) store_shared(stage + c, held[i]);
      }
    }
    for (uint32_t c = whole + thread_index(); c < cols; c += kWarps * 32) stage[c] = load_once(row + c);
  }
};

// The tenants of warps 0 .. for one pass; `pass` counts all passes of a batch. kNone where there is no such
// warp; false where there is no such pass.
constexpr uint32_t kNone = ~0u;

template <uint32_t M>
XORZ_DEVICE bool tenant_of_warp(const Batch<M>& batch, uint32_t pass, uint32_t warp, uint32_t& leader,
                                uint32_t& mine) {
  uint32_t done = 0;
  for (;; pass--) {
    leader = mine = kNone;
    uint32_t taken = 0;
    for (uint32_t t = 0; t < batch.tenants; t++) {
      if (batch.way[t] != kOnStream || (done >> t & 1)) continue;
      if (leader == kNone) leader = t;
      const View &a = batch.view[leader], &b = batch.view[t];
      if (a.rows_log2 != b.rows_log2 || a.cols_log2 != b.cols_log2 || taken == kWarps) continue;
      if (taken == warp) mine = t;
      taken++;
      done |= 1u << t;
    }
    if (leader == kNone) return false;
    if (pass == 0) return true;
  }
}

// Add the products of `exponent` tenants' rows to the totals of the panel at row `r0`. The block calls.
template <class D, uint32_t M>
XORZ_DEVICE void add_streams(float (&total)[kTileLanes][M], StagedRows<typename D::Word>& staged,
                             Batch<M>& batch, const typename D::Word* weight, const typename D::Word* x,
                             uint64_t r0) {
  using W = typename D::Word;
  const uint32_t lane = thread_index() % 32, warp = thread_index() / 32;
  uint32_t leader, mine;
  XORZ_NO_UNROLL
  for (uint32_t pass = 0; tenant_of_warp(batch, pass, warp, leader, mine); pass++) {
    const View& grid = batch.view[leader];
    const View& view = batch.view[mine == kNone ? leader : mine];
    const uint32_t count = mine == kNone ? 0 : batch.rows(mine);
    const uint32_t* list = &batch.order[mine == kNone ? 0 : batch.first[mine]];
    bool sound = true;
    XORZ_NO_UNROLL
    for (uint32_t across = 0; across < grid.across; across++) {
      const uint32_t tile = static_cast<uint32_t>(r0 >> grid.rows_log2) * grid.across + across;
      const Rect rect = rect_of(grid, tile);
      const uint32_t above = static_cast<uint32_t>(r0 - rect.r0);
      const uint32_t rows = above + kTileLanes < rect.rows ? above + kTileLanes : rect.rows;
      const W* words = weight + rect.r0 * grid.k + rect.c0;
      Stream<W> stream;
      Differences<W> differences;
      bool live = mine != kNone;
      if (live) live = stream.begin(view, tile) && differences.begin(view, tile);
      sound = sound && (live || mine == kNone);
      RowLoads<W> loads;
      loads.fetch(words, rect.cols);
      XORZ_NO_UNROLL
      for (uint32_t r = 0; r < rows; r++) {
        const W* row = words + r * grid.k;
        W* stage = staged.row[r % 2];
        loads.put(stage, row, rect.cols);
        if (r + 1 < rows) loads.fetch(row + grid.k, rect.cols);
        block_sync();
        if (!live) continue;
        float sum[M];
        XORZ_UNROLL
        for (uint32_t j = 0; j < M; j++) sum[j] = 0;
        XORZ_NO_UNROLL
        for (uint32_t c = 0; c < rect.cols; c += 32) {
          const bool here = c + lane < rect.cols;
          const W word = stream.step(here ? stage[c + lane] : W(0), here);
          if (!differences.step((r << grid.cols_log2) + c, here)) {
            live = sound = false;
            break;
          }
          if (r >= above && here) {
            XORZ_UNROLL
            for (uint32_t j = 0; j < M; j++) {
              if (j >= count) continue;
              const float value = D::value(load_once(x + list[j] * grid.k + rect.c0 + c + lane));
              sum[j] = fused(D::value(word), value, sum[j]);
              if (differences.count > 0) sum[j] = fused(D::value(differences.first), value, sum[j]);
              if (differences.count > 1) sum[j] = fused(D::value(differences.second), value, sum[j]);
            }
          }
        }
        if (r < above) continue;
        XORZ_UNROLL
        for (uint32_t j = 0; j < M; j++) {
          if (j >= count) continue;
          XORZ_UNROLL
          for (uint32_t other = 16; other > 0; other /= 2) sum[j] += warp_shuffle_xor(sum[j], other);
          if (lane == 0) total[r - above][list[j]] += sum[j];
        }
      }
      if (live)
        sound = sound && stream.sound(rows == rect.rows) && (rows < rect.rows || differences.none_left());
      // The next tile's first row may lie where this one's last rows are still being read.
      block_sync();
    }
    if (!sound) batch.corrupt[mine] = 1;
  }
  block_sync();
}

}  // namespace xorz
