#!/usr/bin/env bash
# A newcomer's hour: a folder of images becomes a dataset, a run, a sweep, a report and a model to hand on.
# Prints each command, what it printed, and the time it took: benchmarks/first_hour.sh PHOTOS > transcript.txt
# FLOPS: of the run; 3e12 took five minutes on one core of an AMD EPYC (first_hour.md).
set -u
photos=$1 flops=${FLOPS:-3e12}
export DIFFSCALE_STORAGE=$PWD/storage COLUMNS=100

step() {
  printf '\n$ %s\n' "$*"
  local started=$SECONDS
  "$@" 2>&1
  printf '# exit code %d after %d s\n' $? $((SECONDS - started))
}

step diffscale data build "$photos" pictures --resolution 16 --split 0.1
step diffscale train few-emoji-uvit name=first data.path=pictures "train.flops=$flops"
step diffscale tune learning-rate base=few-emoji-uvit data.path=pictures budget.trial.flops=3e11 search.samples=4 max_concurrent=2 train.workers=1
step diffscale runs
step diffscale report storage/runs --out report
run=$(echo storage/runs/first-*)
step cat "$run/README.md"
step diffscale sample "$run" --n 64 --out samples
step diffscale evaluate "$run" --metrics fd_efficientnet_lite0 --n 500
step diffscale export "$run" model
step ls model report
