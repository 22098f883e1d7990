"""What a claim is, and how its runs are spelt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_jax import config as configs
from vlm_jax.errors import ConfigError, nearest

MADE = "made"      # what a claim prepares: its folder, and its scores among those of the variants

Score = tuple[str, str]      # (variant, name of a score in its DONE)
Scores = Mapping[str, Mapping[int, Mapping[str, float]]]      # variant -> seed -> score


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a paper says, and the runs that look at it.

    config: as for ``--config``, or by variant. shared, variants: keys of it as on the command line ("stages.pretrain.loss.alpha") and their values;
    what ``shared`` says holds for all variants. differences: what is compared, the side that the claim puts higher
    first. shown: scores to print beside those, of every variant. stage: as for ``--stage``.

    prepare: makes what the variants of a seed train on, called as prepare(folder, seed, train, data); the same call again goes on where it was
    stopped. It returns scores, which stand beside those of the variants as "made", or None where a signal stopped it. made: those to print.
    together: the name of its folder where several claims use what it makes, "" for one of the claim's own.
    In values, "{made}" is its folder, "{seed}" the seed, and "{data}" what the command line names by ``--data``.
    """
    sentence: str
    paper: str
    config: str | Mapping[str, str]
    variants: Mapping[str, Mapping[str, Any]]
    differences: Mapping[str, tuple[Score, Score]]
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shown: Sequence[str] = ()
    stage: str = ""
    prepare: Callable[..., Mapping[str, float] | None] | None = None
    made: Sequence[str] = ()
    together: str = ""

    def config_of(self, variant: str) -> str:
        return self.config if isinstance(self.config, str) else self.config[variant]

    def scores(self) -> dict[str, list[str]]:
        """The scores to print, by variant."""
        found = {**({MADE: dict.fromkeys(self.made)} if self.prepare else {}), **{variant: dict.fromkeys(self.shown) for variant in self.variants}}
        for sides in self.differences.values():
            for variant, score in sides:
                found[variant][score] = None
        return {variant: list(names) for variant, names in found.items()}


# ---- how claims are spelt

def evals(data: str = "scenes:test:canonical", **kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Small evaluations by their kind."""
    return {kind: dict(dict(kind=kind, data=data, examples=400, batch=100), **section) for kind, section in kinds.items()}


def stage(name: str = "pretrain", **fields: Any) -> dict[str, Any]:
    """{"steps": 400} of a stage as a claim spells it."""
    return {f"stages.{name}.{key}": value for key, value in fields.items()}


RECALL = {"text to image R@1": "text_to_image/R@1", "image to text R@1": "image_to_text/R@1"}
RERANK = dict(rerank=dict(options=dict(captions="first", k=16)))

# Canonical captions: 22 tokens at most. What is learnt in a minute is learnt from many small batches.
SMALL = {"data.train": "scenes:train:canonical", "data.eval": "scenes:test:canonical", "data.length": 22, "data.batch": 24, "checkpoint.every": 10_000}


# ---- the configs of runs

def placed(value: Any, places: Mapping[str, Any]) -> Any:
    """A value with "{made}", "{seed}" and "{data}" filled in. Raises ConfigError where ``--data`` is missing."""
    if isinstance(value, Mapping):
        return {key: placed(each, places) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(placed(each, places) for each in value)
    if not isinstance(value, str):
        return value
    if "{data}" in value and not places.get("data"):
        raise ConfigError(f"claim: {value!r} needs --data=DIR, a folder of tars")
    for name, place in places.items():
        value = value.replace(f"{{{name}}}", str(place))
    return value


def set_fields(config: Any, fields: Mapping[str, Any], seed: int, places: Mapping[str, Any], name: str = "the claim's config") -> Any:
    """``config`` with ``fields`` ("stages.pretrain.steps") and a seed. Raises ConfigError for a section that does not exist; the run
    refuses keys that it does not know."""
    for key, value in fields.items():
        node, (*path, last) = config, key.split(".")
        for part in path:
            if part not in node:
                raise ConfigError(f"claim: {key} names {part!r}, which {name} lacks{nearest(part, node)}")
            node = node[part]
        with node.unlocked(), node.ignore_type():
            node[last] = placed(value, places)
    for stage in config.stages.values():
        stage.seed = seed
    return config


def variant_config(claim: Claim, variant: str, seed: int, **places: Any) -> Any:
    """The config of one run."""
    name = claim.config_of(variant)
    return set_fields(configs.from_file(name), {**claim.shared, **claim.variants[variant]}, seed, {"seed": seed, **places}, name)
