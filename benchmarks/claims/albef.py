"""ALBEF: pseudo-targets, hard negatives, re-ranking."""

from __future__ import annotations

from benchmarks.claims.claim import RECALL, RERANK, SMALL, Claim, evals, stage

ALBEF = "configs/albef.py"
SHORT = stage(**SMALL, steps=420, **{"data.size": 32, "loss.queue": 96})

# Matching learns nothing from so few noisy pairs, and has no pseudo-targets: without it there is time for more steps.
SHARES = {"distilled": stage(**{"loss.alpha": 0.4}), "one_hot": stage(**{"loss.alpha": 0.0})}
DISTILLED = {**SHORT, **stage(**{"steps": 600, "loss.weights.itm": 0.0})}
NOISY = "scenes:noisy:canonical"

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
}
