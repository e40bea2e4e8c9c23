// CUDA registrations of the ops that are called once, when a delta is made, cut, joined or checked. They have
// no CUDA kernel: arguments are copied to the host, the CPU kernel runs, and its result is copied back.
// Copying waits for the device, so that none of these ops can be captured in a CUDA graph.
#include "aten.h"
#include "checks.h"
#include "on_device.h"
#include "ops.h"

namespace xorz {
namespace {

std::vector<Tensor> all_on_host(const std::vector<Tensor>& all) {
  std::vector<Tensor> out;
  for (const Tensor& t : all) out.push_back(on_host(t));
  return out;
}

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
  Tensor back(const Tensor& t) const { return on_cuda(t, checks_.cuda); }

 private:
  Checks checks_;
};

}  // namespace

Tensor delta_encode_cuda(const Tensor& base, const Tensor& fine_tuned, const std::string& prefer) {
  const Moving moving("delta_encode", {&base, &fine_tuned});
  moving.check("base", base);
  moving.check("fine_tuned", fine_tuned);
  const NoGrad guard;
  return moving.back(
      delta_encode_cpu(on_host(base), on_host(fine_tuned), prefer == "auto" ? "speed" : prefer));
}

Tensor delta_slice_cuda(const Tensor& delta, const Tensor& base, int64_t dim, int64_t start, int64_t end) {
  const Moving moving("delta_slice", {&delta, &base});
  moving.check("delta", delta);
  moving.check("base", base);
  const NoGrad guard;
  return moving.back(delta_slice_cpu(on_host(delta), on_host(base), dim, start, end));
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
  return moving.back(delta_concat_cpu(all_on_host(deltas), all_on_host(bases), dim));
}

// A full check reads all bytes, so that everything has to be copied.
void delta_check_cuda(const Tensor& delta, const Tensor& base) {
  const Moving moving("delta_check", {&delta, &base});
  moving.check("delta", delta);
  moving.check("base", base);
  delta_check_cpu(on_host(delta), on_host(base));
}

}  // namespace xorz
