#!/usr/bin/env bash
# ultraep_links from the outside: options and report with made-up GPUs, and in builds with CUDA the tool itself without
# one. On a machine with GPUs (perf_links.sh gpu ULTRAEP_LINKS) small copies of every kind; 77, skipped, elsewhere.
# usage: perf_links.sh LINKS_FAKE PERF_JSON [ULTRAEP_LINKS] | perf_links.sh gpu ULTRAEP_LINKS PERF_JSON
set -euo pipefail
# shellcheck source=perf_common.sh
. "$(dirname "$0")/perf_common.sh"
cd "$work"

if [ "$1" = gpu ]; then
  links=$2
  json=$3
  if ! "$links" --list > out 2> err; then
    grep 'no CUDA device can be used' err && exit 77
    fail "--list: $(cat err)"
  fi
  grep -Eq '^GPU 0: .* \(UUID: GPU-[0-9a-f-]{36}\)$' out || fail "--list: $(cat out)"
  gpus=$(wc -l < out)
  status 0 "$links" --bytes 1M -n 3 --flags 20 --ctas 1,16 -J o.json
  grep -Eq '^# copy rate within a GPU: [0-9.]+ GB/s' out || fail "no copy rate: $(cat out)"
  grep -Eq '^# link rate: ([0-9.]+ GB/s, |none, )' out || fail "no link rate: $(cat out)"
  # positive KEY: a rate of the summary.
  positive() { "$json" o.json "$1" | awk '!($1 > 0) { exit 1 }' || fail "$1: $("$json" o.json "$1")"; }
  positive copy_gbps
  [ "$gpus" = 1 ] || positive link_gbps
  # measured PAIR KEY...: rates of both numbers of blocks, more than 0; of bulk copies none before sm_90.
  measured() {
    local pair=$1 key rates
    shift
    for key; do
      rates=$("$json" o.json pairs "$pair" "$key")
      if [[ $key == *_bulk_* && $capability -lt 9 ]]; then
        [ "$rates" = '[null,null]' ] || fail "pair $pair, $key of compute capability $capability: $rates"
      else
        tr -d '[]' <<< "$rates" | awk -F, '!(NF == 2 && $1 > 0 && $2 > 0) { exit 1 }' || fail "pair $pair, $key: $rates"
      fi
    done
  }
  capability=$("$json" o.json gpus 0 compute_capability)
  capability=${capability%.*}
  measured 0 store_gbps store_bulk_gbps
  # From GPU 0 to 1 and back.
  for pair in 1 "$gpus"; do
    if [ "$gpus" -gt 1 ] && [ "$("$json" o.json pairs "$pair" reachable)" = true ]; then
      measured "$pair" {,both_}{store,load}{,_bulk}_gbps
    fi
  done
  # A last part that is no whole bulk copy, and fewer of those than blocks.
  status 0 "$links" --bytes 1000016 -n 1 --flags 1 --ctas 3
  status 0 "$links" --bytes 20000 -n 1 --flags 1 --ctas 7
  status 0 "$links" --gpus 1 --bytes 16 -n 1
  grep -q '^# link rate: none' out || fail "pairs with one GPU"
  echo "perf_links.sh: passed"
  exit 0
fi
fake=$1
json=$2
links=${3:-}
export LINKS_FAKE_GPUS=4
has() {
  tr -s ' ' < out > table
  grep -qxF -- "$1" table || fail "no '$1': $(cat out)"
}

status 0 "$fake" -J o.json
has " 2 420.0 421.0 4000.0 423.0"
has " 2 315.0 315.8 - 317.2"
has " 3 2.50 2.50 2.50 -"
has " 24 240.0 264.0 240.0 264.0 216.0 192.0"
has "# copies by a kernel, both directions at once, GB/s of each, medians: between neighbours"
has " 24 180.0 198.0 162.0 144.0"
grep -q 'medians of 10, by a kernel of 3$' out || fail "copies of a median: $(cat out)"
has "# link rate: 416.5 GB/s, median of 12 pairs and directions (least 401.0, most 432.0)"
has "# copy rate within a GPU: 4000.0 GB/s read and written, median of 4"
[ "$("$json" o.json link_gbps)" = 416.5 ] || fail "the link rate in the JSON"
[ "$("$json" o.json pairs 6 to) $("$json" o.json pairs 6 load_gbps 4)" = "2 288.0" ] || fail "a pair in the JSON"
# Pair 6: neighbours, 1 and 2; pair 7: 1 and 3; pair 5: GPU 1 itself.
of_budget_16() {
  local key
  for key in store_gbps store_bulk_gbps load_gbps load_bulk_gbps; do
    echo "$("$json" o.json pairs "$1" $key 2) $("$json" o.json pairs "$1" both_$key 2)"
  done | paste -sd ' '
}
[ "$(of_budget_16 6)" = "160.0 120.0 176.0 132.0 144.0 108.0 128.0 96.0" ] || fail "in the JSON: $(of_budget_16 6)"
[ "$(of_budget_16 7)" = "160.0 null 176.0 null 144.0 null 128.0 null" ] || fail "no neighbours: $(of_budget_16 7)"
[ "$(of_budget_16 5)" = "160.0 null 176.0 null null null null null" ] || fail "within a GPU: $(of_budget_16 5)"
[ "$("$json" o.json gpus 3 compute_capability)" = 9.0 ] || fail "compute capability in the JSON"
[ "$("$json" o.json iterations) $("$json" o.json kernel_iterations)" = "10 3" ] || fail "copies of a median in the JSON"
[ "$("$json" o.json pairs 5 both_gbps)" = null ] || fail "both directions within a GPU"
status 0 "$fake" --list
[ "$(tail -n 1 out)" = "GPU 3: Fake 3 (UUID: GPU-3)" ] || fail "--list: $(cat out)"

# Other options; pairs that kernels cannot use; one GPU; none; a fault.
status 0 "$fake" --gpus 2 --ctas 1 --bytes 1M -n 5 --flags 10
has "# link rate: 405.5 GB/s, median of 2 pairs and directions (least 401.0, most 410.0)"
grep -q 'medians of 5, by a kernel of 5$' out || fail "copies of a median, 2 GPUs: $(cat out)"
! grep -q neighbours out || fail "neighbours of 2 GPUs"
[ "$(grep -c '^ ' out)" = 8 ] || fail "--gpus 2 --ctas 1: $(cat out)"
status 0 env LINKS_FAKE_FAULT=unreachable "$fake" --gpus 2 -J o.json
has "# GPUs 0 and 1: kernels cannot use each other's memory"
has " 8 80.0 88.0 - - - -"
has " 8 - - - -"
[ "$("$json" o.json pairs 1 flag_us) $("$json" o.json pairs 1 copy_gbps)" = "null 401.0" ] || fail "what was not measured"
status 0 env LINKS_FAKE_FAULT=bulk "$fake" -J o.json
has " 8 80.0 - 80.0 - 72.0 -"
has " 8 60.0 - 54.0 -"
[ "$(of_budget_16 6)" = "160.0 120.0 null null 144.0 108.0 null null" ] || fail "no bulk: $(of_budget_16 6)"
status 0 env LINKS_FAKE_GPUS=1 "$fake" -J o.json
has "# link rate: none, one GPU has no pairs"
[ "$("$json" o.json link_gbps)" = null ] || fail "a link rate of one GPU"
! grep -q 'both directions' out || fail "both directions of one GPU"
status 1 env LINKS_FAKE_GPUS=0 "$fake"
grep -q '^ultraep_links: no CUDA device can be used' err || fail "message without GPUs"
status 1 env LINKS_FAKE_FAULT=flags "$fake"
grep -q 'no answer within' err || fail "message of a flag that does not come"
status 1 "$fake" -J /nonexistent/o.json
for options in '--ctas 4,x' '--ctas 0' '--ctas' '--ctas 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17' '--bytes 24' \
  '--bytes 1Q' '--gpus 0' '-n 0' '--flags 0' 'stray' '--no-such-option'; do
  read -r -a words <<< "$options"
  status 2 "$fake" "${words[@]}"
done
status 0 "$fake" --help
tr -s ' \n' ' ' < out > table
for key in kernel_iterations store_gbps both_load_bulk_gbps; do grep -qw "$key" table || fail "--help has no $key"; done
grep -q 'only measured between neighbours' table || fail "--help does not say what is left out"

# The tool itself, where no GPU can be used.
if [ -n "$links" ]; then
  status 1 env CUDA_VISIBLE_DEVICES=-1 "$links"
  grep -q '^ultraep_links: no CUDA device can be used: ' err || fail "message without a GPU: $(cat err)"
  [ ! -s out ] || fail "a report without a GPU"
fi
echo "perf_links.sh: passed"
