"""The HTML page: one file, images embedded, nothing loaded from elsewhere, every string escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.image import imsave

from vlm_jax.report.series import COUNTS, Score, short, spell

HEADLINES = ("R@1", "top1", "exact", "CIDEr-D", "pointing", "usage", "cosine")

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --page: #f5f7fa; --ink: #1c2430; --quiet: #5d6878; --line: #dfe4eb;
  --accent: #0072b2; --chance: #d55e00; --good: #0072b2; --bad: #b04a08; }
@media (prefers-color-scheme: dark) { :root { --paper: #161b22; --page: #0e1217; --ink: #e4e9f0; --quiet: #98a4b5;
  --line: #2a323d; --accent: #6cb8f0; --chance: #f08a4b; --good: #6cb8f0; --bad: #ff9a5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 .35rem; }
h2 { font-size: 1.2rem; letter-spacing: -0.005em; margin: 0 0 .25rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .2rem 0 .9rem; max-width: 46rem; }
.quiet { color: var(--quiet); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .9rem; margin: 1.6rem 0; }
.tile, section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: .9rem 1.1rem; }
.tile b { display: block; font-size: 1.75rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: .84rem; color: var(--quiet); }
section { padding: 1.3rem 1.4rem 1.5rem; margin: 1.1rem 0; }
section > p { color: var(--quiet); font-size: .92rem; }
img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; } .wide img { min-width: 44rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--quiet); font-size: .8rem; }
th, td { padding: .38rem .8rem .38rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.n, th.n { text-align: right; }
tr:last-child td { border-bottom: 0; }
td b { font-weight: 650; } td.long { white-space: normal; overflow-wrap: anywhere; }
.bar { position: relative; width: 9rem; height: .8rem; background: var(--page); border-radius: .4rem; }
.bar i { position: absolute; top: 0; bottom: 0; left: 0; background: var(--accent); opacity: .85; border-radius: .4rem; }
.bar u { position: absolute; top: -.15rem; bottom: -.15rem; width: 2px; background: var(--chance); }
.found { border-top: 1px solid var(--line); padding: .8rem 0; display: grid; grid-template-columns: minmax(9rem, 15rem) 1fr;
  gap: 1rem; align-items: center; }
.found div, .cards { display: flex; flex-wrap: wrap; gap: .9rem; }
figure { margin: 0; }
figcaption { font-size: .82rem; line-height: 1.4; }
.found figure { width: 6.2rem; } .found figcaption { color: var(--quiet); padding-top: .25rem; }
figure img { width: 6.2rem; height: 6.2rem; object-fit: contain; border-radius: 6px; background: var(--page); }
figure.good img { outline: 3px solid var(--good); outline-offset: 1px; }
figure.bad img { outline: 3px dashed var(--bad); outline-offset: 1px; }
.good strong { color: var(--good); } .bad strong { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.1rem; }
.cards figure { display: grid; grid-template-columns: 6.2rem 1fr; gap: .9rem; } .cards figcaption { font-size: .9rem; }
.cards p { margin: .1rem 0 .35rem; }
pre { overflow: auto; max-height: 32rem; font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  background: var(--page); padding: 1rem; border-radius: 8px; margin: .8rem 0 0; }
summary { cursor: pointer; font-weight: 650; font-size: 1.2rem; }
ul { margin: .4rem 0 0; padding-left: 1.2rem; } li { margin: .2rem 0; }
@media (max-width: 40rem) { .found { grid-template-columns: 1fr; gap: .5rem; } section { padding: 1rem; } }
@media print { body { background: none; } section, .tile { break-inside: avoid; } }
"""


def build(*, title: str, subtitle: str, scores: Mapping[str, Sequence[Score]], figures: Mapping[str, tuple[bytes, bytes]],
          neighbours: Sequence[Mapping[str, Any]], captions: Sequence[Mapping[str, Any]], codes: Sequence[Mapping[str, Any]], config_text: str,
          notes: Sequence[str], provenance: Mapping[str, str]) -> str:
    """The page as text. ``figures``: "curves", "similarity" and "grounding" as PNG for (light, dark); other arguments
    as ``write_report`` takes them, any of them empty."""
    body = [f"<header><h1>{escape(title)}</h1><p class=quiet>{escape(subtitle)}</p></header>", _tiles(scores)]
    if notes:
        body.append(_section("Notes", "", "<ul>" + "".join(f"<li>{escape(n)}</li>" for n in notes) + "</ul>"))
    if scores:
        body.append(_section("Scores", "Intervals hold 95% of bootstrap resamples of the evaluation set. Bars run from 0 to 1; "
                             "the orange tick is chance: what guessing without looking gives.", _tables(scores)))
    if "curves" in figures:
        body.append(_section("Curves", "Training losses are drawn pale with their running mean on top. Evaluation scores carry "
                             "95% intervals; dotted lines and ticks are chance.",
                             _figure(figures["curves"], "Charts over training steps: "
                                     "losses, evaluation scores, learning rate and speed. The scores are in the table above.")))
    if "similarity" in figures:
        body.append(_section("Similarity", "Cosine between every caption (rows) and image (columns). Outlined cells are true "
                             "pairs; bold is the best image for a caption.",
                             _figure(figures["similarity"], "Matrix of cosine similarities between captions and images.")))
    if neighbours:
        body.append(_section("What a text finds", "The nearest images for a few texts, nearest first, with their cosine.",
                             "".join(map(_found, neighbours))))
    if codes:
        body.append(_section("What a code stands for", "The patches nearest to a few codes, from the most frequent code to the least, with their cosine.",
                             "".join(map(_found, codes))))
    if captions:
        body.append(_section("Captions", "Generated captions with the reference below.",
                             f"<div class=cards>{''.join(map(_card, captions))}</div>"))
    if "grounding" in figures:
        body.append(_section("Grounding", "Where a phrase is seen in an image, warmer for more; the outline is the thing's box, which no training "
                             "saw. Right is a hottest cell with its centre inside.",
                             _figure(figures["grounding"], "Images under heat maps, with boxes and the phrases that were looked for.")))
    if provenance:
        rows = "".join(f"<tr><th>{escape(label)}</th><td class=long>{escape(text)}</td></tr>" for label, text in provenance.items())
        body.append(_section("Provenance", "", f"<table><tbody>{rows}</tbody></table>"))
    if config_text:
        body.append(f"<section><details><summary>Configuration</summary><pre>{escape(config_text)}</pre></details></section>")
    return ("<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
            '<meta name=viewport content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(b for b in body if b)
            + "\n</main></body></html>\n")


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{f'<p>{text}</p>' if text else ''}{content}</section>"


def _tiles(scores: Mapping[str, Sequence[Score]]) -> str:
    """The scores that a reader looks for first, with chance."""
    tiles = []
    for several in scores.values():
        names = {s.name for s in several}
        for score in several:
            head, _, tail = score.name.rpartition("/")
            if tail not in HEADLINES or f"{head}/facts/{tail}" in names:
                continue
            chance = score.baselines.get("chance")
            beside = f"chance {short(chance)}" if chance is not None else ""
            tiles.append(f"<div class=tile><span>{escape(spell(score.name))}</span><b>{short(score.value)}</b>"
                         f"<span>{beside}</span></div>")
    return f"<div class=tiles>{''.join(tiles[:12])}</div>" if tiles else ""


def _tables(scores: Mapping[str, Sequence[Score]]) -> str:
    out = []
    for evaluation, several in scores.items():
        counts = [s for s in several if s.name.rpartition("/")[2] in COUNTS]
        rows = [s for s in several if s not in counts]
        others = list(dict.fromkeys(b for s in rows for b in s.baselines if b != "chance"))
        head = ["score", "value", "95% interval", "", "chance", *map(spell, others)]
        cells = "".join(f"<th{' class=n' if i in (1, 2) or i > 3 else ''}>{escape(h)}</th>" for i, h in enumerate(head))
        lines = []
        for s in rows:
            interval = f"{short(s.interval[0])} \u2013 {short(s.interval[1])}" if s.interval else ""
            beside = "".join(f"<td class=n>{short(s.baselines[b]) if b in s.baselines else ''}</td>" for b in ("chance", *others))
            lines.append(f"<tr><td>{escape(spell(s.name.partition('/')[2] or s.name))}</td><td class=n><b>{short(s.value)}</b></td>"
                         f"<td class='n quiet'>{interval}</td><td>{_bar(s)}</td>{beside}</tr>")
        about = ", ".join(f"{spell(s.name.rpartition('/')[2])} {short(s.value)}" for s in counts)
        table = f"<div class=wide><table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        out.append(f"<h3>{escape(spell(evaluation))}</h3>" + (f"<p class=quiet>{escape(about)}</p>" if about else "")
                   + (table if rows else ""))
    return "".join(out)


def _bar(score: Score) -> str:
    """A bar for shares; nothing for other scales."""
    if not 0 <= score.value <= 1 or score.name.endswith("_rank") or score.name.endswith("CIDEr-D"):
        return ""
    chance = score.baselines.get("chance")
    tick = f"<u style='left:{min(max(chance, 0), 1):.1%}'></u>" if chance is not None and chance == chance else ""
    return f"<div class=bar aria-hidden=true><i style='width:{score.value:.1%}'></i>{tick}</div>"


def _found(item: Mapping[str, Any]) -> str:
    figures = []
    for place, (image, score, right) in enumerate(zip(item["images"], item["scores"], item.get("right", [False] * len(item["images"]))), 1):
        mark = "<br><strong>\u2713 its own</strong>" if right else ""
        figures.append(f"<figure{' class=good' if right else ''}><img src='{_thumbnail(image)}' alt='Image found in place {place}"
                       f"{', the right one' if right else ''}'><figcaption>{score:.3f}{mark}</figcaption></figure>")
    return f"<div class=found><span>{escape(item['query'])}</span><div>{''.join(figures)}</div></div>"


def _card(item: Mapping[str, Any]) -> str:
    kind, word = ("good", "\u2713 right") if item["ok"] else ("bad", "\u2717 wrong")
    return (f"<figure class={kind}><img src='{_thumbnail(item['image'])}' alt='Captioned image; reference: "
            f"{escape(item['reference'])}'><figcaption><strong>{word}</strong><p>{escape(item['generated']) or '(empty)'}</p>"
            f"<span class=quiet>{escape(item['reference'])}</span></figcaption></figure>")


def _figure(pngs: tuple[bytes, bytes], alt: str) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(p).decode()}" for p in pngs)
    return (f"<div class=wide><picture><source media='(prefers-color-scheme: dark)' srcset='{dark}'>"
            f"<img src='{light}' alt='{escape(alt)}'></picture></div>")


def _thumbnail(image: np.ndarray) -> str:
    out = io.BytesIO()
    imsave(out, np.ascontiguousarray(image, np.uint8), format="png")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
