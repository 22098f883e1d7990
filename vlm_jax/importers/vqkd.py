"""BEiT v2's image tokenizers (microsoft/unilm ``beit2/modeling_vqkd.py``): encoder, decoder and codebook, without the teacher."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.importers import bert
from vlm_jax.importers.open_clip import heads, linear, norm
from vlm_jax.importers.release import Hints, Release, Shapes, count_layers, grid_of, shape_of
from vlm_jax.weight_rules import Rule

TABLE = "quantize.embedding.weight"
# What the official loader strips; ``embed_avg`` is never written after it was made of an empty codebook.
IGNORED = (r"(loss|teacher|scaling).*", r"quantize\.embedding\.embed_avg")
BLANK = {"quantize.embedding.embed_avg": TABLE}


def tower(shapes: Shapes, name: str, hint: str, hints: Hints) -> dict[str, Any]:
    """The section of a ViT of BEiT's layout; heads from the command line, else 64 channels each."""
    width = shape_of(shapes, f"{name}.patch_embed.proj.weight")[0]
    return dict(width=width, layers=count_layers(shapes, f"{name}.blocks.{{layer}}.norm1.weight"), heads=heads(hint, getattr(hints, hint), None, width),
                mlp_dim=shape_of(shapes, f"{name}.blocks.0.mlp.fc1.weight")[0], patch_bias=True, key_bias=False, norms_at=("output",), eps=1e-6,
                init_scheme="beit")


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    """Sizes from the tensors. Pixels are [0, 1] times 2 minus 1, whatever is in a batch; below 384 an eighth is cropped off (``beit2/datasets.py``)."""
    patch = shape_of(shapes, "encoder.patch_embed.proj.weight")[2]
    size = hints.size or patch * grid_of(shape_of(shapes, "encoder.pos_embed")[1])
    codes, width = shape_of(shapes, TABLE)
    return dict(model=dict(encoder=dict(tower(shapes, "encoder", "image_heads", hints), patch=patch), decoder=tower(shapes, "decoder", "decoder_heads", hints),
                           codes=codes, code_width=width, features=shape_of(shapes, "decode_task_layer.2.weight")[0]),
                data=dict(size=size, length=1, eval_augment=f"resize({size * 8 // 7 if size < 384 else size})|center_crop"), clamps=(),
                loss=dict(weights=dict(rec=1.0, commit=1.0)))


def beit_vit(name: str) -> tuple[Rule, ...]:
    """timm's ViT but for the biases of attention (queries' and values' stand beside the joined matrix) and the name of the last norm."""
    layer = f"{name}.blocks.{{layer}}"
    biases = [(f"{name}/blocks/attn/{role}/bias", f"{layer}.attn.{role[0]}_bias", "heads") for role in ("query", "value")]
    return (*biases, *norm(f"{name}/output_norm", f"{name}.fc_norm"), *bert.timm_vit(name, name))


def rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    """The first rule that fits a leaf is taken: the decoder's patches are single cells of the grid."""
    return (("decoder/patch_embed/projection/kernel", "decoder.patch_embed.proj.weight", "cells"), *beit_vit("encoder"), *beit_vit("decoder"),
            *(rule for side in ("encode", "decode") for ours, theirs in (("hidden", 0), ("out", 2))
              for rule in linear(f"{side}r_head/{ours}", f"{side}_task_layer.{theirs}")),
            ("codebook/table", TABLE, "copy"), ("codebook/count", "quantize.cluster_size", "copy"),
            ("codebook/kmeans_count", "quantize.embedding.cluster_size", "copy"), ("codebook/initted", "quantize.embedding.initted", "one"))


def write_config(config: Any, folder: pathlib.Path, names: Collection[str]) -> None:
    """The official loader reads no config: it is told the name of a size."""


RELEASE = Release("vqkd", "vqkd", describe, rules, IGNORED, ("model.safetensors", "weights.safetensors", "*.pth"), write_config,
                  blank=BLANK, resize="resize_positions_border", licence="mit")
