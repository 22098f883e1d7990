"""What the operator sees: the overview at the start, the bar, the scores. Plain lines without a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from vlm_jax.data import sources

PLAIN_SECONDS = 5.0   # without a terminal, at most one line in this time
HIDDEN = ("step", "lr", "bad_steps")


def amount(n: float, unit: str = "") -> str:
    """1234567 -> '1.23 M'."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= factor:
            return f"{n / factor:.3g} {letter}{unit}"
    return f"{n:.3g} {unit}".rstrip()


class Console:
    """``quiet``: says nothing, in all processes but the first."""

    def __init__(self, quiet: bool = False):
        self.rich = RichConsole(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 140, quiet=quiet)

    def say(self, text: str) -> None:
        self.rich.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        if self.rich.is_terminal and not self.rich._live_stack:
            with self.rich.status(f"{what} ..."):
                yield
        else:
            yield
        self.say(f"{what}: {time.perf_counter() - began:.1f} s")

    def overview(self, name: str, folder: Any, plan: Any, mesh: Any, config: Mapping[str, Any], steps: int,
                 example: Mapping[str, Any], program: Any, source: Any) -> None:
        """Towers and parameters, mesh, memory forecast, one decoded example with its tokens."""
        towers = Table(title=f"{config['system']}, stage {name} -> {folder}", box=box.SIMPLE, title_justify="left")
        towers.add_column("tower")
        for column in ("parameters", "trained", "frozen"):
            towers.add_column(column, justify="right")
        tops = sorted({p.split("/")[0] for p in plan.shapes})
        for top in tops:
            prefix = top + "/" if top + "/" in "".join(p[: len(top) + 1] for p in plan.shapes if p.startswith(top + "/")) else top
            towers.add_row(top, *(f"{plan.count(prefix, t):,}" for t in (None, True, False)))
        towers.add_row("total", *(f"{plan.count('', t):,}" for t in (None, True, False)), style="bold")
        self.rich.print(towers)
        device = mesh.devices.flat[0]
        self.say(f"mesh: {' x '.join(f'{a}={n}' for a, n in mesh.shape.items())} on {mesh.devices.size} "
                 f"{device.platform} device(s) ({device.device_kind}), rules {config['rules']}")
        if program is not None:
            analysis = program.memory_analysis()
            if analysis is not None:
                held, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
                self.say(f"memory forecast per device: {amount(held + temporary, 'B')} (state and batch {amount(held, 'B')}, "
                         f"temporaries {amount(temporary, 'B')})")
        data = config["data"]
        self.say(f"data: {data['train']}: {len(source):,} samples, batch {data['batch']}, {steps} steps = "
                 f"{steps * data['batch'] / max(1, len(source)):.3g} epochs")
        if sources.left_out(source):
            self.say(f"left out: {sources.left_out(source)}")
        self.say(f"captions: {example['tokens_mean']:.1f} tokens on average, {example['tokens_max']} at most, cut to {data['length']}: "
                 f"{example['truncated']:.1%} (of {example['captions']} looked at)")
        self.say(f"example {example['key']!r}: {example['caption']!r}\n  ids {example['ids']}\n  read back: {example['decoded']!r}; "
                 + (f"image {'x'.join(map(str, example['image'].shape))} uint8" if example["image"] is not None else "no image"))

    @contextlib.contextmanager
    def bar(self, name: str, start: int, total: int) -> Iterator[Callable[[Mapping[str, Any], int], None]]:
        """Yields ``progress(row, step)``."""
        def describe(row: Mapping[str, Any]) -> str:
            terms = "  ".join(f"{k} {v:.3f}" for k, v in row.items()
                              if isinstance(v, float) and "/" not in k and k not in HIDDEN)
            speed = (f"  {row['time/images_per_s']:.0f} images/s  data wait {row['time/data_wait']:.1%}"
                     if "time/images_per_s" in row else "")
            return terms + speed

        if self.rich.is_terminal:
            columns = (TextColumn(f"{name}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
                       TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[terms]}"))
            with Progress(*columns, console=self.rich) as progress:
                task = progress.add_task(name, total=total, completed=start, terms="")
                yield lambda row, step: progress.update(task, completed=step, terms=describe(row))
            return
        first: list[float] = []
        last = [0.0]

        def plain(row: Mapping[str, Any], step: int) -> None:
            now = time.perf_counter()
            first.extend(() if first else (now, step))      # the first row comes after compiling: no measure of speed
            if step == total or now - last[0] >= PLAIN_SECONDS:
                last[0] = now
                left = (now - first[0]) / max(1, step - first[1]) * (total - step)
                self.say(f"{name} {step}/{total}  {describe(row)}" + (f"  left {left:.0f} s" if step > first[1] else ""))
        yield plain

    def scores(self, scores: Mapping[str, float], step: int | None = None) -> None:
        """Each score with its interval, chance and baselines beside it; counts of items are left to the files."""
        table = Table(title="scores" if step is None else f"scores at step {step}", box=box.SIMPLE, title_justify="left")
        table.add_column("score", no_wrap=True, overflow="ignore")
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("95% interval", justify="right", no_wrap=True)
        table.add_column("chance and baselines")      # the one to be wrapped where the line is short: else rich takes from the values
        parents = {k: k.rpartition("/")[0] for k in scores if k.rpartition("/")[0] in scores}
        for key, value in scores.items():
            if key in parents:
                continue
            own = {k.removeprefix(key + "/"): v for k, v in scores.items() if parents.get(k) == key}
            low, high = own.pop("ci_low", None), own.pop("ci_high", None)
            if own or low is not None:
                table.add_row(key, f"{value:.4g}", "" if low is None else f"{low:.3f} - {high:.3f}",
                              ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in own.items()))
        self.rich.print(table)
