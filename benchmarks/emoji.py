"""Samples a second of training a small CLIP on emoji, command line against command line: data, steps and logging included.

    python -m benchmarks.emoji --tars='/data/emoji/train-{00000..00003}.tar' --val=/data/emoji/val-00000.tar [--out=FILE.json]

open_clip  ``python -m open_clip_train.main`` on the tars (webdataset, one loader worker): images of 64 pixels in patches of 8, width 192,
           6 layers; text width 192, 4 layers, context 32, CLIP's tokenizer; embedding 128; 14,040,961 parameters; batch 252, AdamW 1e-3,
           crop of 0.8 to 1 of the area, fp32.
ours       ``python -m vlm_jax.main --config=benchmarks/emoji.py:equal``: the same model, batch, optimizer and crop; 32 tokens for every
           caption. Equal work. Target: at least as fast.
recipe     configs/clip.py:small as it is shipped, with a tokenizer of 2,000 pieces trained on the captions: a convolutional stem, half of
           the patches dropped, Muon, text cropped to the batch, colour augmentation. Another model, for the same number of samples.

Each block is a whole run of the command, of --steps steps, and the sides take turns. Times are the commands' own: "images_per_s" of
metrics.jsonl, and the samples a second of open_clip's log, one a step, waiting for data included. The first steps of a run,
which compile and fill buffers, are dropped; ours goes on compiling a step for each new text length, which the median leaves out.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import models, paired
from vlm_jax.config import parse_arg
from vlm_jax.data.tars import find_files

BATCH = 252
PARAMETERS = 14_040_961     # of both models of equal work
PEER = {"embed_dim": 128, "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4}}
LOGGED = re.compile(r"Batch \(t\): [0-9.]+, ([0-9.e+-]+)/s")


def get_config(arg: str = "") -> Any:
    """``--config=benchmarks/emoji.py:recipe``: clip:small as shipped; ``:equal``: with open_clip's model and recipe."""
    whole = models.load_config("clip", "small")
    stage = whole.stages.pretrain
    stage.evals.retrieval.update(examples=16, batch=16)     # a run ends with it; it is not what is timed
    if parse_arg(arg, work=("recipe", "equal")).work == "recipe":
        return whole
    stage.model.image.update(stem="patch", patch_dropout=0.0, remat="none")
    stage.model.text.update(remat="none", end="largest")
    stage.loss.duplicates = "negatives"
    stage.optim = dict(name="adamw", lr=1e-3, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.1, schedule="cosine", warmup=1,
                       clamps=stage.optim.clamps, ema=0.0, max_bad_steps=10)
    stage.data.update(augment="random_resized_crop(scale=0.8..1)", buckets=(), tokenizer="clip")
    return whole


def run(command: Sequence[str]) -> str:
    """Runs a command and returns what it wrote to stdout and stderr. Raises RuntimeError with the end of it where it fails."""
    done = subprocess.run(command, cwd=models.ROOT, env=paired.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nended with code {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def logged_seconds(log: str, batch: int) -> list[float]:
    """Seconds of each step in open_clip's log."""
    return [batch / float(rate) for rate in LOGGED.findall(log)]


def metrics_seconds(path: pathlib.Path, batch: int) -> list[float]:
    """Seconds of each step in metrics.jsonl of a run that logs every step."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [batch / row["time/images_per_s"] for row in rows if "time/images_per_s" in row]


def ours(work: str, tokenizer: str, given: argparse.Namespace) -> list[float]:
    """One run of our command; seconds of each step."""
    with tempfile.TemporaryDirectory() as folder:
        stage = {"data.train": f"tars:{given.tars}", "data.eval": f"tars:{given.val}", "data.tokenizer": tokenizer,
                 "data.batch": given.batch, "steps": given.steps, "log.every": 1, "checkpoint.every": 10**9}
        run([sys.executable, "-m", "vlm_jax.main", f"--config=benchmarks/emoji.py:{work}", f"--workdir={folder}/run",
             *(f"--config.stages.pretrain.{key}={value}" for key, value in stage.items())])
        return metrics_seconds(pathlib.Path(folder) / "run" / "1_pretrain" / "metrics.jsonl", given.batch)


def peer(given: argparse.Namespace) -> list[float]:
    """One run of open_clip's command; seconds of each step."""
    with tempfile.TemporaryDirectory() as folder:
        log = run([sys.executable, "-m", "open_clip_train.main", "--model", models.write_peer_config(folder, PEER), "--name", "run",
                   "--logs", folder, "--device", "cpu", "--precision", "fp32", "--dataset-type", "webdataset", "--train-data",
                   "::".join(find_files(given.tars)), "--train-num-samples", str(given.steps * given.batch), "--epochs", "1",
                   "--batch-size", str(given.batch), "--workers", "1", "--lr", "1e-3", "--wd", "0.1", "--beta1", "0.9", "--beta2", "0.98",
                   "--eps", "1e-6", "--warmup", "1", "--aug-cfg", "scale=(0.8,1.0)", "--seed", "0", "--log-every-n-steps", "1"])
        return logged_seconds(log, given.batch)


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--tars", required=True, help="training tars, with braces or globs")
    flags.add_argument("--val", required=True, help="a tar to evaluate on; 16 of its images, after the steps that are timed")
    flags.add_argument("--batch", type=int, default=BATCH, help="rows (default %(default)s)")
    paired.add_blocks(flags, rounds=3, steps=25, drop=8)
    given = paired.parse(flags, argv, quick=dict(rounds=1, steps=3, drop=1, batch=16))
    given.tars, given.val = given.tars.removeprefix("tars:"), given.val.removeprefix("tars:")
    paired.require_peer("open_clip_train", "webdataset", "pandas")
    machine = paired.machine()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = f"{folder}/tokenizer"
        run([sys.executable, "-m", "vlm_jax.data.tokenizers", "train", f"--input=tars:{given.tars}", "--vocab=2000", f"--out={tokenizer}"])
        blocks = paired.alternate({
            "ours": lambda: ours("equal", "clip", given),
            "recipe": lambda: ours("recipe", tokenizer, given),
            "open_clip": lambda: peer(given)}, given.rounds, given.drop)
    paired.report(given, f"training on emoji, batch {given.batch}, runs of {given.steps} steps", machine, blocks,
                  paired.compare(blocks, [("ours", "open_clip"), ("recipe", "open_clip")]), work=given.batch, unit="samples",
                  packages=("webdataset", "grain"))


if __name__ == "__main__":
    main()
