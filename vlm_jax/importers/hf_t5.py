"""Hugging Face's ``T5ForConditionalGeneration`` of version 1.1, such as Flan-T5: alone."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError, nearest
from vlm_jax.importers.hf_llama import WEIGHTS, attention, refuse_others, sections, wanted
from vlm_jax.importers.release import Hints, Release, Shapes, count_layers, read_json, shape_of
from vlm_jax.weight_rules import Rule

ROLES = dict(query="q", key="k", value="v", out="o")
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu"}
# A T5 of version 1.0 has no gates and ties its head. ``tie_word_embeddings`` says nothing: transformers 5 writes true beside two tensors.
FIXED = dict(model_type="t5", feed_forward_proj="gated-gelu", scale_decoder_outputs=False)
IGNORED = (r".*\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)      # of old files; never read


def mlp(target: str, source: str) -> tuple[Rule, ...]:
    return tuple((f"{target}/{role}/kernel", f"{source}.{name}.weight", "dense") for role, name in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")))


def stack(target: str, source: str, parts: tuple[str, ...]) -> tuple[Rule, ...]:
    """``source``: "encoder" or "decoder". parts: what its layers' members layer.0, layer.1, ... are, "attn", "cross" and "mlp"."""
    rules: list[Rule] = []
    for i, part in enumerate(parts):
        member = f"{source}.block.{{layer}}.layer.{i}"
        name = {"attn": "norm1", "cross": "norm_cross", "mlp": "norm2"}[part]
        rules += [(f"{target}/blocks/{name}/scale", f"{member}.layer_norm.weight", "copy")]
        rules += (mlp(f"{target}/blocks/mlp", f"{member}.DenseReluDense") if part == "mlp" else
                  attention(f"{target}/blocks/{part}", f"{member}.{'SelfAttention' if part == 'attn' else 'EncDecAttention'}", ROLES))
    return tuple(rules)


def table(target: str, source: str) -> tuple[Rule, ...]:
    """A T5 whose names start with ``source`` ("", or "language_model." inside another model)."""
    rules: list[Rule] = []
    for name, parts in (("encoder", ("attn", "mlp")), ("decoder", ("attn", "cross", "mlp"))):
        rules += [*stack(f"{target}/{name}", f"{source}{name}", parts), (f"{target}/{name}_norm/scale", f"{source}{name}.final_layer_norm.weight", "copy"),
                  (f"{target}/{name}_positions", f"{source}{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "copy")]
    return ((f"{target}/token_embed/table", f"{source}shared.weight", "copy"), *rules, (f"{target}/lm_head/kernel", f"{source}lm_head.weight", "dense"))


def tower(shapes: Shapes, config: Mapping[str, Any], source: str = "") -> tuple[dict[str, Any], int]:
    """(``model.language``, rows of the token table), from the tensors and their config.json."""
    refuse_others(config, FIXED)
    vocab, width = shape_of(shapes, f"{source}shared.weight")
    if f"{source}lm_head.weight" not in shapes:
        raise ConfigError(f"the file has no {source}lm_head.weight: a T5 whose head is its token table is not supported; nearest: a Flan-T5 or T5 1.1")
    act = config.get("dense_act_fn", "gelu_new")
    if act not in ACTIVATIONS:
        raise ConfigError(f"config.json: dense_act_fn={act!r} is not supported{nearest(act, ACTIVATIONS)}")
    layers = [count_layers(shapes, f"{source}{name}.block.{{layer}}.layer.0.layer_norm.weight") for name in ("encoder", "decoder")]
    heads = wanted(config, "num_heads")
    inner = shape_of(shapes, f"{source}encoder.block.0.layer.0.SelfAttention.q.weight")[0]
    if heads < 1 or inner % heads:
        raise ConfigError(f"config.json: num_heads={heads} does not divide the {inner} rows of the queries")
    return dict(family="t5", width=width, layers=layers[0], decoder_layers=layers[1], heads=heads, head_dim=inner // heads,
                mlp_dim=shape_of(shapes, f"{source}encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0], activation=ACTIVATIONS[act],
                eps=float(config.get("layer_norm_epsilon", 1e-6)),
                buckets=shape_of(shapes, f"{source}encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")[0],
                max_distance=int(config.get("relative_attention_max_distance", 128))), vocab


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    config = read_json(folder, "config.json")
    return sections(*tower(shapes, config), config, ("eos", "pad"))


def ties(names: Collection[str]) -> dict[str, str]:
    """Both stacks may name the token table again."""
    return {f"{name}.embed_tokens.weight": "shared.weight" for name in ("encoder", "decoder")}


RELEASE = Release("hf_t5", "single_tower", describe, lambda sections, shapes: table("language", ""), IGNORED, WEIGHTS, ties=ties)
