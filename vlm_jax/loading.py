"""``vlm_jax.load(DIR)``: a trained or imported directory as a model to call."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import config as configs
from vlm_jax import partitioning, provenance
from vlm_jax import stage as stages
from vlm_jax.data import ops, tokenizers
from vlm_jax.data.clean import Clean
from vlm_jax.data.layouts import Said
from vlm_jax.data.pipeline import EVAL_AUGMENT
from vlm_jax.errors import ConfigError
from vlm_jax.train.state import merge


class Model:
    """A system with its weights, tokenizer and preprocessing.

    variables: nested weights. tokenizer: None where the source had none. config: the stage's.
    predict: name -> function(batch, **static) -> dict of numpy arrays. ``batch`` holds ``image``
    as uint8 [b, h, w, 3] (normalised inside) or float32 (taken as normalised) and ``text`` as
    int32 ids [b, l]; the names are those of the system ("embed", "features", "generate", ...). Sampling takes ``key=``.
    provenance: the directory's record, {} where it has none. licence: of the weights taken over, None where there are none.
    """

    def __init__(self, stage: stages.Stage, variables: Mapping[str, Any], record: Mapping[str, Any]):
        self.stage, self.variables = stage, variables
        self.provenance, self.licence = record, provenance.licence_of(record)
        self.config, self.tokenizer = stage.config, stage.tokenizer
        self.preprocess = ops.Chain(stage.data.eval_augment or EVAL_AUGMENT, stage.data.size)
        self.predict = stages.bind(stage.system, variables, partitioning.make_mesh("dp", devices=jax.devices()[:1]))

    def images(self, images: Any) -> np.ndarray:
        """Paths, PIL images or arrays [h, w, 3] (one or a list) -> uint8 [b, size, size, 3], preprocessed."""
        if isinstance(images, (str, pathlib.Path)) or not isinstance(images, Iterable) or getattr(images, "ndim", 4) == 3:
            images = [images]
        rng = np.random.default_rng(0)   # evaluation chains draw nothing
        return np.stack([self.preprocess(ops.to_image(x), rng) for x in images])

    def ids(self, texts: str | Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Strings, cleaned as in training -> (ids int32 [b, l], mask bool [b, l]). Raises ConfigError without a tokenizer."""
        if self.tokenizer is None:
            raise ConfigError("this model came without a tokenizer: strings cannot be encoded. Pass ids to "
                              "model.predict[...], or put one into its folder tokenizer/")
        clean = Clean(self.stage.data.text_clean)
        ids, mask, _ = self.tokenizer([clean(text) for text in ([texts] if isinstance(texts, str) else texts)], self.stage.data.length)
        return ids, mask

    def _rows(self, name: str, batch: Mapping[str, np.ndarray], size: int, **options: Any) -> dict[str, np.ndarray]:
        """Runs a predict function in batches of one compiled size; pads the last and cuts it again."""
        count = len(next(iter(batch.values())))
        size = min(size, count)
        parts = []
        for start in range(0, count, size):
            part = {k: v[start:start + size] for k, v in batch.items()}
            missing = size - len(next(iter(part.values())))
            part = {k: np.concatenate([v, np.repeat(v[-1:], missing, 0)]) for k, v in part.items()}
            parts.append({k: v[:size - missing] if np.ndim(v) else v for k, v in self.predict[name](part, **options).items()})
        return {k: np.concatenate([p[k] for p in parts]) if np.ndim(parts[0][k]) else parts[0][k] for k in parts[0]}

    def embed_image(self, images: Any, batch: int = 64) -> np.ndarray:
        """-> float32 [b, e], unit length; [b, k, e] from systems that give an image several vectors, of which the nearest to a text counts."""
        return self._rows("embed", {"image": self.images(images)}, batch)["image_embed"]

    def embed_text(self, texts: str | Sequence[str], batch: int = 256) -> np.ndarray:
        """-> float32 [b, e], unit length."""
        ids, mask = self.ids(texts)
        return self._rows("embed", {"text": ids, "text_mask": mask}, batch)["text_embed"]

    def caption(self, images: Any, batch: int = 64, **options: Any) -> list[str]:
        """A caption for each image. ``options``: method="greedy"|"beam"|"sample", beams=, max_length=, ...

        Raises ConfigError where the system does not generate text.
        """
        if "generate" not in self.predict:
            raise ConfigError(f"system {self.config.system!r} does not generate text (it has {', '.join(self.predict)})")
        self.ids("")
        ids = self._rows("generate", {"image": self.images(images)}, batch, **options)["text"]
        return [self.stage.replies.decode(row) for row in ids]


    def prompts(self, texts: str | Sequence[str]) -> dict[str, np.ndarray]:
        """Strings -> what the system reads before it replies: ``prompt``, and ``instruction`` where it has one, with their masks. They are taken as they
        are: data.templates is not for them. Raises ConfigError where the system reads no prompts (data.layout)."""
        self.ids("")
        if self.stage.data.layout == "plain":
            raise ConfigError(f"system {self.config.system!r} was trained with data.layout='plain' and reads no prompt; nearest: caption")
        said = [Said(((text, ""),)) for text in ([texts] if isinstance(texts, str) else texts)]
        arrays = self.stage.writer.arrays(said, training=False)
        return {key: value for key, value in arrays.items() if key.startswith(("prompt", "instruction"))}

    def reply(self, images: Any, prompts: str | Sequence[str], batch: int = 16, **options: Any) -> list[str]:
        """A reply to each prompt about its image; one image, or one prompt, is for all. ``options``: as of ``caption``. Raises ConfigError."""
        asked, images = self.prompts(prompts), self.images(images)
        rows = max(len(images), len(asked["prompt"]))
        whole = {key: np.repeat(value, rows, 0) if len(value) == 1 else value for key, value in {"image": images, **asked}.items()}
        wrong = next((f"{len(images)} images and {len(asked['prompt'])} prompts" for value in whole.values() if len(value) != rows), "")
        if wrong:
            raise ConfigError(f"{wrong} do not go together; nearest: as many of both, or one of either")
        if "generate" not in self.predict:
            raise ConfigError(f"system {self.config.system!r} does not generate text (it has {', '.join(self.predict)})")
        return [self.stage.replies.decode(row).strip() for row in self._rows("generate", whole, batch, **options)["text"]]


def load(directory: str | pathlib.Path) -> Model:
    """Opens a work directory (its last stage), a stage directory, or an imported directory.

    Averaged weights (optim.ema) are taken where the stage kept them. Warns (``provenance.NonCommercialWeights``) of
    weights that may not be used commercially. Raises ConfigError where the directory holds no model.
    """
    folder = stages.newest_stage(pathlib.Path(directory))
    config = configs.from_json((folder / "config.json").read_text())
    tokenizer, other = (tokenizers.load(str(folder / kept)) if (folder / kept).exists() else None for kept in ("tokenizer", "instruction_tokenizer"))
    config.data.tokenizer = config.data.tokenizer if tokenizer is not None else ""
    if other is None and config.data.get("instruction_tokenizer"):
        config.data.instruction_tokenizer, config.data.instruction_length = "", 0
    config.lora, config.trainable = {}, (".*",)      # adapters are merged
    stage = stages.resolve(config, folder.name.split("_", 1)[-1], tokenizer, other)
    leaves = stages.read_weights(folder)
    missing = (set(stage.plan.shapes) | set(stage.plan.moving)) - set(leaves)
    if missing:
        raise ConfigError(f"{folder} lacks {len(missing)} leaves of its model, the first: {sorted(missing)[0]}")
    params = {p: jnp.asarray(leaves.pop(p)) for p in stage.plan.shapes}      # not twice in memory
    moving = {p: jnp.asarray(leaves.pop(p)) for p in stage.plan.moving}
    record = provenance.read(folder)
    provenance.tell_licence(folder, record)
    return Model(stage, merge(params, {}, moving), record)
