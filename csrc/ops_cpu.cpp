// CPU kernels of the ops.
#include "xorz/src/ffi/bridge.rs.h"
