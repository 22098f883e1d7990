"""Claims of the papers on procedural scenes: variants of a config that differ in one thing, three seeds each.

    python -m benchmarks.claims --list
    python -m benchmarks.claims momentum [--workdir=runs/claims] [--seeds=0,1,2]

Every variant runs with every seed in a work directory of its own, WORKDIR/NAME/VARIANT/SEED. The same command again goes on where it
was stopped, and runs nothing twice. Runs of one seed see the same data in the same order and start from the same weights (as far as the
variants share them), so that differences are taken seed by seed: their mean has a paired interval, Student's t over the seeds. Above zero
the claim holds here, below zero it is reversed, across zero it is open. WORKDIR/NAME/claim.json keeps everything,
claim.md the rows for docs/results.md.

A run is to take at most 90 s on 2 cores: what needs a large model or much data to be seen will not be seen here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import paired
from vlm_jax import config as configs
from vlm_jax.errors import ConfigError, nearest

BUDGET_S = 90
SEEDS = (0, 1, 2)
EXIT_DONE, EXIT_PREEMPTED, EXIT_BAD_CONFIG = 0, 42, 43

Score = tuple[str, str]      # (variant, name of a score in its DONE)
Scores = Mapping[str, Mapping[int, Mapping[str, float]]]      # variant -> seed -> score


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a paper says, and the runs that look at it.

    config: as for ``--config``. shared, variants: keys of it as on the command line ("stages.pretrain.loss.alpha") and their values;
    what ``shared`` says holds for all variants. differences: what is compared, the side that the claim puts higher
    first. shown: scores to print beside those, of every variant. stage: as for ``--stage``.
    """
    sentence: str
    paper: str
    config: str
    variants: Mapping[str, Mapping[str, Any]]
    differences: Mapping[str, tuple[Score, Score]]
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shown: Sequence[str] = ()
    stage: str = ""

    def scores(self) -> dict[str, list[str]]:
        """The scores to print, by variant."""
        found = {variant: dict.fromkeys(self.shown) for variant in self.variants}
        for sides in self.differences.values():
            for variant, score in sides:
                found[variant][score] = None
        return {variant: list(names) for variant, names in found.items()}


# ---- the claims

def evals(**kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Small evaluations by their kind, of scenes in free wording."""
    return {kind: dict(dict(kind=kind, data="scenes:test", examples=400, batch=100), **section) for kind, section in kinds.items()}


RECALL = {"text to image R@1": "text_to_image/R@1", "image to text R@1": "image_to_text/R@1"}
RETRIEVAL = dict(retrieval=dict(options=dict(captions="first")))
RERANK = dict(rerank=dict(examples=200, options=dict(captions="first", k=16)))

ALBEF = "configs/albef.py"
SHORT = {"stages.pretrain.steps": 400, "stages.pretrain.data.batch": 32, "stages.pretrain.loss.alpha_ramp": 100, "stages.pretrain.checkpoint.every": 1000}

CLAIMS: dict[str, Claim] = {
    "momentum": Claim(
        sentence="Learning from the momentum model's pseudo-targets improves what is learnt from noisy pairs.",
        paper="ALBEF (arXiv 2107.07651), sections 3.3 and 6.1",
        config=ALBEF, shared={**SHORT, "stages.pretrain.data.train": "scenes:noisy", "stages.pretrain.evals": evals(**RETRIEVAL, matching={})},
        variants={"distilled": {"stages.pretrain.loss.alpha": 0.4}, "one_hot": {"stages.pretrain.loss.alpha": 0.0}},
        differences={what: (("distilled", f"retrieval/{score}"), ("one_hot", f"retrieval/{score}")) for what, score in RECALL.items()}
        | {"true caption preferred, ITM": (("distilled", "matching/match"), ("one_hot", "matching/match"))}),
    "negatives": Claim(
        sentence="Matching learns more from hard negatives, mined by contrastive similarity, than from random ones.",
        paper="ALBEF (arXiv 2107.07651), sections 3.2 and 6.1",
        config=ALBEF, shared={**SHORT, "stages.pretrain.evals": evals(**RERANK, matching={})},
        variants={name: {"stages.pretrain.loss.negatives": name} for name in ("hard", "random")},
        differences={"true caption preferred, ITM": (("hard", "matching/match"), ("random", "matching/match"))}
        | {f"{what}, re-ranked": (("hard", f"rerank/{score}"), ("random", f"rerank/{score}")) for what, score in RECALL.items()},
        shown=("matching/cosine",)),
    "rerank": Claim(
        sentence="The fusion encoder ranks the dual encoder's nearest better than the dual encoder does.",
        paper="ALBEF (arXiv 2107.07651), section 5",
        config=ALBEF, shared={**SHORT, "stages.pretrain.evals": evals(**RERANK)},
        variants={"albef": {}},
        differences={what: (("albef", f"rerank/{score}"), ("albef", f"rerank/{score}/dual_encoder")) for what, score in RECALL.items()},
        shown=("rerank/pairs", "rerank/text_to_image/reachable", "rerank/text_to_image/seconds_per_1000_queries",
               "rerank/text_to_image/seconds_per_1000_queries/dual_encoder")),
}


# ---- running

def variant_config(claim: Claim, variant: str, seed: int) -> Any:
    """The config of one run. Raises ConfigError for a section that does not exist; the run refuses keys that it does not know."""
    config = configs.from_file(claim.config)
    for key, value in {**claim.shared, **claim.variants[variant]}.items():
        node, (*path, last) = config, key.split(".")
        for part in path:
            if part not in node:
                raise ConfigError(f"claim: {key} names {part!r}, which {claim.config} lacks{nearest(part, node)}")
            node = node[part]
        with node.unlocked(), node.ignore_type():
            node[last] = value
    for stage in config.stages.values():
        stage.seed = seed
    return config


def measure(claim: Claim, folder: pathlib.Path, seeds: Sequence[int], train: Callable[..., Any]) -> tuple[Scores, dict[str, float]] | None:
    """Runs what is not done: (scores, seconds of each run), None where a signal stopped a run. ``train``: ``vlm_jax.train``."""
    scores: dict[str, dict[int, dict[str, float]]] = {variant: {} for variant in claim.variants}
    seconds = {}
    for seed in seeds:      # all variants of a seed before the next one: an early look compares like with like
        for variant in claim.variants:
            config, workdir = variant_config(claim, variant, seed), folder / variant / str(seed)
            plain, record = json.loads(configs.to_json(config)), workdir / "run.json"
            done = json.loads(record.read_text()) if record.exists() else {}
            if done.get("config") != plain:
                print(f"{folder.name}: {variant}, seed {seed}", file=sys.stderr, flush=True)
                run = train(config, workdir, stage=claim.stage)
                if not run.done:
                    return None
                done = {"config": plain, "scores": run.scores, "seconds": json.loads((run.folder / "DONE").read_text())["seconds"]}
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
    found = {"claim": name, **dataclasses.asdict(claim), "scores": scores, "differences": differences, "seconds": seconds,
             "machine": paired.machine(), "versions": paired.versions()}
    (folder / "claim.json").write_text(json.dumps(found, indent=1))
    (folder / "claim.md").write_text("\n".join(markdown) + "\n")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="", help="the claim; --list shows them")
    parser.add_argument("--list", action="store_true", help="the claims, their papers and their runs")
    parser.add_argument("--workdir", default="runs/claims", help="where runs are kept (default %(default)s)")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="default %(default)s")
    args = parser.parse_args(argv)
    if args.list:
        for name, claim in CLAIMS.items():
            print(f"{name}\n    {claim.sentence}\n    {claim.paper}; {claim.config}: {', '.join(claim.variants)}; {len(claim.variants) * len(SEEDS)} runs")
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
        measured = measure(CLAIMS[args.name], folder, seeds, train)
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
