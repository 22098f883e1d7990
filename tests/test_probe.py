"""The linear probe, and the command that evaluates a directory on data of one's own."""

import json

import numpy as np
import pytest
from PIL import Image

from vlm_jax import evaluate
from vlm_jax.errors import ConfigError
from vlm_jax.evals import probe, run


def batches(labels, shift, seed, rows=10):
    """Images whose first pixel tells the class, in noise."""
    rng = np.random.default_rng(seed)
    for at in range(0, len(labels), rows):
        part = labels[at:at + rows]
        image = rng.integers(0, 40, (rows, 2, 2, 3)).astype(np.uint8)
        image[:len(part), 0, 0] += (np.array(part)[:, None] * shift).astype(np.uint8)
        yield {"image": image, "mask": np.arange(rows) < len(part),
               "meta": [{"key": str(at + i), "label": int(c)} for i, c in enumerate(part)] + [{}] * (rows - len(part))}


PREDICT = {"embed": lambda batch: {"image_embed": batch["image"].reshape(len(batch["image"]), -1) / 255.0}}
LABELS = np.arange(64) % 3


def test_it_learns_what_can_be_told_and_nothing_else():
    found = run("probe", PREDICT, batches(LABELS, 60, 1), tokenizer=None, train_batches=batches(LABELS, 60, 0))
    assert found.scores["probe/top1"] == 1.0 and found.scores["probe/top1/chance"] == pytest.approx(1 / 3)
    assert found.scores["probe/images"] == 64 and len(found.items) == 64 and found.items[4]["label"] == "1"
    blind = run("probe", PREDICT, batches(LABELS, 0, 1), tokenizer=None, train_batches=batches(LABELS, 0, 0))
    assert blind.scores["probe/top1"] < 0.6 and blind.scores["probe/top1/majority"] == pytest.approx(22 / 64)


def test_the_fit_is_the_minimum():
    """At the minimum of the regularised loss: bias gradients vanish, and weights = x^T (truth - odds) / strength."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), rng.integers(0, 3, 40)
    w, b = probe.fit(x, y, 3, 2.0, 1000)
    odds = np.exp(x @ w + b)
    error = np.eye(3)[y] - odds / odds.sum(1, keepdims=True)
    np.testing.assert_allclose(error.sum(0), 0, atol=2e-3)
    np.testing.assert_allclose(w, x.T @ error / 2.0, atol=2e-3)
    assert np.abs(probe.fit(x, y, 3, 200.0, 1000)[0]).max() < 0.2 * np.abs(w).max()


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="evaluation sample '0' has no label"):
        run("probe", PREDICT, ({**b, "meta": [{"key": m.get("key")} for m in b["meta"]]} for b in batches(LABELS, 1, 0)), tokenizer=None,
            train_batches=batches(LABELS, 1, 0))
    with pytest.raises(ConfigError, match="label '1' alone"):
        run("probe", PREDICT, batches(LABELS, 1, 0), tokenizer=None, train_batches=batches([1, 1, 1], 1, 0))


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """Class folders for training and testing: red and blue pictures."""
    top = tmp_path_factory.mktemp("flowers")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, colour in (("red_rose", 0), ("blue_bell", 2)):
            (top / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (48, 48, 3)).astype(np.uint8)
                pixels[..., colour] += 180
                Image.fromarray(pixels).save(top / split / name / f"{i}.png")
    return top


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    import vlm_jax
    from tests.tiny import get_config
    tiny = get_config("clip")
    tiny.stages.pretrain.steps, tiny.stages.pretrain.evals, tiny.stages.pretrain.mesh.data = 4, {}, 8
    return vlm_jax.train(tiny, tmp_path_factory.mktemp("start")).folder


def test_class_folders_are_probed_and_named_from_the_command_line(directory, flowers, tmp_path, capsys):
    assert evaluate.main([str(directory), "probe", f"--data=folder:{flowers}/test", f"--train=folder:{flowers}/train", "--batch=8", f"--out={tmp_path}"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["probe/top1"] == 1.0 and scores["probe/train_images"] == 24      # a random tower tells red from blue
    assert "probe/top1" in capsys.readouterr().out
    items = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {i["label"] for i in items} == {"red rose", "blue bell"}
    assert evaluate.main([str(directory), "zeroshot", f"--data=folder:{flowers}/test", "--batch=8", "--templates=clip7"]) == 0
    assert "zeroshot/top1" in capsys.readouterr().out
    assert evaluate.main([str(directory), "zeroshot", f"--data=folder:{flowers}/test", "--train=folder:x"]) == 43
    assert evaluate.main([str(directory), "probe", f"--data=folder:{flowers}/test"]) == 43
    told = capsys.readouterr().err
    assert "has no use in 'zeroshot'" in told and "--train is missing" in told
