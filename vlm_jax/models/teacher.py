"""What a frozen image tower says of each patch: the targets of feature distillation (arXiv 2208.06366, section 2.1)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import ConfigError, nearest
from vlm_jax.models import vit
from vlm_jax.models.sizes import sizes
from vlm_jax.nn.linear import ProjectionHead

POOLS = ("class", "mean", "normed_mean")      # after which a patch's own token may go through the projection


class PatchTeacher(nn.Module):
    """CLIP's image tower, whose patch tokens go through the final norm and the projection; the class token is left out.
    Leaves are named as in a CLIP (``image/...``, ``image_head/...``)."""
    image: vit.ViT
    embed: int
    norm: str = "layernorm"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: Any = jnp.float32

    def setup(self):
        self.image_head = ProjectionHead(self.embed, norm_kind=self.norm, eps=self.image.eps, dtype=self.dtype)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixels float [b, h, w, 3] in [0, 1] -> fp32 [b, n, embed], row by row."""
        tokens = self.image((pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std))
        return self.image_head(tokens[:, int(self.image.class_token):]).astype(jnp.float32)


def build_teacher(*, image: dict, embed: int, size: int, compute: Any, norm: str = "layernorm", image_pool: str = "class", mean=(0.5, 0.5, 0.5),
                  std=(0.5, 0.5, 0.5), **other_side: Any) -> PatchTeacher:
    """From the ``model`` section of a CLIP, whose text side is passed over. Raises ConfigError for a tower without a token for each patch."""
    fields = dict(image)
    tower = fields.pop("tower", "vit")
    if tower != "vit":
        raise ConfigError(f"model.teacher.image.tower={tower!r} has no token for each patch in the joint space; nearest: 'vit'")
    if image_pool not in POOLS:
        raise ConfigError(f"model.teacher.image_pool={image_pool!r}: patches do not go through the projection alone{nearest(image_pool, POOLS)}")
    return PatchTeacher(vit.ViT(**sizes(vit.VARIANTS, image_size=size, norm=norm, dtype=compute, **{**fields, "remat": "none"})), embed, norm, tuple(mean),
                        tuple(std), compute)
