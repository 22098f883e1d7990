"""CLIP: two towers and one contrastive loss (arXiv 2103.00020; openai/CLIP, mlfoundations/open_clip)."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from vlm_jax import config as configs
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.losses.contrastive import contrastive, sigmoid
from vlm_jax.losses.terms import weigh
from vlm_jax.models import resnet, text, vit
from vlm_jax.models.sizes import sizes
from vlm_jax.nn.chunk import chunked
from vlm_jax.nn.linear import ProjectionHead
from vlm_jax.nn.pixels import compute_dtype, normalise
from vlm_jax.nn.pool import AttentionPooler
from vlm_jax.nn.unit import unit
from vlm_jax.system import Batch, Context, Output, System, Variables, drop_key

IMAGE_TOWERS = {"vit": (vit.ViT, vit.VARIANTS), "resnet": (resnet.ModifiedResNet, resnet.VARIANTS)}
TEXT_TOWERS = ("transformer", "cbow")
IMAGE_POOLS = ("class", "mean", "normed_mean", "attention")
KINDS = ("softmax", "sigmoid")


class Clip(nn.Module):
    """Named methods over the two towers. Features are unit vectors of width ``embed``.

    image_pool: what of a ViT's tokens the head sees: "class", their "mean" (without a class token), the mean of
    normed tokens ("normed_mean"), or one learned query's "attention"; a ResNet pools by itself.
    scale: initial multiplier of the cosine, kept as its logarithm. bias: initial logit bias of
    the sigmoid loss; None leaves the parameter out.
    """
    image: nn.Module
    text: nn.Module
    embed: int
    image_pool: str = "class"
    norm: str = "layernorm"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    scale: float = 1 / 0.07
    bias: float | None = None
    dtype: Any = jnp.float32

    def setup(self):
        head = functools.partial(ProjectionHead, self.embed, norm_kind=self.norm, dtype=self.dtype)
        self.text_head = head(eps=getattr(self.text, "eps", 1e-5))
        if isinstance(self.image, vit.ViT):
            self.image_head = head(eps=self.image.eps)
            if self.image_pool == "attention":
                self.image_pooler = AttentionPooler(1, self.image.width, self.image.heads, norm=self.norm, dtype=self.dtype)
        self.logit_scale = self.param("logit_scale", nn.with_logical_partitioning(
            nn.initializers.constant(math.log(self.scale)), ()), (), jnp.float32)
        if self.bias is not None:
            self.logit_bias = self.param("logit_bias", nn.with_logical_partitioning(
                nn.initializers.constant(self.bias), ()), (), jnp.float32)

    def image_features(self, image: jax.Array, train: bool = False, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """image [b, h, w, 3] -> (tokens [b, n, width], unit vector [b, embed]). ``key``: of dropped patches."""
        image = normalise(image, self.mean, self.std)
        if isinstance(self.image, resnet.ModifiedResNet):
            tokens, pooled = self.image(image, train)
            return tokens, unit(pooled)
        tokens = self.image(image, key)
        if self.image_pool == "normed_mean":     # the projection has no bias: it and the mean may change places
            return tokens, unit(self.image_head(self.patches(tokens)).mean(1))
        pooled = {"class": lambda: tokens[:, 0], "mean": lambda: self.patches(tokens).mean(1),
                  "attention": lambda: self.image_pooler(tokens)[:, 0]}[self.image_pool]()
        return tokens, unit(self.image_head(pooled))

    def patches(self, tokens: jax.Array) -> jax.Array:
        """Without the class token."""
        return tokens[:, int(self.image.class_token):]

    def text_features(self, ids: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """ids [b, l] -> (states [b, l, width], unit vector [b, embed])."""
        states, pooled = self.text(ids, mask)
        return states, unit(self.text_head(pooled))

    def encode_image(self, image: jax.Array, train: bool = False, key: jax.Array | None = None) -> jax.Array:
        return self.image_features(image, train, key)[1]

    def encode_text(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return self.text_features(ids, mask)[1]

    def temperature(self) -> tuple[jax.Array, jax.Array | None]:
        """(multiplier of the cosine, logit bias or None)."""
        return jnp.exp(self.logit_scale), self.logit_bias if self.bias is not None else None

    def __call__(self, image: jax.Array, ids: jax.Array):
        return self.encode_image(image), self.encode_text(ids), self.temperature()


def build_model(*, image: dict, text: dict, embed: int, tokens: dict, size: int, length: int, image_pool: str = "class",
                norm: str = "layernorm", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), scale: float = 1 / 0.07,
                bias: float | None = None, dtype: str = "auto") -> Clip:
    """The module of a config's ``model`` section; ``size`` and ``length`` come from its data section."""
    dtype = compute_dtype(dtype)
    if image_pool not in IMAGE_POOLS:
        raise ConfigError(f"model.image_pool={image_pool!r} is not known{nearest(image_pool, IMAGE_POOLS)}")
    return Clip(build_image(embed=embed, size=size, dtype=dtype, norm=norm, **image),
                build_text(length=length, tokens=tokens, dtype=dtype, norm=norm, **text),
                embed=embed, image_pool=image_pool, norm=norm, mean=tuple(mean), std=tuple(std), scale=scale, bias=bias, dtype=dtype)


def build_image(*, tower: str, embed: int, size: int, dtype: Any, norm: str, **fields: Any) -> nn.Module:
    if tower not in IMAGE_TOWERS:
        raise ConfigError(f"model.image.tower={tower!r} is not known{nearest(tower, IMAGE_TOWERS)}")
    module, variants = IMAGE_TOWERS[tower]
    if tower == "resnet":
        return module(**sizes(variants, image_size=size, features=embed, dtype=dtype, **fields))
    return module(**sizes(variants, image_size=size, norm=norm, dtype=dtype, **fields))


def build_text(*, tower: str, tokens: dict, length: int, dtype: Any, norm: str, end: str = "largest", **fields: Any) -> nn.Module:
    """``end``: "largest", pool at the largest id (OpenAI's weights), or "eos", at the tokenizer's end."""
    if tower == "cbow":
        return text.Cbow(vocab=tokens["vocab"], bos_id=tokens["bos"], eos_id=tokens["eos"], pad_id=tokens["pad"], dtype=dtype,
                         width=sizes(text.VARIANTS, **fields)["width"])
    if tower != "transformer":
        raise ConfigError(f"model.text.tower={tower!r} is not known{nearest(tower, TEXT_TOWERS)}")
    if end not in ("largest", "eos"):
        raise ConfigError(f"model.text.end={end!r} is not known{nearest(end, ('largest', 'eos'))}")
    return text.TextTransformer(**sizes(text.VARIANTS, vocab=tokens["vocab"], pad_id=tokens["pad"], context_length=length,
                                        eos_id=tokens["eos"] if end == "eos" else None, norm=norm, dtype=dtype, **fields))


def build_loss(*, weights: dict, kind: str = "softmax", duplicates: str = "negatives", directions: str = "mean", chunk: int = 256):
    """The ``loss`` section, checked."""
    if kind not in KINDS:
        raise ConfigError(f"loss.kind={kind!r} is not known{nearest(kind, KINDS)}")
    return dict(weights=weights, kind=kind, duplicates=duplicates, directions=directions, chunk=chunk)


def build(config: Any) -> System:
    """The System of a resolved stage config. Raises ConfigError."""
    data = config.data
    model = configs.call(build_model, config.model, "model", size=data.size, length=data.length)
    options = configs.call(build_loss, config.loss, "loss")
    microbatch = data.microbatch
    if data.buckets and (getattr(model.text, "causal", "causal") == "none" or getattr(model.text, "pooling", "eot") == "last"):
        raise ConfigError(f"data.buckets={tuple(data.buckets)}: this text tower looks at padding, so that a cropped text gives another result; nearest: ()")
    batch_norm = isinstance(model.image, resnet.ModifiedResNet)
    if batch_norm and microbatch and microbatch < data.batch:
        raise ConfigError(f"data.microbatch={microbatch}: BatchNorm's statistics are of the whole batch and cannot be "
                          "computed in parts; nearest: 0")
    if (options["kind"] == "sigmoid") != (model.bias is not None):
        raise ConfigError(f"loss.kind={options['kind']!r} with model.bias={model.bias}: the sigmoid loss needs a bias "
                          "(-10.0 in SigLIP), the softmax loss has none")

    def init(key, spec):
        image = jnp.zeros((1, *spec["image"].shape[1:]), jnp.float32)
        return model.init(key, image, jnp.zeros((1, *spec["text"].shape[1:]), jnp.int32))

    def loss(variables: Variables, carry, batch: Batch, context: Context):
        def towers(rows, index):
            image, moved = model.apply(variables, rows["image"], context.train, drop_key(context, index), method=Clip.encode_image, mutable=["batch_stats"])
            text = model.apply(variables, rows["text"], rows["text_mask"], method=Clip.encode_text)
            return image, text, moved

        rows = {k: batch[k] for k in ("image", "text", "text_mask")}
        if batch_norm:
            image, text, moved = towers(rows, 0)
        else:
            (image, text), moved = chunked(lambda r, i: towers(r, i)[:2], microbatch)(rows), {}
        scale, bias = model.apply(variables, method=Clip.temperature)
        ids = dict(image_id=batch.get("image_id"), caption_id=batch.get("caption_id"),
                   duplicates=options["duplicates"], chunk=options["chunk"])
        if options["kind"] == "sigmoid":
            con, metrics = sigmoid(image, text, scale, bias, **ids)
        else:
            con, metrics = contrastive(image, text, scale, directions=options["directions"], **ids)
        total, terms = weigh({"con": con}, options["weights"])
        moving = traverse_util.flatten_dict(moved, sep="/") if batch_norm and context.train else {}
        return total, Output({**terms, **metrics, "scale": scale}, moving=moving)

    return System(model, init, loss, {"embed": functools.partial(embed, model), "features": functools.partial(features, model)},
                  papers=("2103.00020", *(("2303.15343",) if options["kind"] == "sigmoid" else ())))


def embed(model: nn.Module, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """image_embed and text_embed [b, embed], for what the batch has; logit_scale, the multiplier."""
    out = {"logit_scale": model.apply(variables, method="temperature")[0]}
    if "image" in batch:
        out["image_embed"] = model.apply(variables, batch["image"], method="encode_image")
    if "text" in batch:
        out["text_embed"] = model.apply(variables, batch["text"], batch.get("text_mask"), method="encode_text")
    return out


def features(model: nn.Module, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """The towers' token outputs after their last block, before the final norm: image [b, n, width] (class token
    first; a ResNet's last feature map, row by row), text [b, l, width], for what the batch has."""
    out = {}
    if "image" in batch:
        out["image"] = model.apply(variables, batch["image"], method="image_features")[0]
    if "text" in batch:
        out["text"] = model.apply(variables, batch["text"], batch.get("text_mask"), method="text_features")[0]
    return out
