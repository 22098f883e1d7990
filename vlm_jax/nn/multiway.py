"""Transformer layers with experts by modality (VLMo, arXiv 2111.02358; BEiT-3, 2208.10442).

A ``Layout`` says which expert computes which tokens. It is static: the tokens of a segment are cut out, go through their own expert
alone and are joined again, so that each token is computed once, and nothing is dispatched. Attention looks at all tokens of the sequence,
whoever computed them.

What is split is a choice of the block: feed-forward parts alone (VLMo; BEiT-3 as in the paper, whose top layers have one joint expert),
everything, with projections and norms of attention too (BEiT-3 as released), or nothing, which is what experts are measured against.
Experts are sub-modules named by modality, with the axes that such a layer has anywhere: ``mlp/image/up/kernel``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.errors import nearest
from vlm_jax.nn import initializers
from vlm_jax.nn.attention import Projection, attend, attention_weights, from_heads, into_heads, weigh, write
from vlm_jax.nn.block import recomputed
from vlm_jax.nn.mlp import Mlp
from vlm_jax.nn.norm import Norm

SPLIT = ("shared", "split")      # one for all, or each expert's own
ALL = "all"      # what is one for all
DROPS = ("sequence", "expert")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """Segments of a sequence in order: (expert, number of tokens). An expert may come more than once."""
    segments: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, mask: Sequence[bool], experts: tuple[str, str] = ("text", "image")) -> Layout:
        """The layout of a token mask, alike for all rows: where it is False the first expert computes, where it is True the second (CogVLM's text and image
        experts: False for <bos>, True for the image, False for what is said of it)."""
        return cls(tuple((experts[bool(on)], len(list(run))) for on, run in itertools.groupby(mask)))

    @property
    def length(self) -> int:
        return sum(count for _, count in self.segments)

    def route(self, fn: Callable[[str, Any], Any], x: Any) -> Any:
        """``fn(expert, part)`` for each segment of x (arrays [b, length, ...]), joined again."""
        leaf = jax.tree.leaves(x)[0]
        if leaf.shape[1] != self.length:
            raise ValueError(f"a layout of {self.length} tokens {self.segments} does not fit a sequence of {leaf.shape[1]}")
        if len(self.segments) == 1:
            return fn(self.segments[0][0], x)
        out, start = [], 0
        for expert, count in self.segments:
            out.append(fn(expert, jax.tree.map(lambda a, at=start, n=count: a[:, at:at + n], x)))
            start += count
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *out)


def one(expert: str, length: int) -> Layout:
    """All ``length`` tokens by one expert."""
    return Layout(((expert, length),))


class Multiway(nn.Module):
    """A module for each of ``experts``, all made by ``make``; x [b, length, ...] goes through them as a layout says. With experts ()
    there is one for all, ``all``.

    Raises ValueError for a layout with an expert that it does not have.
    """
    make: Callable[[], nn.Module]
    experts: tuple[str, ...]

    def setup(self):
        for expert in self.experts or (ALL,):
            setattr(self, expert, self.make())

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        layout = layout if self.experts else one(ALL, layout.length)
        return layout.route(lambda expert, part: self.of(expert)(part), x)

    def of(self, expert: str) -> nn.Module:
        if expert not in (self.experts or (ALL,)):
            raise ValueError(f"expert {expert!r} is not one of this layer{nearest(expert, self.experts)}")
        return getattr(self, expert)


class Projections(nn.Module):
    """Maps to and from heads of one expert: query, key, value, out, and the norm before ``out`` where there is one."""
    width: int
    heads: int
    key_bias: bool
    sub_norm: float
    init_scheme: str
    depth: int
    dtype: Any

    def setup(self):
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        head_dim = self.width // self.heads

        def projection(use_bias):
            return Projection((self.width, self.heads, head_dim), ("embed", "heads", "head_dim"), (self.heads, head_dim), ("heads", "head_dim"),
                              initializers.kernel(self.init_scheme, "qkv", self.width, self.width, self.depth), self.dtype, use_bias)

        self.query, self.key, self.value = projection(True), projection(self.key_bias), projection(True)
        self.out = Projection((self.heads, head_dim, self.width), ("heads", "head_dim", "embed"), (self.width,), ("norm",),
                              initializers.kernel(self.init_scheme, "out", self.width, self.width, self.depth), self.dtype, True)
        if self.sub_norm:
            self.norm = Norm("layernorm", self.sub_norm)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[b, l, width] -> query, key, value [b, l, h, d]."""
        return tuple(into_heads(x.astype(self.dtype), [self.query(), self.key(), self.value()]))

    def merge(self, x: jax.Array) -> jax.Array:
        """[b, l, h, d] -> [b, l, width]."""
        kernel, bias, adapter = self.out()
        rows = x.reshape(*x.shape[:2], -1)
        rows = self.norm(rows) if self.sub_norm else rows
        rows = rows.reshape(-1, rows.shape[-1])
        y = from_heads(rows, kernel, self.dtype) + bias
        y = y if adapter is None else y + adapter(rows.reshape(-1, *x.shape[2:]))
        return y.reshape(*x.shape[:2], -1)


class MultiwayAttention(nn.Module):
    """Self-attention over all tokens, whose maps are one for all (``experts`` ()) or each modality's own."""
    experts: tuple[str, ...]
    maps: Mapping[str, Any]

    def setup(self):
        for expert in self.experts or (ALL,):
            setattr(self, expert, Projections(**self.maps))

    def of(self, expert: str) -> Projections:
        if self.experts and expert not in self.experts:
            raise ValueError(f"expert {expert!r} is not one of this layer{nearest(expert, self.experts)}")
        return getattr(self, expert if self.experts else ALL)

    def __call__(self, x: jax.Array, layout: Layout, mask: jax.Array | None, bias: jax.Array | None, cache: dict[str, jax.Array] | None,
                 index: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        layout = layout if self.experts else one(ALL, layout.length)
        q, k, v = layout.route(lambda expert, part: self.of(expert).project(part), x)
        new = None
        if cache is not None:
            new = {"key": k, "value": v}
            k, v = (write(cache[name], x, index) for name, x in new.items())
            if mask is None:
                position = jnp.reshape(jnp.asarray(index, jnp.int32), (-1, 1)) + jnp.arange(x.shape[1])
                mask = (jnp.arange(k.shape[1]) <= position[..., None])[:, None]      # each looks at what was written up to itself
        y = attend(q, k, v, mask) if bias is None else weigh(attention_weights(q, k, mask, bias=bias), v)
        return layout.route(lambda expert, part: self.of(expert).merge(part), y), new


class MultiwayBlock(nn.Module):
    """Pre-norm block: x += gamma1 attn(norm1 x); x += gamma2 mlp(norm2 x), with experts.

    Fields:
      experts: those of what is split.
      attention: "shared", one for all, or "split", with ``norm1`` and all maps by expert.
      feed_forward: the same of ``norm2`` and ``mlp``.
      layer_scale: what gamma1 and gamma2 (shared by the experts) start at, 0 for none.
      sub_norm: a LayerNorm before the last map of attention and of the feed-forward part.
      key_bias: whether keys have a bias (BEiT's have none).
      drop_path_by: a row's branch is dropped whole ("sequence"), or for each segment of the feed-forward part by itself ("expert").
    """
    width: int
    heads: int
    mlp_dim: int
    experts: tuple[str, ...]
    attention: str = "shared"
    feed_forward: str = "split"
    activation: str = "gelu"
    eps: float = 1e-6
    layer_scale: float = 0.0
    sub_norm: bool = False
    key_bias: bool = True
    drop_path_by: str = "sequence"
    init_scheme: str = "bert"
    depth: int = 1
    dtype: Any = jnp.float32

    def setup(self):
        for name, valid in (("attention", SPLIT), ("feed_forward", SPLIT), ("drop_path_by", DROPS)):
            if (value := getattr(self, name)) not in valid:
                raise ValueError(f"{name}={value!r} is not known{nearest(value, valid)}")
        inner = self.eps if self.sub_norm else 0.0
        split, fed = (self.experts if how == "split" else () for how in (self.attention, self.feed_forward))
        norm = functools.partial(Norm, "layernorm", self.eps)
        self.norm1 = Multiway(norm, split) if split else norm()
        self.attn = MultiwayAttention(split, dict(width=self.width, heads=self.heads, key_bias=self.key_bias, sub_norm=inner,
                                                  init_scheme=self.init_scheme, depth=self.depth, dtype=self.dtype))
        self.norm2 = Multiway(norm, fed)
        self.mlp = Multiway(functools.partial(Mlp, self.mlp_dim, self.activation, True, self.init_scheme, self.depth, self.dtype, inner), fed)
        if self.layer_scale:
            start = nn.with_logical_partitioning(nn.initializers.constant(self.layer_scale), ("norm",))
            self.gamma1, self.gamma2 = self.param("gamma1", start, (self.width,), jnp.float32), self.param("gamma2", start, (self.width,), jnp.float32)

    def __call__(self, x: jax.Array, layout: Layout, mask: jax.Array | None, bias: jax.Array | None, cache: dict | None, index: jax.Array | None,
                 drop_path: jax.Array | None) -> tuple[jax.Array, dict | None]:
        """x [b, l, width] -> (x, what is new of a cache). Arguments as ``multiway_stack``, for one layer."""
        def dropped(y):
            if drop_path is None or not self.has_rng("dropout"):
                return y
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop_path, (y.shape[0], 1, 1))
            return jnp.where(kept, y / (1 - drop_path).astype(y.dtype), 0)

        def scaled(y, gamma):
            return y * gamma.astype(y.dtype) if self.layer_scale else y

        normed = self.norm1(x, layout) if self.attention == "split" else self.norm1(x)
        y, new = self.attn(normed, layout, mask, bias, cache, index)
        x = x + checkpoint_name(dropped(scaled(y, self.gamma1 if self.layer_scale else None)), "attn_out")
        y = self.mlp(self.norm2(x, layout), layout)
        y = scaled(y, self.gamma2 if self.layer_scale else None)
        y = layout.route(lambda _, part: dropped(part), y) if self.drop_path_by == "expert" else dropped(y)
        return x + checkpoint_name(y, "mlp_out"), new


def multiway_stack(layers: int, remat: str = "none", **fields: Any) -> nn.Module:
    """``layers`` equal blocks under ``lax.scan``. Called with

      x [b, l, width]; layout: which expert computes which tokens; mask: True = may attend, to [b, h, l, l]; bias [layers, h, l, l], added to
      the logits; cache: {"key", "value"} [layers, b, length, h, d], in which x's keys and values stand at index, index + 1, ... (without
      a mask, which then is of all the cache's places, each token sees what stands up to itself); drop_path [layers]: the rate of each layer.
      None for what there is not.

    it returns (x, what is new of the cache, for ``nn.block.grown``).
    """
    return nn.scan(recomputed(MultiwayBlock, remat), variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=layers,
                   in_axes=(nn.broadcast, nn.broadcast, 0, 0, nn.broadcast, 0), out_axes=0, metadata_params={nn.PARTITION_NAME: "layers"})(**fields)
