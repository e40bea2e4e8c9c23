// A double of libcuda.so.1: what src/cuda calls of the driver, and what tests/rust/cuda/launch.rs needs to
// set devices up. cuLaunchKernel runs the kernels' own source, compiled for the host, at once. Stricter than
// a driver: device memory has no access but during copies and launches, so that a host that reads it dies; a
// kernel may touch memory of its own device only; what a capture forbids is refused. The status words' two
// addresses differ, as they may on a machine.
//
// XORZ_DOUBLE sets the machine: `devices=2 version=13020 capability=80 image=209` (words apart by spaces; the
// last refuses images). xorz_double() takes orders from the test, xorz_double_log() gives the calls so far, a
// line each.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <list>
#include <mutex>
#include <sstream>

#include "table.h"

namespace {

enum Result {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotFound = 500,
  kCaptureUnsupported = 900,
};
constexpr int kRelaxed = 2;
constexpr int kMostDevices = 4;

struct Context {
  int device;
  std::map<uint64_t, uint64_t> memory;  // address and size
};
struct Stream {
  Context* context;
};
struct Module {
  Context* context;
};
struct Function {
  Context* context;
  std::string name;
  const host::Entry* entry;
  // Lazily, as drivers do: by cuFuncLoad, or at the first launch, which a capture forbids.
  bool loaded = false;
};
struct Pinned {
  uint8_t *host, *device;
  uint64_t size;
};

struct Machine {
  int devices = 1, version = 13020, capability = 80, image = 0;
  bool begun = false;
  Context contexts[kMostDevices];
  std::list<Stream> streams;
  std::list<Module> modules;
  std::list<Function> functions;
  std::list<Pinned> pinned;
  uint8_t* arena = nullptr;
  uint64_t used = 0;
  Stream* capturing = nullptr;
  bool dry = false;
  std::list<std::function<int()>> captured;
  std::map<std::string, int> failing;  // by function: what it returns, once
  std::string log;

  Machine() {
    for (int i = 0; i < kMostDevices; i++) contexts[i].device = i;
    std::istringstream words(std::getenv("XORZ_DOUBLE") ? std::getenv("XORZ_DOUBLE") : "");
    for (std::string word; words >> word;) {
      const std::string name = word.substr(0, word.find('='));
      const int value = std::atoi(word.c_str() + name.size() + 1);
      if (name == "devices") devices = value;
      if (name == "version") version = value;
      if (name == "capability") capability = value;
      if (name == "image") image = value;
    }
  }
};
Machine& machine() {
  static Machine* all = new Machine;
  return *all;
}
std::recursive_mutex one_at_a_time;

thread_local Context* current = nullptr;
thread_local int capture_mode = 0;

// A call: takes its turn, is written down, and may be told to fail.
struct Call {
  std::lock_guard<std::recursive_mutex> turn{one_at_a_time};
  Machine& m = machine();
  int result = kSuccess;

  explicit Call(const std::string& name, const std::string& what = "") {
    m.log += name + (what.empty() ? "" : " ") + what + "\n";
    if (const auto found = m.failing.find(name); found != m.failing.end()) {
      result = found->second;
      m.failing.erase(found);
    } else if (!m.begun && name != "cuInit") {
      result = kNotInitialized;
    }
  }
  // While a stream is captured, unless this thread is relaxed.
  void forbid_in_capture() {
    if (result == kSuccess && m.capturing != nullptr && capture_mode != kRelaxed)
      result = kCaptureUnsupported;
  }
  void need_context() {
    if (result == kSuccess && current == nullptr) result = kInvalidContext;
  }
  bool ok() const { return result == kSuccess; }
};

constexpr uint64_t kArenaBytes = 256u << 20;

void arena_access(int protection) {
  Machine& m = machine();
  if (m.arena != nullptr && m.used > 0) mprotect(m.arena, (m.used + 4095) / 4096 * 4096, protection);
}

// Device memory is there as long as this is.
struct Access {
  Access() { arena_access(PROT_READ | PROT_WRITE); }
  ~Access() { arena_access(PROT_NONE); }
};

bool holds(const Context& context, uint64_t at, uint64_t bytes) {
  auto found = context.memory.upper_bound(at);
  if (found == context.memory.begin()) return false;
  --found;
  return at - found->first <= found->second && bytes <= found->second - (at - found->first);
}

int run(const Function& function, uint32_t x, uint32_t y, uint32_t threads, std::vector<uint64_t> params) {
  const Access access;
  std::vector<void*> pointers;
  for (uint64_t& word : params) pointers.push_back(&word);
  std::vector<host::Buffer> buffers;
  for (const auto& [at, size] : function.context->memory)
    buffers.push_back({reinterpret_cast<uint8_t*>(at), size, true});
  for (const Pinned& page : machine().pinned) buffers.push_back({page.device, page.size, true});
  host::Launch launch = {};
  launch.kernel = function.entry->call;
  launch.params = pointers.data();
  launch.blocks_x = x;
  launch.blocks_y = y;
  launch.threads = threads;
  launch.seed = 1;
  launch.late = true;
  launch.buffers = &buffers;
  host::run(launch);
  return kSuccess;
}

template <class T>
T* find(std::list<T>& all, const void* handle) {
  for (T& one : all)
    if (&one == handle) return &one;
  return nullptr;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int

// Orders: "fail NAME CODE", "capture" a stream, "end", "replay"; "dry" and "wet": whether launches are only
// written down. Gives 0, or what a replay gave.
API xorz_double(const char* order, void* handle) {
  const std::lock_guard<std::recursive_mutex> turn(one_at_a_time);
  Machine& m = machine();
  std::istringstream words(order);
  std::string verb, name;
  int code = 0;
  words >> verb >> name >> code;
  if (verb == "fail") m.failing[name] = code;
  if (verb == "capture") {
    m.captured.clear();
    m.capturing = find(m.streams, handle);
    return m.capturing == nullptr;
  }
  if (verb == "end") m.capturing = nullptr;
  if (verb == "dry" || verb == "wet") m.dry = verb == "dry";
  if (verb == "replay")
    for (const auto& launch : m.captured)
      if (const int result = launch()) return result;
  return 0;
}
extern "C" __attribute__((visibility("default"))) const char* xorz_double_log() {
  const std::lock_guard<std::recursive_mutex> turn(one_at_a_time);
  return machine().log.c_str();
}

API cuInit(unsigned flags) {
  Call call("cuInit");
  if (flags != 0) return kInvalidValue;
  if (call.ok() && call.m.devices == 0) return kNoDevice;
  call.m.begun = call.m.begun || call.ok();
  return call.result;
}
API cuDriverGetVersion(int* version) {
  const std::lock_guard<std::recursive_mutex> turn(one_at_a_time);
  *version = machine().version;
  return kSuccess;
}
API cuDeviceGetCount(int* count) {
  Call call("cuDeviceGetCount");
  *count = call.m.devices;
  return call.result;
}
API cuDeviceGet(int* device, int ordinal) {
  Call call("cuDeviceGet");
  *device = ordinal;
  return !call.ok() ? call.result : ordinal < 0 || ordinal >= call.m.devices ? kInvalidDevice : kSuccess;
}
API cuDeviceGetAttribute(int* value, int attribute, int device) {
  Call call("cuDeviceGetAttribute");
  if (device < 0 || device >= call.m.devices) return kInvalidDevice;
  if (attribute != 75 && attribute != 76 && attribute != 16) return kInvalidValue;
  *value = attribute == 75 ? call.m.capability / 10 : attribute == 76 ? call.m.capability % 10 : 4;
  return call.result;
}
API cuDeviceGetName(char* name, int bytes, int) {
  Call call("cuDeviceGetName");
  std::snprintf(name, static_cast<size_t>(bytes), "double");
  return call.result;
}
API cuDevicePrimaryCtxRetain(void** context, int device) {
  Call call("cuDevicePrimaryCtxRetain", std::to_string(device));
  if (call.ok() && (device < 0 || device >= call.m.devices)) return kInvalidDevice;
  *context = &call.m.contexts[device];
  return call.result;
}
API cuCtxGetCurrent(void** context) {
  // Not written down: every launch asks.
  *context = current;
  return kSuccess;
}
API cuCtxSetCurrent(void* context) {
  Call call("cuCtxSetCurrent");
  if (!call.ok()) return call.result;
  current = static_cast<Context*>(context);
  return kSuccess;
}
API cuModuleLoadData(void** module, const void* image) {
  Call call("cuModuleLoadData", current ? std::to_string(current->device) : "none");
  call.forbid_in_capture();
  call.need_context();
  if (!call.ok()) return call.result;
  uint32_t magic;
  std::memcpy(&magic, image, sizeof magic);
  if (reinterpret_cast<uintptr_t>(image) % 8 != 0 || (magic != 0xBA55ED50u && magic != 0x464C457Fu))
    return kInvalidImage;
  if (call.m.image != 0) return call.m.image;
  call.m.modules.push_back({current});
  *module = &call.m.modules.back();
  return kSuccess;
}
API cuModuleGetFunction(void** function, void* module, const char* name) {
  Call call("cuModuleGetFunction", name);
  const Module* from = find(call.m.modules, module);
  if (from == nullptr) return kInvalidHandle;
  const auto found = host::kernels().find(name);
  if (found == host::kernels().end()) return kNotFound;
  if (!call.ok()) return call.result;
  call.m.functions.push_back({from->context, name, &found->second});
  *function = &call.m.functions.back();
  return kSuccess;
}
API cuFuncLoad(void* handle) {
  Call call("cuFuncLoad");
  call.forbid_in_capture();
  call.need_context();
  if (!call.ok()) return call.result;
  Function* function = find(call.m.functions, handle);
  if (function == nullptr) return kInvalidHandle;
  function->loaded = true;
  return kSuccess;
}
API cuThreadExchangeStreamCaptureMode(int* mode) {
  Call call("cuThreadExchangeStreamCaptureMode", std::to_string(*mode));
  std::swap(*mode, capture_mode);
  return call.result;
}
API cuLaunchKernel(void* handle, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
  Machine& m = machine();
  std::ostringstream what;
  Function* function = find(m.functions, handle);
  what << (function ? function->name : "?") << " grid " << x << " " << y << " " << z << " block " << bx << " "
       << by << " " << bz << " shared " << shared << " stream " << stream << " device "
       << (current ? current->device : -1);
  Call call("cuLaunchKernel", what.str());
  if (!call.ok()) return call.result;
  if (function == nullptr || function->context != current) return kInvalidHandle;
  if (!function->loaded && m.capturing != nullptr) return kCaptureUnsupported;
  function->loaded = true;
  Stream* on = find(m.streams, stream);
  if (stream != nullptr && (on == nullptr || on->context != current)) return kInvalidHandle;
  if (x < 1 || x > 0x7FFFFFFF || y < 1 || y > 65535 || z != 1 || bx * by * bz < 1 || bx * by * bz > 1024 ||
      by != 1 || bz != 1 || shared != 0 || extra != nullptr)
    return kInvalidValue;
  // Parameters are read now, whenever the kernel runs.
  std::vector<uint64_t> values;
  for (uint32_t i = 0; i < function->entry->params; i++) {
    uint64_t value;
    std::memcpy(&value, params[i], sizeof value);
    values.push_back(value);
  }
  m.log.pop_back();
  m.log += " params";
  for (const uint64_t value : values) m.log += " " + std::to_string(value);
  m.log += "\n";
  if (m.dry) return kSuccess;
  const auto launch = [=] { return run(*function, x, y, bx, values); };
  if (m.capturing == nullptr) return launch();
  if (m.capturing != on) return kCaptureUnsupported;
  m.captured.push_back(launch);
  return kSuccess;
}
API cuMemHostAlloc(void** host, size_t bytes, unsigned flags) {
  Call call("cuMemHostAlloc", std::to_string(flags));
  call.forbid_in_capture();
  call.need_context();
  if (!call.ok()) return call.result;
  const size_t pages = (bytes + 4095) / 4096 * 4096;
  const int file = memfd_create("pinned", 0);
  if (file < 0 || ftruncate(file, static_cast<off_t>(pages)) != 0) return kOutOfMemory;
  const auto map = [&] {
    return static_cast<uint8_t*>(mmap(nullptr, pages, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  };
  call.m.pinned.push_back({map(), map(), bytes});
  close(file);
  // A driver promises nothing of its contents.
  std::memset(call.m.pinned.back().host, 0xA5, pages);
  *host = call.m.pinned.back().host;
  return kSuccess;
}
API cuMemHostGetDevicePointer_v2(uint64_t* device, void* host, unsigned flags) {
  Call call("cuMemHostGetDevicePointer_v2");
  if (!call.ok() || flags != 0) return call.ok() ? kInvalidValue : call.result;
  for (const Pinned& page : call.m.pinned)
    if (page.host == host) {
      *device = reinterpret_cast<uint64_t>(page.device);
      return kSuccess;
    }
  return kInvalidValue;
}
API cuGetErrorName(int error, const char** text) {
  static const std::map<int, const char*> names = {{1, "CUDA_ERROR_INVALID_VALUE"},
                                                   {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                   {100, "CUDA_ERROR_NO_DEVICE"},
                                                   {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
                                                   {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
                                                   {400, "CUDA_ERROR_INVALID_HANDLE"},
                                                   {500, "CUDA_ERROR_NOT_FOUND"},
                                                   {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                                                   {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
  const auto found = names.find(error);
  *text = found == names.end() ? nullptr : found->second;
  return found == names.end() ? kInvalidValue : kSuccess;
}
API cuGetErrorString(int error, const char** text) {
  *text = "the double says so";
  return error == 0 ? kInvalidValue : kSuccess;
}

// What the test needs.
API cuStreamCreate(void** stream, unsigned) {
  Call call("cuStreamCreate");
  call.need_context();
  if (!call.ok()) return call.result;
  call.m.streams.push_back({current});
  *stream = &call.m.streams.back();
  return kSuccess;
}
API cuMemAlloc_v2(uint64_t* at, size_t bytes) {
  Call call("cuMemAlloc_v2");
  call.need_context();
  if (!call.ok()) return call.result;
  Machine& m = call.m;
  if (m.arena == nullptr)
    m.arena = static_cast<uint8_t*>(
        mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  // Nothing lies beside anything: a byte too far is outside of all memory.
  const uint64_t offset = m.used + 256;
  if (offset + bytes + 256 > kArenaBytes) return kOutOfMemory;
  *at = reinterpret_cast<uint64_t>(m.arena) + offset;
  m.used = (offset + bytes + 255) / 256 * 256;
  current->memory[*at] = bytes;
  return kSuccess;
}
API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  Call call("cuMemcpyHtoD_v2");
  if (current == nullptr || !holds(*current, to, bytes)) return kInvalidValue;
  const Access access;
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return call.result;
}
API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  Call call("cuMemcpyDtoH_v2");
  if (current == nullptr || !holds(*current, from, bytes)) return kInvalidValue;
  const Access access;
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return call.result;
}
