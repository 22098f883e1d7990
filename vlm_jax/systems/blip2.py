"""BLIP-2: queries between a frozen eye and a frozen language model (arXiv 2301.12597; salesforce/LAVIS). InstructBLIP (arXiv 2305.06500) is its second
stage with queries that read the instruction too."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config as configs
from vlm_jax.decode import generate as decode
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.losses.captioning import caption_nll, captioning
from vlm_jax.losses.matching import NEGATIVES, draw, matching, pairs
from vlm_jax.losses.momentum import TARGETS
from vlm_jax.losses.query_contrastive import GATHERED, query_contrastive
from vlm_jax.losses.terms import wanted, weigh
from vlm_jax.models import bert, llama, t5, vit
from vlm_jax.models import language as languages
from vlm_jax.models.qformer import VARIANTS, QFormer
from vlm_jax.models.sizes import sizes
from vlm_jax.nn.chunk import chunked
from vlm_jax.nn.linear import Linear, projection
from vlm_jax.nn.norm import Norm
from vlm_jax.nn.pixels import compute_dtype, normalise
from vlm_jax.nn.rows import select
from vlm_jax.nn.unit import unit
from vlm_jax.system import Batch, Cacheable, Context, Output, System, Variables, drop_key, run

ITC, ITM, ITG, LM = "itc", "itm", "itg", "lm"
STAGE1 = (ITC, ITM, ITG)
EYES = ("image", "images", "image_states")      # keys of a batch, one of which says what is looked at
RULES = ("sum", "mean", "official")
ANSWERING = ("generate", "rank")
# lavis blip2_vicuna_instruct.py, blip2_t5_instruct.py: what ``generate`` does where nobody says otherwise
INSTRUCTED = dict(method="beam", beams=5, repetition_penalty=1.5)


class Blip2(nn.Module):
    """A ViT and its last norm, the Q-Former, and what stands on it.

    ``terms``: the losses that there are parts for. Stage 1: with "itc" two projections and the temperature, with "itm" its head, with "itg" the
    language head, whose first id is ``dec``. Stage 2: with "lm" the language model, and the map from queries to its embeddings. ``prompt``: ids that
    captions start with, without begin and end. ``first``: what generated text stands behind, -1 for the begin of prompts. ``eps``: of the norm of image
    tokens (transformers has 1e-6).
    """
    image: vit.ViT
    qformer: QFormer
    terms: tuple[str, ...]
    language: languages.Language | None = None
    embed: int = 256
    dec: int = -1
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    temp_start: float = 0.07
    prompt: tuple[int, ...] = ()
    first: int = -1
    eps: float = 1e-5
    dtype: Any = jnp.float32

    def setup(self):
        width = self.qformer.width
        self.image_norm = Norm("layernorm", self.eps)
        if ITC in self.terms:
            self.image_head, self.text_head = projection(width, self.embed, self.dtype), projection(width, self.embed, self.dtype)
            self.temp = self.param("temp", nn.with_logical_partitioning(nn.initializers.constant(self.temp_start), ()), (), jnp.float32)
        if ITM in self.terms:
            self.itm_head = projection(width, 2, self.dtype)
        if ITG in self.terms:
            self.lm_head = bert.LanguageHead(self.qformer.vocab, width, self.qformer.eps, self.dtype)
        if LM in self.terms:
            bound = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")      # torch's default
            self.projection = Linear(self.language.width, ("embed", "joint"), True, bound, dtype=self.dtype)

    def look(self, image: jax.Array) -> jax.Array:
        """image [b, h, w, 3] -> tokens [b, n, width], as the eye gives them."""
        return self.image(normalise(image, self.mean, self.std))

    def norm_image(self, tokens: jax.Array) -> jax.Array:
        """The norm behind the eye, which trains with the Q-Former."""
        return self.image_norm(tokens)

    def encode_image(self, image: jax.Array) -> jax.Array:
        """image [b, h, w, 3] -> tokens [b, n, width], normed."""
        return self.image_norm(self.look(image))

    # ---- stage 1

    def see(self, tokens: jax.Array) -> tuple[jax.Array, Any, Any]:
        """Image tokens -> (states [b, queries, width], keys for ``write``, the image's keys for ``ground``)."""
        return self.qformer.see(tokens)

    def encode_text(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """ids [b, l] -> states [b, l, width]; no image is looked at."""
        return self.qformer.read(ids, mask)

    def image_feature(self, states: jax.Array) -> jax.Array:
        """States of the queries -> unit vectors [b, queries, embed]."""
        return unit(self.image_head(states))

    def text_feature(self, states: jax.Array) -> jax.Array:
        """States [b, l, width] -> unit vector [b, embed] of the first token."""
        return unit(self.text_head(states[:, 0]))

    def ground(self, ids: jax.Array, mask: jax.Array, seen: Any, rows: jax.Array | None = None) -> jax.Array:
        """ids [b, l] beside the queries that look at images ``seen`` -> states [b, queries, width] of the queries. rows int [b]: each text's image."""
        return self.qformer.fuse(ids, mask, None, seen, rows)[:, :self.qformer.queries]

    def match(self, grounded: jax.Array) -> jax.Array:
        """Grounded states -> logits [b, 2], the mean of the queries'; class 1 = match."""
        return self.itm_head(grounded.mean(1))

    def write(self, ids: jax.Array, own: Any) -> jax.Array:
        """ids [b, l] behind the queries' keys -> states of the language head, whose product with ``vocabulary`` are logits; position t predicts id t + 1.
        What is padded on the right needs no mask: nothing real comes after it."""
        return self.lm_head(self.qformer.go_on(ids.at[:, 0].set(self.dec), self.qformer.begin(own, ids.shape[1]))[0])

    def extend(self, cache: dict[str, Any], ids: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """New ids [b, k] after those in the cache -> (logits [b, vocab] after the last, cache)."""
        states, cache = self.qformer.go_on(ids, cache)
        return self.logits(self.lm_head(states[:, -1:]))[:, 0], cache

    def vocabulary(self) -> jax.Array:
        """[width, vocab], which states are multiplied with for logits."""
        return self.language.vocabulary() if LM in self.terms else self.lm_head.vocabulary(self.qformer.table())

    def logits(self, states: jax.Array) -> jax.Array:
        """[b, l, width] -> fp32 [b, l, vocab]."""
        return jnp.einsum("bld,dv->blv", states, self.vocabulary().astype(states.dtype), preferred_element_type=jnp.float32)

    def temperature(self) -> jax.Array:
        """What cosines are divided by."""
        return self.temp

    # ---- stage 2

    def prefix(self, tokens: jax.Array, instruction: jax.Array | None = None, instruction_mask: jax.Array | None = None) -> jax.Array:
        """Image tokens -> embeddings [b, queries, width of the language model]. instruction [b, q]: what the queries read beside the image.

        Of n images in a row the tokens are [b * n, m, width] and the embeddings [b, n * queries, width]: each is seen alone, beside the same instruction."""
        if instruction is None:
            return self.projection(self.qformer.see(tokens)[0])
        instruction, instruction_mask = (jnp.repeat(x, len(tokens) // len(x), axis=0) for x in (instruction, instruction_mask))
        return self.projection(self.qformer.fuse(instruction, instruction_mask, tokens)[:, :self.qformer.queries])

    def reply(self, prefix: jax.Array, prompt: jax.Array | None, prompt_mask: jax.Array | None, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """States [b, l, width] of the language model, whose row t predicts id t of ``ids``; see ``models.language.predict_ids``."""
        return languages.predict_ids(self.language, prefix, prompt, prompt_mask, ids, mask)

    def __call__(self, image: jax.Array, ids: jax.Array):
        tokens, mask, out = self.encode_image(image), jnp.ones(ids.shape, bool), []
        if LM in self.terms:
            words = jnp.zeros((len(image), 1), jnp.int32)
            prefix = self.prefix(tokens, words, words == 0) if self.qformer.vocab else self.prefix(tokens)
            return self.reply(prefix, ids, mask, ids, mask), self.vocabulary()
        states, own, seen = self.see(tokens)
        if ITC in self.terms:
            out += [self.image_feature(states), self.text_feature(self.encode_text(ids, mask)), self.temp]
        if ITM in self.terms:
            out += [self.match(self.ground(ids, mask, seen))]
        if ITG in self.terms:
            out += [self.write(ids, own)]
        return out


def build_model(*, image: dict, qformer: dict, tokens: dict, size: int, terms: tuple[str, ...], language: dict | None = None, embed: int = 256,
                mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), temp: float = 0.07, prompt: tuple[int, ...] | str = (), end: int = -1, first: int = -1,
                eps: float = 1e-5, instruction_tokens: dict | None = None, image_token: int = -1, dtype: str = "auto") -> Blip2:
    """The module of a config's ``model`` section, with the parts that ``terms`` need.

    prompt: ids, or words, whose ids come from the tokenizer. tokens: of the text in batches: of the Q-Former's words in stage 1 (with ``dec``), of
    the language model in stage 2. end: what stands at the end of a text instead of the tokenizer's own end, -1 for that (OPT: 50118, a line break).
    first: an id that nobody reads, in front of what is generated: it counts as text that may be repeated; -1 for tokens.bos (Vicuna, whose prompts
    begin with 2: 1). instruction_tokens: of the words that the Q-Former reads in stage 2, whose batches then have ``instruction``; None: it reads
    none. image_token: the id that files of transformers have in place of a query; nothing here reads it.
    """
    dtype = compute_dtype(dtype)
    image = vit.ViT(**sizes(vit.VARIANTS, image_size=size, dtype=dtype, **image))
    second = LM in terms
    if second and language is None:
        raise ConfigError("loss.weights has lm, but model.language is missing; nearest: model.language=dict(family='opt', variant='2.7b')")
    if second and set(terms) & set(STAGE1):
        raise ConfigError(f"loss.weights has {', '.join(terms)}: lm reads the language model's ids, the others the Q-Former's; nearest: two stages")
    words = tokens["vocab"] if not second else instruction_tokens["vocab"] if instruction_tokens else 0
    former = QFormer(**sizes(VARIANTS, memory_width=image.width, vocab=words, dtype=dtype, **qformer))
    if not second and tokens["dec"] >= tokens["vocab"]:
        raise ConfigError(f"model.tokens.dec={tokens['dec']} is no row of a table of {tokens['vocab']}; nearest: model.tokens.vocab={tokens['dec'] + 1}")
    tower = languages.build(vocab=tokens["vocab"], dtype=dtype, **language) if second else None
    return Blip2(image, former, terms, tower, embed=embed, dec=-1 if second else tokens["dec"], mean=tuple(mean), std=tuple(std), temp_start=temp,
                 prompt=() if isinstance(prompt, str) else tuple(prompt), first=first, eps=eps, dtype=dtype)


def build_loss(*, weights: dict, negatives: str = "hard", targets: str = "pairs", gathered: str = "constant", label_smoothing: float = 0.1
               ) -> dict[str, Any]:
    """The ``loss`` section, checked.

    weights: of ``itc``, ``itm`` and ``itg``, or of ``lm``; the model has no parts for those that are left out or 0. negatives: "hard" (by similarity) or
    "random". targets: "pairs", or "images": texts of the same image are positives and no negatives. gathered: see
    ``losses.query_contrastive``. label_smoothing: of itc and itg.
    """
    for name, value, valid in (("negatives", negatives, NEGATIVES), ("targets", targets, TARGETS), ("gathered", gathered, GATHERED)):
        if value not in valid:
            raise ConfigError(f"loss.{name}={value!r} is not known{nearest(value, valid)}")
    return dict(weights=weights, negatives=negatives, targets=targets, gathered=gathered, label_smoothing=label_smoothing)


def build(config: Any) -> System:
    """The System of a resolved stage config. Raises ConfigError."""
    o = configs.call(build_loss, config.loss, "loss")
    terms = tuple(t for t in (*STAGE1, LM) if wanted(o["weights"], t) or t == ITC and wanted(o["weights"], ITM))
    if not terms:
        raise ConfigError("loss.weights is empty; nearest: dict(itc=1.0, itm=1.0, itg=1.0) or dict(lm=1.0)")
    model = configs.call(build_model, config.model, "model", size=config.data.size, terms=terms)
    asked = {k: w for k, w in o["weights"].items() if wanted(o["weights"], k)}

    def init(key, spec):
        image = spec["images"].shape[2:] if "images" in spec else spec["image"].shape[1:]
        return model.init(key, jnp.zeros((1, *image), jnp.float32), jnp.zeros((1, 2), jnp.int32))

    def seen(variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        images = batch["images"] if "images" in batch else batch["image"][:, None]
        tokens = run(model, variables, Blip2.look, images.reshape(-1, *images.shape[2:]))
        return {"image_states": tokens.reshape(*images.shape[:2], *tokens.shape[1:])}

    parts = second_stage if LM in terms else first_stage
    loss, predict = parts(model, config, o, asked)
    return System(model, init, loss, predict, cacheable=Cacheable("image/.*", seen), papers=("2301.12597", *(("2305.06500",) if LM in terms and model.qformer.vocab else ())))


def tokens_of(model: Blip2, variables: Variables, batch: Batch, key: jax.Array | None) -> jax.Array:
    """The tokens [b * n, m, width] of the images of a batch, n a row, normed; of ``image_states`` where the eye has looked at them before."""
    if "image_states" in batch:
        states = batch["image_states"]
        return run(model, variables, Blip2.norm_image, states.reshape(-1, *states.shape[2:]))
    images = batch["images"] if "images" in batch else batch["image"][:, None]
    return run(model, variables, Blip2.encode_image, images.reshape(-1, *images.shape[2:]), key=key)


# ---- stage 1: the Q-Former alone

def first_stage(model: Blip2, config: Any, o: dict[str, Any], asked: dict[str, float]):
    """(loss, predict functions)."""
    data, tokens, terms, apply = config.data, configs.to_plain(config.model.tokens), model.terms, functools.partial(run, model)
    if data.microbatch:
        raise ConfigError(f"data.microbatch={data.microbatch}: negatives are mined from the whole batch; nearest: 0, and model.*.remat for memory")

    def loss(variables: Variables, carry, batch: Batch, context: Context):
        image_tokens = tokens_of(model, variables, batch, context.drop("image"))
        states, own, seen = apply(variables, Blip2.see, image_tokens, key=context.drop("see"))
        found, metrics = {}, {}
        if ITC in terms:
            text = apply(variables, Blip2.encode_text, batch["text"], batch["text_mask"], key=context.drop("read"))
            ids = batch["image_id"] if o["targets"] == "images" else None
            metrics["temp"] = apply(variables, Blip2.temperature)
            found[ITC], similar = query_contrastive(apply(variables, Blip2.image_feature, states), apply(variables, Blip2.text_feature, text),
                                                    metrics["temp"], ids=ids, smoothing=o["label_smoothing"], gathered=o["gathered"])
        if ITM in terms:
            excluded = jnp.eye(len(states), dtype=bool) if ids is None else ids[:, None] == ids
            negative = functools.partial(draw, o["negatives"], excluded=excluded)
            pair = pairs(batch.get("negative_image", negative(context.key("negative_image"), similar["text_to_image"])),
                         batch.get("negative_text", negative(context.key("negative_text"), similar["image_to_text"])))
            grounded = apply(variables, Blip2.ground, select(batch["text"], pair.text), select(batch["text_mask"], pair.text), seen, pair.image,
                             key=context.drop("ground"))
            found[ITM], metrics["itm_accuracy"] = matching(apply(variables, Blip2.match, grounded), pair.label, pair.weight)
        if ITG in terms:
            written = apply(variables, Blip2.write, batch["text"], own, key=context.drop("write"))
            nll, count, hits = captioning(written[:, :-1], apply(variables, Blip2.vocabulary), batch["text"][:, 1:], batch["text_mask"][:, 1:],
                                          label_smoothing=o["label_smoothing"])
            found[ITG], metrics["token_accuracy"] = nll / jnp.maximum(count, 1), hits / jnp.maximum(count, 1)
        total, raw = weigh({k: found[k] for k in found if k in asked}, asked)
        return total, Output({**raw, **metrics})

    def features(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """image [b, n, width], tokens, and queries [b, q, width], states of the queries beside them; states [b, l, width] of the text alone."""
        out = {}
        if "image" in batch:
            out["image"] = apply(variables, Blip2.encode_image, batch["image"])
            out["queries"] = apply(variables, Blip2.see, out["image"])[0]
        if "text" in batch:
            out["states"] = apply(variables, Blip2.encode_text, batch["text"], batch["text_mask"])
        return out

    def embed(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """image_embed [b, q, embed], the queries', and text_embed [b, embed], for what the batch has: a text's similarity is the largest of its products
        with them. logit_scale, the multiplier."""
        out, found = {"logit_scale": 1 / apply(variables, Blip2.temperature)}, features(variables, batch)
        if "queries" in found:
            out["image_embed"] = apply(variables, Blip2.image_feature, found["queries"])
        if "states" in found:
            out["text_embed"] = apply(variables, Blip2.text_feature, found["states"])
        return out

    def match(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """match [b, 2]: logits of row i's text and image, class 1 = match; grounded [b, q, width], the states they come from.
        ``image_features`` (of ``features``) stands for ``image`` where it was computed before."""
        image_tokens = batch["image_features"] if "image_features" in batch else apply(variables, Blip2.encode_image, batch["image"])

        def ground(m):
            return m.qformer.fuse(batch["text"], batch["text_mask"], image_tokens)[:, :model.qformer.queries]

        grounded = apply(variables, ground)
        return {"match": apply(variables, Blip2.match, grounded), "grounded": grounded}

    def caption_logits(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """logits fp32 [b, l, vocab] of text that stands behind [DEC] (in place of <bos>); row t predicts id t + 1."""
        own = apply(variables, Blip2.see, apply(variables, Blip2.encode_image, batch["image"]))[1]
        return {"logits": apply(variables, Blip2.logits, apply(variables, Blip2.write, batch["text"], own))}

    def generate(variables: Variables, batch: Batch, *, key=None, method: str = "greedy", beams: int = 1, max_length: int = 0, **options: Any
                 ) -> dict[str, jax.Array]:
        """text int32 [b, max_length], from <bos> on, and score [b]. max_length: 0 for data.length; the official captioner has 30 (min_length 10, 3 beams)."""
        length = max_length or data.length
        if length > model.qformer.positions:
            raise ConfigError(f"max_length={length} exceeds the {model.qformer.positions} positions of the text; nearest: {model.qformer.positions}")
        own = apply(variables, Blip2.see, apply(variables, Blip2.encode_image, batch["image"]))[1]
        rows = len(batch["image"])

        def prefill(prompt):
            logits, cache = apply(variables, Blip2.extend, model.qformer.clone(parent=None).begin(own, length), prompt)
            return logits, (), cache

        def extend(cache, ids):
            logits, cache = apply(variables, Blip2.extend, cache, ids)
            return logits, (), cache

        axes = {name: axis for name, axis in model.qformer.CACHE_AXES.items() if name == "index" or name in own}
        out = decode(prefill, extend, jnp.full((rows, 1), model.dec, jnp.int32), method=method, beams=beams, max_length=length, key=key,
                     eos_ids=tokens["eos"], pad_id=tokens["pad"], batch_axis=axes, **{"beam_rule": "transformers_4.33", **options})
        return {**out, "text": out["text"].at[:, 0].set(tokens["bos"])}

    offered = {"features": (features, True), "embed": (embed, ITC in terms), "match": (match, ITM in terms), "caption_logits": (caption_logits, ITG in terms),
               "generate": (generate, ITG in terms)}
    return loss, {name: fn for name, (fn, there) in offered.items() if there}


# ---- stage 2: a language model behind it

def second_stage(model: Blip2, config: Any, o: dict[str, Any], asked: dict[str, float]):
    """(loss, predict functions)."""
    data, tokens, apply = config.data, configs.to_plain(config.model.tokens), functools.partial(run, model)
    encodes = isinstance(model.language, t5.T5)
    eos, end = tokens["eos"], config.model.get("end", -1)
    start = tokens.get("bos", -1)      # T5 has none
    instructed, vicuna = bool(model.qformer.vocab), isinstance(model.language, llama.Llama)
    if not encodes and start < 0:
        raise ConfigError("model.tokens.bos is missing: a decoder's prompt begins with it; nearest: -1 with a tokenizer, or tokens.eos")

    def prompt_ids() -> tuple[int, ...]:
        """model.prompt. Raises ConfigError for words that no tokenizer has read."""
        if isinstance(config.model.get("prompt", ()), str) and config.model.prompt:
            raise ConfigError(f"model.prompt={config.model.prompt!r} is in words, and there is no tokenizer to read them; nearest: its ids")
        return model.prompt

    def closed(ids: jax.Array, mask: jax.Array) -> jax.Array:
        """ids [b, l] with ``model.end`` in the place of the tokenizer's end."""
        if end < 0:
            return ids
        last = jnp.arange(ids.shape[1]) == mask.sum(1, keepdims=True) - 1
        return jnp.where(last & (ids == eos) & (jnp.arange(ids.shape[1]) > 0), end, ids)

    def opened(rows: int) -> tuple[jax.Array, jax.Array]:
        """The prompt of a caption: ids [b, p] and mask, as the tokenizer writes model.prompt, its begin or its end included."""
        ids = jnp.asarray((*prompt_ids(), eos) if encodes else (start, *prompt_ids()), jnp.int32)
        return jnp.tile(ids, (rows, 1)), jnp.ones((rows, len(ids)), bool)

    def question(batch: Batch) -> tuple[jax.Array, jax.Array]:
        """What comes before a reply: ids [b, p] and mask: ``prompt``, or ``text``, a question as the tokenizer writes it. A decoder's is padded on the left
        and has no end."""
        ids, mask = (batch["prompt"], batch["prompt_mask"]) if "prompt" in batch else (batch["text"], batch["text_mask"])
        mask = mask.astype(bool)
        if encodes:
            return ids, mask
        if "prompt" not in batch:
            last = jnp.arange(ids.shape[1]) == mask.sum(1, keepdims=True) - 1
            mask = mask & ~(last & (ids == eos) & (jnp.arange(ids.shape[1]) > 0))
        return languages.to_the_right(ids, mask)

    def lesson(batch: Batch) -> dict[str, jax.Array]:
        """What is learned from a batch: ``prompt``, ``prompt_mask`` (or neither), ``ids``, ``mask``, ``target`` [r, l] and the ``weight`` of each row; r is b,
        or b * a for questions with a answers."""
        if "answer_weight" in batch:
            rows, answers = batch["answer"].shape[:2]
            ids, mask = (batch[name].reshape(rows * answers, -1) for name in ("answer", "answer_mask"))
            prompt, prompt_mask = (jnp.repeat(x, answers, axis=0) for x in question(batch))
            ids, mask = closed(ids, mask), mask.astype(bool)
            if not encodes:      # a reply does not begin anew
                ids, mask = ids[:, 1:], mask[:, 1:]
            return dict(prompt=prompt, prompt_mask=prompt_mask, ids=ids, mask=mask, target=mask, weight=batch["answer_weight"].reshape(-1))
        ids, mask = closed(batch["text"], batch["text_mask"]), batch["text_mask"].astype(bool)
        rows = len(ids)
        if "target_mask" in batch:      # data.layout="joined"
            return dict(ids=ids, mask=mask, target=batch["target_mask"].astype(bool) & mask)
        if "prompt" in batch:           # data.layout="apart"
            return dict(prompt=batch["prompt"], prompt_mask=batch["prompt_mask"], ids=ids, mask=mask, target=mask)
        if not encodes:
            told = prompt_ids()
            ids, mask = languages.after_first(told, ids), languages.after_first((True,) * len(told), mask)
            return dict(ids=ids, mask=mask, target=mask & (jnp.arange(ids.shape[1]) >= (len(told) + 1 if told else 0)))
        prompt, prompt_mask = opened(rows)
        return dict(prompt=prompt, prompt_mask=prompt_mask, ids=ids, mask=mask, target=mask)

    def prefix_of(variables: Variables, batch: Batch, context: Context | None = None) -> jax.Array:
        def key(name):
            return None if context is None else context.drop(name)
        if instructed and "instruction" not in batch:
            raise ConfigError("model.instruction_tokens: the queries read an instruction, and this batch has none; nearest: data.instruction_tokenizer and "
                              "data.instruction_length")
        words = (batch["instruction"], batch["instruction_mask"]) if instructed else ()
        prefix = apply(variables, Blip2.prefix, tokens_of(model, variables, batch, key("image")), *words, key=key("see"))
        return prefix.reshape(next(len(batch[name]) for name in EYES if name in batch), -1, prefix.shape[-1])

    def loss(variables: Variables, carry, batch: Batch, context: Context):
        learned = lesson(batch)
        weight = learned.pop("weight", None)
        target = learned.pop("target")
        images = {k: batch[k] for k in (*EYES, "instruction", "instruction_mask") if k in batch}

        def states(part, chunk):
            own = context.replace(rng=drop_key(context, chunk)) if context.train else context
            prefix = prefix_of(variables, part["images"], own)
            text = part["text"]
            answers = text["ids"].shape[1]
            prefix = jnp.repeat(prefix, answers, axis=0)
            flat = {k: v.reshape(-1, v.shape[-1]) for k, v in text.items()}
            out = apply(variables, Blip2.reply, prefix, flat.get("prompt"), flat.get("prompt_mask"), flat["ids"], flat["mask"], key=own.drop("reply"))
            return out.reshape(-1, answers, *out.shape[1:])

        rows = len(batch["text"])
        text = {k: v.reshape(rows, -1, v.shape[-1]) for k, v in learned.items()}
        out = chunked(states, data.microbatch)({"images": images, "text": text})
        out = out.reshape(-1, *out.shape[2:])
        vocabulary = apply(variables, Blip2.vocabulary)
        if weight is None:
            score = caption_nll if 0 < data.microbatch < data.batch else captioning
            nll, count, hits = (x.sum() for x in score(out, vocabulary, learned["ids"], target))
            lm = nll / jnp.maximum(count, 1)
        else:
            nll, count, hits = caption_nll(out, vocabulary, learned["ids"], target)
            lm, count, hits = (nll / jnp.maximum(count, 1) * weight).sum() / jnp.maximum(weight.sum(), 1e-6), count.sum(), hits.sum()
        total, raw = weigh({LM: lm}, asked)
        return total, Output({**raw, "token_accuracy": hits / jnp.maximum(count, 1)})

    def features(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """prefix [b, q, width of the language model], what it reads of the images; image [b, m, width], tokens, of one image a row."""
        seen = {"image": apply(variables, Blip2.encode_image, batch["image"])} if "image" in batch else {}
        return {**seen, "prefix": prefix_of(variables, batch)}

    def caption_logits(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """logits fp32 [b, l, vocab], whose row t predicts id t of ``text`` (the first one too), behind ``prompt`` where the batch has one; an encoder reads
        model.prompt where it has none."""
        prompt = (batch["prompt"], batch["prompt_mask"]) if "prompt" in batch else opened(len(batch["text"])) if encodes else (None, None)
        states = apply(variables, Blip2.reply, prefix_of(variables, batch), *prompt, batch["text"], batch["text_mask"])
        return {"logits": apply(variables, Blip2.logits, states)}

    def behind(variables: Variables, batch: Batch, prompt: tuple[jax.Array, jax.Array], length: int):
        """(prefill, extend, ids [b, 1] that ``prefill`` takes) of what follows image and prompt: the id is the decoder's first one, or was never read."""
        prefix = prefix_of(variables, batch)
        words = apply(variables, lambda m: m.language.embed(prompt[0]).astype(prefix.dtype))
        x, mask = jnp.concatenate([prefix, words], 1), jnp.concatenate([jnp.ones(prefix.shape[:2], bool), prompt[1]], 1)
        first = tokens["pad"] if encodes else model.first if model.first >= 0 else start
        return (*languages.continuation(lambda fn: apply(variables, lambda m: fn(m.language)), model.language.clone(parent=None), x, mask, length),
                jnp.full((len(x), 1), first, jnp.int32))

    def written(variables: Variables, batch: Batch, prompt: tuple[jax.Array, jax.Array], length: int, key, options: dict[str, Any]) -> dict[str, jax.Array]:
        """``decode`` behind image and prompt; its text begins with one id that was never read."""
        prefill, extend, first = behind(variables, batch, prompt, length)
        out = decode(prefill, extend, first, max_length=length, key=key, eos_ids=eos if end < 0 else end, pad_id=tokens["pad"],
                     batch_axis=model.language.CACHE_AXES, **{"beam_rule": "transformers_4.33", **options})
        text = out["text"]
        if vicuna and tokens["pad"]:      # as its official code reads what was written
            text = jnp.where(text == 0, eos, text)
        return {**out, "text": text if end < 0 else text.at[:, 1:].set(jnp.where(text[:, 1:] == end, eos, text[:, 1:]))}

    def generate(variables: Variables, batch: Batch, *, key=None, method: str | None = None, beams: int | None = None, max_length: int = 0, min_length: int = 1,
                 **options: Any) -> dict[str, jax.Array]:
        """A caption behind model.prompt, or a reply to ``prompt`` where the batch has one: text int32 [b, l], from <bos> on and without the prompt, whose end
        is the tokenizer's, and score [b].

        As in the official code, <bos> counts in min_length, in the length that beams' scores are divided by and, for a decoder, in max_length (0:
        data.length): l is max_length, or with an encoder max_length + 1. Without a method the likeliest id is taken, and where queries read instructions 5
        beams with repetition_penalty 1.5. Official captions: 5 beams, max_length 30, min_length 8, length_penalty 0, repetition_penalty 1.15.
        """
        usual = dict(INSTRUCTED) if instructed and method is None else dict(method=method or "greedy", beams=1)
        usual |= {} if beams is None else dict(beams=beams)
        prompt = question(batch) if "prompt" in batch else opened(len(batch["images"] if "images" in batch else batch["image"]))
        return written(variables, batch, prompt, (max_length or data.length) + encodes, key, {**usual, **options, "min_length": min_length})

    def answer(variables: Variables, batch: Batch, *, key=None, method: str = "generate", beams: int = 5, max_length: int = 10, min_length: int = 1,
               length_penalty: float | None = None, repetition_penalty: float | None = None, k: int = 0, **options: Any) -> dict[str, jax.Array]:
        """Answers to questions ``prompt`` (or ``text``) about ``image``: text int32 [b, 1 + max_length] (Vicuna: [b, max_length]), from <bos> on, and
        score [b]. None stands for what the official code has: length_penalty, of beams, 0 for a decoder and -1 with an encoder; repetition_penalty 1.5
        where queries read instructions, else 1. method "rank": answer int [b], the likeliest of ``candidates`` [c, l], and its score; all are scored."""
        if method not in ANSWERING:
            raise ConfigError(f"method={method!r} is not known{nearest(method, ANSWERING)}")
        if method == "rank":
            given = {new: jnp.broadcast_to(batch[old], (len(batch["prompt" if "prompt" in batch else "text"]), *batch[old].shape))
                     for old, new in (("candidates", "answer"), ("candidates_mask", "answer_mask"))}
            score = rank(variables, {**batch, **given})["score"]
            return {"answer": score.argmax(1), "score": score.max(1)}
        penalty = (-1.0 if encodes else 0.0) if length_penalty is None else length_penalty
        repeated = (INSTRUCTED["repetition_penalty"] if instructed else 1.0) if repetition_penalty is None else repetition_penalty
        return written(variables, batch, question(batch), max_length + (not vicuna), key,
                       dict(options, method="beam" if beams > 1 else "greedy", beams=beams, min_length=min_length, length_penalty=penalty,
                            repetition_penalty=repeated))

    def rank(variables: Variables, batch: Batch, *, key=None, rule: str = "sum") -> dict[str, jax.Array]:
        """score fp32 [b, a] of the candidates ``answer`` [b, a, m] as replies to ``prompt`` (or ``text``), higher for what is likelier. Image and prompt are
        read once for all of them.

        rule: "sum" of the log-probabilities of a candidate's ids (its end included, where it has one), "mean" over them, "official": with an encoder the
        sum, for a decoder the sum divided by all positions but one, of queries, of the batch's longest prompt and its longest candidate (the official
        code with one segment: the order is that of "sum").
        """
        if rule not in RULES:
            raise ConfigError(f"rule={rule!r} is not known{nearest(rule, RULES)}")
        ids, mask = batch["answer"], batch["answer_mask"].astype(bool)
        if "prompt" not in batch and not encodes:      # a reply does not begin anew
            ids, mask = ids[..., 1:], mask[..., 1:]
        prompt, length = question(batch), ids.shape[-1]
        prefill, extend, first = behind(variables, batch, prompt, length)
        logits, _, cache = prefill(first)

        def told(candidate: jax.Array) -> jax.Array:
            """Log-probability of each id [b, m]."""
            rows = logits[:, None]
            if length > 1:
                rows = jnp.concatenate([rows, extend(cache, candidate[:, :-1])[0]], 1)
            return jnp.take_along_axis(rows, candidate[..., None], axis=2)[..., 0] - jax.nn.logsumexp(rows, axis=2)

        each = jnp.where(mask, jax.lax.map(told, ids.swapaxes(0, 1)).swapaxes(0, 1), 0.0)
        score, count = each.sum(2), mask.sum(2)
        if rule == "mean":
            score = score / jnp.maximum(count, 1)
        elif rule == "official" and not encodes:
            frames = batch["images"].shape[1] if "images" in batch else 1
            score = score / (frames * model.qformer.queries + prompt[1].sum(1).max() + count.max() - 1)
        return {"score": score}

    return loss, {"features": features, "caption_logits": caption_logits, "generate": generate, "answer": answer, "rank": rank}
