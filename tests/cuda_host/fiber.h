// Threads that give way by themselves: a stack each, switched by saving what the calling convention asks to
// keep. Tells the address sanitizer of every switch. Must hold no scheduling.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(XORZ_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace host {

constexpr size_t kStack = 64 * 1024 *
                          (
#if defined(__SANITIZE_ADDRESS__)
                              4
#else
                              1
#endif
                          );

struct Fiber {
  char* stack = nullptr;
#if defined(__x86_64__)
  void* saved = nullptr;
#else
  ucontext_t context;
#endif
  void* fake = nullptr;    // of the address sanitizer
  void* thread = nullptr;  // of the thread sanitizer
};

#if defined(__x86_64__)
extern "C" void xorz_switch_stack(void** from, void* to);
__asm__(
    ".text\n.globl xorz_switch_stack\n.type xorz_switch_stack,@function\nxorz_switch_stack:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n"
    ".size xorz_switch_stack,.-xorz_switch_stack\n");
#endif

// The stack of the thread that runs the fibers; learnt at the first switch away from it.
inline const void* main_stack = nullptr;
inline size_t main_stack_bytes = 0;

// `last` where `from` will not be switched to again.
inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake, to.stack ? to.stack : main_stack,
                                 to.stack ? kStack : main_stack_bytes);
#endif
#if defined(XORZ_TSAN)
  if (from.thread == nullptr) from.thread = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  xorz_switch_stack(&from.saved, to.saved);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

// To be called first in a fiber's entry.
inline void fiber_begins() {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (main_stack == nullptr) {
    main_stack = stack;
    main_stack_bytes = bytes;
  }
#endif
}

inline void prepare(Fiber& fiber, void (*entry)()) {
  if (fiber.stack == nullptr) fiber.stack = static_cast<char*>(std::aligned_alloc(4096, kStack));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStack);
  fiber.fake = nullptr;
#endif
#if defined(XORZ_TSAN)
  if (fiber.thread == nullptr) fiber.thread = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
  uint64_t* top = reinterpret_cast<uint64_t*>(fiber.stack + kStack) - 1;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; i++) *--top = 0;
  fiber.saved = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

// What comes before `publish` in one thread comes before what follows `observe` in another.
inline void publish([[maybe_unused]] void* what) {
#if defined(XORZ_TSAN)
  __tsan_release(what);
#endif
}
inline void observe([[maybe_unused]] void* what) {
#if defined(XORZ_TSAN)
  __tsan_acquire(what);
#endif
}

}  // namespace host
