"""EVA-CLIP's ViT-g as BLIP-2 takes it (``eva_vit_g.pth`` of LAVIS): a ViT alone, without the last of its 40 blocks."""

from __future__ import annotations

import pathlib
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.importers.open_clip import linear, norm
from vlm_jax.importers.release import CLIP_MEAN, CLIP_STD, Hints, Release, Shapes, count_layers, grid_of, settle, shape_of
from vlm_jax.models import vit
from vlm_jax.weight_rules import Rule

OFFICIAL = vit.VARIANTS["eva_g14"]
USED = OFFICIAL["layers"]
IGNORED = (rf"blocks\.{USED}\..*", r"(norm|fc_norm|head)\..*", r".*\.relative_position_index")


def table(target: str, source: str) -> tuple[Rule, ...]:
    """Names that start with ``source`` ("", or "visual_encoder." inside BLIP-2's own files); keys have no bias."""
    layer, blocks = f"{source}blocks.{{layer}}", f"{target}/blocks"
    rules = [(f"{blocks}/attn/{role}/kernel", f"{layer}.attn.qkv.weight[{i}/3]", "to_heads") for i, role in enumerate(("query", "key", "value"))]
    rules += [(f"{blocks}/attn/{role}/bias", f"{layer}.attn.{role[0]}_bias", "heads") for role in ("query", "value")]
    return ((f"{target}/class_embed", f"{source}cls_token", "class_row"), (f"{target}/position_embed", f"{source}pos_embed", "batched_resize_positions_border"),
            (f"{target}/patch_embed/projection/kernel", f"{source}patch_embed.proj.weight", "patches"),
            (f"{target}/patch_embed/projection/bias", f"{source}patch_embed.proj.bias", "copy"), *norm(f"{blocks}/norm1", f"{layer}.norm1"), *rules,
            (f"{blocks}/attn/out/kernel", f"{layer}.attn.proj.weight", "from_heads"), (f"{blocks}/attn/out/bias", f"{layer}.attn.proj.bias", "copy"),
            *norm(f"{blocks}/norm2", f"{layer}.norm2"), *linear(f"{blocks}/mlp/up", f"{layer}.mlp.fc1"), *linear(f"{blocks}/mlp/down", f"{layer}.mlp.fc2"))


def tower(shapes: Shapes, hints: Hints, source: str = "") -> tuple[dict[str, Any], int]:
    """(``model.image``, pixels). Heads from --image_heads, else of the official 88 channels."""
    width, _, patch, _ = shape_of(shapes, f"{source}patch_embed.proj.weight")
    shape_of(shapes, f"{source}blocks.0.attn.q_bias")
    heads = settle("image_heads", hints.image_heads, None, width // (OFFICIAL["width"] // OFFICIAL["heads"]))
    if heads < 1 or width % heads:
        raise ConfigError(f"--image_heads={heads} does not divide a width of {width}")
    shared = {name: OFFICIAL[name] for name in ("patch_bias", "key_bias", "norms_at", "eps", "init_scheme")}
    return dict(patch=patch, width=width, layers=min(USED, count_layers(shapes, f"{source}blocks.{{layer}}.norm1.weight")), heads=heads,
                mlp_dim=shape_of(shapes, f"{source}blocks.0.mlp.fc1.weight")[0], **shared), patch * grid_of(shape_of(shapes, f"{source}pos_embed")[1])


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    image, size = tower(shapes, hints)
    return dict(model=dict(image=image, mean=CLIP_MEAN, std=CLIP_STD), data=dict(size=size, length=1), clamps=(), loss=dict(weights={}))


RELEASE = Release("eva", "single_tower", describe, lambda sections, shapes: table("image", ""), IGNORED, ("*.pth",), resize="resize_positions_border")
