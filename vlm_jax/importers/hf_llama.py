"""Hugging Face's ``LlamaForCausalLM``: LLaMA, LLaMA 2 and Vicuna, alone."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.importers.release import Hints, Release, Shapes, count_layers, read_json, shape_of
from vlm_jax.weight_rules import Rule

ROLES = dict(query="q_proj", key="k_proj", value="v_proj", out="o_proj")
# What ``models.llama`` is; config.json may leave any of it out
FIXED = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None, tie_word_embeddings=False)
IGNORED = (r".*\.rotary_emb\.inv_freq",)
WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
LENGTH = 128       # ids of a text, where nobody says otherwise


def refuse_others(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises ConfigError where config.json says other than what our module is."""
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ConfigError(f"config.json: {key}={config[key]!r} is not supported; nearest: {value!r}")


def wanted(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise ConfigError(f"config.json beside the weights lacks {key!r}, which the tensors do not tell")
    return config[key]


def whole_heads(width: int, heads: int) -> int:
    if heads < 1 or width % heads:
        raise ConfigError(f"config.json: {heads} heads do not divide a width of {width}; nearest: "
                          f"{min((h for h in range(1, width + 1) if width % h == 0), key=lambda h: abs(h - heads))}")
    return heads


def sections(language: dict[str, Any], vocab: int, config: Mapping[str, Any], ends: Collection[str], pad: int = 0) -> dict[str, dict[str, Any]]:
    """The sections of a language model alone, with the ids that ``config`` has for ``ends``."""
    tokens = {name: config.get(f"{name}_token_id") for name in ends}
    tokens = {name: pad if name == "pad" and (i is None or i < 0) else i for name, i in tokens.items()}
    return dict(model=dict(language=language, tokens=dict(vocab=vocab, **tokens)), data=dict(size=224, length=min(LENGTH, language.get("positions", LENGTH))),
                clamps=(), loss=dict(weights={}))     # it sees no images: any size


def attention(target: str, source: str, roles: Mapping[str, str], bias: bool = False) -> tuple[Rule, ...]:
    """Four maps under ``source``, by our role: theirs."""
    rules = [(f"{target}/{role}/kernel", f"{source}.{name}.weight", "from_heads" if role == "out" else "to_heads") for role, name in roles.items()]
    if bias:
        rules += [(f"{target}/{role}/bias", f"{source}.{name}.bias", "copy" if role == "out" else "heads") for role, name in roles.items()]
    return tuple(rules)


def table(target: str, source: str) -> tuple[Rule, ...]:
    """A LLaMA whose names start with ``source`` ("", or "language_model." inside another model)."""
    layer, blocks = f"{source}model.layers.{{layer}}", f"{target}/blocks"
    return ((f"{target}/token_embed/table", f"{source}model.embed_tokens.weight", "copy"),
            (f"{blocks}/norm1/scale", f"{layer}.input_layernorm.weight", "copy"), *attention(f"{blocks}/attn", f"{layer}.self_attn", ROLES),
            (f"{blocks}/norm2/scale", f"{layer}.post_attention_layernorm.weight", "copy"),
            *((f"{blocks}/mlp/{role}/kernel", f"{layer}.mlp.{role}_proj.weight", "dense") for role in ("gate", "up", "down")),
            (f"{target}/output_norm/scale", f"{source}model.norm.weight", "copy"), (f"{target}/lm_head/kernel", f"{source}lm_head.weight", "dense"))


def tower(shapes: Shapes, config: Mapping[str, Any], source: str = "") -> tuple[dict[str, Any], int]:
    """(``model.language``, rows of the token table), from the tensors and their config.json."""
    refuse_others(config, FIXED)
    vocab, width = shape_of(shapes, f"{source}model.embed_tokens.weight")
    heads = whole_heads(width, wanted(config, "num_attention_heads"))
    refuse_others(config, dict(num_key_value_heads=heads, head_dim=width // heads))
    rope = config.get("rope_parameters") or config      # where transformers 5 and 4 write it
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"config.json: rope_parameters.rope_type={rope['rope_type']!r} is not supported; nearest: 'default'")
    return dict(family="llama", width=width, layers=count_layers(shapes, f"{source}model.layers.{{layer}}.input_layernorm.weight"), heads=heads,
                mlp_dim=shape_of(shapes, f"{source}model.layers.0.mlp.up_proj.weight")[0], eps=float(wanted(config, "rms_norm_eps")),
                theta=float(rope.get("rope_theta", 1e4))), vocab


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    config = read_json(folder, "config.json")
    return sections(*tower(shapes, config), config, ("bos", "eos", "pad"))


RELEASE = Release("hf_llama", "single_tower", describe, lambda sections, shapes: table("language", ""), IGNORED, WEIGHTS)
