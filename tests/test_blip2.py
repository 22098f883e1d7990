"""BLIP-2 against stored outputs of the official code (salesforce/LAVIS 506965b with transformers 4.33.2, on small random weights): stage 1 and 2 with EVA; with
CLIP's eye, and with T5, at odd sizes that differ from each other and 7 layers of which every third has cross-attention."""

import functools
import json
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import config
from vlm_jax import partitioning, weight_rules
from vlm_jax import stage as stages
from vlm_jax.errors import ConfigError
from vlm_jax.evals import rank
from vlm_jax.importers import blip2 as layouts
from vlm_jax.importers import cli, read, write
from vlm_jax.importers.release import Hints
from vlm_jax.losses.matching import draw
from vlm_jax.losses.query_contrastive import most_similar, query_contrastive
from vlm_jax.models.decoder import positions_of
from vlm_jax.models.qformer import QFormer
from vlm_jax.system import Context
from vlm_jax.train.state import merge

STORED = pathlib.Path(__file__).parent / "parity" / "official_outputs"
STAGE1 = ("blip2_stage1_eva", "blip2_odd_clip")
CASES = (*STAGE1, "blip2_stage2_opt", "blip2_odd_t5")
STILL = Context(jax.random.key(0), jnp.int32(0), train=False)


class Case:
    """A stored model: imported, with its inputs as batches and what it answers."""

    def __init__(self, name, folder):
        self.name, self.source, self.io = name, STORED / name, dict(np.load(STORED / name / "io.npz"))
        self.folder = cli.import_release("blip2", str(self.source), folder, say=lambda line: None)
        self.section = stages.configs.from_json((self.folder / "config.json").read_text())
        self.rows = len(self.io["in_images"])
        self.section.data.batch = self.rows
        self.weights = stages.read_weights(self.folder)
        self.image = {"image": self.io["in_images"].transpose(0, 2, 3, 1)}
        ids = "in_text_ids" if name == "blip2_odd_t5" else "in_input_ids"
        mask = "in_text_mask" if name == "blip2_odd_t5" else "in_attention_mask"
        self.batch = {**self.image, "text": self.io[ids].astype(np.int32), "text_mask": self.io[mask].astype(bool)}
        self.mask = self.batch["text_mask"]
        self.compiled = {}

    def stage(self, **changes):
        """The stage with other keys of its model ("qformer.eps") or loss."""
        section = stages.ConfigDict(self.section.to_dict())
        with section.unlocked():
            for key, value in changes.items():
                *path, last = key.split("__")
                functools.reduce(lambda at, part: at[part], path, section)[last] = value
        return stages.resolve(section, "test")

    @functools.cached_property
    def resolved(self):
        return self.stage()

    @property
    def variables(self):
        return merge(self.weights, {}, {})

    def run(self, stage, variables=None, of="all"):
        """How far what the stage's predict functions give is from the stored outputs, in units of the tolerance; ``of`` "features": of states alone."""
        predict, io = stage.system.predict, self.io
        first, second = np.divmod(np.arange(self.rows ** 2), self.rows)

        def stage1(variables, batch):
            found = predict["features"](variables, batch)
            out = {"out_image_embeds": found["image"], "out_query_states": found["queries"], "out_text_states": found["states"]}
            if of == "features":
                return out
            embeds = predict["embed"](variables, batch)
            pairs = {"image": batch["image"][first], "text": batch["text"][second], "text_mask": batch["text_mask"][second]}
            return {**out, "out_image_feats": embeds["image_embed"], "out_text_feat": embeds["text_embed"],
                    "out_itm_logits_all": predict["match"](variables, pairs)["match"].reshape(self.rows, self.rows, 2),
                    "out_itg_logits": predict["caption_logits"](variables, batch)["logits"]}

        def stage2(variables, batch):
            found = predict["features"](variables, batch)
            return {"out_image_embeds": found["image"], "out_prefix": found["prefix"], "out_logits": predict["caption_logits"](variables, batch)["logits"]}

        variables = variables or merge({p: self.weights[p].reshape(x.shape) for p, x in stage.plan.shapes.items()}, {}, {})
        found = jax.device_get(jax.jit(stage1 if "embed" in predict else stage2)(variables, self.batch))
        if "out_logits" in found and "out_logits" in io:
            queries = io["out_prefix"].shape[1]
            io = {**io, "out_logits": io["out_logits"][:, queries - 1:-1]}
        far = {}
        for name, x in found.items():
            if name in io:
                off = np.abs(x - io[name])
                off = off[self.mask] if name in ("out_text_states", "out_itg_logits", "out_logits") else off
                far[name] = float(off.max()) / (1e-3 if "logits" in name else 1e-4)
        return far

    def texts(self, name, stage=None, **options):
        """What a predict function writes; ``answer`` reads the stored question."""
        batch = dict(self.image)
        if self.name == "blip2_odd_t5":
            batch |= {"prompt": self.io["in_prompt_ids"].astype(np.int32), "prompt_mask": self.io["in_prompt_mask"].astype(bool)}
        elif name == "answer":
            batch |= {"prompt": self.io["in_question_ids"].astype(np.int32), "prompt_mask": self.io["in_question_mask"].astype(bool)}
        predict = (stage or self.resolved).system.predict[name]
        return np.asarray(jax.jit(lambda v, b: predict(v, b, **options)["text"])(self.variables, batch))

    def loss(self, stage, batch):
        """(loss, metrics) of a batch, nothing dropped."""
        if id(stage) not in self.compiled:
            def run(variables, batch):
                value, out = stage.system.loss(variables, {}, batch, STILL)
                return value, out.metrics
            self.compiled[id(stage)] = jax.jit(run), stage
        return jax.device_get(self.compiled[id(stage)][0](self.variables, batch))

    def learn(self, stage, batch):
        """(loss, metrics, gradients) of a batch, nothing dropped."""
        params = {p: jnp.asarray(self.weights[p]) for p in stage.plan.trained}
        held = {p: jnp.asarray(self.weights[p]) for p in stage.plan.frozen}

        @jax.jit
        def run(params, held, batch):
            def loss(params):
                value, out = stage.system.loss(merge(params, held, {}), {}, batch, STILL)
                return value, out.metrics
            return jax.value_and_grad(loss, has_aux=True)(params)

        (value, metrics), grads = jax.device_get(run(params, held, batch))
        return value, metrics, grads

    def official_gradients(self, grads):
        """path -> (ours, theirs), without the keys' biases, whose gradient is rounding noise."""
        theirs = {n: t.read() for n, t in read.open_weights(self.source / "grads.safetensors").items()}
        table = layouts.rules(stages.configs.to_plain(self.section), {n: x.shape for n, x in theirs.items()})
        out = {}
        for path, x in grads.items():
            if not path.endswith("/key/bias") and not path.startswith(("image/", "language/")):
                out[path] = x, weight_rules.value(path, x.shape, *weight_rules.first_match(table, path)[1:], theirs, "gradients")
        return out


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """name -> Case, made once."""
    return functools.cache(lambda name: Case(name, tmp_path_factory.mktemp(name) / "in"))


# ---- parity

@pytest.mark.parametrize("name", CASES)
def test_states_and_logits_are_the_official_ones(opened, name):
    far = opened(name).run(opened(name).resolved)
    assert far and max(far.values()) <= 1, far


@pytest.mark.parametrize("name, change, output", [
    ("blip2_stage1_eva", dict(model__eps=1e-6, model__qformer__eps=1e-5), "out_image_embeds"),
    ("blip2_stage1_eva", dict(model__qformer__heads=1), "out_query_states"), ("blip2_stage2_opt", dict(model__language__eps=1e-4), "out_logits"),
    ("blip2_odd_clip", dict(model__image__activation="gelu"), "out_image_embeds")])
def test_a_planted_mistake_shows(opened, name, change, output):
    assert opened(name).run(opened(name).stage(**change), of="features")[output] > 5


def test_the_two_feed_forward_parts_are_not_mixed_up(opened):
    case = opened("blip2_stage1_eva")
    other = {"query": "text", "text": "query"}
    swapped = {p: case.weights["/".join(other.get(part, part) for part in p.split("/")) if "/mlp/" in p else p] for p in case.weights}
    far = case.run(case.resolved, merge(swapped, {}, {}), of="features")
    assert far["out_query_states"] > 5 and far["out_text_states"] > 5


@pytest.mark.parametrize("name", STAGE1)
def test_a_step_of_stage_1_has_the_official_losses(opened, name):
    case = opened(name)
    batch = {**case.batch, "negative_image": case.io["in_neg_image_idx"], "negative_text": case.io["in_neg_text_idx"], "image_id": np.arange(case.rows)}
    value, metrics, *grads = (case.learn if name == "blip2_stage1_eva" else case.loss)(case.resolved, batch)
    assert abs(value - case.io["out_loss"]) < 1e-4
    for ours, theirs in (("itc", "itc"), ("itm", "itm"), ("itg", "lm")):
        assert abs(metrics[ours] - case.io[f"out_loss_{theirs}"]) < 1e-4, ours
    if not grads:
        return
    compared = case.official_gradients(grads[0])
    assert len(compared) == len([p for p in case.weights if not p.startswith("image/") and not p.endswith("/key/bias")])
    for path, (ours, theirs) in compared.items():
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), path


def test_gathered_features_carry_no_gradient_unless_asked_to(opened):
    """Row i's loss alone moves row i's features; otherwise both sides of each pair move."""
    case = opened("blip2_stage1_eva")
    image, text = jnp.asarray(case.io["out_image_feats"]), jnp.asarray(case.io["out_text_feat"])
    def asked_of_images(image):
        target = 0.9 * jnp.eye(4) + 0.1 / 4
        return -(target * jax.nn.log_softmax(most_similar(image, text) / 0.13)).sum(1).mean() / 2

    own, both = (jax.grad(lambda image, how=how: query_contrastive(image, text, jnp.float32(0.13), smoothing=0.1, gathered=how)[0])(image)
                 for how in ("constant", "learned"))
    wanted = jax.grad(asked_of_images)(image)
    np.testing.assert_allclose(own, wanted, atol=1e-6)
    assert np.abs(both - own).max() > 0.1


def test_texts_of_one_image_are_its_positives(opened):
    case = opened("blip2_stage1_eva")
    image, text = jnp.asarray(case.io["out_image_feats"]), jnp.asarray(case.io["out_text_feat"])
    loss, similar = query_contrastive(image, text, jnp.float32(0.13), ids=jnp.asarray(case.io["in_image_ids"]), smoothing=0.1)
    assert abs(loss - case.io["out_loss_itc_ids"]) < 1e-5
    np.testing.assert_allclose(similar["image_to_text"], case.io["out_sim_i2t"], atol=1e-4)
    np.testing.assert_allclose(similar["text_to_image"], case.io["out_sim_t2i"], atol=1e-4)


def test_a_step_of_stage_2_has_the_official_loss(opened):
    case = opened("blip2_stage2_opt")
    stage = case.stage(trainable=(r"(?!(image|language)/).*",))
    told = {**case.batch, "target_mask": case.io["out_labels"][:, case.io["out_prefix"].shape[1]:] >= 0}
    value, _, grads = case.learn(stage, told)
    assert abs(value - case.io["out_loss"]) < 1e-4 and not any(p.startswith(("image/", "language/")) for p in grads)
    for path, (ours, theirs) in case.official_gradients(grads).items():
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), path
    # without a prompt <bos> is a target too; behind a prompt of the model's the same captions are written without it, and the tokenizer's end is replaced
    assert abs(case.loss(case.resolved, case.batch)[0] - case.io["out_loss_no_prompt"]) < 1e-4
    prompt = tuple(case.io["in_prompt_ids"][1:].tolist())
    bare = {**case.image, "text": np.delete(case.batch["text"], [1, 2], 1), "text_mask": np.delete(case.mask, [1, 2], 1)}
    np.testing.assert_array_equal(case.batch["text"][:, 1:3], np.tile(prompt, (case.rows, 1)))
    ends = np.where(bare["text"] == 5, 2, bare["text"])
    assert abs(case.loss(case.stage(model__prompt=prompt, model__end=5), {**bare, "text": ends})[0] - case.io["out_loss"]) < 1e-4


def test_a_step_beside_an_encoder_has_the_official_loss(opened):
    case = opened("blip2_odd_t5")
    asked = {"prompt": case.io["in_prompt_ids"].astype(np.int32), "prompt_mask": case.io["in_prompt_mask"].astype(bool)}
    assert abs(case.loss(case.resolved, {**case.batch, **asked})[0] - case.io["out_loss"]) < 1e-4
    # planted: the padding of the prompt is looked at; T5's own activation
    seen = {**asked, "prompt_mask": np.ones_like(asked["prompt_mask"])}
    assert abs(case.loss(case.resolved, {**case.batch, **seen})[0] - case.io["out_loss"]) > 1e-3
    assert abs(case.loss(case.stage(model__language__activation="gelu_tanh"), {**case.batch, **asked})[0] - case.io["out_loss"]) > 1e-5


def cut_at_ends(ids, end):
    """Rows of ids up to their first end behind the first place."""
    return [row[:1 + next((i for i, x in enumerate(row[1:], 1) if x == end), len(row))] for row in ids.tolist()]


def same_texts(found, official, ours, theirs):
    assert [row[1:] for row in cut_at_ends(found, ours)] == [[ours if x == theirs else x for x in row[1:]] for row in cut_at_ends(official, theirs)]


@pytest.mark.parametrize("name", STAGE1)
def test_stage_1_writes_the_official_captions(opened, name):
    case = opened(name)
    length, least = (14, 4) if name == "blip2_stage1_eva" else (11, 3)
    same_texts(case.texts("generate", max_length=length, min_length=least), case.io["out_gen_greedy"], 102, 102)
    if "out_gen_beam3" in case.io:
        same_texts(case.texts("generate", method="beam", beams=3, max_length=length, min_length=least), case.io["out_gen_beam3"], 102, 102)


def test_stage_2_writes_the_official_captions_and_answers(opened):
    case = opened("blip2_stage2_opt")
    stage = case.stage(model__prompt=tuple(case.io["in_prompt_ids"][1:].tolist()), model__end=5)
    for name, predict, options in (
            ("out_gen_greedy", "generate", dict(max_length=12)), ("out_gen_beam5", "generate", dict(method="beam", beams=5, max_length=12, min_length=8)),
            ("out_gen_beam3_penalties", "generate", dict(method="beam", beams=3, max_length=10, repetition_penalty=1.5, length_penalty=-1.0)),
            ("out_vqa_greedy", "answer", dict(beams=1, max_length=8)), ("out_vqa_beam5", "answer", dict(beams=5, max_length=8, length_penalty=-1.0))):
        same_texts(case.texts(predict, stage, **options), case.io[name], 2, 5)


def test_an_encoder_and_decoder_write_the_official_captions_and_answers(opened):
    case = opened("blip2_odd_t5")
    for name, predict, options in (
            ("out_gen_greedy", "generate", dict(max_length=9)), ("out_gen_beam4", "generate", dict(method="beam", beams=4, max_length=9, min_length=5)),
            ("out_gen_beam3_penalties", "generate", dict(method="beam", beams=3, max_length=8, repetition_penalty=1.4, length_penalty=-1.0)),
            ("out_vqa_beam5", "answer", dict(beams=5, max_length=7))):
        same_texts(case.texts(predict, **options), case.io[name], 1, 1)


# ---- what looks at what

@pytest.fixture(scope="module")
def looking(opened):
    """A function of changed ids, queries and images to what each pass of stage 1 gives: see, fuse, go_on (logits), match."""
    case = opened("blip2_odd_clip")
    model = case.resolved.system.model

    @jax.jit
    def run(variables, ids, order, rows):
        params = variables["params"]
        former = {**params["qformer"], "queries": params["qformer"]["queries"][order]}
        variables = {"params": {**params, "qformer": former}}

        def passes(m):
            tokens = m.encode_image(jnp.asarray(case.image["image"])[rows])
            states, own, seen = m.see(tokens)
            grounded = m.ground(ids, case.mask, seen)
            feature, text = m.image_feature(states), m.text_feature(m.encode_text(ids, case.mask))
            return {"see": states, "ground": grounded, "match": m.match(grounded), "itc": most_similar(feature, text), "write": m.logits(m.write(ids, own))}
        return model.apply(variables, method=passes)

    def look(ids=case.batch["text"], order=tuple(range(model.qformer.queries)), rows=tuple(range(case.rows))):
        return jax.device_get(run(case.variables, ids, np.array(order), np.array(rows)))

    return case, look


def test_queries_see_words_in_matching_alone_and_words_see_no_later_word(looking):
    case, look = looking
    ids, at = case.batch["text"].copy(), 2
    ids[0, at] += 1
    before, after = look(), look(ids)
    assert np.array_equal(before["see"], after["see"])      # of the contrastive pass, whose keys the captioner goes on from
    assert np.abs(before["ground"] - after["ground"])[0].max() > 1e-3 and np.array_equal(before["ground"][1:], after["ground"][1:])
    moved = np.abs(before["write"] - after["write"])[0].max(-1)
    assert moved[:at].max() == 0 and moved[at:].min() > 1e-3
    assert np.abs(look(rows=np.array([1, 1, 2]))["write"] - before["write"])[0].max() > 1e-3      # words see the image through the queries


def test_queries_are_a_set(looking):
    _, look = looking
    order = np.array([3, 0, 4, 1, 2])
    before, after = look(), look(order=order)
    np.testing.assert_allclose(after["see"], before["see"][:, order], atol=2e-5)
    for name in ("itc", "match", "write"):
        np.testing.assert_allclose(after[name], before[name], atol=2e-5)


@pytest.mark.parametrize("layers, every", [(5, 2), (2, 1), (3, 5)])
def test_layers_of_any_number_and_frequency(layers, every):
    """Words read in one go and one by one; an image's keys made before and anew; a text whose padding is hidden."""
    former = QFormer(width=24, layers=layers, heads=3, mlp_dim=20, queries=3, memory_width=10, vocab=40, positions=9, cross_every=every)
    ids, image = jnp.arange(12).reshape(2, 6), jax.random.normal(jax.random.key(1), (2, 5, 10))
    mask = jnp.arange(6) < jnp.array([[6], [4]])

    def passes(m):
        _, own, seen = m.see(image)
        whole, cache = m.go_on(ids, m.begin(own, 6))
        first, cache = m.go_on(ids[:, :4], m.begin(own, 6))
        then, _ = m.go_on(ids[:, 4:], cache)
        other = jnp.where(mask, ids, 7)
        return (m.fuse(ids, mask, image), m.fuse(ids, mask, None, seen, jnp.array([0, 1])), m.fuse(other, mask, image)[:, :3], whole,
                jnp.concatenate([first, then], 1), m.read(ids, mask)[1, :4], m.read(other, mask)[1, :4])

    rng = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(lambda key: former.init(key, ids, mask, image, method=QFormer.fuse), jax.random.key(0)))
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.3, shapes)
    fused, again, hidden, whole, stepped, read_once, read_other = jax.device_get(jax.jit(lambda v: former.apply(v, method=passes))(variables))
    params = variables["params"]
    count = sum(params[part]["cross"]["norm_cross"]["scale"].size // 24 for part in ("blocks", "tail") if part in params)
    assert count == -(-layers // every) and not any("norm_cross" in p for p in stages.checkpoint.flatten(params) if "plain" in p)
    for ours, theirs in ((fused, again), (fused[:, :3], hidden), (whole, stepped), (read_once, read_other)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_first_word_behind_the_queries_reads_row_34():
    model = stages.resolve(section_of("opt2.7b", "generate"), "rows").system.model
    small = type(model.language)(vocab=9, width=8, layers=1, heads=1, mlp_dim=8)
    x = jnp.zeros((1, model.qformer.queries + 2, 8))
    table = jnp.arange(small.positions + 2)[:, None] * jnp.ones((1, 8))
    mask = jnp.ones(x.shape[:2], bool).at[0, -1].set(False)      # a word, and padding
    rows = small.apply({"params": {"position_embed": table}}, x, mask, method=lambda m, x, mask: m.place(x, positions_of(mask))[0])
    assert rows[0, :, 0].tolist() == [*range(2, 34), 34, 1]


# ---- counts

def section_of(arg, name):
    """A stage of a published size, as it is before any tokenizer."""
    whole = config("blip2", arg)
    section = whole.stages[name]
    section.data.tokenizer = ""
    return section


@pytest.mark.parametrize("arg, name, trained, whole", [
    ("opt2.7b", "generate", 107_133_696, 3_744_625_024), ("opt2.7b", "pretrain", 186_702_654 + 2816, 1_172_599_998),
    ("opt6.7b", "generate", 105_137_664 + 24_576 + 3_149_824 + 2816, None),
    ("flant5xl", "generate", 105_137_664 + 24_576 + 1_574_912 + 2816, None),
    ("flant5xxl", "generate", 105_137_664 + 24_576 + 3_149_824 + 2816, None),
    ("flant5xl,vit=clip_l14", "generate", 101_598_720 + 24_576 + 1_574_912 + 2048, 3_243_538_944),
    ("flant5xl,vit=clip_l14", "pretrain", 183_165_758, 473_747_262)])
def test_counts_are_the_papers_and_frozen_parts_have_no_slots(arg, name, trained, whole):
    section = section_of(arg, name)
    stage = stages.resolve(section, name)
    assert stage.plan.count(trained=True) == trained and whole in (None, stage.plan.count())
    if arg == "opt2.7b" and name == "generate":
        tx, _ = stages.make_optimizer(stage)
        slots = [x for x in jax.tree.leaves(jax.eval_shape(tx.init, stage.plan.trained)) if x.ndim]
        assert sum(math.prod(x.shape) for x in slots) == 2 * trained
        assert {str(x.dtype) for p, x in stage.plan.frozen.items() if p.endswith(("kernel", "table"))} == {"bfloat16"}


# ---- meshes

@pytest.mark.parametrize("name", ["blip2_stage1_eva", "blip2_stage2_opt"])
def test_the_loss_is_the_same_on_any_number_of_devices(opened, name):
    """Stage 1 contrasts with all rows of all devices; the parts that are split are those of the plan."""
    case = opened(name)
    stage = case.stage(trainable=(r"(?!(image|language)/).*",))
    twice = {k: np.concatenate([v, v[::-1]]) for k, v in case.batch.items()}
    drawn = {"negative_image": np.roll(np.arange(8), 3), "negative_text": np.roll(np.arange(8), 5), "image_id": np.arange(8)} if "stage1" in name else {}
    found = {}
    for count, rules in ((1, "dp"), (2, "dp"), (4, "fsdp_tp"), (8, "fsdp")) if drawn else ((1, "dp"), (8, "fsdp_tp")):
        mesh = partitioning.make_mesh(rules, devices=jax.devices()[:count])
        params = {p: jax.device_put(x, partitioning.sharding(mesh, stage.plan.axes[p], x.shape)) for p, x in case.weights.items()}
        with partitioning.use(mesh):
            loss = jax.jit(lambda params, batch: stage.system.loss(merge(params, {}, {}), {}, batch, STILL)[0])
            found[count] = float(loss(params, partitioning.place({**twice, **drawn}, mesh)))
    np.testing.assert_allclose(list(found.values()), found[1], rtol=2e-6)


def test_microbatches_and_dropped_units(opened):
    """Stage 2 in passes of two rows is the same loss; in training it drops units, with other keys in other passes."""
    case = opened("blip2_stage2_opt")
    whole, parts = case.stage(), case.stage(data__microbatch=2)
    batch = {**case.batch, "target_mask": case.mask}
    assert abs(case.loss(whole, batch)[0] - case.loss(parts, batch)[0]) < 1e-5
    moving = Context(jax.random.key(0), jnp.int32(0), train=True)
    loss = jax.jit(lambda v, b: whole.system.loss(v, {}, b, moving)[0])(case.variables, batch)
    assert jnp.isfinite(loss) and abs(loss - case.loss(whole, batch)[0]) > 1e-3


def test_hard_negatives_are_never_of_the_same_image(opened):
    case = opened("blip2_stage1_eva")
    weights = {"t2i": case.io["out_sim_t2i"], "i2t": case.io["out_sim_i2t"]}
    for ids, suffix in ((np.arange(4), ""), (case.io["in_image_ids"], "_ids")):
        excluded = ids[:, None] == ids
        for side, similar in weights.items():
            drawn = np.asarray(jax.vmap(lambda key, s=similar, e=excluded: draw("hard", key, s, e))(jax.random.split(jax.random.key(0), 4000)))
            assert not excluded[np.arange(4), drawn].any()
            share = np.stack([np.bincount(drawn[:, row], minlength=4) for row in range(4)]) / len(drawn)
            wanted = np.where(excluded, 0, case.io[f"out_itm_weights_{side}{suffix}"])
            assert np.abs(share - wanted / wanted.sum(1, keepdims=True)).max() < 0.03


# ---- layouts

@pytest.mark.parametrize("name", CASES)
def test_exporting_an_import_gives_the_source_back_bit_for_bit(opened, name, tmp_path):
    case = opened(name)
    record = json.loads((case.folder / "import.json").read_text())
    assert record["release"] == ("blip2_clip" if name == "blip2_odd_clip" else "blip2")
    out = cli.export_release(record["release"], case.folder, tmp_path / "out", say=lambda line: None)
    source, back = read.open_weights(case.source / "weights.safetensors"), read.open_weights(out)
    assert set(back) == set(source) - set(record["ignored"])
    assert all(np.array_equal(back[name].read(), source[name].read()) for name in back)
    assert all("position_ids" in n or "Qformer.cls" in n for n in record["ignored"])


@pytest.mark.parametrize("name", ["blip2_odd_clip", "blip2_stage2_opt", "blip2_odd_t5"])
def test_files_of_what_was_trained_go_together_with_the_towers_files(opened, name, tmp_path):
    case = opened(name)
    tensors = {n: t.read() for n, t in read.open_weights(case.source / "weights.safetensors").items()}
    prefix, eye = {"blip2_stage2_opt": "opt_model.", "blip2_odd_t5": "t5_model."}.get(name, "none."), "visual_encoder."
    own = {n: x for n, x in tensors.items() if not n.startswith((prefix, eye))}
    for folder, of in (("own", own), ("eye", {n.removeprefix(eye): x for n, x in tensors.items() if n.startswith(eye)}),
                       ("language", {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)})):
        (tmp_path / folder).mkdir()
        if of:
            write.write_safetensors(tmp_path / folder / "model.safetensors", of)
    told = json.loads((case.source / "config.json").read_text())
    words = {"blip2_stage2_opt": "opt", "blip2_odd_t5": "t5"}.get(name)
    (tmp_path / "own" / "config.json").write_text(json.dumps({k: told[k] for k in ("vision", "qformer")}))
    if words:
        (tmp_path / "language" / "config.json").write_text(json.dumps(told[words]))
    hints = Hints(image=str(tmp_path / "eye"), language=str(tmp_path / "language") if words else "")
    folder = cli.import_release("blip2", str(tmp_path / "own"), tmp_path / "in", hints, say=lambda line: None)
    weights = stages.read_weights(folder)
    assert set(weights) == set(case.weights) and all(np.array_equal(weights[p], x) for p, x in case.weights.items())
    release = json.loads((folder / "import.json").read_text())["release"]
    back = read.open_weights(cli.export_release(release, folder, tmp_path / "out", say=lambda line: None))
    assert set(back) == {n for n in own if "position_ids" not in n and n not in json.loads((folder / "import.json").read_text())["ignored"]}
    with pytest.raises(ConfigError, match="stores all of a model in one place"):
        cli.import_release("blip", str(tmp_path / "own"), tmp_path / "none", hints, say=lambda line: None)
    with pytest.raises(ConfigError, match="without visual_encoder.*name the tower's file with --image"):
        cli.import_release("blip2", str(tmp_path / "own"), tmp_path / "none", Hints(language=hints.language), say=lambda line: None)


def test_positions_of_clips_eye_keep_their_corners():
    """LAVIS resizes them with align_corners; what lies between was compared with torch."""
    ramp = np.arange(3.0).repeat(3)[:, None]
    found = weight_rules.resize_grid(np.concatenate([[[9.0]], ramp]), 26, "corners")
    assert found[0] == 9 and np.allclose(found[1:].reshape(5, 5)[:, 2], [0, 0.40625, 1, 1.59375, 2])


# ---- stages

def test_stage_2_starts_from_stage_1_without_its_words_and_stages_inherit(tmp_path, opened):
    first = opened("blip2_odd_clip")
    plain = stages.configs.to_plain(first.section)
    former = plain["model"]["qformer"]
    words = dict(family="opt", width=32, layers=1, heads=2, mlp_dim=40, positions=60)
    sections = stages.configs.stage(
        system="blip2", loss=dict(weights=dict(lm=1.0)), optim=dict(name="adamw", lr=1e-4), steps=1,
        model=dict(image=plain["model"]["image"], qformer=former, language=words, tokens=dict(vocab=50, bos=2, eos=2, pad=1)),
        init=(("(language|projection)/.*", "fresh", "copy"), str(first.folder)), trainable=(r"(?!(image|language)/).*",),
        data=dict(train="", eval="", batch=2, tokenizer="", size=plain["data"]["size"], length=8))
    whole = stages.ConfigDict({"stage_order": ("generate",), "stages": {"generate": sections}})
    stage = stages.open_stage(whole, tmp_path, "generate")
    given = stages.init.take_over(stages.init_rules(whole, stage, tmp_path), stage.plan, lambda origin: stages.open_origin(whole, tmp_path, origin), "init")
    assert {p for p in stage.plan.shapes if p not in given} == {p for p in stage.plan.shapes if p.startswith(("language/", "projection/"))}
    assert not any("text" in p or "token_embed" in p for p in stage.plan.shapes if p.startswith("qformer/"))
    np.testing.assert_array_equal(given["qformer/blocks/plain2/mlp/query/up/kernel"], first.weights["qformer/blocks/plain2/mlp/query/up/kernel"])
    with pytest.raises(ConfigError, match=r"loss.weights has itc, lm: .*nearest: two stages"):
        stages.resolve(stages.ConfigDict({**sections, "loss": dict(weights=dict(lm=1.0, itc=1.0))}), "both")


def test_bert_starts_both_feed_forward_parts_layer_by_layer():
    """As LAVIS: the layers by turns with and without cross-attention, their feed-forward parts for words and for queries."""
    section = section_of("opt2.7b,bert=BERT", "pretrain")
    stage = stages.resolve(section, "pretrain")
    layer = np.arange(12, dtype=np.float32)
    rules = [tuple(rule) for rule in section.init]
    for target, theirs in (("qformer/blocks/cross/mlp/query/up/bias", "text/blocks/mlp/up/bias"),
                           ("qformer/blocks/plain1/norm2/text/scale", "text/blocks/norm2/scale"),
                           ("qformer/blocks/plain1/attn/out/bias", "text/blocks/attn/out/bias")):
        shape = stage.plan.shapes[target].shape
        source = np.broadcast_to(layer[:, None], (12, shape[1]))
        found = weight_rules.first_match(rules, target)
        value = weight_rules.value(target, shape, found[1].removeprefix("BERT:"), found[2], {theirs: source}, "init")
        np.testing.assert_array_equal(value[:, 0], layer[("plain" in target)::2])
    assert weight_rules.first_match(rules, "qformer/blocks/cross/cross/query/kernel") is None      # fresh


@pytest.mark.parametrize("name", ["blip2_stage2_opt", "blip2_odd_t5"])
def test_questions_learn_their_answers(opened, name):
    """An answer behind its question is as likely as in a row of both; answers weigh what people gave them."""
    case = opened(name)
    encodes = name == "blip2_odd_t5"
    asked = {k: np.asarray(case.io[f"in_{'prompt_ids' if encodes else 'question_ids'}"], np.int32) if k == "text" else
             case.io[f"in_{'prompt_mask' if encodes else 'question_mask'}"].astype(bool) for k in ("text", "text_mask")}
    if not encodes:      # as the tokenizer writes a question: padding behind an end
        order = np.argsort(~asked["text_mask"], axis=1, kind="stable")
        ids, mask = (np.take_along_axis(asked[k], order, 1) for k in ("text", "text_mask"))
        ids, mask = np.pad(ids, ((0, 0), (0, 1))), np.pad(mask, ((0, 0), (0, 1)))
        end = np.arange(ids.shape[1]) == mask.sum(1, keepdims=True)
        asked = {"text": np.where(end, 2, ids), "text_mask": mask | end}
    answers = np.tile(np.array([[7, 9, 1], [8, 1, 0]], np.int32) if encodes else np.array([[2, 7, 9, 2], [2, 8, 2, 1]], np.int32), (case.rows, 1, 1))
    there = np.tile(np.array([[1, 1, 1], [1, 1, 0]] if encodes else [[1, 1, 1, 1], [1, 1, 1, 0]], bool), (case.rows, 1, 1))
    weight = np.tile(np.array([[1.0, 0.0]], np.float32), (case.rows, 1))

    def loss(weight):
        return case.loss(case.resolved, {**case.image, **asked, "answer": answers, "answer_mask": there, "answer_weight": weight})[0]

    first, second = loss(weight), loss(weight[:, ::-1].copy())
    assert abs(loss(np.full_like(weight, 0.5)) - (first + second) / 2) < 1e-5 and abs(first - second) > 1e-3
    reply = answers[:, 0] if encodes else answers[:, 0, 1:]
    if encodes:
        row = {"prompt": asked["text"], "prompt_mask": asked["text_mask"], "text": reply, "text_mask": there[:, 0]}
    else:
        question, real = case.io["in_question_ids"].astype(np.int32), case.io["in_question_mask"].astype(bool)
        reply = np.where(reply == 2, case.section.model.end, reply)
        row = {"text": np.concatenate([question, reply], 1), "text_mask": np.concatenate([real, there[:, 0, 1:]], 1)}
        row["target_mask"] = np.concatenate([np.zeros_like(real), there[:, 0, 1:]], 1)
    assert abs(case.loss(case.resolved, {**case.image, **row})[0] - first) < 1e-5


def test_rankings_take_the_nearest_of_an_images_vectors(opened):
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(4, 3, 5)), rng.normal(size=(6, 5))
    wanted = np.einsum("ike,te->itk", image, text).max(-1)
    np.testing.assert_allclose(rank.similarity(image, text), wanted)
    np.testing.assert_allclose(rank.similarity(text, image), wanted.T)
    np.testing.assert_allclose(rank.similarity_of_pairs(image, text[:4]), np.diag(wanted))
    right = [[i] for i in range(4)]
    ranks, _, _ = rank.rank(image, text, right, top=2)
    np.testing.assert_array_equal(ranks, 1 + (wanted > np.diag(wanted[:, :4])[:, None]).sum(1))
    ranks, best, similar = rank.rank(text, image, [[i % 4] for i in range(6)], top=4)
    np.testing.assert_array_equal(best, np.argsort(-wanted.T, axis=1))
    np.testing.assert_allclose(similar, -np.sort(-wanted.T, axis=1))
    assert ranks.min() >= 1


@pytest.mark.parametrize("size, layout, words", [("opt2.7b", "joined", "Question: {q} Answer:"), ("flant5xl", "apart", "Question: {q} Short answer:")])
def test_published_questions_are_worded_as_in_the_paper_and_read_by_the_queries(size, layout, words):
    section = section_of(f"{size},start=SECOND,words=FIRST,bert=BERT", "vqa")
    assert (section.data.layout, tuple(section.data.templates), section.evals.vqa.template) == (layout, (words,), words)
    rules = [tuple(rule) if not isinstance(rule, str) else rule for rule in section.init]
    assert weight_rules.first_match(rules[:-1], "qformer/token_embed/table")[1].startswith("FIRST:") and rules[-1] == "SECOND"
    section.data.update(instruction_tokenizer="", instruction_length=0)
    assert stages.resolve(section, "vqa").system.model.qformer.vocab == 30523
