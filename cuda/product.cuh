// Rows of words (of the base, or a tenant's own) of f32 times rows of x, in registers, an FMA a term; bf16 and f16 are
// product_tensor.cuh's.
//
//   warp w: rows 4 (w % 4) .. + 3 of the panel; chunks w / 4, w / 4 + 2, ... of 32 lanes x 16 bytes
//   for each chunk: four 16-byte loads of W, once, the next chunk's on their way; for each row of x: one 16-byte load of x
//     (L1), 4 FMAs a column
//
// Order of one output: a lane's columns from left to right, one FMA each; lanes by a butterfly (16, 8, 4, 2,
// 1); the even chunks' sum plus the odd ones'; then added to the total. It does not depend on the other rows.
// With c columns a chunk (128) the longest chain is ceil(k / 2c) * c / 32 + 7 roundings.
// Rows that the panel has not are those of its last one again, whose sums nobody takes: no row is asked for its place.
// In flight: 2 KiB a warp and as much again where registers allow it (not by 16 rows of x).
// Registers: 4 M sums, 4 x 4 of W and 4 x 4 of the next chunk, 4 of x.
#pragma once

#include "batch.cuh"

namespace xorz {

constexpr uint32_t kPanel = 16;  // rows of W of a block

// Words `c ..` of a row of `k`, sixteen bytes of them; zeros beyond its end.
template <class W>
XORZ_DEVICE Vector load_columns(const W* row, uint32_t c, uint32_t k) {
  constexpr uint32_t kPer = 16 / sizeof(W);
  if (c + kPer <= k && aligned(row + c, 16)) return load_vector_once(row + c);
  Vector v = {{0, 0, 0, 0}};
  XORZ_UNROLL
  for (uint32_t i = 0; i < kPer; i++)
    if (c + i < k)
      v.part[i * sizeof(W) / 4] |= static_cast<uint32_t>(load_once(row + c + i)) << (8 * (i * sizeof(W) % 4));
  return v;
}

// sum[r][j] += the lane's columns of row `row[r]` of words times those of row list[j] of x, from column `c` on. kWhole: every
// piece of 16 bytes of every row lies where it can be asked for at once.
template <class D, uint32_t M, bool kWhole>
XORZ_DEVICE void sum_columns(float (&sum)[4][M], const typename D::Word* const (&row)[4], uint32_t c,
                             uint32_t k, const typename D::Word* x, const uint32_t* list, uint32_t count) {
  using W = typename D::Word;
  constexpr uint32_t kPer = 16 / sizeof(W), kApart = 64 * kPer;
  constexpr bool kAhead = kWhole && M <= 4;
  const auto columns = [&](const W* of, uint32_t at) {
    return kWhole ? load_vector_once(of + at) : load_columns(of, at, k);
  };
  Vector next[4];
  XORZ_UNROLL
  for (uint32_t r = 0; kAhead && r < 4; r++)
    if (c < k) next[r] = columns(row[r], c);
  XORZ_NO_UNROLL
  for (; c < k; c += kApart) {
    Vector w[4];
    XORZ_UNROLL
    for (uint32_t r = 0; r < 4; r++) {
      w[r] = kAhead ? next[r] : columns(row[r], c);
      if (kAhead && k - c > kApart) next[r] = columns(row[r], c + kApart);
    }
    XORZ_UNROLL
    for (uint32_t j = 0; j < M; j++) {
      if (j >= count) break;
      const Vector v = columns(x + static_cast<uint64_t>(list[j]) * k, c);
      XORZ_UNROLL
      for (uint32_t i = 0; i < kPer; i++) {
        const float value = D::value(word_in<W>(v, i));
        XORZ_UNROLL
        for (uint32_t r = 0; r < 4; r++) sum[r][j] = fused(D::value(word_in<W>(w[r], i)), value, sum[r][j]);
      }
    }
  }
}

// total[r][list[i]] += words row r . x row list[i], for the panel's `rows` rows and `count` rows of x. The
// block calls.
template <class D, uint32_t M>
XORZ_DEVICE void add_product(float (&total)[kPanel][M], float (&partial)[kPanel][M],
                             const typename D::Word* words, uint32_t k, uint32_t rows,
                             const typename D::Word* x, const uint32_t* list, uint32_t count) {
  using W = typename D::Word;
  constexpr uint32_t kPer = 16 / sizeof(W);
  const uint32_t lane = thread_index() % 32, warp = thread_index() / 32;
  const uint32_t r0 = warp % 4 * 4, half = warp / 4;
  const W* row[4];
  XORZ_UNROLL
  for (uint32_t r = 0; r < 4; r++)
    row[r] = words + static_cast<uint64_t>(r0 + r < rows ? r0 + r : rows - 1) * k;
  float sum[4][M];
  XORZ_UNROLL
  for (uint32_t r = 0; r < 4; r++) XORZ_UNROLL
  for (uint32_t j = 0; j < M; j++) sum[r][j] = 0;
  const uint32_t from = (half * 32 + lane) * kPer;
  if (k % kPer == 0 && aligned(words, 16) && aligned(x, 16))
    sum_columns<D, M, true>(sum, row, from, k, x, list, count);
  else
    sum_columns<D, M, false>(sum, row, from, k, x, list, count);
  XORZ_UNROLL
  for (uint32_t r = 0; r < 4; r++) XORZ_UNROLL
  for (uint32_t j = 0; j < M; j++) {
    if (j < count) {
      XORZ_UNROLL
      for (uint32_t other = 16; other > 0; other /= 2) sum[r][j] += warp_shuffle_xor(sum[r][j], other);
      if (half == 1 && lane == 0) partial[r0 + r][j] = sum[r][j];
    }
  }
  block_sync();
  XORZ_UNROLL
  for (uint32_t r = 0; r < 4; r++) XORZ_UNROLL
  for (uint32_t j = 0; j < M; j++)
    if (j < count && half == 0 && lane == 0) total[r0 + r][list[j]] += sum[r][j] + partial[r0 + r][j];
  block_sync();
}

}  // namespace xorz
