#!/usr/bin/env bash
# ultraep_moe from the outside on the host backend: whole layers, balanced results equal to unbalanced ones, faults that
# must be found, output, exit statuses; and perf/moe-eighths with stand-ins for MPS and mpirun.
# usage: perf_moe.sh ULTRAEP_MOE MOE_CORRUPT MOE_EIGHTHS
set -euo pipefail
moe=$1
corrupt=$2
eighths=$3
# shellcheck source=perf_common.sh
. "$(dirname "$0")/perf_common.sh"
cd "$work"

# runs RECORDS OPTIONS...: three lines a record, the balanced ones equal to the bit.
runs() {
  local records=$1
  shift
  status 0 "$moe" -n 1 -w 1 --hidden 32 --inter 16 "$@"
  [ "$(grep -cv '^#' out)" = $((3 * records)) ] || fail "$(grep -cv '^#' out) lines instead of $((3 * records)): $*"
  awk '!/^#/ && $1 == "balanced" { n++; if ($20 != "0.0e+00" || $21 != "0.0e+00" || $22 > 1e-5) exit 1 }
    END { if (n != '"$records"') exit 1 }' out || fail "balanced is not unbalanced: $* ($(grep ' balanced' out))"
  grep -q '^# check: 0 runs wrong OK$' out || fail "the footer: $*"
  # Weights of 6 bytes and gradients of 12 for each of hidden x inter, and at most 1 % more.
  awk -v slots="$(sed -n 's/.* slots \([0-9]*\),.*/\1/p' out)" '/^# memory for replicas, a rank: / { n++
    if ($9 != slots || $15 < 0 || $15 > (slots > 0 ? 1 : 0)) exit 1 } END { if (n != 1) exit 1 }' out ||
    fail "memory for replicas: $* ($(grep 'memory for' out))"
}
small=(-t 4 --experts 16 --topk 3 --tokens 40 --skew 2)

runs 1 "${small[@]}"
runs 1 "${small[@]}" --slots 1 --skew 1.5
runs 1 "${small[@]}" --slots 4 --align 16 --mode once
runs 1 "${small[@]}" --slots 0
runs 1 "${small[@]}" --layers 3
runs 1 "${small[@]}" --layers 3 --slot-grads clear
runs 1 "${small[@]}" --layers 3 --overlap 1 --expert-ctas 4
runs 1 "${small[@]}" --domain 2 --tolerance 0.2 --mode direct
runs 1 -t 4 --experts 8 --topk 2 --tokens 150 --skew 2 --piece-rows 128
runs 1 -t 2 --experts 4 --topk 2 --tokens 150 --layers 2 --skew 1.5 --align 16 --piece-rows 128
runs 1 "${small[@]}" --replica-rows 4
grep -q 'replica rows 4,' out || fail "no word on the rows that a replica costs"
runs 1 "${small[@]}" --gate 1
grep -q '^#   gate, .*: kept [0-9a-z]* of\|^#   gate, .*: kept' out || fail "--gate 1 must say what it weighed"
runs 1 "${small[@]}" --gate 1 --link-gbps 0.001 --row-us 0.001 --expert-us 5
awk '$1 == "balanced" && $4 != 0 { exit 1 }' out || fail "a gate with a slow link must keep no replica"
runs 1 -t 2 --experts 4 --topk 4 --tokens 30 --skew 1
runs 1 -t 1 --experts 4 --topk 2 --tokens 9 --skew 1
runs 1 -t 8 --experts 64 --topk 8 --tokens 16 --skew 4 --inter 48 --hidden 80
runs 1 -t 4 --experts 16 --topk 2 --tokens 0 --skew 1
status 0 "$moe" -n 1 --hidden 32 --inter 16 "${small[@]}" -c 0
grep -q '^# check: none$' out || fail "-c 0 must say that nothing was checked"
# Partial sums are rounded once more.
status 0 "$moe" -n 1 --hidden 32 --inter 16 "${small[@]}" --combine partial
awk '$1 == "balanced" && ($20 > 1e-2 || $20 == 0) { exit 1 }' out || fail "--combine partial: $(grep ' balanced' out)"

# Balance shows; an even ideal is even.
runs 1 -t 8 --experts 32 --topk 4 --tokens 100 --skew 3 --ideal even
awk '$1 == "unbalanced" && ($2 < 2.5 || $3 != $2) { exit 1 } $1 == "balanced" && ($2 < 2.5 || $3 > 1.1 || $4 == 0) { exit 1 }
  $1 == "ideal" && ($2 > 1.01 || $3 != $2 || $4 != 0 || $16 != "100.0") { exit 1 }' out || fail "imbalances: $(grep -v '^#' out)"

# Drawn by chance, as by default, it is nearly even.
runs 1 -t 8 --experts 32 --topk 4 --tokens 100 --skew 3
awk '$1 == "ideal" && ($2 <= 1.01 || $2 > 1.5 || $3 != $2 || $4 != 0) { exit 1 }' out || fail "random: $(grep -v '^#' out)"
status 2 "$moe" --ideal odd
status 2 "$moe" --streams 2
status 2 "$moe" --piece-rows 100
status 2 "$moe" --piece-rows -128
status 2 "$moe" -B cuda --gemm grouped --piece-rows 128
status 2 "$moe" --overlap 2

# A load trace and a routing trace with unused entries.
awk 'BEGIN {
  printf "step,layer,microbatch,src"; for (e = 0; e < 16; e++) printf ",e%d", e; print "";
  for (src = 0; src < 2; src++) { printf "1,0,0,%d", src; for (e = 0; e < 16; e++) printf ",%d", (e * 5) % 16; print "" }
  printf "1,1,0,-1"; for (e = 0; e < 16; e++) printf ",%d", 1000 * e; print "" }' > t.csv
runs 2 -t 4 --trace t.csv --topk 2 --tokens 30
runs 1 -t 4 --trace t.csv --topk 2 --layer 1 --tokens 20
printf 'token,k0,k1\n0,3,5\n1,0,-1\n2,7,3\n' > r.csv
runs 1 -t 4 --routing r.csv --tokens 20 --experts 8

status 0 "$moe" -n 2 --hidden 32 --inter 16 "${small[@]}" -J o.json
for text in '"okay": true' '"mlp_back"' '"of_ideal"' '"speed_up"' '"joules_per_1000_tokens": null' '"inter": 16'; do
  grep -q "$text" o.json || fail "-J without $text"
done
[ "$(grep -c '"run": ' o.json)" = 3 ] || fail "-J must hold three runs"
# The ranks' rows are the run's, and each rank has its times.
awk '/^   "rows": / { all += $2 } /^     "rows": / { ranks += $2; n++ } /^     "mlp_back": / && $2 > 0 { timed++ }
  END { if (n != 12 || timed != n || ranks != all) exit 1 }' o.json || fail "the ranks: $(grep '"rows"' o.json)"

# A library that goes wrong is found out; undamaged, the same program passes.
wrong=("$corrupt" -n 1 -w 1 --hidden 256 --inter 32 "${small[@]}")
status 0 "${wrong[@]}"
for what in weights grads dispatch unweighted; do
  status 1 env PERF_CORRUPT=$what "${wrong[@]}" -J o.json
  grep -q '^# check: [1-9] runs wrong FAILED$' out || fail "damage not counted: $what"
  grep -q ' WRONG ' out || fail "damage not shown: $what"
  grep -q '"okay": false' o.json || fail "damage not in the JSON: $what"
done
# Wrong in the same way in all runs: only the calculation of a token and the identities can tell.
grep -q '^# check: 3 runs wrong FAILED$' out || fail "unweighted sums must be wrong in every run"
status 1 env PERF_CORRUPT=error "${wrong[@]}"
grep -q 'rank [1-3]: ultraepAllToAll.*: internal error' err || fail "message of a failing library"

# Faults.
status 1 env CUDA_VISIBLE_DEVICES=-1 "$moe" -B cuda
grep -Eq 'this build has no CUDA backend|no CUDA device can be used: .*; -B host' err || fail "message of -B cuda: $(cat err)"
status 2 env PMI_SIZE=4 "$moe"
status 2 "$moe" --inter 100
grep -q -- '--inter must be a multiple of 16' err || fail "message of --inter"
status 2 "$moe" --hidden 100
status 2 "$moe" --inter 0
status 2 "$moe" --layers 0
status 2 "$moe" --layers 65
status 2 "$moe" -w 0
status 2 "$moe" --gemm grouped
status 2 "$moe" -B cuda --gemm many
status 2 "$moe" --link-gbps 5
grep -q -- 'need --gate 1' err || fail "message of --link-gbps without a gate"
status 2 "$moe" --gate 1 --link-gbps -5
status 2 "$moe" --balance 1
status 2 "$moe" stray
status 2 "$moe" --experts 63
status 1 "$moe" --skew 500
status 1 "$moe" --trace none.csv
status 1 "$moe" --hidden 65536 --inter 65536 --experts 4096
grep -q 'ask for fewer --tokens, or smaller --hidden or --inter' err || fail "message of too much memory"
status 1 "$moe" -n 1 --hidden 32 --inter 16 "${small[@]}" -J /nonexistent/o.json
status 0 "$moe" --help
for text in 'dW2, W2' 'rank that took least' 'as many tokens and assignments'; do
  grep -q "$text" <(tr -s ' \n' ' ' < out) || fail "--help must say '$text'"
done

# moe-eighths: what it starts, sets and ends. The stand-ins write down what they were asked.
mkdir bin
cat > bin/nvidia-cuda-mps-control << 'STANDIN'
#!/usr/bin/env bash
if [ "${1:-}" = -d ]; then
  echo "start $CUDA_MPS_PIPE_DIRECTORY ${CUDA_MPS_ACTIVE_THREAD_PERCENTAGE:-none}" >> "$MPS_LOG"
  [ "${MPS_FAILS:-}" != 1 ]
else
  echo "$(cat) $CUDA_MPS_PIPE_DIRECTORY" >> "$MPS_LOG"
fi
STANDIN
cat > bin/mpirun << 'STANDIN'
#!/usr/bin/env bash
echo "percent $CUDA_MPS_ACTIVE_THREAD_PERCENTAGE ctas $NCCL_MAX_CTAS sharing $NCCL_MULTI_RANK_GPU_ENABLE" >> "$MPS_LOG"
while [ "$1" != -n ]; do shift; done
ranks=$2 program=$3
shift 5 # -n N PROGRAM -B cuda
exec "$program" -B host -t "$ranks" "$@"
STANDIN
chmod +x bin/*
export PATH=$work/bin:$PATH MPS_LOG=$work/mps.log
few=(--ultraep-moe "$moe" --hidden 32 --inter 16 --experts 16 --iters 1 --tokens 16 --ranks 4 --folder "$work")
head -n 3 t.csv > smartmoe-x.csv
status 0 "$eighths" "${few[@]}" --skew 1.5,2 --traces smartmoe-x --small 8 --logs "$work/logs" -- -w 1
[ "$(grep -c '^skew\|^smartmoe' out)" -ge 15 ] || fail "moe-eighths: lines of the table: $(cat out)"
[ "$(grep -c '^percent 25 ctas 4 sharing 1$' mps.log)" = 5 ] || fail "moe-eighths: settings: $(cat mps.log)"
[ "$(head -n 1 mps.log | cut -d ' ' -f 1,3)" = 'start none' ] || fail "moe-eighths: MPS must start without a share"
pipe=$(sed -n 's/^start \(.*\) none$/\1/p' mps.log)
[ "$(tail -n 1 mps.log)" = "quit $pipe" ] || fail "moe-eighths: MPS must be ended: $(cat mps.log)"
[ ! -e "${pipe%/pipe}" ] || fail "moe-eighths: its folder must be gone"
: > mps.log
status 1 "$eighths" "${few[@]}" --skew 500 --traces none --small 0 --logs "$work/logs2"
grep -q 'FAILED: skew 500 (exit status 1' err || fail "moe-eighths: a run that fails must be named"
grep -q 'FAILED: none (no such trace' err || fail "moe-eighths: a trace that is not there must be named"
grep -q '^quit ' mps.log || fail "moe-eighths: MPS must be ended after a failure"
: > mps.log
status 1 env MPS_FAILS=1 "$eighths" "${few[@]}"
grep -q 'MPS does not start' err || fail "moe-eighths: message of an MPS that does not start"
! grep -q '^quit' mps.log || fail "moe-eighths: must not end what did not start"
status 2 "$eighths" --ranks
status 2 "$eighths" --tokens many
status 2 "$eighths" --unknown 1
status 1 "$eighths" --ultraep-moe /nonexistent
echo "perf_moe.sh: passed"
