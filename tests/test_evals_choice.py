"""Ranking candidates: accuracy, MRR, AUC and verbalisers of stand-in predict functions over real samples; prompts reach the other evaluations."""

import numpy as np
import pytest

from vlm_jax import evals
from vlm_jax.data import tokenizers
from vlm_jax.data.layouts import Layout, Marks, Writer
from vlm_jax.data.pipeline import eval_batches
from vlm_jax.data.rows import Rows
from vlm_jax.data.sources import open_source
from vlm_jax.errors import ConfigError
from vlm_jax.evals.choice import area

LAYOUT = Layout("joined", prompt_length=40, instruction_length=40, templates="task")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load("scenes_instruct")


def batches(source, tokenizer, limit=None, batch=3, layout=LAYOUT, **rows):
    with eval_batches(source, tokenizer, batch=batch, size=32, length=60, limit=limit, augment="squash", threads=0, layout=layout,
                      rows=Rows(candidates=True, **rows), instruction_tokenizer=tokenizer) as found:
        for arrays, meta in found:
            real = iter(meta)
            yield {**arrays, "meta": [next(real) if row else {} for row in arrays["mask"]]}


class Asked:
    """Questions with candidates, about one grey picture each."""
    name = "asked"

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return {"key": str(i // 2), "image": np.zeros((32, 32, 3), np.uint8), **self.samples[i]}


def ranking(scores, seen):
    scores = iter(scores)

    def rank(batch, **options):
        seen.append((batch, options))
        out = np.full(batch["answer"].shape[:2], 9.0)      # what is no candidate scores high: it must not be looked at
        for row in out:
            given = next(scores, ())
            row[:len(given)] = given
        return {"score": out}
    return {"rank": rank}


FOUR = [dict(prompt="what colour", choices=["red", "blue", "green"], label=1, kind="colour"),
        dict(prompt="how many", choices=["one", "two"], label=0, kind="count"),
        dict(prompt="where is it", choices=["left", "right", "above"], label=2, kind="relation"),
        dict(prompt="what colour is it", choices=["white", "red"], label=1, kind="colour")]


@pytest.mark.parametrize("answers", [dict(answers=3, answer_length=4), {}])
def test_the_right_candidate_has_a_rank(tokenizer, answers):
    seen = []
    out = evals.run("choice", ranking([(0.1, 0.9, 0.5), (0.2, 0.2), (np.nan, 0.5, 0.1), (0.3, np.nan)], seen), batches(Asked(*FOUR), tokenizer, **answers),
                    tokenizer=tokenizer, rule="mean")
    s = out.scores
    assert [item["rank"] for item in out.items] == [1, 2, 3, 2] and [item["chosen"] for item in out.items] == [1, 0, 1, 0]     # ties and nan are wrong
    assert s["choice/accuracy"] == 0.25 and s["choice/MRR"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 2) / 4) and s["choice/questions"] == 4
    assert s["choice/accuracy/chance"] == pytest.approx((1 / 3 + 1 / 2) / 2) and s["choice/MRR/chance"] == pytest.approx(((11 / 18) + 0.75) / 2)
    assert s["choice/accuracy/colour"] == 0.5 and s["choice/MRR/relation"] == pytest.approx(1 / 3) and "choice/AUC" not in s
    assert s["choice/accuracy/ci_low"] <= 0.25 <= s["choice/accuracy/ci_high"] and len(out.pictures["captions"]) == 4
    batch, options = seen[0]
    assert options == {"rule": "mean"} and set(batch) == {"image", "prompt", "prompt_mask", "instruction", "instruction_mask", "answer", "answer_mask"}
    assert [tokenizer.decode(ids) for ids in batch["answer"][0][:3]] == ["red", "blue", "green"] and not batch["answer_mask"][1, 2:].any()
    assert tokenizer.decode(batch["prompt"][0][batch["prompt_mask"][0]]) == "what colour"


def test_two_classes_have_an_area_and_words_that_stand_for_them(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, positive = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
        pairs = [(p > n) + (p == n) / 2 for p in score[positive] for n in score[~positive]]
        assert area(score, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(area(np.ones(3), np.ones(3, bool)))
    source, seen = open_source("scenes:test/existence:40"), []
    truth = [source[i]["text"][0] == "yes" for i in range(40)]
    words = (("no", "false"), ("yes", "true"))
    told = [np.log([0.3, 0.05, 0.2, 0.3] if true else [0.1, 0.3, 0.35, 0.01]) for true in truth]
    told[0] = told[0][[2, 3, 0, 1]]      # one is wrong
    replies = Writer(LAYOUT, tokenizer, 60, tokenizer).replies
    s = evals.run("choice", ranking(told, seen), batches(source, tokenizer), tokenizer=replies, verbalisers=words).scores
    assert s["choice/accuracy"] == pytest.approx(39 / 40) and s["choice/accuracy/existence"] == s["choice/accuracy"] and "choice/MRR" not in s
    margin = np.array([np.logaddexp(row[2], row[3]) - np.logaddexp(row[0], row[1]) for row in told])
    assert s["choice/AUC"] == pytest.approx(area(margin, np.array(truth))) and s["choice/AUC/chance"] == 0.5 and 0.9 < s["choice/AUC"] < 1
    assert s["choice/AUC/ci_low"] <= s["choice/AUC"] <= s["choice/AUC/ci_high"]
    batch = seen[0][0]
    assert batch["answer"].shape[:2] == (3, 4) and [tokenizer.decode(ids) for ids in batch["answer"][2]] == ["no", "false", "yes", "true"]
    same = [dict(prompt="is it", choices=["no", "yes"], label=i % 2) for i in range(6)]
    s = evals.run("choice", ranking([(0, i % 2) for i in range(6)], []), batches(Asked(*same), tokenizer), tokenizer=tokenizer).scores
    assert s["choice/AUC"] == 1 and s["choice/MRR"] == pytest.approx(0.75)      # yes is seen; no is a tie


@pytest.mark.parametrize("options,message", [
    (dict(verbalisers=(("yes",),)), "verbalisers=.*nearest: .*no.*false"), (dict(verbalisers=(("yes",), ("yes", "no"))), "words of its own"),
    (dict(), "label=None of the candidates"), (dict(verbalisers=(("red",), ("blue",))), "label=None of the candidates")])
def test_what_cannot_be_ranked_is_refused(tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        evals.run("choice", ranking([], []), batches(open_source("scenes:test/existence:3"), tokenizer), tokenizer=tokenizer, **options)
    with pytest.raises(ConfigError, match="needs predict function 'rank'"):
        evals.run("choice", {}, (), tokenizer=tokenizer)


def test_answers_in_own_words_are_scored_by_kind_and_read_to_their_own_end(tokenizer):
    layout = Layout("joined", prompt_length=40, templates="task", instruction_length=40, marks=Marks(after=".", end="none", candidate_end="none"))
    replies = Writer(layout, tokenizer, 60, tokenizer).replies
    source, given = open_source("scenes:test/count+colour:12"), []

    def answer(batch, method):
        given.append(batch)
        ids, mask, _ = replies(["two"] * 3, 5)
        assert (ids[:, 1] == replies.eos_id).all() and replies.eos_id == tokenizer.body(".")[-1]
        ids[:, 2:] = tokenizer.body("red")[0]      # what comes behind the end is not read
        return {"text": ids, "score": np.zeros(3)}

    out = evals.run("vqa", {"answer": answer}, batches(source, tokenizer, layout=layout), tokenizer=replies, method="generate")
    counts = [source[i]["text"][0] == "two" for i in range(12) if source[i]["kind"] == "count"]
    assert out.scores["vqa/accuracy/count"] == pytest.approx(np.mean(counts)) and out.scores["vqa/accuracy/colour"] == 0 and out.scores["vqa/truncated"] == 0
    assert set(given[0]) == {"image", "prompt", "prompt_mask", "instruction", "instruction_mask"}
    assert out.items[0]["question"].startswith("question: ") and out.items[0]["answer"] == "two"


def test_captions_are_asked_for_and_compared_with_replies(tokenizer):
    source, given = open_source("scenes:test/caption:6"), []

    def generate(batch, method):
        given.append(batch)
        rows = range(3 * (len(given) - 1), 3 * len(given))
        return {"text": tokenizer([source[i]["text"][1] for i in rows], 60)[0], "score": np.zeros(3)}

    out = evals.run("caption", {"generate": generate}, batches(source, tokenizer), tokenizer=tokenizer, source=source)
    assert out.scores["caption/exact"] == 1 and out.scores["caption/facts/exact"] == 1 and "prompt" in given[0] and "text" not in given[0]
