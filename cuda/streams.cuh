// Rows of x of `exponent` tenants: a warp decodes a tile of a tenant and multiplies each word as soon as it is known. The
// fine-tuned matrix is nowhere.
//
//   pairs of a tenant and a tile of its panel: the first tiles of all tenants, then their second ones, ...; eight at a time, a
//   warp each, so that tenants that share a block read the same base words at about the same time, once from L2 and then
//   from L1:
//     for each row of the tile down to the panel's last: (rows above the panel are decoded and thrown away)
//       for each 128 columns: base words, 32 side by side a load, the next 128 columns' on their way
//         four times 32: word = decode (exponent.cuh)
//         for each row of x, for each 32: an FMA of the word
//         where the 128 have differences, for each 32 that have: for each row of x an FMA of each of a word's two, of which
//         those that there are not are zeros
//       lanes by a butterfly -> the warp's sums in shared memory
//     block_sync; warps' sums, in order -> total
//
// A matrix of n x k has ceil(n / 16) * ceil(k / 1024) tiles of 16 x 1024, which is what writers make: one of 4096 x 4096 is 1024
// warps' work for each tenant. Within a tile the chain of a stream's bits is one warp's.
//
// Exceptions are never looked at: where products would need them a difference is NaN, and the decode path follows.
//
// Order of one output: four of a lane's columns from left to right, one FMA for each word, then one for each of their differences (zeros
// change no finite sum), and so on; lanes by a butterfly (16, 8, 4, 2, 1); added to the total, tile column after tile column. Longest
// chain: a tile's columns / 32, the differences of a lane's columns, 5, and one a tile.
// Shared memory: 8 KiB of sums. Registers: M sums, the stream's 11 to 16, 8 of base words.
#pragma once

#include "batch.cuh"
#include "exponent.cuh"

namespace xorz {

constexpr uint32_t kNone = ~0u;
constexpr uint32_t kAheadSteps = 4;  // of 32 columns, whose base words are asked for at once

// What the warps of a round have: each the sums of one tenant's rows of x, by their place in the batch's order.
template <uint32_t M>
struct StreamSums {
  uint32_t tenant[kWarps];
  float sum[kWarps][kTileLanes][M];
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
  typename InRegisters<W>::Word held_word_ = 0;
  uint32_t used_ = 0;  // of the window

  XORZ_DEVICE void fetch() {
    const uint32_t lane = thread_index() % 32, i = span_.from + lane;
    held_position_ = i < span_.to ? load_once(positions_ + i) : ~0u;
    held_word_ = i < span_.to ? load_once(words_ + i) : W(0);
  }

  // Those of the step at `position`, of which there is one at least.
  XORZ_DEVICE bool take(uint32_t position, bool live) {
    do {
      const uint32_t here = next_;
      if (here < position) return false;
      const W fresh = static_cast<W>(warp_shuffle(held_word_, used_));
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
    } while (next_ < position + 32);
    return true;
  }

 public:
  // Whether the next one lies before `count` positions from `position` on: the same in all lanes.
  XORZ_DEVICE bool within(uint32_t position, uint32_t count) const { return next_ < position + count; }

  // Those of the lane's word in the step just made: how many, and which.
  uint32_t count = 0;
  W first = 0, second = 0;
  bool any = false;  // of the step, in any lane

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
    any = next_ < position + 32;
    return !any || take(position, live);  // each: differences
  }

  XORZ_DEVICE bool none_left() const { return next_ == ~0u; }
};

// Which tenant's which tile column is pair `at`, and whether there is such a pair. The whole warp calls.
template <uint32_t M>
XORZ_DEVICE bool pair_at(const Batch<M>& batch, uint32_t at, uint32_t& tenant, uint32_t& column) {
  const uint32_t lane = thread_index() % 32;
  const bool streams = lane < batch.tenants && batch.way[lane] == kOnStream;
  const uint32_t across = streams ? batch.view[lane].across : 0;
  XORZ_NO_UNROLL
  for (column = 0;; column++) {
    uint32_t have = warp_ballot(column < across);
    const uint32_t count = bit_count(have);
    if (count == 0) return false;
    if (at >= count) {
      at -= count;
      continue;
    }
    for (; at > 0; at--) have &= have - 1;
    tenant = first_bit(have);
    return true;
  }
}

// Base words of a row, 32 columns a step.
template <class W>
struct WordsAhead {
  typename InRegisters<W>::Word word[kAheadSteps];

  // From where the lane's first column is; `cols` columns of the row are left there.
  XORZ_DEVICE void fetch(const W* row, uint32_t cols) {
    const uint32_t lane = thread_index() % 32;
    if (cols >= 32 * kAheadSteps) {
      XORZ_UNROLL
      for (uint32_t i = 0; i < kAheadSteps; i++) word[i] = load_once(row + 32 * i);
      return;
    }
    XORZ_UNROLL
    for (uint32_t i = 0; i < kAheadSteps; i++)
      if (32 * i + lane < cols) word[i] = load_once(row + 32 * i);
  }
};

// Rows of x of a tenant: those of `order`, of which there are `count`, by the lane's column of a step; `stride` words from row to row.
template <class W>
struct RowsOf {
  const W* x;
  uint64_t stride;
  const uint32_t* order;
  uint32_t count;
};

// sums += the next steps' words times their columns of the rows of x. Base words become fine-tuned ones; `cols` columns are left
// of the tile's row, of kWhole as many as the steps have. The whole warp calls.
template <class D, bool kWhole, uint32_t M>
XORZ_DEVICE void sum_words(float (&sums)[M], Stream<typename D::Word>& stream,
                           WordsAhead<typename D::Word>& base, uint32_t cols,
                           const RowsOf<typename D::Word>& rows) {
  using W = typename D::Word;
  const uint32_t lane = thread_index() % 32;
  uint32_t live = 0;
  XORZ_UNROLL
  for (uint32_t i = 0; i < kAheadSteps; i++)
    live |= static_cast<uint32_t>(kWhole || 32 * i + lane < cols) << i;
  stream.template steps<kAheadSteps, kWhole>(base.word, live);
  XORZ_UNROLL
  for (uint32_t j = 0; j < M; j++) {
    if (j >= rows.count) break;
    const W* x = rows.x + rows.order[j] * rows.stride;  // each: row
    float value[kAheadSteps];
    XORZ_UNROLL
    for (uint32_t i = 0; i < kAheadSteps; i++)
      value[i] = (live >> i & 1) != 0 ? D::value(load_once(x + 32 * i)) : 0.0f;  // each: row
    XORZ_UNROLL
    for (uint32_t i = 0; i < kAheadSteps; i++) {
      const float word = (live >> i & 1) != 0 ? D::value(static_cast<W>(base.word[i])) : 0.0f;
      sums[j] = fused(word, value[i], sums[j]);  // each: row
    }
  }
}

// sums += the differences of the same steps times their columns of the rows of x: first, then second ones, zeros where there are none.
// `position` is the first step's in the tile. False where the tile contradicts itself. The whole warp calls.
template <class D, uint32_t M>
XORZ_DEVICE bool sum_differences(float (&sums)[M], Differences<typename D::Word>& differences,
                                 uint32_t position, uint32_t cols, const RowsOf<typename D::Word>& rows) {
  const uint32_t lane = thread_index() % 32;
  XORZ_NO_UNROLL
  for (uint32_t c = 0; c < 32 * kAheadSteps && c < cols; c += 32) {
    const bool here = c + lane < cols;
    if (!differences.step(position + c, here)) return false;
    if (!differences.any) continue;
    const float first = differences.count > 0 ? D::value(differences.first) : 0.0f,
                second = differences.count > 1 ? D::value(differences.second) : 0.0f;
    XORZ_UNROLL
    for (uint32_t j = 0; j < M; j++) {
      if (j >= rows.count) break;
      const float value = here ? D::value(load_once(rows.x + rows.order[j] * rows.stride + c)) : 0.0f;
      sums[j] = fused(first, value, sums[j]);
      sums[j] = fused(second, value, sums[j]);
    }
  }
  return true;
}

// The sums of one tile with the rows of x of its tenant; false where the tile contradicts itself. The whole warp calls.
template <class D, uint32_t M>
XORZ_DEVICE bool sum_stream(float (&sums)[kTileLanes][M], const Batch<M>& batch, uint32_t tenant,
                            uint32_t column, const typename D::Word* weight, const typename D::Word* x,
                            uint64_t r0) {
  using W = typename D::Word;
  const View& view = batch.view[tenant];
  const uint32_t lane = thread_index() % 32, first = batch.first[tenant], count = batch.rows(tenant);
  const uint32_t tile = static_cast<uint32_t>(r0 >> view.rows_log2) * view.across + column;
  const Rect rect = rect_of(view, tile);
  const uint32_t above = static_cast<uint32_t>(r0 - rect.r0);
  const uint32_t rows = above + kTileLanes < rect.rows ? above + kTileLanes : rect.rows;
  Stream<W> stream;
  Differences<W> differences;
  if (!stream.begin(view, tile) || !differences.begin(view, tile)) return false;
  const W* row = weight + rect.r0 * view.k + rect.c0 + lane;
  x = held(x + rect.c0 + lane);
  WordsAhead<W> ahead = {};
  ahead.fetch(row, rect.cols);
  XORZ_NO_UNROLL
  for (uint32_t r = 0; r < rows; r++, row += view.k) {
    float sum[M];
    XORZ_UNROLL
    for (uint32_t j = 0; j < M; j++) sum[j] = 0;
    XORZ_NO_UNROLL
    for (uint32_t from = 0; from < rect.cols; from += 32 * kAheadSteps) {
      WordsAhead<W> base = ahead;
      const uint32_t next = from + 32 * kAheadSteps;
      const bool same_row = next < rect.cols;
      if (same_row || r + 1 < rows)  // hot: steps
        ahead.fetch(same_row ? row + next : row + view.k, same_row ? rect.cols - next : rect.cols);
      const uint32_t position = (r << view.cols_log2) + from, left = rect.cols - from;
      // Rows above the panel are only decoded.
      const RowsOf<W> rows_of = {x + from, view.k, batch.order + first, r < above ? 0 : count};
      if (left >= 32 * kAheadSteps)
        sum_words<D, true>(sum, stream, base, left, rows_of);
      else
        sum_words<D, false>(sum, stream, base, left, rows_of);  // each: pieces
      if (differences.within(position, 32 * kAheadSteps) &&
          !sum_differences<D>(sum, differences, position, left, rows_of))  // each: differences
        return false;
    }
    stream.fetch_ahead_units();
    if (r < above) continue;
    XORZ_UNROLL
    for (uint32_t j = 0; j < M; j++) {
      if (j >= count) break;
      XORZ_UNROLL
      for (uint32_t other = 16; other > 0; other /= 2)
        sum[j] += warp_shuffle_xor(sum[j], other);         // each: row
      if (lane == 0) sums[r - above][first + j] = sum[j];  // hot: rows
    }
  }
  for (uint32_t r = rows - above; r < kTileLanes; r++)
    if (lane < count) sums[r][first + lane] = 0;
  return stream.sound(rows == rect.rows) && (rows < rect.rows || differences.none_left());
}

// Add the products of `exponent` tenants' rows to the totals of the panel at row `r0`. The block calls.
template <class D, uint32_t M>
XORZ_DEVICE void add_streams(float (&total)[kTileLanes][M], StreamSums<M>& sums, Batch<M>& batch,
                             const typename D::Word* weight, const typename D::Word* x, uint64_t r0) {
  const uint32_t warp = thread_index() / 32, rows = batch.first[batch.tenants];
  uint32_t tenant, column;
  XORZ_NO_UNROLL
  for (uint32_t round = 0; pair_at(batch, round, tenant, column); round += kWarps) {
    const bool mine = pair_at(batch, round + warp, tenant, column);
    const bool sound = !mine || sum_stream<D, M>(sums.sum[warp], batch, tenant, column, weight, x, r0);
    if (!sound) batch.corrupt[tenant] = 1;  // hot: pairs
    if (thread_index() % 32 == 0) sums.tenant[warp] = mine && sound ? tenant : kNone;
    block_sync();
    for (uint32_t i = thread_index(); i < rows * kTileLanes; i += kWarps * 32) {
      const uint32_t at = i / kTileLanes, r = i % kTileLanes;
      float& all = total[r][batch.order[at]];
      XORZ_UNROLL
      for (uint32_t w = 0; w < kWarps; w++)
        if (sums.tenant[w] == batch.owner[at]) all += sums.sum[w][r][at];
    }
    block_sync();
  }
}

}  // namespace xorz
