#!/usr/bin/env bash
# Makes the speed table of a machine with an NVIDIA GPU in one go: B, L and H in bfloat16, batches
# of 1 to 256. Every part stands beside the public PyTorch code under torch.compile. The parts of
# the sampler are measured again with its own kernels (ar.fused). Then it measures what batch,
# tokens, depth and steps cost.
# Needs: Python 3.11 or newer, an NVIDIA driver for CUDA 12 or 13, network for pip, a checkout of
#   the public code (git clone https://github.com/guolinke/SphereAR). H at 256 images needs 80 GB of
#   GPU memory; a smaller GPU measures fewer sizes.
# Type: bash launch/gpu_benchmark.sh CHECKOUT [cuda12|cuda13] [SIZES] [BATCHES]
#   SIZES is for example "b l", BATCHES "1 64".
# Writes bench_gpu/SIZE_BATCH/benchmark.md. The table names a part that does not fit or fails, and
# the others go on.
set -euo pipefail
checkout=$(realpath "${1:?give a checkout of guolinke/SphereAR}")
cuda=${2:-cuda12}
sizes=${3:-b l h}
batches=${4:-1 8 64 256}
cd "$(dirname "$0")/.."
python3 -m venv .venv-gpu
# shellcheck disable=SC1090,SC1091
. .venv-gpu/bin/activate
pip install -q -e ".[test,$cuda]" torch
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python -c 'import jax
print("JAX", jax.__version__, jax.devices())
assert jax.devices()[0].platform == "gpu"'
for size in $sizes; do
  for batch in $batches; do
    python -m sphere_ar_jax.benchmark --config="configs/ar_$size.py" \
      --config.dtype=bfloat16 --config.ar.remat=False \
      --batch_size="$batch" --train_batch_size="$((batch > 64 ? 64 : batch))" \
      --against="$checkout" --side=compiled --repeats=5 \
      --parts=cold,prefill,transformer,head,decode,encode,train_tokenizer,train_ar,sample \
      --output="bench_gpu/${size}_$batch" || echo "failed: $size at $batch images"
    python -m sphere_ar_jax.benchmark --config="configs/ar_$size.py:gpu" \
      --config.ar.remat=False --batch_size="$batch" --repeats=5 --parts=transformer,head,sample \
      --output="bench_gpu/${size}_${batch}_fused" || echo "failed: $size at $batch images, fused"
  done
  python -m sphere_ar_jax.benchmark --config="configs/ar_$size.py" --config.dtype=bfloat16 \
    --parts=head --curves --batch_size=64 --output="bench_gpu/${size}_curves" ||
    echo "failed: the curves of $size"
done
cat bench_gpu/*/benchmark.md
