"""Attention: one dispatcher over kernels, and the layer with its key-value cache.

Masks are boolean, True = may attend, broadcastable to [b, h, q, k]. A query that may attend to
nothing yields zeros, never NaN.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import nearest
from vlm_jax.nn import initializers
from vlm_jax.nn.lora import LowRank, low_rank
from vlm_jax.nn.narrow import Stored, multiply, stored
from vlm_jax.partitioning import current_sizes, gather, shard, spec

log = logging.getLogger("vlm_jax.attention")

AMPERE = 8.0           # the first compute capability with bfloat16 and cuDNN's flash attention
CAUSAL = ("none", "causal")
QK_NORMS = ("none", "rms")
TPU_BLOCK = 128        # the Pallas kernel's tile; lengths are padded to a multiple of it
TPU_MIN_LENGTH = 256   # below it padding to the tile costs more than the score matrix it saves


def choose(backend: str, dtype: Any, head_dim: int, q_len: int, kv_len: int, masked: bool,
           capability: float | None = None) -> tuple[str, str]:
    """Which kernel computes an attention, and why: ("cudnn" | "pallas" | "xla", reason).

    ``backend`` is jax's name ("cpu", "gpu", "tpu"), ``masked`` says that a mask other than the
    causal one is given, ``capability`` is the CUDA compute capability (8.0 = Ampere).
    """
    dtype = jnp.dtype(dtype)
    if backend == "gpu":
        if capability is None or capability < AMPERE:
            return "xla", f"cuDNN flash attention needs compute capability {AMPERE}, this device has {capability}"
        if dtype not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
            return "xla", f"cuDNN flash attention takes bfloat16 and float16, not {dtype}"
        if head_dim % 8 or head_dim > 128:
            return "xla", f"cuDNN flash attention needs a head_dim that is a multiple of 8 up to 128, not {head_dim}"
        if masked:
            return "xla", "cuDNN would turn an arbitrary mask into a full-size bias"
        return "cudnn", f"cuDNN flash attention on {dtype}, head_dim {head_dim}"
    if backend == "tpu":
        if masked:
            return "xla", "the Pallas kernel takes no arbitrary mask"
        if head_dim > TPU_BLOCK and head_dim % TPU_BLOCK:
            return "xla", f"the Pallas kernel needs head_dim up to {TPU_BLOCK} or a multiple of it, not {head_dim}"
        if min(q_len, kv_len) < TPU_MIN_LENGTH:
            return "xla", f"lengths {q_len}x{kv_len} are below {TPU_MIN_LENGTH}: padding to {TPU_BLOCK} would cost more"
        return "pallas", f"Pallas flash attention, lengths {q_len}x{kv_len} padded to multiples of {TPU_BLOCK}"
    return "xla", f"no fused kernel on {backend}"


@functools.cache
def _log_once(name: str, reason: str) -> None:
    log.info("attention: %s (%s)", name, reason)


def target() -> str:
    """The backend that is compiled for: the mesh's, which may be hardware that is not here, or the default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def cuda_capability() -> float | None:
    """The compute capability of the device, None where it is not CUDA's."""
    value = getattr(jax.devices()[0], "compute_capability", None)
    try:
        return float(value)
    except (TypeError, ValueError):  # not CUDA
        return None


class Drop(NamedTuple):
    """Attention weights are left out with probability ``rate``, by ``key``."""
    rate: float
    key: jax.Array


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, causal: str = "none",
           drop: Drop | None = None, bias: jax.Array | None = None, scale: float | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v. q [b, q, h, d], k and v [b, k, h, d] -> [b, q, h, d].

    ``causal`` "causal" lets query i see keys 0..i. ``bias`` [h, q, k] is added to the logits, ``scale`` stands for 1/sqrt(d).
    With ``drop``, which needs the weights themselves, with a bias or a scale no fused kernel is used. The kernel and the reason
    for it are logged once for each distinct choice, to the logger ``vlm_jax.attention``.
    """
    if causal not in CAUSAL:
        raise ValueError(f"causal={causal!r} is not known{nearest(causal, CAUSAL)}")
    if drop is not None or bias is not None or scale is not None:
        return attend_xla(q, k, v, mask, causal, drop, bias, scale)
    backend = target()
    name, reason = choose(backend, q.dtype, q.shape[-1], q.shape[1], k.shape[1], mask is not None,
                          cuda_capability() if backend == "gpu" else None)
    _log_once(name, reason)
    if name == "cudnn":
        return attend_even(q, k, v, causal)
    if name == "pallas":
        return per_device(functools.partial(attend_padded, causal=causal))(q, k, v)
    return attend_xla(q, k, v, mask, causal)


def attend_even(q: jax.Array, k: jax.Array, v: jax.Array, causal: str = "none") -> jax.Array:
    """cuDNN's kernel, which has a gradient for even lengths alone: odd ones get a row, or a key that no row looks at, more. Shapes as ``attend``."""
    rows, keys = q.shape[1], k.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    hidden = keys % 2 and (causal == "none" or rows > keys)      # else what is causal hides it
    lengths = dict(key_value_seq_lengths=jnp.full(len(k), keys, jnp.int32)) if hidden else {}
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal == "causal", implementation="cudnn", **lengths)[:, :rows]


def attend_xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, causal: str = "none",
               drop: Drop | None = None, bias: jax.Array | None = None, scale: float | None = None) -> jax.Array:
    """The reference: plain matrix products around an fp32 softmax. Shapes as ``attend``."""
    weights = attention_weights(q, k, mask, causal, bias, scale)
    if drop is not None:
        weights = jnp.where(jax.random.bernoulli(drop.key, 1 - drop.rate, weights.shape), weights / (1 - drop.rate), 0)
    return weigh(weights, v)


def attention_weights(q: jax.Array, k: jax.Array, mask: jax.Array | None = None, causal: str = "none", bias: jax.Array | None = None,
                      scale: float | None = None) -> jax.Array:
    """q [b, q, h, d], k [b, k, h, d], bias [h, q, k] that logits get -> fp32 [b, h, q, k], rows of sum 1 (0 for a row without any key)."""
    q, k = (x.transpose(0, 2, 1, 3) for x in (q, k))
    logits = jnp.einsum("bhqd,bhkd->bhqk", q * (q.shape[-1] ** -0.5 if scale is None else scale), k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if causal == "causal":
        order = jnp.arange(k.shape[2])[None, :] <= jnp.arange(q.shape[2])[:, None]
        mask = order if mask is None else mask & order
    return normalised(logits, mask)


def normalised(logits: jax.Array, mask: jax.Array | None) -> jax.Array:
    """fp32 [b, h, q, k] -> weights, rows of sum 1 (0 for a row without any key)."""
    if mask is None:
        return jax.nn.softmax(logits, axis=-1)
    weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.where(mask, weights, 0)      # a row without any key would be uniform


def weigh(weights: jax.Array, v: jax.Array) -> jax.Array:
    """weights [b, h, q, k], v [b, k, h, d] -> [b, q, h, d]."""
    return jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def attend_parts(q: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array]], mask: jax.Array, bias: jax.Array | None = None,
                 scale: float | None = None) -> jax.Array:
    """``attend_xla`` to keys and values that lie in several arrays [m, k, h, d], as to one of them behind the other. Where m is less than the rows b of q,
    b/m rows beside each other (the beams of an example) look at the same ones, which are read once for them. mask [b, h, q, all of k], bias
    [h, q, all of k]."""
    def beside(x, rows):      # [b, h, q, ...] -> [m, h, b/m, q, ...]
        return x.reshape(rows, -1, *x.shape[1:]).swapaxes(1, 2)

    heads_first = [(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)) for k, v in parts]
    q = q.transpose(0, 2, 1, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = [jnp.einsum("mhnqd,mhkd->mnhqk", beside(q, len(k)), k, preferred_element_type=jnp.float32) for k, _ in heads_first]
    logits = jnp.concatenate([x.reshape(*q.shape[:3], -1) for x in logits], -1)
    weights = normalised(logits if bias is None else logits + bias.astype(jnp.float32), mask)
    ends = np.cumsum([k.shape[1] for k, _ in parts])[:-1]
    seen = [jnp.einsum("mhnqk,mhkd->mnqhd", beside(w, len(v)).astype(v.dtype), v, preferred_element_type=jnp.float32)
            for w, (_, v) in zip(jnp.split(weights, ends, -1), heads_first, strict=True)]
    return sum(x.reshape(len(q), *x.shape[2:]) for x in seen).astype(parts[0][1].dtype)


def pallas_kernel(q: jax.Array, k: jax.Array, v: jax.Array, segments: tuple[jax.Array, jax.Array], causal: str) -> jax.Array:
    """TPU flash attention on [b, h, l, d] with l a multiple of ``TPU_BLOCK``; equal segments attend."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash
    return flash.flash_attention(q, k, v, segment_ids=flash.SegmentIds(*segments), causal=causal == "causal",
                                 sm_scale=q.shape[-1] ** -0.5)


def attend_padded(q: jax.Array, k: jax.Array, v: jax.Array, causal: str = "none", block: int = TPU_BLOCK,
                  kernel: Callable[..., jax.Array] = pallas_kernel) -> jax.Array:
    """Runs ``kernel`` on lengths padded to multiples of ``block``. Shapes as ``attend``.

    Real positions form segment 1 and padding segment 0, so that neither sees the other.
    """
    def pad(x):
        x = x.transpose(0, 2, 1, 3)
        return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))

    def segments(x):
        real = jnp.arange(x.shape[1] + -x.shape[1] % block) < x.shape[1]
        return jnp.broadcast_to(real.astype(jnp.int32), (x.shape[0], real.shape[0]))

    out = kernel(pad(q), pad(k), pad(v), (segments(q), segments(k)), causal)
    return out[:, :, :q.shape[1]].transpose(0, 2, 1, 3)


def per_device(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Runs ``fn(q, k, v)`` on each device's own rows and heads: XLA cannot split a Pallas kernel itself."""
    sizes = current_sizes()
    if all(size == 1 for size in sizes.values()) or jax.sharding.get_abstract_mesh().manual_axes:
        return fn

    def run(q, k, v):
        lie = [spec(("batch", "length", "act_heads", "none"), x.shape, sizes) for x in (q, k, v)]
        # Rows and heads are independent and nothing is summed inside, so the check of varying
        # axes, which library kernels do not annotate, may be off.
        return jax.shard_map(fn, in_specs=tuple(lie), out_specs=lie[0], check_vma=False)(q, k, v)

    return run


class Map(NamedTuple):
    """A map to or from heads: its kernel, and its bias and adapter where it has them."""
    kernel: Stored
    bias: jax.Array | None
    adapter: LowRank | None


class Projection(nn.Module):
    """The parameters of one map to or from heads, without the product: ``kernel`` and ``bias``."""
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    bias_shape: tuple[int, ...]
    bias_axes: tuple[str, ...]
    kernel_init: Callable
    dtype: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self) -> Map:
        kernel = self.param("kernel", nn.with_logical_partitioning(self.kernel_init, self.axes), self.shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, self.bias_axes), self.bias_shape,
                              jnp.float32).astype(self.dtype)
        return Map(stored(self, kernel), bias, low_rank(self))


class Attention(nn.Module):
    """Multi-head attention with an optional key-value cache.

    Params ``query``, ``key``, ``value``: kernel [in, heads, head_dim], bias [heads, head_dim];
    ``out``: kernel [heads, head_dim, out], bias [out]. Self-attention multiplies with the three
    kernels joined; they are stored apart, so that each can be loaded, frozen or adapted.

    ``qk_norm`` "rms": queries and keys have unit RMS per head and logits a learned ``gain``
    [heads] that starts at 1.5, on top of 1/sqrt(head_dim).

    Fields:
      width: of the queries' input. kv_width: of the keys' input, if it differs.
      head_dim: default width / heads. out_width: default width.
      init_scheme, depth: see ``nn.initializers``.
      dropout: of the attention weights, where a stream of random keys "dropout" is given.
      key_bias: whether ``key`` has a bias where the others have one; softmax cancels it (EVA has none).
      scale: what logits are multiplied by, None for 1/sqrt(head_dim) (T5: 1).
    """
    width: int
    heads: int
    head_dim: int | None = None
    kv_width: int | None = None
    out_width: int | None = None
    use_bias: bool = True
    key_bias: bool = True
    scale: float | None = None
    qk_norm: str = "none"
    causal: str = "none"
    init_scheme: str = "torch"
    depth: int = 1
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def drop(self) -> Drop | None:
        return Drop(self.dropout, self.make_rng("dropout")) if self.dropout and self.has_rng("dropout") else None

    def setup(self):
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm={self.qk_norm!r} is not known{nearest(self.qk_norm, QK_NORMS)}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}; nearest: "
                             f"{min((h for h in range(1, self.width + 1) if self.width % h == 0), key=lambda h: abs(h - self.heads))}")
        head_dim = self.head_dim or self.width // self.heads
        inner = self.heads * head_dim

        def projection(width, use_bias=self.use_bias):
            return Projection((width, self.heads, head_dim), ("embed", "heads", "head_dim"), (self.heads, head_dim), ("heads", "head_dim"),
                              initializers.kernel(self.init_scheme, "qkv", width, inner, self.depth), self.dtype, use_bias)

        self.query = projection(self.width)
        self.key = projection(self.kv_width or self.width, self.use_bias and self.key_bias)
        self.value = projection(self.kv_width or self.width)
        out = self.out_width or self.width
        self.out = Projection((self.heads, head_dim, out), ("heads", "head_dim", "embed"), (out,), ("norm",),
                              initializers.kernel(self.init_scheme, "out", inner, out, self.depth), self.dtype, self.use_bias)
        if self.qk_norm == "rms":
            self.gain = self.param("gain", nn.with_logical_partitioning(nn.initializers.constant(1.5), ("heads",)),
                                   (self.heads,), jnp.float32)

    def __call__(self, x: jax.Array, memory: jax.Array | None = None, mask: jax.Array | None = None,
                 cache: dict[str, jax.Array] | None = None, index: jax.Array | None = None,
                 rotary: Rotary | None = None, bias: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """x [b, q, width] -> ([b, q, out_width], with a cache the keys and values of x, {"key", "value"} [b, q, h, d]).

        Args:
          memory: [b, k, kv_width], what to attend to; None: ``x`` itself.
          mask: True = may attend, to [b, h, q, k]; with a cache, k is the number of its places.
          cache: {"key", "value"} [b, length, h, d] of self-attention, in which x's stand at
            positions index, index + 1, ... (the caller writes them, with ``write``): queries see what stands up to
            themselves (``causal``) or up to x's last token. See ``attend_cached`` for memory. With {"before_key", "before_value"} [m, n, h, d]
            positions 0 .. n - 1 lie in these, for b/m rows of x beside each other; the others, from n on, in "key" and "value".
          index: int32 scalar or [b], position of x's first token. Writing beyond the cache's
            length, or before "key", is the caller's error: a scalar index is clamped, a vector's tokens are dropped (beyond) or wrap (before).
          rotary: how far self-attention's queries and keys are turned, of x's tokens (``rotary_angles``); the cache holds turned keys.
          bias: [h, q, k] of relative positions, which logits get.
        """
        if memory is not None:
            q, (k, v) = self.project_query(x), self.project_memory(memory)
            return self.merge(attend(q, k, v, mask, self.causal, self.drop(), bias, self.scale)), None
        q, k, v = self.project_self(x)
        if rotary is not None:
            q, k = turn(q, rotary), turn(k, rotary)
        if cache is None:
            return self.merge(attend(q, k, v, mask, self.causal, self.drop(), bias, self.scale)), None
        before = before_of(cache)
        keys, values = write(cache["key"], k, index - before), write(cache["value"], v, index - before)
        positions = jnp.reshape(jnp.asarray(index, jnp.int32), (-1, 1)) + jnp.arange(x.shape[1])  # [b or 1, q]
        last = positions if self.causal == "causal" else jnp.broadcast_to(positions[:, -1:], positions.shape)
        seen = (jnp.arange(before + keys.shape[1]) <= last[..., None])[:, None]                   # [b or 1, 1, q, length]
        mask = seen if mask is None else seen & mask
        if before:
            y = attend_parts(q, ((cache["before_key"], cache["before_value"]), (keys, values)), mask, bias, self.scale)
        else:
            y = attend(q, keys, values, mask, bias=bias, scale=self.scale)
        return self.merge(y), {"key": k, "value": v}

    def attend_cached(self, x: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None = None, shared: bool = False) -> jax.Array:
        """Attends to keys and values [b, k, h, d] that ``project_memory`` made earlier. ``shared``: there may be m of them, each those of b/m rows of x
        beside each other (the beams of an example); the mask is then to [m, h, 1, k]."""
        q = self.project_query(x)
        if len(keys) != len(q) and not shared:
            raise ValueError(f"{len(q)} rows look at {len(keys)} memories; nearest: a memory for each row")
        y = attend(q.reshape(len(keys), -1, *q.shape[2:]), keys, values, mask, drop=self.drop(), scale=self.scale)
        return self.merge(y.reshape(q.shape))

    def project_query(self, x: jax.Array) -> jax.Array:
        """[b, q, width] -> [b, q, h, d]."""
        return self.normalise_query(into_heads(x.astype(self.dtype), [self.query()])[0])

    def project_memory(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[b, k, kv_width] -> keys and values [b, k, h, d]."""
        k, v = into_heads(memory.astype(self.dtype), [self.key(), self.value()])
        return self.normalise_key(k), v

    def project_self(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = into_heads(x.astype(self.dtype), [self.query(), self.key(), self.value()])
        return self.normalise_query(q), self.normalise_key(k), v

    def normalise_query(self, q: jax.Array) -> jax.Array:
        return q if self.qk_norm == "none" else unit_rms(q, self.gain[:, None])

    def normalise_key(self, k: jax.Array) -> jax.Array:
        return k if self.qk_norm == "none" else unit_rms(k)

    def merge(self, x: jax.Array) -> jax.Array:
        """[b, q, h, d] -> [b, q, out_width]."""
        kernel, bias, adapter = self.out()
        y = from_heads(x.reshape(-1, x.shape[-2] * x.shape[-1]), kernel, self.dtype)
        y = y if adapter is None else y + adapter(x.reshape(-1, *x.shape[2:]))
        y = y if bias is None else y + bias
        return y.reshape(*x.shape[:2], -1)


def into_heads(x: jax.Array, maps: list[Map]) -> list[jax.Array]:
    """[b, l, in] -> [b, l, h, d] for each map: one product with all their kernels. They are joined along an axis
    of their own, so that heads may lie on different devices."""
    rows = x.reshape(-1, x.shape[-1])

    def product(rows, *kernels):
        return jnp.einsum("ti,inhd->tnhd", rows, gather(jnp.stack(kernels, 1), "embed", "none", "heads", "head_dim"))

    y = multiply(product, rows, [m.kernel for m in maps], x.dtype)
    biases = [m.bias for m in maps]
    if any(b is not None for b in biases):
        y = y + jnp.stack([jnp.zeros(y.shape[2:], y.dtype) if b is None else b for b in biases])
    if any(m.adapter is not None for m in maps):
        y = y + jnp.stack([jnp.zeros_like(y[:, i]) if m.adapter is None else m.adapter(rows) for i, m in enumerate(maps)], 1)
    y = y.reshape(*x.shape[:2], *y.shape[1:])
    return [shard(y[:, :, i], "batch", "length", "act_heads", "none") for i in range(len(maps))]


def from_heads(rows: jax.Array, kernel: Stored, dtype: Any) -> jax.Array:
    """[t, h * d] -> [t, out]."""
    return multiply(lambda rows, kernel: rows @ gather(kernel.reshape(-1, kernel.shape[-1]), "heads", "embed"), rows, [kernel], dtype)


class Rotary(NamedTuple):
    """Cosines and sines of the angles by which pairs of channels are turned, fp32 [b, l, 1, head_dim/2]."""
    cos: jax.Array
    sin: jax.Array


def rotary_angles(positions: jax.Array, head_dim: int, theta: float = 1e4) -> Rotary:
    """positions int [b, l] -> the turns of rotary positions (arXiv 2104.09864): angle i of head_dim/2 is position * theta^(-2i/head_dim)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def turn(x: jax.Array, rotary: Rotary) -> jax.Array:
    """x [b, l, h, d] turned; channel i of the first half pairs with channel i of the second (Hugging Face's layout, not Meta's)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * rotary.cos - second * rotary.sin, second * rotary.cos + first * rotary.sin], -1).astype(x.dtype)


def unit_rms(x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
    """Unit RMS along the last axis, times ``gain``; fp32 inside."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6) * gain).astype(x.dtype)


def before_of(cache: dict[str, jax.Array]) -> int:
    """How many tokens lie in "before_key", of one layer or of all."""
    return cache["before_key"].shape[-3] if "before_key" in cache else 0


def write(cache: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """cache [..., b, length, h, d], of one layer or of all, with new [..., b, k, h, d] at positions index, index + 1, ..."""
    new, index = new.astype(cache.dtype), jnp.asarray(index, jnp.int32)
    if index.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, index, axis=cache.ndim - 3)
    layers, rows = (slice(None),) * (cache.ndim - 4), jnp.arange(cache.shape[-4])[:, None]
    return cache.at[(*layers, rows, index[:, None] + jnp.arange(new.shape[-3]))].set(new, mode="drop")
