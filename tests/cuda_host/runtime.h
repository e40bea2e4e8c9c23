// The machine that cuda/device.cuh asks for, on the host: a fiber per CUDA thread, one block at a time, one
// thread of the operating system. Stricter than a GPU where a GPU would be silent: every access to device
// memory must lie, aligned, in a buffer of the launch; a warp's lanes must meet in the same collective, a
// block's threads at the same barrier; shared memory holds rubbish when a block begins. `seed` orders fibers
// at random, and takes turns at loads of device memory. Must hold no kernel and no test.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#define XORZ_DEVICE inline
#define XORZ_KERNEL(threads, blocks) extern "C" void
#define XORZ_CONSTANT static const
#define XORZ_SHARED static __attribute__((section("xorz_shared")))
#define XORZ_UNROLL
#define XORZ_UNROLL_4
#define XORZ_NO_UNROLL

namespace host {

struct Index {
  uint32_t thread, block_x, block_y, blocks_x, blocks_y;
};
Index where();

// Device memory of a launch, and the 32-byte sectors that were touched: by the launch, and summed over its
// blocks, each of which counts a sector once.
struct Buffer {
  uint8_t* at;
  uint64_t size;
  bool writable;
  std::vector<uint8_t> seen_by_launch = {}, seen_by_block = {};
  uint64_t launch_sectors = 0, block_sectors = 0;
};

struct Launch {
  void (*kernel)(void** params);
  void** params;
  uint32_t blocks_x, blocks_y, threads;
  uint64_t seed;
  bool count;  // sectors
  bool late;   // asynchronous copies land when waited for, as late as they may; else at once
  std::vector<Buffer>* buffers;
  bool alone;  // of the grid, only this block runs
  uint32_t alone_x, alone_y;
};
void run(const Launch& launch);

// Ends the process with a sentence.
[[noreturn]] void fail(const std::string& what);

// One access of the running thread to device memory.
void touch(const void* at, uint32_t bytes, bool write);

// Collectives; `line` tells which one. A word that each lane brings, and those of all lanes when all have
// come. Only a `fence` orders memory: a GPU promises nothing of it for shuffles and votes.
const uint64_t* meet_warp(uint64_t brought, int line, bool fence = false);
uint64_t meet_block(uint64_t brought, int line);  // the bitwise or of what threads brought

// A lane's share of an operand of a matrix instruction, and what the lane gets of the product.
struct Operands {
  uint32_t a[4], b[2];
  float sums[4];
};
// `value` of the two halves of a word of an operand.
void multiply_matrices(Operands& mine, float (*value)(uint16_t), int line);

// Copies of 16 bytes to shared memory that the running thread has under way.
struct Copy {
  void* to;
  const void* from;
  uint32_t group;
};
struct Copies {
  std::vector<Copy> under_way;
  uint32_t groups = 0;  // ended
};
Copies& copies();
bool copies_are_late();

}  // namespace host

namespace xorz {

inline uint32_t thread_index() { return host::where().thread; }
template <class T>
T held(T value) {
  return value;
}
inline uint32_t thread_index_anew() { return thread_index(); }
inline uint32_t block_x() { return host::where().block_x; }
inline uint32_t block_y() { return host::where().block_y; }
inline uint32_t blocks_x() { return host::where().blocks_x; }
inline uint32_t blocks_y() { return host::where().blocks_y; }

inline void block_sync(int line = __builtin_LINE()) { host::meet_block(0, line); }
inline bool block_any(bool vote, int line = __builtin_LINE()) { return host::meet_block(vote, line) != 0; }
inline void warp_sync(int line = __builtin_LINE()) { host::meet_warp(0, line, true); }
inline uint32_t warp_ballot(bool vote, int line = __builtin_LINE()) {
  const uint64_t* all = host::meet_warp(vote, line);
  uint32_t bits = 0;
  for (uint32_t i = 0; i < 32; i++) bits |= static_cast<uint32_t>(all[i] & 1) << i;
  return bits;
}
template <class T>
T warp_shuffle(T value, uint32_t lane, int line = __builtin_LINE()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  if (lane > 31) host::fail("a shuffle from lane " + std::to_string(lane));
  const uint64_t from = host::meet_warp(bits, line)[lane];
  std::memcpy(&value, &from, sizeof value);
  return value;
}
template <class T>
T warp_shuffle_modulo(T value, uint32_t lane, int line = __builtin_LINE()) {
  return warp_shuffle(value, lane % 32, line);
}
template <class T>
T warp_shuffle_xor(T value, uint32_t mask, int line = __builtin_LINE()) {
  return warp_shuffle(value, (thread_index() % 32) ^ mask, line);
}

inline uint32_t bit_count(uint32_t bits) { return static_cast<uint32_t>(__builtin_popcount(bits)); }
inline uint32_t first_bit(uint32_t bits) {
  return static_cast<uint32_t>(__builtin_ffs(static_cast<int>(bits)) - 1);
}

template <class T>
T load(const T* at) {
  host::touch(at, sizeof(T), false);
  return *at;
}
template <class T>
T load_once(const T* at) {
  return load(at);
}
template <class T>
void store(T* at, T value) {
  host::touch(at, sizeof(T), true);
  *at = value;
}
inline Vector load_vector(const void* at) { return load(static_cast<const Vector*>(at)); }
inline Vector load_vector_once(const void* at) { return load_vector(at); }
// What is fetched ahead must be there, as what is read.
inline void fetch_ahead(const void* at) { host::touch(at, 1, false); }
inline void store_vector(void* at, const Vector& v) { store(static_cast<Vector*>(at), v); }
inline Vector load_shared(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) host::fail("a misaligned load of shared memory");
  Vector v;
  std::memcpy(&v, at, sizeof v);
  return v;
}
inline HalfVector load_shared_half(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 8 != 0) host::fail("a misaligned load of shared memory");
  HalfVector v;
  std::memcpy(&v, at, sizeof v);
  return v;
}
inline void store_shared(void* at, const Vector& v) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) host::fail("a misaligned store to shared memory");
  std::memcpy(at, &v, sizeof v);
}
inline void shared_or(uint32_t* at, uint32_t bits) { __atomic_fetch_or(at, bits, __ATOMIC_RELAXED); }
inline void raise_to(uint32_t* at, uint32_t value) {
  host::touch(at, sizeof *at, true);
  uint32_t now = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (now < value &&
         !__atomic_compare_exchange_n(at, &now, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

inline uint32_t add_to(uint32_t* at, uint32_t value) {
  host::touch(at, sizeof *at, true);
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

// The copies are made here, where the thread sanitizer sees who writes.
inline void copy_async(void* to, const void* from) {
  host::touch(from, 16, false);
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) host::fail("a misaligned copy to shared memory");
  if (host::copies_are_late())
    host::copies().under_way.push_back({to, from, host::copies().groups});
  else
    std::memcpy(to, from, 16);
}
inline void copies_end_group() { host::copies().groups++; }
template <uint32_t N>
void wait_for_copies() {
  host::Copies& copies = host::copies();
  size_t kept = 0;
  for (const host::Copy& copy : copies.under_way) {
    if (copy.group + N < copies.groups)
      std::memcpy(copy.to, copy.from, 16);
    else
      copies.under_way[kept++] = copy;
  }
  copies.under_way.resize(kept);
}

inline void load_matrices(uint32_t (&parts)[4], const void* row, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) host::fail("a misaligned row of a matrix");
  const uint64_t* rows = host::meet_warp(reinterpret_cast<uintptr_t>(row), line);
  const uint32_t lane = thread_index() % 32;
  for (uint32_t i = 0; i < 4; i++)
    std::memcpy(&parts[i], reinterpret_cast<const char*>(rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
}

inline void load_matrices_turned(uint32_t (&parts)[4], const void* row, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) host::fail("a misaligned row of a matrix");
  const uint64_t* rows = host::meet_warp(reinterpret_cast<uintptr_t>(row), line);
  const uint32_t lane = thread_index() % 32;
  for (uint32_t i = 0; i < 4; i++) {
    uint16_t halves[2];
    for (uint32_t h = 0; h < 2; h++)
      std::memcpy(&halves[h], reinterpret_cast<const char*>(rows[8 * i + lane % 4 * 2 + h]) + lane / 4 * 2,
                  2);
    parts[i] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  }
}

inline uint32_t lower_halves(uint32_t a, uint32_t b) { return (a & 0xFFFF) | b << 16; }
inline uint32_t upper_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000u); }
inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float fused(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float half_to_float(uint16_t word) {
  _Float16 half;
  std::memcpy(&half, &word, sizeof half);
  return static_cast<float>(half);
}
inline uint16_t float_to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t word;
  std::memcpy(&word, &half, sizeof word);
  return word;
}

inline void multiply_words(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           float (*value)(uint16_t), int line) {
  host::Operands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {sums[0], sums[1], sums[2], sums[3]}};
  host::multiply_matrices(mine, value, line);
  std::memcpy(sums, mine.sums, sizeof sums);
}
inline void multiply_bf16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                          int line = __builtin_LINE()) {
  multiply_words(
      sums, a, b0, b1, [](uint16_t word) { return float_of(static_cast<uint32_t>(word) << 16); }, line);
}
inline void multiply_f16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         int line = __builtin_LINE()) {
  multiply_words(sums, a, b0, b1, half_to_float, line);
}

}  // namespace xorz
