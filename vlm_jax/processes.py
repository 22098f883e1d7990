"""Several processes that train one model: how they find each other, notice who is gone, and stop together.

A dead or stuck process leaves the others waiting in a collective for ever. So every process gives a sign of life through the
key-value store of JAX's coordination service, which process 0 holds; process 0 looks at all of them, and when one is silent, or
training stands still, it says so: every process prints who it was and the stacks of its threads, and ends with exit code 44.
Where process 0 itself is gone, JAX aborts the others within a second or two, on its own terms: their stacks are printed too, and
a parent that stays behind (``supervise``) turns the abort into 44.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
GRACE = 30      # seconds between our limit and JAX's, which would abort the process (exit code 134) without a word of ours
PORT = 8476
EXIT_BAD, EXIT_HANG = 43, 44
PATIENCE = 20   # how many times longer than in training nothing may happen elsewhere: compiling, restoring, evaluating
PREFIX = "vlm_jax/"


# ---- finding each other

@dataclasses.dataclass(frozen=True)
class Found:
    """What the environment says of the processes of this run; ``why`` names what said it, "" for nothing.

    What is not known (coordinator "", count and index None), JAX finds itself. devices: which local ones this process uses, None for all.
    """
    why: str = ""
    coordinator: str = ""
    count: int | None = None
    index: int | None = None
    devices: tuple[int, ...] | None = None


def found(environment: Mapping[str, str]) -> Found:
    """Whether the environment says that this is one of several processes, and what it knows of them.

    Explicit addresses (JAX's own names, and those that MaxText's launchers set), SkyPilot, Slurm (under srun), Open MPI, TPU slices. Raises
    ConfigError that names what is missing.
    """
    def count(*names: str) -> tuple[str, int | None]:
        return next(((f"{name}={environment[name]}", int(environment[name])) for name in names if environment.get(name, "").isdigit()), ("", None))

    def number(name: str) -> int:
        return int(environment[name]) if environment.get(name, "").isdigit() else 0

    address = environment.get("JAX_COORDINATOR_ADDRESS", "")
    why = f"JAX_COORDINATOR_ADDRESS={address}"
    if not address and environment.get("JAX_COORDINATOR_IP"):
        address = f"{environment['JAX_COORDINATOR_IP']}:{environment.get('JAX_COORDINATOR_PORT', PORT)}"
        why = f"JAX_COORDINATOR_IP={environment['JAX_COORDINATOR_IP']}"
    said, several = count("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT", "PROCESSES_IN_JOB", "NNODES")
    _, index = count("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX", "NODE_RANK")
    slurm = number("SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environment      # under srun; a plain sbatch script is one process
    others = slurm or number("OMPI_COMM_WORLD_SIZE") > 1 or "," in environment.get("TPU_WORKER_HOSTNAMES", "") or \
        "MEGASCALE_COORDINATOR_ADDRESS" in environment
    if address:
        if several == 1:
            return Found()
        missing = [names for names, value in (("JAX_NUM_PROCESSES (or JAX_PROCESS_COUNT, PROCESSES_IN_JOB, NNODES)", several),
                                              ("JAX_PROCESS_ID (or JOB_COMPLETION_INDEX, NODE_RANK)", index)) if value is None]
        if missing and not others:
            raise ConfigError(f"{why} needs {' and '.join(missing)} beside it")
        address = address if ":" in address else f"{address}:{PORT}"
        return Found(why, address, None if missing else several, None if missing else index, _slurm_devices(environment) if slurm else None)
    if (several or 0) > 1 and index is not None and not others:
        raise ConfigError(f"{said} needs JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0) beside it")
    if number("SKYPILOT_NUM_NODES") > 1:
        nodes = environment.get("SKYPILOT_NODE_IPS", "").split()
        why = f"SKYPILOT_NUM_NODES={environment['SKYPILOT_NUM_NODES']}"
        if not nodes or not environment.get("SKYPILOT_NODE_RANK", "").isdigit():
            raise ConfigError(f"{why} needs {'SKYPILOT_NODE_RANK' if nodes else 'SKYPILOT_NODE_IPS'} beside it")
        return Found(why, f"{nodes[0]}:{PORT}", number("SKYPILOT_NUM_NODES"), number("SKYPILOT_NODE_RANK"))
    if slurm:
        return Found(f"SLURM_NTASKS={environment['SLURM_NTASKS']}", devices=_slurm_devices(environment))
    for name in ("OMPI_COMM_WORLD_SIZE", "MEGASCALE_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES"):
        if others and environment.get(name) and (name != "OMPI_COMM_WORLD_SIZE" or number(name) > 1):
            return Found(f"{name}={environment[name]}")
    return Found()


def _slurm_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """JAX gives every Slurm task one GPU, by its place on the node. A node's only task has them all."""
    nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "")
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    alone = nodes == (environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS"))
    return tuple(range(int(gpus))) if alone and gpus.isdigit() and int(gpus) > 1 else None


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
        raise ConfigError(f"--coordinator={coordinator!r} is not HOST:PORT; nearest: {(host or coordinator).rstrip(':')}:{PORT}")
    if not 0 <= index < count:
        raise ConfigError(f"--process_id={index} is not among the --num_processes={count}, which count from 0; "
                          f"nearest: {min(max(index, 0), count - 1)}")


def join(coordinator: str = "", count: int | None = None, index: int | None = None, timeout: int = 300, why: str = "--distributed",
         devices: tuple[int, ...] | None = None) -> None:
    """Waits until all processes are there. What is not given, JAX finds itself on TPUs, under Slurm and Open MPI.

    ``why``: what asked for it. Raises ConfigError where JAX cannot tell who takes part. Where someone does not come
    within ``timeout`` seconds, the process says who and exits with 43: JAX's wait cannot be left otherwise.
    """
    import jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)      # it takes SIGTERM away from us
    joined = threading.Event()

    def give_up() -> None:
        if not joined.wait(timeout):
            print(f"error: {absent(coordinator, count, index, timeout, why)}", file=sys.stderr, flush=True)
            os._exit(EXIT_BAD)

    threading.Thread(target=give_up, name="rendezvous", daemon=True).start()
    try:
        local = coordinator.rpartition(":")[0] in LOOPBACK      # JAX would listen on every interface; nobody is asked for a password
        jax.distributed.initialize(coordinator or None, count, index, initialization_timeout=timeout + GRACE, local_device_ids=devices,
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
    error = unreachable(coordinator)
    if error:
        return waited(f"process {index} cannot reach process 0 at {coordinator} ({error})", start)
    return waited(f"process 0 at {coordinator} is there, but not all {count} processes are", start)


def unreachable(address: str) -> OSError | None:
    """Why nobody answers at HOST:PORT, None where someone does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError as error:
        return error


# ---- noticing who is gone

class Watchdog:
    """Signs of life of this process, and what is said of all of them; ``start`` it after ``join``.

    timeout: seconds that a process may be silent; half as many more, that nothing may happen in training (or five times the longest
    pause so far, where steps take long; ``PATIENCE`` times that outside of training). Ends the process with exit code 44, or with 43
    where another one ended with that. In a single process there is nobody to be silent: it sees training stand still alone.
    """

    def __init__(self, timeout: float, store: Any = None, index: int = 0, count: int = 1, coordinator: str = ""):
        self.timeout, self.store, self.index, self.count, self.coordinator = timeout, store, index, count, coordinator
        self.period = max(min(1.0, timeout / 10), count / 100)      # process 0 answers all of them
        self.host = socket.gethostname()
        self.doing, self.training, self.ticks, self.pause, self.moved = "starting", False, 0, 0.0, time.monotonic()
        self.stops: list[Stop] = []
        self._heard: dict[int, tuple[str, float]] = {}      # process -> (its last sign, when it changed)
        self._going: dict[int, tuple[int, float]] = {}      # process -> (its ticks, when they changed)
        self._round = time.monotonic()
        self._closed, self._leaving = threading.Event(), threading.Lock()

    def start(self) -> "Watchdog":
        faulthandler.enable()      # stacks at JAX's abort too
        for target in (self._beat, self._guard) if self.store else (self._beat,):
            threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True).start()
        return self

    def notice(self, what: str, training: bool) -> None:
        """The main thread has come to ``what``. Every process comes to the same things in the same order."""
        now = time.monotonic()
        if self.training and training and what != self.doing:
            self.pause = max(self.pause, now - self.moved)
        self.doing, self.training, self.ticks, self.moved = what, training, self.ticks + 1, now

    # -- the thread that talks

    def _beat(self) -> None:
        started = last = time.monotonic()
        while not self._closed.wait(self.period):
            now = time.monotonic()
            if now - last > self.timeout / 2:      # we were stopped ourselves, or the machine slept: nobody else is to blame
                started, self.moved, self._heard, self._going = now, now, {}, {}
            last = now
            try:
                self._speak(now, started)
            except Exception as error:      # of the store, whose errors are JAX's own class, and say that process 0 is gone
                if time.monotonic() - self._round > min(5.0, self.timeout) and not self._closed.is_set():
                    self._end(EXIT_HANG, f"process 0 at {self.coordinator} is gone ({str(error).splitlines()[0]})")
                continue
            self._round = time.monotonic()

    def _speak(self, now: float, started: float) -> None:
        sign = [round(now, 1), self.ticks, self.training, self.pause, self.doing, self.host]
        if self.store is None:
            if stuck := self._stuck({0: sign}, now):
                self._end(EXIT_HANG, stuck)
            return
        self.store.key_value_set(f"{PREFIX}alive/{self.index}", json.dumps(sign), True)
        said = {key.removeprefix(f"{PREFIX}said/"): json.loads(value) for key, value in self.store.key_value_dir_get(f"{PREFIX}said/")}
        verdict = said.get("verdict")
        if self.index == 0 and verdict is None and (verdict := self._survey(said, now, started)):
            self._say("verdict", verdict)
            time.sleep(2 * self.period)      # the others hear it while the store lasts
        if verdict and f"left/{self.index}" not in said:      # who left by itself ends with a code of its own
            self._end(*verdict)
        self._agree(said)

    def _say(self, key: str, value: Any) -> None:
        with contextlib.suppress(Exception):      # JAX's own class: the key is there already, or process 0 is gone, which _beat tells
            self.store.key_value_set(f"{PREFIX}said/{key}", json.dumps(value))

    def _survey(self, said: Mapping[str, Any], now: float, started: float) -> tuple[int, str] | None:
        """What process 0 finds: (exit code, message) where one is gone or training stands still."""
        left = {int(key.split("/")[1]): value for key, value in said.items() if key.startswith("left/")}
        for process, (code, message) in left.items():
            if code not in (0, 42):
                return EXIT_BAD if code == EXIT_BAD else EXIT_HANG, f"process {process} ended with exit code {code}: {message}"
        signs = {int(key.rpartition("/")[2]): value for key, value in self.store.key_value_dir_get(f"{PREFIX}alive/")}
        silent = []
        for process in set(range(self.count)) - set(left):
            text = signs.get(process, "")
            if text != self._heard.get(process, (None, 0))[0]:
                self._heard[process] = text, now if text else started
            elif now - self._heard[process][1] > self.timeout:
                silent.append(f"process {process}" + (f" on {json.loads(text)[-1]}, when it was at {json.loads(text)[-2]!r}," if text else ""))
        if silent:
            return EXIT_HANG, f"{' and '.join(silent)} has given no sign of life for {self.timeout:.0f} s: it is dead, stopped, or cut off"
        stuck = self._stuck({process: json.loads(text) for process, text in signs.items() if process not in left}, now)
        return (EXIT_HANG, stuck) if stuck else None

    def _stuck(self, signs: Mapping[int, Any], now: float) -> str:
        """Who keeps the others waiting, where nothing has happened for too long; "" otherwise."""
        for process, sign in signs.items():
            if sign[1] != self._going.get(process, (None, 0))[0]:
                self._going[process] = sign[1], now
        if not signs:
            return ""
        least = min(sign[1] for sign in signs.values())
        behind = {process: sign for process, sign in signs.items() if sign[1] == least}
        limit = max(1.5 * self.timeout, 5 * max(sign[3] for sign in signs.values()))
        waited = min(now - self._going[process][1] for process in behind)
        if waited <= limit * (1 if all(sign[2] for sign in behind.values()) else PATIENCE):
            return ""
        who = ", ".join(f"process {process} on {sign[-1]} ({sign[-2]})" for process, sign in sorted(behind.items())[:8])
        rest = f", {len(signs) - len(behind)} other process(es) wait for it" if len(behind) < len(signs) else ""
        return f"nothing has happened for {waited:.0f} s in {who}{rest}"

    # -- the thread that sees that the other one is not stuck in the store

    def _guard(self) -> None:
        while not self._closed.wait(self.period):
            if time.monotonic() - self._round > self.timeout + 5 * self.period:
                time.sleep(2 * self.period)      # were we stopped ourselves, the other thread has its turn first
                if time.monotonic() - self._round > self.timeout + 5 * self.period:
                    self._end(EXIT_HANG, f"process 0 at {self.coordinator} has not answered for {self.timeout:.0f} s: it is stopped, or cut off")

    def _end(self, code: int, message: str) -> None:
        if not self._leaving.acquire(blocking=False):
            time.sleep(60)      # the main thread is on its way out, with its own code
        sys.stdout.flush()
        print(f"error: {message}; the stacks of process {self.index} follow, exit code {code}", file=sys.stderr, flush=True)
        if code == EXIT_HANG:
            faulthandler.dump_traceback(all_threads=True)
        os._exit(code)

    # ---- stopping together

    def stop_together(self, start: int, total: int) -> Stop | None:
        """The next stop that all processes come to; None in a single process."""
        if self.store is None:
            return None
        self.stops.append(Stop(start, total))
        return self.stops[-1]

    def _agree(self, said: Mapping[str, Any]) -> None:
        """Brings every ``Stop`` to its last step once one process was asked to stop."""
        asked = next((stop.signal for stop in self.stops if stop.signal is not None), None)
        if "stop" not in said and asked is not None:
            self._say("stop", asked)
        if "stop" not in said:
            return
        for number, stop in enumerate(self.stops):
            if f"stop/{number}/{self.index}" not in said:
                self._say(f"stop/{number}/{self.index}", stop.close(said["stop"]))
            steps = [said.get(f"stop/{number}/{process}") for process in range(self.count)]
            if None not in steps:
                stop.decide(max(steps))

    # ---- leaving

    def leave(self, code: int, message: str = "") -> None:
        """Ends this process' part in an orderly way: waits for the others where it is done; says why where it failed."""
        if self.store is None:
            self._closed.set()
            return
        self._say(f"left/{self.index}", [code, message])
        began = time.monotonic()
        # Where it is done, the watchdog ends this if another one is gone; where it failed, process 0 stays until the others have heard.
        while code in (0, 42) or (self.index == 0 and time.monotonic() - began < 4 * self.period + 1):
            if len(self.store.key_value_dir_get(f"{PREFIX}said/left/")) == self.count:
                break
            time.sleep(self.period / 4)
        self._leaving.acquire()
        self._closed.set()
        if code in (0, 42):
            import jax
            jax.distributed.shutdown()
        else:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def blame(self, error: BaseException) -> None:
        """After an error of the runtime: waits for the verdict, which ends this process, where it comes from another one that is gone."""
        if self.store is not None and type(error).__name__ == "JaxRuntimeError":
            print("is another process gone? waiting for what the watchdog finds", file=sys.stderr, flush=True)
            time.sleep(self.timeout + 10 * self.period)


class Stop:
    """When several processes stop together, after the same step: none of them goes beyond the farthest once one is asked."""

    def __init__(self, start: int, total: int):
        self.signal: int | None = None
        self._begun, self._total, self._closed, self._last, self._change = min(start + 1, total), total, False, None, threading.Condition()

    def due(self, step: int) -> bool:
        """Whether all processes stop after ``step``; False lets the next one begin."""
        with self._change:
            self._change.wait_for(lambda: self._last is not None or not self._closed)
            if self._last is not None and step >= self._last:
                return True
            self._begun = min(step + 1, self._total)
            return False

    def close(self, number: int) -> int:
        """No step begins any more until ``decide``; the one that has begun."""
        with self._change:
            self.signal, self._closed = number, True
            return self._begun

    def decide(self, last: int) -> None:
        with self._change:
            self._last = last
            self._change.notify_all()


def watch(timeout: float) -> Watchdog:
    """Starts the watchdog of this process, after ``join`` where there are several. Raises ConfigError for several that did not join."""
    import jax
    if jax.process_count() == 1:
        return Watchdog(timeout).start()
    from jax._src import distributed  # the service that carries our signs has no public door
    state = distributed.global_state
    if state.client is None:
        raise ConfigError(f"{jax.process_count()} processes found each other ({jax.device_count()} devices, {jax.local_device_count()} of them here) "
                          "without having been asked to; start each of them with --distributed")
    return Watchdog(timeout, state.client, state.process_id, state.num_processes, state.coordinator_address).start()


# ---- the parent that stays behind

def supervise(coordinator: str = "") -> None:
    """Forks: the child returns and goes on, the parent waits for it, passes signals on and exits with its code; 44 where it was aborted.

    To be called before any thread starts. Where the system has no fork, it does nothing.
    """
    if not hasattr(os, "fork"):
        return
    sys.stdout.flush()      # or it is written twice
    sys.stderr.flush()
    parent, child = os.getpid(), os.fork()
    if not child:
        _end_with(parent)
        return
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        signal.signal(getattr(signal, name), lambda number, frame: _pass_on(child, number))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGABRT:
        gone = unreachable(coordinator) if coordinator else None
        print(f"error: JAX ended this process: {f'process 0 at {coordinator} is gone ({gone})' if gone else 'another process is gone'}; "
              f"exit code {EXIT_HANG}", file=sys.stderr, flush=True)
        code = EXIT_HANG
    os._exit(code if code >= 0 else 128 - code)


def _pass_on(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _end_with(parent: int) -> None:
    """Ends this process with its parent, killed or not: by the kernel where it does that, by looking elsewhere."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(EXIT_HANG)
    threading.Thread(target=look, name="parent", daemon=True).start()


