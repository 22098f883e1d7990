"""A step of BEiT-3 or VLMo (base) against the same step in PyTorch, fp32, on the CPU.

    pip install --no-deps --target PEER torchscale==0.3.0 fairscale==0.4.13
    python -m benchmarks.multiway_step --system=beit3 --peer=PEER [--out=FILE.json]
    python -m benchmarks.multiway_step --system=vlmo
    python -m benchmarks.multiway_step --system=vlmo --check            (or --system=beit3 --peer=PEER --check)
    python -m benchmarks.multiway_step --system=vlmo --parts

torch and timm are taken from where this runs (the [bench] extra and timm).

beit3: forward and backward of one joint pass, an image with 75 of 196 patches masked beside 64 ids of which half are masked, in torchscale's BEiT3, whose
authors' own package it is; masked ids are told by a head of 64,010 classes at the masked places. No optimizer.
vlmo: the whole pre-training step, with AdamW: images and texts by themselves, the top layers twice (contrast, uni and vl), pairs with two sets of
negatives (matching), and pairs with masked words, a joint pass of four batches. Theirs is put together here from published layers: timm's attention of BEiT,
patches and MLP, torch's norms and embeddings.

Equal on both sides: sizes (ViT-B/16, 224 pixels), ids, batch, which patches and words are masked, negatives, no dropout and no rematerialisation, and
the count of parameters, which is checked. --check measures nothing: both sides compute the loss of the same weights (theirs, imported here), which must be
one number (to 1e-4 of it, or the exit code is 1). --parts measures parts of the step by themselves, forward and backward, on both sides; what
the whole step takes beyond them is the optimizer's.
Beside theirs our step normalises the pixels, takes the gradient's norm and checks that all is finite. Target: a ratio of times of 0.8 at most.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import models, paired

SIZE, PATCH, QUICK_PATCH = 224, 16, 16
BASE = dict(width=768, layers=12, heads=12, mlp_dim=3072)
TINY = dict(width=64, layers=3, heads=1, mlp_dim=256)
FUSED, REACH, WORDS = 2, 196, 30522
CLS, SEP, MASK = 101, 102, 103
LENGTH = {"beit3": 64, "vlmo": 40}
VOCAB = {"beit3": 64010, "vlmo": WORDS}
PARTS = {"beit3": ("forward", "all"), "vlmo": ("itc", "itm", "mlm", "all", "step")}     # "step" with AdamW
WHOLE = {"beit3": "all", "vlmo": "step"}
TOLERANCE = 1e-4
Step = tuple[Callable[[], None], dict[str, Any]]


def sizes(quick: bool) -> dict[str, int]:
    return dict(TINY if quick else BASE, image=models.TINY_SIZE if quick else SIZE)


# ---- ours --------------------------------------------------------------------------------------

def our_config(system: str, rows: int, quick: bool, part: str = "all") -> Any:
    """The base size's stage of configs/, without dropout and rematerialisation, with the loss of a part of the step; tiny where ``quick``."""
    from vlm_jax.config import ConfigDict, to_plain

    size, tower = sizes(quick), {"beit3": "tower", "vlmo": "trunk"}[system]
    stage = {"beit3": "caption", "vlmo": "joint"}[system]      # which has the head of words alone
    config = to_plain(models.load_config(system, "base").stages[stage])
    config["model"][tower] |= dict(remat="none", drop_path=0.0, **({k: size[k] for k in TINY} if quick else {}))
    config["model"]["dtype"] = "float32"
    config["data"] |= dict(batch=rows, size=size["image"], length=LENGTH[system], tokenizer="")
    if system == "vlmo":
        config["loss"] |= dict(ranks=1, masking="tokens", weights={k: v for k, v in config["loss"]["weights"].items() if part in ("all", "step", k)})
    config["optim"] = dict(name="adamw", lr=1e-6, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, schedule="constant", clamps=(), ema=0.0, max_bad_steps=10)
    return ConfigDict({**config, "steps": 1000, "evals": {}, "init": ()})


def our_loss(system: str, stage: Any) -> Callable[[Any, Any], Any]:
    """(flat parameters, batch) -> the loss."""
    import jax
    import jax.numpy as jnp

    from vlm_jax.losses.captioning import captioning
    from vlm_jax.losses.masked import gather_chosen
    from vlm_jax.system import Context, run
    from vlm_jax.train.state import merge

    if system == "vlmo":
        context = Context(rng=jax.random.key(0), step=jnp.int32(0))
        return lambda params, batch: stage.system.loss(merge(params, {}, {}), {}, batch, context)[0]
    from vlm_jax.systems.beit3 import MLM, Beit3

    def loss(params, batch):
        variables, model = merge(params, {}, {}), stage.system.model
        states = run(model, variables, Beit3.encode, batch["image"], batch["masked_text"], batch["text_mask"], batch["masked_patches"])
        at, valid = gather_chosen(batch["masked_at"], LENGTH[system] // 2)
        states = jnp.take_along_axis(states[:, model.tower.image_tokens:], at[..., None], axis=1)
        ids = jnp.take_along_axis(batch["text"], at, axis=1)
        nll, count, _ = captioning(*run(model, variables, functools.partial(Beit3.scored, head=MLM), states), ids, valid)
        return nll / count
    return loss


def our_step(system: str, batch: str, quick: bool, part: str, weights: str = "") -> Step:
    """A worker's function. weights: a file of theirs to take over, for the loss alone."""
    import jax

    from vlm_jax import partitioning
    from vlm_jax.stage import read_weights, resolve
    from vlm_jax.train.init import unbox

    arrays = dict(np.load(batch))
    config = our_config(system, len(arrays["image"]), quick, part)
    if part == "step":
        return models.trainer_step(config, arrays)
    stage = resolve(config, "step")
    if weights:
        from vlm_jax.importers import cli
        from vlm_jax.importers.release import Hints

        folder = cli.import_release(system, weights, pathlib.Path(weights).parent / "ours", Hints(image_heads=sizes(quick)["heads"]), say=lambda line: None)
        params = {path: x for path, x in read_weights(folder).items() if path in stage.plan.shapes}
    else:
        params, _, _ = unbox(jax.jit(lambda key: stage.system.init(key, stage.spec))(jax.random.key(0)))
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    with partitioning.use(mesh):
        placed, params = partitioning.place(arrays, mesh), jax.device_put(params)
        loss = our_loss(system, stage)
        fn = jax.jit(loss if part == "forward" or weights else jax.value_and_grad(loss))
        if weights:
            return lambda: None, {"loss": float(fn(params, placed))}

        def step() -> None:
            jax.block_until_ready(fn(params, placed))

    return step, {"parameters": stage.plan.count(), "text": list(arrays["text"].shape)}


# ---- theirs ------------------------------------------------------------------------------------

def torch_vlmo(quick: bool) -> Any:
    """VLMo in layers of timm and torch; tensors have the names of the official files."""
    import torch
    from timm.layers import Mlp, PatchEmbed
    from timm.models.beit import Attention
    from torch import nn
    from torch.nn import functional as F

    size = sizes(quick)
    width, heads, layers, fused = size["width"], size["heads"], size["layers"], FUSED
    side = size["image"] // PATCH
    length, span = LENGTH["vlmo"], 2 * (size["image"] // PATCH) - 1

    def row_of() -> torch.Tensor:
        """Which row of the table stands at (query, key) of text, then image."""
        grid, n, index = span * span, side * side + 1, torch.empty(length + side * side + 1, length + side * side + 1, dtype=torch.long)
        index[:length, length:], index[length:, :length] = grid + 3, grid + 4
        place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None] + side - 1
        image, text = index[length:, length:], index[:length, :length]
        image[1:, 1:] = apart[0] * span + apart[1]
        image[0, :], image[:, 0], image[0, 0] = grid, grid + 1, grid + 2
        words = torch.arange(length - 1)
        text[1:, 1:] = grid + 3 + REACH + words[None] - words[:, None]
        last = grid + 5 + 2 * REACH
        text[0, :], text[:, 0], text[0, 0] = last - 3, last - 2, last - 1
        assert index.shape == (length + n,) * 2
        return index

    class Block(nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads, qkv_bias=True)
            self.gamma_1, self.gamma_2 = (nn.Parameter(0.1 * torch.ones(width)) for _ in range(2))
            for expert in experts:
                setattr(self, f"norm2_{expert}", nn.LayerNorm(width, eps=1e-6))
                setattr(self, f"mlp_{expert}", Mlp(width, size["mlp_dim"]))

        def fed(self, expert, x):
            return x + self.gamma_2 * getattr(self, f"mlp_{expert}")(getattr(self, f"norm2_{expert}")(x))

        def forward(self, x, bias, expert):
            x = x + self.gamma_1 * self.attn(self.norm1(x), bias)
            if expert != "both":
                return self.fed(expert, x)
            return torch.cat([self.fed("text", x[:, :length]), self.fed("imag", x[:, length:])], 1)

    def linear(name, out, bias=True):
        return nn.ModuleDict({name: nn.Linear(width, out, bias=bias)})

    class Vlmo(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = nn.Module()
            self.transformer.patch_embed = PatchEmbed(size["image"], PATCH, 3, width)
            self.transformer.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.transformer.blocks = nn.ModuleList(Block(("text", "imag", *(("vl",) if i >= layers - fused else ()))) for i in range(layers))
            self.transformer.norm = nn.LayerNorm(width, eps=1e-6)
            self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn(span * span + 5 + 2 * REACH, layers * heads))
            self.text_embeddings = nn.ModuleDict(dict(word_embeddings=nn.Embedding(WORDS, width), position_embeddings=nn.Embedding(length, width),
                                                      token_type_embeddings=nn.Embedding(2, width), LayerNorm=nn.LayerNorm(width, eps=1e-12)))
            self.text_embeddings.position_embeddings.requires_grad_(False)      # there, and not added
            self.token_type_embeddings = nn.Embedding(2, width)
            self.pooler, self.itm_score = linear("dense", width), linear("fc", 2)
            for side_, branch in ((s, b) for s in ("text", "image") for b in ("", "_vl")):
                setattr(self, f"itc{branch}_{side_}_proj", linear("fc", width, bias=False))
            self.mlm_score = nn.ModuleDict(dict(transform=nn.ModuleDict(dict(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))),
                                                decoder=nn.Linear(width, WORDS, bias=False)))
            self.mlm_score.bias = nn.Parameter(torch.zeros(WORDS))
            self.logit_scale, self.logit_vl_scale = (nn.Parameter(torch.tensor(float(np.log(1 / 0.07)))) for _ in range(2))
            self.register_buffer("rows", row_of(), persistent=False)

        def embed_text(self, ids):
            words = self.text_embeddings
            x = words.word_embeddings(ids) + words.token_type_embeddings.weight[0]
            return words.LayerNorm(x) + self.token_type_embeddings.weight[0]

        def embed_image(self, image):
            x = self.transformer.patch_embed(image)
            return torch.cat([self.transformer.cls_token.expand(len(x), -1, -1), x], 1) + self.token_type_embeddings.weight[1]

        def bias(self, part, mask):
            """Of each layer, [b or 1, heads, l, l]; masked keys get -inf."""
            found = self.relative_position_bias_table[self.rows[part, part]].permute(2, 0, 1)[None].chunk(layers, 1)
            if mask is None:
                return found
            hidden = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[:, None, None]
            return [each + hidden for each in found]

        def through(self, x, bias, first, last, expert):
            for i in range(first, last):
                x = self.transformer.blocks[i](x, bias[i], expert)
            return x

        def alone(self, x, part, mask, expert):
            """(features of the uni branch, of the vl branch), unit vectors of the first token."""
            bias = self.bias(part, mask)
            x = self.through(x, bias, 0, layers - fused, expert)
            name, out = {"text": "text", "imag": "image"}[expert], []
            for top, branch in ((expert, ""), ("vl", "_vl")):
                states = self.transformer.norm(self.through(x, bias, layers - fused, layers, top))
                out.append(F.normalize(getattr(self, f"itc{branch}_{name}_proj").fc(states[:, 0]), dim=-1))
            return out

        def forward(self, b, terms):
            image, text, mask, total = self.embed_image(b["image"]), self.embed_text(b["text"]), b["text_mask"], 0.0
            rows = len(text)
            if "itc" in terms:
                images, texts = self.alone(image, slice(length, None), None, "imag"), self.alone(text, slice(0, length), mask, "text")
                told = torch.arange(rows)
                for i, t, scale in zip(images, texts, (self.logit_scale, self.logit_vl_scale), strict=True):
                    logits = scale.exp() * i @ t.T
                    total = total + (F.cross_entropy(logits, told) + F.cross_entropy(logits.T, told)) / 4
            parts, masks, pictures = [], [], []
            if "itm" in terms:
                parts += [text, text, text[b["negative_text"]]]
                masks += [mask, mask, mask[b["negative_text"]]]
                pictures += [image, image[b["negative_image"]], image]
            if "mlm" in terms:
                parts, masks, pictures = parts + [self.embed_text(b["masked_text"])], masks + [mask], pictures + [image]
            if parts:
                x, seen = torch.cat([torch.cat(parts), torch.cat(pictures)], 1), torch.cat(masks)
                bias = self.bias(slice(0, None), torch.cat([seen, torch.ones(len(x), image.shape[1], dtype=torch.bool)], 1))
                x = self.through(x, bias, 0, layers - fused, "both")
                states = self.transformer.norm(self.through(x, bias, layers - fused, layers, "vl"))
            if "itm" in terms:
                pooled = torch.tanh(self.pooler.dense(states[:3 * rows, 0]))
                total = total + F.cross_entropy(self.itm_score.fc(pooled), (torch.arange(3 * rows) < rows).long())
            if "mlm" in terms:
                x = self.mlm_score.transform.LayerNorm(F.gelu(self.mlm_score.transform.dense(states[-rows:, :length])))
                logits = self.mlm_score.decoder(x) + self.mlm_score.bias
                total = total + 0.25 * F.cross_entropy(logits.flatten(0, 1), b["text"].masked_fill(~b["masked_at"], -100).flatten())
            return total

    return Vlmo()


def torch_beit3(quick: bool) -> Any:
    """torchscale's model and a head of words."""
    import torch
    from torch import nn
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    size = sizes(quick)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.beit3 = BEiT3(EncoderConfig(
                img_size=size["image"], patch_size=PATCH, vocab_size=VOCAB["beit3"], multiway=True, layernorm_embedding=False, normalize_output=True,
                no_output_layer=True, encoder_embed_dim=size["width"], encoder_attention_heads=size["heads"], encoder_ffn_embed_dim=size["mlp_dim"],
                encoder_layers=size["layers"], max_source_positions=1024))
            self.mlm_head = nn.Linear(size["width"], VOCAB["beit3"])

        def forward(self, b, terms):
            states = self.beit3(textual_tokens=b["masked_text"], visual_tokens=b["image"], text_padding_position=~b["text_mask"],
                                vision_masked_position=b["masked_patches"])["encoder_out"]
            told = states[:, -b["text"].shape[1]:][b["masked_at"]]
            return nn.functional.cross_entropy(self.mlm_head(told), b["text"][b["masked_at"]])

    torch.manual_seed(0)
    return Model()


def peer_step(system: str, batch: str, quick: bool, part: str, weights: str = "") -> Step:
    """A worker's function. weights: where to write the weights to, for the loss alone."""
    import torch

    torch.manual_seed(0)
    model = {"vlmo": torch_vlmo, "beit3": torch_beit3}[system](quick).train()
    arrays = dict(np.load(batch))
    b = {name: torch.from_numpy(x.astype(np.int64) if x.dtype == np.int32 else x) for name, x in arrays.items()}
    b["image"] = torch.from_numpy(((arrays["image"] / 255 - 0.5) / 0.5).astype(np.float32).transpose(0, 3, 1, 2).copy())
    terms = ("itc", "itm", "mlm") if part in ("all", "step") else (part,)
    if weights:
        from safetensors.torch import save_file

        save_file({name: x.contiguous() for name, x in model.state_dict().items()}, weights)
        with torch.no_grad():
            return lambda: None, {"loss": float(model(b, terms))}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01) if part == "step" else None

    def step() -> None:
        if part == "forward":
            with torch.no_grad():
                model(b, terms)
            return
        model.zero_grad()
        model(b, terms).backward()
        if optimizer is not None:
            optimizer.step()

    return step, {"parameters": sum(p.numel() for p in model.parameters()), "text": list(b["text"].shape), "threads": torch.get_num_threads()}


# ---- a batch for both --------------------------------------------------------------------------

def make_batch(system: str, rows: int, quick: bool) -> dict[str, np.ndarray]:
    """Noise for images and random ids of ``models.caption_lengths`` (beit3: of the whole length), with what is masked and which rows are negatives."""
    rng, size, length = np.random.default_rng(0), sizes(quick), LENGTH[system]
    text = np.zeros((rows, length), np.int32) if system == "vlmo" else np.ones((rows, length), np.int32)      # padding
    lengths = models.caption_lengths(rows) if system == "vlmo" else [length] * rows
    first, last, mask = (CLS, SEP, MASK) if system == "vlmo" else (0, 2, 64001)
    for row, n in zip(text, lengths, strict=True):
        row[:n] = [first, *rng.integers(1996, WORDS, n - 2), last]
    real = np.arange(length) < np.asarray(lengths)[:, None]
    chosen = np.zeros(text.shape, bool)
    for row, n in zip(chosen, lengths, strict=True):
        row[1 + rng.permutation(n - 2)[:length // 2 if system == "beit3" else max(1, round(0.15 * n))]] = True
    patches = (size["image"] // PATCH) ** 2
    hidden = np.stack([rng.permutation(patches) < round(75 / 196 * patches) for _ in range(rows)])
    more = dict(masked_patches=hidden) if system == "beit3" else dict(
        negative_image=np.roll(np.arange(rows, dtype=np.int32), 1), negative_text=np.roll(np.arange(rows, dtype=np.int32), -1))
    return {"image": rng.integers(0, 256, (rows, size["image"], size["image"], 3), np.uint8), "text": text, "text_mask": real,
            "masked_text": np.where(chosen, mask, text).astype(np.int32), "masked_at": chosen, **more}


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--system", choices=tuple(LENGTH), default="beit3")
    flags.add_argument("--peer", default="", help="beit3: the folder that torchscale was installed into, as above")
    flags.add_argument("--batch", type=int, default=4, help="rows (default %(default)s)")
    flags.add_argument("--check", action="store_true", help="compare the losses of the same weights, and stop")
    flags.add_argument("--parts", action="store_true", help="measure parts of the step instead of all of it")
    paired.add_blocks(flags, rounds=4, steps=4, drop=1)
    given = paired.parse(flags, argv, quick=dict(rounds=2, steps=3, drop=1, batch=2))
    paired.require_peer("timm", *(("torchscale",) if given.system == "beit3" and not given.peer else ()))
    path = dict(PYTHONPATH=str(pathlib.Path(given.peer).resolve())) if given.peer else {}
    machine, name = paired.machine(), {"beit3": "torchscale", "vlmo": "torch"}[given.system]
    with tempfile.TemporaryDirectory() as folder:
        batch, weights = (str(pathlib.Path(folder) / file) for file in ("batch.npz", "weights.safetensors"))
        np.savez(batch, **make_batch(given.system, given.batch, given.quick))
        options = dict(system=given.system, batch=batch, quick=given.quick)

        def workers(part, **more):
            return (paired.Worker("benchmarks.multiway_step:peer_step", dict(options, part=part, **more), **path),
                    paired.Worker("benchmarks.multiway_step:our_step", dict(options, part=part, **more)))

        if given.check:
            theirs, ours = workers("all", weights=weights)
            with theirs, ours:
                losses = {name: theirs.facts["loss"], "ours": ours.facts["loss"]}
            print(json.dumps(losses))
            sys.exit(abs(losses["ours"] - losses[name]) > TOLERANCE * abs(losses[name]))
        blocks, facts = {}, {}
        parts = PARTS[given.system] if given.parts else (WHOLE[given.system],)
        for part in parts:
            theirs, ours = workers(part)
            with theirs, ours:
                facts[part] = {"ours": ours.facts, name: theirs.facts}
                if ours.facts["parameters"] != theirs.facts["parameters"]:
                    sys.exit(f"the models differ: {facts}")
                found = paired.alternate({"ours": lambda o=ours: o.block(given.steps), name: lambda t=theirs: t.block(given.steps)}, given.rounds, given.drop)
            blocks |= {side + (f", {part}" if given.parts else ""): each for side, each in found.items()}
    pairs = [tuple(side + (f", {part}" if given.parts else "") for side in ("ours", name)) for part in parts]
    paired.report(given, f"{'parts of ' if given.parts else ''}{'a joint forward-backward' if given.system == 'beit3' else 'a pre-training step'} of "
                  f"{given.system}, batch {given.batch}, {facts[parts[-1]]['ours']['parameters']:,} parameters", machine, blocks,
                  paired.compare(blocks, pairs), work=given.batch, unit="samples", packages=("timm", "torchscale"), facts=facts)


if __name__ == "__main__":
    main()
