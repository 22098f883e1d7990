"""ALBEF: align before fuse, with momentum distillation (arXiv 2107.07651; salesforce/ALBEF)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config as configs
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.losses.masked import mask_tokens, masked_lm
from vlm_jax.losses.matching import NEGATIVES, draw, matching, pairs
from vlm_jax.losses.momentum import TARGETS, enqueue, lerp, make_queues, momentum_contrastive, other_groups, replaced, shadowed
from vlm_jax.losses.terms import wanted, weigh
from vlm_jax.models import bert, grounding, vit
from vlm_jax.models.sizes import sizes
from vlm_jax.nn.linear import projection
from vlm_jax.nn.pixels import compute_dtype, normalise
from vlm_jax.nn.rows import join, part, select
from vlm_jax.nn.unit import unit
from vlm_jax.system import Batch, Context, Output, System, Variables, run

TEACHER = r"(image|text|image_head|text_head|lm_head)/.*"     # what has a slow copy: not the temperature, not itm_head


class Albef(nn.Module):
    """ViT, BERT in two halves, and their heads. Features are unit vectors of width ``embed``.

    The lower half of ``text`` reads texts alone (mode "text" of the official code), the upper half fuses its states
    with image tokens (mode "fusion"); both together are mode "multi_modal". lm_head: with the head of masked modelling.
    """
    image: vit.ViT
    text: bert.Bert
    embed: int
    with_lm_head: bool = True
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    temp_start: float = 0.07
    dtype: Any = jnp.float32

    def setup(self):
        self.image_head, self.text_head = projection(self.image.width, self.embed, self.dtype), projection(self.text.width, self.embed, self.dtype)
        self.itm_head = projection(self.text.width, 2, self.dtype)
        if self.with_lm_head:
            self.lm_head = bert.LanguageHead(self.text.vocab, self.text.width, self.text.eps, self.dtype)
        self.temp = self.param("temp", nn.with_logical_partitioning(nn.initializers.constant(self.temp_start), ()), (), jnp.float32)

    def encode_image(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """image [b, h, w, 3] -> (tokens [b, n, width], unit vector [b, embed])."""
        tokens = self.image(normalise(image, self.mean, self.std))
        return tokens, unit(self.image_head(tokens[:, 0]))

    def encode_text(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """ids [b, l] -> (states [b, l, width] of the lower half, unit vector [b, embed])."""
        states = self.text.lower(ids, mask)
        return states, unit(self.text_head(states[:, 0]))

    def fuse(self, states: jax.Array, mask: jax.Array, tokens: jax.Array, rows: jax.Array | None = None) -> jax.Array:
        """Lower-half states [b, l, width] and image tokens [n, m, width] -> fused states. rows int [b]: each text's image."""
        return self.text.upper(states, mask, tokens, memory_rows=rows)

    def match(self, fused: jax.Array) -> jax.Array:
        """Fused states -> logits [b, 2]; class 1 = match."""
        return self.itm_head(fused[:, 0])

    def predict_tokens(self, fused: jax.Array) -> jax.Array:
        """Fused states -> states of the language head, whose product with ``vocabulary`` are logits."""
        return self.lm_head(fused)

    def vocabulary(self) -> jax.Array:
        return self.lm_head.vocabulary(self.text.table())

    def temperature(self) -> jax.Array:
        """What cosines are divided by."""
        return self.temp

    def __call__(self, image: jax.Array, ids: jax.Array):
        tokens, image = self.encode_image(image)
        states, text = self.encode_text(ids, jnp.ones(ids.shape, bool))
        fused = self.fuse(states, jnp.ones(ids.shape, bool), tokens)
        words = self.predict_tokens(fused) if self.with_lm_head else None
        return image, text, self.match(fused), words, self.temp


def build_model(*, image: dict, text: dict, embed: int, tokens: dict, size: int, lm_head: bool, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
                temp: float = 0.07, dtype: str = "auto") -> Albef:
    """The module of a config's ``model`` section. text.cross_layers: how many of its layers fuse."""
    dtype = compute_dtype(dtype)
    image = vit.ViT(**sizes(vit.VARIANTS, image_size=size, dtype=dtype, **image))
    text = bert.Bert(**sizes(bert.VARIANTS, vocab=tokens["vocab"], memory_width=image.width, dtype=dtype, **text))
    return Albef(image, text, embed=embed, with_lm_head=lm_head, mean=tuple(mean), std=tuple(std), temp_start=temp, dtype=dtype)


def build_loss(*, weights: dict, momentum: float = 0.995, queue: int = 65536, alpha: float = 0.4, alpha_ramp: int = 0, negatives: str = "hard",
               negative_epsilon: float = 0.0, targets: str = "pairs", group: int = 0, mask_share: float = 0.15) -> dict[str, Any]:
    """The ``loss`` section, checked.

    weights: of ``itc``, ``itm``, ``mlm``. momentum: of the teacher. queue: past features kept. alpha: the teacher's share in the targets,
    reached linearly after ``alpha_ramp`` steps. negatives: "hard" (by similarity) or "random". targets: "pairs", or "images": texts of
    the same image are positives and no negatives. group: rows that contrast and mine among themselves, as the official code's GPUs do
    (64 in pre-training); 0: the whole batch.
    """
    for name, value, valid in (("negatives", negatives, NEGATIVES), ("targets", targets, TARGETS)):
        if value not in valid:
            raise ConfigError(f"loss.{name}={value!r} is not known{nearest(value, valid)}")
    if not 0 <= alpha <= 1:
        raise ConfigError(f"loss.alpha={alpha} is not a share; nearest: {min(max(alpha, 0.0), 1.0)}")
    return dict(weights=weights, momentum=momentum, queue=queue, alpha=alpha, alpha_ramp=alpha_ramp, negatives=negatives,
                negative_epsilon=negative_epsilon, targets=targets, group=group, mask_share=mask_share)


def build(config: Any) -> System:
    """The System of a resolved stage config. Raises ConfigError."""
    data, tokens = config.data, configs.to_plain(config.model.tokens)
    o = configs.call(build_loss, config.loss, "loss")
    weights = o["weights"]
    model = configs.call(build_model, config.model, "model", size=data.size, lm_head=wanted(weights, "mlm"))
    if data.microbatch:
        raise ConfigError(f"data.microbatch={data.microbatch}: negatives are mined from the whole batch; nearest: 0, and model.*.remat for memory")
    if o["queue"] < data.batch:
        raise ConfigError(f"loss.queue={o['queue']} is smaller than data.batch={data.batch}; nearest: {data.batch}")
    apply = functools.partial(run, model)

    def init(key, spec):
        return model.init(key, jnp.zeros((1, *spec["image"].shape[1:]), jnp.float32), jnp.zeros((1, *spec["text"].shape[1:]), jnp.int32))

    def init_carry(variables: Variables):
        return {"teacher": jax.tree.map(jnp.copy, shadowed(variables, TEACHER)), **make_queues(o["queue"], model.embed)}

    def next_carry(carry, update):
        return {"teacher": update["teacher"], **enqueue(carry, update["image"], update["text"], update["ids"])}

    def loss(variables: Variables, carry, batch: Batch, context: Context):
        teacher = lerp(carry["teacher"], shadowed(variables, TEACHER), o["momentum"])
        slow = replaced(variables, teacher)
        ids, mask, image_id = batch["text"], batch["text_mask"], batch["image_id"]
        rows, temp = ids.shape[0], apply(variables, Albef.temperature)
        alpha = o["alpha"] * jnp.minimum(1.0, context.step / o["alpha_ramp"]) if o["alpha_ramp"] else o["alpha"]
        masked = wanted(weights, "mlm")
        terms, metrics = {}, {"alpha": jnp.asarray(alpha, jnp.float32), "temp": temp}

        # Texts, and texts with words masked, share the lower half.
        read, read_mask = ids, mask
        if masked:
            corrupted, chosen = batch.get("masked_text"), batch.get("masked_at")
            if corrupted is None:
                corrupted, chosen = mask_tokens(context.key("mask"), ids, mask & (ids != tokens["bos"]) & (ids != tokens["pad"]),
                                                vocab=model.text.vocab, mask_id=tokens["mask"], share=o["mask_share"])
            read, read_mask = jnp.concatenate([ids, corrupted]), jnp.concatenate([mask, mask])

        def towers(variables, name):
            tokens, image = apply(variables, Albef.encode_image, batch["image"])
            states, text = apply(variables, Albef.encode_text, read, read_mask, key=dropped(context, model, name))
            return tokens, image, states, text[:rows]

        tokens_, image, states, text = towers(variables, "student")
        slow_tokens, slow_image, slow_states, slow_text = jax.lax.stop_gradient(towers(slow, "teacher"))

        targets = image_id if o["targets"] == "images" else None
        itc, similar = momentum_contrastive(image, text, slow_image, slow_text, carry, temp, alpha, ids=targets, group=o["group"])
        if wanted(weights, "itc"):
            terms["itc"] = itc

        # One pass of the upper half: pairs, texts with negative images, negative texts, masked texts.
        fused, fused_mask, images = [], [], []
        if wanted(weights, "itm"):
            same = (jnp.eye(rows, dtype=bool) if targets is None else targets[:, None] == targets) | other_groups(rows, o["group"])
            negative = functools.partial(draw, o["negatives"], excluded=same, epsilon=o["negative_epsilon"])
            pair = pairs(batch.get("negative_image", negative(context.key("negative_image"), similar["text_to_image"])),
                         batch.get("negative_text", negative(context.key("negative_text"), similar["image_to_text"])), o["group"])
            fused, fused_mask, images = [select(states[:rows], pair.text)], [select(mask, pair.text)], [pair.image]
        group = o["group"] or rows
        groups = rows // group
        if masked:
            fused, fused_mask, images = fused + [states[rows:]], fused_mask + [mask], images + [jnp.tile(jnp.arange(group), (groups, 1))]
        if fused:
            out = apply(variables, Albef.fuse, join(fused, groups), join(fused_mask, groups), tokens_, jnp.concatenate(images, 1),
                        key=dropped(context, model, "fusion"))
        if wanted(weights, "itm"):
            terms["itm"], metrics["itm_accuracy"] = matching(
                apply(variables, Albef.match, part(out, groups, 0, 3 * group)), pair.label, pair.weight)
        if masked:
            taught = apply(slow, Albef.fuse, slow_states[rows:], mask, slow_tokens, key=dropped(context, model, "teacher_fusion"))
            taught = jax.lax.stop_gradient((apply(slow, Albef.predict_tokens, taught), apply(slow, Albef.vocabulary)))
            nll, count, hits = masked_lm(apply(variables, Albef.predict_tokens, part(out, groups, -group, None)), apply(variables, Albef.vocabulary), ids, chosen,
                                         teacher=taught, alpha=alpha)
            terms["mlm"], metrics["mlm_accuracy"] = nll / jnp.maximum(count, 1), hits / jnp.maximum(count, 1)
        total, raw = weigh(terms, {k: w for k, w in weights.items() if wanted(weights, k)})
        return total, Output({**raw, **metrics}, update={"teacher": teacher, "image": slow_image, "text": slow_text, "ids": image_id})

    return System(model, init, loss, {name: functools.partial(fn, model) for name, fn in PREDICT.items() if name != "mlm_logits" or model.with_lm_head},
                  init_carry, next_carry, {"image_queue|text_queue": ("none", "none"), "id_queue": ("none",)}, papers=("2107.07651",))


def dropped(context: Context, model: Albef, name: str) -> jax.Array | None:
    return context.key(name) if context.train and model.text.dropout else None


def embed(model: Albef, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """image_embed and text_embed [b, embed], for what the batch has; logit_scale, the multiplier."""
    out = {"logit_scale": 1 / run(model, variables, Albef.temperature)}
    if "image" in batch:
        out["image_embed"] = run(model, variables, Albef.encode_image, batch["image"])[1]
    if "text" in batch:
        out["text_embed"] = run(model, variables, Albef.encode_text, batch["text"], batch["text_mask"])[1]
    return out


def features(model: Albef, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """image [b, n, width], tokens; text [b, l, width], lower-half states; fused [b, l, width] where the batch has both."""
    out = {}
    if "image" in batch:
        out["image"] = run(model, variables, Albef.encode_image, batch["image"])[0]
    if "text" in batch:
        out["text"] = run(model, variables, Albef.encode_text, batch["text"], batch["text_mask"])[0]
    if len(out) == 2:
        out["fused"] = run(model, variables, Albef.fuse, out["text"], batch["text_mask"], out["image"])
    return out


def match(model: Albef, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """match [b, 2]: logits of row i's text and image, class 1 = match. ``image_features`` and ``text_features`` (of ``features``)
    stand for ``image`` and ``text`` where they were computed before."""
    found = features(model, variables, {k: batch[k] for k in ("image",) if k in batch})
    found |= features(model, variables, {k: batch[k] for k in ("text", "text_mask") if "text" in batch})
    tokens, states = batch.get("image_features", found.get("image")), batch.get("text_features", found.get("text"))
    return {"match": run(model, variables, Albef.match, run(model, variables, Albef.fuse, states, batch["text_mask"], tokens))}


def mlm_logits(model: Albef, variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
    """logits fp32 [b, l, vocab] of every position of a (masked) text beside its image."""
    fused = features(model, variables, batch)["fused"]
    return {"logits": (run(model, variables, Albef.predict_tokens, fused) @ run(model, variables, Albef.vocabulary)).astype(jnp.float32)}


def ground(model: Albef, variables: Variables, batch: Batch, *, key=None, layer: int | None = None) -> dict[str, jax.Array]:
    """heat fp32 [b, rows, columns], largest 1: where in row i's image its text is seen, from the matching logit's gradient at the
    cross-attention of ``layer`` (``models.grounding.heat``)."""
    found = features(model, variables, {k: batch[k] for k in ("image", "text", "text_mask")})
    cam = grounding.heat(model.text, variables["params"]["text"], lambda fused: run(model, variables, Albef.match, fused)[:, 1],
                         found["text"], batch["text_mask"], found["image"], layer)
    rows, columns = (side // model.image.patch for side in batch["image"].shape[1:3])
    return {"heat": cam.reshape(-1, rows, columns)}


PREDICT = {"embed": embed, "features": features, "match": match, "mlm_logits": mlm_logits, "ground": ground}
