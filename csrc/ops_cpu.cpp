// CPU kernels of the ops: check the arguments, hand their memory to the core, run its tasks on torch's
// threads.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "arguments.h"
#include "aten.h"
#include "checks.h"
#include "ops.h"

namespace xorz {
namespace {

const TorchThreads threads;

rust::Slice<const uint8_t> bytes_of(const Tensor& t, size_t word) {
  return {static_cast<const uint8_t*>(t.const_data_ptr()), static_cast<size_t>(t.numel()) * word};
}

rust::Slice<uint8_t> mutable_bytes_of(const Tensor& t, size_t word) {
  return {static_cast<uint8_t*>(t.mutable_data_ptr()), static_cast<size_t>(t.numel()) * word};
}

Tensor as_tensor(const rust::Vec<uint8_t>& bytes) {
  Tensor t = torch::stable::empty({static_cast<int64_t>(bytes.size())}, ScalarType::Byte);
  if (!bytes.empty()) std::memcpy(t.mutable_data_ptr(), bytes.data(), bytes.size());
  return t;
}

// weight, delta and the dtype they compute in: what delta_linear and its gradient share.
struct LinearWeight {
  rust::Slice<const uint8_t> delta;
  HostMatrix weight;
  const DtypeRow* type;
};

LinearWeight linear_weight(const Checks& checks, const Tensor& weight, const Tensor& delta) {
  const auto bytes = checks.delta("delta", delta);
  const Info info = checks.info("delta", bytes);
  checks.known("weight", weight);
  if (weight.dim() != 2) checks.refuse("weight must be 2-D [n, k], but is " + text(weight));
  const DtypeRow& type = dtype_of_code(info.dtype);
  if (info.dtype > 3)
    checks.refuse(std::string("the delta is of ") + type.name +
                  "; only float32, bfloat16 and float16 compute");
  return {bytes, checks.base("weight", weight, info), &type};
}

}  // namespace

Tensor delta_linear_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                        const Tensor& delta, const std::string& mode) {
  const Checks checks{"delta_linear"};
  check_mode(checks, mode);
  const LinearWeight w = linear_weight(checks, weight, delta);
  const size_t m = check_rows(checks, "input", input, *w.type, w.weight.k, "weight.shape[1]");
  std::optional<Tensor> plain_bias;
  if (bias) {
    check_bias(checks, *bias, *w.type, w.weight.n);
    plain_bias = in_a_row(*bias);
  }
  if (mode == "exact")
    return core(checks,
                [&] { return exact_linear(checks, input, m, w.weight, plain_bias, w.delta, w.type->torch); });
  if (mode == "fast" && w.type->torch == ScalarType::BFloat16 && torch_multiplies(m)) {
    const std::optional<Tensor> product =
        core(checks, [&] { return panels_linear(input, m, w.weight, plain_bias, w.delta); });
    if (product) return *product;
  }
  const Tensor x = in_a_row(input);
  const Tensor out = torch::stable::empty(sizes_with_last(input, w.weight.n), w.type->torch);
  const Linear args{bytes_of(x, w.type->bytes),
                    m,
                    w.weight,
                    bias.has_value(),
                    bias ? bytes_of(*plain_bias, w.type->bytes) : rust::Slice<const uint8_t>(),
                    w.delta,
                    rust::Str(mode)};
  core(checks, [&] { delta_linear(args, mutable_bytes_of(out, w.type->bytes), threads); });
  return out;
}

Tensor delta_linear_grad_input_cpu(const Tensor& grad, const Tensor& weight, const Tensor& delta) {
  const Checks checks{"delta_linear_grad_input"};
  const LinearWeight w = linear_weight(checks, weight, delta);
  const size_t m = check_rows(checks, "grad", grad, *w.type, w.weight.n, "weight.shape[0]");
  const Tensor g = in_a_row(grad);
  const Tensor out = torch::stable::empty(sizes_with_last(grad, w.weight.k), w.type->torch);
  core(checks, [&] {
    delta_linear_grad_input(bytes_of(g, w.type->bytes), m, w.weight, w.delta,
                            mutable_bytes_of(out, w.type->bytes), threads);
  });
  return out;
}

Tensor delta_restore_cpu(const Tensor& base, const Tensor& delta, const MaybeRange& rows,
                         const MaybeRange& columns) {
  const Checks checks{"delta_restore"};
  const auto bytes = checks.delta("delta", delta);
  const Info info = checks.info("delta", bytes);
  const HostMatrix words = checks.base("base", base, info);
  const Cut cut = check_cut(checks, base, words, rows, columns);
  const NoGrad guard;
  const Tensor out = torch::stable::empty(cut.sizes, base.scalar_type());
  const auto to = mutable_bytes_of(out, dtype_of_code(info.dtype).bytes);
  core(checks, [&] { delta_restore_region(words, bytes, cut.region, to, threads); });
  return out;
}

void delta_apply_cpu(const Tensor& weight, const Tensor& delta) {
  const Checks checks{"delta_apply_"};
  const auto bytes = checks.delta("delta", delta);
  const Info info = checks.info("delta", bytes);
  const HostMatrix words = checks.base("weight", weight, info);
  check_apart(checks, words.bytes, bytes);
  mark_written(checks, weight);
  const auto target = mutable_bytes_of(weight, dtype_of_code(info.dtype).bytes);
  core(checks, [&] { delta_apply(info.dtype, info.n, info.k, target, bytes, threads); });
}

Tensor delta_encode_cpu(const Tensor& base, const Tensor& fine_tuned, const std::string& prefer) {
  const Checks checks{"delta_encode"};
  if (prefer != "auto" && prefer != "speed" && prefer != "memory")
    checks.refuse("prefer must be \"auto\", \"speed\" or \"memory\", but is \"" + prefer + "\"");
  const HostMatrix from = checks.words("base", base), to = checks.words("fine_tuned", fine_tuned);
  if (base.scalar_type() != fine_tuned.scalar_type() || shape_text(base) != shape_text(fine_tuned))
    checks.refuse("base is " + text(base) + ", but fine_tuned is " + text(fine_tuned));
  return core(checks, [&] { return as_tensor(delta_encode(from, to, rust::Str(prefer), threads)); });
}

Tensor delta_slice_cpu(const Tensor& delta, const Tensor& base, int64_t dim, int64_t start, int64_t end) {
  const Checks checks{"delta_slice"};
  const auto bytes = checks.delta("delta", delta);
  const HostMatrix words = checks.base("base", base, checks.info("delta", bytes));
  if (dim != 0 && dim != 1)
    checks.refuse("dim must be 0 (rows) or 1 (columns), but is " + std::to_string(dim));
  const int64_t size = static_cast<int64_t>(dim == 0 ? words.n : words.k);
  if (start < 0 || end < start || end > size)
    checks.refuse("start = " + std::to_string(start) + " and end = " + std::to_string(end) +
                  " must lie within 0 to " + std::to_string(size) + ", base's size along dim " +
                  std::to_string(dim));
  return core(checks, [&] { return as_tensor(delta_slice(bytes, words, dim, start, end)); });
}

Tensor delta_concat_cpu(const std::vector<Tensor>& deltas, const std::vector<Tensor>& bases, int64_t dim) {
  const Checks checks{"delta_concat"};
  if (deltas.empty()) checks.refuse("deltas is empty");
  if (deltas.size() != bases.size())
    checks.refuse("there are " + std::to_string(deltas.size()) + " deltas, but " +
                  std::to_string(bases.size()) + " bases");
  if (dim != 0 && dim != 1)
    checks.refuse("dim must be 0 (rows) or 1 (columns), but is " + std::to_string(dim));
  std::vector<Part> parts;
  for (size_t i = 0; i < deltas.size(); ++i) {
    std::string delta = "deltas[", base = "bases[";
    for (std::string* name : {&delta, &base}) name->append(std::to_string(i)).append("]");
    const auto bytes = checks.delta(delta.c_str(), deltas[i]);
    parts.push_back(Part{bytes, checks.base(base.c_str(), bases[i], checks.info(delta.c_str(), bytes))});
  }
  return core(checks, [&] { return as_tensor(delta_concat({parts.data(), parts.size()}, dim)); });
}

void delta_check_cpu(const Tensor& delta, const Tensor& base) {
  const Checks checks{"delta_check"};
  const auto bytes = checks.delta("delta", delta);
  const HostMatrix words = checks.base("base", base, checks.info("delta", bytes));
  core(checks, [&] { delta_check(bytes, words, threads); });
}

Tensor delta_digest_cpu(const Tensor& base) {
  const Checks checks{"delta_digest"};
  const HostMatrix words = checks.words("base", base);
  const Tensor out = torch::stable::empty({kDigest}, ScalarType::Byte);
  core(checks, [&] { delta_digest(words, mutable_bytes_of(out, 1), threads); });
  return out;
}

}  // namespace xorz
