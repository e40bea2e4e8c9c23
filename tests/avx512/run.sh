#!/usr/bin/env bash
# Runs tests of the AVX-512 instances on a machine without AVX-512: a Linux guest in Bochs, which emulates a Sapphire Rapids.
# It must not install or change anything on the host but its own folder, nor call a run without those instructions a pass.
#
#   tests/avx512/run.sh                                      the tests of tests.txt, beside this script
#   tests/avx512/run.sh avx512bf16 cpu simd_parity::every    one instruction set and target, the tests whose names hold this
#   AVX512_TIMEOUT=900 tests/avx512/run.sh                   seconds that the guest may take (default 2700)
#   AVX512_BINARIES=dir tests/avx512/run.sh                  take dir/<target> instead of building with cargo
#   XORZ_BOCHS=dir tests/avx512/run.sh                       where Bochs is kept (default: xorz/bochs in the user's cache)
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
limit=${AVX512_TIMEOUT:-2700}
# Without a word of the guest for so long, it has stopped: it says something every half minute.
quiet=300
tools=${XORZ_BOCHS:-${XDG_CACHE_HOME:-$HOME/.cache}/xorz/bochs}
# The first Debian whose Bochs has the bf16 dot product. Its packages run beside those of any other.
suite=trixie
packages=(bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso busybox-static cpio)
model=sapphire_rapids
fail() { echo "avx512: $*" >&2; exit 1; }

work=$(mktemp -d)
guest=
end_guest() {
  [ -n "$guest" ] || return 0
  kill -KILL -- "-$guest" 2>/dev/null || true
  wait "$guest" 2>/dev/null || true
  guest=
}
trap 'end_guest; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
mkdir -p "$work"/{root/{bin,dev,proc,tmp,tests},iso}

# --- The tools: packages with all that they need, unpacked into a folder of our own, and a kernel.
[ "$(uname -m)" = x86_64 ] || fail "this check emulates the test binaries' own libraries: run it on x86_64"
fetch_tools() {
  for program in apt-get apt-cache dpkg-deb; do
    command -v "$program" >/dev/null || fail "$program is missing; this check fetches Debian's packages"
  done
  # The mirror that this machine uses already; of the next Debian.
  local mirror keys=/usr/share/keyrings/debian-archive-keyring.gpg
  mirror=$(apt-get indextargets --format '$(REPO_URI) $(CREATED_BY)' 'ORIGIN: Debian' 'LABEL: Debian' | sed -n 's/ Packages$//p' | head -1)
  [ -n "$mirror" ] || fail "apt knows no mirror of Debian; run apt-get update"
  [ -e "$keys" ] || fail "$keys is missing; install debian-archive-keyring"
  local at=$work/apt new
  mkdir -p "$at"/{lists,cache/archives}/partial
  : > "$at/status"
  echo "deb [signed-by=$keys] $mirror $suite main" > "$at/sources.list"
  local apt=(-qq -o Dir::Etc::sourcelist="$at/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$at/lists"
    -o Dir::Cache="$at/cache" -o Dir::State::status="$at/status" -o APT::Install-Recommends=0
    -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=1)
  echo "avx512: fetching Bochs and a kernel, 90 MB, once" >&2
  apt-get "${apt[@]}" update || fail "cannot read the package lists of $suite"
  # With nothing installed, "all that they need" is everything, the C library included.
  apt-get "${apt[@]}" install --download-only -y "${packages[@]}" >/dev/null || fail "cannot download ${packages[*]}"
  local image
  image=$(apt-cache "${apt[@]}" depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -1)
  (cd "$at/cache/archives" && apt-get "${apt[@]}" download "${image:?no kernel}") || fail "cannot download $image"
  new=$(mktemp -d "$(dirname "$tools")/bochs.XXXXXX")
  for deb in "$at"/cache/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$new" --exclude='./usr/share/doc' --exclude='./usr/share/locale' \
      --exclude='./lib/modules' --exclude='./usr/lib/modules'
  done
  basename -a "$at"/cache/archives/{bochs,linux-image-*}_*.deb > "$new/versions"
  rm -rf "$tools"
  mv "$new" "$tools"
}
mkdir -p "$(dirname "$tools")"
[ -e "$tools/versions" ] || fetch_tools
lib=$tools/usr/lib/x86_64-linux-gnu
# A program of the folder, with the libraries of the folder.
ours() { local program=$1; shift; "$lib/ld-linux-x86-64.so.2" --library-path "$lib" "$tools/usr/bin/$program" "$@"; }
export LTDL_LIBRARY_PATH=$lib/bochs/plugins BXSHARE=$tools/usr/share/bochs
models=$(ours bochs-bin --help cpu 2>&1 || true)
grep -qx "$model" <<< "$models" || fail "this Bochs has no CPU model $model; remove $tools and run this again"
cp "$tools"/boot/vmlinuz-* "$work/iso/vmlinuz"

# --- The tests: lines of "instruction set, target, filter".
list=$work/root/tests/list
if [ $# -gt 0 ]; then echo "$1 ${2:?no target} ${3:-}"; else grep -Ev '^(#|$)' "$here/tests.txt"; fi > "$list"
while read -r _ target _; do
  to="$work/root/tests/$target"
  [ ! -e "$to" ] || continue
  if [ -n "${AVX512_BINARIES:-}" ]; then
    from="$AVX512_BINARIES/$target"
  else
    from=$(cd "$here/../.." && ${NICE:-} "${CARGO:-cargo}" test --locked --quiet --release --no-run --test "$target" \
      --message-format=json | sed -n '/"name":"'"$target"'"/s/.*"executable":"\([^"]*\)".*/\1/p')
  fi
  [ -x "$from" ] || fail "no binary of the test target $target"
  cp "$from" "$to"
  ldd "$to" | grep -o '/[^ ]*' | while read -r needed; do
    mkdir -p "$work/root/$(dirname "$needed")" && cp -nL "$needed" "$work/root/$needed"
  done
done < "$list"

# --- The guest.
cp "$tools/usr/bin/busybox" "$work/root/bin/"
cat > "$work/root/init" <<'GUEST'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
exec > /dev/ttyS0 2>&1
export TMPDIR=/tmp RUST_BACKTRACE=0
echo "@cpu$($b grep -m1 'model name' /proc/cpuinfo | $b cut -d: -f2)"
for flag in avx512f avx512bw avx512vl avx512_vbmi2 avx512_bf16 bmi2; do
  $b grep -qw $flag /proc/cpuinfo && echo "@has $flag"
done
while :; do $b sleep 30; echo "@alive $($b cut -d' ' -f1 /proc/uptime)"; done &
while read -r isa target filter; do
  echo "@run $isa $target $filter"
  XORZ_ISA=$isa XORZ_TEST_ISA=$isa /tests/$target $filter --test-threads=1 --nocapture < /dev/null
  echo "@rc $? $isa $target $filter"
done < /tests/list
echo "@end"
$b sleep 1000000
GUEST
chmod +x "$work/root/init"
(cd "$work/root" && find . | ours cpio -o -H newc --quiet) > "$work/iso/initrd"
cp "$tools/usr/lib/ISOLINUX/isolinux.bin" "$tools/usr/lib/syslinux/modules/bios/ldlinux.c32" "$work/iso/"
cat > "$work/iso/isolinux.cfg" <<'BOOT'
default guest
label guest
  kernel vmlinuz
  append initrd=initrd console=ttyS0 quiet nosmp nokaslr mitigations=off no5lvl clearcpuid=amx_tile panic=-1
BOOT
ours xorriso -as mkisofs -quiet -o "$work/guest.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
  -boot-info-table "$work/iso" 2>/dev/null
cat > "$work/bochsrc" <<BOCHS
cpu: model=$model, ips=100000000, reset_on_triple_fault=0
megs: 512
romimage: file=$BXSHARE/BIOS-bochs-latest
vgaromimage: file=$BXSHARE/VGABIOS-lgpl-latest
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
echo "avx512: $(tr '\n' ' ' < "$tools/versions"), $(wc -l < "$list") lines of tests"
start=$SECONDS
run="'$lib/ld-linux-x86-64.so.2' --library-path '$lib' '$tools/usr/bin/bochs-bin' -q -f '$work/bochsrc' -rc '$work/debugger'"
# A session of its own: nothing of it is stopped for touching our terminal, and all of it can be ended at once.
TERM=linux ${NICE:-} setsid script -qec "$run" /dev/null < /dev/null > "$work/screen" 2>&1 &
guest=$!

# --- Pass on what the guest says, until it has said all, ends, says nothing for long, or takes too long.
shown=0 heard=$SECONDS stopped=
while :; do
  sleep 1
  running=1
  kill -0 "$guest" 2>/dev/null || running=
  lines=$(wc -l < "$work/serial")
  if [ "$lines" -gt "$shown" ]; then
    sed -n "$((shown + 1)),${lines}p" "$work/serial" | tr -d '\r' | grep -v '^@alive' | sed "s/^/[$((SECONDS - start)) s] /" || true
    shown=$lines heard=$SECONDS
  fi
  if grep -q '^@end' "$work/serial"; then break; fi
  [ -n "$running" ] || { stopped="the guest stopped before the last test"; break; }
  [ $((SECONDS - heard)) -lt "$quiet" ] || { stopped="the guest has said nothing for $quiet s"; break; }
  [ $((SECONDS - start)) -lt "$limit" ] || { stopped="the guest took more than $limit s"; break; }
done
end_guest

# --- The verdict: every line ran to its end, passed at least one test, and lacked nothing.
tr -d '\r' < "$work/serial" > "$work/said"
said() { grep -Eq "$1" "$work/said"; }
said '^@cpu' || { tail -5 "$work/log" >&2; fail "the guest did not start: $stopped"; }
for flag in avx512f avx512bw avx512vl avx512_vbmi2 avx512_bf16 bmi2; do
  said "^@has $flag\$" || fail "the guest has no $flag"
done
[ -z "$stopped" ] || fail "$stopped"
! said '^@rc [1-9]' || fail "failed: $(grep -E '^@rc [1-9]' "$work/said" | cut -d' ' -f3- | tr '\n' ';')"
passed=$(sed -n 's/^test result: ok\. \([0-9]*\) passed.*/\1/p' "$work/said")
[ "$(grep -c '^[1-9]' <<< "$passed")" = "$(wc -l < "$list")" ] || fail "a line of tests ran none"
total=$(awk '{ n += $1 } END { print n }' <<< "$passed")
echo "avx512: all passed, $total tests in $((SECONDS - start)) s"
