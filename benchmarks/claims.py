"""Claims of the papers on procedural scenes: variants of a config that differ in one thing, three seeds each.

    python -m benchmarks.claims --list
    python -m benchmarks.claims momentum [--workdir=runs/claims] [--seeds=0,1,2]
    python -m benchmarks.claims momentum_clipart --data=DIR      # tars of real pairs: DIR/train-*.tar, DIR/val-*.tar

Every variant runs with every seed in a work directory of its own, WORKDIR/NAME/VARIANT/SEED. The same command again goes on where it
was stopped, and runs nothing twice, nor what another claim in WORKDIR has run. Runs of one seed see the same data in the same order and
start from the same weights (as far as the variants share them), so that differences are taken seed by seed: their mean has a paired
interval, Student's t over the seeds. Above zero the claim holds here, below zero it is reversed, across zero it is open.
WORKDIR/NAME/claim.json keeps everything, claim.md the rows for docs/results.md.

A run is to take at most 90 s on 2 cores: what needs a large model or much data to be seen will not be seen here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import random
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import paired
from vlm_jax import config as configs
from vlm_jax.data.scene import CLASSES, COLOURS, SHAPES, frequency, make_scene
from vlm_jax.data.scenes import LENGTHS, NOISE, caption, open_scenes, render
from vlm_jax.errors import ConfigError, nearest

BUDGET_S = 90
SEEDS = (0, 1, 2)
MADE = "made"      # what a claim prepares: its folder, and its scores among those of the variants
EXIT_DONE, EXIT_PREEMPTED, EXIT_BAD_CONFIG = 0, 42, 43

Score = tuple[str, str]      # (variant, name of a score in its DONE)
Scores = Mapping[str, Mapping[int, Mapping[str, float]]]      # variant -> seed -> score


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a paper says, and the runs that look at it.

    config: as for ``--config``, or by variant. shared, variants: keys of it as on the command line ("stages.pretrain.loss.alpha") and their values;
    what ``shared`` says holds for all variants. differences: what is compared, the side that the claim puts higher
    first. shown: scores to print beside those, of every variant. stage: as for ``--stage``.

    prepare: makes what the variants of a seed train on, called as prepare(folder, seed, train, data); the same call again goes on where it was
    stopped. It returns scores, which stand beside those of the variants as "made", or None where a signal stopped it. made: those to print.
    together: the name of its folder where several claims use what it makes, "" for one of the claim's own.
    In values, "{made}" is its folder, "{seed}" the seed, and "{data}" what the command line names by ``--data``.
    """
    sentence: str
    paper: str
    config: str | Mapping[str, str]
    variants: Mapping[str, Mapping[str, Any]]
    differences: Mapping[str, tuple[Score, Score]]
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shown: Sequence[str] = ()
    stage: str = ""
    prepare: Callable[..., Mapping[str, float] | None] | None = None
    made: Sequence[str] = ()
    together: str = ""

    def config_of(self, variant: str) -> str:
        return self.config if isinstance(self.config, str) else self.config[variant]

    def scores(self) -> dict[str, list[str]]:
        """The scores to print, by variant."""
        found = {**({MADE: dict.fromkeys(self.made)} if self.prepare else {}), **{variant: dict.fromkeys(self.shown) for variant in self.variants}}
        for sides in self.differences.values():
            for variant, score in sides:
                found[variant][score] = None
        return {variant: list(names) for variant, names in found.items()}


# ---- how claims are spelt

def evals(data: str = "scenes:test:canonical", **kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Small evaluations by their kind."""
    return {kind: dict(dict(kind=kind, data=data, examples=400, batch=100), **section) for kind, section in kinds.items()}


def stage(name: str = "pretrain", **fields: Any) -> dict[str, Any]:
    """{"steps": 400} of a stage as a claim spells it."""
    return {f"stages.{name}.{key}": value for key, value in fields.items()}


RECALL = {"text to image R@1": "text_to_image/R@1", "image to text R@1": "image_to_text/R@1"}
RERANK = dict(rerank=dict(options=dict(captions="first", k=16)))

# Canonical captions: 22 tokens at most. What is learnt in a minute is learnt from many small batches.
SMALL = {"data.train": "scenes:train:canonical", "data.eval": "scenes:test:canonical", "data.length": 22, "data.batch": 24, "checkpoint.every": 10_000}
ALBEF = "configs/albef.py"
SHORT = stage(**SMALL, steps=420, **{"data.size": 32, "loss.queue": 96})

# Matching learns nothing from so few noisy pairs, and has no pseudo-targets: without it there is time for more steps.
SHARES = {"distilled": stage(**{"loss.alpha": 0.4}), "one_hot": stage(**{"loss.alpha": 0.0})}
DISTILLED = {**SHORT, **stage(**{"steps": 600, "loss.weights.itm": 0.0})}
BLIP, NOISY = "configs/blip.py", "scenes:noisy:canonical"
# Single objects, ten tokens: a captioner and a filter that are worth something in a minute.
SINGLES = {**SMALL, "data.train": "tars:{made}/noisy/*.tar", "data.eval": "scenes:objects:canonical", "data.length": 10, "data.batch": 32, "data.size": 32}
BLIP_SHORT = stage(**SINGLES, steps=200, **{"loss.queue": 128, "loss.momentum": 0.95, "model.image.positions": "sincos",
                                            "model.image.positions_at": ("input", "output")})
HUMAN = {key: value for name in ("caption", "retrieval") for key, value in stage(name, **{
    **SINGLES, "data.train": "tars:{made}/human/*.tar", "steps": 80, "evals": {},
    **({"loss.queue": 128, "loss.momentum": 0.95} if name == "retrieval" else {})}).items()}

# A transformer of three layers over 17 tokens of an image and 22 of a text, the top layer fused. What is compared learns at one rate.
VLMO, BEIT3 = "configs/vlmo.py", "configs/beit3.py:targets=colours"
MATRICES = {"optim.name": "muon", "optim.lr": 2e-3, "optim.muon_lr": 0.02,
            "optim.muon_exclude": (r".*_head/.*|pooler/.*|lm_.*|(.*/)?table|.*_embed|position_bias/.*",)}
TOWER = {"data.size": 32, **MATRICES, **{f"model.trunk.{k}": v for k, v in dict(
    patch=8, width=96, layers=3, heads=3, mlp_dim=288, fused=1, reach=48, layer_scale=0.0).items()}}
# Tokens that go through the transformer in a joint step of 24 pairs: each side alone, its top layer twice, and four times both
FUSED_STEPS, FUSED_TOKENS = 400, 24 * ((17 + 22) * 4 // 3 + 4 * (17 + 22))


def fused(steps: int = FUSED_STEPS, **fields: Any) -> dict[str, Any]:
    """VLMo's last stage, of pairs."""
    return stage("joint", **SMALL, **TOWER, steps=steps, evals=evals(**RERANK), **fields)


def before(name: str, tokens: int, share: float) -> dict[str, Any]:
    """A stage of images or texts alone, 96 of ``tokens`` in a step, that takes ``share`` of the tokens of ``FUSED_STEPS``."""
    return stage(name, **{**SMALL, "data.batch": 96}, **TOWER, steps=round(share * FUSED_STEPS * FUSED_TOKENS / (96 * tokens)))


FUSED = {"stage_order": ("joint",), **fused(init=())}
SHOWN_OF_FUSED = ("rerank/text_to_image/R@10/dual_encoder", "rerank/text_to_image/reachable")


def of_fused(ours: str, theirs: str) -> dict[str, tuple[Score, Score]]:
    """Retrieval of two variants, by the dual encoder and re-ranked by the fusion encoder."""
    return {f"{what}, {how}": ((ours, f"rerank/{score}{tail}"), (theirs, f"rerank/{score}{tail}"))
            for how, tail in (("dual encoder", "/dual_encoder"), ("re-ranked", "")) for what, score in RECALL.items()}


# The same three layers and shared attention; a third of the rows are images alone, a third texts, a third pairs
MASKED_TOWER = {"data.size": 32, **MATRICES, **{f"model.tower.{k}": v for k, v in dict(
    patch=8, width=96, layers=3, heads=3, mlp_dim=288, attention="shared", joint_layers=1, sub_norm=False).items()}}
MASKED = {"stage_order": ("pretrain", "itc"),
          **stage(**{**SMALL, "data.batch": 96}, **MASKED_TOWER, **{"loss.image_masked": 6}, steps=FUSED_STEPS * FUSED_TOKENS // (2 * 32 * 2 * (17 + 22))),
          **stage("itc", **{**SMALL, "data.batch": 48}, **MASKED_TOWER, steps=FUSED_STEPS * FUSED_TOKENS // (2 * 48 * (17 + 22)),
                  evals=evals(retrieval=dict(options=dict(captions="first"))))}

# BLIP-2: the preset's eye and language model, made first and once for all seeds, as the paper's are; then short stages of small batches, the first made once
# for a seed.
BLIP2, INSTRUCTBLIP = "configs/blip2.py", "configs/instructblip.py"
BRIDGE = {"checkpoint.every": 10_000}
FIRST_STEPS, SECOND_STEPS, INSTRUCT_STEPS = 200, 300, 300
EYE, LANGUAGE, FIRST = "{made}/towers/1_eye", "{made}/towers/2_language", "{made}/{seed}/3_pretrain"
IMAGE_RULE, LANGUAGE_RULE, NEW_PROJECTION = ("image/.*", f"{EYE}:", "copy"), ("language/.*", f"{LANGUAGE}:", "copy"), ("projection/.*", "fresh", "copy")
SEEN = {**stage("pretrain", **BRIDGE, steps=FIRST_STEPS, init=(IMAGE_RULE,), evals={}),
        **stage("generate", **BRIDGE, steps=SECOND_STEPS, init=(LANGUAGE_RULE, NEW_PROJECTION, FIRST), evals=evals("scenes:test", caption={}),
                **{"data.prompt_length": 4})}
WRITTEN = {"exact captions": "caption/facts/exact", "true objects": "caption/facts/objects", "true relations": "caption/facts/relations", "CIDEr-D": "caption/CIDEr-D"}
QUERIES = (2, 8, 32)
LANGUAGE_STILL = (r"(?!language/).*",)
TYPES, NEW_TYPES = "count+colour+relation+existence", "comparison"
REPLIES = {**BRIDGE, "data.eval": f"scenes:test/{TYPES}", "data.prompt_length": 40, "data.length": 28}
READ = {**stage("instruct", **REPLIES, steps=INSTRUCT_STEPS, init=(LANGUAGE_RULE, NEW_PROJECTION, FIRST),
                evals={name: dict(section, examples=400, batch=100) for name, section in dict(
                    questions=dict(kind="vqa", data=f"scenes:test/{TYPES}", options=dict(method="generate", beams=1)),
                    held_out=dict(kind="vqa", data=f"scenes:test/{NEW_TYPES}", options=dict(method="generate", beams=1)),
                    choice=dict(kind="choice", data="scenes:test/choice"), caption=dict(kind="caption", data="scenes:test/caption")).items()},
                **{"data.instruction_length": 40, "data.train": f"scenes:train/caption+detail+{TYPES}+vqg"}), "stage_order": ("instruct",)}
BLIND = stage("instruct", **{"model.instruction_tokens": {}, "data.instruction_tokenizer": "", "data.instruction_length": 0})
SIZES = {"caption": 100_000, "colour": 10_000, "count": 2000, "existence": 600, "relation": 200}      # of a mixture's sources


def replied(ours: str, theirs: str) -> dict[str, tuple[Score, Score]]:
    """Replies of two variants, to instructions of the kinds that were trained on and of others."""
    of = {"questions": "questions/accuracy", "captions": "caption/facts/exact", "comparisons, held out": "held_out/accuracy",
          "choice, held out": "choice/accuracy"}
    return {what: ((ours, score), (theirs, score)) for what, score in of.items()}


# ---- data that claims make first

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


WEB, HUMANS = 2400, 600      # noisy pairs that are rewritten, true ones


def bootstrap(made: pathlib.Path, seed: int, train: Callable[..., Any], data: str = "") -> dict[str, float] | None:
    """Pre-trains BLIP on ``WEB`` noisy pairs of single objects (made/noisy), tunes a captioner and a filter apart on ``HUMANS`` true pairs of
    others (made/human), and puts the noisy ones through both (made/SEED/rewritten). Scores: what was kept, by what was planted."""
    from vlm_jax import capfilt
    from vlm_jax.data import pack
    from vlm_jax.data.sources import open_source
    folder, places = made / str(seed), {"seed": seed, "made": made}
    record = folder / "made.json"
    if record.exists():
        return json.loads(record.read_text())
    seen = LENGTHS["objects"]      # those before are evaluated on
    web = range(seen, seen + WEB)
    noisy, clean = (open_scenes("objects", count=web.stop + HUMANS, canonical_share=1.0, noise=share) for share in (NOISE, 0.0))
    pack.pack([noisy[i] for i in web], str(made / "noisy"), shard=WEB)
    pack.pack([clean[i] for i in range(web.stop, web.stop + HUMANS)], str(made / "human"), shard=HUMANS)
    runs = {}
    for name in ("pretrain", "caption", "retrieval"):
        config = set_fields(configs.from_file(BLIP), {**BLIP_SHORT, **stage(evals={}), **HUMAN}, seed, places, BLIP)
        runs[name] = train(config, folder / "runs", stage=name)
        if not runs[name].done:
            return None
    if capfilt.main([f"--captioner={runs['caption'].folder}", f"--filter={runs['retrieval'].folder}", f"--data=tars:{made / 'noisy'}/*.tar",
                     f"--out={folder / 'rewritten'}", "--max_length=10", f"--seed={seed}"]):
        raise ConfigError(f"rewriting into {folder} failed")
    rewritten, said = open_source(f"tars:{folder / 'rewritten'}/*.tar"), {}
    for row in range(len(rewritten)):
        said[rewritten.key(row)] = json.loads(rewritten.record(row, ("json",))["json"])["capfilt"]
    kept: dict[str, list[bool]] = {"": [], "other": [], "lie": []}
    true = []
    for i in web:
        of_web, synthetic = (said.get(noisy.key(i), {}).get(branch, ("", 0.0)) for branch in ("web", "synthetic"))
        kept[noisy.caption(i, noisy.scene(i))[1]].append(of_web[1] >= capfilt.PROBABILITY)
        if synthetic[1] >= capfilt.PROBABILITY:
            true.append(noisy.judge(i, synthetic[0])["exact"])
    found = {"true captions kept": statistics.fmean(kept[""]), "captions of others dropped": 1 - statistics.fmean(kept["other"]),
             "lies dropped": 1 - statistics.fmean(kept["lie"]), "synthetic captions kept": len(true) / WEB,
             "synthetic captions kept that are true": statistics.fmean(true) if true else math.nan,
             "texts that are true, before": len(kept[""]) / WEB,
             "texts that are true, after": (sum(kept[""]) + sum(true)) / max(1, sum(map(sum, kept.values())) + len(true))}
    record.write_text(json.dumps(found))
    return found


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


def bridge(made: pathlib.Path, seed: int, train: Callable[..., Any], data: str = "") -> dict[str, float] | None:
    """The eye and the language model of BLIP-2's preset (made/towers, of seed 0), and its first stage (made/SEED). Scores: what the eye's own decoder and the
    first stage write and find."""
    found, places = {}, {"seed": seed, "made": made}
    scored = stage("pretrain", evals=evals("scenes:test", retrieval=dict(options=dict(captions="first")), caption={}))
    towers, own = configs.from_file(BLIP2), set_fields(configs.from_file(BLIP2), {**SEEN, **scored}, seed, places, BLIP2)
    for name, config, folder in (("eye", towers, "towers"), ("language", towers, "towers"), ("pretrain", own, str(seed))):
        run = train(config, made / folder, stage=name)
        if not run.done:
            return None
        found |= {f"{name}/{score}": value for score, value in run.scores.items()}
    return found


MADE_FIRST = ("eye/caption/facts/exact", "pretrain/retrieval/text_to_image/R@1", "pretrain/caption/facts/exact")

# ---- the claims

CLAIMS: dict[str, Claim] = {
    "momentum": Claim(
        sentence="Learning from the momentum model's pseudo-targets improves what is learnt from noisy pairs.",
        paper="ALBEF (arXiv 2107.07651), sections 3.3 and 6.1",
        config=ALBEF, shared={**DISTILLED, **stage(**{"data.train": NOISY, "evals": evals(retrieval=dict(options=dict(captions="first")), matching={})})},
        variants=SHARES,
        differences={what: (("distilled", f"retrieval/{score}"), ("one_hot", f"retrieval/{score}")) for what, score in RECALL.items()}
        | {"true caption preferred, cosine": (("distilled", "matching/cosine"), ("one_hot", "matching/cosine"))}),
    "momentum_clipart": Claim(
        sentence="Learning from the momentum model's pseudo-targets improves what is learnt from noisy pairs: titles and keywords of clip art.",
        paper="ALBEF (arXiv 2107.07651), sections 3.3 and 6.1",
        config=ALBEF, shared={**DISTILLED, **stage(**{"data.train": "tars:{data}/train-*.tar", "data.eval": "tars:{data}/val-*.tar",
                                                      "data.tokenizer": "train:2000", "evals": evals("tars:{data}/val-*.tar", retrieval={})})},
        variants=SHARES,
        differences={f"{what.replace('@1', k)}": tuple((name, f"retrieval/{score.replace('@1', k)}") for name in ("distilled", "one_hot"))
                     for what, score in RECALL.items() for k in ("@1", "@10")}),
    "negatives": Claim(
        sentence="Matching learns more from hard negatives, mined by contrastive similarity, than from random ones.",
        paper="ALBEF (arXiv 2107.07651), sections 3.2 and 6.1",
        config=ALBEF, shared={**SHORT, **stage(evals=evals(**RERANK, matching={}))},
        variants={name: stage(**{"loss.negatives": name}) for name in ("hard", "random")},
        differences={"true caption preferred, ITM": (("hard", "matching/match"), ("random", "matching/match"))}
        | {f"{what}, {how}": (("hard", f"rerank/{score}{tail}"), ("random", f"rerank/{score}{tail}"))
           for how, tail in (("re-ranked", ""), ("dual encoder", "/dual_encoder")) for what, score in RECALL.items()},
        shown=("matching/cosine",)),
    "rerank": Claim(
        sentence="The fusion encoder ranks the dual encoder's nearest better than the dual encoder does.",
        paper="ALBEF (arXiv 2107.07651), section 5",
        config=ALBEF, shared={**SHORT, **stage(evals=evals(**RERANK, matching={}))},
        variants={"albef": stage(**{"loss.negatives": "hard"})},
        differences={what: (("albef", f"rerank/{score}"), ("albef", f"rerank/{score}/dual_encoder")) for what, score in RECALL.items()},
        shown=("rerank/pairs", "rerank/text_to_image/reachable", "rerank/text_to_image/seconds_per_1000_queries",
               "rerank/text_to_image/seconds_per_1000_queries/dual_encoder")),
    "balancing": Claim(
        sentence="Pairs balanced over queries teach more of rare classes than the pool that they are taken from.",
        paper="CLIP (arXiv 2103.00020), section 2.2; MetaCLIP (arXiv 2309.16671)", config="configs/clip.py", prepare=balance, made=("pairs", "pairs kept"),
        shared={**stage(**SMALL), **stage(**{"steps": 300, "data.batch": 48, "data.size": 32, "loss.duplicates": "positives", "evals": evals(
            "scenes:objects:canonical", zeroshot=dict(examples=840, options=dict(templates="scene", groups=GROUPS)))})},
        variants={name: stage(**{"data.train": f"tars:{{made}}/{folder}/*.tar"})
                  for name, folder in (("balanced", f"balanced/cap_{CAP}_seed_{{seed}}"), ("pool", "pool"))},
        differences={f"zero-shot, {group}": (("balanced", f"zeroshot/top1/{group}"), ("pool", f"zeroshot/top1/{group}")) for group in GROUPS}),
    "capfilt": Claim(
        sentence="Captions rewritten and filtered by a model that saw few true pairs teach a new model more than the noisy ones.",
        paper="BLIP (arXiv 2201.12086), section 4.3 and table 1", config=BLIP, prepare=bootstrap,
        made=("true captions kept", "captions of others dropped", "lies dropped", "synthetic captions kept", "synthetic captions kept that are true",
              "texts that are true, before", "texts that are true, after"),
        shared={**BLIP_SHORT, **stage(evals=evals("scenes:objects:canonical", caption={}, zeroshot=dict(examples=840, options=dict(templates="scene"))))},
        variants={"rewritten": stage(**{"data.train": "tars:{made}/{seed}/rewritten/*.tar"}), "noisy": stage(**{"data.train": "tars:{made}/noisy/*.tar"})},
        differences={"exact captions": (("rewritten", "caption/facts/exact"), ("noisy", "caption/facts/exact")),
                     "zero-shot": (("rewritten", "zeroshot/top1"), ("noisy", "zeroshot/top1"))}),
    "finetune_emoji": Claim(
        sentence="Fine-tuning a model of scenes teaches emoji named after shapes better than training from scratch does, at as many steps.",
        paper="CLIP (arXiv 2103.00020), section 3; WiSE-FT (arXiv 2109.01903)", config=CLIP, prepare=near_emoji, stage="finetune",
        made=("pairs few", "pairs unseen"), shared={**FEW, **stage("finetune", evals=NAMED)},
        variants={"finetuned": {}, "scratch": FRESH}, differences=of_finetuned("finetuned", "scratch")),


    "stagewise": Claim(
        sentence="Images alone, then texts alone, then pairs teach more than pairs from the start, at as many tokens through the transformer.",
        paper="VLMo (arXiv 2111.02358), section 3.4 and its ablations", config=VLMO,
        variants={"staged": {"stage_order": ("vision", "language", "joint"), **before("vision", 17, 0.16), **before("language", 22, 0.16),
                             **fused(round(0.68 * FUSED_STEPS))},
                  "joint": FUSED},
        differences=of_fused("staged", "joint"), shown=SHOWN_OF_FUSED),
    "shared_attention": Claim(
        sentence="Attention that all modalities share teaches more than attention of each one's own.",
        paper="VLMo (arXiv 2111.02358), section 3.2 and its ablations", config=VLMO, shared=FUSED,
        variants={"shared": {}, "separate": stage("joint", **{"model.trunk.attention": "split"})},
        differences=of_fused("shared", "separate"), shown=SHOWN_OF_FUSED),
    "global_negatives": Claim(
        sentence="Matching learns more from hard negatives of the whole batch than from those of six groups, as where each device has four pairs.",
        paper="VLMo (arXiv 2111.02358), section 3.3 and its ablations", config=VLMO, shared=FUSED,
        variants={"global": {}, "local": stage("joint", **{"loss.group": 4})},
        differences=of_fused("global", "local"), shown=SHOWN_OF_FUSED),
    "experts": Claim(
        sentence="Feed-forward experts by modality teach more than one feed-forward part for all, at the same work for each token.",
        paper="VLMo (arXiv 2111.02358), section 3.2 and its ablations", config=VLMO, shared=FUSED,
        variants={"experts": {}, "one": stage("joint", **{"model.trunk.feed_forward": "shared"})},
        differences=of_fused("experts", "one"), shown=SHOWN_OF_FUSED),
    "masked_then_contrast": Claim(
        sentence="Masked modelling alone and then contrast teach more than contrast, matching and masked words together, at as many tokens.",
        paper="BEiT-3 (arXiv 2208.10442), section 2.2", config={"masked": BEIT3, "together": VLMO},
        variants={"masked": MASKED, "together": FUSED},
        differences={what: (("masked", f"retrieval/{score}"), ("together", f"rerank/{score}/dual_encoder")) for what, score in RECALL.items()},
        shown=()),
    "stage1": Claim(
        sentence="Queries that first learn beside the eye alone then teach a frozen language model more than queries that start with it, at as many pairs.",
        paper="BLIP-2 (arXiv 2301.12597), section 4.1 and figure 5", config=BLIP2, prepare=bridge, together="bridge", made=MADE_FIRST,
        shared={**SEEN, "stage_order": ("generate",)},
        variants={"stage1": {}, "none": stage("generate", steps=FIRST_STEPS + SECOND_STEPS, init=(IMAGE_RULE, LANGUAGE_RULE, (".*", "fresh", "copy")))},
        differences={what: (("stage1", score), ("none", score)) for what, score in WRITTEN.items()}),
    "queries": Claim(
        sentence="More queries tell the language model more of an image.",
        paper="BLIP-2 (arXiv 2301.12597), section 3.1, which has 32", config=BLIP2, prepare=bridge, together="bridge", made=MADE_FIRST,
        shared={**SEEN, "stage_order": ("pretrain", "generate"), **stage("generate", init=(LANGUAGE_RULE, NEW_PROJECTION, "@pretrain"))},
        variants={str(count): {f"stages.{name}.model.qformer.queries": count for name in ("pretrain", "generate")} for count in QUERIES},
        differences={f"{what}, {a} queries against {b}": ((str(a), score), (str(b), score))
                     for b, a in zip(QUERIES, QUERIES[1:], strict=False) for what, score in WRITTEN.items()}),
    "trainable": Claim(
        sentence="With eye and language model frozen the queries learn as much as where all weights train.",
        paper="BLIP-2 (arXiv 2301.12597), section 4.1 and table 2", config=BLIP2, prepare=bridge, together="bridge", made=MADE_FIRST,
        shared={**SEEN, "stage_order": ("generate",)},
        variants={"frozen": {}, "language frozen": stage("generate", trainable=LANGUAGE_STILL), "full": stage("generate", trainable=(".*",))},
        differences={f"{what}, against {other}": (("frozen", score), (other, score))
                     for other in ("language frozen", "full") for what, score in WRITTEN.items()}),
    "instruction_aware": Claim(
        sentence="Queries that read the instruction give better replies than queries that see the image alone.",
        paper="InstructBLIP (arXiv 2305.06500), section 2.3 and table 2", config=INSTRUCTBLIP, prepare=bridge, together="bridge", shared=READ,
        made=MADE_FIRST, variants={"aware": {}, "blind": BLIND}, differences=replied("aware", "blind"),
        shown=("questions/accuracy/most_frequent", "held_out/accuracy/most_frequent")),
    "sampling": Claim(
        sentence="Shares by the roots of sizes teach more than equal shares and than shares by sizes.",
        paper="InstructBLIP (arXiv 2305.06500), section 2.4 and table 2", config=INSTRUCTBLIP, prepare=bridge, together="bridge",
        made=MADE_FIRST,
        shared={**READ, **stage("instruct", **{"data.train": ";".join(f"scenes:train/{task}:{size}" for task, size in SIZES.items())})},
        variants={rule: stage("instruct", **{"data.mixture": rule}) for rule in ("sqrt", "uniform", "proportional")},
        differences={f"{what}, against {other}": sides for other in ("uniform", "proportional") for what, sides in replied("sqrt", other).items()}),
}


# ---- running

def placed(value: Any, places: Mapping[str, Any]) -> Any:
    """A value with "{made}", "{seed}" and "{data}" filled in. Raises ConfigError where ``--data`` is missing."""
    if isinstance(value, Mapping):
        return {key: placed(each, places) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(placed(each, places) for each in value)
    if not isinstance(value, str):
        return value
    if "{data}" in value and not places.get("data"):
        raise ConfigError(f"claim: {value!r} needs --data=DIR, a folder of tars")
    for name, place in places.items():
        value = value.replace(f"{{{name}}}", str(place))
    return value


def set_fields(config: Any, fields: Mapping[str, Any], seed: int, places: Mapping[str, Any], name: str = "the claim's config") -> Any:
    """``config`` with ``fields`` ("stages.pretrain.steps") and a seed. Raises ConfigError for a section that does not exist; the run
    refuses keys that it does not know."""
    for key, value in fields.items():
        node, (*path, last) = config, key.split(".")
        for part in path:
            if part not in node:
                raise ConfigError(f"claim: {key} names {part!r}, which {name} lacks{nearest(part, node)}")
            node = node[part]
        with node.unlocked(), node.ignore_type():
            node[last] = placed(value, places)
    for stage in config.stages.values():
        stage.seed = seed
    return config


def variant_config(claim: Claim, variant: str, seed: int, **places: Any) -> Any:
    """The config of one run."""
    name = claim.config_of(variant)
    return set_fields(configs.from_file(name), {**claim.shared, **claim.variants[variant]}, seed, {"seed": seed, **places}, name)


def finished(record: pathlib.Path, plain: Any, runs: pathlib.Path | None) -> dict[str, Any] | None:
    """What a run of the config ``plain`` left: its own record, or one of the same seed among other claims' (``runs``)."""
    others = () if runs is None else sorted(runs.glob(f"*/*/{record.parent.name}/{record.name}"))
    for path in (record, *others):
        if path.exists() and (done := json.loads(path.read_text()))["config"] == plain:
            return done
    return None


def measure(claim: Claim, folder: pathlib.Path, seeds: Sequence[int], train: Callable[..., Any],
            data: str = "", runs: pathlib.Path | None = None) -> tuple[Scores, dict[str, float]] | None:
    """Prepares and runs what is not done: (scores, seconds of each run), None where a signal stopped a run. ``train``: ``vlm_jax.train``.
    ``runs``: the folder of all claims, whose runs of the same config and seed are not run again."""
    scores: dict[str, dict[int, Mapping[str, float]]] = {variant: {} for variant in claim.scores()}
    seconds, made = {}, folder.parent / claim.together if claim.together else folder / MADE
    for seed in seeds:      # all variants of a seed before the next one: an early look compares like with like
        if claim.prepare:
            found = claim.prepare(made, seed, train, data)
            if found is None:
                return None
            scores[MADE][seed] = found
        for variant in claim.variants:
            config, workdir = variant_config(claim, variant, seed, made=made, data=data), folder / variant / str(seed)
            plain, record = json.loads(configs.to_json(config)), workdir / "run.json"
            done = finished(record, plain, runs)
            if done is None:
                print(f"{folder.name}: {variant}, seed {seed}", file=sys.stderr, flush=True)
                run = train(config, workdir, stage=claim.stage)
                if not run.done:
                    return None
                stages = [json.loads(path.read_text()) for path in workdir.glob("*/DONE")]
                done = {"config": plain, "scores": run.scores, "seconds": sum(stage["seconds"] for stage in stages)}
                record.write_text(json.dumps(done, indent=1))
            for name in claim.scores()[variant]:
                if name not in done["scores"]:
                    raise ConfigError(f"claim {folder.name!r}: variant {variant!r} has no score {name!r}{nearest(name, done['scores'], 5)}; "
                                      f"where its evaluations have changed since it was run, remove {workdir}")
            scores[variant][seed], seconds[f"{variant}/{seed}"] = done["scores"], done["seconds"]
    return scores, seconds


# ---- what came out

def paired_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of differences that were taken seed by seed; (nan, nan) for a single seed."""
    from scipy.stats import t
    if len(differences) < 2:
        return math.nan, math.nan
    middle = statistics.mean(differences)
    half = float(t.ppf(0.5 + level / 2, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return middle - half, middle + half


def verdict(low: float, high: float) -> str:
    return "holds" if low > 0 else "reversed" if high < 0 else "open"


def compare(claim: Claim, scores: Scores) -> dict[str, dict[str, Any]]:
    """For each difference of the claim: by seed, mean, interval, verdict."""
    found = {}
    for what, ((a, ours), (b, theirs)) in claim.differences.items():
        each = [scores[a][seed][ours] - scores[b][seed][theirs] for seed in scores[a]]
        interval = paired_interval(each)
        found[what] = {"of": [[a, ours], [b, theirs]], "by_seed": each, "mean": statistics.mean(each), "interval": list(interval),
                       "verdict": verdict(*interval)}
    return found


def rows(claim: Claim, scores: Scores, differences: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The two tables, in Markdown."""
    def line(*cells):
        return "| " + " | ".join(x if isinstance(x, str) else f"{x:.4g}" for x in cells) + " |"

    seeds = [f"seed {seed}" for seed in next(iter(scores.values()))]
    out = [line("variant", "score", *seeds, "mean", "spread"), "|---" * (len(seeds) + 4) + "|"]
    for variant, names in claim.scores().items():
        for name in names:
            values = [found[name] for found in scores[variant].values()]
            out.append(line(variant, name, *values, statistics.mean(values), f"{min(values):.4g} to {max(values):.4g}"))
    out += ["", line("difference", *seeds, "mean", "95% interval, paired", "claim"), "|---" * (len(seeds) + 4) + "|"]
    for what, found in differences.items():
        (a, ours), (b, theirs) = found["of"]
        sides = f"{a} - {b}" if a != b else f"{a}, {ours} - {theirs}"
        out.append(line(f"{what} ({sides})", *(f"{x:+.4f}" for x in found["by_seed"]), f"{found['mean']:+.4f}",
                        "{:+.4f} to {:+.4f}".format(*found["interval"]), found["verdict"]))
    return out


def report(name: str, claim: Claim, folder: pathlib.Path, scores: Scores, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Prints the tables and writes claim.json and claim.md into ``folder``."""
    differences = compare(claim, scores)
    longest = max(seconds.values())
    markdown = [f"### {name}: {claim.sentence}", "", f"{claim.paper}. `python -m benchmarks.claims {name}`: {len(seconds)} runs of "
                f"{min(seconds.values()):.0f} to {longest:.0f} s.", "", *rows(claim, scores, differences)]
    print("\n" + "\n".join(markdown))
    if longest > BUDGET_S:
        print(f"\nThe longest run took {longest:.0f} s, more than the {BUDGET_S} s that a run is to take on 2 cores.")
    told = {field.name: getattr(claim, field.name) for field in dataclasses.fields(claim) if field.name != "prepare"}
    found = {"claim": name, **told, "scores": scores, "differences": differences, "seconds": seconds,
             "machine": paired.machine(), "versions": paired.versions()}
    (folder / "claim.json").write_text(json.dumps(found, indent=1))
    (folder / "claim.md").write_text("\n".join(markdown) + "\n")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="", help="the claim; --list shows them")
    parser.add_argument("--list", action="store_true", help="the claims, their papers and their runs")
    parser.add_argument("--workdir", default="runs/claims", help="where runs are kept (default %(default)s)")
    parser.add_argument("--data", default="", help="folder of tars, for claims on real pairs")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="default %(default)s")
    args = parser.parse_args(argv)
    if args.list:
        for name, claim in CLAIMS.items():
            of = ", ".join(f"{variant} of {claim.config_of(variant)}" for variant in claim.variants)
            print(f"{name}\n    {claim.sentence}\n    {claim.paper}; {of}; {len(claim.variants) * len(SEEDS)} runs")
        return EXIT_DONE
    try:
        if args.name not in CLAIMS:
            raise ConfigError(f"claim {args.name!r} is not known{nearest(args.name, CLAIMS)}")
        try:
            seeds = [int(seed) for seed in args.seeds.split(",")]
        except ValueError:
            raise ConfigError(f"--seeds={args.seeds!r} is no list of numbers; nearest: 0,1,2") from None
        from vlm_jax import train  # imports a framework
        folder = pathlib.Path(args.workdir) / args.name
        measured = measure(CLAIMS[args.name], folder, seeds, train, args.data, folder.parent)
        if measured is None:
            print("stopped; the same command resumes", file=sys.stderr)
            return EXIT_PREEMPTED
        report(args.name, CLAIMS[args.name], folder, *measured)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
