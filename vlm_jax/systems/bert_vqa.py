"""Answering questions about an image with BERTs: one reads the question beside the image, another writes the answer beside what the first
one found (ALBEF, arXiv 2107.07651, section 4; BLIP, 2201.12086, section 5.3)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config as configs
from vlm_jax.decode import generate as decode
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.losses.captioning import caption_nll
from vlm_jax.losses.masked import masked_lm
from vlm_jax.losses.momentum import lerp, replaced, shadowed
from vlm_jax.losses.terms import wanted, weigh
from vlm_jax.models import bert, vit
from vlm_jax.models.sizes import sizes
from vlm_jax.nn.block import MEMORY_AXES
from vlm_jax.nn.pixels import compute_dtype, normalise
from vlm_jax.system import Batch, Context, Output, System, Variables, run

TEACHER = ".*"      # every part has a slow copy
RANKS = ("sequence", "first_and_sequence")
PADS = ("hidden", "seen")
METHODS = ("rank", "generate")
FIRST = ("model", "bos")
HEAD = ("lm_head/.*", "", "copy")
# The answer decoder takes over what read beside the image: ALBEF's upper half, all of BLIP in its decoder's role.
ADOPT = {
    "albef": (("decoder/blocks_cross/decoder_(.*)", r"text/blocks_cross/\1", "copy"), (r"decoder/(.*)", r"text/\1", "copy"), HEAD, ("(image|text)/.*", "", "copy")),
    "blip": ((r"decoder/(.*)", r"text/\1", "copy"), HEAD, ("(image|text)/.*", "", "copy")),
}


class AnswerModel(nn.Module):
    """ViT, a BERT that reads the question, a BERT that writes the answer, and the language head.

    first: the id that stands first in a question, -1 for the tokenizer's; start: the same of an answer. answer_ends: ends that close
    an answer: 2 in ALBEF, which writes "[SEP]" into the text and has its tokenizer add another.
    """
    image: vit.ViT
    text: bert.Bert
    decoder: bert.Bert
    first: int = -1
    start: int = -1
    eos: int = 0
    answer_ends: int = 1
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: Any = jnp.float32

    def setup(self):
        self.lm_head = bert.LanguageHead(self.decoder.vocab, self.decoder.width, self.decoder.eps, self.dtype)

    def encode_image(self, image: jax.Array) -> jax.Array:
        """image [b, h, w, 3] -> tokens [b, n, width]."""
        return self.image(normalise(image, self.mean, self.std))

    def ask(self, ids: jax.Array, mask: jax.Array, tokens: jax.Array, first: str = "model") -> jax.Array:
        """A question [b, l] beside its image's tokens -> states [b, l, width]. ``first`` "bos" leaves the first token as it is."""
        return self.text(ids if self.first < 0 or first == "bos" else ids.at[:, 0].set(self.first), mask, tokens)

    def write(self, ids: jax.Array, states: jax.Array, seen: jax.Array, rows: jax.Array | None = None) -> jax.Array:
        """Answers [n, l] beside questions' states [b, m, width] -> states of the language head; position t predicts id t + 1.
        seen bool [b, m]: the questions' real tokens. rows int [n]: each answer's question; None: its own."""
        return self.lm_head(self.decoder.decode(ids, None, states, seen if rows is None else seen[rows], rows))

    def vocabulary(self) -> jax.Array:
        return self.lm_head.vocabulary(self.decoder.table())

    def logits(self, states: jax.Array) -> jax.Array:
        """States of the language head [b, l, width + 1] -> fp32 [b, l, vocab]."""
        return jnp.einsum("bld,dv->blv", states, self.vocabulary().astype(states.dtype), preferred_element_type=jnp.float32)

    def extend(self, cache: dict[str, Any], ids: jax.Array, states: jax.Array | None = None) -> tuple[jax.Array, dict[str, Any]]:
        """New ids [b, k] after those in the cache -> (logits [b, vocab] after the last, cache). ``states`` at prefill alone."""
        out, own = self.decoder.extend(ids, cache["text"], cache["position"], states, cache["seen"])
        return self.logits(self.lm_head(out[:, -1:]))[:, 0], {**cache, "text": own, "position": cache["position"] + ids.shape[1]}

    def __call__(self, image: jax.Array, ids: jax.Array):
        mask = jnp.ones(ids.shape, bool)
        return self.write(ids, self.ask(ids, mask, self.encode_image(image)), mask)


def close(model: AnswerModel, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Answers [n, l] as the tokenizer gives them -> those that the decoder learns: its own start, all of its ends."""
    if model.start >= 0:
        ids = ids.at[:, 0].set(model.start)
    more = model.answer_ends - 1
    ids, mask = jnp.pad(ids, ((0, 0), (0, more))), jnp.pad(mask, ((0, 0), (0, more)))
    length, at = mask.sum(1, keepdims=True), jnp.arange(ids.shape[1])
    added = (at >= length) & (at < length + more) & (length > 0)
    return jnp.where(added, model.eos, ids), mask | added


def build_model(*, image: dict, text: dict, decoder: dict, tokens: dict, size: int, answer_ends: int = 1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
                paper: str = "", dtype: str = "auto") -> AnswerModel:
    """The module of a config's ``model`` section. text, decoder: as for BERT; tokens.enc and tokens.dec, where there are some, stand first
    in questions and answers. paper: the arXiv id to cite."""
    dtype = compute_dtype(dtype)
    image = vit.ViT(**sizes(vit.VARIANTS, image_size=size, dtype=dtype, **image))
    text = sizes(bert.VARIANTS, vocab=tokens["vocab"], memory_width=image.width, dtype=dtype, **text)
    decoder = sizes(bert.VARIANTS, vocab=tokens["vocab"], memory_width=text["width"], dtype=dtype, roles=("decoder",), **decoder)
    if answer_ends < 1:
        raise ConfigError(f"model.answer_ends={answer_ends}: an answer needs an end; nearest: 1")
    return AnswerModel(image, bert.Bert(**text), bert.Bert(**{**decoder, "cross_layers": decoder["layers"]}), first=tokens.get("enc", -1), start=tokens.get("dec", -1),
                       eos=tokens["eos"], answer_ends=answer_ends, mean=tuple(mean), std=tuple(std), dtype=dtype)


def build_loss(*, weights: dict, momentum: float = 0.995, alpha: float = 0.0, alpha_ramp: int = 0, label_smoothing: float = 0.0,
               rank_by: str = "sequence") -> dict[str, Any]:
    """The ``loss`` section, checked.

    weights: of ``answer``. alpha: share of a slow copy's distribution in the targets, reached linearly after ``alpha_ramp`` steps; 0: there is
    no copy. momentum: of the copy. rank_by: how a list of answers is ranked: "sequence", by the loss of the answer (smoothed as in training,
    as BLIP does), or "first_and_sequence", with its first token's log-probability counted once more (ALBEF).
    """
    if rank_by not in RANKS:
        raise ConfigError(f"loss.rank_by={rank_by!r} is not known{nearest(rank_by, RANKS)}")
    if not 0 <= alpha <= 1:
        raise ConfigError(f"loss.alpha={alpha} is not a share; nearest: {min(max(alpha, 0.0), 1.0)}")
    if alpha and label_smoothing:
        raise ConfigError(f"loss.label_smoothing={label_smoothing} beside loss.alpha={alpha}: targets are smoothed or taught; nearest: 0")
    return dict(weights=weights, momentum=momentum, alpha=alpha, alpha_ramp=alpha_ramp, label_smoothing=label_smoothing, rank_by=rank_by)


def build(config: Any) -> System:
    """The System of a resolved stage config. Raises ConfigError."""
    data, tokens = config.data, configs.to_plain(config.model.tokens)
    o = configs.call(build_loss, config.loss, "loss")
    model = configs.call(build_model, config.model, "model", size=data.size)
    if not data.answers:
        raise ConfigError("data.answers=0, but a system that answers learns from answers; nearest: 10, and data.answer_length=8")
    if data.microbatch:
        raise ConfigError(f"data.microbatch={data.microbatch} is not supported by bert_vqa; nearest: 0, and model.*.remat for memory")
    apply = functools.partial(run, model)

    def init(key, spec):
        return model.init(key, jnp.zeros((1, *spec["image"].shape[1:]), jnp.float32), jnp.zeros((1, 2), jnp.int32))

    def init_carry(variables: Variables):
        return {"teacher": jax.tree.map(jnp.copy, shadowed(variables, TEACHER))} if o["alpha"] else {}

    def next_carry(carry, update):
        return update if o["alpha"] else carry

    def loss(variables: Variables, carry, batch: Batch, context: Context):
        rows, answers = batch["answer"].shape[:2]
        ids, mask = close(model, batch["answer"].reshape(rows * answers, -1), batch["answer_mask"].reshape(rows * answers, -1))
        which = jnp.repeat(jnp.arange(rows), answers)
        weight = batch["answer_weight"].reshape(-1)

        def written(variables, name):
            tokens = apply(variables, AnswerModel.encode_image, batch["image"], key=context.drop(f"{name}_image"))
            states = apply(variables, AnswerModel.ask, batch["text"], batch["text_mask"], tokens, key=context.drop(f"{name}_question"))
            states = apply(variables, AnswerModel.write, ids, states, batch["text_mask"], which, key=context.drop(f"{name}_answer"))
            return states[:, :-1], apply(variables, AnswerModel.vocabulary)

        states, vocabulary = written(variables, "student")
        update, metrics = {}, {}
        if o["alpha"]:
            teacher = lerp(carry["teacher"], shadowed(variables, TEACHER), o["momentum"])
            taught = jax.lax.stop_gradient(written(replaced(variables, teacher), "teacher"))
            alpha = o["alpha"] * jnp.minimum(1.0, context.step / o["alpha_ramp"]) if o["alpha_ramp"] else o["alpha"]
            update, metrics = {"teacher": teacher}, {"alpha": jnp.asarray(alpha, jnp.float32)}
            total, count, hits = masked_lm(states, vocabulary, ids[:, 1:], mask[:, 1:], teacher=taught, alpha=alpha, weight=weight)
        else:
            nll, count, hits = caption_nll(states, vocabulary, ids[:, 1:], mask[:, 1:], label_smoothing=o["label_smoothing"])
            total, count, hits = (nll * weight).sum(), count.sum(), hits.sum()
        metrics["token_accuracy"] = hits / jnp.maximum(count, 1)
        total, raw = weigh({"answer": total / rows}, {k: w for k, w in o["weights"].items() if wanted(o["weights"], k)})
        return total, Output({**raw, **metrics}, update=update)

    def question(variables: Variables, batch: Batch, first: str = "model") -> jax.Array:
        tokens = apply(variables, AnswerModel.encode_image, batch["image"])
        return apply(variables, functools.partial(AnswerModel.ask, first=first), batch["text"], batch["text_mask"], tokens)

    def answer(variables: Variables, batch: Batch, *, key=None, method: str = "rank", k: int = 128, first: str = "model", pads: str = "hidden",
               beams: int = 3, max_length: int = 10, min_length: int = 1, **options: Any) -> dict[str, jax.Array]:
        """Answers to questions ``text`` [b, l] about ``image``.

        method "rank": the best of ``candidates`` int32 [c, l] (with ``candidates_mask``; as the tokenizer gives them), by loss.rank_by, among the ``k``
        whose first token is likeliest. Returns answer int32 [b], an index into the candidates; score fp32 [b]; top int32 [b, k], all that were
        scored, best first; top_score [b, k]. "generate" writes one, by beam search (``beams`` 1: greedily; other options as
        ``vlm_jax.decode`` has them): text int32 [b, max_length], from <bos> on, and score [b].
        ``first`` "bos" keeps questions' own first token, as Hugging Face's BLIP does; ``pads`` "seen" lets the decoder look at the padding of
        questions while it generates, as BLIP's code does there.
        """
        for name, value, valid in (("method", method, METHODS), ("pads", pads, PADS), ("first", first, FIRST)):
            if value not in valid:
                raise ConfigError(f"{name}={value!r} is not known{nearest(value, valid)}")
        states = question(variables, batch, first)
        if method == "rank":
            if "candidates" not in batch:
                raise ConfigError("method='rank' needs candidates [c, l]; nearest: method='generate'")
            return rank(variables, states, batch["text_mask"], batch["candidates"], batch["candidates_mask"], k)
        return written(variables, states, batch["text_mask"] if pads == "hidden" else jnp.ones_like(batch["text_mask"]), key,
                       dict(options, method="beam" if beams > 1 else "greedy", beams=beams, max_length=max_length, min_length=min_length))

    def rank(variables: Variables, states, seen, candidates, candidates_mask, k: int):
        rows, k = len(states), min(k, len(candidates))
        ids, mask = close(model, candidates, candidates_mask.astype(bool))
        first = apply(variables, AnswerModel.write, jnp.tile(ids[:1, :1], (rows, 1)), states, seen)
        first = jax.nn.log_softmax(apply(variables, AnswerModel.logits, first)[:, 0])[:, ids[:, 1]]      # [rows, candidates]
        likely, top = jax.lax.top_k(first, k)
        which, chosen = jnp.repeat(jnp.arange(rows), k), top.reshape(-1)
        written = apply(variables, AnswerModel.write, ids[chosen], states, seen, which)
        nll, _, _ = caption_nll(written[:, :-1], apply(variables, AnswerModel.vocabulary), ids[chosen, 1:], mask[chosen, 1:], label_smoothing=o["label_smoothing"])
        score = -nll.reshape(rows, k) + (likely if o["rank_by"] == "first_and_sequence" else 0.0)
        order = jnp.argsort(-score, axis=1, stable=True)
        top, score = (jnp.take_along_axis(x, order, axis=1) for x in (top, score))
        return {"answer": top[:, 0].astype(jnp.int32), "score": score[:, 0], "top": top.astype(jnp.int32), "top_score": score}

    def written(variables: Variables, states, seen, key, options):
        rows, length = len(states), options["max_length"]
        if length > model.decoder.positions:
            raise ConfigError(f"max_length={length} exceeds the {model.decoder.positions} positions of the answer; nearest: {model.decoder.positions}")

        def prefill(prompt):
            own = model.decoder.clone(parent=None).init_cache(rows, length, states.shape[1])
            logits, cache = apply(variables, AnswerModel.extend, {"text": own, "position": jnp.int32(0), "seen": seen}, prompt, states)
            return logits, (), cache

        def extend(cache, ids):
            logits, cache = apply(variables, AnswerModel.extend, cache, ids)
            return logits, (), cache

        start = jnp.full((rows, 1), tokens["bos"] if model.start < 0 else model.start, jnp.int32)
        out = decode(prefill, extend, start, key=key, eos_ids=tokens["eos"], pad_id=tokens["pad"], batch_axis={"text": MEMORY_AXES, "position": -1, "seen": -1},
                     **{"beam_rule": "transformers_4.15", **options})
        return {**out, "text": out["text"].at[:, 0].set(tokens["bos"])}

    def states(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """image [b, n, width], tokens; states [b, l, width] of the question beside them."""
        found = apply(variables, AnswerModel.encode_image, batch["image"])
        return {"image": found, "states": apply(variables, AnswerModel.ask, batch["text"], batch["text_mask"], found)}

    def answer_logits(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """logits fp32 [b, l, vocab] of answers ``answer`` [b, l] (``answer_mask``) to questions; row t predicts id t + 1."""
        ids, _ = close(model, batch["answer"], batch["answer_mask"].astype(bool))
        out = apply(variables, AnswerModel.write, ids, question(variables, batch), batch["text_mask"])
        return {"logits": apply(variables, AnswerModel.logits, out)}

    return System(model, init, loss, {"answer": answer, "features": states, "answer_logits": answer_logits}, init_carry, next_carry, adopt=ADOPT,
                  papers=tuple(p for p in (config.model.get("paper", ""),) if p))
