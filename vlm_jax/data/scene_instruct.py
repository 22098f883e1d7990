"""Instructions about scenes: what is asked of a picture and the true reply, by task. Each is a pure function of (split, index).

============ ============================================================================================================
caption      a caption, short
detail       every object with all its attributes, and where each is seen from those before
count        how many objects of a shape, colour, fill or size there are: the number is drawn first, among those that the scene has
colour       the colour of an object
relation     whether one object is on a side of another (half of the time it is, else it is on the opposite one), or on which side it is
existence    whether there is an object of a colour and shape: half of the time there is, else another scene of the split has it
comparison   which of two objects is bigger, or whether they have one size or fill
vqg          a question whose answer is given
dialogue     two or three questions in turn, of which the last says "it"
choice       a question with four answers to choose from
video        eight frames in which one object moves: which way, or which one
text         no picture: a scene in words, or its keywords, and then a caption, a description or one of the tasks above, for models of language alone
============ ============================================================================================================

Questions are drawn so that their words say little of the answer (``tests/test_scene_instruct.py`` counts what the best guess by the words reaches). An
object is called by as few attributes as tell it apart, and never by what is asked for. Where a scene has no such question, as one of a single object has
none about two, another scene of the split stands in.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data import templates
from vlm_jax.data.scene import COLOURS, FILLS, HELD_OUT_PAIRS, OPPOSITE, RELATIONS, SHAPES, SIZES, Scene, Thing, make_scene, pick, shuffled, stream
from vlm_jax.data.scene_picture import render
from vlm_jax.data.scene_text import NUMBERS, PLACES, canonical, caption

VALUES = {"shape": SHAPES, "colour": COLOURS, "fill": FILLS, "size": SIZES}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FRAMES, PATH = 8, 0.3      # of a video; how far an object moves, in sides of the picture
CHOICES = 4
_TRIED = 12


class Asked(NamedTuple):
    """One instruction. ``task`` names its templates, ``slots`` what else fills them; ``choices`` with the number of the right one; ``turns`` in place of
    prompt and reply; ``replies``, each as good; ``frames`` of a video."""
    prompt: str
    replies: tuple[str, ...]
    task: str
    slots: Mapping[str, str] = {}
    choices: tuple[str, ...] = ()
    label: int = -1
    turns: tuple[tuple[str, str], ...] = ()
    frames: Sequence[np.ndarray] = ()


# ---- words

def _name(things: Sequence[Thing], i: int, without: str = "") -> str | None:
    """The shortest description that fits object ``i`` only and does not tell the attribute ``without``; None where none does."""
    names = ("shape",), ("colour", "shape"), ("fill", "shape"), ("size", "shape"), ("size", "colour", "shape"), ("colour", "fill", "shape"), (
        "size", "colour", "fill", "shape")
    for attributes in names:
        value = [getattr(things[i], a) for a in attributes]
        if without not in attributes and sum([getattr(t, a) for a in attributes] == value for t in things) == 1:
            return "the " + " ".join(value)
    return None


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _counted(attribute: str, value: str) -> str:
    return f"{value}{'es' if value.endswith('s') else 's'}" if attribute == "shape" else f"{value} objects"


def detailed(scene: Scene) -> str:
    """Every object with all its attributes from left to right, and where each is seen from those before."""
    order = sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].x)
    things = [scene.objects[i] for i in order]
    said = [_article(f"{t.size} {t.colour} {t.fill} {t.material} {t.shape}") for t in things]
    listed = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    text = f"there {'is' if len(said) == 1 else 'are'} {NUMBERS[len(said)]} object{'s' * (len(said) > 1)}: {listed}."
    for a, b in itertools.combinations(order, 2):
        text += f" {_named(scene.objects, b)} is {PLACES[scene.relation(b, a)][0]} {_named(scene.objects, a)}."
    return text


def _named(things: Sequence[Thing], i: int) -> str:
    return _name(things, i) or "it"      # no two objects of a scene are alike


# ---- questions by type: (question, answer)

Pair = tuple[str, str]


def _count(rng, scene: Scene) -> Pair:
    attribute = pick(rng, tuple(VALUES))
    by_count: dict[int, list[str]] = {}
    for value in VALUES[attribute]:
        by_count.setdefault(sum(getattr(t, attribute) == value for t in scene.objects), []).append(value)
    count = pick(rng, sorted(by_count))
    return f"how many {_counted(attribute, pick(rng, by_count[count]))} are there", NUMBERS[count]


def _colour(rng, scene: Scene) -> Pair | None:
    i = pick(rng, range(len(scene.objects)))
    name = _name(scene.objects, i, "colour")
    return (f"what colour is {name}", scene.objects[i].colour) if name else None


def _two(rng, scene: Scene) -> tuple[int, int] | None:
    order = shuffled(rng, range(len(scene.objects)))
    return (order[0], order[1]) if len(order) > 1 else None


def _relation(rng, scene: Scene) -> Pair | None:
    if (two := _two(rng, scene)) is None:
        return None
    a, b = two
    where, names = scene.relation(a, b), (_named(scene.objects, a), _named(scene.objects, b))
    if rng.random() < 0.5:
        return f"where is {names[0]} seen from {names[1]}", where
    true = rng.random() < 0.5
    return f"is {names[0]} {PLACES[where if true else OPPOSITE[where]][0]} {names[1]}", _yes(true)


def _existence(rng, scene: Scene) -> Pair:
    there = {(t.shape, t.colour) for t in scene.objects}
    true = rng.random() < 0.5
    shape, colour = pick(rng, sorted(there))
    while not true and (shape, colour) in there:      # what the others of the split show
        thing = pick(rng, make_scene(int(rng.random() * 10_000), scene.split).objects)
        shape, colour = thing.shape, thing.colour
    return f"is there {_article(f'{colour} {shape}')}", _yes(true)


def _comparison(rng, scene: Scene) -> Pair | None:
    for _ in range(_TRIED if len(scene.objects) > 1 else 0):
        attribute, true = pick(rng, ("bigger", "size", "fill")), rng.random() < 0.5
        a, b = _two(rng, scene)
        kind = "size" if attribute == "bigger" else attribute
        names = _name(scene.objects, a, kind), _name(scene.objects, b, kind)
        same = getattr(scene.objects[a], kind) == getattr(scene.objects[b], kind)
        if None in names:
            continue
        if attribute == "bigger" and not same:
            return f"which is bigger, {names[0]} or {names[1]}", names[0] if scene.objects[a].size == "big" else names[1]
        if attribute != "bigger" and same == true:
            return f"are {names[0]} and {names[1]} of the same {attribute}", _yes(same)
    return None


QUESTIONS: Mapping[str, Callable[[Any, Scene], Pair | None]] = {"count": _count, "colour": _colour, "relation": _relation, "existence": _existence,
                                                         "comparison": _comparison}


# ---- the other tasks

def _asked(name: str) -> Callable[[Any, Scene], Asked | None]:
    def ask(rng, scene: Scene) -> Asked | None:
        found = QUESTIONS[name](rng, scene)
        return found and Asked(found[0], (found[1],), "scenes_vqa")
    return ask


def _caption(rng, scene: Scene) -> Asked:
    replies = (caption(scene),) if scene.split in ("train", "longtail") else (caption(scene, canonical_share=0.0), canonical(scene))
    return Asked("a short caption", replies, "scenes_caption")


def _detail(rng, scene: Scene) -> Asked:
    return Asked("describe the picture in detail", (detailed(scene),), "scenes_detail")


def _alone(scene: Scene, asked: str, by: str) -> list[Pair]:
    """Questions for one attribute of objects that another tells apart."""
    words = {"colour": "what colour is the {}", "shape": "what shape is the {} object"}[asked]
    return [(words.format(getattr(t, by)), getattr(t, asked)) for t in scene.objects if sum(getattr(o, by) == getattr(t, by) for o in scene.objects) == 1]


def _vqg(rng, scene: Scene) -> Asked | None:
    known = _alone(scene, "colour", "shape") + _alone(scene, "shape", "colour")
    if not known:
        return None
    answer = pick(rng, known)[1]
    return Asked(f"write a question with the answer: {answer}", tuple(question for question, told in known if told == answer), "scenes_vqg", {"a": answer})


def _dialogue(rng, scene: Scene) -> Asked | None:
    if (two := _two(rng, scene)) is None:
        return None
    a, b = two
    thing, name, other = scene.objects[a], _named(scene.objects, a), _named(scene.objects, b)
    where, true = scene.relation(a, b), rng.random() < 0.5
    turns = [(f"is it {PLACES[where if true else OPPOSITE[where]][0]} {other}", _yes(true))]
    unknown = _name(scene.objects, a, "colour")
    turns.insert(0, (f"what colour is {unknown}", thing.colour) if unknown else (f"is {name} matte or shiny", thing.material))
    if rng.random() < 0.5:
        turns.insert(0, ("how many objects are there", NUMBERS[len(scene.objects)]))
    return Asked("", (), "", turns=tuple(turns))


def _choice(rng, scene: Scene) -> Asked | None:
    known = [("colour", *pair) for pair in _alone(scene, "colour", "shape")] + [("shape", *pair) for pair in _alone(scene, "shape", "colour")]
    if (two := _two(rng, scene)) is not None:
        a, b = two
        known += [("relation", f"where is {_named(scene.objects, a)} seen from {_named(scene.objects, b)}", scene.relation(a, b))] * max(1, len(known) // 2)
    if not known:
        return None
    kind, question, answer = pick(rng, known)
    values = {**VALUES, "relation": RELATIONS}[kind]
    said = question.split()[3]      # "what colour is the X", "what shape is the X object": never one that no scene shows
    possible = [v for v in values if v != answer and not (kind == "colour" and _held(scene, said, v)) and not (kind == "shape" and _held(scene, v, said))]
    choices = shuffled(rng, [answer, *shuffled(rng, possible)[:CHOICES - 1]])
    return Asked(question, (answer,), "scenes_choice", choices=tuple(choices), label=choices.index(answer))


def _held(scene: Scene, shape: str, colour: str) -> bool:
    return (shape, colour) in HELD_OUT_PAIRS and scene.split != "heldout_pair"


class Frames(Sequence):
    """A scene whose object ``mover`` goes along a straight way, each frame drawn when it is asked for: uint8 [size, size, 3]."""

    def __init__(self, scene: Scene, mover: int, start: tuple[float, float], end: tuple[float, float], size: int = 64):
        self.scene, self.mover, self.start, self.end, self.size = scene, mover, start, end, size

    def __len__(self) -> int:
        return FRAMES

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < FRAMES:
            raise IndexError(f"a video of {FRAMES} frames has no frame {i}")
        share = i / (FRAMES - 1)
        x, y = (a + (b - a) * share for a, b in zip(self.start, self.end, strict=True))
        objects = list(self.scene.objects)
        objects[self.mover] = dataclasses.replace(objects[self.mover], x=x, y=y)
        return render(dataclasses.replace(self.scene, objects=tuple(objects)), self.size)


def _video(rng, scene: Scene) -> Asked:
    way = pick(rng, tuple(DIRECTIONS))
    dx, dy = DIRECTIONS[way]
    found = None
    for i in shuffled(rng, range(len(scene.objects))):
        thing = scene.objects[i]
        margin = thing.radius + 0.03
        x, y = (min(max(v, margin + PATH / 2 * abs(d)), 1 - margin - PATH / 2 * abs(d)) for v, d in ((thing.x, dx), (thing.y, dy)))
        start, end = (x - dx * PATH / 2, y - dy * PATH / 2), (x + dx * PATH / 2, y + dy * PATH / 2)
        free = [t for t in scene.objects if t is not thing and _apart(t, thing.radius, start, end)]
        if found is None or len(free) > len(found[1]):
            found = thing, free, start, end
    thing, free, start, end = found      # what would be in the way is not there
    objects = tuple(t for t in scene.objects if t is thing or t in free)
    mover, stage = objects.index(thing), dataclasses.replace(scene, objects=objects)
    name = _named(objects, mover)
    question, answer = ("what moves", name) if len(objects) > 1 and rng.random() < 0.5 else (f"which way does {name} move", way)
    return Asked(question, (answer,), "scenes_video", frames=Frames(stage, mover, start, end))


def _apart(thing: Thing, radius: float, start: tuple[float, float], end: tuple[float, float]) -> bool:
    """Whether an object keeps clear of a circle on its way."""
    steps = np.linspace(0, 1, 9)[:, None]
    way = np.array(start) * (1 - steps) + np.array(end) * steps
    return bool((np.hypot(*(way - (thing.x, thing.y)).T) >= thing.radius + radius + 0.02).all())


def keywords(rng, scene: Scene) -> str:
    """The attributes of each object in any order, and where the others are seen from the first."""
    things = shuffled(rng, range(len(scene.objects)))
    first = scene.objects[things[0]]
    said = [" ".join(shuffled(rng, [t.size, t.colour, t.fill, t.shape])) for t in (scene.objects[i] for i in things)]
    return ", ".join(said + [f"{first.shape} {scene.relation(things[0], i)} {scene.objects[i].shape}" for i in things[1:]])


def _told(rng, scene: Scene) -> str:
    if rng.random() < 0.5:
        return keywords(rng, scene)
    return pick(rng, (canonical, lambda s: caption(s, seed=1 + int(rng.random() * 9), canonical_share=0.0), detailed))(scene)


def _text(rng, scene: Scene) -> Asked | None:
    """Three in eight say a caption again, three tell the scene in other words, two do a task with a description before it. No sentence stands alone: from
    those a small model learns what is usual, and not to look back, which is all that what comes before it in place of a picture can be used by."""
    drawn = rng.random()
    if drawn < 0.75:
        again, short = drawn < 0.375, rng.random() < 0.7
        reply = caption(scene) if again or short else detailed(scene)
        words = pick(rng, templates.TEMPLATES["scenes_caption" if again or short else "scenes_detail"]).text
        return Asked(f"{reply if again else _told(rng, scene)} {words}", (reply,), "")
    asked = TASKS[pick(rng, ALL)](rng, scene)
    if asked is None:
        return None
    description = detailed(scene)      # which states all that is asked for
    if asked.turns:
        return asked._replace(turns=((f"{description} {asked.turns[0][0]}", asked.turns[0][1]), *asked.turns[1:]))
    slots = templates.slots_of({"prompt": asked.prompt, "choices": asked.choices, "slots": asked.slots})
    return Asked(f"{description} {templates.fill(pick(rng, templates.TEMPLATES[asked.task]), slots)}", asked.replies, "")


TASKS: Mapping[str, Callable[[Any, Scene], Asked | None]] = {
    "caption": _caption, "detail": _detail, **{name: _asked(name) for name in QUESTIONS}, "vqg": _vqg, "dialogue": _dialogue, "choice": _choice,
    "video": _video, "text": _text}
ALL = tuple(name for name in TASKS if name not in ("video", "text"))      # what "instruct" stands for: the tasks about one picture
PAIRED = ("relation", "comparison", "dialogue")      # of which a scene of one object has none


def instruction(split: str, index: int, tasks: Sequence[str]) -> tuple[str, Scene, Asked]:
    """(task, scene, what is asked of it) of a sample: the task is drawn from ``tasks``; the scene is that of the index where it has such a question."""
    rng = stream(split, index, "instruct")
    task, scene = pick(rng, tasks), make_scene(index, split)
    while (asked := TASKS[task](rng, scene)) is None:
        scene = make_scene(int(rng.random() * 10_000), split)
    return task, scene, asked
