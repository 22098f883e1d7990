"""Instructions about scenes: replies are true by the facts, words alone tell nothing, and all of it is read as one knows words."""

import collections
import re

import numpy as np
import pytest

from vlm_jax.data import scene_instruct, scenes, tokenizers
from vlm_jax.data.clean import Clean
from vlm_jax.data.layouts import Layout, Writer
from vlm_jax.data.pipeline import eval_batches, train_batches
from vlm_jax.data.rows import Rows
from vlm_jax.data.scene import COLOURS, FILLS, MATERIALS, OPPOSITE, SHAPES, SIZES
from vlm_jax.data.scene_text import NUMBERS, PLACES, judge, parse
from vlm_jax.data.sources import open_source, read_answers

SPLITS = ("train", "test", "heldout_pair")
SIDE = {words: side for side, synonyms in PLACES.items() for words in synonyms[:1]}


def meant(words, things):
    """The objects that "the big red star", "red objects" or "a star" may mean: read from the words and the facts alone."""
    one = {"crosses": "cross", "objects": "object", **{f"{shape}s": shape for shape in SHAPES}}
    wanted = [w for w in (one.get(w, w) for w in words.split()) if w not in ("the", "a", "an", "object")]
    assert all(w in (*SHAPES, *COLOURS, *FILLS, *SIZES, *MATERIALS) for w in wanted), words
    return [t for t in things if all(w in (t.shape, t.colour, t.fill, t.size, t.material) for w in wanted)]


def truth(question, scene):
    """The true answer, by another reading than that which wrote the question."""
    things = scene.objects

    def the(words):
        found = meant(words, things)
        assert len(found) == 1, (words, question)
        return found[0]

    def side(a, b):
        return scene.relation(things.index(a), things.index(b))

    if match := re.fullmatch(r"how many (.*) are there", question):
        return NUMBERS[len(meant(match[1], things))]
    if match := re.fullmatch(r"what (colour|shape) is (the .*)", question):
        return getattr(the(match[2]), match[1])
    if match := re.fullmatch(r"is there (an? .*)", question):
        return "yes" if meant(match[1], things) else "no"
    if match := re.fullmatch(r"where is (the .*) seen from (the .*)", question):
        return side(the(match[1]), the(match[2]))
    if match := re.fullmatch(rf"is (the .*) ({'|'.join(SIDE)}) (the .*)", question):
        return "yes" if side(the(match[1]), the(match[3])) == SIDE[match[2]] else "no"
    if match := re.fullmatch(r"which is bigger, (the .*) or (the .*)", question):
        bigger = [words for words in match.groups() if the(words).size == "big"]
        assert len(bigger) == 1
        return bigger[0]
    if match := re.fullmatch(r"are (the .*) and (the .*) of the same (size|fill)", question):
        return "yes" if getattr(the(match[1]), match[3]) == getattr(the(match[2]), match[3]) else "no"
    raise AssertionError(question)


@pytest.mark.parametrize("task", scene_instruct.QUESTIONS)
def test_answers_follow_from_the_facts_and_never_name_what_is_asked(task):
    for split in SPLITS:
        source = open_source(f"scenes:{split}/{task}")
        for i in range(150):
            kind, scene, asked = source.asked(i)
            assert kind == task and asked.replies == (truth(asked.prompt, scene),), asked
            if match := re.search("of the same (size|fill)|(bigger)", asked.prompt):
                values = FILLS if match[1] == "fill" else SIZES
                assert not set(values) & set(asked.prompt.split())


def test_words_alone_say_little_of_the_answer():
    """The best guess that knows how often each question has which answer, on other scenes."""
    best = dict(count=0.5, colour=0.2, relation=0.42, existence=0.55, comparison=0.62, video=0.3)
    for task, most in best.items():
        seen, right = collections.defaultdict(collections.Counter), 0
        for i in range(2000):
            _, _, asked = scene_instruct.instruction("train", i, (task,))
            if i < 1400:
                seen[asked.prompt][asked.replies[0]] += 1
            else:
                guess = seen[asked.prompt].most_common(1) or [("yes", 1)]
                right += guess[0][0] == asked.replies[0]
        assert right / 600 < most, (task, right)


def test_the_other_tasks_are_true_too():
    for split in SPLITS:
        for i in range(100):
            _, scene, asked = scene_instruct.instruction(split, i, ("caption",))
            assert judge(scene, asked.replies[0])["exact"] and scene.index == i
            _, scene, asked = scene_instruct.instruction(split, i, ("vqg",))
            assert all(truth(question, scene) == asked.slots["a"] for question in asked.replies)
            _, scene, asked = scene_instruct.instruction(split, i, ("choice",))
            assert asked.choices[asked.label] == asked.replies[0] == truth(asked.prompt, scene) and len(set(asked.choices)) == 4
            _, scene, asked = scene_instruct.instruction(split, i, ("dialogue",))
            *_, (known, _), (last, reply) = asked.turns
            it = re.fullmatch(r"(?:what colour|is) (?:is )?(the .*?)(?: matte or shiny)?", known)[1]
            assert truth(last.replace("is it", f"is {it}"), scene) == reply and 2 <= len(asked.turns) <= 3
            assert all(truth(q, scene) == a for q, a in asked.turns if q.startswith(("how many red", "what colour")))
            _, scene, asked = scene_instruct.instruction(split, i, ("detail",))
            listed, _, places = asked.replies[0].partition(". ")
            assert listed.count("matte") + listed.count("shiny") == len(scene.objects) and listed.startswith("there ")
            for sentence in filter(None, places.rstrip(".").split(". ")):
                subject, where, other = re.fullmatch(rf"(the .*) is ({'|'.join(SIDE)}) (the .*)", sentence).groups()
                assert truth(f"where is {subject} seen from {other}", scene) == SIDE[where]
            *objects, = scene_instruct.keywords(np.random.default_rng(i), scene).split(", ")
            places, objects = [words.split() for words in objects[len(scene.objects):]], [set(words.split()) for words in objects[:len(scene.objects)]]
            things = [next(t for t in scene.objects if {t.size, t.colour, t.fill, t.shape} == words) for words in objects]
            assert places == [[things[0].shape, scene.relation(scene.objects.index(things[0]), scene.objects.index(t)), t.shape] for t in things[1:]]
    labels = [scene_instruct.instruction("train", i, ("choice",))[2].label for i in range(800)]
    assert min(np.bincount(labels)) > 150


def test_a_video_shows_what_moves_and_no_frame_tells_where_to():
    turns = collections.Counter()
    for i in range(60):
        _, _, asked = scene_instruct.instruction("train", i, ("video",))
        moved = asked.frames
        thing = moved.scene.objects[moved.mover]
        dx, dy = moved.end[0] - moved.start[0], moved.end[1] - moved.start[1]
        way = ("right" if dx > 0 else "left") if abs(dx) > 1e-9 else ("down" if dy > 0 else "up")
        assert abs(abs(dx) + abs(dy) - scene_instruct.PATH) < 1e-9 and min(*moved.start, *moved.end) - thing.radius > 0
        name = re.fullmatch("which way does (the .*) move", asked.prompt)
        assert meant(name[1] if name else asked.replies[0], moved.scene.objects) == [thing] and (not name or asked.replies == (way,))
        turns[way] += 1
        for other in moved.scene.objects:
            assert other is thing or all(np.hypot(other.x - x, other.y - y) > other.radius + thing.radius for x, y in (moved.start, moved.end))
    assert min(turns.values()) > 5 and len(turns) == 4
    still, last = moved[0].astype(int), moved[7].astype(int)
    assert len(moved) == 8 and moved[0].shape == (64, 64, 3) and (np.abs(last - still).max(-1) > 40).mean() < 0.3 and (last != still).any()
    assert OPPOSITE["left"] == "right"


def test_tasks_are_pure_joined_by_plus_and_say_their_kind():
    source = open_source("scenes:test/caption+count")
    kinds = collections.Counter(source[i]["kind"] for i in range(60))
    assert set(kinds) == {"caption", "count"} and min(kinds.values()) > 15 and source.name == "scenes:test/caption+count"
    whole = open_source("scenes:train/instruct")
    assert {whole.asked(i)[0] for i in range(200)} == set(scene_instruct.ALL)
    assert whole.fingerprint() == open_source("scenes:train/instruct").fingerprint() != source.fingerprint()
    sample, again = whole[17], open_source("scenes:train/instruct")[17]
    assert sample.keys() == again.keys() and all(np.array_equal(sample[k], again[k]) for k in sample if k not in ("json", "slots"))
    assert len(open_source("scenes:train/count:250")) == 250 and read_answers(open_source("scenes:train/count"), 3)[0] in NUMBERS
    assert [open_source("scenes:heldout_pair/relation")[i]["kind"] for i in range(3)] == ["relation"] * 3


@pytest.mark.parametrize("spec,message", [
    ("train/cuont", "task 'cuont'.*nearest: 'count'"), ("train/count+colours", "task 'colours'.*nearest: 'colour'"),
    ("train/vqa+count", "task 'vqa' is not known"), ("train/instruct+count", "task 'instruct' is not known"),
    ("train/video+count", "'video' has batches of its own.*nearest: 'train/video'"), ("train/text+count", "'text' has batches of its own"),
    ("objects/relation", "objects/relation is about two objects.*nearest: 'train/relation'"), ("noisy/count", "nearest: 'train/count'")])
def test_what_cannot_be_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        open_source(f"scenes:{spec}")


def test_the_instruction_tokenizer_has_every_word_as_one_piece():
    tokenizer, rng = tokenizers.load("scenes_instruct"), np.random.default_rng(0)
    writer = Writer(Layout("joined", prompt_length=64, templates="task"), tokenizer, 64)
    words = set(scenes.instruct_vocabulary(200))
    for task in scene_instruct.TASKS:
        source = open_source(f"scenes:val/{task}")
        for i in range(40):
            said = writer.say(source[i], Clean(""), lambda texts, _: texts[0], rng, True)
            text = f"{said.prompt} {said.reply}".strip()
            spelt = [w for w in re.findall("[a-z]+", re.sub(r"\([a-d]\)", "", text)) if len(tokenizer.body(w)) > 1]
            assert not spelt and tokenizer.decode(tokenizer.body(text)) == text
            assert not set(re.findall("[a-z]{2,}", text)) - words
    assert tokenizers.load("scenes").vocab_size < tokenizer.vocab_size


def test_texts_say_before_what_they_ask_for():
    asked = [scene_instruct.instruction("train", i, ("text",))[2] for i in range(400)]
    assert all(a.prompt or a.turns for a in asked)
    captions = [a for a in asked if a.replies and judge(scene_instruct.make_scene(0, "train"), a.replies[0])["understood"]]
    again = [a for a in captions if a.prompt.startswith(a.replies[0])]
    assert 130 < len(again) < 200 and len(captions) > len(again) + 60
    for a in captions:      # but for the three with synonyms
        shapes = {thing.get("shape") for thing in parse(a.replies[0]).objects} - {"circle", "square", "cross"}
        assert shapes <= set(re.findall("[a-z]+", a.prompt))


def test_texts_and_videos_make_batches():
    tokenizer = tokenizers.load("scenes_instruct")
    options = dict(size=32, augment="squash", threads=0, length=60)
    with train_batches(open_source("scenes:train/text"), tokenizer, **options, batch=64, seed=0, rows=Rows(images=0),
                       layout=Layout("joined", prompt_length=90)) as batches:
        batch = next(batches)[1]
    assert "image" not in batch and 0 < batch["target_mask"].sum() < batch["text_mask"].sum() - 64 and 1 not in batch["text"][:, 1:]
    with eval_batches(open_source("scenes:test/video"), tokenizer, **options, batch=4, limit=4, rows=Rows(images=4),
                      layout=Layout("apart", prompt_length=40, templates="task")) as batches:
        (batch, meta), = batches
    assert batch["images"].shape == (4, 4, 32, 32, 3) and all(m["kind"] == "video" and m["question"].startswith("question: ") for m in meta)
