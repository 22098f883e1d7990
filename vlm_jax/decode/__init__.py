"""Autoregressive decoding over an opaque key-value cache.

A family hands over two functions; decoding never looks inside the cache::

    prefill(prompt int32 [b,p])          -> (logits [b,V], states, cache)
    extend(cache, tokens int32 [n,k])    -> (logits [n,k,V] or [n,V], states, cache)

* ``logits`` score the id that follows the last token given; of ``[n,k,V]`` the last row is read.
* ``states`` are the family's own (hidden states, or ``()``); decoding ignores them.
* ``cache`` is any pytree. ``prefill`` returns it at its final size (room for ``max_length``
  tokens) and ``extend`` with the same structure, shapes and dtypes. Positions belong to the
  family: the cache carries its own counter where one is needed.
* Beam search calls ``extend`` with ``n = b * beams`` rows, row-major (the beams of an example lie
  together) and permutes the cache by rows: ``batch_axis`` says which axis of each leaf that is.
  What all beams of an example read, image memory or the keys of what came before, need not be moved
  nor repeated (axis -1) where the family's attention lets rows beside each other look at one
  (``nn.attention.attend_cached``, ``attend_parts``).

``generate`` is pure and jit-able: static shapes, one ``lax.while_loop``, early stop when every
row is done.
"""

from vlm_jax.decode.loop import METHODS, generate

__all__ = ["METHODS", "generate"]
