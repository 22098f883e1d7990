"""Training on mixtures of two images: mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899), as timm's ``Mixup`` draws them for a whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def soft_labels(labels: jax.Array, classes: int, smoothing: float = 0.0) -> jax.Array:
    """int [b] -> fp32 [b, classes]: 1 - smoothing on the class, ``smoothing`` shared by all."""
    return (1 - smoothing) * jax.nn.one_hot(labels, classes) + smoothing / classes


def box(key: jax.Array, height: int, width: int, share: jax.Array) -> jax.Array:
    """bool [height, width]: a box of about ``share`` of the area and the image's ratio around a place drawn evenly, cut at the edges."""
    def side(key, length):
        half, middle = jnp.floor(length * jnp.sqrt(share)).astype(jnp.int32) // 2, jax.random.randint(key, (), 0, length)
        at = jnp.arange(length)
        return (at >= middle - half) & (at < middle + half)

    rows, columns = (side(k, n) for k, n in zip(jax.random.split(key), (height, width), strict=True))
    return rows[:, None] & columns


def weights(key: jax.Array, height: int, width: int, mixup: float, cutmix: float) -> jax.Array:
    """fp32 [height, width]: how much of each image stays at each place. mixup, cutmix: parameters of the Beta distributions, 0 for none; with both, one is
    drawn evenly."""
    which, share, place = jax.random.split(key, 3)
    flat = jnp.full((height, width), jax.random.beta(share, mixup, mixup)) if mixup else None
    cut = 1 - box(place, height, width, 1 - jax.random.beta(share, cutmix, cutmix)).astype(jnp.float32) if cutmix else None
    if flat is None or cut is None:
        return cut if flat is None else flat
    return jnp.where(jax.random.bernoulli(which), cut, flat)


def mix(key: jax.Array, image: jax.Array, targets: jax.Array, *, mixup: float = 0.0, cutmix: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Each row with the row as far from the other end of the batch: (image float [b, h, w, 3], targets [b, classes]), the latter by the share of the
    pixels. One mixture is drawn for the batch."""
    if not (mixup or cutmix):
        return image, targets
    stays = weights(key, *image.shape[1:3], mixup, cutmix)
    whole, each = stays.mean(), stays[..., None]
    return each * image + (1 - each) * image[::-1], whole * targets + (1 - whole) * targets[::-1]


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over rows, in nats."""
    return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()
