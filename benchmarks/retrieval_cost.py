"""What retrieval costs as the set grows: VLMo as a dual encoder, as a fusion encoder, and re-ranking between them (arXiv 2111.02358, section 3).

    python -m benchmarks.retrieval_cost [--config=configs/vlmo.py] [--repeats=3] [--out=FILE.json] [--plot=docs/retrieval_cost.png]

n images and n texts, each text asks for its image: processor seconds from pixels and ids to the best image of every text. The dual encoder computes each
image and each text once; the fusion encoder computes every pair; re-ranking computes a pair for each of a text's 16 nearest. The slope is that of a straight
line through the logarithms, by least squares: 1 where twice as many take twice as long. Weights are fresh and pixels are noise, for
costs do not depend on them. Compiling is left out, in batches of 16 rows.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import paired

ROWS, NEAREST = 16, 16
WAYS = ("dual encoder", "re-ranking", "fusion encoder")
SIZES = {"dual encoder": (16, 32, 64, 128, 256, 512, 1024, 2048), "re-ranking": (16, 32, 64, 128, 256, 512), "fusion encoder": (16, 32, 64, 128)}
LARGEST = 5000      # images of COCO's test set
Points = Mapping[int, Sequence[float]]


def retrieve(way: str, predict: Mapping[str, Callable], tokenizer: Any, length: int, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """The best image of each text, int [n]. images [n, h, w, 3]."""
    from vlm_jax.evals.embed import embed_images
    from vlm_jax.evals.pairs import match_scores, read_texts
    from vlm_jax.evals.rank import rank
    count, fuses = len(texts), way != "dual encoder"
    batches = ({"image": images[i:i + ROWS], "meta": [{}] * ROWS} for i in range(0, count, ROWS))
    found = embed_images(predict["embed"], batches, predict["features"] if fuses else None)
    found.rows = ROWS
    read = read_texts(predict["embed"], predict["features"] if fuses else lambda batch: {}, texts, tokenizer, length, ROWS)
    near = min(NEAREST, count) if way == "re-ranking" else 1
    candidates = rank(read.embeds, found.embeds, np.arange(count)[:, None], top=near)[1] if way != "fusion encoder" else np.tile(np.arange(count), (count, 1))
    if not fuses:
        return candidates[:, 0]
    pairs = np.stack([candidates.ravel(), np.repeat(np.arange(count), candidates.shape[1])], 1)
    best = match_scores(predict["match"], found, read, pairs)[0].reshape(candidates.shape).argmax(1)
    return candidates[np.arange(count), best]


def measure(predict: Mapping[str, Callable], tokenizer: Any, length: int, size: int, texts: Sequence[str], sizes: Mapping[str, Sequence[int]],
            repeats: int) -> dict[str, dict[int, list[float]]]:
    """way -> n -> processor seconds of each repeat. size: pixels of the square images; texts: as many as the largest n."""
    pixels = np.random.default_rng(0)
    images = pixels.integers(0, 256, (max(map(max, sizes.values())), size, size, 3), np.uint8)
    found: dict[str, dict[int, list[float]]] = {way: {} for way in sizes}
    for way, counts in sizes.items():
        retrieve(way, predict, tokenizer, length, images[:ROWS], texts[:ROWS])      # compiles
        for count in counts:
            for _ in range(repeats):
                began = time.process_time()
                retrieve(way, predict, tokenizer, length, images[:count], texts[:count])
                found[way].setdefault(count, []).append(time.process_time() - began)
            print(f"{way}, {count}: {statistics.median(found[way][count]):.3g} s", flush=True)
    return found


def fit(points: Points) -> tuple[float, float]:
    """(slope, seconds at n = 1) of the line through the logarithms of n and of the median seconds."""
    slope, start = np.polyfit(np.log(list(points)), np.log([statistics.median(x) for x in points.values()]), 1)
    return float(slope), float(np.exp(start))


def rows(found: Mapping[str, Points]) -> list[str]:
    """The table, in Markdown."""
    counts = sorted({n for points in found.values() for n in points})
    out = ["| n | " + " | ".join(f"{way}, s" for way in found) + " |", "|---" * (len(found) + 1) + "|"]
    out += ["| " + " | ".join([f"{n:,}", *(f"{statistics.median(points[n]):.3g}" if n in points else "" for points in found.values())]) + " |" for n in counts]
    fits = [fit(points) for points in found.values()]
    out.append("| slope | " + " | ".join(f"{slope:.2f}" for slope, _ in fits) + " |")
    out.append(f"| {LARGEST:,}, by the fit | " + " | ".join(f"{start * LARGEST ** slope:,.0f}" for slope, start in fits) + " |")
    return out


def draw(found: Mapping[str, Points]) -> bytes:
    """PNG: seconds over n, both logarithmic, with the fitted lines."""
    from vlm_jax.report.curves import plain_log
    from vlm_jax.report.theme import LIGHT, render

    def paint(figure: Any, theme: Any) -> None:
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        for (way, points), colour, marker in zip(found.items(), theme.lines, "os^", strict=False):
            slope, start = fit(points)
            line = np.array([min(points), LARGEST])
            axes.plot(line, start * line ** slope, color=colour, linewidth=1, linestyle="--")
            axes.plot(list(points), [statistics.median(x) for x in points.values()], marker, color=colour, markersize=5, label=f"{way}, slope {slope:.2f}")
        axes.set(xscale="log", yscale="log", xlabel="images, and as many texts", ylabel="processor seconds for all texts")
        plain_log(axes.xaxis)
        plain_log(axes.yaxis)
        axes.set_title("Retrieval as the set grows")
        axes.legend(loc="upper left")

    return render(paint, LIGHT, 5.2, 3.6)


def open_model(config: str) -> tuple[Any, dict[str, Callable]]:
    """(the stage "joint" of a config, its predict functions with fresh weights)."""
    import jax
    from flax.core import meta

    from vlm_jax import config as configs
    from vlm_jax import partitioning
    from vlm_jax.stage import bind, resolve

    stage, mesh = resolve(configs.from_file(config).stages.joint, "joint"), partitioning.make_mesh(devices=jax.devices()[:1])
    with partitioning.use(mesh):
        variables = meta.unbox(jax.jit(lambda key: stage.system.init(key, stage.spec))(jax.random.key(0)))
    return stage, bind(stage.system, variables, mesh)


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(prog="python -m benchmarks.retrieval_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--config", default="configs/vlmo.py", help="a config with a stage joint (default %(default)s)")
    flags.add_argument("--repeats", type=int, default=3, help="default %(default)s")
    flags.add_argument("--out", help="JSON file to write everything to")
    flags.add_argument("--plot", help="PNG file to draw into")
    given = flags.parse_args(argv)
    from vlm_jax.data.scenes import open_scenes
    stage, predict = open_model(given.config)
    scenes = open_scenes("train")
    texts = [scenes.caption(i, scenes.scene(i))[0] for i in range(max(map(max, SIZES.values())))]
    machine = paired.machine()
    found = measure(predict, stage.tokenizer, stage.data.length, stage.data.size, texts, SIZES, given.repeats)
    print("\n" + "\n".join(rows(found)))
    told = {"machine": machine, "versions": paired.versions()}
    paired.conditions(told)
    if given.plot:
        pathlib.Path(given.plot).write_bytes(draw(found))
    paired.write(given, {"seconds": found, **told})


if __name__ == "__main__":
    main()
