#!/usr/bin/env bash
# Submits a run on the GPUs of a SLURM cluster. Preempted or out of time, it is queued again and
# goes on.
#
# Type:    NODES=4 GPUS_PER_NODE=8 SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=24:00:00 \
#            bash launch/slurm.sh [--dry-run] --config=configs/ar_l.py:dtype=bfloat16,data=… \
#            --config.tokenizer=/shared/runs/vae --workdir=/shared/runs/l \
#            [all else that `main` takes]
# Needs:   an account on a SLURM cluster; a disk that its nodes share, with this checkout, the
#          Python environment and --workdir (or a gs:// workdir); this package with '.[cuda12]' or
#          '.[cuda13]' in the environment that is active.
# Costs:   this one line; NODES × GPUS_PER_NODE GPUs for the time limit, again at each requeue,
#          until the run is finished.
# May set: NODES, GPUS_PER_NODE       1 and 8; GPUS_PER_NODE=0 for CPUs
#          PROCESSES_PER_NODE         one for each GPU, as jax.distributed takes it under SLURM;
#                                     1 for one process with all GPUs
#          CPUS_PER_PROCESS           8 for each of its GPUs; they load the images
#          SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, SBATCH_QOS, SBATCH_RESERVATION, …
#                                     sbatch's own variables
#          GRACE_SECONDS              300: SIGTERM comes this long before the time limit
#          JOB_NAME, LOG              sphere_ar, sphere_ar-%j.log
#          PYTHON                     the interpreter (python)
#          JAX_COMPILATION_CACHE_DIR  compiled programs for the next start (compilation_cache next
#                                     to the workdir)
#          DOCTOR=0                   start without `python -m sphere_ar_jax.doctor` on every
#                                     process first
#          MAX_RESTARTS               1000
#          RETRIES                    3 failures in a row, of processes that were lost and of disks
#                                     or buckets; a preemption, or an hour of work, starts the
#                                     count anew
#
# The job itself is launch/slurm_job.sh. `scancel JOB` ends it for good; the same line, typed again,
# goes on.
# Written from SLURM's and JAX's documentation, and tested with stand-ins for sbatch and srun;
# never run on a real cluster.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"
take_words "$@"
nodes=$(whole NODES 1)
gpus=$(whole GPUS_PER_NODE 8)
grace=$(whole GRACE_SECONDS 300)
per_gpu=$((gpus > 0 ? gpus : 1))
processes=${PROCESSES_PER_NODE:-$per_gpu}
[ "$processes" = "$per_gpu" ] || [ "$processes" = 1 ] ||
  die "PROCESSES_PER_NODE is $processes, but must be 1 or the number of GPUs of a node, $per_gpu"
cpus=$(whole CPUS_PER_PROCESS $((8 * per_gpu / processes)))

environment=("SPHERE_AR_LAUNCH=$here" "JAX_COMPILATION_CACHE_DIR=$(cache_dir)")
resources=("--nodes=$nodes" "--ntasks-per-node=$processes" "--cpus-per-task=$cpus")
if [ "$gpus" -gt 0 ]; then
  # GPUs are requested per node, not per task: a JAX process must see all GPUs of its node, and takes
  # the one of its local number.
  resources+=("--gpus-per-node=$gpus")
  if [ "$processes" -lt "$gpus" ]; then  # under SLURM, JAX would take one GPU for each process
    environment+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))")
  fi
fi
run env "${environment[@]}" sbatch \
  --job-name="${JOB_NAME:-sphere_ar}" --output="${LOG:-sphere_ar-%j.log}" \
  --open-mode=append "${resources[@]}" --requeue --signal="TERM@$grace" --export=ALL \
  "$here/slurm_job.sh" "${words[@]}"
