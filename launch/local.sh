#!/usr/bin/env bash
# Runs the program on one machine, on its CPU or on all of its GPUs (one process has them all).
# After SIGTERM, and after a fault of a disk or bucket that may pass, it runs the program again.
#
# Type:    bash launch/local.sh [--dry-run] --config=configs/digits.py --workdir=DIR \
#            [all else that `main` takes]
# Needs:   Python 3.11 or newer and this package: pip install -e . (for GPUs '.[cuda12]' or
#          '.[cuda13]'; for gs:// workdirs the extra gcs and `gcloud auth application-default
#          login`). No account, no quota.
# Costs:   this one line; what the machine costs.
# May set: PYTHON                     the interpreter (python)
#          CUDA_VISIBLE_DEVICES       the GPUs to take (all)
#          JAX_COMPILATION_CACHE_DIR  compiled programs for the next start
#                                     (~/.cache/sphere_ar_jax, on local disk)
#          DOCTOR=0                   start without `python -m sphere_ar_jax.doctor` first
#          RESTART_SECONDS            the pause before a restart (5)
#          MAX_RESTARTS               how many restarts there are at most (1000)
#          RETRIES                    how many faults in a row are answered by a restart (3); SIGTERM
#                                     and an hour of work start the count anew
#
# At SIGTERM the program saves and ends with 143 = 128 + 15. If another process than this script
# sent the signal, the same command goes on. So it does after exit code 75, a fault of a disk or
# bucket that may pass. This script passes SIGTERM and Ctrl-C on to the program, and then both end.
# Any other exit code is final and becomes this script's. To go on after a reboot, let systemd or
# cron (@reboot) type the line.
#
# It has run on CPUs. It was never run on a real cluster, nor on a GPU.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
take_words "$@"
pause=$(whole RESTART_SECONDS 5)
most=$(whole MAX_RESTARTS 1000)
retries=$(whole RETRIES 3)
program=("${PYTHON:-python}" -m)

if [ "${DOCTOR:-1}" != 0 ]; then
  code=0
  run "${program[@]}" sphere_ar_jax.doctor "${words[@]}" || code=$?
  if [ "$code" -ne 0 ]; then
    say 'not started: see above (DOCTOR=0 starts all the same)'
    exit "$code"
  fi
fi
program+=(sphere_ar_jax.main "${words[@]}")
if [ -n "$dry_run" ]; then run "${program[@]}"; exit; fi

child='' stopped='' woken=''
pass_on() {
  stopped=1 woken=1
  [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null || true
}
trap 'pass_on TERM' TERM HUP
trap 'pass_on INT' INT
# The program gets a process group, so that Ctrl-C reaches it only once, from here.
set -m
restarts=0 faults=0
while :; do
  began=$SECONDS
  "${program[@]}" </dev/null &
  child=$!
  [ -z "$stopped" ] || kill -s TERM "$child"  # the signal came just before
  while :; do  # a signal may end `wait` while the program still runs
    woken='' code=0
    wait "$child" || code=$?
    [ -n "$woken" ] || break
  done
  child=''
  [ -z "$stopped" ] || exit "$code"
  case $code in
    143) faults=0 why='SIGTERM, saved' ;;
    75)
      [ $((SECONDS - began)) -lt 3600 ] || faults=0
      faults=$((faults + 1)) why='a fault that may pass'
      if [ "$faults" -gt "$retries" ]; then say "failed $faults times in a row"; exit "$code"; fi ;;
    *) exit "$code" ;;
  esac
  if [ "$restarts" -ge "$most" ]; then say "stopped after $restarts restarts"; exit "$code"; fi
  restarts=$((restarts + 1))
  say "ended by $why; restart $restarts in $pause s"
  sleep "$pause"
  [ -z "$stopped" ] || exit "$code"
done
