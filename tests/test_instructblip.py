"""InstructBLIP, which is BLIP-2's second stage with queries that read the instruction, against stored outputs of salesforce/LAVIS (T5) and of transformers 5
(BLIP-2 with OPT and T5, retrieval, InstructBLIP with T5 and LLaMA), on small random weights of sizes that all differ."""

import functools
import itertools
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests.tiny import config
from vlm_jax import stage as stages
from vlm_jax import weight_rules
from vlm_jax.data import tokenizers
from vlm_jax.data.layouts import Layout, Marks, Said, Writer
from vlm_jax.data.order import order_of
from vlm_jax.data.published import SETS
from vlm_jax.data.sources import SHARES, Mixture
from vlm_jax.errors import ConfigError
from vlm_jax.importers import blip2 as layouts
from vlm_jax.importers import cli, eva, hf_blip2, read, write
from vlm_jax.importers.release import Hints
from vlm_jax.system import Context
from vlm_jax.train.state import merge

STORED = pathlib.Path(__file__).parent / "parity" / "official_outputs"
FACES = ("hf_blip2_opt", "hf_blip2_t5", "hf_blip2_retrieval", "hf_instructblip_t5", "hf_instructblip_llama")
LAVIS, LLAMA = "instructblip_t5", "hf_instructblip_llama"
STILL = Context(jax.random.key(0), jnp.int32(0), train=False)
QUERIES = 4      # of transformers' models
TRAINED = (r"(?!(image|language)/).*",)


def quiet(line):
    pass


class Case:
    """A stored model, imported; its inputs as a batch."""

    def __init__(self, name, folder):
        self.name, self.source, self.io = name, STORED / name, dict(np.load(STORED / name / "io.npz"))
        self.folder = cli.import_release("blip2" if name == LAVIS else "hf_blip2", str(self.source), folder, say=quiet)
        self.section = stages.configs.from_json((self.folder / "config.json").read_text())
        self.weights = stages.read_weights(self.folder)
        self.batch = self.lavis() if name == LAVIS else self.face()

    def lavis(self):
        io = self.io
        found = {"image": io["in_images"].transpose(0, 2, 3, 1)}
        for ours, theirs in (("instruction", "qformer"), ("text", "output")):
            found |= {ours: io[f"in_{theirs}_ids"].astype(np.int32), f"{ours}_mask": io[f"in_{theirs}_mask"] == 1}
        return {**found, "prompt": io["in_input_ids"].astype(np.int32), "prompt_mask": io["in_attention_mask"] == 1}

    @property
    def asked(self):
        """The batch with its prompt uncut, as generating has it."""
        return {**self.batch, "prompt": self.io["in_prompt_ids"].astype(np.int32), "prompt_mask": self.io["in_prompt_mask"] == 1}

    def face(self):
        io, found = self.io, {"image": self.io["in_pixel_values"].transpose(0, 2, 3, 1)}
        if "in_qformer_input_ids" in io:
            found |= {"instruction": io["in_qformer_input_ids"], "instruction_mask": io["in_qformer_attention_mask"] == 1}
        if self.name == "hf_blip2_retrieval":
            return {**found, "text": io["in_input_ids"], "text_mask": io["in_attention_mask"] == 1}
        ids, mask = io["in_input_ids"][:, QUERIES:], io["in_attention_mask"][:, QUERIES:] == 1
        if "in_decoder_input_ids" not in io:
            return {**found, "text": ids, "text_mask": mask}
        text = np.roll(io["in_decoder_input_ids"], -1, 1)      # the last one is for nobody
        return {**found, "prompt": ids, "prompt_mask": mask, "text": text, "text_mask": np.ones(text.shape, bool)}

    def stage(self, **changes):
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

    @functools.cached_property
    def calls(self):
        return {}

    def run(self, name, batch=None, stage=None, **options):
        """A predict function's answer; one compiled program for each name, stage and options."""
        key = (name, id(stage), *options.items())
        if key not in self.calls:
            predict = (stage or self.resolved).system.predict[name]
            self.calls[key] = stage, jax.jit(lambda v, b: predict(v, b, **options))
        return jax.device_get(self.calls[key][1](self.variables, self.batch if batch is None else batch))

    @functools.cached_property
    def learning(self):
        stage = self.stage(trainable=TRAINED)
        held = {p: jnp.asarray(self.weights[p]) for p in stage.plan.frozen}

        @jax.jit
        def run(params, batch):
            return jax.value_and_grad(lambda params: stage.system.loss(merge(params, held, {}), {}, batch, STILL)[0])(params)

        return lambda batch: jax.device_get(run({p: jnp.asarray(self.weights[p]) for p in stage.plan.trained}, batch))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """name -> Case, made once."""
    return functools.cache(lambda name: Case(name, tmp_path_factory.mktemp(name) / "in"))


def cut(ids, end):
    """Rows up to their first end behind the first place."""
    return [row[:1 + next((i for i, x in enumerate(row[1:], 1) if x == end), len(row))] for row in np.asarray(ids).tolist()]


def filled(batch, **widths):
    """A batch with more padding: columns of a key (on the left of a decoder's prompt: negative)."""
    out = dict(batch)
    for key, width in widths.items():
        sides = ((0, 0), (0, width) if width > 0 else (-width, 0))
        out |= {key: np.pad(batch[key], sides, constant_values=7), f"{key}_mask": np.pad(batch[f"{key}_mask"], sides)}
    return out


# ---- parity with LAVIS

def test_states_and_logits_are_the_official_ones(opened):
    case = opened(LAVIS)
    seen, logits = case.run("features"), case.run("caption_logits")["logits"]
    assert np.abs(seen["image"] - case.io["out_image_embeds"]).max() < 1e-4 and np.abs(seen["prefix"] - case.io["out_prefix"]).max() < 1e-4
    assert np.abs(logits - case.io["out_logits"])[case.batch["text_mask"]].max() < 1e-3


@pytest.mark.parametrize("change", [dict(model__eps=1e-6), dict(model__qformer__eps=1e-6)])
def test_a_planted_mistake_of_the_queries_shows(opened, change):
    case = opened(LAVIS)
    assert np.abs(case.run("features", stage=case.stage(**change))["prefix"] - case.io["out_prefix"]).max() > 1e-5


def test_a_planted_activation_shows(opened):
    case = opened(LAVIS)
    logits = case.run("caption_logits", stage=case.stage(model__language__activation="gelu_tanh"))["logits"]
    assert np.abs(logits - case.io["out_logits"])[case.batch["text_mask"]].max() > 2e-3


def test_a_step_has_the_official_loss_and_gradients_whatever_is_padded(opened):
    case = opened(LAVIS)
    batch = filled(case.batch, prompt=3, instruction=2, text=2)
    loss, grads = case.learning(batch)
    assert abs(loss - case.io["out_loss"]) < 1e-4 and not any(p.startswith(("image/", "language/")) for p in grads)
    theirs = {n: t.read() for n, t in read.open_weights(case.source / "grads.safetensors").items()}
    table = layouts.rules(stages.configs.to_plain(case.section), {n: x.shape for n, x in theirs.items()})
    compared = 0
    for path, ours in grads.items():
        found = weight_rules.first_match(table, path)
        if not path.endswith("/key/bias") and not ("/blocks/plain1/" in path and "/text/" in path and found[1] not in theirs):
            other = weight_rules.value(path, ours.shape, *found[1:], theirs, "gradients")
            assert np.abs(ours - other).max() <= 1e-4 * max(np.abs(other).max(), 1e-6), path
            compared += 1
    assert compared > 60
    other = {k: np.where(batch[f"{k}_mask"], batch[k], 0) for k in ("prompt", "instruction", "text")}      # ids of padding are nobody's
    assert case.learning({**batch, **other})[0] == loss
    wrong = {**batch, "instruction_mask": np.ones_like(batch["instruction_mask"])}      # planted: padding is read
    assert abs(case.learning(wrong)[0] - loss) > 1e-2


def test_replies_are_the_official_ones_whatever_is_padded(opened):
    case = opened(LAVIS)
    frames = {"images": case.io["in_video"].transpose(0, 2, 3, 4, 1), **{k: v[:2] for k, v in case.asked.items() if k.startswith(("prompt", "instruction"))}}
    assert np.abs(case.run("features", frames)["prefix"] - case.io["out_video_prefix"]).max() < 1e-4
    padded = filled(case.asked, prompt=2, instruction=3)
    for wanted, name, batch, options in (("out_gen_greedy", "generate", padded, dict(method="greedy", max_length=9)),
                                         ("out_gen_video_greedy", "generate", frames, dict(method="greedy", max_length=9)),
                                         ("out_vqa_beam5", "answer", case.asked, dict(max_length=7))):      # the official penalties by default
        assert cut(case.run(name, batch, **options)["text"], 1) == cut(case.io[wanted], 1), wanted


def test_candidates_have_the_official_scores_in_one_pass_over_image_and_prompt(opened):
    case = opened(LAVIS)
    ids, mask = (np.pad(case.io[f"in_candidate_{name}"], ((0, 0), (0, 2))) for name in ("ids", "mask"))      # padding is not scored
    wanted = -case.io["out_candidate_loss"]
    batch = {**case.asked, "answer": np.broadcast_to(ids, (4, *ids.shape)), "answer_mask": np.broadcast_to(mask, (4, *mask.shape))}
    np.testing.assert_allclose(case.run("rank", batch, rule="mean")["score"] * mask.sum(1), wanted, atol=1e-3)
    best = case.run("answer", {**case.asked, "candidates": ids, "candidates_mask": mask}, method="rank")
    assert best["answer"].tolist() == wanted.argmax(1).tolist()
    np.testing.assert_allclose(best["score"], wanted.max(1), atol=1e-3)
    with pytest.raises(ConfigError, match="rule='avg' is not known"):
        case.resolved.system.predict["rank"](case.variables, batch, rule="avg")


def test_files_of_what_was_trained_go_with_the_towers_files(opened, tmp_path):
    """As LAVIS stores it, "_trimmed": beside eva_vit_g.pth and a directory of the language model."""
    case = opened(LAVIS)
    tensors = {name: np.array(t.read()) for name, t in read.open_weights(case.source / "weights.safetensors").items()}
    told = json.loads((case.source / "config.json").read_text())
    parts = {"trained": {n: x for n, x in tensors.items() if not n.startswith((layouts.EYE, "t5_model."))}}
    for place, prefix in (("eye", layouts.EYE), ("t5", "t5_model.")):
        parts[place] = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    for place, found in parts.items():
        (tmp_path / place).mkdir()
        write.write_safetensors(tmp_path / place / "model.safetensors", found)
    (tmp_path / "t5" / "config.json").write_text(json.dumps(dict(told["t5"], model_type="t5", dense_act_fn="gelu_new")))      # their code says "gelu"
    (tmp_path / "trained" / "config.json").write_text(json.dumps({k: told[k] for k in ("vision", "qformer")}))
    whole = cli.import_release("blip2", str(tmp_path / "trained"), tmp_path / "in", Hints(image=str(tmp_path / "eye" / "model.safetensors"),
                                                                                          language=str(tmp_path / "t5")), say=quiet)
    again = stages.read_weights(whole)
    assert set(again) == set(case.weights) and all(np.array_equal(again[p], x) for p, x in case.weights.items())
    assert stages.configs.from_json((whole / "config.json").read_text()).model.to_dict() == case.section.model.to_dict()
    back = cli.export_release("blip2", whole, tmp_path / "back", say=quiet)
    assert set(read.open_weights(back)) == set(parts["trained"]) - {"Qformer.bert.embeddings.position_ids"}


# ---- parity with transformers

@pytest.mark.parametrize("name", FACES)
def test_transformers_models_answer_the_same(opened, name):
    case = opened(name)
    if name == "hf_blip2_retrieval":
        embeds = case.run("embed")
        assert np.abs(case.run("match")["match"] - case.io["out_match"]).max() < 1e-5
        assert np.abs(np.einsum("iqe,te->itq", embeds["image_embed"], embeds["text_embed"]).max(-1) - case.io["out_cosine"]).max() < 1e-5
        return
    logits, wanted, mask = case.run("caption_logits")["logits"], case.io["out_logits"], case.batch["text_mask"]
    if "prompt" not in case.batch:
        wanted = wanted[:, QUERIES - 1:-1]
        mask = mask & np.pad(mask, ((0, 0), (1, 0)), constant_values=True)[:, :-1]      # what padding predicts is nobody's
    assert np.abs(logits - wanted)[mask].max() < (1e-4 if LLAMA == name else 3e-5)


def replying(case):
    """The batch of a decoder with its text as the prompt."""
    return {k.replace("text", "prompt"): v for k, v in case.batch.items()}


def test_vicuna_writes_behind_its_own_begin(opened):
    case = opened(LLAMA)
    batch, new = replying(case), case.io["out_penalised"].shape[1]
    assert case.section.model.first == 1 and case.section.model.tokens.bos == case.section.data.marks.begin == 2
    batch = filled(batch, prompt=-3, instruction=2)
    text = case.run("generate", batch, method="greedy", max_length=new + 1, repetition_penalty=1.5)["text"]
    assert text[:, 0].tolist() == [1, 1, 1] and cut(text, 2) == cut(np.pad(case.io["out_penalised"], ((0, 0), (1, 0)), constant_values=1), 2)
    # planted: the begin of prompts is what was repeated
    other = case.stage(model__first=-1)
    assert cut(case.run("generate", batch, other, method="greedy", max_length=new + 1, repetition_penalty=1.5)["text"], 2)[0][1:] != cut(text, 2)[0][1:]
    shape = jax.eval_shape(lambda v, b: case.resolved.system.predict["answer"](v, b, max_length=4), case.variables, batch)["text"].shape
    assert shape == (3, 4)      # max_length counts the begin in answers too


def test_vicunas_candidates_equal_each_of_them_alone(opened):
    case = opened(LLAMA)
    rng, batch = np.random.default_rng(0), replying(case)
    count, length = 3, 4
    real = np.arange(length) < np.array([4, 2, 1])[:, None]
    ids = np.where(real, rng.integers(3, 80, (3, count, length)), 81).astype(np.int32)
    found = case.run("rank", {**batch, "answer": ids, "answer_mask": np.broadcast_to(real, ids.shape)}, rule="official")["score"]
    wide = case.batch["text"].shape[1]
    for a in range(count):
        row = {**case.batch, "text": np.concatenate([batch["prompt"], ids[:, a]], 1),
               "text_mask": np.concatenate([batch["prompt_mask"], np.tile(real[a], (3, 1))], 1)}
        logits = case.run("caption_logits", row)["logits"][:, wide:]
        each = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[:, a][..., None], 2)[..., 0] * real[a]
        # lavis modeling_llama.py, reduction="none": the mean over all positions but one, of queries, prompt and candidate
        np.testing.assert_allclose(found[:, a], each.sum(1) / (QUERIES + wide + length - 1), atol=1e-5)


@pytest.mark.parametrize("name", ["hf_blip2_opt", "hf_blip2_retrieval", "hf_instructblip_t5"])
def test_an_export_is_the_import(opened, name, tmp_path, monkeypatch):
    case = opened(name)
    monkeypatch.setattr(write, "SHARD", 60_000)
    out = cli.export_release("hf_blip2", case.folder, tmp_path / "out", say=quiet)
    source, back = read.open_weights(case.source), read.open_weights(out)
    assert set(source) == set(back) and len(list(out.glob("model-*.safetensors"))) > 1
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor.read(), source[key].read(), err_msg=key)
    width = case.section.model.image.width
    bias = back["vision_model.encoder.layers.1.self_attn.qkv.bias"].read()
    assert not bias[width:2 * width].any() and bias[:width].all()
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (case.source, out))
    for part in ("vision_config", "qformer_config", "text_config"):
        for key, value in ours.get(part, {}).items():
            wordless = not ours[part].get("use_qformer_text_input", True)      # sizes of tables that it has not
            free = ("tie_word_embeddings", "scale_decoder_outputs", *(("vocab_size", "max_position_embeddings") if wordless else ()))
            if key in theirs[part] and key not in free:
                assert theirs[part][key] == value, (part, key)
    assert ours["architectures"] == theirs["architectures"] and ours.get("image_token_index") == theirs["image_token_index"]
    again = cli.import_release("hf_blip2", str(out), tmp_path / "again", say=quiet)
    assert stages.configs.from_json((again / "config.json").read_text()).model.to_dict() == case.section.model.to_dict()


def saved_tokenizer(folder, begin, end, names, words):
    """A tokenizer.json of whole words in ``folder``: names are its special pieces in their order, begin and end (or None) what it puts around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [*names, *words]
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=names[-1]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [(name, pieces.index(name)) for name in dict.fromkeys((begin, end)) if name]
    made.post_processor = processors.TemplateProcessing(single=" ".join(filter(None, (begin, "$A", end))), special_tokens=around)
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))


def test_both_tokenizers_come_and_go_with_the_weights(tmp_path):
    words = "what colour is the cat red".split()
    shutil.copytree(STORED / LLAMA, tmp_path / "face")
    saved_tokenizer(tmp_path / "face", "</s>", None, ("<pad>", "<s>", "</s>", "<unk>"), words)      # as Vicuna's is saved
    saved_tokenizer(tmp_path / "face" / "qformer_tokenizer", "[CLS]", "[SEP]", ("[PAD]", "[CLS]", "[SEP]", "[UNK]"), words)
    folder = cli.import_release("hf_blip2", str(tmp_path / "face"), tmp_path / "in", say=quiet)
    model = vlm_jax.load(folder)
    assert model.config.model.tokens.to_dict() == dict(vocab=83, bos=2, eos=2, pad=81) and model.config.data.layout == "joined"
    asked = model.prompts("what is red")
    assert asked["prompt"].shape == asked["instruction"].shape == (1, 128) and asked["prompt"][asked["prompt_mask"]].tolist() == [2, 4, 6, 9]
    assert asked["prompt_mask"][0, -4:].all() and asked["instruction"][asked["instruction_mask"]].tolist() == [1, 4, 6, 9, 2]
    back = cli.export_release("hf_blip2", folder, tmp_path / "back", say=quiet)
    for name in ("tokenizer.json", "qformer_tokenizer/tokenizer.json"):
        assert json.loads((back / name).read_text()) == json.loads((tmp_path / "face" / name).read_text()), name
    assert (back / "tokenizer_config.json").is_file() and json.loads((back / "processor_config.json").read_text()) == dict(
        processor_class="InstructBlipProcessor", num_query_tokens=QUERIES)


def test_vicunas_file_of_what_was_trained_goes_with_its_towers(opened, tmp_path):
    case = opened(LLAMA)
    trained = cli.export_release("blip2", case.folder, tmp_path / "trained", say=quiet)
    own = {n: np.array(t.read()) for n, t in read.open_weights(trained).items() if not n.startswith(layouts.EYE)}      # an import's eye may train
    write.write_safetensors(trained / "model.safetensors", own)
    language = {n.removeprefix("language_model."): np.array(t.read()) for n, t in read.open_weights(case.source).items() if n.startswith("language_model.")}
    eye = weight_rules.export_leaves(eva.table("image", ""), {p: x for p, x in case.weights.items() if p.startswith("image/")}, "eye")
    for name, tensors in (("language", language), ("eye", eye)):
        (tmp_path / name).mkdir()
        write.write_safetensors(tmp_path / name / "model.safetensors", tensors)
    (tmp_path / "language" / "config.json").write_text(json.dumps(json.loads((case.source / "config.json").read_text())["text_config"]))
    assert {n.split(".")[0] for n in own} == {"Qformer", "query_tokens", "ln_vision", "llm_proj"}
    whole = cli.import_release("blip2", str(trained), tmp_path / "in", Hints(image=str(tmp_path / "eye" / "model.safetensors"),
                                                                             language=str(tmp_path / "language")), say=quiet)
    again, model = stages.read_weights(whole), stages.configs.from_json((whole / "config.json").read_text()).model
    assert set(again) == set(case.weights) and all(np.array_equal(again[p], x) for p, x in case.weights.items())
    assert model.first == 1 and model.tokens.to_dict() == dict(vocab=83, bos=2, eos=2, pad=82) and model.eps == 1e-5
    assert model.language.to_dict() == case.section.model.language.to_dict()
    with pytest.raises(ConfigError, match="without llm_model"):
        cli.import_release("blip2", str(trained), tmp_path / "half", Hints(image=str(tmp_path / "eye" / "model.safetensors")), say=quiet)


def test_image_tokens_are_ids_that_no_text_has():
    def of(family, vocab):
        return hf_blip2.image_token(stages.ConfigDict(dict(model=dict(tokens=dict(vocab=vocab)))), family)
    assert (of("opt", 50304), of("opt", 50272), of("t5", 32128), of("llama", 32001), of("llama", 32064)) == (50265, 50265, 32100, 0, 32001)


# ---- what the queries read

def test_the_instruction_changes_what_is_seen_and_without_words_it_is_blip2(opened):
    case = opened(LAVIS)
    others = {**case.batch, **{k: np.roll(case.batch[k], 1, 0) for k in ("instruction", "instruction_mask")}}
    before, after = case.run("features")["prefix"], case.run("features", others)["prefix"]
    assert np.abs(before - after).max((1, 2)).min() > 1e-3
    blind = case.stage(model__instruction_tokens={})
    variables = merge({p: case.weights[p] for p in blind.plan.shapes}, {}, {})
    features = jax.jit(lambda v, b: blind.system.predict["features"](v, b)["prefix"])
    plain = features(variables, {"image": case.batch["image"]})
    np.testing.assert_array_equal(plain, features(variables, others))
    model = blind.system.model
    np.testing.assert_array_equal(plain, jax.jit(lambda v, x: model.apply(v, x, method=lambda m, x: m.projection(m.see(m.encode_image(x))[0])))(
        variables, case.batch["image"]))
    assert "2305.06500" in case.resolved.system.papers and "2305.06500" not in blind.system.papers
    with pytest.raises(ConfigError, match="this batch has none; nearest: data.instruction_tokenizer"):
        case.resolved.system.predict["features"](case.variables, {"image": case.batch["image"]})


def lavis_rows(prompts, replies, begin, end, pad):
    """blip2_vicuna_instruct.py ``concat_text_input_output`` and the labels of ``forward``: (ids, mask, labels) of the text."""
    asked, told = ([[begin, *row] for row in rows] for rows in (prompts, replies))
    told = [[*row, end] for row in told]
    wide, long = (max(map(len, rows)) for rows in (asked, told))
    out = []
    for a, t in zip(asked, told, strict=True):
        ids = a + t[1:] + [pad] * (long - len(t)) + [pad] * (wide - len(a))
        out.append((ids, [i < len(a) + len(t) - 1 for i in range(len(ids))], [-100 if i < len(a) or x == pad else x for i, x in enumerate(ids)]))
    return [np.array(x) for x in zip(*out, strict=True)]


def test_a_row_is_laid_out_as_lavis_does():
    tokenizer, marks = tokenizers.load("scenes_instruct"), dict(config("instructblip", "vicuna7b").stages.instruct.data.marks)
    said = [Said((("is it red", "yes"),)), Said((("how many circles are there and is one of them above a square", "two"),)), Said((("what", "a red circle"),))]
    made = Writer(Layout("joined", prompt_length=10, marks=Marks(**marks)), tokenizer, 6).arrays(said, training=True)
    bodies = [tokenizer.body(s.prompt)[-9:] for s in said]
    assert any(len(tokenizer.body(s.prompt)) > 9 for s in said)      # one is cut, on the left
    ids, mask, labels = lavis_rows(bodies, [tokenizer.body(s.reply) for s in said], 2, tokenizer.eos_id, 32000)
    columns = ids.shape[1]
    np.testing.assert_array_equal(made["text"][:, :columns], ids)
    np.testing.assert_array_equal(made["text_mask"][:, :columns], mask)
    np.testing.assert_array_equal(made["target_mask"][:, :columns], labels >= 0)
    assert not made["text_mask"][:, columns:].any() and set(made["text"][:, 0]) == {2}
    assert all(row[m][-1] == tokenizer.eos_id and t[m][-1] for row, m, t in zip(made["text"], made["text_mask"], made["target_mask"], strict=True))


class Sized:
    """A source that is as long as a data set."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        raise IndexError(i)


def test_sets_are_drawn_by_the_roots_of_their_sizes_and_the_named_factors():
    spec = config("instructblip", "flant5xl,data=D").stages.instruct.data.train
    names = [part.split(":")[1] for part in spec.split(";")]
    factors = np.array([float(part.rpartition("@")[2]) for part in spec.split(";")])
    assert len(names) == 13 and {n for n in names} == {n for n, s in SETS.items() if s.held == "in" and s.samples}
    sizes = np.array([SETS[n].samples for n in names])
    changed = {n: f for n, f in zip(names, factors, strict=True) if f != 1}
    assert set(changed) == {"vqav2", "vqg_vqav2", "aokvqa", "okvqa"} and changed["aokvqa"] < 1 < changed["okvqa"]
    parts = [Sized(n) for n in sizes.tolist()]
    order = order_of(Mixture(parts, [SHARES["sqrt"](len(part)) * f for part, f in zip(parts, factors.tolist(), strict=True)]), 0, 1, 1)
    drawn = np.searchsorted(np.cumsum(sizes), order.index(np.arange(1_000_000)), "right")
    share = np.sqrt(sizes) * factors
    np.testing.assert_allclose(np.bincount(drawn, minlength=13) / 1e6, share / share.sum(), rtol=0.01)


# ---- published sizes

@pytest.mark.parametrize("size, trained, whole", [
    ("vicuna7b", 185_660_160 + 24_576 + 3_149_824 + 2816, 7_913_155_712), ("vicuna13b", 185_660_160 + 24_576 + 3_937_280 + 2816, 14_191_393_920),
    ("flant5xl", 185_660_160 + 24_576 + 1_574_912 + 2816, 4_022_914_176), ("flant5xxl", 185_660_160 + 24_576 + 3_149_824 + 2816, 12_310_064_256)])
def test_counts_are_the_papers_and_frozen_parts_have_no_slots(size, trained, whole):
    stage = stages.resolve(config("instructblip", size).stages.instruct, "instruct")
    assert stage.plan.count(trained=True) == trained and stage.plan.count() == whole
    if size == "vicuna7b":
        assert trained == 188_837_376
        tx, _ = stages.make_optimizer(stage)
        slots = [x for x in jax.tree.leaves(jax.eval_shape(tx.init, stage.plan.trained)) if x.ndim]
        assert sum(math.prod(x.shape) for x in slots) == 2 * trained
        variables = merge(dict(stage.plan.shapes), {}, {})
        video = {"images": jax.ShapeDtypeStruct((1, 4, 224, 224, 3), jnp.uint8), **{k: jax.ShapeDtypeStruct((1, 9), t) for k, t in (
            ("instruction", jnp.int32), ("instruction_mask", bool))}}
        assert jax.eval_shape(stage.system.predict["features"], variables, video)["prefix"].shape == (1, 128, 4096)


def test_vicunas_tables_get_a_row_for_padding():
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    for how, x in (("grow", table), ("grow_columns", table.T)):
        shape = (4, 2) if how == "grow" else (2, 4)
        grown = weight_rules.apply(((".*", "x", how),), {"table": shape}, {"x": x})["table"]
        np.testing.assert_array_equal(grown if how == "grow" else grown.T, [*table, table.mean(0)])
    whole = config("instructblip", "vicuna7b,language=V,words=S")
    built = {name: stages.resolve(whole.stages[name], name) for name in whole.stages}
    assert whole.stage_order == ("generate", "instruct") and whole.stages.instruct.init[-1] == "@generate"
    assert built["generate"].plan.count(trained=True) == 105_137_664 + 24_576 + 3_149_824 + 2816
    text = {p for p in built["instruct"].plan.shapes if weight_rules.first_match((whole.stages.instruct.init[0],), p)}
    assert set(built["instruct"].plan.shapes) - text == set(built["generate"].plan.shapes)
    with pytest.raises(ConfigError, match="nearest: start=DIR"):
        config("instructblip", "flant5xl,language=V")


def test_held_out_sets_are_evaluated_by_their_measures():
    stage = config("instructblip", "vicuna7b,data=D").stages.instruct
    out = {n: s for n, s in SETS.items() if s.held == "out"}
    assert set(stage.evals) == {*out, "vqav2"} and len(out) == 13
    for name, table in out.items():
        assert stage.evals[name].kind == table.evaluator and stage.evals[name].data.split(":")[2] in table.splits, name
        assert stage.evals[name].get("images", 0) == (4 if table.video else 0)
    assert stage.optim.lr == 1e-5 and stage.steps == 60_000 and stage.data.batch == 128 and stage.data.mixture == "sqrt"


def test_the_preset_goes_on_from_blip2s_stages():
    whole = config("instructblip")
    assert whole.stage_order[-3:] == ("pretrain", "generate", "instruct")
    built = {name: stages.resolve(whole.stages[name], name) for name in whole.stages}
    taken = set()
    for target, source in itertools.islice(((r[0], r[1]) if not isinstance(r, str) else (".*", r) for r in whole.stages.instruct.init), 2):
        origin = built[source.strip("@:")].plan.shapes
        for path, x in built["instruct"].plan.shapes.items():
            if path not in taken and weight_rules.first_match(((target, "", "copy"),), path):
                assert origin[path].shape == x.shape, path
                taken.add(path)
    assert taken == set(built["instruct"].plan.shapes)
