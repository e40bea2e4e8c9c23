// What `sparse` tenants' entries add to the base product: the base is not touched.
//
//   rounds of up to X rows of x (X = 4, f32: 2), tenants in the order of the batch; a round's rows of one tenant
//   are a segment, and the 16 half warps are shared out evenly among its segments (16, 8, 4 or 4 a segment)
//     for each 4096 columns: the round's rows of x -> shared memory (16-byte loads)
//       for each tile of them: a half warp is 16 lanes (rows of W) and takes a run of the tile's records:
//         sum its gaps; block_sync; begin where the runs before it end
//         for each record: one gap, one difference, and for each row of x of the segment one word and one FMA
//     half warps' sums, in order, to the totals
//
// Order of one output: entries of a run first to last, tile after tile, one FMA each; runs 0, 1, ... added up
// from 0; the result added to the total. Runs depend on how many segments share the round: a row's bits
// depend on the map of tenants, never on another row's values. Longest chain: the lane's entries + 16 runs + 1.
// Shared memory: 32 KiB of x, 2 KiB of gap sums, 4 KiB of sums. Registers: X sums, 2 of walk, X words.
#pragma once

#include "batch.cuh"
#include "sparse.cuh"

namespace xorz {

constexpr uint32_t kHalfWarps = 16;

template <class W>
struct Round {
  static constexpr uint32_t kRows = sizeof(W) == 2 ? 4 : 2;  // rows of x
  alignas(16) W x[kRows][kMaxTileCols];
};

struct Runs {
  uint32_t gaps[2][kHalfWarps][kTileLanes];
  float sums[kHalfWarps][kTileLanes][4];
};

// Which of the block's rows of x a round takes, and what this half warp does in it. The same everywhere in a
// half warp.
template <uint32_t M, uint32_t kRows>
struct Segment {
  uint32_t rows[kRows];  // of the round: rows of x of the block
  uint32_t count;        // of the round
  uint32_t tenant;       // of this half warp
  uint32_t from, to;     // its rows of the round
  uint32_t run, runs;    // its share of the records
  uint32_t ordinals;     // of the round: the segment of each row, a byte a row, from 1 on
  bool live;

  // Round `round` of the rows that the tenants with entries have; false if there is none.
  XORZ_DEVICE bool begin(const Batch<M>& batch, uint32_t round, uint32_t half_warp) {
    uint32_t at = 0, segments = 0;
    uint32_t owner[kRows];
    count = ordinals = 0;
    uint32_t previous = M;
    for (uint32_t t = 0; t < batch.tenants; t++) {
      if (batch.way[t] != kOnEntries) continue;
      for (uint32_t i = batch.first[t]; i < batch.first[t + 1]; i++, at++) {
        if (at / kRows != round) continue;
        if (t != previous) segments++;
        previous = t;
        XORZ_UNROLL
        for (uint32_t r = 0; r < kRows; r++)
          if (r == count) {
            rows[r] = batch.order[i];
            owner[r] = t;
            ordinals |= segments << (8 * r);
          }
        count++;
      }
    }
    if (count == 0) return false;
    runs = segments == 1 ? 16 : segments == 2 ? 8 : 4;
    const uint32_t segment = half_warp / runs + 1;
    run = half_warp % runs;
    from = kRows;
    to = 0;
    tenant = 0;
    XORZ_UNROLL
    for (uint32_t r = kRows; r-- > 0;)
      if (r < count && (ordinals >> (8 * r) & 0xFF) == segment) {
        from = r;
        to = to == 0 ? r + 1 : to;
        tenant = owner[r];
      }
    live = to != 0;
    return true;
  }
};

// Columns c0 .. of the round's rows of x to shared memory. The block calls.
template <class W, uint32_t kRows, class Segment>
XORZ_DEVICE void stage_rows(Round<W>& round, const Segment& segment, const W* x, uint64_t k, uint64_t c0) {
  constexpr uint32_t kPer = 16 / sizeof(W);
  const uint32_t cols = k - c0 < kMaxTileCols ? static_cast<uint32_t>(k - c0) : kMaxTileCols;
  XORZ_UNROLL
  for (uint32_t r = 0; r < kRows; r++) {
    if (r >= segment.count) break;
    const W* row = x + segment.rows[r] * k + c0;
    const uint32_t whole = aligned(row, 16) ? cols / kPer * kPer : 0;
    for (uint32_t c = thread_index() * kPer; c < whole; c += kHalfWarps * 16 * kPer)
      store_shared(&round.x[r][c], load_vector_once(row + c));
    for (uint32_t c = whole + thread_index(); c < cols; c += kHalfWarps * 16)
      round.x[r][c] = load_once(row + c);
  }
}

// Add the entries of every tenant that has them to the totals of the panel at row `r0`. The block calls.
template <class D, uint32_t M>
XORZ_DEVICE void add_entries(float (&total)[kTileLanes][M], Round<typename D::Word>& round, Runs& runs,
                             Batch<M>& batch, const typename D::Word* x, uint64_t r0) {
  using W = typename D::Word;
  constexpr uint32_t kRows = Round<W>::kRows;
  const uint32_t lane = thread_index() % kTileLanes, half_warp = thread_index() / kTileLanes;
  // The most tiles of any tenant that lie side by side in 4096 columns: barriers are the whole block's.
  uint32_t narrowest = 12;
  uint64_t k = 0;
  for (uint32_t t = 0; t < batch.tenants; t++) {
    if (batch.way[t] != kOnEntries) continue;
    narrowest = batch.view[t].cols_log2 < narrowest ? batch.view[t].cols_log2 : narrowest;
    k = batch.view[t].k;
  }
  Segment<M, kRows> segment;
  const W nothing = no_op<W>(D::kCode);
  XORZ_NO_UNROLL
  for (uint32_t n = 0; segment.begin(batch, n, half_warp); n++) {
    const View& view = batch.view[segment.tenant];
    float sum[kRows];
    XORZ_UNROLL
    for (uint32_t r = 0; r < kRows; r++) sum[r] = 0;
    bool sound = true;
    uint32_t parity = 0;
    XORZ_NO_UNROLL
    for (uint64_t c0 = 0; c0 < k; c0 += kMaxTileCols) {
      block_sync();
      stage_rows<W, kRows>(round, segment, x, k, c0);
      const uint64_t left = k - c0 < kMaxTileCols ? k - c0 : kMaxTileCols;
      const uint32_t steps = static_cast<uint32_t>((left + (1u << narrowest) - 1) >> narrowest);
      XORZ_NO_UNROLL
      for (uint32_t i = 0; i < steps; i++, parity ^= 1) {
        Records<W> records;
        records.count = 0;
        const uint32_t across = static_cast<uint32_t>(c0 >> view.cols_log2) + i;
        uint32_t tile = 0;
        bool live = segment.live && i < kMaxTileCols >> view.cols_log2 && across < view.across;
        if (live) {
          tile = static_cast<uint32_t>(r0 >> view.rows_log2) * view.across + across;
          live = records_of(view, tile, records);
          sound = sound && live;
          if (!live) records.count = 0;
        }
        const Span run = run_of(records.count, segment.run, segment.runs);
        runs.gaps[parity][half_warp][lane] = live ? gap_sum(records, lane, run) : 0;
        block_sync();
        if (live) {
          uint32_t column = 0;
          for (uint32_t before = half_warp - segment.run; before < half_warp; before++)
            column += runs.gaps[parity][before][lane];
          const Rect rect = rect_of(view, tile);
          const uint32_t shift = i << view.cols_log2;
          const uint32_t end = lane < rect.rows ? run.to : run.from;
          XORZ_UNROLL_4
          for (uint32_t j = run.from; j < end; j++) {
            column = records.column_at(j, lane, column);
            const W difference = records.difference_at(j, lane);
            if (difference == nothing) continue;
            if (column >= rect.cols) {
              sound = false;
              continue;
            }
            XORZ_UNROLL
            for (uint32_t r = 0; r < kRows; r++)
              if (r >= segment.from && r < segment.to)
                sum[r] = fused(D::value(difference), D::value(round.x[r][shift + column]), sum[r]);
          }
        }
      }
    }
    if (!sound) batch.corrupt[segment.tenant] = 1;
    XORZ_UNROLL
    for (uint32_t r = 0; r < kRows; r++) runs.sums[half_warp][lane][r] = sum[r];
    block_sync();
    // A half warp for each row of x of the round.
    XORZ_UNROLL
    for (uint32_t r = 0; r < kRows; r++) {
      if (r != half_warp || r >= segment.count) continue;
      const uint32_t first = ((segment.ordinals >> (8 * r) & 0xFF) - 1) * segment.runs;
      float all = 0;
      for (uint32_t i = 0; i < segment.runs; i++) all += runs.sums[first + i][lane][r];
      total[lane][segment.rows[r]] += all;
    }
    block_sync();
  }
}

}  // namespace xorz
