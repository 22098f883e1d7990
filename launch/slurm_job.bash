#!/usr/bin/env bash
# What sbatch runs: see launch/slurm.sh, which submits it. Arguments are those of vlm_jax.main.
set -uo pipefail

again=10                # restarts after a process was gone or stuck
trap : TERM USR1        # meant for main, which saves; the script has to stay to see how it ended
command=(srun --kill-on-bad-exit=0 --open-mode append --output "${LOGS:-logs}/%x_%j_process%t.log")
[ -z "${IMAGE:-}" ] || command+=("--container-image=$IMAGE" "--container-mounts=$PWD:$PWD" "--container-workdir=$PWD")
"${command[@]}" "${PYTHON:-python}" -u -m vlm_jax.main "$@" &
step=$!
while :; do             # a signal ends the waiting, not the step
    wait "$step"
    code=$?
    kill -0 "$step" 2> /dev/null || break
done
echo "vlm_jax.main ended with $code ($(date))"
if [ "$code" = 42 ] || { [ "$code" = 44 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$again" ]; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
