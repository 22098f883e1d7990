"""The embedded scenes: pure, honest about what is held out, and true to their own descriptions."""

import dataclasses
import pickle

import numpy as np
import pytest
import sentencepiece

from vlm_jax.data import scene, scene_picture, scene_text, scenes
from vlm_jax.data.scene import (
    COLOURS,
    DISTINCT,
    HELD_OUT_PAIRS,
    HELD_OUT_TRIPLES,
    SPLITS,
    make_scene,
)
from vlm_jax.data.scene_text import canonical, caption, judge, parse, questions
from vlm_jax.data.sources import open_source

EVALUATION = ("val", "test", "heldout_pair", "heldout_triple")
SOME = [make_scene(i, split) for split in SPLITS for i in range(160)]


def kinds(one):
    return tuple(sorted(thing.kind for thing in one.objects))


def wordings(one, count=4):
    return [canonical(one), *(caption(one, seed, canonical_share=0.0) for seed in range(count))]


def test_samples_are_a_pure_function_of_split_and_index():
    source, again = scenes.open_scenes("train"), pickle.loads(pickle.dumps(scenes.open_scenes("train")))
    backwards = [again[i] for i in reversed(range(50))][::-1]
    for i in range(50):
        first, second = source[i], backwards[i]
        assert first["text"] == second["text"] and first["json"] == second["json"]
        np.testing.assert_array_equal(first["image"], second["image"])


def test_scene_numbers_do_not_depend_on_the_machine():
    one = make_scene(3, "test")
    assert canonical(one) == ("a small orange square below a small purple hollow cross"
                              " and left of a big orange hollow star")
    assert [round(thing.x, 6) for thing in one.objects] == [0.656835, 0.214737, 0.546144]


def test_splits_differ_in_layout():
    layouts = {tuple((t.x, t.y) for t in make_scene(i, split).objects) for split in SPLITS for i in range(300)}
    assert len(layouts) == 300 * len(SPLITS)


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_combinations_are_where_they_belong(split):
    for i in range(2000):
        objects = make_scene(i, split).objects
        pairs = sum((t.shape, t.colour) in HELD_OUT_PAIRS for t in objects)
        triples = sum((t.shape, t.colour, t.fill) in HELD_OUT_TRIPLES for t in objects)
        assert (pairs, triples) == {"heldout_pair": (1, 0), "heldout_triple": (0, 1)}.get(split, (0, 0))
        assert len(objects) in {"train": (1, 2, 3), "objects": (1,), "longtail": (1,)}.get(split, (2, 3))


def test_held_out_tables_are_the_promised_sizes_and_leave_every_word_seen():
    assert len(HELD_OUT_PAIRS) == 6 and len(HELD_OUT_TRIPLES) == 11
    assert not {triple[:2] for triple in HELD_OUT_TRIPLES} & HELD_OUT_PAIRS
    seen = {thing.kind for i in range(3000) for thing in make_scene(i, "train").objects}
    assert seen == set(scene.SEEN) and len(seen) == (144 - 18 - 11) * 2


def test_no_evaluated_set_of_objects_is_trained_on():
    sets = {split: {kinds(make_scene(i, split)) for i in range(3000)} for split in ("train", "val", "test")}
    assert not {s for s in sets["train"] if len(s) > 1} & (sets["val"] | sets["test"])
    assert not sets["val"] & sets["test"]


@pytest.mark.parametrize("split", EVALUATION)
def test_evaluation_scenes_are_told_apart_by_their_facts(split):
    assert len({kinds(make_scene(i, split)) for i in range(DISTINCT)}) == DISTINCT
    stated = set()
    for i in range(1000):
        facts = parse(caption(make_scene(i, split), canonical_share=0.0))
        stated.add(tuple(sorted((o["shape"], o["colour"], o["size"], o.get("fill", "solid")) for o in facts.objects)))
    assert len(stated) == 1000


def test_objects_are_apart_and_inside_and_clearly_placed():
    for one in SOME:
        assert len(set(kinds(one))) == len(one.objects)
        for k, a in enumerate(one.objects):
            assert a.radius <= a.x <= 1 - a.radius and a.radius <= a.y <= 1 - a.radius
            for b in one.objects[:k]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
                assert abs(abs(a.x - b.x) - abs(a.y - b.y)) >= 8 / 64


def test_own_captions_are_judged_exact():
    for one in SOME:
        for text in wordings(one):
            verdict = judge(one, text)
            assert verdict.pop("literal") == (text == canonical(one))
            assert all(verdict.values()), (text, verdict)


def test_parsed_facts_are_the_scene():
    for one in SOME[::5]:
        for text in wordings(one):
            facts = parse(text)
            assert facts.understood and len(facts.relations) == len(one.objects) - 1
            assert sorted((o["shape"], o["colour"], o.get("fill", "solid"), o["size"]) for o in facts.objects) == list(
                kinds(one))


@pytest.mark.parametrize("attribute", ["shape", "colour", "fill", "size"])
def test_a_changed_attribute_is_false(attribute):
    values = {"shape": scene.SHAPES, "colour": COLOURS, "fill": scene.FILLS, "size": scene.SIZES}[attribute]
    for n, one in enumerate(SOME):
        k = n % len(one.objects)
        old = getattr(one.objects[k], attribute)
        new = values[(values.index(old) + 1) % len(values)]
        changed = list(one.objects)
        changed[k] = dataclasses.replace(changed[k], **{attribute: new})
        for text in wordings(dataclasses.replace(one, objects=tuple(changed)), 2):
            verdict = judge(one, text)
            assert not verdict["exact"] and not verdict["attributes"] and not verdict["literal"]
            assert verdict["objects"] == (attribute in ("fill", "size"))


def test_swapped_colours_are_false_though_every_word_is_right():
    for one in SOME:
        a, b = one.objects[0], one.objects[-1]
        if a.colour == b.colour or a.shape == b.shape:
            continue
        swapped = (dataclasses.replace(a, colour=b.colour), *one.objects[1:-1], dataclasses.replace(b, colour=a.colour))
        verdict = judge(one, canonical(dataclasses.replace(one, objects=swapped)))
        assert verdict["shapes"] and verdict["colours"] and not verdict["objects"] and not verdict["exact"]


def test_mirrored_relations_are_false():
    for one in SOME:
        if len(one.objects) == 1:
            continue
        turned = dataclasses.replace(one, objects=tuple(
            dataclasses.replace(t, x=1 - t.x, y=1 - t.y) for t in one.objects))
        for text in wordings(turned, 3):
            verdict = judge(one, text)
            assert verdict["attributes"] and not verdict["relations"] and not verdict["exact"], text


def test_swaps_are_false_in_the_same_words_and_show_nothing_held_out():
    found = dict.fromkeys(scene_text.SWAPS, 0)
    for one in SOME[::3]:
        shown = scene_text._unseen(one)
        for kind, (true, false) in scene_text.swaps(one).items():
            found[kind] += 1
            assert true == canonical(one) and judge(one, true)["exact"] and true != false
            verdict = judge(one, false)
            assert verdict["understood"] and not verdict["exact"] and verdict["shapes"] and verdict["colours"]
            counts = [sorted(word for word in text.split() if word not in ("a", "an")) for text in (true, false)]
            if kind == "relation":      # the places may have other names, the objects are the same
                assert verdict["attributes"] and not verdict["relations"]
            else:
                assert counts[0] == counts[1]
            assert {(o["shape"], o["colour"]) for o in parse(false).objects} & HELD_OUT_PAIRS <= shown
    assert min(found.values()) > 100
    assert not scene_text.swaps(next(s for s in SOME if len(s.objects) == 1))


def test_noisy_captions_are_false_as_often_as_said_and_the_field_says_which():
    noisy, clean = scenes.open_scenes("noisy"), scenes.open_scenes("train")
    samples = [noisy[i] for i in range(600)]
    kinds = [s["json"]["noise"] for s in samples]
    assert 0.26 < np.mean([k != "" for k in kinds]) < 0.34 and 0.4 < kinds.count("lie") / (kinds.count("lie") + kinds.count("other")) < 0.6
    for i, sample in enumerate(samples):
        text, = sample["text"]
        assert noisy.judge(i, text)["exact"] == (sample["json"]["noise"] == "") and noisy.judge(i, text)["understood"]
        assert sample["key"] == clean.key(i) and (sample["json"]["noise"] or sample["text"] == clean[i]["text"])
        assert not {(o["shape"], o["colour"]) for o in parse(text).objects} & HELD_OUT_PAIRS
    np.testing.assert_array_equal(samples[7]["image"], clean[7]["image"])
    assert scenes.open_scenes("noisy")[599]["text"] == samples[599]["text"] and "noise" not in clean[7]["json"]
    assert noisy.name == "scenes:noisy" and noisy.fingerprint() != clean.fingerprint()
    assert len(scenes.open_scenes("val", noise=0.5)[0]["text"]) == 1


@pytest.mark.parametrize("text", [
    "", "a", "nothing here", "a small red red circle", "a small red circle left of", "a small circle wibble red",
    "a small red circle left of a big blue square and", "the first left of the second",
    "a circle left of a square, small red respectively", "a red circle and a blue star, the first above the third"])
def test_what_does_not_parse_is_not_understood(text):
    assert not parse(text).understood
    assert not judge(SOME[0], text)["exact"]


def test_leaving_something_out_is_not_exact():
    one = next(s for s in SOME if len(s.objects) == 2 and s.objects[0].fill == "striped")
    full = canonical(one)
    assert judge(one, full)["exact"]
    assert not judge(one, full.replace(" striped", "", 1))["attributes"]
    assert not judge(one, full.replace("small ", "").replace("big ", ""))["attributes"]
    for place, words in scene_text.PLACES.items():
        full = full.replace(f" {words[0]} ", " and ")
    assert judge(one, full)["understood"] and not judge(one, full)["relations"]


def test_the_material_may_be_told_and_must_be_true():
    one = next(s for s in SOME if len(s.objects) == 1)
    thing = one.objects[0]
    assert not any(material in text for material in scene.MATERIALS for text in wordings(one))
    for material in scene.MATERIALS:
        assert judge(one, canonical(one).replace(thing.size, f"{thing.size} {material}"))["exact"] == (
            material == thing.material)


def test_share_of_canonical_captions():
    texts = [(caption(s), canonical(s)) for s in SOME]
    assert 0.45 < np.mean([a == b for a, b in texts]) < 0.56
    assert all(caption(s, canonical_share=1.0) == canonical(s) for s in SOME[:50])


def test_some_wordings_name_shapes_before_their_colours():
    first = 0
    for one in SOME:
        text = caption(one, canonical_share=0.0)
        codes = "".join(scene_text._lexicon().get(word, "?")[0] for word in scene_text._words(text))
        first += codes.index("n") < codes.index("c")
    assert 0.4 < first / len(SOME) < 0.7


def test_boxes_hold_the_pixels_of_their_objects():
    for one in SOME[::6]:
        empty = scene_picture.render(dataclasses.replace(one, objects=()), 64).astype(int)
        for k, box in enumerate(scenes.boxes(one, 64)):
            alone = scene_picture.render(dataclasses.replace(one, objects=(one.objects[k],)), 64).astype(int)
            rows, columns = np.nonzero(np.abs(alone - empty).max(-1) > 8)
            drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert np.abs(drawn - box).max() <= 1.5


def test_a_phrase_names_one_object_and_its_box():
    source, told = scenes.open_scenes("test"), 0
    for i in range(200):
        if found := source.phrase(i):
            told += 1
            article, colour, shape = found[0].split()
            (at,) = [k for k, thing in enumerate(source.scene(i).objects) if (thing.colour, thing.shape) == (colour, shape)]
            np.testing.assert_allclose(np.array(found[1]) * 64, scenes.boxes(source.scene(i), 64)[at], atol=1e-4)
            assert article == ("an" if colour == "orange" else "a")
    assert told > 190


def test_pictures_show_the_colour_and_scale_with_size():
    one = next(s for s in SOME if s.objects[0].fill == "solid" and s.objects[0].material == "matte"
               and s.objects[0].shape != "heart")
    thing = one.objects[0]
    for size in (48, 64, 100):
        picture = scenes.render(one, size)
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
        np.testing.assert_allclose(picture[int(thing.y * size), int(thing.x * size)], thing.rgb, atol=40)
    np.testing.assert_array_equal(scenes.render_batch([one, one], 48)[1], scenes.render(one, 48))


def test_answers_are_true():
    asked = set()
    for one in SOME:
        things = one.objects
        for kind, question, answer in questions(one):
            asked.add(kind)
            words = question.split()
            about = [t for t in things if all(word not in question or word == getattr(t, attribute)
                                              for attribute, values in (("shape", scene.SHAPES), ("colour", COLOURS))
                                              for word in values)]
            if kind == "count":
                singular = {scene_text._plural(shape): shape for shape in scene.SHAPES}
                _, attribute, value = scene_text._lexicon().get(singular.get(words[2], words[2]), ("", "", ""))
                wanted = [t for t in things if not attribute or getattr(t, attribute) == value]
                assert answer == scene_text.NUMBERS[len(wanted)]
            elif kind == "exists":
                assert answer == ("yes" if about else "no")
            elif kind in ("colour", "shape"):
                assert [getattr(t, kind) for t in about] == [answer]
            elif kind in ("fill", "material") and len(about) == 1:
                assert answer == getattr(about[0], kind)
            elif kind == "relation" and " seen from " in question:
                places = {one.relation(a, b) for a in range(len(things)) for b in range(len(things)) if a != b
                          and scene_text._name(things, a) in question.split(" seen from ")[0]
                          and question.endswith(scene_text._name(things, b))}
                assert answer in places
            elif kind == "size":
                named = [t for k, t in enumerate(things) if scene_text._name(things, k) in question]
                alike = len({t.size for t in named}) == 1
                assert {"yes": alike, "no": not alike}.get(answer, not alike)
                if answer not in ("yes", "no"):
                    assert any(t.size == "big" and t.shape in answer for t in named)
    assert asked == {"count", "exists", "colour", "shape", "fill", "material", "relation", "size"}


def test_questions_never_mention_an_unseen_pair_in_training():
    for i in range(2000):
        for question in questions(make_scene(i, "train")):
            for shape, colour in HELD_OUT_PAIRS:
                assert f"{colour} {shape}" not in question.question


def test_the_committed_tokenizer_has_every_word_and_any_text():
    model = sentencepiece.SentencePieceProcessor(model_file=str(scenes.TOKENIZER))
    assert [model.pad_id(), model.bos_id(), model.eos_id(), model.unk_id()] == [0, 1, 2, 3]
    assert scenes.TOKENIZER.stat().st_size < 50_000
    for one in SOME:
        for text in wordings(one, 2):
            ids = model.encode(text)
            assert len(ids) <= 28 and model.decode(ids) == text
            assert len(ids) == len(scene_text._words(text))
        assert len(model.encode(canonical(one))) <= 24
    assert all(len(model.encode(word)) == 1 for word in scenes.vocabulary(300))
    for text in ("Hello wörld, 東京!", "an isthmus", "colours: {a_b}"):
        assert model.decode(model.encode(text)) == text and model.unk_id() not in model.encode(text)


def test_the_tokenizer_is_rebuilt_with_the_same_pieces():
    built = sentencepiece.SentencePieceProcessor(model_proto=scenes.train_tokenizer())
    committed = sentencepiece.SentencePieceProcessor(model_file=str(scenes.TOKENIZER))
    pieces, expected = ([model.id_to_piece(i) for i in range(len(model))] for model in (built, committed))
    assert pieces == expected


@pytest.mark.parametrize("split", SPLITS)
def test_source(split):
    source = scenes.open_scenes(split, 48, 84, views=("boxes", "questions"))
    assert len(source) == 84 == len(list(source)) and len(scenes.open_scenes("train")) == 10_000_000
    sample = source[83]
    assert sample["image"].shape == (48, 48, 3) and sample["key"] == f"{split}/00000083"
    assert len(sample["text"]) == (1 if split in scenes.TRAINING else 2)
    assert all(source.judge(83, text)["exact"] for text in sample["text"])
    assert len(sample["json"]["boxes"]) == len(sample["json"]["objects"])
    assert {"kind", "question", "answer"} == set(sample["json"]["questions"][0])
    assert hasattr(source, "classes") == (split == "objects") == ("label" in sample)
    if split == "objects":
        assert len(source.classes) == 42 and {source[i]["label"] for i in range(42)} == set(range(42))
        only = sample["json"]["objects"][0]
        assert source.classes[sample["label"]] == f"{only['colour']} {only['shape']}"
    with pytest.raises(IndexError, match="84"):
        source[84]


@pytest.mark.parametrize("options, named", [
    (dict(split="tset"), "test"), (dict(split="test", size=8), "size 8"), (dict(split="test", count=0), "count 0"),
    (dict(split="test", canonical_share=2), "canonical_share 2"),
    (dict(split="test", noise=1), "noise 1"), (dict(split="noise"), "nearest: 'noisy'"), (dict(split="test", views=("box",)), "boxes")])
def test_errors_name_the_field(options, named):
    with pytest.raises(ValueError, match=named):
        scenes.open_scenes(**options)


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scenes", "show", f"--out={tmp_path}/page.png", "--rows=1", "--columns=2"])
    scenes.main()
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", ["scenes", "speed", "--count=50"])
    scenes.main()
    assert "samples_per_second" in capsys.readouterr().out


def test_long_tail_falls_off_as_it_says():
    source = scenes.open_scenes("longtail", canonical_share=1.0)
    drawn = np.bincount([scene.class_of(source.scene(i)) for i in range(3000)], minlength=len(scene.CLASSES)) / 3000
    wanted = np.array([scene.frequency(name) for name in scene.CLASSES])
    assert wanted.sum() == pytest.approx(1) and wanted.max() / wanted.min() > 200
    assert np.abs(drawn - wanted).max() < 4 * np.sqrt(wanted.max() / 3000)


def test_canonical_wording_alone_is_a_source_of_its_own():
    test, noisy = open_source("scenes:test:canonical"), open_source("scenes:noisy:canonical")
    assert test[3]["text"] == [canonical(make_scene(3, "test"))] and test.name == "scenes:test:canonical"
    texts = {noisy[i]["json"]["noise"]: noisy[i]["text"][0] == canonical(make_scene(i, "train")) for i in range(40)}
    assert texts == {"": True, "lie": False, "other": False}
    with pytest.raises(ValueError, match="wording 'canonicl' is not known; nearest: 'scenes:test:canonical'"):
        open_source("scenes:test:canonicl")
