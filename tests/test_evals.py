"""Evaluations over numpy stand-ins for predict functions, against figures worked out by hand or by brute force."""

import json
import math
import pathlib

import numpy as np
import pytest

from vlm_jax import evals, evaluate
from vlm_jax.errors import ConfigError
from vlm_jax.evals import bootstrap, codebook, prompts, text_metrics
from vlm_jax.evals.rank import chance_mean, chance_median, chance_within, rank, rerank

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "caption_metrics.json").read_text())
WORDS = ["<pad>", "<bos>", "<eos>", "a", "red", "blue", "green", "circle", "square", "star", "the", "above", "small"]


class Tokenizer:
    pad_id, bos_id, eos_id = 0, 1, 2

    def __call__(self, texts, length):
        ids, cut = np.zeros((len(texts), length), np.int32), 0
        for i, text in enumerate(texts):
            row = [1, *(WORDS.index(w) for w in text.split()), 2]
            cut += len(row) > length
            ids[i, :len(row[:length])] = row[:length]
        return ids, ids != 0, cut

    def decode(self, ids):
        return " ".join(WORDS[i] for i in ids if i > 2)


def batches(samples, size=4, length=8):
    """Batches as the trainer hands them over, filled up to ``size`` rows. An image's first pixel is its vector."""
    for start in range(0, len(samples), size):
        part = samples[start:start + size]
        image = np.zeros((size, 2, 2, 3), np.uint8)
        for row, sample in enumerate(part):
            image[row, 0, 0] = sample["vector"]
        ids, mask, _ = Tokenizer()([s["captions"][0] for s in part] + [""] * (size - len(part)), length)
        yield {"image": image, "text": ids, "text_mask": mask, "mask": np.arange(size) < len(part),
               "meta": [{"key": f"k{start + i}", "index": start + i, **s} for i, s in enumerate(part)] + [{}] * (size - len(part))}


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


COLOURS = {"red": 0, "blue": 1, "green": 2}


def embed(batch):
    """Images: their first pixel as a vector; texts: which colours they name. Asserts fixed shapes."""
    out = {}
    if "image" in batch:
        out["image_embed"] = unit(batch["image"][:, 0, 0].astype(np.float32))
    if "text" in batch:
        assert batch["text"].shape == (4, 8) and batch["text_mask"].any(1).all()
        hits = [[(row == WORDS.index(c)).sum() for c in COLOURS] for row in batch["text"]]
        out["text_embed"] = unit(np.array(hits, np.float32))
    return out


SAMPLES = [{"vector": (200, 10, 0), "captions": ["a red circle", "red star"], "label": 0},
           {"vector": (0, 200, 20), "captions": ["a blue square"], "label": 1},
           {"vector": (0, 30, 200), "captions": ["a green star", "green"], "label": 2},
           {"vector": (200, 0, 90), "captions": ["a green circle"], "label": 0},
           {"vector": (20, 0, 100), "captions": ["the green star"], "label": 0}]


def run(kind, samples=SAMPLES, predict=None, **options):
    return evals.run(kind, predict or {"embed": embed}, batches(samples), tokenizer=Tokenizer(), **options)


# retrieval

def brute_ranks(samples):
    """Both directions from the full matrix, one query at a time."""
    images = unit(np.array([s["vector"] for s in samples], np.float32))
    captions = [(i, c) for i, s in enumerate(samples) for c in s["captions"]]
    texts = unit(np.array([[c.split().count(w) for w in COLOURS] for _, c in captions], np.float32))
    s = images @ texts.T
    to_image = [1 + sum(s[j, c] >= s[i, c] - 1e-6 for j in range(len(samples)) if j != i) for c, (i, _) in
                enumerate(captions)]
    to_text = [1 + sum(s[i, c] >= max(s[i, d] for d, (j, _) in enumerate(captions) if j == i) - 1e-6
                       for c, (j, _) in enumerate(captions) if j != i) for i in range(len(samples))]
    return np.array(to_image), np.array(to_text)


def test_retrieval_equals_brute_force_in_both_directions():
    out = run("retrieval")
    to_image, to_text = brute_ranks(SAMPLES)
    assert to_image.tolist() == [1, 1, 1, 1, 1, 3, 2]       # so that a changed stand-in cannot hide a failure
    for name, ranks in (("text_to_image", to_image), ("image_to_text", to_text)):
        for k in (1, 5, 10):
            assert out.scores[f"retrieval/{name}/R@{k}"] == pytest.approx((ranks <= k).mean())
        assert out.scores[f"retrieval/{name}/mean_rank"] == pytest.approx(ranks.mean())
        assert out.scores[f"retrieval/{name}/median_rank"] == np.median(ranks)
    assert [i["rank"] for i in out.items if i["query"] == "text"] == to_image.tolist()
    assert [i["rank"] for i in out.items if i["query"] == "image"] == to_text.tolist()
    assert out.scores["retrieval/images"] == 5 and out.scores["retrieval/captions"] == 7
    assert out.items[0] == {"query": "text", "key": "k0", "caption": "a red circle", "rank": 1, "top": ["k0", "k3", "k4", "k1", "k2"]}


def test_retrieval_has_chance_and_interval_beside_every_score():
    scores = run("retrieval").scores
    assert scores["retrieval/text_to_image/R@1/chance"] == pytest.approx(1 / 5)
    assert scores["retrieval/image_to_text/R@1/chance"] == pytest.approx((2 / 7 + 1 / 7 + 2 / 7 + 1 / 7 + 1 / 7) / 5)
    assert scores["retrieval/text_to_image/mean_rank/chance"] == pytest.approx(3.0)
    for name in [n for n in scores if n.count("/") == 2 and n.split("/")[1] in ("text_to_image", "image_to_text")]:
        assert scores[f"{name}/ci_low"] <= scores[name] <= scores[f"{name}/ci_high"]
        assert math.isfinite(scores[f"{name}/chance"])
    assert run("retrieval").scores == scores                # deterministic


def test_equal_captions_are_wrong_or_right_as_asked():
    twins = [{"vector": (200, 0, 9), "captions": ["a red circle"]}, {"vector": (200, 9, 0), "captions": ["a red circle"]},
             {"vector": (0, 0, 200), "captions": ["a green star"]}]
    wrong = run("retrieval", twins).scores
    assert wrong["retrieval/duplicates"] == pytest.approx(2 / 3)
    assert wrong["retrieval/image_to_text/R@1"] == pytest.approx(1 / 3)         # equal texts tie, against the model
    right = run("retrieval", twins, duplicates="right").scores
    assert right["retrieval/image_to_text/R@1"] == right["retrieval/text_to_image/R@1"] == 1
    assert right["retrieval/text_to_image/R@1/chance"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    with pytest.raises(ConfigError, match="duplicates='good'"):
        run("retrieval", twins, duplicates="good")


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_collapsed_or_broken_model_ranks_last(value):
    same = np.full((6, 3), value)
    ranks, _, _ = rank(same, same, [[i] for i in range(6)])
    assert ranks.tolist() == [6] * 6


def test_ranks_do_not_depend_on_the_chunk(monkeypatch):
    rng = np.random.default_rng(0)
    queries, targets = unit(rng.normal(size=(50, 8))), unit(rng.normal(size=(70, 8)))
    right = [sorted(rng.choice(70, size=rng.integers(1, 4), replace=False).tolist()) for _ in range(50)]
    whole = rank(queries, targets, right)
    monkeypatch.setattr("vlm_jax.evals.rank.CELLS", 150)
    for a, b in zip(whole, rank(queries, targets, right)):
        np.testing.assert_array_equal(a, b)
    full = queries @ targets.T
    wanted = [1 + sum(full[q, t] >= max(full[q, r]) for t in range(70) if t not in r) for q, r in enumerate(right)]
    assert whole[0].tolist() == wanted
    assert (whole[1] == np.argsort(-full, axis=1)[:, :5]).all()


def test_chance_levels_match_random_orders():
    rng, total, sizes = np.random.default_rng(0), 12, np.array([1, 2, 5])
    drawn = np.array([[rng.permutation(total)[:p].min() + 1 for p in sizes] for _ in range(20_000)])
    for k in (1, 3, 10, 12):
        assert chance_within(k, total, sizes) == pytest.approx((drawn <= k).mean(), abs=0.01)
    assert chance_mean(total, sizes) == pytest.approx(drawn.mean(), abs=0.05)
    assert chance_median(total, sizes) == np.median(drawn)


def test_retrieval_pictures_hold_what_they_show():
    out = run("retrieval", queries=2)
    similarity = out.pictures["similarity"]
    assert similarity["matrix"].shape == (5, 5) and len(similarity["images"]) == len(similarity["captions"]) == 5
    assert similarity["captions"][0] == "a red circle" and similarity["images"][0].dtype == np.uint8
    first = out.pictures["neighbours"][0]
    assert first["query"] == "a red circle" and first["right"] == [True] + [False] * 4
    assert first["scores"] == sorted(first["scores"], reverse=True) and len(first["images"]) == 5


def test_cut_captions_are_counted():
    long = [dict(SAMPLES[0], captions=["a red circle above a small blue square"]), SAMPLES[1]]
    assert run("retrieval", long).scores["retrieval/truncated"] == 0.5


# re-ranking

def matcher(seen=None, broken=()):
    """An arbitrary function of the pair, of features alone: token 0 of an image is its first pixel, state 1 of a text its ids."""
    def features(batch):
        assert set(batch) in ({"image"}, {"text", "text_mask"})
        return {"image": batch["image"][:, :1, 0].astype(np.float32)} if "image" in batch else {"text": np.stack([batch["text"]] * 2, 1)}

    def match(batch):
        assert set(batch) == {"image_features", "text_features", "text", "text_mask"} and len(batch["text"]) == 4
        assert (batch["text_features"][:, 1] == batch["text"]).all()
        code = (batch["image_features"][:, 0] @ np.array([1.0, 0.37, 0.59])) * (batch["text"] @ np.arange(1, 9))
        if seen is not None:
            seen.append(code)
        return {"match": np.stack([np.full(4, 1e3), np.where(np.isin(batch["text"][:, 2], broken), np.nan, np.sin(code))], 1)}
    return {"embed": embed, "features": features, "match": match}


def exhaustive(samples=SAMPLES, cosine=0.0):
    """Both directions' ranks from the matching head on all pairs, one query at a time."""
    captions = [(i, c) for i, s in enumerate(samples) for c in s["captions"]]
    code = [np.array(s["vector"]) @ np.array([1.0, 0.37, 0.59]) for s in samples]
    ids = [Tokenizer()([c], 8)[0][0] @ np.arange(1, 9) for _, c in captions]
    images = unit(np.array([s["vector"] for s in samples], np.float32))
    texts = unit(np.array([[c.split().count(w) for w in COLOURS] for _, c in captions], np.float32))
    s = np.sin(np.outer(code, ids)) + cosine * images @ texts.T
    return ([1 + sum(s[j, c] >= s[i, c] - 1e-6 for j in range(len(samples)) if j != i) for c, (i, _) in enumerate(captions)],
            [1 + sum(s[i, c] >= max(s[i, d] for d, (j, _) in enumerate(captions) if j == i) - 1e-6 for c, (j, _) in enumerate(captions) if j != i)
             for i in range(len(samples))])


def ranks_of(out):
    return [[i["rank"] for i in out.items if i["query"] == query] for query in ("text", "image")]


@pytest.mark.parametrize("score, cosine", [("match", 0), ("match+cosine", 1)])
def test_reranking_all_candidates_equals_exhaustive_matching(score, cosine):
    seen = []
    out = run("rerank", predict=matcher(seen), k=100, score=score)
    wanted = exhaustive(cosine=cosine)
    assert ranks_of(out) == list(map(list, wanted)) and wanted[0] != brute_ranks(SAMPLES)[0].tolist()
    for name, ranks, dual in zip(("text_to_image", "image_to_text"), wanted, brute_ranks(SAMPLES)):
        for k in (1, 5, 10):
            assert out.scores[f"rerank/{name}/R@{k}"] == pytest.approx((np.array(ranks) <= k).mean())
            assert out.scores[f"rerank/{name}/R@{k}/dual_encoder"] == pytest.approx((dual <= k).mean())
            assert out.scores[f"rerank/{name}/R@{k}/chance"] == run("retrieval").scores[f"retrieval/{name}/R@{k}/chance"]
        assert out.scores[f"rerank/{name}/R@1/ci_low"] <= out.scores[f"rerank/{name}/R@1"] <= out.scores[f"rerank/{name}/R@1/ci_high"]
        assert out.scores[f"rerank/{name}/reachable"] == 1
        assert 0 < out.scores[f"rerank/{name}/seconds_per_1000_queries"] and 0 < out.scores[f"rerank/{name}/seconds_per_1000_queries/dual_encoder"]
    assert out.scores["rerank/pairs"] == 35 and len(seen) == 1 + 9      # 7 texts x 5 images in fours, and one to compile
    assert run("retrieval").items[0]["rank"] == out.items[0]["dual_encoder"]


def test_what_is_not_among_the_candidates_ranks_after_them_by_cosine():
    out = run("rerank", predict=matcher(), k=1)
    dual = [r.tolist() for r in brute_ranks(SAMPLES)]
    assert ranks_of(out) == dual        # the one candidate stays first, the others follow by cosine
    assert out.scores["rerank/text_to_image/reachable"] == np.mean(np.array(dual[0]) == 1)
    queries, targets = np.eye(3)[[0]], np.array([[0.9, 0, 0], [0.8, 0, 0], [0.7, 0, 0], [0.6, 0, 0], [0.6, 0, 0]])

    def ranked(right, scores, targets=targets):
        ranks, near, _ = rank(queries, targets, [right], top=2)
        return rerank(ranks, [right], 5, near, np.array([scores]))[0]
    # scores of any size: no candidate falls behind the others
    assert [ranked(right, [-900.0, -500.0]) for right in ([0], [1], [2], [3], [1, 4], [2, 3], [0, 2])] == [2, 1, 3, 5, 1, 3, 2]
    assert ranked([0], [np.nan, 1]) == 5 and ranked([0], [1, np.nan]) == 2
    assert ranked([0, 1], [2.0, 2.0]) == 1 and ranked([1], [2.0, 2.0]) == 2
    assert ranked([0], [9.0, 1.0], np.ones((5, 3))) == 5      # a candidate by chance alone


def test_equal_captions_are_scored_once_and_tie():
    twins = [dict(SAMPLES[0], captions=["a red circle"]), dict(SAMPLES[3], captions=["a red circle"]), dict(SAMPLES[1], captions=["a blue star"])]
    wrong, right = (run("rerank", twins, matcher(), duplicates=d, captions="first") for d in ("wrong", "right"))
    assert wrong.scores["rerank/pairs"] == 6 and wrong.scores["rerank/duplicates"] == pytest.approx(2 / 3)
    assert min(ranks_of(wrong)[1][:2]) >= 2 and ranks_of(right)[1][0] == ranks_of(wrong)[1][0] - 1


def test_rerank_says_what_it_needs():
    with pytest.raises(ConfigError, match="'rerank' needs predict function 'features'"):
        run("rerank")
    with pytest.raises(ConfigError, match="score='macth'.*nearest: 'match'"):
        run("rerank", predict=matcher(), score="macth")
    with pytest.raises(ConfigError, match="k=0.*nearest: 1"):
        run("rerank", predict=matcher(), k=0)
    broken = run("rerank", predict=matcher(broken=(WORDS.index("blue"),)))
    assert [i["rank"] for i in broken.items if i.get("caption") == "a blue square"] == [5]


@pytest.mark.parametrize("flag, kind, nearest", [
    ("--k=3", "retrieval", "rerank"), ("--score=match", "matching", "rerank"), ("--templates=photo", "rerank", "zeroshot")])
def test_a_flag_of_another_kind_is_refused(flag, kind, nearest, capsys):
    assert evaluate.main(["nowhere", kind, "--data=scenes:test", flag]) == 43
    assert f"{flag} has no use in {kind!r}; nearest: {nearest!r}" in capsys.readouterr().err


# matching

class Swaps:
    name = "swaps"

    def swaps(self, index):
        return {0: {"colour": ("a red circle", "a blue circle"), "shape": ("a red circle above a blue star", "a red star above a blue circle")},
                1: {"colour": ("a blue square", "a red square")}, 2: {"shape": ("a green star", "a green circle")}}.get(index, {})


def test_matching_prefers_the_true_caption():
    def match(batch):       # likes circles
        return {"match": np.stack([np.zeros(4), (batch["text"] == WORDS.index("circle")).argmax(1)], 1)}
    out = run("matching", predict={**matcher(), "match": match}, source=Swaps())
    s = out.scores
    assert s["matching/pairs"] == 4 and s["matching/images"] == 3
    assert s["matching/cosine"] == 0.5 and s["matching/cosine/colour"] == 1 and s["matching/cosine/shape"] == 0      # ties are wrong
    assert s["matching/match"] == 0 and s["matching/match/chance"] == s["matching/match/shape/chance"] == 0.5
    assert s["matching/match/ci_low"] <= s["matching/match"] <= s["matching/match/ci_high"]
    assert out.items[3] == {"key": "k2", "swap": "shape", "true": "a green star", "false": "a green circle", "match_margin": -3.0,
                            "cosine_margin": 0.0}
    alone = run("matching", source=Swaps())       # no matching head
    assert "matching/match" not in alone.scores and alone.scores["matching/cosine/colour"] == 1


def test_matching_needs_a_source_that_tells_false_captions():
    with pytest.raises(ConfigError, match="source None tells no false captions"):
        run("matching")
    with pytest.raises(ConfigError, match="none of the 1 images"):
        run("matching", SAMPLES[4:], source=type("None", (), {"swaps": lambda self, i: {}})())


# grounding

class Places:
    name = "places"
    asked = {0: ("a red circle", (0.5, 0.0, 1.0, 0.5)), 1: ("a blue square", (0.0, 0.5, 0.75, 1.0)), 3: ("a green circle", (0.0, 0.0, 0.5, 1.0)),
             4: ("the green star", (0.5, 0.5, 1.0, 1.0))}

    def phrase(self, index):
        return self.asked.get(index)


def looks(batch, layer=0):
    """2 x 2 maps: all heat at the top right, but half of a square's at the bottom right, and none for "the"."""
    heat = np.zeros((4, 2, 2), np.float32)
    heat[:, 0, 1] = 1
    for row, ids in enumerate(batch["text"]):
        if WORDS.index("square") in ids:
            heat[row] = [[0, 0], [0.5, 1]] if layer == 8 else [[0, 0.5], [0, 1]]
        if WORDS.index("the") in ids:
            heat[row] = 0
    assert batch["image"].shape[0] == len(batch["text"]) == 4
    return {"heat": heat}


def test_grounding_points_into_boxes():
    out = run("grounding", predict={"ground": looks}, source=Places())
    s = out.scores
    assert [(i["key"], i["hit"], round(i["heat_inside"], 6)) for i in out.items] == [
        ("k0", True, 1.0), ("k1", True, round(1 / 3, 6)), ("k3", False, 0.0), ("k4", False, 0.0)]
    assert s["grounding/images"] == 4 and s["grounding/pointing"] == 0.5 and abs(s["grounding/heat_inside"] - (1 + 1 / 3) / 4) < 1e-6
    chance = (0.25 + 0.375 + 0.5 + 0.25) / 4
    assert s["grounding/pointing/chance"] == s["grounding/heat_inside/chance"] == chance
    assert s["grounding/pointing/ci_low"] <= 0.5 <= s["grounding/pointing/ci_high"]
    assert [(p["phrase"], p["ok"]) for p in out.pictures["grounding"]][:2] == [("a red circle", True), ("a blue square", True)]
    other = run("grounding", predict={"ground": looks}, source=Places(), layer=8, shown=1)
    assert abs(other.items[1]["heat_inside"] - 2 / 3) < 1e-6 and len(other.pictures["grounding"]) == 1


def test_grounding_needs_a_source_with_boxes():
    with pytest.raises(ConfigError, match="source None tells no phrases"):
        run("grounding", predict={"ground": looks})
    with pytest.raises(ConfigError, match="no image of the source"):
        run("grounding", SAMPLES[2:3], predict={"ground": looks}, source=type("None", (), {"phrase": lambda self, i: None})())


# zero-shot

def test_zeroshot_scores_chance_and_majority():
    out = run("zeroshot", classes=("red", "blue", "green"), templates=("a {}", "the small {}"))
    assert [i["predicted"] for i in out.items] == ["red", "blue", "green", "red", "green"]
    assert out.scores["zeroshot/top1"] == pytest.approx(4 / 5)
    assert out.scores["zeroshot/top1/chance"] == pytest.approx(1 / 3)
    assert out.scores["zeroshot/top1/majority"] == pytest.approx(3 / 5)
    assert out.scores["zeroshot/mean_per_class"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert out.scores["zeroshot/top1/ci_low"] < 0.8 < out.scores["zeroshot/top1/ci_high"]
    assert "zeroshot/top5" not in out.scores                # of three classes it would be 1 for anything
    assert out.pictures["neighbours"][0]["query"] == "red"


def test_zeroshot_scores_groups_of_classes_among_all():
    out = run("zeroshot", classes=("red", "blue", "green"), templates=("a {}", "the small {}"), groups={"warm": ("red",), "cold": ("blue", "green")})
    assert out.scores["zeroshot/top1/warm"] == pytest.approx(2 / 3) and out.scores["zeroshot/top1/cold"] == 1
    assert out.scores["zeroshot/top1/warm/chance"] == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match="groups.warm: 'rad' is no class.*nearest: 'red'"):
        run("zeroshot", classes=("red", "blue", "green"), templates="plain", groups={"warm": ("rad",)})


def test_zeroshot_normalises_averages_and_normalises_again():
    weights = {"3": (1.0, 0.0), "10": (0.6, 0.8), "4": (0.0, 1.0)}    # a, the, red

    def two(batch):
        if "image" in batch:
            return {"image_embed": unit(batch["image"][:, 0, 0, :2].astype(np.float32))}
        vectors = [weights[str(row[1])] if row[1] != 4 else weights["4"] for row in batch["text"]]
        return {"text_embed": 7 * np.array(vectors, np.float32)}      # lengths must not matter
    samples = [{"vector": (89, 45, 0), "captions": ["a red"], "label": 0},
               {"vector": (80, 60, 0), "captions": ["a red"], "label": 0}]
    out = run("zeroshot", samples, {"embed": two}, classes=("circle", "red"), templates=("a {}", "the {}"))
    # both classes start with "a"/"the": equal ensembles of (1,0) and (.6,.8), a tie that counts against
    assert out.scores["zeroshot/top1"] == 0
    mean = unit(np.array([0.8, 0.4]))
    assert out.items[0]["similarity"] == pytest.approx([unit(np.array([89.0, 45.0])) @ mean] * 2, abs=1e-6)


def test_zeroshot_takes_classes_from_the_source_and_names_bad_labels():
    class Source:
        classes = ["red", "blue", "green"]
    assert run("zeroshot", source=Source(), templates="plain").scores["zeroshot/classes"] == 3
    with pytest.raises(ConfigError, match="sample 'k2' has label=2"):
        run("zeroshot", classes=("red", "blue"), templates="plain")
    with pytest.raises(ConfigError, match="names two classes"):
        run("zeroshot")


def test_zeroshot_top5_and_majority_of_the_five_most_frequent():
    names = ("red", "blue", "green", "a", "the", "small")
    out = run("zeroshot", classes=names, templates="plain").scores
    assert out["zeroshot/top5/chance"] == pytest.approx(5 / 6) and out["zeroshot/top5/majority"] == 1


def test_prompt_templates():
    assert len(prompts.TEMPLATES["clip80"]) == len(set(prompts.TEMPLATES["clip80"])) == 80
    assert len(prompts.TEMPLATES["clip7"]) == 7 and set(prompts.TEMPLATES["clip7"]) < set(prompts.TEMPLATES["clip80"])
    for name in prompts.TEMPLATES:
        assert all(t.count("{}") == 1 for t in prompts.templates(name))
    with pytest.raises(ConfigError, match="templates='foto'.*nearest: 'photo'"):
        prompts.templates("foto")
    with pytest.raises(ConfigError, match="exactly one"):
        prompts.templates(("a photo",))


# captions

class Scenes:
    def judge(self, index, caption):
        wanted = SAMPLES[index]["captions"][0].split()
        facts = {"exact": caption.split() == wanted, "colour": wanted[1] in caption.split()}
        return facts | ({"shape": wanted[2] in caption.split()} if index != 1 else {})


GENERATED = ["a red circle", "A  blue square", "a green circle", "a green circle", "a red circle"]


def captioner(texts, seen):
    position = iter(range(0, 100, 4))

    def generate(batch, **options):
        seen.append((batch["image"].shape, options))
        start = next(position)
        rows = (texts[start:start + 4] + [""] * 4)[:4]
        return {"text": Tokenizer()([t.lower() for t in rows], 8)[0], "score": np.arange(4.0)}
    return {"generate": generate, "embed": embed}


def test_caption_scores_and_baselines():
    seen = []
    out = run("caption", predict=captioner(GENERATED, seen), source=Scenes(), method="beam", beams=3, max_length=8)
    assert seen == [((4, 2, 2, 3), {"method": "beam", "beams": 3, "max_length": 8})] * 2
    s = out.scores
    assert s["caption/exact"] == pytest.approx(3 / 5) and s["caption/facts/exact"] == pytest.approx(3 / 5)
    assert s["caption/facts/colour"] == pytest.approx(4 / 5)
    assert s["caption/facts/shape"] == pytest.approx(2 / 4)  # no such fact for one image
    assert s["caption/distinct"] == pytest.approx(3 / 5) and s["caption/distinct/reference"] == 1
    tokens = [g.lower().split() for g in GENERATED]
    references = [[c.split() for c in x["captions"]] for x in SAMPLES]
    assert s["caption/BLEU-4"] == text_metrics.bleu(tokens, references)
    assert s["caption/CIDEr-D"] == text_metrics.cider_d(tokens, references)[0]
    assert s["caption/ROUGE-L"] == text_metrics.rouge_l(tokens, references)[0]
    constant = [["a", "blue", "square"]] * 5                 # all are said once: the first in the alphabet
    assert s["caption/ROUGE-L/most_frequent"] == text_metrics.rouge_l(constant, references)[0]
    assert s["caption/exact/chance"] == 0                    # the captions of these five all differ
    assert "caption/exact/nearest" not in s
    for name in ("exact", "facts/colour", "BLEU-4", "CIDEr-D", "ROUGE-L"):
        assert s[f"caption/{name}/ci_low"] <= s[f"caption/{name}"] <= s[f"caption/{name}/ci_high"]
    assert out.items[1]["generated"] == "a blue square" and out.items[1]["score"] == 1.0
    assert out.items[2]["facts"] == {"exact": False, "colour": True, "shape": False}


def test_caption_baselines_from_training_samples():
    train = [{"vector": (100, 0, 0), "captions": ["a red circle"]}, {"vector": (0, 99, 0), "captions": ["a blue square"]},
             {"vector": (0, 1, 50), "captions": ["a green star"]}, {"vector": (10, 1, 50), "captions": ["a blue square"]}]
    out = run("caption", predict=captioner(GENERATED, []), train_batches=batches(train)).scores
    assert out["caption/exact/most_frequent"] == pytest.approx(1 / 5)           # "a blue square"
    assert out["caption/exact/nearest"] == pytest.approx(3 / 5)                 # right for the first three


def test_caption_pictures_show_right_and_wrong():
    shown = run("caption", predict=captioner(GENERATED, []), source=Scenes(), shown=4).pictures["captions"]
    assert [p["ok"] for p in shown] == [True, True, False, False]
    assert shown[2]["generated"] == "a green circle" and shown[2]["reference"] == "a green star"


def test_a_misspelt_or_missing_name_says_what_is_there():
    with pytest.raises(ConfigError, match="'retreival'.*nearest: 'retrieval'"):
        run("retreival")
    with pytest.raises(ConfigError, match="'caption' needs predict function 'generate'"):
        run("caption")
    with pytest.raises(TypeError, match="beems"):
        run("caption", predict=captioner(GENERATED, []), beems=3)
    with pytest.raises(ConfigError, match="no samples"):
        run("retrieval", [])
    with pytest.raises(ConfigError, match="'k1' has none"):
        evals.run("retrieval", {"embed": embed}, [dict(b, meta=[dict(m, captions=[] if m.get("index") else ["a"])
                  for m in b["meta"]]) for b in batches(SAMPLES)], tokenizer=Tokenizer())


# metrics

@pytest.mark.parametrize("name", sorted(GOLDEN["sets"]))
def test_caption_metrics_equal_the_coco_evaluation(name):
    stored = GOLDEN["sets"][name]
    items = [GOLDEN["items"][i] for i in stored["items"]]
    candidates = [i["candidate"].split() for i in items]
    references = [[r.split() for r in i["references"]] for i in items]
    for n in range(1, 5):
        assert text_metrics.bleu(candidates, references, n) == pytest.approx(stored["bleu"][n - 1], abs=1e-8)
    mean, each = text_metrics.cider_d(candidates, references)
    assert mean == pytest.approx(stored["cider_d"], abs=1e-9)
    np.testing.assert_allclose(each, stored["cider_d_each"], atol=1e-9)
    mean, each = text_metrics.rouge_l(candidates, references)
    assert mean == pytest.approx(stored["rouge_l"], abs=1e-9)
    np.testing.assert_allclose(each, stored["rouge_l_each"], atol=1e-9)


def test_golden_captions_reach_the_length_penalties():
    def lengths(name):
        items = [GOLDEN["items"][i] for i in GOLDEN["sets"][name]["items"]]
        return text_metrics.bleu_parts([i["candidate"].split() for i in items],
                                       [[r.split() for r in i["references"]] for i in items]).sum(0)[:2]
    assert lengths("short")[0] < lengths("short")[1] and lengths("natural")[0] != lengths("natural")[1]


def test_metrics_of_nothing_in_common():
    assert text_metrics.bleu([["a"]], [[["b"]]]) == 0
    assert text_metrics.bleu([[]], [[["b"]]]) == 0
    assert text_metrics.rouge_l([[]], [[["b"]]])[0] == 0
    assert text_metrics.cider_d([["a"], []], [[["b"]], [["c"]]])[0] == 0


def test_tokenise_splits_as_the_treebank_does():
    text = "A man\u2019s dog, running -- \"fast\"! Don't stop the T-shirt (3.5 m)... they'll rock"
    assert text_metrics.tokenise(text) == ["a", "man", "'s", "dog", "running", "fast", "do", "n't", "stop", "the", "t-shirt",
                                           "3.5", "m", "they", "'ll", "rock"]


# bootstrap and items

def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng, covered, narrow, wide = np.random.default_rng(0), 0, [], []
    for trial in range(200):
        low, high = bootstrap.mean_interval(rng.normal(size=60), seed=trial, samples=400)
        covered += low <= 0 <= high
    assert 0.90 <= covered / 200 <= 0.98
    units = np.repeat(np.arange(40), 5)                     # five equal values per unit are one observation
    values = np.repeat(rng.normal(size=40), 5)
    narrow, wide = bootstrap.mean_interval(values), bootstrap.mean_interval(values, units)
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(math.sqrt(5), rel=0.15)
    assert bootstrap.mean_interval(values, units) == wide
    assert all(math.isnan(x) for x in bootstrap.mean_interval(np.array([])))


def test_items_are_written_as_json_lines(tmp_path):
    out = run("retrieval")
    evals.write_items(tmp_path / "a" / "items.jsonl", out.items + [{"x": np.float32(0.5), "y": np.arange(2), "z": "é"}])
    rows = [json.loads(line) for line in (tmp_path / "a" / "items.jsonl").read_text("utf-8").splitlines()]
    assert rows[:-1] == out.items and rows[-1] == {"x": 0.5, "y": [0, 1], "z": "é"}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["items.jsonl"]


# codebook

def quantised(batch):
    """Four patches an image, with codes of a book of five; the first pixel's channels tell the codes of three."""
    first = batch["image"][:, 0, 0].astype(int)
    ids = np.concatenate([np.clip(first // 100, 0, 2), np.zeros((4, 1), int)], 1)
    target = np.zeros((4, 4, 2), np.float32)
    target[:, :2, 0], target[:, 2:, 1] = 3, 1
    return {"ids": ids, "similarity": 1 - first[:, [0, 1, 2, 0]] / 1000, "codes": np.int32(5), "decoded": None, "target": target,
            "cosine": np.where(ids == 0, 0.5, 1.0)}


def test_codebook_counts_codes_and_pictures_what_they_stand_for():
    out = run("codebook", predict={"reconstruct": quantised}, shown=2, nearest=3)
    s, ids = out.scores, np.array([[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [2, 0, 0, 0], [0, 0, 1, 0]])
    assert [list(i["ids"]) for i in out.items] == ids.tolist()
    share = np.array([15, 1, 4]) / 20
    assert s["codebook/usage"] == 0.6 and abs(s["codebook/usage/uniform"] - (1 - 0.8 ** 20)) < 1e-9
    assert abs(s["codebook/perplexity"] - np.exp(-(share * np.log(share)).sum())) < 1e-9 and s["codebook/perplexity/codes"] == 5
    assert s["codebook/images"] == 5 and s["codebook/tokens"] == 20      # rows that fill a batch up do not count
    assert abs(s["codebook/cosine"] - (15 * 0.5 + 5) / 20) < 1e-6 and s["codebook/cosine/ci_low"] <= s["codebook/cosine"] <= s["codebook/cosine/ci_high"]
    assert abs(s["codebook/cosine/constant"] - 0.5 ** 0.5) < 1e-6      # half of the features lie along each axis
    frequent, rare = out.pictures["codes"]
    assert frequent["query"].startswith("code 0: 75") and rare["query"].startswith("code 1: 5")
    assert frequent["scores"] == [1.0, 1.0, 1.0] and len(rare["images"]) == 1 and frequent["images"][0].shape == (96, 96, 3)
    patch = rare["images"][0]      # the lower left one is black, the one above it dark
    assert (patch[32:64, 32:64] == 0).all() and (patch[:32, 32:64] == [9, 0, 45]).all()
    assert "codebook/cosine" not in run("codebook", predict={"tokens": lambda b: {k: v for k, v in quantised(b).items() if k != "cosine"}}).scores


def test_a_pictured_patch_stands_in_its_darkened_surroundings():
    image = np.full((4, 4, 3), 100, np.uint8)
    image[2:, :2] = 200
    found = codebook.patch(image, 2, 4)
    assert found.shape == (96, 96, 3) and (found[32:64, 32:64] == 200).all() and (found[:32, 32:] == 45).all() and (found[:, :32] == 0).all()
