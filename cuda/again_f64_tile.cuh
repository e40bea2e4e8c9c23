// The decode path (again_f64.cuh) of a tile of the product of many rows.
//
//   for each row of the panel with an output to be computed again, for each tile column:
//     its fine-tuned words -> shared memory; for each such output: 256 partial sums in f64, then a tree
//
// Shared memory: the stages', for 4096 words, 2 KiB of partial sums and 1 KiB of sums.
#pragma once

#include "again_f64.cuh"
#include "segments.cuh"
#include "stages.cuh"

namespace xorz {

// Bit j % 32 of word j / 32 of row r: output of row j of the tile of x and row r of the panel.
template <class W>
struct AgainBits {
  uint32_t bits[kRowsOfW][kRowsOfX<W> / 32];
};

template <class W>
struct AgainF64Tile {
  W words[kMaxTileCols];
  double sum[kRowsOfX<W>];
  double part[kLargeThreads];
};

// Compute and write the outputs that `again` asks for, of the panel at row `r0` and the rows of x `rows`. The
// block calls.
template <class D>
XORZ_DEVICE void compute_tile_again(AgainF64Tile<typename D::Word>& f64,
                                    const AgainBits<typename D::Word>& again, const TenantRows& tenant,
                                    const Product<typename D::Word>& p, const uint32_t* rows, uint64_t r0) {
  using W = typename D::Word;
  constexpr uint32_t kParts = kRowsOfX<W> / 32;
  const bool tiled = tenant.way == kOnEntries || tenant.way == kOnStream;
  const uint32_t width = tiled ? tenant.view.tile_cols() : kMaxTileCols;
  const uint32_t thread = thread_index_anew();
  XORZ_NO_UNROLL
  for (uint32_t r = 0; r < kRowsOfW; r++) {
    uint32_t any = 0;
    XORZ_UNROLL
    for (uint32_t part = 0; part < kParts; part++) any |= again.bits[r][part];
    if (any == 0) continue;
    block_sync();
    if (thread < kRowsOfX<W>) f64.sum[thread] = 0;
    XORZ_NO_UNROLL
    for (uint64_t c0 = 0; c0 < p.k; c0 += width) {
      const uint32_t cols = p.k - c0 < width ? static_cast<uint32_t>(p.k - c0) : width;
      block_sync();
      fetch_row<D>(tenant.view, tenant.way, tenant.slot, p, r0 + r, c0, cols, f64.words);
      XORZ_NO_UNROLL
      for (uint32_t part = 0; part < kParts; part++) {
        for (uint32_t left = again.bits[r][part]; left != 0; left &= left - 1) {
          const uint32_t j = part * 32 + first_bit(left);
          const double sum = dot_f64<D>(f64.part, f64.words, p.x + rows[j] * p.k + c0, cols);
          if (thread == 0) f64.sum[j] += sum;
          block_sync();
        }
      }
    }
    block_sync();
    if (thread < kRowsOfX<W> && (again.bits[r][thread / 32] >> (thread % 32) & 1)) {
      double value = f64.sum[thread];
      if (p.biases != nullptr)
        value += static_cast<double>(D::value(load_once(p.biases + bias_row(p, tenant.slot) + r0 + r)));
      store(p.out + rows[thread] * p.n + r0 + r, round_f64<D>(value));
    }
  }
}

}  // namespace xorz
