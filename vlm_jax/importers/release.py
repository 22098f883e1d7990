"""What an official release is to the importer: a table of rules, and how its files state sizes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from vlm_jax.errors import ConfigError, nearest
from vlm_jax.weight_rules import Rule

Shapes = Mapping[str, tuple[int, ...]]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Hints:
    """What the command line says of things that a file may not tell; "" and 0 leave them to the file or the family."""
    activation: str = ""
    image_heads: int = 0
    text_heads: int = 0
    decoder_heads: int = 0
    pooler_heads: int = 0
    size: int = 0
    image: str = ""
    language: str = ""


def no_parts(shapes: Shapes, hints: Hints) -> dict[str, str]:
    """Of a layout whose file is the whole. Raises ConfigError where another file was named."""
    for flag in ("image", "language"):
        if getattr(hints, flag):
            raise ConfigError(f"--{flag}={getattr(hints, flag)!r}: this layout stores all of a model in one place; nearest: leave it out")
    return {}


@dataclasses.dataclass(frozen=True)
class Release:
    """One official layout.

    describe: (tensor shapes, folder of the files, hints) -> the sections ``model`` and ``data`` of a stage.
    rules: (those sections, tensor shapes) -> the table; read forwards by import, backwards by export.
    ignored: regexes of tensors that hold no weights, or are for tasks that no system here has. resize: how its own code resizes a table of image positions.
    weights_files: the names that its own loader looks for, best first: hub snapshots hold other layouts' files too.
    ties: (names of tensors) -> {name of a second copy: the tensor that it equals}; a file may hold both, we hold one.
    blank: name of a tensor that the release's own loader demands and nobody reads -> the tensor whose shape it has, filled with zeros on export.
    zeros: leaf that the layout has and our model has not -> the leaf whose shape it has; an export fills it with zeros.
    given: values of leaves that a file of this layout need not hold. Rules for ``carry/...`` fill the system's carry (slow copies, queues), where the file has it.
    write_config: (stage config, folder, tensor names) writes what the release's own loader reads beside the weights
    (the first of ``weights_files``); None where nobody's loader would read an export.
    parts: (tensor shapes, hints) -> {path of another file that belongs to the whole: what its names start with there}, for layouts that store what was
    trained alone.
    stored: (stage config, names) -> those of them that such a layout holds; an export of an import holds what the imported file did.
    licence: of the official weights, where all have one and their files do not say it. library, task: what the hub's
    metadata calls the loader and the use of this layout.
    """
    name: str
    system: str
    describe: Callable[[Shapes, pathlib.Path, Hints], dict[str, dict[str, Any]]]
    rules: Callable[[Mapping[str, Any], Shapes], Sequence[Rule]]
    ignored: tuple[str, ...]
    weights_files: tuple[str, ...] = ()
    write_config: Callable[[Any, pathlib.Path, Collection[str]], None] | None = None
    resize: str = "resize_positions"
    ties: Callable[[Collection[str]], Mapping[str, str]] = lambda names: {}
    blank: Mapping[str, str] = dataclasses.field(default_factory=dict)
    zeros: Mapping[str, str] = dataclasses.field(default_factory=dict)
    given: Mapping[str, float] = dataclasses.field(default_factory=dict)
    parts: Callable[[Shapes, Hints], Mapping[str, str]] = no_parts
    stored: Callable[[Any, Collection[str]], Collection[str]] = lambda config, names: names
    licence: str = ""
    library: str = "vlm_jax"
    task: str = ""


def read_json(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """A JSON file of the release, {} where there is none."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}, not an object")
    return found


def settle(name: str, hint: Any, known: Any, default: Any) -> Any:
    """What the file knows, else the hint, else the family's default. Raises ConfigError where hint and file disagree."""
    if known not in (None, 0, ""):
        if hint not in (None, 0, "", known):
            raise ConfigError(f"--{name}={hint}, but the release has {known}; nearest: {known}")
        return known
    return hint or default


def count_layers(shapes: Shapes, template: str) -> int:
    """Layers named ``template`` with "{layer}": 0 .. n-1 must all be there."""
    count = 0
    while template.replace("{layer}", str(count)) in shapes:
        count += 1
    return count


def shape_of(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ConfigError(f"the file lacks {name!r}{nearest(name, shapes, 5)}: is it of this release?")
    return tuple(shapes[name])


def grid_of(positions: int) -> int:
    """The side of a square grid of positions beside one class row."""
    side = round(max(positions - 1, 0) ** 0.5)
    if side * side != positions - 1 or not side:
        raise ConfigError(f"a table of {positions} positions is no square grid with a class row")
    return side


def refuse_options(section: Mapping[str, Any], accepted: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for an option of a foreign config that is neither known nor switched off.

    ``accepted``: name -> None for an option that is read (or of no effect on the weights' use), else the only
    value that is supported.
    """
    for key, value in section.items():
        if key not in accepted:
            if value in (None, False, 0, "", [], {}):
                continue
            raise ConfigError(f"{where}.{key}={value!r} is not supported{nearest(key, accepted)}")
        if accepted[key] is not None and value not in accepted[key]:
            raise ConfigError(f"{where}.{key}={value!r} is not supported; nearest: {accepted[key][0]!r}")
