// mode="exact": bit for bit what torch's linear gives on the fine-tuned weights.
//
// bf16 and f16: panels of rows are restored into scratch and multiplied by aten::linear one after another.
// That equals one whole multiplication only where torch picks the same kernel for both: panels of at least
// two rows, and more than 4096 multiplications in each. A probe per dtype compares the two on this machine;
// if they differ, and for f32 always (no panel size is safe there), the whole matrix is restored once, used
// and freed.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "aten.h"
#include "checks.h"
#include "ops.h"

namespace xorz {
namespace {

constexpr size_t kScratchBytes = 2u << 20;  // per thread: restored rows and their products
constexpr size_t kSmallProduct = 4096;      // torch multiplies smaller ones by another kernel

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  return call_aten("aten::linear", "", input, weight, bias);
}

Tensor cut(const Tensor& t, int64_t dim, size_t start, size_t length) {
  Tensor whole = t;
  return torch::stable::narrow(whole, dim, static_cast<int64_t>(start), static_cast<int64_t>(length));
}

// Calls `f` for panels of at least `rows` rows that are as equal as possible.
template <class F>
void for_panels(size_t n, size_t rows, const F& f) {
  const size_t panels = std::max<size_t>(1, n / rows);
  for (size_t i = 0; i < panels; ++i) f(n * i / panels, n * (i + 1) / panels);
}

// Does a product by panels equal the whole one here? Sizes that take torch's different paths, a few
// milliseconds.
bool panels_equal_whole(ScalarType type) {
  const size_t n = 131, k = 96;
  auto fill = [&](std::vector<int64_t> sizes, uint32_t seed) {
    Tensor t = torch::stable::empty(sizes, ScalarType::Float);
    auto* p = static_cast<float*>(t.mutable_data_ptr());
    for (int64_t i = 0; i < t.numel(); ++i) {
      seed = seed * 1664525u + 1013904223u;
      p[i] = (static_cast<float>(seed >> 8) / 8388608.0f - 1.0f) * ((seed >> 28) == 0 ? 8.0f : 0.5f);
    }
    return torch::stable::to(t, type);
  };
  const Tensor weight = fill({n, k}, 1), bias = fill({n}, 2);
  for (const std::vector<int64_t>& rows :
       std::vector<std::vector<int64_t>>{{}, {1}, {2}, {17}, {130}, {3, 5}})
    for (const bool with_bias : {false, true}) {
      std::vector<int64_t> sizes = rows;
      sizes.push_back(k);
      const Tensor x = fill(sizes, 3);
      const size_t m = static_cast<size_t>(x.numel()) / k;
      const Tensor whole = torch::stable::contiguous(
          linear(x, weight, with_bias ? std::optional<Tensor>(bias) : std::nullopt));
      bool equal = true;
      for_panels(n, std::max<size_t>(16, kSmallProduct / (m * k) + 1), [&](size_t r0, size_t r1) {
        std::optional<Tensor> b;
        if (with_bias) b = cut(bias, 0, r0, r1 - r0);
        const Tensor part = torch::stable::contiguous(linear(x, cut(weight, 0, r0, r1 - r0), b));
        const Tensor same = torch::stable::contiguous(cut(whole, -1, r0, r1 - r0));
        equal = equal && std::memcmp(part.const_data_ptr(), same.const_data_ptr(), part.numel() * 2) == 0;
      });
      if (!equal) return false;
    }
  return true;
}

// Rows of the smallest panel that is used, or `n` for one panel.
size_t panel_rows(size_t m, const HostMatrix& weight, ScalarType type) {
  if (type == ScalarType::Float || m == 0 || weight.k == 0) return weight.n;
  static const bool bf16 = panels_equal_whole(ScalarType::BFloat16),
                    f16 = panels_equal_whole(ScalarType::Half);
  if (!(type == ScalarType::BFloat16 ? bf16 : f16)) return weight.n;
  const size_t least = std::max<size_t>(2, kSmallProduct / (m * weight.k) + 1);
  const size_t most = kScratchBytes * torch::stable::get_num_threads() / ((weight.k + m) * 2);
  // for_panels makes panels of `rows` to twice as many.
  return std::clamp<size_t>(most / 2, std::min(least, weight.n), std::max<size_t>(weight.n, 1));
}

// aten::linear on panels of at least `rows` restored rows, or nothing where autocast makes the product
// another dtype's.
std::optional<Tensor> by_panels(const Tensor& input, size_t m, const HostMatrix& weight,
                                const std::optional<Tensor>& bias, rust::Slice<const uint8_t> delta,
                                ScalarType type, size_t rows) {
  const NoGrad guard;
  const TorchThreads threads;
  const size_t word = type == ScalarType::Float ? 4 : 2;
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = static_cast<int64_t>(weight.n);
  if (m == 0) return torch::stable::empty(sizes, type);
  std::optional<Tensor> out, scratch;
  bool other_dtype = false;
  for_panels(weight.n, std::max<size_t>(rows, 1), [&](size_t r0, size_t r1) {
    if (other_dtype) return;
    const size_t count = r1 - r0;
    if (!scratch || static_cast<size_t>(scratch->size(0)) < count)
      scratch = torch::stable::empty({static_cast<int64_t>(count), static_cast<int64_t>(weight.k)}, type);
    const Tensor panel = cut(*scratch, 0, 0, count);
    rust::Slice<uint8_t> bytes(static_cast<uint8_t*>(panel.mutable_data_ptr()), count * weight.k * word);
    delta_restore_rows(weight, delta, r0, r1, bytes, threads);
    std::optional<Tensor> part_bias;
    if (bias) part_bias = cut(*bias, 0, r0, count);
    const Tensor part = linear(input, panel, part_bias);
    note_exact_panel((bytes.size() + (count == weight.n ? 0 : m * count * word)) / threads.threads());
    other_dtype = part.scalar_type() != type;
    if (other_dtype) return;
    if (count == weight.n) {
      out = part;
      return;
    }
    if (!out) out = torch::stable::empty(sizes, type);
    Tensor target = cut(*out, -1, r0, count);
    torch::stable::copy_(target, part);
  });
  return other_dtype ? std::nullopt : out;
}

// Rows of a panel that matrix units are busy with: at least 512, unless that takes more than 8 MiB.
constexpr size_t kMatrixRows = 512, kMatrixBytes = 8u << 20;

[[noreturn]] void refuse_autocast(const Checks& checks) {
  checks.refuse(
      "mode=\"exact\" computes in the weight's dtype, but autocast is on with another one; "
      "disable autocast around it");
}

}  // namespace

void check_not_autocast(const Checks& checks, const Tensor& product, ScalarType type) {
  if (product.scalar_type() != type) refuse_autocast(checks);
}

Tensor exact_linear(const Checks& checks, const Tensor& input, size_t m, const HostMatrix& weight,
                    const std::optional<Tensor>& bias, rust::Slice<const uint8_t> delta, ScalarType type) {
  const auto out = by_panels(input, m, weight, bias, delta, type, panel_rows(m, weight, type));
  if (!out) refuse_autocast(checks);
  return *out;
}

std::optional<Tensor> panels_linear(const Tensor& input, size_t m, const HostMatrix& weight,
                                    const std::optional<Tensor>& bias, rust::Slice<const uint8_t> delta) {
  const size_t fit = kMatrixBytes / (4 * std::max<size_t>(weight.k, 1));
  const size_t rows = std::clamp<size_t>(fit, 64, kMatrixRows);
  return by_panels(input, m, weight, bias, delta, ScalarType::BFloat16, rows);
}

}  // namespace xorz
