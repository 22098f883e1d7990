"""The column of caption lengths, and the buckets that are chosen from it before a row is read."""

import io
import json
import os
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import lengths, tars
from vlm_jax.data.pipeline import train_batches
from vlm_jax.data.sources import Mixture, open_source
from vlm_jax.data.tokenizers import train

OPTIONS = dict(batch=4, size=8, length=24, augment="squash", seed=1, block=2, window=2)


def picture():
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(out, "PNG")
    return out.getvalue()


def tar_of(path, samples):
    """samples: (caption, image bytes)."""
    with tarfile.open(path, "w") as tar:
        for i, (text, image) in enumerate(samples):
            for kind, content in (("png", image), ("txt", text.encode()), ("json", json.dumps({"title": text + " and more"}).encode())):
                info = tarfile.TarInfo(f"k{i:03}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return f"tars:{path}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train([f"number {i} of the cats" for i in range(100)], 200)


def captions(n):
    return [" ".join(["cats"] * (1 + i % 18)) for i in range(n)]


def test_the_column_is_the_tokenizers_own_count(tmp_path, tokenizer):
    texts = captions(30)
    for shard in (0, 1):
        tar_of(tmp_path / f"s{shard}.tar", [(t, picture()) for t in texts[15 * shard:15 * shard + 15]])
    source = open_source(f"tars:{tmp_path}/s{{0,1}}.tar")
    column = lengths.token_lengths(source, tokenizer)
    assert len(column) == 30 and column[np.arange(30)].tolist() == [len(tokenizer.encode(t)) for t in texts]
    assert column[np.array([29, 0, 14, 15])].tolist() == [len(tokenizer.encode(texts[i])) for i in (29, 0, 14, 15)]
    several = open_source(f"tars:{tmp_path}/s0.tar", caption="txt@1;json:title@2")
    assert lengths.token_lengths(several, tokenizer)[np.arange(15)].tolist() == [len(tokenizer.encode(t + " and more")) for t in texts[:15]]
    both = Mixture([source, several], [1, 1])
    assert len(lengths.token_lengths(both, tokenizer)) == 45
    assert lengths.token_lengths(open_source("scenes:train"), tokenizer) is None


def test_a_tars_column_is_kept_beside_its_index(tmp_path, tokenizer, monkeypatch):
    spec = tar_of(tmp_path / "a.tar", [(t, picture()) for t in captions(9)])
    first = lengths.token_lengths(open_source(spec), tokenizer)[np.arange(9)]
    files = sorted(f.name for f in tmp_path.glob("a.tar.idx.*.len"))
    assert len(files) == 1
    counted = []
    count = lengths._count
    monkeypatch.setattr(lengths, "_count", lambda *a: counted.append(1) or count(*a))
    np.testing.assert_array_equal(lengths.token_lengths(open_source(spec), tokenizer)[np.arange(9)], first)
    assert not counted
    other = train(["one two three"] * 9, 40)
    lengths.token_lengths(open_source(spec), other)                       # another tokenizer, another file
    tar_of(tmp_path / "a.tar", [(t + " cats", picture()) for t in captions(9)])
    os.utime(tmp_path / "a.tar", (1, 1))                                  # another tar under the same name
    again = lengths.token_lengths(open_source(spec), tokenizer)[np.arange(9)]
    assert len(counted) == 2 and (again > first).all()


def test_the_command_counts_ahead_of_time(tmp_path, tokenizer, capsys):
    tar_of(tmp_path / "a.tar", [(t, picture()) for t in captions(5)])
    tokenizer.save(str(tmp_path / "tokenizer"))
    tars.main([str(tmp_path / "a.tar"), "--processes=1", f"--tokenizer={tmp_path / 'tokenizer'}"])
    assert "5 samples" in capsys.readouterr().out and len(list(tmp_path.glob("*.len"))) == 1


def test_a_batch_has_the_bucket_of_its_longest_caption_and_loses_nothing(tmp_path, tokenizer):
    source = open_source(tar_of(tmp_path / "a.tar", [(t, picture()) for t in captions(40)]))
    with train_batches(source, tokenizer, **OPTIONS, stop_step=20) as whole, \
            train_batches(source, tokenizer, **OPTIONS, stop_step=20, buckets=(8, 12, 16)) as cropped:
        used = set()
        for (_, a), (_, b) in zip(whole, cropped):
            length = b["text"].shape[1]
            used.add(length)
            assert length == min(x for x in (8, 12, 16, 24) if x >= a["text_mask"].sum(1).max())
            np.testing.assert_array_equal(a["text"][:, :length], b["text"])
            np.testing.assert_array_equal(a["image"], b["image"])
            assert not a["text_mask"][:, length:].any()
    assert len(used) >= 3


def test_what_replaces_a_bad_sample_fits_the_bucket(tmp_path, tokenizer):
    """The bucket is told from the column before any row is read: a replacement must not need a larger one."""
    samples = [(t, picture() if i % 3 else b"<html>") for i, t in enumerate(captions(60))]
    source = open_source(tar_of(tmp_path / "a.tar", samples))
    column = lengths.token_lengths(source, tokenizer)
    from vlm_jax.data.order import order_of
    order = order_of(source, OPTIONS["seed"], OPTIONS["block"], OPTIONS["window"])
    with train_batches(source, tokenizer, **OPTIONS, stop_step=20, buckets=(8, 12, 16), bad_budget=1.0) as batches:
        for step, batch in batches:
            longest = int(column[order.index(np.arange(step * 4, step * 4 + 4))].max())
            length = min(x for x in (8, 12, 16, 24) if x >= longest)
            assert batch["text"].shape[1] == length
            ends = batch["text"][np.arange(4), batch["text_mask"].sum(1) - 1]
            assert (ends == tokenizer.eos_id).all()       # nothing was cut


def test_a_tar_that_cannot_be_written_beside_still_has_a_column(tmp_path, tokenizer):
    folder = pathlib.Path(tmp_path / "readonly")
    folder.mkdir()
    spec = tar_of(folder / "a.tar", [(t, picture()) for t in captions(5)])
    folder.chmod(0o555)
    try:
        assert len(lengths.token_lengths(open_source(spec), tokenizer)) == 5
        assert not list(folder.glob("*.len")) and list((tmp_path / "cache").rglob("*.len"))
    finally:
        folder.chmod(0o755)
