#!/usr/bin/env bash
# Trains on Cloud TPU VMs: create them, copy this repository, run the same command on every worker, delete them.
#
#   launch/tpu_vm.sh create --name=NAME --zone=ZONE --type=v5litepod-8 [--version=IMAGE] [--spot] [--dry-run]
#   launch/tpu_vm.sh queue  --name=NAME --zone=ZONE --type=v5p-128 [--slices=N] [--version=IMAGE] [--spot] [--dry-run]
#   launch/tpu_vm.sh state  --name=NAME --zone=ZONE [--queued] [--dry-run]
#   launch/tpu_vm.sh copy   --name=NAME --zone=ZONE [--slices=N] [--dry-run]
#   launch/tpu_vm.sh run    --name=NAME --zone=ZONE [--slices=N] [--dry-run] -- --config=configs/clip.py:l14 --workdir=gs://BUCKET/l14 ...
#   launch/tpu_vm.sh logs   --name=NAME --zone=ZONE [--slices=N] [--dry-run]
#   launch/tpu_vm.sh delete --name=NAME --zone=ZONE [--queued] [--dry-run]
#
# queue asks for a slice, or for several that train together (--slices), and waits its turn; state says whether it has come. A slice that was queued is
# deleted with --queued. TPU_NAME, TPU_ZONE, TPU_TYPE and TPU_VERSION stand in for the flags. The project is gcloud's own (gcloud config set project ...).
# copy installs the package too, in ~/vlm_jax/.venv. What follows "--" goes to vlm_jax.main as it stands. run lasts as long as its connection (start it
# in tmux); the same line resumes, on fresh machines too where --workdir lies in a bucket. Each worker keeps its output in ~/vlm_jax/logs/HOST.log.
#
# The exit code of run is main's: 0 done, 42 stopped by a signal and saved (the same line resumes), 43 bad config or data, or out of memory, 44 a process
# that is gone or stuck (the same line resumes); 255 is a lost connection. Of several workers it is the first that is not 0.
# For v2 to v6e. Later chips come through GKE alone: launch/gke.sh.
set -euo pipefail
# shellcheck source=launch/arguments.bash
source "$(dirname -- "${BASH_SOURCE[0]}")/arguments.bash"

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

action=${1:-}
case $action in
    create | queue | state | copy | run | logs | delete) shift ;;
    -h | --help) usage; exit 0 ;;
    *) die "${action:-nothing} is not an action (valid: create queue state copy run logs delete --help)" ;;
esac

name=${TPU_NAME:-} zone=${TPU_ZONE:-} type=${TPU_TYPE:-} version=${TPU_VERSION:-} slices=1 spot=false queued=false
read_arguments "name zone type version slices" "spot queued" "$@"
[ -n "$name" ] || die "--name (or TPU_NAME) is missing"
[ -n "$zone" ] || die "--zone (or TPU_ZONE) is missing"
need_number slices
queue=(gcloud compute tpus queued-resources)
tpu=(gcloud compute tpus tpu-vm) everywhere=(--zone "$zone" --worker=all)
if [ "$slices" != 1 ]; then     # of one queued resource
    tpu=("${queue[@]}") everywhere+=(--node=all)
fi

case $action in
    create | queue)
        [ -n "$type" ] || die "--type (or TPU_TYPE) is missing, such as v5litepod-8"
        [ -n "$version" ] || version=$(image "$type")
        if [ "$action" = create ]; then
            [ "$slices" = 1 ] || die "--slices=$slices: several slices are queued: launch/tpu_vm.sh queue ..."
            command=("${tpu[@]}" create "$name" --zone "$zone" --accelerator-type "$type" --version "$version")
        else
            command=("${queue[@]}" create "$name" --zone "$zone" --accelerator-type "$type" --runtime-version "$version")
            if [ "$slices" = 1 ]; then command+=(--node-id "$name"); else command+=(--node-count "$slices" --node-prefix "$name"); fi
        fi
        ! $spot || command+=(--spot)
        call "${command[@]}"
        ;;
    state)
        if $queued; then tpu=("${queue[@]}") format='value(state.state)'; else format='value(state)'; fi
        call "${tpu[@]}" describe "$name" --zone "$zone" --format "$format"
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
        need_training
        # The pipe keeps a log on each worker; pipefail keeps main's exit code, and gcloud passes on the code of its ssh.
        # shellcheck disable=SC2016    # $HOME and $(hostname) are the worker's
        remote='set -o pipefail; cd "$HOME/vlm_jax"; mkdir -p logs; .venv/bin/python -u -m vlm_jax.main --platform=tpu --distributed '
        # shellcheck disable=SC2016
        remote+="$(show "${arguments[@]}")"' 2>&1 | tee -a "logs/$(hostname).log"'
        call "${tpu[@]}" ssh "$name" "${everywhere[@]}" --command "$remote"
        ;;
    logs)
        # shellcheck disable=SC2016
        call "${tpu[@]}" ssh "$name" "${everywhere[@]}" --command 'tail -n 200 "$HOME/vlm_jax/logs/$(hostname).log" | sed "s/^/$(hostname): /"'
        ;;
    delete)
        if $queued; then call "${queue[@]}" delete "$name" --zone "$zone" --force --quiet; else call "${tpu[@]}" delete "$name" --zone "$zone" --quiet; fi
        ;;
esac
