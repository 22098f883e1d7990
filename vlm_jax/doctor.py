"""Looks at a machine, a data set and a config before time is spent on them.

python -m vlm_jax.doctor                                              versions, devices and who holds them, memory, disk, caches
python -m vlm_jax.doctor --data='tars:/data/{0000..0099}.tar'         and the data set: unreadable, left out, sizes, captions, near-duplicates, speed
python -m vlm_jax.doctor --config=configs/clip.py:b32                 and what a train step needs of the devices at hand, with changes that pay

--data='' with --config takes the config's own data; its tokenizer and caption length are used too. --json prints one object.
Exit codes: 0 training can start, 43 it cannot.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from vlm_jax.checks import ERROR, OK, WARNING, Finding
from vlm_jax.errors import ConfigError, nearest

MARKS = {OK: "green", WARNING: "yellow", ERROR: "bold red"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="a source to look at: folder:DIR, tars:FILES, parquet:FILES, jsonl:FILE, csv:FILE, ...")
    parser.add_argument("--config", default="", help="a config to forecast, as main takes it")
    parser.add_argument("--stage", default="", help="with --config: this stage (default: the first)")
    parser.add_argument("--samples", type=int, default=10_000, help="samples to read, spread over the data; 0 for all (default: 10000)")
    parser.add_argument("--caption", default="", help="the caption's field, such as txt or json:title")
    parser.add_argument("--tokenizer", default="", help="as data.tokenizer (default: the config's)")
    parser.add_argument("--length", type=int, default=0, help="tokens of a caption (default: the config's)")
    parser.add_argument("--workdir", default="runs", help="where runs will be written")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args(argv)

    from vlm_jax import main as command
    from vlm_jax.checks import environment

    findings, told = list(environment.examine(args.workdir, command.accelerator_present)), {}
    config = section = None
    try:
        if args.config:
            from vlm_jax import config as configs
            config = configs.from_file(args.config)
            args.stage = args.stage or config.stage_order[0]
            if args.stage not in config.stages:
                raise ConfigError(f"--stage={args.stage!r} is not a stage{nearest(args.stage, config.stages)}")
            section = config.stages[args.stage]
    except ConfigError as error:
        findings.append(Finding("config", "config", ERROR, str(error)))
    if args.data is not None:
        told["data"] = data(args, section, findings)
    if config is not None:
        told["forecast"] = forecast(config, args, findings)
    can_start = not any(f.status == ERROR for f in findings)
    if args.json:
        print(json.dumps({"can_start": can_start, "findings": environment.as_json(findings), **told}, indent=1))
    else:
        show(findings, can_start)
    return 0 if can_start else 43


def data(args: argparse.Namespace, section: Any, findings: list[Finding]) -> dict[str, Any]:
    """Numbers of the data set; adds what was found."""
    from vlm_jax.checks import dataset
    from vlm_jax.data import sources, tokenizers
    own = section.data if section is not None else {}
    spec, name = args.data or own.get("train", ""), args.tokenizer or own.get("tokenizer", "")
    try:
        if not spec:
            raise ConfigError("--data names no source, and neither does the config; nearest: --data=folder:photos")
        options = {k: v for k, v in (("caption", args.caption or own.get("caption", "")), ("label", own.get("label", "")),
                                     ("answer", own.get("answer", ""))) if v}
        source = sources.open_source(spec, **options)
        tokenizer = tokenizers.load(name) if name and not name.startswith("train:") else None
    except (ValueError, OSError, ImportError) as error:
        findings.append(Finding("data", "open", ERROR, str(error)))
        return {}
    numbers, found = dataset.examine(source, tokenizer, length=args.length or own.get("length", 0), samples=args.samples,
                                     bad_budget=own.get("bad_budget", 0.01))
    findings += found
    return numbers


def forecast(config: Any, args: argparse.Namespace, findings: list[Finding]) -> dict[str, Any]:
    """What the step of a stage needs of the devices at hand; adds what was found."""
    import jax

    from vlm_jax import forecast as forecasts
    from vlm_jax.checks import environment

    def tell(name: str, text: str, status: str = OK) -> None:
        findings.append(Finding("config", name, status, text))

    try:
        stage = forecasts.open_stage(config, args.stage)
        found, changes = forecasts.advise(stage, forecasts.mesh_of(stage, jax.devices()), args.config, environment.available_memory())
    except ValueError as error:      # of a size, or that nothing fits
        tell("forecast", str(error), ERROR)
        return {}
    for line in found.lines():
        tell("forecast", line)
    for change in changes:
        tell("suggestion", change)
    return {**found.to_json(), "suggestions": changes}


def show(findings: list[Finding], can_start: bool) -> None:
    from rich import box
    from rich.table import Table

    from vlm_jax.console import Console
    console = Console().rich
    for area in dict.fromkeys(f.area for f in findings):
        table = Table(title=area, box=box.SIMPLE, title_justify="left")
        table.add_column("what", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("found", overflow="fold")
        for f in findings:
            if f.area == area:
                from rich.text import Text
                table.add_row(f.name, Text(f.status, MARKS[f.status]), Text(f.text))
        console.print(table)
    errors = [f.name for f in findings if f.status == ERROR]
    console.print("training can start" if can_start else f"training cannot start: {', '.join(errors)}", style="bold")


if __name__ == "__main__":
    sys.exit(main())
