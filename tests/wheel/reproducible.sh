#!/bin/sh
# Promise: the same sources give the same wheel, byte for byte, wherever they lie and whenever they are built: two builds from
# nothing, of one commit, in folders of different names and depths. What they share is the compilers and torch; each compiles its
# own CUDA kernels, where there is an nvcc or one can be fetched (XORZ_CUDA=1: an error where not; XORZ_CUDA=0: none are compiled).
# SOURCE_DATE_EPOCH, if it is set, is the time that the archive's members get; else it is the commit's. Minutes.
set -eu
cd "$(dirname "$0")/../.."
PY=$PWD/${PY:-.venv/bin/python}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2> /dev/null || echo 1700000000)}
export SOURCE_DATE_EPOCH

# What git knows or would take: edits of the tree are part of it, those made while it builds are not, nor what was built.
git ls-files -z --cached --others --exclude-standard | tar -cf "$tmp/sources.tar" --null --ignore-failed-read -T - 2> /dev/null

build() {  # build FOLDER UMASK: the wheel of the sources, copied there
  mkdir -p "$tmp/$1/source"
  tar -xf "$tmp/sources.tar" -C "$tmp/$1/source"
  ( cd "$tmp/$1/source" && umask "$2" && PATH="$(dirname "$PY"):$PATH" XORZ_CUDA_KERNELS="$tmp/$1/kernels" "$PY" -m pip wheel --quiet \
      --disable-pip-version-check --no-deps --no-build-isolation -w "$tmp/$1/wheel" . )
}

build a 022
build some/folder/further/down 077
first=$(echo "$tmp"/a/wheel/*.whl)
second=$(echo "$tmp"/some/folder/further/down/wheel/*.whl)
# What is in them: a library that lacks the kernels would be the easier promise.
if [ -n "$(ls "$tmp"/a/kernels 2> /dev/null)" ]; then "$PY" tests/wheel/fatbin_images.py "$first"; else echo "without CUDA kernels"; fi
if cmp -s "$first" "$second"; then
  echo "the wheel is reproducible: sha256 $(sha256sum "$first" | cut -d' ' -f1), SOURCE_DATE_EPOCH $SOURCE_DATE_EPOCH"
  exit 0
fi
"$PY" - "$first" "$second" << 'DIFFERENCES'
import sys, zipfile
a, b = (zipfile.ZipFile(path) for path in sys.argv[1:])
names = {i.filename: i for i in a.infolist()}, {i.filename: i for i in b.infolist()}
if list(names[0]) != list(names[1]):
    print("the wheels hold other files, or in another order:", sorted(names[0].keys() ^ names[1].keys()))
for name in names[0].keys() & names[1].keys():
    one, two = names[0][name], names[1][name]
    if a.read(name) != b.read(name):
        left, right = a.read(name), b.read(name)
        at = next((i for i, (x, y) in enumerate(zip(left, right)) if x != y), min(len(left), len(right)))
        print(f"{name}: {len(left)} and {len(right)} bytes, other from byte {at}: {left[at - 40:at + 40]!r} {right[at - 40:at + 40]!r}")
    for field in ("date_time", "external_attr", "compress_type", "create_system"):
        if getattr(one, field) != getattr(two, field):
            print(f"{name}: {field} is {getattr(one, field)} and {getattr(two, field)}")
DIFFERENCES
echo "the wheel is not reproducible" >&2
exit 1
