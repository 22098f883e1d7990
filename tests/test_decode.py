"""Decoding against references written from the definitions, on models small enough to enumerate."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.decode import beam, choose, generate
from vlm_jax.decode.cache import gather_rows

VOCAB, BOS, EOS, OTHER_EOS, PAD, LENGTH = 6, 1, 2, 3, 0, 6


class Tiny:
    """Logits from the whole history, which only the cache holds: [layers, rows, LENGTH] and a counter."""

    def __init__(self, rows, seed=0, spread=2.0):
        rng = np.random.default_rng(seed)
        self.rows = rows
        self.tables = jnp.asarray(rng.normal(size=(LENGTH, VOCAB, VOCAB)) * spread, jnp.float32)
        self.bias = jnp.asarray(rng.normal(size=(rows, VOCAB)) * 1.5, jnp.float32)

    def logits(self, ids, length, bias):
        """ids [n,LENGTH] of which ``length`` stand."""
        distance = jnp.clip(length - 1 - jnp.arange(LENGTH), 0, LENGTH - 1)
        seen = self.tables[distance[None, :], ids] * 0.5 ** distance[None, :, None]
        return jnp.sum(jnp.where((jnp.arange(LENGTH) < length)[None, :, None], seen, 0), axis=1) + bias

    def prefill(self, prompt):
        ids = jnp.zeros((self.rows, LENGTH), jnp.int32).at[:, :prompt.shape[1]].set(prompt)
        cache = {"layers": jnp.stack([ids, -ids]), "bias": self.bias, "length": jnp.int32(prompt.shape[1])}
        return self.logits(ids, cache["length"], self.bias), (), cache

    def extend(self, cache, tokens):
        ids = jax.lax.dynamic_update_slice_in_dim(cache["layers"][0], tokens, cache["length"], axis=1)
        length = cache["length"] + tokens.shape[1]
        # -ids is read back too, so that a reordering that misses a layer shows.
        logits = self.logits((ids - jnp.stack([ids, -ids])[1]) // 2, length, cache["bias"])
        return logits[:, None], "states", {"layers": jnp.stack([ids, -ids]), "bias": cache["bias"], "length": length}

    def generate(self, prompt=None, **options):
        options = {"max_length": LENGTH, "eos_ids": (EOS,), "pad_id": PAD, **options}
        prompt = jnp.full((self.rows, 1), BOS) if prompt is None else prompt
        axes = {"layers": 1, "bias": 0, "length": 0}
        run = jax.jit(lambda p: generate(self.prefill, self.extend, p, batch_axis=axes, **options))
        return jax.tree.map(np.asarray, run(prompt))

    def log_probs(self, row, texts):
        """float64 [n,V] next-id log-probabilities after texts (equal lengths) of one row, in numpy."""
        tables, logits = np.asarray(self.tables, np.float64), np.asarray(self.bias[row], np.float64)
        for distance, ids in enumerate(np.array(texts).T[::-1]):
            logits = logits + tables[distance, ids] * 0.5 ** distance
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def every_text(model, row, ends, penalty):
    """All complete continuations of <bos> with their scores, by enumeration."""
    done, open_texts = [], [((BOS,), 0.0)]
    while open_texts:
        scores = model.log_probs(row, [t for t, _ in open_texts])
        following = [(t + (i,), s + scores[n, i]) for n, (t, s) in enumerate(open_texts) for i in range(VOCAB)]
        finished = [x for x in following if x[0][-1] in ends or len(x[0]) == LENGTH]
        done += [(t, s / (len(t) - 1) ** penalty) for t, s in finished]
        open_texts = [x for x in following if not (x[0][-1] in ends or len(x[0]) == LENGTH)]
    return sorted(done, key=lambda x: -x[1])


def beam_reference(model, row, beams, ends, penalty):
    """Beam search by lists: ranked continuations, ended pool, early_stopping=False."""
    running, pool = [((BOS,), 0.0)], []
    for length in range(1, LENGTH):
        scores = model.log_probs(row, [t for t, _ in running])
        ranked = sorted(((t + (i,), s + scores[n, i]) for n, (t, s) in enumerate(running) for i in range(VOCAB)),
                        key=lambda x: -x[1])[:(1 + len(ends)) * beams]
        stops = [t[-1] in ends or length + 1 == LENGTH for t, _ in ranked]
        pool += [(t, s / length ** penalty) for (t, s), stop in zip(ranked[:beams], stops) if stop]
        pool = sorted(pool, key=lambda x: -x[1])[:beams]
        running = [x for x, stop in zip(ranked, stops) if not stop][:beams]
        if not running or len(pool) == beams and running[0][1] / length ** penalty <= pool[-1][1]:
            break
    return pool[0]


def padded(text):
    return list(text) + [PAD] * (LENGTH - len(text))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_texts(penalty):
    model = Tiny(rows=3)
    out = model.generate(method="beam", beams=150, length_penalty=penalty)
    for row in range(3):
        text, score = every_text(model, row, {EOS}, penalty)[0]
        assert out["text"][row].tolist() == padded(text)
        assert out["score"][row] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("beams,penalty,ends", [(1, 1.0, (EOS,)), (2, 1.0, (EOS,)), (3, 1.0, (EOS, OTHER_EOS)),
                                                (4, 0.6, (EOS,)), (2, 2.0, (EOS,))])
def test_narrow_beams_equal_the_list_reference(beams, penalty, ends):
    model = Tiny(rows=24, seed=1)
    out = model.generate(method="beam", beams=beams, length_penalty=penalty, eos_ids=ends)
    wanted = [beam_reference(model, row, beams, set(ends), penalty) for row in range(24)]
    assert out["text"].tolist() == [padded(t) for t, _ in wanted]
    np.testing.assert_allclose(out["score"], [s for _, s in wanted], atol=1e-5)
    if beams > 1:                                           # the cases would tell beam from greedy
        assert (out["text"] != model.generate(eos_ids=ends)["text"]).any()


def test_greedy_takes_the_likeliest_id_and_scores_what_it_took():
    model = Tiny(rows=8, seed=3)
    out = model.generate(length_penalty=1.0)
    for row in range(8):
        text, total = (BOS,), 0.0
        while len(text) < LENGTH and text[-1] != EOS:
            scores = model.log_probs(row, [text])[0]
            text, total = text + (int(np.argmax(scores)),), total + scores.max()
        assert out["text"][row].tolist() == padded(text)
        assert out["score"][row] == pytest.approx(total / (len(text) - 1), abs=1e-5)
    lengths = (out["text"] != PAD).sum(1)
    assert lengths.min() < LENGTH, "some row must end early for this test to test padding"


def test_a_longer_prompt_is_kept_and_not_scored():
    model = Tiny(rows=2, seed=5)
    prompt = jnp.array([[BOS, 4, 5], [BOS, 5, 4]])
    out = model.generate(prompt, max_length=4)
    assert out["text"][:, :3].tolist() == prompt.tolist()
    for row in range(2):
        scores = model.log_probs(row, [tuple(prompt[row].tolist())])[0]
        assert out["text"][row, 3] == np.argmax(scores)
        assert out["score"][row] == pytest.approx(scores.max(), abs=1e-5)


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_min_length_forbids_an_early_end(method):
    model = Tiny(rows=16, seed=3)
    free = model.generate(method=method, beams=2)["text"]
    assert ((free == EOS).argmax(1)[(free == EOS).any(1)] < 4).any()
    held = model.generate(method=method, beams=2, min_length=4)["text"]
    assert not (held[:, :4] == EOS).any()


def test_several_ends_each_end_a_text():
    text = Tiny(rows=32, seed=11).generate(eos_ids=(EOS, OTHER_EOS))["text"]
    assert (text == OTHER_EOS).any() and (text == EOS).any()
    ended = np.isin(text, (EOS, OTHER_EOS))
    after = np.cumsum(ended, axis=1) - ended > 0
    assert (text[after] == PAD).all() and ended.sum(1).max() == 1


def test_repetition_penalty_follows_ctrl():
    scores, penalise = jnp.array([[2.0, -2.0, 1.0, 3.0]]), jax.jit(choose.penalise_repetition, static_argnums=3)
    out = penalise(scores, jnp.array([[0, 1, 1, 3]]), jnp.int32(3), 2.0)
    assert out.tolist() == [[1.0, -4.0, 1.0, 3.0]]          # the fourth id does not stand yet
    out = penalise(scores[None], jnp.array([[[0, 1, 1, 3]]]), jnp.int32(3), 2.0)
    assert out.tolist() == [[[1.0, -4.0, 1.0, 3.0]]]        # beams beside the batch
    def repeats(**options):
        text = Tiny(rows=32, seed=7).generate(min_length=LENGTH, **options)["text"]
        return sum(len(row) - len(set(row.tolist())) for row in text)
    assert repeats(repetition_penalty=50.0) < repeats()


def frequencies(**options):
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.07, 0.03]))
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    drawn = jax.jit(lambda key: choose.draw(key, jnp.broadcast_to(logits, (40_000, 5)), **options))(jax.random.key(0))
    return np.bincount(np.asarray(drawn), minlength=5) / 40_000


@pytest.mark.parametrize("options,wanted", [
    ({}, [0.4, 0.3, 0.2, 0.07, 0.03]),
    ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
    ({"top_p": 0.69}, [4 / 7, 3 / 7, 0, 0, 0]),             # two ids reach 0.69
    ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0, 0]),         # three are needed for 0.71
    ({"top_p": 0.1}, [1, 0, 0, 0, 0]),
    ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0, 0]),  # 4/9 < 0.5 after the first cut
    ({"temperature": 0.5}, np.array([16, 9, 4, 0.49, 0.09]) / 29.58),
])
def test_sampling_draws_from_the_stated_distribution(options, wanted):
    found = frequencies(**options)
    np.testing.assert_allclose(found, wanted, atol=4 * math.sqrt(0.25 / 40_000))
    assert (found[np.asarray(wanted) == 0] == 0).all()


def test_sampled_texts_follow_the_model_and_the_key():
    model = Tiny(rows=1, seed=11)
    many = Tiny(rows=6000, seed=11)
    many.tables, many.bias = model.tables, jnp.broadcast_to(model.bias, (6000, VOCAB))
    options = {"method": "sample", "max_length": 3, "length_penalty": 0.0}
    out = many.generate(key=jax.random.key(1), **options)
    first = np.exp(model.log_probs(0, [(BOS,)])[0])
    for a, b in itertools.product(range(VOCAB), range(VOCAB)):
        wanted = first[a] * ((b == PAD) if a == EOS else np.exp(model.log_probs(0, [(BOS, a)])[0, b]))
        hits = (out["text"][:, 1] == a) & (out["text"][:, 2] == b)
        assert hits.mean() == pytest.approx(wanted, abs=4 * math.sqrt(0.25 / 6000))
        if hits.any() and not a == EOS:
            assert out["score"][hits][0] == pytest.approx(math.log(wanted), abs=1e-4)
    assert (many.generate(key=jax.random.key(1), **options)["text"] == out["text"]).all()
    assert (many.generate(key=jax.random.key(2), **options)["text"] != out["text"]).any()


def test_top_k_of_one_is_greedy():
    model = Tiny(rows=8, seed=3)
    sampled = model.generate(method="sample", top_k=1, key=jax.random.key(0), temperature=3.0)
    assert (sampled["text"] == model.generate()["text"]).all()


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_stops_when_every_row_is_done(method):
    calls = []

    def prefill(prompt):
        return jnp.zeros((2, VOCAB)).at[:, EOS].set(50.0), (), jnp.zeros(2)

    def extend(cache, tokens):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.zeros((tokens.shape[0], VOCAB)).at[:, EOS].set(50.0), (), cache

    run = jax.jit(lambda p: generate(prefill, extend, p, method=method, beams=2, max_length=500, eos_ids=EOS, pad_id=PAD))
    out = run(jnp.full((2, 1), BOS))
    jax.effects_barrier()
    assert out["text"][:, :3].tolist() == [[BOS, EOS, PAD]] * 2
    assert len(calls) <= 3                                  # beam must fill two places, greedy needs none


def test_gather_rows_knows_each_leafs_axis():
    cache = {"kv": jnp.arange(6).reshape(2, 3), "shared": jnp.arange(3), "index": jnp.int32(7)}
    out = gather_rows(cache, jnp.array([2, 2, 0, 1]), {"kv": 1, "shared": -1, "index": 0})
    assert out["kv"].tolist() == [[2, 2, 0, 1], [5, 5, 3, 4]]
    assert out["shared"].tolist() == [0, 1, 2] and out["index"] == 7
    with pytest.raises(ValueError, match="batch_axis=2 .*nearest: 1"):
        gather_rows(cache["kv"], jnp.array([0]), 2)


@pytest.mark.parametrize("options,words", [
    ({"method": "beams"}, "method='beams'.*nearest: 'beam'"), ({"max_length": 1}, "max_length=1.*nearest: 2"),
    ({"eos_ids": ()}, r"eos_ids=\(\)"), ({"beams": 0}, "beams=0.*nearest: 1"), ({"method": "sample"}, "key=None"),
    ({"min_length": 9}, "min_length=9.*nearest: 6"),
    ({"method": "sample", "key": 0, "temperature": 0.0}, "temperature=0.0"),
    ({"method": "sample", "key": 0, "top_p": 0.0}, "top_p=0.0"),
])
def test_errors_name_the_argument(options, words):
    with pytest.raises(ValueError, match=words):
        Tiny(rows=1).generate(**options)


def test_beams_sort_no_vocabulary():
    """Sorting all continuations of a row takes XLA on CPUs thirty times as long as finding the few best."""
    table = jnp.zeros((1000, 1000))

    def found(prompt, table):
        return beam.search(lambda p: (table[p[:, -1]], (), {"x": prompt}), lambda cache, ids: (table[ids], (), cache), prompt, beams=5,
                           max_length=6, min_length=6, length_penalty=1.0, repetition_penalty=1.0, eos_ids=(2,), pad_id=1, batch_axis=0, rule="transformers_4.33")

    program = jax.jit(found).lower(jnp.zeros((2, 1), jnp.int32), table).compile().as_text()
    assert "TopK" in program and not re.search(r"\[2,5000\]\S* sort\(|\[2,5000\]\S*\) sort\(", program)
