// One row of an `exponent` tile, decoded from the tile's top: lanes carry bits from row to row.
#pragma once

#include "exponent.cuh"

namespace xorz {

// to(column of the tile, word) for each word of row `row`, exceptions apart. False where the stream
// contradicts itself in what was read. A warp calls.
template <class W, class To>
XORZ_DEVICE bool decode_row(const View& v, uint32_t tile, const Rect& rect, uint32_t row, const W* weight,
                            To to) {
  const uint32_t lane = thread_index() % 32;
  Stream<W> stream;
  if (!stream.begin(v, tile)) return false;
  XORZ_NO_UNROLL
  for (uint32_t r = 0; r <= row; r++) {
    XORZ_NO_UNROLL
    for (uint32_t c = 0; c < rect.cols; c += 32) {
      const bool here = c + lane < rect.cols;
      const W word =
          stream.step(here ? load_once(weight + (rect.r0 + r) * v.k + rect.c0 + c + lane) : W(0), here);
      if (here && r == row) to(c + lane, word);
    }
  }
  return stream.sound(row + 1 == rect.rows);
}

}  // namespace xorz
