"""BEiT-3's ``.pth`` files (addf400/files, release beit3; microsoft/unilm beit3 on torchscale 0.2.0): before and after contrastive tuning, and fine-tuned.

One layout for all: which heads a file has says what its model is for.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.importers.open_clip import heads, linear, norm
from vlm_jax.importers.release import Hints, Release, Shapes, count_layers, read_json, shape_of
from vlm_jax.models.beit3 import DEAD_ROWS
from vlm_jax.weight_rules import Rule

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYER = "beit3.encoder.layers.{layer}"
# XLM-R's ids; the mask is the last of the 64,002 ids in use, and the table has 64,010 rows
TOKENS = dict(bos=0, pad=1, eos=2)
ROWS, MASK = 64010, 64001
TEXT_LENGTH, CAPTION_LENGTH = 64, 32
STATEMENT = ("False", "True")


def expert_rules(expert: str, branch: str) -> tuple[Rule, ...]:
    """One modality's part of the layers; the branch stands after the sub-module, and inside ``ffn`` before it."""
    rules: list[Rule] = []
    for role in ("query", "key", "value"):
        source = f"{LAYER}.self_attn.{role[0]}_proj.{branch}"
        rules += [(f"blocks/attn/{expert}/{role}/kernel", f"{source}.weight", "to_heads"), (f"blocks/attn/{expert}/{role}/bias", f"{source}.bias", "heads")]
    out = f"{LAYER}.self_attn.out_proj.{branch}"
    return (*rules, (f"blocks/attn/{expert}/out/kernel", f"{out}.weight", "from_heads"), (f"blocks/attn/{expert}/out/bias", f"{out}.bias", "copy"),
            *norm(f"blocks/attn/{expert}/norm", f"{LAYER}.self_attn.inner_attn_ln.{branch}"),
            *norm(f"blocks/norm1/{expert}", f"{LAYER}.self_attn_layer_norm.{branch}"),
            *norm(f"blocks/norm2/{expert}", f"{LAYER}.final_layer_norm.{branch}"), *linear(f"blocks/mlp/{expert}/up", f"{LAYER}.ffn.{branch}.fc1"),
            *norm(f"blocks/mlp/{expert}/sub_norm", f"{LAYER}.ffn.{branch}.ffn_layernorm"), *linear(f"blocks/mlp/{expert}/down", f"{LAYER}.ffn.{branch}.fc2"),
            *norm(f"output_norm/{expert}", f"beit3.encoder.layer_norm.{branch}"))


RULES: tuple[Rule, ...] = (
    ("text/token_embed/table", "beit3.text_embed.weight", "copy"), ("text/position_embed", "beit3.encoder.embed_positions.B.weight", "copy"),
    ("image/position_embed", "beit3.encoder.embed_positions.A.weight", "resize_positions_border"),
    ("image/class_embed", "beit3.vision_embed.cls_token", "class_row"), ("image/mask_embed", "beit3.vision_embed.mask_token", "class_row"),
    ("image/patch_embed/projection/kernel", "beit3.vision_embed.proj.weight", "patches"),
    ("image/patch_embed/projection/bias", "beit3.vision_embed.proj.bias", "copy"),
    *expert_rules("image", "A"), *expert_rules("text", "B"), *linear("mlm_head", "mlm_head"), *linear("mim_head", "mim_head"),
    ("image_head/kernel", "vision_head.weight", "dense"), ("text_head/kernel", "language_head.weight", "dense"), ("logit_scale", "logit_scale", "scalar"),
    *norm("pooler/norm", "pooler.norm"), *linear("pooler/dense", "pooler.dense"),
    *linear("vqa_head/dense1", "head.0"), *norm("vqa_head/norm2", "head.1"), *linear("vqa_head/dense2", "head.3"),
    *norm("pair_head/norm1", "head.norm1"), *linear("pair_head/dense1", "head.dense1"), *norm("pair_head/norm2", "head.norm2"),
    *linear("pair_head/dense2", "head.dense2"),
    *norm("class_head/norm", "fc_norm"), *linear("class_head/out", "head"))


def rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    return RULES


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    """Sizes from the tensors; heads from --image_heads, the encoder_config of config.json, else 64 channels each."""
    stated = read_json(folder, "config.json").get("encoder_config", {})
    width, _, patch, _ = shape_of(shapes, "beit3.vision_embed.proj.weight")
    vocab = shape_of(shapes, "beit3.text_embed.weight")[0]
    positions = shape_of(shapes, "beit3.encoder.embed_positions.B.weight")[0]
    patches = shape_of(shapes, "beit3.encoder.embed_positions.A.weight")[0] - 1 - DEAD_ROWS
    side = round(max(patches, 0) ** 0.5)
    if side * side != patches or not side:
        raise ConfigError(f"beit3.encoder.embed_positions.A.weight has {patches} rows of patches, which are no square grid")
    if f"{LAYER}.self_attn.q_proj.A.weight".replace("{layer}", "0") not in shapes:
        raise ConfigError("the file has no attention split by modality: is it of this release?")
    tower = dict(patch=patch, width=width, layers=count_layers(shapes, f"{LAYER}.self_attn.q_proj.A.weight"),
                 heads=heads("image_heads", hints.image_heads, stated.get("encoder_attention_heads", 0), width),
                 mlp_dim=shape_of(shapes, LAYER.replace("{layer}", "0") + ".ffn.A.fc1.weight")[0], positions=positions)
    model = dict(tower=tower, tokens=dict(TOKENS, vocab=vocab, mask=MASK if vocab >= ROWS else vocab - 1))
    data = dict(size=patch * side, length=min(TEXT_LENGTH, positions - DEAD_ROWS), eval_augment="squash")
    weights: dict[str, float] = {}
    loss: dict[str, Any] = {}
    if "fc_norm.weight" in shapes:
        weights, data["eval_augment"] = dict(cls=1.0), "resize|center_crop"
        model |= dict(classes=shape_of(shapes, "head.weight")[0], mean=IMAGENET_MEAN, std=IMAGENET_STD)
    elif "head.dense1.weight" in shapes:
        weights, classes = dict(cls=1.0), shape_of(shapes, "head.dense2.weight")[0]
        model |= dict(classes=classes)
        data |= dict(images=2, classes=STATEMENT if classes == len(STATEMENT) else tuple(map(str, range(classes))))
    elif "head.0.weight" in shapes:
        weights = dict(vqa=1.0)
        model |= dict(classes=shape_of(shapes, "head.3.weight")[0])
        data |= dict(answers=10, answer_length=8)
    else:
        if "vision_head.weight" in shapes:
            weights["itc"] = 1.0
        if "mim_head.weight" in shapes:
            weights |= dict(mim=1.0, pair_mim=1.0)
            model |= dict(targets=dict(kind="unknown", codes=shape_of(shapes, "mim_head.weight")[0]))
            loss = dict(streams=dict(image=1, text=1, pair=2), image_masked=max(1, round(75 / 196 * patches)))
        if "mlm_head.weight" in shapes:
            weights |= dict(mlm=1.0, pair_mlm=1.0) if "mim_head.weight" in shapes else dict(cap=1.0)
        if weights == dict(cap=1.0):
            data["length"], loss = min(CAPTION_LENGTH, data["length"]), dict(caption_share=0.7, label_smoothing=0.1)
    if not weights:
        raise ConfigError("the file has no head of BEiT-3's (mlm_head, mim_head, vision_head, pooler, head): a tower alone is not imported")
    return dict(model=model, data=data, clamps=(), loss=dict(loss, weights=weights))


def write_config(config: Any, folder: pathlib.Path, names: Collection[str]) -> None:
    """config.json: what the tensors cannot tell, under the names of torchscale's EncoderConfig."""
    tower, tokens = config.model.tower, config.model.tokens
    (folder / "config.json").write_text(json.dumps(dict(encoder_config=dict(
        img_size=config.data.size, patch_size=tower.patch, vocab_size=tokens.vocab, multiway=True, layernorm_embedding=False,
        normalize_output="beit3.encoder.layer_norm.A.weight" in names, no_output_layer=True, encoder_embed_dim=tower.width, encoder_attention_heads=tower.heads,
        encoder_ffn_embed_dim=tower.mlp_dim, encoder_layers=tower.layers, max_source_positions=tower.positions)), indent=1))


RELEASE = Release("beit3", "beit3", describe, rules, (), ("model.safetensors", "weights.safetensors", "*.pth"), write_config, resize="resize_positions_border")
