"""Answers and classes by BERT beside a ViT against stored outputs of the official code (salesforce/ALBEF b9727e4 and salesforce/BLIP 056a169, their
fine-tuning classes on small random weights), and how such stages start from pre-trained weights."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from vlm_jax import stage as stages
from vlm_jax.errors import ConfigError
from vlm_jax.importers import cli, read
from vlm_jax.systems import bert_classify, bert_vqa
from vlm_jax.system import Context
from vlm_jax.train.state import merge

STORED = pathlib.Path(__file__).parent / "parity" / "official_outputs"
LAYOUTS = {"albef_vqa": "albef_vqa", "albef_ve": "albef_ve", "albef_nlvr": "albef_nlvr", "albef_ta": "albef_nlvr", "blip_vqa": "blip_vqa", "blip_nlvr": "blip_nlvr"}


class Case:
    """A stored model: imported, with its inputs as batches."""

    def __init__(self, name, folder):
        self.name, self.io = name, dict(np.load(STORED / name / "io.npz"))
        self.folder = cli.import_release(name.split("_")[0], str(STORED / name), folder, say=lambda line: None)
        self.section = stages.configs.from_json((self.folder / "config.json").read_text())
        self.section.data.batch = 4
        image = self.io["in_images"].transpose(0, 2, 3, 1)
        self.batch = {"text": self.io["in_input_ids"].astype(np.int32), "text_mask": self.io["in_attention_mask"].astype(bool)}
        if name == "albef_ta":
            first, second = self.io["in_first"], self.io["in_second"]
            self.asked = dict(self.batch, images=np.stack([image[first], image[second]], 1))
            self.learned = dict(self.batch, image=image, assigned=np.stack([first, second], 1), label=self.io["in_label"].astype(np.int32))
        elif name.endswith("vqa"):
            self.asked = dict(self.batch, image=image, candidates=self.io["in_candidates"].astype(np.int32), candidates_mask=self.io["in_candidates_mask"].astype(bool))
            self.learned = dict(self.batch, image=image, **self.answers())
        else:
            pictures = {"images": np.stack(np.split(image, 2), 1)} if name.endswith("nlvr") else {"image": image}
            self.asked = self.batch | pictures
            self.learned = dict(self.asked, label=self.io["in_label"].astype(np.int32))

    def answers(self):
        """The flat list of answers as rows of at most three."""
        rows = np.repeat(np.arange(4), self.io["in_n"])
        at = np.concatenate([np.arange(n) for n in self.io["in_n"]])
        ids = np.zeros((4, 3, self.io["in_answers"].shape[1]), np.int32)
        mask, weight = np.zeros(ids.shape, bool), np.zeros((4, 3), np.float32)
        ids[rows, at], mask[rows, at], weight[rows, at] = self.io["in_answers"], self.io["in_answers_mask"], self.io["in_weights"]
        return {"answer": ids, "answer_mask": mask, "answer_weight": weight}

    def predict(self, section):
        stage = stages.resolve(section, "test")
        leaves = stages.read_weights(self.folder)
        variables = merge({p: leaves[p].reshape(x.shape) for p, x in stage.plan.shapes.items()}, {}, {})
        return stages.bind(stage.system, variables, stages.partitioning.make_mesh("dp", devices=jax.devices()[:1]))

    def furthest(self, section):
        """The largest difference from the official output, in units of its tolerance."""
        predict = self.predict(section)
        if not self.name.endswith("vqa"):
            return np.abs(predict["classify"](self.asked)["logits"] - self.io["out_logits"]).max() / 1e-3
        found = predict["answer"](self.asked, method="rank", k=4)
        if self.name == "blip_vqa":      # the official code tells the winner alone
            return 0.0 if (found["answer"] == self.io["out_answer"]).all() else np.inf
        same = (found["top"] == self.io["out_topk_ids"]).all()
        return np.abs(jax.nn.softmax(found["top_score"]) - self.io["out_topk_probs"]).max() / 1e-4 if same else np.inf


@pytest.fixture(scope="module", params=LAYOUTS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param) / "in")


def test_predictions_are_the_official_ones_and_a_planted_mistake_shows(case):
    assert json.loads((case.folder / "import.json").read_text())["release"] == LAYOUTS[case.name]      # told by its tensors
    assert case.furthest(case.section) <= 1
    if case.name == "blip_vqa":
        return      # a mistake need not change who wins: the loss sees it, below
    wrong = stages.ConfigDict(case.section.to_dict())
    with wrong.model.unlocked():
        wrong.model.text.heads = 1
    assert case.furthest(wrong) > 5


def step(case, section, carry):
    """(loss, gradients, carry after) of the stored batch."""
    stage, leaves = stages.resolve(section, "step"), stages.read_weights(case.folder)

    @jax.jit
    def run(params, carry, batch):
        def loss(params):
            return stage.system.loss(merge(params, {}, {}), carry, batch, Context(jax.random.key(0), jnp.int32(0), train=False))
        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, grads, stage.system.next_carry(carry, out.update)

    return jax.device_get(run({p: leaves[p] for p in stage.plan.shapes}, carry, case.learned))


def carry_of(case):
    kept = stages.read_carry(case.folder)
    return {"teacher": {p.removeprefix("teacher/"): x for p, x in kept.items()}} if kept else {}


def test_a_step_has_the_official_loss_gradients_and_slow_copy(case):
    value, grads, after = step(case, case.section, carry_of(case))
    assert abs(value - case.io["out_loss"]) < 1e-4
    patch = grads["image/patch_embed/projection/kernel"]
    wanted = case.io["out_grad_patch"]
    np.testing.assert_allclose(patch.reshape(*wanted.shape[2:], 3, -1).transpose(3, 2, 0, 1), wanted, rtol=0, atol=1e-4)
    np.testing.assert_allclose(grads["text/token_embed/table"], case.io["out_grad_word"], rtol=0, atol=1e-4)
    assert bool(after) == ("out_after_word_m" in case.io)
    if after:
        np.testing.assert_allclose(after["teacher"]["text/token_embed/table"], case.io["out_after_word_m"], rtol=0, atol=1e-6)
    if case.name in ("blip_vqa", "albef_vqa"):
        wrong = stages.ConfigDict(case.section.to_dict())
        wrong.loss.update({"label_smoothing": 0.0} if case.name == "blip_vqa" else {"alpha": 0.0})
        value, *_ = step(case, wrong, {})
        assert abs(value - case.io["out_loss"]) > 1e-2


def test_exporting_an_import_gives_the_source_back_bit_for_bit(case, tmp_path):
    out = cli.export_release(LAYOUTS[case.name], case.folder, tmp_path / "out", say=lambda line: None)
    source, back = read.open_weights(STORED / case.name / "weights.safetensors"), read.open_weights(out)
    ignored = set(json.loads((case.folder / "import.json").read_text())["ignored"])
    assert set(back) == set(source) - ignored
    assert all(np.array_equal(back[name].read(), source[name].read()) for name in back)
    assert all("position_ids" in name or name == "temp" or name.startswith("text_proj") for name in ignored)


# ---- starting from pre-trained weights

def towers_of(folder):
    """What a fine-tuning stage has in common with an imported pre-trained model."""
    model = stages.configs.to_plain(stages.configs.from_json((folder / "config.json").read_text()).model)
    return {k: v for k, v in model.items() if k in ("image", "text", "tokens", "mean", "std", "dtype")}


def test_stages_start_from_pretrained_weights_as_the_official_code_does(tmp_path):
    first = cli.import_release("albef", str(STORED / "albef_pretrain"), tmp_path / "albef", say=lambda line: None)
    source, slow = stages.read_weights(first), stages.read_carry(first)
    model = towers_of(first)
    common = dict(optim=dict(name="adamw", lr=1e-4), steps=1)
    size = stages.configs.from_json((first / "config.json").read_text()).data.size

    def start(**sections):
        config = stages.ConfigDict({"stage_order": ("tuned",), "stages": {"tuned": stages.configs.stage(**{**common, "init": str(first), **sections})}})
        stage = stages.open_stage(config, tmp_path, "tuned")
        given = stages.init.take_over(stages.init_rules(config, stage, tmp_path), stage.plan, lambda origin: stages.open_origin(config, tmp_path, origin), "init")
        return stage, given, stages.init_carry(config, stage, tmp_path)

    data = dict(train="", eval="", batch=4, tokenizer="", size=size, length=8)
    stage, given, carry = start(system="bert_vqa", model=dict(model, decoder=dict(width=32, layers=2, heads=2, mlp_dim=128, positions=25), answer_ends=2),
                                data=dict(data, answers=2, answer_length=4), loss=dict(weights=dict(answer=1.0), alpha=0.4))
    assert set(given) == set(stage.plan.shapes)      # nothing is left fresh
    for ours, theirs in (("decoder/blocks_cross/decoder_attn/query/kernel", "text/blocks_cross/attn/query/kernel"), ("decoder/blocks_cross/decoder_norm1/scale", "text/blocks_cross/norm1/scale"),
                         ("decoder/blocks_cross/mlp/up/kernel", "text/blocks_cross/mlp/up/kernel"), ("decoder/token_embed/table", "text/token_embed/table"),
                         ("text/blocks/attn/out/kernel", "text/blocks/attn/out/kernel"), ("lm_head/bias", "lm_head/bias")):
        np.testing.assert_array_equal(given[ours], source[theirs], err_msg=ours)
        np.testing.assert_array_equal(carry[f"teacher/{ours}"], slow[f"teacher/{theirs}"], err_msg=ours)
    assert not np.array_equal(source["text/token_embed/table"], slow["teacher/text/token_embed/table"])

    pairs = dict(model, text=dict(model["text"], pairing="alternate"), classes=2)
    stage, given, carry = start(system="bert_classify", model=pairs, data=dict(data, images=2, classes=("False", "True")), loss=dict(weights=dict(cls=1.0), alpha=0.4))
    assert {p for p in stage.plan.shapes if p not in given} == {p for p in stage.plan.shapes if p.startswith("head/")}
    for block in ("first", "second"):
        np.testing.assert_array_equal(given[f"text/blocks_pair/{block}/mlp/up/kernel"], source["text/blocks_cross/mlp/up/kernel"])
    assert "text/blocks_pair/second/cross/key/kernel" not in stage.plan.shapes and "teacher/head/out/kernel" not in carry

    with pytest.raises(ConfigError, match=r"stages.tuned.init=.* is a 'albef', of which a 'clip' takes nothing over; nearest: 'clip'"):
        start(system="clip", model=dict(image=dict(tower="vit", variant="mini"), text=dict(tower="transformer", variant="mini"), embed=8,
                                      tokens=dict(vocab=140, bos=1, eos=2, pad=0)), loss=dict(weights=dict(con=1.0)),
              data=dict(data, size=48))


def test_blip_starts_its_twins_and_its_answers_from_the_pretrained_text(tmp_path):
    first = cli.import_release("blip", str(STORED / "blip_pretrain"), tmp_path / "blip", say=lambda line: None)
    source, model = stages.read_weights(first), towers_of(first)
    layers, size = model["text"]["layers"], stages.configs.from_json((first / "config.json").read_text()).data.size
    model["text"] |= dict(cross_layers=layers, token_types=0)
    data = dict(train="", eval="", batch=4, tokenizer="", size=size, length=8)

    def start(**sections):
        config = stages.ConfigDict({"stage_order": ("tuned",), "stages": {"tuned": stages.configs.stage(init=str(first), optim=dict(name="adamw", lr=1e-4), steps=1, **sections)}})
        stage = stages.open_stage(config, tmp_path, "tuned")
        return stage, stages.init.take_over(stages.init_rules(config, stage, tmp_path), stage.plan, lambda origin: stages.open_origin(config, tmp_path, origin), "init")

    stage, given = start(system="bert_classify", model=dict(model, text=dict(model["text"], pairing="twin"), classes=2), data=dict(data, images=2, classes=("False", "True")),
                         loss=dict(weights=dict(cls=1.0)))
    twins = min(layers, bert_classify.TWINS)
    for role in ("cross", "cross_other"):
        np.testing.assert_array_equal(given[f"text/blocks_cross/{role}/query/kernel"], source["text/blocks_cross/cross/query/kernel"][:twins])
    assert all(p.startswith("head/") for p in stage.plan.shapes if p not in given)
    text = {k: v for k, v in model["text"].items() if k not in ("cross_layers",)}
    stage, given = start(system="bert_vqa", model=dict(model, decoder=text), data=dict(data, answers=2, answer_length=4), loss=dict(weights=dict(answer=1.0)))
    np.testing.assert_array_equal(given["decoder/blocks_cross/decoder_attn/query/kernel"], source["text/blocks_cross/decoder_attn/query/kernel"])
    np.testing.assert_array_equal(given["text/blocks_cross/attn/query/kernel"], source["text/blocks_cross/attn/query/kernel"])
    assert set(given) == set(stage.plan.shapes)


# ---- assignment, answers

def test_assignments_are_thirds_of_their_own_image_first_second_and_neither():
    similarity = jax.random.normal(jax.random.key(1), (5, 5)) * 2
    first, second, label = jax.vmap(lambda key: bert_classify.assign(key, similarity))(jax.random.split(jax.random.key(0), 4000))
    first, second, label = (np.asarray(x) for x in (first, second, label))
    own = np.arange(5)
    assert ((first == own) == (label == 0)).all() and ((second == own) == (label == 1)).all() and (first != second).all()
    assert np.abs(np.bincount(label.ravel(), minlength=3) / label.size - 1 / 3).max() < 0.015
    other = np.where(label == 0, second, first)      # one draw from the softmax without the diagonal
    for row in range(5):
        wanted = np.where(own == row, 0, np.exp(np.asarray(similarity)[row]))
        found = np.bincount(other[:, row][label[:, row] < 2], minlength=5)
        assert np.abs(found / found.sum() - wanted / wanted.sum()).max() < 0.03
    with pytest.raises(ValueError, match="a batch of 2 has no two other images"):
        bert_classify.assign(jax.random.key(0), jnp.zeros((2, 2)))


def test_answers_get_their_start_and_all_their_ends():
    model = bert_vqa.AnswerModel(None, None, None, start=7, eos=2, answer_ends=2)
    ids, mask = bert_vqa.close(model, jnp.array([[1, 5, 2, 0], [1, 5, 6, 2], [0, 0, 0, 0]]), jnp.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool))
    assert ids.tolist() == [[7, 5, 2, 2, 0], [7, 5, 6, 2, 2], [7, 0, 0, 0, 0]] and mask.sum(1).tolist() == [4, 5, 0]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return Case("blip_vqa", tmp_path_factory.mktemp("blip") / "in")


def test_a_question_s_padding_matters_only_where_it_is_asked_to(blip):
    predict = blip.predict(blip.section)
    longer = {k: np.pad(v, ((0, 0), (0, 3))) for k, v in blip.batch.items()} | {"image": blip.asked["image"]}
    asked = {k: v for k, v in blip.asked.items() if not k.startswith("candidates")}
    options = dict(method="generate", beams=2, max_length=6)
    np.testing.assert_allclose(predict["answer"](asked, **options)["score"], predict["answer"](longer, **options)["score"], atol=1e-5)
    assert np.abs(predict["answer"](longer, **options)["score"] - predict["answer"](longer, pads="seen", **options)["score"]).max() > 1e-4
    for wrong, message in ((dict(method="rang"), "method='rang' is not known; nearest: 'rank'"), (dict(pads="sean"), "pads='sean' is not known; nearest: 'seen'"),
                           (dict(method="rank"), r"method='rank' needs candidates \[c, l\]; nearest: method='generate'")):
        with pytest.raises(ConfigError, match=message):
            predict["answer"](asked, **wrong)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.data.update(answers=0, answer_length=0), "data.answers=0, but a system that answers learns from answers"),
    (lambda s: s.loss.update(rank_by="first"), "loss.rank_by='first' is not known; nearest: 'first_and_sequence'"),
    (lambda s: s.loss.update(alpha=1.5), "loss.alpha=1.5 is not a share; nearest: 1.0")])
def test_wrong_sections_are_refused_by_name(blip, change, message):
    section = stages.ConfigDict(blip.section.to_dict())
    change(section)
    with pytest.raises(ConfigError, match=message):
        stages.resolve(section, "wrong")


def test_an_imported_model_loads(blip):
    assert vlm_jax.load(blip.folder).predict["answer"](blip.asked, method="rank", k=4)["answer"].tolist() == blip.io["out_answer"].tolist()


# ---- Hugging Face

def test_huggingface_s_answers_come_in_and_go_out(tmp_path):
    stored = STORED / "hf_blip_vqa"
    io = dict(np.load(stored / "io.npz"))
    folder = cli.import_release("", str(stored), tmp_path / "in", say=lambda line: None)
    assert json.loads((folder / "import.json").read_text())["release"] == "hf_blip_vqa"
    model, asked = vlm_jax.load(folder), {"image": io["in_images"].transpose(0, 2, 3, 1), "text": io["in_input_ids"].astype(np.int32)}
    asked["text_mask"] = np.ones(asked["text"].shape, bool)
    for beams, name in ((1, "out_greedy"), (3, "out_beam")):      # transformers begins with [DEC], an answer of ours with <bos>
        found = model.predict["answer"](asked, method="generate", first="bos", beams=beams, max_length=8)["text"]
        np.testing.assert_array_equal(found[:, 1:], io[name][:, 1:])
    section = stages.configs.from_json((folder / "config.json").read_text())
    stage = stages.resolve(section, "test")
    leaves = stages.read_weights(folder)
    variables = merge({p: leaves[p] for p in stage.plan.shapes}, {}, {})
    states = jax.jit(lambda v, t: bert_vqa.run(stage.system.model, v, bert_vqa.AnswerModel.write, t, io["out_states"], asked["text_mask"]))(variables, io["in_answers"].astype(np.int32))
    logits = bert_vqa.run(stage.system.model, variables, bert_vqa.AnswerModel.logits, states)
    np.testing.assert_allclose(logits, io["out_logits"], rtol=0, atol=1e-3)
    out = cli.export_release("hf_blip_vqa", folder, tmp_path / "out", say=lambda line: None)
    source, back = read.open_weights(stored / "model.safetensors"), read.open_weights(out)
    assert set(back) == set(source) and all(np.array_equal(back[n].read(), source[n].read()) for n in source)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BlipForQuestionAnswering"] and config["text_config"]["num_attention_heads"] == 2
