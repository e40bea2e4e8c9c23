// What `sparse` tenants' entries add to the base product: the base is not touched.
//
//   groups of tenants in the order of the batch: one that has more than X rows of x alone (X = 4, f32: 2), else as many as have X
//   together; the 16 half warps are shared out evenly among a group's tenants (16, 8, 4 or 4 a tenant)
//     for each tile of the group's tenants side by side:
//       a half warp is 16 lanes (rows of W) and takes a run of its tenant's records: it sums their gaps
//       for each X of the group's rows of x:
//         4096 columns of them -> shared memory, column by column (8 bytes each); block_sync
//         before the first: a run begins where the gaps of those before it add up to
//         for each record: one gap, one difference, the column's 8 bytes, and an FMA a row of x
//         half warps' sums, in order, to the totals; block_sync
//
// Gaps of one byte never go back, so that where a run ends says that all of it lies within the tile: those are walked without
// looking at columns, and with what only pads (-0.0, which adds nothing to a finite sum). Runs that end beyond, and gaps of two
// bytes, are walked with an eye on each.
//
// Order of one output: tile after tile: entries of a run first to last, one FMA each; runs 0 + 1, 2 + 3, ... (the half warps of a
// warp), these added up from 0; the result added to the total. Runs depend on how many tenants share the group: a row's bits
// depend on the map of tenants, never on another row's values. Longest chain: a tile's entries of the lane, 9 for its runs, one a tile.
// Shared memory: 32 KiB of x, half a KiB of gap sums, 2 KiB of sums. Registers: X sums, 2 of walk, 2 to 4 of x.
#pragma once

#include "batch.cuh"
#include "sparse.cuh"

namespace xorz {

constexpr uint32_t kHalfWarps = 16;

// Rows of x of a round, column by column: what an entry needs of them lies side by side.
template <class W>
struct Round {
  static constexpr uint32_t kRows = 8 / sizeof(W);
  alignas(16) W x[kMaxTileCols][kRows];
};

// What the half warps of each warp have found, together.
struct Runs {
  uint32_t gaps[kWarps][kTileLanes];
  float sums[kWarps][kTileLanes][4];
};

// The rows of x of the block whose tenants have entries, tenant after tenant.
template <uint32_t M>
struct EntryRows {
  uint32_t row[M], tenant[M];
};

// Which of them are computed together, and what this half warp does of it: the same everywhere in a half warp.
struct Group {
  uint32_t first, count;  // of the group: of the rows with entries
  uint32_t begins;        // bits: which of them is a tenant's first
  uint32_t tenant;        // of this half warp
  uint32_t from, mine;    // its rows of the group: the first, and how many; 0: none
  uint32_t run;           // its share of the records
  uint32_t runs_log2;     // how many shares there are

  // The group that begins with row `at` of those with entries; bit i of `starts` says that row i is a tenant's first, or one past
  // the last row of all.
  template <uint32_t M>
  XORZ_DEVICE void begin(const EntryRows<M>& rows, uint32_t starts, uint32_t at, uint32_t most,
                         uint32_t half_warp) {
    const uint32_t ends = starts >> (at + 1), near = ends & ((1u << most) - 1);
    first = at;
    count = near >= 8 ? 4 : near >= 4 ? 3 : near >= 2 ? 2 : near == 1 ? 1 : first_bit(ends) + 1;
    begins = starts >> at & ((1u << count) - 1);
    uint32_t segments = begins;
    const uint32_t of = bit_count(segments);
    runs_log2 = of == 1 ? 4 : of == 2 ? 3 : 2;
    run = half_warp & ((1u << runs_log2) - 1);
    const uint32_t segment = half_warp >> runs_log2;
    XORZ_UNROLL
    for (uint32_t i = 0; i < 3; i++)
      if (i < segment) segments &= segments - 1;
    from = mine = 0;
    tenant = rows.tenant[at];
    if (segment >= of) return;
    from = first_bit(segments);
    segments &= segments - 1;
    mine = (segments != 0 ? first_bit(segments) : count) - from;
    tenant = rows.tenant[at + from];
  }
};

// Two columns of the rows of x at `pairs`, `at` words of 4 bytes further, to shared memory.
template <uint32_t kRows>
XORZ_DEVICE void stage_pair(void* to, const uint32_t* const (&pairs)[kRows], uint32_t at) {
  static_assert(kRows == 4, "of words of 2 bytes");
  uint32_t two[kRows];
  XORZ_UNROLL
  for (uint32_t r = 0; r < kRows; r++) two[r] = load_once(pairs[r] + at);
  store_shared(to, {{lower_halves(two[0], two[1]), lower_halves(two[2], two[3]), upper_halves(two[0], two[1]),
                     upper_halves(two[2], two[3])}});
}

// Columns c0 .. of `count` rows of x, at most a round's, to shared memory; rows that there are not are the first one again. The
// block calls.
template <class W>
XORZ_DEVICE void stage_rows(Round<W>& round, const uint32_t* rows, uint32_t count, const W* x, uint32_t k,
                            uint32_t c0) {
  constexpr uint32_t kRows = Round<W>::kRows, kThreads = 32 * kWarps;
  const uint32_t cols = k - c0 < kMaxTileCols ? k - c0 : kMaxTileCols;
  const W* from[kRows];
  XORZ_UNROLL
  for (uint32_t r = 0; r < kRows; r++) from[r] = x + static_cast<uint64_t>(rows[r < count ? r : 0]) * k + c0;
  uint32_t single = thread_index_anew();
  // Where two columns of any row may be asked for at once they are, four times at a time as long as there are so many.
  if constexpr (sizeof(W) == 2) {
    if (k % 2 == 0 && aligned(x, 4)) {
      constexpr uint32_t kApart = 2 * kThreads, kAtOnce = 4;
      uint32_t c = single * 2;
      const uint32_t* pairs[kRows];
      XORZ_UNROLL
      for (uint32_t r = 0; r < kRows; r++) pairs[r] = reinterpret_cast<const uint32_t*>(from[r] + c);
      XORZ_NO_UNROLL
      for (; c + (kAtOnce - 1) * kApart < cols; c += kAtOnce * kApart) {
        XORZ_UNROLL
        for (uint32_t i = 0; i < kAtOnce; i++)
          stage_pair(round.x[c + i * kApart], pairs, i * kThreads);  // hot: stage
        XORZ_UNROLL
        for (uint32_t r = 0; r < kRows; r++) pairs[r] += kAtOnce * kThreads;
      }
      XORZ_NO_UNROLL
      for (; c < cols; c += kApart) {
        stage_pair(round.x[c], pairs, 0);  // each: pieces
        XORZ_UNROLL
        for (uint32_t r = 0; r < kRows; r++) pairs[r] += kThreads;
      }
      return;
    }
  }
  XORZ_NO_UNROLL
  for (; single < cols; single += kThreads) {
    XORZ_UNROLL
    for (uint32_t r = 0; r < kRows; r++) round.x[single][r] = load_once(from[r] + single);  // each: pieces
  }
}

// sums[i] += the differences of `count` records, four at most, times row i of x, of kCount rows; of kFour there are four, else those
// behind them do nothing. `x` is where the first row's word of the column before lies, and moves on.
template <class D, uint32_t kCount, bool kFour, uint32_t kRows>
XORZ_DEVICE void walk_four(float (&sums)[kRows], const uint8_t* gaps, const typename D::Word* differences,
                           uint32_t count, const typename D::Word*& x) {
  using W = typename D::Word;
  uint32_t gap[4];
  float difference[4];
  XORZ_UNROLL
  for (uint32_t i = 0; i < 4; i++) {
    const bool there = kFour || i < count;
    gap[i] = there ? load_once(gaps + i * kTileLanes) : 0u;
    difference[i] = D::value(there ? load_once(differences + i * kTileLanes) : no_op<W>(D::kCode));
  }
  XORZ_UNROLL
  for (uint32_t i = 0; i < 4; i++) {
    x += gap[i] * kRows;
    if constexpr (kCount == 1) {
      sums[0] = fused(difference[i], D::value(*x), sums[0]);
    } else {
      const HalfVector words = load_shared_half(x);
      XORZ_UNROLL
      for (uint32_t r = 0; r < kRows; r++)
        sums[r] = fused(difference[i], D::value(word_in<W>(words, r)), sums[r]);
    }
  }
}

// sums[i] += a run's differences times row i of x, of kCount rows, all of whose columns are known to be those of the tile. `x` is
// where the first row's word of the column lies that the run begins behind; all of a round's rows are asked for as a whole.
template <class D, uint32_t kCount, uint32_t kRows>
XORZ_DEVICE void walk(float (&sums)[kRows], const Records<typename D::Word>& records, Span run, uint32_t lane,
                      const typename D::Word* x) {
  const uint8_t* gaps = records.gaps + run.from * kTileLanes + lane;
  const typename D::Word* differences = records.differences + run.from * kTileLanes + lane;
  uint32_t left = run.to - run.from;
  XORZ_NO_UNROLL
  for (; left >= 4; left -= 4) {
    walk_four<D, kCount, true>(sums, gaps, differences, 4, x);  // hot: entries
    gaps += 4 * kTileLanes;
    differences += 4 * kTileLanes;
  }
  if (left != 0) walk_four<D, kCount, false>(sums, gaps, differences, left, x);
}

// The same where columns are not known to be the tile's, of which there are `cols`; false where one is not.
template <class D, uint32_t kRows>
XORZ_DEVICE bool walk_warily(float (&sums)[kRows], uint32_t count, const Records<typename D::Word>& records,
                             Span run, uint32_t lane, const typename D::Word* x, uint32_t column,
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
      if (r < count) sums[r] = fused(D::value(difference), D::value(x[column * kRows + r]), sums[r]);
  }
  return sound;
}

// The half warp's run of a tile, whichever way, by one row of the round or by all; `gaps` is what its gaps add up to in this lane.
// The tile's first column of the first row lies at `x`. False where a column is none of the tile's.
template <class D, uint32_t kRows>
XORZ_DEVICE bool walk_run(float (&sums)[kRows], uint32_t count, const Records<typename D::Word>& records,
                          Span run, uint32_t lane, const typename D::Word* x, uint32_t column, uint32_t gaps,
                          uint32_t cols) {
  if (records.gap_bytes != 1 || column + gaps >= cols)
    return walk_warily<D>(sums, count, records, run, lane, x, column, cols);  // cold: beyond
  if (count == 1)
    walk<D, 1>(sums, records, run, lane, x + column * kRows);
  else
    walk<D, kRows>(sums, records, run, lane, x + column * kRows);
  return true;
}

// The first records of the panel's tiles come to L2 meanwhile: 8 KiB a tenant. The block calls.
template <class W, uint32_t M>
XORZ_DEVICE void fetch_entries_ahead(const Batch<M>& batch, uint64_t r0) {
  const uint32_t tenant = thread_index_anew() / kTileLanes;
  if (tenant >= batch.tenants || batch.way[tenant] != kOnEntries) return;
  const View& view = batch.view[tenant];
  Records<W> records;
  const uint32_t tile = static_cast<uint32_t>(r0 >> view.rows_log2) * view.across;
  if (!records_of(view, tile, records)) return;  // each: tenants
  const uint32_t bytes =
      records.count * kTileLanes * (view.gap_bytes + static_cast<uint32_t>(sizeof(W)));  // each: tenants
  const uint32_t end = bytes < 8192 ? bytes : 8192;
  for (uint32_t at = thread_index_anew() % kTileLanes * 128; at < end; at += kTileLanes * 128)
    fetch_ahead(records.gaps + at);  // each: tenants
}

// The rows with entries to `rows`, and where their tenants begin (see Group). Every warp calls, and the block must meet before it
// reads them.
template <uint32_t M>
XORZ_DEVICE uint32_t list_entry_rows(EntryRows<M>& rows, const Batch<M>& batch) {
  const uint32_t lane = thread_index_anew() % 32;
  const uint32_t tenant = lane < batch.first[batch.tenants] ? batch.owner[lane % M] : 0;
  const bool has = lane < batch.first[batch.tenants] && batch.way[tenant] == kOnEntries;
  const uint32_t have = warp_ballot(has);
  const uint32_t begins = warp_ballot(has && batch.first[tenant] == lane);
  const uint32_t at = bit_count(have & ((1u << lane) - 1)), count = bit_count(have);
  if (thread_index_anew() < 32 && has) {
    rows.row[at] = batch.order[lane % M];
    rows.tenant[at] = tenant;
  }
  // Bits of `begins` move together as their rows do.
  uint32_t starts = 1u << count;
  XORZ_NO_UNROLL
  for (uint32_t left = begins; left != 0; left &= left - 1)
    starts |= 1u << bit_count(have & ((left & (0 - left)) - 1));  // hot: gather
  return starts;
}

// Add what a group's tiles at `across` hold to the totals: side by side in the 4096 columns from c0 on, number `i` of them; `staged`
// where those columns of all of the group's rows of x lie in `round`. False where a tile contradicts itself. The block calls.
template <class D, uint32_t M>
XORZ_DEVICE bool add_tiles(float (&total)[kTileLanes][M], const Group& group, const EntryRows<M>& rows,
                           Round<typename D::Word>& round, Runs& runs, const View& view,
                           const typename D::Word* x, uint32_t k, uint64_t r0, uint32_t c0, uint32_t i,
                           bool staged) {
  using W = typename D::Word;
  constexpr uint32_t kRows = Round<W>::kRows;
  const uint32_t lane = thread_index_anew() % kTileLanes, half_warp = thread_index_anew() / kTileLanes;
  const uint32_t warp = half_warp / 2;
  const uint32_t column0 = i << view.cols_log2, across = (c0 >> view.cols_log2) + i;
  Records<W> records;
  bool live = group.mine != 0 && column0 < kMaxTileCols && across < view.across, sound = true;
  if (live) sound = live = records_of(view, static_cast<uint32_t>(r0 >> 4) * view.across + across, records);
  if (!live) records.count = 0;
  const uint32_t share = records.count * group.run;
  const Span run = {share >> group.runs_log2, (share + records.count) >> group.runs_log2};
  const uint32_t gaps = live ? gap_sum(records, lane, run) : 0;
  const uint32_t both = gaps + warp_shuffle_xor(gaps, kTileLanes);
  if (half_warp % 2 == 0) runs.gaps[warp][lane] = both;
  uint32_t column = half_warp % 2 == 0 ? 0 : both - gaps;
  live = live && lane < view.n - r0;
  XORZ_NO_UNROLL
  for (uint32_t done = 0; done < group.count; done += kRows) {
    const uint32_t count = group.count - done < kRows ? group.count - done : kRows;
    if (done != 0 || !staged) stage_rows(round, rows.row + group.first + done, count, x, k, c0);
    block_sync();
    XORZ_UNROLL
    for (uint32_t before = 0; before < kWarps - 1; before++)
      if (done == 0 && before < group.run / 2) column += runs.gaps[warp - 1 - before][lane];
    const uint32_t mine = group.mine < done + kRows ? group.mine - done : kRows;
    // One row alone, or all of the round's: what others have of them nobody takes.
    const uint32_t from = mine == 1 ? group.from : 0;
    float sum[kRows];
    XORZ_UNROLL
    for (uint32_t r = 0; r < kRows; r++) sum[r] = 0;
    if (live) {
      const uint32_t left = k - c0 - column0;
      const uint32_t cols = left < view.tile_cols() ? left : view.tile_cols();
      const bool well = walk_run<D>(sum, mine == 1 ? 1 : count, records, run, lane, &round.x[column0][from],
                                    column, gaps, cols);
      sound = sound && well;
    }
    XORZ_UNROLL
    for (uint32_t r = 0; r < kRows; r++) {
      sum[r] += warp_shuffle_xor(sum[r], kTileLanes);
      if (half_warp % 2 == 0 && from + r - group.from < mine) runs.sums[warp][lane][from + r] = sum[r];
    }
    block_sync();
    // A half warp for each row of x of the round.
    if (half_warp < count) {
      const uint32_t segment = bit_count(group.begins & ((2u << half_warp) - 1)) - 1;
      const uint32_t first = segment << (group.runs_log2 - 1);
      float all = 0;
      XORZ_UNROLL
      for (uint32_t w = 0; w < kWarps; w++)
        if (w < 1u << (group.runs_log2 - 1)) all += runs.sums[first + w][lane][half_warp];
      total[lane][rows.row[group.first + done + half_warp]] += all;  // hot: round
    }
  }
  return sound;
}

// By how much the narrowest tiles of a group's tenants are narrower than 4096 columns, as a power of two: 0 where a tile has all
// columns. Every warp calls.
template <uint32_t M>
XORZ_DEVICE uint32_t narrower_log2(const Group& group, const EntryRows<M>& rows, const Batch<M>& batch) {
  const uint32_t lane = thread_index_anew() % 32;
  uint32_t its = 0;
  if (lane < group.count) {
    const View& view = batch.view[rows.tenant[group.first + lane]];
    its = view.across > 1 ? 12 - view.cols_log2 : 0;
  }
  uint32_t most = 0;
  for (uint32_t votes = warp_ballot(its != 0); votes != 0; votes = warp_ballot(its > most)) most++;
  return most;
}

// Add the entries of every tenant that has them to the totals of the panel at row `r0`. The block calls.
template <class D, uint32_t M>
XORZ_DEVICE void add_entries(float (&total)[kTileLanes][M], EntryRows<M>& rows,
                             Round<typename D::Word>& round, Runs& runs, Batch<M>& batch,
                             const typename D::Word* x, uint32_t k, uint64_t r0) {
  constexpr uint32_t kRows = Round<typename D::Word>::kRows;
  const uint32_t starts = list_entry_rows(rows, batch);
  block_sync();
  Group group;
  XORZ_NO_UNROLL
  for (uint32_t at = 0; starts >> (at + 1) != 0; at += group.count) {
    group.begin(rows, starts, at, kRows, thread_index_anew() / kTileLanes);
    const View& view = batch.view[group.tenant];
    const uint32_t narrower = narrower_log2(group, rows, batch);
    XORZ_NO_UNROLL
    for (uint32_t c0 = 0; c0 < k; c0 += kMaxTileCols) {
      XORZ_NO_UNROLL
      for (uint32_t i = 0; i < 1u << narrower && c0 + (i << (12 - narrower)) < k; i++) {
        const bool staged = i != 0 && group.count <= kRows;
        if (!add_tiles<D>(total, group, rows, round, runs, view, x, k, r0, c0, i, staged))
          batch.corrupt[group.tenant] = 1;
      }
    }
  }
}

}  // namespace xorz
