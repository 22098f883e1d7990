#!/usr/bin/env bash
# Trains on Google Kubernetes Engine (any cluster with JobSet 0.10 or newer): one pod a host, started again according to main's exit code.
#
#   launch/gke.sh start --name=NAME --image=IMAGE --tpu=tpu-v5p-slice --topology=4x4x4 [--chips=4] [--slices=N] [--spot] [--restarts=20] [--dry-run] -- --config=... --workdir=gs://BUCKET/NAME ...
#   launch/gke.sh start --name=NAME --image=IMAGE --gpu=nvidia-h100-80gb --hosts=2 [--gpus=8] ... -- ...
#   launch/gke.sh state | logs | stop --name=NAME [--dry-run]
#
# --tpu, --gpu: the node pool's label (cloud.google.com/gke-tpu-accelerator, gke-accelerator); --chips: of a host; --slices: several slices train
# together. The image holds the repository's package; the cluster and the project are kubectl's own. What follows "--" goes to vlm_jax.main.
# --dry-run prints the manifest as a command.
#
# Exit codes of main, and what follows: 0 done; 42 stopped by a signal and saved: started again, for free; 43 bad config or data, or out of memory: never
# started again; 44 a process that is gone or stuck, and any other: started again, at most --restarts times; a lost node: started again, for free.
# The exit code of this script is kubectl's.
set -euo pipefail
# shellcheck source=launch/arguments.bash
source "$(dirname -- "${BASH_SOURCE[0]}")/arguments.bash"

action=${1:-}
case $action in
    start | state | logs | stop) shift ;;
    -h | --help) usage; exit 0 ;;
    *) die "${action:-nothing} is not an action (valid: start state logs stop --help)" ;;
esac

name="" image="" tpu="" topology="" chips=4 slices=1 gpu="" hosts="" gpus=8 restarts=20 spot=false
read_arguments "name image tpu topology chips slices gpu hosts gpus restarts" "spot" "$@"
need name
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "--name=$name is not a name of Kubernetes: at most 40 of a-z, 0-9 and -, a letter first"

manifest() {
    cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
$annotations
spec:
  network:
    enableDNSHostnames: true
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: bad_config_or_data
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: ["exit code 43"]
      - name: preempted_and_saved
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: ["exit code 42", "DisruptionTarget"]
  replicatedJobs:
    - name: train
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [42, 43]}
              - action: FailJob
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
$selector
              tolerations:
                - {key: $resource, operator: Exists, effect: NoSchedule}
              containers:
                - name: train
                  image: $(json "$image")
                  command: [python, -u, -m, vlm_jax.main]
                  args:
$(for word in "${arguments[@]}"; do printf '                    - %s\n' "$(json "$word")"; done)
                  env:
$environment
                  resources:
                    limits: {$resource: $each}
YAML
}

case $action in
    start)
        need image
        need_training
        need_number slices
        need_number restarts
        annotations="  labels: {app: vlm-jax}"
        environment="                    - {name: PYTHONUNBUFFERED, value: \"1\"}"
        if [ -n "$tpu" ]; then
            [ -z "$gpu" ] || die "--tpu=$tpu and --gpu=$gpu: one of them"
            need topology
            need_number chips
            [[ $topology =~ ^[0-9]+(x[0-9]+)+$ ]] || die "--topology=$topology is not AxB or AxBxC"
            all=$((${topology//x/*}))
            if [ "$all" -lt "$chips" ]; then chips=$all; fi
            hosts=$((all / chips)) each=$chips resource=google.com/tpu
            arguments=(--platform=tpu --distributed "${arguments[@]}")
            annotations+=$'\n  annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}'    # a slice, a pool of nodes
            selector="                cloud.google.com/gke-tpu-accelerator: $tpu"$'\n'"                cloud.google.com/gke-tpu-topology: $topology"
        else
            [ -n "$gpu" ] || die "--tpu or --gpu is missing, such as --tpu=tpu-v5p-slice --topology=4x4x4, or --gpu=nvidia-h100-80gb --hosts=2"
            need hosts
            need_number hosts
            need_number gpus
            [ "$slices" = 1 ] || die "--slices=$slices is for TPUs; give --hosts"
            each=$gpus resource=nvidia.com/gpu
            arguments=(--platform=gpu "${arguments[@]}")
            selector="                cloud.google.com/gke-accelerator: $gpu"
            # JobSet's name of the first pod; Kubernetes itself sets JOB_COMPLETION_INDEX.
            environment+=$'\n'"                    - {name: JAX_COORDINATOR_ADDRESS, value: \"$name-train-0-0.$name:8476\"}"
            environment+=$'\n'"                    - {name: JAX_NUM_PROCESSES, value: \"$hosts\"}"
        fi
        ! $spot || selector+=$'\n'"                cloud.google.com/gke-spot: \"true\""
        if $dry_run; then
            printf "kubectl apply -f - << 'YAML'\n%s\nYAML\n" "$(manifest)"
        else
            manifest | kubectl apply -f -
        fi
        ;;
    state) call kubectl get "jobset/$name" -o wide ;;
    logs) call kubectl logs --selector "jobset.sigs.k8s.io/jobset-name=$name" --prefix --tail 200 --max-log-requests 1024 ;;
    stop) call kubectl delete "jobset/$name" ;;
esac
