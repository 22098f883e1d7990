"""OpenAI's nine CLIP archives (openai/CLIP ``clip/model.py``): TorchScript, or their state dicts."""

from __future__ import annotations

import pathlib
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.importers import open_clip
from vlm_jax.importers.release import CLIP_MEAN, CLIP_STD, Hints, Release, Shapes, settle

IGNORED = (*open_clip.IGNORED, "input_resolution", "context_length", "vocab_size")


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    """Every OpenAI weight is QuickGELU with heads of 64 channels (``build_model``); small models of the same layout may say other heads."""
    if "text.text_projection" in shapes:
        raise ConfigError("text tensors start with 'text.': this is open_clip's layout; nearest: --release=open_clip")
    model, _ = open_clip.read_config(folder)
    stated = {None: None, True: "quick_gelu", False: "gelu"}[model.get("quick_gelu", False) if model else None]
    if stated == "gelu":
        raise ConfigError(f"{open_clip.CONFIG} beside the file says GELU, OpenAI's weights are QuickGELU; nearest: --release=open_clip")
    activation = settle("activation", hints.activation, "quick_gelu", "")
    image, pixels = open_clip.image_section(shapes, hints, activation, {})
    words, found = open_clip.text_section(shapes, hints, activation, {}, "")
    return dict(model=dict(image=image, text=dict(tower="transformer", end="largest", **words), embed=found["embed"], image_pool="class",
                           norm="layernorm", mean=CLIP_MEAN, std=CLIP_STD, tokens=open_clip.tokens(found["vocab"], {})),
                data=dict(size=pixels, length=found["length"], eval_augment="resize|center_crop"))


RELEASE = Release("openai_clip", "clip", describe, open_clip.rules, IGNORED, licence="mit")     # openai/CLIP LICENSE
