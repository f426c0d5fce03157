# shellcheck shell=bash
# Read by perf/sweep: its results as a table and as a JSON document, made of the states and outputs of the parts shown.
# shellcheck disable=SC2154 # what perf/sweep has set

# ---- the table ----

# The link's rate in GB/s, or nothing: of GPUs that the ranks have to themselves.
report_link() {
  [ "$shared" -gt 0 ] || sed -n 's/^# link rate: \([0-9.]*\) GB\/s.*/\1/p' "$parts/links.log" 2> /dev/null || true
}

# is_shown NAME: with a good result.
is_shown() {
  recall "$1"
  [[ $status_of == ok && " ${shown[*]} " == *" $1 "* ]]
}

# The parts shown and good whose names begin so.
shown_of() {
  local name
  for name in "${shown[@]}"; do
    if [[ $name == "$1" || $name == "$1"-* ]] && is_shown "$name"; then echo "$name"; fi
  done
}

report_head() {
  local gpus
  gpus=$(sed 's/^GPU [0-9]*: //; s/ (UUID.*//' <<< "$gpu_list" | sort | uniq -c | awk '{ $1 = $1 " x"; print }' | paste -sd ';')
  echo "perf/sweep on $(uname -n), $(date '+%Y-%m-%d %H:%M'): $gpus, driver $driver"
  if [ "$shared" -gt 0 ]; then
    echo "$shared ranks as threads that share one GPU: these figures measure one GPU, not links"
  else
    echo "a GPU for each rank, ranks as threads of one process; $n_gpus GPUs can be used"
  fi
  echo "SMs a rank: $ctas unless a part says otherwise"
}

report_links() {
  local name
  for name in topology links; do
    is_shown $name || continue
    printf '\n== %s\n' $name
    cat "$parts/$name.log"
  done
}

# perf_rows NAME: lines of a run of ultraep_perf as the table wants them, a balance setting each:
#   name ranks balance before after route step dispatch link% copy% x combine link% copy% x gain-d gain-c
# x: the baseline over ours; gain: the baseline without balance over ours; - where there is none.
perf_rows() {
  local name=$1 count
  recall "$name"
  count=${command_of##* -t }
  awk -v name="$name" -v ranks="${count%% *}" -v link="$(report_link)" '
    function share(bytes, us) {
      return link > 0 && ranks > 1 && bytes != "" && us > 0 ? sprintf("%.1f", 100 * bytes / (link * 1e3 * us)) : "-"
    }
    function ratio(above, below) { return above > 0 && below > 0 ? sprintf("%.2f", above / below) : "-" }
    /^# balance [01]: busiest link/ { gsub(/[:,]/, ""); dispatched[$3] = $11; combined[$3] = $13 }
    !/^#/ && NF >= 22 { lines[$4] = $0 }
    END {
      for (b = 0; b < 2; b++) {
        if (!(b in lines)) continue
        based = split(lines[b], f, " ") >= 26
        if (b == 0 && based) { base_d = f[23]; base_c = f[25] }
        print name, ranks, b, f[5], f[6], f[8], f[17], f[10], share(dispatched[b], f[10]), f[19], \
          based ? ratio(f[23], f[10]) : "-", f[13], share(combined[b], f[13]), f[21], based ? ratio(f[25], f[13]) : "-", \
          ratio(base_d, f[10]), ratio(base_c, f[13])
      }
    }' "$parts/$name.log"
}

# All runs of ultraep_perf; the last columns set them beside even traffic on as many ranks.
report_perf() {
  local name rows
  rows=$(for name in "${shown[@]}"; do
    case $name in main-* | skew-* | tokens128 | once | partial) is_shown "$name" && perf_rows "$name" ;; esac
  done || true)
  [ -n "$rows" ] || return 0
  printf '\n== ultraep_perf, us\n'
  echo "link: the busiest rank's bytes to or from other ranks at the link rate, as a share of the time, in per cent"
  echo "copy: bytes read and written at the rate of a copy within a GPU, as a share of the time, in per cent"
  echo "x: ncclSend and ncclRecv of the same rows over ours; x0: those of the rows without balance over ours"
  echo "even: our time over that of main with as many ranks"
  printf '%-10s %5s %7s %7s %7s %8s %8s %9s %6s %6s %6s %6s %6s %9s %6s %6s %6s %6s %6s\n' part ranks balance before after \
    route route+d dispatch link copy x x0 even combine link copy x x0 even
  awk '
    { row[NR] = $0 }
    $1 ~ /^main-/ { d[$2] = $8; c[$2] = $12 }
    function even(us, of) { return of > 0 && us > 0 && part ~ /^(main|skew)-/ ? sprintf("%.3f", us / of) : "-" }
    END {
      for (i = 1; i <= NR; i++) {
        split(row[i], f, " ")
        part = f[1]
        printf "%-10s %5s %7s %7s %7s %8s %8s %9s %6s %6s %6s %6s %6s %9s %6s %6s %6s %6s %6s\n", f[1], f[2], f[3], f[4], \
          f[5], f[6], f[7], f[8], f[9], f[10], f[11], f[16], even(f[8], d[f[2]]), f[12], f[13], f[14], f[15], f[17], \
          even(f[12], c[f[2]])
      }
    }' <<< "$rows"
}

# SMs against bandwidth: of bare copies between two GPUs, and of the exchange.
report_sms() {
  local name rows
  rows=$(for name in $(shown_of sms); do perf_rows "$name"; done)
  [ -n "$rows" ] || return 0
  printf '\n== SMs against bandwidth: main with other SMs, us\n'
  echo "bare: copies by a kernel between two GPUs, plain or bulk, whichever is faster, GB/s, medians"
  echo "both: the same of each direction, with both directions at once, as an exchange has them"
  printf '%6s %11s %11s %11s %11s %9s %6s %6s %9s %6s %6s\n' SMs bare-stores bare-loads both-stores both-loads dispatch \
    link copy combine link copy
  awk '
    function best(a, b) { return a + 0 < b + 0 ? b : a }
    function rate(of, way) { return (of, way) in rates ? rates[of, way] : "-" }
    FNR == NR {
      if (/^# copies by a kernel, one direction/) { table = "one"; first = 4 }
      else if (/^# copies by a kernel, both directions/) { table = "both"; first = 2 }
      else if (/^# +blocks/) inside = table != ""
      else if (/^#/) { inside = 0; table = "" }
      else if (inside) {
        rates[$1, table "-stores"] = best($first, $(first + 1))
        rates[$1, table "-loads"] = best($(first + 2), $(first + 3))
      }
      next
    }
    { sub(/^sms-/, "", $1); printf "%6s %11s %11s %11s %11s %9s %6s %6s %9s %6s %6s\n", $1, rate($1, "one-stores"),
      rate($1, "one-loads"), rate($1, "both-stores"), rate($1, "both-loads"), $8, $9, $10, $12, $13, $14 }' \
    <(if is_shown links; then cat "$parts/links.log"; else echo '#'; fi) - <<< "$rows"
}

# Lines of nccl-tests: medians of the turns, out of place, the sizes that ran; wrong: the most of any turn.
report_nccl_tests() {
  local name names
  names=$(shown_of nccl-tests && shown_of plugin)
  [ -n "$names" ] || return 0
  printf '\n== nccl-tests, out of place, medians\n'
  echo "x: plain NCCL's time over this one"
  printf '%-26s %5s %12s %10s %9s %7s %6s\n' part turns bytes us busbw wrong x
  for name in $names; do
    awk -v part="${name%-*}" '!/^#/ && $1 ~ /^[0-9]+$/ && NF >= 9 { print part, $1, $6, $8, $9 }' "$parts/$name.log"
  done | sort -s -k 1,1 -k 2,2n -k 3,3n | awk '
    function line() {
      if (n == 0) return
      us = n % 2 ? times[(n + 1) / 2] : (times[n / 2] + times[n / 2 + 1]) / 2
      plain = part ~ /^nccl-tests/
      kind = part
      sub(/.*-/, "", kind)
      if (plain) nccl[kind, bytes] = us
      printf "%-26s %5d %12s %10s %9s %7s %6s\n", part, n, bytes, us, rates[int((n + 1) / 2)], wrong, \
        !plain && (kind, bytes) in nccl ? sprintf("%.2f", nccl[kind, bytes] / us) : "-"
    }
    $1 != part || $2 != bytes { line(); n = 0; part = $1; bytes = $2; wrong = $5 }
    { times[++n] = $3; rates[n] = $4; if ($5 + 0 > wrong + 0) wrong = $5 }
    END { line() }'
}

report_layer() {
  local name names
  names=$(shown_of moe)
  [ -n "$names" ] || return 0
  printf '\n== ultraep_moe, a whole layer: ms, of ideal in per cent\n%-10s %-11s %8s %8s %9s %8s %8s\n' part run before after \
    total ideal speed-up
  for name in $names; do
    awk -v name="$name" '$1 ~ /^(unbalanced|balanced|ideal)$/ {
      printf "%-10s %-11s %8s %8s %9s %8s %8s\n", name, $1, $2, $3, $14, $16, $17 }' "$parts/$name.log"
  done
}

report_others() {
  if is_shown check; then
    printf '\n== check: every row of a small run; wrong are\n'
    sed -n 's/^# Out of bounds values *: //p' "$parts/check.log"
  fi
  if is_shown ep-bench; then
    printf '\n== perf/compare with ep_bench\n'
    sed -n '/^program /,/^$/p' "$parts/ep-bench.log" | grep . || true
  fi
  if is_shown gpu-tests; then
    printf '\n== ctest -L gpu\n'
    grep -E 'tests passed|\((Skipped|Not Run)\)' "$parts/gpu-tests.log" || true
  fi
}

# What failed with the end of its output, then what did not run, and why.
report_missing() {
  local name lines heading=$'\n== failed or not run\n'
  for name in "${shown[@]}"; do
    recall "$name"
    [ "$status_of" != ok ] || continue
    printf '%s%s: %s: %s\n' "$heading" "$name" "$status_of" "$reason_of"
    heading='' lines=8
    [ "$name" != gpu-tests ] || lines=25
    [ "$status_of" != failed ] || tail -n $lines "$parts/$name.log" | cut -c 1-300 | sed 's/^/   /'
  done
}

report_table() {
  local name count=0
  report_head
  report_links
  report_perf
  report_sms
  report_nccl_tests
  report_layer
  report_others
  report_missing
  for name in "${shown[@]}"; do if is_shown "$name"; then count=$((count + 1)); fi; done
  printf '\n%d of %d parts have a result; all output is in %s\n' $count ${#shown[@]} "$parts"
}

# ---- the JSON document ----

# Standard input as a JSON string; what is not plain ASCII is dropped.
json_string() {
  LC_ALL=C tr -cd '\11\12\40-\176' | sed 's/\\/\\\\/g; s/"/\\"/g; s/\t/\\t/g' |
    awk 'BEGIN { ORS = ""; print "\"" } { print (NR > 1 ? "\\n" : "") $0 } END { print "\"" }'
}

# An object, of what was kept of a part.
json_part() {
  local name=$1
  recall "$name"
  printf '  {"name": "%s", "status": "%s", "seconds": %s, "date": "%s",\n' "$name" "$status_of" "$seconds_of" "$date_of"
  printf '   "reason": %s,\n   "command": %s,\n' "$(json_string <<< "$reason_of")" "$(json_string <<< "$command_of")"
  printf '   "log": %s,\n   "result": ' "$(tail -n 60 "$parts/$name.log" 2> /dev/null | json_string)"
  # A part that was cut off may have left half a document.
  if [ "$status_of" = ok ] && [ -s "$parts/$name.json" ]; then cat "$parts/$name.json"; else echo null; fi
  printf '  }'
}

report_json() {
  local name link between=''
  link=$(report_link)
  printf '{"version": 1, "tool": "perf/sweep", "host": %s, "date": "%s",\n' "$(uname -n | json_string)" \
    "$(date '+%Y-%m-%d %H:%M:%S')"
  printf ' "driver": %s, "gpus": [' "$(json_string <<< "$driver")"
  while IFS= read -r name; do
    printf '%s%s' "$between" "$(json_string <<< "$name")"
    between=', '
  done <<< "$gpu_list"
  printf '],\n "shared": %d, "ranks": %d, "ctas": %d, "link_gbps": %s,\n "parts": [\n' "$shared" "$most" "$((10#$ctas))" \
    "${link:-null}"
  between=''
  for name in "${shown[@]}"; do
    printf '%s' "$between"
    cat "$parts/$name.part"
    between=$',\n'
  done
  printf '\n ]}\n'
}

# Both files; a file appears whole.
report_write() {
  report_table > "$out/.sweep.txt"
  mv "$out/.sweep.txt" "$out/sweep.txt"
  report_json > "$out/.sweep.json"
  mv "$out/.sweep.json" "$out/sweep.json"
}
