// Runs launches that it reads from standard input and writes what they left in device memory to standard
// output: the tests' side is tests/rust/common/device.rs. A launch, little-endian:
//
//   u32 length and bytes of the kernel's name; u32 blocks x, blocks y, threads; u64 seed; u32 1 to count
//     sectors + 2 for asynchronous copies that land late + 4 to run one block of the grid alone: u32 x, y
//   u32 parameters; each: u32 kind; 0, 1: u32, u64 value; 2: null; 3, 4: input, output: u64 size, u64 offset
//     of its address from a multiple of 256, bytes; 5: memory of zeros that may be larger than the machine's, of
//     which only touched pages are real: u64 size; u32 places and for each u64 offset, u64 size, bytes; u32
//     places to give back (none: an input) and for each u64 offset, u64 size
//
// and back, for each parameter of kind 3 to 5: u64 sectors of the launch, u64 sectors of its blocks; of kind 4:
// bytes; of kind 5: the bytes of its places.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "table.h"

namespace {

using host::kernels;

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) host::fail("the launch is cut");
}
template <class T>
T read() {
  T value;
  read(&value, sizeof value);
  return value;
}
void write(const void* from, size_t bytes) {
  if (std::fwrite(from, 1, bytes, stdout) != bytes) host::fail("cannot write");
}

struct Param {
  uint32_t kind;
  uint64_t value = 0;
  void* block = nullptr;
  size_t buffer = 0;
  std::vector<std::pair<uint64_t, uint64_t>> back = {};
};

host::Buffer vast(Param& param) {
  const uint64_t size = read<uint64_t>();
  param.block =
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (param.block == MAP_FAILED) host::fail("no addresses");
  uint8_t* at = static_cast<uint8_t*>(param.block);
  for (uint32_t places = read<uint32_t>(); places > 0; places--) {
    const uint64_t offset = read<uint64_t>(), bytes = read<uint64_t>();
    read(at + offset, bytes);
  }
  param.back.resize(read<uint32_t>());
  for (auto& [offset, bytes] : param.back) {
    offset = read<uint64_t>();
    bytes = read<uint64_t>();
  }
  return {at, size, !param.back.empty()};
}

void one(uint32_t name_bytes) {
  std::string name(name_bytes, 0);
  read(name.data(), name_bytes);
  const auto found = kernels().find(name);
  if (found == kernels().end()) host::fail("no kernel " + name);
  host::Launch launch = {};
  launch.kernel = found->second.call;
  launch.blocks_x = read<uint32_t>();
  launch.blocks_y = read<uint32_t>();
  launch.threads = read<uint32_t>();
  launch.seed = read<uint64_t>();
  const uint32_t ways = read<uint32_t>();
  launch.count = (ways & 1) != 0;
  launch.late = (ways & 2) != 0;
  launch.alone = (ways & 4) != 0;
  if (launch.alone) {
    launch.alone_x = read<uint32_t>();
    launch.alone_y = read<uint32_t>();
  }
  std::vector<Param> params(read<uint32_t>());
  if (params.size() != found->second.params) host::fail(name + " takes other parameters");
  std::vector<host::Buffer> buffers;
  for (Param& param : params) {
    param.kind = read<uint32_t>();
    if (param.kind == 0) param.value = read<uint32_t>();
    if (param.kind == 1) param.value = read<uint64_t>();
    if (param.kind < 3) continue;
    param.buffer = buffers.size();
    if (param.kind == 5) {
      buffers.push_back(vast(param));
      param.value = reinterpret_cast<uintptr_t>(param.block);
      continue;
    }
    const uint64_t size = read<uint64_t>(), offset = read<uint64_t>();
    if (posix_memalign(&param.block, 256, size + offset + (size + offset == 0)) != 0) host::fail("no memory");
    uint8_t* at = static_cast<uint8_t*>(param.block) + offset;
    read(at, size);
    param.value = reinterpret_cast<uintptr_t>(at);
    buffers.push_back({at, size, param.kind == 4});
  }
  std::vector<void*> pointers;
  for (Param& param : params) pointers.push_back(&param.value);
  launch.params = pointers.data();
  launch.buffers = &buffers;
  host::run(launch);
  for (const Param& param : params) {
    if (param.kind < 3) continue;
    const host::Buffer& buffer = buffers[param.buffer];
    write(&buffer.launch_sectors, 8);
    write(&buffer.block_sectors, 8);
    if (param.kind == 4) write(buffer.at, buffer.size);
    for (const auto& [offset, bytes] : param.back) write(buffer.at + offset, bytes);
    if (param.kind == 5)
      munmap(param.block, buffer.size);
    else
      std::free(param.block);
  }
  std::fflush(stdout);
}

}  // namespace

int main() {
  uint32_t name_bytes;
  while (std::fread(&name_bytes, 4, 1, stdin) == 1) one(name_bytes);
  return 0;
}
