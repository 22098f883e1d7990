"""CoCa: a contrastive and a captioning loss from one forward pass (arXiv 2205.01917; open_clip ``coca_model.py``)."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config as configs
from vlm_jax.decode import generate as decode
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.losses.captioning import caption_nll, captioning
from vlm_jax.losses.contrastive import contrastive
from vlm_jax.losses.terms import wanted, weigh
from vlm_jax.models import multimodal, text, vit
from vlm_jax.models.sizes import sizes
from vlm_jax.nn.block import MEMORY_AXES, OWN_AXES
from vlm_jax.nn.chunk import chunked
from vlm_jax.nn.linear import ProjectionHead
from vlm_jax.nn.norm import Norm
from vlm_jax.nn.pixels import compute_dtype, normalise
from vlm_jax.nn.pool import AttentionPooler
from vlm_jax.nn.unit import unit
from vlm_jax.system import Batch, Context, Output, System, Variables, drop_key

POOLERS = ("cascade", "parallel", "open_clip")


class CoCa(nn.Module):
    """Image tower, poolers, the lower (text) and the upper (multimodal) half of the decoder.

    pooler: "cascade", the one contrastive query attends to the caption queries' outputs (the
    paper's choice); "parallel", both attend to the image tokens; "open_clip", one pooler whose
    first output is the contrastive vector and whose others are the image memory.
    """
    image: vit.ViT
    text: text.TextTransformer
    decoder: multimodal.MultimodalDecoder
    caption_pooler: AttentionPooler
    contrast_pooler: AttentionPooler | None
    embed: int
    pooler: str = "cascade"
    norm: str = "layernorm"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    scale: float = 1 / 0.07
    beam_rule: str = "log_probability"
    dtype: Any = jnp.float32

    def setup(self):
        self.text_head = ProjectionHead(self.embed, norm_kind=self.norm, eps=self.text.eps, dtype=self.dtype)
        if self.pooler == "open_clip":
            self.memory_norm = Norm(self.norm, self.image.eps)
        self.image_head = ProjectionHead(self.embed, norm_kind="none" if self.pooler == "open_clip" else self.norm, dtype=self.dtype)
        self.logit_scale = self.param("logit_scale", nn.with_logical_partitioning(
            nn.initializers.constant(math.log(self.scale)), ()), (), jnp.float32)

    def encode_image(self, image: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """image [b, h, w, 3] -> (unit vector [b, embed], image memory [b, m, width]). ``key``: of dropped patches."""
        tokens = self.image(normalise(image, self.mean, self.std), key)
        memory = self.caption_pooler(tokens)
        if self.pooler == "open_clip":
            memory = self.memory_norm(memory)
            return unit(self.image_head(memory[:, 0])), memory[:, 1:]
        pooled = self.contrast_pooler(memory if self.pooler == "cascade" else tokens)
        return unit(self.image_head(pooled[:, 0])), memory

    def encode_text(self, ids: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """ids [b, l] -> (unit vector [b, embed] of the class token, states [b, l, width] for the upper half)."""
        states, pooled = self.text(ids, mask)
        return unit(self.text_head(pooled)), states

    def decode(self, states: jax.Array, memory: jax.Array) -> jax.Array:
        """Lower-half states [b, l, width] and image memory -> upper-half states [b, l, width]."""
        return self.decoder(states, memory)

    def vocabulary(self) -> jax.Array:
        """[width, vocab]: logits = upper-half states @ vocabulary."""
        return self.decoder.vocab_matrix()

    def temperature(self) -> jax.Array:
        """The multiplier of the cosine."""
        return jnp.exp(self.logit_scale)

    def caption_logits(self, image: jax.Array, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """fp32 [b, l, vocab]; row t predicts id t + 1."""
        return self.decoder.logits(self.decode(self.encode_text(ids, mask)[1], self.encode_image(image)[1]))

    def init_cache(self, batch: int, length: int, memory: jax.Array) -> dict[str, Any]:
        return {"lower": self.text.init_cache(batch, length), "upper": self.decoder.init_cache(batch, length, memory.shape[1]),
                "position": jnp.int32(0)}

    def extend(self, cache: dict[str, Any], ids: jax.Array, memory: jax.Array | None = None) -> tuple[jax.Array, dict[str, Any]]:
        """New ids [b, k] after those in the cache -> (logits [b, k, vocab], cache). ``memory`` at prefill alone."""
        at = cache["position"]
        states, lower = self.text.extend(ids, cache["lower"], at)
        states, upper = self.decoder.extend(states, cache["upper"], at, memory)
        return self.decoder.logits(states), {"lower": lower, "upper": upper, "position": at + ids.shape[1]}

    def __call__(self, image: jax.Array, ids: jax.Array):
        vector, memory = self.encode_image(image)
        words, states = self.encode_text(ids)
        return vector, words, self.decoder.logits(self.decode(states, memory)), self.temperature()


def build_model(*, image: dict, text: dict, decoder: dict, poolers: dict, embed: int, tokens: dict, size: int, length: int,
                norm: str = "layernorm", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), scale: float = 1 / 0.07,
                beam_rule: str = "log_probability", dtype: str = "auto") -> CoCa:
    """The module of a config's ``model`` section; ``size`` and ``length`` come from its data section.

    ``beam_rule``: how beam search ranks captions unless told otherwise, see ``decode.beam.search``."""
    dtype = compute_dtype(dtype)
    shared = dict(norm=norm, dtype=dtype)
    image = vit.ViT(**sizes(vit.VARIANTS, image_size=size, **shared, **image))
    lower = build_text(tokens=tokens, length=length, **shared, **text)
    layout, contrast, caption = build_poolers(**shared, width=embed if poolers["layout"] == "open_clip" else lower.width, **poolers)
    upper = multimodal.MultimodalDecoder(**sizes(
        multimodal.VARIANTS, vocab=tokens["vocab"], memory_width=caption.width, **shared, **decoder))
    return CoCa(image, lower, upper, caption, contrast, embed=embed, pooler=layout, norm=norm, mean=tuple(mean), std=tuple(std),
                scale=scale, beam_rule=beam_rule, dtype=dtype)


def build_text(*, tokens: dict, length: int, **fields: Any) -> text.TextTransformer:
    return text.TextTransformer(**sizes(text.VARIANTS, vocab=tokens["vocab"], pad_id=tokens["pad"], context_length=length,
                                        pooling="class", **fields))


def build_poolers(*, layout: str, queries: int, heads: int, width: int, **fields: Any):
    """(layout, contrastive pooler or None, caption pooler). ``queries`` counts open_clip's contrastive one too."""
    if layout not in POOLERS:
        raise ConfigError(f"model.poolers.layout={layout!r} is not known{nearest(layout, POOLERS)}")
    caption = AttentionPooler(queries, width, heads, **fields)
    return layout, None if layout == "open_clip" else AttentionPooler(1, width, heads, **fields), caption


def build_loss(*, weights: dict, duplicates: str = "negatives", directions: str = "mean", chunk: int = 256,
               label_smoothing: float = 0.0) -> dict[str, Any]:
    """The ``loss`` section, checked: weights of ``con`` and ``cap``, and their options."""
    return dict(weights=weights, duplicates=duplicates, directions=directions, chunk=chunk, label_smoothing=label_smoothing)


def build(config: Any) -> System:
    """The System of a resolved stage config. Raises ConfigError."""
    data, tokens = config.data, configs.to_plain(config.model.tokens)
    model = configs.call(build_model, config.model, "model", size=data.size, length=data.length)
    options = configs.call(build_loss, config.loss, "loss")
    weights, microbatch = options["weights"], data.microbatch
    # Whole batches want the caption loss as one sum, whose gradient needs no second look at the
    # logits; micro-batches want it by example.
    caption_loss = caption_nll if 0 < microbatch < data.batch else captioning

    def init(key, spec):
        image = jnp.zeros((1, *spec["image"].shape[1:]), jnp.float32)
        return model.init(key, image, jnp.zeros((1, *spec["text"].shape[1:]), jnp.int32))

    def loss(variables: Variables, carry, batch: Batch, context: Context):
        def forward(rows, index):
            image, memory = model.apply(variables, rows["image"], drop_key(context, index), method=CoCa.encode_image)
            text, states = model.apply(variables, rows["text"], rows["text_mask"], method=CoCa.encode_text)
            out = {"image": image, "text": text}
            if wanted(weights, "cap"):
                states = model.apply(variables, states, memory, method=CoCa.decode)
                out["cap"] = caption_loss(states[:, :-1], model.apply(variables, method=CoCa.vocabulary), rows["text"][:, 1:],
                                          rows["text_mask"][:, 1:], label_smoothing=options["label_smoothing"])
            return out

        out = chunked(forward, microbatch)({k: batch[k] for k in ("image", "text", "text_mask")})
        scale = model.apply(variables, method=CoCa.temperature)
        terms, metrics = {}, {"scale": scale}
        if wanted(weights, "con"):
            terms["con"], accuracy = contrastive(
                out["image"], out["text"], scale, duplicates=options["duplicates"], image_id=batch.get("image_id"),
                caption_id=batch.get("caption_id"), directions=options["directions"], chunk=options["chunk"])
            metrics |= accuracy
        if wanted(weights, "cap"):
            nll, count, correct = (x.sum() for x in out["cap"])
            terms["cap"] = nll / jnp.maximum(count, 1)
            metrics["token_accuracy"] = correct / jnp.maximum(count, 1)
        total, raw = weigh(terms, {k: w for k, w in weights.items() if wanted(weights, k)})
        return total, Output({**raw, **metrics})

    def generate(variables: Variables, batch: Batch, *, key=None, method: str = "greedy", beams: int = 1, max_length: int = 0,
                 **options: Any) -> dict[str, jax.Array]:
        """text int32 [b, max_length] from <bos> on, and score [b]. ``max_length`` 0 is the text tower's context."""
        limit = model.text.context_length
        if max_length > limit:
            raise ConfigError(f"max_length={max_length} exceeds the context of {limit} tokens; nearest: {limit}")
        _, memory = model.apply(variables, batch["image"], method=CoCa.encode_image)
        prompt = jnp.full((memory.shape[0], 1), tokens["bos"], jnp.int32)

        def prefill(prompt):
            cache = model.apply(variables, prompt.shape[0], max_length or limit, memory, method=CoCa.init_cache)
            logits, cache = model.apply(variables, cache, prompt, memory, method=CoCa.extend)
            return logits[:, -1], (), cache

        def extend(cache, ids):
            logits, cache = model.apply(variables, cache, ids, method=CoCa.extend)
            return logits[:, -1], (), cache

        return decode(prefill, extend, prompt, method=method, beams=beams, max_length=max_length or limit, key=key,
                      eos_ids=tokens["eos"], pad_id=tokens["pad"], batch_axis={"lower": OWN_AXES, "upper": MEMORY_AXES, "position": -1},
                      **{"beam_rule": model.beam_rule, **options})

    return System(model, init, loss, {
        "embed": functools.partial(embed, model), "features": functools.partial(features, model),
        "caption_logits": functools.partial(caption_logits, model), "generate": generate}, papers=("2205.01917",))


def embed(model: CoCa, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """image_embed and text_embed [b, embed], for what the batch has; logit_scale, the multiplier."""
    out = {"logit_scale": model.apply(variables, method=CoCa.temperature)}
    if "image" in batch:
        out["image_embed"] = model.apply(variables, batch["image"], method=CoCa.encode_image)[0]
    if "text" in batch:
        out["text_embed"] = model.apply(variables, batch["text"], batch.get("text_mask"), method=CoCa.encode_text)[0]
    return out


def features(model: CoCa, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """image [b, m, width], the image memory, and text [b, l, width], the lower half's states, for what the batch has."""
    out = {}
    if "image" in batch:
        out["image"] = model.apply(variables, batch["image"], method=CoCa.encode_image)[1]
    if "text" in batch:
        out["text"] = model.apply(variables, batch["text"], batch.get("text_mask"), method=CoCa.encode_text)[1]
    return out


def caption_logits(model: CoCa, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """logits fp32 [b, l, vocab]; row t predicts id t + 1."""
    return {"logits": model.apply(variables, batch["image"], batch["text"], batch.get("text_mask"), method=CoCa.caption_logits)}
