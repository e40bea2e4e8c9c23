// Words (the bits of one element, without arithmetic meaning) and the three dtypes that products compute on.
#pragma once

#include "device.cuh"

namespace xorz {

// Codes of dtypes: those of src/matrix.rs.
enum DtypeCode : uint32_t { kF32 = 1, kBf16 = 2, kF16 = 3, kF64 = 4, kDtypes = 15 };

XORZ_DEVICE uint32_t word_bytes_of(uint32_t dtype) {
  // A digit a dtype, by code: log2 of its bytes.
  constexpr uint64_t kLog2 = 0x3322110000031120ull;
  return dtype >= 1 && dtype <= kDtypes ? 1u << (kLog2 >> (4 * dtype) & 15) : 0;
}

// Bits of a word below its exponent field; integers of the same size are treated alike.
XORZ_DEVICE uint32_t mantissa_bits_of(uint32_t dtype, uint32_t word_bytes) {
  if (dtype == kF16) return 10;
  return word_bytes == 1 ? 3 : word_bytes == 2 ? 7 : word_bytes == 4 ? 23 : 52;
}

// Whether `sparse` adds differences; else it XORs them.
XORZ_DEVICE bool computes(uint32_t dtype) { return dtype >= kF32 && dtype <= kF16; }

// The difference that does nothing: -0.0, or 0 where differences are XORed.
template <class W>
XORZ_DEVICE W no_op(uint32_t dtype) {
  return computes(dtype) ? static_cast<W>(W(1) << (8 * sizeof(W) - 1)) : W(0);
}

// All bits set is a NaN of every floating dtype.
template <class W>
XORZ_DEVICE W nan_word() {
  return static_cast<W>(~W(0));
}

XORZ_DEVICE bool finite(float value) { return (bits_of(value) & 0x7F800000u) != 0x7F800000u; }

// bf16, f16, f32: how a word becomes a value, a value of the dtype its word again, and any value the nearest
// word.
struct Bf16 {
  using Word = uint16_t;
  static constexpr uint32_t kCode = kBf16;
  static XORZ_DEVICE float value(uint16_t word) { return float_of(static_cast<uint32_t>(word) << 16); }
  static XORZ_DEVICE uint16_t narrow(float value) { return static_cast<uint16_t>(bits_of(value) >> 16); }
  static XORZ_DEVICE uint16_t round(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
};

struct F16 {
  using Word = uint16_t;
  static constexpr uint32_t kCode = kF16;
  static XORZ_DEVICE float value(uint16_t word) { return half_to_float(word); }
  static XORZ_DEVICE uint16_t narrow(float value) { return float_to_half(value); }
  static XORZ_DEVICE uint16_t round(float value) { return float_to_half(value); }
};

struct F32 {
  using Word = uint32_t;
  static constexpr uint32_t kCode = kF32;
  static XORZ_DEVICE float value(uint32_t word) { return float_of(word); }
  static XORZ_DEVICE uint32_t narrow(float value) { return bits_of(value); }
  static XORZ_DEVICE uint32_t round(float value) { return bits_of(value); }
};

// sums (16 x 8) += a (16 x 16) * b (16 x 8), words of bf16 or f16; see device.cuh. The whole warp calls.
template <class D>
XORZ_DEVICE void multiply_mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(sizeof(typename D::Word) == 2, "f32 has no matrix instruction that keeps its words");
  if constexpr (D::kCode == kBf16)
    multiply_bf16(sums, a, b0, b1);
  else
    multiply_f16(sums, a, b0, b1);
}

// The value of a word of 2 or 4 bytes of a dtype known at run time only, and the word of a value that it
// holds.
XORZ_DEVICE float value_of(uint32_t dtype, uint16_t word) {
  return dtype == kF16 ? F16::value(word) : Bf16::value(word);
}
XORZ_DEVICE float value_of(uint32_t, uint32_t word) { return F32::value(word); }
template <class W>
XORZ_DEVICE W narrow_to(uint32_t dtype, float value) {
  if constexpr (sizeof(W) == 4) return F32::narrow(value);
  return static_cast<W>(dtype == kF16 ? F16::narrow(value) : Bf16::narrow(value));
}

// f64 to a word, rounded once: to odd at f32 first, then to nearest (rounding twice to nearest may differ).
template <class D>
XORZ_DEVICE typename D::Word round_f64(double value) {
  const float near = static_cast<float>(value);
  if (sizeof(typename D::Word) == 4 || !finite(near) || static_cast<double>(near) == value)
    return D::round(near);
  const uint32_t bits = bits_of(near);
  if (bits & 1) return D::round(near);
  const double there = near < 0 ? -static_cast<double>(near) : static_cast<double>(near);
  const bool towards = there < (value < 0 ? -value : value);
  return D::round(float_of(towards ? bits + 1 : bits - 1));
}

// Word `i` of sixteen bytes, or of eight.
template <class W, class Vector>
XORZ_DEVICE W word_in(const Vector& vector, uint32_t i) {
  if constexpr (sizeof(W) == 4)
    return static_cast<W>(vector.part[i]);
  else
    return static_cast<W>(vector.part[i * sizeof(W) / 4] >> (8 * (i * sizeof(W) % 4)));
}

template <class T>
XORZ_DEVICE bool aligned(const T* at, uint32_t bytes) {
  return (reinterpret_cast<uintptr_t>(at) & (bytes - 1)) == 0;
}

}  // namespace xorz
