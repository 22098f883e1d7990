"""VLMo and BEiT-3: stages, shared attention, negatives, experts, masked modelling first."""

from __future__ import annotations

from typing import Any

from benchmarks.claims.claim import RECALL, RERANK, SMALL, Claim, Score, evals, stage

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

CLAIMS: dict[str, Claim] = {
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
}
