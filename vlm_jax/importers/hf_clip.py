"""Hugging Face's ``CLIPModel`` (transformers ``models/clip/modeling_clip.py``): a ViT and a text transformer."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError, nearest
from vlm_jax.importers import open_clip
from vlm_jax.importers.release import CLIP_MEAN, CLIP_STD, Hints, Release, Shapes, count_layers, grid_of, read_json, settle, shape_of
from vlm_jax.models import text, vit
from vlm_jax.weight_rules import Rule

# CLIPVisionConfig's and CLIPTextConfig's defaults: a config.json may leave them out
VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=32,
              hidden_act="quick_gelu", layer_norm_eps=1e-5, num_channels=3)
TEXT = dict(vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
            max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5, pad_token_id=1, bos_token_id=49406, eos_token_id=49407)
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
               "silu": "silu", "swish": "silu"}
BY_ARGMAX = 2      # eos_token_id of configs older than transformers #24773: the largest id ends the text


def attention(target: str, source: str) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for role in ("query", "key", "value"):
        rules += [(f"{target}/{role}/kernel", f"{source}.{role[0]}_proj.weight", "to_heads"), (f"{target}/{role}/bias", f"{source}.{role[0]}_proj.bias", "heads")]
    return (*rules, (f"{target}/out/kernel", f"{source}.out_proj.weight", "from_heads"), (f"{target}/out/bias", f"{source}.out_proj.bias", "copy"))


def blocks(target: str, source: str) -> tuple[Rule, ...]:
    layer = f"{source}.encoder.layers.{{layer}}"
    return (*open_clip.norm(f"{target}/norm1", f"{layer}.layer_norm1"), *attention(f"{target}/attn", f"{layer}.self_attn"),
            *open_clip.norm(f"{target}/norm2", f"{layer}.layer_norm2"),
            *open_clip.linear(f"{target}/mlp/up", f"{layer}.mlp.fc1"), *open_clip.linear(f"{target}/mlp/down", f"{layer}.mlp.fc2"))


def rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    image, words = "vision_model.embeddings", "text_model.embeddings"
    return (("image/class_embed", f"{image}.class_embedding", "copy"), ("image/patch_embed/projection/kernel", f"{image}.patch_embedding.weight", "patches"),
            ("image/position_embed", f"{image}.position_embedding.weight", RELEASE.resize),
            *open_clip.norm("image/input_norm", "vision_model.pre_layrnorm"), *blocks("image/blocks", "vision_model"),      # (sic)
            *open_clip.norm("image_head/norm", "vision_model.post_layernorm"), ("image_head/kernel", "visual_projection.weight", "dense"),
            ("text/token_embed/table", f"{words}.token_embedding.weight", "copy"), ("text/position_embed", f"{words}.position_embedding.weight", "copy"),
            *blocks("text/blocks", "text_model"), *open_clip.norm("text_head/norm", "text_model.final_layer_norm"),
            ("text_head/kernel", "text_projection.weight", "dense"), ("logit_scale", "logit_scale", "scalar"))


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    config = read_json(folder, "config.json")
    if not config:
        raise ConfigError(f"{folder} has no config.json: a CLIPModel's heads and activation stand there")
    if config.get("model_type", "clip") != "clip":
        raise ConfigError(f"config.json: model_type={config['model_type']!r} is not supported; nearest: 'clip'")
    # old files state overrides in *_config_dict
    vision, words = ({**defaults, **(config.get(f"{k}_config") or {}), **(config.get(f"{k}_config_dict") or {})} for k, defaults in (("vision", VISION), ("text", TEXT)))
    image = _tower(shapes, vision, "vision_model", "image_heads", hints)
    width, _, patch, _ = shape_of(shapes, "vision_model.embeddings.patch_embedding.weight")
    check(vision, "vision_config", hidden_size=width, patch_size=patch)
    pixels = patch * grid_of(shape_of(shapes, "vision_model.embeddings.position_embedding.weight")[0])
    check(vision, "vision_config", image_size=pixels)
    body = _tower(shapes, words, "text_model", "text_heads", hints)
    vocab, width = shape_of(shapes, "text_model.embeddings.token_embedding.weight")
    length = shape_of(shapes, "text_model.embeddings.position_embedding.weight")[0]
    check(words, "text_config", hidden_size=width, vocab_size=vocab, max_position_embeddings=length)
    end = words["eos_token_id"]
    if not isinstance(end, int):
        raise ConfigError(f"config.json: text_config.eos_token_id={end!r} is not supported; nearest: {end[0] if end else vocab - 1}")
    normal, chain = preprocessing(read_json(folder, "preprocessor_config.json"), pixels)
    return dict(model=dict(image=dict(image, tower="vit", patch=patch), text=dict(body, tower="transformer", end="largest" if end == BY_ARGMAX else "eos"),
                           embed=shape_of(shapes, "visual_projection.weight")[0], image_pool="class", norm="layernorm", **normal,
                           tokens=dict(vocab=vocab, bos=min(words["bos_token_id"] or 0, vocab - 1), eos=vocab - 1 if end == BY_ARGMAX else end,
                                       pad=0 if end == BY_ARGMAX else end)),     # CLIPTokenizer pads with the end; the config's pad id is unused
                data=dict(size=pixels, length=length, eval_augment=chain))


def _tower(shapes: Shapes, section: Mapping[str, Any], name: str, flag: str, hints: Hints) -> dict[str, Any]:
    """What both towers' sections have in common."""
    where = name.replace("_model", "_config")
    layers = count_layers(shapes, f"{name}.encoder.layers.{{layer}}.layer_norm1.weight")
    mlp_dim, width = shape_of(shapes, f"{name}.encoder.layers.0.mlp.fc1.weight")
    check(section, where, num_hidden_layers=layers, intermediate_size=mlp_dim)
    if section["hidden_act"] not in ACTIVATIONS:
        raise ConfigError(f"config.json: {where}.hidden_act={section['hidden_act']!r} is not supported{nearest(section['hidden_act'], ACTIVATIONS)}")
    return dict(width=width, layers=layers, mlp_dim=mlp_dim, eps=float(section["layer_norm_eps"]),
                heads=open_clip.heads(flag, getattr(hints, flag), section["num_attention_heads"], width),
                activation=settle("activation", hints.activation, ACTIVATIONS[section["hidden_act"]], ""))


def check(section: Mapping[str, Any], where: str, **found: int) -> None:
    """Raises ConfigError where config.json contradicts the tensors."""
    for key, value in found.items():
        if section[key] != value:
            raise ConfigError(f"config.json: {where}.{key}={section[key]}, but the tensors have {value}; nearest: {value}")


def preprocessing(found: Mapping[str, Any], pixels: int) -> tuple[dict[str, Any], str]:
    """({"mean", "std"}, the evaluation chain) of preprocessor_config.json."""
    if found.get("resample", 3) != 3:
        raise ConfigError(f"preprocessor_config.json: resample={found['resample']} is not supported; nearest: 3 (bicubic)")
    size = found.get("size", pixels)
    side = size.get("shortest_edge", 0) if isinstance(size, Mapping) else size
    if side:
        chain = "resize|center_crop" if side == pixels else f"resize({side})|center_crop"
    elif (size.get("height"), size.get("width")) == (pixels, pixels):
        chain = "squash"
    else:
        raise ConfigError(f"preprocessor_config.json: size={size} does not give {pixels}x{pixels}; nearest: {{'shortest_edge': {pixels}}}")
    return dict(mean=tuple(found.get("image_mean", CLIP_MEAN)), std=tuple(found.get("image_std", CLIP_STD))), chain


def write_config(config: Any, folder: pathlib.Path, names: Collection[str]) -> None:
    """config.json and preprocessor_config.json. Raises ConfigError for what a CLIPModel cannot say."""
    model, data = config.model, config.data
    if model.image.get("tower", "vit") != "vit" or model.text.get("tower", "transformer") != "transformer":
        raise ConfigError(f"a CLIPModel is a ViT and a text transformer, not {model.image.get('tower')} and {model.text.get('tower')}; "
                          "nearest: --export=open_clip")
    if model.get("image_pool", "class") != "class" or model.text.get("pooling", "eot") != "eot" or model.text.get("causal", "causal") != "causal":
        raise ConfigError(f"a CLIPModel pools at the class token and the text's end, behind a causal mask, not model.image_pool="
                          f"{model.get('image_pool')!r}, model.text.pooling={model.text.get('pooling', 'eot')!r}; nearest: --export=open_clip")
    image, words = {**vit.VARIANTS.get(model.image.get("variant", ""), {}), **model.image}, {**text.VARIANTS.get(model.text.get("variant", ""), {}), **model.text}
    back = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}

    def tower(found):
        return dict(hidden_size=found["width"], intermediate_size=found["mlp_dim"], num_hidden_layers=found["layers"], num_attention_heads=found["heads"],
                    hidden_act=back[found.get("activation", "gelu")], layer_norm_eps=found.get("eps", 1e-5), projection_dim=model.embed)

    end = BY_ARGMAX if words.get("end", "largest") == "largest" else model.tokens.eos
    (folder / "config.json").write_text(json.dumps(dict(
        architectures=["CLIPModel"], model_type="clip", projection_dim=model.embed, torch_dtype="float32",
        vision_config=dict(tower(image), model_type="clip_vision_model", image_size=data.size, patch_size=image["patch"]),
        text_config=dict(tower(words), model_type="clip_text_model", vocab_size=model.tokens.vocab, max_position_embeddings=data.length,
                         bos_token_id=model.tokens.bos, eos_token_id=end, pad_token_id=1)), indent=1))
    resized = data.eval_augment.split("|")[0]
    side = int(resized[7:-1]) if resized.startswith("resize(") else data.size
    size = {"height": data.size, "width": data.size} if resized == "squash" else {"shortest_edge": side}
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="CLIPImageProcessor", do_resize=True, size=size, do_center_crop=resized != "squash",
        crop_size=dict(height=data.size, width=data.size), do_rescale=True, rescale_factor=1 / 255, do_normalize=True, do_convert_rgb=True,
        resample=3, image_mean=list(model.mean), image_std=list(model.std)), indent=1))


RELEASE = Release("hf_clip", "clip", describe, rules, (r".*\.position_ids", r".*attn_mask"),
                  ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"), write_config,
                  resize="resize_positions_border", library="transformers", task="zero-shot-image-classification")
