"""Packed tars read like their source: same samples, order, keys, captions, labels, sides; whole or not there at all."""

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm_jax.data import pack as packing
from vlm_jax.data import tars
from vlm_jax.data.pack import main, pack
from vlm_jax.data.pipeline import train_batches
from vlm_jax.data.sources import open_source
from vlm_jax.data.tokenizers import load
from vlm_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]


def picture(shade=0, form="PNG", size=(8, 8), **options):
    out = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(out, form, **options)
    return out.getvalue()


def fill(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"folder:{root}"


def photos(root, count):
    return fill(root, {f"d{i % 3} é/{i}.{kind}": content for i in range(count)
                       for kind, content in (("png", picture(i)), ("txt", f"photo {i}"))})


def samples(source):
    return [source[i] for i in range(len(source))]


def same(one, two, *, images=True):
    assert len(one) == len(two) and getattr(one, "classes", None) == getattr(two, "classes", None)
    for a, b in zip(samples(one), samples(two), strict=True):
        for name in ("key", "text", "text_weight", "label", *(["image"] if images else [])):
            assert a.get(name) == b.get(name), name
    assert [one.read_text(i) for i in range(len(one))] == [two.read_text(i) for i in range(len(two))]


def test_a_folder_comes_back_as_it_was(tmp_path):
    spec = photos(tmp_path / "photos", 25)
    fill(tmp_path / "photos", {"x.y/a.b.c.JPEG": picture(1, "JPEG"), "x.y/a.b.c.txt": "dots", "x.y/a_b_c.jpg": picture(2, "JPEG"), "x.y/a_b_c.txt": "more",
                               "x.y/a_b_c.gif": picture(3, "GIF"), "n" * 90 + "/" + "m" * 150 + ".bmp": picture(4, "BMP"),
                               "n" * 90 + "/" + "m" * 150 + ".txt": "long"})
    source = open_source(spec)
    packed = pack(source, str(tmp_path / "out"), shard=10)
    copy = open_source(f"tars:{tmp_path}/out/*.tar")
    assert packed[:2] == (3, 29) and not packed.left_out and not copy.counts
    same(source, copy)
    assert list(copy.keys()) == list(source.keys()) == [copy.key(i) for i in range(29)]
    for side in ("train:30", "val:30"):
        same(open_source(f"{spec}#{side}"), open_source(f"tars:{tmp_path}/out/*.tar#{side}"))
    same(open_source(f"{spec}#val:30"), open_source(pack_of(tmp_path, "side", f"{spec}#val:30")))
    same(source, open_source(pack_of(tmp_path, "again", f"tars:{tmp_path}/out/*.tar", shard=7)))
    os.remove(tmp_path / "out" / "00001.tar.idx")      # it is made from the tar alone
    same(source, open_source(f"tars:{tmp_path}/out/*.tar"))
    names = tarfile.open(tmp_path / "out" / "00002.tar").getnames()
    assert {"x.y/a_b_c.jpg", "x.y/a_b_c.txt", "x.y/a_b_c-2.gif", "x.y/a_b_c-3.jpg", "__pack__"} <= set(names)
    first_only = open_source(f"tars:{tmp_path}/out/*.tar", caption="txt")
    assert [s["text"] for s in samples(first_only)] == [s["text"][:1] for s in samples(source)]


def pack_of(tmp_path, name, spec, *, shard=1000, **options):
    pack(open_source(spec, **options), str(tmp_path / name), shard=shard)
    return f"tars:{tmp_path}/{name}/*.tar"


def test_training_on_the_copy_is_the_same(tmp_path):
    source = open_source(photos(tmp_path / "photos", 20))
    options = dict(batch=4, size=8, length=8, augment="random_crop|flip", seed=3, stop_step=6, threads=0)
    copy = open_source(pack_of(tmp_path, "out", source.name, shard=6))
    for (_, a), (_, b) in zip(*(train_batches(s, load("scenes"), **options) for s in (source, copy)), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_captions_weights_labels_and_the_rest_come_along(tmp_path):
    row = {"image": "a.png", "text": "one", "tags": ["x", "y z"], "kind": "dog", "license": "CC0", "weights": "heavy", "deep": {"id": 7}}
    rows = [row, {**row, "tags": []}, {"image": "a.png", "text": "three", "kind": "cat"}, {"image": "../b.png", "text": "four", "kind": "cat"}]
    fill(tmp_path, {"t/a.png": picture(1), "b.png": picture(2), "t/t.jsonl": "\n".join(map(json.dumps, rows))})
    for name, options in {"weighted": dict(caption="json:text@1;json:tags@3"), "labelled": dict(caption="json:text", label="json:kind"),
                          "both": dict(caption="json:tags;json:text", label="json:kind"), "plain": {}}.items():
        copy = open_source(pack_of(tmp_path, name, f"jsonl:{tmp_path}/t/t.jsonl", **options))
        same(open_source(f"jsonl:{tmp_path}/t/t.jsonl", **options), copy)
        assert list(copy.keys()) == ["a.png", "a.png", "a.png", "../b.png"]      # rows of one image keep its key
    tar = tarfile.open(tmp_path / "plain" / "00000.tar")
    assert json.load(tar.extractfile("a.json")) == {"tags": ["x", "y z"], "kind": "dog", "license": "CC0", "weights": "heavy", "deep": {"id": 7}}
    assert tar.getnames() == ["a.png", "a.txt", "a.json", "a-2.png", "a-2.txt", "a-2.json", "a-3.png", "a-3.txt", "a-3.json", "b.png", "b.txt", "b.json",
                              "__pack__"]


def test_classes_of_folders_and_parquet_come_along(tmp_path):
    spec = fill(tmp_path / "c", {f"{name}/{i}.png": picture(i) for i, name in enumerate(["b_b", "a", "c c", "a"])} | {"zero/x.md": ""})
    copy = open_source(pack_of(tmp_path, "one", spec))
    same(open_source(spec), copy)
    assert copy.classes == ["a", "b b", "c c", "zero"] and copy[0]["text"] == ["a photo of a a"]
    assert open_source(f"tars:{tmp_path}/one/*.tar", caption="the {}")[3]["text"] == ["the c c"]
    table = pa.table({"image": [picture(i) for i in range(5)], "fine": [2, 0, 1, 1, 0], "text": [["p", "q"]] * 5, "other": [b"\xff\xfe"] * 5})
    features = {"image": {"_type": "Image"}, "fine": {"_type": "ClassLabel", "names": ["zebra", "ape", "bear"]}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), tmp_path / "t.parquet", row_group_size=2)
    copy = open_source(pack_of(tmp_path, "two", f"parquet:{tmp_path}/t.parquet", shard=2))
    same(open_source(f"parquet:{tmp_path}/t.parquet"), copy)
    assert copy.classes == ["zebra", "ape", "bear"] and copy[0]["label"] == 2      # in their own order
    with pytest.raises(ValueError, match="packed with other classes than"):
        open_source(f"tars:{tmp_path}/{{one,two}}/00000.tar")
    assert "label" not in open_source(f"tars:{{{pack_of(tmp_path, 'three', photos(tmp_path / 'p', 2))[5:]},{tmp_path}/one/00000.tar}}")[0]


def test_computed_pictures_are_kept_without_loss(tmp_path):
    class Computed:
        name, classes = "computed", ["dark", "light"]

        def __len__(self):
            return 5

        def __getitem__(self, i):
            return {"key": f"c/{i}", "image": np.random.default_rng(i).integers(0, 256, (9, 7, 3), np.uint8), "text": [f"n {i}", "n"], "label": i % 2,
                    "json": {"at": np.arange(2), "raw": b"\xff", "name": b"plain"}}

    pack(Computed(), str(tmp_path / "out"))
    copy = open_source(f"tars:{tmp_path}/out/00000.tar")
    assert copy.classes == ["dark", "light"] and len(copy) == 5
    for a, b in zip(samples(copy), map(Computed().__getitem__, range(5)), strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(a["image"]))), b["image"])
        assert (a["text"], a["label"], a["json"]["at"], a["json"]["name"], "raw" in a["json"]) == (b["text"], b["label"], [0, 1], "plain", False)


def test_bad_samples_are_left_out_by_name(tmp_path, capsys):
    spec = photos(tmp_path / "p", 6)
    fill(tmp_path / "p", {"d0 é/0.png": picture(9, size=(64, 64))[:60], "d1 é/1.png": b"", "d0 é/3.png": b"no picture", "d1 é/4.txt": " ",
                          "d2 é/5.txt": b"\xe9", "lonely.jpg": picture()})
    assert main([spec, f"--out={tmp_path}/out", "--shard=2"]) == 0
    out = capsys.readouterr().out
    assert len(open_source(f"tars:{tmp_path}/out/*.tar")) == 1 and "1 tar, 1 samples" in out
    for told in ("lonely.jpg has no caption", "d1 é/1.png (empty_image)", "d0 é/3.png (not_an_image", "d1 é/4.png (empty_caption",
                 "d2 é/5.png (caption_not_utf8", "d0 é/0.png ("):
        assert told in out, told
    fill(tmp_path / "p", {"d2 é/2.png": b""})
    assert main([spec, f"--out={tmp_path}/none"]) == 43
    assert "error: none of the 6 samples of" in (err := capsys.readouterr().err) and "d1 é/1.png (empty_image), and 1 more" in err


def test_shrinking_keeps_small_ones_the_kind_and_the_orientation(tmp_path):
    turned = Image.Exif()
    turned[0x0112], turned[0x010F] = 6, "a camera"
    rng = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    grey = io.BytesIO()
    Image.fromarray(rng[..., 0]).save(grey, "PNG")
    files = {"big.jpg": picture(7, "JPEG", (90, 60), exif=turned), "small.jpg": picture(8, "JPEG", (400, 20)), "wide.webp": picture(9, "WEBP", (90, 60)),
             "grey.png": grey.getvalue(), "anim.gif": picture(5, "GIF", (60, 61))}
    spec = fill(tmp_path / "p", files | {name.split(".")[0] + ".txt": "x" for name in files})
    for threads in (1, 3):
        pack(open_source(spec), str(tmp_path / f"out{threads}"), size=20, threads=threads)
    assert (tmp_path / "out1" / "00000.tar").read_bytes() == (tmp_path / "out3" / "00000.tar").read_bytes()
    tar = tarfile.open(tmp_path / "out1" / "00000.tar")
    found = {name: Image.open(tar.extractfile(name)) for name in tar.getnames() if name.endswith(("jpg", "png", "webp", "gif"))}
    assert {name: (image.format, image.size) for name, image in found.items()} == {
        "anim.png": ("PNG", (20, 20)), "big.jpg": ("JPEG", (30, 20)), "grey.png": ("PNG", (30, 20)), "small.jpg": ("JPEG", (400, 20)),
        "wide.jpg": ("JPEG", (30, 20))}
    assert dict(found["big.jpg"].getexif()) == {0x0112: 6} and not found["grey.png"].getexif()
    assert tar.extractfile("small.jpg").read() == files["small.jpg"]
    expected = Image.fromarray(rng[..., 0]).resize((30, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(found["grey.png"])[..., 0], np.asarray(expected))


def test_a_pack_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    source = open_source(photos(tmp_path / "p", 23))
    pack(source, str(tmp_path / "whole"), shard=5)
    whole = [(tmp_path / "whole" / f"0000{i}.tar").read_bytes() for i in range(5)]
    real, calls = packing._add, []

    def dies(tar, name, content):
        calls.append(name)
        if len(calls) == 31:      # within the third tar
            raise KeyboardInterrupt
        real(tar, name, content)

    monkeypatch.setattr(packing, "_add", dies)
    with pytest.raises(KeyboardInterrupt):
        pack(source, str(tmp_path / "cut"), shard=5)
    assert sorted(os.listdir(tmp_path / "cut")) == [".lock", "00000.tar", "00000.tar.idx", "00001.tar", "00001.tar.idx", "pack.json"]
    monkeypatch.setattr(packing, "_add", real)
    (tmp_path / "cut" / "00002.tar.tmp").write_bytes(b"left by a killed one")
    said, changed = [], os.stat(tmp_path / "cut" / "00001.tar").st_mtime_ns
    pack(source, str(tmp_path / "cut"), shard=5, say=said.append)
    assert ["(kept)" in line for line in said] == [True, True, False, False, False] and os.stat(tmp_path / "cut" / "00001.tar").st_mtime_ns == changed
    assert [(tmp_path / "cut" / f"0000{i}.tar").read_bytes() for i in range(5)] == whole
    (tmp_path / "cut" / "00003.tar").write_bytes(whole[3][:-12000])      # damaged: written again
    pack(source, str(tmp_path / "cut"), shard=5, say=said.append)
    assert [(tmp_path / "cut" / f"0000{i}.tar").read_bytes() for i in range(5)] == whole and "(kept)" in said[7] and "(kept)" not in said[8]


def test_bytes_close_a_tar(tmp_path):
    source = open_source(photos(tmp_path / "p", 12))
    packed = pack(source, str(tmp_path / "out"), limit=5000)
    assert packed.tars > 2 and packed == pack(source, str(tmp_path / "out"), limit=5000)
    same(source, open_source(f"tars:{tmp_path}/out/*.tar"))


def test_a_folder_of_other_tars_is_refused(tmp_path):
    source, other = open_source(photos(tmp_path / "p", 3)), open_source(photos(tmp_path / "q", 3))
    pack(source, str(tmp_path / "out"))
    for changed, message in ((lambda: pack(other, str(tmp_path / "out")), "packed with source='folder:.*/p', not 'folder:.*/q'"),
                             (lambda: pack(source, str(tmp_path / "out"), size=4), "with size=0, not 4"),
                             (lambda: pack(source, str(tmp_path / "p2"), shard=0), "shard=0")):
        with pytest.raises(ConfigError, match=message):
            changed()
    with filelock.FileLock(str(tmp_path / "out" / ".lock")), pytest.raises(ConfigError, match="out is being packed by another process"):
        pack(source, str(tmp_path / "out"))
    (tmp_path / "mine").mkdir(), (tmp_path / "mine" / "a.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"mine holds tars already \(a.tar\)"):
        pack(source, str(tmp_path / "mine"))
    with pytest.raises(ConfigError, match="mixed by weight"):
        pack(open_source([f"{source.name}@1", f"{other.name}@2"]), str(tmp_path / "mix"))
    pack(open_source([source, other]), str(tmp_path / "mix"))
    same(open_source([source, other]), open_source(f"tars:{tmp_path}/mix/*.tar"))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"keys": [1], "label": 0, "classes": null, "rows": [], "left_out": {}}',
                                     b'{"keys": ["a", "b"], "label": 0, "classes": null, "rows": [], "left_out": {}}',
                                     b'{"keys": ["\\ud800"], "label": 0, "classes": null, "rows": [], "left_out": {}}'])
def test_a_strange_pack_member_makes_no_keys(tmp_path, content):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("k.png", picture()), ("k.txt", b"x"), (tars.PACK, content)):
            packing._add(tar, name, data)
    source = open_source(f"tars:{tmp_path}/a.tar")
    assert source.key(0) == "a/k" and source[0]["text"] == ["x"]


def test_the_command(tmp_path):
    spec = photos(tmp_path / "p", 12)
    run = subprocess.run([sys.executable, "-m", "vlm_jax.data.pack", spec, f"--out={tmp_path}/out", "--shard=9"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and "out: 2 tars, 12 samples" in run.stdout and "left out: nothing" in run.stdout
    lines = [line.strip() for line in run.stdout.splitlines() if "--config" in line]
    specs = [line.split("=", 1)[1].strip("'") for line in lines]
    assert lines[0].startswith("--config.stages.pretrain.data.train='tars:") and [len(open_source(s)) > 0 for s in specs] == [True, True]


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    for args, message in (([f"folder:{tmp_path}/none"], "error: no folder"), ([f"folder:{tmp_path}"], "holds no image"), (["scene:x"], "nearest: 'scenes'"),
                          ([f"jsonl:{tmp_path}/x"], "error: no file")):
        assert main([*args, f"--out={tmp_path}/out"]) == 43 and message in capsys.readouterr().err
