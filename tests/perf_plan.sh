#!/usr/bin/env bash
# ultraep_plan from the outside: options, exit statuses, output, and JSON that agrees with the trace.
# usage: perf_plan.sh ULTRAEP_PLAN PERF_PLAN_CHECK [TRACES]
set -euo pipefail
plan=$1
check=$2
traces=${ULTRAEP_TRACES:-${3:-}}
# shellcheck source=perf_common.sh
. "$(dirname "$0")/perf_common.sh"
cd "$work"


# A trace of 2 layers, 8 sources, 32 experts, and one summed over its sources, with skews that move about.
awk 'BEGIN {
  printf "step,layer,microbatch,src"; for (e = 0; e < 32; e++) printf ",e%d", e; print "";
  for (layer = 0; layer < 2; layer++) for (src = 0; src < 8; src++) {
    printf "5,%d,0,%d", layer, src;
    for (e = 0; e < 32; e++) printf ",%d", int(4000 / (1 + (e * 7 + layer * 5) % 32)) + (src * 13 + e) % 9; print "" }
  printf "5,2,0,-1"; for (e = 0; e < 32; e++) printf ",%d", 100000 * (e % 5) + e; print "" }' > t.csv

# Without balance, records on as many, fewer and more ranks; domains; tolerance; the JSON agrees each time.
for ranks in 1 4 8 16 32; do
  for slots in 0 1 2; do
    status 0 "$plan" --trace t.csv --ranks $ranks --slots $slots --json o.json
    "$check" o.json t.csv $ranks $slots $ranks 99 99 > /dev/null
  done
done
status 0 "$plan" --trace t.csv --ranks 16 --slots 2 --domain 4 --json o.json
"$check" o.json t.csv 16 2 4 99 99 > /dev/null
status 0 "$plan" --trace t.csv --ranks 8 --slots 4 --json o.json
"$check" o.json t.csv 8 4 8 1.001 1.001 > /dev/null
status 0 "$plan" --trace t.csv --ranks 8 --slots 4 --tolerance 0.5 --json loose.json
"$check" loose.json t.csv 8 4 8 1.501 1.501 > /dev/null
! cmp -s o.json loose.json || fail "tolerance changes nothing"
# Replicas' worth: none is as without; a little leaves rows where they are, and more than all rows all of them.
status 0 "$plan" --trace t.csv --ranks 8 --slots 4 --replica-rows 0 --json dear.json
[ "$(sed 's/"plan_us":[^,}]*//g' dear.json)" = "$(sed 's/"plan_us":[^,}]*//g' o.json)" ] || fail "--replica-rows 0"
status 0 "$plan" --trace t.csv --ranks 8 --slots 4 --replica-rows 200 --json dear.json
"$check" dear.json t.csv 8 4 8 1.2 1.2 > /dev/null
grep -q 'replica rows 200,' out || fail "no word on the rows that a replica costs"
grep -q '"replica_rows":200,' dear.json || fail "--json without replica_rows"
[ "$(tail -n 1 dear.json | grep -o '"planned":[^,]*')" != "$(tail -n 1 o.json | grep -o '"planned":[^,]*')" ] ||
  fail "--replica-rows 200 changes nothing"
status 0 "$plan" --trace t.csv --ranks 8 --slots 4 --replica-rows 1048576
grep -q '^# worst .* 0 *0 *0 ' out || fail "replicas that cost more than they take"
# The cost gate. A copy that costs far more than all rows: no replicas; for next to nothing: all; between, the cheapest.
gated=(--trace t.csv --ranks 8 --slots 4 --gate)
status 0 "$plan" "${gated[@]}" --row-ns 0.001 --link 0.1 --expert-bytes 90M
grep -q '^# worst .* 0 *0 *0 ' out || fail "the cost gate let replicas through"
grep -q '^#   gate: kept none of [1-9]' out || fail "no word on what the gate held back"
grep -q '^# gate: kept 0 of [1-9]' out || fail "no sum of what the gate held back"
status 0 "$plan" "${gated[@]}" --row-ns 4000 --link 1000000
grep -q '^#   gate: kept all [1-9]' out || fail "no word on what the gate let pass"
status 0 "$plan" "${gated[@]}" --row-ns 10 --link 20 --expert-bytes 4M
grep -Eq '^#   gate: kept ([1-9][0-9]*) of [1-9].*; all: ' out || fail "no word on what the gate thinned: $(cat out)"
status 0 "$plan" --trace t.csv --ranks 8 --slots 4
! grep -q 'gate: kept' out || fail "a gate that nobody asked for"
grep -q 'cost gate off' out || fail "no word on the gate being off"
for gate in "" =direct =relay; do
  for link in 0.1 10 100 450 1e6; do
    status 0 "$plan" --trace t.csv --ranks 8 --slots 4 --gate$gate --link $link --row-ns 10 --json o.json
    "$check" o.json t.csv 8 4 8 99 99 > /dev/null
    grep -q '"gate":{"on":true' o.json || fail "--json without the gate"
  done
done

# The critical path of the copies: the links' own time alone, which the check works out, then the defaults.
for ranks in 8 16; do
  status 0 "$plan" --trace t.csv --ranks $ranks --slots 2 --cost --tile 1 --hop-us 0 --link 1,450,900 --json o.json
  "$check" o.json t.csv $ranks 2 $ranks 99 99 > /dev/null
  [ "$(grep -o '"gbps":450' o.json | wc -l)" = 4 ] || fail "--cost: not every record and the summary has its links"
done
sed 's/"sends":\([0-9]\)/"sends":9\1/' o.json > bad.json
status 1 "$check" bad.json t.csv 16 2 16 99 99
# 64 ranks, the traffic and the links of the README: at most half of direct sending, and 0.188 ms.
records=10
[ -z "${SANITIZED:-}" ] || records=2
for skew in 1.5 2 3; do
  status 0 "$plan" --zipf $skew --ranks 64 --experts 256 --slots 2 --tolerance 0.005 --records $records --cost
  grep -q '^#   712 GB/s, a copy 53.0 us: direct .* (rank [0-9]* sends [0-9]*, rank [0-9]* receives 1); relay ' out ||
    fail "--cost: the line of a record"
  sed -n 's/^# copies at .*, relay .* (worst \([0-9.]*\)), .* of direct (worst \([0-9.]*\))$/\1 \2/p' out > bars
  awk '{ if ($1 <= 0 || $1 > 188 || $2 > 0.5) exit 1 } END { if (NR != 3) exit 1 }' bars ||
    fail "relays take too long, skew $skew: $(cat bars)"
done

# --json -: nothing but JSON on stdout; one object a record and the summary.
status 0 "$plan" --trace t.csv --ranks 8 --slots 2 --chart always --json -
[ "$(wc -l < out)" = 4 ] || fail "--json - wrote $(wc -l < out) lines"
cp out o.json
"$check" o.json t.csv 8 2 8 99 99 > /dev/null
status 0 "$plan" --trace t.csv --ranks 8 --slots 2 --layer 1 --limit 1 --repeat 3 --json -
[ "$(wc -l < out)" = 2 ] || fail "--layer or --limit"
grep -q '"layer":1,' out || fail "--layer 1"

# The check itself fails where it should.
sed 's/\[0,0,\([0-9]\)/[0,0,9\1/' o.json > bad.json
status 1 "$check" bad.json t.csv 8 2 8 99 99
head -n 3 o.json > bad.json
status 1 "$check" bad.json t.csv 8 2 8 99 99
status 1 "$check" o.json t.csv 8 2 8 0.5 99

# zipf: reproducible, other with another seed.
zipf=(--zipf 2 --ranks 16 --experts 64 --topk 4 --tokens 512 --slots 2 --json -)
status 0 "$plan" "${zipf[@]}" --seed 3 --records 2
sed 's/"plan_us":[^,}]*//g' out > first
"$check" out - 16 2 16 1.02 1.02 > /dev/null
status 0 "$plan" "${zipf[@]}" --seed 3 --records 2
sed 's/"plan_us":[^,}]*//g' out | cmp -s - first || fail "the same seed gave other plans"
status 0 "$plan" "${zipf[@]}" --seed 4 --records 2
! sed 's/"plan_us":[^,}]*//g' out | cmp -s - first || fail "another seed gave the same plans"

# The chart: as wanted, not on a file by itself, and in the locale's characters.
status 0 "$plan" --trace t.csv --ranks 8 --slots 2
! grep -q '^rank 7' out || fail "a chart without a terminal"
status 0 env LC_ALL=C "$plan" --trace t.csv --ranks 8 --slots 2 --chart always
grep -q '^rank 7 .*[0-9]$' out || fail "no chart"
LC_ALL=C grep -q '####' out || fail "a chart in ASCII"
status 0 "$plan" --trace t.csv --ranks 8 --slots 2 --chart never
grep -q '^# 3 records: mean imbalance' out || fail "no summary"

# Faults: the message says what and where.
status 2 "$plan" --trace t.csv --slots 2
status 2 "$plan" --trace t.csv --ranks 8
status 2 "$plan" --ranks 8 --slots 2
status 2 "$plan" --trace t.csv --zipf 2 --ranks 8 --slots 2
status 2 "$plan" --trace t.csv --ranks 8x --slots 2
status 2 "$plan" --trace t.csv --ranks 8 --slots 65
status 2 "$plan" --trace t.csv --ranks 8 --slots 2 --domain 3
status 2 "$plan" --trace t.csv --ranks 8 --slots 2 --tolerance nan
status 2 "$plan" --trace t.csv --ranks 8 --slots 2 --cost 1
for bad in -1 1048577 1.5 x ""; do status 2 "$plan" --trace t.csv --ranks 8 --slots 2 --replica-rows "$bad"; done
for bad in --gate=no --link=1,2,x --link= --link=0 --link=1,2,3,4,5,6,7,8,9 --row-ns=0 --tflops=-1 --hop-us=nan \
  --expert-bytes=0 --tile=1G "--link=0.001 --cost" "--gate --tflops=0.001"; do
  # shellcheck disable=SC2086
  status 2 "$plan" --trace t.csv --ranks 8 --slots 2 $bad
done
status 2 "$plan" --trace t.csv --ranks 8 --slots 2 stray
status 1 "$plan" --zipf 31 --ranks 8 --slots 2
grep -q 'skew 31 is outside' err || fail "message of a skew out of reach"
status 1 "$plan" --trace none.csv --ranks 8 --slots 2
grep -q 'none.csv: cannot be opened' err || fail "message of a missing file"
status 1 "$plan" --trace t.csv --ranks 7 --slots 2
grep -q '32 experts are no multiple of 7 ranks' err || fail "message of ranks that do not divide"
sed '3s/,[0-9]*$/,x/' t.csv > bad.csv
status 1 "$plan" --trace bad.csv --ranks 8 --slots 2
grep -q 'bad.csv:3:[0-9]*: ' err || fail "message without line and column"
status 1 "$plan" --trace t.csv --ranks 8 --slots 2 --json /nonexistent/o.json
status 1 "$plan" --trace t.csv --ranks 8 --slots 2 --layer 77
if [ -w /dev/full ]; then
  status 1 "$plan" --trace t.csv --ranks 8 --slots 2 --json /dev/full
  "$plan" --trace t.csv --ranks 8 --slots 2 > /dev/full 2> err && fail "a full disk went unnoticed"
fi
status 0 "$plan" --help
grep -q 'realised counts the assignments' out || fail "--help"

# Real loads, where they are: the quality that is promised.
real() {
  [ -n "$traces" ] && [ -f "$traces/$1.csv" ] || return 0
  status 0 "$plan" --trace "$traces/$1.csv" --ranks "$2" --slots "$3" --json o.json
  "$check" o.json "$traces/$1.csv" "$2" "$3" "$2" "$4" "$5"
}
real smartmoe-step1001 16 2 1.001 1.001
real smartmoe-step1001 16 1 1.001 2.42
real smartmoe-step1001 32 2 1.001 99
real deepseek-v3-prefill-in1024 16 2 1.004 1.05
real deepseek-v3-prefill-in1024 64 2 1.0005 99
echo "perf_plan.sh: passed"
