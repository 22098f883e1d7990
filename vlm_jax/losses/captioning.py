"""Next-token loss that never holds the logits of a whole batch.

Per token with state h, vocabulary matrix W [d, V], target y and label smoothing s:

    l = h W,   nll = logsumexp(l) - (1 - s) l_y - s mean(l),   d nll / d l = softmax(l) - (1 - s) 1_y - s / V

Tokens are met chunk by chunk on the device that owns them (states are never gathered); a chunk
sees the whole vocabulary, so its gradient needs nothing from other chunks. Two functions differ
in when that gradient is formed:

``captioning``   the batch's sum, a scalar. Whatever weight the caller puts on it is one number, so
                 the gradient is formed in the forward pass and scaled later: no logits twice.
``caption_nll``  one sum per example. The gradient of W mixes the examples with weights known only
                 in the backward pass, so logits are formed anew there: exact for any weighting.
                 For towers run in rematerialised micro-batches (which compute it all twice anyway)
                 and for scoring.

Divide by the number of valid tokens of the global batch outside: sum(nll) / sum(tokens). (open_clip
divides by each device's own count, which weighs a token by where it happens to live.)
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from vlm_jax.losses import tiles
from vlm_jax.partitioning import ring

CHUNK = 512


def captioning(states: jax.Array, vocab: jax.Array, targets: jax.Array, mask: jax.Array, *,
               chunk: int = CHUNK, label_smoothing: float = 0.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the global batch: (negative log-likelihood in nats, valid tokens, correct tokens).

    states: [b, l, d] float; the product with ``vocab`` [d, V] runs in the dtype of ``states``, its
    sums and the softmax in float32. targets: int [b, l], the id that position predicts (already
    shifted). mask: bool [b, l], True where the target counts; other targets may hold anything.
    chunk: tokens whose logits are alive at a time on a device. A token is correct when its target's
    logit is above every other; counts are float32 and carry no gradient.
    Raises ValueError on shapes that disagree.
    """
    _check(states, vocab, targets, mask)
    nll, correct = _total(chunk, label_smoothing, states, vocab, targets, mask)
    return nll, mask.sum(dtype=jnp.float32), correct


def caption_nll(states: jax.Array, vocab: jax.Array, targets: jax.Array, mask: jax.Array, *,
                chunk: int = CHUNK, label_smoothing: float = 0.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same sums per example: three float32 arrays [b]. Arguments as in ``captioning``."""
    _check(states, vocab, targets, mask)
    nll, correct = _each(chunk, label_smoothing, states, vocab, targets, mask)
    return nll, mask.sum(1, dtype=jnp.float32), correct


def _check(states, vocab, targets, mask):
    b, l, d = states.shape
    for name, shape, right in (("vocab", vocab.shape[:1], (d,)), ("targets", targets.shape, (b, l)),
                               ("mask", mask.shape, (b, l))):
        if shape != right:
            raise ValueError(f"{name} {shape} does not fit states {states.shape}; nearest: {right}")


def _token_losses(states, vocab, targets, smoothing):
    """A chunk of tokens [t, d] -> (nll [t], correct [t]) and what the gradient needs of the logits [t, V]."""
    logits = jnp.einsum("td,dv->tv", states, vocab.astype(states.dtype), preferred_element_type=jnp.float32)
    # A comparison, not a gather: it stays local where the vocabulary is split over devices.
    hot = targets[:, None] == jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1)
    own = jnp.where(hot, logits, 0).sum(1)
    peak = logits.max(1)
    lse = peak + jnp.log(jnp.exp(logits - peak[:, None]).sum(1))
    nll = lse - (1 - smoothing) * own - smoothing * logits.mean(1)
    correct = own > jnp.where(hot, -jnp.inf, logits).max(1)
    return nll, correct, (logits, lse, hot)


def _values(chunk, smoothing, states, vocab, targets, mask):
    """One device's rows -> per example (nll [n], correct [n])."""
    def meet(_, tokens):
        return None, _token_losses(tokens[0], vocab, tokens[1], smoothing)[:2]

    tokens = (states.reshape(-1, states.shape[-1]), targets.reshape(-1))
    _, sums = jax.lax.scan(meet, None, tiles.cut(tokens, chunk))
    return tuple(_per_example(x, mask) for x in tiles.join(sums, targets.size))


def _per_example(tokens, mask):
    return jnp.where(mask, tokens.reshape(mask.shape), 0).sum(1, dtype=jnp.float32)


def _gradients(peers, chunk, smoothing, states, vocab, targets, mask, weights):
    """As ``_values``, and the gradients of sum(weights * nll): to states, and to vocab (over all peers).

    weights: [n, l] float32, zero where mask is.
    """
    def meet(d_vocab, tokens):
        states, targets, weights = tokens
        nll, correct, (logits, lse, hot) = _token_losses(states, vocab, targets, smoothing)
        d_logits = jnp.exp(logits - lse[:, None]) - (1 - smoothing) * hot - smoothing / vocab.shape[1]
        d_logits = (weights[:, None] * d_logits).astype(states.dtype)
        d_vocab += jnp.einsum("td,tv->dv", states, d_logits, preferred_element_type=jnp.float32)
        return d_vocab, (nll, correct, jnp.einsum("tv,dv->td", d_logits, vocab.astype(states.dtype)))

    tokens = (states.reshape(-1, states.shape[-1]), targets.reshape(-1), weights.reshape(-1))
    start = peers.varying(jnp.zeros(vocab.shape, jnp.float32))
    d_vocab, out = jax.lax.scan(meet, start, tiles.cut(tokens, chunk))
    nll, correct, d_states = tiles.join(out, targets.size)
    sums = (_per_example(nll, mask), _per_example(correct, mask))
    return sums, d_states.reshape(states.shape), peers.sum(d_vocab).astype(vocab.dtype)


SPLIT = ("batch", "none", "batch", "batch")  # states, vocab, targets, mask


# ---- one sum

@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(chunk, smoothing, *arrays):
    def local(peers, *arrays):
        return peers.sum(tuple(x.sum() for x in _values(chunk, smoothing, *arrays)))
    return ring(local, SPLIT, "none")(*arrays)


def _total_forward(chunk, smoothing, *arrays):
    def local(peers, states, vocab, targets, mask):
        sums, *gradients = _gradients(peers, chunk, smoothing, states, vocab, targets, mask, mask.astype(jnp.float32))
        return peers.sum(tuple(x.sum() for x in sums)), *gradients
    sums, *gradients = ring(local, SPLIT, ("none", "batch", "none"))(*arrays)
    return sums, gradients


def _total_backward(chunk, smoothing, gradients, cotangents):
    return *((cotangents[0] * g).astype(g.dtype) for g in gradients), None, None


_total.defvjp(_total_forward, _total_backward)


# ---- a sum per example

@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _each(chunk, smoothing, *arrays):
    return ring(lambda peers, *arrays: _values(chunk, smoothing, *arrays), SPLIT, "batch")(*arrays)


def _each_forward(chunk, smoothing, *arrays):
    return _each(chunk, smoothing, *arrays), arrays


def _each_backward(chunk, smoothing, arrays, cotangents):
    def local(peers, states, vocab, targets, mask, cotangent):
        weights = jnp.where(mask, cotangent[:, None], 0)
        return _gradients(peers, chunk, smoothing, states, vocab, targets, mask, weights)[1:]
    return *ring(local, (*SPLIT, "batch"), ("batch", "none"))(*arrays, cotangents[0]), None, None


_each.defvjp(_each_forward, _each_backward)
