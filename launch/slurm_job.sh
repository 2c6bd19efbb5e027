#!/usr/bin/env bash
# The job that launch/slurm.sh submits. It starts the program on all nodes with srun, and queues
# itself again after SIGTERM, and after faults that may pass.
#
# Type:    nothing, since sbatch runs it. It runs a copy, which finds the other scripts by
#          SPHERE_AR_LAUNCH, their directory.
#          bash launch/slurm_job.sh --dry-run --config=… --workdir=… prints what it would run.
# Needs:   what launch/slurm.sh sets and says; inside a job, SLURM's variables.
# Costs:   what launch/slurm.sh costs.
# May set: PYTHON, DOCTOR=0, MAX_RESTARTS, RETRIES: see launch/slurm.sh
#
# SIGTERM comes to the processes at preemption and GRACE_SECONDS before the time limit. They save
# and end with 143, and the job is queued again. It is queued again, at most RETRIES times in a row,
# after 75, a fault of a disk or bucket that may pass, and where there are several processes
# (SLURM_JOB_NUM_NODES × SLURM_NTASKS_PER_NODE) after 134, with which JAX aborts processes that have
# lost another one, and after 137, which is kill -9. ~/.cache/sphere_ar_jax/slurm-JOB counts these.
# Any other exit code is final. A job that was cancelled is left alone.
# Written from SLURM's and JAX's documentation, and tested with stand-ins for srun and scontrol;
# never run on a real cluster.
set -euo pipefail
# shellcheck source=launch/common.sh
. "${SPHERE_AR_LAUNCH:-$(dirname "$0")}/common.sh"
take_words "$@"
[ -n "$dry_run" ] || need SLURM_JOB_ID
most=$(whole MAX_RESTARTS 1000)
retries=$(whole RETRIES 3)
failures_file=$HOME/.cache/sphere_ar_jax/slurm-${SLURM_JOB_ID:-}

failures() {  # counts one more failure and prints how many there were in a row
  local before=0
  # An hour of work starts the count anew.
  if [ "$SECONDS" -lt 3600 ] && [ -f "$failures_file" ]; then before=$(cat "$failures_file"); fi
  mkdir -p "$(dirname "$failures_file")"
  echo $((before + 1)) | tee "$failures_file"
}

# One process may end before the others have saved; srun must then not end the others.
tasks=(srun --kill-on-bad-exit=0 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}")
python=${PYTHON:-python}

if [ "${DOCTOR:-1}" != 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
  code=0
  run "${tasks[@]}" --label "$python" -m sphere_ar_jax.doctor "${words[@]}" || code=$?
  if [ "$code" -ne 0 ]; then
    say 'not started: see above (DOCTOR=0 starts all the same)'
    exit "$code"
  fi
fi
code=0
run "${tasks[@]}" "$python" -m sphere_ar_jax.main "${words[@]}" || code=$?
if [ -n "$dry_run" ]; then
  printf '# if that ends with 143: %s\n' "$(quote scontrol requeue "${SLURM_JOB_ID:-JOB}")"
  exit
fi
processes=$((${SLURM_JOB_NUM_NODES:-1} * ${SLURM_NTASKS_PER_NODE:-1}))
case $code in
  143) rm -f "$failures_file" ;;
  75 | 134 | 137)
    [ "$code" -eq 75 ] || [ "$processes" -gt 1 ] || exit "$code"
    count=$(failures)
    if [ "$count" -gt "$retries" ]; then
      rm -f "$failures_file"
      say "failed $count times in a row, last with exit code $code: not queued again"
      exit "$code"
    fi ;;
  *) rm -f "$failures_file"; exit "$code" ;;
esac
if [ "${SLURM_RESTART_COUNT:-0}" -ge "$most" ]; then
  say "stopped after $most restarts"
# A job that was cancelled is COMPLETING.
elif [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  say "ended with exit code $code; queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
