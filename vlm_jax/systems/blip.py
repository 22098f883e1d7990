"""BLIP: one text network that encodes, is grounded in an image, and writes (arXiv 2201.12086; salesforce/BLIP)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config as configs
from vlm_jax.decode import generate as decode
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.losses.captioning import captioning
from vlm_jax.losses.matching import NEGATIVES, draw, matching, pairs
from vlm_jax.losses.momentum import TARGETS, enqueue, lerp, make_queues, momentum_contrastive, other_groups, replaced, shadowed
from vlm_jax.losses.terms import wanted, weigh
from vlm_jax.models import bert, vit
from vlm_jax.models.language import after_first
from vlm_jax.models.sizes import sizes
from vlm_jax.nn.block import MEMORY_AXES
from vlm_jax.nn.linear import projection
from vlm_jax.nn.pixels import compute_dtype, normalise
from vlm_jax.nn.rows import select
from vlm_jax.nn.unit import unit
from vlm_jax.system import Batch, Context, Output, System, Variables, run

TEACHER = r"(image|image_head|text_head)/.*|text/(?!.*/decoder_).*"     # what has a slow copy: the decoder has none
MINERS = ("teacher", "student")
PROMPTS = ("none", "model")
FIRST = ("enc", "cls")
ITC, ITM, LM = "itc", "itm", "lm"


class Blip(nn.Module):
    """ViT, BERT in up to two roles (the paper's MED), and their heads. Features are unit vectors of width ``embed``.

    The first token says what ``text`` is to do: [CLS] reads a text alone, [ENC] reads it beside an image, [DEC] continues it
    beside an image. ``terms``: the losses that there are parts for: with "itc" the two projections and the temperature,
    with "itm" its head, with "lm" the decoder and the language head. ``prompt``: ids that captions start with.
    """
    image: vit.ViT
    text: bert.Bert
    embed: int
    terms: tuple[str, ...]
    dec: int
    enc: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    temp_start: float = 0.07
    prompt: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    def setup(self):
        if ITC in self.terms:
            self.image_head, self.text_head = projection(self.image.width, self.embed, self.dtype), projection(self.text.width, self.embed, self.dtype)
            self.temp = self.param("temp", nn.with_logical_partitioning(nn.initializers.constant(self.temp_start), ()), (), jnp.float32)
        if ITM in self.terms:
            self.itm_head = projection(self.text.width, 2, self.dtype)
        if LM in self.terms:
            self.lm_head = bert.LanguageHead(self.text.vocab, self.text.width, self.text.eps, self.dtype)

    def encode_image(self, image: jax.Array) -> jax.Array:
        """image [b, h, w, 3] -> tokens [b, n, width]."""
        return self.image(normalise(image, self.mean, self.std))

    def encode_text(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """ids [b, l] -> states [b, l, width]; no image is looked at."""
        return self.text(ids, mask)

    def image_feature(self, tokens: jax.Array) -> jax.Array:
        """Tokens [b, n, width] -> unit vector [b, embed] of the class token."""
        return unit(self.image_head(tokens[:, 0]))

    def text_feature(self, states: jax.Array) -> jax.Array:
        """States [b, l, width] -> unit vector [b, embed] of the first token."""
        return unit(self.text_head(states[:, 0]))

    def ground(self, ids: jax.Array, mask: jax.Array, tokens: jax.Array, rows: jax.Array | None = None, first: str = "enc") -> jax.Array:
        """ids [b, l] beside image tokens [n, m, width] -> states [b, l, width]. rows int [b]: each text's image; None: its own.
        ``first`` "cls" leaves the first token as it is."""
        return self.text(ids.at[:, 0].set(self.enc) if first == "enc" else ids, mask, tokens, None, rows)

    def match(self, grounded: jax.Array) -> jax.Array:
        """Grounded states -> logits [b, 2]; class 1 = match."""
        return self.itm_head(grounded[:, 0])

    def write(self, ids: jax.Array, tokens: jax.Array) -> jax.Array:
        """ids [b, l] -> states of the language head, whose product with ``vocabulary`` are logits; position t predicts id t + 1.
        What is padded on the right needs no mask: nothing real comes after it."""
        return self.lm_head(self.text.decode(ids.at[:, 0].set(self.dec), None, tokens))

    def vocabulary(self) -> jax.Array:
        return self.lm_head.vocabulary(self.text.table())

    def logits(self, states: jax.Array) -> jax.Array:
        """States of the language head [b, l, width + 1] -> fp32 [b, l, vocab]."""
        return jnp.einsum("bld,dv->blv", states, self.vocabulary().astype(states.dtype), preferred_element_type=jnp.float32)

    def extend(self, cache: dict[str, Any], ids: jax.Array, tokens: jax.Array | None = None) -> tuple[jax.Array, dict[str, Any]]:
        """New ids [b, k] after those in the cache -> (logits [b, vocab] after the last, cache). ``tokens`` of the image at prefill alone."""
        states, own = self.text.extend(ids, cache["text"], cache["position"], tokens)
        return self.logits(self.lm_head(states[:, -1:]))[:, 0], {"text": own, "position": cache["position"] + ids.shape[1]}

    def temperature(self) -> jax.Array:
        """What cosines are divided by."""
        return self.temp

    def __call__(self, image: jax.Array, ids: jax.Array):
        mask, tokens, out = jnp.ones(ids.shape, bool), self.encode_image(image), []
        if ITC in self.terms:
            out += [self.image_feature(tokens), self.text_feature(self.encode_text(ids, mask)), self.temp]
        if ITM in self.terms:
            out += [self.match(self.ground(ids, mask, tokens))]
        if LM in self.terms:
            out += [self.write(ids, tokens)]
        return out


def build_model(*, image: dict, text: dict, embed: int, tokens: dict, size: int, terms: tuple[str, ...], mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
                temp: float = 0.07, prompt: tuple[int, ...] = (), dtype: str = "auto") -> Blip:
    """The module of a config's ``model`` section, with the parts that ``terms`` need."""
    dtype = compute_dtype(dtype)
    image = vit.ViT(**sizes(vit.VARIANTS, image_size=size, dtype=dtype, **image))
    roles = (("encoder",) if {ITC, ITM} & set(terms) else ()) + (("decoder",) if LM in terms else ())
    fields = sizes(bert.VARIANTS, vocab=tokens["vocab"], memory_width=image.width, token_types=0, roles=roles, dtype=dtype, **text)
    text = bert.Bert(**{**fields, "cross_layers": fields["layers"]})
    for name in ("dec", "enc"):
        if tokens[name] >= text.vocab:
            raise ConfigError(f"model.tokens.{name}={tokens[name]} is no row of a table of {text.vocab}; nearest: model.tokens.vocab={tokens[name] + 1}")
    return Blip(image, text, embed=embed, terms=terms, dec=tokens["dec"], enc=tokens["enc"], mean=tuple(mean), std=tuple(std),
                temp_start=temp, prompt=tuple(prompt), dtype=dtype)


def build_loss(*, weights: dict, momentum: float = 0.995, queue: int = 57600, alpha: float = 0.4, alpha_ramp: int = 0, negatives: str = "hard",
               negative_epsilon: float = 0.0, mined_by: str = "teacher", targets: str = "pairs", group: int = 0,
               label_smoothing: float = 0.1, prompt: str = "none") -> dict[str, Any]:
    """The ``loss`` section, checked.

    weights: of ``itc``, ``itm``, ``lm``; the model has no parts for those that are left out or 0. momentum: of the teacher. queue: past
    features kept. alpha: the teacher's share in the targets, reached linearly after ``alpha_ramp`` steps. negatives: "hard" (by
    similarity, plus ``negative_epsilon``) or "random". mined_by: whose keys the similarity is with, "teacher" or "student". targets:
    "pairs", or "images": texts of the same image are positives and no negatives. group: rows that contrast and mine among themselves, as
    the official code's GPUs do (90 in pre-training of the base size); 0: the whole batch. prompt: "none", or "model": captions are
    learned behind model.prompt, whose own words are no targets.
    """
    for name, value, valid in (("negatives", negatives, NEGATIVES), ("targets", targets, TARGETS), ("mined_by", mined_by, MINERS), ("prompt", prompt, PROMPTS)):
        if value not in valid:
            raise ConfigError(f"loss.{name}={value!r} is not known{nearest(value, valid)}")
    return dict(weights=weights, momentum=momentum, queue=queue, alpha=alpha, alpha_ramp=alpha_ramp, negatives=negatives, negative_epsilon=negative_epsilon,
                mined_by=mined_by, targets=targets, group=group, label_smoothing=label_smoothing, prompt=prompt)


def build(config: Any) -> System:
    """The System of a resolved stage config. Raises ConfigError."""
    data, tokens = config.data, configs.to_plain(config.model.tokens)
    o = configs.call(build_loss, config.loss, "loss")
    weights = o["weights"]
    terms = tuple(t for t in (ITC, ITM, LM) if wanted(weights, t) or t == ITC and wanted(weights, ITM))
    model = configs.call(build_model, config.model, "model", size=data.size, terms=terms)
    if data.microbatch:
        raise ConfigError(f"data.microbatch={data.microbatch}: negatives are mined from the whole batch; nearest: 0, and model.*.remat for memory")
    if ITC in terms and o["queue"] < data.batch:
        raise ConfigError(f"loss.queue={o['queue']} is smaller than data.batch={data.batch}; nearest: {data.batch}")
    if o["prompt"] == "model" and not model.prompt:
        raise ConfigError("loss.prompt='model', but model.prompt is empty; nearest: 'none'")
    apply = functools.partial(run, model)

    def init(key, spec):
        return model.init(key, jnp.zeros((1, *spec["image"].shape[1:]), jnp.float32), jnp.zeros((1, *spec["text"].shape[1:]), jnp.int32))

    def init_carry(variables: Variables):
        return {"teacher": jax.tree.map(jnp.copy, shadowed(variables, TEACHER)), **make_queues(o["queue"], model.embed)} if ITC in terms else {}

    def next_carry(carry, update):
        return {"teacher": update["teacher"], **enqueue(carry, update["image"], update["text"], update["ids"])} if ITC in terms else carry

    def contrast(variables: Variables, carry, batch: Batch, context: Context, image_tokens):
        """(ITC, similarities [b, b] to mine negatives by, pairs that are no negatives, metrics, update)."""
        def text_feature(variables, name):
            states = apply(variables, Blip.encode_text, batch["text"], batch["text_mask"], key=context.drop(name))
            return apply(variables, Blip.text_feature, states)

        image, text, temp = apply(variables, Blip.image_feature, image_tokens), text_feature(variables, "text"), apply(variables, Blip.temperature)
        teacher = lerp(carry["teacher"], shadowed(variables, TEACHER), o["momentum"])
        slow = replaced(variables, teacher)
        slow_image, slow_text = jax.lax.stop_gradient((
            apply(slow, Blip.image_feature, apply(slow, Blip.encode_image, batch["image"], key=context.drop("teacher_image"))), text_feature(slow, "teacher")))
        alpha = o["alpha"] * jnp.minimum(1.0, context.step / o["alpha_ramp"]) if o["alpha_ramp"] else o["alpha"]
        ids = batch["image_id"] if o["targets"] == "images" else None
        itc, similar = momentum_contrastive(image, text, slow_image, slow_text, carry, temp, alpha, ids=ids, group=o["group"])
        if o["mined_by"] == "student":
            similar = {"image_to_text": image @ text.T / temp, "text_to_image": text @ image.T / temp}
        elsewhere = other_groups(len(image), o["group"])
        similar = {k: jnp.where(elsewhere, -jnp.inf, s) for k, s in similar.items()}
        excluded = elsewhere | (jnp.eye(len(image), dtype=bool) if ids is None else ids[:, None] == ids)
        return (itc, similar, excluded, {"alpha": jnp.asarray(alpha, jnp.float32), "temp": temp},
                {"teacher": teacher, "image": slow_image, "text": slow_text, "ids": batch["image_id"]})

    def match_pairs(variables: Variables, batch: Batch, context: Context, image_tokens, similar, excluded):
        """(ITM, accuracy): one pass over pairs, texts with negative images and negative texts."""
        negative = functools.partial(draw, o["negatives"], excluded=excluded, epsilon=o["negative_epsilon"])
        pair = pairs(batch.get("negative_image", negative(context.key("negative_image"), similar["text_to_image"])),
                     batch.get("negative_text", negative(context.key("negative_text"), similar["image_to_text"])), o["group"])
        grounded = apply(variables, Blip.ground, select(batch["text"], pair.text), select(batch["text_mask"], pair.text), image_tokens, pair.image,
                         key=context.drop("ground"))
        return matching(apply(variables, Blip.match, grounded), pair.label, pair.weight)

    def write(variables: Variables, batch: Batch, context: Context, image_tokens):
        """(LM in nats a token, accuracy)."""
        prompt = model.prompt if o["prompt"] == "model" else ()
        ids, mask = after_first(prompt, batch["text"]), after_first((True,) * len(prompt), batch["text_mask"])
        states = apply(variables, Blip.write, ids, image_tokens, key=context.drop("write"))
        counted = mask[:, 1:] & (jnp.arange(ids.shape[1] - 1) >= len(prompt))
        nll, count, hits = captioning(states[:, :-1], apply(variables, Blip.vocabulary), ids[:, 1:], counted, label_smoothing=o["label_smoothing"])
        return nll / jnp.maximum(count, 1), hits / jnp.maximum(count, 1)

    def loss(variables: Variables, carry, batch: Batch, context: Context):
        image_tokens = apply(variables, Blip.encode_image, batch["image"], key=context.drop("image"))
        found, metrics, update = {}, {}, ()
        if ITC in terms:
            found[ITC], similar, excluded, metrics, update = contrast(variables, carry, batch, context, image_tokens)
        if ITM in terms:
            found[ITM], metrics["itm_accuracy"] = match_pairs(variables, batch, context, image_tokens, similar, excluded)
        if LM in terms:
            found[LM], metrics["token_accuracy"] = write(variables, batch, context, image_tokens)
        asked = {k: w for k, w in weights.items() if wanted(weights, k)}
        total, raw = weigh({k: found[k] for k in found if k in asked}, asked)
        return total, Output({**raw, **metrics}, update=update)

    def generate(variables: Variables, batch: Batch, *, key=None, method: str = "greedy", beams: int = 1, max_length: int = 0,
                 prompt: tuple[int, ...] | None = None, **options: Any) -> dict[str, jax.Array]:
        """text int32 [b, max_length - len(prompt)], from <bos> on and without the prompt, and score [b].

        ``prompt``: ids that every caption starts with, None for model.prompt. max_length (0: data.length and the prompt), min_length,
        and in beam search the length that scores are divided by, count the prompt, as in the official code.
        """
        prompt = model.prompt if prompt is None else tuple(prompt)
        limit = model.text.positions
        if max_length > limit:
            raise ConfigError(f"max_length={max_length} exceeds the {limit} positions of the text; nearest: {limit}")
        length = max_length or min(data.length + len(prompt), limit)
        image_tokens = apply(variables, Blip.encode_image, batch["image"])
        rows = image_tokens.shape[0]

        def prefill(prompt):
            cache = {"text": model.text.clone(parent=None).init_cache(rows, length, image_tokens.shape[1]), "position": jnp.int32(0)}
            logits, cache = apply(variables, Blip.extend, cache, prompt, image_tokens)
            return logits, (), cache

        def extend(cache, ids):
            logits, cache = apply(variables, Blip.extend, cache, ids)
            return logits, (), cache

        start = jnp.tile(jnp.asarray([model.dec, *prompt], jnp.int32), (rows, 1))
        out = decode(prefill, extend, start, method=method, beams=beams, max_length=length, key=key, eos_ids=tokens["eos"], pad_id=tokens["pad"],
                     batch_axis={"text": MEMORY_AXES, "position": -1}, **{"beam_rule": "transformers_4.15", **options})
        bos = jnp.full((rows, 1), tokens["bos"], jnp.int32)
        return {**out, "text": jnp.concatenate([bos, out["text"][:, len(prompt) + 1:]], 1)}

    offered = {"features": (features, True), "embed": (embed, ITC in terms), "match": (match, ITM in terms), "caption_logits": (caption_logits, LM in terms)}
    predict = {name: functools.partial(fn, model) for name, (fn, there) in offered.items() if there}
    return System(model, init, loss, predict | ({"generate": generate} if LM in terms else {}), init_carry, next_carry,
                  {"image_queue|text_queue": ("none", "none"), "id_queue": ("none",)}, papers=("2201.12086",))


def embed(model: Blip, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """image_embed and text_embed [b, embed], for what the batch has; logit_scale, the multiplier."""
    out = {"logit_scale": 1 / run(model, variables, Blip.temperature)}
    found = features(model, variables, batch)
    if "image" in found:
        out["image_embed"] = run(model, variables, Blip.image_feature, found["image"])
    if "states" in found:
        out["text_embed"] = run(model, variables, Blip.text_feature, found["states"])
    return out


def features(model: Blip, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """image [b, n, width], tokens; states [b, l, width] of the text alone, where the model has an encoder (``match`` reads texts anew)."""
    out = {}
    if "image" in batch:
        out["image"] = run(model, variables, Blip.encode_image, batch["image"])
    if "text" in batch and "encoder" in model.text.roles:
        out["states"] = run(model, variables, Blip.encode_text, batch["text"], batch["text_mask"])
    return out


def match(model: Blip, variables: Variables, batch: Batch, *, key=None, first: str = "enc") -> dict[str, jax.Array]:
    """match [b, 2]: logits of row i's text and image, class 1 = match; grounded [b, l, width], the states they come from.

    ``image_features`` (of ``features``) stands for ``image`` where it was computed before. ``first``: the texts' first token, "enc"
    as in training, or "cls" as the official demo and Hugging Face have it.
    """
    if first not in FIRST:
        raise ConfigError(f"first={first!r} is not known{nearest(first, FIRST)}")
    image_tokens = batch["image_features"] if "image_features" in batch else run(model, variables, Blip.encode_image, batch["image"])
    grounded = run(model, variables, functools.partial(Blip.ground, first=first), batch["text"], batch["text_mask"], image_tokens)
    return {"match": run(model, variables, Blip.match, grounded), "grounded": grounded}


def caption_logits(model: Blip, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """logits fp32 [b, l, vocab] of text that stands behind [DEC] (in place of <bos>); row t predicts id t + 1."""
    states = run(model, variables, Blip.write, batch["text"], run(model, variables, Blip.encode_image, batch["image"]))
    return {"logits": run(model, variables, Blip.logits, states)}
