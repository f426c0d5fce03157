#!/usr/bin/env bash
# ultraep_moe -B cuda from the outside, ranks as threads: small layers, each checked by the tool itself.
# Leaves with 77, skipped, where there is no GPU, or no NCCL or cuBLAS to load.
# usage: perf_moe_cuda.sh ULTRAEP_MOE
set -euo pipefail
moe=$1
# shellcheck source=perf_common.sh
. "$(dirname "$0")/perf_common.sh"
cd "$work"

small=(-B cuda -t 4 --experts 16 --topk 3 --tokens 200 --skew 2 --hidden 256 --inter 128 -n 2 -w 1)

if ! "$moe" "${small[@]}" > out 2> err; then
  grep -E 'no CUDA backend|no CUDA device can be used|(NCCL|cuBLAS) cannot be loaded|NCCL .* is too old' err && exit 77
  fail "the first run: $(cat err) $(grep 'WRONG' out)"
fi
# runs OPTIONS...: three lines, nothing wrong, every time of an exchange and of the products above zero.
runs() {
  "$moe" "${small[@]}" "$@" > out 2> err || fail "$*: $(head -c 500 err) $(grep 'WRONG' out)"
  [ "$(grep -cv '^#' out)" = 3 ] || fail "$(grep -cv '^#' out) lines instead of 3: $*"
  grep -v '^#' out | awk '{ for (i = 5; i <= 14; i++) if (i != 6 && i != 13 && $i <= 0) exit 1 }' ||
    fail "a time is not above zero: $* ($(grep -v '^#' out))"
}

runs
runs --gemm grouped
runs --layers 3
# Two ranks, as ranks that are threads on one GPU share its 32 hardware queues, too: streams of one that stand behind
# another's in a queue wait for it.
runs -t 2 --layers 3 --overlap 1 --streams 3 --ctas 8 --expert-ctas 4
runs --overlap 1 --gemm grouped
runs --layers 2 --gemm grouped --align 16
runs -t 2 --slots 1 --mode once
runs --combine partial --mode direct
runs --gate 1
runs -c 0 -J o.json
grep -q '"seconds"' o.json || fail "-J holds no times"
echo "perf_moe_cuda.sh: passed"
