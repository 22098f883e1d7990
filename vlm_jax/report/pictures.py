"""The figures with images in them: similarity matrix, nearest images, captions, heat maps."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vlm_jax.report.theme import Theme, render


def draw_similarity(similarity: Mapping[str, Any], theme: Theme) -> bytes:
    """PNG of a caption-by-image matrix, thumbnails above the columns.

    ``similarity``: ``matrix`` [n images, m captions] of cosines, ``images`` n uint8 [h,w,3],
    ``captions`` m strings; image i and caption i are a pair. True pairs are outlined, the best
    image of each caption is bold.
    """
    values = np.asarray(similarity["matrix"], np.float64).T  # rows are captions
    images, captions = similarity["images"], similarity["captions"]
    rows, columns = values.shape
    cell, text, top, margin = 0.62, 3.0, 0.75, 0.15
    width, height = text + columns * cell + margin, top + rows * cell + margin

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_axes((text / width, margin / height, columns * cell / width, rows * cell / height))
        colours = LinearSegmentedColormap.from_list("similarity", theme.ramp)
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
        digits = 2 if high - low >= 0.1 else 3 if high - low >= 0.01 else 4
        span = max(high - low, 0.05)                        # what is nearly equal shall look so
        axes.imshow(values, cmap=colours, vmin=low, vmax=low + span, aspect="auto")
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_xticks([])
        axes.set_yticks(range(rows), [_wrap(c, 42, 3) for c in captions])
        axes.tick_params(axis="y", labelsize=7.5, labelcolor=theme.ink, pad=6)
        for r in range(rows):
            best = values[r] == np.nanmax(values[r]) if np.isfinite(values[r]).any() else np.zeros(columns, bool)
            for c in range(columns):
                shade = colours((values[r, c] - low) / span)
                axes.text(c, r, f"{values[r, c]:.{digits}f}".replace("-", "\u2212"), ha="center", va="center", fontsize=7.5,
                          fontweight="bold" if best[c] else "normal",
                          color="#0b0f15" if _luminance(shade) > 0.2 else "#ffffff")
            if r < columns:
                axes.add_patch(Rectangle((r - 0.46, r - 0.46), 0.92, 0.92, fill=False, edgecolor=theme.lines[1], linewidth=1.8))
        for c, image in enumerate(images):
            x, side = (text + (c + 0.06) * cell) / width, cell * 0.88
            _show(figure.add_axes((x, 1 - (top - 0.06) / height, side / width, side / height)), image)

    return render(draw, theme, width, height)


def draw_neighbours(neighbours: Sequence[Mapping[str, Any]], theme: Theme) -> bytes:
    """PNG of what texts find: one row per query, the nearest images with their cosine, right ones framed.

    Each of ``neighbours``: ``query`` string, ``images`` uint8 [h,w,3] nearest first, ``scores``,
    ``right`` booleans where one can be right.
    """
    side, text, gap, line = 1.15, 2.7, 0.16, 1.5
    columns = max(len(n["images"]) for n in neighbours)
    width, height = text + columns * (side + gap) + gap, len(neighbours) * line + 0.25

    def draw(figure: Figure, theme: Theme) -> None:
        for r, n in enumerate(neighbours):
            y = height - 0.1 - (r + 1) * line
            figure.text(0.15 / width, (y + 0.3 + side / 2) / height, _wrap(n["query"], 34, 5), va="center", fontsize=9)
            for c, (image, score, right) in enumerate(zip(n["images"], n["scores"], n.get("right", [False] * len(n["images"])))):
                x = text + c * (side + gap)
                axes = figure.add_axes((x / width, (y + 0.3) / height, side / width, side / height))
                _show(axes, image, theme.good if right else None)
                figure.text((x + side / 2) / width, (y + 0.14) / height, f"{score:.3f}" + ("  \u2713 its own" if right else ""),
                            ha="center", va="center", fontsize=7.5, color=theme.good if right else theme.quiet)

    return render(draw, theme, width, height)


def draw_captions(captions: Sequence[Mapping[str, Any]], theme: Theme) -> bytes:
    """PNG of generated captions under their images, with the reference.

    Each of ``captions``: ``image`` uint8 [h,w,3], ``generated``, ``reference`` strings, ``ok`` boolean.
    """
    columns, side, gap, below = min(4, len(captions)), 2.5, 0.28, 1.45
    rows = -(-len(captions) // columns)
    width, height = columns * (side + gap) + gap, rows * (side + below) + gap

    def draw(figure: Figure, theme: Theme) -> None:
        for i, item in enumerate(captions):
            x, y = gap + i % columns * (side + gap), height - gap - i // columns * (side + below) - side
            colour = theme.good if item["ok"] else theme.bad
            _show(figure.add_axes((x / width, y / height, side / width, side / height)), item["image"], colour)
            text = _wrap(item["generated"], 36, 3)
            figure.text(x / width, (y - 0.1) / height, "\u2713 right" if item["ok"] else "\u2717 wrong", va="top", fontsize=8.5,
                        fontweight="bold", color=colour)
            figure.text(x / width, (y - 0.29) / height, text, va="top", fontsize=8.5)
            figure.text(x / width, (y - 0.36 - 0.165 * (text.count("\n") + 1)) / height,
                        _wrap("ref: " + item["reference"], 42, 3), va="top", fontsize=7.5, color=theme.quiet)

    return render(draw, theme, width, height)


def draw_grounding(grounding: Sequence[Mapping[str, Any]], theme: Theme) -> bytes:
    """PNG of heat maps over their images, with the box of what the phrase names.

    Each of ``grounding``: ``image`` uint8 [h,w,3], ``heat`` [rows,columns] of at most 1, ``box`` x0, y0, x1, y1 in shares of the sides, ``phrase``,
    ``ok`` boolean.
    """
    columns, side, gap, below = min(6, len(grounding)), 1.6, 0.2, 0.5
    rows = -(-len(grounding) // columns)
    width, height = columns * (side + gap) + gap, rows * (side + below) + gap

    def draw(figure: Figure, theme: Theme) -> None:
        for i, item in enumerate(grounding):
            x, y = gap + i % columns * (side + gap), height - gap - i // columns * (side + below) - side
            colour = theme.good if item["ok"] else theme.bad
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            _show(axes, item["image"], colour)
            h, w = np.shape(item["image"])[:2]
            heat = np.clip(np.asarray(item["heat"], np.float64), 0, 1)
            axes.imshow(heat, cmap="inferno", alpha=0.75 * heat, extent=(-0.5, w - 0.5, h - 0.5, -0.5), interpolation="nearest")
            x0, y0, x1, y1 = item["box"]
            axes.add_patch(Rectangle((x0 * w - 0.5, y0 * h - 0.5), (x1 - x0) * w, (y1 - y0) * h, fill=False, edgecolor="#ffffff", linewidth=1.4))
            figure.text(x / width, (y - 0.1) / height, ("\u2713 " if item["ok"] else "\u2717 ") + _wrap(item["phrase"], 26, 2), va="top", fontsize=8,
                        color=colour)

    return render(draw, theme, width, height)


def _show(axes, image: np.ndarray, frame: str | None = None) -> None:
    axes.imshow(np.asarray(image), interpolation="nearest", aspect="equal")
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set(visible=frame is not None, color=frame or "none", linewidth=2.5)


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2): near 0.18, black and white text read equally well."""
    rgb = np.asarray(colour[:3])
    return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722))


def _wrap(text: str, columns: int, lines: int) -> str:
    """At most ``lines`` lines; what does not fit ends in an ellipsis."""
    parts = textwrap.wrap(" ".join(text.split()), columns) or ["(empty)"]
    return "\n".join(parts[:lines]) + ("\u2026" if len(parts) > lines else "")
