"""CLIP: balanced pairs, and fine-tuning from scenes to emoji."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import re
from collections.abc import Callable
from typing import Any

from benchmarks.claims.claim import MADE, RECALL, SMALL, Claim, Score, evals, placed, set_fields, stage
from vlm_jax import config as configs
from vlm_jax.data.scene import CLASSES, COLOURS, SHAPES, frequency, make_scene
from vlm_jax.data.scenes import LENGTHS, caption, open_scenes, render
from vlm_jax.errors import ConfigError

POOL, CAP, CLOSE = 20_000, 500, 12_000
LONG_TAIL = sorted(CLASSES, key=frequency)      # the rarest first
GROUPS = {"tail": LONG_TAIL[:14], "middle": LONG_TAIL[14:28], "head": LONG_TAIL[28:]}


def balance(made: pathlib.Path, seed: int, train: Callable[..., Any], data: str = "") -> dict[str, float]:
    """``POOL`` long-tailed pairs in made/pool, and those that balancing over the words of shapes and colours keeps in made/balanced."""
    from vlm_jax.data import curate, pack
    pool, out, words = made / "pool", made / "balanced", made / "words.txt"
    pack.pack(open_scenes("longtail", count=POOL, canonical_share=1.0), str(pool), shard=5000)
    words.write_text("\n".join((*SHAPES, *COLOURS)))
    for command in (["queries", f"--list={words}"], ["match", f"--input=tars:{pool}/*.tar"], ["balance", f"--cap={CAP}", f"--seed={seed}"]):
        if curate.main([*command, f"--out={out}"]):
            raise ConfigError(f"{command[0]} of {out} failed")
    kept = curate.add_counts(str(out / f"cap_{CAP}_seed_{seed}"), "balance")[1]["kept"]
    return {"pairs": float(POOL), "pairs kept": float(kept)}


CLIP = "configs/clip.py"
START = stage(**{"data.train": "tars:{made}/close/*.tar@1;scenes:train@1", "data.tokenizer": "{made}/tokenizer", "steps": 500, "checkpoint.every": 10_000})
NAMED = dict(retrieval=dict(kind="retrieval", data="tars:{made}/unseen/*.tar", examples=100, batch=100),
             old=dict(kind="retrieval", data="scenes:test", examples=500, batch=100, options=dict(captions="first")))

FEW = stage("finetune", **{"init": "{made}/start/1_pretrain", "steps": 60, "select": {}, "checkpoint.every": 10_000, "data.train": "tars:{made}/few/*.tar",
                           "data.eval": "tars:{made}/unseen/*.tar"})
# What the start was trained with, from nothing: its model and its own rates
FRESH = stage("finetune", **{"init": (), "model": configs.to_plain(configs.from_file(CLIP).stages.pretrain.model), "data.tokenizer": "{made}/tokenizer",
                             "data.size": 48, "data.length": 32, "data.eval_augment": "squash",
                             "optim.lr": 3e-3, "optim.muon_lr": 0.08, "optim.schedule": "trapezoid", "optim.decay_from": "50%", "optim.warmup": "5%"})


def of_finetuned(tuned: str, scratch: str) -> dict[str, tuple[Score, Score]]:
    """The fine-tuned model against one from scratch and against the start, and what it has lost of scenes. Mean ranks: by how much it is better."""
    found: dict[str, tuple[Score, Score]] = {}
    for rival, other in (("scratch", scratch), ("zero-shot", MADE)):
        for way in ("text_to_image", "image_to_text"):
            what = f"over {rival}, {way.replace('_', ' ')}"
            found |= {f"{what} R@{k}": ((tuned, f"retrieval/{way}/R@{k}"), (other, f"retrieval/{way}/R@{k}")) for k in (1, 10)}
            found[f"{what}, mean rank"] = (other, f"retrieval/{way}/mean_rank"), (tuned, f"retrieval/{way}/mean_rank")
    return found | {f"scenes lost, {what}": ((MADE, f"old/{score}"), (tuned, f"old/{score}")) for what, score in RECALL.items()}


def close_up(index: int) -> dict[str, Any]:
    """A scene of "objects" as an emoji shows it: the object fills the picture, mostly on a light ground. Half of the captions are bare names."""
    scene = make_scene(index, "objects")
    thing, rng = scene.objects[0], random.Random(index)
    x, y, radius = rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58), rng.uniform(0.28, 0.5)
    if thing.colour == "white":
        ground = tuple(rng.uniform(0, 170) for _ in range(3))
    else:
        ground = (rng.uniform(225, 255),) * 3 if rng.random() < 0.7 else tuple(rng.uniform(0, 255) for _ in range(3))
    scene = dataclasses.replace(scene, objects=(dataclasses.replace(thing, x=x, y=y, radius=radius),), background=ground, noise=rng.uniform(0, 5))
    name = " ".join([thing.fill] * (thing.fill != "solid") + [thing.colour, thing.shape])
    return {"key": f"close/{index:08d}", "image": render(scene), "text": [name if rng.random() < 0.5 else caption(scene)], "json": {}}


def names_shape(text: str) -> bool:
    """Whether a caption has the name of one of the scenes' shapes as a word."""
    return not set(SHAPES).isdisjoint(re.findall(r"\w+", text.lower()))


def near_emoji(made: pathlib.Path, seed: int, train: Callable[..., Any], data: str = "") -> dict[str, float] | None:
    """The emoji that are named after the scenes' shapes (made/few to train on, made/unseen of a third style), a tokenizer of scenes and emoji, and
    a CLIP of scenes and ``close_up``s, trained once, with the seed 0. Scores: of that one, before it has seen an emoji."""
    from vlm_jax.data import pack, tokenizers
    from vlm_jax.data.sources import open_source
    emoji = placed("tars:{data}/train-*.tar", {"data": data})
    if not (made / "tokenizer").exists():
        few = [sample for sample in open_source(emoji) if names_shape(sample["text"][0])]
        unseen = [sample for sample in open_source(f"tars:{data}/val-*.tar") if names_shape(sample["text"][0])]
        pack.pack([close_up(i) for i in range(LENGTHS["objects"], LENGTHS["objects"] + CLOSE)], str(made / "close"), shard=CLOSE)
        pack.pack(few, str(made / "few"), shard=len(few))
        pack.pack(unseen, str(made / "unseen"), shard=len(unseen))
        texts = [text for source in ("scenes:train", f"tars:{made}/close/*.tar", emoji) for text in tokenizers.captions(source, 8000, None)]
        tokenizers.train(texts, 2000).save(str(made / "tokenizer"))
    start = train(set_fields(configs.from_file(CLIP), {**START, **stage(evals=NAMED)}, 0, {"made": made}, CLIP), made / "start", stage="pretrain")
    if not start.done:
        return None
    sizes = {f"pairs {folder}": float(len(open_source(f"tars:{made}/{folder}/*.tar"))) for folder in ("few", "unseen")}
    return {**sizes, **start.scores}


CLAIMS: dict[str, Claim] = {
    "balancing": Claim(
        sentence="Pairs balanced over queries teach more of rare classes than the pool that they are taken from.",
        paper="CLIP (arXiv 2103.00020), section 2.2; MetaCLIP (arXiv 2309.16671)", config="configs/clip.py", prepare=balance, made=("pairs", "pairs kept"),
        shared={**stage(**SMALL), **stage(**{"steps": 300, "data.batch": 48, "data.size": 32, "loss.duplicates": "positives", "evals": evals(
            "scenes:objects:canonical", zeroshot=dict(examples=840, options=dict(templates="scene", groups=GROUPS)))})},
        variants={name: stage(**{"data.train": f"tars:{{made}}/{folder}/*.tar"})
                  for name, folder in (("balanced", f"balanced/cap_{CAP}_seed_{{seed}}"), ("pool", "pool"))},
        differences={f"zero-shot, {group}": (("balanced", f"zeroshot/top1/{group}"), ("pool", f"zeroshot/top1/{group}")) for group in GROUPS}),
    "finetune_emoji": Claim(
        sentence="Fine-tuning a model of scenes teaches emoji named after shapes better than training from scratch does, at as many steps.",
        paper="CLIP (arXiv 2103.00020), section 3; WiSE-FT (arXiv 2109.01903)", config=CLIP, prepare=near_emoji, stage="finetune",
        made=("pairs few", "pairs unseen"), shared={**FEW, **stage("finetune", evals=NAMED)},
        variants={"finetuned": {}, "scratch": FRESH}, differences=of_finetuned("finetuned", "scratch")),
}
