"""The notebook in docs runs from top to bottom in one process, on a smaller model."""

import json
import os
import pathlib

import matplotlib.pyplot
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALLER = {'configs.from_file("configs/clip.py")': 'configs.from_file("tests/tiny.py:clip")', "STEPS = 300": "STEPS = 4",
           "examples = 200": "examples = 16"}


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_notebook_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: matplotlib.pyplot.savefig(tmp_path / f"{len(os.listdir(tmp_path))}.png"))
    source = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code")
    for text, smaller in SMALLER.items():
        assert text in source
        source = source.replace(text, smaller)
    names: dict = {}
    exec(compile(source, str(path), "exec"), names)
    assert names["run"].done and names["similarity"].shape == (8, 8)
    assert len(list(tmp_path.glob("*.png"))) == 2 and "pretrain 4/4" in capsys.readouterr().out
