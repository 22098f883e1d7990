"""VLMo's ``.pt`` files (microsoft/unilm ``vlmo/``): after the text stage, pre-trained, fine-tuned; and BEiT's ``.pth``, which VLMo starts from
(``beit/``, ``beit2/``)."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.errors import ConfigError
from vlm_jax.importers.open_clip import heads as whole_heads
from vlm_jax.importers.open_clip import linear, norm
from vlm_jax.importers.release import Hints, Release, Shapes, count_layers, grid_of, read_json, shape_of
from vlm_jax.models.sizes import sizes
from vlm_jax.models.vlmo import VARIANTS
from vlm_jax.weight_rules import Rule

TABLE = "relative_position_bias_table"
INDICES = ("relative_position_index", "text_relative_position_index", "text_imag_relative_position_index")
IGNORED = (*INDICES, r"text_embeddings\.position_ids")
HEADS = {     # ours -> a tensor that tells it
    "pooler": "pooler.dense.weight", "mlm": "mlm_score.bias", "itm": "itm_score.fc.weight", "itc": "itc_image_proj.fc.weight",
    "itc_vl": "itc_vl_image_proj.fc.weight", "vqa": "vqa_classifier.3.weight", "nlvr": "nlvr2_classifier.3.weight"}
STATEMENT = ("False", "True")


def trunk_rules(stack: str, source: str, first: int, experts: Mapping[str, str]) -> tuple[Rule, ...]:
    """A stack of layers that starts at layer ``first`` of ``source`` ("transformer.blocks"). experts: ours -> what official names end in."""
    layer = f"{source}.{{layer+{first}}}"
    rules: list[Rule] = [*norm(f"{stack}/norm1", f"{layer}.norm1"), (f"{stack}/gamma([12])", rf"{layer}.gamma_\1", "copy")]
    for i, role in enumerate(("query", "key", "value")):
        rules.append((f"{stack}/attn/all/{role}/kernel", f"{layer}.attn.qkv.weight[{i}/3]", "to_heads"))
        rules.append((f"{stack}/attn/all/{role}/bias", f"{layer}.attn.{role[0]}_bias", "heads"))
    rules += [(f"{stack}/attn/all/out/kernel", f"{layer}.attn.proj.weight", "from_heads"), (f"{stack}/attn/all/out/bias", f"{layer}.attn.proj.bias", "copy")]
    for ours, theirs in experts.items():
        rules += [*norm(f"{stack}/norm2/{ours}", f"{layer}.norm2{theirs}"), *linear(f"{stack}/mlp/{ours}/up", f"{layer}.mlp{theirs}.fc1"),
                  *linear(f"{stack}/mlp/{ours}/down", f"{layer}.mlp{theirs}.fc2")]
    return tuple(rules)


def image_rules(source: str) -> tuple[Rule, ...]:
    return (("image/class_embed", f"{source}cls_token", "class_row"), ("image/mask_embed", f"{source}mask_token", "class_row"),
            ("image/position_embed", f"{source}pos_embed", "batched_resize_positions_border"),
            ("image/patch_embed/projection/kernel", f"{source}patch_embed.proj.weight", "patches"),
            ("image/patch_embed/projection/bias", f"{source}patch_embed.proj.bias", "copy"), *norm("norm", f"{source}norm"))


def rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    trunk = {"reach": 196, **sizes(VARIANTS, **sections["model"]["trunk"])}
    lower = trunk["layers"] - trunk["fused"]
    grid = (2 * (sections["data"]["size"] // trunk["patch"]) - 1) ** 2
    if TABLE in shapes:      # of another resolution, perhaps
        grid = shapes[TABLE][0] - 5 - 2 * trunk["reach"]
    text, experts = "text_embeddings", {"text": "_text", "image": "_imag", "vl": "_vl"}
    classifiers = [rule for ours, theirs in (("vqa_head", "vqa_classifier"), ("nlvr_head", "nlvr2_classifier"))
                   for rule in (*linear(f"{ours}/up", f"{theirs}.0"), *norm(f"{ours}/norm", f"{theirs}.1"), *linear(f"{ours}/down", f"{theirs}.3"))]
    projections = [(f"{side}{branch}_head/kernel", f"itc{branch}_{side}_proj.fc.weight", "dense") for side in ("image", "text") for branch in ("", "_vl")]
    return (*image_rules("transformer."), *trunk_rules("blocks", "transformer.blocks", 0, experts),
            *trunk_rules("blocks_vl", "transformer.blocks", lower, experts),
            ("position_bias/image", f"{TABLE}[0..{grid}]", "resize_relative_positions"),
            ("position_bias/class", f"{TABLE}[{grid}..{grid + 3}]", "relative_positions"),
            ("position_bias/text", f"{TABLE}[{grid + 3}..]", "relative_positions"),
            ("text/token_embed/table", f"{text}.word_embeddings.weight", "copy"), ("text/position_embed", f"{text}.position_embeddings.weight", "copy"),
            ("text/type_embed", f"{text}.token_type_embeddings.weight", "copy"), *norm("text/embed_norm", f"{text}.LayerNorm"),
            ("type_embed", "token_type_embeddings.weight", "copy"), *linear("pooler", "pooler.dense"), *linear("itm_head", "itm_score.fc"), *projections,
            *linear("lm_head/dense", "mlm_score.transform.dense"), *norm("lm_head/norm", "mlm_score.transform.LayerNorm"),
            ("lm_head/bias", "mlm_score.bias", "copy"), ("lm_table", "mlm_score.decoder.weight", "copy"), *classifiers,
            ("logit_(vl_)?scale", r"\g<0>", "scalar"))


def stated(folder: pathlib.Path) -> dict[str, Any]:
    """config.json beside the file: what an export of ours says there (``write_config``), nested as the official code's or not."""
    config = read_json(folder, "config.json")
    return {**config, **config.get("vlmo_config", {}), **config.get("architecture", {})}


def published(width: int, layers: int) -> Mapping[str, Any]:
    return next((v for v in VARIANTS.values() if v["patch"] == 16 and (v["width"], v["layers"]) == (width, layers)), {})


def common(shapes: Shapes, prefix: str, mlp: str) -> dict[str, Any]:
    """Fields of the trunk that tensors tell."""
    width, _, patch, _ = shape_of(shapes, f"{prefix}patch_embed.proj.weight")
    return dict(width=width, patch=patch, layers=count_layers(shapes, f"{prefix}blocks.{{layer}}.norm1.weight"),
                mlp_dim=shape_of(shapes, f"{prefix}blocks.0.{mlp}.fc1.weight")[0], layer_scale=0.1 if f"{prefix}blocks.0.gamma_1" in shapes else 0.0)


def side_of(shapes: Shapes, config: Mapping[str, Any], patch: int, positions: int) -> tuple[int, int]:
    """(patches along a side, reach of the text's relative positions): the table's rows alone do not tell them apart."""
    rows = shape_of(shapes, TABLE)[0]

    def fits(side, reach):
        return side > 0 and (2 * side - 1) ** 2 + 5 + 2 * reach == rows

    sides = [config["image_size"] // patch] if "image_size" in config else []
    sides += [grid_of(shapes[INDICES[0]][0])] if INDICES[0] in shapes else []
    for side in sides:
        reach = (rows - 5 - (2 * side - 1) ** 2) // 2
        if fits(side, reach):
            return side, reach
    for reach in (config.get("max_text_len_of_initckpt", 196), positions):
        side = (round(max(0, rows - 5 - 2 * reach) ** 0.5) + 1) // 2
        if fits(side, reach):
            return side, reach
    raise ConfigError(f"{TABLE} has {rows} rows, which fit no square image beside texts of 196 or {positions} ids; "
                      "state image_size in a config.json beside the file")


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    """Sizes from the tensors; where they do not tell (heads without a bias table, the resolution of that table), from a config.json beside
    them, a hint or the published sizes."""
    config, trunk = stated(folder), common(shapes, "transformer.", "mlp_imag")
    layers, width = trunk["layers"], trunk["width"]
    vocab, positions = shape_of(shapes, "text_embeddings.word_embeddings.weight")[0], shape_of(shapes, "text_embeddings.position_embeddings.weight")[0]
    known = published(width, layers)
    upper = [i for i in range(layers) if f"transformer.blocks.{i}.mlp_vl.fc1.weight" in shapes]
    if upper != list(range(layers - len(upper), layers)):
        raise ConfigError(f"layers {upper} of {layers} have a third expert: they must be the topmost")
    start = config.get("vlffn_start_layer_index", layers)
    fused = len(upper) or (layers - start if 0 < start < layers else known.get("fused", max(1, layers // 6)))
    if TABLE in shapes:
        side, reach = side_of(shapes, config, trunk["patch"], positions)
        trunk |= dict(heads=whole_heads("image_heads", hints.image_heads, shapes[TABLE][1] // layers, width), positions="relative", reach=reach)
    else:
        side = grid_of(shape_of(shapes, "transformer.pos_embed")[1])
        trunk |= dict(heads=whole_heads("image_heads", hints.image_heads, config.get("num_heads") or known.get("heads"), width),
                      positions="absolute", reach=196)
    heads = tuple(name for name, tensor in HEADS.items() if tensor in shapes)
    trunk |= dict(fused=fused, text_positions=positions, types=shape_of(shapes, "token_type_embeddings.weight")[0],
                  experts=("text", "image", *(["vl"] if upper else [])))
    model = dict(trunk=trunk, heads=heads, tokens=dict(vocab=vocab, **{name: config.get("ids", {}).get(theirs, default) for name, theirs, default in (
        ("bos", "cls", 101), ("eos", "sep", 102), ("pad", "pad", 0), ("mask", "mask", 103))}))
    data = dict(size=side * trunk["patch"], length=positions, eval_augment="squash")
    weights = {name: weight for name, weight in (("itc", 1.0), ("itm", 1.0), ("mlm", 0.25)) if name in heads}
    if "vqa" in heads:
        model["classes"], weights = shape_of(shapes, HEADS["vqa"])[0], dict(vqa=1.0)
        data |= dict(answers=10, answer_length=8)
    elif "nlvr" in heads:
        data, weights = data | dict(images=2, classes=STATEMENT), dict(nlvr=1.0)
    elif heads == ("pooler", "mlm"):
        weights = dict(textmlm=1.0)
    return dict(model=model, data=data, clamps=(), loss=dict(weights=weights))


def write_config(config: Any, folder: pathlib.Path, names: Collection[str]) -> None:
    """config.json: what the tensors cannot tell, under the names of the official code."""
    trunk, tokens = ConfigDict(sizes(VARIANTS, **config.model.trunk)), config.model.tokens
    ids = {theirs: tokens[ours] for ours, theirs in (("bos", "cls"), ("eos", "sep"), ("pad", "pad"), ("mask", "mask")) if ours in tokens}
    (folder / "config.json").write_text(json.dumps(dict(
        image_size=config.data.size, patch_size=trunk.get("patch", 16), embed_dim=trunk.width, depth=trunk.layers, num_heads=trunk.heads,
        vlffn_start_layer_index=trunk.layers - trunk.fused,
        max_text_len=trunk.get("text_positions", 40), max_text_len_of_initckpt=trunk.get("reach", 196), ids=ids), indent=1))


# ---- BEiT --------------------------------------------------------------------------------------

SHARED = f"rel_pos_bias.{TABLE}"
BEIT_IGNORED = (r"(head|fc_norm|cls_pt_\w+)\..*", r".*relative_position_index")     # of classification; what BEiT v2 has for pre-training alone


def describe_beit(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    trunk = common(shapes, "", "mlp")
    layers, width = trunk["layers"], trunk["width"]
    table = next((name for name in (f"blocks.0.attn.{TABLE}", SHARED) if name in shapes), "")
    if table:
        rows, heads = shape_of(shapes, table)
        side = grid_of((round((rows - 3) ** 0.5) + 1) ** 2 // 4 + 1)
        trunk["heads"] = whole_heads("image_heads", hints.image_heads, heads, width)
    else:
        side = grid_of(shape_of(shapes, "pos_embed")[1])
        trunk |= dict(heads=whole_heads("image_heads", hints.image_heads, published(width, layers).get("heads"), width), positions="absolute")
    if table and "pos_embed" in shapes:
        raise ConfigError("the file has both a table of absolute positions and one of relative ones, of which VLMo has one")
    trunk |= dict(fused=published(width, layers).get("fused", max(1, layers // 6)), experts=("image",))
    coded = dict(targets=dict(kind="unknown", codes=shape_of(shapes, "lm_head.weight")[0])) if "lm_head.weight" in shapes else {}
    return dict(model=dict(trunk=trunk, heads=("mim",) if coded else (), **coded),
                data=dict(size=side * trunk["patch"], length=2, eval_augment="squash"), clamps=(), loss=dict(weights={}))


def beit_rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    trunk = sections["model"]["trunk"]
    lower = trunk["layers"] - trunk["fused"]
    table = SHARED if SHARED in shapes else f"blocks.{{layer}}.attn.{TABLE}"
    rows = next((shape[0] for name, shape in shapes.items() if re.search(rf"{TABLE}$", name)), 3)
    stacks = [(target, source.removeprefix("vit."), how) for stack, first in (("blocks", 0), ("blocks_vl", lower))
              for target, source, how in trunk_rules(stack, "vit.blocks", first, {"image": ""})]
    return (*image_rules(""), *stacks, ("position_bias/image", f"{table}[0..{rows - 3}]", "resize_relative_positions"),
            ("position_bias/class", f"{table}[{rows - 3}..]", "relative_positions"), *linear("mim_head", "lm_head"))


RELEASE = Release("vlmo", "vlmo", describe, rules, IGNORED, ("model.safetensors", "weights.safetensors", "*.pt"), write_config,
                  resize="resize_positions_border")
# A fine-tuned BEiT has no norm at the end: it starts fresh.
BEIT_RELEASE = Release("beit", "vlmo", describe_beit, beit_rules, BEIT_IGNORED, ("model.safetensors", "weights.safetensors", "*.pth"),
                       resize="resize_positions_border", given={"norm/scale": 1.0, "norm/bias": 0.0})
