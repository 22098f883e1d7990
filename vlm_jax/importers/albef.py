"""ALBEF's ``.pth`` files (salesforce/ALBEF ``models/``): pre-training and retrieval, with their slow copies and queues."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.importers import bert
from vlm_jax.importers.open_clip import heads, linear
from vlm_jax.importers.release import CLIP_MEAN, CLIP_STD, Hints, Release, Shapes, count_layers, grid_of, read_json, shape_of
from vlm_jax.models import bert as towers
from vlm_jax.models import vit
from vlm_jax.models.sizes import sizes
from vlm_jax.weight_rules import Rule

IGNORED = (r".*\.position_ids",)


def prefix(shapes: Collection[str], tower: str = "text_encoder") -> str:
    """Fine-tuned files leave "bert." out."""
    return tower if f"{tower}.embeddings.word_embeddings.weight" in shapes else f"{tower}.bert"


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    """Sizes from the tensors; heads from config.json or config_bert.json beside the file, else 64 channels each."""
    config = read_json(folder, "config.json")
    stated = config.get("bert_config") or read_json(folder, "config_bert.json")
    width, _, patch, _ = shape_of(shapes, "visual_encoder.patch_embed.proj.weight")
    image = dict(patch=patch, width=width, layers=count_layers(shapes, "visual_encoder.blocks.{layer}.norm1.weight"),
                 heads=heads("image_heads", hints.image_heads, config.get("vision_heads"), width), mlp_dim=shape_of(shapes, "visual_encoder.blocks.0.mlp.fc1.weight")[0],
                 patch_bias=True, norms_at=("output",), eps=1e-6, init_scheme="bert")
    text, tower = text_section(shapes, prefix(shapes), stated, hints)
    if not text["cross_layers"]:
        raise ConfigError("the file has no cross-attention: is it a plain BERT?")
    words = "text_encoder.cls.predictions.bias" in shapes
    queue = {"queue": shape_of(shapes, "image_queue")[1]} if "image_queue" in shapes else {}
    return dict(model=dict(image=image, text=text, embed=shape_of(shapes, "vision_proj.weight")[0], mean=CLIP_MEAN, std=CLIP_STD, tokens=tower["tokens"]),
                data=dict(size=patch * grid_of(shape_of(shapes, "visual_encoder.pos_embed")[1]), length=min(30, text["positions"]), eval_augment="squash"),
                clamps=(("temp", 0.001, 0.5),),
                loss=dict(queue, weights=dict(itc=1.0, itm=1.0, **({"mlm": 1.0} if words else {})), targets="images" if "idx_queue" in shapes else "pairs"))


def text_section(shapes: Shapes, where: str, stated: Mapping[str, Any], hints: Hints) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the section of a BERT whose tensors start with ``where``, {"tokens"}). Ids are bert-base-uncased's."""
    vocab, width = shape_of(shapes, f"{where}.embeddings.word_embeddings.weight")
    layers = count_layers(shapes, f"{where}.encoder.layer.{{layer}}.intermediate.dense.weight")
    crossed = [i for i in range(layers) if f"{where}.encoder.layer.{i}.crossattention.self.query.weight" in shapes]
    if crossed != list(range(layers - len(crossed), layers)):
        raise ConfigError(f"layers {crossed} of {layers} have cross-attention: they must be the topmost")
    types = f"{where}.embeddings.token_type_embeddings.weight"
    section = dict(width=width, layers=layers, heads=heads("text_heads", hints.text_heads, stated.get("num_attention_heads"), width),
                   mlp_dim=shape_of(shapes, f"{where}.encoder.layer.0.intermediate.dense.weight")[0], positions=shape_of(shapes, f"{where}.embeddings.position_embeddings.weight")[0],
                   token_types=shape_of(shapes, types)[0] if types in shapes else 0, cross_layers=len(crossed), dropout=0.1)
    return section, dict(tokens=dict(vocab=vocab, bos=101, eos=102, pad=0, mask=103))


def lower_layers(text: Mapping[str, Any]) -> int:
    """How many layers of a text section have no cross-attention."""
    found = sizes(towers.VARIANTS, **text)
    return found["layers"] - found["cross_layers"]


def student(sections: Mapping[str, Any], names: Collection[str], suffix: str = "") -> tuple[Rule, ...]:
    """Rules of the model, or with suffix "_m" of its slow copy."""
    lower = lower_layers(sections["model"]["text"])
    tower, where = f"text_encoder{suffix}", prefix(names, f"text_encoder{suffix}") if names else f"text_encoder{suffix}.bert"
    return (*bert.timm_vit("image", f"visual_encoder{suffix}"), *bert.embeddings("text", f"{where}.embeddings"),
            *bert.layers("text/blocks", f"{where}.encoder.layer"), *bert.layers("text/blocks_cross", f"{where}.encoder.layer", lower),
            *bert.language_head("lm_head", f"{tower}.cls.predictions"), *linear("image_head", f"vision_proj{suffix}"), *linear("text_head", f"text_proj{suffix}"))


def rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    queue = [(f"carry/{ours}", theirs, how) for ours, theirs, how in (
        ("image_queue", "image_queue", "dense"), ("text_queue", "text_queue", "dense"), ("id_queue", "idx_queue", "id_row"), ("pointer", "queue_ptr", "one"),
        ("pointer", "ptr_queue", "one")) if not shapes or theirs in shapes]
    teacher = [(f"carry/teacher/{target}", source, how) for target, source, how in student(sections, shapes, "_m")] if not shapes or "vision_proj_m.weight" in shapes else []
    return (*student(sections, shapes), *linear("itm_head", "itm_head"), ("temp", "temp", "scalar"), *queue, *teacher)


def ties(names: Collection[str]) -> dict[str, str]:
    """The language head's matrix is the token table, and its bias is stored twice."""
    out = {}
    for tower in ("text_encoder", "text_encoder_m"):
        head = f"{tower}.cls.predictions"
        if f"{head}.bias" in names:
            out |= {f"{head}.decoder.weight": f"{prefix(names, tower)}.embeddings.word_embeddings.weight", f"{head}.decoder.bias": f"{head}.bias"}
    return out


def write_config(config: Any, folder: pathlib.Path, names: Collection[str]) -> None:
    """config.json: what the tensors cannot tell, under the names of the official code's configs."""
    image, text = sizes(vit.VARIANTS, **config.model.image), sizes(towers.VARIANTS, **config.model.text)
    doubled = text["cross_layers"] if text.get("pairing") == "alternate" else 0
    (folder / "config.json").write_text(json.dumps(dict(
        image_res=config.data.size, vision_width=image["width"], vision_depth=image["layers"], vision_heads=image["heads"], embed_dim=config.model.get("embed", 256),
        bert_config=dict(model_type="bert", hidden_act="gelu", layer_norm_eps=1e-12, hidden_size=text["width"], num_attention_heads=text["heads"],
                         intermediate_size=text["mlp_dim"], num_hidden_layers=text["layers"] + doubled, fusion_layer=text["layers"] - text["cross_layers"],
                         vocab_size=config.model.tokens.vocab, max_position_embeddings=text.get("positions", 512), type_vocab_size=text.get("token_types", 2),
                         encoder_width=image["width"])), indent=1))


RELEASE = Release("albef", "albef", describe, rules, IGNORED, ("model.safetensors", "weights.safetensors", "*.pth"), write_config, resize="resize_positions_border", ties=ties)
