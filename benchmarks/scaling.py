"""What the recipes of the papers need on TPU slices that are not here: each train step compiled for its topology, nothing run.

    nice python -m benchmarks.scaling [--only=coca] [--out=scaling.jsonl]      compiles the rows that FILE lacks, and prints the tables
    python -m benchmarks.scaling --table [--out=scaling.jsonl]                 prints the tables of FILE

Needs libtpu (pip install -e ".[tpu]"), no TPU. A row takes one to eight minutes of a core; a killed run goes on where it was.
Step times are the least that the chips' peaks allow (vlm_jax/roofline.py), not measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402  (after the platform)
import jax.numpy as jnp  # noqa: E402

from vlm_jax import config as configs  # noqa: E402
from vlm_jax import forecast, memory, partitioning, roofline  # noqa: E402
from vlm_jax.console import amount  # noqa: E402
from vlm_jax.losses.contrastive import contrastive  # noqa: E402

SLICES = {"v5e": {8: "2x4", 32: "4x8", 128: "8x16", 256: "16x16", 512: "16x16*2"},
          "v5p": {8: "2x2x2", 64: "4x4x4", 256: "4x8x8", 512: "8x8x8"},
          "v6e": {8: "2x4", 32: "4x8", 128: "8x16", 256: "16x16"}}
# Recipes with the paper's batch, and where they are compiled: (config, chips of v5e, of v5p, of v6e)
RECIPES = (("clip.py:l14", (256,), (64,), (128,)), ("clip.py:l14_336", (256,), (256,), (256,)), ("coca.py:base", (256,), (64,), (256,)),
           ("coca.py:large", (256,), (256,), (256,)), ("coca.py:2b", (), (512,), (256,)), ("albef.py:base", (8,), (8,), (8,)), ("blip.py:base", (32,), (8,), (32,)))
# Rows of a chip, and chips of v5e
GROWING = (("clip.py:l14", 32, (8, 32, 128, 256, 512)), ("coca.py:base", 32, (8, 32, 128)), ("albef.py:base", 16, (8, 32, 128)), ("blip.py:base", 90, (8, 32)))
LOSS_BATCHES, LOSS_WIDTH = (8_192, 32_768, 131_072, 524_288, 1_048_576), 768
LOSS = "contrastive loss"


class Row(NamedTuple):
    """A program: a config of configs/ or the loss alone, a topology, the batch (0: the recipe's own), and which table it is of."""
    table: str
    config: str
    topology: str
    batch: int

    @property
    def key(self) -> str:
        return " ".join(map(str, self))


def rows() -> Iterator[Row]:
    for config, *chips in RECIPES:
        for generation, counts in zip(SLICES, chips):
            yield from (Row("recipe", config, f"{generation}:{SLICES[generation][n]}", 0) for n in counts)
    for config, each, counts in GROWING:
        yield from (Row("growing", config, f"v5e:{SLICES['v5e'][n]}", each * n) for n in counts)
    for generation, shape in (("v5e", "16x16"), ("v5p", "8x8x8")):
        yield from (Row("loss", LOSS, f"{generation}:{shape}", batch) for batch in LOSS_BATCHES)
    yield from (Row("loss", LOSS, f"v5e:{shape}", 1024 * n) for n, shape in SLICES["v5e"].items())


def measure(row: Row) -> dict[str, Any]:
    """The record of a row. Where the compiler finds too little memory, its words stand under "too_large"."""
    try:
        if row.config == LOSS:
            return {**row._asdict(), **loss(row)}
        config = configs.from_file(f"configs/{row.config}")
        name = config.stage_order[0]
        if row.batch:
            config.stages[name].data.batch = row.batch
        stage = forecast.open_stage(config, name)
        return {**row._asdict(), **forecast.forecast(stage, forecast.mesh_of(stage, forecast.absent_devices(row.topology)), row.config).to_json()}
    except jax.errors.JaxRuntimeError as error:
        if not memory.out_of_memory(error):
            raise
        return {**row._asdict(), "too_large": str(error).splitlines()[0]}


def loss(row: Row) -> dict[str, Any]:
    """Value and gradient of the contrastive loss on embeddings that are there."""
    began = time.perf_counter()
    mesh = partitioning.make_mesh(devices=forecast.absent_devices(row.topology))

    def argument(shape):
        axes = ("batch", "none") if shape else ()
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=partitioning.sharding(mesh, axes, shape))

    with partitioning.use(mesh):
        embeddings = argument((row.batch, LOSS_WIDTH))
        traced = jax.jit(jax.value_and_grad(lambda *a: contrastive(*a)[0], argnums=(0, 1, 2))).trace(embeddings, embeddings, argument(()))
        program = traced.lower().compile()
    need, analysis = roofline.demand(traced, program, mesh.devices.size), program.memory_analysis()
    seconds = need.seconds(roofline.chip_of(mesh))
    return {"devices": mesh.devices.size, "device": mesh.devices.flat[0].device_kind, "batch": row.batch, "state_bytes": analysis.argument_size_in_bytes,
            "temporary_bytes": analysis.temp_size_in_bytes, "peak_bytes": analysis.argument_size_in_bytes + analysis.temp_size_in_bytes,
            "limit_bytes": memory.limit_of(mesh), "flops": need.flops, "traffic_bytes": need.traffic, "seconds": seconds,
            "step_seconds": max(seconds.values()), "collectives": {k: (c.count, c.sent) for k, c in need.collectives.items()},
            "compile_seconds": time.perf_counter() - began}


TITLES = {"recipe": "Recipes at the papers' batches", "growing": "Batch and chips grow together (rows of a chip fixed): memory must stay flat",
          "loss": f"The contrastive loss alone, width {LOSS_WIDTH}, value and gradient"}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    out = []
    for kind, title in TITLES.items():
        chosen = [r for r in records if r["table"] == kind]
        if not chosen:
            continue
        out += [f"**{title}**", "",
                "| program | topology | chips | batch | memory of a chip | of | TFLOP | sent | step at the peaks | bound by | examples/s |",
                "|---|---|---|---|---|---|---|---|---|---|---|"]
        for r in chosen:
            if "too_large" in r:
                out.append(f"| {r['config']} | {r['topology']} | | {r['batch'] or ''} | too large: {r['too_large'].partition(': ')[2]} | | | | | | |")
                continue
            seconds = r["seconds"]
            held = f"{amount(r['peak_bytes'], 'B')} | {amount(r['limit_bytes'], 'B')}"
            out.append(f"| {r['config']} | {r['topology']} | {r['devices']} | {r['batch']:,} | {held} |"
                       f" {r['flops'] / 1e12:.3g} | {amount(sum(b for _, b in r['collectives'].values()), 'B')} | {r['step_seconds'] * 1e3:.3g} ms | "
                       f"{max(seconds, key=seconds.get)} | {r['batch'] / r['step_seconds']:,.0f} |")
        out.append("")
    return "\n".join(out)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", default="", help="rows whose table, config, topology or batch contain this, written \"TABLE CONFIG TOPOLOGY BATCH\"")
    flags.add_argument("--out", default="scaling.jsonl")
    flags.add_argument("--table", action="store_true", help="compile nothing")
    given = flags.parse_args()
    path = pathlib.Path(given.out)
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {Row(*(r[f] if f != "batch" else r.get("asked", r["batch"]) for f in Row._fields)).key for r in records}
    for row in () if given.table else rows():
        if row.key in known or given.only not in row.key:
            continue
        record = {**measure(row), "asked": row.batch}
        records.append(record)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{row.key}: {record.get('too_large') or amount(record['peak_bytes'], 'B')}, compiled in {record.get('compile_seconds', 0):.0f} s", flush=True)
    print(table(records))


if __name__ == "__main__":
    main()
