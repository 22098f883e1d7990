"""Hugging Face's ``BertModel``, ``BertForMaskedLM`` and ``BertForPreTraining``: a BERT alone, which other systems start from."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.importers import bert
from vlm_jax.importers.albef import text_section
from vlm_jax.importers.release import Hints, Release, Shapes, read_json
from vlm_jax.weight_rules import Rule

HEAD = "cls.predictions"
# The pooler and the next-sentence head are for tasks that no system here has.
IGNORED = (r".*\.position_ids", r"(bert\.)?pooler\..*", r"cls\.seq_relationship\..*")
# What ``models.bert`` is; config.json may leave any of it out
FIXED = dict(model_type="bert", hidden_act="gelu", position_embedding_type="absolute", is_decoder=False)


def full_names(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """As files of a model with a head have them: the tower's start with "bert."."""
    return {name if name.startswith(("bert.", "cls.")) else f"bert.{name}": shape for name, shape in shapes.items()}


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    config = read_json(folder, "config.json")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise ConfigError(f"config.json: {key}={config[key]!r} is not supported; nearest: {value!r}")
    text, tokens = text_section(full_names(shapes), "bert", config, hints)
    if text.pop("cross_layers"):
        raise ConfigError("the file has cross-attention, which a plain BERT has not; nearest: --release=albef or --release=blip")
    return dict(model=dict(text=dict(text, eps=float(config.get("layer_norm_eps", 1e-12))), lm_head=f"{HEAD}.bias" in shapes, **tokens),
                data=dict(size=224, length=text["positions"]), clamps=(), loss=dict(weights={}))     # it sees no images: any size


def rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    table = (*bert.embeddings("text", "bert.embeddings"), *bert.layers("text/blocks", "bert.encoder.layer"), *bert.language_head("lm_head", HEAD))
    old = any(name.endswith("LayerNorm.gamma") for name in shapes)      # bert-base-uncased, as it was converted from TensorFlow

    def theirs(name: str) -> str:
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") if old else name
        return name if any(n.startswith("bert.") for n in shapes) else name.removeprefix("bert.")

    return tuple((target, theirs(source), how) for target, source, how in table)


def ties(names: Collection[str]) -> dict[str, str]:
    """The language head's matrix is the token table, and its bias is stored twice."""
    return {f"{HEAD}.decoder.weight": "bert.embeddings.word_embeddings.weight", f"{HEAD}.decoder.bias": f"{HEAD}.bias"} if f"{HEAD}.bias" in names else {}


RELEASE = Release("hf_bert", "single_tower", describe, rules, IGNORED, ("model.safetensors", "pytorch_model.bin"), ties=ties)
