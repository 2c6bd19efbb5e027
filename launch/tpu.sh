#!/usr/bin/env bash
# Runs the program on a Cloud TPU VM, a pod slice or several: asks for it, waits, installs, runs,
# and goes on when preempted.
#
# Type:    TPU_NAME=l TPU_ZONE=us-east5-b TPU_TYPE=v6e-64 \
#            bash launch/tpu.sh [--dry-run] --config=configs/ar_l.py:tpu,data=… \
#            --config.tokenizer=gs://BUCKET/vae --workdir=gs://BUCKET/l [all else that `main` takes]
#          With the same variables, bash launch/tpu.sh --stop lets the run save and end, and
#          bash launch/tpu.sh --delete deletes the TPU, too.
# Needs:   a Google Cloud project with billing, the Cloud TPU API and quota for that type in that
#          zone; a bucket in the zone's region that the project's Compute Engine service account may
#          write; gcloud 528 or newer, logged in (gcloud auth login; gcloud config set project …);
#          for more than one host also ssh-add ~/.ssh/google_compute_engine (gcloud makes the key at
#          the first gcloud compute ssh).
# Costs:   this one line; the TPU by the second from ACTIVE until it is deleted. It is deleted when
#          the run has ended well; after an error it is KEPT, and this script says so.
# Must set: TPU_NAME, TPU_ZONE, TPU_TYPE
# May set: SLICES                     1; more: Multislice
#          RUNTIME_VERSION            the image of the hosts; known for v2 to v6e
#          SPOT=1                     spot capacity: cheaper, may be taken away at any time
#          PROJECT                    gcloud's own, if not given
#          CREATE_FLAGS               more flags for gcloud … queued-resources create, for example
#                                     '--reserved --network=mine'
#          SETUP                      a command for every host, after the installation, for example
#                                     one that mounts the data. It is run again at each restart:
#                                     'mountpoint -q /data || gcsfuse BUCKET /data'
#          KEEP=1                     do not delete at the end; needed where the program writes a
#                                     file of its own on the first host, as samples
#          JAX_COMPILATION_CACHE_DIR  compiled programs for the next start (compilation_cache next
#                                     to the workdir, since the hosts' disks go with the TPU)
#          DOCTOR=0                   start without `python -m sphere_ar_jax.doctor` on every host
#                                     first; needed for more than 64 hosts, which gcloud reaches
#                                     only in groups
#          POLL_SECONDS               60 between looks
#          MAX_RESTARTS               1000
#          RETRIES                    3 failures in a row; a preemption, or an hour of work, starts
#                                     the count anew
#
# The run goes on without this script, which only starts it, shows the first host's lines and waits.
# Ctrl-C or a lost connection ends the showing, and the same line takes it up again, or starts what
# has ended. But a TPU that was taken away is asked for again only while the script runs. Exit code
# 2 of the program, a mistake in what was typed, is final.
# The hosts get this checkout's code and configs/, committed or not, and write ~/sphere_ar.log.
# Written from gcloud's help and source (528), and tested with a stand-in for gcloud;
# never run on a real cluster or TPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"
verb=run
case ${1:-} in
  --stop | --delete)
    verb=${1#--}
    alone "$@" ;;
  *) take_words "$@" ;;
esac
need TPU_NAME TPU_ZONE
place=("--zone=$TPU_ZONE")
[ -z "${PROJECT:-}" ] || place+=("--project=$PROJECT")
tpus=(gcloud compute tpus queued-resources)
poll=$(whole POLL_SECONDS 60)
most=$(whole MAX_RESTARTS 1000)
retries=$(whole RETRIES 3)
slices=$(whole SLICES 1)
worker="bash ~/sphere_ar/launch/tpu_worker.sh"
package=${TMPDIR:-/tmp}/sphere_ar-$TPU_NAME.tgz

on_all() {  # a command on every host of every slice
  run "${tpus[@]}" ssh "$TPU_NAME" "${place[@]}" --node=all --worker=all --batch-size=all \
    --command="$1"
}

runtime_version() {
  case $TPU_TYPE in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5e-* | v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "TPU_TYPE is $TPU_TYPE, whose image is not known here: set RUNTIME_VERSION" ;;
  esac
}

create() {
  local nodes=("--node-id=$TPU_NAME") more
  [ "$slices" -le 1 ] || nodes=("--node-count=$slices" "--node-prefix=$TPU_NAME")
  [ -z "${SPOT:-}" ] || nodes+=(--spot)
  read -r -a more <<<"${CREATE_FLAGS:-}" || true
  run "${tpus[@]}" create "$TPU_NAME" "${place[@]}" \
    "--accelerator-type=${TPU_TYPE/#v5e-/v5litepod-}" "--runtime-version=$version" \
    "${nodes[@]}" ${more[@]+"${more[@]}"}
}

delete() { run "${tpus[@]}" delete "$TPU_NAME" "${place[@]}" --force --quiet; }

look() { run "${tpus[@]}" describe "$TPU_NAME" "${place[@]}" '--format=value(state.state)'; }

state() {  # NONE: there is no such request. UNKNOWN: gcloud could not say
  local text
  if text=$(look 2>&1); then
    printf '%s\n' "${text##*[[:space:]]}"
  else
    case $text in
      *NOT_FOUND* | *'not found'*) echo NONE ;;
      *) printf '%s\n' "$text" >&2; echo UNKNOWN ;;
    esac
  fi
}

bring_up() {  # returns when the TPU is there
  local now command before='' unknown=0
  while :; do
    now=$(state)
    [ "$now" = "$before" ] || say "$TPU_NAME: $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      NONE) create || give_up $? "$TPU_NAME could not be asked for" ;;
      SUSPENDED) delete || say "$TPU_NAME could not be deleted; trying again" ;;
      FAILED)
        command=$(quote "${tpus[@]}" describe "$TPU_NAME" "${place[@]}")
        give_up 1 "the request failed; $command says why" ;;
      UNKNOWN)
        unknown=$((unknown + 1))
        [ "$unknown" -lt 10 ] || give_up 1 'gcloud could not tell the state ten times' ;;
    esac
    sleep "$poll"
  done
}

install() {  # does nothing on hosts where a run still goes on
  local free="flock -n ~/sphere_ar.lock true || exit 0"
  local unpack="mkdir -p ~/sphere_ar && tar -xzf ~/sphere_ar.tgz -C ~/sphere_ar"
  run env COPYFILE_DISABLE=1 tar -czf "$package" -C "$root" --exclude=__pycache__ \
    sphere_ar_jax configs launch pyproject.toml README.md LICENSE &&
    run "${tpus[@]}" scp "$package" "$TPU_NAME:sphere_ar.tgz" "${place[@]}" \
      --node=all --worker=all --batch-size=all &&
    on_all "$free; $unpack && env SETUP=$(quote "${SETUP:-}") $worker install"
}

doctor() { [ "${DOCTOR:-1}" = 0 ] || on_all "$worker doctor $(quote "${words[@]}")"; }

start() {
  local cache
  cache=$(quote "$(cache_dir)")
  on_all "env JAX_COMPILATION_CACHE_DIR=$cache $worker start $(quote "${words[@]}")"
}

watch() { on_all "$worker wait"; }

give_up() {
  local names
  names=$(quote "TPU_NAME=$TPU_NAME" "TPU_ZONE=$TPU_ZONE")
  say "$2"
  [ "$1" -eq 2 ] || say "no more restarts: exit code $1"
  say "$TPU_NAME may still be there, and cost money: $names bash $0 --delete"
  exit "$1"
}

case $verb in
  stop) on_all "$worker stop"; exit ;;
  delete) delete; exit ;;
esac
need TPU_TYPE
need_remote_words "$root"
on_host=
[ "$mode" != sample ] || on_host=1
for word in "${words[@]}"; do
  case $mode:$word in
    train:* | *:--output=gs://*) ;;
    *:--output=*) on_host=1 ;;
  esac
done
[ -z "$on_host" ] || [ -n "${KEEP:-}" ] ||
  die "what --mode=$mode writes there goes with the TPU: set KEEP=1, copy it away, then --delete"
version=${RUNTIME_VERSION:-$(runtime_version)}
if [ -n "$dry_run" ]; then
  create; look; install; doctor; start; watch
  [ -n "${KEEP:-}" ] || delete
  exit
fi

restarts=0 failures=0 checked=''
while :; do
  bring_up
  began=$SECONDS code=0
  # Code 2 of an installation, as of tar or pip, does not mean that the run ended for good.
  install || { code=$?; [ "$code" -ne 2 ] || code=1; }
  if [ "$code" -eq 0 ] && [ -z "$checked" ]; then
    doctor || give_up $? 'not started: see above (DOCTOR=0 starts all the same)'
    checked=1
  fi
  [ "$code" -ne 0 ] || { start && watch; } || code=$?
  case $code in
    0) break ;;
    2 | 130) give_up "$code" 'the program ended for good: see above' ;;
  esac
  sleep "$poll"  # a TPU that was taken away is ACTIVE for a while yet
  if [ "$(state)" = ACTIVE ] && [ "$code" -ne 143 ]; then
    [ $((SECONDS - began)) -lt 3600 ] || failures=0
    failures=$((failures + 1))
    [ "$failures" -le "$retries" ] ||
      give_up "$code" "failed $failures times in a row, last with exit code $code"
    # Code 255 says that ssh was lost; the run may still go on. After any other code no host may go
    # on with it.
    [ "$code" -eq 255 ] || on_all "$worker stop" || true
  else
    failures=0
  fi
  restarts=$((restarts + 1))
  [ "$restarts" -le "$most" ] || give_up "$code" "$most restarts"
  say "exit code $code; restart $restarts"
done
[ -n "${KEEP:-}" ] || delete
