"""The models that are compared, ours and open_clip's, equal in work; their train steps; and a batch for both.

Ours is a published stage of configs/ with these changes: the batch; exact GELU (open_clip's ViT-B-32; the
quick GELU of OpenAI's weights is another model there); remat "none", for open_clip keeps its activations too
(the stage of clip:b32 computes them again); float32. Theirs is ``create_model`` with its own loss and
AdamW in open_clip's two parameter groups. Parameter counts must agree.

Each framework is imported in the function that needs it: a process holds one of them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUCKETS = (16, 20, 24, 32)      # text lengths that our batches are cropped to
TINY = dict(width=64, heads=1, layers=2)    # of every tower, for --quick; the embedding is as wide
TINY_SIZE = 64      # pixels
PEER_TINY = {"vision_cfg": dict(width=64, head_width=64, layers=2, image_size=TINY_SIZE), "text_cfg": TINY, "multimodal_cfg": TINY}


@dataclasses.dataclass(frozen=True)
class Compared:
    config: str     # configs/<config>.py
    size: str       # its argument
    peer: str       # open_clip's name
    batch: int


COMPARED = {"clip_b32": Compared("clip", "b32", "ViT-B-32", 32), "clip_l14": Compared("clip", "l14", "ViT-L-14", 8),
            "coca_b32": Compared("coca", "b32_open", "coca_ViT-B-32", 16)}


# ---- ours --------------------------------------------------------------------------------------

def load_config(name: str, arg: str = "") -> Any:
    """The config of configs/<name>.py:<arg>."""
    spec = importlib.util.spec_from_file_location(f"configs_{name}", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def our_config(name: str, batch: int, quick: bool = False, dtype: str = "float32", **tower: int) -> Any:
    """The stage config of COMPARED[name]; ``tower``: fields of every tower, such as layers and width."""
    config = load_config(COMPARED[name].config, COMPARED[name].size).stages.pretrain
    changes = {**(dict(TINY, mlp_dim=4 * TINY["width"]) if quick else {}), **tower}
    for field in ("image", "text", "decoder"):
        if field in config.model:
            with config.model[field].unlocked():
                config.model[field].update(activation="gelu", remat="none", **changes)
    config.model.update(dtype=dtype, **({"embed": TINY["width"]} if quick else {}))
    config.data.update(batch=batch, microbatch=0, tokenizer="", **({"size": TINY_SIZE} if quick else {}))
    config.evals = {}
    return config


def our_train_step(name: str, batch: str, quick: bool, dtype: str = "float32", **tower: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """A worker's function: ``trainer_step`` on the batch (.npz). Beside open_clip's work it normalises the pixels, takes the gradient's norm
    and checks that all is finite."""
    arrays = dict(np.load(batch))
    return trainer_step(our_config(name, len(arrays["image"]), quick, dtype, **tower), arrays)


def trainer_step(config: Any, arrays: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray] | None = None
                 ) -> tuple[Callable[[], None], dict[str, Any]]:
    """(the step as ``vlm_jax.run`` makes it, on a batch that it places anew each time; what is told of it) of a stage's config. given: weights by path,
    for fresh ones; what is told then has the loss of the batch without dropout, and counts what trains."""
    import jax

    from vlm_jax import partitioning
    from vlm_jax.run import compiled_by_shape
    from vlm_jax.stage import make_optimizer, resolve
    from vlm_jax.train import init
    from vlm_jax.train.step import make_train_step

    stage = resolve(config, "pretrain")
    mesh, key = partitioning.make_mesh(devices=jax.devices()[:1]), jax.random.key(0)
    with partitioning.use(mesh):
        tx, _ = make_optimizer(stage)
        state = init.create(stage.system, stage.plan, tx, mesh, key, stage.spec, given or {})
        step_fn = compiled_by_shape(make_train_step(stage.system, tx, key), 0)
        first = {} if given is None else {"loss": loss_without_dropout(stage.system, state, partitioning.place(arrays, mesh)),
                                          "parameters": stage.plan.count(trained=True)}

    def step() -> None:
        nonlocal state
        with partitioning.use(mesh):
            state, metrics = step_fn(state, partitioning.place(arrays, mesh))
            jax.block_until_ready((state, metrics))

    return step, {"parameters": stage.plan.count(), "device": jax.devices()[0].device_kind, "text": list(arrays["text"].shape), **first}


def loss_without_dropout(system: Any, state: Any, batch: Mapping[str, Any]) -> float:
    import jax
    import jax.numpy as jnp

    from vlm_jax.system import Context
    from vlm_jax.train.state import merge

    def loss(state, batch):
        return system.loss(merge(state.params, state.frozen, state.moving), state.carry, batch, Context(jax.random.key(0), jnp.int32(0), train=False))[0]

    return float(jax.jit(loss)(state, batch))


# ---- theirs ------------------------------------------------------------------------------------

def peer_model(name: str, quick: bool = False) -> Any:
    """open_clip's model of COMPARED[name], fp32, fresh weights."""
    import open_clip

    peer = COMPARED[name].peer
    if not quick:
        return open_clip.create_model(peer, output_dict=True)
    config = open_clip.get_model_config(peer)
    config["embed_dim"] = TINY["width"]
    for section, fields in PEER_TINY.items():
        if section in config:
            config[section].update(fields)
    with tempfile.TemporaryDirectory() as folder:
        return open_clip.create_model(write_peer_config(folder, config), output_dict=True)


def write_peer_config(folder: str, config: Mapping[str, Any]) -> str:
    """Writes a model config where open_clip finds it; the model name that it has there."""
    (pathlib.Path(folder) / "open_clip_config.json").write_text(json.dumps({"model_cfg": dict(config)}))
    return f"local-dir:{folder}"


def peer_train_step(name: str, batch: str, quick: bool, dtype: str = "float32", compiled: bool = False) -> tuple[Callable[[], None], dict[str, Any]]:
    """A worker's function: forward, loss, backward, AdamW and the clamp as in open_clip's ``train_one_epoch``. The batch (.npz)
    is normalised before the clock starts, as open_clip's loader hands it over. dtype "bfloat16": on the GPU by autocast, as with
    ``--precision amp_bf16``, the batch copied there in each step; ``compiled``: with ``--torchcompile``."""
    import open_clip
    import torch

    torch.manual_seed(0)
    arrays = dict(np.load(batch))
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    image = torch.from_numpy(((arrays["image"] / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2).copy())
    text = torch.from_numpy(arrays["text"].astype(np.int64))
    device = "cuda" if dtype == "bfloat16" else "cpu"
    model = peer_model(name, quick).train().to(device)
    if hasattr(model, "text_decoder"):
        loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, cache_labels=True)
    else:
        loss = open_clip.ClipLoss(cache_labels=True)
    named = list(model.named_parameters())
    gains = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    kept = {id(p) for p in gains}
    optimizer = torch.optim.AdamW([{"params": gains, "weight_decay": 0.0}, {"params": [p for _, p in named if id(p) not in kept],
                                                                             "weight_decay": 0.2}],
                                  lr=1e-6, betas=(0.9, 0.98), eps=1e-6)     # as small as in our warm-up

    if device == "cuda":
        image, text = image.pin_memory(), text.pin_memory()
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            losses = loss(**forward(image.to(device, non_blocking=True), text.to(device, non_blocking=True)), output_dict=True)
        sum(losses.values()).backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if device == "cuda":
            torch.cuda.synchronize()

    return step, {"parameters": sum(p.numel() for _, p in named), "text": list(text.shape), "threads": torch.get_num_threads()}


# ---- a batch for both --------------------------------------------------------------------------

def caption_lengths(rows: int) -> np.ndarray:
    """int [rows], tokens with begin and end: 8 + floor(Exponential(mean 5)), at most 20, drawn with seed 0; the median is 11, as
    of captions from the web. Cut off at 20, for in a batch it is the longest that counts."""
    return np.minimum(8 + np.random.default_rng(0).exponential(5, rows).astype(int), 20)


def make_batch(name: str, rows: int, quick: bool = False, buckets: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """A batch of vlm_jax.data.batch's glossary from our own pipeline: noise for images, random ids for captions of
    ``caption_lengths``. The text is as long as the context, or cropped as the pipeline crops it where ``buckets`` are given."""
    from vlm_jax.data import pipeline
    from vlm_jax.data.tokenizers import Tokenizer

    config = our_config(name, rows, quick)
    data, tokens = config.data, config.model.tokens

    class Ids(Tokenizer):
        kind, vocab_size, pad_id, bos_id, eos_id = "ids", tokens.vocab, tokens.pad, tokens.bos, tokens.eos

        def encode(self, text):
            number, length = map(int, text.split())
            return [self.bos_id, *np.random.default_rng(number).integers(1, self.bos_id, length - 2).tolist(), self.eos_id]

    class Noise:
        lengths = caption_lengths(rows)

        def __len__(self):
            return rows

        def __getitem__(self, i):
            pixels = np.random.default_rng(i).integers(0, 256, (data.size, data.size, 3), np.uint8)
            return {"key": str(i), "image": pixels, "text": [f"{i} {self.lengths[i]}"]}

    with pipeline.train_batches(Noise(), Ids(), batch=rows, size=data.size, length=data.length, augment="squash", seed=0,
                                stop_step=1, threads=0, buckets=buckets) as batches:
        return next(batches)[1]
