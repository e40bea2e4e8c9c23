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
// Gaps of one byte never go back, so that where a run ends says that all of it lies within the tile: those are walked without
// looking at columns, and with what only pads (-0.0, which adds nothing to a finite sum). Runs that end beyond, and gaps of two
// bytes, are walked with an eye on each.
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
  uint32_t from, mine;   // its rows of the round: the first, and how many; 0: none
  uint32_t run;          // its share of the records
  uint32_t runs_log2;    // how many shares there are
  uint32_t ordinals;     // of the round: the segment of each row, a byte a row, from 1 on

  // The next round of the places in the batch's order that are in `left`; false if there is none.
  XORZ_DEVICE bool begin(const Batch<M>& batch, uint32_t& left, uint32_t half_warp) {
    uint32_t segments = 0, previous = M;
    uint32_t owner[kRows];
    count = ordinals = 0;
    XORZ_UNROLL
    for (uint32_t r = 0; r < kRows; r++) {
      if (left == 0) break;
      const uint32_t at = first_bit(left);
      left &= left - 1;
      rows[r] = batch.order[at];
      owner[r] = batch.owner[at];
      segments += owner[r] != previous;
      previous = owner[r];
      ordinals |= segments << (8 * r);
      count++;
    }
    if (count == 0) return false;
    runs_log2 = segments == 1 ? 4 : segments == 2 ? 3 : 2;
    const uint32_t segment = (half_warp >> runs_log2) + 1;
    run = half_warp & ((1u << runs_log2) - 1);
    from = tenant = mine = 0;
    XORZ_UNROLL
    for (uint32_t r = kRows; r-- > 0;)
      if (r < count && (ordinals >> (8 * r) & 0xFF) == segment) {
        from = r;
        tenant = owner[r];
        mine++;
      }
    return true;
  }
};

// Columns c0 .. of the round's rows of x to shared memory. The block calls.
template <class W, uint32_t kRows, class Segment>
XORZ_DEVICE void stage_rows(Round<W>& round, const Segment& segment, const W* x, uint64_t k, uint64_t c0) {
  constexpr uint32_t kPer = 16 / sizeof(W), kThreads = 16 * kHalfWarps;
  const uint32_t cols = k - c0 < kMaxTileCols ? static_cast<uint32_t>(k - c0) : kMaxTileCols;
  // Rows lie where pieces of 16 bytes may be asked for, or none does.
  const uint32_t whole = aligned(x, 16) && k % kPer == 0 ? cols : 0;
  XORZ_NO_UNROLL
  for (uint32_t c = thread_index_anew() * kPer; c < whole; c += kThreads * kPer) {
    Vector piece[kRows];
    XORZ_UNROLL
    for (uint32_t r = 0; r < kRows; r++)
      if (r < segment.count) piece[r] = load_vector_once(x + segment.rows[r] * k + c0 + c);
    XORZ_UNROLL
    for (uint32_t r = 0; r < kRows; r++)
      if (r < segment.count) store_shared(&round.x[r][c], piece[r]);  // hot: stage
  }
  XORZ_NO_UNROLL
  for (uint32_t c = whole + thread_index_anew(); c < cols; c += kThreads) {
    XORZ_UNROLL
    for (uint32_t r = 0; r < kRows; r++)
      if (r < segment.count) round.x[r][c] = load_once(x + segment.rows[r] * k + c0 + c);  // cold: pieces
  }
}

// sums[i] += a run's differences times row i of `rows` of x, each kMaxTileCols words after the one before it. All of the run's
// columns are known to be those of the tile.
template <class D, uint32_t kCount, uint32_t kRows>
XORZ_DEVICE void walk(float (&sums)[kRows], const Records<typename D::Word>& records, Span run, uint32_t lane,
                      const typename D::Word* rows, uint32_t column) {
  using W = typename D::Word;
  const uint8_t* gaps = records.gaps + run.from * kTileLanes + lane;
  const W* differences = records.differences + run.from * kTileLanes + lane;
  XORZ_UNROLL_4
  for (uint32_t j = run.from; j < run.to; j++, gaps += kTileLanes, differences += kTileLanes) {
    column += load_once(gaps);  // hot: entries
    const float difference = D::value(load_once(differences));
    XORZ_UNROLL
    for (uint32_t r = 0; r < kCount; r++)
      sums[r] = fused(difference, D::value(rows[r * kMaxTileCols + column]), sums[r]);
  }
}

// The same where columns are not known to be the tile's, of which there are `cols`; false where one is not.
template <class D, uint32_t kRows>
XORZ_DEVICE bool walk_warily(float (&sums)[kRows], uint32_t count, const Records<typename D::Word>& records,
                             Span run, uint32_t lane, const typename D::Word* rows, uint32_t column,
                             uint32_t cols) {
  using W = typename D::Word;
  bool sound = true;
  XORZ_NO_UNROLL
  for (uint32_t j = run.from; j < run.to; j++) {
    column = records.column_at(j, lane, column);
    const W difference = records.difference_at(j, lane);
    if (difference == no_op<W>(D::kCode)) continue;
    if (column >= cols) {
      sound = false;
      continue;
    }
    XORZ_UNROLL
    for (uint32_t r = 0; r < kRows; r++)
      if (r < count)
        sums[r] = fused(D::value(difference), D::value(rows[r * kMaxTileCols + column]), sums[r]);
  }
  return sound;
}

// The half warp's run of a tile, whichever way; `gaps` is what its gaps add up to in this lane. False where a column is none of
// the tile's.
template <class D, uint32_t kRows>
XORZ_DEVICE bool walk_run(float (&sums)[kRows], uint32_t count, const Records<typename D::Word>& records,
                          Span run, uint32_t lane, const typename D::Word* rows, uint32_t column,
                          uint32_t gaps, uint32_t cols) {
  if (records.gap_bytes != 1 || column + gaps >= cols)
    return walk_warily<D>(sums, count, records, run, lane, rows, column, cols);  // cold: beyond
  if (count == 1)
    walk<D, 1>(sums, records, run, lane, rows, column);
  else if (count == 2)
    walk<D, 2>(sums, records, run, lane, rows, column);
  else if (kRows == 4 && count == 3)
    walk<D, 3 < kRows ? 3 : kRows>(sums, records, run, lane, rows, column);
  else
    walk<D, kRows>(sums, records, run, lane, rows, column);
  return true;
}

// The first records of the panel's tiles come to L2 meanwhile: 8 KiB a tenant. The block calls.
template <class W, uint32_t M>
XORZ_DEVICE void fetch_entries_ahead(const Batch<M>& batch, uint64_t r0) {
  const uint32_t tenant = thread_index_anew() / kTileLanes;
  if (tenant >= batch.tenants || batch.way[tenant] != kOnEntries) return;
  const View& view = batch.view[tenant];
  Records<W> records;
  if (!records_of(view, static_cast<uint32_t>(r0 >> view.rows_log2) * view.across, records)) return;
  const uint32_t bytes = records.count * kTileLanes * (view.gap_bytes + static_cast<uint32_t>(sizeof(W)));
  const uint32_t end = bytes < 8192 ? bytes : 8192;
  for (uint32_t at = thread_index_anew() % kTileLanes * 128; at < end; at += kTileLanes * 128)
    fetch_ahead(records.gaps + at);
}

// Add the entries of every tenant that has them to the totals of the panel at row `r0`. The block calls.
template <class D, uint32_t M>
XORZ_DEVICE void add_entries(float (&total)[kTileLanes][M], Round<typename D::Word>& round, Runs& runs,
                             Batch<M>& batch, const typename D::Word* x, uint64_t r0) {
  using W = typename D::Word;
  constexpr uint32_t kRows = Round<W>::kRows;
  const uint32_t lane = thread_index_anew() % kTileLanes, half_warp = thread_index_anew() / kTileLanes;
  const uint32_t in_warp = thread_index_anew() % 32;
  // The most tiles of any tenant that lie side by side in 4096 columns: barriers are the whole block's.
  uint32_t narrowest = 12;
  uint64_t k = 0;
  for (uint32_t t = 0; t < batch.tenants; t++) {
    if (batch.way[t] != kOnEntries) continue;
    narrowest = batch.view[t].cols_log2 < narrowest ? batch.view[t].cols_log2 : narrowest;
    k = batch.view[t].k;
  }
  uint32_t left = warp_ballot(in_warp < batch.first[batch.tenants] &&
                              batch.way[batch.owner[in_warp < M ? in_warp : 0]] == kOnEntries);
  Segment<M, kRows> segment;
  XORZ_NO_UNROLL
  while (segment.begin(batch, left, half_warp)) {
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
      const uint64_t rest = k - c0 < kMaxTileCols ? k - c0 : kMaxTileCols;
      const uint32_t steps = static_cast<uint32_t>((rest + (1u << narrowest) - 1) >> narrowest);
      XORZ_NO_UNROLL
      for (uint32_t i = 0; i < steps; i++, parity ^= 1) {
        Records<W> records;
        records.count = 0;
        const uint32_t across = static_cast<uint32_t>(c0 >> view.cols_log2) + i;
        uint32_t tile = 0;
        bool live = segment.mine != 0 && i < kMaxTileCols >> view.cols_log2 && across < view.across;
        if (live) {
          tile = static_cast<uint32_t>(r0 >> view.rows_log2) * view.across + across;
          live = records_of(view, tile, records);
          sound = sound && live;
          if (!live) records.count = 0;
        }
        const uint32_t share = records.count * segment.run;
        const Span run = {share >> segment.runs_log2, (share + records.count) >> segment.runs_log2};
        const uint32_t gaps = live ? gap_sum(records, lane, run) : 0;
        runs.gaps[parity][half_warp][lane] = gaps;
        block_sync();
        if (!live) continue;
        const Rect rect = rect_of(view, tile);
        if (lane >= rect.rows) continue;
        uint32_t column = 0;
        XORZ_UNROLL
        for (uint32_t before = 0; before < kHalfWarps - 1; before++)
          if (before < segment.run) column += runs.gaps[parity][half_warp - 1 - before][lane];
        const bool well = walk_run<D>(sum, segment.mine, records, run, lane,
                                      round.x[segment.from] + (i << view.cols_log2), column, gaps, rect.cols);
        sound = sound && well;
      }
    }
    if (!sound) batch.corrupt[segment.tenant] = 1;
    XORZ_UNROLL
    for (uint32_t r = 0; r < kRows; r++)
      if (r < segment.mine) runs.sums[half_warp][lane][segment.from + r] = sum[r];  // hot: round
    block_sync();
    // A half warp for each row of x of the round.
    if (half_warp < segment.count) {
      uint32_t row = 0;
      XORZ_UNROLL
      for (uint32_t r = 0; r < kRows; r++)
        if (r == half_warp) row = segment.rows[r];
      const uint32_t ordinal = (segment.ordinals >> (8 * half_warp) & 0xFF) - 1;
      const uint32_t first = ordinal << segment.runs_log2;
      float all = 0;
      XORZ_UNROLL
      for (uint32_t i = 0; i < kHalfWarps; i++)
        if (i < 1u << segment.runs_log2) all += runs.sums[first + i][lane][half_warp];
      total[lane][row] += all;
    }
    block_sync();
  }
}

}  // namespace xorz
