"""The two sides of a source: which samples, for good, and that every reader of sources accepts a side."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data.lengths import token_lengths
from vlm_jax.data.order import order_of
from vlm_jax.data.pipeline import eval_batches, preview, train_batches
from vlm_jax.data.sources import Mixture, check_splits, key_of, left_out, name_of, open_source, read_text
from vlm_jax.data.split import Split, parse_split, place_of
from vlm_jax.data.tars import TarSource
from vlm_jax.data.tokenizers import train


def picture(shade=0):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 0, 0)).save(out, "PNG")
    return out.getvalue()


def tar_of(path, count):
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            for kind, content in (("png", picture(i)), ("txt", f"number {i} of the cats".encode()), ("json", json.dumps({"n": "ab"[i % 2]}).encode())):
                info = tarfile.TarInfo(f"k{i:03}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            if i % 10 == 3:
                tar.addfile(tarfile.TarInfo(f"x{i}.txt"))
    return f"tars:{path}"


@pytest.fixture(scope="module")
def tokenizer():
    return train([f"number {i} of the cats" for i in range(100)], 200)


def rows_of(tmp_path, count):
    """A JSONL of two rows an image, a CSV, and class folders over the same pictures."""
    for i in range(count):
        (tmp_path / f"c{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"c{i % 2}" / f"{i}.png").write_bytes(picture(i))
    names = [f"c{i % 2}/{i}.png" for i in range(count)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"image": n, "text": f"{n} {j}"}) + "\n" for j in range(2) for n in names) + "broken\n")
    (tmp_path / "t.csv").write_text("image,text\n" + "".join(f"{n},of {n}\n" for n in names))
    return [f"jsonl:{tmp_path}/t.jsonl", f"csv:{tmp_path}/t.csv", f"folder:{tmp_path}"]


def test_a_place_is_a_function_of_the_key_for_good():
    assert [round(place_of(key), 4) for key in ("a", "photos/图 é.jpg", "")] == [26.259, 83.4556, 86.6604]      # b2sum -l 48
    places = np.array([place_of(f"shard-{i % 7}/{i}") for i in range(20000)])
    assert places.min() >= 0 and places.max() < 100
    assert np.abs(np.histogram(places, 20, (0, 100))[0] - 1000).max() < 130      # about four standard deviations


def test_both_sides_make_the_whole(tmp_path):
    for spec in [tar_of(tmp_path / "a.tar", 60), *rows_of(tmp_path, 60)]:
        whole = open_source(spec)
        keys = list(whole.keys())
        assert keys == [whole.key(i) for i in range(len(whole))]
        for share in ("", ":5", ":37.5"):
            sides = [open_source(f"{spec}#{side}{share or ':12'}") for side in ("train", "val")]
            assert sorted(np.concatenate([s.rows for s in sides]).tolist()) == list(range(len(whole)))
            assert not set(sides[0].keys()) & set(sides[1].keys())      # rows of one image stay together
            for side in sides:
                assert side.rows.tolist() == sorted(side.rows.tolist()) and side.name == f"{spec}#{side.side}{share or ':12'}"
                assert [side.key(i) for i in range(len(side))] == list(side.keys()) == [keys[row] for row in side.rows]
        assert {key for key in keys if place_of(key) < 37.5} == set(open_source(f"{spec}#val:37.5").keys())
    assert open_source(f"{spec}#train").name == f"{spec}#train" and open_source(f"{spec}#train:5").held_out == 5


def test_a_side_is_a_source_like_any_other(tmp_path, tokenizer):
    spec = tar_of(tmp_path / "a.tar", 60)
    whole, side = open_source(spec, label="json:n"), open_source(f"{spec}#val:20", label="json:n")
    assert isinstance(side, Split) and 0 < len(side) < 30
    row = int(side.rows[-1])
    assert side[-1] == whole[row] and read_text(side, len(side) - 1) == whole.read_text(row) and key_of(side, 0) == whole.key(int(side.rows[0]))
    assert side.classes == ["a", "b"] and side.counts == whole.counts == {"missing_image": 6} and name_of(side) == f"{spec}#val:20"
    assert left_out(side) == left_out(whole) == f"{tmp_path}/a.tar: x3 has no image (only txt), and 5 more"
    for i in (len(side), -len(side) - 1):
        with pytest.raises(IndexError, match="val:20 has"):
            side[i]
    assert order_of(side, 0).n == len(side)
    options = dict(size=8, length=12)
    for step, batch in train_batches(side, tokenizer, batch=4, augment="squash", seed=0, stop_step=3, buckets=(8,), threads=0, **options):
        assert batch["image"].shape == (4, 8, 8, 3) and step < 3
    assert sum(len(meta) for _, meta in eval_batches(side, tokenizer, batch=4, **options)) == len(side)
    assert preview(side, tokenizer, **options)["samples"] == len(side)


def test_lengths_of_a_side(tmp_path, tokenizer, monkeypatch):
    for spec in (tar_of(tmp_path / "a.tar", 60), rows_of(tmp_path, 60)[1]):
        whole, side = open_source(spec), open_source(f"{spec}#train:20")
        expected = [len(tokenizer.encode(read_text(side, i)[0])) for i in range(len(side))]
        assert token_lengths(side, tokenizer)[np.arange(len(side))].tolist() == expected
        assert token_lengths(whole, tokenizer)[side.rows].tolist() == expected
    side = open_source(f"tars:{tmp_path}/a.tar#val:20")
    monkeypatch.setattr(TarSource, "read_text", lambda *_: 1 / 0)      # the column beside the tar serves both sides
    assert len(token_lengths(side, tokenizer)) == len(side)


def test_sides_in_a_mixture(tmp_path, tokenizer):
    tars, rows, _, _ = [tar_of(tmp_path / "a.tar", 60), *rows_of(tmp_path, 60)]
    mixture = open_source(f"{tars}#train:20@3; {rows}#val:20@1")
    assert isinstance(mixture, Mixture) and mixture.weights == [3, 1] and [p.side for p in mixture.parts] == ["train", "val"]
    place = len(mixture.parts[0])
    assert mixture[place]["key"] == mixture.parts[1].key(0) == key_of(mixture, place)
    assert len(token_lengths(mixture, tokenizer)) == len(mixture) and "has no image" in left_out(mixture)


def test_specs_that_are_no_split(tmp_path):
    assert parse_split("folder:a#train:2.5") == ("folder:a", "train", 2.5) and parse_split("tars:x#y/a.tar") == ("tars:x#y/a.tar", "", 0)
    (tmp_path / "photos#summer").mkdir()
    assert parse_split(f"folder:{tmp_path}/photos#summer")[1] == "" and parse_split(f"folder:{tmp_path}/photos#summer#val")[1] == "val"
    for wrong, message in (("#vla", "'vla' is not a side of a split; nearest: 'val'"), ("#val:0", "nearest: 'csv:x#val:10'"), ("#val:100", "between 0"),
                           ("#train:ten", "not a share"), ("#val:nan", "not a share")):
        with pytest.raises(ValueError, match=message):
            parse_split("csv:x" + wrong)
    with pytest.raises(ValueError, match="nearest: 'scenes:val'"):
        open_source("scenes:train#val")


def test_an_empty_side_says_what_would_do(tmp_path):
    specs = rows_of(tmp_path, 4)
    with pytest.raises(ValueError, match=r"#val:0.01 is empty: with 0.01% held out, all 4 samples .*write #train:(\d+) and #val:\1, which hold out"):
        open_source(f"{specs[2]}#val:0.01")
    with pytest.raises(ValueError, match="#train:99.9 is empty.*all 4 samples"):
        open_source(f"{specs[2]}#train:99.9")
    (tmp_path / "one.csv").write_text("image,text\nc0/0.png,a\nc0/0.png,b\n")
    empty = "train" if place_of("c0/0.png") < 10 else "val"
    with pytest.raises(ValueError, match="all 2 samples.*of one image"):
        open_source(f"csv:{tmp_path}/one.csv#{empty}")


def test_shares_that_leak_are_refused():
    check_splits("folder:a#train:10", "folder:a#val:10"), check_splits("folder:a#train:20", "folder:a#val"), check_splits("", "")
    check_splits("folder:a#train", "folder:b#val:10"), check_splits(("folder:a#train", "csv:b"), ["csv:c"])
    for train_on, evaluate_on in (("folder:a#train", "folder:a#val:20"), ("csv:b@1; folder:a#train@2", "folder:a#val:20")):
        with pytest.raises(ValueError, match="folder:a#val:20 has samples of folder:a#train:10.*nearest: 'folder:a#val:10'"):
            check_splits(train_on, evaluate_on)
