"""BLIP-2's training against transformers' own BLIP-2, fp32, on the CPU.

    python -m benchmarks.query_step [--part=queries|language] [--out=FILE.json]

queries   forward and backward of the first stage's passes through a base Q-Former (12 x 768, 32 queries): the queries beside image tokens (257 x 1408,
          given), the text alone, and both together; contrast and matching of the pairs themselves on top. Theirs is Blip2ForImageTextRetrieval by its
          parts, for it has no loss; generation of text is left out, for it has no such pass. The image's keys and values are made once here, for both
          passes that look at it, and twice there.
language  a step of the second stage: an eye of one layer of ViT-g and OPT-125M, both frozen (theirs: requires_grad off), the same Q-Former, the loss, its
          gradient and AdamW on what trains. Theirs is Blip2ForConditionalGeneration, which forms logits at the places of the image too. Ours is the whole
          train step of vlm_jax.run: it also takes the gradient's norm and checks that all is finite.

Equal on both sides, and checked: the weights (theirs, imported), the number of trained ones, and the loss of the batch without dropout. Dropout is 0.1 in the
Q-Former and in OPT, as transformers has it by default; nothing is rematerialised. Texts have 32 ids. Target: a ratio of times of 0.8 at most.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import models, paired

PARTS = ("queries", "language")
QUERIES, LENGTH, WORDS, SIZE = 32, 32, (1000, 20000), 224
IMAGE_TOKEN = 50271      # an id that no text has
TEMPERATURE, CLOSE = 0.07, 1e-4
TINY = dict(hidden_size=64, num_attention_heads=2, num_hidden_layers=2, intermediate_size=128)     # of the Q-Former, for --quick
EYE = dict(hidden_size=1408, intermediate_size=6144, num_hidden_layers=1, num_attention_heads=16, image_size=SIZE, patch_size=14)
TINY_EYE = dict(EYE, hidden_size=88, intermediate_size=384, num_attention_heads=4, image_size=28)
OPT = dict(model_type="opt", vocab_size=50272, hidden_size=768, word_embed_proj_dim=768, num_hidden_layers=12, num_attention_heads=12, ffn_dim=3072,
           max_position_embeddings=2048, bos_token_id=2, eos_token_id=2, pad_token_id=1)
TINY_OPT = dict(OPT, hidden_size=64, word_embed_proj_dim=64, num_hidden_layers=2, num_attention_heads=2, ffn_dim=128)


# ---- theirs, whose weights both have -----------------------------------------------------------

def peer_model(part: str, quick: bool) -> Any:
    """transformers' model with weights of seed 0; the trained ones have gradients, the others none."""
    import torch
    import transformers

    torch.manual_seed(0)
    words = part == "queries"
    former = dict(TINY if quick else {}, vocab_size=30523, use_qformer_text_input=words)
    config = transformers.Blip2Config(vision_config=TINY_EYE if quick else EYE, qformer_config=former, text_config=TINY_OPT if quick else OPT,
                                      num_query_tokens=QUERIES, **({} if words else dict(image_token_index=IMAGE_TOKEN)))
    model = (transformers.Blip2ForImageTextRetrieval if words else transformers.Blip2ForConditionalGeneration)(config)
    with torch.no_grad():
        model.query_tokens.normal_(0, 0.02)
    model.vision_model.requires_grad_(False)
    if not words:
        model.vision_model.post_layernorm.requires_grad_(True)
        model.language_model.requires_grad_(False)
    return model


def saved_peer(part: str, quick: bool, folder: str) -> Any:
    model = peer_model(part, quick)
    model.save_pretrained(folder)
    return model


def counted(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def peer_step(part: str, quick: bool, batch: str, folder: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """A worker's function; its model is written to ``folder``, for the other side."""
    import torch

    model, arrays = saved_peer(part, quick, folder), dict(np.load(batch))
    text, mask = (torch.from_numpy(arrays[k].astype(np.int64)) for k in ("text", "text_mask"))
    trained = [p for p in model.parameters() if p.requires_grad]
    if part == "queries":
        tokens, step_of = torch.from_numpy(arrays["tokens"]), None

        def loss() -> Any:
            queries = model.query_tokens.expand(len(tokens), -1, -1)
            real = torch.ones(tokens.shape[:2], dtype=torch.long)
            seen = model.qformer(query_embeds=queries, encoder_hidden_states=tokens, encoder_attention_mask=real).last_hidden_state
            read = model.qformer(query_embeds=model.embeddings(input_ids=text), query_length=0, attention_mask=mask).last_hidden_state
            both = model.qformer(query_embeds=model.embeddings(input_ids=text, query_embeds=queries), query_length=QUERIES,
                                 attention_mask=torch.cat([torch.ones(queries.shape[:2], dtype=torch.long), mask], 1), encoder_hidden_states=tokens,
                                 encoder_attention_mask=real).last_hidden_state
            image = torch.nn.functional.normalize(model.vision_projection(seen), dim=-1)
            words = torch.nn.functional.normalize(model.text_projection(read[:, 0]), dim=-1)
            alike = torch.einsum("iqd,td->itq", image, words).max(2).values / TEMPERATURE
            own = torch.arange(len(alike))
            contrast = (torch.nn.functional.cross_entropy(alike, own) + torch.nn.functional.cross_entropy(alike.T, own)) / 2
            return contrast + torch.nn.functional.cross_entropy(model.itm_head(both[:, :QUERIES]).mean(1), torch.ones_like(own))
    else:
        image = torch.from_numpy(pixels(arrays["image"]).transpose(0, 3, 1, 2).copy())
        seen = torch.full((len(text), QUERIES), IMAGE_TOKEN)
        ids, whole = torch.cat([seen, text], 1), torch.cat([torch.ones_like(seen), mask], 1)
        labels = torch.cat([torch.full_like(seen, -100), torch.where(mask > 0, text, -100)], 1)
        plain = [p for p in trained if p.ndim < 2]
        kept = {id(p) for p in plain}
        step_of = torch.optim.AdamW([{"params": [p for p in trained if id(p) not in kept], "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
                                    lr=1e-6, betas=(0.9, 0.98))

        def loss() -> Any:
            return model(pixel_values=image, input_ids=ids, attention_mask=whole, labels=labels).loss

    model.eval()
    with torch.no_grad():
        first = float(loss())
    model.train()

    def step() -> None:
        value = loss()
        for p in trained:
            p.grad = None
        value.backward()
        if step_of is not None:
            step_of.step()

    unused = 0 if part == "language" else sum(p.numel() for n, p in model.named_parameters() if n.startswith("language"))
    return step, {"parameters": counted(model) - unused, "loss": first, "threads": torch.get_num_threads()}


def pixels(image: np.ndarray) -> np.ndarray:
    """uint8 [b, h, w, 3] as CLIP's models take it, float32."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ((image / 255 - mean) / std).astype(np.float32)


# ---- ours --------------------------------------------------------------------------------------

def imported(folder: str) -> tuple[Any, dict[str, np.ndarray]]:
    """(the imported stage's config, weights) of transformers' model in ``folder``."""
    from vlm_jax import stage
    from vlm_jax.config import from_json
    from vlm_jax.importers import cli

    out = pathlib.Path(folder) / "imported"
    if not out.exists():
        cli.import_release("hf_blip2", folder, out, say=lambda line: print(line, file=sys.stderr))
    return from_json((out / "config.json").read_text()), stage.read_weights(out)


def our_config(part: str, found: Any, batch: int) -> Any:
    """The published stage with the imported sizes."""
    from vlm_jax.config import ConfigDict, to_plain

    config = to_plain(models.load_config("blip2", "opt2.7b").stages["pretrain" if part == "queries" else "generate"])
    model = to_plain(found.model)
    model["qformer"] |= dict(dropout=0.1, remat="none")
    model["image"] |= dict(remat="none")
    if part == "language":
        model["language"] |= dict(dropout=0.1, remat="none")
    config["data"] |= dict(batch=batch, size=found.data.size, length=LENGTH, tokenizer="")
    config["optim"] |= dict(lr=1e-6, schedule="constant", warmup=0, end_lr=0.0)
    weights = dict(itc=1.0, itm=1.0) if part == "queries" else dict(lm=1.0)
    return ConfigDict({**config, "model": dict(model, dtype="float32"), "loss": dict(weights=weights), "steps": 1000, "evals": {}, "init": (),
                       "frozen_dtype": "float32"})


def our_step(part: str, quick: bool, batch: str, folder: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """A worker's function."""
    arrays = dict(np.load(batch))
    found, weights = imported(folder)
    config = our_config(part, found, len(arrays["text"]))
    return models.trainer_step(config, arrays, weights) if part == "language" else queries_step(config, arrays, weights)


def queries_step(config: Any, arrays: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> tuple[Callable[[], None], dict[str, Any]]:
    import functools

    import jax
    import jax.numpy as jnp
    import optax

    from vlm_jax.stage import resolve
    from vlm_jax.system import run
    from vlm_jax.train.state import merge

    stage = resolve(config, "pretrain")
    model, apply = stage.system.model, functools.partial(run, stage.system.model)
    used = {p: jnp.asarray(weights[p]) for p in stage.plan.shapes if not p.startswith(("image/", "image_norm/")) and p != "temp"}
    tokens, text, mask = (jnp.asarray(arrays[k]) for k in ("tokens", "text", "text_mask"))
    kind = type(model)

    def loss(params: Any, tokens: Any, text: Any, mask: Any, key: Any) -> Any:
        variables = merge(params, {"temp": jnp.float32(TEMPERATURE)}, {})
        first, second, third = (None, None, None) if key is None else jax.random.split(key, 3)
        states, _, seen = apply(variables, kind.see, tokens, key=first)
        words = apply(variables, kind.text_feature, apply(variables, kind.encode_text, text, mask, key=second))
        both = apply(variables, kind.ground, text, mask, seen, key=third)
        alike = jnp.einsum("iqd,td->itq", apply(variables, kind.image_feature, states), words).max(2) / TEMPERATURE
        own = jnp.arange(len(alike))
        entropy = optax.losses.softmax_cross_entropy_with_integer_labels
        contrast = (entropy(alike, own).mean() + entropy(alike.T, own).mean()) / 2
        return contrast + entropy(apply(variables, kind.match, both), jnp.ones_like(own)).mean()

    first = float(jax.jit(functools.partial(loss, key=None))(used, tokens, text, mask))
    gradient, keys = jax.jit(jax.value_and_grad(loss)), iter(range(10**9))

    def step() -> None:
        jax.block_until_ready(gradient(used, tokens, text, mask, jax.random.key(next(keys))))

    return step, {"parameters": sum(x.size for x in used.values()), "loss": first}


# ---- a batch for both --------------------------------------------------------------------------

def make_batch(part: str, rows: int, quick: bool) -> dict[str, np.ndarray]:
    """Image tokens or noise for images, and random ids of ``models.caption_lengths`` for texts, padded to ``LENGTH``."""
    rng = np.random.default_rng(0)
    eye = TINY_EYE if quick else EYE
    pad, begin, end = (0, 101, 102) if part == "queries" else (1, 2, 2)
    text, lengths = np.full((rows, LENGTH), pad, np.int32), models.caption_lengths(rows)
    for row, length in zip(text, lengths, strict=True):
        row[:length] = [begin, *rng.integers(*WORDS, length - 2), end]
    out = {"text": text, "text_mask": np.arange(LENGTH) < lengths[:, None]}
    if part == "queries":
        return out | {"tokens": rng.standard_normal((rows, (eye["image_size"] // eye["patch_size"]) ** 2 + 1, eye["hidden_size"]), np.float32)}
    side = eye["image_size"]
    return out | {"image": rng.integers(0, 256, (rows, side, side, 3), np.uint8), "caption_id": np.arange(rows, dtype=np.int32),
                  "image_id": np.arange(rows, dtype=np.int32)}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Exits where the sides do not compute the same."""
    if ours["parameters"] != theirs["parameters"] or abs(ours["loss"] - theirs["loss"]) > CLOSE * abs(theirs["loss"]):
        sys.exit(f"the models differ: ours {ours}, transformers {theirs}")


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--part", choices=PARTS, default=PARTS[0])
    flags.add_argument("--batch", type=int, default=4, help="rows (default %(default)s)")
    paired.add_blocks(flags, rounds=4, steps=4, drop=1)
    given = paired.parse(flags, argv, quick=dict(rounds=2, steps=2, drop=1))
    paired.require_peer("transformers")
    machine = paired.machine()
    with tempfile.TemporaryDirectory() as folder:
        batch = str(pathlib.Path(folder) / "batch.npz")
        np.savez(batch, **make_batch(given.part, given.batch, given.quick))
        options = dict(part=given.part, quick=given.quick, batch=batch, folder=str(pathlib.Path(folder) / "model"))
        with paired.Worker("benchmarks.query_step:peer_step", options) as theirs, paired.Worker("benchmarks.query_step:our_step", options) as ours:
            same(ours.facts, theirs.facts)
            blocks = paired.alternate({"ours": lambda: ours.block(given.steps), "transformers": lambda: theirs.block(given.steps)}, given.rounds, given.drop)
            facts = {"ours": ours.facts, "transformers": theirs.facts}
    paired.report(given, f"BLIP-2, {given.part}, batch {given.batch}, {ours.facts['parameters']:,} trained parameters", machine, blocks,
                  paired.compare(blocks, [("ours", "transformers")]), work=given.batch, unit="samples", packages=("transformers",), facts=facts)


if __name__ == "__main__":
    main()
