#!/usr/bin/env bash
# Trains on all GPUs of this host, in one process that sees them all, and nowhere else: without a GPU it stops. It is launch/local.sh with --platform=gpu.
#
#   launch/gpu.sh [--gpus=0,1] [--dry-run] -- --config=configs/clip.py:b32 --workdir=runs/b32 ...
#
# What follows "--" goes to vlm_jax.main as it stands, started in the repository. --gpus takes some of the GPUs (CUDA_VISIBLE_DEVICES). PYTHON names the
# interpreter. The exit code is main's: 0 done, 42 stopped by a signal and saved (the same line resumes), 43 bad config or data, or out of memory,
# 44 stuck (the same line resumes).
set -euo pipefail
# shellcheck source=launch/arguments.bash
source "$(dirname -- "${BASH_SOURCE[0]}")/arguments.bash"

gpus=""
read_arguments "gpus" "" "$@"
need_training
options=("--gpus=$gpus")
if $dry_run; then options+=(--dry-run); fi
exec "$(dirname -- "${BASH_SOURCE[0]}")/local.sh" "${options[@]}" -- --platform=gpu "${arguments[@]}"
