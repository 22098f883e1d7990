"""metrics.jsonl: one row per logged step or evaluation, always written; other loggers beside it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("vlm_jax.metrics")


class MetricsLog:
    """Appends rows to ``folder/metrics.jsonl``; TensorBoard and Weights & Biases where asked for.

    A row is flat JSON with ``step``; NaN and infinity are written as strings so that every line
    parses anywhere. ``resume_at`` drops rows beyond that step: they will be made again.
    ``writes``: False in all processes but the first, whose rows are the same. Rows that the disk refuses wait for it to take them:
    a full one costs no training.
    """

    def __init__(self, folder: pathlib.Path, resume_at: int | None = None, tensorboard: bool = False, wandb: str = "", writes: bool = True):
        self.path = pathlib.Path(folder) / "metrics.jsonl" if writes else pathlib.Path(os.devnull)
        tensorboard, wandb = tensorboard and writes, wandb if writes else ""
        if writes and self.path.exists():
            rows = [r for r in read_rows(self.path) if resume_at is not None and r["step"] <= resume_at]
            fresh = self.path.with_suffix(".tmp")
            fresh.write_text("".join(json.dumps(r) + "\n" for r in rows))
            os.replace(fresh, self.path)
        self.file = self.path.open("ab", buffering=0)    # a row at a time, for whoever watches
        self.waiting: list[bytes] = []
        self.sinks = []
        if tensorboard:
            from tensorboardX import SummaryWriter
            writer = SummaryWriter(str(folder))
            self.sinks.append(lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items()
                                           if isinstance(v, float)])
        if wandb:
            import wandb as client
            run = client.init(project=wandb, dir=str(folder), resume="allow")
            self.sinks.append(lambda row: run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"]))

    def write(self, row: Mapping[str, Any]) -> None:
        clean = {k: (str(v) if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}
        self.waiting.append(json.dumps(clean).encode() + b"\n")
        self._write()
        for sink in self.sinks:
            sink(row)

    def _write(self) -> None:
        rows = b"".join(self.waiting)
        size = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(rows) != len(rows):
                raise OSError("the disk took a part")
            self.waiting.clear()
        except OSError as error:
            with contextlib.suppress(OSError):      # half a row would hide those after it
                self.file.truncate(size)
            log.error("%s: %d row(s) wait to be written: %s", self.path, len(self.waiting), error)

    def flush(self) -> None:
        """Forces what was written to the disk."""
        if self.waiting:
            self._write()
        if self.path.name == "metrics.jsonl":
            with contextlib.suppress(OSError):      # told when a row is refused
                os.fsync(self.file.fileno())

    def close(self) -> None:
        self.flush()
        self.file.close()


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a kill cut short is left out."""
    rows = []
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
