"""VQ-KD against the first steps of the official code (microsoft/unilm 768a3c8, folder beit2, tiny random weights), its codebook, and how it
starts from a CLIP."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import vlm_jax
from tests.tiny import config
from vlm_jax import partitioning, weight_rules
from vlm_jax import stage as stages
from vlm_jax.errors import ConfigError
from vlm_jax.evaluate import evaluate
from vlm_jax.importers import cli, read, vqkd, write
from vlm_jax.importers.release import Hints
from vlm_jax.models.teacher import build_teacher
from vlm_jax.nn import codebook
from vlm_jax.system import Context
from vlm_jax.systems.vqkd import Vqkd
from vlm_jax.train import init
from vlm_jax.train.state import flatten, merge

STORED = pathlib.Path(__file__).parent / "parity" / "official_outputs" / "vqkd"
IO = dict(np.load(STORED / "io.npz"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """in: the tokenizer; clip: its teacher, whose tensors have OpenAI's layout."""
    where = tmp_path_factory.mktemp("vqkd")
    cli.import_release("vqkd", str(STORED / "weights.safetensors"), where / "in", Hints(image_heads=3, decoder_heads=4), say=lambda line: None)
    tensors = read.open_weights(STORED / "weights.safetensors")
    teacher = {n.removeprefix("teacher_model."): t.read() for n, t in tensors.items() if n.startswith("teacher_model.")}
    write.write_safetensors(where / "clip.safetensors", teacher)
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


def steps(stage, leaves):
    """A function from a change of the batches to what the official run stored, of ours: two forward passes of training with the same network
    weights, the codebook going on; and a function to the gradients of the first."""
    context, frozen = Context(jax.random.key(0), jnp.int32(0)), {p: leaves[p] for p in stage.plan.frozen}
    trained, empty = {p: leaves[p] for p in stage.plan.trained}, {p: jnp.asarray(leaves[p]) for p in stage.plan.moving}

    def loss(trained, moving, batch):
        return stage.system.loss(merge(trained, frozen, moving), {}, batch, context)

    @jax.jit
    def step(moving, batch):
        value, out = loss(trained, moving, batch)
        z = stage.system.model.apply(merge(trained, frozen, moving), batch["image"], method=Vqkd.encode).reshape(-1, stage.config.model.code_width)
        start = batch["kmeans_start"]
        book = codebook.begin({p.removeprefix("codebook/"): x for p, x in moving.items()}, z, start)
        return value, out, z, codebook.look_up(z, book["table"]).reshape(len(batch["image"]), -1), codebook.kmeans(z, start), codebook.kmeans(z, start, 1)[0]

    def two(change=lambda batch: batch):
        moving, found = empty, {}
        for i, name in enumerate(("in_images", "in_images2"), 1):
            value, out, z, codes, (table, bins), table_1 = step(moving, change(batch_of(name)))
            moving = {**moving, **out.moving}
            if i == 1:
                found = {"out_z": z, "out_kmeans_weight": table, "out_kmeans_bins": bins, "out_kmeans_weight_1": table_1,
                         "out_initted": moving["codebook/initted"][None],
                         "out_train_quant_loss": out.metrics["commit"], "out_train_rec_loss": out.metrics["rec"],
                         "out_train_inner_cluster_size": moving["codebook/kmeans_count"]}
            found |= {"out_train_loss" + ("_2" if i == 2 else ""): value, f"out_train_codes_{i}": codes, f"out_train_codebook_{i}": moving["codebook/table"],
                      f"out_train_cluster_size_{i}": moving["codebook/count"]}
        return jax.device_get(found)

    return two, lambda: jax.device_get(jax.jit(jax.grad(lambda *args: loss(*args)[0]))(trained, empty, batch_of("in_images")))


TOLERANCE = {"out_z": 1e-4, "out_kmeans_bins": 0, "out_train_codes_1": 0, "out_train_codes_2": 0, "out_train_loss": 1e-4, "out_train_loss_2": 1e-4,
             "out_train_quant_loss": 1e-4, "out_train_rec_loss": 1e-4}      # the rest 1e-5


def furthest(found):
    """Differences from the stored arrays in units of their tolerance."""
    stored = {n for n in IO if n.startswith("out_") and n != "out_grad_norm"}
    assert stored == set(found)
    return {n: float(np.abs(found[n].astype(np.float64) - IO[n]).max()) / (TOLERANCE.get(n, 1e-5) or 1e-9) for n in stored}


def test_two_steps_and_their_gradients_are_the_official_ones(folder):
    two, gradients = steps(*opened(folder))
    far = furthest(two())
    assert max(far.values()) <= 1, far
    assert furthest(two(lambda batch: {**batch, "image": (batch["image"] + 1) / 2}))["out_train_codes_1"] > 3      # pixels left in [0, 1]
    ours = weight_rules.export_leaves(vqkd.rules({}, {}), gradients(), "gradients")
    theirs = {n: t.read() for n, t in read.open_weights(STORED / "grads.safetensors").items()}
    assert set(ours) == set(theirs)
    for name, x in theirs.items():
        assert np.abs(ours[name] - x).max() <= 1e-3 * np.abs(x).max() + 1e-6, name
    order = json.loads((STORED / "order.json").read_text())
    np.testing.assert_allclose([np.linalg.norm(ours.get(n, 0.0)) for n in order], IO["out_grad_norm"], rtol=1e-3, atol=1e-6)


def tell(**changes):
    """A change of the model's section; towers' sections are updated."""
    def change(section):
        for name, value in changes.items():
            if isinstance(value, dict):
                section.model[name].update(value)
            else:
                section.model[name] = value
    return change


MISTAKES = {  # what is wrong -> (change of the section, the arrays that tell)
    "LayerNorm eps 1e-5": (tell(encoder=dict(eps=1e-5)), ("out_z",)),
    "no norm before the decoder's head": (tell(decoder=dict(norms_at=())), ("out_train_loss",)),
    "teacher in the student's colours": (tell(teacher=dict(mean=(0.5,) * 3, std=(0.5,) * 3)), ("out_train_rec_loss",)),
    "decay 0.9, a quarter of the commitment": (lambda section: section.loss.update(decay=0.9, weights=dict(rec=1.0, commit=0.25)),
                                               ("out_train_cluster_size_1", "out_train_codebook_2", "out_train_loss")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_shows(folder, mistake):
    change, tells = MISTAKES[mistake]
    far = furthest(steps(*opened(folder, change))[0]())
    assert all(far[name] > 3 for name in tells), far


@pytest.mark.parametrize("where, name, tells", [(jnp, "tanh", "out_train_codes_1"), (codebook, "unit", "out_train_codebook_2")])
def test_a_step_left_out_shows(folder, monkeypatch, where, name, tells):
    two, _ = steps(*opened(folder))
    monkeypatch.setattr(where, name, lambda x: x)
    assert furthest(two())[tells] > 3


def test_exporting_an_import_gives_the_source_back_bit_for_bit(folder, tmp_path):
    out = read.open_weights(cli.export_release("vqkd", folder / "in", tmp_path / "out", say=lambda line: None))
    source = read.open_weights(STORED / "weights.safetensors")
    assert set(out) == {n for n in source if not n.startswith(("teacher", "scaling"))}      # what the official loader strips
    assert all(np.array_equal(out[n].read(), source[n].read()) and out[n].dtype == source[n].dtype for n in out)


def test_an_imported_tokenizer_says_codes_in_raster_order(folder):
    model = vlm_jax.load(folder / "in")
    image = np.zeros((1, 40, 40, 3), np.uint8)
    image[:, 8:16, 32:] = 255
    found = model.predict["tokens"]({"image": image})
    assert found["ids"].shape == (1, 25) and found["ids"].dtype == np.int32 and found["codes"] == 37
    decoded = model.predict["reconstruct"]({"image": image})
    assert decoded["decoded"].shape == (1, 25, 512) and "cosine" not in decoded
    assert (decoded["ids"] == found["ids"]).all()
    uint8, normed = model.predict["tokens"]({"image": image})["similarity"], model.predict["tokens"]({"image": image / np.float32(127.5) - 1})["similarity"]
    np.testing.assert_allclose(uint8, normed, atol=1e-5)      # a dark image is scaled like any other
    with pytest.raises(ConfigError, match="model.teacher is missing"):
        model.stage.system.loss(model.variables, {}, {"image": image}, Context(jax.random.key(0), jnp.int32(0)))


def test_an_imported_tokenizer_is_scored_without_a_text_tokenizer(folder):
    model = vlm_jax.load(folder / "in")
    assert model.tokenizer is None
    scores = evaluate(model, "codebook", "scenes:test", examples=4, batch=4).scores
    assert scores["codebook/images"] == 4 and scores["codebook/tokens"] == 100 and 0 < scores["codebook/usage"] <= 1
    with pytest.raises(ConfigError, match="came without a tokenizer"):
        evaluate(model, "retrieval", "scenes:test", examples=4)


# ---- the codebook ------------------------------------------------------------------------------

def directions(seed, count, width=6):
    x = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def test_codes_stay_unit_vectors_and_the_unused_stay_where_they_are():
    z = directions(0, 40)
    book = codebook.begin(codebook.empty(12, 6), z, codebook.draw(jax.random.key(1), 40, 12))
    start = book["table"]

    @jax.jit
    def follow(book, batch):
        ids = codebook.look_up(batch, book["table"])
        return ids, codebook.follow(book, batch, ids, 0.9)

    for i in range(60):
        batch = directions(i, 40)
        ids, after = follow(book, batch * jnp.sign(batch[:, :1]))      # half of the sphere
        counts, before, book = np.bincount(ids, minlength=12), book["table"], after
        np.testing.assert_allclose(jnp.linalg.norm(book["table"], axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(book["table"][counts == 0], before[counts == 0], atol=1e-6)
    assert np.abs(book["table"] - start).max() > 0.1 and float(book["initted"]) == 1
    again = codebook.begin(book, z, codebook.draw(jax.random.key(2), 40, 12))
    np.testing.assert_array_equal(again["table"], book["table"])      # it begins once


def test_usage_and_perplexity_by_hand():
    count = 0.01 * jnp.asarray([0.99 ** 99, 0.99 ** 101, 0.0, 5.0])      # a vector 99 batches ago, 101 ago, never, and often
    assert float(codebook.usage(count, 0.99)) == 0.5
    np.testing.assert_allclose(codebook.perplexity(jnp.asarray([2.0, 2.0, 0.0, 0.0])), 2, rtol=1e-6)
    starts = codebook.draw(jax.random.key(0), 50, 20)
    assert len(set(starts.tolist())) == 20 and codebook.draw(jax.random.key(0), 5, 20).max() < 5


# ---- stages ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The embedded preset's tokenizer after three steps, with towers of width 32, from an imported CLIP."""
    whole, workdir = config("vqkd"), tmp_path_factory.mktemp("run")
    stage = whole.stages.tokenizer
    for tower in (stage.model.encoder, stage.model.decoder):
        with tower.unlocked():
            tower.update(width=32, heads=2, mlp_dim=64, layers=2)
    stage.model.codes, stage.model.code_width, stage.init = 24, 8, str(folder / "clip")
    stage.data.update(batch=8, prefetch=2, size=40)
    stage.evals, stage.steps, stage.log.every = dict(codebook=dict(kind="codebook", examples=16, batch=8, options=dict(shown=2, nearest=2))), 3, 1
    return whole, vlm_jax.train(whole, workdir, stage="tokenizer"), workdir


def test_a_stage_learns_from_an_imported_teacher_that_stays_as_it_is(folder, trained):
    whole, result, workdir = trained
    before, after = stages.read_weights(folder / "clip"), stages.read_weights(result.folder)
    taken = {p for p in after if p.startswith("teacher/")}
    assert {p.removeprefix("teacher/") for p in taken} == {p for p in before if p.startswith(("image/", "image_head/"))}
    assert all(np.array_equal(after[p], before[p.removeprefix("teacher/")]) for p in taken)
    np.testing.assert_allclose(np.linalg.norm(after["codebook/table"], axis=1), 1, atol=1e-6)
    rows = [row for row in result.rows if "loss" in row]
    assert len(rows) == 3 and all(abs(row["loss"] - row["rec"] - row["commit"]) < 1e-5 for row in rows)
    assert all(0 < row["usage"] <= 1 and 1 <= row["perplexity"] <= 24 for row in rows)
    assert result.scores["codebook/codes"] == 24 and -1 <= result.scores["codebook/cosine"] <= 1
    assert (result.folder / "report" / "codes.png").exists() and "What a code stands for" in (result.folder / "report" / "report.html").read_text()
    own = stages.inherit(config("vqkd"), workdir, "tokenizer").model.teacher      # what the plain command takes: the model of the stage before it
    assert own == config("vqkd").stages.teacher.model


def codebooks(trained, rules, devices, microbatch=0):
    """(codebook, metrics) after two batches from the same weights and key on so many devices."""
    whole, _, workdir = trained
    section = stages.inherit(whole, workdir, "tokenizer")
    section.data.microbatch = microbatch
    stage, mesh = stages.resolve(section, "tokenizer"), partitioning.make_mesh(rules, devices=jax.devices()[:devices])
    leaves = stages.read_weights(trained[1].folder)
    moving = {p: np.zeros(x.shape, x.dtype) for p, x in stage.plan.moving.items()}      # empty again
    with partitioning.use(mesh):
        def place(leaves):
            return {p: jax.device_put(x, partitioning.sharding(mesh, stage.plan.axes[p], x.shape)) for p, x in leaves.items()}

        step = jax.jit(lambda params, moving, batch: stage.system.loss(merge(params, {}, moving), {}, batch, Context(jax.random.key(3), jnp.int32(0)))[1])
        params, moving = place({p: leaves[p] for p in stage.plan.shapes}), place(moving)
        for image in np.random.default_rng(0).integers(0, 255, (2, 8, 40, 40, 3), np.uint8):
            out = step(params, moving, partitioning.place({"image": image}, mesh))
            moving = dict(out.moving)
        return jax.device_get((moving, out.metrics))


def test_the_codebook_is_the_same_on_any_mesh_and_in_micro_batches(trained):
    wanted, metrics = codebooks(trained, "dp", 1)
    assert float(wanted["codebook/initted"]) == 1 and metrics["perplexity"] > 2
    found, other = codebooks(trained, "fsdp", 4, 4)
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, atol=2e-5)
    assert all(abs(other[k] - x) < 1e-4 * max(1, abs(x)) for k, x in metrics.items())


@pytest.mark.parametrize("layers, decoder", [(1, 7.27), (3, 21.4)])
def test_published_sizes(layers, decoder):
    whole = config("vqkd", f"base,layers={layers}")
    clip = config("clip", "b16").stages.pretrain.model
    section = stages.configs.ConfigDict({**whole.stages.tokenizer.to_dict(), "model": {**whole.stages.tokenizer.model.to_dict(), "teacher": clip.to_dict()}})
    plan = stages.resolve(section, "tokenizer").plan
    own = {name: sum(int(np.prod(x.shape)) for p, x in plan.shapes.items() if p.startswith(name + "/")) / 1e6 for name in ("encoder", "decoder", "teacher")}
    assert abs(own["encoder"] - 85.8) < 0.05 and abs(own["decoder"] - decoder) < 0.05 and abs(own["teacher"] - 86.2) < 0.05, own
    assert plan.moving["codebook/table"].shape == (8192, 32)
    assert not any(p.startswith("teacher/") or p.endswith("attn/key/bias") for p in plan.trained)


def test_matrices_into_the_residual_stream_shrink_with_depth(trained):
    whole, _, workdir = trained
    stage = stages.resolve(stages.inherit(whole, workdir, "tokenizer"), "tokenizer")
    params = flatten(jax.tree.map(np.asarray, linen.meta.unbox(jax.jit(lambda key: stage.system.init(key, stage.spec))(jax.random.key(0))))["params"])
    for path in ("encoder/blocks/attn/out/kernel", "encoder/blocks/mlp/down/kernel"):
        found = [float(x.std()) for x in params[path]]
        np.testing.assert_allclose(found, [0.02 * 0.5396 / (2 * layer) ** 0.5 for layer in (1, 2)], rtol=0.1)      # .5396: a normal cut at one sigma
    assert np.abs(params["encoder/blocks/attn/query/kernel"]).max() <= 0.02


@pytest.mark.parametrize("change, message", [
    (lambda s: s.update(init=()), "model.teacher='init' takes the model from what init names, which is nothing"),
    (lambda s: s.model.update(teacher=None), r"model.features=0: without model.teacher .*nearest: 512"),
    (lambda s: s.model.encoder.update(patch=20), "model.teacher.image.patch=8 gives another grid than model.encoder.patch=20; nearest: 20"),
    (lambda s: s.loss.update(decay=1.0), "loss.decay=1.0 must be between 0 and 1; nearest: 0.99"),
    (lambda s: s.loss.update(weights=dict(rec=1.0, comit=1.0)), "comit")])
def test_wrong_sections_are_refused_by_name(trained, change, message):
    whole = stages.configs.ConfigDict(trained[0].to_dict())
    with whole.unlocked(), whole.ignore_type():
        change(whole.stages.tokenizer)
    with pytest.raises((ConfigError, ValueError), match=message):
        stage = stages.resolve(stages.inherit(whole, trained[2], "tokenizer"), "tokenizer")
        jax.eval_shape(lambda: stage.system.loss(stage.system.init(jax.random.key(0), stage.spec), {}, {"image": jnp.zeros((1, 40, 40, 3))},
                                                 Context(jax.random.key(0), jnp.int32(0))))


def test_a_teacher_that_cannot_say_anything_of_a_patch_is_refused():
    clip = stages.configs.to_plain(config("clip").stages.pretrain.model)
    with pytest.raises(ConfigError, match="model.teacher.image_pool='attention': patches do not go through the projection alone"):
        build_teacher(**{k: v for k, v in clip.items() if k != "dtype"}, size=48, compute=jnp.float32)
    with pytest.raises(ConfigError, match="model.teacher.image.tower='resnet' has no token for each patch"):
        build_teacher(image=dict(tower="resnet"), embed=8, size=48, compute=jnp.float32)
