// The kernels by name, to be called as a driver calls them: with pointers to their parameters.
#pragma once

#include <map>
#include <string>
#include <utility>

#ifndef XORZ_KERNELS_HEADER
#define XORZ_KERNELS_HEADER "kernels.h"
#endif
#include XORZ_KERNELS_HEADER

namespace host {

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** params, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(params[I])...);
}
template <class... A>
constexpr uint32_t arity(void (*)(A...)) {
  return sizeof...(A);
}

struct Entry {
  void (*call)(void**);
  uint32_t params;
};

inline const std::map<std::string, Entry>& kernels() {
#define XORZ_ENTRY(name)                                                                             \
  {#name,                                                                                            \
   {[](void** params) { call(name, params, std::make_index_sequence<arity(decltype(&name){})>()); }, \
    arity(decltype(&name){})}},
  static const std::map<std::string, Entry> all = {XORZ_KERNELS(XORZ_ENTRY)};
  return all;
}

}  // namespace host
