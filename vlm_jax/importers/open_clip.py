"""open_clip's CLIP (``open_clip/model.py``: CLIP and CustomTextCLIP, ViT and ModifiedResNet), and the
tables of its towers, which OpenAI's archives and CoCa share."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError, nearest
from vlm_jax.importers.release import (
    CLIP_MEAN,
    CLIP_STD,
    Hints,
    Release,
    Shapes,
    count_layers,
    grid_of,
    read_json,
    refuse_options,
    settle,
    shape_of,
)
from vlm_jax.models import resnet, text, vit
from vlm_jax.weight_rules import Rule

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
IGNORED = (r"(.*\.)?attn_mask", r".*\.num_batches_tracked", r"(.*\.)?position_ids")
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh", "relu", "silu")
VISION_OPTIONS = dict(
    layers=None, width=None, head_width=None, mlp_ratio=None, patch_size=None, image_size=None, patch_dropout=None, no_ln_pre=None,
    final_ln_after_pool=None, pool_type=("tok", "avg"), output_tokens=None, norm_kwargs=None, pos_embed_type=None,
    attentional_pool=(True, False), attn_pooler_queries=None, attn_pooler_heads=None, block_type=("default", None),
    timm_model_pretrained=None, timm_pool=None, timm_proj=None, timm_proj_bias=None, timm_drop=None, timm_drop_path=None)
TEXT_OPTIONS = dict(
    context_length=None, vocab_size=None, width=None, heads=None, layers=None, mlp_ratio=None, embed_cls=None, pad_id=None, eos_id=None,
    no_causal_mask=None, final_ln_after_pool=None, pool_type=("argmax", "eos", "last", "first"), output_tokens=None, norm_kwargs=None,
    hf_tokenizer_name=None, tokenizer_kwargs=None, tokenizer_mode=None, proj_type=("linear",), block_type=("default", None),
    hf_model_pretrained=None, hf_proj_type=None, hf_pooler_type=None)
POOLINGS = {"argmax": "eot", "eos": "eot", "last": "last", "first": "first"}


# ---- tables ------------------------------------------------------------------------------------

def norm(target: str, source: str) -> tuple[Rule, ...]:
    return ((f"{target}/scale", f"{source}.weight", "copy"), (f"{target}/bias", f"{source}.bias", "copy"))


def linear(target: str, source: str) -> tuple[Rule, ...]:
    return ((f"{target}/kernel", f"{source}.weight", "dense"), (f"{target}/bias", f"{source}.bias", "copy"))


def attention(target: str, source: str, weights: str = "joined") -> tuple[Rule, ...]:
    """torch's MultiheadAttention. ``weights`` "joined": one in_proj_weight; "apart": q_, k_ and v_proj_weight
    (keys of another width), the biases joined all the same."""
    rules: list[Rule] = []
    for i, role in enumerate(("query", "key", "value")):
        weight = f"{source}.in_proj_weight[{i}/3]" if weights == "joined" else f"{source}.{role[0]}_proj_weight"
        rules += [(f"{target}/{role}/kernel", weight, "to_heads"), (f"{target}/{role}/bias", f"{source}.in_proj_bias[{i}/3]", "heads")]
    return (*rules, (f"{target}/out/kernel", f"{source}.out_proj.weight", "from_heads"), (f"{target}/out/bias", f"{source}.out_proj.bias", "copy"))


def blocks(target: str, source: str) -> tuple[Rule, ...]:
    layer = f"{source}.resblocks.{{layer}}"
    return (*norm(f"{target}/norm1", f"{layer}.ln_1"), *attention(f"{target}/attn", f"{layer}.attn"), *norm(f"{target}/norm2", f"{layer}.ln_2"),
            *linear(f"{target}/mlp/up", f"{layer}.mlp.c_fc"), *linear(f"{target}/mlp/down", f"{layer}.mlp.c_proj"))


def vit_rules() -> tuple[Rule, ...]:
    return (("image/class_embed", "visual.class_embedding", "copy"), ("image/position_embed", "visual.positional_embedding", "resize_positions"),
            ("image/patch_embed/projection/kernel", "visual.conv1.weight", "patches"), *norm("image/input_norm", "visual.ln_pre"),
            *blocks("image/blocks", "visual.transformer"))


def head_rules() -> tuple[Rule, ...]:
    """After the ViT's blocks; ``visual.proj`` is [in, out] already."""
    return (*norm("image_head/norm", "visual.ln_post"), ("image_head/kernel", "visual.proj", "copy"))


def batch_norm(target: str, source: str) -> tuple[Rule, ...]:
    return (*norm(target, source), (f"batch_stats/{target}/mean", f"{source}.running_mean", "copy"),
            (f"batch_stats/{target}/var", f"{source}.running_var", "copy"))


def resnet_rules() -> tuple[Rule, ...]:
    block, source = r"image/stage(\d)_block(\d+)", r"visual.layer\1.\2"
    pool = [(f"image/pool/attn/{role}/kernel", f"visual.attnpool.{role[0]}_proj.weight", "to_heads") for role in ("query", "key", "value")]
    pool += [(f"image/pool/attn/{role}/bias", f"visual.attnpool.{role[0]}_proj.bias", "heads") for role in ("query", "key", "value")]
    return ((r"image/stem([123])/conv/kernel", r"visual.conv\1.weight", "conv"), *batch_norm(r"image/stem([123])/norm", r"visual.bn\1"),
            (rf"{block}/conv([123])/conv/kernel", rf"{source}.conv\3.weight", "conv"), *batch_norm(rf"{block}/conv([123])/norm", rf"{source}.bn\3"),
            (rf"{block}/shortcut/conv/kernel", rf"{source}.downsample.0.weight", "conv"),
            *batch_norm(rf"{block}/shortcut/norm", rf"{source}.downsample.1"),
            ("image/pool/position_embed", "visual.attnpool.positional_embedding", "resize_positions"), *pool,
            ("image/pool/attn/out/kernel", "visual.attnpool.c_proj.weight", "from_heads"),
            ("image/pool/attn/out/bias", "visual.attnpool.c_proj.bias", "copy"))


def text_rules(prefix: str = "") -> tuple[Rule, ...]:
    return (("text/token_embed/table", f"{prefix}token_embedding.weight", "copy"),
            ("text/position_embed", f"{prefix}positional_embedding", "copy"), ("text/class_embed", f"{prefix}cls_emb", "copy"),
            *blocks("text/blocks", f"{prefix}transformer"), *norm("text_head/norm", f"{prefix}ln_final"),
            ("text_head/kernel", f"{prefix}text_projection", "copy"))


SCALE_RULES: tuple[Rule, ...] = (("logit_scale", "logit_scale", "scalar"), ("logit_bias", "logit_bias", "scalar"))


def rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    image = resnet_rules() if sections["model"]["image"]["tower"] == "resnet" else (*vit_rules(), *head_rules())
    return (*image, *text_rules("text." if "text.text_projection" in shapes else ""), *SCALE_RULES)


# ---- sizes -------------------------------------------------------------------------------------

def image_section(shapes: Shapes, hints: Hints, activation: str, vision: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """(the image tower's section, pixels), from tensor shapes; ``vision`` is the config's, {} without one."""
    if "visual.conv1.weight" not in shapes:
        raise ConfigError("the file has no 'visual.conv1.weight': neither a ViT nor a ModifiedResNet of CLIP's layout")
    if "visual.attnpool.positional_embedding" in shapes:
        return _resnet_section(shapes, hints)
    width, _, patch, other = shape_of(shapes, "visual.conv1.weight")
    if patch != other:
        raise ConfigError(f"patches of {patch}x{other} pixels are not square")
    layers = count_layers(shapes, "visual.transformer.resblocks.{layer}.ln_1.weight")
    mlp_dim = shape_of(shapes, "visual.transformer.resblocks.0.mlp.c_fc.weight")[0]
    check_config(vision, "vision_cfg", width=width, layers=layers, patch_size=patch)
    pixels = grid_of(shape_of(shapes, "visual.positional_embedding")[0]) * patch
    known = vision and width // vision.get("head_width", 64) or published_heads(vit.VARIANTS, width, layers, mlp_dim)
    return dict(tower="vit", patch=patch, width=width, layers=layers, heads=heads("image_heads", hints.image_heads, known, width),
                mlp_dim=mlp_dim, activation=activation, eps=eps_of(vision),
                norms_at=() if "visual.ln_pre.weight" not in shapes else ("input",)), pixels


def _resnet_section(shapes: Shapes, hints: Hints) -> tuple[dict[str, Any], int]:
    width = 2 * shape_of(shapes, "visual.conv1.weight")[0]
    settle("image_heads", hints.image_heads, width * 32 // 64, 0)
    counts = tuple(count_layers(shapes, f"visual.layer{stage}.{{layer}}.conv1.weight") for stage in (1, 2, 3, 4))
    return (dict(tower="resnet", width=width, blocks=counts),
            32 * grid_of(shape_of(shapes, "visual.attnpool.positional_embedding")[0]))


def text_section(shapes: Shapes, hints: Hints, activation: str, section: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(the text tower's section, {"vocab", "length", "embed"})."""
    vocab, width = shape_of(shapes, f"{prefix}token_embedding.weight")
    layers = count_layers(shapes, f"{prefix}transformer.resblocks.{{layer}}.ln_1.weight")
    mlp_dim = shape_of(shapes, f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0]
    length = shape_of(shapes, f"{prefix}positional_embedding")[0] - (f"{prefix}cls_emb" in shapes)
    check_config(section, "text_cfg", width=width, layers=layers, vocab_size=vocab, context_length=length)
    known = section.get("heads") or published_heads(text.VARIANTS, width, layers, mlp_dim)
    return (dict(width=width, layers=layers, heads=heads("text_heads", hints.text_heads, known, width), mlp_dim=mlp_dim, activation=activation,
                 eps=eps_of(section)),
            dict(vocab=vocab, length=length, embed=shape_of(shapes, f"{prefix}text_projection")[1]))


def published_heads(variants: Mapping[str, Mapping[str, int]], width: int, layers: int, mlp_dim: int) -> int:
    """Heads of the published tower of exactly this size, 0 where there is none."""
    found = {v["heads"] for v in variants.values() if (v["width"], v["layers"], v["mlp_dim"]) == (width, layers, mlp_dim)}
    return found.pop() if len(found) == 1 else 0


def heads(name: str, hint: int, known: int, width: int) -> int:
    """Heads: known, given, or of 64 channels (CLIP's rule). Raises ConfigError where they do not divide ``width``."""
    count = settle(name, hint, known, width // 64)
    if not count or width % count:
        raise ConfigError(f"--{name}={count or 'unknown'} does not fit width {width}: the file does not tell; nearest: "
                          f"{min((h for h in range(1, width + 1) if width % h == 0), key=lambda h: abs(h - (count or width // 64)))}")
    return count


def eps_of(section: Mapping[str, Any]) -> float:
    return float((section.get("norm_kwargs") or {}).get("eps", 1e-5))


def check_config(section: Mapping[str, Any], where: str, **found: Any) -> None:
    """Raises ConfigError where a config file contradicts the tensors."""
    for key, value in found.items():
        stated = section.get(key, value)
        if stated != value:
            raise ConfigError(f"{CONFIG}: {where}.{key}={stated}, but the tensors have {value}; nearest: {value}")


def check_activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ConfigError(f"--activation={name!r} is not known{nearest(name, ACTIVATIONS)}")
    return name


def preprocessing(found: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """({"mean", "std"}, the evaluation chain) of a ``preprocess_cfg``."""
    modes = {"shortest": "resize|center_crop", "squash": "squash"}
    mode, filter_ = found.get("resize_mode", "shortest"), found.get("interpolation", "bicubic")
    if mode not in modes:
        raise ConfigError(f"{CONFIG}: preprocess_cfg.resize_mode={mode!r} is not supported{nearest(mode, modes)}")
    if filter_ != "bicubic":
        raise ConfigError(f"{CONFIG}: preprocess_cfg.interpolation={filter_!r} is not supported; nearest: 'bicubic'")
    return dict(mean=tuple(found.get("mean", CLIP_MEAN)), std=tuple(found.get("std", CLIP_STD))), modes[mode]


def read_config(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model_cfg, preprocess_cfg) of open_clip_config.json, or of a model config by itself; empty without one."""
    found = read_json(folder, CONFIG)
    model = found.get("model_cfg", found if "vision_cfg" in found else {})
    for name, options in (("vision_cfg", VISION_OPTIONS), ("text_cfg", TEXT_OPTIONS)):
        if name in model:
            sides = model[name].get("patch_size")
            if isinstance(sides, list) and len(set(sides)) == 1:      # [14, 14]
                model[name] = {**model[name], "patch_size": sides[0]}
            refuse_options(model[name], options, f"{CONFIG}: {name}")
    return model, found.get("preprocess_cfg", {})


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    model, preprocess = read_config(folder)
    if "multimodal_cfg" in model or "text.cls_emb" in shapes:
        raise ConfigError("this is a CoCa; nearest: --release=open_clip_coca")
    vision, section = model.get("vision_cfg", {}), model.get("text_cfg", {})
    known = {True: "quick_gelu", False: "gelu"}[bool(model.get("quick_gelu", False))] if model else None
    activation = check_activation(settle("activation", hints.activation, known, "gelu"))
    prefix = "text." if "text.text_projection" in shapes else ""
    image, pixels = image_section(shapes, hints, activation, vision)
    words, found = text_section(shapes, hints, activation, section, prefix)
    pooling = section.get("pool_type", "argmax")
    words |= dict(tower="transformer", pooling=POOLINGS[pooling], end="eos" if pooling == "eos" else "largest",
                  causal="none" if section.get("no_causal_mask") else "causal")
    if vision.get("attentional_pool"):
        raise ConfigError(f"{CONFIG}: vision_cfg.attentional_pool={vision['attentional_pool']!r} is supported in CoCa only; nearest: False")
    pool = "class" if vision.get("pool_type", "tok") == "tok" else "mean" if vision.get("final_ln_after_pool") else "normed_mean"
    normal, chain = preprocessing(preprocess)
    bias = dict(bias=-10.0) if "logit_bias" in shapes else {}
    return dict(model=dict(image=image, text=words, embed=found["embed"], image_pool=pool, norm="layernorm", **normal, **bias,
                           tokens=tokens(found["vocab"], section)),
                data=dict(size=pixels, length=found["length"], eval_augment=chain))


def tokens(vocab: int, section: Mapping[str, Any]) -> dict[str, int]:
    """Special ids as CLIP's tokenizer lays them: the two largest begin and end, 0 pads."""
    eos = section["eos_id"] if section.get("pool_type") == "eos" and "eos_id" in section else vocab - 1
    return dict(vocab=vocab, bos=max(vocab - 2, 0), eos=eos, pad=section.get("pad_id", 0))


# ---- the way back ------------------------------------------------------------------------------

def model_cfg(config: Any) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of a stage config. Raises ConfigError for what it cannot say."""
    model, data = config.model, config.data
    image, words = model.image, model.text
    if image.get("tower", "vit") == "resnet":
        variant = resnet.VARIANTS.get(image.get("variant", ""), {})
        vision = dict(layers=list(image.get("blocks", variant.get("blocks"))), width=image.get("width", variant.get("width")),
                      image_size=data.size)
    else:
        image = {**vit.VARIANTS.get(image.get("variant", ""), {}), **image}
        vision = dict(layers=image["layers"], width=image["width"], head_width=image["width"] // image["heads"], patch_size=image["patch"],
                      image_size=data.size, mlp_ratio=ratio(image["mlp_dim"], image["width"]))
        if tuple(image.get("norms_at", ("input",))) == ():
            vision["no_ln_pre"] = True
        if model.get("image_pool", "class") != "class":
            vision |= dict(pool_type="avg", final_ln_after_pool=model.image_pool == "mean")
        if image.get("eps", 1e-5) != 1e-5:
            vision["norm_kwargs"] = dict(eps=image["eps"])
    return dict(embed_dim=model.embed, vision_cfg=vision, text_cfg=text_cfg(config),
                **(dict(init_logit_bias=model.bias) if model.get("bias") is not None else {}),
                **(dict(quick_gelu=True) if words.get("activation", "gelu") == "quick_gelu" else {}))


def text_cfg(config: Any) -> dict[str, Any]:
    words, data = {**text.VARIANTS.get(config.model.text.get("variant", ""), {}), **config.model.text}, config.data
    section = dict(context_length=data.length, vocab_size=config.model.tokens.vocab, width=words["width"], heads=words["heads"],
                   layers=words["layers"], mlp_ratio=ratio(words["mlp_dim"], words["width"]))
    if words.get("end") == "eos":
        section |= dict(pool_type="eos", eos_id=config.model.tokens.eos)
    if words.get("pooling", "eot") in ("last", "first"):
        section["pool_type"] = words["pooling"]
    if words.get("causal", "causal") == "none":
        section["no_causal_mask"] = True
    if words.get("eps", 1e-5) != 1e-5:
        section["norm_kwargs"] = dict(eps=words["eps"])
    if config.model.tokens.pad:
        section["pad_id"] = config.model.tokens.pad
    return section


def ratio(mlp_dim: int, width: int) -> float | int:
    """A ratio that open_clip's int(width * ratio) turns back into ``mlp_dim``."""
    if mlp_dim % width == 0:
        return mlp_dim // width
    return next(r for digits in range(3, 12) for r in (round((mlp_dim + 0.5) / width, digits),) if int(width * r) == mlp_dim)


def preprocess_cfg(config: Any) -> dict[str, Any]:
    chains = {"resize|center_crop": "shortest", "squash": "squash"}
    if config.data.eval_augment not in chains:
        raise ConfigError(f"open_clip cannot state data.eval_augment={config.data.eval_augment!r}{nearest(config.data.eval_augment, chains)}")
    return dict(mean=list(config.model.mean), std=list(config.model.std), interpolation="bicubic", resize_mode=chains[config.data.eval_augment])


def write_config(config: Any, folder: pathlib.Path, names: Collection[str]) -> None:
    custom = dict(custom_text=True) if "text.text_projection" in names else {}     # the text tower in a module of its own
    (folder / CONFIG).write_text(json.dumps(dict(model_cfg=model_cfg(config) | custom, preprocess_cfg=preprocess_cfg(config)), indent=1))


RELEASE = Release("open_clip", "clip", describe, rules, IGNORED, WEIGHTS, write_config,
                  library="open_clip", task="zero-shot-image-classification")
