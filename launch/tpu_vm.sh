#!/usr/bin/env bash
# Trains on a Cloud TPU VM: create it, copy this repository, run the same command on every worker, delete it.
#
#   launch/tpu_vm.sh create --name=NAME --zone=ZONE --type=v5litepod-8 [--version=IMAGE] [--spot] [--dry-run]
#   launch/tpu_vm.sh copy   --name=NAME --zone=ZONE [--dry-run]
#   launch/tpu_vm.sh run    --name=NAME --zone=ZONE [--dry-run] -- --config=configs/clip.py:b32 --workdir=DIR ...
#   launch/tpu_vm.sh delete --name=NAME --zone=ZONE [--dry-run]
#
# TPU_NAME, TPU_ZONE, TPU_TYPE and TPU_VERSION stand in for the flags. The project is gcloud's own (gcloud config set project ...).
# copy installs the package too, in ~/vlm_jax/.venv. What follows "--" goes to vlm_jax.main as it stands. run lasts as long as its
# connection (start it in tmux); the same line resumes, on a fresh machine too where --workdir lies in a mounted bucket.
#
# The exit code of run is main's: 0 done, 42 stopped by a signal and saved (the same line resumes), 43 bad config or data, or out of memory.
# Machines of one host, the ones that vlm_jax.main trains on today: v2-8, v3-8, v4-8, v5p-8, v5litepod-1, -4 and -8, v6e-1, -4 and -8.
# A larger slice has several hosts: run starts main on all of them with --distributed, and main says that it does not train there yet.
set -euo pipefail

die() {
    printf 'error: %s\n' "$1" >&2
    exit 43
}

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
}

# The image that Google names for a generation.
image() {
    case $1 in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
        *) die "type $1: its image is not known here; name it with --version" ;;
    esac
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

call() {
    if $dry_run; then show "$@"; else "$@"; fi
}

action=${1:-}
case $action in
    create | copy | run | delete) shift ;;
    -h | --help) usage; exit 0 ;;
    *) die "${action:-nothing} is not an action (valid: create copy run delete --help)" ;;
esac

name=${TPU_NAME:-} zone=${TPU_ZONE:-} type=${TPU_TYPE:-} version=${TPU_VERSION:-} spot=false dry_run=false
while [ $# -gt 0 ]; do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --version=*) version=${1#*=} ;;
        --spot) spot=true ;;
        --dry-run) dry_run=true ;;
        --) shift; break ;;
        *) die "$1 is not known (valid: --name= --zone= --type= --version= --spot --dry-run); arguments of vlm_jax.main follow --" ;;
    esac
    shift
done
[ -n "$name" ] || die "--name (or TPU_NAME) is missing"
[ -n "$zone" ] || die "--zone (or TPU_ZONE) is missing"
tpu=(gcloud compute tpus tpu-vm)
everywhere=(--zone "$zone" --worker=all)

case $action in
    create)
        [ -n "$type" ] || die "--type (or TPU_TYPE) is missing, such as v5litepod-8"
        [ -n "$version" ] || version=$(image "$type")
        command=("${tpu[@]}" create "$name" --zone "$zone" --accelerator-type "$type" --version "$version")
        ! $spot || command+=(--spot)
        call "${command[@]}"
        ;;
    copy)
        # What git tracks, as it lies here; runs, caches and keys stay behind.
        root=$(cd -- "$(dirname -- "$0")/.." && pwd)
        archive=vlm_jax.tar.gz
        if ! $dry_run; then
            folder=$(mktemp -d)
            trap 'rm -rf -- "$folder"' EXIT
            archive=$folder/vlm_jax.tar.gz
            git -C "$root" ls-files -z | tar -C "$root" --null -T - -czf "$archive"
        fi
        call "${tpu[@]}" scp "$archive" "$name:vlm_jax.tar.gz" "${everywhere[@]}"
        # The images' own Python is too old for the package; uv brings one.
        # shellcheck disable=SC2016    # $HOME is the worker's
        call "${tpu[@]}" ssh "$name" "${everywhere[@]}" --command \
            'set -e; mkdir -p "$HOME/vlm_jax"; cd "$HOME/vlm_jax"; tar -xzf ../vlm_jax.tar.gz; python3 -m pip install -q --user uv; [ -d .venv ] || python3 -m uv venv -q --python 3.12 .venv; python3 -m uv pip install -q --python .venv/bin/python -e ".[tpu]"'
        ;;
    run)
        [ $# -gt 0 ] || die "nothing to train: give --config=... after --"
        # The pipe keeps a log on each worker; pipefail keeps main's exit code, and gcloud passes on the code of its ssh.
        # shellcheck disable=SC2016    # $HOME and $(hostname) are the worker's
        remote='set -o pipefail; cd "$HOME/vlm_jax"; mkdir -p logs; .venv/bin/python -u -m vlm_jax.main --platform=tpu --distributed '
        # shellcheck disable=SC2016
        remote+="$(show "$@")"' 2>&1 | tee -a "logs/$(hostname).log"'
        call "${tpu[@]}" ssh "$name" "${everywhere[@]}" --command "$remote"
        ;;
    delete)
        call "${tpu[@]}" delete "$name" --zone "$zone" --quiet
        ;;
esac
