// Where the core's tasks run: the Rust core sees this class through the typed door (src/ffi/bridge.rs), the
// shim implements it over torch's own thread pool. No torch header here: the core's build compiles it too.
#pragma once

#include <cstddef>
#include <memory>

namespace xorz {

struct Task;  // a Rust closure; call(index) runs one task and never throws

class Executor {
 public:
  virtual ~Executor() = default;
  // How many tasks may run at once.
  virtual std::size_t threads() const = 0;
  // Runs task.call(i) once for every i below `tasks`, in any order, on any thread, and waits. Throws on
  // failure.
  virtual void run(std::size_t tasks, const Task& task) const = 0;
};

}  // namespace xorz
