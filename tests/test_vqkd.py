"""VQ-KD against the first steps of the official code (microsoft/unilm 768a3c8, folder beit2, tiny random weights), its codebook, and how it starts from a CLIP."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests.tiny import config
from vlm_jax import partitioning, weight_rules
from vlm_jax import stage as stages
from vlm_jax.errors import ConfigError
from vlm_jax.importers import cli, read, vqkd, write
from vlm_jax.importers.release import Hints
from vlm_jax.nn import codebook, mlp
from vlm_jax.systems.vqkd import Vqkd
from vlm_jax.system import Context
from vlm_jax.train import init
from vlm_jax.train.state import flatten, merge
from vlm_jax.train.step import make_train_step

STORED = pathlib.Path(__file__).parent / "parity" / "official_outputs" / "vqkd"
IO = dict(np.load(STORED / "io.npz"))
ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """in: the tokenizer; clip: its teacher, whose tensors have OpenAI's layout."""
    where = tmp_path_factory.mktemp("vqkd")
    cli.import_release("vqkd", str(STORED / "weights.safetensors"), where / "in", Hints(image_heads=3, decoder_heads=4), say=lambda line: None)
    tensors = read.open_weights(STORED / "weights.safetensors")
    write.write_safetensors(where / "clip.safetensors", {n.removeprefix("teacher_model."): t.read() for n, t in tensors.items() if n.startswith("teacher_model.")})
    cli.import_release("openai_clip", str(where / "clip.safetensors"), where / "clip", Hints(image_heads=5, text_heads=1), say=lambda line: None)
    return where


def opened(folder, change=lambda section: None):
    """(stage, weights by path): the imported tokenizer with the teacher that its ``init`` names, as a run makes them."""
    section = stages.configs.from_json((folder / "in" / "config.json").read_text())
    section.init, section.trainable, section.data.batch = (str(folder / "clip"), str(folder / "in")), (r"(?!teacher/).*",), 4
    section.model = {**section.model.to_dict(), "teacher": "init"}
    whole = stages.configs.ConfigDict(dict(stage_order=("tokenizer",), stages=dict(tokenizer=section)))
    section = stages.inherit(whole, folder, "tokenizer")
    with section.unlocked():
        change(section)
    stage = stages.resolve(section, "tokenizer")
    leaves = init.take_over(stages.init_rules(whole, stage, folder), stage.plan, lambda origin: stages.open_origin(whole, folder, origin), "init")
    return stage, leaves


def batch_of(name):
    """Stored images are [0, 1]; a batch holds them normalised, as what is no uint8 is taken to be."""
    return {"image": IO[name].transpose(0, 2, 3, 1) * 2 - 1, "kmeans_start": IO["in_kmeans_start"]}


def two_steps(stage, leaves, change=lambda batch: batch):
    """What the official run stored, of ours: two forward passes of training with the same network weights, the codebook going on."""
    context = Context(jax.random.key(0), jnp.int32(0))
    params = {p: leaves[p] for p in stage.plan.shapes}

    @jax.jit
    def step(params, moving, batch):
        trained, frozen = ({p: x for p, x in params.items() if p.startswith("teacher/") == kind} for kind in (False, True))

        def loss(trained):
            return stage.system.loss(merge(trained, frozen, moving), {}, batch, context)
        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        variables = merge(params, {}, moving)
        return value, out, grads, stage.system.model.apply(variables, batch["image"], method=Vqkd.encode)

    found, moving = {}, {p: jnp.asarray(leaves[p]) for p in stage.plan.moving}
    for i, name in enumerate(("in_images", "in_images2")):
        batch = change(batch_of(name))
        value, out, grads, z = step(params, moving, batch)
        suffix = ("", "_2")[i]
        if i == 0:
            table, bins = codebook.kmeans(z.reshape(-1, z.shape[-1]), IO["in_kmeans_start"])
            found |= {"out_z": z.reshape(-1, z.shape[-1]), "out_kmeans_weight": table, "out_kmeans_bins": bins, "out_train_quant_loss": out.metrics["commit"],
                      "out_kmeans_weight_1": codebook.kmeans(found["out_z"] if "out_z" in found else z.reshape(-1, z.shape[-1]), IO["in_kmeans_start"], 1)[0],
                      "out_train_rec_loss": out.metrics["rec"], "out_initted": out.moving["codebook/initted"][None],
                      "out_train_inner_cluster_size": out.moving["codebook/kmeans_count"], "grads": grads}
        seen = codebook.begin({p.removeprefix("codebook/"): x for p, x in moving.items()}, z.reshape(-1, z.shape[-1]), IO["in_kmeans_start"])
        found |= {f"out_train_loss{suffix}": value, f"out_train_codes_{i + 1}": codebook.look_up(z, seen["table"]),
                  f"out_train_codebook_{i + 1}": out.moving["codebook/table"], f"out_train_cluster_size_{i + 1}": out.moving["codebook/count"]}
        moving = {**moving, **out.moving}
    return jax.device_get(found)


TOLERANCE = {"out_z": 1e-4, "out_kmeans_bins": 0, "out_train_codes_1": 0, "out_train_codes_2": 0, "out_train_loss": 1e-4, "out_train_loss_2": 1e-4,
             "out_train_quant_loss": 1e-4, "out_train_rec_loss": 1e-4}      # the rest 1e-5


def furthest(found):
    """Differences from the stored arrays in units of their tolerance."""
    stored = {n for n in IO if n.startswith("out_") and n != "out_grad_norm"}
    assert stored == set(found) - {"grads"}
    return {n: float(np.abs(found[n].astype(np.float64) - IO[n]).max()) / (TOLERANCE.get(n, 1e-5) or 1e-9) for n in stored}


def test_two_steps_are_the_official_ones(folder):
    stage, leaves = opened(folder)
    found = two_steps(stage, leaves)
    far = furthest(found)
    assert max(far.values()) <= 1, far
    # gradients of every parameter that trains, in our layout
    tensors = {n: t.read() for n, t in read.open_weights(STORED / "grads.safetensors").items()}
    rules = vqkd.rules({}, {})
    wanted, left = weight_rules.import_leaves(rules, (), {p: x.shape for p, x in found["grads"].items()}, tensors, "grads")
    assert not left and len(wanted) == len(found["grads"])
    for path, x in wanted.items():
        assert np.abs(found["grads"][path] - x).max() <= 1e-3 * np.abs(x).max() + 1e-6, path
    norms = {n: float(v) for n, v in zip(json.loads((STORED / "order.json").read_text()), IO["out_grad_norm"], strict=True)}
    assert all(abs(np.linalg.norm(x) - norms[n]) < 1e-5 + 1e-4 * norms[n] for n, x in tensors.items())
    assert {n for n, v in norms.items() if v > 0} <= set(tensors)
