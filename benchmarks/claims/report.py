"""What came out: differences, their intervals, tables."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import paired
from benchmarks.claims.claim import Claim, Scores

BUDGET_S = 90


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
