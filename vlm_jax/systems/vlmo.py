"""VLMo: unified pre-training with mixture-of-modality-experts, in stages vision, language, both; and what it is fine-tuned into
(arXiv 2111.02358; microsoft/unilm ``vlmo/``)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import config as configs
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.losses.answers import answer_loss, rank, soft_targets, table
from vlm_jax.losses.block_mask import block_mask
from vlm_jax.losses.contrastive import contrastive
from vlm_jax.losses.masked import mask_tokens, mask_words, masked_lm
from vlm_jax.losses.matching import NEGATIVES, draw, matching, pairs
from vlm_jax.losses.momentum import other_groups
from vlm_jax.losses.terms import wanted, weigh
from vlm_jax.models import bert, image_codes, vlmo
from vlm_jax.models.sizes import sizes
from vlm_jax.nn.linear import Linear
from vlm_jax.nn.mlp import TwoLayerHead
from vlm_jax.nn.pixels import compute_dtype, normalise, unnormalise
from vlm_jax.nn.rows import join, part, select
from vlm_jax.nn.unit import unit
from vlm_jax.system import Batch, Context, Output, System, Variables, run

HEADS = ("mim", "pooler", "mlm", "itm", "itc", "itc_vl", "vqa", "nlvr")
NEEDS: Mapping[str, tuple[str, ...]] = {     # loss term -> the heads that it trains
    "mim": ("mim",), "textmlm": ("mlm",), "itc": ("itc",), "itm": ("itc", "pooler", "itm"), "mlm": ("mlm",),
    "vqa": ("pooler", "vqa"), "nlvr": ("pooler", "nlvr")}
MASKING = ("tokens", "words")


class Vlmo(nn.Module):
    """The transformer and its heads. Features are unit vectors of its width.

    heads: what there is of "mim" (codes of masked patches), "pooler", "mlm", "itm", "itc" and "itc_vl" (projections and scale of the two
    contrastive branches), "vqa", "nlvr". The trunk's parameters lie at the top: ``blocks/*``, ``image/*``, ``text/*``; where what tells masked
    patches has some, they are at ``tokenizer/*`` and frozen (``trainable``).
    """
    trunk: vlmo.Mome
    heads: tuple[str, ...]
    targets: nn.Module
    classes: int = 0
    scale: float = 1 / 0.07
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: Any = jnp.float32

    def setup(self):
        nn.share_scope(self, self.trunk)
        width, init = self.trunk.width, nn.initializers.normal(0.02)

        def head(features, use_bias=True):
            return Linear(features, ("embed", "joint"), use_bias, init, dtype=self.dtype)

        def log_scale(name):
            return self.param(name, nn.with_logical_partitioning(nn.initializers.constant(np.log(self.scale)), ()), (), jnp.float32)

        if "mim" in self.heads:
            self.mim_head = head(self.targets.codes)
            self.tokenizer = self.targets.clone(parent=None, name=None)
        if "pooler" in self.heads:
            self.pooler = head(width)
        if "mlm" in self.heads:
            self.lm_head = bert.LanguageHead(self.trunk.vocab, width, self.trunk.text_eps, self.dtype)
            self.lm_table = self.param("lm_table", nn.with_logical_partitioning(init, ("vocab", "embed")), (self.trunk.vocab, width), jnp.float32)
        if "itm" in self.heads:
            self.itm_head = head(2)
        if "itc" in self.heads:
            self.image_head, self.text_head, self.logit_scale = head(width, False), head(width, False), log_scale("logit_scale")
        if "itc_vl" in self.heads:
            self.image_vl_head, self.text_vl_head, self.logit_vl_scale = head(width, False), head(width, False), log_scale("logit_vl_scale")
        if "vqa" in self.heads:
            self.vqa_head = TwoLayerHead(2 * width, self.classes, dtype=self.dtype)
        if "nlvr" in self.heads:
            self.nlvr_head = TwoLayerHead(2 * width, 2, dtype=self.dtype)

    def embed_image(self, image: jax.Array, masked: jax.Array | None = None, row: int = vlmo.IMAGE_TYPE) -> jax.Array:
        """image [b, h, w, 3] -> embeddings [b, n, width], which the routes start from. masked bool [b, patches]."""
        return self.trunk.embed_image(normalise(image, self.mean, self.std), row, masked)

    def embed_images(self, images: jax.Array) -> jax.Array:
        """images [b, 2, h, w, 3] -> embeddings [b, 2, n, width], the second with a token type of its own."""
        return jnp.stack([self.embed_image(images[:, 0]), self.embed_image(images[:, 1], row=vlmo.OTHER_IMAGE_TYPE)], 1)

    def embed_text(self, ids: jax.Array) -> jax.Array:
        """ids [b, l] -> embeddings [b, l, width]."""
        return self.trunk.embed_text(ids)

    def encode_image(self, embeds: jax.Array, experts: tuple[str, ...] = ("image",)) -> tuple[jax.Array, ...]:
        """Embeddings of images -> states [b, n, width] after the final norm, one for each of the top layers' ``experts``."""
        return self.trunk.alone(embeds, "image", None, experts)

    def encode_text(self, embeds: jax.Array, mask: jax.Array, experts: tuple[str, ...] = ("text",)) -> tuple[jax.Array, ...]:
        """Embeddings of texts -> states [b, l, width], likewise."""
        return self.trunk.alone(embeds, "text", mask, experts)

    def joint(self, text: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
        """Embeddings of texts and of their images -> states [b, l + n, width]."""
        return self.trunk.joint(text, mask, image)

    def feature(self, states: jax.Array, branch: str) -> jax.Array:
        """States -> unit vector [b, width]. branch: "image", "text", and "image_vl", "text_vl" of what went through the expert "vl"."""
        return unit(getattr(self, f"{branch}_head")(states[:, 0]))

    def scales(self) -> tuple[jax.Array, ...]:
        """What cosines are multiplied by: of the uni branch and, where there is one, the vl branch."""
        return tuple(jnp.exp(s) for s in ([self.logit_scale] + ([self.logit_vl_scale] if "itc_vl" in self.heads else [])))

    def pool(self, states: jax.Array) -> jax.Array:
        """Joint states -> [b, width], of the text's class token."""
        return jnp.tanh(self.pooler(states[:, 0]))

    def match(self, states: jax.Array) -> jax.Array:
        """Joint states -> logits [b, 2]; class 1 = match."""
        return self.itm_head(self.pool(states))

    def predict_tokens(self, states: jax.Array) -> jax.Array:
        """States of texts -> states whose product with ``vocabulary`` are logits."""
        return self.lm_head(states)

    def vocabulary(self) -> jax.Array:
        return self.lm_head.vocabulary(self.lm_table)

    def predict_codes(self, states: jax.Array) -> jax.Array:
        """States of images -> logits [b, patches, codes]."""
        return self.mim_head(states[:, 1:]).astype(jnp.float32)

    def codes(self, image: jax.Array) -> jax.Array:
        """image [b, h, w, 3] -> ids [b, patches] that its patches are to be told as."""
        return jax.lax.stop_gradient(self.tokenizer(unnormalise(image, self.mean, self.std)))

    def answer(self, states: jax.Array) -> jax.Array:
        """Joint states -> logits fp32 [b, answers]."""
        return self.vqa_head(self.pool(states)).astype(jnp.float32)

    def judge(self, states: jax.Array) -> jax.Array:
        """Joint states of a text beside each of two images [b, 2, m, width] -> logits fp32 [b, 2]."""
        pooled = self.pool(states.reshape(-1, *states.shape[2:]))
        return self.nlvr_head(pooled.reshape(len(states), -1)).astype(jnp.float32)

    def __call__(self, image: jax.Array, ids: jax.Array):
        """Everything once: for parameters' shapes."""
        out, pixels = [], image
        image = self.embed_image(pixels, jnp.ones((1, self.trunk.side ** 2), bool) if "mim" in self.heads else None)
        vl = ("vl",) if "vl" in self.trunk.experts else ()
        states = self.encode_image(image, ("image", *vl))
        if "mim" in self.heads:
            out += [self.predict_codes(states[0]), *([self.codes(pixels)] if not isinstance(self.targets, image_codes.Unknown) else [])]
        if self.trunk.with_text:
            text, mask = self.embed_text(ids), jnp.ones(ids.shape, bool)
            read, fused = self.encode_text(text, mask, ("text", *vl)), self.joint(text, mask, image)
            if "mlm" in self.heads:
                out += [self.predict_tokens(fused), self.vocabulary()]
            for branch, x in (("image", states), ("text", read)):
                out += [self.feature(x[0], branch)] if "itc" in self.heads else []
                out += [self.feature(x[-1], f"{branch}_vl")] if "itc_vl" in self.heads else []
            out += [self.scales()] if "itc" in self.heads else []
            out += [self.pool(fused)] if "pooler" in self.heads else []
            out += [self.match(fused)] if "itm" in self.heads else []
            out += [self.answer(fused)] if "vqa" in self.heads else []
            out += [self.judge(jnp.stack([fused, fused], 1))] if "nlvr" in self.heads else []
        return out


def build_model(*, trunk: dict, heads: tuple[str, ...], size: int, tokens: dict | None = None, targets: dict | None = None, classes: int = 0,
                scale: float = 1 / 0.07, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), answers: Any = (), answer_ids: Any = (),
                pieces: tuple[int, ...] = (), dtype: str = "auto") -> Vlmo:
    """The module of a config's ``model`` section.

    trunk: fields of ``models.vlmo.Mome``. targets: what masked patches are to be told as (``models.image_codes``): kind "colours" (a stand-in; ``bins``),
    "vqkd" (a frozen tokenizer: ``encoder``, a ViT, ``codes`` and ``code_width``; its weights are for ``init`` to bring, and ``trainable`` leaves out
    tokenizer/.*) or "unknown". answers: what questions are answered with, texts or a file with
    one a line; answer_ids: the same as the tokenizer writes them, filled in from it; classes: how many, where they are not told.
    pieces: ids that go on with the word before them, filled in likewise.
    """
    dtype = compute_dtype(dtype)
    for head in heads:
        if head not in HEADS:
            raise ConfigError(f"model.heads={tuple(heads)}: {head!r} is not a head{nearest(head, HEADS)}")
    if answer_ids and classes not in (0, len(answer_ids)):
        raise ConfigError(f"model.classes={classes}, but model.answers are {len(answer_ids)}; nearest: 0, as many as there are")
    classes = classes or len(answer_ids)
    if "vqa" in heads and not classes:
        raise ConfigError("model.classes=0 and model.answers says none: a classifier of answers needs a list of them; nearest: model.answers=FILE")
    trunk = sizes(vlmo.VARIANTS, **{"vocab": tokens["vocab"] if tokens else 0, "image_size": size, "dtype": dtype, "with_mask": "mim" in heads, **trunk})
    trunk = vlmo.Mome(**trunk)
    told = image_codes.make_targets(trunk.patch, size, **(targets or {}))
    return Vlmo(trunk, tuple(heads), told, classes=classes, scale=scale, mean=tuple(mean), std=tuple(std), dtype=dtype)


def build_loss(*, weights: dict, negatives: str = "hard", group: int = 0, ranks: int = 1, masking: str = "tokens", mask_share: float = 0.15,
               block_share: float = 75 / 196) -> dict[str, Any]:
    """The ``loss`` section, checked.

    weights: of ``mim``; ``textmlm`` (texts alone); ``itc``, ``itm``, ``mlm``; ``vqa``; ``nlvr``. negatives: of matching, "hard" (by similarity) or
    "random". group: rows that are mined among themselves, as where negatives are local to a GPU; 0: the whole batch. ranks: the gradient
    of itc's features is divided by it, that of the scales is not: the official code, where each of so many GPUs lets its own features
    alone learn and the average over all is taken, trains so. masking: of texts, "tokens" or "words" whole; mask_share: how much.
    block_share: how much of an image is masked (75 of 196 patches, as BEiT's).
    """
    for name, value, valid in (("negatives", negatives, NEGATIVES), ("masking", masking, MASKING)):
        if value not in valid:
            raise ConfigError(f"loss.{name}={value!r} is not known{nearest(value, valid)}")
    for name in weights:
        if name not in NEEDS:
            raise ConfigError(f"loss.weights.{name} is not a term{nearest(name, NEEDS)}")
    if ranks < 1:
        raise ConfigError(f"loss.ranks={ranks} must be at least 1; nearest: 1")
    return dict(weights=weights, negatives=negatives, group=group, ranks=ranks, masking=masking, mask_share=mask_share, block_share=block_share)


def on_ranks(x: jax.Array, ranks: int) -> jax.Array:
    """x, with a gradient ``ranks`` times smaller."""
    return x if ranks == 1 else x / ranks + jax.lax.stop_gradient(x * (1 - 1 / ranks))


def build(config: Any) -> System:
    """The System of a resolved stage config. Raises ConfigError."""
    data, tokens = config.data, configs.to_plain(config.model.get("tokens", {}))
    o = configs.call(build_loss, config.loss, "loss")
    model = configs.call(build_model, config.model, "model", size=data.size)
    terms_wanted = tuple(name for name in o["weights"] if wanted(o["weights"], name))
    for term in terms_wanted:
        for head in NEEDS[term]:
            if head not in model.heads:
                raise ConfigError(f"loss.weights.{term} needs the head {head!r}, which model.heads={model.heads} lacks; nearest: {(*model.heads, head)}")
    if data.microbatch:
        raise ConfigError(f"data.microbatch={data.microbatch}: negatives are mined from the whole batch; nearest: 0, and model.trunk.remat for memory")
    if not data.images and set(terms_wanted) != {"textmlm"}:
        raise ConfigError("data.images=0, but of loss.weights only textmlm learns from texts alone; nearest: data.images=1")
    if "nlvr" in terms_wanted and data.images != 2:
        raise ConfigError(f"data.images={data.images}, but statements are about two images; nearest: data.images=2 and data.classes=('False', 'True')")
    if "vqa" in terms_wanted and not data.answers:
        raise ConfigError("data.answers=0, but a system that answers learns from answers; nearest: 10, and data.answer_length=8")
    listed = table(config.model.get("answer_ids") or (), tokens.get("pad", 0))
    continues = np.zeros(model.trunk.vocab + 1, bool)
    continues[list(config.model.get("pieces") or ())] = True
    if o["masking"] == "words" and not continues.any() and data.tokenizer:
        raise ConfigError(f"loss.masking='words', but tokenizer {data.tokenizer!r} has no pieces that go on with a word; nearest: 'tokens'")
    if "vqa" in terms_wanted and not len(listed) and data.tokenizer:
        raise ConfigError("model.answers is empty: questions are answered from a list; nearest: model.answers=FILE, with one answer a line")
    apply, branches, patches = functools.partial(run, model), ("itc_vl" in model.heads) + 1, model.trunk.side ** 2

    def init(key, spec):
        return model.init(key, jnp.zeros((1, data.size, data.size, 3), jnp.float32), jnp.zeros((1, data.length), jnp.int32))

    def hide(context: Context, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(ids with words masked, bool: where), as the batch has them or by chance."""
        if "masked_text" in batch:
            return batch["masked_text"], batch["masked_at"]
        ids, mask = batch["text"], batch["text_mask"].astype(bool)
        fixed = (ids == tokens["bos"]) | (ids == tokens["eos"])
        how = dict(vocab=model.trunk.vocab, mask_id=tokens["mask"], share=o["mask_share"])
        if o["masking"] == "words":
            return mask_words(context.key("mask"), ids, mask, fixed & mask, jnp.asarray(continues)[ids], **how)
        return mask_tokens(context.key("mask"), ids, mask & ~fixed, **how)

    def spell(variables: Variables, states: jax.Array, ids: jax.Array, chosen: jax.Array):
        """(loss, accuracy) of the masked words."""
        nll, count, hits = masked_lm(apply(variables, Vlmo.predict_tokens, states), apply(variables, Vlmo.vocabulary), ids, chosen)
        return nll / jnp.maximum(count, 1), hits / jnp.maximum(count, 1)

    def dual(variables: Variables, image: jax.Array, text: jax.Array, mask: jax.Array, context: Context | None = None):
        """Unit vectors (image, text) of the uni branch and, where the model has one, of the vl branch."""
        experts = (("image", "vl"), ("text", "vl"))
        drop = (None, None) if context is None else (context.drop("image"), context.drop("text"))
        images = apply(variables, functools.partial(Vlmo.encode_image, experts=experts[0][:branches]), image, key=drop[0])
        texts = apply(variables, functools.partial(Vlmo.encode_text, experts=experts[1][:branches]), text, mask, key=drop[1])
        return [tuple(apply(variables, Vlmo.feature, x, f"{side}{suffix}") for side, x in (("image", i), ("text", t)))
                for i, t, suffix in zip(images, texts, ("", "_vl"))]

    def loss(variables: Variables, carry, batch: Batch, context: Context):
        terms, metrics = {}, {}
        ids, mask = batch["text"], batch["text_mask"].astype(bool)
        rows = len(ids)
        embed_text = functools.partial(apply, variables, Vlmo.embed_text)

        if "mim" in terms_wanted:
            drawn = block_mask(context.key("blocks"), rows, model.trunk.side, round(o["block_share"] * patches), min_cells=max(1, 16 * patches // 196))
            masked, codes = batch.get("masked_patches", drawn), apply(variables, Vlmo.codes, batch["image"])
            states, = apply(variables, Vlmo.encode_image, apply(variables, Vlmo.embed_image, batch["image"], masked), key=context.drop("image"))
            logp = jax.nn.log_softmax(apply(variables, Vlmo.predict_codes, states))
            told, count = jnp.take_along_axis(logp, codes[..., None], axis=-1)[..., 0], jnp.maximum(masked.sum(), 1)
            terms["mim"], metrics["mim_accuracy"] = -(told * masked).sum() / count, ((logp.argmax(-1) == codes) & masked).sum() / count
        if "textmlm" in terms_wanted:
            corrupted, chosen = hide(context, batch)
            states, = apply(variables, Vlmo.encode_text, embed_text(corrupted, key=context.drop("masked_embed")), mask, key=context.drop("text"))
            terms["textmlm"], metrics["textmlm_accuracy"] = spell(variables, states, ids, chosen)

        # Texts, images and pairs of both start from the same embeddings.
        if {"itc", "itm", "mlm", "vqa"} & set(terms_wanted):
            image = apply(variables, Vlmo.embed_image, batch["image"])
        if {"itc", "itm", "vqa", "nlvr"} & set(terms_wanted):
            text = embed_text(ids, key=context.drop("embed"))
        if {"itc", "itm"} & set(terms_wanted):
            vectors, scales = dual(variables, image, text, mask, context), apply(variables, Vlmo.scales)
            if "itc" in terms_wanted:
                losses = []
                for (i, t), scale, suffix in zip(vectors, scales, ("", "_vl")):
                    value, told = contrastive(on_ranks(i, o["ranks"]), on_ranks(t, o["ranks"]), scale)
                    losses.append(value)
                    metrics |= {f"{name}{suffix}": x for name, x in told.items()} | {f"logit_scale{suffix}": scale}
                terms["itc"] = sum(losses) / len(losses)

        # One pass of pairs: positives, texts with negative images, negative texts; and masked texts.
        texts, masks, images = [], [], []
        if "itm" in terms_wanted:
            similar = jax.lax.stop_gradient(scales[0] * vectors[0][0].astype(jnp.float32) @ vectors[0][1].astype(jnp.float32).T)
            negative = functools.partial(draw, o["negatives"], excluded=jnp.eye(rows, dtype=bool) | other_groups(rows, o["group"]))
            pair = pairs(batch.get("negative_image", negative(context.key("negative_image"), similar.T)),
                         batch.get("negative_text", negative(context.key("negative_text"), similar)), o["group"])
            texts, masks, images = [select(text, pair.text)], [select(mask, pair.text)], [select(image, pair.image)]
        group = o["group"] or rows
        groups = rows // group
        if "mlm" in terms_wanted:
            corrupted, chosen = hide(context, batch)
            texts, masks, images = texts + [embed_text(corrupted, key=context.drop("masked_embed"))], masks + [mask], images + [image]
        if texts:
            states = apply(variables, Vlmo.joint, *(join(x, groups) for x in (texts, masks, images)), key=context.drop("joint"))
        if "itm" in terms_wanted:
            terms["itm"], metrics["itm_accuracy"] = matching(apply(variables, Vlmo.match, part(states, groups, 0, 3 * group)), pair.label, pair.weight)
        if "mlm" in terms_wanted:
            terms["mlm"], metrics["mlm_accuracy"] = spell(variables, part(states, groups, -group, None)[:, :ids.shape[1]], ids, chosen)

        if "vqa" in terms_wanted:
            logits = apply(variables, Vlmo.answer, apply(variables, Vlmo.joint, text, mask, image, key=context.drop("joint")))
            target = batch["answer_target"] if "answer_target" in batch else soft_targets(batch, listed, tokens["pad"])
            terms["vqa"], told = answer_loss(logits, target)
            metrics |= told
        if "nlvr" in terms_wanted:
            logits = judged(variables, batch, context)
            terms["nlvr"], metrics["accuracy"] = matching(logits, batch["label"])
        total, raw = weigh(terms, {k: w for k, w in o["weights"].items() if k in terms_wanted})
        return total, Output({**raw, **metrics})

    def judged(variables: Variables, batch: Batch, context: Context | None = None):
        drop = [None, None] if context is None else [context.drop("embed"), context.drop("joint")]
        images = apply(variables, Vlmo.embed_images, batch["images"])
        text = jnp.repeat(apply(variables, Vlmo.embed_text, batch["text"], key=drop[0]), 2, axis=0)
        states = apply(variables, Vlmo.joint, text, jnp.repeat(batch["text_mask"], 2, axis=0), images.reshape(-1, *images.shape[2:]), key=drop[1])
        return apply(variables, Vlmo.judge, states.reshape(-1, 2, *states.shape[1:]))

    def embeds_of(variables: Variables, batch: Batch) -> tuple[jax.Array | None, jax.Array | None]:
        """(image, text) embeddings of what the batch has; ``image_features`` and ``text_features`` stand for those computed before."""
        image, text = batch.get("image_features"), batch.get("text_features")
        image = apply(variables, Vlmo.embed_image, batch["image"]) if image is None and "image" in batch else image
        text = apply(variables, Vlmo.embed_text, batch["text"]) if text is None and "text" in batch and model.trunk.with_text else text
        return image, text

    def joined(variables: Variables, batch: Batch) -> jax.Array:
        image, text = embeds_of(variables, batch)
        return apply(variables, Vlmo.joint, text, batch["text_mask"].astype(bool), image)

    def embed(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """image_embed and text_embed [b, width] of the uni branch, for what the batch has; logit_scale, the multiplier."""
        out, (image, text) = {"logit_scale": apply(variables, Vlmo.scales)[0]}, embeds_of(variables, batch)
        if image is not None:
            out["image_embed"] = apply(variables, Vlmo.feature, apply(variables, Vlmo.encode_image, image)[0], "image")
        if text is not None:
            out["text_embed"] = apply(variables, Vlmo.feature, apply(variables, Vlmo.encode_text, text, batch["text_mask"])[0], "text")
        return out

    def features(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """image [b, n, width] and text [b, l, width]: what goes into the transformer, for ``match``. Attention is over both from the first layer on."""
        return {name: x for name, x in zip(("image", "text"), embeds_of(variables, batch)) if x is not None}

    def states(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """What comes out of it, after the final norm: image and text alone (``image``, ``text``), the same through the top layers' expert "vl"
        (``image_vl``, ``text_vl``), and ``joint`` [b, l + n, width] where the batch has both; ``pooled`` [b, width] of the latter."""
        out, (image, text) = {}, embeds_of(variables, batch)
        vl = ("vl",) if "vl" in model.trunk.experts else ()
        if image is not None:
            found = apply(variables, functools.partial(Vlmo.encode_image, experts=("image", *vl)), image)
            out |= dict(zip(("image", "image_vl"), found))
        if text is not None:
            found = apply(variables, functools.partial(Vlmo.encode_text, experts=("text", *vl)), text, batch["text_mask"])
            out |= dict(zip(("text", "text_vl"), found))
        if image is not None and text is not None:
            out["joint"] = joined(variables, batch)
            if "pooler" in model.heads:
                out["pooled"] = apply(variables, Vlmo.pool, out["joint"])
        return out

    def match(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """match [b, 2]: logits of row i's text and image, class 1 = match. ``image_features`` and ``text_features`` (of ``features``)
        stand for ``image`` and ``text`` where they were computed before."""
        return {"match": apply(variables, Vlmo.match, joined(variables, batch))}

    def mlm_logits(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """logits fp32 [b, l, vocab] of every position of a (masked) text, beside its image where the batch has one."""
        image, text = embeds_of(variables, batch)
        found = apply(variables, Vlmo.encode_text, text, batch["text_mask"])[0] if image is None else joined(variables, batch)[:, :text.shape[1]]
        found = apply(variables, Vlmo.predict_tokens, found) @ apply(variables, Vlmo.vocabulary)
        return {"logits": found.astype(jnp.float32)}

    def answer(variables: Variables, batch: Batch, *, key=None, method: str = "rank", k: int = 1) -> dict[str, jax.Array]:
        """Answers to questions ``text`` [b, l] about ``image``, of the model's own list: answer int32 [b] and score fp32 [b], its logit; logits [b, answers].

        ``candidates`` int32 [c, l] (with ``candidates_mask``, as the tokenizer gives them): answer is then the number of one of them, the likeliest
        that is in the list; the least number is the score where none is. top int32 [b, k] and top_score: the likeliest k, best first.
        """
        if method != "rank":
            raise ConfigError(f"method={method!r}: a classifier of answers writes none; nearest: 'rank'")
        logits = scored = apply(variables, Vlmo.answer, joined(variables, batch))
        if "candidates" in batch:
            if not len(listed):
                if len(batch["candidates"]) != model.classes:
                    raise ConfigError(f"{len(batch['candidates'])} candidates, but the model has {model.classes} answers and was not told which "
                                      f"(model.answers); nearest: its own {model.classes}, in their order")
            else:
                scored = rank(logits, batch["candidates"], batch["candidates_mask"], listed, tokens["pad"])
        top_score, top = jax.lax.top_k(scored, min(k, scored.shape[1]))
        return {"answer": top[:, 0].astype(jnp.int32), "score": top_score[:, 0], "top": top.astype(jnp.int32), "top_score": top_score, "logits": logits}

    def classify(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """logits fp32 [b, 2] of ``text`` beside ``images`` [b, 2, h, w, 3]: false, true."""
        return {"logits": judged(variables, batch)}

    offered = {"embed": (embed, "itc"), "match": (match, "itm"), "mlm_logits": (mlm_logits, "mlm"), "answer": (answer, "vqa"), "classify": (classify, "nlvr")}
    predict = {"features": features, "states": states, **{name: fn for name, (fn, head) in offered.items() if head in model.heads}}
    return System(model, init, loss, predict, papers=("2111.02358",), adopt={"vqkd": image_codes.FROM_VQKD})
