"""Official models on small random weights, as stored by ``python -m tests.parity --store`` (which needs torch; this does not)."""

import json
import pathlib

import numpy as np
import pytest

import vlm_jax
from tests.parity import compare
from vlm_jax import weight_rules
from vlm_jax.importers import cli, read

STORED = pathlib.Path(__file__).parent / "parity" / "stored"
CASES = sorted(f.name for f in STORED.iterdir() if f.is_dir())
STEPPED = [name for name in CASES if (STORED / name / "step.npz").exists()]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """name -> imported directory, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = compare.import_case(STORED / name, tmp_path_factory.mktemp("imported") / name)
        return made[name]
    return get


def test_every_release_has_cases():
    elsewhere = {name for name in cli.RELEASES if name.startswith(("albef", "blip", "hf_blip"))} | {      # in the tests of each system
        "hf_bert", "timm_vit", "eva", "hf_opt", "hf_llama", "hf_t5", "beit3", "vqkd", "vlmo", "beit"}
    assert {json.loads((STORED / name / "case.json").read_text())["release"] for name in CASES} | elsewhere == set(cli.RELEASES)


@pytest.mark.parametrize("name", CASES)
def test_answers_are_the_official_ones_and_a_planted_mistake_shows(name, imported):
    io = dict(np.load(STORED / name / "io.npz"))
    found = compare.differences(vlm_jax.load(imported(name)), io)
    assert {"image_embed", "text_embed", "logit_scale"} <= set(found) and compare.within(found), found
    mistakes = compare.planted(imported(name), io)
    assert {"activation", "eps"} <= set(mistakes)
    for mistake, changed in mistakes.items():
        assert not compare.within(changed), (mistake, changed)


@pytest.mark.parametrize("name", STEPPED)
def test_a_training_step_is_the_official_one(name, imported):
    found = compare.step_differences(STORED / name, imported(name))
    assert compare.step_within(found), found


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("openai")])
def test_exporting_an_import_gives_the_source_back_bit_for_bit(name, imported, tmp_path):
    out = compare.export_case(STORED / name, imported(name), tmp_path / "back")
    source, back = read.open_weights(STORED / name), read.open_weights(out)
    ignored = json.loads((imported(name) / "import.json").read_text())["ignored"]
    assert set(back) == set(source) - set(ignored)
    for key, tensor in back.items():
        assert (tensor.dtype, tensor.shape) == (source[key].dtype, source[key].shape), key
        assert tensor.read().tobytes() == source[key].read().tobytes(), key
    again = cli.import_release(json.loads((STORED / name / "case.json").read_text())["release"], str(out), tmp_path / "again", say=lambda line: None)
    io = dict(np.load(STORED / name / "io.npz"))
    first, second = (compare.answers(vlm_jax.load(d), io) for d in (imported(name), again))
    assert all(np.array_equal(first[k], second[k]) for k in first)


def test_one_layout_is_exported_to_another(imported, tmp_path):
    """OpenAI's weights as a CLIPModel and as open_clip's CLIP answer alike."""
    io = dict(np.load(STORED / "openai_vit" / "io.npz"))
    for release in ("hf_clip", "open_clip"):
        out = cli.export_release(release, imported("openai_vit"), tmp_path / release, say=lambda line: None)
        again = cli.import_release(release, str(out), tmp_path / f"{release}-again", say=lambda line: None)
        assert compare.within(compare.differences(vlm_jax.load(again), io))


def test_tables_of_positions_are_resized_as_the_releases_do():
    stored = np.load(STORED / "resize.npz")
    names = {name.rsplit("/", 1)[0] for name in stored.files}
    assert len(names) == 12
    for name in names:
        given, wanted = stored[f"{name}/in"], stored[f"{name}/out"]
        kernel = name.split("/")[0]
        if kernel == "sequence":
            found = weight_rules.resize_sequence(given, len(wanted))
        else:
            found = weight_rules.resize_grid(given, len(wanted), kernel)
            other = weight_rules.resize_grid(given, len(wanted), {"antialias": "border", "border": "antialias"}[kernel])
            assert len(given) == len(wanted) or np.abs(other - wanted).max() > 1e-3      # the kernels differ
        # relative to the table's largest entry; torch computes the places of linear samples in fp32, ours are float64
        np.testing.assert_allclose(found, wanted, rtol=0, atol=np.abs(given).max() * (3e-6 if kernel == "sequence" else 1e-6))
