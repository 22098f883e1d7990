"""Tasks about scenes: a question, a statement to be judged, a statement about two pictures. Each is a pure function of (split, index).

``statement``: the statement is one claim, or two joined by "and" or "or" of which the second is about a thing above, below, left or right of
the picture, where nobody can see it::

    there is a red star in the picture                                       entailment or contradiction
    there is a red star in the picture and a blue circle above the picture   neutral where the star is there, else contradiction
    there is a red star in the picture or a blue circle above the picture    entailment where the star is there, else neutral

The three forms are drawn evenly, and the claim is true half of the time, so that the classes are even and words alone tell none of them: the
best guess without looking is right half of the time. The claim is a noun phrase as above, or a whole caption, a true one or a lie.

``pair``: whether something is in one picture, in both or in either, told truly half of the time. The second picture is drawn until the statement
can be made. A false claim about one side holds of the other half of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vlm_jax.data.scene import COLOURS, FILLS, HELD_OUT_PAIRS, SHAPES, Scene, make_scene, pick, shuffled, stream
from vlm_jax.data.scene_text import LONGEST, NUMBERS, PLACES, Question, caption, lie, questions

ENTAILMENT = ("contradiction", "neutral", "entailment")
PAIRS = ("False", "True")
_TRIED = 12      # pictures looked at for one kind of statement


def question(scene: Scene) -> Question:
    """One of the scene's questions."""
    return pick(stream(scene.split, scene.index, "tasks"), questions(scene))


# ---- what can be said of a picture

class Claim(NamedTuple):
    """"there IS WHAT in the picture": of a shape, a colour, a fill, some of them, or a number of objects."""
    shape: str = ""
    colour: str = ""
    fill: str = ""
    count: int = 0

    @property
    def words(self) -> str:
        if self.count:
            return f"{NUMBERS[self.count]} object{'s' if self.count > 1 else ''}"
        return _article(" ".join(filter(None, (self.fill, self.colour, self.shape or "object"))))

    @property
    def there(self) -> str:
        return "there are" if self.count > 1 else "there is"

    def holds(self, scene: Scene) -> bool:
        if self.count:
            return len(scene.objects) == self.count
        return any(all(value in ("", getattr(thing, name)) for name, value in (("shape", self.shape), ("colour", self.colour), ("fill", self.fill)))
                   for thing in scene.objects)


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


_KINDS = {"pair": ("shape", "colour"), "shape": ("shape",), "colour": ("colour",), "fill": ("fill",), "filled shape": ("shape", "fill"), "count": ()}


def _claim_of(rng, scene: Scene, kind: str) -> Claim:
    """A claim that is true of the scene."""
    if kind == "count":
        return Claim(count=len(scene.objects))
    thing = pick(rng, scene.objects)
    return Claim(**{name: getattr(thing, name) for name in _KINDS[kind]})


def _any_claim(rng, kind: str) -> Claim:
    """A claim of any picture; of no combination that is held out."""
    if kind == "count":
        return Claim(count=2 + int(rng.random() * 2))
    while True:
        claim = Claim(**{name: pick(rng, {"shape": SHAPES, "colour": COLOURS, "fill": FILLS}[name]) for name in _KINDS[kind]})
        if (claim.shape, claim.colour) not in HELD_OUT_PAIRS:
            return claim


def _false_claim(rng, kind: str, *scenes: Scene) -> Claim | None:
    """A claim that is false of all the scenes, where one is found soon."""
    tries = (_any_claim(rng, kind) for _ in range(_TRIED))
    return next((claim for claim in tries if not any(claim.holds(scene) for scene in scenes)), None)


# ---- entailment

def statement(scene: Scene) -> tuple[str, int]:
    """(a statement about the scene, the number of its class in ``ENTAILMENT``)."""
    rng = stream(scene.split, scene.index, "tasks")
    form, true = pick(rng, ("", "and", "or")), rng.random() < 0.5
    adjunct = f" {form} {_any_claim(rng, 'pair').words} {_place(rng)} the picture" if form else ""
    claim = ""
    if rng.random() < 0.5:
        claim = caption(scene) if true else lie(scene, rng)
    if not claim or len((claim + adjunct).replace(",", " ,").split()) > LONGEST:
        kind = pick(rng, ("pair", "shape", "colour", "filled shape"))
        said = _claim_of(rng, scene, kind) if true else None
        while said is None:
            said = _false_claim(rng, kind, scene)
        claim = f"there is {said.words} in the picture"
    label = {"": "entailment" if true else "contradiction", "and": "neutral" if true else "contradiction", "or": "entailment" if true else "neutral"}[form]
    return claim + adjunct, ENTAILMENT.index(label)


def _place(rng) -> str:
    words = pick(rng, tuple(PLACES.values()))
    return words[0] if rng.random() < 0.5 else pick(rng, words)


# ---- pairs

class Pair(NamedTuple):
    """Two scenes, what is said of them, and whether it is true."""
    left: Scene
    right: Scene
    statement: str
    label: int


def _of_side(rng, kind: str, true: bool, mine: Scene, other: Scene) -> Claim | None:
    if true:
        return _claim_of(rng, mine, kind)
    if rng.random() < 0.5:
        said = _claim_of(rng, other, kind)
        return None if said.holds(mine) else said
    return _false_claim(rng, kind, mine, other)


def _of_both(rng, kind: str, true: bool, mine: Scene, other: Scene) -> Claim | None:
    said = _claim_of(rng, mine, kind)
    return said if said.holds(other) == true else None


def _of_either(rng, kind: str, true: bool, mine: Scene, other: Scene) -> Claim | None:
    return _claim_of(rng, mine, kind) if true else _false_claim(rng, kind, mine, other)


# wordings, kinds of claim, how a claim is found; {side} is where ``mine`` is
_FORMS: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable], ...] = (
    (("{there} {what} in the {side} picture", "the {side} picture shows {what}"), ("pair", "shape", "colour", "filled shape", "count"), _of_side),
    (("there is no {noun} in the {side} picture",), ("pair", "shape", "colour", "filled shape"), _of_side),
    (("{there} {what} in the left picture and in the right picture",), ("shape", "colour", "fill", "count"), _of_both),
    (("{there} {what} in the left picture or in the right picture",), ("pair", "shape", "filled shape", "count"), _of_either))


def pair(split: str, index: int, length: int) -> Pair:
    """The scene ``index`` and another of the first ``length``, one left and one right, with a statement about both."""
    rng = stream(split, index, "tasks")
    true, scene = rng.random() < 0.5, make_scene(index, split)
    mine_left = rng.random() < 0.5
    while True:
        wordings, kinds, find = pick(rng, _FORMS)
        wording, kind = pick(rng, wordings), pick(rng, kinds)
        negated = "no {noun}" in wording
        for _ in range(_TRIED):
            other = int(rng.random() * length)
            if other == index and length > 1:
                continue
            partner = make_scene(other, split)
            mine, away = shuffled(rng, (scene, partner))
            said = find(rng, kind, true != negated, mine, away)
            if said is None:
                continue
            left, right = (scene, partner) if mine_left else (partner, scene)
            text = wording.format(there=said.there, what=said.words, noun=said.words.partition(" ")[2], side="left" if mine is left else "right")
            return Pair(left, right, text, int(true))
