"""Hugging Face's ``OPTForCausalLM``: an OPT alone."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.importers.hf_llama import WEIGHTS, attention, refuse_others, sections, wanted, whole_heads
from vlm_jax.importers.open_clip import linear, norm
from vlm_jax.importers.release import Hints, Release, Shapes, count_layers, read_json, shape_of
from vlm_jax.models.opt import OFFSET
from vlm_jax.weight_rules import Rule

ROLES = dict(query="q_proj", key="k_proj", value="v_proj", out="out_proj")
# What ``models.opt`` is; 350M is post-norm with narrower embeddings
FIXED = dict(model_type="opt", activation_function="relu", do_layer_norm_before=True, enable_bias=True, layer_norm_elementwise_affine=True,
             tie_word_embeddings=True, _remove_final_layer_norm=False)


def start(shapes: Shapes, source: str = "") -> str:
    """What names start with; old files lack "model."."""
    return f"{source}model.decoder" if f"{source}model.decoder.embed_tokens.weight" in shapes else f"{source}decoder"


def table(target: str, source: str) -> tuple[Rule, ...]:
    """An OPT whose names start with ``source`` ("model.decoder")."""
    layer, blocks = f"{source}.layers.{{layer}}", f"{target}/blocks"
    return ((f"{target}/token_embed/table", f"{source}.embed_tokens.weight", "copy"), (f"{target}/position_embed", f"{source}.embed_positions.weight", "copy"),
            *norm(f"{blocks}/norm1", f"{layer}.self_attn_layer_norm"), *attention(f"{blocks}/attn", f"{layer}.self_attn", ROLES, bias=True),
            *norm(f"{blocks}/norm2", f"{layer}.final_layer_norm"), *linear(f"{blocks}/mlp/up", f"{layer}.fc1"), *linear(f"{blocks}/mlp/down", f"{layer}.fc2"),
            *norm(f"{target}/output_norm", f"{source}.final_layer_norm"))


def tower(shapes: Shapes, config: Mapping[str, Any], source: str = "") -> tuple[dict[str, Any], int]:
    """(``model.language``, rows of the token table), from the tensors and their config.json."""
    source = start(shapes, source)
    vocab, width = shape_of(shapes, f"{source}.embed_tokens.weight")
    refuse_others(config, FIXED | dict(word_embed_proj_dim=width))
    return dict(family="opt", width=width, layers=count_layers(shapes, f"{source}.layers.{{layer}}.fc1.weight"),
                heads=whole_heads(width, wanted(config, "num_attention_heads")), mlp_dim=shape_of(shapes, f"{source}.layers.0.fc1.weight")[0],
                positions=shape_of(shapes, f"{source}.embed_positions.weight")[0] - OFFSET), vocab


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    config = read_json(folder, "config.json")
    return sections(*tower(shapes, config), config, ("bos", "eos", "pad"), pad=1)


def ties(names: Collection[str]) -> dict[str, str]:
    """Some files hold the head's matrix, which is the token table."""
    return {"lm_head.weight": f"{start(dict.fromkeys(names, ()))}.embed_tokens.weight"}


RELEASE = Release("hf_opt", "single_tower", describe, lambda sections, shapes: table("language", start(shapes)), (), WEIGHTS, ties=ties)
