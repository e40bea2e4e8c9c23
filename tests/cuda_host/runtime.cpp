// Runs launches: fibers, their order, where they meet, and what they touch.
#include <algorithm>
#include <cstdio>
#include <random>

#include "device.cuh"
#include "fiber.h"

extern "C" char __start_xorz_shared[] __attribute__((weak)), __stop_xorz_shared[] __attribute__((weak));

namespace host {
namespace {

struct Thread {
  Fiber fiber;
  uint32_t index = 0;
  bool done = false;
  uint32_t met = 0;  // collectives of its warp that it took part in
  Copies copies;
};

// Two meetings at a time: a lane is in the second while others are still leaving the first.
struct Meeting {
  uint32_t come = 0;
  int line = 0;
  uint64_t brought[32];
  Operands operands[32];
};
struct Warp {
  Meeting meeting[2];
};

Launch launch_;
uint32_t block_x_, block_y_;
Fiber scheduler_;
std::vector<Thread> threads_;
std::vector<Warp> warps_;
Thread* running_ = nullptr;

// Threads that can go on, in the order in which they came; at most as many as a block has. No container: the
// thread sanitizer watches what those call.
constexpr uint32_t kMostThreads = 1024;
Thread* ready_[kMostThreads];
uint32_t first_ready_ = 0, ready_count_ = 0;

void push(Thread* thread) { ready_[(first_ready_ + ready_count_++) % kMostThreads] = thread; }

std::minstd_rand random_;
uint32_t until_turn_ = 0;

struct Barrier {
  uint32_t come = 0;
  int line = 0;
  uint64_t all = 0, left = 0;
};
Barrier barrier_;

// The next thread that goes on; at random where there is a seed.
Thread* take() {
  Thread*& first = ready_[first_ready_];
  if (launch_.seed != 0) std::swap(first, ready_[(first_ready_ + random_() % ready_count_) % kMostThreads]);
  first_ready_ = (first_ready_ + 1) % kMostThreads;
  ready_count_--;
  return first;
}

void wait() { switch_fiber(running_->fiber, scheduler_, running_->done); }

// One block begins when the one before it has ended.
char blocks_;

void entry() {
  fiber_begins();
  observe(&blocks_);
  launch_.kernel(launch_.params);
  publish(&blocks_);
  running_->done = true;
  wait();
  std::abort();
}

// The sanitizer keeps red zones between shared arrays, so it must not see this; eight bytes at a time, since
// it is done for every block.
__attribute__((no_sanitize("address"), noinline)) void poison_shared() {
  volatile uint64_t* at =
      reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(__start_xorz_shared) + 7) / 8 * 8);
  for (; reinterpret_cast<char*>(const_cast<uint64_t*>(at + 1)) <= __stop_xorz_shared; at = at + 1)
    *at = 0xA5A5A5A5A5A5A5A5u;
}

void run_block() {
  poison_shared();
  threads_.resize(launch_.threads);
  warps_.assign((launch_.threads + 31) / 32, Warp());
  barrier_ = Barrier();
  first_ready_ = ready_count_ = 0;
  until_turn_ = 1 + random_() % 97;
  for (uint32_t i = 0; i < launch_.threads; i++) {
    threads_[i].index = i;
    threads_[i].done = false;
    threads_[i].met = 0;
    threads_[i].copies.under_way.clear();
    threads_[i].copies.groups = 0;
    prepare(threads_[i].fiber, entry);
    push(&threads_[i]);
  }
  publish(&blocks_);
  uint32_t live = launch_.threads;
  while (live > 0) {
    if (ready_count_ == 0) {
      running_ = nullptr;
      fail("deadlock: " + std::to_string(live) + " threads wait for others, at the barrier of line " +
           std::to_string(barrier_.line) + " or in a collective");
    }
    running_ = take();
    switch_fiber(scheduler_, running_->fiber, false);
    live -= running_->done;
  }
  observe(&blocks_);
}

void count(Buffer& buffer, uint64_t from, uint64_t to) {
  buffer.seen_by_launch.resize(buffer.size / 32 + 2);
  buffer.seen_by_block.resize(buffer.size / 32 + 2);
  // Sectors of addresses, not of offsets.
  const uint64_t base = reinterpret_cast<uintptr_t>(buffer.at) / 32 * 32;
  for (uint64_t s = (from - base) / 32; s <= (to - 1 - base) / 32; s++) {
    buffer.launch_sectors += !buffer.seen_by_launch[s];
    buffer.block_sectors += !buffer.seen_by_block[s];
    buffer.seen_by_launch[s] = buffer.seen_by_block[s] = 1;
  }
}

}  // namespace

void fail(const std::string& what) {
  std::fprintf(stderr, "cuda_host: %s (block %u, %u; thread %d)\n", what.c_str(), block_x_, block_y_,
               running_ ? static_cast<int>(running_->index) : -1);
  std::fflush(stderr);
  std::_Exit(3);
}

Index where() { return {running_->index, block_x_, block_y_, launch_.blocks_x, launch_.blocks_y}; }

void touch(const void* at, uint32_t bytes, bool write) {
  static size_t last = 0;
  std::vector<Buffer>& buffers = *launch_.buffers;
  const uint64_t from = reinterpret_cast<uintptr_t>(at);
  const auto holds = [&](const Buffer& b) {
    const uint64_t start = reinterpret_cast<uintptr_t>(b.at);
    return from >= start && from - start <= b.size && bytes <= b.size - (from - start);
  };
  if (last >= buffers.size() || !holds(buffers[last])) {
    last = 0;
    while (last < buffers.size() && !holds(buffers[last])) last++;
  }
  if (last == buffers.size()) {
    std::string near = "no buffer";
    int64_t least = 4096;
    for (size_t i = 0; i < buffers.size(); i++) {
      const int64_t offset = static_cast<int64_t>(from - reinterpret_cast<uintptr_t>(buffers[i].at));
      const int64_t off = offset < 0 ? -offset : offset - static_cast<int64_t>(buffers[i].size);
      if (off >= least) continue;
      least = off;
      near = "byte " + std::to_string(offset) + " of buffer " + std::to_string(i) + " of " +
             std::to_string(buffers[i].size);
    }
    fail("an access of " + std::to_string(bytes) + " bytes outside of device memory: " + near);
  }
  if (from % bytes != 0) fail("a misaligned access of " + std::to_string(bytes) + " bytes");
  if (write && !buffers[last].writable) fail("a write to an input");
  if (launch_.count) count(buffers[last], from, from + bytes);
  if (launch_.seed != 0 && --until_turn_ == 0) {
    until_turn_ = 1 + random_() % 97;
    push(running_);
    wait();
  }
}

namespace {

// The running thread's next meeting with its warp.
Meeting& meeting_of(int line) {
  Thread& me = *running_;
  Meeting& meeting = warps_[me.index / 32].meeting[me.met++ % 2];
  if (meeting.come == 0) meeting.line = line;
  if (meeting.line != line)
    fail("lanes of a warp in different collectives, of lines " + std::to_string(meeting.line) + " and " +
         std::to_string(line));
  return meeting;
}

// Wait until all lanes have come; the last one does `work` for them.
template <class F>
void meet(Meeting& meeting, F work) {
  if (++meeting.come < 32) {
    wait();
    return;
  }
  work();
  meeting.come = 0;
  const uint32_t first = running_->index / 32 * 32;
  for (uint32_t i = first; i < first + 32; i++)
    if (i != running_->index) push(&threads_[i]);
}

}  // namespace

const uint64_t* meet_warp(uint64_t brought, int line, bool fence) {
  Meeting& meeting = meeting_of(line);
  meeting.brought[running_->index % 32] = brought;
  if (fence) publish(&meeting);
  meet(meeting, [] {});
  if (fence) observe(&meeting);
  return meeting.brought;
}

// m16n8k16: row r of a is in lanes 4 (r % 8) .., register r / 8 + 2 (k / 8); column c of b in lanes 4 c ..,
// register k / 8; of the sums, lane l has rows l / 4 and l / 4 + 8 of columns 2 (l % 4) and the next. The 16
// products of a sum are added to it in f64, from left to right, and the sum is rounded once.
void multiply_matrices(Operands& mine, float (*value)(uint16_t), int line) {
  Meeting& meeting = meeting_of(line);
  const uint32_t lane = running_->index % 32;
  meeting.operands[lane] = mine;
  meet(meeting, [&] {
    double a[16][16], b[8][16];
    const auto half = [value](uint32_t word, uint32_t k) {
      return static_cast<double>(value(static_cast<uint16_t>(word >> (16 * (k % 2)))));
    };
    for (uint32_t k = 0; k < 16; k++) {
      const uint32_t in_row = k % 8 / 2, side = k / 8;
      for (uint32_t r = 0; r < 16; r++)
        a[r][k] = half(meeting.operands[r % 8 * 4 + in_row].a[r / 8 + 2 * side], k);
      for (uint32_t c = 0; c < 8; c++) b[c][k] = half(meeting.operands[c * 4 + in_row].b[side], k);
    }
    for (uint32_t l = 0; l < 32; l++)
      for (uint32_t i = 0; i < 4; i++) {
        const double *row = a[l / 4 + i / 2 * 8], *column = b[l % 4 * 2 + i % 2];
        double sum = static_cast<double>(meeting.operands[l].sums[i]);
        for (uint32_t k = 0; k < 16; k++) sum += row[k] * column[k];
        meeting.operands[l].sums[i] = static_cast<float>(sum);
      }
  });
  mine = meeting.operands[lane];
}

Copies& copies() { return running_->copies; }
bool copies_are_late() { return launch_.late; }

uint64_t meet_block(uint64_t brought, int line) {
  if (barrier_.come == 0) {
    barrier_.line = line;
    barrier_.all = 0;
  }
  if (barrier_.line != line)
    fail("threads of a block at different barriers, of lines " + std::to_string(barrier_.line) + " and " +
         std::to_string(line));
  barrier_.all |= brought;
  publish(&barrier_);
  if (++barrier_.come < launch_.threads) {
    wait();
  } else {
    barrier_.come = 0;
    barrier_.left = barrier_.all;
    for (Thread& thread : threads_)
      if (&thread != running_) push(&thread);
  }
  observe(&barrier_);
  return barrier_.left;
}

void run(const Launch& launch) {
  launch_ = launch;
  random_.seed(static_cast<uint32_t>(launch.seed));
  if (launch.threads % 32 != 0 || launch.threads > kMostThreads)
    fail("a block of " + std::to_string(launch.threads) + " threads");
  const uint32_t from_x = launch.alone ? launch.alone_x : 0, from_y = launch.alone ? launch.alone_y : 0;
  const uint32_t to_x = launch.alone ? from_x + 1 : launch.blocks_x;
  const uint32_t to_y = launch.alone ? from_y + 1 : launch.blocks_y;
  for (block_y_ = from_y; block_y_ < to_y; block_y_++)
    for (block_x_ = from_x; block_x_ < to_x; block_x_++) {
      for (Buffer& buffer : *launch.buffers)
        std::fill(buffer.seen_by_block.begin(), buffer.seen_by_block.end(), 0);
      run_block();
    }
}

}  // namespace host
