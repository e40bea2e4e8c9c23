// Fine-tuned words made where they are wanted, in device memory: copies, runs of a lane's entries,
// exceptions. For restore, apply and lookups; products patch shared memory (patch_*.cuh).
#pragma once

#include "sparse.cuh"

namespace xorz {

// Copy `count` words; threads `i` of `of` take part. 16 bytes at a time where both sides allow it.
template <class W>
XORZ_DEVICE void copy_words(W* to, const W* from, uint64_t count, uint64_t i, uint64_t of) {
  constexpr uint32_t kPer = 16 / sizeof(W);
  const uint64_t past = (reinterpret_cast<uintptr_t>(to) & 15) / sizeof(W);
  const bool together = (reinterpret_cast<uintptr_t>(from) & 15) == (reinterpret_cast<uintptr_t>(to) & 15);
  uint64_t head = past == 0 ? 0 : kPer - past;
  if (!together || head > count) head = count;
  const uint64_t vectors = (count - head) / kPer;
  for (uint64_t w = i; w < head; w += of) store(to + w, load_once(from + w));
  XORZ_UNROLL_4
  for (uint64_t v = i; v < vectors; v += of)
    store_vector(to + head + v * kPer, load_vector_once(from + head + v * kPer));  // hot: copied
  for (uint64_t w = head + vectors * kPer + i; w < count; w += of) store(to + w, load_once(from + w));
}

template <class W>
XORZ_DEVICE void fill_nan(W* to, uint64_t count, uint64_t i, uint64_t of) {
  for (uint64_t w = i; w < count; w += of) store(to + w, nan_word<W>());
}

// One lane's run of records, from its row of the base to its row of the result (which may be the same).
// `column` is where the record before the run stands. False where a column lies outside of the tile, or
// columns of the lane go back. Without `kStores` that is all that is done.
template <class W, bool kStores = true>
XORZ_DEVICE bool patch_run(const Records<W>& records, uint32_t dtype, uint32_t lane, Span run,
                           uint32_t column, uint32_t cols, const W* base, W* row) {
  const W nothing = no_op<W>(dtype);
  // An entry that follows one on the same column is that run's, even if it began in an earlier run.
  uint32_t last = 0, back = column;
  bool any = false;
  for (uint32_t j = run.from; j-- > 0;) {
    if (records.gap_bytes == 2) back = records.column_at(j, lane, 0);
    if (records.difference_at(j, lane) != nothing) {
      last = back;
      any = true;
      break;
    }
    if (records.gap_bytes == 1) back -= records.column_at(j, lane, 0);
  }
  bool open = false, sound = true;
  float sum = 0;
  W word = 0;
  for (uint32_t j = run.from; j < records.count; j++) {
    // Beyond the run's end only the last column's other entries are wanted.
    if (j >= run.to && !open) break;
    column = records.column_at(j, lane, column);  // hot: run
    const W difference = records.difference_at(j, lane);
    if (difference == nothing) continue;
    const bool same = any && column == last;
    if (same && !open) continue;
    if (!same && j >= run.to) break;
    if (column >= cols || (any && column < last)) {
      sound = false;
      break;
    }
    word = same ? word : load(base + column);
    if (!computes(dtype)) {
      word = static_cast<W>(word ^ difference);
    } else if constexpr (sizeof(W) == 2 || sizeof(W) == 4) {
      sum = (same ? sum : value_of(dtype, word)) + value_of(dtype, difference);
      word = narrow_to<W>(dtype, sum);
    }
    if (kStores) store(row + column, word);
    any = open = true;
    last = column;
  }
  return sound;
}

// The words stored apart. Ascending positions only: two threads never write the same word. Without `kStores` they are
// looked at only.
template <class W, bool kStores = true>
XORZ_DEVICE bool patch_exceptions(const View& v, uint32_t tile, const Rect& rect, W* matrix, uint32_t i,
                                  uint32_t of) {
  Span span;
  if (!listed_of(v, exceptions_in(v), tile, span)) return false;
  const uint16_t* positions = reinterpret_cast<const uint16_t*>(v.bytes + v.exception_positions);
  const W* words = reinterpret_cast<const W*>(v.bytes + v.exception_words);
  bool sound = true;
  for (uint32_t e = span.from + i; e < span.to; e += of) {
    const uint32_t position = load_once(positions + e);
    const uint32_t r = position >> v.cols_log2, c = position & (v.tile_cols() - 1);
    if (r >= rect.rows || c >= rect.cols || (e > span.from && load_once(positions + e - 1) >= position)) {
      sound = false;
      continue;
    }
    if (kStores) store(matrix + (rect.r0 + r) * v.k + rect.c0 + c, load_once(words + e));
  }
  return sound;
}

}  // namespace xorz
