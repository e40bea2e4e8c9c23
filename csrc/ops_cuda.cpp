// CUDA kernels of the ops: check what the host knows of the arguments, and hand addresses to the core, which
// launches on torch's current stream. No device memory is read here, nothing waits; memory comes from torch's
// allocator. A delta's header and a tenant's slot are therefore known to the kernels alone: what does not fit
// gives NaN, and an error of the next call on that device.
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <map>

#include "arguments.h"
#include "embedding.h"
#include "grouped.h"
#include "on_device.h"
#include "ops.h"
#include "staging.h"

namespace xorz {
namespace {

constexpr size_t kDeltaAlign = 16;

size_t address(const Tensor& t) { return reinterpret_cast<size_t>(t.const_data_ptr()); }
size_t mutable_address(const Tensor& t) { return reinterpret_cast<size_t>(t.mutable_data_ptr()); }

// The delta at an address that the kernels can read: a slice that is not aligned is copied.
Tensor aligned(const Tensor& delta) {
  return address(delta) % kDeltaAlign == 0 ? delta : torch::stable::clone(delta);
}

CudaMatrix device_words(const HostMatrix& w, bool bits = false) {
  return {w.dtype, bits, w.n, w.k, reinterpret_cast<size_t>(w.bytes.data())};
}

// Whether the tensor is of integers, which stand for the bits of any dtype of that size, as on the CPU.
bool are_bits(const Tensor& t) {
  return t.scalar_type() == ScalarType::Short || t.scalar_type() == ScalarType::Int;
}

// Rows `from` .. `to` of the fine-tuned words, panels by the core's rule.
Tensor restored_rows(const Checks& checks, const OnDevice& device, const CudaMatrix& base, const Tensor& like,
                     ScalarType type, const Tensor& delta, size_t from, size_t to) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  if (from != 0 || to != base.n) sizes[0] = static_cast<int64_t>(to - from);
  const Tensor plain = aligned(delta), out = torch::stable::new_empty(like, sizes, type);
  const size_t at = mutable_address(out), bytes = static_cast<size_t>(plain.numel());
  core(checks, [&] { cuda_delta_restore(device.place(), base, from, to, at, address(plain), bytes); });
  return out;
}

Tensor restored(const Checks& checks, const OnDevice& device, const CudaMatrix& base, const Tensor& like,
                ScalarType type, const Tensor& delta) {
  return restored_rows(checks, device, base, like, type, delta, 0, base.n);
}

// [m, n] of a product. `args` keeps no tensor alive: who calls does, until the launch.
Tensor product(const Checks& checks, const OnDevice& device, const CudaLinear& args, const Tensor& like,
               const std::vector<int64_t>& sizes) {
  const Tensor out = torch::stable::new_empty(like, sizes);
  const size_t bytes = core(checks, [&] { return cuda_linear_workspace(args); });
  std::optional<Tensor> workspace;
  if (bytes > 0) workspace = torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  const size_t at = workspace ? mutable_address(*workspace) : 0, to = mutable_address(out);
  core(checks, [&] { cuda_delta_linear(device.place(), args, at, to); });
  return out;
}

// What one tenant's product takes: its left operand's dtype, and the weight, of that dtype or its bits.
struct OneWeight {
  const DtypeRow* type;
  HostMatrix words;
};

// `name`: of the left operand.
OneWeight weight_of(const Checks& checks, const char* name, const Tensor& input, const Tensor& weight,
                    const Tensor& delta) {
  checks.delta("delta", delta);
  const DtypeRow& type = checks.known(name, input);
  if (type.code > 3)
    checks.refuse(std::string(name) + " is " + text(input) + "; only float32, bfloat16 and float16 compute");
  HostMatrix words = checks.words("weight", weight);
  if (weight.dim() != 2) checks.refuse("weight must be 2-D [n, k], but is " + text(weight));
  if (are_bits(weight) && static_cast<uint8_t>(weight.element_size()) == type.bytes) words.dtype = type.code;
  if (words.dtype != type.code)
    checks.refuse(std::string(name) + " is " + text(input) + ", but weight is " + text(weight));
  return {&type, words};
}

// The arguments of a product of `m` rows at `input` with one tenant's weight.
CudaLinear one_linear(const HostMatrix& words, size_t input, size_t m, const Tensor& delta) {
  CudaLinear args{};
  args.input = input;
  args.m = m;
  args.weight = device_words(words);
  args.arena = address(delta);
  args.arena_bytes = static_cast<size_t>(delta.numel());
  return args;
}

// The arguments of a product of many tenants.
CudaLinear grouped_linear(const GroupedOperands& g, const Tensor& arena) {
  CudaLinear args = one_linear(g.weight, address(g.rows), g.m, arena);
  args.grouped = true;
  args.slots = address(g.tenancy.slots);
  args.slot_count = g.s;
  args.tenant_of_row = address(g.tenancy.tenant_of_row);
  return args;
}

// One tenant's product of many rows by torch, on panels of `rows` restored rows of W: their words are in
// scratch memory of one panel, which the next overwrites. Nothing where autocast makes the product another
// dtype's.
std::optional<Tensor> by_panels(const Checks& checks, const OnDevice& device, const CudaLinear& args,
                                size_t rows, const Tensor& x, const Tensor& weight,
                                const std::optional<Tensor>& bias, ScalarType type) {
  const size_t n = args.weight.n;
  const auto k = static_cast<int64_t>(args.weight.k), m = static_cast<int64_t>(args.m);
  const Tensor flat = x.dim() == 2 ? x : call_aten("aten::view", "", x, std::vector<int64_t>{m, k});
  Tensor scratch = torch::stable::new_empty(weight, {static_cast<int64_t>(std::min(rows, n)), k}, type);
  std::optional<Tensor> out;
  for (size_t from = 0; from < n; from += rows) {
    const size_t to = std::min(n, from + rows), at = mutable_address(scratch);
    const auto count = static_cast<int64_t>(to - from);
    core(checks, [&] { cuda_delta_linear_panel(device.place(), args, from, to, at); });
    std::optional<Tensor> part_bias;
    if (bias) {
      Tensor all = *bias;
      part_bias = torch::stable::narrow(all, 0, static_cast<int64_t>(from), count);
    }
    const Tensor panel = torch::stable::narrow(scratch, 0, 0, count);
    const Tensor part = call_aten("aten::linear", "", flat, panel, part_bias);
    if (part.scalar_type() != type) return std::nullopt;
    if (to - from == n) return part;
    if (!out) out = torch::stable::new_empty(flat, {m, static_cast<int64_t>(n)});
    Tensor target = torch::stable::narrow(*out, 1, static_cast<int64_t>(from), count);
    torch::stable::copy_(target, part);
  }
  return out;
}

// Rows of a batch by slot, in their order; -1 is the base. `map`: each row's slot, on the host.
std::map<int32_t, std::vector<int64_t>> rows_by_slot(const Checks& checks, const Tensor& map, size_t slots) {
  const auto* tenant = static_cast<const int32_t*>(map.const_data_ptr());
  std::map<int32_t, std::vector<int64_t>> rows;
  for (int64_t i = 0; i < map.numel(); ++i) {
    if (tenant[i] < -1 || tenant[i] >= static_cast<int64_t>(slots))
      checks.refuse("tenant_of_row[" + std::to_string(i) + "] is " + std::to_string(tenant[i]) +
                    ", but there are " + std::to_string(slots) + " slots, and the base is -1");
    rows[tenant[i]].push_back(i);
  }
  return rows;
}

// The delta of a slot, of which `place` is its offset and length; nothing where the slot is empty.
std::optional<Tensor> delta_of_slot(const Checks& checks, const Tensor& arena, int32_t slot,
                                    const int64_t* place) {
  const int64_t offset = place[0], length = place[1];
  if (length == 0) return std::nullopt;
  if (offset < 0 || offset % 64 != 0 || length < kLeastDelta || offset > arena.numel() ||
      length > arena.numel() - offset)
    checks.refuse("slot " + std::to_string(slot) + " is " + std::to_string(length) + " bytes at offset " +
                  std::to_string(offset) + ", but must be at least " + std::to_string(kLeastDelta) +
                  " at a multiple of 64 in an arena of " + std::to_string(arena.numel()));
  Tensor all = arena;
  return torch::stable::narrow(all, 0, offset, length);
}

// Each tenant's rows gathered, multiplied by torch with a transient restored matrix, and put back. Who has
// which row has to be known here, so that this waits for the device, once.
Tensor exact_grouped(const Checks& checks, const OnDevice& device, const GroupedOperands& g,
                     const Tensor& weight, const std::optional<Tensor>& biases, const Tensor& arena) {
  const auto m = static_cast<int64_t>(g.m), n = static_cast<int64_t>(g.weight.n),
             k = static_cast<int64_t>(g.weight.k);
  Staging staging(checks);
  const Tensor places = staging.fetch(g.tenancy.slots), map = staging.fetch(g.tenancy.tenant_of_row);
  staging.arrived();
  const auto* place = static_cast<const int64_t*>(places.const_data_ptr());
  const Tensor x =
      g.rows.dim() == 2 ? g.rows : call_aten("aten::view", "", g.rows, std::vector<int64_t>{m, k});
  const Tensor out = torch::stable::new_empty(x, {m, n});
  for (const auto& [slot, rows] : rows_by_slot(checks, map, g.s)) {
    std::optional<Tensor> delta;
    if (slot >= 0) delta = delta_of_slot(checks, arena, slot, place + 2 * slot);
    const CudaMatrix base = device_words(g.weight);
    Tensor whole = delta ? restored(checks, device, base, weight, g.type->torch, *delta) : weight;
    if (whole.scalar_type() != g.type->torch) whole = call_aten("aten::view", "dtype", whole, g.type->torch);
    const Tensor host = torch::stable::empty({static_cast<int64_t>(rows.size())}, ScalarType::Long);
    std::memcpy(host.mutable_data_ptr(), rows.data(), rows.size() * sizeof(int64_t));
    const Tensor index = Staging::send(host, x);
    std::optional<Tensor> bias;
    if (biases) {
      Tensor all = *biases;
      bias = torch::stable::select(all, 0, slot < 0 ? static_cast<int64_t>(g.s) : slot);
    }
    const Tensor some = call_aten("aten::index_select", "", x, int64_t{0}, index);
    const Tensor part = call_aten("aten::linear", "", some, whole, bias);
    check_not_autocast(checks, part, g.type->torch);
    call_aten("aten::index_copy_", "", out, int64_t{0}, index, part);
  }
  return g.rows.dim() == 2 ? out : call_aten("aten::view", "", out, g.out_sizes);
}

}  // namespace

Tensor delta_linear_cuda(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Tensor& delta, const std::string& mode) {
  const Checks checks{"delta_linear", cuda_device_of({&input, &weight, bias ? &*bias : nullptr, &delta})};
  check_mode(checks, mode);
  const OneWeight w = weight_of(checks, "input", input, weight, delta);
  const DtypeRow& type = *w.type;
  const HostMatrix& words = w.words;
  const size_t m = check_rows(checks, "input", input, type, words.k, "weight.shape[1]");
  if (bias) check_bias(checks, *bias, type, words.n);
  const NoGrad guard;
  const OnDevice device(checks);
  if (mode == "exact") {
    // One transient matrix: no other size of panel is sure to give cuBLAS's bits.
    const Tensor whole = restored(checks, device, device_words(words), weight, type.torch, delta);
    const Tensor out = call_aten("aten::linear", "", input, whole, bias);
    check_not_autocast(checks, out, type.torch);
    return out;
  }
  const Tensor x = in_a_row(input), plain = aligned(delta);
  std::optional<Tensor> plain_bias;
  if (bias) plain_bias = in_a_row(*bias);
  CudaLinear args = one_linear(words, address(x), m, plain);
  args.biases = plain_bias ? address(*plain_bias) : 0;
  args.deterministic = mode == "deterministic";
  const std::vector<int64_t> sizes = sizes_with_last(input, words.n);
  if (const size_t rows = core(checks, [&] { return cuda_panel_rows(args); })) {
    const auto out = by_panels(checks, device, args, rows, x, weight, plain_bias, type.torch);
    if (out) return sizes.size() == 2 ? *out : call_aten("aten::view", "", *out, sizes);
  }
  return product(checks, device, args, input, sizes);
}

Tensor delta_linear_grad_input_cuda(const Tensor& grad, const Tensor& weight, const Tensor& delta) {
  const Checks checks{"delta_linear_grad_input", cuda_device_of({&grad, &weight, &delta})};
  const OneWeight w = weight_of(checks, "grad", grad, weight, delta);
  const size_t m = check_rows(checks, "grad", grad, *w.type, w.words.n, "weight.shape[0]");
  const NoGrad guard;
  const OnDevice device(checks);
  const Tensor g = in_a_row(grad), plain = aligned(delta);
  CudaLinear args = one_linear(w.words, address(g), m, plain);
  args.grad = true;
  return product(checks, device, args, grad, sizes_with_last(grad, w.words.k));
}

Tensor delta_linear_grouped_grad_input_cuda(const Tensor& grad, const Tensor& weight, const Tensor& arena,
                                            const Tensor& slots, const Tensor& tenant_of_row) {
  const Checks checks{"delta_linear_grouped_grad_input",
                      cuda_device_of({&grad, &weight, &arena, &slots, &tenant_of_row})};
  checks.known("weight", weight);
  const OnDevice device(checks);
  const GroupedOperands g = grouped_operands(checks, "grad", grad, 0, weight, arena, slots, tenant_of_row);
  const NoGrad guard;
  CudaLinear args = grouped_linear(g, arena);
  args.grad = true;
  return product(checks, device, args, grad, g.out_sizes);
}

Tensor delta_linear_grouped_cuda(const Tensor& input, const Tensor& weight,
                                 const std::optional<Tensor>& biases, const Tensor& arena,
                                 const Tensor& slots, const Tensor& tenant_of_row, const std::string& mode) {
  const Checks checks{"delta_linear_grouped", cuda_device_of({&input, &weight, biases ? &*biases : nullptr,
                                                              &arena, &slots, &tenant_of_row})};
  check_mode(checks, mode);
  checks.known("weight", weight);
  const OnDevice device(checks);
  const GroupedOperands g = grouped_operands(checks, "input", input, 1, weight, arena, slots, tenant_of_row);
  if (biases) check_biases(checks, *biases, g);
  const NoGrad guard;
  if (mode == "exact") return exact_grouped(checks, device, g, weight, biases, arena);
  CudaLinear args = grouped_linear(g, arena);
  args.biases = biases ? address(*biases) : 0;
  args.bias_stride = biases ? static_cast<size_t>(biases->stride(0)) : 0;
  args.deterministic = mode == "deterministic";
  return product(checks, device, args, input, g.out_sizes);
}

// Ranges are cut from the panel that has them, which is restored first: a GPU is done with that sooner than a
// host can ask.
Tensor delta_restore_cuda(const Tensor& base, const Tensor& delta, const MaybeRange& rows,
                          const MaybeRange& columns) {
  const Checks checks{"delta_restore", cuda_device_of({&base, &delta})};
  checks.delta("delta", delta);
  const HostMatrix words = checks.words("base", base);
  const Cut cut = check_cut(checks, base, words, rows, columns);
  const NoGrad guard;
  const OnDevice device(checks);
  const CudaMatrix from = device_words(words, are_bits(base));
  // TALLEST_TILE of src/cuda/plan.rs, which refuses panels that begin or end elsewhere.
  constexpr size_t kTallest = 256;
  const size_t first = rows ? static_cast<size_t>((*rows)[0]) / kTallest * kTallest : 0;
  const size_t past = rows ? (static_cast<size_t>((*rows)[1]) + kTallest - 1) / kTallest * kTallest : from.n;
  Tensor out = restored_rows(checks, device, from, base, base.scalar_type(), delta, first,
                             std::max(first, std::min(past, from.n)));
  if (rows) out = torch::stable::narrow(out, 0, (*rows)[0] - static_cast<int64_t>(first), cut.sizes.front());
  if (columns) out = torch::stable::narrow(out, base.dim() - 1, (*columns)[0], cut.sizes.back());
  // A part of its own memory, like every other result: the whole is given back.
  return rows || columns ? torch::stable::clone(out) : out;
}

void delta_apply_cuda(const Tensor& weight, const Tensor& delta) {
  const Checks checks{"delta_apply_", cuda_device_of({&weight, &delta})};
  const auto bytes = checks.delta("delta", delta);
  const HostMatrix words = checks.words("weight", weight);
  check_apart(checks, words.bytes, bytes);
  const OnDevice device(checks);
  mark_written(checks, weight);
  const Tensor plain = aligned(delta);
  const CudaMatrix target = device_words(words, are_bits(weight));
  const size_t bytes_between = core(checks, [&] { return cuda_apply_workspace(target); });
  const Tensor workspace =
      torch::stable::new_empty(weight, {static_cast<int64_t>(bytes_between)}, ScalarType::Byte);
  const size_t at = mutable_address(workspace);
  core(checks, [&] {
    cuda_delta_apply(device.place(), target, address(plain), static_cast<size_t>(plain.numel()), at);
  });
}

Tensor delta_digest_cuda(const Tensor& base) {
  const Checks checks{"delta_digest", cuda_device_of({&base})};
  const CudaMatrix words = device_words(checks.words("base", base));
  const OnDevice device(checks);
  const size_t between = core(checks, [&] { return cuda_digest_workspace(words); });
  const Tensor workspace = torch::stable::new_empty(base, {static_cast<int64_t>(between)}, ScalarType::Byte),
               out = torch::stable::new_empty(base, {kDigest}, ScalarType::Byte);
  const size_t at = mutable_address(workspace), to = mutable_address(out);
  core(checks, [&] { cuda_delta_digest(device.place(), words, at, to); });
  return out;
}

Tensor delta_embedding_cuda(const Tensor& indices, const Tensor& weight, const Tensor& arena,
                            const Tensor& slots, const Tensor& tenant_of_row) {
  const Checks checks{"delta_embedding", cuda_device_of({&indices, &weight, &arena, &slots, &tenant_of_row})};
  checks.known("weight", weight);
  const OnDevice device(checks);
  const EmbeddingOperands l = embedding_operands(checks, indices, weight, arena, slots, tenant_of_row);
  const NoGrad guard;
  const Tensor out = torch::stable::new_empty(weight, l.out_sizes);
  CudaLookup args{};
  args.indices = address(l.indices);
  args.m = l.m;
  args.weight = device_words(l.weight, are_bits(weight));
  args.arena = address(arena);
  args.arena_bytes = static_cast<size_t>(arena.numel());
  args.slots = address(l.tenancy.slots);
  args.slot_count = static_cast<size_t>(slots.size(0));
  args.tenant_of_row = address(l.tenancy.tenant_of_row);
  const size_t to = mutable_address(out);
  core(checks, [&] { cuda_delta_embedding(device.place(), args, to); });
  return out;
}

}  // namespace xorz
