#!/usr/bin/env bash
# perf/sweep with stand-ins for everything that it runs: what it asks of them, the table and the JSON document; parts that
# fail, hang or find no time; resuming; options at fault; machines with one GPU and with none.
# usage: perf_sweep.sh PERF_SWEEP ULTRAEP_PERF LINKS_FAKE PERF_JSON
set -euo pipefail
sweep=$1
perf=$2
links_fake=$3
json=$4
# shellcheck source=perf_common.sh
. "$(dirname "$0")/perf_common.sh"
cd "$work"

# ---- the stand-ins ----

mkdir -p bin build/perf build/plugin nccl
touch build/plugin/libultraep.so
cp "$links_fake" build/perf/ultraep_links
# What the tool itself writes, though of the host.
"$perf" -t 2 --tokens 8 --hidden 64 --skew 1 -n 1 -J sample.json > /dev/null

# Each notes its call, then fails or hangs where its words are those of FAKE_FAIL or FAKE_HANG, or takes FAKE_SECONDS.
cat > bin/fake << 'END'
#!/usr/bin/env bash
words="${0##*/} $*"
echo "$words" >> "$FAKE_CALLS"
if [ -n "${FAKE_FAIL:-}" ] && [[ $words == *"$FAKE_FAIL"* ]]; then
  printf 'going\nbroken "here"\n' >&2
  exit 5
fi
if [ -n "${FAKE_HANG:-}" ] && [[ $words == *"$FAKE_HANG"* ]]; then
  trap '' TERM
  while :; do sleep 1; done
fi
[[ -z ${FAKE_SECONDS:-} || $words == nvidia-smi* ]] || sleep "$FAKE_SECONDS"
json='' balance=both tokens=0 ranks=0 matrix=''
while [ $# -gt 0 ]; do
  case $1 in
  -J) json=$2 ;;
  -t) ranks=$2 ;;
  --balance) balance=$2 ;;
  --baseline) base=$2 ;;
  --matrix) matrix=$2 ;;
  esac
  shift
done
[ -z "$json" ] || cp "$FAKE_SAMPLE" "$json"
[ -z "$matrix" ] || printf '10 20\n70000 30\n' > "$matrix"
END
for tool in ultraep_perf ultraep_moe; do cp bin/fake build/perf/$tool; done
# Dispatch and combine take 1000 and 900 us without balance, 800 and 750 with; 330 and 270 MB go over the busiest link.
cat >> build/perf/ultraep_perf << 'END'
line() {
  echo "  58720256    29360128 bfloat16       $1   4.0000   $2        0   31.00     0.00  $3  58.72  51.38  $4  65.24  57.09    N/A  $5    800.0  80.0    800.0  88.9    6.50${base:+  2600.0   2.60   2700.0   3.00}  zipf"
}
[ "$balance" = 1 ] || line 0 4.0000 1000.0 900.0 1010.0
[ "$balance" = 0 ] || line 1 1.0000 800.0 750.0 820.0
echo "#"
echo "# balance 0: busiest link, bytes of one call: dispatch 330000000, combine 270000000"
echo "# balance 1: busiest link, bytes of one call: dispatch 264000000, combine 225000000"
echo "# Out of bounds values : 0 OK"
END
cat >> build/perf/ultraep_moe << 'END'
echo "  unbalanced  3.0000  3.0000     0    0.047    0.000    0.353   29.743    0.473    0.302   47.600    0.413    0.000   280.500       5595   45.0    1.000    0.06     N/A        -        -        -        -        -  zipf"
echo "  balanced    3.0000  1.0000     7    0.024    0.206    0.257   20.750    0.287    0.170   47.965    0.289    0.443   130.250       6896   97.5    2.154    0.06     N/A        -        -        -        -        -  zipf"
END
for tool in nvidia-smi ctest mpirun; do cp bin/fake bin/$tool; done
cat >> bin/nvidia-smi << 'END'
case $words in
*' -L') for ((i = 0; i < FAKE_GPUS; i++)); do echo "GPU $i: NVIDIA H200 (UUID: ${FAKE_UUID:-GPU}-$i)"; done ;;
*driver_version*) echo 580.1 ;;
*) echo "GPU0 GPU1 NV18" ;;
esac
END
printf 'echo "98%% tests passed, 0 tests failed out of 3"; echo "	 1 - gpu_sm (Skipped)"\n' >> bin/ctest
for tool in alltoall_perf alltoallv_perf; do cp bin/fake nccl/$tool; done
cat >> nccl/alltoall_perf << 'END'
echo "# env ${ULTRAEP_P2P:-} ${NCCL_TUNER_PLUGIN:-} ${LD_PRELOAD:+preloaded} nvls ${NCCL_NVLS_ENABLE:-}" >> "$FAKE_CALLS"
# Slower from turn to turn, and with the library half as long.
turn=$(grep -c '^alltoall_perf' "$FAKE_CALLS")
us=$((1000 + 100 * turn)) rate=$((500 - 10 * turn))
[ -z "${LD_PRELOAD:-}" ] || us=$((us / 2))
echo "   536870912       1048576     float    none      -1   $us.0  357.9  $rate.2      0   1501.0  357.7  313.0   "
END
cat >> nccl/alltoallv_perf << 'END'
[ -s "$NCCL_TESTS_ALLTOALLV_MATRIX_FILE" ] || exit 3
echo "      131072         16384     float    none      -1   1234.5    8.4    7.4      0   1235.0    8.4    7.4   "
END
cp bin/fake ep_bench
echo 'printf "Dispatch:    total=3267.10 us (min=1, max=2)\nCombine:     total=2453.20 us (min=1, max=2)\n"' >> ep_bench
# perf/compare starts it so.
cat > bin/mpirun << 'END'
#!/usr/bin/env bash
while [ $# -gt 0 ] && [ "$1" != -n ]; do shift; done
shift 2
exec "$@"
END
chmod +x bin/* build/perf/* nccl/* ep_bench
export FAKE_CALLS=$work/calls FAKE_SAMPLE=$work/sample.json FAKE_GPUS=4 LINKS_FAKE_GPUS=4
unset CUDA_VISIBLE_DEVICES
PATH=$work/bin:$PATH

# sweep WANTED OPTIONS...: its exit status; calls holds what it ran.
sweep() {
  local wanted=$1
  shift
  : > calls
  status "$wanted" "$sweep" --build build --out out.d "$@"
}
# has TEXT: a line of the table with these words in front, blanks apart.
table() {
  tr -s ' ' < out.d/sweep.txt | sed 's/^ //' > table
}
has() {
  table
  grep -qF -- "$1" table || fail "no '$1' in the table: $(cat table)"
}
lacks() {
  table
  ! grep -qF -- "$1" table || fail "'$1' in the table: $(cat table)"
}
# called TEXT: a call with these words.
called() {
  grep -qE -- "$1" calls || fail "no call '$1': $(cat calls)"
}
# part NAME FIELD...: what the document tells of a part; nothing where it has none.
part() {
  local name=$1 i=0
  shift
  while at=$("$json" out.d/sweep.json parts $i name 2> /dev/null); do
    [ "$at" != "$name" ] || { "$json" out.d/sweep.json parts $i "$@" && return; }
    i=$((i + 1))
  done
}
all=(--nccl-tests nccl --ep-bench ./ep_bench)

# ---- all is well ----

sweep 0 "${all[@]}" -- --seed 7
has "4 x NVIDIA H200, driver 580.1"
has "# link rate: 416.5 GB/s"
has "2 420.0 421.0 4000.0 423.0"
# Shares of the link rate: 330 MB in 1000 us, 270 in 900, of 416.5 GB/s; none for one rank. The baseline: 2600 and 2700.
has "main-4 4 0 4.0000 4.0000 31.00 1010.0 1000.0 79.2 80.0 2.60 2.60 1.000 900.0 72.0 88.9 3.00 3.00 1.000"
has "main-1 1 0 4.0000 4.0000 31.00 1010.0 1000.0 - 80.0 2.60"
has "skew-4 4 1 4.0000 1.0000 31.00 820.0 800.0 79.2 80.0 3.25 3.25 0.800 750.0 72.0 88.9 3.60 3.60 0.833"
has "skew-1.5 4 1 4.0000 1.0000 31.00 820.0 800.0 79.2 80.0 - - 0.800 750.0"
# Bare stores are faster by bulk copies, loads plain.
has "SMs bare-stores bare-loads both-stores both-loads dispatch link copy combine link copy"
has "24 264.0 216.0 198.0 162.0 1000.0 79.2 80.0 900.0 72.0 88.9"
# Three turns of three: the plain ones are the 1st, 4th and 7th call.
has "nccl-tests-alltoall 3 536870912 1400.0 460.2 0 -"
has "plugin-schedule-alltoall 3 536870912 750.0 450.2 0 1.87"
has "plugin-observe-alltoall 3 536870912 1600.0 440.2 0 0.88"
has "plugin-schedule-alltoallv 3 131072 1234.5 7.4 0 1.00"
[ "$(grep '^# env' calls | cut -d ' ' -f 3-4 | paste -sd ,)" = ' ,schedule , ultraep, ,schedule , ultraep, ,schedule , ultraep' ] ||
  fail "turns: $(grep '^# env' calls)"
has "moe-3 balanced 3.0000 1.0000 130.250 97.5 2.154"
has "NCCL EP ep_bench, ht, 24 SMs 1 - 3267.10 - 2453.20"
has "98% tests passed"
has "0 OK"
lacks "failed or not run"
called '^ultraep_perf -B cuda -t 2 --hidden 7168 --topk 8 --experts 256 --tokens 4096 --graph 1 -c 0 -n 20 -w 5 --skew 1 --balance 0 --ctas 24 --baseline nccl -J .*/main-2.json --seed 7$'
called '^ultraep_perf .* -t 4 .*--skew 4 --balance both .*--baseline nccl --matrix '
called '^ultraep_perf .*--tokens 128 .*-w 200 '
called '^ultraep_perf .*--combine partial '
called '^ultraep_perf .*--ctas 32 '
called '^alltoall_perf -g 4 -b 1K '
called '^alltoallv_perf -g 4 -b 131072 -e 131072 '
called '^# env schedule  preloaded nvls 0$'
called '^# env  ultraep  nvls 0$'
called '^ultraep_moe -B cuda -t 4 .*--skew 3 -J '
called '^ultraep_moe -B cuda -t 4 .*--skew 3 --overlap 1 '
called '^ctest --test-dir .*/build -L gpu '
[ "$(grep -c '^ultraep_perf' calls)" = 16 ] || fail "$(grep -c '^ultraep_perf' calls) runs of ultraep_perf: $(cat calls)"
[ "$("$json" out.d/sweep.json link_gbps) $("$json" out.d/sweep.json gpus 3)" = "416.5 GPU 3: NVIDIA H200 (UUID: GPU-3)" ] ||
  fail "the head of the document"
[ "$(part main-4 status) $(part main-4 reason)" = "ok " ] || fail "a part of the document: $(cat out.d/sweep.json)"
[ "$(part main-4 result config hidden)" = 64 ] || fail "the tool's own document in it"
[ "$(part links result pairs 6 to)" = 2 ] || fail "the links' own document in it"
[ "$(part gpu-tests result)" = null ] || fail "a document where there is none"
[ "$(part gpu-tests log | tail -n 1)" = "$(printf '\t 1 - gpu_sm (Skipped)')" ] || fail "the output in the document"

# ---- resuming ----

cp out.d/sweep.txt before
sweep 0 "${all[@]}" -- --seed 7
! grep -qv '^nvidia-smi' calls || fail "run again: $(cat calls)"
cmp -s <(tail -n +2 before) <(tail -n +2 out.d/sweep.txt) || fail "another table: $(diff before out.d/sweep.txt)"
grep -q '^== main-4: kept from 20' out || fail "no word on what was kept"
# Other options, other results; only the parts asked for, and what there is of the others.
sweep 0 "${all[@]}" --parts once,sms-8,moe -- --seed 8
[ "$(grep -cv '^nvidia-smi' calls)" = 2 ] || fail "other options: $(cat calls)"
has "moe-3 balanced"
lacks "main-4"
sweep 0 "${all[@]}" --parts once --fresh
[ "$(grep -cv '^nvidia-smi' calls)" = 1 ] || fail "--fresh: $(cat calls)"
lacks "moe-3 balanced"
FAKE_UUID=other sweep 0 "${all[@]}" --parts partial
grep -q 'earlier results are of other GPUs or another build: forgotten' out || fail "no word on other GPUs"
lacks "once 4"
echo >> build/plugin/libultraep.so
FAKE_UUID=other sweep 0 --parts partial
called '^ultraep_perf .*--combine partial '

# ---- parts that fail, hang, or find no time ----

FAKE_FAIL='--mode once' FAKE_HANG='--combine partial' sweep 1 --fresh --limit 3 --parts main,once,partial,sms
has "once: failed: exit status 5"
has 'broken "here"'
has "partial: failed: not done in 3 s"
has "main-4 4 0"
has "32 - - - - 1000.0 - 80.0"
grep -q '2 parts failed or did not run' err || fail "the number of failures: $(cat err)"
[ "$(part once status) $(part once log | tail -n 1)" = 'failed broken "here"' ] || fail "a failed part in the document"
sweep 0 --parts main,once,partial,sms
[ "$(grep -c '^ultraep_perf' calls)" = 2 ] || fail "resuming: $(cat calls)"
has "once 4 0"
lacks "failed or not run"
begun=$SECONDS
FAKE_SECONDS=2 sweep 1 --fresh --budget 6 --parts main,once,partial,gpu-tests
[ $((SECONDS - begun)) -le 11 ] || fail "a budget of 6 s took $((SECONDS - begun)) s"
has "main-4 4 0"
has "gpu-tests: not run: out of time"
[ "$(part gpu-tests status)" = "not run" ] || fail "a part without time in the document"
FAKE_HANG=ctest sweep 1 --fresh --budget 2 --parts gpu-tests
has "gpu-tests: failed: not done in "
has " s: out of time"
# A tool that fails with half a document, and one whose output is not ASCII, leave the whole one whole.
printf '#!/bin/sh\nprintf "{\\"half" > "%s"; printf "\\303\\244\\033[1m\\\\ \\t\\"\\n"; exit 1\n' "$work/out.d/parts/moe-1.json" \
  > build/perf/ultraep_moe
sweep 1 --fresh --parts moe
[ "$(part moe-1 result) $(part moe-1 log)" = "$(printf 'null [1m\\ \t"')" ] || fail "half a document: $(cat out.d/sweep.json)"
# Interrupted: what there is is written.
FAKE_HANG='--mode once' "$sweep" --build build --out out.d --fresh --parts main,once > out 2> err &
pid=$!
for ((i = 0; i < 200; i++)); do
  if grep -q '^== once' out; then break; fi
  sleep 0.05
done
kill -TERM $pid
got=0
wait $pid || got=$?
[ $got = 1 ] || fail "exit status $got when interrupted"
has "main-4 4 0"
has "once: failed: interrupted"
grep -q 'interrupted' err || fail "no word on being interrupted"

# ---- other machines ----

LINKS_FAKE_FAULT=bulk sweep 0 --fresh --parts links,sms
has "24 240.0 216.0 180.0 162.0 1000.0 79.2"
FAKE_GPUS=1 LINKS_FAKE_GPUS=1 sweep 0 --fresh --parts links,sms-8
has "8 - - - - 1000.0 -"
FAKE_GPUS=1 LINKS_FAKE_GPUS=1 sweep 0 --fresh --parts links,main,skew,plugin,topology
has "# link rate: none, one GPU has no pairs"
has "main-1 1 0 4.0000 4.0000 31.00 1010.0 1000.0 - 80.0"
has "skew-4: left out: 1 ranks cannot be so uneven"
has "plugin: left out: --nccl-tests is not given"
[ "$("$json" out.d/sweep.json link_gbps)" = null ] || fail "a link rate of one GPU"
FAKE_GPUS=2 LINKS_FAKE_GPUS=2 sweep 0 --fresh --shared 8 --nccl-tests nccl --parts links,main,sms,nccl-tests
has "8 ranks as threads that share one GPU: these figures measure one GPU, not links"
has "main-8 8 0 4.0000 4.0000 31.00 1010.0 1000.0 - 80.0"
has "nccl-tests: left out: one thread drives all ranks"
called '^ultraep_perf .* -t 8 .*--ctas 16 .*--baseline nccl'
! grep -q -e '--ctas 24' calls || fail "blocks that do not fit on one GPU: $(cat calls)"
sweep 0 --fresh --nccl-tests nccl --parts nccl-tests
has "nccl-tests-alltoallv: left out: skew-4 wrote no traffic for it"
[ "$(grep -c '^alltoall_perf' calls) $(grep -c '^alltoallv_perf' calls)" = '3 0' ] || fail "without uneven traffic: $(cat calls)"
CUDA_VISIBLE_DEVICES=0,2 sweep 0 --fresh --parts main
[ "$(grep -c '^ultraep_perf' calls)" = 2 ] || fail "GPUs that CUDA may not use: $(cat calls)"
sweep 0 --fresh --gpus 3,1 --parts main
called '^ultraep_perf -B cuda -t 3 '
has "main-3 3 0"
# Where nvidia-smi does not work, ultraep_links finds them.
FAKE_FAIL=nvidia-smi sweep 0 --fresh --parts links,main
has "1 x Fake 0;1 x Fake 1;1 x Fake 2;1 x Fake 3, driver unknown"
FAKE_FAIL=nvidia-smi LINKS_FAKE_GPUS=0 sweep 77 --fresh
grep -q '^perf/sweep: no GPU here' err || fail "message without GPUs: $(cat err)"

# ---- options at fault ----

while read -r options; do
  read -r -a words <<< "$options"
  sweep 2 "${words[@]}"
  [ ! -s calls ] || [ "$(grep -cv '^nvidia-smi' calls)" = 0 ] || fail "ran in spite of $options: $(cat calls)"
done << 'END'
--no-such-option
--budget
--budget x
--budget 0
--gpus 8
--gpus 0
--gpus 1,,2
--gpus two
--shared 0x
--shared 2 --gpus 2
--ctas 0
--limit -1
--parts nothing
--parts main-64
END
grep -q "none of 'main-64' is a part here" err || fail "message of a part that is not there: $(cat err)"
status 1 "$sweep" --build nowhere --out out.d
grep -q 'no build folder' err || fail "message without a build folder"
status 0 "$sweep" --help
grep -q -- '--shared N' out || fail "--help"
echo "perf_sweep.sh: passed"
