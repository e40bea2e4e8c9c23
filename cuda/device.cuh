// What a kernel asks of the machine: every intrinsic and every inline instruction, and nothing else. Compiled
// by nvcc it is the GPU; compiled by a host compiler it is the emulation of tests/cuda_host, from the same
// kernel sources.
#pragma once

#include <stdint.h>

namespace xorz {
// Sixteen bytes: what one thread asks memory for at a time.
struct alignas(16) Vector {
  uint32_t part[4];
};
struct alignas(8) HalfVector {
  uint32_t part[2];
};
}  // namespace xorz

#ifdef __CUDACC__

#include <cuda_fp16.h>

#define XORZ_DEVICE __device__ __forceinline__
#define XORZ_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define XORZ_SHARED __shared__
#define XORZ_CONSTANT __constant__ const
#define XORZ_UNROLL _Pragma("unroll")
#define XORZ_UNROLL_4 _Pragma("unroll 4")
#define XORZ_NO_UNROLL _Pragma("unroll 1")

namespace xorz {

XORZ_DEVICE uint32_t thread_index() { return threadIdx.x; }
// As if it were news: what follows from it is computed where it is used, instead of being kept in a register.
XORZ_DEVICE uint32_t thread_index_anew() {
  uint32_t index = threadIdx.x;
  asm volatile("" : "+r"(index));
  return index;
}
// As if it were news, too: what it was computed from is not computed again where it is used.
template <class T>
XORZ_DEVICE const T* held(const T* at) {
  asm volatile("" : "+l"(at));
  return at;
}
XORZ_DEVICE uint32_t held(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}
XORZ_DEVICE uint32_t block_x() { return blockIdx.x; }
XORZ_DEVICE uint32_t block_y() { return blockIdx.y; }
XORZ_DEVICE uint32_t blocks_x() { return gridDim.x; }
XORZ_DEVICE uint32_t blocks_y() { return gridDim.y; }

XORZ_DEVICE void block_sync() { __syncthreads(); }
XORZ_DEVICE bool block_any(bool vote) { return __syncthreads_or(vote) != 0; }
XORZ_DEVICE void warp_sync() { __syncwarp(); }

// The whole warp takes part in each of these.
XORZ_DEVICE uint32_t warp_ballot(bool vote) { return __ballot_sync(0xFFFFFFFFu, vote); }
template <class T>
XORZ_DEVICE T warp_shuffle(T value, uint32_t lane) {
  return __shfl_sync(0xFFFFFFFFu, value, static_cast<int>(lane));
}
// From lane `lane` modulo 32.
template <class T>
XORZ_DEVICE T warp_shuffle_modulo(T value, uint32_t lane) {
  return warp_shuffle(value, lane);
}
template <class T>
XORZ_DEVICE T warp_shuffle_xor(T value, uint32_t mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, static_cast<int>(mask));
}

XORZ_DEVICE uint32_t bit_count(uint32_t bits) {
  return static_cast<uint32_t>(__popc(static_cast<int>(bits)));
}
XORZ_DEVICE uint32_t first_bit(uint32_t bits) {
  return static_cast<uint32_t>(__ffs(static_cast<int>(bits)) - 1);
}

// Memory of the device. `load_once` is for what no thread writes during the launch: it may pass by the
// coherent path.
template <class T>
XORZ_DEVICE T load(const T* at) {
  return *at;
}
template <class T>
XORZ_DEVICE T load_once(const T* at) {
  return __ldg(at);
}
template <class T>
XORZ_DEVICE void store(T* at, T value) {
  *at = value;
}
XORZ_DEVICE Vector load_vector(const void* at) {
  const uint4 v = *static_cast<const uint4*>(at);
  return {{v.x, v.y, v.z, v.w}};
}
XORZ_DEVICE Vector load_vector_once(const void* at) {
  const uint4 v = __ldg(static_cast<const uint4*>(at));
  return {{v.x, v.y, v.z, v.w}};
}
// The line of `at` will be read: it may come to L2 meanwhile. Nothing waits for it.
XORZ_DEVICE void fetch_ahead(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(at)));
}
XORZ_DEVICE void store_vector(void* at, const Vector& v) {
  *static_cast<uint4*>(at) = make_uint4(v.part[0], v.part[1], v.part[2], v.part[3]);
}
// Sixteen bytes of shared memory, or eight.
XORZ_DEVICE Vector load_shared(const void* at) { return load_vector(at); }
XORZ_DEVICE HalfVector load_shared_half(const void* at) {
  const uint2 v = *static_cast<const uint2*>(at);
  return {{v.x, v.y}};
}
XORZ_DEVICE void store_shared(void* at, const Vector& v) { store_vector(at, v); }
XORZ_DEVICE void shared_or(uint32_t* at, uint32_t bits) { atomicOr(at, bits); }
XORZ_DEVICE void raise_to(uint32_t* at, uint32_t value) { atomicMax(at, value); }
XORZ_DEVICE uint32_t add_to(uint32_t* at, uint32_t value) { return atomicAdd(at, value); }

// Sixteen bytes of device memory on their way to shared memory, past the registers. A thread's copies since
// its last `copies_end_group` are a group; when `wait_for_copies` returns, the thread's groups have arrived
// but for the last N. Others see them after a barrier.
XORZ_DEVICE void copy_async(void* to, const void* from) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from))
      : "memory");
}
XORZ_DEVICE void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <uint32_t N>
XORZ_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four matrices of 8 rows of 16 bytes: lane l names row l % 8 of matrix l / 8, and gets, of each, the 4 bytes
// at 4 (l % 4) of row l / 4. The whole warp calls.
XORZ_DEVICE void load_matrices(uint32_t (&parts)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
// The same, each matrix turned: the lane gets the 2 bytes at 2 (l / 4) of rows 2 (l % 4) and 2 (l % 4) + 1.
XORZ_DEVICE void load_matrices_turned(uint32_t (&parts)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
// sums (16 x 8) += a (16 x 16) * b (16 x 8), in f32. The whole warp calls.
XORZ_DEVICE void multiply_bf16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
XORZ_DEVICE void multiply_f16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The lower halves of two words, a's first, and the upper ones.
XORZ_DEVICE uint32_t lower_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
XORZ_DEVICE uint32_t upper_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// The upper half of the product.
XORZ_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

XORZ_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
XORZ_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
XORZ_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
XORZ_DEVICE float half_to_float(uint16_t word) { return __half2float(__ushort_as_half(word)); }
XORZ_DEVICE uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }

}  // namespace xorz

#else
#include "runtime.h"
#endif
