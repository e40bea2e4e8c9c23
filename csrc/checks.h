// What the ops ask of their arguments. Every refusal is our own sentence: it names the op, the argument and
// both values that disagree, holds no path of the build machine, and comes before anything of aten is called.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <iterator>
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

// Bytes of a resident delta's header.
inline constexpr int64_t kLeastDelta = 192;
// Bytes of a digest.
inline constexpr int64_t kDigest = 16;

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

// Names of dtypes that torch has and the core does not, for messages.
inline constexpr struct {
  ScalarType torch;
  const char* name;
} kForeignDtypes[] = {
    {ScalarType::ComplexHalf, "complex32"},           {ScalarType::ComplexFloat, "complex64"},
    {ScalarType::ComplexDouble, "complex128"},        {ScalarType::QInt8, "qint8 (quantised)"},
    {ScalarType::QUInt8, "quint8 (quantised)"},       {ScalarType::QInt32, "qint32 (quantised)"},
    {ScalarType::QUInt4x2, "quint4x2 (quantised)"},   {ScalarType::QUInt2x4, "quint2x4 (quantised)"},
    {ScalarType::Float8_e5m2fnuz, "float8_e5m2fnuz"}, {ScalarType::Float8_e4m3fnuz, "float8_e4m3fnuz"},
};

// torch's own number of the dtype. Tensor::scalar_type would throw for dtypes that the stable ABI does not
// know.
inline int32_t dtype_number(const Tensor& t) {
  int32_t number = -1;
  aoti_torch_get_dtype(t.get(), &number);
  return number;
}

inline const DtypeRow* find_dtype(const Tensor& t) {
  const int32_t number = dtype_number(t);
  for (const DtypeRow& row : kDtypes)
    if (static_cast<int32_t>(row.torch) == number) return &row;
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
  if (const DtypeRow* row = find_dtype(t)) return row->name;
  const int32_t number = dtype_number(t);
  for (const auto& row : kForeignDtypes)
    if (static_cast<int32_t>(row.torch) == number) return row.name;
  return "torch's dtype number " + std::to_string(number);
}

inline std::string text(const Tensor& t) { return type_text(t) + " " + shape_text(t); }

// The tensor's layout where it has no plain strides, such as "sparse COO"; empty for dense tensors.
inline std::string layout_text(const Tensor& t) {
  static constexpr const char* names[] = {"",           "sparse COO", "sparse CSR", "MKL-DNN",
                                          "sparse CSC", "sparse BSR", "sparse BSC", "jagged"};
  int32_t layout = 0;
  aoti_torch_get_layout(t.get(), &layout);
  const bool known = layout >= 0 && static_cast<size_t>(layout) < std::size(names);
  return known ? names[layout] : "torch's layout number " + std::to_string(layout);
}

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  int32_t type = -1;
  aoti_torch_get_device_type(t.get(), &type);
  return type == aoti_torch_device_type_meta() ? "meta"
                                               : "torch's device type number " + std::to_string(type);
}

// Checks the arguments of one op, whose name begins every message.
struct Checks {
  std::string op;
  // The CUDA device that the op runs on; -1 is the CPU.
  int32_t cuda = -1;

  [[noreturn]] void refuse(const std::string& sentence) const { fail(op + ": " + sentence); }

  void require(bool ok, const std::string& sentence) const {
    if (!ok) refuse(sentence);
  }

  std::string device() const { return cuda < 0 ? "cpu" : "cuda:" + std::to_string(cuda); }

  // Dense, on the op's device, of a dtype that the core knows.
  const DtypeRow& known(const char* name, const Tensor& t) const {
    if (!t.defined()) refuse(std::string(name) + " must be a tensor, but is None");
    if (const std::string layout = layout_text(t); !layout.empty())
      refuse(std::string(name) + " must be a dense tensor, but is " + layout + " " + text(t));
    if (cuda < 0 ? !t.is_cpu() : !t.is_cuda() || t.get_device_index() != cuda)
      refuse(std::string(name) + " is on " + device_text(t) +
             (t.is_cuda() && cuda < 0 ? ", but this op has no CUDA kernel; move its tensors to the CPU"
                                      : ", but another argument is on " + device()));
    const DtypeRow* row = find_dtype(t);
    if (!row) refuse(std::string(name) + " is " + text(t) + ", a dtype that xorz does not know");
    return *row;
  }

  void contiguous(const char* name, const Tensor& t) const {
    if (!t.is_contiguous())
      refuse(std::string(name) + " " + text(t) + " must be contiguous; call .contiguous() once, outside");
  }

  // The bytes of a delta. On a CUDA device they must not be read here.
  rust::Slice<const uint8_t> delta(const char* name, const Tensor& t) const {
    if (known(name, t).torch != ScalarType::Byte || t.dim() != 1)
      refuse(std::string(name) + " must be a 1-D uint8 tensor (a resident delta), but is " + text(t));
    contiguous(name, t);
    // The host reads no byte of a device's memory; that there are none is known, and no bytes are no delta.
    if (t.is_cuda() && t.numel() < kLeastDelta)
      refuse(std::string(name) + " is " + text(t) + ", but a resident delta has at least " +
             std::to_string(kLeastDelta) + " bytes");
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
  HostMatrix words(const char* name, const Tensor& t) const {
    const DtypeRow& row = known(name, t);
    contiguous(name, t);
    const int64_t n = t.dim() < 2 ? 1 : t.size(0);
    int64_t k = 1;
    for (int64_t i = t.dim() < 2 ? 0 : 1; i < t.dim(); ++i) k *= t.size(i);
    const size_t bytes = static_cast<size_t>(n * k) * row.bytes;
    return HostMatrix{row.code,
                      static_cast<size_t>(n),
                      static_cast<size_t>(k),
                      {static_cast<const uint8_t*>(t.const_data_ptr()), bytes}};
  }

  // The base of a delta: of the delta's dtype and shape, or its integer bits (int16, int32).
  HostMatrix base(const char* name, const Tensor& t, const Info& info) const {
    HostMatrix words = this->words(name, t);
    const DtypeRow& want = dtype_of_code(info.dtype);
    const DtypeRow& have = dtype_of_code(words.dtype);
    const bool bits = have.torch == ScalarType::Short || have.torch == ScalarType::Int;
    if (bits && have.bytes == want.bytes) words.dtype = info.dtype;
    if (words.dtype != info.dtype || words.n != info.n || words.k != info.k)
      refuse(std::string(name) + " is " + text(t) + ", but the delta is of " + want.name + " [" +
             std::to_string(info.n) + ", " + std::to_string(info.k) + "]");
    return words;
  }
};

// Calls into the core; the op's name is put in front of its message if it fails.
template <class F>
auto core(const Checks& checks, const F& f) {
  try {
    return f();
  } catch (const rust::Error& e) {
    checks.refuse(e.what());
  }
}

}  // namespace xorz
