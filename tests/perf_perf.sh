#!/usr/bin/env bash
# ultraep_perf from the outside: small runs of every kind with nothing wrong, output, and exit statuses.
# usage: perf_perf.sh ULTRAEP_PERF PERF_CORRUPT
set -euo pipefail
perf=$1
corrupt=$2
# shellcheck source=perf_common.sh
. "$(dirname "$0")/perf_common.sh"
cd "$work"

# runs LINES OPTIONS...: LINES result lines, each with #wrong 0.
runs() {
  local lines=$1
  shift
  status 0 "$perf" -n 2 -w 1 --hidden 256 "$@"
  [ "$(grep -cv '^#' out)" = "$lines" ] || fail "$(grep -cv '^#' out) lines instead of $lines: $*"
  [ "$(grep -v '^#' out | awk '$16 == 0' | wc -l)" = "$lines" ] || fail "#wrong is not 0: $*"
  grep -q '^# Out of bounds values : 0 OK$' out || fail "the footer: $*"
}
# busiest LINES: o.json knows the busiest link of each line, for dispatch and for combine.
busiest() {
  [ "$(grep -A 2 '"busiest_link_bytes"' o.json | grep -Ec '"(dispatch|combine)": [1-9][0-9]*,?$')" = $((2 * $1)) ] ||
    fail "the busiest link: $(grep -A 2 '"busiest_link_bytes"' o.json)"
}
small=(-t 4 --experts 16 --topk 3 --tokens 40 --skew 2)

for type in bfloat16 half float fp8; do
  for mode in direct once; do
    # What crosses between ranks by the plan is what the library has counted, else it would not be known.
    runs 2 "${small[@]}" -d $type --mode $mode --align 8 -J o.json
    busiest 2
    runs 2 "${small[@]}" -d $type --mode $mode --combine partial -J o.json
    busiest 2
  done
done
runs 2 "${small[@]}" --slots 0
runs 2 "${small[@]}" --slots 4 --tolerance 0.3 --seed 7
runs 2 "${small[@]}" --domain 2
runs 2 "${small[@]}" --replica-rows 8 -J o.json
grep -q 'replica rows 8,' out && grep -q '"replica_rows": 8,' o.json || fail "no word on the rows that a replica costs"
busiest 2
runs 2 "${small[@]}" --replica-rows 1048576
awk '!/^#/ { if ($7 != 0) exit 1 }' out || fail "replicas that cost more than they take"
runs 2 "${small[@]}" --expert-bytes 0
grep -q '^# cost gate: off' out || fail "no word on the gate being off"
! grep -q '^#   gate' out || fail "a gate that nobody asked for"
runs 2 "${small[@]}" --expert-bytes 0 --gate-bytes 1G
[ "$(grep -c '^#   gate, .*: kept none of [1-9][0-9]* replicas: ' out)" = 1 ] || fail "no word on what the gate held back"
awk '!/^#/ { if ($7 != 0) exit 1 }' out || fail "the gate let replicas through"
runs 1 "${small[@]}" --balance 1 --tokens 4000 --gate-bytes 1K -J o.json
grep -Eq '^#   gate, .*: kept (all )?[1-9]' out || fail "no word on what the gate kept"
[ "$(awk '!/^#/ { print $7 }' out)" = "$(sed -n 's/^ *"kept": \([0-9]*\),$/\1/p' o.json)" ] || fail "the gate's count in the JSON"
runs 1 "${small[@]}" --balance 0 -m 3
for type in float32 bfloat16; do
  runs 2 "${small[@]}" --slots 4 --grads $type --expert-bytes 4128 -m 2 -J o.json
  awk '!/^#/ && $17 <= 0 { exit 1 }' out || fail "the time of gradients"
  grep -q '"grads_us": [0-9]' o.json || fail "gradients are not in the JSON"
done
runs 1 "${small[@]}" --balance 1 -w 0
runs 2 -t 1 --experts 4 --topk 2 --tokens 9 --skew 1
runs 2 -t 4 --experts 16 --tokens 0 --skew 2
runs 2 -t 8 --experts 8 --topk 8 --tokens 5 --skew 1
runs 6 -t 4 --experts 16 --topk 3 --skew 2 -b 1K -e 16K -f 4
status 0 "$perf" -n 2 -c 0 --hidden 256 "${small[@]}"
grep -q ' N/A  zipf' out || fail "-c 0 must say that nothing was checked"

# Balance shows: the same traffic, before and after.
runs 2 -t 8 --experts 32 --topk 4 --tokens 200 --skew 3
awk '!/^#/ { if ($5 < 2.5 || ($4 == 0 && $6 != $5) || ($4 == 1 && $6 > 1.1)) exit 1 }' out || fail "imbalances"

# A load trace: exact loads and scaled ones; summed and by source. A routing trace.
awk 'BEGIN {
  printf "step,layer,microbatch,src"; for (e = 0; e < 16; e++) printf ",e%d", e; print "";
  for (src = 0; src < 2; src++) { printf "1,0,0,%d", src; for (e = 0; e < 16; e++) printf ",%d", (e * 5) % 16; print "" }
  printf "1,1,0,-1"; for (e = 0; e < 16; e++) printf ",%d", 1000 * e; print "" }' > t.csv
runs 4 -t 4 --trace t.csv --topk 2 --tokens 30
runs 2 -t 4 --trace t.csv --topk 2 --limit 1
runs 2 -t 2 --trace t.csv --topk 4 --layer 1 -b 4K
printf 'token,k0,k1\n0,3,5\n1,0,-1\n2,7,3\n' > r.csv
runs 2 -t 4 --routing r.csv
runs 2 -t 4 --routing r.csv --tokens 20 --experts 8 --combine partial

# JSON, well-formed enough to hold what the table says.
status 0 "$perf" -n 2 --hidden 256 "${small[@]}" -J o.json
for text in '"nwrong": 0' '"okay": true' '"dispatch"' '"average_bus_bandwidth"'; do
  grep -q "$text" o.json || fail "-J without $text"
done

# A library that damages one byte is found out, in numbers, words and exit status; undamaged, the same program passes.
status 0 "$corrupt" -n 2 --hidden 256 "${small[@]}"
for what in dispatch combine weights grads; do
  status 1 env PERF_CORRUPT=$what "$corrupt" -n 2 --hidden 256 "${small[@]}" --balance 1 --grads float32 -J o.json
  grep -q '^# Out of bounds values : [1-9][0-9]* FAILED$' out || fail "damage not counted: $what"
  grep -v '^#' out | awk '$16 == 0 { exit 1 }' || fail "#wrong is 0: $what"
  grep -q '"okay": false' o.json || fail "damage not in the JSON: $what"
  grep -q '^# first fault: .' out || fail "damage not described: $what"
done
# A library that fails on some ranks ends the run with a message, not a hang.
status 1 env PERF_CORRUPT=error "$corrupt" -n 2 --hidden 256 "${small[@]}"
grep -q 'rank [1-3]: ultraepAllToAll.*: internal error' err || fail "message of a failing library"

# The bytes from rank to rank of the first line: with masters only a row's sum is what the rank sends.
status 0 "$perf" -n 1 --hidden 256 "${small[@]}" --matrix m.txt
awk '{ sum = 0; for (i = 1; i <= NF; i++) sum += $i; if (NF != 4 || sum != 40 * 3 * 512) exit 1 }
  END { if (NR != 4) exit 1 }' m.txt || fail "the matrix: $(cat m.txt)"
# The busiest link is that of the rank that sends or gets most; in mode once it carries less.
awk '{ for (i = 1; i <= NF; i++) if (i != NR) { sent[NR] += $i; got[i] += $i } }
  END { for (r = 1; r <= NR; r++) { if (sent[r] > most) most = sent[r]; if (got[r] > most) most = got[r] } print most }' \
  m.txt > most
for mode in direct once; do
  status 0 "$perf" -n 1 --hidden 256 "${small[@]}" --balance 0 --mode $mode -J o.json
  sed -n '/"busiest_link_bytes"/,/}/s/.*"dispatch": \([0-9]*\),$/\1/p' o.json > busiest-$mode
done
cmp -s most busiest-direct || fail "the busiest link: $(cat busiest-direct) instead of $(cat most)"
[ "$(cat busiest-once)" -lt "$(cat most)" ] || fail "the busiest link of mode once: $(cat busiest-once)"
status 0 "$perf" -n 1 --hidden 256 "${small[@]}" --balance 1 --gate-bytes 1K -J o.json
grep -A 1 '"busiest_link_bytes"' o.json | grep -q '"dispatch": null' || fail "a busiest link that nobody knows"
status 1 "$perf" -n 1 --hidden 256 "${small[@]}" --matrix m.txt --gate-bytes 1M --balance 1
grep -q 'not known beforehand' err || fail "message of --matrix with the cost gate"
status 1 "$perf" -n 1 --hidden 256 "${small[@]}" --matrix /nonexistent/m.txt

# Faults.
# Without a GPU, -B cuda says what is missing: the backend, or in a build that has it a device that can be used.
status 1 env CUDA_VISIBLE_DEVICES=-1 "$perf" -B cuda
grep -Eq 'this build has no CUDA backend; use -B host|no CUDA device can be used: .*; -B host' err ||
  fail "message of -B cuda: $(cat err)"
[ ! -s out ] || fail "-B cuda without a device printed a report"
# Started by mpirun: ranks of the host are threads.
status 2 env PMI_SIZE=4 "$perf"
grep -q 'start it without mpirun' err || fail "message of -B host under mpirun"
status 2 env OMPI_COMM_WORLD_SIZE=4 "$perf" -B cuda -t 3
grep -q 'a rank is a process, and these are 4' err || fail "message of -t under mpirun"
status 2 "$perf" --graph 1
status 2 "$perf" --grads fp8
status 2 "$perf" --grads float32 --expert-bytes 0
status 2 "$perf" --grads float32 --gate-bytes 1M
status 2 "$perf" --baseline nccl
grep -q -- '--graph and --baseline need -B cuda' err || fail "message of --baseline on the host"
status 2 "$perf" -B cuda --baseline mpi
status 2 "$perf" -B cuda --graph 2
status 2 "$perf" -B cuda --ctas -1
status 2 "$perf" -B tpu
status 2 "$perf" -t 0
status 2 "$perf" -b 1K -e 1
status 2 "$perf" -b 1Q
status 2 "$perf" --tokens 5 -b 1K
status 2 "$perf" --trace t.csv --skew 2
status 2 "$perf" --trace t.csv --experts 16
status 2 "$perf" --routing r.csv --topk 2
status 2 "$perf" --hidden 100
status 2 "$perf" --experts 63
status 2 "$perf" --limit 2
status 2 "$perf" stray
status 1 "$perf" --skew 500
status 1 "$perf" --trace none.csv
status 1 "$perf" -t 3 --trace t.csv
status 1 "$perf" -t 4 --routing r.csv --experts 4
grep -q 'expert 5 is outside -1..3' err || fail "message of an expert out of range"
status 1 "$perf" -n 1 --hidden 256 "${small[@]}" -J /nonexistent/o.json
# More tokens than memory: said, not tried.
awk 'BEGIN { printf "step,layer,microbatch,src"; for (e = 0; e < 16; e++) printf ",e%d", e; printf "\n1,0,0,-1";
  for (e = 0; e < 16; e++) printf ",400000"; print "" }' > huge.csv
status 1 "$perf" -t 4 --trace huge.csv --topk 2 --hidden 65536
grep -q 'ask for fewer with --tokens' err || fail "message of too many tokens"
status 0 "$perf" --help
grep -q 'busbw = algbw \* (R-1)/R' <(tr -s ' \n' ' ' < out) || fail "--help must define busbw"
grep -q -- '-B cuda -c 0: 10' out || fail "--help must say what -m is with -B cuda"
grep -q 'counts known beforehand' <(tr -s ' \n' ' ' < out) || fail "--help must say what the baseline is spared"
echo "perf_perf.sh: passed"
