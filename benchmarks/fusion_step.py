"""A pre-training step of ALBEF or BLIP (base) against the authors' own PyTorch library, salesforce-lavis, fp32, on the CPU.

    pip install --no-deps --target PEER salesforce-lavis==1.0.2 transformers==4.26.1 tokenizers==0.13.3 timm==0.4.12 "huggingface_hub<0.26" \\
        omegaconf antlr4-python3-runtime==4.9.3 iopath portalocker requests urllib3 idna charset_normalizer
    python -m benchmarks.fusion_step --system=albef --peer=PEER [--out=FILE.json]
    python -m benchmarks.fusion_step --system=blip --peer=PEER

torch and torchvision are taken from where this runs (the [bench] extra). The folder holds what lavis 1.0.2 was written for; of its other requirements
it needs fairscale for rematerialisation alone, which is off here, so that a name stands for it, and its own ``__init__`` files, which import every
model and data set, are passed over. ``numpy.Inf`` is given back to it.

A step is the whole loss (contrast with teacher and queue, matching with mined negatives, masked words or captions), its gradient, AdamW, the moved
teacher and queue. Equal on both sides: towers (ViT-B/16, BERT-base), pixels (albef 256, blip 224), ids (25, 30), batch, queue (65,536, 57,600), dropout
0.1 in student and teacher, no rematerialisation, and the count of trained parameters, which is checked: for lavis's ALBEF has no token types, ours is built
without. Texts are ids on both sides, made before the clock starts; pixels are normalised before for lavis, inside the step here. Beside lavis's work
ours takes the gradient's norm and checks that all is finite; lavis draws its negatives one by one.
Target: a ratio of times of 0.8 at most.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import pathlib
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import models, paired

SYSTEMS = {"albef": dict(queue=65536, size=256, length=25), "blip": dict(queue=57600, size=224, length=30)}
CLS, SEP, MASK, DEC, ENC, WORDS = 101, 102, 103, 30522, 30523, (1996, 30522)
STUB = "fairscale.nn.checkpoint.checkpoint_activations"


# ---- ours --------------------------------------------------------------------------------------

def our_config(system: str, batch: int, quick: bool) -> Any:
    """The base size's pre-training stage with ``SYSTEMS``' sizes; tiny towers where ``quick``."""
    from vlm_jax.config import ConfigDict, to_plain

    config, sizes = to_plain(models.load_config(system, "base").stages.pretrain), SYSTEMS[system]
    tiny = dict(models.TINY, mlp_dim=4 * models.TINY["width"]) if quick else {}
    for tower in ("image", "text"):
        config["model"][tower] |= dict(tiny, remat="none")
    if system == "albef":
        config["model"]["text"] |= dict(token_types=0, cross_layers=1 if quick else 6)
    config["model"]["dtype"] = "float32"
    config["loss"] |= dict(group=0, queue=sizes["queue"])
    config["data"] |= dict(batch=batch, size=models.TINY_SIZE if quick else sizes["size"], length=sizes["length"], tokenizer="")
    config["optim"] = dict(name="adamw", lr=1e-6, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05, schedule="constant", clamps=config["optim"]["clamps"],
                           ema=0.0, max_bad_steps=10)
    return ConfigDict({**config, "steps": 1000, "evals": {}, "init": ()})


def our_step(system: str, batch: str, quick: bool) -> tuple[Callable[[], None], dict[str, Any]]:
    """A worker's function; see ``models.our_train_step``."""
    arrays = dict(np.load(batch))
    return models.trainer_step(our_config(system, len(arrays["image"]), quick), arrays)


# ---- theirs ------------------------------------------------------------------------------------

def open_lavis(module: str) -> Any:
    """A module of the lavis that lies on the path, without its packages' ``__init__``."""
    root = pathlib.Path(importlib.util.find_spec("lavis").submodule_search_locations[0])
    np.Inf = np.inf
    for name in ("lavis", "lavis.models", *(STUB.rsplit(".", n)[0] for n in (3, 2, 1))):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")[1:]))] if name.startswith("lavis") else []
    sys.modules[STUB] = types.ModuleType(STUB)
    sys.modules[STUB].checkpoint_wrapper = None      # for use_grad_checkpointing
    sys.modules["lavis.models"].BaseModel = importlib.import_module("lavis.models.base_model").BaseModel
    return importlib.import_module(module)


class Ids:
    """The batch's ids in the place of a tokenizer of the same words."""
    pad_token_id, cls_token_id, mask_token_id, bos_token_id, enc_token_id = 0, CLS, MASK, DEC, ENC

    def __init__(self, text: Any, mask: Any, vocab: int):
        self.text, self.mask, self.vocab = text, mask, vocab

    def __call__(self, texts: Any, **options: Any) -> Any:
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": self.text.clone(), "attention_mask": self.mask.clone()})

    def __len__(self) -> int:
        return self.vocab


def peer_step(system: str, batch: str, quick: bool) -> tuple[Callable[[], None], dict[str, Any]]:
    """A worker's function: forward, loss, backward and AdamW as in lavis's ``BaseTask.train_step`` and ``RunnerBase``."""
    import torch

    torch.manual_seed(0)
    pretrain = open_lavis(f"lavis.models.{system}_models.{system}_pretrain")
    med, vit = sys.modules["lavis.models.med"], sys.modules["lavis.models.vit"]
    from transformers.models.bert.configuration_bert import BertConfig

    arrays, sizes = dict(np.load(batch)), SYSTEMS[system]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    image = torch.from_numpy(((arrays["image"] / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2).copy())
    text, mask = torch.from_numpy(arrays["text"].astype(np.int64)), torch.from_numpy(arrays["text_mask"].astype(np.int64))
    tiny, file = models.TINY, {"albef": "med_config_albef.json", "blip": "bert_config.json"}[system]
    folder = pathlib.Path(sys.modules["lavis"].__path__[0]) / "configs" / "models"
    config = BertConfig.from_dict(json.loads((folder / file).read_text()) | dict(vocab_size=30522) | (dict(
        hidden_size=tiny["width"], intermediate_size=4 * tiny["width"], num_attention_heads=tiny["heads"], num_hidden_layers=tiny["layers"],
        encoder_width=tiny["width"], **({"fusion_layer": 1} if system == "albef" else {})) if quick else {}))
    fields = dict(img_size=models.TINY_SIZE, embed_dim=tiny["width"], depth=tiny["layers"], num_heads=tiny["heads"]) if quick else dict(
        img_size=sizes["size"], embed_dim=768, depth=12, num_heads=12)
    eyes = vit.VisionTransformerEncoder(patch_size=16, norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6), **fields)
    eyes.vision_width = fields["embed_dim"]
    ids = Ids(text, mask, 30522 if system == "albef" else 30524)
    kind = getattr(pretrain, {"albef": "AlbefPretrain", "blip": "BlipPretrain"}[system])
    kind.init_tokenizer = classmethod(lambda cls: ids)
    if system == "albef":
        model = kind(eyes, med.BertForMaskedLM(config), queue_size=sizes["queue"], max_txt_len=sizes["length"])
    else:
        model = kind(eyes, med.XBertEncoder(config, add_pooling_layer=False), med.XBertLMHeadDecoder(config), queue_size=sizes["queue"],
                     max_txt_len=sizes["length"])
    model.train()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]      # a tensor of two names is one
    plain = [p for n, p in named if p.ndim < 2 or "bias" in n or "ln" in n or "bn" in n]      # RunnerBase.optimizer
    kept = {id(p) for p in plain}
    optimizer = torch.optim.AdamW([{"params": [p for _, p in named if id(p) not in kept], "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
                                  lr=1e-6, betas=(0.9, 0.999))
    samples = {"image": image, "text_input": [""] * len(image), "epoch": 0, "num_iters_per_epoch": 1000}
    done = 0

    def step() -> None:
        nonlocal done
        loss = model({**samples, "iters": done})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done += 1

    return step, {"parameters": sum(p.numel() for _, p in named), "text": list(text.shape), "threads": torch.get_num_threads()}


# ---- a batch for both --------------------------------------------------------------------------

def make_batch(system: str, rows: int, quick: bool) -> dict[str, np.ndarray]:
    """Noise for images, and random ids of ``models.caption_lengths`` for texts, padded to the system's length."""
    rng, sizes = np.random.default_rng(0), SYSTEMS[system]
    text, lengths = np.zeros((rows, sizes["length"]), np.int32), models.caption_lengths(rows)
    for row, length in zip(text, lengths, strict=True):
        row[:length] = [CLS, *rng.integers(*WORDS, length - 2), SEP]
    side = models.TINY_SIZE if quick else sizes["size"]
    return {"image": rng.integers(0, 256, (rows, side, side, 3), np.uint8), "text": text, "text_mask": text != 0,
            "caption_id": np.arange(rows, dtype=np.int32), "image_id": np.arange(rows, dtype=np.int32)}


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--system", choices=tuple(SYSTEMS), default="albef")
    flags.add_argument("--peer", default="", help="the folder that salesforce-lavis was installed into, as above")
    flags.add_argument("--batch", type=int, default=4, help="rows, a divisor of the queue (default %(default)s)")
    paired.add_blocks(flags, rounds=4, steps=4, drop=1)
    given = paired.parse(flags, argv, quick=dict(rounds=2, steps=3, drop=1))
    paired.require_peer()
    if not given.peer or not (pathlib.Path(given.peer) / "lavis").is_dir():
        sys.exit(f"--peer={given.peer!r} holds no lavis; --help tells how such a folder is made")
    machine = paired.machine()
    with tempfile.TemporaryDirectory() as folder:
        batch = str(pathlib.Path(folder) / "batch.npz")
        np.savez(batch, **make_batch(given.system, given.batch, given.quick))
        options = dict(system=given.system, batch=batch, quick=given.quick)
        with paired.Worker("benchmarks.fusion_step:our_step", options) as ours, \
                paired.Worker("benchmarks.fusion_step:peer_step", options, PYTHONPATH=str(pathlib.Path(given.peer).resolve())) as theirs:
            facts = {"ours": ours.facts, "lavis": theirs.facts}
            if ours.facts["parameters"] != theirs.facts["parameters"]:
                sys.exit(f"the models differ: {facts}")
            blocks = paired.alternate({"ours": lambda: ours.block(given.steps), "lavis": lambda: theirs.block(given.steps)}, given.rounds, given.drop)
    paired.report(given, f"pre-training step of {given.system}, batch {given.batch}, {ours.facts['parameters']:,} parameters", machine, blocks,
                  paired.compare(blocks, [("ours", "lavis")]), work=given.batch, unit="samples", facts=facts)


if __name__ == "__main__":
    main()
