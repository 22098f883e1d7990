"""A tower alone: a ViT (arXiv 2010.11929), a BERT (arXiv 1810.04805) or a language model (OPT, LLaMA, T5) as published, for other
stages to start from.

Its leaves have the paths that a system of several towers gives them (``image/...``, ``text/...``, ``lm_head/...``, ``language/...``), so
that the rules of an ``init`` are short. A language model learns to predict the next token; the others are called, not trained.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config as configs
from vlm_jax.decode import generate as decode
from vlm_jax.errors import ConfigError
from vlm_jax.losses.captioning import caption_nll, captioning
from vlm_jax.losses.terms import wanted, weigh
from vlm_jax.models import bert, t5, vit
from vlm_jax.models.language import Language, continuation, predict_ids
from vlm_jax.models.language import build as build_language
from vlm_jax.models.sizes import sizes
from vlm_jax.nn.chunk import chunked
from vlm_jax.nn.pixels import compute_dtype, normalise
from vlm_jax.system import Batch, Context, Output, System, Variables, drop_key, run

LM = "lm"

PAPERS = {"opt": ("2205.01068",), "llama": ("2302.13971",), "t5": ("1910.10683", "2210.11416")}


class SingleTower(nn.Module):
    """image: a ViT, or text: a BERT, with the head of masked modelling where ``with_lm_head``, or language: a language model."""
    image: vit.ViT | None
    text: bert.Bert | None
    language: Language | None = None
    with_lm_head: bool = False
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: Any = jnp.float32

    def setup(self):
        if self.with_lm_head:
            self.lm_head = bert.LanguageHead(self.text.vocab, self.text.width, self.text.eps, self.dtype)

    def encode_image(self, image: jax.Array) -> jax.Array:
        """image [b, h, w, 3] -> tokens [b, n, width]."""
        return self.image(normalise(image, self.mean, self.std))

    def encode_text(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """ids [b, l] -> states [b, l, width]."""
        return self.text(ids, mask)

    def predict_tokens(self, states: jax.Array) -> jax.Array:
        """States -> logits [b, l, vocab]."""
        return self.lm_head(states) @ self.lm_head.vocabulary(self.text.table())

    def __call__(self, image: jax.Array, ids: jax.Array):
        if self.image is not None:
            return self.encode_image(image)
        if self.language is not None:
            x = self.language.embed(ids)
            return self.language.logits(self.language(x, None, x) if isinstance(self.language, t5.T5) else self.language(x))
        states = self.encode_text(ids, jnp.ones(ids.shape, bool))
        return self.lm_head(states) if self.with_lm_head else states


def build_model(*, size: int, image: dict | None = None, text: dict | None = None, tokens: dict | None = None, lm_head: bool = False,
                mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), dtype: str = "auto", language: dict | None = None) -> SingleTower:
    """The module of a config's ``model`` section: it has ``image``, or ``tokens`` and ``text`` or ``language``."""
    if sum(section is not None for section in (image, text, language)) != 1:
        raise ConfigError("model: a tower alone is either image or text or language")
    dtype = compute_dtype(dtype)
    if language is not None:
        return SingleTower(None, None, build_language(vocab=tokens["vocab"], dtype=dtype, **language), dtype=dtype)
    if image is not None:
        return SingleTower(vit.ViT(**sizes(vit.VARIANTS, image_size=size, dtype=dtype, **image)), None, mean=tuple(mean), std=tuple(std), dtype=dtype)
    return SingleTower(None, bert.Bert(**sizes(bert.VARIANTS, vocab=tokens["vocab"], dtype=dtype, **text)), with_lm_head=lm_head, dtype=dtype)


def build(config: Any) -> System:
    """The System of a resolved stage config. Raises ConfigError."""
    model = configs.call(build_model, config.model, "model", size=config.data.size)

    def init(key, spec):
        image = spec["image"].shape[1:] if "image" in spec else (1, 1, 3)
        return model.init(key, jnp.zeros((1, *image), jnp.float32), jnp.zeros((1, *spec["text"].shape[1:]), jnp.int32))

    def loss(variables: Variables, carry, batch: Batch, context):
        raise ConfigError("a tower alone has no loss: name its directory in the init of another system's stage, such as configs/albef.py:base; "
                          "a language model has loss.weights.lm")

    def features(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """image [b, n, width], tokens; or text [b, l, width], states."""
        if model.image is not None:
            return {"image": run(model, variables, SingleTower.encode_image, batch["image"])}
        return {"text": run(model, variables, SingleTower.encode_text, batch["text"], batch["text_mask"])}

    def mlm_logits(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """logits fp32 [b, l, vocab] of every position of a (masked) text."""
        return {"logits": run(model, variables, SingleTower.predict_tokens, features(variables, batch)["text"]).astype(jnp.float32)}

    if model.language is not None:
        weights = configs.to_plain(config.loss.get("weights", {}))
        learn = functools.partial(next_tokens, model, config.data, weights) if wanted(weights, LM) else loss
        return System(model, init, learn, {name: functools.partial(fn, model) for name, fn in (("features", states), ("logits", logits))}
                      | {"generate": functools.partial(generate, model, configs.to_plain(config.model.tokens))},
                      papers=PAPERS[config.model.language["family"]])
    return System(model, init, loss, {"features": features, **({"mlm_logits": mlm_logits} if model.with_lm_head else {})},
                  papers=("2010.11929",) if model.image is not None else ("1810.04805",))


def next_tokens(model: SingleTower, data: Any, weights: dict[str, float], variables: Variables, carry: Any, batch: Batch, context: Context
                ) -> tuple[jax.Array, Output]:
    """Mean over the batch's learned tokens of -log p(token | those before it): of ``text``, but for its first, in layout "plain", of ``target_mask`` in
    "joined". With an encoder, which reads ``prompt`` (layout "apart"), of all of ``text``. Raises ConfigError for an encoder without a prompt."""
    encodes = isinstance(model.language, t5.T5)
    if encodes and "prompt" not in batch:
        raise ConfigError(f"data.layout={data.layout!r}: the encoder of this language model has nothing to read; nearest: 'apart'")
    target = batch.get("target_mask", batch["text_mask"]).astype(bool)

    def read(part: Batch, chunk: jax.Array) -> jax.Array:
        def of(m):
            if encodes:
                nothing = jnp.zeros((len(part["text"]), 0, m.language.width), m.language.dtype)
                return predict_ids(m.language, nothing, part["prompt"], part["prompt_mask"], part["text"], part["text_mask"])
            return m.language(m.language.embed(part["text"]), part["text_mask"])
        return run(model, variables, of, key=drop_key(context, chunk))

    texts = {name: batch[name] for name in ("text", "text_mask", "prompt", "prompt_mask") if name in batch}
    found, ids = chunked(read, data.microbatch)(texts), batch["text"]
    if not encodes:      # row t of a decoder predicts id t + 1
        found, ids, target = found[:, :-1], ids[:, 1:], target[:, 1:]
    score = caption_nll if 0 < data.microbatch < data.batch else captioning
    nll, count, hits = (x.sum() for x in score(found, run(model, variables, lambda m: m.language.vocabulary()), ids, target))
    total, raw = weigh({LM: nll / jnp.maximum(count, 1)}, weights)
    return total, Output({**raw, "token_accuracy": hits / jnp.maximum(count, 1)})


def given(tower: Language, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(embeddings [b, p + l, width], mask bool [b, p + l]) of ``text``, behind the embeddings ``prefix`` [b, p, width] where there are some."""
    x, mask = tower.embed(batch["text"]), batch["text_mask"].astype(bool)
    if "prefix" in batch:
        x, mask = jnp.concatenate([batch["prefix"].astype(x.dtype), x], 1), jnp.pad(mask, ((0, 0), (batch["prefix"].shape[1], 0)), constant_values=True)
    return x, mask


def states(model: SingleTower, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """text [b, p + l, width], states of ``prefix`` and ``text`` (T5: the encoder's); padding may be on either side. T5 also has target
    [b, t, width], the decoder's states of the ids ``target`` [b, t], where the batch has them; the first id is that of padding."""
    def of(m):
        x, mask = given(m.language, batch)
        if not isinstance(m.language, t5.T5):
            return {"text": m.language(x, mask)}
        memory = m.language.encode(x, mask)
        return {"text": memory} | ({"target": m.language.decode(m.language.embed(batch["target"]), memory, mask)} if "target" in batch else {})

    return run(model, variables, of)


def logits(model: SingleTower, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """logits fp32 [b, p + l, vocab] of the id behind each; T5: [b, t, vocab], of ``target``."""
    found = states(model, variables, batch)
    return {"logits": run(model, variables, lambda m: m.language.logits(found["target" if isinstance(m.language, t5.T5) else "text"]))}


def generate(model: SingleTower, tokens: dict, variables: Variables, batch: Batch, *, key=None, max_new: int = 32, min_new: int = 0, **options: Any
             ) -> dict[str, jax.Array]:
    """text int32 [b, l + max_new]: ``text``, which is padded on the left, and its continuation; T5: [b, 1 + max_new], the id of padding and what
    the decoder writes. score [b]. ``options``: of ``vlm_jax.decode.generate``; lengths there count the ids of the result."""
    x, mask = run(model, variables, lambda m: given(m.language, batch))
    start = jnp.full((x.shape[0], 1), tokens["pad"], jnp.int32) if isinstance(model.language, t5.T5) else batch["text"].astype(jnp.int32)
    length = start.shape[1] + max_new
    prefill, extend = continuation(lambda fn: run(model, variables, lambda m: fn(m.language)), model.language.clone(parent=None), x, mask, length)
    return decode(prefill, extend, start, max_length=length, min_length=start.shape[1] + min_new, key=key, eos_ids=tokens["eos"], pad_id=tokens["pad"],
                  batch_axis=model.language.CACHE_AXES, **options)
