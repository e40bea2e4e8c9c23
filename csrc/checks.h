// What the ops ask of their arguments. Every refusal is our own sentence: it names the op, the argument and
// both values that disagree, holds no path of the build machine, and comes before anything of aten is called.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "rust/cxx.h"
#include "xorz/src/ffi/bridge.rs.h"

namespace xorz {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct DtypeRow {
  ScalarType torch;
  uint8_t code;  // of the core, see xorz_dtype in xorz.h
  uint8_t bytes;
  const char* name;
};

inline constexpr DtypeRow kDtypes[] = {
    {ScalarType::Float, 1, 4, "float32"},
    {ScalarType::BFloat16, 2, 2, "bfloat16"},
    {ScalarType::Half, 3, 2, "float16"},
    {ScalarType::Double, 4, 8, "float64"},
    {ScalarType::Byte, 5, 1, "uint8"},
    {ScalarType::Char, 6, 1, "int8"},
    {ScalarType::Bool, 7, 1, "bool"},
    {ScalarType::Float8_e4m3fn, 8, 1, "float8_e4m3fn"},
    {ScalarType::Float8_e5m2, 9, 1, "float8_e5m2"},
    {ScalarType::UInt16, 10, 2, "uint16"},
    {ScalarType::Short, 11, 2, "int16"},
    {ScalarType::UInt32, 12, 4, "uint32"},
    {ScalarType::Int, 13, 4, "int32"},
    {ScalarType::UInt64, 14, 8, "uint64"},
    {ScalarType::Long, 15, 8, "int64"},
};

inline const DtypeRow* find_dtype(ScalarType type) {
  for (const DtypeRow& row : kDtypes)
    if (row.torch == type) return &row;
  return nullptr;
}

inline const DtypeRow& dtype_of_code(uint8_t code) { return kDtypes[code - 1]; }

[[noreturn]] inline void fail(const std::string& text) { throw std::runtime_error("xorz::" + text); }

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline std::string type_text(const Tensor& t) {
  const DtypeRow* row = find_dtype(t.scalar_type());
  return row ? row->name : "a dtype that xorz does not know";
}

inline std::string text(const Tensor& t) { return type_text(t) + " " + shape_text(t); }

// One op's arguments; `op` opens every sentence.
struct Checks {
  std::string op;

  [[noreturn]] void refuse(const std::string& sentence) const { fail(op + ": " + sentence); }

  void require(bool ok, const std::string& sentence) const {
    if (!ok) refuse(sentence);
  }

  // On the CPU, of a dtype that the core knows.
  const DtypeRow& known(const char* name, const Tensor& t) const {
    if (!t.is_cpu())
      refuse(std::string(name) +
             " is not on the CPU, but another argument is; this build has no CUDA kernels");
    const DtypeRow* row = find_dtype(t.scalar_type());
    if (!row) refuse(std::string(name) + " has " + type_text(t));
    return *row;
  }

  void contiguous(const char* name, const Tensor& t) const {
    if (!t.is_contiguous())
      refuse(std::string(name) + " " + text(t) + " must be contiguous; call .contiguous() once, outside");
  }

  // The bytes of a delta.
  rust::Slice<const uint8_t> delta(const char* name, const Tensor& t) const {
    known(name, t);
    if (t.scalar_type() != ScalarType::Byte || t.dim() != 1)
      refuse(std::string(name) + " must be a 1-D uint8 tensor (a resident delta), but is " + text(t));
    contiguous(name, t);
    return {static_cast<const uint8_t*>(t.const_data_ptr()), static_cast<size_t>(t.numel())};
  }

  Info info(const char* name, rust::Slice<const uint8_t> delta) const {
    try {
      return delta_info(delta);
    } catch (const rust::Error& e) {
      refuse(std::string(name) + ": " + e.what());
    }
  }

  // A matrix of its own dtype: the first dimension is the rows, 1-D and 0-D tensors are one row.
  Words words(const char* name, const Tensor& t) const {
    const DtypeRow& row = known(name, t);
    contiguous(name, t);
    const int64_t n = t.dim() < 2 ? 1 : t.size(0);
    int64_t k = 1;
    for (int64_t i = t.dim() < 2 ? 0 : 1; i < t.dim(); ++i) k *= t.size(i);
    const size_t bytes = static_cast<size_t>(n * k) * row.bytes;
    return Words{row.code,
                 static_cast<size_t>(n),
                 static_cast<size_t>(k),
                 {static_cast<const uint8_t*>(t.const_data_ptr()), bytes}};
  }

  // The base of a delta: of the delta's dtype and shape, or its integer bits (int16, int32).
  Words base(const char* name, const Tensor& t, const Info& info) const {
    Words words = this->words(name, t);
    const DtypeRow& want = dtype_of_code(info.dtype);
    const bool bits = t.scalar_type() == ScalarType::Short || t.scalar_type() == ScalarType::Int;
    if (bits && find_dtype(t.scalar_type())->bytes == want.bytes) words.dtype = info.dtype;
    if (words.dtype != info.dtype || words.n != info.n || words.k != info.k)
      refuse(std::string(name) + " is " + text(t) + ", but the delta is of " + want.name + " [" +
             std::to_string(info.n) + ", " + std::to_string(info.k) + "]");
    return words;
  }
};

}  // namespace xorz
