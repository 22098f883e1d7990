"""The report: what is drawn, that the page is whole and harmless, and that any part may be missing."""

import html.parser
import io
import math
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image

from vlm_jax import report
from vlm_jax.report import pictures, series, theme

EVIL = "<script>alert('$x^2$ & \"y\"')</script>"


def image(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)


def training(steps):
    return [{"step": s, "loss": 2.0 / s, "con": 1.0 / s, "cap": 0.5 / s, "lr": 1e-3, "grad_norm": 1.0,
             "image_to_text": 0.5, "time/images_per_s": 100.0} for s in range(1, steps + 1)]


SCORES = {"retrieval/text_to_image/R@1": 0.5, "retrieval/text_to_image/R@1/chance": 0.01,
          "retrieval/text_to_image/R@1/ci_low": 0.4, "retrieval/text_to_image/R@1/ci_high": 0.6,
          "retrieval/text_to_image/mean_rank": 3.0, "retrieval/images": 100.0,
          "caption/facts/exact": 0.25, "caption/facts/exact/most_frequent": 0.125, "caption/CIDEr-D": 4.5}
PARTS = {
    "metrics": training(60) + [{"step": 60, **SCORES}],
    "similarity": {"matrix": np.linspace(-1, 1, 6).reshape(2, 3), "images": [image(0), image(1)], "captions": ["a", EVIL, "c"]},
    "neighbours": [{"query": EVIL, "images": [image(2), image(3)], "scores": [0.9, 0.1], "right": [True, False]}],
    "captions": [{"image": image(4), "generated": EVIL, "reference": "ref " + EVIL, "ok": False},
                 {"image": image(5), "generated": "", "reference": "b", "ok": True}],
    "grounding": [{"image": image(6), "heat": np.eye(3), "box": (0.1, 0.2, 0.6, 0.7), "phrase": EVIL, "ok": True},
                  {"image": image(7), "heat": np.zeros((3, 3)), "box": (0, 0, 1, 1), "phrase": "b", "ok": False}],
    "config_text": '{"note": "' + EVIL + '"}', "notes": [EVIL]}


class Page(html.parser.HTMLParser):
    """Collects tags, text and sources; checks that what opens closes."""
    VOID = {"meta", "img", "br", "source"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    before = dict(matplotlib.rcParams)
    path = report.write_report(tmp_path_factory.mktemp("report"), title=EVIL, **PARTS)
    assert dict(matplotlib.rcParams) == before              # global state is left as it was
    return path, Page(path.read_text("utf-8"))


def test_every_picture_is_written_and_readable(whole):
    path, _ = whole
    assert sorted(p.name for p in path.parent.iterdir()) == ["captions.png", "curves.png", "grounding.png", "neighbours.png", "report.html",
                                                             "similarity.png"]
    for picture in path.parent.glob("*.png"):
        pixels = np.asarray(Image.open(picture).convert("L"))
        assert min(pixels.shape) > 150 and pixels.std() > 5, picture.name


def test_the_page_loads_nothing_from_elsewhere_and_has_alt_texts(whole):
    _, page = whole
    sources = [v for _, a in page.attributes for k, v in a.items() if k in ("src", "srcset", "href")]
    assert len(sources) == 3 * 2 + 2 + 2 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in page.text[1] and "@import" not in "".join(page.text)
    assert all(a.get("alt") for tag, a in page.attributes if tag == "img")
    assert [a["lang"] for tag, a in page.attributes if tag == "html"] == ["en"]


def test_strings_are_shown_and_never_run(whole):
    path, page = whole
    assert "<script" not in path.read_text("utf-8")
    shown = "\n".join(page.text)
    assert shown.count(EVIL) == 2 + 1 + 1 + 2 + 1           # title twice, note, query, caption and reference, config


def test_scores_stand_beside_chance_interval_and_baselines(whole):
    _, page = whole
    shown = " ".join(" ".join(page.text).split())
    assert "text \u2192 image, R@1 0.500 0.400 \u2013 0.600 0.010" in shown
    assert re.search(r"facts, exact 0\.250 +0\.125", shown) and "images 100" in shown
    assert "60 steps, loss 0.033 at the end" in shown


@pytest.mark.parametrize("parts", [(), ("captions",), ("config_text",), ("neighbours", "notes")], ids=str)
def test_any_part_may_be_missing(parts, tmp_path):
    path = report.write_report(tmp_path / "new", title="t", **{k: PARTS[k] for k in parts})
    Page(path.read_text("utf-8"))
    assert {p.stem for p in path.parent.glob("*.png")} == {"captions", "neighbours"} & set(parts)
    assert ("What a text finds" in path.read_text("utf-8")) == ("neighbours" in parts)


def test_a_second_report_replaces_the_first(tmp_path):
    report.write_report(tmp_path, title="t", captions=PARTS["captions"])
    report.write_report(tmp_path, title="t")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_rows_fall_into_panels():
    rows = [{"step": 1, "loss": 2.0, "con": "nan", "lr": 0.1, "grad_norm": 1, "scale": 10, "name": "text", "ok": True},
            {"step": 2, "loss": 1.0, "con": 0.5, "token_accuracy": 0.3, "time/images_per_s": 9.0, "time/other": 1},
            {"step": 2, "zeroshot/top1": 0.4}]
    panels, scores = series.curves(rows)
    assert {k: sorted(v) for k, v in panels.items()} == {
        "Loss": ["con", "loss"], "Learning rate": ["lr"], "Images per second": ["time/images_per_s"],
        "Gradient norm": ["grad_norm"], "Accuracy in the batch": ["token_accuracy"],
        "Similarity scale and bias": ["scale"], "Other": ["time/other"]}
    assert panels["Loss"]["loss"].tolist() == [[1, 2], [2, 1]] and math.isnan(panels["Loss"]["con"][0, 1])
    assert {k: v.tolist() for k, v in scores.items()} == {"zeroshot/top1": [[2, 0.4]]}


def test_scores_are_grouped_with_what_stands_beside_them():
    found = series.read_scores({"step": 3, **SCORES})
    assert {k: [s.name for s in v] for k, v in found.items()} == {
        "retrieval": ["retrieval/text_to_image/R@1", "retrieval/text_to_image/mean_rank", "retrieval/images"],
        "caption": ["caption/facts/exact", "caption/CIDEr-D"]}
    first = found["retrieval"][0]
    assert (first.value, first.interval, first.baselines) == (0.5, (0.4, 0.6), {"chance": 0.01})
    assert series.score_panels([s.name for v in found.values() for s in v] + ["c2/CIDEr-D"]) == {
        "retrieval, text \u2192 image": {"retrieval/text_to_image/R@1": "R@1"},
        "retrieval, ranks": {"retrieval/text_to_image/mean_rank": "text \u2192 image mean"},
        "caption": {"caption/facts/exact": "facts: exact"},
        "CIDEr-D": {"caption/CIDEr-D": "caption", "c2/CIDEr-D": "c2"}}


def test_curves_of_one_step_of_failed_runs_and_of_many_evaluations(tmp_path):
    broken = [{"step": 1, "loss": "nan", "con": "inf", "lr": 0.0, "grad_norm": "nan"}]
    many = [{"step": s, **SCORES} for s in (10, 20)]
    for name, rows in (("broken", broken), ("many", many), ("nan", [{"step": 1, "zeroshot/top1": "nan"}])):
        report.write_report(tmp_path / name, title=name, metrics=rows)
        assert (tmp_path / name / "curves.png").stat().st_size > 5000


def test_similarity_has_captions_down_and_images_across():
    """Image 1 fits caption 0 best: the darkest cell is in the first row, second column."""
    matrix = np.zeros((3, 2))
    matrix[1, 0] = 1.0
    png = pictures.draw_similarity({"matrix": matrix, "images": [image(i) for i in range(3)], "captions": ["a", "b"]}, theme.LIGHT)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    target = np.array([int(theme.LIGHT.ramp[2][i:i + 2], 16) for i in (1, 3, 5)])
    rows, columns = np.nonzero(np.abs(pixels - target).sum(-1) <= 6)
    height, width = pixels.shape[:2]
    cell, top, text = 0.62 * theme.DPI, 0.75 * theme.DPI, 3.0 * theme.DPI
    assert len(rows) > 0.4 * cell ** 2
    assert abs(rows.mean() - (top + cell / 2)) < 6 and abs(columns.mean() - (text + 1.5 * cell)) < 6


@pytest.mark.parametrize("kind", ["protanopia", "deuteranopia", "tritanopia"])
@pytest.mark.parametrize("colours", [theme.LIGHT, theme.DARK], ids=["light", "dark"])
def test_line_colours_stay_apart_under_colour_blindness(colours, kind):
    """Simulated with the matrices of Machado et al. 2009 (severity 1) in linear RGB; distances in CIE Lab."""
    matrix = {"protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
              "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
              "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]}[kind]
    rgb = np.array([[int(c[i:i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours.lines[:3]])
    seen = np.clip(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.array(matrix).T, 0, 1)
    xyz = seen @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]]) / (0.9505, 1, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
    for i in range(3):
        for j in range(i):
            assert np.linalg.norm(lab[i] - lab[j]) > 15
