"""Image-text contrastive losses over the global batch, exact on any mesh, in linear memory.

With s_ij = image_i . text_j, logits l_ij = scale * s_ij (+ bias), N rows in the global batch:

softmax   CLIP (Radford et al. 2021, section 2.3, figure 3):
          row_i    = logsumexp_j l_ij - mean_{j in P_i} l_ij
          column_j = logsumexp_i l_ij - mean_{i in P_j} l_ij
          loss     = c/N * (sum_i row_i + sum_j column_j), c = 1/2 ("mean") or 1 ("sum")
sigmoid   SigLIP (Zhai et al. 2023, equation 1):
          loss     = 1/N * sum_ij softplus(-z_ij l_ij), z_ij = 1 in P, -1 elsewhere

Pairs (i, j), i != j, that share an image id or a caption id are duplicates:

"negatives"  P_i = {i}; duplicates are negatives like any other (CLIP, CoCa as published)
"positives"  P_i = {i and its duplicates}: a target distribution uniform over them
"masked"     P_i = {i}; duplicates appear neither as positives nor in a denominator

How: image rows stay where they are. Text rows, with whatever is summed per column, travel round
the ring of devices and are met chunk by chunk, so that one tile of [rows per device, chunk]
logits is alive at a time. The softmax needs its denominators before any gradient: its backward
goes round once more and forms the tiles anew. The sigmoid does not: one round yields both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest
from vlm_jax.losses import tiles
from vlm_jax.partitioning import Ring, ring

DUPLICATES = ("negatives", "positives", "masked")
DIRECTIONS = {"mean": 0.5, "sum": 1.0}
CHUNK = 256
FLOOR = -1e30  # below every logit, yet finite: FLOOR - FLOOR is 0 and not nan


def contrastive(image: jax.Array, text: jax.Array, scale: jax.Array, *, duplicates: str = "negatives",
                image_id: jax.Array | None = None, caption_id: jax.Array | None = None,
                directions: str = "mean", chunk: int = CHUNK) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Symmetric softmax cross-entropy (InfoNCE) between the images and texts of the global batch.

    image, text: [b, e], L2-normalised, row i of one belonging to row i of the other, any float
    dtype (float32 inside). scale: scalar multiplier exp(logit_scale). image_id, caption_id: int [b],
    equal where two rows show the same image or caption; read unless ``duplicates="negatives"``.
    directions: "mean" (CLIP, open_clip) or "sum" (CoCa's paper) of the two directions.
    chunk: texts met at a time; memory is proportional to rows per device times chunk.

    Returns (loss, metrics): scalars in float32. Metrics ``image_to_text`` and ``text_to_image``
    are top-1 accuracies within the batch (strict: a tie is a miss) and carry no gradient.
    Raises ValueError on an unknown option or on duplicates asked for without ids.
    """
    if directions not in DIRECTIONS:
        raise ValueError(f"directions={directions!r} is unknown{nearest(directions, tuple(DIRECTIONS))}")
    ids = _ids(image, text, duplicates, image_id, caption_id)
    return _softmax(duplicates, DIRECTIONS[directions], chunk, image, text, jnp.asarray(scale, jnp.float32), ids)


def sigmoid(image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array, *,
            duplicates: str = "negatives", image_id: jax.Array | None = None,
            caption_id: jax.Array | None = None, chunk: int = CHUNK) -> tuple[jax.Array, dict[str, jax.Array]]:
    """SigLIP's pairwise sigmoid loss: the sum over all pairs of the global batch, per row.

    bias: scalar added to every logit (published init -10, with scale 10). All else as in
    ``contrastive``.
    """
    ids = _ids(image, text, duplicates, image_id, caption_id)
    return _sigmoid(duplicates, chunk, image, text, jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32), ids)


def _ids(image, text, duplicates, image_id, caption_id) -> dict[str, jax.Array]:
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates={duplicates!r} is unknown{nearest(duplicates, DUPLICATES)}")
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"image {image.shape} and text {text.shape} must both be [rows, width] of one shape")
    ids = {"row": jnp.arange(1, image.shape[0] + 1)}  # from 1: tiles.cut pads with 0
    if duplicates != "negatives":
        given = {k: v for k, v in {"image": image_id, "caption": caption_id}.items() if v is not None}
        if not given:
            raise ValueError(f"duplicates={duplicates!r} needs image_id, caption_id or both; nearest without: 'negatives'")
        ids |= given
    return ids


def _relation(duplicates: str, rows: dict, keys: dict) -> tuple[jax.Array, jax.Array]:
    """Which pairs count at all, and which are positive: two bools [rows, keys]. Padding has row 0."""
    def equal(name):
        return rows[name][:, None] == keys[name][None, :]

    own, real = equal("row"), jnp.broadcast_to(keys["row"] > 0, (rows["row"].size, keys["row"].size))
    if duplicates == "negatives":
        return real, own
    same = functools.reduce(jnp.logical_or, [equal(name) for name in rows if name != "row"])
    if duplicates == "positives":
        return real, own | (same & real)
    return own | (real & ~same), own


def _dot(a: jax.Array, b: jax.Array, contract: str) -> jax.Array:
    return jnp.einsum(contract, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _round(peers: Ring, tile: Callable, row_sums: Any, keys: Any, key_sums: Any, chunk: int) -> tuple[Any, Any]:
    """Meets every row with every key once. tile(row_sums, key chunk, key_sums chunk) -> new sums.

    Keys and their sums visit all peers and come home.
    """
    rows = keys["text"].shape[0]
    keys, key_sums = tiles.cut((keys, peers.varying(key_sums)), chunk)

    def meet(row_sums, key):
        return tile(row_sums, *key)

    def visit(carry, _):
        row_sums, keys, key_sums = carry
        row_sums, key_sums = jax.lax.scan(meet, row_sums, (keys, key_sums))
        return (row_sums, *peers.shift((keys, key_sums))), None

    start = (peers.varying(row_sums), keys, key_sums)
    (row_sums, _, key_sums), _ = jax.lax.scan(visit, start, length=peers.size)
    return row_sums, tiles.join(key_sums, rows)


class _Top(NamedTuple):
    """Running best logits per row or per column."""
    positive: jax.Array
    rival: jax.Array

    @classmethod
    def start(cls, n: int):
        return cls(jnp.full(n, FLOOR), jnp.full(n, FLOOR))

    def meet(self, logits, counted, positive, axis):
        best = jnp.where(positive, logits, FLOOR).max(axis)
        rival = jnp.where(counted & ~positive, logits, FLOOR).max(axis)
        return _Top(jnp.maximum(self.positive, best), jnp.maximum(self.rival, rival))

    @property
    def peak(self):
        return jnp.maximum(self.positive, self.rival)


class _Sums(NamedTuple):
    """Running softmax statistics per row (axis 1 of a tile) or per column (axis 0)."""
    top: _Top
    total: jax.Array    # sum of exp(logit - peak) over counted pairs
    target: jax.Array   # sum of positive logits
    count: jax.Array    # number of positives

    @classmethod
    def start(cls, n: int):
        return cls(_Top.start(n), jnp.zeros(n), jnp.zeros(n), jnp.zeros(n))

    def meet(self, logits, counted, positive, axis):
        top = self.top.meet(logits, counted, positive, axis)
        shifted = jnp.where(counted, jnp.exp(logits - jnp.expand_dims(top.peak, axis)), 0)
        return _Sums(top, self.total * jnp.exp(self.top.peak - top.peak) + shifted.sum(axis),
                     self.target + jnp.where(positive, logits, 0).sum(axis),
                     self.count + positive.sum(axis, dtype=jnp.float32))

    @property
    def lse(self):
        return self.top.peak + jnp.log(self.total)

    @property
    def loss(self):
        return self.lse - self.target / self.count


def _accuracy(peers: Ring, rows: _Top, columns: _Top) -> dict[str, jax.Array]:
    def share(top):
        return peers.sum((top.positive > top.rival).sum(dtype=jnp.float32)) / (top.rival.size * peers.size)
    return {"image_to_text": share(rows), "text_to_image": share(columns)}


# ---- softmax

@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _softmax(duplicates, weight, chunk, image, text, scale, ids):
    return _softmax_forward(duplicates, weight, chunk, image, text, scale, ids)[0]


def _softmax_forward(duplicates, weight, chunk, image, text, scale, ids):
    def local(peers, image, text, scale, ids):
        n, f32 = image.shape[0], jnp.float32

        def tile(rows, keys, columns):
            logits = _dot(image.astype(f32), keys["text"].astype(f32), "ie,je->ij") * scale
            pairs = _relation(duplicates, ids, keys["ids"])
            return rows.meet(logits, *pairs, axis=1), columns.meet(logits, *pairs, axis=0)

        rows, columns = _round(peers, tile, _Sums.start(n), {"text": text, "ids": ids}, _Sums.start(n), chunk)
        loss = weight / (n * peers.size) * peers.sum((rows.loss + columns.loss).sum())
        kept = {"row_lse": rows.lse, "column_lse": columns.lse, "share": 1 / rows.count}
        return loss, _accuracy(peers, rows.top, columns.top), kept

    run = ring(local, ("batch", "batch", "none", "batch"), ("none", "none", "batch"))
    loss, metrics, kept = run(image, text, scale, ids)
    return (loss, metrics), (image, text, scale, ids, kept)


def _softmax_backward(duplicates, weight, chunk, residuals, cotangents):
    def local(peers, image, text, scale, ids, kept, cotangent):
        f32 = jnp.float32
        # Being a duplicate is mutual: row i and column i have equally many positives.
        keys = {"text": text, "ids": ids, "lse": kept["column_lse"], "share": kept["share"]}

        def tile(d_image, keys, d_text):
            rows, columns = image.astype(f32), keys["text"].astype(f32)
            logits = _dot(rows, columns, "ie,je->ij") * scale
            counted, positive = _relation(duplicates, ids, keys["ids"])
            drawn = jnp.exp(logits - kept["row_lse"][:, None]) + jnp.exp(logits - keys["lse"])
            wanted = kept["share"][:, None] + keys["share"]
            d_logits = jnp.where(counted, drawn, 0) - jnp.where(positive, wanted, 0)
            return d_image + _dot(d_logits, columns, "ij,je->ie"), d_text + _dot(d_logits, rows, "ij,ie->je")

        empty = jnp.zeros(image.shape, f32)
        d_image, d_text = _round(peers, tile, empty, keys, empty, chunk)
        outer = cotangent * weight / (image.shape[0] * peers.size)
        d_scale = outer * peers.sum((image * d_image).sum())  # sum_ij d_ij s_ij, without the tiles
        return (outer * scale * d_image).astype(image.dtype), (outer * scale * d_text).astype(text.dtype), d_scale

    image, text, scale, ids, kept = residuals
    run = ring(local, ("batch", "batch", "none", "batch", "batch", "none"), ("batch", "batch", "none"))
    d_image, d_text, d_scale = run(image, text, scale, ids, kept, cotangents[0])
    return d_image, d_text, d_scale, None


_softmax.defvjp(_softmax_forward, _softmax_backward)


# ---- sigmoid

@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sigmoid(duplicates, chunk, image, text, scale, bias, ids):
    return _sigmoid_forward(duplicates, chunk, image, text, scale, bias, ids)[0]


def _sigmoid_forward(duplicates, chunk, image, text, scale, bias, ids):
    def local(peers, image, text, scale, bias, ids):
        n, f32 = image.shape[0], jnp.float32
        empty = jnp.zeros(image.shape, f32)

        def tile(row_sums, keys, key_sums):
            (row_top, loss, d_bias, d_image), (column_top, d_text) = row_sums, key_sums
            rows, columns = image.astype(f32), keys["text"].astype(f32)
            logits = _dot(rows, columns, "ie,je->ij") * scale + bias
            counted, positive = pairs = _relation(duplicates, ids, keys["ids"])
            wrong = jnp.where(positive, -logits, logits)
            odds = jnp.where(counted, jax.nn.sigmoid(wrong), 0)
            d_logits = jnp.where(positive, -odds, odds)
            row_sums = (row_top.meet(logits, *pairs, axis=1),
                        loss + jnp.where(counted, jax.nn.softplus(wrong), 0).sum(1),
                        d_bias + d_logits.sum(1), d_image + _dot(d_logits, columns, "ij,je->ie"))
            return row_sums, (column_top.meet(logits, *pairs, axis=0),
                              d_text + _dot(d_logits, rows, "ij,ie->je"))

        row_sums = (_Top.start(n), jnp.zeros(n), jnp.zeros(n), empty)
        (row_top, loss, d_bias, d_image), (column_top, d_text) = _round(
            peers, tile, row_sums, {"text": text, "ids": ids}, (_Top.start(n), empty), chunk)
        total = n * peers.size
        loss, d_scale, d_bias = peers.sum((loss.sum(), (image * d_image).sum(), d_bias.sum()))
        gradients = ((scale / total * d_image).astype(image.dtype), (scale / total * d_text).astype(text.dtype))
        return loss / total, _accuracy(peers, row_top, column_top), gradients, (d_scale / total, d_bias / total)

    run = ring(local, ("batch", "batch", "none", "none", "batch"), ("none", "none", "batch", "none"))
    loss, metrics, wide, scalars = run(image, text, scale, bias, ids)
    return (loss, metrics), (*wide, *scalars)


def _sigmoid_backward(duplicates, chunk, gradients, cotangents):
    # The loss is one scalar, so gradients formed in the forward pass need only its cotangent.
    return *((cotangents[0] * g).astype(g.dtype) for g in gradients), None


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)
