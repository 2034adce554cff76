#!/usr/bin/env bash
# Runs every test, quick ones first, and prints what passed, failed and was skipped.
#
#   e2e/test.sh            everything
#   e2e/test.sh --quick    without the cluster
#
# LAMINA_TEST_LOGS  where the full output goes (default: target/test-logs)
set -uo pipefail
cd "$(dirname "$0")/.."
logs="${LAMINA_TEST_LOGS:-target/test-logs}"
mkdir -p "$logs"
quick=no; [ "${1:-}" = --quick ] && quick=yes
failed=0

say() { printf '\n== %s %s\n' "$(date +%H:%M:%S)" "$*"; }

# step NAME COMMAND...: runs it with its output in a log; on failure shows the end of the log and stops.
step() {
  local name=$1; shift
  say "$name"
  local start=$SECONDS
  if "$@" >"$logs/$name.log" 2>&1; then
    printf '   ok, %s s\n' $((SECONDS - start))
  else
    printf '   FAILED after %s s: %s (log: %s)\n' $((SECONDS - start)) "$*" "$logs/$name.log"
    tail -n 80 "$logs/$name.log"
    failed=1
    finish
  fi
}

finish() {
  say "summary"
  # The workspace runs the tests of this quick step again: counted once.
  [ ! -e "$logs/workspace.log" ] || rm -f "$logs/protocol.log"
  grep -hE '^test result:' "$logs"/*.log 2>/dev/null | awk '
    { for (i = 1; i <= NF; i++) { if ($i == "passed;") p += $(i-1); if ($i == "failed;") f += $(i-1); if ($i == "ignored;") g += $(i-1) } }
    END { printf "tests: %d passed, %d failed, %d ignored\n", p, f, g }'
  local skipped
  skipped=$(grep -hE '^skipped: ' "$logs"/*.log 2>/dev/null | sort -u)
  local count=0
  if [ -n "$skipped" ]; then count=$(printf '%s\n' "$skipped" | wc -l); printf '%s\n' "$skipped"; fi
  local passed fails
  passed=$(grep -hE '^test result:' "$logs"/*.log | grep -oE '[0-9]+ passed' | awk '{s+=$1} END {print s+0}')
  fails=$(grep -hE '^test result:' "$logs"/*.log | grep -oE '[0-9]+ failed' | awk '{s+=$1} END {print s+0}')
  [ "$failed" = 0 ] || [ "$fails" -gt 0 ] || fails=1
  # Which seed of the simulator failed must not be lost with a log that is longer than what is kept of it.
  grep -hE '^failing seed' "$logs"/*.log 2>/dev/null | tail -n 8
  # A skipped check prints its reason from within a test that the runner counts as passed.
  echo "total: $((passed - count)) passed, $fails failed, $count skipped"
  exit "$failed"
}

rm -f "$logs"/*.log
if [ "$quick" = no ]; then
  # The Go programs of the cluster take longest and need nothing of ours: at low priority beside everything else.
  nice -n 15 ./e2e/cluster/build-tools.sh >"$logs/cluster-tools.txt" 2>&1 &
  tools=$!
fi

step format cargo fmt --all --check
step clippy cargo clippy --workspace --all-targets -- -D warnings
step clippy-mutants cargo clippy -p lamina-e2e --features mutants --all-targets -- -D warnings
step tidy cargo test -p lamina-e2e --test tidy
step protocol cargo test -p lamina-protocol -p lamina-client
step portable ./e2e/portable.sh
step fuzz ./fuzz/run.sh 60
export SIMULATED_SEEDS=2000
step simulator cargo test --profile sim -p lamina-e2e --features mutants --lib --test simulation --test oracles -- --nocapture
unset SIMULATED_SEEDS
step mutants cargo run --profile sim -p lamina-e2e --features mutants --bin mutants -- --short --threads 2

if [ "$quick" = no ]; then
  say "waiting for the programs of the cluster"
  if ! wait "$tools"; then echo "   FAILED: see $logs/cluster-tools.txt"; tail -n 20 "$logs/cluster-tools.txt"; failed=1; finish; fi
fi
# All of lamina-e2e has been run: tidy above, its oracles and the simulation in the steps before.
step workspace cargo test --workspace --exclude lamina-e2e -- --nocapture --test-threads=2
finish
