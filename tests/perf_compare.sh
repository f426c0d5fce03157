#!/usr/bin/env bash
# perf/compare with stand-ins for the programs it runs: what it asks of them, what it reads, and that one which fails
# stops no other.
# usage: perf_compare.sh PERF_COMPARE
set -euo pipefail
compare=$1
# shellcheck source=perf_common.sh
. "$(dirname "$0")/perf_common.sh"
cd "$work"

fail() {
  echo "perf_compare.sh: $*: $(cat out err)" >&2
  exit 1
}
# has TEXT...: a line of the table with these words, blanks apart.
has() {
  tr -s ' ' < out | grep -qF -- "$*" || fail "no '$*'"
}

cat > ultraep_perf << 'END'
#!/usr/bin/env bash
echo "ultraep_perf $*" >> calls
while [ $# -gt 0 ]; do
  [ "$1" = --matrix ] && printf '10 20\n70000 30\n' > "$2"
  shift
done
echo "# copy rate: 4300.0 GB/s read and written"
echo " 1 1 bfloat16 0 4.0 4.0 0 31.0 0.00 900.1 1 1 950.2 1 1 N/A 930.3 800.0 88.9 800.0 84.2 6.50 2700.4 3.0 2800.5 2.9 zipf"
echo " 1 1 bfloat16 1 4.0 1.0 9 32.0 0.00 910.1 1 1 960.2 1 1 N/A 940.3 800.0 87.9 800.0 83.3 6.60 2000.0 2.2 2100.0 2.2 zipf"
END
cat > mpirun << 'END'
#!/usr/bin/env bash
[ "$1" = --quiet ] || exit 3
shift
[ "$1 $2" = "-n 2" ] || exit 4
shift 2
exec "$@"
END
cat > ep_bench << 'END'
#!/usr/bin/env bash
echo "ep_bench $*" >> calls
printf 'Dispatch:    total=3267.10 us (min=3000.00, max=3500.00)\nCombine:     total=2453.20 us (min=1.00, max=2.00)\n'
printf 'Dispatch:    kernel=973.00 us\nCombine:     kernel=992.00 us\nEP-induced delta:    +1000.00 MB\n'
END
cat > alltoallv_perf << 'END'
#!/usr/bin/env bash
echo "alltoallv_perf $* $(head -n 1 "$NCCL_TESTS_ALLTOALLV_MATRIX_FILE")" >> calls
printf '# size count\n  131072  1  float  none  -1  1234.5  8.49  7.43  N/A  124.0  0  0 N/A\n'
END
chmod +x ultraep_perf mpirun ep_bench alltoallv_perf
run() { "$compare" --ultraep-perf ./ultraep_perf --ranks 2 --mpirun "./mpirun --quiet" --logs logs "$@" > out 2> err; }

run --ep-bench ./ep_bench --nccl-tests . --skew 1,4 || fail "exit status $?"
has "UltraEP, masters only 1 31.0 900.1 930.3 950.2 6.50"
has "UltraEP, balanced, 2 slots 4 32.0 910.1 940.3 960.2 6.60"
has "ncclSend/ncclRecv (ultraep_perf) 4 - 2700.4 - 2800.5 -"
has "NCCL EP ep_bench, ht, 16 SMs 1 - 3267.10 - 2453.20 1.05"
has "nccl-tests alltoallv_perf 4 - 1234.5 - - -"
has "copy rate: 4300.0 GB/s"
! tr -s ' ' < out | grep -q 'ep_bench.* 4 - ' || fail "ep_bench has no skewed traffic"
grep -q 'alltoallv_perf -g 1 -b 131072 -e 131072 .* 10 20$' calls || fail "alltoallv_perf's options: $(cat calls)"
grep -q 'ep_bench --algorithm ht --layout em --tokens 4096 --hidden 7168' calls || fail "ep_bench's options"

# What is not given is left out; what fails is named, and the others go on.
run --skew 1 || fail "exit status $?"
has "NCCL EP: left out"
has "nccl-tests: left out"
printf '#!/bin/sh\necho broken; exit 5\n' > ep_bench
if run --ep-bench ./ep_bench --nccl-tests . --skew 1; then fail "a program that fails must show"; fi
grep -q 'FAILED: ep_bench (exit status 5;' err || fail "the failure is not named"
has "nccl-tests alltoallv_perf 1 - 1234.5 - - -"
printf '#!/bin/sh\nsleep 30\n' > ep_bench
if run --ep-bench ./ep_bench --skew 1 --limit 1; then fail "a program that does not end must show"; fi
grep -q 'ep_bench (exit status 124: not done in 1 s' err || fail "the time limit is not named"
if run --no-such-option; then fail "an unknown option must show"; fi
echo "perf_compare.sh: passed"
