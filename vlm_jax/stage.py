"""A stage of a config, checked and built: what training, evaluating and loading stand on.

The dataclasses are the sections of a stage that the trainer itself reads; their fields are the keys.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pathlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlm_jax import config as configs
from vlm_jax import partitioning, systems, weight_rules
from vlm_jax.data import pipeline, sources, tokenizers
from vlm_jax.data.features import FeatureStore
from vlm_jax.data.layouts import Layout, Marks, Writer
from vlm_jax.data.order import order_of
from vlm_jax.data.rows import Rows
from vlm_jax.data.split import parse_split
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.evals import vqa
from vlm_jax.importers import hub
from vlm_jax.nn import lora, narrow
from vlm_jax.system import System
from vlm_jax.train import checkpoint, init, optim
from vlm_jax.train.state import merge

IMPORTED = "imported"     # in a work directory: what came from the hub
TAUGHT = "teacher/"      # in a carry: slow copies of parameters, by their path
NO_ADAPTER = r"(?!.*/lora_\w+$).*"     # where weights come from, adapters were merged
BEST, RESULT = "best", "result"     # in a stage directory: weights at the best evaluation; the weights that it is for


class Data(configs.Data):
    """The data section, and what its fields come to together."""

    @functools.cached_property
    def text(self) -> Layout:
        """How text lies in a batch. Raises ValueError for values that do not go together."""
        unknown = [key for key in self.marks if key not in Marks.__dataclass_fields__]
        if unknown:
            raise ValueError(f"marks.{unknown[0]}={self.marks[unknown[0]]!r} is not known{nearest(unknown[0], Marks.__dataclass_fields__)}")
        if bool(self.instruction_tokenizer) != bool(self.instruction_length):
            raise ValueError(f"instruction_tokenizer={self.instruction_tokenizer!r} and instruction_length={self.instruction_length} go together; nearest: "
                             + ("instruction_length=32" if self.instruction_tokenizer else f"instruction_tokenizer={self.tokenizer!r}"))
        if self.layout != "plain" and self.swap:
            raise ValueError(f"swap={self.swap!r} is of captions in layout='plain', not {self.layout!r}; nearest: swap=''")
        return Layout(self.layout, self.prompt_length, self.instruction_length, self.templates, self.eval_template, self.prefix,
                      Marks(**self.marks))

    @functools.cached_property
    def rows(self) -> Rows:
        """What a row holds beside one image and its text. Raises ValueError for values that do not go together."""
        if self.swap and self.buckets:
            raise ValueError(f"swap={self.swap!r} changes how long texts are, which buckets={tuple(self.buckets)} must know; nearest: buckets=()")
        twice = [name for name in self.classes if list(self.classes).count(name) > 1]
        if twice:
            raise ValueError(f"classes={tuple(self.classes)} names {twice[0]!r} twice")
        return Rows(self.answers, self.answer_length, self.images, len(self.classes), self.swap, self.text_clean, self.layout != "plain")


@dataclasses.dataclass(frozen=True)
class Optim:
    """What of the optim section concerns the trainer; the rest goes to train/optim.py."""
    ema: float = 0.0
    max_bad_steps: int = 10


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """every: a duration between saves; keep: how many stay."""
    every: int | str = 1000
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class Logging:
    """every: steps between rows of metrics.jsonl; tensorboard, wandb: extra loggers (wandb: a project name)."""
    every: int = 10
    tensorboard: bool = False
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class Select:
    """Which weights are the result of a stage; by default the last step's.

    metric: an evaluation's score, such as "retrieval/text_to_image/R@1": the weights at the evaluation where it was
    highest, the start included. average: the trained weights' share in an average with those that the stage started
    from (WiSE-FT, arXiv 2109.01903), 1 for no average; what ``init`` left fresh is not averaged.
    """
    metric: str = ""
    average: float = 1.0


@dataclasses.dataclass(frozen=True)
class Eval:
    """One evaluation: its kind, data ("" for data.eval), how many examples, and the kind's own options.

    every: a duration between runs (also before the first step), 0 for the last step only. train: what a probe is
    fitted on, and what frequent answers are counted in, "" for data.train. images, template: instead of data.images (frames of a video) and
    data.eval_template.
    """
    kind: str
    data: Any = ""
    train: Any = ""
    examples: int = 0
    batch: int = 128
    every: int | str = 0
    images: int = 0
    template: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Stage:
    """A stage, built: everything that training, evaluating and loading need."""
    name: str
    config: ConfigDict
    data: Data
    tokenizer: Any
    system: System
    adapters: lora.Adapters | None = None
    instruction_tokenizer: Any = None

    @functools.cached_property
    def replies(self) -> Any:
        """The tokenizer of what the system writes and of candidates, which may end otherwise than its texts; None without one."""
        return None if self.tokenizer is None else self.writer.replies

    @functools.cached_property
    def writer(self) -> Writer:
        """What lays text out; there is none without a tokenizer."""
        return Writer(self.data.text, self.tokenizer, self.data.length, self.instruction_tokenizer)

    @functools.cached_property
    def merged(self) -> "Stage":
        """The stage without adapters: what its weights are for once they are merged into the kernels."""
        if self.adapters is None:
            return self
        config = ConfigDict(configs.to_plain(self.config))
        config.lora, config.trainable = {}, (".*",)
        return resolve(config, self.name, self.tokenizer, self.instruction_tokenizer)

    @functools.cached_property
    def examples(self) -> int:
        """Samples of an epoch."""
        return len(self.open(self.data.train))

    def steps(self, duration: int | str, where: str) -> int:
        """A duration (train/optim.py: 1000, "5%", "3epochs", "50000examples") in steps. Raises ConfigError."""
        total = None if where == "steps" else total_steps(self)
        try:
            return optim.steps(duration, batch=self.data.batch, total=total,
                               examples_per_epoch=self.examples if "ep" in str(duration) else None)
        except ValueError as error:
            raise ConfigError(f"stages.{self.name}.{where}={duration!r}: {error}") from error

    @functools.cached_property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        d = self.data
        keys = {d.rows.image_key: (d.rows.image_shape(d.batch, d.size), "uint8")} if d.images else {}
        keys |= d.text.shapes(d.batch, d.length)
        keys |= {"caption_id": ((d.batch,), "int32"), "image_id": ((d.batch,), "int32")}
        if d.answers and d.layout == "plain":
            answers = (d.batch, d.answers, d.answer_length)
            keys |= {"answer": (answers, "int32"), "answer_mask": (answers, "bool"), "answer_weight": (answers[:2], "float32")}
        if d.classes:
            keys["label"] = ((d.batch,), "int32")
        return {key: jax.ShapeDtypeStruct(shape, jnp.dtype(kind)) for key, (shape, kind) in keys.items()}

    @functools.cached_property
    def kept(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What the batches of training hold instead of images; {} for images."""
        if not self.data.cache_features:
            return {}
        image = self.data.rows.image_key
        variables = merge(dict(self.plan.shapes), {}, dict(self.plan.moving))
        return jax.eval_shape(self.system.cacheable.compute, variables, {image: self.spec[image]})

    @functools.cached_property
    def step_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The batch of a training step."""
        return {**{key: x for key, x in self.spec.items() if not self.kept or key != self.data.rows.image_key}, **self.kept}

    @functools.cached_property
    def plan(self) -> init.Plan:
        """What the model's leaves are; nothing is computed. Raises ConfigError for sizes that do not fit together."""
        return configs.call(init.plan, {}, f"stages.{self.name}", self.system, self.spec, tuple(self.config.trainable))

    def open(self, which: Any) -> Any:
        """The source of a spec. Raises ConfigError."""
        if not which:
            raise ConfigError(f"stages.{self.name}.data.train and data.eval must name a source, such as "
                              "folder:photos#train, tars:/data/{00000..00099}.tar or scenes:train")
        d = self.data
        options = {k: v for k, v in (("caption", d.caption), ("label", d.label), ("classes", d.classes), ("answer", d.answer)) if v}
        if d.mixture and which == d.train:
            options["mixture"] = d.mixture
        options |= {} if d.images else {"image": ""}
        source = configs.call(sources.open_source, {}, f"stages.{self.name}.data", which, **options)
        own = list(getattr(source, "classes", None) or ()) if d.classes else []
        if own and own != list(d.classes):
            raise ConfigError(f"stages.{self.name}.data.classes={tuple(d.classes)}: {sources.name_of(source)} has other classes or another order; "
                              f"nearest: {tuple(own)}")
        return source

    def eval_batches(self, source: Any, batch: int, examples: int | None, images: int = 0, template: str = "", mesh: Any = None) -> Iterator[dict[str, Any]]:
        """Batches with ``meta`` beside the arrays, every sample once. images, template: instead of data.images and data.eval_template.

        Of several processes over ``mesh``, each reads its rows of a batch, and all get the whole batch; ``batch`` is rounded up to rows that
        divide over it.
        """
        keys = self.scored(images, template)
        alone = mesh is None or partitioning.process_count() == 1
        if not alone:
            batch = partitioning.divisible(batch, mesh)
        mine = np.arange(batch) if alone else partitioning.rows_here(batch, mesh)
        with pipeline.eval_batches(source, self.tokenizer, batch=batch, size=self.data.size, length=self.data.length,
                                   augment=self.data.eval_augment or pipeline.EVAL_AUGMENT, limit=examples,
                                   bad_budget=self.data.bad_budget, mine=mine, **keys) as batches:
            for arrays, meta in batches:
                told = dict(zip(mine[arrays["mask"]].tolist(), meta))
                if not alone:
                    arrays = partitioning.whole_batch(arrays, mesh, batch)
                    told = {int(row): one for part in partitioning.exchange(told) for row, one in part.items()}
                yield {**arrays, "meta": [told.get(row, {}) for row in range(batch)]}

    def train_batches(self, source: Any, start: int, stop: int, quarantine: pathlib.Path, mesh: Any = None, features: FeatureStore | None = None
                      ) -> pipeline.TrainBatches:
        """Batches of the rows that this process reads: all of them without a ``mesh`` over several. features: what they hold instead of images."""
        d = self.data
        mine = None if mesh is None else partitioning.rows_here(d.batch, mesh)
        return configs.call(
            pipeline.train_batches, {}, f"stages.{self.name}.data", source, self.tokenizer, batch=d.batch, size=d.size,
            length=d.length, augment=d.augment or pipeline.EVAL_AUGMENT, seed=self.config.seed, start_step=start, stop_step=stop,
            threads=d.threads, workers=d.workers, prefetch=d.prefetch, block=d.block, window=d.window, bad_budget=d.bad_budget,
            buckets=d.buckets, quarantine_path=str(quarantine), features=features, mine=mine, **self.beside)

    def scored(self, images: int, template: str) -> dict[str, Any]:
        """``beside`` for an evaluation with other images or another template, which stay as they are where it is 0 or "". Raises ConfigError."""
        change = [("rows", "images", images), ("layout", "eval_template", template)]
        return self.beside | {key: configs.call(dataclasses.replace, {}, f"stages.{self.name}.evals", self.beside[key], **{field: value})
                              for key, field, value in change if value}

    @property
    def beside(self) -> dict[str, Any]:
        """What of the data section says which keys batches have: arguments of data/pipeline.py."""
        return {"rows": self.data.rows, "layout": self.data.text, "instruction_tokenizer": self.instruction_tokenizer}

    def keys_of_step(self, source: Any, step: int) -> list[str]:
        """The samples of training step ``step`` (0-based), before any bad one was replaced."""
        positions = np.arange(step * self.data.batch, (step + 1) * self.data.batch)
        order = order_of(source, self.config.seed, self.data.block, self.data.window)
        return [sources.key_of(source, int(i)) for i in order.index(positions)]


def system_names() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(systems.__path__)]


def resolve(stage_config: ConfigDict, name: str, tokenizer: Any = None, instruction_tokenizer: Any = None) -> Stage:
    """Checks every section and builds the system; compiles and allocates nothing.

    ``model.tokens`` (vocab, bos, eos, pad) is filled from the tokenizer where it says -1, and must agree with it elsewhere: begin, end and padding are
    those that ``data.marks`` says. ``model.instruction_tokens`` is the same of the instruction tokenizer. Where a model lists ``answers``, knows
    ``pieces`` of words or has a ``prompt`` in words, it gets their ids from the tokenizer. Raises ConfigError.
    """
    stage_config = ConfigDict({**configs.DEFAULTS, **configs.to_plain(stage_config)})
    configs.check_stage(name, stage_config)
    stage_config.data.train, stage_config.data.eval = train_and_eval(stage_config.data)
    data = configs.call(Data, stage_config.data, f"stages.{name}.data")
    stage_config.data = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}     # defaults written out
    for field in ("batch", "size", "length"):
        if getattr(data, field) < 1:
            raise ConfigError(f"stages.{name}.data.{field}={getattr(data, field)} must be at least 1")
    configs.call(lambda: (data.text, data.rows), {}, f"stages.{name}.data")
    configs.call(sources.check_splits, {}, f"stages.{name}.data", data.train, data.eval)
    if data.microbatch and data.batch % data.microbatch:
        divisors = [m for m in range(1, data.batch + 1) if data.batch % m == 0]
        closest = min(divisors, key=lambda m: abs(m - data.microbatch))
        raise ConfigError(f"stages.{name}.data.microbatch={data.microbatch} does not divide data.batch={data.batch}; "
                          f"nearest: {closest}")
    if tokenizer is None and data.tokenizer:
        tokenizer = configs.call(tokenizers.load, {}, f"stages.{name}.data.tokenizer", data.tokenizer)
    if instruction_tokenizer is None and data.instruction_tokenizer:
        instruction_tokenizer = configs.call(tokenizers.load, {}, f"stages.{name}.data.instruction_tokenizer", data.instruction_tokenizer)
    if tokenizer is not None:
        writer = configs.call(Writer, {}, f"stages.{name}.data", data.text, tokenizer, data.length, instruction_tokenizer)
        if "tokens" in stage_config.model:
            begin, marked = data.text.marks.begin, writer.replies
            ids = {"bos": tokenizer.bos_id if begin < 0 else begin, "eos": marked.eos_id, "pad": marked.pad_id}
            fill_tokens(stage_config.model.tokens, tokenizer, ids, f"stages.{name}.model.tokens", data.tokenizer)
    if "instruction_tokens" in stage_config.model and instruction_tokenizer is None:
        for key, value in stage_config.model.instruction_tokens.items():
            if value == -1:
                raise ConfigError(f"stages.{name}.model.instruction_tokens.{key}=-1 is the instruction tokenizer's, and data.instruction_tokenizer is ''; "
                                  f"nearest: {data.tokenizer!r}")
    elif "instruction_tokens" in stage_config.model:
        ids = {"bos": instruction_tokenizer.bos_id, "eos": instruction_tokenizer.eos_id, "pad": instruction_tokenizer.pad_id}
        fill_tokens(stage_config.model.instruction_tokens, instruction_tokenizer, ids, f"stages.{name}.model.instruction_tokens", data.instruction_tokenizer)
    if tokenizer is not None and "model" in stage_config:
        with stage_config.model.unlocked(), stage_config.model.ignore_type():
            if stage_config.model.get("answers"):
                stage_config.model.update(listed_answers(stage_config.model.answers, tokenizer, data, f"stages.{name}"))
            if "pieces" in stage_config.model:
                stage_config.model.pieces = tuple(tokenizer.continuing)
            if isinstance(stage_config.model.get("prompt"), str):
                marks = {tokenizer.bos_id, tokenizer.eos_id}
                stage_config.model.prompt = tuple(i for i in tokenizer.encode(stage_config.model.prompt) if i not in marks)
    if stage_config.system not in system_names():
        raise ConfigError(f"stages.{name}.system={stage_config.system!r} is not a system"
                          f"{nearest(stage_config.system, system_names())}")
    module = importlib.import_module(f"vlm_jax.systems.{stage_config.system}")
    system = configs.call(module.build, {}, f"stages.{name}", stage_config)
    adapters = None
    if stage_config.lora:
        adapters = configs.call(lora.Adapters, stage_config.lora, f"stages.{name}.lora")
        system = configs.call(lora.adapt, {}, f"stages.{name}.lora", system, adapters)
    system = configs.call(narrow.narrow, {}, f"stages.{name}", system, tuple(stage_config.trainable), stage_config.frozen_dtype)
    return Stage(name, stage_config, data, tokenizer, system, adapters, instruction_tokenizer)


def fill_tokens(section: ConfigDict, tokenizer: Any, ids: Mapping[str, int | None], where: str, name: str) -> None:
    """Puts a tokenizer's ids where a section says -1; a key that it does not know is a row of its own behind its vocabulary. Raises ConfigError where they
    differ."""
    found = dict(ids)
    if getattr(tokenizer, "mask_id", None) is not None:
        found["mask"] = tokenizer.mask_id
    rows = max(tokenizer.vocab_size, *(1 + i for i in ids.values() if i is not None))     # a mark may be a row that the vocabulary has not
    own = [key for key in sorted(section) if key != "vocab" and key not in found]     # such as BLIP's [DEC] and [ENC]
    found |= {key: rows + i for i, key in enumerate(own)}
    found["vocab"] = rows + len(own)
    for key, value in section.items():
        if value == -1:
            section[key] = found[key]
        elif value != found[key] and not (key == "vocab" and value > found[key]):    # a table may be padded
            raise ConfigError(f"{where}.{key}={value}, but tokenizer {name!r} has {found[key]}; nearest: {found[key]} (or -1 to take the tokenizer's)")


def listed_answers(answers: str | tuple[str, ...], tokenizer: Any, data: Data, where: str) -> dict[str, Any]:
    """``answers`` (texts, or a file with one a line) as texts, and ``answer_ids``, as the tokenizer writes them. Raises ConfigError."""
    try:
        texts = tuple(vqa.read_candidates(answers))
    except ConfigError as error:
        raise ConfigError(str(error).replace("vqa candidates", f"{where}.model.answers", 1)) from None
    longest = max(len(tokenizer.encode(text)) for text in texts)
    if data.answers and longest > data.answer_length:
        raise ConfigError(f"{where}.data.answer_length={data.answer_length} cuts answers of model.answers; nearest: {longest}")
    return {"answers": texts, "answer_ids": tuple(map(tuple, tokenizer(texts, longest)[0].tolist()))}


def make_optimizer(stage: Stage):
    """(optax transformation, learning rate by step) of a stage."""
    section = {k: v for k, v in stage.config.optim.items() if k not in Optim.__dataclass_fields__}
    shapes = {p: x.shape for p, x in stage.plan.trained.items()}
    axes = {p: stage.plan.axes[p] for p in shapes}
    epochs = any("ep" in str(v) for v in configs.flatten(section).values() if isinstance(v, str))
    return configs.call(optim.make_optimizer, section, f"stages.{stage.name}.optim", axes, shapes,
                        total_steps=total_steps(stage), batch=stage.data.batch, examples_per_epoch=stage.examples if epochs else None)


OWN_TOKENIZER = "train:"     # data.tokenizer="train:2000": at most so many pieces, from the training captions


def pieces(section: ConfigDict) -> int:
    """The vocabulary that a stage's tokenizer is to be trained with; 0 where it is another tokenizer."""
    text = str(section.data.get("tokenizer", ""))
    if not text.startswith(OWN_TOKENIZER):
        return 0
    try:
        return int(text.removeprefix(OWN_TOKENIZER))
    except ValueError:
        raise ConfigError(f"data.tokenizer={text!r} has no number of pieces; nearest: {OWN_TOKENIZER}2000") from None


def train_and_eval(data: Mapping[str, Any]) -> tuple[Any, Any]:
    """The two sources of a data section. With data.eval empty, a part of data.train is held out by the hash of its keys."""
    train, held = data["train"], data["eval"]
    if not isinstance(train, str) or not train or held or ";" in train or train.startswith("scenes:") or parse_split(train)[1]:
        return train, held
    return f"{train}#train", f"{train}#val"


def open_stage(config: ConfigDict, workdir: pathlib.Path, name: str) -> Stage:
    """A stage of a config, with what it inherits and the tokenizer that was trained for it. Raises ConfigError."""
    folder = folder_of(config, workdir, name)
    section = inherit(config, workdir, name)
    own = tokenizers.load(str(folder / "tokenizer")) if pieces(section) else None
    return resolve(section, name, own)


def total_steps(stage: Stage) -> int:
    steps = stage.steps(stage.config.steps, "steps")
    if steps < 1:
        raise ConfigError(f"stages.{stage.name}.steps={stage.config.steps} must be at least 1")
    return steps


def folder_of(config: ConfigDict, workdir: pathlib.Path, name: str) -> pathlib.Path:
    """workdir/<n>_<stage>: stages of the path are numbered from 1, the others follow by name."""
    order = list(config.stage_order) + sorted(set(config.stages) - set(config.stage_order))
    if name not in order:
        raise ConfigError(f"stage {name!r} is not in the config{nearest(name, order)}")
    return pathlib.Path(workdir) / f"{order.index(name) + 1}_{name}"


def origin_folder(config: ConfigDict, workdir: pathlib.Path, origin: str) -> pathlib.Path:
    """The stage directory of an origin: "@stage", a directory, or "hf:OWNER/NAME[@REVISION]", which ``run`` has
    imported into the work directory. Raises ConfigError."""
    if origin.startswith("@"):
        folder = folder_of(config, workdir, origin[1:])
        if not (folder / "DONE").exists():
            raise ConfigError(f"init takes weights from stage {origin[1:]!r}, which has not finished in {folder}: "
                              f"run --stage={origin[1:]} first")
        return folder
    if origin.startswith("hf:"):
        return newest_stage(pathlib.Path(workdir) / IMPORTED / hub.folder_name(origin))
    return newest_stage(pathlib.Path(origin))


def origins(section: ConfigDict) -> list[str]:
    """Where a stage's ``init`` takes weights from, in its order."""
    given = (section.init,) if isinstance(section.init, str) else section.init
    sources = [rule.rstrip(":") if isinstance(rule, str) else init.split_source(rule[1])[0] for rule in given]
    return list(dict.fromkeys(origin for origin in sources if origin and origin != weight_rules.FRESH))


def hub_origins(section: ConfigDict) -> list[str]:
    """What a stage's ``init`` takes from the hub."""
    return [origin for origin in origins(section) if origin.startswith("hf:")]


INHERIT = "init"      # as ``model``: that of the weights which the stage starts from


def inherit(config: ConfigDict, workdir: pathlib.Path, name: str) -> ConfigDict:
    """The section of a stage. With model="init" it has the model of its first origin, and so have data.size, length, tokenizer, eval_augment,
    text_clean, and how text is laid out, where they say 0 or "". A key of ``model`` that says "init" has the origin's whole model, of whatever
    system: a teacher. Raises ConfigError for an origin that is of another system than it must be."""
    section = ConfigDict(configs.to_plain(config.stages[name]))
    plain = configs.to_plain(section)
    model = plain.get("model")
    parts = [key for key, value in model.items() if value == INHERIT] if isinstance(model, Mapping) else []
    if model != INHERIT and not parts:
        return section
    found = origins(section)
    if not found:
        raise ConfigError(f"stages.{name}.model{'.' + parts[0] if parts else ''}={INHERIT!r} takes the model from what init names, which is nothing; "
                          "nearest: init=@pretrain, or a trained or imported directory")
    if found[0].startswith("@") and found[0][1:] in config.stages:
        origin = inherit(config, workdir, found[0][1:])
        tokenizer, other = origin.data.tokenizer, origin.data.get("instruction_tokenizer", "")
        if pieces(origin):
            tokenizer = str(folder_of(config, workdir, found[0][1:]) / "tokenizer")
    else:
        folder = origin_folder(config, workdir, found[0])
        origin = configs.from_json((folder / "config.json").read_text())
        tokenizer, other = (str(folder / kept) if (folder / kept).exists() else "" for kept in ("tokenizer", "instruction_tokenizer"))
    if parts:
        return ConfigDict({**plain, "model": {**model, **{key: configs.to_plain(origin.model) for key in parts}}})
    if origin.system != section.system:
        raise ConfigError(f"stages.{name}.init={found[0]!r} is a {origin.system!r}, the stage a {section.system!r}; "
                          f"nearest: --config=configs/{origin.system}.py")
    given = dict(size=origin.data.size, length=origin.data.length, tokenizer=tokenizer, eval_augment=origin.data.get("eval_augment", ""),
                 text_clean=origin.data.get("text_clean", ""), layout=origin.data.get("layout") or "plain")
    if (plain["data"].get("layout") or given["layout"]) != "plain":
        given |= {key: configs.to_plain(origin.data[key]) for key in ("prompt_length", "instruction_length", "marks") if key in origin.data}
        given["instruction_tokenizer"] = other
    data = {**plain["data"], **{key: plain["data"].get(key) or value for key, value in given.items()}}
    return ConfigDict({**plain, "model": configs.to_plain(origin.model), "data": data})


def open_origin(config: ConfigDict, workdir: pathlib.Path, origin: str) -> Mapping[str, np.ndarray]:
    """The leaves of an origin that an ``init`` rule names."""
    return read_weights(origin_folder(config, workdir, origin))


def init_rules(config: ConfigDict, stage: Stage, workdir: pathlib.Path) -> list[weight_rules.Rule]:
    """The rules of a stage's ``init``. A string among them, or instead of them, is an origin to take every leaf
    from by its own name, or, of another system, by what this one's ``adopt`` says; where the resolution differs, image positions are
    resized as the origin's release does. Raises ConfigError."""
    given = (stage.config.init,) if isinstance(stage.config.init, str) else stage.config.init
    rules: list[weight_rules.Rule] = []
    for rule in given:
        if not isinstance(rule, str):
            if len(rule) != 3:
                raise ConfigError(f"stages.{stage.name}.init rule {tuple(rule)!r} is not (target, source, how); nearest: {(*rule, 'copy')[:3]!r}")
            rules.append(tuple(rule))
            continue
        folder, source = origin_folder(config, workdir, rule.rstrip(":")), rule.rstrip(":") + ":"
        record = folder / "import.json"
        resize = json.loads(record.read_text())["resize"] if record.exists() else "resize_positions"
        adopted = adoption(stage, folder, rule)
        for positions, how in (("image/(.*/)?position_embed", resize), ("(.*/)?position_bias/image", "resize_relative_positions")):
            held = [path for path in stage.plan.shapes if re.fullmatch(positions, path)]
            if any(adopted is None or any(re.fullmatch(target, path) for target, *_ in adopted) for path in held):
                rules.append((positions, source, how))
        if adopted is None:
            rules.append((NO_ADAPTER, source, "copy"))
        else:      # a rule for a part that this model lacks says nothing
            rules += [(target, own if own == weight_rules.FRESH else source + own, how) for target, own, how in adopted
                      if any(re.fullmatch(target, path) for path in stage.plan.shapes)]
    return rules


def adoption(stage: Stage, folder: pathlib.Path, origin: str) -> tuple[weight_rules.Rule, ...] | None:
    """How a stage starts from the weights in ``folder``: None for leaf by leaf, as where they are of the same model. Raises ConfigError."""
    section = configs.from_json((folder / "config.json").read_text())
    if section.system == stage.config.system:
        return None
    if section.system not in stage.system.adopt:
        known = [stage.config.system, *stage.system.adopt]
        raise ConfigError(f"stages.{stage.name}.init={origin!r} is a {section.system!r}, of which a {stage.config.system!r} takes nothing over"
                          f"{nearest(section.system, known)}")
    return stage.system.adopt[section.system]


def init_carry(config: ConfigDict, stage: Stage, workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Slow copies and queues that go on: those of the origin where ``init`` is one whole origin. Of another system's, the slow copies,
    by the same rules as the weights."""
    origin = stage.config.init
    if not isinstance(origin, str) or not origin:
        return {}
    folder = origin_folder(config, workdir, origin.rstrip(":"))
    carry, adopted = read_carry(folder), adoption(stage, folder, origin)
    if adopted is None:
        return carry
    sources = {p.removeprefix(TAUGHT): x for p, x in carry.items() if p.startswith(TAUGHT)}
    if not sources:
        return {}
    source = origin.rstrip(":") + ":"
    rules = [(target, own.removeprefix(source), how) for target, own, how in init_rules(config, stage, workdir)]
    targets = {p.removeprefix(TAUGHT): x.shape for p, x in carry_shapes(stage).items() if p.startswith(TAUGHT)}
    found = {p: weight_rules.first_match(rules, p) for p in targets}
    held = {p: targets[p] for p, rule in found.items() if rule and weight_rules.ROWS.sub(r"\1", rule[1]) in sources}
    return {TAUGHT + p: weight_rules.value(p, shape, *found[p][1:], sources, "init") for p, shape in held.items()}


def read_weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All leaves a model needs (parameters and statistics): the stage's result where it chose one (``Select``), else
    its newest good checkpoint; the averaged weights where there are some, int8 widened, adapters merged. Raises ConfigError."""
    return whole(read_leaves(folder, RESULT if (folder / RESULT).exists() else "checkpoints"))


def whole(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leaves as they were trained -> those of the model without adapters and int8 kernels."""
    return lora.merge(narrow.restore(leaves))


def read_carry(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The carry of a stage's newest checkpoint, or of an import that has one, by path."""
    try:
        return checkpoint.load_params(folder / "checkpoints", collections=("carry",))
    except (ValueError, FileNotFoundError):
        return {}


def read_leaves(folder: pathlib.Path, which: str) -> dict[str, np.ndarray]:
    """The leaves of a stage as they were trained, from one of its series of checkpoints. Raises ConfigError."""
    def read(collection):
        try:
            return checkpoint.load_params(folder / which, collections=(collection,))
        except ValueError:      # nothing stored under that name
            return {}
    try:
        leaves = {**read("params"), **read("moving"), **read("ema")}
        if (folder / "frozen").exists():
            leaves |= checkpoint.load_params(folder / "frozen", collections=("frozen",))
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error
    return leaves


def carry_shapes(stage: Stage) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a system's carry (slow copies, queues) by path."""
    variables = merge(dict(stage.plan.shapes), {}, dict(stage.plan.moving))
    return checkpoint.flatten(jax.eval_shape(stage.system.init_carry, variables))


def newest_stage(folder: pathlib.Path) -> pathlib.Path:
    """The stage directory meant by ``folder``: itself, or the last of its stages that has a checkpoint."""
    if (folder / "config.json").exists():
        return folder
    found = [f for f in folder.glob("*_*") if (f / "config.json").exists() and (f / "checkpoints").exists()]
    if not found:
        raise ConfigError(f"{str(folder)!r} holds no trained or imported model (no config.json in it or its stages)")
    return max(found, key=lambda f: int(f.name.split("_")[0]) if f.name.split("_")[0].isdigit() else -1)


def bind(system: System, variables: Any, mesh: Any) -> dict[str, Callable]:
    """Predict functions over host batches: placed, jitted once per name and options, brought back as numpy."""
    def make(fn):
        @functools.lru_cache(maxsize=None)
        def jitted(options):
            everywhere = {"out_shardings": partitioning.replicated(mesh)} if partitioning.process_count() > 1 else {}
            return jax.jit(lambda variables, batch, key: fn(variables, batch, key=key, **dict(options)), **everywhere)

        def call(batch: Mapping[str, Any], key: jax.Array | None = None, **options: Any) -> dict[str, np.ndarray]:
            arrays = {k: v for k, v in batch.items() if k != "meta"}
            with partitioning.use(mesh):
                return jax.device_get(jitted(tuple(sorted(options.items())))(variables, partitioning.place(arrays, mesh), key))
        return call

    return {name: make(fn) for name, fn in system.predict.items()}
