"""Instructions: how prompt and reply become ids and masks, templates, mixtures, frames."""

import io

import numpy as np
import pytest
import tokenizers as library
from ml_collections import ConfigDict
from PIL import Image

from tests import tiny
from vlm_jax import config as configs
from vlm_jax.data import templates, tokenizers
from vlm_jax.data.bad import BadDataError, BadSample
from vlm_jax.data.batch import GLOSSARY, validate
from vlm_jax.data.layouts import Layout, Marks, Said, Writer
from vlm_jax.data.order import order_of
from vlm_jax.data.pipeline import eval_batches, preview, train_batches
from vlm_jax.data.rows import Rows
from vlm_jax.data.sources import open_source
from vlm_jax.errors import ConfigError
from vlm_jax.loading import Model
from vlm_jax.stage import fill_tokens, inherit, resolve

OPTIONS = dict(size=8, augment="squash", seed=1, threads=0)
EVAL = dict(size=8, augment="squash", threads=0)


class Samples:
    """An open source of the given samples, each with a grey picture."""
    name = "samples"

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return {"key": f"k{i}", "image": np.full((8, 8, 3), i, np.uint8), **self.samples[i]}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load("scenes")


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE with what OPT's tokenizer puts in front: "</s>", id 2."""
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False,
                                          initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(["a photo of a dog", "a photo of two cats\n", "a red dog"] * 20, trainer)
    model.post_processor = library.processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return tokenizers.JsonTokenizer(model.to_str().encode())


@pytest.fixture(scope="module")
def pieces():
    """Word pieces as BERT has them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "colour", "is", "it", "red", "?", "a", "##b"]
    return tokenizers.JsonTokenizer(library.BertWordPieceTokenizer({w: i for i, w in enumerate(words)}, lowercase=True).to_str().encode())


def one(samples, tokenizer, layout, length, other=None, batch=None, **options):
    with train_batches(Samples(*samples), tokenizer, **OPTIONS, batch=batch or len(samples), length=length, layout=layout, instruction_tokenizer=other,
                       **options) as batches:
        batch = next(batches)[1]
    validate(batch)
    return batch


def scored(samples, tokenizer, layout, length, other=None, **options):
    with eval_batches(Samples(*samples), tokenizer, **EVAL, batch=len(samples), length=length, layout=layout, instruction_tokenizer=other,
                      **options) as batches:
        (batch, meta), = batches
    validate(batch)
    return batch, meta


# ---- ids and masks of one sample

def test_a_sample_for_a_decoder_token_by_token(tokenizer, pieces):
    """[begin][prompt][reply][end][pads]: the begin is the one that the config names, once; reply and end are learned."""
    layout = Layout("joined", prompt_length=8, instruction_length=7, marks=Marks(begin=2))
    body = tokenizer.body
    batch = one([{"prompt": "what colour is it", "text": ["red"]}], tokenizer, layout, 4, pieces)
    assert batch["text"].tolist() == [[2, *body("what colour is it"), *body("red"), 2] + [0] * 5]
    assert batch["text_mask"][0].tolist() == [True] * 7 + [False] * 5
    assert batch["target_mask"][0].tolist() == [False] * 5 + [True] * 2 + [False] * 5
    assert batch["instruction"].tolist() == [[2, 5, 6, 7, 8, 3, 0]] and batch["instruction_mask"][0].tolist() == [True] * 6 + [False]
    assert set(batch) == {"image", "text", "text_mask", "target_mask", "instruction", "instruction_mask", "caption_id", "image_id"}
    assert set(batch) <= set(GLOSSARY)
    found, (meta,) = scored([{"prompt": "what colour is it", "text": ["red"]}], tokenizer, layout, 4, pieces)
    assert found["prompt"].tolist() == [[0, 0, 0, 2, *body("what colour is it")]]       # on the left: the reply follows
    assert found["prompt_mask"][0].tolist() == [False] * 3 + [True] * 5
    assert all(np.array_equal(found[key], batch[key]) for key in ("text", "target_mask", "instruction", "caption_id"))
    assert meta["question"] == "what colour is it" and meta["captions"] == meta["answers"] == ["red"]


def test_a_sample_for_an_encoder_and_a_decoder_token_by_token(tokenizer):
    batch = one([{"prompt": "what colour is it", "text": ["red"]}], tokenizer, Layout("apart", prompt_length=8), 4)
    assert batch["prompt"].tolist() == [[1, *tokenizer.body("what colour is it"), 2, 0, 0]]
    assert batch["text"].tolist() == [[*tokenizer.body("red"), 2, 0, 0]] and batch["text_mask"][0].tolist() == [True, True, False, False]
    assert "target_mask" not in batch and "instruction" not in batch
    found, _ = scored([{"prompt": "what colour is it", "text": ["red"]}], tokenizer, Layout("apart", prompt_length=8), 4)
    assert all(np.array_equal(found[key], batch[key]) for key in ("prompt", "prompt_mask", "text"))


def test_byte_level_pieces_apart_are_those_of_the_whole(bpe):
    """A word holds the space before it, and the suffix is the end: the ids are those of "a photo of a dog\\n", the mask falls between words."""
    marks = Marks(before=" ", after="\n", end="none", candidate_end="none")
    assert bpe.frame == ([2], []) and bpe.bos_id == 2
    batch = one([{"prompt": "a photo of", "text": ["a dog"]}], bpe, Layout("joined", prompt_length=8, marks=marks), 8)
    whole = bpe.encode("a photo of a dog\n")
    assert batch["text"][0][batch["text_mask"][0]].tolist() == whole
    learned = batch["text"][0][batch["target_mask"][0]].tolist()
    assert learned == whole[len(bpe.encode("a photo of")):] and bpe.decode(learned) == " a dog\n"
    alone = one([{"text": ["a dog"]}], bpe, Layout("joined", prompt_length=1, marks=marks), 8)
    assert alone["text"][0][alone["text_mask"][0]].tolist() == bpe.encode("a dog\n")      # nothing before it: no space
    replies = Writer(Layout("joined", prompt_length=8, marks=marks), bpe, 8).replies
    assert replies.eos_id == bpe.body("\n")[-1] and replies.decode([*replies.encode("two cats"), 5, 5]) == " two cats"
    ids, mask, cut = replies(["two cats", "a"], 2)
    assert cut == 1 and ids[1][mask[1]].tolist() == bpe.body(" a\n")


def test_prompts_are_cut_on_the_left_and_replies_on_the_right(tokenizer, pieces):
    long, words = "a b c d e f g h", "red green blue cyan white"
    sample, body = [{"prompt": long, "text": [words]}], tokenizer.body
    layout = Layout("joined", prompt_length=5, instruction_length=4)
    batch = one(sample, tokenizer, layout, 3, pieces)
    assert batch["text"].tolist() == [[1, *body(long)[-4:], *body(words)[:3]]]      # a begin, no end: nothing ends there
    assert batch["target_mask"][0].tolist() == [False] * 5 + [True] * 3
    assert batch["instruction"].tolist() == [[2, *pieces.body(long)[-2:], 3]]
    apart = one(sample, tokenizer, Layout("apart", prompt_length=5), 3)
    assert apart["prompt"].tolist() == [[1, *body(long)[-3:], 2]] and apart["text"].tolist() == [[*body(words)[:2], 2]]
    exact = one([{"prompt": "red", "text": ["red green"]}], tokenizer, layout, 3, pieces)
    assert exact["text"][0][:5].tolist() == [1, *body("red"), *body("red green"), 2]


def test_turns_are_one_row_with_a_span_each(tokenizer):
    turns = [("what colour is it", "red"), ("how many", "two")]
    body, layout = tokenizer.body, Layout("joined", prompt_length=12, instruction_length=12)
    batch = one([{"turns": turns}], tokenizer, layout, 4, tokenizer)
    assert batch["text"][0][:11].tolist() == [1, *body(turns[0][0]), *body("red"), 2, *body("how many"), *body("two"), 2]
    assert np.flatnonzero(batch["target_mask"][0]).tolist() == [5, 6, 9, 10]
    assert batch["instruction"][0][:8].tolist() == [1, *body("what colour is it how many"), 2]
    found, (meta,) = scored([{"turns": turns}], tokenizer, layout, 4, tokenizer)
    assert found["prompt"][0][found["prompt_mask"][0]].tolist() == batch["text"][0][:9].tolist() and meta["captions"] == ["two"]
    assert meta["question"] == "what colour is it red how many"
    apart = one([{"turns": turns}] * 16, tokenizer, Layout("apart", prompt_length=12), 4)
    said = {tokenizer.decode(p[m]): tokenizer.decode(t) for p, m, t in zip(apart["prompt"], apart["prompt_mask"], apart["text"], strict=True)}
    assert said == {"what colour is it": "red", "what colour is it red how many": "two"}      # a turn is drawn, what came before is history


def test_a_text_may_be_cut_in_two(tokenizer):
    text = "a red circle left of a blue square"
    batch = one([{"text": [text]}] * 32, tokenizer, Layout("apart", prompt_length=12, prefix="words"), 12)
    halves = {(tokenizer.decode(p[m]), tokenizer.decode(t)) for p, m, t in zip(batch["prompt"], batch["prompt_mask"], batch["text"], strict=True)}
    assert len(halves) == 7 and all(" ".join(both) == text and all(both) for both in halves)
    found, _ = scored([{"text": [text]}], tokenizer, Layout("apart", prompt_length=12, prefix="words"), 12)
    assert tokenizer.decode(found["text"][0]) == text and found["prompt_mask"][0].sum() == 2


def test_captions_and_questions_of_any_source_have_a_prompt(tokenizer):
    """A source knows captions and answers: a question is its prompt, the answer that is drawn its reply."""
    asked = {"text": ["what colour"], "answers": ["red", "blue"], "answer_weights": [0.75, 0.25], "all_answers": ["red", "red", "red", "blue"]}
    batch = one([asked] * 64, tokenizer, Layout("apart", prompt_length=8), 4)
    replies = [tokenizer.decode(ids) for ids in batch["text"]]
    assert set(replies) == {"red", "blue"} and 36 < replies.count("red") < 60 and tokenizer.decode(batch["prompt"][0]) == "what colour"
    found, (meta,) = scored([asked], tokenizer, Layout("joined", prompt_length=8), 4)
    assert meta["answers"] == ["red", "red", "red", "blue"] and meta["question"] == "what colour" and meta["captions"] == ["red"]
    plain = one([{"text": ["a red circle"]}], tokenizer, Layout("joined", prompt_length=1), 6)
    assert plain["target_mask"][0].tolist() == [False] + [True] * 4 + [False] * 2


# ---- padding, buckets, processes

@pytest.mark.parametrize("name", ["joined", "apart"])
def test_buckets_crop_and_change_no_real_token(tokenizer, name):
    samples = [{"prompt": "what colour is it", "text": ["red"]}, {"prompt": "how many", "text": ["two"]}]
    layout = Layout(name, prompt_length=10, instruction_length=9)
    whole = one(samples, tokenizer, layout, 6, tokenizer)
    short = one(samples, tokenizer, layout, 6, tokenizer, buckets=(8,))
    for key in ("text", "text_mask", "instruction", "instruction_mask", *(["target_mask"] if name == "joined" else ["prompt", "prompt_mask"])):
        width = short[key].shape[1]
        assert width == min(8, whole[key].shape[1]) and np.array_equal(short[key], whole[key][:, :width])
        assert not whole[key][:, width:].any()      # what is cut off was padding
    wider = one(samples, tokenizer, Layout(name, prompt_length=14, instruction_length=12), 8, tokenizer)
    for key in ("text", "instruction"):
        assert [row[mask].tolist() for row, mask in zip(wider[key], wider[key + "_mask"], strict=True)] == [
            row[mask].tolist() for row, mask in zip(whole[key], whole[key + "_mask"], strict=True)]
    with pytest.raises(ValueError, match=r"buckets=\(16,\) must lie between 2 and length=1[06]"):
        one(samples, tokenizer, layout, 6, tokenizer, buckets=(16,))


def test_batches_are_the_same_from_another_process_and_step(tokenizer, bpe):
    layout = Layout("joined", prompt_length=24, instruction_length=24, templates="task", marks=Marks(before=" ", after="\n", end="none"))
    options = dict(**OPTIONS, batch=4, length=24, layout=layout, instruction_tokenizer=tokenizer)
    source = open_source("scenes:train/instruct")
    with train_batches(source, bpe, **options | {"size": 32}, stop_step=3) as here, \
            train_batches(source, bpe, **options | {"size": 32}, start_step=1, stop_step=3, workers=1) as there:
        batches = dict(here)
        for step, batch in there:
            assert batch.keys() == batches[step].keys() and all(np.array_equal(batch[key], value) for key, value in batches[step].items())


# ---- templates

def test_templates_have_known_slots_and_the_papers_are_marked():
    for task, found in templates.TEMPLATES.items():
        assert found and templates.parse(tuple(t.text for t in found))
        assert all(t.origin in ("paper", "ours") for t in found), task
    counted = {task: (len(found), {t.origin for t in found}) for task, found in templates.TEMPLATES.items()}
    assert counted["caption"] == (13, {"paper"}) and counted["vqa"] == (10, {"paper"}) and counted["vqg"] == (6, {"paper"})
    assert counted["vqa_ocr"] == (10, {"ours"}) and counted["scenes_vqa"][1] == {"ours"}
    slots = templates.slots_of({"prompt": "what is it?", "choices": ["a cat", "a dog"],
                                "slots": {"ocr": [str(i) for i in range(40)], "history": [("q", "a"), "b"]}})
    assert templates.fill(templates.Template("{history}: {q} {choices} ({ocr})"), slots) == (
        "q a b: what is it? (a) a cat (b) a dog (" + ", ".join(map(str, range(30))) + ")")
    assert templates.rendered_choices(["x"] * 28)[-15:] == "(z) x (aa) x (ab) x"[-15:]
    for wrong, said in (("vga", "templates='vga' is no task; nearest: 'vq"), (("{question}",), r"slot \{question\}; nearest: ")):
        with pytest.raises(ValueError, match=said):
            templates.parse(wrong)


def test_a_template_is_drawn_for_each_example_and_fixed_in_evaluation(tokenizer):
    samples = [{"prompt": "is it red", "text": ["no"], "task": "scenes_vqa"}] * 64 + [{"prompt": "as it is", "text": ["no"]}]
    layout = Layout("joined", prompt_length=64, templates="task")
    batch = one(samples, tokenizer, layout, 4, batch=65 * 2)

    def prompts(batch):
        return [tokenizer.decode(ids[mask & ~learned]) for ids, mask, learned in zip(batch["text"], batch["text_mask"], batch["target_mask"], strict=True)]

    wordings = {templates.fill(t, {"q": "is it red"}) for t in templates.TEMPLATES["scenes_vqa"]}
    assert set(prompts(batch)) == wordings | {"as it is"}
    assert prompts(batch) == prompts(one(samples, tokenizer, layout, 4, batch=65 * 2))
    found, meta = scored(samples[62:], tokenizer, layout, 4)
    assert [m["question"] for m in meta] == ["question: is it red short answer:"] * 2 + ["as it is"]
    fixed = Layout("joined", prompt_length=64, templates="task", eval_template="{q} answer:")
    assert [m["question"] for m in scored(samples[62:], tokenizer, fixed, 4)[1]] == ["is it red answer:"] * 2 + ["as it is"]
    own = Layout("joined", prompt_length=64, templates=("answer: {q}", "{ocr}"))      # what cannot be filled is not drawn
    assert set(prompts(one(samples, tokenizer, own, 4))) == {"answer: is it red", "answer: as it is"}
    with pytest.raises(BadDataError, match="missing_slot 64"):
        one(samples[:1], tokenizer, Layout("joined", prompt_length=64, templates=("{ocr}",)), 4, bad_budget=1.0)


# ---- candidates

def test_candidates_are_the_replies_that_may_be_chosen(tokenizer):
    samples = [{"prompt": "what colour", "choices": ["red", "a blue circle"], "label": 1},
               {"prompt": "how many", "choices": ["two", "one", "three"], "label": 0}]
    rows = Rows(answers=3, answer_length=4, candidates=True)
    for marks, end in ((Marks(), [2]), (Marks(candidate_end="none"), [])):
        batch, meta = scored(samples, tokenizer, Layout("joined", prompt_length=8, marks=marks), 6, rows=rows)
        assert batch["answer"].shape == (2, 3, 4) and batch["label"].tolist() == [1, 0] and "answer_weight" not in batch
        assert batch["answer"][0][batch["answer_mask"][0]].tolist() == [*tokenizer.body("red"), *end, *tokenizer.body("a blue circle"), *end]
        assert not batch["answer_mask"][0, 2].any() and meta[1]["choices"] == ["two", "one", "three"] and meta[0]["captions"] == ["a blue circle"]
    trained = one(samples, tokenizer, Layout("apart", prompt_length=8), 6, rows=rows)
    assert {tokenizer.decode(ids) for ids in trained["text"]} == {"a blue circle", "two"} and "answer" not in trained and "label" not in trained
    with pytest.raises(BadDataError, match="too_many_choices.*3, more than answers=2"):
        with eval_batches(Samples(*samples * 20), tokenizer, **EVAL, batch=40, length=6, layout=Layout("joined", prompt_length=8),
                          rows=Rows(answers=2, answer_length=4, candidates=True)) as batches:
            next(batches)


# ---- mixtures

SIZES = {"a": 566_747, "b": 14_000_000, "c": 9_009, "d": 17_056, "e": 800_000, "f": 21_953, "g": 58_000, "h": 443_757}


class Sized:
    def __init__(self, name):
        self.name, self.count = name, SIZES[name]

    def __len__(self):
        return self.count


@pytest.mark.parametrize("rule,share", [("sqrt", lambda n: n**0.5), ("uniform", lambda n: 1.0), ("proportional", float)])
def test_a_million_draws_have_the_shares_of_the_rule(rule, share):
    mixture = open_source([Sized(name) for name in SIZES], mixture=rule)
    expected = np.array([share(n) for n in SIZES.values()])
    counted = np.bincount(order_of(mixture, seed=3).stream(np.arange(10**6))[0], minlength=len(SIZES)) / 10**6
    assert np.abs(counted / (expected / expected.sum()) - 1).max() < 0.01


def test_factors_override_the_shares_of_a_rule(tmp_path):
    mixture = open_source("scenes:val@0.5; scenes:train; scenes:objects@2", mixture="sqrt")
    shares = np.array([0.5 * 1000**0.5, 10**3.5, 2 * 1050**0.5])
    assert mixture.weights == pytest.approx(shares)
    counted = np.bincount(order_of(mixture, seed=0).stream(np.arange(10**6))[0]) / 10**6
    assert np.abs(counted / (shares / shares.sum()) - 1).max() < 0.01
    assert open_source("scenes:val; scenes:test").weights is None
    for spec, rule, said in (("scenes:val; scenes:test", "sqr", "mixture='sqr' is no rule of shares; nearest: 'sqrt'"),
                             ("scenes:val", "sqrt", "several sources.*is one"), ("scenes:val@0; scenes:test", "sqrt", "positive @WEIGHT")):
        with pytest.raises(ValueError, match=said):
            open_source(spec, mixture=rule)


# ---- frames

def animation(kind, shades):
    frames = [Image.new("RGB", (9, 9), (shade,) * 3) for shade in shades]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=40, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_frames_of_an_animation_are_spread_over_it(tokenizer, kind):
    moving = {"image": animation(kind, range(0, 250, 25)), "text": ["it moves"]}
    with eval_batches(Samples(moving), tokenizer, **EVAL, batch=1, length=8, rows=Rows(images=4)) as batches:
        (batch, _), = batches
    validate(batch)
    assert batch["images"].shape == (1, 4, 8, 8, 3) and np.abs(batch["images"][0, :, 0, 0, 0].astype(int) - [0, 50, 125, 175]).max() <= 2
    with eval_batches(Samples(moving), tokenizer, **EVAL, batch=1, length=8) as batches:
        assert next(batches)[0]["image"].shape == (1, 8, 8, 3)      # one image: the first frame
    with train_batches(Samples({"frames": [np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)] * 5, "text": ["x"]}), tokenizer,
                       **OPTIONS | {"augment": "random_resized_crop(scale=0.1..0.5)|flip|color_jitter(0.4, 0.4, 0.4, 0.1)"}, batch=2, length=8,
                       rows=Rows(images=3)) as batches:
        drawn = next(batches)[1]["images"]
    assert (drawn[:, 0] == drawn[:, 1]).all() and (drawn[:, 0] == drawn[:, 2]).all() and (drawn[0] != drawn[1]).any()      # one way to cut a video
    still, cut = io.BytesIO(), Samples({"image": moving["image"][:-40], "text": ["x"]}, {"image": b"no picture", "text": ["x"]})
    Image.new("RGB", (9, 9)).save(still, "PNG")
    with eval_batches(Samples({"image": still.getvalue(), "text": ["x"]}), tokenizer, **EVAL, batch=1, length=8, rows=Rows(images=4)) as batches:
        assert not next(batches)[0]["mask"].any() and batches.ledger.counts == {"image_count": 1}
    with eval_batches(cut, tokenizer, **EVAL, batch=2, length=8, rows=Rows(images=4)) as batches:
        next(batches)
        assert set(batches.ledger.counts) <= {"not_an_image", "broken_image", "truncated_image"} and batches.ledger.counts["not_an_image"] == 1


def test_a_folder_of_frames_is_a_video(tmp_path, tokenizer):
    (tmp_path / "clip").mkdir()
    for i in range(10):
        Image.new("RGB", (9, 9), (25 * i,) * 3).save(tmp_path / "clip" / f"{i:03d}.png")
    (tmp_path / "v.jsonl").write_text('{"image": "clip", "question": "what moves", "answer": "it"}\n')
    source = open_source(f"jsonl:{tmp_path / 'v.jsonl'}")
    with eval_batches(source, tokenizer, **EVAL, batch=1, length=8, rows=Rows(images=4), layout=Layout("joined", prompt_length=8)) as batches:
        (batch, meta), = batches
    assert batch["images"][0, :, 0, 0, 0].tolist() == [0, 50, 125, 175] and meta[0]["key"] == "clip" and meta[0]["answers"] == ["it"]
    (tmp_path / "clip" / "none").mkdir()
    (tmp_path / "w.jsonl").write_text('{"image": "clip/none", "text": "x"}\n')
    with pytest.raises(BadSample, match="missing_image"):
        open_source(f"jsonl:{tmp_path / 'w.jsonl'}")[0]


def test_text_alone_needs_no_image(tokenizer):
    class Texts(Samples):
        def __getitem__(self, i):
            return {"key": f"k{i}", **self.samples[i]}

    with train_batches(Texts({"text": ["red"]}, {"text": ["blue"]}), tokenizer, **OPTIONS, batch=2, length=4, rows=Rows(images=0)) as batches:
        batch = next(batches)[1]
    validate(batch)
    assert set(batch) == {"text", "text_mask", "caption_id", "image_id"} and {tokenizer.decode(ids) for ids in batch["text"]} == {"red", "blue"}
    assert preview(Texts({"text": ["red"]}), tokenizer, size=8, length=4, rows=Rows(images=0))["image"] is None


# ---- the data section

def stage_of(model=None, **data):
    config = tiny.tiny("clip").stages.pretrain
    config.data = {**config.data.to_dict(), **data}
    with config.model.unlocked():
        config.model.update(model or {})
    return resolve(config, "pretrain")


def test_a_stage_says_the_shapes_of_its_layout(tmp_path):
    layout = dict(layout="joined", prompt_length=40, length=8, instruction_tokenizer="scenes", instruction_length=40, templates="task", batch=4, size=32,
                  train="scenes:train/instruct", eval="scenes:test/choice", answers=4, answer_length=8)
    for name in ("joined", "apart"):
        stage = stage_of(**layout | {"layout": name})
        with stage.train_batches(stage.open(stage.data.train), 0, 1, tmp_path / "q.jsonl") as batches:
            (_, batch), = batches
        assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == {
            key: (value.shape, str(value.dtype)) for key, value in stage.spec.items()}
        assert ("target_mask" in batch) == (name == "joined") and ("prompt" in batch) == (name == "apart")
        scored = next(iter(stage.eval_batches(stage.open(stage.data.eval), 4, 4)))
        assert scored["prompt"].shape == (4, 40) and scored["answer"].shape[0] == 4 and (scored["label"] >= 0).all()
        assert stage.replies.decode(stage.replies(["a red circle"], 8)[0][0]) == "a red circle"
    assert stage_of().replies.kind == "sentencepiece"


def test_an_evaluation_may_have_other_frames_and_another_template():
    stage = stage_of(layout="joined", prompt_length=40, templates="task", size=32)
    batch = next(iter(stage.eval_batches(stage.open("scenes:test/video"), 2, 2, images=4, template="{q} - answer:")))
    assert batch["images"].shape == (2, 4, 32, 32, 3) and all(m["question"].endswith(" - answer:") for m in batch["meta"])
    with pytest.raises(ConfigError, match=r"stages\.pretrain\.evals: templates: '\{p\}' has the slot"):
        stage.eval_batches(stage.open("scenes:test/video"), 2, 2, template="{p}").__next__()


def test_a_model_that_goes_on_reads_as_the_one_it_came_from(tmp_path):
    """From a trained or imported directory come both tokenizers, the layout and the marks."""
    layout = dict(layout="joined", prompt_length=30, instruction_tokenizer="scenes_instruct", instruction_length=24, templates="task", marks=dict(begin=2))
    origin = stage_of(**layout)
    folder = tmp_path / "origin"
    for name in ("tokenizer", "instruction_tokenizer"):
        getattr(origin, name).save(folder / name)
    (folder / "config.json").write_text(configs.to_json(origin.config))
    config = tiny.tiny("clip")
    config.stages.pretrain = {**config.stages.pretrain.to_dict(), "model": "init", "init": str(folder), "data": dict(
        train="scenes:train/colour", eval="scenes:test/colour", batch=8, size=0, length=0, tokenizer="", layout="")}
    section = inherit(config, tmp_path, "pretrain")
    assert section.data.instruction_tokenizer == str(folder / "instruction_tokenizer") and section.data.marks.to_dict() == dict(begin=2)
    stage = resolve(section, "pretrain")
    assert stage.spec["instruction"].shape == (8, 24) and stage.spec["text"].shape == (8, 30 + origin.data.length)
    assert stage.instruction_tokenizer.vocab_size == 433 and stage.tokenizer.vocab_size == 401
    assert stage.replies.decode([2, *stage.tokenizer.body("red"), 2, 7]) == "red"      # a begin that is an end too
    config.stages.pretrain.data.layout = "plain"
    assert "instruction_tokenizer" not in inherit(config, tmp_path, "pretrain").data      # who says "plain" has no use for the rest


def test_a_loaded_model_replies_to_prompts():
    stage = stage_of(layout="joined", prompt_length=6, length=8, instruction_tokenizer="scenes", instruction_length=6, marks=dict(begin=2), size=16)
    model, seen = Model(stage, {}, {}), []

    def generate(batch, **options):
        seen.append((batch, options))
        return {"text": np.concatenate([np.full((len(batch["image"]), 1), 2), batch["instruction"][:, 1:]], 1)}

    model.predict = {"generate": generate}
    picture = np.zeros((16, 16, 3), np.uint8)
    assert model.reply(picture, ["is it red", "how many"], method="greedy") == ["is it red", "how many"]
    batch, options = seen[0]
    assert batch["image"].shape == (2, 16, 16, 3) and options == {"method": "greedy"}
    assert batch["prompt"].tolist() == [[0, 0, 2, *model.tokenizer.body("is it red")], [0, 0, 0, 2, *model.tokenizer.body("how many")]]
    assert model.reply([picture] * 3, "is it red") == ["is it red"] * 3
    with pytest.raises(ConfigError, match="3 images and 2 prompts"):
        model.reply([picture] * 3, ["a", "b"])
    with pytest.raises(ConfigError, match="data.layout='plain' and reads no prompt; nearest: caption"):
        Model(stage_of(), {}, {}).prompts("red")


def test_what_a_run_is_told_of_its_text(tokenizer):
    source, layout = open_source("scenes:train/colour"), Layout("joined", prompt_length=40, templates="task", marks=Marks(begin=2))
    told = preview(source, tokenizers.load("scenes_instruct"), size=32, length=4, augment="squash", layout=layout, captions=32)
    assert told["decoded"] == told["caption"] and told["ids"][0] == 2 == told["ids"][-1] and told["truncated"] == 0 and told["tokens_max"] <= 20
    short = preview(source, tokenizer, size=32, length=4, augment="squash", layout=Layout("apart", prompt_length=6), captions=32)
    assert short["truncated"] > 0.5 and short["decoded"].split()[-1] == short["caption"].split()[-1]


def test_a_stage_tells_the_model_the_marks_that_it_reads():
    layout = dict(layout="joined", prompt_length=8, instruction_tokenizer="scenes", instruction_length=8)
    stage = stage_of(marks=dict(begin=2, pad=900), **layout)
    assert stage.config.model.tokens.to_dict() == dict(vocab=901, bos=2, eos=2, pad=900)      # a row of its own for padding
    other = tokenizers.load("scenes")
    section, wrong = ConfigDict(dict(vocab=-1, bos=-1, dec=-1)), ConfigDict(dict(bos=7))
    fill_tokens(section, other, {"bos": 1, "eos": 2, "pad": 0}, "model.instruction_tokens", "scenes")
    assert section.to_dict() == dict(vocab=other.vocab_size + 1, bos=1, dec=other.vocab_size)
    with pytest.raises(ConfigError, match=r"instruction_tokens\.bos=7, but tokenizer 'scenes' has 1; nearest: 1"):
        fill_tokens(wrong, other, {"bos": 1, "eos": 2, "pad": 0}, "model.instruction_tokens", "scenes")
    with pytest.raises(ConfigError, match=r"instruction_tokens\.vocab=-1 is the instruction tokenizer's.*nearest: 'scenes'"):
        stage_of(dict(instruction_tokens=dict(vocab=-1)), layout="joined", prompt_length=8)


@pytest.mark.parametrize("data,message", [
    (dict(layout="jointed"), "layout='jointed'.*nearest: 'joined'"),
    (dict(layout="joined"), "layout='joined' needs prompt_length.*nearest: 1"),
    (dict(prompt_length=8), "prompt_length=8 has no use with layout='plain'; nearest: layout='joined'"),
    (dict(templates="vqa"), "templates='vqa' has no use with layout='plain'"),
    (dict(layout="joined", prompt_length=8, templates="vqaa"), "templates='vqaa' is no task; nearest: 'vqa'"),
    (dict(layout="joined", prompt_length=8, eval_template="{p}"), r"slot \{p\}; nearest: 'q'"),
    (dict(layout="joined", prompt_length=8, instruction_length=8), "instruction_tokenizer='' and instruction_length=8.*instruction_tokenizer='scenes'"),
    (dict(layout="joined", prompt_length=8, instruction_tokenizer="scenes"), "instruction_length=0.*nearest: instruction_length=32"),
    (dict(layout="apart", prompt_length=1), "prompt_length=1 does not hold the tokenizer's marks of a prompt; nearest: 2"),
    (dict(layout="joined", prompt_length=8, prefix="word"), "prefix='word'.*nearest: 'words'"),
    (dict(layout="joined", prompt_length=8, marks=dict(begn=2)), "marks.begn=2 is not known; nearest: 'begin'"),
    (dict(layout="joined", prompt_length=8, marks=dict(end="none")), "marks.end='none' with marks.after=''.*nearest: end='eos'"),
    (dict(layout="joined", prompt_length=8, marks=dict(end="none", after=" ")), "marks.after=' ' is no end.*nearest: end='eos'"),
    (dict(layout="joined", prompt_length=8, marks=dict(begin=-2)), "marks.begin=-2 is no id; nearest: -1"),
    (dict(layout="joined", prompt_length=8, images=2, swap="sides"), "swap='sides' is of captions.*nearest: swap=''"),
    (dict(layout="joined", prompt_length=8, answers=2, answer_length=4, classes=("a", "b")), r"answers=2 are candidates.*nearest: classes=\(\)")])
def test_what_does_not_go_together_is_refused_before_compile(data, message):
    with pytest.raises(ConfigError, match=r"stages\.pretrain\.data: .*" + message):
        stage_of(**data)


def test_a_row_is_what_is_said_of_it():
    said = Said((("q", "a"), ("r", "b")))
    assert (said.prompt, said.reply, said.instruction) == ("q a r", "b", "q r")
