"""``write_report``: what a stage leaves behind for people to look at."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.report import page, series
from vlm_jax.report.curves import draw_curves
from vlm_jax.report.pictures import draw_captions, draw_grounding, draw_neighbours, draw_similarity
from vlm_jax.report.theme import DARK, LIGHT


def write_report(folder: str | os.PathLike, *, title: str, metrics: Sequence[Mapping[str, Any]] = (),
                 scores: Mapping[str, Any] | None = None, config_text: str = "",
                 similarity: Mapping[str, Any] | None = None, neighbours: Sequence[Mapping[str, Any]] = (),
                 captions: Sequence[Mapping[str, Any]] = (), grounding: Sequence[Mapping[str, Any]] = (),
                 codes: Sequence[Mapping[str, Any]] = (), notes: Sequence[str] = (),
                 provenance: Mapping[str, str] | None = None) -> pathlib.Path:
    """Writes ``report.html``, self-contained, and the pictures that there is something to draw for.

    Args:
        folder: made where missing; files of an earlier report are replaced.
        title: of the page.
        metrics: rows of metrics.jsonl -> curves.png. A row with ``loss`` is a training row, another
            one holds evaluation scores.
        scores: final scores by name; None takes those of the last evaluation row.
        config_text: shown as it is, folded.
        similarity: ``matrix`` [n images, m captions], ``images``, ``captions`` -> similarity.png.
        neighbours: per text ``query``, ``images``, ``scores``, ``right`` -> neighbours.png.
        captions: per image ``image``, ``generated``, ``reference``, ``ok`` -> captions.png.
        grounding: per phrase ``image``, ``heat``, ``box``, ``phrase``, ``ok`` -> grounding.png.
        codes: per code ``query``, ``images`` of patches, ``scores`` -> codes.png.
        notes: sentences put on top.
        provenance: licence, code, data and the like, by label.
        Images are uint8 [h,w,3]; see ``pictures`` for the five above.

    Returns:
        The page's path.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if scores is None:
        scores = next((row for row in reversed(metrics) if "loss" not in row), {})
    figures = {}
    if curves := draw_curves(metrics, LIGHT):
        figures["curves"] = curves, draw_curves(metrics, DARK)
    if similarity is not None and len(similarity["images"]) and len(similarity["captions"]):
        figures["similarity"] = draw_similarity(similarity, LIGHT), draw_similarity(similarity, DARK)
    if grounding:
        figures["grounding"] = draw_grounding(grounding, LIGHT), draw_grounding(grounding, DARK)
    pictures = {name: light for name, (light, _) in figures.items()}
    if neighbours:
        pictures["neighbours"] = draw_neighbours(neighbours, LIGHT)
    if codes:
        pictures["codes"] = draw_neighbours(codes, LIGHT)
    if captions:
        pictures["captions"] = draw_captions(captions, LIGHT)
    for name in ("curves", "similarity", "neighbours", "captions", "grounding", "codes"):
        (folder / f"{name}.png").unlink(missing_ok=True)
        if name in pictures:
            (folder / f"{name}.png").write_bytes(pictures[name])
    path = folder / "report.html"
    path.write_text(page.build(title=title, subtitle=_subtitle(metrics), scores=series.read_scores(scores), figures=figures,
                               neighbours=neighbours, captions=captions, codes=codes, config_text=config_text, notes=notes,
                               provenance=provenance or {}), "utf-8")
    return path


def _subtitle(metrics: Sequence[Mapping[str, Any]]) -> str:
    training = [row for row in metrics if "loss" in row]
    if not training:
        return ""
    loss = series.number(training[-1]["loss"])
    return f"{training[-1]['step']:,} steps, loss {series.short(loss)} at the end"
