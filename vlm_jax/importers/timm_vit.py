"""timm's vision transformers and DeiT (``deit_base_patch16_224``): a ViT alone, which other systems start from."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from vlm_jax.importers import bert
from vlm_jax.importers.open_clip import heads
from vlm_jax.importers.release import Hints, Release, Shapes, count_layers, grid_of, read_json, shape_of
from vlm_jax.weight_rules import Rule

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IGNORED = (r"(head|pre_logits)\..*",)      # of classification


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    """Sizes from the tensors; heads from --image_heads, else 64 channels each. Colours from config.json where it has timm's pretrained_cfg."""
    width, _, patch, _ = shape_of(shapes, "patch_embed.proj.weight")
    image = dict(patch=patch, width=width, layers=count_layers(shapes, "blocks.{layer}.norm1.weight"),
                 heads=heads("image_heads", hints.image_heads, None, width), mlp_dim=shape_of(shapes, "blocks.0.mlp.fc1.weight")[0],
                 patch_bias=True, norms_at=("output",), eps=1e-6, init_scheme="bert")
    colours = read_json(folder, "config.json").get("pretrained_cfg", {})
    return dict(model=dict(image=image, mean=tuple(colours.get("mean", IMAGENET_MEAN)), std=tuple(colours.get("std", IMAGENET_STD))),
                data=dict(size=patch * grid_of(shape_of(shapes, "pos_embed")[1]), length=1), clamps=(), loss=dict(weights={}))


def rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    return tuple((target, source.removeprefix("vit."), how) for target, source, how in bert.timm_vit("image", "vit"))


RELEASE = Release("timm_vit", "single_tower", describe, rules, IGNORED, ("model.safetensors", "pytorch_model.bin", "*.pth"), resize="resize_positions_border")
