#!/usr/bin/env bash
# Trains on a Slurm cluster: one process a node, which has all of the node's GPUs. A run that is stopped goes back into the queue and resumes.
#
#   launch/slurm.sh --nodes=4 [--gpus=8] [--name=NAME] [--time=24:00:00] [--partition=P] [--account=A] [--image=FILE] [--logs=logs] [--dry-run] -- --config=... --workdir=...
#
# Start it on a login node, in an environment with the package (or with PYTHON naming its interpreter); --workdir lies on storage that all nodes see.
# What follows "--" goes to vlm_jax.main as it stands. --image runs it in a container (pyxis: srun --container-image). Two minutes before the time
# limit, and at a preemption, main gets a signal, saves and ends with 42; launch/slurm_job.bash then asks for the job to be queued again.
# Each process writes LOGS/NAME_JOB_processI.log, the job LOGS/NAME_JOB.log.
#
# The exit code is sbatch's. That of the job is main's: 0 done, 42 stopped by a signal and saved (queued again), 43 bad config or data, or out of memory,
# 44 a process that is gone or stuck (queued again, ten times at most).
set -euo pipefail
# shellcheck source=launch/arguments.bash
source "$(dirname -- "${BASH_SOURCE[0]}")/arguments.bash"

nodes="" gpus=8 name=vlm_jax time="" partition="" account="" image="" logs=logs
read_arguments "nodes gpus name time partition account image logs" "" "$@"
need nodes
need_training
need_number nodes
[[ $gpus =~ ^[0-9]+$ ]] || die "--gpus=$gpus is not a number"
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

command=(sbatch --job-name "$name" --nodes "$nodes" --ntasks-per-node 1)
[ "$gpus" = 0 ] || command+=(--gpus-per-node "$gpus")
[ -z "$time" ] || command+=(--time "$time")
[ -z "$partition" ] || command+=(--partition "$partition")
[ -z "$account" ] || command+=(--account "$account")
# Without "B:" the signal goes to the processes of srun, not to the script.
command+=(--requeue --signal USR1@120 --open-mode append --chdir "$root" --output "$logs/%x_%j.log" --export "ALL,PYTHON=${PYTHON:-python},IMAGE=$image,LOGS=$logs")
$dry_run || (cd -- "$root" && mkdir -p -- "$logs")
call "${command[@]}" "$root/launch/slurm_job.bash" "${arguments[@]}"
