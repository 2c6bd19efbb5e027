#!/usr/bin/env bash
# Runs the program on TPU slices of a GKE cluster with XPK: builds and pushes an image, and creates
# a workload (a JobSet).
#
# Type:    CLUSTER=… TPU_TYPE=v6e-64 \
#            IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/sphere_ar_jax:1 \
#            bash launch/xpk.sh [--dry-run] --config=configs/ar_l.py:tpu,data=… \
#            --config.tokenizer=gs://BUCKET/vae --workdir=gs://BUCKET/l [all else that `main` takes]
#          With the same variables, bash launch/xpk.sh --delete ends the workload.
# Needs:   a Google Cloud project with billing and TPU quota; a cluster (xpk cluster create
#          --cluster=… --tpu-type=…); an Artifact Registry repository; a bucket that the cluster's
#          service account may write; xpk (pip install xpk), gcloud with kubectl, and docker, logged
#          in (gcloud auth login; gcloud auth configure-docker REGION-docker.pkg.dev).
# Costs:   this one line; the slices for as long as the cluster has them, not only while the
#          workload runs.
# Must set: CLUSTER, TPU_TYPE, IMAGE
# May set: WORKLOAD                   sphere-ar; lower-case letters, digits and -, at most 40
#          SLICES                     1
#          PROJECT, ZONE              gcloud's own, if not given
#          BUILD=0                    IMAGE is there already: do not build and push
#          MAX_RESTARTS               1000, those after a crash that comes again and again, too
#          GRACE_SECONDS              300 to save in after SIGTERM; spot nodes give less than 30
#                                     whatever is asked for
#          JAX_COMPILATION_CACHE_DIR  compiled programs for the next start (compilation_cache next
#                                     to the workdir)
#          DOCTOR=0                   start without `python -m sphere_ar_jax.doctor` on every host
#                                     first
#          XPK_FLAGS                  more flags for xpk workload create, for example
#                                     --priority=high
#
# Exit codes 127 to 255, so also 143 after SIGTERM, restart all hosts, and the run goes on; this is
# XPK's own rule. So does 75, a fault of a disk or bucket that may pass. Any other ends the
# workload. A workload of the same name must be deleted
# before it is created again; the run goes on all the same.
# Data must be on every host, under the path that the config names: xpk storage attach, and then
# XPK_FLAGS=--storage=NAME. XPK's GPU clusters are not for this script, because JAX does not find
# its processes there by itself.
# Written against XPK's source of June 2026, and tested with stand-ins for docker and xpk;
# never run on a real cluster.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"
workload=${WORKLOAD:-sphere-ar}
place=()
[ -z "${PROJECT:-}" ] || place+=("--project=$PROJECT")
[ -z "${ZONE:-}" ] || place+=("--zone=$ZONE")
if [ "${1:-}" = --delete ]; then
  alone "$@"
  need CLUSTER
  run xpk workload delete --force "--cluster=$CLUSTER" "--workload=$workload" \
    ${place[@]+"${place[@]}"}
  exit
fi
take_words "$@"
need CLUSTER TPU_TYPE IMAGE
need_remote_words "$root"
slices=$(whole SLICES 1)
most=$(whole MAX_RESTARTS 1000)
grace=$(whole GRACE_SECONDS 300)
read -r -a more <<<"${XPK_FLAGS:-}" || true

if [ "${BUILD:-1}" != 0 ]; then
  # The program runs as root, because only root may open TPU devices.
  run docker build --platform=linux/amd64 --file="$root/launch/Dockerfile" \
    --build-arg extra=tpu --build-arg user=root --tag="$IMAGE" "$root"
  run docker push "$IMAGE"
fi
# XPK passes SIGTERM on to one process; exec makes it the program.
program="exec python -m sphere_ar_jax.main $(quote "${words[@]}")"
if [ "${DOCTOR:-1}" != 0 ]; then
  program="python -m sphere_ar_jax.doctor $(quote "${words[@]}") && $program"
fi
run xpk workload create "--cluster=$CLUSTER" "--workload=$workload" \
  "--tpu-type=${TPU_TYPE/#v5e-/v5litepod-}" "--num-slices=$slices" \
  "--docker-image=$IMAGE" "--max-restarts=$most" --restart-on-exit-codes=75 \
  "--termination-grace-period-seconds=$grace" \
  ${place[@]+"${place[@]}"} ${more[@]+"${more[@]}"} \
  --command="export JAX_COMPILATION_CACHE_DIR=$(quote "$(cache_dir)"); $program"
