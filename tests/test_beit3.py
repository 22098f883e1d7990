"""BEiT-3 against stored outputs of the official code (microsoft/unilm beit3 768a3c8 on torchscale 0.2.0, its classes on small random weights), and what must
hold of its tower, its masks and its decoding."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import config as config_of
from vlm_jax import partitioning, weight_rules
from vlm_jax import stage as stages
from vlm_jax.data import tokenizers
from vlm_jax.errors import ConfigError
from vlm_jax.importers import beit3 as layout
from vlm_jax.importers import cli, read
from vlm_jax.importers.release import Hints
from vlm_jax.losses.masked import gather_chosen, mask_share
from vlm_jax.models import beit3 as models
from vlm_jax.models import image_codes
from vlm_jax.nn import mlp
from vlm_jax.system import Context
from vlm_jax.systems import beit3
from vlm_jax.train.state import merge, unbox

STORED = pathlib.Path(__file__).parent / "parity" / "official_outputs"
CASES = ("vqa", "nlvr", "classes", "retrieval", "caption", "pretrain")


# ---- the official code

class Case:
    """A stored model: imported, with its inputs as a batch."""

    def __init__(self, name, folder):
        self.name, self.io = name, dict(np.load(STORED / f"beit3_{name}" / "io.npz"))
        self.folder = cli.import_release("beit3", str(STORED / f"beit3_{name}"), folder, say=lambda line: None)
        self.section = stages.configs.from_json((self.folder / "config.json").read_text())
        io, images = self.io, self.io["in_images" if name == "vqa" else "in_image"].transpose(0, 2, 3, 1)
        self.batch = {"image": images}
        if name != "classes":
            ids, padding = (io["in_question_ids"], io["in_padding_mask"]) if name == "vqa" else (io["in_ids"], io["in_pad"])
            self.batch |= {"text": ids.astype(np.int32), "text_mask": padding == 0}
        if name == "nlvr":
            self.batch["images"] = np.stack([self.batch.pop("image"), io["in_image2"].transpose(0, 2, 3, 1)], 1)

    @functools.cached_property
    def stage(self):
        return stages.resolve(self.section, "test")

    def predict(self, section=None, leaves=None):
        stage, leaves = stages.resolve(section, "test") if section else self.stage, leaves or stages.read_weights(self.folder)
        variables = merge({p: leaves[p].reshape(x.shape) for p, x in stage.plan.shapes.items()}, {}, {})
        return stages.bind(stage.system, variables, stages.partitioning.make_mesh("dp", devices=jax.devices()[:1]))

    def differences(self, predict):
        """Largest difference by answer."""
        batch, io = self.batch, self.io
        real = batch.get("text_mask")
        if self.name == "vqa":
            found, fused = predict["answer"](batch), predict["fuse"](batch)
            states = np.concatenate([fused["image"], fused["states"]], 1) - io["out_states"]
            return dict(states=states[np.concatenate([np.ones(fused["image"].shape[:2], bool), real], 1)], pooled=found["pooled"] - io["out_pooled"],
                        logits=found["logits"] - io["out_logits"])
        if self.name in ("nlvr", "classes"):
            return dict(logits=predict["classify"](batch)["logits"] - io["out_logits"])
        if self.name == "retrieval":
            found = predict["embed"](batch)
            return dict(image=found["image_embed"] - io["out_image"], text=found["text_embed"] - io["out_text"])
        if self.name == "caption":
            return dict(logits=(predict["caption_logits"](dict(batch, text=io["in_masked"].astype(np.int32)))["logits"] - io["out_logits"])[real])
        found, alone = predict["fuse"](dict(batch, masked=io["in_mk"])), predict["features"](batch)
        count = found["image"].shape[1]
        return dict(image=found["image"] - io["out_both"][:, :count], states=(found["states"] - io["out_both"][:, count:])[real],
                    mim=found["image_logits"] - io["out_mim"],
                    mlm=(found["text_logits"] - io["out_mlm"])[real], alone=(alone["states"] - io["out_text"])[real])


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return cases(request.param, tmp_path_factory)


MADE = {}      # imported once


def cases(name, factory):
    if name not in MADE:
        MADE[name] = Case(name, factory.mktemp(name) / "in")
    return MADE[name]


def worst(differences):
    return max(float(np.abs(x).max()) for x in differences.values())


def test_states_and_logits_are_the_official_ones(case):
    assert worst(case.differences(case.predict())) < 2e-5
    terms = {"vqa": {"vqa"}, "nlvr": {"cls"}, "classes": {"cls"}, "retrieval": {"itc"}, "caption": {"cap"}, "pretrain": {"mim", "mlm", "pair_mim", "pair_mlm"}}
    assert set(case.section.loss.weights) == terms[case.name]      # told by the file's tensors


@pytest.mark.parametrize("mistake", ["eps", "activation", "swapped", "sub_norm", "rows", "padding", "heads"])
def test_planted_mistakes_show(mistake, tmp_path_factory, monkeypatch):
    case = cases("vqa", tmp_path_factory)
    section, leaves, batch = stages.ConfigDict(case.section.to_dict()), dict(stages.read_weights(case.folder)), dict(case.batch)
    if mistake == "eps":
        section.model.tower.eps = 1e-6
    elif mistake == "heads":
        section.model.tower.heads = 4
    elif mistake == "swapped":
        leaves |= {p: leaves[p.replace("/text/", "/new/").replace("/image/", "/text/").replace("/new/", "/image/")] for p in leaves if p.startswith("blocks/")}
    elif mistake == "rows":
        leaves |= {p: np.roll(leaves[p], 2, 0) for p in ("image/position_embed", "text/position_embed")}
    elif mistake == "sub_norm":
        leaves |= {p: x * 0 + 1 for p, x in leaves.items() if p.endswith("sub_norm/scale")}
    elif mistake == "padding":
        batch["text_mask"] = np.ones_like(batch["text_mask"])
    elif mistake == "activation":
        monkeypatch.setitem(mlp.ACTIVATIONS, "gelu", mlp.ACTIVATIONS["gelu_tanh"])
    found = case.predict(section, leaves)["fuse"](batch)["image"]
    assert np.abs(found - case.io["out_states"][:, :found.shape[1]]).max() > 5e-4


def learned(case):
    """The batch of a stored training step."""
    if case.name == "vqa":
        return dict(case.batch, answer_target=case.io["in_labels"])
    if case.name == "nlvr":
        return dict(case.batch, label=case.io["in_label"].astype(np.int32))
    return dict(case.batch, **({"corrupted": case.io["in_masked"].astype(np.int32), "chosen": case.io["in_chosen"] == 1} if case.name == "caption" else {}))


def value_and_grad(case, step):
    leaves, batch, system = stages.read_weights(case.folder), learned(case), stages.resolve(case.section, "step").system

    @jax.jit
    def run(params, step):
        return jax.value_and_grad(lambda p: system.loss(merge(p, {}, {}), {}, batch, Context(jax.random.key(0), step, train=False))[0])(params)
    return jax.device_get(run({p: leaves[p] for p in case.stage.plan.shapes}, jnp.int32(step)))


@pytest.mark.parametrize("name", ["vqa", "nlvr", "retrieval", "caption"])
def test_losses_and_gradients_are_the_official_ones(name, tmp_path_factory):
    case = cases(name, tmp_path_factory)
    if name == "caption":
        case.section.loss.update(dict(drop_worst=0.2, drop_worst_after=10))
        assert abs(value_and_grad(case, 0)[0] - case.io["out_loss_0"]) < 1e-5
    value, grads = value_and_grad(case, 100)
    assert abs(value - case.io["out_loss_100" if name == "caption" else "out_loss"]) < 1e-5
    stored = STORED / "beit3_vqa" / "grads.safetensors"
    wanted = {k.removeprefix("grad/"): x for k, x in case.io.items() if k.startswith("grad/")}
    if name == "vqa":
        wanted = {k: x.read() for k, x in read.open_weights(stored).items()}
    found = weight_rules.export_leaves(layout.RULES, grads, "gradients")
    for key, x in wanted.items():
        np.testing.assert_allclose(found[key].reshape(x.shape), x, rtol=0, atol=1e-3 * np.abs(x).max() + 2e-6, err_msg=key)
    if name == "vqa":
        norms = [np.linalg.norm(found[key]) for key in json.loads((STORED / "beit3_vqa" / "config.json").read_text())["param_order"]]
        np.testing.assert_allclose(norms, case.io["out_grad_norm"], rtol=1e-3, atol=1e-5)
    assert not found["beit3.vision_embed.mask_token"].any()


def test_captions_are_the_official_beams(tmp_path_factory):
    case = cases("caption", tmp_path_factory)
    predict, images = case.predict(), case.io["in_many"].transpose(0, 2, 3, 1)
    for name in (n for n in case.io if n.startswith("out_beam")):
        length, beams, penalty = name.split("_")[2:]
        found = predict["generate"]({"image": images}, method="beam", beams=int(beams), max_length=int(length), length_penalty=float(penalty))["text"]
        for ours, theirs in zip(found.tolist(), case.io[name].tolist(), strict=True):
            theirs = [i for i in theirs if i != 39]      # its decoder skips the mask that stands before the end
            assert ours[:ours.index(2) + 1] == theirs[:theirs.index(2) + 1], name
    lengths = (case.io["out_beam_8_3_0.6"] == 2).argmax(1)
    assert lengths.min() < 4 and lengths.max() == 7      # early ends, and captions that were cut


def test_decoding_step_by_step_says_what_the_whole_text_says(tmp_path_factory):
    case = cases("caption", tmp_path_factory)
    predict, images = case.predict(), case.batch["image"]
    found = predict["generate"]({"image": images}, max_length=7)["text"]
    for length in range(1, 6):      # at each mask stands what a pass over the whole text would say
        ids = np.concatenate([found[:, :length], np.full((len(found), 1), 39, np.int32)], 1)
        said = predict["caption_logits"]({"image": images, "text": ids, "text_mask": np.ones(ids.shape, bool)})["logits"][:, -1].argmax(-1)
        running = ~(found[:, :length] == 2).any(1)
        np.testing.assert_array_equal(found[running, length], said[running])


def test_exporting_an_import_gives_the_source_back_bit_for_bit(case, tmp_path):
    out = cli.export_release("beit3", case.folder, tmp_path / "out", say=lambda line: None)
    source, back = read.open_weights(STORED / f"beit3_{case.name}" / "weights.safetensors"), read.open_weights(out)
    assert set(back) == set(source) and all(back[n].shape == source[n].shape and np.array_equal(back[n].read(), source[n].read()) for n in source)
    if case.name == "caption":      # and the config beside it is enough to come in again
        again = cli.import_release("beit3", str(out), tmp_path / "again", say=lambda line: None)
        assert stages.configs.from_json((again / "config.json").read_text()).model == stages.configs.from_json((case.folder / "config.json").read_text()).model


def test_positions_are_resized_without_antialias_and_keep_their_first_three_rows(tmp_path):
    source, where = str(STORED / "beit3_retrieval"), "image/position_embed"
    given = read.open_weights(STORED / "beit3_retrieval" / "weights.safetensors")["beit3.encoder.embed_positions.A.weight"].read()
    found = stages.read_weights(cli.import_release("beit3", source, tmp_path / "in", Hints(size=36), say=lambda line: None))[where]
    assert given.shape[0] == 19 and found.shape[0] == 39
    np.testing.assert_array_equal(found[:3], given[:3])
    np.testing.assert_allclose(found[3:], weight_rules.resize_grid(given[3:], 36, "border"), atol=1e-6)
    assert np.abs(found[3:] - weight_rules.resize_grid(given[3:], 36, "antialias")).max() > 1e-2


# ---- the tower

FIELDS = dict(image_size=12, patch=4, width=16, layers=2, heads=2, mlp_dim=24, vocab=20, positions=12)
IMAGE = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
IDS = jnp.array([[0, 5, 6, 7, 2, 1], [0, 8, 2, 1, 1, 1]])
REAL = jnp.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], bool)
PATCHES = 10      # with the class token


@functools.cache
def tower(**fields):
    """(module, parameters by path)."""
    module = models.Tower(**{**FIELDS, **fields})
    params, _, _ = unbox(jax.jit(module.init)(jax.random.key(1), IMAGE, IDS))
    keys = iter(jax.random.split(jax.random.key(2), len(params)))
    return module, {p: x + 0.3 * jax.random.normal(next(keys), x.shape) for p, x in params.items()}


@functools.cache
def compiled(module, unidirectional):
    run = lambda params, *args: module.apply(merge(params, {}, {}), *args, unidirectional=unidirectional)      # noqa: E731
    return jax.jit(run), jax.jit(jax.grad(lambda *args: jnp.square(run(*args)).sum()))


def states(module, params, image, ids, real=REAL, masked=None, unidirectional="none"):
    return compiled(module, unidirectional)[0](params, image, ids, None if ids is None else real, masked)


def idle(module, params, *args):
    return {p for p, g in compiled(module, "none")[1](params, *args).items() if not np.abs(g).max()}


def test_a_modality_alone_teaches_its_own_parameters():
    module, params = tower()
    mine = {e: {p for p in params if f"/{e}/" in f"/{p}"} for e in ("image", "text")}
    assert mine["image"] | mine["text"] == set(params)
    assert idle(module, params, IMAGE, None) == mine["text"] | {"image/mask_embed"}
    assert idle(module, params, None, IDS, REAL) == mine["image"]
    assert idle(module, params, IMAGE, IDS, REAL, jnp.ones((2, 9), bool).at[:, 2].set(False)) == set()


def test_pairs_meet_in_one_softmax():
    """With the texts' values zero, what a text is still changes what an image is: by the denominator alone."""
    module, params = tower(layers=1)
    params = {p: 0 * x if "attn/text/value" in p else x for p, x in params.items()}
    first, second = (states(module, params, IMAGE, ids)[:, :PATCHES] for ids in (IDS, IDS.at[:, 1].set(11)))
    assert np.abs(first - second).max() > 1e-4
    hidden = jnp.zeros(IDS.shape, bool)
    first, second = (states(module, params, IMAGE, ids, hidden)[:, :PATCHES] for ids in (IDS, IDS.at[:, 1].set(11)))
    np.testing.assert_array_equal(first, second)


def test_dead_rows_are_never_read():
    module, params = tower()
    broken = params | {f"{e}/position_embed": params[f"{e}/position_embed"].at[:2].set(jnp.nan) for e in ("image", "text")}
    for args in ((IMAGE, IDS, REAL), (IMAGE, None), (None, IDS, REAL)):
        np.testing.assert_array_equal(states(module, broken, *args), states(module, params, *args))


def test_nothing_real_depends_on_padding_nor_a_caption_on_what_comes_later():
    module, params = tower()
    other = jnp.where(REAL, IDS, 9)
    real = np.concatenate([np.ones((2, PATCHES), bool), REAL], 1)
    for mode in models.UNIDIRECTIONAL:
        found = [np.asarray(states(module, params, IMAGE, ids, REAL, unidirectional=mode))[real] for ids in (IDS, other)]
        np.testing.assert_array_equal(*found)
    later = IDS.at[:, 2:].set(13)
    both = [states(module, params, IMAGE, ids, unidirectional="text") for ids in (IDS, later)]
    np.testing.assert_allclose(both[0][:, :PATCHES + 2], both[1][:, :PATCHES + 2], atol=1e-6)
    assert np.abs(both[0][:, PATCHES + 2:] - both[1][:, PATCHES + 2:]).max() > 1e-2
    np.testing.assert_allclose(both[0][:, :PATCHES], states(module, params, IMAGE, None), atol=1e-5)      # images see themselves
    assert np.abs(states(module, params, IMAGE, IDS)[:, 0] - states(module, params, IMAGE, later)[:, 0]).max() > 1e-2
    with pytest.raises(ValueError, match="unidirectional='txt' is not known; nearest: 'text'"):
        states(module, params, IMAGE, IDS, unidirectional="txt")


def test_masked_patches_are_seen_as_places_only():
    module, params = tower()
    masked = jnp.zeros((2, 9), bool).at[:, 4].set(True)
    other = IMAGE.at[:, 4:8, 4:8].set(2.0)      # the fifth patch
    np.testing.assert_array_equal(states(module, params, IMAGE, None, None, masked), states(module, params, other, None, None, masked))
    assert np.abs(states(module, params, IMAGE, None) - states(module, params, other, None)).max() > 1e-2


def test_the_paper_s_tower_has_an_expert_for_pairs_in_its_top_layers():
    module, params = tower(attention="shared", joint_layers=1)
    joint = {p for p in params if "/joint/" in p}
    assert joint and all(p.startswith("blocks_joint/") for p in joint) and "blocks/attn/all/query/kernel" in params
    assert joint <= idle(module, params, IMAGE, None) and joint <= idle(module, params, None, IDS, REAL)
    above = {p for p in params if p.startswith("blocks_joint/mlp/") and p not in joint}
    assert idle(module, params, IMAGE, IDS) == above | {"image/mask_embed", *(p for p in params if p.startswith("blocks_joint/norm2/") and p not in joint)}


def count(name, stage, keep=lambda path, plan: not path.startswith("tokenizer/")):
    section = config_of("beit3", name).stages[stage]
    plan = stages.resolve(section, stage).plan
    return sum(int(np.prod(x.shape)) for p, x in plan.shapes.items() if keep(p, plan)) / 1e6


def test_sizes_are_the_published_ones():
    for size, stage, millions in (("base", "pretrain", 276.51), ("base", "itc", 222.17), ("base", "caption", 270.75), ("base", "vqa", 228.11),
                                  ("base", "nlvr", 225.72),
                                  ("large", "pretrain", 746.71), ("large", "vqa", 682.99)):
        assert round(count(size, stage), 2) == millions, (size, stage)
    assert round(count("base", "classes", lambda p, plan: p in plan.trainable), 1) == 86.7

    def kernels(part):
        return round(count("giant", "itc", lambda p, plan: p.endswith("kernel") and part in p), 1)
    assert (kernels("mlp/image/"), kernels("mlp/text/"), kernels("mlp/joint/"), kernels("attn/")) == (692.1, 692.1, 51.9, 317.2)


# ---- masked data modelling

def test_a_fixed_share_of_a_text_is_masked():
    ids, real = jnp.tile(jnp.arange(4, 24)[None], (400, 1)), jnp.arange(20)[None] < jnp.array([20, 12, 3, 2] * 100)[:, None]
    corrupted, chosen = jax.jit(functools.partial(mask_share, share=0.5, mask_id=30))(jax.random.key(0), ids, real)
    assert (np.asarray(chosen.sum(1)).reshape(-1, 4) == (10, 6, 2, 1)).all() and not chosen[:, 0].any() and not (chosen & ~real).any()
    changed = np.asarray(corrupted)[np.asarray(chosen)]
    assert abs((changed == 30).mean() - 0.8 - 0.1 / 28) < 0.03 and changed.min() >= 3 and changed.max() <= 30
    assert (np.asarray(corrupted == ids) | np.asarray(chosen)).all()
    at, valid = gather_chosen(chosen, 10)
    assert (np.asarray(valid.sum(1)) == np.asarray(chosen.sum(1))).all() and jnp.take_along_axis(chosen, at, 1)[valid].all()


@functools.cache
def tiny(stage="pretrain", **loss):
    """(stage of the embedded preset with a small tower, its parameters, a batch)."""
    section = config_of("beit3", "targets=colours").stages[stage]
    section.model.tower.update(dict(variant="mini", width=16, heads=2, layers=2, mlp_dim=24))
    section.data.batch = 6
    section.loss.update(loss)
    made = stages.resolve(section, stage)
    params, _, _ = unbox(jax.jit(lambda k: made.system.init(k, made.spec))(jax.random.key(0)))
    with made.train_batches(made.open(made.data.train), 0, 1, pathlib.Path("/dev/null")) as batches:
        batch = {k: jnp.asarray(v) for k, v in next(iter(batches))[1].items() if k in made.spec}
    return made, params, batch


@functools.cache
def system_of(name, train, loss):
    made = tiny(name, **dict(loss))[0]
    run = lambda params, batch: made.system.loss(merge(params, {}, {}), {}, batch, Context(jax.random.key(3), jnp.int32(0), train=train))      # noqa: E731
    return jax.jit(run), jax.jit(jax.value_and_grad(lambda *args: run(*args)[0]))


def loss_of(name, params, batch, train=True, **loss):
    """(loss, metrics) of a stage of ``tiny``."""
    value, out = system_of(name, train, tuple(loss.items()))[0](params, batch)
    return value, out.metrics


def test_each_stream_looks_at_its_own_rows_and_side():
    made, params, batch = tiny()
    run = lambda b: loss_of("pretrain", params, b)[1]      # noqa: E731
    before = run(batch)
    assert {"mim", "mlm", "pair_mim", "pair_mlm"} <= set(before)
    assert abs(float(before["mlm"]) - np.log(made.config.model.tokens.vocab)) < 0.5 and abs(float(before["mim"]) - np.log(512)) < 0.5
    for row, key, terms in ((0, "image", {"mim"}), (1, "text", {"mlm"}), (2, "image", {"pair_mim", "pair_mlm"}), (0, "text", set()), (1, "image", set()),
                            (4, "text", {"mlm"})):
        value = jax.random.randint(jax.random.key(row), batch[key].shape[1:], 4, 90).astype(batch[key].dtype)
        after = run(batch | {key: batch[key].at[row].set(value)})
        assert {t for t in ("mim", "mlm", "pair_mim", "pair_mlm") if abs(float(after[t] - before[t])) > 1e-7} == terms, (row, key)


def test_losses_are_of_masked_places_alone():
    """Against the definition: cross-entropy at the places that the masks of these keys have."""
    made, params, batch = tiny()
    masked = beit3.block_mask(Context(jax.random.key(3), jnp.int32(0)).key("image_image"), 2, 6, 14, 3)

    @jax.jit
    def each(params, images):
        apply = functools.partial(beit3.run, made.system.model, merge(params, {}, {}))
        logits = apply(beit3.Beit3.patches, apply(beit3.Beit3.encode, images, None, None, masked)[:, 1:])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), apply(beit3.Beit3.codes, images)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss_of("pretrain", params, batch)[1]["mim"], each(params, batch["image"][::3])[masked].mean(), rtol=1e-5)


def test_a_pair_may_have_one_side_masked():
    _, params, batch = tiny()
    found, both = loss_of("pretrain", params, batch, pair_masks="one")[1], loss_of("pretrain", params, batch)[1]
    assert all(np.isfinite(x) for x in found.values())
    assert float(found["mim"]) == float(both["mim"]) and float(found["pair_mlm"]) != float(both["pair_mlm"])


def test_colours_are_bins_of_each_patch_s_mean():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[0, :4, 4:] = (255, 128, 31)
    ids = image_codes.Colours(4, 8)(jnp.asarray(image))
    assert ids.tolist() == [[0, 7 * 64 + 4 * 8 + 0, 0, 0]] and image_codes.Colours(4, 8).codes == 512
    np.testing.assert_array_equal(ids, image_codes.Colours(4, 8)(jnp.asarray(image / 255.0)))


def test_a_trained_tokenizer_lives_in_the_model_and_stays_as_it_is():
    section = config_of("beit3", "targets=colours").stages.pretrain
    section.model.tower.update(dict(width=16, heads=2, layers=2, mlp_dim=24))
    section.model.targets = dict(kind="vqkd", encoder=dict(variant="mini", width=16, heads=2, layers=1, mlp_dim=24), codes=32, code_width=4)
    section.trainable, section.data.batch, section.loss = (r"(?!tokenizer/).*",), 3, dict(weights=dict(mim=1.0), image_masked=14, mask_min_cells=3)
    made = stages.resolve(section, "pretrain")
    own = {p for p in made.plan.shapes if p.startswith("tokenizer/")}
    assert {"tokenizer/table", "tokenizer/encoder/blocks/attn/query/kernel", "tokenizer/encoder_head/out/kernel"} <= own and not own & set(made.plan.trainable)
    params, _, _ = unbox(jax.jit(lambda k: made.system.init(k, made.spec))(jax.random.key(0)))
    image = jax.random.randint(jax.random.key(1), (3, 48, 48, 3), 0, 255).astype(jnp.uint8)
    ids = jax.jit(lambda p: beit3.run(made.system.model, merge(p, {}, {}), beit3.Beit3.codes, image))(params)
    assert ids.shape == (3, 36) and 0 <= int(ids.min()) and int(ids.max()) < 32 and len(np.unique(ids)) > 1
    batch = {"image": image, "text": jnp.full((3, 32), 5), "text_mask": jnp.ones((3, 32), bool)}
    grads = jax.jit(jax.grad(lambda p: made.system.loss(merge(p, {}, {}), {}, batch, Context(jax.random.key(3), jnp.int32(0)))[0]))(params)
    assert not any(np.abs(grads[p]).max() for p in own) and np.abs(grads["mim_head/kernel"]).max() > 0


@pytest.mark.parametrize("name, rules, devices", [("itc", "dp", 4), ("pretrain", "dp", 2)])
def test_the_global_batch_s_loss_and_gradient_on_any_mesh(name, rules, devices):
    made, params, batch = tiny(name)
    if name == "itc":
        batch = {k: jnp.concatenate([v, v[:2, ::-1]]) for k, v in batch.items() if k in ("image", "text", "text_mask")}
    value, gradient = system_of(name, True, ())
    run = gradient if name == "itc" else lambda *args: (value(*args)[0], {})
    wanted, grads = run(params, batch)
    mesh = partitioning.make_mesh(rules, devices=jax.devices()[:devices])
    with partitioning.use(mesh):
        placed = {p: jax.device_put(x, partitioning.sharding(mesh, made.plan.axes[p], x.shape)) for p, x in params.items()}
        found, found_grads = run(placed, partitioning.place(batch, mesh))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for path, g in grads.items():
        np.testing.assert_allclose(found_grads[path], g, atol=2e-5 * max(1.0, float(np.abs(g).max())), err_msg=path)


# ---- answers

def test_a_listed_answer_is_chosen_among_candidates():
    made, params, batch = tiny("vqa")
    assert [i for i in made.config.model.answer_ids[0] if i != made.tokenizer.pad_id] == made.tokenizer.encode("yes")
    leaves = {p: x + 0.3 * jax.random.normal(jax.random.key(5), x.shape) for p, x in params.items()}
    predict = stages.bind(made.system, merge(leaves, {}, {}), partitioning.make_mesh("dp", devices=jax.devices()[:1]))
    asked = {k: np.asarray(batch[k]) for k in ("image", "text", "text_mask")}
    whole = predict["answer"](asked)
    candidates = ["a very strange answer", *made.config.model.answers[::-1]]
    ids, mask, _ = made.tokenizer(candidates, 10)
    found = predict["answer"](asked | {"candidates": ids, "candidates_mask": mask}, method="rank", k=3)
    assert [candidates[i] for i in found["answer"]] == [made.config.model.answers[i] for i in whole["answer"]]
    np.testing.assert_allclose(found["score"], whole["logits"].max(1), rtol=1e-6)
    value, metrics = loss_of("vqa", leaves, batch)
    assert np.isfinite(value) and metrics["listed"] == 1
    none = loss_of("vqa", leaves, batch | {"answer_target": jnp.zeros(whole["logits"].shape)})[0]
    np.testing.assert_allclose(none, jax.nn.softplus(whole["logits"]).sum(1).mean(), rtol=1e-5)


def test_soft_scores_follow_how_many_of_ten_gave_an_answer():
    made, params, batch = tiny("vqa")
    listed = made.config.model.answers[:5]
    ids, mask, _ = made.tokenizer(listed, 8)
    answer = jnp.tile(jnp.asarray(ids)[None], (6, 1, 1))
    weight = jnp.tile(jnp.array([[0.1, 0.2, 0.3, 0.4, 0.0]]), (6, 1))
    found = loss_of("vqa", params, batch | {"answer": answer, "answer_mask": jnp.tile(jnp.asarray(mask)[None], (6, 1, 1)), "answer_weight": weight})[0]
    target = jnp.zeros((6, len(made.config.model.answers))).at[:, :5].set(jnp.array([0.3, 0.6, 0.9, 1.0, 0.0]))
    np.testing.assert_allclose(found, loss_of("vqa", params, batch | {"answer_target": target})[0], rtol=1e-6)


def test_images_with_classes_are_mixed_in_training_alone(tmp_path_factory):
    case = cases("classes", tmp_path_factory)
    section, leaves = stages.ConfigDict(case.section.to_dict()), stages.read_weights(case.folder)
    system = stages.resolve(section, "plain").system
    with section.unlocked():
        section.loss.update(mixup=0.8, cutmix=1.0)
    mixed, found = stages.resolve(section, "mixed").system, {}
    batch = {"image": case.batch["image"], "label": jnp.arange(len(case.batch["image"])) % 2}
    for train in (False, True):
        context = Context(jax.random.key(0), jnp.int32(0), train=train)
        found[train] = [float(jax.jit(lambda p, s=s, c=context: s.loss(merge(p, {}, {}), {}, batch, c)[0])(leaves)) for s in (system, mixed)]
    assert found[False][0] == found[False][1] and found[True][0] != found[True][1] and np.isfinite(found[True]).all()


# ---- sections, tokenizer

def rewritten(section, **model):
    section.model = {**{k: v for k, v in section.model.to_dict().items() if k not in model}, **model}


@pytest.mark.parametrize("stage, change, message", [
    ("pretrain", lambda s: s.loss.update(mixup=0.8), "loss.mixup=0.8: mixtures are of images with classes"),
    ("pretrain", lambda s: s.data.update(images=0), "data.images=0, but of loss.weights only mlm learns from texts alone; nearest: 1"),
    ("pretrain", lambda s: s.loss.weights.update(mlmm=1.0), "loss.weights.mlmm=1.0 is not a term; nearest: 'mlm'"),
    ("pretrain", lambda s: s.loss.update(pair_masks="bot"), "loss.pair_masks='bot' is not known; nearest: 'both'"),
    ("pretrain", lambda s: s.loss.update(image_masked=75), "loss.image_masked=75 of 36 patches; nearest: 14"),
    ("pretrain", lambda s: s.data.update(batch=64), r"data.batch=64 does not divide into groups of 3 rows \(loss.streams\); nearest: 63"),
    ("pretrain", lambda s: s.loss.update(streams=dict(text=0)), "loss.weights.mlm=1.0, but loss.streams.text=0; nearest: loss.streams.text=1"),
    ("pretrain", lambda s: s.model.targets.update(kind="colour"), "targets.kind='colour' is not known; nearest: 'colours'"),
    ("itc", lambda s: s.data.update(microbatch=48), "data.microbatch=48 is not supported by beit3"),
    ("vqa", lambda s: s.data.update(answers=0, answer_length=0), "data.answers=0, but a system that answers learns from answers"),
    ("vqa", lambda s: s.model.update(classes=7), "model.classes=7, but model.answers are"),
    ("vqa", lambda s: rewritten(s, answers="answrs.txt"), "stages.wrong.model.answers='answrs.txt': no such file"),
    ("nlvr", lambda s: s.data.update(images=1), "data.classes|model"),
    ("caption", lambda s: s.data.update(length=64), "data.length=64 exceeds the 50 places of model.tower.positions=52; nearest: 50")])
def test_wrong_sections_are_refused_by_name(stage, change, message):
    section = config_of("beit3", "targets=colours").stages[stage]
    change(section)
    if message.startswith("data.classes|"):      # one image beside no text: another head, and no error
        assert "class_head/out/kernel" in stages.resolve(section, "other").plan.shapes
        return
    with pytest.raises(ConfigError, match=message):
        stages.resolve(section, "wrong")


def test_ids_are_counted_as_xlmr_counts_them(tmp_path):
    import sentencepiece
    lines = ["a red circle above a blue square", "two green stars", "the yellow heart is left of the cross"] * 5
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(tmp_path / "spm"), vocab_size=60, hard_vocab_limit=False,
                                             model_type="unigram",
                                             unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)      # beit3.spm's own ids
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    found = tokenizers.load(f"xlmr:{tmp_path / 'spm.model'}")
    assert (found.bos_id, found.pad_id, found.eos_id, found.mask_id, found.vocab_size) == (0, 1, 2, plain.vocab_size() + 1, plain.vocab_size() + 2)
    assert found.encode("a red star") == [0, *(i + 1 for i in plain.encode("a red star")), 2]
    assert 3 in found.encode("%") and found.decode(found.encode("a red star") + [1, 1]) == "a red star"
    assert found.decode([0, *found.encode("two stars")[1:-1], found.mask_id, 2]) == "two stars"
    found.save(str(tmp_path / "saved"))
    assert tokenizers.load(str(tmp_path / "saved")).fingerprint() == found.fingerprint()
