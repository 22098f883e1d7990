"""Words for scenes: captions, the facts a caption states, the check of those facts, and questions.

The canonical caption names every object by size, colour, fill (unless solid) and shape, leftmost
object first, and says where that one is with regard to each other object:

    a small red striped circle left of a big blue square and above a small green hollow star

Free captions state the same facts in one of ``SENTENCES`` with noun phrases of one of ``PHRASES``,
objects in any order, and synonyms. Several put the noun before its colour, or all nouns before all
colours, so that a writer has to see a shape without leaning on its colour. The material is never
mentioned; questions ask for it. No caption is longer than ``LONGEST`` words and commas.

`parse` reads any mixture of these wordings back, and says when it could not; `judge` compares what
it read with the scene. `swaps` and `lie` write what is false of it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from vlm_jax.data.scene import (
    COLOURS,
    FILLS,
    HELD_OUT_PAIRS,
    HELD_OUT_TRIPLES,
    MATERIALS,
    OPPOSITE,
    SEEN,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    pick,
    shuffled,
    stream,
)

LONGEST = 28  # words and commas; with the start and end marks at most 30 tokens

# The first word is the canonical one.
SYNONYMS = {word: (word,) for word in (*SHAPES, *COLOURS, *FILLS, *SIZES, *MATERIALS)} | {
    "circle": ("circle", "disc"), "square": ("square", "box"), "cross": ("cross", "plus"),
    "cyan": ("cyan", "turquoise"), "purple": ("purple", "violet"),
    "small": ("small", "little", "tiny"), "big": ("big", "large", "huge"),
    "solid": ("solid", "plain", "filled"), "striped": ("striped", "stripy"), "hollow": ("hollow", "empty"),
    "shiny": ("shiny", "glossy")}
PLACES = {"left": ("left of", "to the left of", "on the left of"),
          "right": ("right of", "to the right of", "on the right of"),
          "above": ("above", "over"), "below": ("below", "under", "beneath")}
SIDES = {"left": ("to its left", "on its left"), "right": ("to its right", "on its right"),
         "above": ("above it", "over it"), "below": ("below it", "under it")}
OPENINGS = ("there is", "here is", "we see", "the picture shows", "a picture of", "this is")
VERBS = ("is", "sits", "lies")
ORDINALS = ("the first", "the second", "the third")
NUMBERS = ("zero", "one", "two", "three")

PHRASES = ("plain", "fill_first", "colour_after", "that_is", "size_after")
SENTENCES = ("relations", "opening", "verb", "inverted", "with", "ordinals", "respectively")


# ---- writing

@dataclasses.dataclass(frozen=True, slots=True)
class _Pen:
    """Chooses words: always the canonical ones without `rng`."""

    rng: object = None

    def word(self, value: str, table=SYNONYMS) -> str:
        words = table[value]
        if self.rng is None or len(words) == 1 or self.rng.random() < 0.5:  # half of the words are canonical
            return words[0]
        return pick(self.rng, words)

    def fill(self, thing: Thing) -> str | None:
        """A solid object's fill goes without saying, mostly."""
        if thing.fill == "solid" and (self.rng is None or self.rng.random() < 0.8):
            return None
        return self.word(thing.fill)

    def phrase(self, thing: Thing, style: str) -> str:
        size, colour, shape = self.word(thing.size), self.word(thing.colour), self.word(thing.shape)
        fill = self.fill(thing)
        if style == "plain":
            return _article(size, colour, fill, shape)
        if style == "fill_first":
            return _article(size, fill, colour, shape)
        if style == "colour_after":
            ending = {"striped": f"with {colour} stripes", "hollow": f"with {_article(colour, 'outline')}",
                      "solid": f"in {fill} {colour}" if fill else f"in {colour}"}
            return f"{_article(size, shape)} {ending[thing.fill]}"
        if style == "that_is":
            words = [size, fill, colour] if self.rng.random() < 0.5 else [colour, size, fill]
            words = [word for word in words if word]
            return f"{_article(shape)} that is {' '.join(words[:-1])} and {words[-1]}"
        return f"{_article(fill, shape)} in {colour} of {size} size"  # size_after


def _article(*words: str | None) -> str:
    words = [word for word in words if word]
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def canonical(scene: Scene) -> str:
    """The one canonical caption of a scene."""
    order = sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].x)
    return _sentence(scene, order, "relations", "plain", _Pen())


def caption(scene: Scene, seed: int = 0, canonical_share: float = 0.5) -> str:
    """One caption: canonical with probability `canonical_share`, else free wording.

    A pure function of its arguments; different seeds word the same facts differently.
    """
    rng = stream(scene.split, scene.index, "caption", seed)
    if rng.random() < canonical_share:
        return canonical(scene)
    pen = _Pen(rng)
    order = shuffled(rng, range(len(scene.objects)))
    sentence = pick(rng, SENTENCES if len(order) > 1 else ("relations", "opening"))
    style = pick(rng, PHRASES)
    text = _sentence(scene, order, sentence, style, pen)
    for shorter in (sentence, "relations"):
        if len(_words(text)) > LONGEST:
            text = _sentence(scene, order, shorter, "plain", pen)
    return text


def _sentence(scene: Scene, order: Sequence[int], sentence: str, style: str, pen: _Pen) -> str:
    if sentence == "respectively":
        return _respectively(scene, order, pen)
    first, *rest = [pen.phrase(scene.objects[i], style) for i in order]
    where = [scene.relation(order[0], i) for i in order[1:]]
    if sentence == "with":
        sides = [f"{phrase} {pen.word(OPPOSITE[place], SIDES)}" for phrase, place in zip(rest, where)]
        return f"{first} with {' and '.join(sides)}"
    places = [pen.word(place, PLACES) for place in where]
    if sentence == "ordinals":
        listed = ", ".join([first, *rest[:-1]]) + f" and {rest[-1]}"
        facts = " and ".join(f"{place} {ordinal}" for place, ordinal in zip(places, ORDINALS[1:]))
        return f"{listed}, {ORDINALS[0]} {facts}"
    facts = " and ".join(f"{place} {phrase}" for place, phrase in zip(places, rest))
    if sentence == "inverted":
        return f"{facts} {pick(pen.rng, (*VERBS, OPENINGS[0]))} {first}"
    if sentence == "opening":
        return f"{pick(pen.rng, OPENINGS)} {first} {facts}".rstrip()
    if sentence == "verb":
        return f"{first} {pick(pen.rng, VERBS)} {facts}"
    return f"{first} {facts}".rstrip()  # relations


def _respectively(scene: Scene, order: Sequence[int], pen: _Pen) -> str:
    """Shapes and places first, the other attributes after them in the same order."""
    things = [scene.objects[i] for i in order]
    first, *rest = [_article(pen.word(thing.shape)) for thing in things]
    facts = " and ".join(f"{pen.word(scene.relation(order[0], i), PLACES)} {phrase}"
                         for i, phrase in zip(order[1:], rest))
    groups = [" ".join(word for word in (pen.word(t.size), pen.word(t.colour), pen.fill(t)) if word) for t in things]
    return f"{first} {facts}, {', '.join(groups[:-1])} and {groups[-1]} respectively"


# ---- reading

@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What a caption states.

    `objects`: for each a dict with some of shape, colour, fill, size, material. `relations`: (subject,
    place, other) with indices into `objects`. `understood`: all words were known and the grammar fits;
    otherwise the rest is what could be read.
    """

    objects: tuple[dict[str, str], ...]
    relations: tuple[tuple[int, str, int], ...]
    understood: bool


@functools.cache
def _lexicon() -> dict[str, tuple[str, str, str]]:
    """phrase -> (code of its word class, attribute, value)."""
    table = {}
    for code, attribute, values in (("z", "size", SIZES), ("c", "colour", COLOURS), ("f", "fill", FILLS),
                                    ("m", "material", MATERIALS), ("n", "shape", SHAPES)):
        table |= {word: (code, attribute, value) for value in values for word in SYNONYMS[value]}
    table |= {word: ("r", "relation", value) for value, words in PLACES.items() for word in words}
    table |= {word: ("q", "relation", value) for value, words in SIDES.items() for word in words}
    table |= {word: (str(i + 1), "ordinal", str(i)) for i, word in enumerate(ORDINALS)}
    for code, words in (("e", OPENINGS), ("v", VERBS), ("d", ("a", "an", "the")), ("k", (",", ";", ".")),
                        ("a", ("and",)), ("w", ("with",)), ("i", ("in",)), ("o", ("of",)), ("y", ("size",)),
                        ("t", ("that is", "which is")), ("R", ("respectively",))):
        table |= {word: (code, "", "") for word in words}
    return table | {"stripes": ("s", "fill", "striped"), "outline": ("s", "fill", "hollow")}


@functools.cache
def _tokens() -> re.Pattern:
    phrases = sorted(_lexicon(), key=len, reverse=True)
    known = "|".join(re.escape(phrase) + (r"\b" if phrase[-1].isalpha() else "") for phrase in phrases)
    return re.compile(rf"({known})|\S+")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s,.;]+|[,.;]", text)


_ADJECTIVES = "[zcfm](?:[ka]{0,2}[zcfm])*"
_NOUN_PHRASE = re.compile(f"d[zcfm]*n(?:if?c|wd?cs|t{_ADJECTIVES})?(?:ozy)?")
_RESPECTIVELY = re.compile("(.+?)k((?:[zcfm]+[ka]*)+)R")
# N: a noun phrase. Relations belong to the first one unless the sentence is inverted.
_PLAIN = re.compile("e?N(?:t?v?rN(?:[ka]*v?rN)*)?")
_INVERTED = re.compile("rN(?:[ka]*rN)*k?[ve]N")
_WITH = re.compile("e?NwNq(?:[ka]*w?Nq)*")
_ORDINALS = re.compile("e?N(?:[ka]+N)+[ka]*1v?r[23](?:[ka]*v?r[23])*")
_LISTED = re.compile("e?N(?:[ka]+N)+")


def parse(text: str) -> Facts:
    """The facts a caption states, for any text (never raises)."""
    entries = [_lexicon()[m[1]] if m[1] else ("?", "", "") for m in _tokens().finditer(text.lower())]
    while entries and entries[-1][0] == "k":
        entries.pop()
    codes = "".join(entry[0] for entry in entries)
    late: list[dict[str, str]] = []
    consistent = True
    tail = _RESPECTIVELY.fullmatch(codes)
    if tail:
        start = tail.start(2)
        for group in re.finditer("[zcfm]+", tail[2]):
            attributes, agree = _attributes(entries[start + group.start():start + group.end()])
            late.append(attributes)
            consistent &= agree
        codes = tail[1]
    objects, shortened, values, position = [], "", [], 0
    for match in _NOUN_PHRASE.finditer(codes):
        attributes, agree = _attributes(entries[match.start():match.end()])
        consistent &= agree
        shortened += codes[position:match.start()] + "N"
        values += [entry[2] for entry in entries[position:match.start()]] + [str(len(objects))]
        objects.append(attributes)
        position = match.end()
    shortened += codes[position:]
    values += [entry[2] for entry in entries[position:len(codes)]]
    if tail:
        consistent &= len(late) == len(objects) and not any(a.keys() & b.keys() for a, b in zip(objects, late))
        objects = [a | b for a, b in zip(objects, late)]
    relations, fits = _relations(shortened, values)
    known = len(objects)
    relations = [r for r in relations if r[0] < known and r[2] < known]
    return Facts(tuple(objects), tuple(relations), bool(fits and consistent and objects))


def _attributes(entries: Sequence[tuple[str, str, str]]) -> tuple[dict[str, str], bool]:
    """The attributes among the entries, and whether none is named twice."""
    stated = [(attribute, value) for _, attribute, value in entries if attribute]
    return dict(stated), len(dict(stated)) == len(stated)


def _relations(codes: str, values: Sequence[str]) -> tuple[list[tuple[int, str, int]], bool]:
    """Relations of a sentence of noun phrases, and whether it has a known form."""
    nouns = [int(value) for code, value in zip(codes, values) if code == "N"]
    places = [value for code, value in zip(codes, values) if code in "rq"]
    if _PLAIN.fullmatch(codes):
        return [(0, place, other) for place, other in zip(places, nouns[1:])], True
    if _INVERTED.fullmatch(codes):
        return [(nouns[-1], place, other) for place, other in zip(places, nouns)], True
    if _WITH.fullmatch(codes):
        return [(subject, place, 0) for place, subject in zip(places, nouns[1:])], True
    if _ORDINALS.fullmatch(codes):
        others = [int(value) for code, value in zip(codes, values) if code in "23"]
        # an ordinal beyond the list refers to nothing
        return [(0, place, other) for place, other in zip(places, others)], max(others) < len(nouns)
    return [], bool(_LISTED.fullmatch(codes))


def judge(scene: Scene, text: str) -> dict[str, bool]:
    """Is this caption true of the scene, and does it name all of it?

    understood  every word and the sentence's form were read
    objects     as many objects as the scene has, with the right (shape, colour) each
    shapes, colours   the same, of shapes and of colours alone
    attributes  nothing false is said of an object, and nothing the canonical caption says is left out
    relations   every relation stated is true, and as many are stated as in the canonical caption
    exact       understood, objects, attributes and relations
    literal     the text is the canonical caption

    Objects, attributes and relations are those of the one matching of the caption's objects to the
    scene's that fares best, in this order.
    """
    facts = parse(text)
    things = scene.objects
    bags = {name: sorted(o.get(name, "") for o in facts.objects) == sorted(getattr(t, name) for t in things)
            for name in ("shape", "colour")}
    best = (False, False, False)
    if len(facts.objects) == len(things):
        best = max(_agreement(scene, facts, order) for order in itertools.permutations(range(len(things))))
    named, described, placed = best
    return {"exact": facts.understood and named and described and placed,
            "literal": text.strip() == canonical(scene),
            "understood": facts.understood, "objects": named, "shapes": bags["shape"], "colours": bags["colour"],
            "attributes": described, "relations": placed}


def _agreement(scene: Scene, facts: Facts, order: Sequence[int]) -> tuple[bool, bool, bool]:
    """(objects, attributes, relations) when the caption's object k is the scene's object order[k]."""
    pairs = [(stated, scene.objects[i]) for stated, i in zip(facts.objects, order)]
    named = all((stated.get("shape"), stated.get("colour")) == (t.shape, t.colour) for stated, t in pairs)
    described = named and all(
        all(getattr(t, attribute) == value for attribute, value in stated.items())
        and "size" in stated and ("fill" in stated or t.fill == "solid") for stated, t in pairs)
    stated = set(facts.relations)
    placed = (len(stated) >= len(order) - 1
              and all(scene.relation(order[a], order[b]) == place for a, place, b in stated))
    return named, described, placed


# ---- writing what is false

ATTRIBUTES = ("colour", "shape", "size", "fill")
SWAPS = (*ATTRIBUTES, "relation")


def swaps(scene: Scene) -> dict[str, tuple[str, str]]:
    """For each kind of ``SWAPS`` that the scene allows, its canonical caption and a false one in the same words.

    Two objects have exchanged this attribute, or ("relation") their places. The false caption is one of the scene with the exchange,
    judged false of the scene itself; it names no held-out combination that the scene does not show. Pure; the two
    objects are drawn.
    """
    rng, true, found = stream(scene.split, scene.index, "swaps"), canonical(scene), {}
    pairs = shuffled(rng, list(itertools.combinations(range(len(scene.objects)), 2)))
    for kind in SWAPS:
        for a, b in pairs:
            other = _exchanged(scene, a, b, ("x", "y") if kind == "relation" else (kind,))
            false = canonical(other)
            if _unseen(other) <= _unseen(scene) and is_false(scene, false):
                found[kind] = (true, false)
                break
    return found


def lie(scene: Scene, rng, canonical_share: float = 0.5) -> str:
    """A fluent caption that is false: one object has become another kind of thing, of a shape and colour that were seen together."""
    objects = list(scene.objects)
    at = int(rng.random() * len(objects))
    other = pick(rng, [kind for kind in SEEN if kind[:2] != objects[at].kind[:2]])
    objects[at] = dataclasses.replace(objects[at], **other._asdict())
    return caption(dataclasses.replace(scene, objects=tuple(objects)), canonical_share=canonical_share)


def is_false(scene: Scene, text: str) -> bool:
    """A full description that reads well and is not true: of this scene something is said that does not hold."""
    verdict = judge(scene, text)
    return verdict["understood"] and not verdict["exact"]


def _exchanged(scene: Scene, a: int, b: int, fields: Sequence[str]) -> Scene:
    objects = list(scene.objects)
    for i, other in ((a, objects[b]), (b, objects[a])):
        objects[i] = dataclasses.replace(objects[i], **{field: getattr(other, field) for field in fields})
    return dataclasses.replace(scene, objects=tuple(objects))


def _unseen(scene: Scene) -> set[tuple[str, ...]]:
    """The held-out combinations that a scene shows."""
    return {k for t in scene.objects for k in ((t.shape, t.colour), (t.shape, t.colour, t.fill)) if k in HELD_OUT_PAIRS or k in HELD_OUT_TRIPLES}


# ---- questions

class Question(NamedTuple):
    kind: str
    question: str
    answer: str


def questions(scene: Scene, seed: int = 0) -> list[Question]:
    """Questions with one true answer each, at most one of each kind.

    Kinds: count, exists, colour, shape, fill, material, relation, size. An object is referred to by as
    few of its attributes as tell it apart. Nothing is asked of a held-out pair the scene does not show.
    """
    rng = stream(scene.split, scene.index, "questions", seed)
    things = scene.objects
    asked = [_count(rng, things), _exists(rng, things)]
    i = int(rng.random() * len(things))
    thing, name = things[i], _name(things, i)
    if name != _full(thing):
        asked.append(Question("fill", f"is {name} solid, striped or hollow", thing.fill))
    asked.append(Question("material", f"is {name} matte or shiny", thing.material))
    if sum(t.shape == thing.shape for t in things) == 1:
        asked.append(Question("colour", f"what colour is the {thing.shape}", thing.colour))
    if sum(t.colour == thing.colour for t in things) == 1:
        asked.append(Question("shape", f"what shape is the {thing.colour} object", thing.shape))
    if len(things) > 1:
        j = (i + 1 + int(rng.random() * (len(things) - 1))) % len(things)
        other, place = _name(things, j), scene.relation(i, j)
        if rng.random() < 0.5:
            asked.append(Question("relation", f"where is {name} seen from {other}", place))
        else:
            tried = place if rng.random() < 0.5 else pick(rng, [p for p in PLACES if p != place])
            asked.append(Question("relation", f"is {name} {PLACES[tried][0]} {other}", _yes(tried == place)))
        if thing.size == things[j].size or rng.random() < 0.3:
            asked.append(Question("size", f"are {name} and {other} of the same size",
                                  _yes(thing.size == things[j].size)))
        else:
            asked.append(Question("size", f"which is bigger, {name} or {other}",
                                  name if thing.size == "big" else other))
    return asked


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _count(rng, things: Sequence[Thing]) -> Question:
    attribute = pick(rng, ("any", "shape", "colour", "fill", "size"))
    if attribute == "any":
        return Question("count", "how many objects are there", NUMBERS[len(things)])
    values = {"shape": SHAPES, "colour": COLOURS, "fill": FILLS, "size": SIZES}[attribute]
    value = getattr(pick(rng, things), attribute) if rng.random() < 0.7 else pick(rng, values)
    what = _plural(value) if attribute == "shape" else f"{value} objects"
    return Question("count", f"how many {what} are there",
                    NUMBERS[sum(getattr(t, attribute) == value for t in things)])


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _exists(rng, things: Sequence[Thing]) -> Question:
    there = {(t.shape, t.colour) for t in things}
    if rng.random() < 0.5:
        shape, colour = pick(rng, sorted(there))
    else:
        shape, colour = pick(rng, [pair for pair in itertools.product(SHAPES, COLOURS)
                                   if pair not in there and pair not in HELD_OUT_PAIRS])
    return Question("exists", f"is there {_article(colour, shape)}", _yes((shape, colour) in there))


def _full(thing: Thing) -> str:
    return f"the {thing.size} {thing.colour} {thing.fill} {thing.shape}"


def _name(things: Sequence[Thing], i: int) -> str:
    """The shortest of a few descriptions that fits object i only."""
    for attributes in (("shape",), ("colour", "shape"), ("size", "colour", "shape"), ("colour", "fill", "shape")):
        value = [getattr(things[i], a) for a in attributes]
        if sum([getattr(t, a) for a in attributes] == value for t in things) == 1:
            return "the " + " ".join(value)
    return _full(things[i])
