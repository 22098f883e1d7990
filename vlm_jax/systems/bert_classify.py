"""Classes of a text beside an image or two, by a BERT with a head on its first token: visual entailment, NLVR2 and the assignment of texts
to images before it (ALBEF, arXiv 2107.07651, section 4; BLIP, 2201.12086, section 5.4)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config as configs
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.losses.momentum import lerp, replaced, shadowed
from vlm_jax.losses.terms import wanted, weigh
from vlm_jax.models import bert, vit
from vlm_jax.models.sizes import sizes
from vlm_jax.nn.linear import projection
from vlm_jax.nn.pixels import compute_dtype, normalise
from vlm_jax.nn.unit import unit
from vlm_jax.system import Batch, Context, Output, System, Variables, run

TEACHER = ".*"
TARGETS = ("labels", "assignment")
HEADS = ("mlp", "linear")
SHARPNESS = 0.07      # of the similarity that assignments are drawn by (ALBEF models/model_pretrain_nlvr.py)
NEITHER = 2
TOWERS = ("(image|image_head|text)/.*", "", "copy")
TWINS = bert.AVERAGED
ADOPT = {
    "albef": (("text/blocks_pair/(first|second)/(.*)", r"text/blocks_cross/\2", "copy"), TOWERS),
    "blip": (("text/blocks_cross/cross_other/(.*)", rf"text/blocks_cross/cross/\1[0..{TWINS}]", "copy"), ("text/blocks_merge/merge/.*", "fresh", "copy"),
             ("text/blocks_merge/cross_other/(.*)", rf"text/blocks_cross/cross/\1[{TWINS}..]", "copy"), ("text/blocks_merge/(.*)", rf"text/blocks_cross/\1[{TWINS}..]", "copy"),
             (r"text/blocks_cross/.*", rf"\g<0>[0..{TWINS}]", "copy"), TOWERS),
}


class Classifier(nn.Module):
    """ViT, a BERT that reads the text beside what it saw, and a head of ``classes`` logits on the first token.

    first: the id that stands first, -1 for the tokenizer's. head: "mlp" (with a ReLU between), "linear". with_image_head: with the
    projection that assignments are drawn by.
    """
    image: vit.ViT
    text: bert.Bert
    classes: int
    head_kind: str = "mlp"
    first: int = -1
    embed: int = 0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: Any = jnp.float32

    def setup(self):
        if self.head_kind not in HEADS:
            raise ValueError(f"head={self.head_kind!r} is not known{nearest(self.head_kind, HEADS)}")
        self.head = (Head if self.head_kind == "mlp" else projection)(self.text.width, self.classes, self.dtype)
        if self.embed:
            self.image_head = projection(self.image.width, self.embed, self.dtype)

    def encode_image(self, image: jax.Array) -> jax.Array:
        """image [b, h, w, 3] -> tokens [b, n, width]; images [b, k, h, w, 3] -> [b, k, n, width]."""
        tokens = self.image(normalise(image.reshape(-1, *image.shape[-3:]), self.mean, self.std))
        return tokens.reshape(*image.shape[:-3], *tokens.shape[1:])

    def image_feature(self, tokens: jax.Array) -> jax.Array:
        """Tokens [b, n, width] -> unit vector [b, embed] of the class token."""
        return unit(self.image_head(tokens[:, 0]))

    def read(self, ids: jax.Array, mask: jax.Array, tokens: jax.Array) -> jax.Array:
        """ids [b, l] beside the tokens of an image [b, n, width] or of two [b, 2, n, width] -> states [b, l, width]."""
        return self.text(ids if self.first < 0 else ids.at[:, 0].set(self.first), mask, tokens)

    def classify(self, states: jax.Array) -> jax.Array:
        """States -> logits [b, classes]."""
        return self.head(states[:, 0])

    def __call__(self, image: jax.Array, ids: jax.Array):
        tokens = self.encode_image(image)
        own = tokens if tokens.ndim == 3 else tokens[:, 0]
        if self.text.pairing != "none" and tokens.ndim == 3:
            tokens = jnp.stack([tokens, tokens], 1)      # the pair is made of the batch's images
        return self.classify(self.read(ids, jnp.ones(ids.shape, bool), tokens)), self.image_feature(own) if self.embed else None


class Head(nn.Module):
    """[..., width] -> [..., classes] through a hidden layer of the same width; params dense/*, out/*."""
    width: int
    classes: int
    dtype: Any = jnp.float32

    def setup(self):
        self.dense, self.out = projection(self.width, self.width, self.dtype), projection(self.width, self.classes, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jax.nn.relu(self.dense(x)))


def build_model(*, image: dict, text: dict, tokens: dict, size: int, classes: int, head: str = "mlp", embed: int = 0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
                paper: str = "", dtype: str = "auto") -> Classifier:
    """The module of a config's ``model`` section. text: as for BERT, with its ``pairing`` for two images; tokens.enc, where there is one, stands first.
    embed: width of the projection that assignments are drawn by, 0 for none. paper: the arXiv id to cite."""
    dtype = compute_dtype(dtype)
    image = vit.ViT(**sizes(vit.VARIANTS, image_size=size, dtype=dtype, **image))
    text = bert.Bert(**sizes(bert.VARIANTS, vocab=tokens["vocab"], memory_width=image.width, dtype=dtype, **text))
    return Classifier(image, text, classes, head_kind=head, first=tokens.get("enc", -1), embed=embed, mean=tuple(mean), std=tuple(std), dtype=dtype)


def build_loss(*, weights: dict, momentum: float = 0.995, alpha: float = 0.0, alpha_ramp: int = 0, targets: str = "labels") -> dict[str, Any]:
    """The ``loss`` section, checked.

    weights: of ``cls``. alpha: share of a slow copy's distribution in the targets, reached linearly after ``alpha_ramp`` steps; 0: there is no
    copy. targets: "labels" of the data, or "assignment": of a text and two images of the batch, is it of the first, the second or neither
    (ALBEF's pre-training for NLVR2)?
    """
    if targets not in TARGETS:
        raise ConfigError(f"loss.targets={targets!r} is not known{nearest(targets, TARGETS)}")
    if not 0 <= alpha <= 1:
        raise ConfigError(f"loss.alpha={alpha} is not a share; nearest: {min(max(alpha, 0.0), 1.0)}")
    if alpha and targets == "assignment":
        raise ConfigError(f"loss.alpha={alpha}: assignments are learned without a slow copy; nearest: 0")
    return dict(weights=weights, momentum=momentum, alpha=alpha, alpha_ramp=alpha_ramp, targets=targets)


def build(config: Any) -> System:
    """The System of a resolved stage config. Raises ConfigError."""
    data = config.data
    o = configs.call(build_loss, config.loss, "loss")
    model = configs.call(build_model, config.model, "model", size=data.size)
    assigned, paired = o["targets"] == "assignment", model.text.pairing != "none"
    if not assigned and len(data.classes) != model.classes:
        raise ConfigError(f"data.classes={tuple(data.classes)} are {len(data.classes)}, but model.classes={model.classes}; nearest: model.classes={len(data.classes)}")
    if assigned and not (paired and model.embed and model.classes == 3):
        raise ConfigError("loss.targets='assignment' needs model.text.pairing for two images, model.embed above 0 and model.classes=3")
    if not assigned and paired != (data.images == 2):
        raise ConfigError(f"data.images={data.images}, but model.text.pairing={model.text.pairing!r}; nearest: data.images={1 + paired}")
    if data.microbatch:
        raise ConfigError(f"data.microbatch={data.microbatch} is not supported by bert_classify; nearest: 0, and model.*.remat for memory")
    key_of_images = "images" if paired and not assigned else "image"
    apply = functools.partial(run, model)

    def init(key, spec):
        return model.init(key, jnp.zeros((1, *spec[key_of_images].shape[1:]), jnp.float32), jnp.zeros((1, *spec["text"].shape[1:]), jnp.int32))

    def init_carry(variables: Variables):
        return {"teacher": jax.tree.map(jnp.copy, shadowed(variables, TEACHER))} if o["alpha"] else {}

    def next_carry(carry, update):
        return update if o["alpha"] else carry

    def logits_of(variables: Variables, batch: Batch, tokens: jax.Array, key=None):
        return apply(variables, Classifier.classify, apply(variables, Classifier.read, batch["text"], batch["text_mask"], tokens, key=key))

    def loss(variables: Variables, carry, batch: Batch, context: Context):
        tokens = apply(variables, Classifier.encode_image, batch[key_of_images], key=context.drop("image"))
        if assigned:
            similar = jax.lax.stop_gradient(apply(variables, Classifier.image_feature, tokens))
            first, second, label = assign(context.key("assign"), similar @ similar.T / SHARPNESS)
            if "assigned" in batch:
                first, second, label = batch["assigned"][:, 0], batch["assigned"][:, 1], batch["label"]
            tokens = jnp.stack([tokens[first], tokens[second]], 1)
        else:
            label = batch["label"]
        logits = logits_of(variables, batch, tokens, context.drop("text")).astype(jnp.float32)
        logp = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(logp, label[:, None], axis=1)[:, 0]
        update, metrics = {}, {"accuracy": (logits.argmax(1) == label).mean()}
        if o["alpha"]:
            teacher = lerp(carry["teacher"], shadowed(variables, TEACHER), o["momentum"])
            slow = replaced(variables, teacher)
            taught = logits_of(slow, batch, apply(slow, Classifier.encode_image, batch[key_of_images], key=context.drop("teacher_image")), context.drop("teacher_text"))
            alpha = o["alpha"] * jnp.minimum(1.0, context.step / o["alpha_ramp"]) if o["alpha_ramp"] else o["alpha"]
            nll = (1 - alpha) * nll - alpha * (jax.nn.softmax(jax.lax.stop_gradient(taught).astype(jnp.float32)) * logp).sum(1)
            update, metrics["alpha"] = {"teacher": teacher}, jnp.asarray(alpha, jnp.float32)
        total, raw = weigh({"cls": nll.mean()}, {k: w for k, w in o["weights"].items() if wanted(o["weights"], k)})
        return total, Output({**raw, **metrics}, update=update)

    def classify(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """logits fp32 [b, classes] of ``text`` beside ``image`` [b, h, w, 3], or ``images`` [b, 2, h, w, 3]; states [b, l, width] of the text."""
        tokens = apply(variables, Classifier.encode_image, batch["images" if paired else "image"])
        states = apply(variables, Classifier.read, batch["text"], batch["text_mask"], tokens)
        return {"logits": apply(variables, Classifier.classify, states).astype(jnp.float32), "states": states, "image": tokens}

    return System(model, init, loss, {"classify": classify}, init_carry, next_carry, adopt=ADOPT, papers=tuple(p for p in (config.model.get("paper", ""),) if p))


def assign(key: jax.Array, similarity: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Two images for each text and the answer: (first, second, label), int [b] each; rows of ``similarity`` [b, b] say which images are alike.

    Label 0, a third of the texts: their own image and one like it; 1: the same the other way round; 2: two that are like their own, not it.
    """
    rows = len(similarity)
    if rows < 3:
        raise ValueError(f"a batch of {rows} has no two other images for a text; nearest: 3")
    like, kind = jax.random.split(key)
    logp = jnp.where(jnp.eye(rows, dtype=bool), -jnp.inf, jax.nn.log_softmax(similarity, axis=1))
    _, drawn = jax.lax.top_k(logp + jax.random.gumbel(like, logp.shape), 2)      # without replacement
    label = jax.random.randint(kind, (rows,), 0, 3)
    own = jnp.arange(rows)
    return (jnp.where(label == 0, own, drawn[:, 0]), jnp.where(label == 1, own, jnp.where(label == NEITHER, drawn[:, 1], drawn[:, 0])), label)
