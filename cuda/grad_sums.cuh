// The sums of a block's tile of gradients, in registers, and half a panel of them: grad (64 rows) . W (32 rows, a strip).
//
//   bf16, f16: 64 rows of grad by 256 columns, warp w has columns 32 w .. + 31
//     for each 16 rows of W: ldmatrix 4 x 16 rows of grad, and turned 2 x 16 columns of W; 16 mma.m16n8k16
//   f32: 64 by 128, thread (i, j) = (t / 16, t % 16) has rows i, i + 16, .. of grad by columns 4 j .. + 3 and 64 + 4 j .. + 3
//     for each 4 rows of W: 4 + 8 loads of 16 bytes, 128 FMAs (no TF32)
//
// Order of one output: rows of W from top to bottom, 16 an mma (whose inner order is the machine's), or one an FMA. It
// depends on nothing else. Longest chain: ceil(n / 16) sums of mma, or n FMAs. Registers: 64 sums (f32: 32).
#pragma once

#include "stages.cuh"

namespace xorz {

constexpr uint32_t kRowsOfGrad = 64;  // of a block

// Columns of a strip, and stages' buffers of 32 columns that it takes.
template <class W>
constexpr uint32_t kStripColumns = 512 / sizeof(W);
template <class W>
constexpr uint32_t kStripSteps = kStripColumns<W> / kStepColumns;

// Rows of W of a half of a panel.
constexpr uint32_t kHalfPanel = kStepColumns;

template <class D>
struct TensorGrads {
  using W = typename D::Word;
  float sum[4][4][4];

  XORZ_DEVICE void clear() {
    XORZ_UNROLL
    for (uint32_t i = 0; i < 4; i++) XORZ_UNROLL
    for (uint32_t j = 0; j < 4; j++) XORZ_UNROLL
    for (uint32_t e = 0; e < 4; e++) sum[i][j][e] = 0;
  }

  // `grad` holds columns r .. + 31 of the rows of grad, `w` all columns of the strip of rows of W, of which those from r on
  // are meant; `count` rows of grad.
  XORZ_DEVICE void step(const W* grad, const W (*w)[kRowsOfW * kStepColumns], uint32_t r, uint32_t count) {
    using S = Stages<W>;
    const uint32_t lane = thread_index_anew() % 32;
    const W* mine = w[thread_index_anew() / 32];
    XORZ_UNROLL
    for (uint32_t piece = 0; piece < S::kPieces; piece += 2) {
      const uint32_t row = r + piece * S::kPer + lane / 8 % 2 * 8 + lane % 8;
      uint32_t b[2][4];
      XORZ_UNROLL
      for (uint32_t j = 0; j < 2; j++) load_matrices_turned(b[j], mine + S::piece_at(row, 2 * j + lane / 16));
      XORZ_UNROLL
      for (uint32_t i = 0; i < 4; i++) {
        if (i * 16 >= count) continue;
        uint32_t a[4];
        load_matrices(a, grad + S::piece_at(i * 16 + lane % 16, piece + lane / 16));
        XORZ_UNROLL
        for (uint32_t j = 0; j < 4; j++) {
          const uint32_t b0 = b[j / 2][j % 2 * 2], b1 = b[j / 2][j % 2 * 2 + 1];
          multiply_mma<D>(sum[i][j], a, b0, b1);
        }
      }
    }
  }

  // f(row of grad, column of the strip, sum) for each of the thread's sums.
  template <class F>
  XORZ_DEVICE void each(F f) const {
    const uint32_t lane = thread_index_anew() % 32, warp = thread_index_anew() / 32;
    XORZ_UNROLL
    for (uint32_t i = 0; i < 4; i++) XORZ_UNROLL
    for (uint32_t j = 0; j < 4; j++) XORZ_UNROLL
    for (uint32_t e = 0; e < 4; e++)
      f(i * 16 + e / 2 * 8 + lane / 4, warp * kStepColumns + j * 8 + lane % 4 * 2 + e % 2, sum[i][j][e]);
  }
};

struct FusedGrads {
  float sum[4][8];

  XORZ_DEVICE void clear() {
    XORZ_UNROLL
    for (uint32_t i = 0; i < 4; i++) XORZ_UNROLL
    for (uint32_t j = 0; j < 8; j++) sum[i][j] = 0;
  }

  XORZ_DEVICE void step(const uint32_t* grad, const uint32_t (*w)[kRowsOfW * kStepColumns], uint32_t r,
                        uint32_t) {
    using S = Stages<uint32_t>;
    const uint32_t i0 = thread_index_anew() / 16, j0 = thread_index_anew() % 16;
    XORZ_NO_UNROLL
    for (uint32_t piece = 0; piece < S::kPieces; piece++) {
      Vector a[4];
      XORZ_UNROLL
      for (uint32_t i = 0; i < 4; i++) a[i] = load_shared(grad + S::piece_at(i0 + i * 16, piece));
      XORZ_UNROLL
      for (uint32_t c = 0; c < 4; c++) XORZ_UNROLL
      for (uint32_t half = 0; half < 2; half++) {
        const uint32_t row = r + piece * 4 + c;
        const Vector b = load_shared(w[half * 2 + j0 / 8] + S::piece_at(row, j0 % 8));
        XORZ_UNROLL
        for (uint32_t i = 0; i < 4; i++) XORZ_UNROLL
        for (uint32_t e = 0; e < 4; e++)
          sum[i][half * 4 + e] = fused(float_of(b.part[e]), float_of(a[i].part[c]), sum[i][half * 4 + e]);
      }
    }
  }

  template <class F>
  XORZ_DEVICE void each(F f) const {
    const uint32_t i0 = thread_index_anew() / 16, j0 = thread_index_anew() % 16;
    XORZ_UNROLL
    for (uint32_t i = 0; i < 4; i++) XORZ_UNROLL
    for (uint32_t j = 0; j < 8; j++) f(i0 + i * 16, j / 4 * 64 + j0 * 4 + j % 4, sum[i][j]);
  }
};

template <class D>
struct GradsOf {
  using Type = TensorGrads<D>;
};
template <>
struct GradsOf<F32> {
  using Type = FusedGrads;
};

}  // namespace xorz
