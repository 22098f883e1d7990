"""BLIP-2 and InstructBLIP: the first stage, queries, what trains; instructions, mixtures."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from benchmarks.claims.claim import Claim, Score, evals, set_fields, stage
from vlm_jax import config as configs

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
WRITTEN = {"exact captions": "caption/facts/exact", "true objects": "caption/facts/objects", "true relations": "caption/facts/relations",
           "CIDEr-D": "caption/CIDEr-D"}
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

CLAIMS: dict[str, Claim] = {
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
