# shellcheck shell=bash
# Read by the tests of the tools in perf/: a folder of their own to work in, and how they fail.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
  echo "${0##*/}: $*" >&2
  exit 1
}
# status WANTED COMMAND...: runs, output to out and err.
status() {
  local wanted=$1 got=0
  shift
  "$@" > out 2> err || got=$?
  [ "$got" = "$wanted" ] || fail "exit status $got instead of $wanted: $* ($(head -c 300 err) $(grep -e 'first fault' -e WRONG out | head -n 3))"
}
