// The entries of a `sparse` tile, walked in pieces: sixteen threads, one a row of the tile, take a run of
// records. With gaps of one byte a run begins where the gaps before it add up to; runs are summed first, all
// at once (`gap_sum`).
#pragma once

#include "resident.cuh"

namespace xorz {

// A tile's records: gaps of all of them, then differences of all of them, lane (row) after lane in each.
template <class W>
struct Records {
  const uint8_t* gaps;
  const W* differences;
  uint32_t count;
  uint32_t gap_bytes;

  // Column of record `j` in lane `lane`, where the one before it stands at `column`.
  XORZ_DEVICE uint32_t column_at(uint32_t j, uint32_t lane, uint32_t column) const {
    const uint64_t i = static_cast<uint64_t>(j) * kTileLanes + lane;
    return gap_bytes == 1 ? column + load_once(gaps + i)
                          : load_once(reinterpret_cast<const uint16_t*>(gaps) + i);
  }
  XORZ_DEVICE W difference_at(uint32_t j, uint32_t lane) const {
    return load_once(differences + static_cast<uint64_t>(j) * kTileLanes + lane);
  }
};

template <class W>
XORZ_DEVICE bool records_of(const View& v, uint32_t tile, Records<W>& records) {
  Span span;
  // Two entries a column, and one that pads for each 255 columns or fewer that are stepped over: no tile has so many records that
  // gaps of one byte could wrap a column of 32 bits.
  if (!units_of(v, tile, 2 * columns_of_tile(v) + kMaxTileCols / 128, span)) return false;
  const uint64_t record = kTileLanes * (v.gap_bytes + sizeof(W));
  records.count = span.to - span.from;
  records.gap_bytes = v.gap_bytes;
  records.gaps = v.bytes + v.payload + span.from * record;
  records.differences = reinterpret_cast<const W*>(records.gaps + static_cast<uint64_t>(records.count) *
                                                                      kTileLanes * v.gap_bytes);
  return true;
}

// Run `i` of `of` (at most 64), as even as can be. No tile has 2^14 records, so 32 bits hold the products.
XORZ_DEVICE Span run_of(uint32_t count, uint32_t i, uint32_t of) {
  return {count * i / of, count * (i + 1) / of};
}

// Columns that a run of one lane steps over.
template <class W>
XORZ_DEVICE uint32_t gap_sum(const Records<W>& records, uint32_t lane, Span run) {
  uint32_t sum = 0;
  if (records.gap_bytes != 1) return sum;
  const uint8_t* gaps = records.gaps + run.from * kTileLanes + lane;
  uint32_t left = run.to - run.from;
  XORZ_NO_UNROLL
  for (; left >= 4; left -= 4, gaps += 4 * kTileLanes) {
    XORZ_UNROLL
    for (uint32_t i = 0; i < 4; i++) sum += load_once(gaps + i * kTileLanes);  // hot: gaps
  }
  XORZ_UNROLL
  for (uint32_t i = 0; i < 3; i++)
    if (i < left) sum += load_once(gaps + i * kTileLanes);
  return sum;
}

}  // namespace xorz
