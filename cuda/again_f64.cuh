// The decode path: an output whose f32 sum is not finite is computed again, from the fine-tuned words
// themselves, in f64, where products of two f32 are exact and do not overflow. So NaN and infinities are
// those of the fine-tuned weights, whatever the base, the differences and the order of f32 sums made of them.
// Slow and plain on purpose.
//
//   for each tenant, for each row of the panel with such an output, for each tile column:
//     base row -> shared memory; the row's words: one thread walks the entries, or a warp decodes down from
//       the tile's top and the block adds differences; then exceptions
//     for each such output: 256 partial sums in f64, then a tree
//
// Tiles found corrupt before are not taken again. Shared memory: the 32 KiB that stage x and rows before, and
// 2 KiB.
#pragma once

#include "decode.cuh"
#include "differences.cuh"
#include "sparse.cuh"
#include "streams.cuh"

namespace xorz {

// The exceptions of a tile's row, put over its words. False where they do not ascend, and two lanes might have the same
// word, or lie outside of the tile. The first warp calls.
template <class W>
XORZ_DEVICE bool override_row(const View& v, uint32_t tile, const Rect& rect, uint32_t row, W* words) {
  Span span;
  if (!listed_of(v, exceptions_in(v), tile, span)) return false;
  const uint16_t* positions = reinterpret_cast<const uint16_t*>(v.bytes + v.exception_positions);
  const W* overriding = reinterpret_cast<const W*>(v.bytes + v.exception_words);
  for (uint32_t from = span.from; from < span.to; from += 32) {
    const uint32_t e = from + thread_index();
    const bool there = e < span.to;
    const uint32_t position = there ? load_once(positions + e) : 0;
    const uint32_t r = position >> v.cols_log2, c = position & (v.tile_cols() - 1);
    const bool ascends = e == span.from || !there || load_once(positions + e - 1) < position;
    if (warp_ballot(!ascends || r >= rect.rows || c >= rect.cols) != 0) return false;
    if (there && r == row) words[c] = load_once(overriding + e);
  }
  return true;
}

// As the oracle does it (src/codec/sparse.rs): one lane, entry after entry.
template <class D>
XORZ_DEVICE void walk_row(const View& v, uint32_t tile, uint32_t lane, uint32_t cols,
                          typename D::Word* words) {
  using W = typename D::Word;
  Records<W> records;
  if (!records_of(v, tile, records)) return;
  uint32_t column = 0, last = ~0u;
  float sum = 0;
  for (uint32_t j = 0; j < records.count; j++) {
    column = records.column_at(j, lane, column);
    const W difference = records.difference_at(j, lane);
    if (difference == no_op<W>(D::kCode) || column >= cols) continue;
    sum = (column == last ? sum : D::value(words[column])) + D::value(difference);
    words[column] = D::narrow(sum);
    last = column;
  }
}

template <uint32_t M>
struct AgainF64 {
  uint32_t again[kTileLanes];  // bit j: row j of x
  double sum[M];
  double part[kWarps * 32];
};

// The row of words `row` (of the matrix), columns c0 .., that the rows of the tenant of `slot` are multiplied with;
// `cols` of them, within one tile. NaN and a report where exceptions contradict themselves. The block calls.
template <class D>
XORZ_DEVICE void fetch_row(const View& v, uint32_t way, int32_t slot, const Product<typename D::Word>& p,
                           uint64_t row, uint64_t c0, uint32_t cols, typename D::Word* words) {
  using W = typename D::Word;
  const W* from =
      (way == kOnOwnWords ? reinterpret_cast<const W*>(v.bytes + v.payload) : p.weight) + row * p.k + c0;
  for (uint32_t c = thread_index(); c < cols; c += kWarps * 32) words[c] = load_once(from + c);
  block_sync();
  if (way == kOnEntries || way == kOnStream) {
    const uint32_t tile =
        static_cast<uint32_t>(row >> v.rows_log2) * v.across + static_cast<uint32_t>(c0 >> v.cols_log2);
    const Rect rect = rect_of(v, tile);
    const uint32_t r = static_cast<uint32_t>(row - rect.r0);
    if (way == kOnEntries && thread_index() == 0) walk_row<D>(v, tile, r, cols, words);
    if (way == kOnStream && thread_index() < 32)
      decode_row(v, tile, rect, r, p.weight, [words](uint32_t c, W word) { words[c] = word; });
    block_sync();
    const auto edit = [&](uint32_t at, uint32_t c, auto after) {
      if (at == r && c < cols) words[c] = after(words[c]);
    };
    if (way == kOnStream) add_differences<W>(v, tile, rect, thread_index(), kWarps * 32, edit);
    block_sync();
    if (thread_index() < 32 && !override_row(v, tile, rect, r, words)) {
      for (uint32_t c = thread_index(); c < cols; c += 32) words[c] = nan_word<W>();
      if (thread_index() == 0)
        report(p.status, kTileCorrupt, p.slots == nullptr ? 0 : static_cast<uint32_t>(slot));
    }
    block_sync();
  }
}

// words . x, in thread 0; `part` holds a number a thread. The block calls, and must meet before it calls
// again.
template <class D>
XORZ_DEVICE double dot_f64(double* part, const typename D::Word* words, const typename D::Word* x,
                           uint32_t cols) {
  double sum = 0;
  for (uint32_t c = thread_index(); c < cols; c += kWarps * 32)
    sum += static_cast<double>(D::value(words[c])) * static_cast<double>(D::value(load_once(x + c)));
  part[thread_index()] = sum;
  XORZ_NO_UNROLL
  for (uint32_t half = kWarps * 16; half > 0; half /= 2) {
    block_sync();
    if (thread_index() < half) part[thread_index()] += part[thread_index() + half];
  }
  return thread_index() == 0 ? part[0] : 0;
}

// Compute and write the outputs that `f64.again` asks for, of the panel at row `r0` and the rows of x from
// `m0` on. The block calls.
template <class D, uint32_t M>
XORZ_DEVICE void compute_again(AgainF64<M>& f64, typename D::Word* words, const Batch<M>& batch,
                               const Product<typename D::Word>& p, uint64_t m0, uint64_t r0) {
  XORZ_NO_UNROLL
  for (uint32_t t = 0; t < batch.tenants; t++) {
    uint32_t rows_of_x = 0;
    for (uint32_t i = batch.first[t]; i < batch.first[t + 1]; i++) rows_of_x |= 1u << batch.order[i];
    const bool tiled = batch.way[t] == kOnEntries || batch.way[t] == kOnStream;
    const uint32_t width = tiled ? batch.view[t].tile_cols() : kMaxTileCols;
    XORZ_NO_UNROLL
    for (uint32_t r = 0; r < kTileLanes; r++) {
      const uint32_t again = f64.again[r] & rows_of_x;
      if (again == 0) continue;
      if (thread_index() < M) f64.sum[thread_index()] = 0;
      XORZ_NO_UNROLL
      for (uint64_t c0 = 0; c0 < p.k; c0 += width) {
        const uint32_t cols = p.k - c0 < width ? static_cast<uint32_t>(p.k - c0) : width;
        block_sync();
        fetch_row<D>(batch.view[t], batch.way[t], batch.slot[t], p, r0 + r, c0, cols, words);
        XORZ_NO_UNROLL
        for (uint32_t left = again; left != 0; left &= left - 1) {
          const uint32_t j = first_bit(left);
          const auto* x = p.x + (m0 + j) * p.k + c0;
          const double sum = dot_f64<D>(f64.part, words, x, cols);
          if (thread_index() == 0) f64.sum[j] += sum;
          block_sync();
        }
      }
      block_sync();
      if (thread_index() < M && (again >> thread_index() & 1)) {
        const uint32_t j = thread_index();
        double value = f64.sum[j];
        if (p.biases != nullptr)
          value += static_cast<double>(D::value(load_once(p.biases + bias_row(p, batch.slot[t]) + r0 + r)));
        store(p.out + (m0 + j) * p.n + r0 + r, round_f64<D>(value));
      }
      block_sync();
    }
  }
}

}  // namespace xorz
