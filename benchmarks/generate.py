"""Captions: ids a second from CoCa ViT-B/32 against open_clip's ``generate``, and from BLIP-2 against transformers', fp32, on the CPU.

    python -m benchmarks.generate [--method=greedy|beam] [--out=FILE.json]
    python -m benchmarks.generate --system=blip2 [--method=greedy|beam]

CoCa. A step captions a batch of 8 random images with 30 ids (begin included), the image tower included. Both sides make
29 ids for every image, in 29 passes through the decoder: the end is forbidden before the last place
(ours: min_length = max_length; theirs: min_seq_len = seq_len - 1, after which it writes the end as the last id).
Weights are fresh, so what is written means nothing; times do not depend on it.

greedy  ours: method "greedy". Theirs: generation_type "top_k" with top_k = 1, which draws from one candidate.
beam    six hypotheses of each image. Ours: method "beam". Theirs: "beam_search" with num_beams = 6 in one group (its default of
        three groups is another search).

Ours keeps keys and values of past ids and of the image; open_clip computes all of them again for every id.
Target: several times as fast. Theirs needs transformers below 4.57, which took out the beam scorer that open_clip imports.

BLIP-2. A step captions a batch of images by the models of benchmarks/query_step.py (an eye of one layer of ViT-g, a base Q-Former, OPT-125M), whose weights are
equal on both sides. Greedy, or five hypotheses; 30 ids, begin included, the end forbidden; both keep keys and values. The ids that are written must be
equal. Target: 1.5 times as fast.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import models, paired, query_step

BEAMS = {"coca": 6, "blip2": 5}


def pictures(rows: int, size: int) -> np.ndarray:
    """uint8 [rows, size, size, 3] noise."""
    return np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)


def count(text: np.ndarray, ends: Sequence[int]) -> None:
    """Raises ValueError unless every row of text int [b, l] runs to its last place: no end and no pad between first and last id."""
    if np.isin(text[:, 1:-1], ends).any():
        raise ValueError(f"a caption ended early: {text}")


def ours(rows: int, length: int, method: str, quick: bool) -> tuple[Callable[[], None], dict[str, Any]]:
    """A worker's function."""
    import jax
    import optax

    from vlm_jax import partitioning
    from vlm_jax.stage import bind, resolve
    from vlm_jax.train import init
    from vlm_jax.train.state import merge

    stage = resolve(models.our_config("coca_b32", rows, quick), "coca_b32")
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    state = init.create(stage.system, stage.plan, optax.identity(), mesh, jax.random.key(0), stage.spec, {})
    predict = bind(stage.system, merge(state.params, {}, state.moving), mesh)
    batch = {"image": pictures(rows, stage.data.size)}
    options = dict(method=method, beams=BEAMS["coca"] if method == "beam" else 1, max_length=length, min_length=length)

    def step() -> None:
        text = predict["generate"](batch, **options)["text"]
        if text.shape != (rows, length):
            raise ValueError(f"{text.shape} ids instead of {(rows, length)}")
        count(text, [stage.config.model.tokens.eos])

    return step, {"parameters": stage.plan.count()}


def peer(rows: int, length: int, method: str, quick: bool) -> tuple[Callable[[], None], dict[str, Any]]:
    """A worker's function."""
    import open_clip
    import torch

    torch.manual_seed(0)
    model = models.peer_model("coca_b32", quick).eval()
    size = model.visual.image_size[0]
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    image = torch.from_numpy(((pictures(rows, size) / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2).copy())
    # open_clip's pad is an id of the vocabulary, which would end a row that happens to hold it.
    options = dict(generation_type="top_k", top_k=1) if method == "greedy" else dict(
        generation_type="beam_search", num_beams=BEAMS["coca"], num_beam_groups=1)

    def step() -> None:
        text = model.generate(image, seq_len=length, min_seq_len=length - 1, pad_token_id=-1, **options).numpy()
        if text.shape != (rows, length):
            raise ValueError(f"{text.shape} ids instead of {(rows, length)}")
        count(text, [49407, -1])

    return step, {"parameters": sum(p.numel() for p in model.parameters()), "threads": torch.get_num_threads()}


# ---- BLIP-2

def peer_blip2(rows: int, length: int, method: str, quick: bool, folder: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """A worker's function; its model is written to ``folder``, for the other side."""
    import torch

    model = query_step.saved_peer("language", quick, folder).eval()
    image = torch.from_numpy(query_step.pixels(pictures(rows, model.config.vision_config.image_size)).transpose(0, 3, 1, 2).copy())
    options = dict(do_sample=False, num_beams=BEAMS["blip2"] if method == "beam" else 1, max_new_tokens=length - 1, min_new_tokens=length - 1)

    def step() -> np.ndarray:
        with torch.no_grad():
            return model.generate(pixel_values=image, **options)[:, 1 - length:].numpy()

    return step, {"text": step().tolist(), "parameters": sum(p.numel() for p in model.parameters()), "threads": torch.get_num_threads()}


def our_blip2(rows: int, length: int, method: str, quick: bool, folder: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """A worker's function."""
    import jax.numpy as jnp

    from vlm_jax import partitioning
    from vlm_jax.stage import bind, resolve
    from vlm_jax.train.state import merge

    found, weights = query_step.imported(folder)
    stage = resolve(query_step.our_config("language", found, rows), "generate")
    mesh = partitioning.make_mesh()
    predict = bind(stage.system, merge({p: jnp.asarray(x) for p, x in weights.items()}, {}, {}), mesh)
    batch = {"image": pictures(rows, stage.data.size)}
    options = dict(method=method, beams=BEAMS["blip2"] if method == "beam" else 1, max_length=length, min_length=length)

    def step() -> np.ndarray:
        return np.asarray(predict["generate"](batch, **options)["text"])[:, 1:]

    return step, {"text": step().tolist(), "parameters": sum(x.size for x in weights.values())}


def compare_blip2(given: argparse.Namespace) -> None:
    machine = paired.machine()
    with tempfile.TemporaryDirectory() as folder:
        options = dict(rows=given.batch, length=given.length, method=given.method, quick=given.quick, folder=folder)
        with paired.Worker("benchmarks.generate:peer_blip2", options) as theirs, paired.Worker("benchmarks.generate:our_blip2", options) as ours:
            facts = {"ours": ours.facts, "transformers": theirs.facts}
            if ours.facts["text"] != theirs.facts["text"]:
                sys.exit(f"the ids differ: {facts}")
            blocks = paired.alternate({"ours": lambda: ours.block(given.steps), "transformers": lambda: theirs.block(given.steps)}, given.rounds, given.drop)
    paired.report(given, f"captions of blip2, {given.method}, batch {given.batch}, {given.length} ids", machine, blocks,
                  paired.compare(blocks, [("ours", "transformers")]), work=given.batch * (given.length - 1), unit="tokens",
                  packages=("transformers",), facts=facts)


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--system", choices=tuple(BEAMS), default="coca")
    flags.add_argument("--method", choices=("greedy", "beam"), default="greedy")
    flags.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    flags.add_argument("--length", type=int, default=30, help="ids of a caption, begin included (default %(default)s)")
    paired.add_blocks(flags, rounds=5, steps=3, drop=1)
    given = paired.parse(flags, argv, quick=dict(rounds=2, steps=2, drop=1, batch=2, length=8))
    paired.require_peer("transformers")
    if given.system == "blip2":
        return compare_blip2(given)
    if tuple(map(int, importlib.metadata.version("transformers").split(".")[:2])) >= (4, 57):
        print('open_clip generates with transformers below 4.57: pip install -e ".[bench]"')
        sys.exit(1)
    machine = paired.machine()
    options = dict(rows=given.batch, length=given.length, method=given.method, quick=given.quick)
    with paired.Worker("benchmarks.generate:ours", options) as ours, paired.Worker("benchmarks.generate:peer", options) as theirs:
        facts = {"ours": ours.facts, "open_clip": theirs.facts}
        if ours.facts["parameters"] != theirs.facts["parameters"]:
            sys.exit(f"the models differ: {facts}")
        blocks = paired.alternate({"ours": lambda: ours.block(given.steps), "open_clip": lambda: theirs.block(given.steps)},
                                  given.rounds, given.drop)
    paired.report(given, f"captions of coca_b32, {given.method}, batch {given.batch}, {given.length} ids", machine, blocks,
                  paired.compare(blocks, [("ours", "open_clip")]), work=given.batch * (given.length - 1), unit="tokens",
                  packages=("transformers",), facts=facts)


if __name__ == "__main__":
    main()
