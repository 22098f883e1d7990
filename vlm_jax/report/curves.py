"""The figure of everything over steps: loss terms, evaluation scores, learning rate, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from vlm_jax.report import series
from vlm_jax.report.theme import Theme, render

COLUMNS, WIDTH, HEIGHT = 3, 4.1, 2.75                       # panels in a row; inches of one


def draw_curves(rows: Sequence[Mapping[str, Any]], theme: Theme) -> bytes | None:
    """PNG, or None where there is nothing to draw. Rows: see ``series.curves``."""
    training, scores = series.curves(rows)
    main = {n: p for n, p in scores.items() if n.rpartition("/")[0] not in scores}
    panels = [(title, lambda axes, t, lines=lines, title=title: _lines(axes, t, title, lines))
              for title, lines in training.items() if title == "Loss"]
    for title, names in series.score_panels(main).items():
        draw = _steps if any(len(scores[n]) > 1 for n in names) else _dots
        panels.append((title[0].upper() + title[1:], lambda axes, t, draw=draw, names=names: draw(axes, t, names, scores)))
    panels += [(title, lambda axes, t, lines=lines, title=title: _lines(axes, t, title, lines))
               for title, lines in training.items() if title != "Loss"]
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    height = -(-len(panels) // columns)

    def draw(figure: Figure, theme: Theme) -> None:
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
        grid = np.atleast_1d(figure.subplots(height, columns)).ravel()
        for axes, (title, paint) in zip(grid, panels):
            axes.set_title(title)
            paint(axes, theme)
        for axes in grid[len(panels):]:
            axes.set_axis_off()

    return render(draw, theme, WIDTH * columns, HEIGHT * height)


def _lines(axes, theme: Theme, title: str, lines: Mapping[str, np.ndarray]) -> None:
    """Training metrics: the points pale, their running mean on top where there are many."""
    names = sorted(lines, key=lambda n: (n != "loss", n))
    for name, colour in zip(names, _cycle(theme, len(names))):
        step, value = lines[name].T
        smooth = _running_mean(value) if len(value) >= 40 else value
        if len(value) >= 40:
            axes.plot(step, value, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(step, smooth, color=colour, marker="o" if len(value) == 1 else None, markersize=4,
                  label=series.spell(name))
    finite = np.concatenate([v[:, 1] for v in lines.values()])
    finite = finite[np.isfinite(finite)]
    if title in ("Loss", "Gradient norm") and len(finite) and finite.min() > 0 and finite.max() > 30 * finite.min():
        axes.set_yscale("log")
        axes.grid(which="minor", visible=False)
    elif len(finite):
        if title != "Learning rate" and finite.min() >= 0 and finite.min() < 0.5 * finite.max():
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep="") if finite.max() >= 1e4 else axes.yaxis.get_major_formatter())
    if len(lines) > 1:
        axes.legend(loc="best", handlelength=1.2)
    _step_axis(axes)


def _steps(axes, theme: Theme, names: Sequence[str], scores: Mapping[str, np.ndarray]) -> None:
    """Scores over steps with their intervals as bands and chance dotted."""
    for name, colour in zip(names, _cycle(theme, len(names))):
        step, value = scores[name].T
        axes.plot(step, value, color=colour, marker="o", markersize=3.5, label=series.spell(name.rpartition("/")[2]))
        low, high = scores.get(f"{name}/ci_low"), scores.get(f"{name}/ci_high")
        if low is not None and high is not None and len(low) == len(high) == len(step):
            axes.fill_between(step, low[:, 1], high[:, 1], color=colour, alpha=0.15, linewidth=0)
        if (chance := scores.get(f"{name}/chance")) is not None:
            axes.plot(chance[:, 0], chance[:, 1], color=colour, linestyle=(0, (1, 2)), linewidth=1.2)
    _score_range(axes.set_ylim, axes.get_ylim, names, scores)
    axes.legend(loc="best", handlelength=1.2)
    _step_axis(axes)


def _dots(axes, theme: Theme, names: Sequence[str], scores: Mapping[str, np.ndarray]) -> None:
    """Scores of a single evaluation: a dot with its interval each, a tick where chance lies."""
    names = list(reversed(names))
    for y, name in enumerate(names):
        value = scores[name][-1, 1]
        low, high = (scores[f"{name}/{end}"][-1, 1] if f"{name}/{end}" in scores else value for end in ("ci_low", "ci_high"))
        axes.plot([low, high], [y, y], color=theme.lines[0], alpha=0.45, linewidth=4, solid_capstyle="round")
        axes.plot(value, y, "o", color=theme.lines[0], markersize=5.5)
        axes.annotate(series.short(value), (value, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        if f"{name}/chance" in scores:
            axes.plot(scores[f"{name}/chance"][-1, 1], y, "|", color=theme.lines[1], markersize=13, markeredgewidth=2,
                      label="chance" if y == 0 else None)
    axes.set_yticks(range(len(names)), [series.spell(n.rpartition("/")[2]) for n in names])
    axes.set_ylim(-0.5, len(names) - 0.3)
    axes.tick_params(axis="y", labelcolor=theme.ink)
    axes.grid(axis="y", visible=False)
    _score_range(axes.set_xlim, axes.get_xlim, names, scores)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0, handletextpad=0.2)
    axes.set_xlabel(f"at step {int(scores[names[0]][-1, 0]):,}")


def _score_range(set_limits, get_limits, names: Sequence[str], scores: Mapping[str, np.ndarray]) -> None:
    """Shares are shown from 0 to 1, other scores from 0."""
    top = max((scores[n][:, 1].max() for n in names), default=1)
    shares = top <= 1 and not any(n.endswith("_rank") for n in names)
    set_limits(-0.02 if shares else 0, 1.02 if shares else get_limits()[1] * 1.03)


def _step_axis(axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _running_mean(value: np.ndarray) -> np.ndarray:
    """Mean over a window of a twenty-fifth of the run, centred, narrower at the ends; skips what is not finite."""
    half = max(1, len(value) // 50)
    finite = np.isfinite(value)
    sums = np.concatenate([[0], np.cumsum(np.where(finite, value, 0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(value))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(value))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _cycle(theme: Theme, count: int) -> list[str]:
    return [theme.lines[i % len(theme.lines)] for i in range(count)]
