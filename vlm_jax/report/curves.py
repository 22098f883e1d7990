"""The figure of everything over steps: loss terms, evaluation scores, learning rate, speed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    StrMethodFormatter,
)

from vlm_jax.report import series
from vlm_jax.report.theme import Theme, render

COLUMNS, WIDTH, HEIGHT = 3, 4.1, 2.75                       # panels in a row; inches of one
NOISY = ("Loss", "Gradient norm", "Accuracy in the batch", "Images per second")


def draw_curves(rows: Sequence[Mapping[str, Any]], theme: Theme) -> bytes | None:
    """PNG, or None where there is nothing to draw. Rows: see ``series.curves``."""
    training, scores = series.curves(rows)
    main = {n: p for n, p in scores.items() if n.rpartition("/")[0] not in scores}
    panels = [(title, lambda axes, t, lines=lines, title=title: _lines(axes, t, title, lines))
              for title, lines in training.items() if title == "Loss"]
    for title, labels in series.score_panels(main).items():
        draw = _steps if any(len(scores[n]) > 1 for n in labels) else _dots
        panels.append((title[0].upper() + title[1:], lambda axes, t, draw=draw, labels=labels: draw(axes, t, labels, scores)))
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
    for name, (colour, dashes) in zip(names, _styles(theme, len(names))):
        step, value = lines[name].T
        smooth = title in NOISY and len(value) >= 40
        if smooth:
            axes.plot(step, value, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(step, _running_mean(value) if smooth else value, color=colour, marker="o" if len(value) == 1 else None,
                  markersize=4, linestyle=dashes, label=series.spell(name))
    finite = np.concatenate([v[:, 1] for v in lines.values()])
    finite = finite[np.isfinite(finite)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    if title in ("Loss", "Gradient norm") and low > 0 and high > 30 * low:
        _log_axis(axes)
    else:
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
        if low >= 0 and low < 0.5 * high or high - low <= 1e-6 * abs(high):
            axes.set_ylim(min(0, 2 * low), 1.08 * high if high > 0 else 1)
        if high >= 1e4:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if len(lines) > 1:
        axes.legend(loc="best", handlelength=1.2)
    _step_axis(axes)


def _steps(axes, theme: Theme, labels: Mapping[str, str], scores: Mapping[str, np.ndarray]) -> None:
    """Scores over steps with their intervals as bands and chance dotted."""
    for name, (colour, dashes) in zip(labels, _styles(theme, len(labels))):
        step, value = scores[name].T
        axes.plot(step, value, color=colour, marker="o", markersize=3.5, linestyle=dashes, label=labels[name])
        low, high = scores.get(f"{name}/ci_low"), scores.get(f"{name}/ci_high")
        if low is not None and high is not None and len(low) == len(high) == len(step):
            axes.fill_between(step, low[:, 1], high[:, 1], color=colour, alpha=0.15, linewidth=0)
        if (chance := scores.get(f"{name}/chance")) is not None:
            axes.plot(chance[:, 0], chance[:, 1], color=colour, linestyle=(0, (1, 2)), linewidth=1.2)
    if _ranks(labels) and min(scores[n][:, 1].min() for n in labels) > 0:
        _log_axis(axes)
    else:
        axes.set_ylim(*_range(labels, scores))
    axes.legend(loc="best", handlelength=1.2)
    _step_axis(axes)


def _dots(axes, theme: Theme, labels: Mapping[str, str], scores: Mapping[str, np.ndarray]) -> None:
    """Scores of a single evaluation: a dot with its interval each, a tick where chance lies."""
    names = list(reversed(labels))
    for y, name in enumerate(names):
        value = scores[name][-1, 1]
        low, high = (scores[f"{name}/{end}"][-1, 1] if f"{name}/{end}" in scores else value for end in ("ci_low", "ci_high"))
        axes.plot([low, high], [y, y], color=theme.lines[0], alpha=0.4, linewidth=4, solid_capstyle="round")
        axes.plot(value, y, "o", color=theme.lines[0], markersize=5.5)
        axes.annotate(series.short(value), (high, y), (8, 0), textcoords="offset points", va="center", fontsize=8)
        if f"{name}/chance" in scores:
            axes.plot(scores[f"{name}/chance"][-1, 1], y, "|", color=theme.lines[1], markersize=10, markeredgewidth=2)
    axes.set_yticks(range(len(names)), [labels[n] for n in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", labelcolor=theme.ink)
    axes.grid(axis="y", visible=False)
    if _ranks(names):
        axes.set_xscale("log")
        plain_log(axes.xaxis)
        axes.set_xlim(0.8, 2.5 * axes.get_xlim()[1])
    else:
        low, high = _range(names, scores)
        axes.set_xlim(low, high * 1.13)
        if high < 1.1:
            axes.set_xticks(np.arange(6) / 5)
    tick = "; orange: chance" if any(f"{n}/chance" in scores for n in names) else ""
    axes.set_xlabel(f"at step {int(scores[names[0]][-1, 0]):,}{tick}")


def _ranks(names: Iterable[str]) -> bool:
    return any(n.endswith("_rank") for n in names)


def _range(names: Iterable[str], scores: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Shares are shown from 0 to 1, other scores from 0 to a little above the best."""
    shown = [scores[k][:, 1] for n in names for k in (n, f"{n}/ci_high", f"{n}/chance") if k in scores]
    finite = np.concatenate(shown)
    top = finite[np.isfinite(finite)].max(initial=0)
    return (-0.02, 1.02) if top <= 1 else (0.0, 1.05 * top)


def _log_axis(axes) -> None:
    axes.set_yscale("log")
    plain_log(axes.yaxis)


def plain_log(axis) -> None:
    """Ticks at 1, 2 and 5 of each decade, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


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


def _styles(theme: Theme, count: int) -> list[tuple[str, str]]:
    """(colour, dashes) of each line: from the fourth on colour alone might not tell them apart."""
    return [(theme.lines[i % len(theme.lines)], "-" if i < 3 else "--") for i in range(count)]
