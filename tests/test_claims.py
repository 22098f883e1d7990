"""The harness of small claims: what it runs, what it runs again, and what it makes of the scores."""

import json
import math
import types

import numpy as np
import pytest

from benchmarks.claims import CLAIMS, clip, multiway
from benchmarks.claims import report as reports
from benchmarks.claims.__main__ import main
from benchmarks.claims.claim import MADE, Claim, evals, variant_config
from benchmarks.claims.run import measure
from tests import tiny
from vlm_jax import train
from vlm_jax.data.scene import make_scene
from vlm_jax.data.scene_text import parse
from vlm_jax.data.sources import open_source
from vlm_jax.errors import ConfigError
from vlm_jax.run import Trained

LR = "stages.pretrain.optim.lr"
CLAIM = Claim(
    sentence="Learning is better than not.", paper="none", config="configs/clip.py", variants={"learning": {LR: 1e-3}, "still": {LR: 0.0}},
    differences={"R@1": (("learning", "retrieval/R@1"), ("still", "retrieval/R@1")),
                 "over chance": (("learning", "retrieval/R@1"), ("learning", "retrieval/chance"))},
    shared={"stages.pretrain.steps": 3, "stages.pretrain.data.train": "scenes:noisy"}, shown=("retrieval/images",))


class Runs:
    """A stand-in for training: leaves what a run leaves. R@1 grows with the rate and the seed."""

    def __init__(self, stops_at=None):
        self.seen, self.stops_at = [], stops_at

    def __call__(self, config, workdir, *, stage):
        own = config.stages.pretrain
        self.seen.append((workdir.parent.name, own.seed, own.steps, own.data.train))
        folder = workdir / "1_pretrain"
        folder.mkdir(parents=True, exist_ok=True)
        done = len(self.seen) != self.stops_at
        if done:
            value = 0.1 * own.seed + 100 * own.optim.lr + (0.01 * own.seed if own.optim.lr else 0)
            (folder / "DONE").write_text(json.dumps({"step": own.steps, "seconds": 7.0, "scores": {
                "retrieval/R@1": value, "retrieval/chance": 0.01, "retrieval/images": 40}}))
        return Trained(folder, done)


def test_every_variant_runs_with_every_seed_once(tmp_path):
    runs = Runs()
    scores, seconds = measure(CLAIM, tmp_path, (0, 2), runs)
    assert runs.seen == [(v, s, 3, "scenes:noisy") for s in (0, 2) for v in ("learning", "still")]
    assert scores["learning"][2]["retrieval/R@1"] == pytest.approx(0.32) and seconds == dict.fromkeys(
        ("learning/0", "still/0", "learning/2", "still/2"), 7.0)
    again = Runs()
    assert measure(CLAIM, tmp_path, (0, 1, 2), again)[0]["still"].keys() == {0, 1, 2}
    assert [seen[:2] for seen in again.seen] == [("learning", 1), ("still", 1)]


def test_a_stopped_claim_goes_on(tmp_path):
    runs = Runs(stops_at=2)
    assert measure(CLAIM, tmp_path, (0, 1), runs) is None and len(runs.seen) == 2
    again = Runs()
    assert measure(CLAIM, tmp_path, (0, 1), again) is not None
    assert [seen[:2] for seen in again.seen] == [("still", 0), ("learning", 1), ("still", 1)]


def test_a_run_of_an_equal_config_is_taken_from_another_claim(tmp_path):
    measure(CLAIM, tmp_path / "first", (0,), Runs(), runs=tmp_path)
    other, runs = Claim(**{**vars_of(CLAIM), "variants": {"plain": {LR: 1e-3}, "quick": {LR: 2e-3}}, "differences": {
        "R@1": (("plain", "retrieval/R@1"), ("quick", "retrieval/R@1"))}}), Runs()
    scores, seconds = measure(other, tmp_path / "second", (0, 1), runs, runs=tmp_path)
    assert [seen[:2] for seen in runs.seen] == [("quick", 0), ("plain", 1), ("quick", 1)]
    assert scores["plain"][0]["retrieval/R@1"] == pytest.approx(0.1) and seconds["plain/0"] == 7.0


def test_a_changed_variant_is_run_again_and_a_missing_score_is_named(tmp_path):
    measure(CLAIM, tmp_path, (0,), Runs())
    other = Claim(**{**vars_of(CLAIM), "variants": {"learning": {LR: 2e-3}, "still": {LR: 0.0}}})
    runs = Runs()
    measure(other, tmp_path, (0,), runs)
    assert [seen[0] for seen in runs.seen] == ["learning"]
    with pytest.raises(ConfigError, match="'learning' has no score 'retrieval/image'.*nearest: 'retrieval/images'"):
        measure(Claim(**{**vars_of(CLAIM), "shown": ("retrieval/image",)}), tmp_path, (0,), Runs())
    with pytest.raises(ConfigError, match="names 'optin'.*nearest: 'optim'"):
        variant_config(Claim(**{**vars_of(CLAIM), "shared": {"stages.pretrain.optin.lr": 1}}), "still", 0)


def vars_of(claim):
    return {name: getattr(claim, name) for name in Claim.__dataclass_fields__}


def test_differences_are_taken_seed_by_seed(tmp_path):
    found = reports.compare(CLAIM, measure(CLAIM, tmp_path, (0, 1, 2), Runs())[0])["R@1"]
    assert found["by_seed"] == pytest.approx([0.1, 0.11, 0.12]) and found["mean"] == pytest.approx(0.11)
    half = 4.302653 * 0.01 / math.sqrt(3)      # the scores themselves spread ten times as much
    assert found["interval"] == pytest.approx([0.11 - half, 0.11 + half], rel=1e-5) and found["verdict"] == "holds"


def test_the_paired_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [low <= 0.3 <= high for low, high in (reports.paired_interval(rng.normal(0.3, 2, size=3).tolist()) for _ in range(1000))]
    assert 0.93 <= np.mean(covered) <= 0.97
    assert all(math.isnan(x) for x in reports.paired_interval([0.5]))
    assert [reports.verdict(*x) for x in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (math.nan, math.nan))] == ["holds", "reversed", "open", "open"]


def test_the_report_has_json_and_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reports.paired, "machine", lambda: {"cpu": "x"})
    scores, seconds = measure(CLAIM, tmp_path, (0, 1), Runs())
    reports.report("a", CLAIM, tmp_path, scores, {**seconds, "still/1": 95.0})
    kept, markdown = json.loads((tmp_path / "claim.json").read_text()), (tmp_path / "claim.md").read_text()
    assert kept["scores"]["still"]["1"]["retrieval/R@1"] == pytest.approx(0.1) and kept["sentence"] == CLAIM.sentence and kept["versions"]["jax"]
    assert kept["differences"]["R@1"]["by_seed"] == pytest.approx([0.1, 0.11]) and kept["machine"] == {"cpu": "x"}
    assert "| learning | retrieval/R@1 | 0.1 | 0.21 | 0.155 | 0.1 to 0.21 |" in markdown and "4 runs of 7 to 95 s" in markdown
    assert "| R@1 (learning - still) | +0.1000 | +0.1100 | +0.1050 | +0.0415 to +0.1685 | holds |" in markdown
    assert "| over chance (learning, retrieval/R@1 - retrieval/chance) | +0.0900 |" in markdown
    assert len({line.count("|") for line in markdown.splitlines() if line.startswith("|")}) == 1
    printed = capsys.readouterr().out
    assert markdown in printed and "more than the 90 s" in printed


def test_what_is_prepared_is_trained_on_and_scored(tmp_path):
    asked, runs = [], Runs()

    def prepare(made, seed, train, data):
        asked.append((made, seed))
        return None if seed == 9 else {"kept": 10.0 + seed}

    claim = Claim(**{**vars_of(CLAIM), "prepare": prepare, "made": ("kept",), "shared": {
        **CLAIM.shared, "stages.pretrain.data.train": "tars:{made}/{seed}/{0..3}.tar;tars:{data}/*.tar"}})
    with pytest.raises(ConfigError, match="needs --data=DIR"):
        measure(claim, tmp_path, (1,), runs)
    scores, _ = measure(claim, tmp_path, (0, 1), runs, "/real")
    assert asked == [(tmp_path / "made", seed) for seed in (1, 0, 1)] and scores["made"][1] == {"kept": 11.0}
    assert runs.seen[-1][3] == f"tars:{tmp_path}/made/1/{{0..3}}.tar;tars:/real/*.tar"
    assert "| made | kept | 10 | 11 |" in "\n".join(reports.rows(claim, scores, reports.compare(claim, scores)))
    assert measure(claim, tmp_path, (9,), runs, "/real") is None


def test_balancing_prepares_pairs_of_the_tail(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "POOL", 300)
    monkeypatch.setattr(clip, "CAP", 20)
    told = clip.balance(tmp_path, 1, None)
    assert clip.balance(tmp_path, 1, None) == told and 40 < told["pairs kept"] < 200 and told["pairs"] == 300
    texts = {"pool": "pool", "balanced": "balanced/cap_20_seed_1"}
    texts = {name: [s["text"][0] for s in open_source(f"tars:{tmp_path}/{folder}/*.tar")] for name, folder in texts.items()}
    shares = {name: np.mean(["red" in t for t in found]) for name, found in texts.items()}
    assert len(texts["balanced"]) == told["pairs kept"] and shares["balanced"] < shares["pool"]
    rare = [t for t in texts["pool"] if "heart" in t]
    assert rare and sorted(rare) == sorted(t for t in texts["balanced"] if "heart" in t)


def test_close_ups_show_what_they_say_and_emoji_are_chosen_by_name():
    shown = [clip.close_up(i) for i in range(24)]
    assert clip.close_up(3)["text"] == shown[3]["text"] and (clip.close_up(3)["image"] == shown[3]["image"]).all()
    for sample in shown:
        thing, = make_scene(int(sample["key"].removeprefix("close/")), "objects").objects
        facts, = max((parse(article + sample["text"][0]) for article in ("", "a ")), key=lambda facts: facts.understood).objects
        assert (facts["shape"], facts["colour"]) == (thing.shape, thing.colour)
        corner, middle = sample["image"][:3, :3].mean((0, 1)), sample["image"].astype(float)
        assert (np.abs(middle - corner).max(-1) > 40).mean() > 0.04      # a scene's small object has about 1%
    ground = [sample["image"][:3, :3].mean() for sample in shown]
    assert np.mean(np.array(ground) > 200) > 0.4
    assert [clip.names_shape(t) for t in ("red heart", "keycap: *", "Latin cross", "heartbeat")] == [True, False, True, False]


def test_registered_claims_compare_what_they_run(capsys):
    for name, claim in CLAIMS.items():
        assert claim.sentence.endswith(".") and "arXiv" in claim.paper and name.isidentifier()
        assert all(names for variant, names in claim.scores().items() if variant != MADE)      # no variant is run for nothing
        for variant, changed in claim.variants.items():
            config = variant_config(claim, variant, 0, made="made", data="data")      # its sections exist
            last = claim.stage or config.stage_order[-1]
            assert {score.partition("/")[0] for score in claim.scores()[variant]} <= set({**claim.shared, **changed}[f"stages.{last}.evals"])
        assert len({json.dumps(v) for v in claim.variants.values()}) == len(claim.variants)
    assert main(["--list"]) == 0 and CLAIMS["momentum"].sentence in capsys.readouterr().out
    assert main(["momentun"]) == main(["momentum", "--seeds=a"]) == 43
    told = capsys.readouterr().err
    assert "nearest: 'momentum'" in told and "--seeds='a'" in told


def test_stages_before_the_pairs_take_what_the_pairs_give_up():
    def tokens(variant):
        config = variant_config(CLAIMS["stagewise"], variant, 0)
        return sum(config.stages[name].steps * {"vision": 96 * 17, "language": 96 * 22, "joint": multiway.FUSED_TOKENS}[name] for name in config.stage_order)

    def of_masked(config):
        return config.stages.pretrain.steps * 32 * (17 + 22 + 39) + config.stages.itc.steps * 48 * (17 + 22)

    assert tokens("staged") == pytest.approx(tokens("joint"), rel=2e-3)
    assert of_masked(variant_config(CLAIMS["masked_then_contrast"], "masked", 0)) == pytest.approx(tokens("joint"), rel=2e-3)


def test_a_real_run_is_scored_and_not_repeated(tmp_path):
    claim = Claim(sentence="", paper="", config=str(tiny.ROOT / "tests" / "tiny.py") + ":clip", shared={
        "stages.pretrain.steps": 2, "stages.pretrain.evals": evals(retrieval=dict(examples=8, batch=8, options=dict(captions="first")),
                                                                           matching=dict(examples=8, batch=8))},
        variants={"one": {}}, differences={"R@1": (("one", "retrieval/text_to_image/R@1"), ("one", "retrieval/text_to_image/R@1/chance"))},
        shown=("matching/cosine",))
    scores, seconds = measure(claim, tmp_path, (3,), train)
    assert scores["one"][3]["retrieval/text_to_image/R@1/chance"] == 1 / 8 and 0 <= scores["one"][3]["matching/cosine"] <= 1
    assert json.loads((tmp_path / "one" / "3" / "1_pretrain" / "config.json").read_text())["seed"] == 3 and seconds["one/3"] > 0
    assert measure(claim, tmp_path, (3,), types.SimpleNamespace()) == (scores, seconds)      # nothing is called
