// Declares every kernel of cuda/, and lists them for the runner. A parameter list that differs from the
// kernel's own would go unnoticed by a linker, so the kernels' sources are what is included.
#pragma once

#include "digest.cu"
#include "embedding.cu"
#include "linear_grad.cu"
#include "linear_large.cu"
#include "linear_segments.cu"
#include "linear_small.cu"
#include "restore.cu"

#define XORZ_KERNELS(X)         \
  X(xorz_digest_leaves)         \
  X(xorz_digest_root)           \
  X(xorz_delta_restore_8)       \
  X(xorz_delta_restore_16)      \
  X(xorz_delta_restore_32)      \
  X(xorz_delta_restore_64)      \
  X(xorz_delta_verify_8)        \
  X(xorz_delta_verify_16)       \
  X(xorz_delta_verify_32)       \
  X(xorz_delta_verify_64)       \
  X(xorz_delta_apply_8)         \
  X(xorz_delta_apply_16)        \
  X(xorz_delta_apply_32)        \
  X(xorz_delta_apply_64)        \
  X(xorz_delta_embedding_8)     \
  X(xorz_delta_embedding_16)    \
  X(xorz_delta_embedding_32)    \
  X(xorz_delta_embedding_64)    \
  X(xorz_linear_small_bf16_m16) \
  X(xorz_linear_small_f16_m16)  \
  X(xorz_linear_small_f32_m4)   \
  X(xorz_linear_small_f32_m16)  \
  X(xorz_linear_segments_bf16)  \
  X(xorz_linear_segments_f16)   \
  X(xorz_linear_segments_f32)   \
  X(xorz_linear_large_bf16)     \
  X(xorz_linear_large_f16)      \
  X(xorz_linear_large_f32)      \
  X(xorz_linear_grad_bf16)      \
  X(xorz_linear_grad_f16)       \
  X(xorz_linear_grad_f32)
