"""``generate``: one entry for greedy search, sampling and beam search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.decode import beam, choose
from vlm_jax.errors import nearest

METHODS = ("greedy", "beam", "sample")


def generate(prefill: Callable, extend: Callable, prompt: jax.Array, *, method: str = "greedy", beams: int = 1,
             max_length: int, min_length: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             length_penalty: float = 1.0, repetition_penalty: float = 1.0, eos_ids: int | tuple[int, ...],
             pad_id: int, key: jax.Array | None = None, batch_axis: Any = 0, beam_rule: str = "log_probability") -> dict[str, jax.Array]:
    """Continues each prompt until an end or ``max_length``.

    Args:
        prefill, extend: see ``vlm_jax.decode``.
        prompt: int32 [b,p] ids every text starts with, p >= 1 (for captions a column of bos ids).
        method: "greedy" (the likeliest id), "beam" (see ``beam.search``), "sample".
        beams: hypotheses per row; read by "beam" alone.
        max_length: ids in the result, prompt and end included. A text that reaches it without an
            end is cut, not marked.
        min_length: ends are forbidden while fewer ids than this stand, prompt included.
        temperature, top_k, top_p: read by "sample" alone; see ``choose.truncate``.
        length_penalty: exponent of the length that scores are divided by; "beam" ranks by it.
        repetition_penalty: see ``choose.penalise_repetition``. 1 is off.
        eos_ids: the ids that end a text, each on its own.
        pad_id: fills the text after its end.
        key: PRNG key; "sample" needs one.
        batch_axis: the rows' axis in the cache; see ``cache.gather_rows``.
        beam_rule: what "beam" ranks by, a name in ``beam.RULES``; see ``beam.search``.

    Returns:
        ``text`` int32 [b,max_length]: prompt, continuation, its end, padding.
        ``score`` float32 [b]: the model's log-probability of the continuation (its end included)
        divided by its number of ids ** length_penalty. Penalties, temperature and cuts change
        which ids are chosen but not how they are scored, except in beam search, whose ranking is
        by penalised log-probabilities.

    Raises:
        ValueError: naming the argument, its value and the nearest valid one.
    """
    eos_ids = (eos_ids,) if isinstance(eos_ids, int) else tuple(int(i) for i in eos_ids)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is no decoding method{nearest(method, METHODS)}")
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt of shape {prompt.shape} is not [batch, length] with length 1 or more")
    if max_length <= prompt.shape[1]:
        raise ValueError(f"max_length={max_length} leaves no room after a prompt of {prompt.shape[1]} ids; nearest: "
                         f"{prompt.shape[1] + 1}")
    if not eos_ids:
        raise ValueError("eos_ids=() gives a text no end; nearest: the tokenizer's (eos_id,)")
    if min_length > max_length:
        raise ValueError(f"min_length={min_length} is above max_length; nearest: {max_length}")
    if beams < 1:
        raise ValueError(f"beams={beams} is not positive; nearest: 1")
    if method == "sample":
        if key is None:
            raise ValueError("key=None: method='sample' draws from a PRNG key; nearest: jax.random.key(0)")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} is not positive; nearest: method='greedy'")
        if top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(f"top_k={top_k}, top_p={top_p}: top_k is 0 (all) or more, top_p in (0, 1]")
    prompt = prompt.astype(jnp.int32)
    if method == "beam":
        return beam.search(prefill, extend, prompt, beams=beams, max_length=max_length, min_length=min_length,
                           length_penalty=length_penalty, repetition_penalty=repetition_penalty, eos_ids=eos_ids,
                           pad_id=pad_id, batch_axis=batch_axis, rule=beam_rule)

    def pick(logits, text, position):
        logits = choose.penalise_repetition(logits, text, position, repetition_penalty)
        logits = choose.forbid_early_end(logits, position, min_length, eos_ids)
        if method == "greedy":
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return choose.draw(jax.random.fold_in(key, position), logits, temperature, top_k, top_p)

    return _single(prefill, extend, prompt, pick, max_length, length_penalty, eos_ids, pad_id)


class _Rows(NamedTuple):
    position: jax.Array                                     # [] ids that stand in ``text``
    text: jax.Array                                         # [b,max_length]
    total: jax.Array                                        # [b] log-probability so far
    length: jax.Array                                       # [b] ids continued so far
    done: jax.Array                                         # [b] bool
    cache: Any


def last_logits(logits: jax.Array) -> jax.Array:
    """[n,k,V] or [n,V] -> the last [n,V], in float32."""
    return (logits if logits.ndim == 2 else logits[:, -1]).astype(jnp.float32)


def _single(prefill, extend, prompt, pick, max_length, length_penalty, eos_ids, pad_id):
    """The loop of greedy search and sampling: one hypothesis per row."""
    ends = jnp.array(eos_ids, jnp.int32)
    batch, start = prompt.shape

    def append(rows: _Rows, logits) -> _Rows:
        token = jnp.where(rows.done, pad_id, pick(logits, rows.text, rows.position))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        return _Rows(rows.position + 1, rows.text.at[:, rows.position].set(token),
                     rows.total + jnp.where(rows.done, 0.0, chosen), rows.length + ~rows.done,
                     rows.done | jnp.isin(token, ends), rows.cache)

    def step(rows: _Rows) -> _Rows:
        token = jax.lax.dynamic_slice_in_dim(rows.text, rows.position - 1, 1, axis=1)
        logits, _, cache = extend(rows.cache, token)
        return append(rows._replace(cache=cache), last_logits(logits))

    logits, _, cache = prefill(prompt)
    text = jnp.full((batch, max_length), pad_id, jnp.int32).at[:, :start].set(prompt)
    rows = _Rows(jnp.int32(start), text, jnp.zeros(batch), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool), cache)
    rows = append(rows, last_logits(logits))
    rows = jax.lax.while_loop(lambda r: (r.position < max_length) & ~jnp.all(r.done), step, rows)
    return {"text": rows.text, "score": rows.total / rows.length.astype(jnp.float32) ** length_penalty}
