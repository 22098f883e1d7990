"""Contrast of texts with images that have several features each, of which the nearest counts (BLIP-2, arXiv 2301.12597, section 3.1).

    s_ij = max_q image_iq . text_j / temp
    itc = 1/2 [mean_i -sum_j target_ij log softmax_j(s_ij) + the same for texts]

``target`` is 1 - smoothing at the own pair, or spread evenly over the pairs of the same id, plus smoothing / b everywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

GATHERED = ("constant", "learned")


def most_similar(image: jax.Array, text: jax.Array) -> jax.Array:
    """image [n, q, e], text [m, e] -> fp32 [n, m]: the largest product of each text with the features of each image."""
    return jnp.einsum("iqe,je->ijq", image, text, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32).max(-1)


def query_contrastive(image: jax.Array, text: jax.Array, temp: jax.Array, *, ids: jax.Array | None = None, smoothing: float = 0.0,
                      gathered: str = "constant") -> tuple[jax.Array, dict[str, jax.Array]]:
    """image [b, q, e] and text [b, e], unit vectors of the global batch; ids int [b]: rows of the same id are positives of each other.

    gathered: the other side's features, which the official code gathers from all devices, are "constant": no gradient goes through them, only
    through those of the row that is asked about; or "learned".

    Returns (loss, {"image_to_text", "text_to_image": similarities [b, b] over temp}).
    """
    rows = image.shape[0]
    fixed = jax.lax.stop_gradient if gathered == "constant" else lambda x: x
    similar = {"image_to_text": most_similar(image, fixed(text)) / temp, "text_to_image": most_similar(fixed(image), text).T / temp}
    same = jnp.eye(rows) if ids is None else (ids[:, None] == ids).astype(jnp.float32)
    target = (1 - smoothing) * same / same.sum(1, keepdims=True) + smoothing / rows
    return sum(-(target * jax.nn.log_softmax(s, axis=1)).sum(1).mean() for s in similar.values()) / 2, similar
