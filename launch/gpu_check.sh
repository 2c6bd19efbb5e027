#!/usr/bin/env bash
# Checks a machine with an NVIDIA GPU in one go: installs the package with CUDA, runs the tests on
# the GPU, and runs the digits job on it.
# Needs: Python 3.11 or newer, an NVIDIA driver for CUDA 12 or 13, network for pip. It takes about
#   15 minutes.
# Type: bash launch/gpu_check.sh [cuda12|cuda13]     (in the checkout)
# It ends with the scores of the run, metrics.json.
set -euo pipefail
cuda=${1:-cuda12}
cd "$(dirname "$0")/.."
python3 -m venv .venv-gpu
# shellcheck disable=SC1090,SC1091
. .venv-gpu/bin/activate
pip install -q -e ".[test,$cuda]"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python -c 'import jax
print("JAX", jax.__version__, jax.devices())
assert jax.devices()[0].platform == "gpu"'
# Tests start further processes on the same GPU, so that none may take all of its memory. Goldens
# were measured in full float32, not TF32. The test that kills a run compares bit for bit, which
# needs deterministic operations.
XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS=--xla_gpu_deterministic_ops=true \
  JAX_DEFAULT_MATMUL_PRECISION=highest pytest -q
workdir=$(mktemp -d)
python -m sphere_ar_jax.main --config=configs/digits.py --workdir="$workdir"
cat "$workdir/metrics.json"
