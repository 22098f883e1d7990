"""The finetune stage: what it inherits, what it chooses and averages, what adapters leave; trained from a directory."""

import json
import shutil

import numpy as np
import pytest

import vlm_jax
from tests.tiny import config, get_config
from vlm_jax import run
from vlm_jax import stage as stages
from vlm_jax.errors import ConfigError
from vlm_jax.train import checkpoint
from vlm_jax.train.metrics import read_rows

METRIC = "retrieval/text_to_image/R@1"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A small CLIP after four steps."""
    tiny = get_config("clip")
    tiny.stages.pretrain.steps, tiny.stages.pretrain.evals = 4, {}
    tiny.stages.pretrain.mesh.data = 8
    return vlm_jax.train(tiny, tmp_path_factory.mktemp("start")).folder


def finetune(start, arg="", name="clip", **sections):
    """The config's own stage, on few scenes."""
    whole = config(name, arg)
    stage = whole.stages.finetune
    stage.init = str(start)
    stage.data.update(train="scenes:train", eval="scenes:test", batch=8, augment="squash", threads=1)
    stage.optim.lr, stage.mesh.data, stage.log.every = 3e-3, 8, 1
    stage.evals = dict(retrieval=dict(kind="retrieval", examples=16, batch=8, every=2))
    with stage.ignore_type():
        for key, value in sections.items():
            stage[key] = value
    return whole


@pytest.fixture(scope="module")
def tuned(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tuned")
    return vlm_jax.train(finetune(start, steps="48examples", checkpoint=dict(every=2, keep=5), select=dict(metric=METRIC, average=0.5)),
                         workdir, stage="finetune")


def test_it_has_the_model_and_the_tokenizer_of_what_it_starts_from(start, tuned):
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (start, tuned.folder))
    assert new["model"] == old["model"] and (new["data"]["size"], new["data"]["length"]) == (48, 32)
    assert (tuned.folder / "tokenizer").exists() and tuned.done
    assert [r["step"] for r in tuned.rows if "loss" in r] == [1, 2, 3, 4, 5, 6]      # 48 examples in batches of 8


def test_the_best_evaluation_is_kept_the_start_included(tuned):
    scores = {r["step"]: r[METRIC] for r in tuned.rows if METRIC in r}
    assert list(scores) == [0, 2, 4, 6]
    step, _ = checkpoint.latest_good(tuned.folder / "best")
    assert scores[step] == max(scores.values()) and step == min(s for s, score in scores.items() if score == scores[step])
    told = checkpoint.read_manifest(tuned.folder / "best" / str(step))["extra"]
    assert told == {"score": scores[step], "metric": METRIC}


def test_the_result_is_the_average_with_the_start(start, tuned):
    before, best, result = stages.read_weights(start), stages.read_leaves(tuned.folder, "best"), stages.read_weights(tuned.folder)
    assert result.keys() == before.keys()
    for path in result:
        np.testing.assert_allclose(result[path], 0.5 * (before[path] + best[path]), rtol=0, atol=1e-6)
    model = vlm_jax.load(tuned.folder)
    np.testing.assert_array_equal(model.variables["params"]["logit_scale"], result["logit_scale"])
    assert tuned.scores[METRIC] >= 0 and "average" in (tuned.folder / "report" / "report.html").read_text()


def test_killed_before_its_end_it_chooses_the_same(start, tuned, tmp_path):
    shutil.copytree(tuned.folder.parent, tmp_path / "run")
    folder = tmp_path / "run" / tuned.folder.name
    (folder / "DONE").unlink()
    shutil.rmtree(folder / "result")
    shutil.rmtree(folder / "checkpoints" / "6")
    again = vlm_jax.train(finetune(start, steps="48examples", checkpoint=dict(every=2, keep=5), select=dict(metric=METRIC, average=0.5)),
                          tmp_path / "run", stage="finetune")
    assert again.scores == tuned.scores
    a, b = stages.read_weights(again.folder), stages.read_weights(tuned.folder)
    assert all(np.array_equal(a[p], b[p]) for p in b)
    rows = [{k: v for k, v in r.items() if not k.startswith("time/")} for r in again.rows]
    assert rows == [{k: v for k, v in r.items() if not k.startswith("time/")} for r in tuned.rows]


def test_adapters_are_merged_into_what_is_left(start, tmp_path):
    done = vlm_jax.train(finetune(start, "tune=lora", steps=2, checkpoint=dict(every=2, keep=1), evals={}, select={}), tmp_path, stage="finetune")
    stored = checkpoint.read_manifest(done.folder / "checkpoints" / "2")["leaves"]
    assert any(p.startswith("params/") and p.endswith("lora_b") for p in stored) and not any(p.endswith("kernel") for p in stored)
    before, after = stages.read_weights(start), stages.read_weights(done.folder)
    assert before.keys() == after.keys()
    moved = {p for p in before if not np.array_equal(before[p], after[p])}
    assert "image/blocks/attn/query/kernel" in moved and all(p.endswith("kernel") or p == "logit_scale" for p in moved)
    assert vlm_jax.load(done.folder).embed_text("a red circle").shape == (1, 16)


@pytest.mark.parametrize("change, message", [
    (dict(select=dict(metric="retrieval/text_to_image/R@l")), "not among the scores; nearest: .*R@1"),
    (dict(select=dict(metric="caption/exact")), "no score of an evaluation that runs during training; nearest: .*retrieval"),
    (dict(select=dict(average=1.5)), "average=1.5 is not a share; nearest: 1.0"),
    (dict(steps="2epoks"), "unit 'epoks' is unknown; nearest: .*epochs"),
    (dict(lora=dict(rank=0)), "rank=0 must be at least 1"),
    (dict(init=()), "takes the model from what init names"),
    (dict(init="nowhere"), "nowhere.* holds no trained or imported model"),
])
def test_what_does_not_fit_is_named(start, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        run.run(finetune(start, **change), tmp_path / "run", only="finetune")


def test_another_systems_weights_are_refused(start, tmp_path):
    with pytest.raises(ConfigError, match="is a 'clip', the stage a 'coca'; nearest: --config=configs/clip.py"):
        run.run(finetune(start, name="coca"), tmp_path, only="finetune")


def test_an_average_needs_something_to_start_from(tmp_path):
    tiny = get_config("clip")
    tiny.stages.pretrain.select = dict(average=0.5)
    with pytest.raises(ConfigError, match="starts from fresh weights"):
        run.run(tiny, tmp_path)


def test_train_runs_a_named_config_and_returns_what_it_made(start, tmp_path):
    assert read_rows(start / "metrics.jsonl")[-1]["step"] == 4
    with pytest.raises(ConfigError, match="'configs/clap.py' does not exist; nearest: .*configs/clip.py"):
        vlm_jax.train("configs/clap.py", tmp_path)
    again = vlm_jax.train(finetune(start, steps=2, evals={}, select={}), tmp_path, stage="finetune")
    assert again.done and again.scores == {} and again.model.config.system == "clip"
