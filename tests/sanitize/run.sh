#!/bin/sh
# The C++ shim compiled with sanitizers, and the C program over the C ABI too, under a hot subset of the tests. Rust is linked as
# `make build` made it: its own checks stand in for them there, and its allocations are watched all the same.
#
#   tests/sanitize/run.sh address   AddressSanitizer and UndefinedBehaviorSanitizer (the default)
#   tests/sanitize/run.sh thread    ThreadSanitizer, with the threads that torch brings along as they are
#
# After that pytest arguments, in place of the subset. PY: the Python of an environment with torch; XORZ_BUILD: where `make build`
# left libxorz_bridge.a. Minutes.
set -eu
cd "$(dirname "$0")/../.."
kind=${1:-address}
test $# -eq 0 || shift
PY=${PY:-.venv/bin/python}
case $PY in /*) ;; *) PY=$PWD/$PY ;; esac
build=${XORZ_BUILD:-build/cmake}
CXX=${CXX:-c++}
CC=${CC:-cc}
case $kind in
  address) flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined" runtime=libasan.so controls="beyond overflow" ;;
  thread) flags="-fsanitize=thread" runtime=libtsan.so controls="race" ;;
  *) echo "sanitize: $kind is neither address nor thread" >&2; exit 2 ;;
esac
out=build/sanitize/$kind
mkdir -p "$out/objects"
torch=$("$PY" -c "import importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin))")

# The very sources and definitions of CMakeLists.txt.
sources=$(sed -n 's/^add_library(xorz_torch MODULE \(.*\))$/\1/p' CMakeLists.txt)
target=$(sed -n 's/^set(XORZ_TORCH_TARGET "\([^"]*\)".*/\1/p' CMakeLists.txt)
test -n "$sources" && test -n "$target" || { echo "sanitize: CMakeLists.txt was not understood" >&2; exit 1; }
objects=
for source in $sources; do
  object=$out/objects/$(basename "$source" .cpp).o
  objects="$objects $object"
  test "$object" -nt "$source" && test -z "$(find csrc -name '*.h' -newer "$object")" && continue
  echo "sanitize: $source"
  "$CXX" -std=c++20 -O1 -g -fPIC -fvisibility=hidden -fno-omit-frame-pointer $flags -DTORCH_TARGET_VERSION="$target" -Icsrc \
    -isystem "$torch/include" -isystem "$build/cargo/cxxbridge" -c "$source" -o "$object"
done
package=$("$PY" -c "import importlib.util as u, os; print(os.path.dirname(u.find_spec('xorz').origin))")
rm -rf "$out/site"
mkdir -p "$out/site"
cp -r "$package" "$out/site/xorz"
cp -r python/xorz/. "$out/site/xorz/"
# The sanitizer's own functions are in its runtime, which is loaded first.
"$CXX" -shared $flags -o "$out/site/xorz/libxorz_torch.so" $objects -Wl,--whole-archive "$build/libxorz_bridge.a" \
  -Wl,--no-whole-archive "$torch/lib/libtorch_cpu.so" -ldl -lpthread -Wl,--version-script=csrc/exports.map

echo "sanitize: the C program"
"$CC" -std=c11 -Wall -Wextra -Werror -O1 -g $flags -Icsrc tests/capi/test_capi.c "$build/libxorz.a" -lm -lpthread -ldl \
  -o "$out/test_capi"
case $kind in
  thread) setarch -R "$out/test_capi" "$out" ;;
  *) "$out/test_capi" "$out" ;;
esac

preload=$("$CC" -print-file-name=$runtime)
stdcxx=$("$CC" -print-file-name=libstdc++.so.6)
# Python and torch keep what they have until the end, which is no leak of ours; leaks of the C ABI are counted elsewhere
# (tests/rust/codec/ffi_leaks.rs, `make test-capi` under valgrind).
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=66:detect_odr_violation=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
# Threads of torch's pool are told of work in ways that its own build does not show; only what has a frame of ours counts.
export TSAN_OPTIONS="exitcode=66 ignore_noninstrumented_modules=1 report_signal_unsafe=0 history_size=4"
unset PYTHONMALLOC 2> /dev/null || true
set -- "${@:-}"
test -n "$1" || set -- tests/python/test_ops.py tests/python/test_grouped.py tests/python/test_embedding.py \
  tests/python/test_misuse.py tests/python/test_threads.py tests/python/test_bookkeeping.py
run() {
  LD_PRELOAD="$preload $stdcxx" PYTHONPATH="$PWD/$out/site" OMP_NUM_THREADS=2 setarch -R "$PY" "$@"
}
"$CXX" -std=c++20 -O1 -g -fPIC -shared $flags tests/sanitize/control.cpp -o "$out/control.so"
for control in $controls; do
  if run -c "import torch, ctypes, sys; ctypes.CDLL(sys.argv[1])[sys.argv[2]](10000)" "$out/control.so" "$control" \
    > "$out/$control.log" 2>&1 || ! grep -qE "Sanitizer|runtime error" "$out/$control.log"; then
    echo "sanitize: $control was not noticed, so that nothing would be: $out/$control.log" >&2
    exit 1
  fi
done
run -m pytest -x "$@"
echo "sanitize: no finding, and $controls noticed"
