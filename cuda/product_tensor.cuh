// The same product as product.cuh's for up to 16 rows of x of bf16 and f16, by tensor cores: W is the left operand, straight
// from device memory in registers, x the right one.
//
//   warp w: groups w, w + 8, ... of 128 columns, of all 16 rows of the panel, in steps of 32
//     for each step: lane l asks for columns 8 (l % 4) .. + 7 of rows l / 4 and l / 4 + 8 of W (16 bytes each, four steps
//     ahead), and of rows l / 4 (and + 8) of x, from L1: two mma.m16n8k16 for each eight rows of x
//
// A matrix instruction takes sixteen columns in any order, if both operands have the same: its first is given
// columns 8 t .. + 3 of a step for t = 0 to 3, its second the others, so that a lane needs 16 bytes side by side and nothing
// is shuffled or staged.
//
// Order of one output: steps of a warp from left to right, two mma each, whose inner order is the machine's; warps 0 to 7, from
// 0; then added to the total. It depends on nothing but k. Longest chain: 2 ceil(k / 1024) * 4 mma, 8 warps and 1.
// Rows that the panel or the list has not are its last ones again: nobody takes their sums.
// Instructions of a step: 2 loads of W, 1 or 2 of x, 2 or 4 mma, for 1 KiB of W. In flight: 4 KiB a warp.
// Registers: 8 sums, 4 x 8 of W, 8 of x. Shared memory: 8 KiB of warps' sums.
#pragma once

#include "product.cuh"

namespace xorz {

constexpr uint32_t kGroupSteps = 4, kTensorStep = 32, kGroup = kGroupSteps * kTensorStep;

template <uint32_t M>
struct TensorPartial {
  float sum[kWarps][kPanel][M];
};

// sums += a step: rows l / 4 and l / 4 + 8 of W by rows l / 4 of x.
template <class D>
XORZ_DEVICE void multiply_step(float (&sums)[4], const Vector& upper, const Vector& lower, const Vector& x) {
  XORZ_UNROLL
  for (uint32_t i = 0; i < 4; i += 2) {
    const uint32_t a[4] = {upper.part[i], lower.part[i], upper.part[i + 1], lower.part[i + 1]};
    multiply_mma<D>(sums, a, x.part[i], x.part[i + 1]);
  }
}

// `groups` groups of the warp's, all of whole pieces. `upper` and `lower` are where the lane's columns of the first of them lie in its
// two rows of W, `few` and, if kBoth, `more` where they lie in its one or two rows of x.
template <class D, bool kBoth>
XORZ_DEVICE void multiply_groups(float (&sum)[2][4], const typename D::Word* upper,
                                 const typename D::Word* lower, const typename D::Word* few,
                                 const typename D::Word* more, uint32_t groups) {
  constexpr uint32_t kApart = kWarps * kGroup;
  if (groups == 0) return;
  Vector w[kGroupSteps][2];
  XORZ_UNROLL
  for (uint32_t s = 0; s < kGroupSteps; s++) {
    w[s][0] = load_vector_once(upper + s * kTensorStep);
    w[s][1] = load_vector_once(lower + s * kTensorStep);
  }
  XORZ_NO_UNROLL
  for (;;) {
    groups--;
    upper += kApart;
    lower += kApart;
    XORZ_UNROLL
    for (uint32_t s = 0; s < kGroupSteps; s++) {
      const Vector of_x = load_vector_once(few + s * kTensorStep);
      multiply_step<D>(sum[0], w[s][0], w[s][1], of_x);  // hot: product_tensor
      if (kBoth) multiply_step<D>(sum[1], w[s][0], w[s][1], load_vector_once(more + s * kTensorStep));
      if (groups != 0) {
        w[s][0] = load_vector_once(upper + s * kTensorStep);
        w[s][1] = load_vector_once(lower + s * kTensorStep);
      }
    }
    if (groups == 0) return;
    few += kApart;
    if (kBoth) more += kApart;
  }
}

// What add_product of product.cuh does, by tensor cores. The block calls.
template <class D, uint32_t M>
XORZ_DEVICE void add_product_by_tensor(float (&total)[kPanel][M], TensorPartial<M>& partial,
                                       const typename D::Word* words, uint32_t k, uint32_t rows,
                                       const typename D::Word* x, const uint32_t* list, uint32_t count) {
  static_assert(M == 16, "two eights of rows of x");
  using W = typename D::Word;
  const uint32_t lane = thread_index() % 32, warp = thread_index() / 32, eighth = lane / 4;
  const auto row_of = [&](uint32_t r) { return words + static_cast<uint64_t>(r < rows ? r : rows - 1) * k; };
  const auto x_of = [&](uint32_t j) {
    return x + static_cast<uint64_t>(list[j < count ? j : count - 1]) * k;
  };
  const W *upper = row_of(eighth), *lower = row_of(eighth + 8);
  const W *few = x_of(eighth), *more = x_of(eighth + 8);
  const bool both = count > 8;
  float sum[2][4];
  XORZ_UNROLL
  for (uint32_t i = 0; i < 2; i++) XORZ_UNROLL
  for (uint32_t e = 0; e < 4; e++) sum[i][e] = 0;

  // Groups of whole pieces first: what else there is follows the warp's last one of these.
  const bool whole = k % 8 == 0 && aligned(words, 16) && aligned(x, 16);
  const uint32_t all = whole ? k / kGroup : 0;
  const uint32_t groups = all > warp ? (all - warp + kWarps - 1) / kWarps : 0;
  const uint32_t mine = lane % 4 * 8, from = warp * kGroup + mine;
  if (both)
    multiply_groups<D, true>(sum, upper + from, lower + from, few + from, more + from, groups);
  else
    multiply_groups<D, false>(sum, upper + from, lower + from, few + from, more, groups);
  XORZ_NO_UNROLL
  for (uint32_t c = (groups * kWarps + warp) * kGroup; c < k; c += kWarps * kGroup) {
    const uint32_t to = k - c < kGroup ? k : c + kGroup;
    XORZ_NO_UNROLL
    for (uint32_t at = c; at < to; at += kTensorStep) {
      const Vector a = load_columns(upper, at + mine, k);  // cold: pieces
      const Vector b = load_columns(lower, at + mine, k);  // cold: pieces
      multiply_step<D>(sum[0], a, b, load_columns(few, at + mine, k));
      if (both) multiply_step<D>(sum[1], a, b, load_columns(more, at + mine, k));
    }
  }

  XORZ_UNROLL
  for (uint32_t i = 0; i < 2; i++) XORZ_UNROLL
  for (uint32_t e = 0; e < 4; e++)
    partial.sum[warp][eighth + e / 2 * 8][i * 8 + lane % 4 * 2 + e % 2] = sum[i][e];
  block_sync();
  const uint32_t r = thread_index() / M, j = thread_index() % M;
  if (j < count) {
    float all_warps = 0;
    XORZ_UNROLL
    for (uint32_t w = 0; w < kWarps; w++) all_warps += partial.sum[w][r][j];
    total[r][list[j]] += all_warps;
  }
  block_sync();
}

}  // namespace xorz
