#!/usr/bin/env bash
# The exchange with one process a rank. Several processes run on one GPU at the same time only under MPS: an MPS
# of its own is started and ended here unless every rank has a GPU. 77 (skipped) where neither is there.
#
#   gpu_processes.sh PROGRAM [RANKS [SHAPES]]      PROGRAM: gpu_process_rank; RANKS 4, SHAPES 12 by default
set -uo pipefail

program=$1
ranks=${2:-4}
shapes=${3:-12}
seconds=240 # that a rank may take

skip() {
  echo "$1: skipped"
  exit 77
}

unset CUDA_DEVICE_MAX_CONNECTIONS # what one process may have, 8 under MPS may not
export PATH=$PATH:/usr/local/nvidia/bin
"$program" probe || skip "no GPU"

work=$(mktemp -d)
mps=
finish() {
  if [ -n "$mps" ]; then echo quit | timeout 30 "$mps" > /dev/null 2>&1; fi
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 1' INT TERM

gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU')
if [ "$gpus" -lt "$ranks" ]; then
  control=$(command -v nvidia-cuda-mps-control) || skip "$gpus GPUs for $ranks ranks, and no nvidia-cuda-mps-control"
  export CUDA_MPS_PIPE_DIRECTORY=$work/pipe CUDA_MPS_LOG_DIRECTORY=$work/log
  mkdir "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
  timeout 30 "$control" -d || skip "MPS does not start"
  mps=$control
  timeout 60 "$program" probe || skip "MPS gives no access to the GPU"
fi

pids=()
for ((rank = 0; rank < ranks; rank++)); do
  timeout -k 5 "$seconds" "$program" "$rank" "$ranks" "$work/id" "$shapes" > "$work/out.$rank" 2>&1 &
  pids+=($!)
done
status=0
for ((rank = 0; rank < ranks; rank++)); do
  wait "${pids[rank]}"
  code=$?
  [ "$code" -eq 0 ] || echo "rank $rank: exit status $code"
  # A failure counts for more than a skip.
  if [ "$code" -ne 0 ] && { [ "$status" -eq 0 ] || [ "$code" -ne 77 ]; }; then status=$code; fi
  cat "$work/out.$rank"
done
exit "$status"
