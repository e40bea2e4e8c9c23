// What the sanitizers must find, so that their silence says something: run.sh calls each of these from
// Python, as the tests call the shim, and expects the run to end.
#include <climits>
#include <cstdlib>
#include <thread>

extern "C" {

// AddressSanitizer: a byte behind a buffer.
int beyond(int length) {
  auto* bytes = static_cast<volatile char*>(std::malloc(static_cast<std::size_t>(length)));
  const int found = bytes[length];
  std::free(const_cast<char*>(bytes));
  return found;
}

// UndefinedBehaviorSanitizer: a sum that is no int.
int overflow(int more) {
  volatile int most = INT_MAX;
  return most + more;
}

// ThreadSanitizer: two threads and one word.
int race(int rounds) {
  int shared = 0;
  auto work = [&shared, rounds] {
    for (int i = 0; i < rounds; i++) shared = shared + 1;
  };
  std::thread one(work), two(work);
  one.join();
  two.join();
  return shared;
}
}
