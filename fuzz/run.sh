#!/usr/bin/env bash
# Fuzzes the decoders with libFuzzer, guided by coverage, on a stable toolchain.
#
#   fuzz/run.sh [SECONDS]        all targets, each for so long (default 60), two at a time; then `prove`
#   fuzz/run.sh prove            a planted fault is found, or the fuzzer finds nothing
#   fuzz/run.sh one TARGET ...   one target (wire, control, device) with libFuzzer's options
#   fuzz/run.sh minimise         keeps of the found inputs the smallest that reach something new
#
# An input that breaks a target is printed in base64, written to fuzz/corpus/TARGET, and fails every test run until the
# decoder is mended. New inputs that reach new code go to target/fuzz/found; `minimise` puts them into the corpus.
#
# cargo-fuzz wants a nightly toolchain only for the sanitizers; counting coverage needs none: these are stable flags.
set -uo pipefail
cd "$(dirname "$0")/.."
host=$(rustc -vV | sed -n 's/^host: //p')
programs=target/fuzz/$host/fuzz
found=target/fuzz/found
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
  -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"

build() {
  # With --target the flags reach only what is fuzzed, not build scripts.
  RUSTFLAGS=$(echo $coverage) cargo build -q -p lamina-fuzz --features engine --bins --profile fuzz \
    --target "$host" --target-dir target/fuzz
}

# one TARGET OPTIONS...: 0 if nothing broke. Inputs that break it go to the corpus.
one() {
  local target=$1; shift
  mkdir -p "$found/$target"
  "$programs/fuzz-$target" "$found/$target" "fuzz/corpus/$target" -artifact_prefix="fuzz/corpus/$target/" \
    -max_len=16384 -len_control=50 -timeout=10 -rss_limit_mb=512 -print_final_stats=1 "$@" >"target/fuzz/$target.log" 2>&1
  local status=$?
  if [ $status != 0 ]; then
    grep -vE '^#[0-9]+' "target/fuzz/$target.log" | tail -n 40
    echo "fuzz: $target broke; the input is in fuzz/corpus/$target"
    return 1
  fi
  echo "fuzz: $target: $(sed -n 's/^stat::number_of_executed_units: *//p' "target/fuzz/$target.log") inputs," \
    "$(grep -oE 'cov: [0-9]+' "target/fuzz/$target.log" | tail -n 1), nothing broke"
}

prove() {
  local inputs; inputs=$(mktemp -d)
  mkdir "$inputs/found" "$inputs/seeds"
  cp fuzz/corpus/control/seed-request-Fence "$inputs/seeds"
  # Short inputs and few changes at a time: seconds instead of minutes, and a slow machine has room.
  timeout 330 "$programs/fuzz-planted" "$inputs/found" "$inputs/seeds" -artifact_prefix="$inputs/" \
    -max_total_time=300 -max_len=48 -mutate_depth=2 >"target/fuzz/planted.log" 2>&1
  local crashes; crashes=$(find "$inputs" -name 'crash-*' | wc -l)
  rm -rf "$inputs"
  if [ "$crashes" = 0 ] || ! grep -q 'the planted fault' target/fuzz/planted.log; then
    echo "fuzz: the planted fault was not found"; tail -n 5 target/fuzz/planted.log
    return 1
  fi
  echo "fuzz: the planted fault was found after $(grep -cE '^#[0-9]+' target/fuzz/planted.log) steps"
}

minimise() {
  local target kept most=120
  for target in wire control device; do
    kept=$(mktemp -d); mkdir -p "$found/$target"
    "$programs/fuzz-$target" -set_cover_merge=1 "$kept" "fuzz/corpus/$target" "$found/$target" >/dev/null 2>&1 || return 1
    find "fuzz/corpus/$target" -type f -regextype egrep -regex '.*/[0-9a-f]{40}' -delete
    # What libFuzzer kept of the seeds is there under another name: only what is new.
    find "$kept" -type f -size -2049c -printf '%s %p\n' | sort -n | head -n "$most" | cut -d' ' -f2 | while read -r file; do
      grep -qxF "$(sha1sum <"$file")" <(for seed in "fuzz/corpus/$target"/*; do sha1sum <"$seed"; done) || cp "$file" "fuzz/corpus/$target/"
    done
    rm -rf "$kept"
    echo "fuzz: $target keeps $(find "fuzz/corpus/$target" -type f | wc -l) inputs"
  done
}

all() {
  local seconds=$1 running=() failed=0 target
  for target in wire device control; do
    one "$target" -max_total_time="$seconds" &
    running+=($!)
    if [ ${#running[@]} = 2 ]; then wait "${running[0]}" || failed=1; running=("${running[1]}"); fi
  done
  for target in "${running[@]}"; do wait "$target" || failed=1; done
  prove || failed=1
  return $failed
}

build || { echo "fuzz: it does not build"; exit 1; }
case ${1:-60} in
  prove) prove ;;
  one) shift; one "$@" ;;
  minimise) minimise ;;
  *) all "${1:-60}" ;;
esac
