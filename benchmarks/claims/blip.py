"""BLIP: captions rewritten and filtered."""

from __future__ import annotations

import json
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.claims.claim import SMALL, Claim, evals, set_fields, stage
from vlm_jax import config as configs
from vlm_jax.data.scenes import LENGTHS, NOISE, open_scenes
from vlm_jax.errors import ConfigError

BLIP = "configs/blip.py"
# Single objects, ten tokens: a captioner and a filter that are worth something in a minute.
SINGLES = {**SMALL, "data.train": "tars:{made}/noisy/*.tar", "data.eval": "scenes:objects:canonical", "data.length": 10, "data.batch": 32, "data.size": 32}
BLIP_SHORT = stage(**SINGLES, steps=200, **{"loss.queue": 128, "loss.momentum": 0.95, "model.image.positions": "sincos",
                                            "model.image.positions_at": ("input", "output")})
HUMAN = {key: value for name in ("caption", "retrieval") for key, value in stage(name, **{
    **SINGLES, "data.train": "tars:{made}/human/*.tar", "steps": 80, "evals": {},
    **({"loss.queue": 128, "loss.momentum": 0.95} if name == "retrieval" else {})}).items()}
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


CLAIMS: dict[str, Claim] = {
    "capfilt": Claim(
        sentence="Captions rewritten and filtered by a model that saw few true pairs teach a new model more than the noisy ones.",
        paper="BLIP (arXiv 2201.12086), section 4.3 and table 1", config=BLIP, prepare=bootstrap,
        made=("true captions kept", "captions of others dropped", "lies dropped", "synthetic captions kept", "synthetic captions kept that are true",
              "texts that are true, before", "texts that are true, after"),
        shared={**BLIP_SHORT, **stage(evals=evals("scenes:objects:canonical", caption={}, zeroshot=dict(examples=840, options=dict(templates="scene"))))},
        variants={"rewritten": stage(**{"data.train": "tars:{made}/{seed}/rewritten/*.tar"}), "noisy": stage(**{"data.train": "tars:{made}/noisy/*.tar"})},
        differences={"exact captions": (("rewritten", "caption/facts/exact"), ("noisy", "caption/facts/exact")),
                     "zero-shot": (("rewritten", "zeroshot/top1"), ("noisy", "zeroshot/top1"))}),
}
