// Rows of x of `exponent` tenants: a warp decodes a tile of a tenant and multiplies each word as soon as it is known. The
// fine-tuned matrix is nowhere.
//
//   pairs of a tenant and a tile of its panel: the first tiles of all tenants, then their second ones, ...; eight at a time, a
//   warp each, so that tenants that share a block read the same base words at about the same time, once from L2 and then
//   from L1:
//     for each row of the tile down to the panel's last: (rows above the panel are decoded and thrown away)
//       for each 128 columns: base words, 32 side by side a load, the next 128 columns' on their way
//         for each 32: word = decode (exponent.cuh)
//         for each row of x, for each 32: an FMA of the word, and where the 128 have differences one of each of its two, of
//         which those that there are not are zeros
//       lanes by a butterfly -> the warp's sums in shared memory
//     block_sync; warps' sums, in order -> total
//
// A matrix of n x k has ceil(n / 16) * ceil(k / 1024) tiles of 16 x 1024, which is what writers make: one of 4096 x 4096 is 1024
// warps' work for each tenant. Within a tile the chain of a stream's bits is one warp's.
//
// Exceptions are never looked at: where products would need them a difference is NaN, and the decode path follows.
//
// Order of one output: a lane's columns from left to right, one FMA for the word and one for each of its differences (zeros change
// no finite sum); lanes by a butterfly (16, 8, 4, 2, 1); added to the total, tile column after tile column. Longest
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
    XORZ_UNROLL
    for (uint32_t i = 0; i < kAheadSteps; i++)
      if (cols >= 32 * kAheadSteps || 32 * i + lane < cols) word[i] = load_once(row + 32 * i);
  }
};

// What a lane multiplies its columns of x by, step by step: the word, and its differences where the step has any.
struct Terms {
  float word[kAheadSteps], first[kAheadSteps], second[kAheadSteps];
  bool differ;  // the same in all lanes
};

// The next steps' terms, from their base words; `position` is the first one's in the tile, and `cols` columns are left of its row.
// False where the tile contradicts itself. The whole warp calls.
template <class D>
XORZ_DEVICE bool decode_terms(Terms& terms, Stream<typename D::Word>& stream,
                              Differences<typename D::Word>& differences,
                              const WordsAhead<typename D::Word>& base, uint32_t position, uint32_t cols) {
  const uint32_t lane = thread_index() % 32;
  terms.differ = false;
  XORZ_UNROLL
  for (uint32_t i = 0; i < kAheadSteps; i++) {
    terms.word[i] = terms.first[i] = terms.second[i] = 0;
    if (32 * i >= cols) continue;
    const bool here = 32 * i + lane < cols;
    const typename D::Word word = stream.step(static_cast<typename D::Word>(base.word[i]), here);
    if (!differences.step(position + 32 * i, here)) return false;
    if (here) terms.word[i] = D::value(word);
    if (!differences.any) continue;
    terms.differ = true;
    if (differences.count > 0) terms.first[i] = D::value(differences.first);    // each: differences
    if (differences.count > 1) terms.second[i] = D::value(differences.second);  // each: differences
  }
  return true;
}

// sum += terms times the lane's columns of a row of x, which begin at `x`.
template <class D>
XORZ_DEVICE void add_terms(float& sum, const Terms& terms, const typename D::Word* x, uint32_t cols) {
  const uint32_t lane = thread_index() % 32;
  float value[kAheadSteps];
  XORZ_UNROLL
  for (uint32_t i = 0; i < kAheadSteps; i++)
    value[i] = 32 * i + lane < cols ? D::value(load_once(x + 32 * i)) : 0.0f;
  XORZ_UNROLL
  for (uint32_t i = 0; i < kAheadSteps; i++) {
    sum = fused(terms.word[i], value[i], sum);
    if (!terms.differ) continue;
    sum = fused(terms.first[i], value[i], sum);   // each: differences
    sum = fused(terms.second[i], value[i], sum);  // each: differences
  }
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
  x += rect.c0 + lane;
  WordsAhead<W> ahead = {};
  ahead.fetch(row, rect.cols);
  XORZ_NO_UNROLL
  for (uint32_t r = 0; r < rows; r++, row += view.k) {
    float sum[M];
    XORZ_UNROLL
    for (uint32_t j = 0; j < M; j++) sum[j] = 0;
    XORZ_NO_UNROLL
    for (uint32_t from = 0; from < rect.cols; from += 32 * kAheadSteps) {
      const WordsAhead<W> base = ahead;
      if (from + 32 * kAheadSteps < rect.cols)  // hot: steps
        ahead.fetch(row + from + 32 * kAheadSteps, rect.cols - from - 32 * kAheadSteps);
      else if (r + 1 < rows)
        ahead.fetch(row + view.k, rect.cols);
      Terms terms;
      if (!decode_terms<D>(terms, stream, differences, base, (r << view.cols_log2) + from, rect.cols - from))
        return false;
      if (r < above) continue;
      XORZ_UNROLL
      for (uint32_t j = 0; j < M; j++) {
        if (j >= count) break;
        const typename D::Word* its = x + batch.order[first + j] * view.k + from;  // each: row
        add_terms<D>(sum[j], terms, its, rect.cols - from);                        // each: row
      }
    }
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
