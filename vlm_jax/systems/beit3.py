"""BEiT-3: images as a foreign language (arXiv 2208.10442; microsoft/unilm beit3, whose pre-training was never released).

One tower; what a stage learns, and which heads there are, follows from ``loss.weights``: masked data modelling (mim, mlm, pair_mim,
pair_mlm), contrast (itc), captions (cap), answers (vqa), classes of an image or of two beside a text (cls).
"""

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
from vlm_jax.losses.answers import answer_loss, rank, soft_targets, table
from vlm_jax.losses.block_mask import block_mask
from vlm_jax.losses.captioning import caption_nll, captioning
from vlm_jax.losses.contrastive import contrastive
from vlm_jax.losses.masked import gather_chosen, mask_share
from vlm_jax.losses.mixing import mix, soft_cross_entropy, soft_labels
from vlm_jax.losses.terms import wanted, weigh
from vlm_jax.models import beit3, image_codes
from vlm_jax.models.sizes import sizes
from vlm_jax.nn.pixels import compute_dtype, normalise, unnormalise
from vlm_jax.nn.unit import unit
from vlm_jax.system import Batch, Context, Output, System, Variables, run

MIM, MLM, PAIR_MIM, PAIR_MLM, ITC, CAP, VQA, CLS = "mim", "mlm", "pair_mim", "pair_mlm", "itc", "cap", "vqa", "cls"
TERMS = (MIM, MLM, PAIR_MIM, PAIR_MLM, ITC, CAP, VQA, CLS)
MASKED = (MIM, MLM, PAIR_MIM, PAIR_MLM)
ALONE = (VQA, CLS)      # what is not learned beside other terms
STREAMS = ("image", "text", "pair")
PAIR_MASKS = ("both", "one")
METHODS = ("rank",)
CLASSIFIER_SCALE = 1e-3


class Beit3(nn.Module):
    """The tower and the heads that ``terms`` need. Params: the tower's ``image/*``, ``text/*``, ``blocks/*``, ``output_norm/*``; ``mlm_head``,
    ``mim_head``; ``image_head``, ``text_head``, ``logit_scale``; ``pooler``, ``vqa_head``; ``pair_head`` or ``class_head``; ``tokenizer/*``,
    where what tells masked patches has some, which are frozen (``trainable``)."""
    tower: beit3.Tower
    targets: nn.Module
    terms: tuple[str, ...]
    classes: int = 0
    images: int = 1
    mask_id: int = 0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    scale: float = 1 / 0.07
    dtype: Any = jnp.float32

    def setup(self):
        t, has = self.tower, set(self.terms).intersection
        self.body = t.clone(parent=None, name=None)
        nn.share_scope(self, self.body)
        if has({MLM, PAIR_MLM, CAP}):
            self.mlm_head = beit3.TokenHead(t.vocab, t.width, self.dtype)
        if has({MIM, PAIR_MIM}):
            self.mim_head = beit3.TokenHead(self.targets.codes, t.width, self.dtype)
            self.tokenizer = self.targets.clone(parent=None, name=None)
        if has({ITC}):
            self.image_head, self.text_head = (beit3.linear(t.width, t.width, self.dtype, use_bias=False) for _ in range(2))
            self.logit_scale = self.param("logit_scale", nn.with_logical_partitioning(nn.initializers.constant(math.log(self.scale)), ()), (), jnp.float32)
        if has({VQA}):
            self.pooler = beit3.Pooler(t.width, t.eps, self.dtype)
            self.vqa_head = beit3.two_layer_head(t.width, self.classes, t.eps, self.dtype)
        if has({CLS}) and self.images == 2:
            self.pair_head = beit3.two_layer_head(t.width, self.classes, t.eps, self.dtype, CLASSIFIER_SCALE, input_norm=True)
        elif has({CLS}):
            self.class_head = beit3.ClassHead(t.width, self.classes, t.eps, CLASSIFIER_SCALE, self.dtype)

    def encode(self, image: jax.Array | None, ids: jax.Array | None, real: jax.Array | None = None, masked: jax.Array | None = None,
               unidirectional: str = "none") -> jax.Array:
        """Images [b, h, w, 3] and ids [b, l], or one of them (None) -> states [b, 1 + n + l, width], image first; see ``beit3.Tower``."""
        return self.body(None if image is None else normalise(image, self.mean, self.std), ids, real, masked, unidirectional)

    def codes(self, image: jax.Array) -> jax.Array:
        """image [b, h, w, 3] -> ids [b, n] that its patches are to be told as."""
        return jax.lax.stop_gradient(self.tokenizer(unnormalise(image, self.mean, self.std)))

    def words(self, states: jax.Array) -> jax.Array:
        """States -> fp32 logits [..., vocab]."""
        return self.mlm_head.logits(states)

    def patches(self, states: jax.Array) -> jax.Array:
        """States -> fp32 logits [..., codes]."""
        return self.mim_head.logits(states)

    def scored(self, states: jax.Array, head: str) -> tuple[jax.Array, jax.Array]:
        """What the loss of "mlm" or "mim" multiplies: (states [..., width + 1], vocabulary [width + 1, ids])."""
        head = self.mlm_head if head == MLM else self.mim_head
        return head(states), head.vocabulary()

    def image_feature(self, states: jax.Array) -> jax.Array:
        """States of images alone -> unit vectors [b, width]."""
        return unit(self.image_head(states[:, 0]))

    def text_feature(self, states: jax.Array) -> jax.Array:
        """States of texts alone -> unit vectors [b, width]."""
        return unit(self.text_head(states[:, 0]))

    def temperature(self) -> jax.Array:
        """The multiplier of cosines."""
        return jnp.exp(self.logit_scale)

    def pool(self, states: jax.Array) -> jax.Array:
        """What answers are told from [b, width]: the image's class token beside the question."""
        return self.pooler(states[:, 0])

    def tell(self, pooled: jax.Array) -> jax.Array:
        """-> fp32 logits [b, classes] of the listed answers."""
        return self.vqa_head(pooled).astype(jnp.float32)

    def classify(self, states: jax.Array) -> jax.Array:
        """States of images [b, 1 + n, width], or of two beside their text [b, 2, 1 + n + l, width] -> fp32 logits [b, classes]."""
        if self.images == 2:
            first = jnp.stack([states[:, :, 0], states[:, :, self.tower.image_tokens]], 2)
            return self.pair_head(first.reshape(len(states), -1)).astype(jnp.float32)
        return self.class_head(states[:, 1:].mean(1)).astype(jnp.float32)

    def begin(self, image: jax.Array, ids: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """An image and the first ids [b, k] of a caption -> (logits [b, vocab] of the next, cache)."""
        states, own = self.body.prefill(normalise(image, self.mean, self.std), self.behind(ids), cache["keys"])
        return self.words(states[:, -1]), {"keys": own, "position": cache["position"] + ids.shape[1]}

    def extend(self, ids: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """New ids [b, k] -> (logits [b, vocab] of the next, cache). They stand where the mask stood."""
        states, own = self.body.extend(self.behind(ids), cache["keys"], cache["position"])
        return self.words(states[:, -1]), {"keys": own, "position": cache["position"] + ids.shape[1]}

    def behind(self, ids: jax.Array) -> jax.Array:
        """ids [b, k] with a mask behind them: what comes next is told there."""
        return jnp.pad(ids, ((0, 0), (0, 1)), constant_values=self.mask_id)

    def __call__(self, image: jax.Array, ids: jax.Array):
        states, terms, out = self.encode(image, ids), set(self.terms), []
        if terms & {MLM, PAIR_MLM, CAP}:
            out.append(self.words(states[:, :1]))
        if terms & {MIM, PAIR_MIM}:
            out += [self.patches(states[:, :1]), *([self.codes(image)] if not isinstance(self.targets, image_codes.Unknown) else [])]
        if ITC in terms:
            out += [self.image_feature(states), self.text_feature(states), self.logit_scale]
        if VQA in terms:
            out.append(self.tell(self.pool(states)))
        if CLS in terms:
            out.append(self.classify(jnp.stack([states, states], 1) if self.images == 2 else states))
        return out


def build_model(*, tower: dict, tokens: dict, size: int, terms: tuple[str, ...], images: int = 1, targets: dict | None = None, classes: int = 0,
                answers: tuple[str, ...] = (), answer_ids: tuple[tuple[int, ...], ...] = (), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
                scale: float = 1 / 0.07, dtype: str = "auto") -> Beit3:
    """The module of a config's ``model`` section, with the heads that ``terms`` need.

    targets: what masked patches are to be told as: kind "colours" (a stand-in; ``bins``), "vqkd" (a frozen tokenizer: ``encoder``, a ViT, ``codes`` and
    ``code_width``; its weights are for ``init`` to bring, and ``trainable`` leaves out tokenizer/.*) or "unknown". classes: of an image, of two beside a
    text, or answers; 0: as many as ``answers``. answers: the list that questions are answered from, in the order of
    the head's classes, or the name of a file with one a line; answer_ids: the same as the tokenizer has them (``vlm_jax.stage`` fills it).
    """
    dtype = compute_dtype(dtype)
    fields = sizes(beit3.VARIANTS, image_size=size, vocab=tokens["vocab"], dtype=dtype, **tower)
    tower = beit3.Tower(**{"final_norm": not set(terms) & set(ALONE) or images == 2, **fields})
    if not 0 <= tokens["mask"] < tower.vocab:
        raise ConfigError(f"model.tokens.mask={tokens['mask']} is no row of a table of {tower.vocab}; nearest: model.tokens.vocab={tokens['mask'] + 1}")
    if VQA in terms and answers and classes not in (0, len(answers)):
        raise ConfigError(f"model.classes={classes}, but model.answers are {len(answers)}; nearest: {len(answers)}")
    classes = classes or len(answers)
    if set(terms) & set(ALONE) and classes < 2:
        raise ConfigError(f"model.classes={classes} leaves nothing to choose; nearest: 2" + (", or model.answers" if VQA in terms else ""))
    return Beit3(tower, image_codes.make_targets(tower.patch, size, **(targets or {})), terms, classes=classes, images=images, mask_id=tokens["mask"],
                 mean=tuple(mean), std=tuple(std), scale=scale, dtype=dtype)


def build_loss(*, weights: dict, streams: dict | None = None, text_share: float = 0.15, pair_text_share: float = 0.5, image_masked: int = 75,
               mask_min_cells: int = 16, pair_masks: str = "both", caption_share: float = 0.6, label_smoothing: float = 0.0, drop_worst: float = 0.0,
               drop_worst_after: int = 0, mixup: float = 0.0, cutmix: float = 0.0) -> dict[str, Any]:
    """The ``loss`` section, checked.

    weights: of ``mim`` and ``mlm`` (images and texts alone), ``pair_mim`` and ``pair_mlm``, ``itc``, ``cap``, ``vqa``, ``cls``; the model has no heads
    for those that are left out or 0. The paper names no weights of its terms.
    streams: of so many rows side by side as the three numbers add up to, how many are used as images alone (their text is not looked at), as
    texts alone (nor their image) and as pairs; default 1, 1, 1. text_share, pair_text_share: of a text's tokens that are masked. image_masked: patches
    of an image that are masked, block-wise (75 of 14 x 14, the official code's "40%"); mask_min_cells: the smallest block's area.
    pair_masks: a pair has "both" sides masked at once, or "one", drawn for each (the paper does not say).
    caption_share: of a caption's tokens. label_smoothing: of captions, shared by all wrong ids; of classes, by all. drop_worst: share of the
    caption tokens with the largest losses that is left out after ``drop_worst_after`` steps. mixup, cutmix: of images with classes, see ``losses.mixing``.
    """
    for name in weights:
        if name not in TERMS:
            raise ConfigError(f"loss.weights.{name}={weights[name]} is not a term{nearest(name, TERMS)}")
    terms = tuple(t for t in TERMS if wanted(weights, t))
    if not terms or set(terms) & set(ALONE) and len(terms) > 1:
        raise ConfigError(f"loss.weights={weights}: {' and '.join(ALONE)} are learned alone, and something must be; nearest: one of them, or others")
    streams = {**dict.fromkeys(STREAMS, 1), **(streams or {})}
    for name, count in streams.items():
        if name not in STREAMS:
            raise ConfigError(f"loss.streams.{name}={count} is not a stream{nearest(name, STREAMS)}")
        if count < 0:
            raise ConfigError(f"loss.streams.{name}={count} rows are no number; nearest: 0")
    for term, stream in ((MIM, "image"), (MLM, "text"), (PAIR_MIM, "pair"), (PAIR_MLM, "pair")):
        if term in terms and not streams[stream]:
            raise ConfigError(f"loss.weights.{term}={weights[term]}, but loss.streams.{stream}=0; nearest: loss.streams.{stream}=1")
    for name, share in (("text_share", text_share), ("pair_text_share", pair_text_share), ("caption_share", caption_share)):
        if not 0 < share <= 1:
            raise ConfigError(f"loss.{name}={share} is not a share; nearest: {min(max(share, 0.15), 1.0)}")
    for name, share in (("label_smoothing", label_smoothing), ("drop_worst", drop_worst)):
        if not 0 <= share < 1:
            raise ConfigError(f"loss.{name}={share} is not a share below 1; nearest: {min(max(share, 0.0), 0.9)}")
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if value < 0 or value and CLS not in terms:
            raise ConfigError(f"loss.{name}={value}: mixtures are of images with classes (loss.weights.{CLS}), by a number above 0; nearest: 0")
    if pair_masks not in PAIR_MASKS:
        raise ConfigError(f"loss.pair_masks={pair_masks!r} is not known{nearest(pair_masks, PAIR_MASKS)}")
    return dict(weights=weights, terms=terms, streams=streams, text_share=text_share, pair_text_share=pair_text_share, image_masked=image_masked,
                mask_min_cells=mask_min_cells, pair_masks=pair_masks, caption_share=caption_share, label_smoothing=label_smoothing, drop_worst=drop_worst,
                drop_worst_after=drop_worst_after, mixup=mixup, cutmix=cutmix)


def build(config: Any) -> System:
    """The System of a resolved stage config. Raises ConfigError."""
    data, tokens = config.data, configs.to_plain(config.model.tokens)
    o = configs.call(build_loss, config.loss, "loss")
    terms, weights = o["terms"], o["weights"]
    model = configs.call(build_model, config.model, "model", size=data.size, terms=terms, images=data.images)
    check(o, model, data)
    listed = table(config.model.get("answer_ids", ()), tokens["pad"])
    grid = model.tower.image_size // model.tower.patch
    apply = functools.partial(run, model)

    def init(key, spec):
        variables = model.init(key, jnp.zeros((1, data.size, data.size, 3), jnp.float32), jnp.zeros((1, 2), jnp.int32))
        return {**variables, "params": beit3.by_depth(variables["params"])}

    def encode(variables: Variables, *args: Any, key=None) -> jax.Array:
        return apply(variables, Beit3.encode, *args, key=key)

    # ---- masked data modelling

    def told(variables: Variables, states: jax.Array, ids: jax.Array, chosen: jax.Array, most: int, head: str):
        """(cross-entropy over chosen places, in nats; accuracy). states [b, l, width], ids and chosen [b, l], at most ``most`` of a row."""
        at, valid = gather_chosen(chosen, most)
        states, ids = jnp.take_along_axis(states, at[..., None], axis=1), jnp.take_along_axis(ids, at, axis=1)
        nll, count, hits = captioning(*apply(variables, functools.partial(Beit3.scored, head=head), states), ids, valid)
        return nll / jnp.maximum(count, 1), hits / jnp.maximum(count, 1)

    def mask_image(context: Context, name: str, rows: int):
        return block_mask(context.key(f"{name}_image"), rows, grid, o["image_masked"], o["mask_min_cells"])

    def mask_text(context: Context, name: str, ids, real, share: float):
        """(corrupted ids, chosen, the most that a row can have)."""
        corrupted, chosen = mask_share(context.key(f"{name}_text"), ids, real, share=share, mask_id=tokens["mask"])
        return corrupted, chosen, max(1, int(ids.shape[1] * share + 0.5))

    def streams(batch: Batch) -> dict[str, Batch]:
        """The rows of each stream: of every group of rows side by side, the first are images alone, the next texts alone, the others pairs."""
        counts, out, start = o["streams"], {}, 0
        for name in STREAMS:
            def cut(x, start=start, count=counts[name]):
                return x.reshape(-1, sum(counts.values()), *x.shape[1:])[:, start:start + count].reshape(-1, *x.shape[1:])
            out[name], start = {k: cut(batch[k]) for k in ("image", "text", "text_mask")}, start + counts[name]
        return out

    def masked_data(variables: Variables, batch: Batch, context: Context):
        part, found, metrics = streams(batch), {}, {}
        image, text, pair = (part[name] for name in STREAMS)
        if MIM in terms:
            masked = mask_image(context, "image", len(image["image"]))
            states = encode(variables, image["image"], None, None, masked, key=context.drop("image"))
            found[MIM], metrics["mim_accuracy"] = told(variables, states[:, 1:], apply(variables, Beit3.codes, image["image"]), masked, o["image_masked"], MIM)
        if MLM in terms:
            ids, chosen, most = mask_text(context, "text", text["text"], text["text_mask"], o["text_share"])
            states = encode(variables, None, ids, text["text_mask"], key=context.drop("text"))
            found[MLM], metrics["mlm_accuracy"] = told(variables, states, text["text"], chosen, most, MLM)
        if {PAIR_MIM, PAIR_MLM} & set(terms):
            masked = mask_image(context, "pair", len(pair["image"]))
            ids, chosen, most = mask_text(context, "pair", pair["text"], pair["text_mask"], o["pair_text_share"])
            if o["pair_masks"] == "one":
                side = jax.random.bernoulli(context.key("pair_side"), 0.5, (len(ids), 1))
                masked, chosen, ids = masked & side, chosen & ~side, jnp.where(side, pair["text"], ids)
            states = encode(variables, pair["image"], ids, pair["text_mask"], masked, key=context.drop("pair"))
            seen, read = states[:, 1:model.tower.image_tokens], states[:, model.tower.image_tokens:]
            if PAIR_MIM in terms:
                found[PAIR_MIM], metrics["pair_mim_accuracy"] = told(variables, seen, apply(variables, Beit3.codes, pair["image"]), masked, o["image_masked"],
                                                                     MIM)
            if PAIR_MLM in terms:
                found[PAIR_MLM], metrics["pair_mlm_accuracy"] = told(variables, read, pair["text"], chosen, most, MLM)
        return found, metrics

    # ---- tuning

    def contrast(variables: Variables, batch: Batch, context: Context):
        image = apply(variables, Beit3.image_feature, encode(variables, batch["image"], None, key=context.drop("itc_image")))
        text = apply(variables, Beit3.text_feature, encode(variables, None, batch["text"], batch["text_mask"], key=context.drop("itc_text")))
        scale = apply(variables, Beit3.temperature)
        loss, metrics = contrastive(image, text, scale)
        return loss, {**metrics, "scale": scale}

    def write(variables: Variables, batch: Batch, context: Context):
        """Smoothed divergence of masked tokens under UniLM's mask, in nats a token, and accuracy."""
        ids, chosen, most = mask_text(context, "caption", batch["text"], batch["text_mask"], o["caption_share"])
        ids, chosen = batch.get("corrupted", ids), batch.get("chosen", chosen)
        states = apply(variables, functools.partial(Beit3.encode, unidirectional="text"), batch["image"], ids, batch["text_mask"], key=context.drop("caption"))
        at, valid = gather_chosen(chosen, ids.shape[1] if "chosen" in batch else most)
        states = jnp.take_along_axis(states[:, model.tower.image_tokens:], at[..., None], axis=1)
        states, vocabulary = apply(variables, functools.partial(Beit3.scored, head=MLM), states)
        wanted_ids, each = jnp.take_along_axis(batch["text"], at, axis=1).reshape(-1, 1), valid.reshape(-1, 1)
        wrong, eps = model.tower.vocab - 1, o["label_smoothing"]
        nll, _, hits = caption_nll(states.reshape(-1, 1, states.shape[-1]), vocabulary, wanted_ids, each, label_smoothing=eps * (wrong + 1) / wrong)
        if eps:      # of the divergence: the entropy of what is to be told
            nll = nll + ((1 - eps) * math.log(1 - eps) + eps * math.log(eps / wrong))
        each, count = each[:, 0], valid.sum()
        kept = each
        if o["drop_worst"]:
            rank = jnp.argsort(jnp.argsort(jnp.where(each, nll, jnp.inf)))
            some = each & (rank < jnp.floor(count * (1 - o["drop_worst"]) + 1e-4).astype(jnp.int32))
            kept = jnp.where(context.step > o["drop_worst_after"], some, each)
        return jnp.where(kept, nll, 0).sum() / jnp.maximum(kept.sum(), 1), {"token_accuracy": hits.sum() / jnp.maximum(count, 1)}

    def answered(variables: Variables, batch: Batch, key=None) -> jax.Array:
        states = encode(variables, batch["image"], batch["text"], batch["text_mask"], key=key)
        return apply(variables, Beit3.tell, apply(variables, Beit3.pool, states))

    def question(variables: Variables, batch: Batch, context: Context):
        logits = answered(variables, batch, context.drop("question"))
        return answer_loss(logits, batch["answer_target"] if "answer_target" in batch else soft_targets(batch, listed, tokens["pad"]))

    def class_logits(variables: Variables, batch: Batch, key=None) -> jax.Array:
        if data.images == 2:
            pictures, rows = batch["images"], len(batch["images"])
            ids, real = (jnp.repeat(batch[k], 2, axis=0) for k in ("text", "text_mask"))
            states = encode(variables, pictures.reshape(-1, *pictures.shape[2:]), ids, real, key=key)
            return apply(variables, Beit3.classify, states.reshape(rows, 2, *states.shape[1:]))
        return apply(variables, Beit3.classify, encode(variables, batch["image"], None, key=key))

    def classed(variables: Variables, batch: Batch, context: Context):
        targets = soft_labels(batch["label"], model.classes, o["label_smoothing"] if context.train else 0.0)
        if context.train and data.images == 1:
            image = normalise(batch["image"], model.mean, model.std)
            image, targets = mix(context.key("mix"), image, targets, mixup=o["mixup"], cutmix=o["cutmix"])
            batch = {**batch, "image": image}
        logits = class_logits(variables, batch, context.drop("class"))
        return soft_cross_entropy(logits, targets), {"accuracy": (logits.argmax(1) == targets.argmax(1)).mean()}

    def loss(variables: Variables, carry, batch: Batch, context: Context):
        found, metrics = masked_data(variables, batch, context) if set(terms) & set(MASKED) else ({}, {})
        for term, fn in ((ITC, contrast), (CAP, write), (VQA, question), (CLS, classed)):
            if term in terms:
                found[term], more = fn(variables, batch, context)
                metrics |= more
        total, raw = weigh(found, {k: w for k, w in weights.items() if wanted(weights, k)})
        return total, Output({**raw, **metrics})

    # ---- predictions

    def features(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """image [b, 1 + n, width], an image alone; states [b, l, width], a text alone: for what the batch has."""
        out = {}
        if "image" in batch:
            out["image"] = encode(variables, batch["image"], None)
        if "text" in batch:
            out["states"] = encode(variables, None, batch["text"], batch.get("text_mask"))
        return out

    def fuse(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """image [b, 1 + n, width] and states [b, l, width] of a pair, each beside the other; with the heads of masked modelling image_logits
        [b, n, codes] and text_logits [b, l, vocab]. ``masked`` bool [b, n]: patches that are hidden."""
        states = encode(variables, batch["image"], batch["text"], batch.get("text_mask"), batch.get("masked"))
        out = {"image": states[:, :model.tower.image_tokens], "states": states[:, model.tower.image_tokens:]}
        if {MIM, PAIR_MIM} & set(terms):
            out["image_logits"] = apply(variables, Beit3.patches, out["image"][:, 1:])
        if {MLM, PAIR_MLM, CAP} & set(terms):
            out["text_logits"] = apply(variables, Beit3.words, out["states"])
        return out

    def embed(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """image_embed and text_embed [b, width], for what the batch has; logit_scale, the multiplier."""
        found, out = features(variables, batch), {"logit_scale": apply(variables, Beit3.temperature)}
        if "image" in found:
            out["image_embed"] = apply(variables, Beit3.image_feature, found["image"])
        if "states" in found:
            out["text_embed"] = apply(variables, Beit3.text_feature, found["states"])
        return out

    def caption_logits(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """logits fp32 [b, l, vocab] of every place of a text with masks in it, under UniLM's mask: row t tells the id at t."""
        states = apply(variables, functools.partial(Beit3.encode, unidirectional="text"), batch["image"], batch["text"], batch.get("text_mask"))
        return {"logits": apply(variables, Beit3.words, states[:, model.tower.image_tokens:])}

    def generate(variables: Variables, batch: Batch, *, key=None, method: str = "greedy", beams: int = 1, max_length: int = 0,
                 **options: Any) -> dict[str, jax.Array]:
        """text int32 [b, max_length], from <bos> on, and score [b]: each id is told at a mask behind those before it, whose place it then takes.

        max_length (0: data.length) counts begin and end. Beam search ranks as the official code does (``beam_rule`` "unilm"); other options as
        ``vlm_jax.decode`` has them.
        """
        length, limit = max_length or data.length, model.tower.positions - beit3.DEAD_ROWS - 1
        if length > limit:
            raise ConfigError(f"max_length={length} exceeds the {limit} places of a caption with a mask behind it; nearest: {limit}")
        rows = len(batch["image"])

        def prefill(ids):
            cache = {"keys": model.tower.clone(parent=None).init_cache(rows, length + 1), "position": jnp.int32(0)}
            logits, cache = apply(variables, Beit3.begin, batch["image"], ids, cache)
            return logits, (), cache

        def extend(cache, ids):
            logits, cache = apply(variables, Beit3.extend, ids, cache)
            return logits, (), cache

        return decode(prefill, extend, jnp.full((rows, 1), tokens["bos"], jnp.int32), method=method, beams=beams, max_length=length, key=key,
                      eos_ids=tokens["eos"], pad_id=tokens["pad"], batch_axis={"keys": 1, "position": 0}, **{"beam_rule": "unilm", **options})

    def answer(variables: Variables, batch: Batch, *, key=None, method: str = "rank", k: int = 1) -> dict[str, jax.Array]:
        """The best of ``candidates`` int32 [c, l] (with ``candidates_mask``), as the tokenizer gives them, for questions ``text`` about ``image``: answer
        int32 [b], an index into them, and score fp32 [b], its logit; those that are not in the model's list are never chosen before those
        that are. Without candidates: an index into the list. top int32 [b, k], top_score: the best ``k``. logits fp32 [b, classes]; pooled [b, width]."""
        if method not in METHODS:
            raise ConfigError(f"method={method!r}: answers are chosen from a list; nearest: {METHODS[0]!r}")
        states = encode(variables, batch["image"], batch["text"], batch["text_mask"])
        pooled = apply(variables, Beit3.pool, states)
        logits = scores = apply(variables, Beit3.tell, pooled)
        if "candidates" in batch:
            if not len(listed):
                raise ConfigError("model.answers is empty: nobody knows which answers the head's classes are; nearest: a file with one a line")
            scores = rank(logits, batch["candidates"], batch["candidates_mask"], listed, tokens["pad"])
        best, top = jax.lax.top_k(scores, min(k, scores.shape[1]))
        return {"answer": top[:, 0].astype(jnp.int32), "score": best[:, 0], "top": top.astype(jnp.int32), "top_score": best, "logits": logits, "pooled": pooled}

    def classify(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """logits fp32 [b, classes] of ``image`` [b, h, w, 3], or of ``images`` [b, 2, h, w, 3] beside ``text``."""
        return {"logits": class_logits(variables, batch)}

    offered = {"features": (features, True), "fuse": (fuse, True), "embed": (embed, {ITC}), "caption_logits": (caption_logits, {MLM, PAIR_MLM, CAP}),
               "generate": (generate, {MLM, PAIR_MLM, CAP} if not model.tower.joint_layers else set()), "answer": (answer, {VQA}),
               "classify": (classify, {CLS})}
    return System(model, init, loss, {name: fn for name, (fn, needed) in offered.items() if needed is True or needed & set(terms)}, papers=("2208.10442",),
                  adopt={"vqkd": image_codes.FROM_VQKD})


def check(o: dict[str, Any], model: Beit3, data: Any) -> None:
    """Raises ConfigError where loss, model and data do not go together."""
    terms, patches, group = set(o["terms"]), model.tower.image_tokens - 1, sum(o["streams"].values())
    if terms & {MIM, PAIR_MIM} and not 0 < o["image_masked"] <= patches:
        raise ConfigError(f"loss.image_masked={o['image_masked']} of {patches} patches; nearest: {round(75 / 196 * patches)}")
    if terms & set(MASKED) and data.batch % group:
        raise ConfigError(f"data.batch={data.batch} does not divide into groups of {group} rows (loss.streams); nearest: "
                          f"{max(1, round(data.batch / group)) * group}")
    if data.microbatch:
        raise ConfigError(f"data.microbatch={data.microbatch} is not supported by beit3; nearest: 0, and model.tower.remat for memory")
    if not data.images and terms != {MLM}:
        raise ConfigError(f"data.images=0, but of loss.weights only {MLM} learns from texts alone; nearest: 1")
    if data.images > 2 or data.images == 2 and CLS not in terms:
        raise ConfigError(f"data.images={data.images}: two images stand beside a text where loss.weights has cls, else one; nearest: "
                          f"{2 if CLS in terms else 1}")
    if data.images == 2 and (o["mixup"] or o["cutmix"]):
        raise ConfigError(f"loss.mixup={o['mixup']} and loss.cutmix={o['cutmix']} are of images alone, not of data.images=2; nearest: 0")
    if CLS in terms and len(data.classes) not in (0, model.classes):
        raise ConfigError(f"data.classes={tuple(data.classes)} are {len(data.classes)}, but model.classes={model.classes}; nearest: "
                          f"model.classes={len(data.classes)}")
    if CLS in terms and data.train and not data.classes:
        raise ConfigError("data.classes=() gives batches no label; nearest: the names of the classes")
    if VQA in terms and data.train and not data.answers:
        raise ConfigError("data.answers=0, but a system that answers learns from answers; nearest: 10, and data.answer_length=8")
    if data.length > model.tower.positions - beit3.DEAD_ROWS:
        places = model.tower.positions - beit3.DEAD_ROWS
        raise ConfigError(f"data.length={data.length} exceeds the {places} places of model.tower.positions={model.tower.positions}; nearest: {places}")
