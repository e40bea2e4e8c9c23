#!/bin/sh
# Runs the fuzz targets for MINUTES (2) in all, on the stable toolchain: what cargo-fuzz asks of a nightly one is coverage, which
# LLVM's pass gives without. Seeds are the golden files and cases/, which holds what was found and fixed; corpus/ is kept from run
# to run. Fails where a target fails: input that crashes it, takes more than a second or ten times its size in memory (the targets
# count both, by the thread's own processor time), or a minute by the clock, as what hangs does and nothing that waits its turn on a
# busy machine, or half a GiB. FUZZ_TARGETS names some of them. With a FUZZ_SEED other than 0 and a number of FUZZ_RUNS, after which
# each target ends before its time is over, a run can be had again: it reads and writes no corpus, so that what was run before on the
# machine changes nothing.
set -eu
cd "$(dirname "$0")"
minutes=${1:-${MINUTES:-2}}
targets=${FUZZ_TARGETS:-"package resident ops predicted exchange checkpoint index cache"}
host=$(rustc -vV | sed -n 's/^host: //p')
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
 -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Coverflow-checks -Ccodegen-units=1"
bins=$(for target in $targets; do printf -- '--bin %s ' "$target"; done)
# With a little optimisation inputs are as far from a second as users would find them; without any, which compiles in half a minute,
# one that takes 0.1 s took 1.07 beside other work. For hours the rest is worth the wait, too.
optimised=$(awk "BEGIN { print (($minutes > 20) ? 3 : 1) }")
RUSTFLAGS="--cfg fuzzing $coverage" cargo --config "profile.release.package.xorz.opt-level=$optimised" \
  build --release --locked --target "$host" $bins
seconds=$(awk "BEGIN { n = split(\"$targets\", t, \" \"); s = int(60 * $minutes / n); print (s > 0 ? s : 1) }")
TMPDIR=$(mktemp -d)
export TMPDIR XORZ_CACHE_DIR=
trap 'rm -rf "$TMPDIR"' EXIT
for target in $targets; do
  # Seeds of another day's golden files are none of this one's.
  rm -rf "target/seeds/$target"
  corpus=corpus/$target
  test "${FUZZ_SEED:-0}" = 0 || corpus=$TMPDIR/corpus/$target
  mkdir -p "$corpus" "artifacts/$target" "target/seeds/$target" "cases/$target"
  for file in ../golden/*; do
    test -f "$file" || continue
    case $target in
      # `package` takes a byte that says what follows: 7 is a package as it is.
      package) { printf '\007'; cat "$file"; } > "target/seeds/$target/$(basename "$file")" ;;
      checkpoint) head -c 65536 "$file" > "target/seeds/$target/$(basename "$file")" ;;
    esac
  done
  # After 8 it takes the columns of a table, whose length comes first, and its digests: those of a golden one that has no zstd.
  test "$target" != package || python3 - "target/seeds/$target" ../golden/v2_*_plain_table.xorz <<'END'
import json, pathlib, sys
for path in map(pathlib.Path, sys.argv[2:]):
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    first, end = json.loads(data[8:start])["xorz:table"]["data_offsets"]
    table = data[start + first : start + end]
    columns = int.from_bytes(table[16:20], "little")
    head = bytes([8]) + columns.to_bytes(2, "little") + bytes([255])
    pathlib.Path(sys.argv[1], path.stem).write_bytes(head + table[24:])
END
  # `resident` takes deltas as they are: those in golden safetensors files, which begin with XORZDLT.
  test "$target" != resident || python3 - "target/seeds/$target" ../golden/layout*.safetensors <<'END'
import json, pathlib, sys
for path in map(pathlib.Path, sys.argv[2:]):
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for i, info in enumerate(json.loads(data[8:start]).values()):
        first, end = info.get("data_offsets", (0, 0))
        if data[start + first : start + end].startswith(b"XORZDLT"):
            pathlib.Path(sys.argv[1], f"{path.stem}-{i}").write_bytes(data[start + first : start + end])
END
  # Lengths are free from the start: by itself libFuzzer tries no more than eight bytes for thousands of runs, which choose a pair
  # and are over before anything is edited.
  "target/$host/release/$target" -len_control=0 -max_total_time="$seconds" -runs="${FUZZ_RUNS:--1}" -seed="${FUZZ_SEED:-0}" \
    -timeout=60 -rss_limit_mb=512 -max_len=65536 -artifact_prefix="artifacts/$target/" -print_final_stats=1 -verbosity=1 \
    "$corpus" "target/seeds/$target" "cases/$target" \
    2> "target/$target.log" || { tail -40 "target/$target.log" >&2; echo "fuzz: $target failed" >&2; exit 1; }
  grep -E '^(Done|stat::number_of_executed_units|stat::peak_rss_mb)' "target/$target.log" | sed "s/^/$target: /"
  # Edges of the library's code that some input has taken.
  grep -oE 'DONE +cov: [0-9]+' "target/$target.log" | sed "s/DONE *cov/$target: edges/"
done
