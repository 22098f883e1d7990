"""Paired measurements: the sides of a comparison take turns on one machine, each in a process of its own.

A side is a function that runs one block and returns the seconds of its steps. ``alternate`` calls the
sides in turn, the order reversed from round to round (a b, b a, a b ...), so that a drift of the
machine's speed favours nobody, and drops the first steps of every block. A round gives one ratio per
pair of sides; what is reported is the median over the rounds with quartiles and range.

``Worker`` is the usual side: a process that lives through the whole measurement and is stopped
(SIGSTOP, with its reader threads and processes) while another works. Every side gets the same cores
and the same memory settings (``environment``): glibc keeps freed memory and backs it with huge pages.
Without them the framework that frees more each step pays for page faults that depend on who ran before.

The machine must have nothing else to do. It is not only that times drift: threads of OpenMP wait by
spinning, and where they share a core with another program small operations take a hundred times as long.

The protocol of a worker is lines of JSON: it is told its options, answers {"ready": facts}, is told a
number of steps, answers {"seconds": [...]}, and so on until its input ends.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
MEMORY = ("glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:"
          "glibc.malloc.trim_threshold=1099511627776")
ON_GPU = dict(JAX_PLATFORMS="cuda", CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"), XLA_PYTHON_CLIENT_MEM_FRACTION="0.45", GLIBC_TUNABLES="")
PACKAGES = ("jax", "jaxlib", "flax", "torch", "open_clip_torch")

Blocks = Mapping[str, Sequence[Sequence[float]]]    # side -> [round][step] seconds


def environment(**more: str) -> dict[str, str]:
    """What every side starts with: the CPU, as many threads as there are cores, MEMORY, and no look at the network."""
    cores = str(len(os.sched_getaffinity(0)))
    return {**os.environ, "GLIBC_TUNABLES": MEMORY, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": cores,
            "HF_HUB_OFFLINE": "1", **more}


# ---- workers -----------------------------------------------------------------------------------

class Worker:
    """A process that runs steps when told to.

    target: "module:function"; the function takes ``options`` and returns (step, facts): ``step()`` runs
    one step to its end, ``facts`` (JSON) are kept here. The module is imported in the process itself,
    so it must not import a framework before the function does.
    """

    def __init__(self, target: str, options: Mapping[str, Any], **env: str):
        self.target = target
        self.process = subprocess.Popen([sys.executable, "-m", "benchmarks.paired", target], cwd=ROOT, env=environment(**env),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0)
        try:
            self.facts = self._ask(options)["ready"]
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def block(self, steps: int) -> list[float]:
        """Runs a block; the seconds of each step."""
        self._signal(signal.SIGCONT)
        seconds = self._ask(steps)["seconds"]
        self._signal(signal.SIGSTOP)
        return seconds

    def _ask(self, message: Any) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"worker {self.target} ended (exit code {self.process.wait()}); its error is above")
        return json.loads(line)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)     # with the processes that it started
        except ProcessLookupError:
            pass

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def serve(target: str) -> None:
    """A worker's life. What libraries print goes to stderr: stdout is the protocol's."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    options = json.loads(sys.stdin.readline())
    module, _, function = target.partition(":")
    step, facts = getattr(importlib.import_module(module), function)(**options)
    answers.write(json.dumps({"ready": facts}) + "\n")
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        answers.write(json.dumps({"seconds": seconds}) + "\n")


# ---- turns and statistics ----------------------------------------------------------------------

def alternate(sides: Mapping[str, Callable[[], Sequence[float]]], rounds: int, drop: int) -> dict[str, list[list[float]]]:
    """Every side runs one block a round; the first ``drop`` steps of each are left out. Raises ValueError where none stay."""
    blocks: dict[str, list[list[float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            seconds = list(sides[name]())
            if len(seconds) <= drop:
                raise ValueError(f"a block of {name!r} has {len(seconds)} steps, of which {drop} are dropped: none is left")
            blocks[name].append(seconds[drop:])
            print(f"round {number + 1} of {rounds}: {name} {statistics.median(seconds[drop:]):.4g} s a step", file=sys.stderr, flush=True)
    return blocks


def compare(blocks: Blocks, pairs: Sequence[tuple[str, str]], of: Callable[[Sequence[float]], float] = statistics.median) -> dict[str, Any]:
    """Ratios of step times, "a / b" -> median, quartiles, range and the ratio of every round, for (a, b) in ``pairs``.

    ``of`` turns a block's seconds into one number: the median, or the mean where a step by itself says
    little (readers that work ahead hand over two batches at once, then none).
    """
    out = {}
    for a, b in pairs:
        ratios = [of(x) / of(y) for x, y in zip(blocks[a], blocks[b], strict=True)]
        out[f"{a} / {b}"] = {"median": statistics.median(ratios), "quartiles": quartiles(ratios),
                             "range": [min(ratios), max(ratios)], "rounds": ratios}
    return out


def quartiles(values: Sequence[float]) -> list[float]:
    """First and third quartile, interpolated between the values (both the value itself where there is one)."""
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


# ---- flags and reports -------------------------------------------------------------------------

def parse(flags: argparse.ArgumentParser, argv: Sequence[str] | None, quick: Mapping[str, Any]) -> argparse.Namespace:
    """Adds the flags that all comparisons share and parses. --quick makes ``quick`` the defaults. From here on this
    process and its children keep to ``--threads`` cores."""
    cores = sorted(os.sched_getaffinity(0))
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--threads", type=int, default=len(cores), help="cores that each side may use (default: all, %(default)s)")
    flags.add_argument("--out", help="JSON file to write everything measured to")
    flags.add_argument("--quick", action="store_true", help="tiny sizes and few steps: shows that it runs, measures nothing")
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--quick" in argv:
        flags.set_defaults(**quick)
    given = flags.parse_args(argv)
    if not 1 <= given.threads <= len(cores):
        flags.error(f"--threads={given.threads} must lie between 1 and the {len(cores)} cores of this machine")
    os.sched_setaffinity(0, cores[:given.threads])
    return given


def add_blocks(flags: argparse.ArgumentParser, rounds: int, steps: int, drop: int) -> None:
    """The flags of a measurement in blocks."""
    flags.add_argument("--rounds", type=int, default=rounds, help="blocks of each side (default %(default)s)")
    flags.add_argument("--steps", type=int, default=steps, help="steps in a block (default %(default)s)")
    flags.add_argument("--drop", type=int, default=drop, help="first steps of a block that do not count (default %(default)s)")


def require_peer(*modules: str) -> None:
    """Exits with code 1 where torch, open_clip or one of ``modules`` is missing."""
    for module in ("torch", "open_clip", *modules):
        if importlib.util.find_spec(module) is None:
            print(f'{module} is missing: pip install -e ".[bench]"')
            sys.exit(1)


def machine() -> dict[str, Any]:
    """CPU model, cores in use and present, memory, system, and how many cores are at work before the measurement."""
    told = pathlib.Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.processor(), "threads": len(os.sched_getaffinity(0)), "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": platform.platform(), "busy": busy_cores()}


def busy_cores(seconds: float = 1.0) -> float:
    """Cores at work now, over all processes (Linux; 0 elsewhere). The load average still tells of the minute before."""
    def spent():
        found = pathlib.Path("/proc/stat")
        ticks = [int(x) for x in found.read_text().splitlines()[0].split()[1:9]] if found.exists() else [1, 0, 0, 0, 0]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)      # idle and iowait

    busy, whole = spent()
    time.sleep(seconds)
    busy, whole = (now - before for now, before in zip(spent(), (busy, whole)))
    return round((os.cpu_count() or 1) * busy / whole, 2) if whole else 0.0


def versions(*more: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def report(given: argparse.Namespace, title: str, machine: Mapping[str, Any], blocks: Blocks, ratios: Mapping[str, Mapping[str, Any]], *,
           work: float = 1, unit: str = "steps", of: Callable[[Sequence[float]], float] = statistics.median,
           packages: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """Prints the tables of a measurement and writes all of it to ``--out``. ``work``: units that a step does; ``of``: see ``compare``."""
    found = {"benchmark": title, "settings": {k: v for k, v in vars(given).items() if k != "out"}, "machine": dict(machine),
             "versions": versions(*packages), "memory": MEMORY, "ratios": dict(ratios), "seconds": dict(blocks), **more}
    print(f"\n{title}{' (--quick: these figures mean nothing)' if given.quick else ''}\n")
    print(f"| side | s a step | over the blocks | {unit} a second |\n|---|---|---|---|")
    for name, side in blocks.items():
        each = [of(block) for block in side]
        middle = statistics.median(each)
        print(f"| {name} | {middle:.4g} | {min(each):.4g} to {max(each):.4g} | {work / middle:.4g} |")
    print("\n| ratio of times (below 1: the first is faster) | median | quartiles | range | rounds |\n|---|---|---|---|---|")
    for name, ratio in ratios.items():
        low, high = ratio["quartiles"]
        least, most = ratio["range"]
        print(f"| {name} | {ratio['median']:.3f} | {low:.3f} to {high:.3f} | {least:.3f} to {most:.3f} | {len(ratio['rounds'])} |")
    conditions(found)
    write(given, found)
    return found


def conditions(found: Mapping[str, Any]) -> None:
    """Prints the machine and the versions of a measurement."""
    where = found["machine"]
    if where["busy"] > 0.2:
        print(f"\nOther work took {where['busy']:.2f} cores when it began: these ratios say little.")
    print(f"\n{where['cpu']}, {where['threads']} of {where['cores']} cores, {where['memory_gib']} GiB, {where['busy']:.2f} cores busy before; "
          + ", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items()))


def write(given: argparse.Namespace, found: Mapping[str, Any]) -> None:
    if given.out:
        pathlib.Path(given.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    serve(sys.argv[1])
