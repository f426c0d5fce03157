#!/usr/bin/env bash
# How many instructions counting costs a call: what a run with calls taken over needs more than one without.
#   plugin_overhead.sh PROGRAM
set -euo pipefail

program=$1
most=150 # a send; at one instruction a nanosecond, a slow machine indeed, that is 150 ns

command -v valgrind > /dev/null || {
  echo "skipped: no valgrind on this machine"
  exit 77
}

# instructions KIND COUNT VARIABLE=VALUE...
instructions() {
  local kind=$1 count=$2
  shift 2
  env "$@" valgrind --tool=callgrind --callgrind-out-file=/dev/null "$program" "$kind" "$count" 2>&1 |
    sed -n 's/.*Collected *: *\([0-9]*\).*/\1/p'
}

# each KIND VARIABLE=VALUE...: instructions of one call
each() {
  local kind=$1 few many
  shift
  few=$(instructions "$kind" 2000 "$@")
  many=$(instructions "$kind" 12000 "$@")
  echo $(((many - few) / 10000))
}

for kind in send group alltoall; do
  without=$(each $kind ULTRAEP_P2P=off)
  with=$(each $kind ULTRAEP_P2P=observe)
  more=$((with - without))
  echo "$kind: $more instructions more where the call is taken over (fake NCCL and client: $without)"
  case $kind in
  alltoall) limit=$((most + 100)) ;; # any number of ranks; and the stand-in's own send in it, which is passed on
  *) limit=$most ;;
  esac
  [ $more -gt 0 ] || [ $kind = group ] || {
    echo "the calls were not taken over"
    exit 1
  }
  [ $more -le $limit ] || {
    echo "more than $limit"
    exit 1
  }
done
