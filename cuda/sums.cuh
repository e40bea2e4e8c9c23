// The sums of a block's tile of outputs, in registers, and one step of 32 columns of them.
//
//   bf16, f16: 128 rows of x by 64 of W, warp w has rows 32 (w / 2) .. + 31 by 32 (w % 2) .. + 31
//     for each 16 columns: ldmatrix 2 x 16 rows of x and 2 x 16 of W, 8 mma.m16n8k16; sixteens of x beyond `count` are left out
//   f32: 64 by 64, thread (i, j) = (t / 16, t % 16) has rows i, i + 16, .. of x by j, j + 16, .. of W
//     for each 4 columns: 4 + 4 loads of 16 bytes, 64 FMAs (no TF32: every product is that of the f32 words)
//
// Order of one output: columns from left to right, 16 an mma (whose inner order is the machine's), or one an
// FMA. It depends on nothing else: not on the row's place, nor on its company.
// Longest chain: ceil(k / 16) sums of mma, or k FMAs. Registers: 32 sums, 24 of operands; f32: 16 and 20.
#pragma once

#include "stages.cuh"

namespace xorz {

template <class D>
struct TensorSums {
  using W = typename D::Word;
  float sum[2][4][4];
  // Where in a buffer of x, and of W, the lane's row of the first piece lies; how many sixteens of rows of x the warp has. Rows
  // that are 16 apart lie alike, and two pieces on is another bit of the place: a step computes no places.
  uint32_t x_at, w_at, sixteens;
  uint32_t live;  // `sixteens`; 0 before the first step

  // All sums 0, of a tile of `count` rows of x.
  XORZ_DEVICE void begin(uint32_t count) {
    using S = Stages<W>;
    const uint32_t lane = thread_index_anew() % 32, warp = thread_index_anew() / 32;
    const uint32_t x0 = warp / 2 * 32, w0 = warp % 2 * 32;
    x_at = S::piece_at(x0 + lane % 16, lane / 16);
    w_at = S::template word_of_window<S::kSteps>(w0 + lane / 16 * 8 + lane % 8, lane / 8 % 2 * S::kPer);
    sixteens = count <= x0 ? 0 : count <= x0 + 16 ? 1 : 2;
    XORZ_UNROLL
    for (uint32_t i = 0; i < 2; i++) XORZ_UNROLL
    for (uint32_t j = 0; j < 4; j++) XORZ_UNROLL
    for (uint32_t e = 0; e < 4; e++) sum[i][j][e] = 0;
  }

  // Steps before `start` count for nothing.
  XORZ_DEVICE void stop() { live = 0; }
  XORZ_DEVICE void start() { live = sixteens; }

  // Step `at` of a window of W. Whether it counts is known from `start`: f32, which has no register for that, is told.
  XORZ_DEVICE void step(const W* x, const W* w, uint32_t at, bool) {
    if (live == 2)
      step_of<2>(x, w, at);  // each: multiplied
    else if (live == 1)
      step_of<1>(x, w, at);  // each: multiplied
  }

  // Of the first `kSixteens` sixteens of rows of x.
  template <uint32_t kSixteens>
  XORZ_DEVICE void step_of(const W* x, const W* w, uint32_t at) {
    using S = Stages<W>;
    constexpr uint32_t kApart = 16 * kStepColumns;
    XORZ_UNROLL
    for (uint32_t piece = 0; piece < S::kPieces; piece += 2) {
      uint32_t b[2][4];
      XORZ_UNROLL
      for (uint32_t j = 0; j < 2; j++)
        load_matrices(b[j], w + (w_at ^ (at * S::kPieces + piece) * S::kPer) + j * kApart * S::kSteps);
      XORZ_UNROLL
      for (uint32_t i = 0; i < kSixteens; i++) {
        uint32_t a[4];
        load_matrices(a, x + (x_at ^ piece * S::kPer) + i * kApart);
        XORZ_UNROLL
        for (uint32_t j = 0; j < 4; j++) {
          const uint32_t b0 = b[j / 2][j % 2 * 2], b1 = b[j / 2][j % 2 * 2 + 1];
          multiply_mma<D>(sum[i][j], a, b0, b1);
        }
      }
    }
  }

  // The sums of row r of W become larger by f(r).
  template <class F>
  XORZ_DEVICE void add(F f) {
    const uint32_t lane = thread_index_anew() % 32, warp = thread_index_anew() / 32;
    XORZ_UNROLL
    for (uint32_t j = 0; j < 8; j++) {
      const float more = f(warp % 2 * 32 + j / 2 * 8 + lane % 4 * 2 + j % 2);
      XORZ_UNROLL
      for (uint32_t i = 0; i < 4; i++) sum[i / 2][j / 2][i % 2 * 2 + j % 2] += more;
    }
  }

  // f(row of x, each) for the thread's rows of x, where each(g) is g(row of W, sum) for its sums of the row.
  template <class F>
  XORZ_DEVICE void each_row(F f) const {
    const uint32_t lane = thread_index_anew() % 32, warp = thread_index_anew() / 32;
    XORZ_UNROLL
    for (uint32_t i = 0; i < 4; i++)
      f(warp / 2 * 32 + i * 8 + lane / 4, [&](auto g) {
        XORZ_UNROLL
        for (uint32_t j = 0; j < 8; j++)
          g(warp % 2 * 32 + j / 2 * 8 + lane % 4 * 2 + j % 2, sum[i / 2][j / 2][i % 2 * 2 + j % 2]);
      });
  }
};

struct FusedSums {
  float sum[4][4];

  XORZ_DEVICE void begin(uint32_t) {
    XORZ_UNROLL
    for (uint32_t i = 0; i < 4; i++) XORZ_UNROLL
    for (uint32_t j = 0; j < 4; j++) sum[i][j] = 0;
  }

  XORZ_DEVICE void stop() {}
  XORZ_DEVICE void start() {}

  XORZ_DEVICE void step(const uint32_t* x, const uint32_t* w, uint32_t, bool counts) {
    using S = Stages<uint32_t>;
    if (!counts) return;
    const uint32_t i0 = thread_index_anew() / 16, j0 = thread_index_anew() % 16;
    XORZ_NO_UNROLL
    for (uint32_t piece = 0; piece < S::kPieces; piece++) {
      Vector b[4];
      XORZ_UNROLL
      for (uint32_t j = 0; j < 4; j++) b[j] = load_shared(w + S::piece_at(j0 + j * 16, piece));
      XORZ_UNROLL
      for (uint32_t i = 0; i < 4; i++) {
        const Vector a = load_shared(x + S::piece_at(i0 + i * 16, piece));
        XORZ_UNROLL
        for (uint32_t j = 0; j < 4; j++) XORZ_UNROLL
        for (uint32_t c = 0; c < 4; c++)
          sum[i][j] = fused(float_of(b[j].part[c]), float_of(a.part[c]), sum[i][j]);
      }
    }
  }

  template <class F>
  XORZ_DEVICE void add(F f) {
    XORZ_UNROLL
    for (uint32_t j = 0; j < 4; j++) {
      const float more = f(thread_index_anew() % 16 + j * 16);
      XORZ_UNROLL
      for (uint32_t i = 0; i < 4; i++) sum[i][j] += more;
    }
  }

  template <class F>
  XORZ_DEVICE void each_row(F f) const {
    XORZ_UNROLL
    for (uint32_t i = 0; i < 4; i++)
      f(thread_index_anew() / 16 + i * 16, [&](auto g) {
        XORZ_UNROLL
        for (uint32_t j = 0; j < 4; j++) g(thread_index_anew() % 16 + j * 16, sum[i][j]);
      });
  }
};

template <class D>
struct SumsOf {
  using Type = TensorSums<D>;
};
template <>
struct SumsOf<F32> {
  using Type = FusedSums;
};

}  // namespace xorz
