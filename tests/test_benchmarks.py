"""What of the benchmarks needs no other framework: turns, statistics, our sides, and what they say without open_clip."""

import argparse
import json
import pathlib
import shutil
import statistics
import types

import numpy as np
import pytest

from benchmarks import data_pipeline, emoji, fusion_step, generate, models, multiway_step, paired, query_step, retrieval_cost, startup, train_step
from vlm_jax.data.batch import validate
from vlm_jax.stage import resolve

COMMANDS = {"train_step": train_step, "data_pipeline": data_pipeline, "generate": generate, "startup": startup, "emoji": emoji,
            "fusion_step": fusion_step, "multiway_step": multiway_step, "query_step": query_step}


# ---- turns and statistics ----------------------------------------------------------------------

def test_ratios_are_of_the_blocks_of_a_round():
    blocks = {"a": [[1, 1, 9], [2, 2, 2], [6, 6, 6]], "b": [[2, 2, 2], [2, 2, 2], [3, 4, 5]]}
    found = paired.compare(blocks, [("a", "b")])["a / b"]
    assert found["rounds"] == [0.5, 1, 1.5] and found["median"] == 1
    assert found["quartiles"] == [0.75, 1.25] and found["range"] == [0.5, 1.5]
    assert paired.compare(blocks, [("a", "b")], of=statistics.mean)["a / b"]["rounds"][0] == pytest.approx(11 / 6)
    assert paired.quartiles([3.0]) == [3.0, 3.0]


def test_turns_reverse_and_first_steps_are_dropped():
    turns = []
    sides = {name: lambda name=name: turns.append(name) or [9, 1, 2] for name in "ab"}
    assert paired.alternate(sides, rounds=3, drop=1) == {"a": [[1, 2]] * 3, "b": [[1, 2]] * 3}
    assert turns == list("abbaab")
    with pytest.raises(ValueError, match="none is left"):
        paired.alternate(sides, rounds=1, drop=3)


WORKERS = """
import json, os, threading, time

def ticking(path):
    file = open(path, "w", buffering=1)

    def tick():     # a reader thread that never rests
        while True:
            file.write(json.dumps(["tick", time.monotonic()]) + "\\n")
            time.sleep(0.002)

    def step():
        began = time.monotonic()
        time.sleep(0.02)
        file.write(json.dumps(["step", began, time.monotonic()]) + "\\n")
        print("not an answer")

    threading.Thread(target=tick, daemon=True).start()
    return step, {"memory": os.environ["GLIBC_TUNABLES"]}

def failing():
    raise OSError("no such thing")
"""


def fake_worker(folder, function, **options):
    (folder / "fake_workers.py").write_text(WORKERS)
    return paired.Worker(f"fake_workers:{function}", options, PYTHONPATH=str(folder))


def test_one_worker_works_at_a_time(tmp_path):
    with fake_worker(tmp_path, "ticking", path=str(tmp_path / "a")) as a, fake_worker(tmp_path, "ticking", path=str(tmp_path / "b")) as b:
        assert a.facts == {"memory": paired.MEMORY}
        blocks = paired.alternate({"a": lambda: a.block(3), "b": lambda: b.block(3)}, rounds=2, drop=1)
    assert all(0.02 <= s < 2 for side in blocks.values() for block in side for s in block)
    rows = {name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in "ab"}
    for worker, other in ("ab", "ba"):
        ticks = np.array([row[1] for row in rows[worker] if row[0] == "tick"])
        steps = [row[1:] for row in rows[other] if row[0] == "step"]
        assert len(ticks) > 20 and len(steps) == 6
        assert sum(((began < ticks) & (ticks < ended)).sum() for began, ended in steps) <= 1   # the last before it is stopped
    assert a.process.returncode and b.process.returncode     # ended


def test_a_worker_that_fails_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="fake_workers:failing ended"):
        fake_worker(tmp_path, "failing")


def test_report_prints_and_writes(tmp_path, capsys):
    given = argparse.Namespace(out=str(tmp_path / "x.json"), quick=False, threads=2)
    blocks = {"ours": [[1.0], [2.0]], "theirs": [[2.0], [2.0]]}
    machine = paired.machine()
    paired.report(given, "a test", machine, blocks, paired.compare(blocks, [("ours", "theirs")]), work=6, unit="images")
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["ratios"]["ours / theirs"]["median"] == 0.75 and written["seconds"] == blocks and written["machine"]["cores"]
    assert written["versions"]["jax"] and written["settings"] == {"quick": False, "threads": 2}
    printed = capsys.readouterr().out
    assert "| ours | 1.5 | 1 to 2 | 4 |" in printed and "| ours / theirs | 0.750 | 0.625 to 0.875 | 0.500 to 1.000 | 2 |" in printed


# ---- commands ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_what_is_compared(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[name].main(["--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert COMMANDS[name].__doc__.strip() in told and f"python -m benchmarks.{name}" in told
    assert "arget" in told and "--quick" in told and "--out" in told


@pytest.mark.parametrize("name", COMMANDS)
def test_without_open_clip_a_line_says_how_to_get_it(name, capsys, monkeypatch):
    monkeypatch.setattr(paired, "importlib", types.SimpleNamespace(util=types.SimpleNamespace(find_spec=lambda _: None)))
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[name].main(["--quick", *(["--tars=x", "--val=x"] if name == "emoji" else [])])
    assert stopped.value.code == 1
    assert capsys.readouterr().out == 'torch is missing: pip install -e ".[bench]"\n'


def test_no_benchmark_imports_a_framework_before_its_worker_does():
    for path in pathlib.Path(paired.__file__).parent.glob("*.py"):
        if path.stem in (*COMMANDS, "paired", "models"):
            tops = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
            assert not any(word in line for line in tops for word in ("jax.numpy", "import jax", "torch", "open_clip")), path


# ---- our sides ---------------------------------------------------------------------------------

def test_batches_are_cropped_to_the_bucket_and_nothing_else(tmp_path):
    whole, cropped = (models.make_batch("clip_b32", 16, True, buckets) for buckets in ((), models.BUCKETS))
    validate(cropped)
    assert whole["text"].shape == (16, 77) and cropped["text"].shape[1] in models.BUCKETS
    lengths = whole["text_mask"].sum(1)
    assert sorted(lengths) == sorted(models.caption_lengths(16)) and lengths.min() >= 8 and lengths.max() <= 20
    assert cropped["text"].shape[1] == next(b for b in models.BUCKETS if b >= lengths.max())
    for key in whole:
        assert np.array_equal(whole[key][:, :cropped["text"].shape[1]] if "text" in key else whole[key], cropped[key])
    assert np.median(models.caption_lengths(10_000)) == 11


def test_our_train_step_runs(tmp_path):
    np.savez(tmp_path / "batch.npz", **models.make_batch("clip_b32", 4, True, models.BUCKETS))
    step, facts = models.our_train_step("clip_b32", str(tmp_path / "batch.npz"), True)
    step()
    step()
    assert facts["parameters"] > 1_000_000 and facts["text"][1] in models.BUCKETS


def test_cropping_changes_neither_loss_nor_gradient():
    found = train_step.check("clip_b32", 4, quick=True)
    assert max(found.values()) <= train_step.TOLERANCE and set(found) == {"loss", "gradient"}


def test_the_models_of_the_comparison_are_the_published_ones():
    for name, parameters in (("clip_b32", 151_277_313), ("coca_b32", 253_560_065)):     # open_clip's own counts
        stage = resolve(models.our_config(name, 8), name)
        assert stage.plan.count() == parameters
        assert stage.system.model.image.remat == stage.system.model.text.remat == "none"
        assert stage.system.model.image.activation == "gelu"


def test_the_fusion_models_have_laviss_counts_and_its_work():
    for system, parameters in (("albef", 209_937_725 - 2 * 768), ("blip", 252_441_919)):     # without a table of token types
        config = fusion_step.our_config(system, 4, False)
        stage, batch = resolve(config, system), fusion_step.make_batch(system, 4, False)
        assert stage.plan.count() == parameters and config.model.text.dropout == 0.1 and config.loss.group == 0
        assert stage.system.model.image.remat == stage.system.model.text.remat == "none"
        validate(batch)
        assert {name: batch[name].shape for name in stage.spec} == {name: x.shape for name, x in stage.spec.items()}


def test_the_models_with_experts_have_their_published_counts_and_equal_batches():
    for system, parameters in (("vlmo", 202_445_470), ("beit3", 270_211_082)):
        stage, batch = resolve(multiway_step.our_config(system, 3, False), system), multiway_step.make_batch(system, 3, False)
        assert stage.plan.count() == parameters
        tower = stage.system.model.trunk if system == "vlmo" else stage.system.model.tower
        assert tower.remat == "none" and not tower.drop_path
        same = ("image", "text", "text_mask")
        assert {name: batch[name].shape for name in same} == {name: stage.spec[name].shape for name in same}
        assert (batch["masked_text"] != batch["text"]).sum() == batch["masked_at"].sum() > 0 and not (batch["masked_at"] & ~batch["text_mask"]).any()
    assert (batch["masked_patches"].sum(1) == 75).all() and (batch["masked_at"].sum(1) == 32).all()
    only = multiway_step.our_config("vlmo", 3, True, "itm")
    assert set(only.loss.weights) == {"itm"}


def test_the_query_models_are_theirs_and_read_the_same_batch(tmp_path):
    for part, stored, name in (("queries", "hf_blip2_retrieval", "pretrain"), ("language", "hf_blip2_opt", "generate")):
        folder = shutil.copytree(pathlib.Path(__file__).parent / "parity/official_outputs" / stored, tmp_path / part)
        found, weights = query_step.imported(str(folder))
        stage = resolve(query_step.our_config(part, found, 4), name)
        assert {p for p in stage.plan.shapes if p in weights} >= set(weights) - {"temp"} and stage.system.model.qformer.remat == "none"
        batch = query_step.make_batch(part, 4, True)
        validate({k: v for k, v in batch.items() if k != "tokens"})
        assert batch["text"].shape == stage.spec["text"].shape and batch["text_mask"].sum(1).tolist() == models.caption_lengths(4).tolist()
    query_step.same(dict(parameters=3, loss=2.0), dict(parameters=3, loss=2.0001))
    for other in (dict(parameters=4, loss=2.0), dict(parameters=3, loss=2.001)):
        with pytest.raises(SystemExit, match="the models differ"):
            query_step.same(other, dict(parameters=3, loss=2.0))


def test_a_caption_that_ends_early_is_an_error():
    generate.count(np.array([[1, 5, 5, 9]]), [9])
    with pytest.raises(ValueError, match="ended early"):
        generate.count(np.array([[1, 5, 9, 3]]), [9])


def test_photographs_are_the_same_each_time_and_both_sides_read_them(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    tars, again = (data_pipeline.photographs(tmp_path / folder, 12, tars=2) for folder in ("a", "b"))
    assert [pathlib.Path(p).read_bytes() for p in tars] == [pathlib.Path(p).read_bytes() for p in again]
    step, facts = data_pipeline.decoding(tars, size=32, batch=5)
    step()
    assert facts["samples"] == 12
    step, facts = data_pipeline.ours(tars, size=32, batch=5, tokenizer="scenes")
    step()
    assert facts["samples"] == 12


def test_emoji_of_equal_work_is_open_clips_model():
    stage = emoji.get_config("equal").stages.pretrain
    tokenizer = types.SimpleNamespace(vocab_size=49408, bos_id=49406, eos_id=49407, pad_id=0)
    assert resolve(stage, "pretrain", tokenizer).plan.count() == emoji.PARAMETERS
    assert emoji.get_config("recipe").stages.pretrain.model.image.stem == "conv"


def test_emoji_reads_both_logs(tmp_path):
    log = ("2026-01-01,00:00:00 | INFO | Start epoch 0\n"
           "2026-01-01,00:00:04 | INFO | Train Epoch: 0 [ 252/6300 (4%)] Data (t): 1.203 Batch (t): 4.110, 61.3139/s, 61.3139/s/gpu\n"
           "2026-01-01,00:00:06 | INFO | Train Epoch: 0 [ 504/6300 (8%)] Data (t): 0.203 Batch (t): 2.100, 126.000/s, 126.000/s/gpu\n")
    assert emoji.logged_seconds(log, 252) == pytest.approx([4.11, 2.0], rel=1e-4)
    rows = [{"step": 1, "time/images_per_s": 63.0}, {"step": 2, "time/images_per_s": 126.0}, {"step": 2, "retrieval/r": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert emoji.metrics_seconds(tmp_path / "metrics.jsonl", 252) == [4, 2]


# ---- what retrieval costs ----------------------------------------------------------------------

class Matcher:
    """A dual encoder that is wrong by one place, and a matching head that is right, on images whose first pixel is their number."""

    def __init__(self):
        self.pairs, self.encoded = 0, 0

    def embed(self, batch):
        self.encoded += len(next(iter(batch.values())))
        if "image" in batch:
            return {"image_embed": np.eye(64, dtype=np.float32)[batch["image"][:, 0, 0, 0]]}
        return {"text_embed": np.roll(np.eye(64, dtype=np.float32), 1, 1)[batch["text"][:, 0]] + 0.5 * np.eye(64, dtype=np.float32)[batch["text"][:, 0]]}

    def features(self, batch):
        return {"image": batch["image"][:, :1, 0, :1]} if "image" in batch else {"text": batch["text"][..., None]}

    def match(self, batch):
        self.pairs += len(batch["text"])
        right = batch["image_features"][:, 0, 0] == batch["text_features"][:, 0, 0]
        return {"match": np.stack([~right, right], 1)}

    def predict(self):
        return {name: getattr(self, name) for name in ("embed", "features", "match")}


def test_each_way_to_retrieve_does_its_own_work():
    images = np.arange(48, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    tokenizer = lambda texts, length: (np.array([[int(t)] * length for t in texts]), np.ones((len(texts), length), bool), 0)      # noqa: E731
    for way, pairs in (("dual encoder", 0), ("re-ranking", 48 * 16), ("fusion encoder", 48 * 48)):
        model = Matcher()
        best = retrieval_cost.retrieve(way, model.predict(), tokenizer, 3, images, [str(i) for i in range(48)])
        np.testing.assert_array_equal(best, np.r_[1:48, 47] if way == "dual encoder" else np.arange(48))
        assert model.encoded == 96 and model.pairs == (pairs and pairs + retrieval_cost.ROWS)      # one batch before its clock starts


def test_slopes_are_those_of_powers_and_stand_under_the_table():
    found = {"dual encoder": {n: [0.5 * n, 9.0 * n, 0.1 * n] for n in (16, 32, 64)}, "fusion encoder": {n: [0.01 * n ** 2] for n in (16, 32)}}
    assert retrieval_cost.fit(found["dual encoder"]) == pytest.approx((1, 0.5)) and retrieval_cost.fit(found["fusion encoder"]) == pytest.approx((2, 0.01))
    table = retrieval_cost.rows(found)
    assert table[-3:] == ["| 64 | 32 |  |", "| slope | 1.00 | 2.00 |", "| 5,000, by the fit | 2,500 | 250,000 |"]
    assert retrieval_cost.draw(found).startswith(b"\x89PNG")
