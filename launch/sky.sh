#!/usr/bin/env bash
# Trains on any cloud through SkyPilot, which finds machines, copies this repository, and starts anew what a cloud takes away.
#
#   launch/sky.sh --name=NAME --accelerators=H100:8 [--nodes=2] [--infra=gcp] [--extra=cuda] [--on-demand] [--dry-run] -- --config=... --workdir=gs://BUCKET/NAME ...
#
# What follows "--" goes to vlm_jax.main as it stands; --workdir and data lie in buckets, so that a fresh machine resumes. --extra: cuda, cuda12 or tpu
# (--accelerators=tpu-v6e-8). Logs: sky jobs logs NAME; stop: sky jobs cancel --name NAME.
#
# The exit code is SkyPilot's (0, or 100 where the job failed). Its controller reads main's: 0 done, 42 stopped by a signal and saved and 44 a process that
# is gone or stuck are started again, 43 bad config or data, or out of memory, is final.
set -euo pipefail
# shellcheck source=launch/arguments.bash
source "$(dirname -- "${BASH_SOURCE[0]}")/arguments.bash"

name="" accelerators="" nodes=1 infra="" extra=cuda on_demand=false
read_arguments "name accelerators nodes infra extra" "on-demand" "$@"
need name accelerators
need_training
need_number nodes
case $extra in cuda | cuda12 | tpu) ;; *) die "--extra=$extra is not known (valid: cuda cuda12 tpu)" ;; esac
$dry_run || cd -- "$(dirname -- "$0")/.."     # what SkyPilot copies

command=(sky jobs launch --yes --name "$name" --num-nodes "$nodes" --gpus "$accelerators")
[ -z "$infra" ] || command+=(--infra "$infra")
if $on_demand; then command+=(--no-use-spot); else command+=(--use-spot); fi
command+=(--env "EXTRA=$extra" --env "ARGUMENTS=$(show "${arguments[@]}")" launch/sky.yaml)
call "${command[@]}"
