"""Answering questions and classifying pairs: scores of stand-in predict functions over real files and scenes."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vlm_jax import evals, evaluate
from vlm_jax.data import tokenizers
from vlm_jax.data.pipeline import eval_batches
from vlm_jax.data.rows import Rows
from vlm_jax.data.sources import open_source
from vlm_jax.errors import ConfigError
from vlm_jax.evals.answers import CONTRACTIONS, Given, normalise
from vlm_jax.evals.evaluation import in_turn
from vlm_jax.evals.vqa import read_candidates


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load("scenes")


@pytest.fixture
def asked(tmp_path):
    """Three questions about two pictures: ten answers that differ, ten that agree, and one answer alone."""
    for name in ("a.png", "b.png"):
        out = io.BytesIO()
        Image.new("RGB", (8, 8), (9, 9, 9)).save(out, "PNG")
        (tmp_path / name).write_bytes(out.getvalue())
    rows = [{"image": "a.png", "question": "how many", "answer": ["two"] * 3 + ["2"] * 2 + ["Three"] * 2 + ["red", "blue", "A red"], "answer_type": "number",
             "question_id": 11},
            {"image": "a.png", "question": "is it", "answer": ["yes"] * 10, "answer_type": "yes/no"},
            {"image": "b.png", "question": "what colour", "answer": "Red.", "answer_type": "other"}]
    (tmp_path / "vqa.json").write_text(json.dumps(rows))
    return open_source(f"jsonl:{tmp_path / 'vqa.json'}")


def batches(source, tokenizer, batch=2, limit=None, **rows):
    with eval_batches(source, tokenizer, batch=batch, size=32 if source.name.startswith("scenes") else 8, length=30, limit=limit, rows=Rows(**rows)) as found:
        for arrays, meta in found:
            real = iter(meta)
            yield {**arrays, "meta": [next(real) if row else {} for row in arrays["mask"]]}


# answers

@pytest.mark.parametrize("answer,form", [
    ("The  Red, ball!", "red ball"), ("two", "2"), ("none", "0"), ("1,000", "1000"), ("3.5", "3.5"), ("U.S. flag.", "us flag"), ("t-shirt", "t shirt"),
    ("on/off", "on off"), ("dont know", "don't know"), ("it's 10:30", "it's 10:30"), ("whats that", "what's that"), ("an", ""), ("a\nb\t", "b"),
    ("well", "well"), ("couldve", "could've"), ("yes - no", "yes no")])
def test_answers_are_compared_as_the_evaluation_does(answer, form):
    assert normalise(answer) == form


def test_contractions_are_of_no_word_that_stands_by_itself():
    assert not {"well", "were", "shed", "wed", "hell", "shell", "ill", "its", "id"} & CONTRACTIONS.keys()
    assert CONTRACTIONS["wont"] == "won't" and CONTRACTIONS["youve"] == "you've" and CONTRACTIONS["oclock"] == "o'clock"


def test_accuracy_leaves_each_person_out():
    def by_hand(answers, text):
        forms = [normalise(a) for a in answers]
        return np.mean([min(1, sum(f == normalise(text) for j, f in enumerate(forms) if j != i) / 3) for i in range(len(forms))])

    answers = ["two"] * 3 + ["2"] * 2 + ["Three"] * 2 + ["red", "blue", "A red"]
    for text in ("2", "three", "red", "the blue", "green"):
        assert Given(answers).accuracy(text) == pytest.approx(by_hand(answers, text))
    assert Given(answers).accuracy("two.") == 1 and Given(answers).accuracy("blue") == pytest.approx(0.3) and Given(answers).most == "2"
    assert Given(["a cat"] * 10).accuracy("cat") == 0       # where all agree, answers are compared as they are
    assert Given(["a cat"] * 10).accuracy("a cat ") == 1
    assert Given(["A cat."]).accuracy("cat") == 1 and Given(["x", "y"]).accuracy("y") == 1 and Given(["x"]).accuracy("z") == 0


# vqa

def ranking(choices, seen):
    def answer(batch, method, k):
        assert method == "rank" and set(batch) == {"image", "text", "text_mask", "candidates", "candidates_mask"}
        seen.append((k, batch["candidates"], batch["candidates_mask"]))
        rows = len(batch["image"])
        picked = [choices.pop(0) if choices else 0 for _ in range(rows)]
        return {"answer": np.array(picked, np.int32), "score": np.arange(rows, dtype=np.float32)}
    return {"answer": answer}


def test_ranked_answers_are_scored_with_baselines(asked, tokenizer):
    listed, seen = ("red", "yes", "2", "green"), []
    out = evals.run("vqa", ranking([2, 1, 3], seen), batches(asked, tokenizer, answers=2, answer_length=6), tokenizer=tokenizer, source=asked,
                    candidates=listed, k=128)
    assert seen[0][0] == 4 and seen[0][1].shape == (4, 4) and seen[0][2].sum(1).tolist() == [3, 3, 4, 3]      # a digit is two pieces
    assert [tokenizer.decode(ids) for ids in seen[0][1]] == list(listed)
    s = out.scores
    assert s["vqa/accuracy"] == pytest.approx(2 / 3) and s["vqa/questions"] == 3
    red = Given(asked[0]["all_answers"]).accuracy("red")
    assert red == pytest.approx(0.6)
    assert s["vqa/accuracy/chance"] == pytest.approx(((red + 1) / 4 + 1 / 4 + 1 / 4) / 3)
    assert s["vqa/accuracy/most_frequent"] == pytest.approx(1 / 3)      # "yes"
    assert s["vqa/accuracy/ci_low"] <= s["vqa/accuracy"] <= s["vqa/accuracy/ci_high"]
    assert s["vqa/accuracy/number"] == 1 and s["vqa/accuracy/other"] == 0 and s["vqa/accuracy/yes or no"] == 1
    assert s["vqa/accuracy/other/chance"] == pytest.approx(1 / 4)
    assert s["vqa/reachable"] == 1 and s["vqa/truncated"] == 0
    assert out.items[0] | {"answers": 0} == {"key": "a.png", "question": "how many", "answer": "2", "score": 0.0, "accuracy": 1.0, "answers": 0,
                                             "kind": "number", "question_id": 11}
    assert [p["ok"] for p in out.pictures["captions"]] == [True, True, False] and out.pictures["captions"][0]["generated"] == "how many 2"
    short = evals.run("vqa", ranking([0, 0, 0], seen), batches(asked, tokenizer), tokenizer=tokenizer, candidates=("red",), answer_length=2).scores
    assert short["vqa/truncated"] == 1 and short["vqa/reachable"] == pytest.approx(1 / 3)


def test_candidates_are_counted_in_the_training_source(asked, tokenizer, tmp_path):
    assert read_candidates("train:2", asked) == ["yes", "two"]
    assert read_candidates("train:99", asked)[:3] == ["yes", "two", "2"] and len(read_candidates("train:99", asked)) == 8
    assert read_candidates("train:5", asked, 1) == ["two", "2", "Three", "A red", "blue"]
    questions = open_source("scenes:train/vqa")
    assert {"yes", "no", "two"} <= set(read_candidates("train:40", questions, 300))
    (tmp_path / "list.txt").write_text("red\n\nblue\nred\n")
    (tmp_path / "answer_list.json").write_text('["a", "b"]')
    assert read_candidates(str(tmp_path / "list.txt")) == ["red", "blue"] and read_candidates(str(tmp_path / "answer_list.json")) == ["a", "b"]
    out = evals.run("vqa", ranking([], []), batches(asked, tokenizer), tokenizer=tokenizer, train_source=asked, candidates="train:3").scores
    assert out["vqa/accuracy"] == out["vqa/accuracy/most_frequent"] == pytest.approx(1 / 3)


def test_answers_in_own_words(asked, tokenizer):
    def answer(batch, method, beams):
        assert method == "generate" and beams == 3 and "candidates" not in batch
        ids, _, _ = tokenizer(["2", "red"], 6)
        ids[1][ids[1] == tokenizer.eos_id] = ids[1][1]       # has no end
        return {"text": ids, "score": np.zeros(2)}

    s = evals.run("vqa", {"answer": answer}, batches(asked, tokenizer), tokenizer=tokenizer, method="generate", beams=3).scores
    assert s["vqa/accuracy"] == pytest.approx(1 / 3) and s["vqa/truncated"] == pytest.approx(1 / 3) and "vqa/reachable" not in s
    assert s["vqa/accuracy/chance"] == pytest.approx(((1 + 0.6) / 3 + 1 / 3 + 1 / 3) / 3)      # one of 2, yes, red


@pytest.mark.parametrize("options,message", [
    (dict(method="rnak"), "method='rnak'.*nearest: 'rank'"), (dict(candidates="train:x"), "candidates='train:x'.*nearest: 'train:3128'"),
    (dict(candidates="train:5"), "'train:5' needs a training source"), (dict(candidates=()), r"candidates=\(\) gives no answer"),
    (dict(candidates="nowhere/list.txt"), "candidates='nowhere/list.txt': no such file.*nearest"), (dict(k=0), "k=0.*nearest: 1")])
def test_wrong_options_of_vqa_name_the_nearest(asked, tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        evals.run("vqa", ranking([], []), batches(asked, tokenizer), tokenizer=tokenizer, **options)


def test_vqa_without_answers_says_so(tokenizer):
    plain = open_source("scenes:test")
    with pytest.raises(ConfigError, match="'test/00000000' has no answers.*data.answer"):
        evals.run("vqa", ranking([], []), batches(plain, tokenizer, limit=2), tokenizer=tokenizer, candidates=("red",))
    with pytest.raises(ConfigError, match="scenes:test has no answers"):
        read_candidates("train:4", plain, 4)
    with pytest.raises(ConfigError, match="needs predict function 'answer'"):
        evals.run("vqa", {"embed": None}, [], tokenizer=tokenizer)


# classify

def test_pairs_are_classified_with_recall_of_each_class(tokenizer):
    source, seen = open_source("scenes:test/pairs"), []

    def classify(batch):
        assert set(batch) == {"images", "text", "text_mask"} and batch["images"].shape == (4, 2, 32, 32, 3)
        seen.append(1)
        return {"logits": np.tile([0.0, 1.0 if len(seen) < 3 else np.nan], (4, 1))}

    out = evals.run("classify", {"classify": classify}, batches(source, tokenizer, 4, 12, images=2, classes=2), tokenizer=tokenizer, source=source)
    labels = np.array([source[i]["label"] for i in range(12)])
    assert set(labels.tolist()) == {0, 1}
    hits = (labels == 1) & (np.arange(12) < 8)      # what is no number is wrong
    s = out.scores
    assert s["classify/accuracy"] == pytest.approx(hits.mean()) and s["classify/accuracy/chance"] == 0.5 and s["classify/samples"] == 12
    assert s["classify/accuracy/majority"] == pytest.approx(max(labels.mean(), 1 - labels.mean()))
    assert s["classify/recall/False"] == 0 and s["classify/recall/True"] == pytest.approx(hits[labels == 1].mean())
    assert s["classify/accuracy/ci_low"] <= s["classify/accuracy"] <= s["classify/accuracy/ci_high"]
    assert out.items[0]["predicted"] == "True" and out.items[0]["text"] == source[0]["text"][0]
    assert out.pictures["captions"][0]["image"].shape == (32, 64, 3)


@pytest.mark.parametrize("kind,name", [("retrieval", "embed"), ("caption", "generate")])
def test_evaluations_of_one_image_refuse_pairs(kind, name, tokenizer):
    pairs = batches(open_source("scenes:test/pairs"), tokenizer, 2, 2, images=2)
    with pytest.raises(ConfigError, match=r"the batches have 2 \(data.images\); nearest: kind='classify'"):
        evals.run(kind, {name: None}, pairs, tokenizer=tokenizer)


def test_a_reader_of_the_label_is_right_about_entailment(tokenizer):
    source = open_source("scenes:val/entailment")
    labels = iter([source[i]["label"] for i in range(6)])
    predict = {"classify": lambda batch: {"logits": np.eye(3)[[next(labels) for _ in batch["image"]]]}}
    s = evals.run("classify", predict, batches(source, tokenizer, 3, 6, classes=3), tokenizer=tokenizer, source=source).scores
    assert s["classify/accuracy"] == 1 and s["classify/accuracy/chance"] == pytest.approx(1 / 3)


def test_wrong_classes_are_refused(asked, tokenizer):
    source = open_source("scenes:val/entailment")
    two = {"classify": lambda batch: {"logits": np.zeros((len(batch["text"]), 2))}}
    with pytest.raises(ConfigError, match="tells 2 classes apart, not 3; nearest: 2 names"):
        evals.run("classify", two, batches(source, tokenizer, 2, 2), tokenizer=tokenizer, source=source)
    with pytest.raises(ConfigError, match=r"classes=\[\].*nearest: data.classes"):
        evals.run("classify", two, batches(asked, tokenizer), tokenizer=tokenizer, source=asked)
    with pytest.raises(ConfigError, match="'a.png' has label=None, not one of the 2 classes; nearest: 0"):
        evals.run("classify", two, batches(asked, tokenizer), tokenizer=tokenizer, classes=("a", "b"))


# the command

@pytest.mark.parametrize("flag,kind", [("--candidates=list.txt", "caption"), ("--method=generate", "classify")])
def test_flags_of_vqa_are_its_own(flag, kind, capsys):
    assert evaluate.main(["nowhere", kind, "--data=scenes:test", flag]) == 43
    assert f"{flag} has no use in {kind!r}; nearest: 'vqa'" in capsys.readouterr().err


def test_examples_are_right_and_wrong_in_turn():
    assert in_turn([0, 2, 4, 6], [1, 3, 5], 4) == [0, 2, 1, 3]
    assert in_turn([0], [1, 3, 5], 4) == [0, 1, 3, 5] and in_turn([0, 2, 4], [], 2) == [0, 2]
