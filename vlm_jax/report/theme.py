"""Colours and matplotlib settings of the two themes; figures that leave matplotlib's global state as it was."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Callable

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 150


@dataclasses.dataclass(frozen=True)
class Theme:
    """``lines``: after Okabe and Ito (2008); the first three are told apart under every colour-vision deficiency,
    further lines are dashed as well."""
    paper: str
    ink: str
    quiet: str
    grid: str
    good: str
    bad: str
    lines: tuple[str, ...]
    ramp: tuple[str, str, str]                              # least to most similar


LIGHT = Theme("#ffffff", "#1c2430", "#5d6878", "#e4e8ee", "#0072b2", "#c2500a",
              ("#0072b2", "#d55e00", "#009e73", "#b3609a", "#b88300", "#3a92c9", "#444c58"),
              ("#f6f8fb", "#8fc0e0", "#084a7c"))
DARK = Theme("#161b22", "#e4e9f0", "#98a4b5", "#2a323d", "#6cb8f0", "#ff9a5c",
             ("#5aa5f5", "#f08a4b", "#7de8c8", "#e08fc4", "#e6b422", "#9bd0ff", "#c3cbd6"),
             ("#1b222c", "#1f6fa8", "#c9e8ff"))


def render(draw: Callable[[Figure, Theme], None], theme: Theme, width: float, height: float) -> bytes:
    """PNG of what ``draw(figure, theme)`` puts on a figure of that size (inches)."""
    settings = {
        "font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False, "text.color": theme.ink,
        "axes.facecolor": theme.paper, "axes.edgecolor": theme.grid, "axes.labelcolor": theme.quiet,
        "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 8,
        "axes.titlecolor": theme.ink, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": theme.grid, "grid.linewidth": 0.7, "lines.linewidth": 1.6,
        "xtick.color": theme.quiet, "ytick.color": theme.quiet, "xtick.labelsize": 8, "ytick.labelsize": 8,
        "xtick.major.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0, "legend.frameon": False, "legend.fontsize": 8}
    out = io.BytesIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")     # a box stands for it
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor=theme.paper)
        canvas = FigureCanvasAgg(figure)
        draw(figure, theme)
        canvas.print_png(out)       # savefig would lay the figure out once more
    return out.getvalue()
