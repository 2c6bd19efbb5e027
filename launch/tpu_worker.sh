#!/usr/bin/env bash
# What launch/tpu.sh runs on each host of a TPU: installs, starts the program so that it outlives
# the connection, waits.
#
# Type:    nothing, since launch/tpu.sh does. By hand, on a host, in ~/sphere_ar:
#          bash launch/tpu_worker.sh install | doctor WORDS | start WORDS | wait | stop  [--dry-run]
# Needs:   Ubuntu as on Cloud TPU VMs, network; WORDS are those that `main` takes.
# Costs:   nothing of its own.
# May set: SETUP, JAX_COMPILATION_CACHE_DIR: see launch/tpu.sh; STOP_SECONDS, 600 until `stop` kills
#
# A host runs one program at a time. The program holds the lock ~/sphere_ar.lock for as long as it
# lives, so that `start` does nothing where it runs already. `wait` ends with its exit code, or with
# 143 if it vanished without one, as at a reboot.
# Tested with stand-ins for uv and Python; never run on a real cluster or TPU.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh
verb=${1:-}
[ $# -eq 0 ] || shift
base=$HOME/sphere_ar
log=$base.log lock=$base.lock ended=$base.exit pid=$base.pid last=$base.words
python=.venv/bin/python
export PATH=$HOME/.local/bin:$PATH

runs() { ! flock -n "$lock" true; }

install() {
  command -v uv >/dev/null 2>&1 || run bash -c 'curl -LsSf https://astral.sh/uv/install.sh | sh'
  [ -x "$python" ] || run uv venv --quiet --python=3.12 .venv  # the hosts' own may be too old
  run uv pip install --quiet --python="$python" -e '.[tpu,gcs]'
  [ -z "${SETUP:-}" ] || run bash -c "$SETUP"
}

start() {
  local program=("$python" -u -m sphere_ar_jax.main "${words[@]}")
  if [ -n "$dry_run" ]; then run "${program[@]}"; return; fi
  exec 9>>"$lock"
  if ! flock -n 9; then
    [ "$(quote "${words[@]}")" = "$(cat "$last")" ] ||
      die 'another command is running: launch/tpu.sh --stop ends it'
    say 'runs already'
    return
  fi
  rm -f "$ended" "$pid"
  quote "${words[@]}" >"$last"
  # Descriptor 9, and with it the lock, stays with the program and what it starts.
  # shellcheck disable=SC2016
  setsid nohup bash -c '
    ended=$1 pid=$2; shift 2
    "$@" & child=$!
    echo $child >"$pid"; code=0; wait $child || code=$?
    echo $code >"$ended.new"; mv "$ended.new" "$ended"
  ' - "$ended" "$pid" "${program[@]}" </dev/null >>"$log" 2>&1 &
}

wait_for_it() {
  local shown=''
  case $(hostname) in
    *-w-0 | *[!0-9]) ;;  # on the others the same lines
    *-w-*) shown=/dev/null ;;
  esac
  tail -n 20 -F "$log" >"${shown:-/dev/stdout}" 2>/dev/null &
  local tail=$!
  flock "$lock" true  # it is held until the program has ended
  sleep 1
  kill "$tail"
  exit "$(cat "$ended" 2>/dev/null || echo 143)"
}

stop() {
  local left
  left=$(whole STOP_SECONDS 600)
  runs || return 0
  kill -s TERM "$(cat "$pid")" || true
  while runs && [ "$left" -gt 0 ]; do
    sleep 1
    left=$((left - 1))
  done
  runs || return 0
  say 'did not end in time: killed'
  kill -s KILL "$(cat "$pid")" || true
}

case $verb in
  install | stop)
    alone "$verb" "$@"
    if [ "$verb" = stop ] && [ -n "$dry_run" ]; then
      echo "kill -s TERM \"\$(cat '$pid')\""
      exit
    fi
    "$verb" ;;
  wait)
    alone wait "$@"
    if [ -n "$dry_run" ]; then run flock "$lock" true; exit; fi
    wait_for_it ;;
  doctor)
    take_words "$@"
    if [ -z "$dry_run" ] && runs; then say 'runs already: not looked at'; exit; fi
    run "$python" -m sphere_ar_jax.doctor "${words[@]}" ;;
  start)
    take_words "$@"
    start ;;
  -h | --help) show_help ;;
  *) die "say install, doctor, start, wait or stop, not '$verb' (--help says more)" ;;
esac
