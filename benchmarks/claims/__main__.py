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
import pathlib
import sys
from collections.abc import Sequence

from benchmarks.claims import CLAIMS
from benchmarks.claims.report import report
from benchmarks.claims.run import measure
from vlm_jax.errors import ConfigError, nearest

SEEDS = (0, 1, 2)
EXIT_DONE, EXIT_PREEMPTED, EXIT_BAD_CONFIG = 0, 42, 43


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
