// What an `exponent` tile stores apart for words that do not fit their width: exact differences, which are added to
// what the stream gives (the base word), first to last where a word has two.
//
//   a thread a difference: the first one of its word adds the second one, too
//
// Where positions do not ascend, or three are one, the tile contradicts itself. Registers: 6.
#pragma once

#include "resident.cuh"

namespace xorz {

// The word of a computing dtype after one difference, or two.
template <class W>
XORZ_DEVICE W word_after(uint32_t dtype, W word, W first, bool pair, W second) {
  const float sum = value_of(dtype, word) + value_of(dtype, first);
  return narrow_to<W>(dtype, pair ? sum + value_of(dtype, second) : sum);
}

// Whether place `e` of a tile's list, in `span`, does not follow what comes before it: positions ascend, and two in
// succession may be equal, three not. `second`: it is the second one of its word.
XORZ_DEVICE bool out_of_order(const uint16_t* positions, const Span& span, uint32_t e, uint32_t position,
                              bool& second) {
  const uint32_t before = e > span.from ? load_once(positions + e - 1) : ~0u;
  second = before == position;
  if (second) return e - span.from >= 2 && load_once(positions + e - 2) == position;
  return before != ~0u && before > position;
}

// edit(row, column, after) for each word of `tile` that has differences, where after(word) is the word that it becomes.
// Threads `i` of `of` take part; no two of them have the same word. False where the tile contradicts itself.
template <class W, class Edit>
XORZ_DEVICE bool add_differences(const View& v, uint32_t tile, const Rect& rect, uint32_t i, uint32_t of,
                                 Edit edit) {
  // Others do not compute, and `open_delta` lets them have none.
  if constexpr (sizeof(W) == 2 || sizeof(W) == 4) {
    const Listing list = differences_in(v);
    Span span;
    if (!listed_of(v, list, tile, span)) return false;
    const uint16_t* positions = reinterpret_cast<const uint16_t*>(v.bytes + list.positions);
    const W* differences = reinterpret_cast<const W*>(v.bytes + list.words);
    bool sound = true;
    for (uint32_t e = span.from + i; e < span.to; e += of) {
      const uint32_t position = load_once(positions + e);
      const uint32_t r = position >> v.cols_log2, c = position & (v.tile_cols() - 1);
      bool second;
      if (out_of_order(positions, span, e, position, second) || r >= rect.rows || c >= rect.cols) {
        sound = false;
        continue;
      }
      if (second) continue;
      const bool pair = e + 1 < span.to && load_once(positions + e + 1) == position;
      edit(r, c, [&](W word) {
        return word_after(v.dtype, word, load_once(differences + e), pair,
                          pair ? load_once(differences + e + 1) : W(0));
      });
    }
    return sound;
  }
  return true;
}

}  // namespace xorz
