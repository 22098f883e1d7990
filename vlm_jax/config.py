"""Configs: what every file in configs/ is made of. Imports nothing heavy, so ``--help`` is quick.

A config is ``{"stage_order": (...), "stages": {name: stage}}`` and a stage has exactly the keys
of ``STAGE_KEYS``. A section is given as keyword arguments to the function that reads it, so a
misspelt or unread key is an error before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
import inspect
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.errors import ConfigError, nearest

STAGE_KEYS = ("system", "model", "loss", "lora", "trainable", "frozen_dtype", "init", "optim", "data", "evals", "steps", "select", "checkpoint",
              "log", "mesh", "rules", "seed")
DEFAULTS: Mapping[str, Any] = dict(
    loss={}, lora={}, trainable=(".*",), frozen_dtype="float32", init=(), evals={}, select={}, seed=0, rules="dp", mesh=dict(data=0, fsdp=0, tensor=0),
    checkpoint=dict(every=1000, keep=2), log=dict(every=10, tensorboard=False, wandb=""))
# May differ between a run and its resumption; every other change is refused by name. The last line changes where and in how many
# passes a step is computed: results change by rounding, and in what dropout draws.
MAY_CHANGE = ("steps", "evals", "select", "log", "checkpoint", "data.threads", "data.workers", "data.prefetch", "data.bad_budget", "data.eval",
              "mesh", "rules", "data.microbatch", "model.*.remat")


@dataclasses.dataclass(frozen=True)
class Data:
    """The data section. Sources are spec strings (vlm_jax/data/sources.py); sizes in pixels and tokens.

    microbatch: rows per pass through the towers, 0 for all at once (nn/chunk.py).
    buckets: text lengths that a batch may be cropped to, () for always ``length``.
    block, window: the two-level permutation (data/order.py); block 1 is the full shuffle.
    caption, label: which field of a sample, "" for the source's own ("txt", "json:title", "txt@1;json:title@2" by weight);
        as a caption, "a photo of a {}" is filled with the name of the class.
    workers: processes that make batches instead of the reader threads, 0 for none.
    bad_budget: the share of samples that may be unreadable before the run stops.
    answers: answers kept per question, the likeliest first; 0: batches have none. answer_length: ids per answer. In other layouts than "plain" the most
        candidates of a row, for evaluation: training draws an answer for its reply.
    answer: which field of a sample they are in, "" for the source's own ("json:answer@0.5": the weight of one that stands alone, not in a list).
    images: images per row, or frames of a video or an animation, evenly spread; several are ``images`` in a batch, instead of ``image``. 0: text alone.
    classes: the names of the labels in the order of their ids; batches have ``label`` where they are given.
    swap: "sides": in training, two images change places half of the time, and the words left and right with them.
    text_clean: how captions and questions are cleaned before they are tokenised (data/clean.py): "albef", "blip", "albef_question",
        "blip_question", "" for not at all; "blip(40)" keeps 40 words.
    mixture: the shares of train's sources: "sqrt" or "proportional" to their samples, "uniform", "" for their own @WEIGHTs; with a rule those are
        factors on a source's share.
    layout: how text lies in a batch (data/batch.py): "plain" (also where it is ""), "joined" (prompt and reply in one row), "apart" (prompt for an encoder, reply for a
        decoder). ``length`` is then that of a reply, prompt_length that of a prompt with its begin.
    instruction_tokenizer, instruction_length: a second tokenizer, which reads the prompt too, as ``instruction``.
    templates: wordings of prompts, one drawn for each example: a task of data/templates.py, texts of one's own, "task" for each sample's own,
        "" for the prompt as it stands. eval_template: that of evaluation, "" for the first.
    prefix: "words": in training a text without a prompt is cut between two words that are drawn; the first part is its prompt.
    cache_features: a folder where what a frozen tower makes of images is kept, so that it is computed once, "" for none; relative ones lie in the stage's own.
    marks: what stands around prompts and replies (layouts.Marks), where it is not the tokenizer's own.
    """
    train: Any
    eval: Any
    batch: int
    size: int
    length: int
    tokenizer: str
    microbatch: int = 0
    augment: str = ""
    eval_augment: str = ""
    caption: str = ""
    label: str = ""
    buckets: tuple[int, ...] = ()
    block: int = 1
    window: int = 1
    threads: int = 2
    workers: int = 0
    prefetch: int = 4
    bad_budget: float = 0.01
    answers: int = 0
    answer_length: int = 0
    answer: str = ""
    images: int = 1
    classes: tuple[str, ...] = ()
    swap: str = ""
    text_clean: str = ""
    mixture: str = ""
    layout: str = ""
    prompt_length: int = 0
    instruction_tokenizer: str = ""
    instruction_length: int = 0
    templates: str | tuple[str, ...] = ""
    eval_template: str = ""
    prefix: str = ""
    cache_features: str = ""
    marks: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "layout", self.layout or "plain")

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Of the fields that have one."""
        return {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
                for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING}


def parse_arg(arg: str | None, **declared: Any) -> ConfigDict:
    """Reads the text after the colon of ``--config=configs/x.py:base,res=288``.

    ``declared``: name -> default, or a tuple of choices whose first is the default. A choice may be given without
    its name, and so may the first declared. Values take the type of their default.
    Raises ConfigError for an argument that is not declared.
    """
    values = {k: v[0] if isinstance(v, tuple) else v for k, v in declared.items()}
    choices = {text: name for name, v in reversed(declared.items()) if isinstance(v, tuple) for text in v if text}
    free = [k for k in list(declared)[:1] if not isinstance(declared[k], tuple)]
    for i, part in enumerate(p.strip() for p in (arg or "").split(",") if p.strip()):
        name, equals, text = part.partition("=")
        if not equals:
            if part not in choices and (i or not free):
                raise ConfigError(f"config argument {part!r} is not known{nearest(part, [*choices, *(f'{k}=' for k in declared)])}")
            name, text = choices.get(part) or free[0], part
        if name not in declared:
            raise ConfigError(f"config argument {name!r} is not declared{nearest(name, declared)}")
        default = values[name]
        if isinstance(declared[name], tuple) and text not in map(str, declared[name]):
            raise ConfigError(f"config argument {name}={text!r} is not a choice{nearest(text, declared[name])}")
        try:
            if isinstance(default, bool):
                values[name] = {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            else:
                values[name] = text if default is None else type(default)(text)
        except (ValueError, KeyError):
            raise ConfigError(f"config argument {name}={text!r} is not a {type(default).__name__}") from None
    return ConfigDict(values)


def stage(**sections: Any) -> dict[str, Any]:
    """One complete stage: ``sections`` over the defaults that hold for every system."""
    out = {**DEFAULTS, **sections}
    for key in ("checkpoint", "log", "mesh"):
        out[key] = {**DEFAULTS[key], **out[key]}
    if "data" in out:      # written out: a field that a config has can be given on the command line
        out["data"] = {**Data.defaults(), **out["data"]}
    unknown = set(out) - set(STAGE_KEYS)
    missing = set(STAGE_KEYS) - set(out)
    if unknown:
        key = sorted(unknown)[0]
        raise ConfigError(f"stage key {key!r} is not known{nearest(key, STAGE_KEYS)}")
    if missing:
        raise ConfigError(f"stage lacks {sorted(missing)}")
    return out


def stages(order: tuple[str, ...], **named: Mapping[str, Any]) -> ConfigDict:
    """The config of a run: the stages that the plain command runs in ``order``, and others by name."""
    for name in order:
        if name not in named:
            raise ConfigError(f"stage_order names {name!r}, which is not a stage{nearest(name, named)}")
    return ConfigDict(dict(stage_order=tuple(order), stages=dict(named)))


def from_towers(vit: str, bert: str, text: tuple[tuple[str, str, str], ...]) -> tuple[tuple[str, str, str], ...]:
    """``init`` rules of a model whose towers were published alone; "" leaves a tower fresh.

    vit: a directory imported with --release=timm_vit. bert: one with --release=hf_bert, whose leaves go where ``text`` says:
    (our path, path there or "" for the same, how).
    """
    image = (("image/position_embed", f"{vit}:", "resize_positions_border"), ("image/.*", f"{vit}:", "copy")) if vit else ()
    return image + tuple((target, f"{bert}:{path}", how) for target, path, how in text if bert)


TUNES = ("full", "head", "lora")


def finetune(system: str, *, size: str, tune: str, task: str, heads: str, clamps: tuple[Any, ...], evals: Mapping[str, Any],
             **sections: Any) -> dict[str, Any]:
    """A stage that goes on from other weights, with their model, sizes and tokenizer (``model="init"``).

    tune: what trains. "full": everything, lower layers slower by ``layer_decay`` a layer; "head": what ``heads``
    (a regex over parameter paths) matches; "lora": adapters beside the blocks' products, and the temperature. size: "scenes" and
    "small", trained here, take larger rates and the optimizer that they were trained with; "scenes" scores its old task too. task:
    "captions", scored by ``evals``, or "classes", by zero-shot.
    """
    own = size in ("scenes", "small")
    optim = dict(name="adamw", lr={"full": 1e-3 if own else 1e-5, "head": 2e-3 if own else 1e-3, "lora": 2e-3 if own else 5e-4}[tune],
                 b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.05 if tune == "full" else 0.0, schedule="cosine", warmup="10%", clip_norm=1.0,
                 layer_decay=0.75 if tune == "full" else 1.0, clamps=clamps, ema=0.0, max_bad_steps=10)
    if own and tune == "full":
        optim |= dict(name="muon", muon_lr=0.03, muon_scale="width", momentum=0.95, eps=1e-8, layer_decay=1.0)
    scored = dict(evals)
    if task == "classes":
        scored = dict(zeroshot=dict(kind="zeroshot", data="", examples=0, every="1epoch", options=dict(templates="photo")))
    if size == "scenes":
        scored["old"] = dict(kind="retrieval", data="scenes:test", examples=500, every="100epochs", options=dict(captions="first"))
    return stage(**{**dict(
        system=system, model="init", init="@pretrain",
        lora=dict(rank=16, alpha=32.0) if tune == "lora" else {},
        trainable={"full": (".*",), "head": (heads,), "lora": (".*/lora_[ab]", "logit_scale")}[tune],
        optim=optim, evals=scored,
        select=dict(metric="zeroshot/top1" if task == "classes" else "retrieval/text_to_image/R@1", average=1.0),
        data=dict(train="", eval="", batch=64, microbatch=0, size=0, length=0, tokenizer="", augment="random_resized_crop(scale=0.6..1)",
                  eval_augment="", caption="", label="", threads=2, prefetch=4, bad_budget=0.01),
        steps="5epochs", checkpoint=dict(every="1epoch", keep=2)), **sections})


def check_stage(name: str, stage_config: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the stage has exactly the keys of ``STAGE_KEYS``."""
    for key in stage_config:
        if key not in STAGE_KEYS:
            raise ConfigError(f"stages.{name}.{key} is not a key of a stage{nearest(key, STAGE_KEYS)}")
    for key in STAGE_KEYS:
        if key not in stage_config:
            raise ConfigError(f"stages.{name}.{key} is missing")


def check_keys(fn: Callable[..., Any], section: Mapping[str, Any], where: str, taken: Iterable[str] = ()) -> None:
    """Raises ConfigError for a key of ``section`` that ``fn`` does not read by name, or that is ``taken``."""
    parameters = inspect.signature(fn).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [k for k in parameters if k not in taken]
    for key in section:
        if key not in known:
            raise ConfigError(f"{where}.{key}={section[key]!r} is not a known key{nearest(key, known)}")


def call(fn: Callable[..., Any], section: Mapping[str, Any], where: str, *args: Any, **given: Any) -> Any:
    """``fn(*args, **given, **section)``, refusing keys that ``fn`` does not read by name.

    ``where``: the section's path for the message, such as "stages.pretrain.optim".
    """
    check_keys(fn, section, where, {*list(inspect.signature(fn).parameters)[:len(args)], *given})
    section = {k: to_plain(v) for k, v in section.items()}
    try:
        return fn(*args, **given, **section)
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{where}: {error}") from error


def to_plain(value: Any) -> Any:
    """ConfigDict -> dict, all the way down."""
    if isinstance(value, (Mapping, ConfigDict)):
        return {k: to_plain(v) for k, v in value.items()}
    return type(value)(to_plain(v) for v in value) if isinstance(value, (tuple, list)) else value


def to_json(config: Mapping[str, Any]) -> str:
    return json.dumps(to_plain(config), indent=1, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """The inverse of ``to_json``; lists come back as tuples."""
    def freeze(value):
        if isinstance(value, dict):
            return {k: freeze(v) for k, v in value.items()}
        return tuple(freeze(v) for v in value) if isinstance(value, list) else value
    return ConfigDict(freeze(json.loads(text)))


def from_file(name: str) -> ConfigDict:
    """The config of "configs/clip.py:small", as ``--config`` reads it. A path that does not exist here is looked for in
    the checkout that vlm_jax was installed from. Raises ConfigError."""
    text, _, arg = name.partition(":")
    here, checkout = pathlib.Path(text), pathlib.Path(__file__).resolve().parents[1] / text
    path = here if here.exists() else checkout
    if not path.is_file():
        beside = sorted(str(pathlib.Path(text).parent / p.name) for p in checkout.parent.glob("*.py"))
        raise ConfigError(f"config {text!r} does not exist{nearest(text, beside) if beside else ''}")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)) and value:
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = json.loads(json.dumps(to_plain(value)))
    return out


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys that differ between two stage configs and may not, one line each."""
    a, b = flatten(old), flatten(new)
    lines = []
    for key in sorted(a.keys() | b.keys()):
        if any(fnmatch.fnmatchcase(key, k) or key.startswith(k + ".") for k in MAY_CHANGE):
            continue
        if a.get(key, "(absent)") != b.get(key, "(absent)"):
            lines.append(f"{key}: {a.get(key, '(absent)')!r} -> {b.get(key, '(absent)')!r}")
    return lines
