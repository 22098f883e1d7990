"""Procedural scenes: what is there and where, as a pure function of (split, index).

A `Scene` is the source of truth; the picture (`scene_picture`), the captions, the facts check and
the questions (`scene_text`) are views of it. A new view (depth, sound, motion, a dialogue, an edit)
reads the same description and draws what it needs from its own random `stream`, so adding one
never changes the others.

Scenes hold 2 or 3 objects (a tenth of the training scenes hold 1). No two objects overlap, no two
share all of shape, colour, fill and size, and each pair is clearly left/right or clearly above/below
of one another. Lengths are fractions of the picture's side, x to the right and y downwards.

Splits, each an endless list of indices:

============== ==================================================================================
train          seen combinations
val, test      seen combinations; no set of objects of one of these three occurs in another
heldout_pair   exactly one object has a (shape, colour) of ``HELD_OUT_PAIRS``
heldout_triple exactly one object has a (shape, colour, fill) of ``HELD_OUT_TRIPLES``, none a pair
objects        one object of a seen combination, classes in turn, for zero-shot classification
longtail       for training: one object of a seen combination, shapes and colours with the frequencies
               of ``frequency``
============== ==================================================================================

The evaluation splits (val, test, held-out) enumerate sets of objects without repetition, so that
the first ``DISTINCT`` scenes of each have facts, and therefore captions, that differ pairwise.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from vlm_jax.errors import nearest

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
FILLS = ("solid", "striped", "hollow")
SIZES = ("small", "big")
MATERIALS = ("matte", "shiny")
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

SPLITS = ("train", "val", "test", "heldout_pair", "heldout_triple", "objects", "longtail")
DISTINCT = 5000  # scenes at the start of val, test and the held-out splits with pairwise different facts

HELD_OUT_PAIRS = frozenset({
    ("circle", "green"), ("square", "purple"), ("triangle", "cyan"),
    ("star", "red"), ("cross", "yellow"), ("heart", "blue")})
HELD_OUT_TRIPLES = frozenset({
    ("circle", "red", "hollow"), ("circle", "cyan", "striped"), ("square", "blue", "striped"),
    ("square", "yellow", "hollow"), ("triangle", "yellow", "solid"), ("triangle", "purple", "striped"),
    ("star", "white", "hollow"), ("star", "orange", "solid"), ("cross", "orange", "striped"),
    ("cross", "blue", "hollow"), ("heart", "green", "solid")})
CLASSES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS
                if (shape, colour) not in HELD_OUT_PAIRS)

RGB = {"red": (224, 40, 44), "orange": (246, 138, 24), "yellow": (246, 228, 56), "green": (52, 176, 62),
       "cyan": (68, 216, 226), "blue": (56, 92, 238), "purple": (164, 62, 212), "white": (240, 240, 240)}
RADIUS = {"small": (0.100, 0.130), "big": (0.170, 0.205)}
_COLOUR_JITTER = 14.0  # levels of 255, each channel
_ROTATION = math.radians(25)  # jitter to both sides
_GAP = 0.03  # between the circles around two objects, and to the border
_CLEAR = 8 / 64  # the horizontal and vertical distance of two objects differ by this much


class Kind(NamedTuple):
    """What a caption can say of one object."""

    shape: str
    colour: str
    fill: str
    size: str


@dataclasses.dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene.

    `fill` is the texture; `rgb` the jittered colour (0 to 255); (`x`, `y`) the centre and `radius` that
    of the circle around the shape, in fractions of the picture's side; `rotation` in radians.
    """

    shape: str
    colour: str
    fill: str
    size: str
    material: str
    x: float
    y: float
    radius: float
    rotation: float
    rgb: tuple[float, float, float]

    @property
    def kind(self) -> Kind:
        return Kind(self.shape, self.colour, self.fill, self.size)


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """Objects on a background of tint `background` (0 to 255) with noise of deviation `noise`."""

    split: str
    index: int
    objects: tuple[Thing, ...]
    background: tuple[float, float, float]
    noise: float

    def relation(self, subject: int, other: int) -> str:
        """Where object `subject` is, seen from object `other`: one of ``RELATIONS``."""
        a, b = self.objects[subject], self.objects[other]
        return _relation(a.x - b.x, a.y - b.y)


def _relation(dx: float, dy: float) -> str:
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


_STREAMS = ("scene", "picture", "caption", "questions", "swaps", "noise", "tasks", "instruct")


def stream(split: str, index: int, purpose: str, seed: int = 0) -> random.Random:
    """The random numbers of one view of one scene. Only `random()` is the same on every Python."""
    return random.Random((seed << 64) + (index << 16) + (SPLITS.index(split) << 8) + _STREAMS.index(purpose))


def pick(rng: random.Random, choices: Sequence):
    return choices[int(rng.random() * len(choices))]


def shuffled(rng: random.Random, items: Sequence) -> list:
    keys = [rng.random() for _ in items]
    return [item for _, item in sorted(zip(keys, items), key=lambda pair: pair[0])]


def make_scene(index: int, split: str) -> Scene:
    """The scene number `index` >= 0 of `split`, the same on every machine.

    Raises ValueError for an unknown split and IndexError for a negative index.
    """
    if split not in SPLITS:
        raise ValueError(f"scenes split {split!r} is not known{nearest(split, SPLITS)}")
    if index < 0:
        raise IndexError(f"scenes index {index}: must be 0 or more")
    rng = stream(split, index, "scene")
    kinds = shuffled(rng, _kinds(index, split, rng))
    places = _places(rng, [_between(rng, *RADIUS[kind.size]) for kind in kinds])
    objects = []
    for kind, (x, y, radius) in zip(kinds, places):
        bright = _between(rng, 0.9, 1.06)
        rgb = tuple(min(255.0, bright * level + _between(rng, -_COLOUR_JITTER, _COLOUR_JITTER))
                    for level in RGB[kind.colour])
        objects.append(Thing(*kind, pick(rng, MATERIALS), x, y, radius,
                             _between(rng, -_ROTATION, _ROTATION), rgb))
    dark = _between(rng, 22, 58)
    tint = tuple(dark + _between(rng, 0, 26) for _ in range(3))
    return Scene(split, index, tuple(objects), tint, _between(rng, 3, 9))


def class_of(scene: Scene) -> int:
    """The index in ``CLASSES`` of the (only) object of a scene of split "objects"."""
    thing, = scene.objects
    return CLASSES.index(f"{thing.colour} {thing.shape}")


def frequency(name: str) -> float:
    """How often split "longtail" draws one of ``CLASSES``, as a share: shapes and colours fall off as their rank to the power of -1.5."""
    return _longtail()[CLASSES.index(name)]


@functools.cache
def _longtail() -> tuple[float, ...]:
    mass = [((1 + COLOURS.index(colour)) * (1 + SHAPES.index(shape))) ** -1.5 for colour, shape in map(str.split, CLASSES)]
    return tuple(m / sum(mass) for m in mass)


def _between(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _places(rng: random.Random, radii: Sequence[float]) -> list[tuple[float, float, float]]:
    """A place for each radius, (x, y, radius) in order: rejection, begun afresh when it gets stuck."""
    while True:
        placed: list[tuple[float, float, float]] = []
        for radius in radii:
            margin = radius + _GAP
            for _ in range(12):
                x, y = _between(rng, margin, 1 - margin), _between(rng, margin, 1 - margin)
                if all(abs(abs(x - a) - abs(y - b)) >= _CLEAR
                       and (x - a) ** 2 + (y - b) ** 2 >= (radius + r + _GAP) ** 2 for a, b, r in placed):
                    placed.append((x, y, radius))
                    break
            else:
                break
        if len(placed) == len(radii):
            return placed


# ---- which objects: every set of different kinds has a rank, and each split owns some of the ranks

_ALL = tuple(Kind(*kind) for kind in itertools.product(SHAPES, COLOURS, FILLS, SIZES))
_PAIR = tuple(k for k in _ALL if k[:2] in HELD_OUT_PAIRS)
_TRIPLE = tuple(k for k in _ALL if k[:3] in HELD_OUT_TRIPLES)
SEEN = tuple(k for k in _ALL if k[:2] not in HELD_OUT_PAIRS and k[:3] not in HELD_OUT_TRIPLES)
_OWN = {"test": 0, "val": 1}  # the rank's last digit; training has the other eight
_STEP = 2_654_435_761  # a prime longer than any list of ranks: stepping by it visits each rank once


def _kinds(index: int, split: str, rng: random.Random) -> list[Kind]:
    if split == "objects":
        return [_of_class(CLASSES[index % len(CLASSES)], rng)]
    if split == "longtail":
        return [_of_class(CLASSES[bisect_right(list(itertools.accumulate(_longtail()))[:-1], rng.random())], rng)]
    if split == "train":
        draw = rng.random()
        count = 1 if draw < 0.1 else 2 if draw < 0.55 else 3
        if count == 1:
            return [pick(rng, SEEN)]
        tens = math.comb(len(SEEN), count) // 10
        rank = 10 * int(rng.random() * tens) + 2 + int(rng.random() * 8)
        return [SEEN[i] for i in _subset(rank, count)]
    count, turn = 2 + index % 2, index // 2
    if split in _OWN:
        tens = math.comb(len(SEEN), count) // 10
        rank = 10 * (turn * _STEP % tens) + _OWN[split]
        return [SEEN[i] for i in _subset(rank, count)]
    held = _PAIR if split == "heldout_pair" else _TRIPLE
    rank = turn * _STEP % (len(held) * math.comb(len(SEEN), count - 1))
    return [held[rank % len(held)], *(SEEN[i] for i in _subset(rank // len(held), count - 1))]


def _of_class(name: str, rng: random.Random) -> Kind:
    colour, shape = name.split()
    return pick(rng, [k for k in SEEN if k[:2] == (shape, colour)])


def _subset(rank: int, count: int) -> list[int]:
    """The subset of size `count` with this rank in the combinatorial number system."""
    chosen = []
    for size in range(count, 0, -1):
        element = bisect_right(_binomials(size), rank) - 1
        chosen.append(element)
        rank -= _binomials(size)[element]
    return chosen


@functools.cache
def _binomials(size: int) -> tuple[int, ...]:
    return tuple(math.comb(n, size) for n in range(len(SEEN)))
