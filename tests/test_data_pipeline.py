"""Batches: the same whatever the threads and restarts; bad samples replaced, counted, and stopping a run."""

import io
import itertools
import json
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data.bad import BadDataError, Ledger
from vlm_jax.data.batch import hash31, validate
from vlm_jax.data.pipeline import eval_batches, preview, train_batches
from vlm_jax.data.sources import Mixture, open_source
from vlm_jax.data.tokenizers import train

AUGMENT = "random_resized_crop(scale=0.5..1)|flip|rand_augment(1,5)"
OPTIONS = dict(batch=8, size=16, length=12, augment=AUGMENT, seed=3)


def picture(i):
    y, x = np.mgrid[:20, :24]
    out = io.BytesIO()
    Image.fromarray(np.stack([x * 9, y * 11, (x * 0 + 2 * i) % 256], -1).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def tar_of(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, image, text in samples:
            for kind, content in (("png", image), ("txt", text if isinstance(text, bytes) else text.encode())):
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return open_source(f"tars:{path}")


@pytest.fixture(scope="module")
def tokenizer():
    return train([f"number {i} of the cats" for i in range(100)], 200)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tar_of(tmp_path_factory.mktemp("good") / "g.tar", [(f"k{i:02}", picture(i), f"number {i}") for i in range(50)])


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """50 samples, every fifth bad in one of four ways."""
    ways = [(b"<html>", "x"), (picture(0)[:60], "x"), (picture(0), b"\xff\xfe"), (picture(0), "  ")]
    samples = [(f"k{i:02}", picture(i), f"number {i}") if i % 5 else (f"k{i:02}", *ways[i // 5 % 4]) for i in range(50)]
    return tar_of(tmp_path_factory.mktemp("spoilt") / "s.tar", samples)


def collect(source, tokenizer, steps, **options):
    with train_batches(source, tokenizer, **{**OPTIONS, **options}) as batches:
        return list(itertools.islice(batches, steps))


def same(a, b):
    return [s for s, _ in a] == [s for s, _ in b] and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for (_, x), (_, y) in zip(a, b, strict=True))


def test_batches_follow_the_glossary_and_the_order(good, tokenizer):
    batches = collect(good, tokenizer, 7, augment="squash")
    assert [s for s, _ in batches] == list(range(7))
    for _, batch in batches:
        validate(batch)
        assert batch["image"].shape == (8, 16, 16, 3) and batch["text"].shape == (8, 12)
    numbers = [tokenizer.decode(row) for _, b in batches for row in b["text"]]
    assert len(set(numbers[:50])) == 50 and set(numbers[:50]) == {f"number {i}" for i in range(50)}  # one epoch
    assert batches[0][1]["caption_id"].tolist() == [hash31(t) for t in numbers[:8]]
    assert batches[0][1]["image_id"].tolist() == [hash31(f"g/k{int(t.split()[1]):02}") for t in numbers[:8]]
    blue = [int(b["image"][r, 0, 0, 2]) // 2 for _, b in batches for r in range(8)]
    assert numbers == [f"number {i}" for i in blue]  # image and caption belong together


@pytest.mark.parametrize("options", [{}, {"block": 4, "window": 3}, {"buckets": (6, 9)}])
def test_threads_and_restarts_change_nothing(spoilt, tokenizer, options):
    options = {**options, "bad_budget": 1.0}
    whole = collect(spoilt, tokenizer, 10, threads=0, **options)
    assert same(whole, collect(spoilt, tokenizer, 10, threads=1, prefetch=1, **options))
    assert same(whole, collect(spoilt, tokenizer, 10, threads=4, prefetch=7, **options))
    assert same(whole[6:], collect(spoilt, tokenizer, 4, threads=3, start_step=6, **options))  # resumed mid-epoch
    assert not same(whole, collect(spoilt, tokenizer, 10, seed=4, **options))
    far = collect(spoilt, tokenizer, 1, start_step=10**9, **options)
    assert far[0][0] == 10**9


def test_run_ends_at_its_last_step(good, tokenizer):
    batches = train_batches(good, tokenizer, **OPTIONS, start_step=2, stop_step=5)
    assert [s for s, _ in batches] == [2, 3, 4]
    assert list(train_batches(good, tokenizer, **OPTIONS, start_step=5, stop_step=5)) == []
    batches.close()
    batches.close()


def test_close_ends_the_reader_threads(good, tokenizer):
    before = set(threading.enumerate())
    with train_batches(good, tokenizer, **OPTIONS, threads=3) as batches:
        next(batches)
        assert set(threading.enumerate()) - before
    for _ in range(100):
        if not set(threading.enumerate()) - before:
            break
        time.sleep(0.05)
    assert not set(threading.enumerate()) - before


def test_bad_samples_are_replaced_counted_and_written_down(spoilt, tokenizer, tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    options = dict(augment="squash", bad_budget=0.5, quarantine_path=str(path))
    with train_batches(spoilt, tokenizer, **{**OPTIONS, **options}) as batches:
        epoch = [next(batches)[1] for _ in range(7)]
        counts = dict(batches.ledger.counts)
    numbers = [int(tokenizer.decode(row).split()[1]) for b in epoch for row in b["text"]]
    assert all(n % 5 for n in numbers)                 # no bad one came through
    assert len(set(numbers[:50])) == 40                # and no good one was lost
    assert set(counts) == {"not_an_image", "truncated_image", "caption_not_utf8", "empty_caption"}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {r["key"] for r in rows} == {f"s/k{i:02}" for i in range(0, 50, 5)} and len(rows) == 10
    assert all(r["source"] == spoilt.name and r["reason"] in counts for r in rows)
    with open(path, "a") as file:
        file.write('{"source": "cut')                  # a crash while writing, then a restart
    collect(spoilt, tokenizer, 7, **options)
    assert len(path.read_text().splitlines()) == 11    # each bad sample stands there once


def test_budget_stops_the_run_at_the_same_step(spoilt, tokenizer):
    def run(threads, budget):
        batches = train_batches(spoilt, tokenizer, **OPTIONS, threads=threads, bad_budget=budget)
        done = []
        with batches, pytest.raises(BadDataError) as caught:
            for step, _ in batches:
                done.append(step)
        return done, str(caught.value)

    done, message = run(0, 0.05)
    assert 5 < len(done) < 15 and (done, message) == run(3, 0.05)  # 16 may always be bad, about 1 in 5 is
    assert "By reason:" in message and "not_an_image" in message and "s/k" in message and "bad_budget=0.05" in message
    assert len(collect(spoilt, tokenizer, 30, bad_budget=0.3)) == 30


def test_budget_is_a_share_above_a_floor():
    ledger = Ledger(0.1, floor=3)
    from vlm_jax.data.bad import Offence
    offence = Offence("s", "k", "empty_image", "", 0)
    ledger.add(4, [offence] * 3)
    with pytest.raises(BadDataError, match="4 bad samples of 5"):
        ledger.add(1, [offence])
    ledger = Ledger(0.1, floor=3)
    ledger.add(1000, [offence] * 100)
    with pytest.raises(ValueError, match="bad_budget=2"):
        Ledger(2)


def test_data_that_is_all_bad_stops_at_once(tmp_path, tokenizer):
    source = tar_of(tmp_path / "b.tar", [(f"k{i}", b"junk", "text") for i in range(30)])
    with train_batches(source, tokenizer, **OPTIONS, bad_budget=1.0) as batches, \
            pytest.raises(BadDataError, match="64 candidates in a row"):
        next(batches)
    with pytest.raises(BadDataError, match="none of the first 30"):
        preview(source, tokenizer, size=16, length=12)


def test_errors_of_the_reader_reach_the_consumer(tokenizer):
    class Broken:
        name = "broken"

        def __len__(self):
            return 10

        def __getitem__(self, i):
            raise OSError("disk gone")

    with train_batches(Broken(), tokenizer, **OPTIONS, threads=2) as batches, pytest.raises(OSError, match="disk gone"):
        next(batches)


def test_several_captions_are_drawn_by_weight(tokenizer):
    class Several:
        name = "several"

        def __len__(self):
            return 400

        def __getitem__(self, i):
            return {"key": str(i), "image": np.zeros((16, 16, 3), np.uint8),
                    "text": ["number 1", "number 2", "number 3"], "text_weight": [1, 3, 0]}

    def drawn(**options):
        (_, batch), = collect(Several(), tokenizer, 1, batch=400, augment="squash", **options)
        return [tokenizer.decode(row) for row in batch["text"]]

    texts = drawn()
    assert texts == drawn(threads=0) and "number 3" not in texts
    assert 250 < texts.count("number 2") < 350
    assert texts != drawn(start_step=1)
    assert set(drawn(caption="first")) == {"number 1"}


def test_mixture_keeps_its_shares(good, spoilt, tokenizer):
    mixture = Mixture([good, spoilt], [3, 1])
    batches = collect(mixture, tokenizer, 50, bad_budget=1.0, augment="squash")
    ids = np.concatenate([b["image_id"] for _, b in batches])
    from_good = np.isin(ids, [hash31(good.key(i)) for i in range(50)])
    assert abs(from_good.mean() - 0.75) < 0.05
    assert np.isin(ids[~from_good], [hash31(spoilt.key(i)) for i in range(50) if i % 5]).all()
    assert same(batches[20:], collect(mixture, tokenizer, 30, bad_budget=1.0, augment="squash", start_step=20))


def test_text_is_cropped_to_the_smallest_bucket(tokenizer):
    class Lengths:
        name = "lengths"

        def __len__(self):
            return 64

        def __getitem__(self, i):
            return {"key": str(i), "image": np.zeros((16, 16, 3), np.uint8),
                    "text": ["number 1" + " of the cats" * (i // 16)]}

    full = collect(Lengths(), tokenizer, 32, batch=2, augment="squash")
    cropped = collect(Lengths(), tokenizer, 32, batch=2, augment="squash", buckets=(8, 5))
    used = set()
    for (_, a), (_, b) in zip(full, cropped):
        length = b["text"].shape[1]
        used.add(length)
        longest = a["text_mask"].sum(1).max()
        assert length == min(x for x in (5, 8, 12) if x >= longest)
        assert (a["text"][:, :length] == b["text"]).all() and not a["text_mask"][:, length:].any()
    assert used == {5, 8, 12}
    for wrong in ((12,), (40,), (1,)):
        with pytest.raises(ValueError, match="buckets"):
            train_batches(Lengths(), tokenizer, **OPTIONS, buckets=wrong)


def test_evaluation_reads_everything_once_and_pads(good, tokenizer):
    for threads in (0, 2):
        with eval_batches(good, tokenizer, batch=16, size=16, length=12, threads=threads) as batches:
            assert len(batches) == 4
            out = list(batches)
        assert [len(m) for _, m in out] == [16, 16, 16, 2]
        assert [m["index"] for _, meta in out for m in meta] == list(range(50))
        for batch, meta in out:
            validate(batch)
            assert batch["image"].shape == (16, 16, 16, 3) and batch["mask"].sum() == len(meta)
            assert [tokenizer.decode(t) for t in batch["text"][batch["mask"]]] == [m["captions"][0] for m in meta]
        assert out[-1][0]["mask"].tolist() == [True] * 2 + [False] * 14
        assert not out[-1][0]["text_mask"][2:].any() and not out[-1][0]["image"][2:].any()
        assert out[0][1][3] == {"key": "g/k03", "captions": ["number 3"], "label": None, "index": 3}
    assert sum(len(m) for _, m in eval_batches(good, tokenizer, batch=16, size=16, length=12, limit=20)) == 20


def test_evaluation_leaves_bad_samples_out(spoilt, tokenizer, tmp_path):
    options = dict(batch=16, size=16, length=12, quarantine_path=str(tmp_path / "q.jsonl"))
    with eval_batches(spoilt, tokenizer, **options, bad_budget=0.5) as batches:
        out = list(batches)
        assert batches.ledger.counts.total() == 10
    assert [m["index"] for _, meta in out for m in meta] == [i for i in range(50) if i % 5]
    batch, meta = out[0]
    assert batch["mask"].tolist() == [i % 5 != 0 for i in range(16)]
    assert [tokenizer.decode(t) for t in batch["text"][batch["mask"]]] == [m["captions"][0] for m in meta]
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 10


def test_preview_shows_an_example_and_how_captions_fit(spoilt, tokenizer):
    shown = preview(spoilt, tokenizer, size=16, length=3)
    assert shown["key"] == "s/k01" and shown["caption"] == "number 1" and shown["image"].shape == (16, 16, 3)
    assert shown["decoded"] == tokenizer.decode(shown["ids"]) and len(shown["ids"]) == 3
    lengths = [len(tokenizer.encode(f"number {i}")) for i in range(50) if i % 5]
    readable = shown["captions"]  # samples with a bad image but a good caption count here too
    assert 40 <= readable < 50 and shown["samples"] == 50
    assert shown["tokens_max"] == max(lengths) and shown["truncated"] == 1
    assert preview(spoilt, tokenizer, size=16, length=12)["truncated"] == 0


@pytest.mark.parametrize("change,message", [
    ({"batch": 0}, "batch=0"), ({"seed": -1}, "seed=-1"), ({"workers": -1}, "workers=-1"), ({"augment": "flipp"}, "nearest: 'flip'"),
    ({"augment": "flip"}, "not size=16"), ({"block": 0}, "block=0"), ({"bad_budget": 2}, "bad_budget=2"),
    ({"caption": "sampel"}, "nearest: 'sample'"),
])
def test_wrong_arguments_are_refused_at_once(good, tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        train_batches(good, tokenizer, **{**OPTIONS, **change})
