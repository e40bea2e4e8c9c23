// CUDA registrations of the ops that are called once, when a delta is made, cut, joined or checked. They have
// no CUDA kernel: arguments are copied to pinned memory of the host, together, the CPU kernel runs, and its
// result is copied back. Each op waits once, for its arguments, and for no stream but the current one
// (`staging.h`); a result is on its way when the op returns. None can be captured in a CUDA graph.
#include "aten.h"
#include "checks.h"
#include "ops.h"
#include "staging.h"

namespace xorz {
namespace {

// Checks that all tensors are on one CUDA device, contiguous, and of dtypes that the core knows.
class Moving {
 public:
  Moving(const char* op, std::initializer_list<const Tensor*> tensors)
      : checks_{op, cuda_device_of(tensors)} {}

  void check(const std::string& name, const Tensor& t) const {
    checks_.known(name.c_str(), t);
    checks_.contiguous(name.c_str(), t);
  }
  void check(const std::string& name, const std::vector<Tensor>& all) const {
    for (size_t i = 0; i < all.size(); ++i) check(name + "[" + std::to_string(i) + "]", all[i]);
  }
  Staging staging() const { return Staging(checks_); }

 private:
  Checks checks_;
};

}  // namespace

Tensor delta_encode_cuda(const Tensor& base, const Tensor& fine_tuned, const std::string& prefer) {
  const Moving moving("delta_encode", {&base, &fine_tuned});
  moving.check("base", base);
  moving.check("fine_tuned", fine_tuned);
  const NoGrad guard;
  Staging staging = moving.staging();
  const Tensor from = staging.fetch(base), to = staging.fetch(fine_tuned);
  staging.arrived();
  return staging.send(delta_encode_cpu(from, to, prefer == "auto" ? "speed" : prefer), base);
}

Tensor delta_slice_cuda(const Tensor& delta, const Tensor& base, int64_t dim, int64_t start, int64_t end) {
  const Moving moving("delta_slice", {&delta, &base});
  moving.check("delta", delta);
  moving.check("base", base);
  const NoGrad guard;
  Staging staging = moving.staging();
  const Tensor whole = staging.fetch(delta), words = staging.fetch(base);
  staging.arrived();
  return staging.send(delta_slice_cpu(whole, words, dim, start, end), base);
}

Tensor delta_concat_cuda(const std::vector<Tensor>& deltas, const std::vector<Tensor>& bases, int64_t dim) {
  const Tensor* first = nullptr;
  for (const auto* all : {&deltas, &bases})
    for (const Tensor& t : *all)
      if (first == nullptr && t.defined() && t.is_cuda()) first = &t;
  const Moving moving("delta_concat", {first});
  moving.check("deltas", deltas);
  moving.check("bases", bases);
  const NoGrad guard;
  Staging staging = moving.staging();
  const std::vector<Tensor> parts = staging.fetch(deltas), words = staging.fetch(bases);
  staging.arrived();
  return staging.send(delta_concat_cpu(parts, words, dim), *first);
}

// A full check reads all bytes, so that everything has to be copied.
void delta_check_cuda(const Tensor& delta, const Tensor& base) {
  const Moving moving("delta_check", {&delta, &base});
  moving.check("delta", delta);
  moving.check("base", base);
  const NoGrad guard;
  Staging staging = moving.staging();
  const Tensor mine = staging.fetch(delta), words = staging.fetch(base);
  staging.arrived();
  delta_check_cpu(mine, words);
}

}  // namespace xorz
