"""Several processes that train one model: how they find each other, once, before any backend starts."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Mapping

from vlm_jax.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
GRACE = 30      # seconds between our limit and JAX's, which would abort the process (exit code 134) without a word of ours


def found(environment: Mapping[str, str]) -> str:
    """What in the environment says that this is one of several processes, such as "SLURM_NTASKS=8"; "" for nothing."""
    def count(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else 0

    if count("SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environment:      # under srun; a plain sbatch script is one process
        return f"SLURM_NTASKS={environment['SLURM_NTASKS']}"
    if count("OMPI_COMM_WORLD_SIZE") > 1:
        return f"OMPI_COMM_WORLD_SIZE={environment['OMPI_COMM_WORLD_SIZE']}"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return f"TPU_WORKER_HOSTNAMES={environment['TPU_WORKER_HOSTNAMES']}"
    if environment.get("JAX_COORDINATOR_ADDRESS"):
        return f"JAX_COORDINATOR_ADDRESS={environment['JAX_COORDINATOR_ADDRESS']}"
    return ""


def check(coordinator: str, count: int | None, index: int | None) -> None:
    """Raises ConfigError unless the three are given together or not at all, and fit together."""
    given = {"--coordinator=HOST:PORT": coordinator or None, "--num_processes=N": count, "--process_id=I": index}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        present = ", ".join(f"{name.split('=')[0]}={value}" for name, value in given.items() if value is not None)
        raise ConfigError(f"{present} needs {' and '.join(missing)} beside it")
    if missing:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--coordinator={coordinator!r} is not HOST:PORT; nearest: {(host or coordinator).rstrip(':')}:{8476}")
    if not 0 <= index < count:
        raise ConfigError(f"--process_id={index} is not among the --num_processes={count}, which count from 0; "
                          f"nearest: {min(max(index, 0), count - 1)}")


def join(coordinator: str = "", count: int | None = None, index: int | None = None, timeout: int = 300, why: str = "--distributed") -> None:
    """Waits until all processes are there. What is not given, JAX finds itself on TPUs, under Slurm and Open MPI.

    ``why``: what asked for it. Raises ConfigError where JAX cannot tell who takes part. Where someone does not come
    within ``timeout`` seconds, the process says who and exits with 43: JAX's wait cannot be left otherwise.
    """
    check(coordinator, count, index)
    import jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    joined = threading.Event()

    def give_up() -> None:
        if not joined.wait(timeout):
            print(f"error: {absent(coordinator, count, index, timeout, why)}", file=sys.stderr, flush=True)
            os._exit(43)

    threading.Thread(target=give_up, name="rendezvous", daemon=True).start()
    try:
        local = coordinator.rpartition(":")[0] in LOOPBACK      # JAX would listen on every interface; nobody is asked for a password
        jax.distributed.initialize(coordinator or None, count, index, initialization_timeout=timeout + GRACE,
                                   coordinator_bind_address=coordinator if local else None)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{why}: JAX cannot tell which processes take part ({error}); give --coordinator=HOST:PORT, "
                          "--num_processes=N and --process_id=I") from error
    finally:
        joined.set()


def absent(coordinator: str, count: int | None, index: int | None, timeout: int, why: str) -> str:
    """Who did not come, as far as it can be seen from here."""
    def waited(who: str, hint: str) -> str:
        return f"{why}: {who} after {timeout} s (--rendezvous_timeout). {hint}"

    others = "the other processes" if count is None else f"the other {count - 1} of {count} processes"
    start = "Start the same command on every host; a proxy or a closed port between them has the same effect."
    if index == 0:
        return waited(f"process 0 still waits at {coordinator} for {others}", start)
    if not coordinator:
        return waited(f"{others} did not come", start)
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError as error:
        return waited(f"process {index} cannot reach process 0 at {coordinator} ({error})", start)
    return waited(f"process 0 at {coordinator} is there, but not all {count} processes are", start)
