"""Beam search with the conventions of the field's reference (Hugging Face, early_stopping=False)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.decode import choose
from vlm_jax.decode.cache import gather_rows
from vlm_jax.errors import nearest

RULES = ("log_probability", "open_clip", "transformers_4.15", "transformers_4.33", "unilm")


class _Beams(NamedTuple):
    position: jax.Array                                     # [] ids that stand in ``text``
    text: jax.Array                                         # [b,k,L] running hypotheses
    total: jax.Array                                        # [b,k] their log-probability, falling
    ended: jax.Array                                        # [b,k,L] the best ended hypotheses
    score: jax.Array                                        # [b,k] their score, falling; -inf: none
    closed: jax.Array                                       # [b] bool: nothing better can come
    cache: Any


def search(prefill: Callable, extend: Callable, prompt: jax.Array, *, beams: int, max_length: int, min_length: int,
           length_penalty: float, repetition_penalty: float, eos_ids: tuple[int, ...], pad_id: int,
           batch_axis: Any, rule: str = "log_probability") -> dict[str, jax.Array]:
    """Keeps the ``beams`` likeliest unfinished texts of each row; returns its best finished one.

    Arguments and result as in ``generate``. Each step ranks all continuations by total
    log-probability. Those among the first ``beams`` that end (or reach ``max_length``) compete
    for the ``beams`` places of ended texts by score = total / continued ids ** length_penalty;
    the best ``beams`` that do not end run on. A row closes when its places are full and the best
    running text, scored at its present length, does not beat the worst of them: a heuristic for
    length_penalty > 0, where a longer text may still score higher.

    ``rule`` "open_clip" ranks as ``CoCa.generate`` of open_clip 3 does, so that captions are its own: raw logits are
    summed, not log-probabilities; the prompt counts as length; at ``max_length`` the running texts compete
    beside those that end there; a row closes by its best continuation, ended ones included.
    "transformers_4.15" ranks as that release does, with which BLIP's captions were made: as "open_clip", but
    log-probabilities are summed, and the end does not count as length. "transformers_4.33" (BLIP-2, InstructBLIP) is the same, but a row closes by what its
    best continuation would score with its new id counted.
    "unilm" ranks as microsoft/unilm's captioning does (beit3 ``engine_for_finetuning.py``): log-probabilities; the prompt and the end count as
    length; a text ends wherever an end comes before ``beams`` that run on; one ended text is kept, and a row closes when no running one could
    beat it if it were ``max_length`` - 1 long; texts are cut one id short of ``max_length``: the last id counts in the score, and an end stands in its place.
    """
    if rule not in RULES:
        raise ValueError(f"beam_rule={rule!r} is not known{nearest(rule, RULES)}")
    theirs = rule != "log_probability"
    limit = max_length - (rule == "unilm")
    if limit <= prompt.shape[1]:
        raise ValueError(f"max_length={max_length} leaves beam_rule={rule!r} no room after a prompt of {prompt.shape[1]} ids; nearest: {prompt.shape[1] + 2}")
    ends = jnp.array(eos_ids, jnp.int32)
    batch, start = prompt.shape
    first_row = jnp.arange(batch)[:, None] * beams          # of each example, in the flat [b*k] order

    def best_of(score, ended, more, texts):
        """The ``beams`` best of [b,k] scores with their texts [b,k,L] and of others."""
        score, kept = jax.lax.top_k(jnp.concatenate([score, more], axis=1), beams)
        return score, jnp.take_along_axis(jnp.concatenate([ended, texts], axis=1), kept[:, :, None], axis=1)

    def advance(state: _Beams, logits) -> tuple[_Beams, jax.Array]:
        """Adds one id to every hypothesis. Also returns which row [b*k] each one came from."""
        vocab = logits.shape[-1]
        logits = logits.astype(jnp.float32)
        scores = (logits if rule == "open_clip" else jax.nn.log_softmax(logits)).reshape(batch, beams, vocab)
        scores = choose.penalise_repetition(scores, state.text, state.position, repetition_penalty)
        scores = choose.forbid_early_end(scores, state.position, min_length, eos_ids)
        totals = (state.total[:, :, None] + scores).reshape(batch, beams * vocab)
        # Every beam has len(eos_ids) continuations that end, so this many hold `beams` that do not.
        # The barrier keeps its slices apart from later ones: else XLA sorts all continuations on CPUs, thirty times as long.
        totals, index = jax.lax.optimization_barrier(jax.lax.top_k(totals, min((1 + len(eos_ids)) * beams, beams * vocab)))
        source, token = index // vocab, (index % vocab).astype(jnp.int32)
        text = jnp.take_along_axis(state.text, source[:, :, None], axis=1).at[:, :, state.position].set(token)
        position = state.position + 1
        last = position == limit
        stops = jnp.isin(token, ends) | (last & (not theirs))
        total, best = jax.lax.top_k(jnp.where(stops, -jnp.inf, totals), beams)
        running = jnp.take_along_axis(text, best[:, :, None], axis=1)

        counted = {"log_probability": position - start, "transformers_4.15": position - 1, "transformers_4.33": position - 1}.get(rule, position)
        length = counted.astype(jnp.float32) ** length_penalty
        rows = first_row + jnp.take_along_axis(source, best, axis=1)
        if rule == "unilm":
            ends_here = jnp.isin(token, ends)
            closed = state.closed | (totals[:, 0] / (max_length - 1) ** length_penalty <= state.score[:, 0])
            before = jnp.cumsum(~ends_here, axis=1) - ~ends_here      # candidates that run on and are likelier
            may_end = (last | ends_here & (before < beams)) & ~closed[:, None]
            cut = text.at[:, :, state.position].set(jnp.where(ends_here, token, ends[0]))
            score, ended = best_of(state.score, state.ended, jnp.where(may_end, totals / length, -jnp.inf), cut)
            return _Beams(position, running, total, ended, score, closed, state.cache), rows.reshape(-1)
        may_end = stops & (jnp.arange(totals.shape[1]) < beams) & ~state.closed[:, None]
        score, ended = best_of(state.score, state.ended, jnp.where(may_end, totals / length, -jnp.inf), text)
        attainable = position.astype(jnp.float32) ** length_penalty if rule == "transformers_4.33" else length
        closed = state.closed | ((totals if theirs else total)[:, 0] / attainable <= score[:, -1])
        if theirs:
            whole = position.astype(jnp.float32) ** length_penalty
            score, ended = best_of(score, ended, jnp.where(last & ~closed[:, None], total / whole, -jnp.inf), running)
        return _Beams(position, running, total, ended, score, closed, state.cache), rows.reshape(-1)

    def step(carry):
        state, rows = carry
        cache = gather_rows(state.cache, rows, batch_axis)
        token = jax.lax.dynamic_slice_in_dim(state.text, state.position - 1, 1, axis=2)
        logits, _, cache = extend(cache, token.reshape(batch * beams, 1))
        return advance(state._replace(cache=cache), logits if logits.ndim == 2 else logits[:, -1])

    logits, _, cache = prefill(prompt)
    copies = jnp.repeat(jnp.arange(batch), beams)
    text = jnp.full((batch, beams, max_length), pad_id, jnp.int32).at[:, :, :start].set(prompt[:, None])
    # The copies of a prompt are one hypothesis: only the first may continue.
    total = jnp.full((batch, beams), -jnp.inf).at[:, 0].set(0.0)
    state = _Beams(jnp.int32(start), text, total, text, jnp.full((batch, beams), -jnp.inf), jnp.zeros(batch, bool),
                   gather_rows(cache, copies, batch_axis))
    logits = logits if logits.ndim == 2 else logits[:, -1]
    carry = advance(state, jnp.repeat(logits, beams, axis=0))
    state, _ = jax.lax.while_loop(lambda c: (c[0].position < limit) & ~jnp.all(c[0].closed), step, carry)
    return {"text": state.ended[:, 0], "score": state.score[:, 0]}
