"""A small run, killed at random moments, ends bitwise where it would have ended undisturbed.

    python -m benchmarks.kills --rounds=200 [--steps=120] [--seed=0] [--out FILE.json]

A round is one SIGKILL: half of them fall while a checkpoint is being written, a tenth before training has begun again, the others
at any time, after none to three saves. A run that reaches its last step is compared with an undisturbed one, every leaf of its state and every row of its
metrics, and the next one begins; the last of them is left to finish. A process that has imported everything is forked for each
start, so that a round takes a few seconds. Prints where the kills fell and the goodput of the runs; exits with 1 where an end differs.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"

from tests import tiny  # noqa: E402  (after the flags that JAX reads)
from vlm_jax import run  # noqa: E402
from vlm_jax.train import checkpoint, goodput  # noqa: E402
from vlm_jax.train.metrics import read_rows  # noqa: E402

STAGE = "1_pretrain"
SECONDS = 120      # for one start
EVERY = 12         # steps between saves
SAVES = 4          # fewer than these are let pass before a kill


def config(steps: int) -> Any:
    whole = tiny.get_config("clip")
    stage = whole.stages.pretrain
    stage.steps, stage.evals, stage.checkpoint.every = steps, {}, EVERY
    return whole


def fork(call: Callable[[], int], log: pathlib.Path) -> int:
    """Runs ``call`` in a child whose exit code it returns; this process has started no JAX backend and no thread of its own."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = call()
        sys.stdout.flush()
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def digest(folder: pathlib.Path) -> str:
    """A hash of every leaf of the last checkpoint and of the rows of metrics, timings left out."""
    leaves = checkpoint.load_params(folder / STAGE / "checkpoints", collections=("params",))
    leaves |= {f"o/{p}": x for p, x in checkpoint.load_params(folder / STAGE / "checkpoints", collections=("opt_state",)).items()}
    found = hashlib.sha256()
    for path in sorted(leaves):
        found.update(path.encode() + str(leaves[path].dtype).encode() + leaves[path].tobytes())
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_rows(folder / STAGE / "metrics.jsonl")]
    found.update(json.dumps(rows).encode())
    return found.hexdigest()


def digest_of(folder: pathlib.Path) -> str:
    """``digest`` in a child: reading a checkpoint starts a backend."""
    out = folder.with_suffix(".digest")

    def write() -> int:
        out.write_text(digest(folder))
        return 0

    pid = fork(write, folder.with_suffix(".log"))
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"the end of {folder} cannot be read: {folder.with_suffix('.log').read_text()[-2000:]}")
    return out.read_text()


def unfinished(folder: pathlib.Path, since: float) -> bool:
    """Whether a checkpoint is being written there: one that is not committed and has changed since a time (what an earlier kill left has not)."""
    newest = committed(folder)

    def written(entry: pathlib.Path) -> bool:
        try:      # an old one that is being removed has no manifest either
            new = "tmp" in entry.name or (entry.name.isdigit() and int(entry.name) > newest and not (entry / checkpoint.MANIFEST).exists())
            return new and entry.stat().st_mtime > since
        except FileNotFoundError:      # renamed meanwhile
            return False
    return any(written(e) for e in (folder / STAGE / "checkpoints").glob("*"))


def committed(folder: pathlib.Path) -> int:
    """The newest step of a checkpoint that is whole, 0 without one."""
    return max((int(e.parent.name) for e in (folder / STAGE / "checkpoints").glob(f"*/{checkpoint.MANIFEST}") if e.parent.name.isdigit()), default=0)


def size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def strike(pid: int, folder: pathlib.Path, chance: random.Random) -> str | None:
    """Kills the process at a random moment; where it fell, None where the run was done before."""
    metrics = folder / STAGE / "metrics.jsonl"
    kind, before, began, since = chance.random(), size(metrics), time.monotonic(), time.time()

    def until(condition: Callable[[], bool]) -> bool:
        while not condition():
            if ended_here := ended(pid):
                raise RuntimeError(f"{folder} ended with {ended_here}: {folder.with_suffix('.log').read_text()[-3000:]}")
            if ended_here is not None:
                return False
            if time.monotonic() - began > SECONDS:
                raise RuntimeError(f"{folder} hangs: {folder.with_suffix('.log').read_text()[-3000:]}")
            time.sleep(0.0005)
        return True

    if kind < 0.1:
        wake = time.monotonic() + chance.random() * 2
        alive = until(lambda: time.monotonic() > wake)
    else:      # rows beyond the restored step are dropped at the start: then the file grows again
        alive = until(lambda: size(metrics) < before or (before == 0 and size(metrics) > 0)) if before else until(lambda: size(metrics) > 0)
        low, saved = size(metrics), committed(folder) + chance.randrange(SAVES) * EVERY
        alive = alive and until(lambda: size(metrics) > low) and until(lambda: committed(folder) >= saved)
        wake = time.monotonic() + chance.random() * 0.6
        alive = alive and (kind < 0.6 or until(lambda: time.monotonic() > wake))
        if alive and kind < 0.6:
            alive = until(lambda: unfinished(folder, since))
            wake = time.monotonic() + chance.random() * 0.03
            alive = alive and until(lambda: time.monotonic() > wake)
    if not alive:
        return None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if unfinished(folder, since):
        return "inside a save"
    return "before training" if size(metrics) <= before and kind < 0.1 else "between saves"


def told(fell: collections.Counter) -> str:
    return ", ".join(f"{where}: {n}" for where, n in fell.most_common())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(argv)
    chance, fell, runs, kills, wrong, rates = random.Random(args.seed), collections.Counter(), 0, 0, 0, []
    whole, began = config(args.steps), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills") as temporary:
        root = pathlib.Path(temporary)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "cache")
        import jax
        jax.config.update("jax_compilation_cache_dir", str(root / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

        def start(folder: pathlib.Path) -> int:
            return fork(lambda: run.run(whole, folder, began=time.time()), folder.with_suffix(".log"))

        _, status = os.waitpid(start(root / "undisturbed"), 0)
        if status:
            raise RuntimeError((root / "undisturbed.log").read_text()[-3000:])
        expected = digest_of(root / "undisturbed")
        print(f"undisturbed: {args.steps} steps, {time.monotonic() - began:.1f} s", flush=True)
        while kills < args.rounds:
            runs, folder, here = runs + 1, root / f"run{runs}", 0
            while True:
                pid = start(folder)
                if kills == args.rounds:      # enough: the last run is left to finish
                    _, status = os.waitpid(pid, 0)
                    if status:
                        raise RuntimeError(folder.with_suffix(".log").read_text()[-3000:])
                    break
                where = strike(pid, folder, chance)
                if where is None:
                    break
                kills, here = kills + 1, here + 1
                fell[where] += 1
                if kills % 10 == 0:
                    print(f"{kills} kills, {time.monotonic() - began:.0f} s; they fell {told(fell)}", flush=True)
            same = digest_of(folder) == expected
            wrong += not same
            summed = goodput.total(goodput.read(folder / "goodput.jsonl"))
            rates.append({"kills": here, "same": same, "seconds": {k: round(v, 2) for k, v in summed.items()}})
            print(f"run {runs}: killed {here} times, the end is {'bitwise the same' if same else 'NOT THE SAME'}; {goodput.line(summed)}", flush=True)
    seconds = time.monotonic() - began
    print(f"{kills} kills in {runs} runs, {wrong} ends that differ; they fell {told(fell)}; "
          f"{seconds:.0f} s, {seconds / max(1, kills):.1f} s a round")
    if args.out:
        args.out.write_text(json.dumps({"rounds": kills, "runs": rates, "differ": wrong, "fell": fell, "seconds": round(seconds, 1)}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
