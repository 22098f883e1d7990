#!/usr/bin/env bash
# Trains on all GPUs of this host, in one process that sees them all.
#
#   launch/gpu.sh [--gpus=0,1] [--dry-run] -- --config=configs/clip.py:b32 --workdir=runs/b32 ...
#
# What follows "--" goes to vlm_jax.main as it stands, started in the repository. --gpus takes some of the GPUs (CUDA_VISIBLE_DEVICES). PYTHON names the interpreter.
# The exit code is main's: 0 done, 42 stopped by a signal and saved (the same line resumes), 43 bad config or data, or out of memory.
set -euo pipefail

die() {
    printf 'error: %s\n' "$1" >&2
    exit 43
}

# A word as a shell reads it back.
quote() {
    case $1 in
        "" | *[!A-Za-z0-9_./:=,@%+~-]*) printf "'%s'" "${1//\'/\'\\\'\'}" ;;
        *) printf '%s' "$1" ;;
    esac
}

show() {
    local word line=""
    for word in "$@"; do line+="$(quote "$word") "; done
    printf '%s\n' "${line% }"
}

dry_run=false gpus=""
while [ $# -gt 0 ]; do
    case $1 in
        --gpus=*) gpus=${1#*=} ;;
        --dry-run) dry_run=true ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        --) shift; break ;;
        *) die "$1 is not known (valid: --gpus=LIST --dry-run --help); arguments of vlm_jax.main follow --" ;;
    esac
    shift
done
[ $# -gt 0 ] || die "nothing to train: give --config=... after --"

# Under Slurm or with leftovers of another job in the environment, one process is still one process.
command=(env -u SLURM_STEP_NODELIST -u OMPI_COMM_WORLD_SIZE -u JAX_COORDINATOR_ADDRESS)
[ -z "$gpus" ] || command+=("CUDA_VISIBLE_DEVICES=$gpus")
command+=("${PYTHON:-python}" -m vlm_jax.main --platform=gpu "$@")

if $dry_run; then
    show "${command[@]}"
    exit 0
fi
cd -- "$(dirname -- "$0")/.."
exec "${command[@]}"    # signals reach main, which saves
