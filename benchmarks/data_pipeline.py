"""Images a second that our pipeline prepares, against bare decoding and against open_clip's own loader, on the same tars.

    python -m benchmarks.data_pipeline [--tars='/data/train-{00000..00003}.tar'] [--size=224] [--out=FILE.json]

ours       vlm_jax.data.pipeline.train_batches on ``tars:``, as many reader threads as cores: a full shuffle by random access,
           random crop of 0.9 to 1 of the area resized to the size (bicubic), CLIP's tokenizer, batches of uint8.
decoding   Pillow and nothing else: the same files from memory, decode and bicubic resize, a pool of as many threads.
open_clip  its webdataset loader (open_clip_train.data.get_wds_dataset) with its own training transform, the same crop; a buffer
           shuffle, CLIP's tokenizer, normalised floats, once for each of --workers.

A step is one batch; a block's figure is the mean over its steps, for readers that work ahead hand over batches in bursts.
While one side works the others are stopped, readers included (benchmarks/paired.py): nobody starts with batches made in
another's time. Targets: nearly as fast as bare decoding, and faster than open_clip's loader on the same cores.

Without --tars a set of synthetic photographs is made: 2,000 JPEGs of 256 x 256 smooth noise with captions, in 4 tars.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import io
import itertools
import os
import pathlib
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import paired
from vlm_jax.data.tars import find_files

SCALE = (0.9, 1.0)      # of the area that a crop keeps; open_clip's default
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
WORDS = "a an the of on in with and red blue old small dog cat bicycle street tree house river boat child table market hill".split()


def photographs(folder: str | pathlib.Path, count: int = 2000, tars: int = 4, pixels: int = 256) -> list[str]:
    """Writes ``tars`` WebDataset tars of ``count`` JPEGs (quality 90) of smooth coloured noise and captions of 6 to 14 words.
    The same arguments give the same files. Their paths."""
    from PIL import Image

    def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))

    paths = [str(pathlib.Path(folder) / f"photographs-{i:05d}.tar") for i in range(tars)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(number, count, tars):
                rng = np.random.default_rng(i)
                size = (pixels, pixels)
                # large shapes, texture a quarter as strong, and a little grain: some 25 KB, as photographs of this size have
                shapes, texture = (Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
                                   for n in (8, 64))
                picture = 0.75 * np.asarray(shapes) + 0.25 * np.asarray(texture) + rng.normal(0, 4, (pixels, pixels, 1))
                out = io.BytesIO()
                Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
                add(tar, f"{i:06d}.jpg", out.getvalue())
                add(tar, f"{i:06d}.txt", " ".join(rng.choice(WORDS, rng.integers(6, 15))).encode())
    return paths


# ---- the sides: worker functions, see benchmarks/paired.py ---------------------------------------

def ours(tars: Sequence[str], size: int, batch: int, tokenizer: str = "clip") -> tuple[Callable[[], None], dict[str, Any]]:
    from vlm_jax.data import pipeline, tokenizers
    from vlm_jax.data.sources import open_source

    sys.setswitchinterval(5e-4)     # as vlm_jax.run does
    threads = len(os.sched_getaffinity(0))
    source = open_source("tars:{" + ",".join(tars) + "}" if len(tars) > 1 else f"tars:{tars[0]}")
    batches = pipeline.train_batches(source, tokenizers.load(tokenizer), batch=batch, size=size, length=77, seed=0, threads=threads,
                                     augment=f"random_resized_crop(scale={SCALE[0]}..{SCALE[1]})")
    return lambda: next(batches), {"samples": len(source), "threads": threads}


def decoding(tars: Sequence[str], size: int, batch: int) -> tuple[Callable[[], None], dict[str, Any]]:
    from PIL import Image

    files = []
    for path in tars:
        with tarfile.open(path) as tar:
            files += [tar.extractfile(m).read() for m in tar if m.name.lower().endswith(IMAGES)]
    endless = itertools.cycle(files)
    threads = len(os.sched_getaffinity(0))
    pool = concurrent.futures.ThreadPoolExecutor(threads)

    def decode(data: bytes) -> None:
        Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)

    return lambda: list(pool.map(decode, itertools.islice(endless, batch))), {"samples": len(files), "threads": threads}


def peer(tars: Sequence[str], size: int, batch: int, workers: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """The samples are said to be 10**9: an epoch without end, over the same tars again and again."""
    import open_clip
    from open_clip_train.data import get_wds_dataset

    arguments = argparse.Namespace(train_data="::".join(tars), train_num_samples=10**9, train_data_upsampling_factors=None,
                                   dataset_resampled=False, seed=0, batch_size=batch, workers=workers, world_size=1)
    transform = open_clip.image_transform(size, is_train=True, aug_cfg={"scale": SCALE})
    data = get_wds_dataset(arguments, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    batches = iter(data.dataloader)
    return lambda: next(batches), {"workers": workers}


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--tars", help="WebDataset tars, with braces or globs (default: synthetic photographs)")
    flags.add_argument("--size", type=int, default=224, help="pixels a side (default %(default)s)")
    flags.add_argument("--batch", type=int, default=64, help="images in a batch (default %(default)s)")
    flags.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="loader processes of open_clip (default %(default)s)")
    flags.add_argument("--photographs", type=int, default=2000, help="synthetic ones to make without --tars (default %(default)s)")
    paired.add_blocks(flags, rounds=6, steps=30, drop=8)
    given = paired.parse(flags, argv, quick=dict(rounds=2, steps=6, drop=2, size=32, batch=8, photographs=64))
    paired.require_peer("open_clip_train", "webdataset", "pandas")
    machine = paired.machine()
    with contextlib.ExitStack() as stack:
        if given.tars:
            tars = find_files(given.tars.removeprefix("tars:"))
        else:
            tars = photographs(stack.enter_context(tempfile.TemporaryDirectory()), given.photographs)
        options = dict(tars=tars, size=given.size, batch=given.batch)
        workers = {"ours": ("ours", {}), "decoding": ("decoding", {}),
                   **{f"open_clip, {n} worker{'s' * (n > 1)}": ("peer", {"workers": n}) for n in given.workers}}
        started = {name: stack.enter_context(paired.Worker(f"benchmarks.data_pipeline:{function}", {**options, **more}))
                   for name, (function, more) in workers.items()}
        blocks = paired.alternate({name: lambda w=worker: w.block(given.steps) for name, worker in started.items()},
                                  given.rounds, given.drop)
        facts = {name: worker.facts for name, worker in started.items()}
    paired.report(given, f"data pipeline, {given.tars or 'synthetic photographs'}, {facts['decoding']['samples']:,} images to {given.size} "
                  f"pixels, batches of {given.batch}", machine, blocks,
                  paired.compare(blocks, [("ours", name) for name in blocks if name != "ours"], of=statistics.mean),
                  work=given.batch, unit="images", of=statistics.mean, packages=("pillow", "grain", "webdataset"), facts=facts)


if __name__ == "__main__":
    main()
