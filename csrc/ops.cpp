// Schemas of every op, and their registration. The registrar survives a second copy of this library in one process,
// which torch's own STABLE_TORCH_LIBRARY does not: it ignores the refusal and goes on with a wild handle.
#include <torch/csrc/stable/library.h>

#include "xorz/src/ffi/bridge.rs.h"

namespace {

class Registrar {
 public:
  Registrar() {
    if (aoti_torch_library_init_def("xorz", "xorz", 0, &def_) != 0) def_ = nullptr;
  }
  ~Registrar() {
    if (def_ != nullptr) aoti_torch_delete_library_object(def_);
  }

 private:
  TorchLibraryHandle def_ = nullptr;
};

const Registrar registrar;

}  // namespace
