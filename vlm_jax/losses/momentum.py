"""Contrast against a slow copy of the model and a queue of its past features (ALBEF, arXiv 2107.07651, section 3.2; MoCo).

    s_i2t = f_image . [g_text of the batch, text queue] / temp        f: student, g: teacher
    target = alpha softmax(g_image . [...] / temp) + (1 - alpha) own
    itc = 1/2 [mean_i -sum_j target_ij log softmax(s_i2t)_ij + the same for texts]

``own`` is 1 at a row's own key, or, given ids, equal mass on every key of the same id. The teacher of a step is the old one moved
towards the student before the step's update; its features enter the queues after the loss has looked at them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

TARGETS = ("pairs", "images")     # what is positive: a text and its own image, or all texts and images of one image id


def shadowed(variables: Mapping[str, Any], pattern: str) -> dict[str, jax.Array]:
    """The parameters that have a slow copy, by path: those whose whole path matches the regex."""
    return {p: x for p, x in traverse_util.flatten_dict(variables["params"], sep="/").items() if re.fullmatch(pattern, p)}


def replaced(variables: Mapping[str, Any], teacher: Mapping[str, jax.Array]) -> dict[str, Any]:
    """``variables`` with the slow copy in place of what it shadows."""
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    return {**variables, "params": traverse_util.unflatten_dict({**params, **teacher}, sep="/")}


def lerp(teacher: Any, student: Any, momentum: float) -> Any:
    """momentum * teacher + (1 - momentum) * student, leaf by leaf, without gradient."""
    return jax.tree.map(lambda t, s: momentum * t + (1 - momentum) * jax.lax.stop_gradient(s).astype(t.dtype), teacher, student)


def make_queues(size: int, width: int) -> dict[str, jax.Array]:
    """Random unit rows for images and texts [size, width], ids that no sample has, and where to write next."""
    def rows(seed):
        x = jax.random.normal(jax.random.key(seed), (size, width), jnp.float32)
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    return {"image_queue": rows(1), "text_queue": rows(2), "id_queue": jnp.full((size,), -100, jnp.int32), "pointer": jnp.int32(0)}


def enqueue(queues: Mapping[str, jax.Array], image: jax.Array, text: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
    """The queues after the features [b, width] and ids [b] of a step were written over the oldest rows."""
    size, rows = queues["image_queue"].shape[0], image.shape[0]
    if rows > size:
        raise ValueError(f"queue={size} is smaller than the batch of {rows}; nearest: {rows}")
    at = (queues["pointer"] + jnp.arange(rows)) % size
    return {"image_queue": queues["image_queue"].at[at].set(image), "text_queue": queues["text_queue"].at[at].set(text),
            "id_queue": queues["id_queue"].at[at].set(ids), "pointer": ((queues["pointer"] + rows) % size).astype(jnp.int32)}


def momentum_contrastive(image: jax.Array, text: jax.Array, image_teacher: jax.Array, text_teacher: jax.Array,
                         queues: Mapping[str, jax.Array], temp: jax.Array, alpha: jax.Array | float, *,
                         ids: jax.Array | None = None, group: int = 0) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Image-text contrastive loss with soft targets.

    image, text and their teachers: unit rows [b, e]. temp: what similarities are divided by. alpha: share of the teacher's
    distribution in the target. ids int [b]: keys of the same id, also in the queue, are positives (retrieval fine-tuning); None: the own key.
    group: rows see the keys of their own group of so many rows alone, as where each of the official code's GPUs had so many; 0: all.

    Returns (loss, {"image_to_text", "text_to_image": similarities [b, b] of students with the batch's teachers, over temp}).
    """
    rows = image.shape[0]
    image_teacher, text_teacher = jax.lax.stop_gradient((image_teacher, text_teacher))
    same = jnp.eye(rows, dtype=bool) if ids is None else ids[:, None] == ids
    queued = jnp.zeros((rows, len(queues["id_queue"])), bool) if ids is None else ids[:, None] == queues["id_queue"]
    visible = ~other_groups(rows, group)
    own = jnp.concatenate([same & visible, queued], 1).astype(jnp.float32)
    own = own / own.sum(1, keepdims=True)

    def direction(query, query_teacher, key_teacher, queue):
        keys = jnp.concatenate([key_teacher, queue]).T
        seen = jnp.concatenate([visible, jnp.ones((rows, queue.shape[0]), bool)], 1)
        similarity = query @ keys / temp
        taught = jax.lax.stop_gradient(query_teacher @ keys / temp)
        soft = jax.nn.softmax(taught, axis=1, where=seen)
        target = alpha * soft + (1 - alpha) * own
        logp = jax.nn.log_softmax(jnp.where(seen, similarity, -jnp.inf), axis=1)
        return -jnp.sum(target * jnp.where(seen, logp, 0), axis=1).mean(), similarity[:, :rows]

    i2t, image_to_text = direction(image, image_teacher, text_teacher, queues["text_queue"])
    t2i, text_to_image = direction(text, text_teacher, image_teacher, queues["image_queue"])
    return (i2t + t2i) / 2, {"image_to_text": image_to_text, "text_to_image": text_to_image}


def other_groups(rows: int, group: int) -> jax.Array:
    """bool [rows, rows]: True where two rows are of different groups of ``group`` rows; 0: never. Raises ValueError
    for a size that does not divide the rows."""
    if group and rows % group:
        raise ValueError(f"group={group} does not divide the batch of {rows}")
    which = jnp.arange(rows) // (group or rows)
    return which[:, None] != which
