#!/usr/bin/env bash
# Trains on this machine: in one process that sees all of its devices, or in several that share them.
#
#   launch/local.sh [--processes=N] [--gpus=0,1] [--port=8476] [--dry-run] -- --config=configs/clip.py:b32 --workdir=runs/b32 ...
#
# What follows "--" goes to vlm_jax.main as it stands, started in the repository. --gpus takes some of the GPUs (CUDA_VISIBLE_DEVICES); several processes
# have equal parts of them. --port is where several find each other, for a second such run beside a first. PYTHON names the interpreter. The output of
# several stands in WORKDIR/logs/process_I.log, that of process 0 here too. SIGTERM and Ctrl-C reach them all, which save.
#
# The exit code is main's: 0 done, 42 stopped by a signal and saved (the same line resumes), 43 bad config or data, or out of memory, 44 a process that is
# gone or stuck (the same line resumes). Of several processes the first of 43, 44, any other, 42.
set -euo pipefail
# shellcheck source=launch/arguments.bash
source "$(dirname -- "${BASH_SOURCE[0]}")/arguments.bash"

processes=1 gpus="" port=8476
read_arguments "processes gpus port" "" "$@"
need_training
need_number processes
need_number port
python=${PYTHON:-python}
# Under Slurm or with leftovers of another job in the environment, these are still the only processes.
clean=(env -u SLURM_STEP_NODELIST -u OMPI_COMM_WORLD_SIZE -u SKYPILOT_NUM_NODES -u JAX_COORDINATOR_ADDRESS -u JAX_COORDINATOR_IP)
$dry_run || cd -- "$(dirname -- "$0")/.."

if [ "$processes" = 1 ]; then
    [ -z "$gpus" ] || clean+=("CUDA_VISIBLE_DEVICES=$gpus")
    command=("${clean[@]}" "$python" -m vlm_jax.main "${arguments[@]}")
    if $dry_run; then show "${command[@]}"; exit 0; fi
    exec "${command[@]}"    # signals reach main, which saves
fi

if [ -z "$gpus" ] && command -v nvidia-smi > /dev/null; then
    gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -)
fi
IFS=, read -ra every <<< "$gpus"
each=$((${#every[@]} / processes))
[ -z "$gpus" ] || [ $((each * processes)) = ${#every[@]} ] || die "--gpus=$gpus does not divide over --processes=$processes"

workdir=.
for word in "${arguments[@]}"; do
    case $word in --workdir=*://*) ;; --workdir=*) workdir=${word#--workdir=} ;; esac
done
logs=$workdir/logs
$dry_run || mkdir -p -- "$logs"

started=()
for ((i = 0; i < processes; i++)); do
    command=("${clean[@]}")
    if [ -n "$gpus" ]; then
        share=$(IFS=,; printf '%s' "${every[*]:i * each:each}")
        command+=("CUDA_VISIBLE_DEVICES=$share")
    fi
    command+=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$i")
    command+=("$python" -u -m vlm_jax.main "${arguments[@]}")
    if $dry_run; then
        printf '%s > %s 2>&1 &\n' "$(show "${command[@]}")" "$(quote "$logs/process_$i.log")"
    elif [ "$i" = 0 ]; then
        "${command[@]}" > >(tee -a -- "$logs/process_0.log") 2>&1 &
        started+=($!)
    else
        "${command[@]}" >> "$logs/process_$i.log" 2>&1 &
        started+=($!)
    fi
done
if $dry_run; then exit 0; fi

trap 'kill -TERM "${started[@]}" 2> /dev/null || true' TERM INT
code=0
rank() { case $1 in 43) echo 4 ;; 44) echo 3 ;; 0) echo 0 ;; 42) echo 1 ;; *) echo 2 ;; esac; }
for i in "${!started[@]}"; do
    while :; do
        own=0
        wait "${started[i]}" || own=$?
        kill -0 "${started[i]}" 2> /dev/null || break      # a signal ends the waiting, not the process
    done
    [ "$own" = 0 ] || printf 'process %s ended with %s: %s\n' "$i" "$own" "$logs/process_$i.log" >&2
    [ "$(rank "$own")" -le "$(rank "$code")" ] || code=$own
done
exit "$code"
