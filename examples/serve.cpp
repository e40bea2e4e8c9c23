// A saved TorchScript module with xorz layers, served from C++: no Python, no header of xorz.
// Usage: serve LIBRARY MODULE INPUTS OUTPUTS, where INPUTS is a list of tensors as torch.save writes it.
#include <dlfcn.h>
#include <torch/script.h>

#include <fstream>
#include <future>
#include <iostream>
#include <iterator>

int main(int argc, char** argv) {
  if (argc != 5) return std::cerr << "usage: serve LIBRARY MODULE INPUTS OUTPUTS\n", 2;
  // The library registers its ops as it is loaded; it never leaves the process. Linking it does the same.
  if (dlopen(argv[1], RTLD_NOW) == nullptr) return std::cerr << dlerror() << "\n", 2;
  try {
    torch::jit::Module module = torch::jit::load(argv[2]);
    module.eval();
    std::ifstream file(argv[3], std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    const c10::IValue saved_inputs = torch::jit::pickle_load(bytes);
    const c10::ArrayRef<c10::IValue> inputs = saved_inputs.toListRef();

    // One module, many threads, no lock. What is thread-local, such as InferenceMode, is set in each of them.
    const auto serve = [&](size_t first, size_t step) {
      const c10::InferenceMode guard;
      std::vector<c10::IValue> outputs;
      for (size_t i = first; i < inputs.size(); i += step) outputs.push_back(module.forward({inputs[i]}));
      return outputs;
    };
    constexpr size_t kThreads = 4;
    std::vector<std::future<std::vector<c10::IValue>>> threads;
    for (size_t t = 0; t < kThreads; ++t)
      threads.push_back(std::async(std::launch::async, serve, t, kThreads));
    std::vector<c10::IValue> outputs(inputs.size());
    for (size_t t = 0; t < kThreads; ++t) {
      const std::vector<c10::IValue> part = threads[t].get();  // throws what the thread threw
      for (size_t i = 0; i < part.size(); ++i) outputs[t + i * kThreads] = part[i];
    }

    const std::vector<char> saved = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(outputs)));
    std::ofstream(argv[4], std::ios::binary).write(saved.data(), static_cast<std::streamsize>(saved.size()));
  } catch (const c10::Error& error) {  // torch's own; what() would add a stack
    return std::cerr << error.what_without_backtrace() << "\n", 1;
  } catch (const std::exception& error) {
    return std::cerr << error.what() << "\n", 1;
  }
}
