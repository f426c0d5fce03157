#!/usr/bin/env bash
# ultraep_perf -B cuda from the outside, ranks as threads: small checked runs of every kind, and timed ones.
# Leaves with 77, skipped, where there is no GPU or no NCCL to load.
# usage: perf_cuda.sh ULTRAEP_PERF
set -euo pipefail
perf=$1
# shellcheck source=perf_common.sh
. "$(dirname "$0")/perf_common.sh"
cd "$work"

small=(-B cuda -t 4 --experts 16 --topk 3 --tokens 40 --skew 2 --hidden 256 -n 2 -w 1)

if ! "$perf" "${small[@]}" > out 2> err; then
  grep -E 'no CUDA device can be used|NCCL cannot be loaded|NCCL .* is too old' err && exit 77
  fail "the first run: $(cat err) $(grep 'first fault' out)"
fi
# runs LINES OPTIONS...: LINES result lines; checked ones with #wrong 0.
runs() {
  local lines=$1
  shift
  "$perf" "${small[@]}" "$@" > out 2> err || fail "$*: $(head -c 500 err) $(grep 'first fault' out)"
  [ "$(grep -cv '^#' out)" = "$lines" ] || fail "$(grep -cv '^#' out) lines instead of $lines: $*"
  grep -v '^#' out | awk '$16 != "0" && $16 != "N/A" { exit 1 }' || fail "#wrong is not 0: $*"
  grep -q '^# Out of bounds values : 0 OK$' out || fail "the footer: $*"
}

runs 2
grep -v '^#' out | awk '$16 != "0" { exit 1 }' || fail "a checked run must say so"
grep -q '^# copy rate: [0-9.]* GB/s' out || fail "no copy rate"
# What perf/sweep reads; it is not there where the library's counters say otherwise.
for mode in direct once; do
  runs 2 --mode $mode
  [ "$(grep -cE '^# balance [01]: busiest link, bytes of one call: dispatch [1-9][0-9]*, combine [1-9][0-9]*$' out)" = 2 ] ||
    fail "no busiest link: $(grep '^# balance' out)"
done
for type in bfloat16 half float fp8; do
  runs 2 -d $type --align 8 --mode direct
  runs 2 -d $type --mode once --combine partial
done
runs 2 -t 2 --ctas 4 -m 3
runs 2 --tokens 0
for type in float32 bfloat16; do
  runs 2 --slots 4 --expert-bytes 40K --grads $type
  runs 1 --balance 1 --expert-bytes 40K --grads $type --graph 1 -c 0
  grep -qE '^# balance 1: of the copy rate: weights [0-9.]+ %, gradients [0-9.]+ %, in [0-9.]+ us$' out ||
    fail "no rates of weights and gradients: $(grep '^# balance' out)"
done
runs 1 --balance 1 --graph 1 -J o.json
grep -q '"gpu"' o.json || fail "-J says nothing of the GPU"
# Timed, with the baseline: every time there and above zero.
for graph in 0 1; do
  runs 2 -c 0 --graph $graph --baseline nccl
  grep -v '^#' out | awk '{ if ($8 <= 0 || $10 <= 0 || $13 <= 0 || $17 <= 0 || $18 <= 0 || $23 <= 0 || $25 <= 0) exit 1 }' ||
    fail "a time is not above zero: $(grep -v '^#' out)"
done
echo "perf_cuda.sh: passed"
