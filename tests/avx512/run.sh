#!/usr/bin/env bash
# Runs tests of the AVX-512 instance on a machine without AVX-512: a Linux guest in Bochs, which emulates a Skylake-X.
# It must not install a kernel, change the host beyond Debian packages, or call a run without AVX-512 a pass.
#
#   tests/avx512/run.sh                             the tests of tests.txt, beside this script
#   tests/avx512/run.sh cpu simd_parity::every      one target, the tests whose names hold this
#   AVX512_TIMEOUT=900 tests/avx512/run.sh          seconds that the guest may take (default 3600)
#   AVX512_BINARIES=dir tests/avx512/run.sh         take dir/<target> instead of building with cargo
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
limit=${AVX512_TIMEOUT:-3600}
packages=(bochs bochsbios vgabios bochs-term isolinux syslinux-common xorriso busybox-static cpio binutils)
model=corei7_skylake_x
fail() { echo "avx512: $*" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{root/{bin,dev,proc,tmp,tests},iso,kernel}

# --- What is needed, by the package manager's own names.
command -v dpkg-query >/dev/null && command -v apt-get >/dev/null || fail "this check needs Debian's apt-get"
[ "$(uname -m)" = x86_64 ] || fail "this check emulates the test binaries' own libraries: run it on x86_64"
missing=()
for p in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
  [ "$(id -u)" = 0 ] || fail "missing packages; run: sudo apt-get install --no-install-recommends ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
models=$(bochs --help cpu 2>&1 || true)
grep -qx "$model" <<< "$models" || fail "this bochs has no CPU model $model: it was built without AVX-512"

# The kernel is downloaded and unpacked, never installed: it shall not become the host's.
image=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -1)
[ -n "$image" ] || fail "apt knows no linux-image-cloud-amd64; run apt-get update"
(cd "$work/kernel" && apt-get download -qq "$image" 2>/dev/null && dpkg-deb -x "$image"_*.deb .) ||
  fail "cannot download $image"
cp "$work"/kernel/boot/vmlinuz-* "$work/iso/vmlinuz"

# --- The tests: lines of "target filter".
if [ $# -gt 0 ]; then echo "$1 ${2:-}"; else grep -Ev '^(#|$)' "$here/tests.txt"; fi > "$work/root/tests/list"
while read -r target _; do
  to="$work/root/tests/$target"
  [ ! -e "$to" ] || continue
  if [ -n "${AVX512_BINARIES:-}" ]; then
    from="$AVX512_BINARIES/$target"
  else
    from=$(cd "$here/../.." && ${NICE:-} "${CARGO:-cargo}" test --locked --quiet --release --no-run --test "$target" \
      --message-format=json | sed -n '/"name":"'"$target"'"/s/.*"executable":"\([^"]*\)".*/\1/p')
  fi
  [ -x "$from" ] || fail "no binary of the test target $target"
  strip -g -o "$to" "$from"
  ldd "$to" | grep -o '/[^ ]*' | while read -r lib; do
    mkdir -p "$work/root/$(dirname "$lib")" && cp -nL "$lib" "$work/root/$lib"
  done
done < "$work/root/tests/list"

# --- The guest. noxsaves and clearcpuid: Bochs 2.7 reports a wrong size of the compacted state, at which Linux would
# switch AVX off altogether.
cp /bin/busybox "$work/root/bin/"
cat > "$work/root/init" <<'GUEST'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
exec > /dev/ttyS0 2>&1
export TMPDIR=/tmp XORZ_ISA=avx512 XORZ_TEST_ISA=avx512 RUST_BACKTRACE=0
echo "@cpu$($b grep -m1 'model name' /proc/cpuinfo | $b cut -d: -f2)"
for flag in avx512f avx512bw; do $b grep -qw $flag /proc/cpuinfo && echo "@has $flag"; done
while read -r target filter; do
  echo "@run $target $filter"
  /tests/$target $filter --test-threads=1 --nocapture < /dev/null
  echo "@rc $? $target $filter"
done < /tests/list
echo "@end"
$b sleep 2
$b poweroff -f
GUEST
chmod +x "$work/root/init"
(cd "$work/root" && find . | cpio -o -H newc --quiet) > "$work/iso/initrd"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$work/iso/"
cat > "$work/iso/isolinux.cfg" <<'BOOT'
default guest
label guest
  kernel vmlinuz
  append initrd=initrd console=ttyS0 quiet nosmp nokaslr mitigations=off noxsaves clearcpuid=xsavec panic=-1
BOOT
xorriso -as mkisofs -quiet -o "$work/guest.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
  -boot-info-table "$work/iso" 2>/dev/null
cat > "$work/bochsrc" <<BOCHS
cpu: model=$model, ips=100000000, reset_on_triple_fault=0
megs: 512
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=$work/guest.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial
display_library: term
log: $work/log
panic: action=fatal
BOCHS
# Debian's Bochs is the one with the debugger, which waits for "c"; its text display wants a terminal of its own.
printf 'c\nq\n' > "$work/debugger"
: > "$work/serial"
echo "avx512: $(dpkg-query -W -f='bochs ${Version}' bochs), $image, $(wc -l < "$work/root/tests/list") lines of tests"
start=$SECONDS
TERM=linux ${NICE:-} timeout -k 10 "$limit" script -qec "bochs -q -f $work/bochsrc -rc $work/debugger" /dev/null \
  < /dev/null > "$work/screen" 2>&1 &
guest=$!
tail --pid=$guest -n +1 -f "$work/serial" | while IFS= read -r line; do
  printf '[%5d s] %s\n' $((SECONDS - start)) "${line%$'\r'}"
done
wait $guest || [ $? -ne 124 ] || echo "avx512: stopped after $limit s" >&2

# --- The verdict: every line ran to its end, passed at least one test, and lacked nothing.
tr -d '\r' < "$work/serial" > "$work/said"
said() { grep -Eq "$1" "$work/said"; }
said '^@cpu' || { tail -5 "$work/log" >&2; fail "the guest did not start"; }
said '^@has avx512f$' && said '^@has avx512bw$' || fail "the guest has no AVX-512"
! said 'SKIPPED.*avx512' || fail "a test says that it lacks AVX-512"
! said '^@rc [1-9]' || fail "failed: $(grep -E '^@rc [1-9]' "$work/said" | cut -d' ' -f3- | tr '\n' ';')"
said '^@end$' || fail "the guest stopped before the last test"
passed=$(sed -n 's/^test result: ok\. \([0-9]*\) passed.*/\1/p' "$work/said")
[ "$(grep -c '^[1-9]' <<< "$passed")" = "$(wc -l < "$work/root/tests/list")" ] || fail "a line of tests ran none"
total=$(awk '{ n += $1 } END { print n }' <<< "$passed")
echo "avx512: all passed, $total tests in $((SECONDS - start)) s"
