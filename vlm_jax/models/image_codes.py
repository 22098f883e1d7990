"""Image tokenizers: what masked patches are to be told as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest
from vlm_jax.models import vit
from vlm_jax.models.sizes import sizes
from vlm_jax.nn import codebook
from vlm_jax.nn.pixels import colour_bins
from vlm_jax.nn.unit import unit

# How a model that holds a tokenizer under ``tokenizer/`` starts from weights of the system vqkd (``System.adopt``)
FROM_VQKD = (("tokenizer/table", "codebook/table", "copy"), ("tokenizer/encoder/position_embed", "encoder/position_embed", "resize_positions_border"),
             ("tokenizer/(.*)", r"\1", "copy"))


class Colours(nn.Module):
    """A stand-in for a trained image tokenizer, without parameters: the bin of each patch's mean colour.

    image uint8 [b, h, w, 3], or float in [0, 1] -> ids int32 [b, n], in raster order, below ``bins`` ** 3.
    """
    patch: int
    image_size: int
    bins: int = 8

    @property
    def codes(self) -> int:
        return self.bins ** 3

    def __call__(self, image: jax.Array) -> jax.Array:
        return colour_bins(image.astype(jnp.float32) / (255 if image.dtype == jnp.uint8 else 1), self.patch, self.bins)


class VqTokens(nn.Module):
    """The encoder and the codes of a VQ-KD tokenizer (BEiT v2, arXiv 2208.06366), frozen: image float [b, h, w, 3] in [0, 1] -> ids int32 [b, n].

    Params: ``encoder/*``, ``encoder_head/(hidden|out)/*``, ``table`` [codes, code_width], of unit vectors.
    """
    patch: int
    image_size: int
    encoder: Mapping[str, Any]
    codes: int = 8192
    code_width: int = 32

    def setup(self):
        self.vit = vit.ViT(**sizes(vit.VARIANTS, **{**self.encoder, "image_size": self.image_size}), name="encoder")
        if self.vit.patch != self.patch:
            raise ValueError(f"targets.encoder.patch={self.vit.patch} gives another grid than the tower's {self.patch}; nearest: {self.patch}")
        self.encoder_head = codebook.TaskLayer(self.code_width)
        self.table = self.param("table", nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "norm")), (self.codes, self.code_width),
                                jnp.float32)

    def __call__(self, image: jax.Array) -> jax.Array:
        tokens = self.vit(2 * image - 1)[:, int(self.vit.class_token):]
        return jnp.argmax(unit(self.encoder_head(tokens)) @ self.table.T, -1).astype(jnp.int32)


class Unknown(nn.Module):
    """Of weights that came without their tokenizer: only how many ids it has is known."""
    codes: int
    patch: int = 0
    image_size: int = 0

    def __call__(self, image: jax.Array) -> jax.Array:
        raise ValueError("model.targets.kind='unknown' tells no ids of masked patches; nearest: 'colours', or loss.weights without masked images")


TARGETS: Mapping[str, type[nn.Module]] = {"colours": Colours, "vqkd": VqTokens, "unknown": Unknown}


def make_targets(patch: int, image_size: int, *, kind: str = "colours", **fields: Any) -> nn.Module:
    """The tokenizer of masked images: a module with ``codes``, called with images as they come -> ids [b, n]. Raises ValueError."""
    if kind not in TARGETS:
        raise ValueError(f"targets.kind={kind!r} is not known{nearest(kind, TARGETS)}")
    return TARGETS[kind](patch=patch, image_size=image_size, **fields)
