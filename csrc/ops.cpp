// Schemas of every op, and their registration. No kernels here.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <cstring>

namespace xorz {
namespace {

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

struct Op {
  const char* name;
  const char* schema;
  Boxed cpu;
  Boxed cuda;
};

const Op kOps[] = {
    {"delta_linear",
     "delta_linear(Tensor input, Tensor weight, Tensor? bias, Tensor delta, *, str mode=\"fast\") -> Tensor",
     TORCH_BOX(&delta_linear_cpu), TORCH_BOX(&delta_linear_cuda)},
    {"delta_linear_grad_input", "delta_linear_grad_input(Tensor grad, Tensor weight, Tensor delta) -> Tensor",
     TORCH_BOX(&delta_linear_grad_input_cpu), TORCH_BOX(&delta_linear_grad_input_cuda)},
    {"delta_linear_grouped",
     "delta_linear_grouped(Tensor input, Tensor weight, Tensor? biases, Tensor arena, Tensor slots, "
     "Tensor tenant_of_row, *, str mode=\"fast\") -> Tensor",
     TORCH_BOX(&delta_linear_grouped_cpu), TORCH_BOX(&delta_linear_grouped_cuda)},
    {"delta_linear_grouped_grad_input",
     "delta_linear_grouped_grad_input(Tensor grad, Tensor weight, Tensor arena, Tensor slots, Tensor "
     "tenant_of_row) -> Tensor",
     TORCH_BOX(&delta_linear_grouped_grad_input_cpu), TORCH_BOX(&delta_linear_grouped_grad_input_cuda)},
    {"delta_embedding",
     "delta_embedding(Tensor indices, Tensor weight, Tensor arena, Tensor slots, Tensor tenant_of_row) -> "
     "Tensor",
     TORCH_BOX(&delta_embedding_cpu), TORCH_BOX(&delta_embedding_cuda)},
    // Ranges of any length, checked by the kernel: with "[2]" torch would take the number 3 for (3, 3).
    {"delta_restore",
     "delta_restore(Tensor base, Tensor delta, *, SymInt[]? rows=None, SymInt[]? columns=None) -> Tensor",
     TORCH_BOX(&delta_restore_cpu), TORCH_BOX(&delta_restore_cuda)},
    {"delta_apply_", "delta_apply_(Tensor(a!) weight, Tensor delta) -> ()", TORCH_BOX(&delta_apply_cpu),
     TORCH_BOX(&delta_apply_cuda)},
    {"delta_encode", "delta_encode(Tensor base, Tensor fine_tuned, *, str prefer=\"auto\") -> Tensor",
     TORCH_BOX(&delta_encode_cpu), TORCH_BOX(&delta_encode_cuda)},
    {"delta_slice", "delta_slice(Tensor delta, Tensor base, int dim, int start, int end) -> Tensor",
     TORCH_BOX(&delta_slice_cpu), TORCH_BOX(&delta_slice_cuda)},
    {"delta_concat", "delta_concat(Tensor[] deltas, Tensor[] bases, int dim) -> Tensor",
     TORCH_BOX(&delta_concat_cpu), TORCH_BOX(&delta_concat_cuda)},
    {"delta_check", "delta_check(Tensor delta, Tensor base) -> ()", TORCH_BOX(&delta_check_cpu),
     TORCH_BOX(&delta_check_cuda)},
    {"delta_digest", "delta_digest(Tensor base) -> Tensor", TORCH_BOX(&delta_digest_cpu),
     TORCH_BOX(&delta_digest_cuda)},
};

// For tensors of these kinds torch would print a page about backends. The CPU kernels are registered for
// them, too, and refuse them in a sentence: no kernel reads an argument without plain strides on the CPU.
const char* const kRefusing[] = {"SparseCPU", "SparseCsrCPU", "QuantizedCPU", "MkldnnCPU"};

// Survives a second copy of this library in one process, which torch's STABLE_TORCH_LIBRARY does not: that
// one ignores the refusal and goes on with a wild handle. The first copy serves; torch is told nothing of the
// second.
class Registrar {
 public:
  Registrar() {
    if (aoti_torch_library_init_def("xorz", "xorz", 0, &def_) != 0) {
      def_ = nullptr;
      std::fprintf(
          stderr,
          "xorz: another copy of libxorz_torch.so serves this process already; this one stays idle\n");
      return;
    }
    bool ok = true;
    for (const Op& op : kOps) ok = aoti_torch_library_def(def_, op.schema) == 0 && ok;
    ok = implement("CPU") && implement("CUDA") && ok;
    for (const char* key : kRefusing) ok = implement(key) && ok;
    if (!ok) std::fprintf(stderr, "xorz: this torch refused to register some of the ops\n");
  }
  ~Registrar() {
    for (TorchLibraryHandle impl : impls_) aoti_torch_delete_library_object(impl);
    if (def_ != nullptr) aoti_torch_delete_library_object(def_);
  }
  Registrar(const Registrar&) = delete;
  Registrar& operator=(const Registrar&) = delete;

 private:
  bool implement(const char* key) {
    TorchLibraryHandle impl = nullptr;
    if (aoti_torch_library_init_impl("xorz", key, "xorz", 0, &impl) != 0) return false;
    impls_.push_back(impl);
    bool ok = true;
    for (const Op& op : kOps) {
      const Boxed kernel = std::strcmp(key, "CUDA") == 0 ? op.cuda : op.cpu;
      ok = torch_library_impl(impl, op.name, kernel, TORCH_ABI_VERSION) == 0 && ok;
    }
    return ok;
  }

  TorchLibraryHandle def_ = nullptr;
  std::vector<TorchLibraryHandle> impls_;
};

const Registrar registrar;

}  // namespace
}  // namespace xorz
