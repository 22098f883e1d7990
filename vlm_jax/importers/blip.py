"""BLIP: salesforce/BLIP's ``.pth`` files (pre-training, captioning, retrieval) and Hugging Face's models of the same towers."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.importers import bert
from vlm_jax.importers.open_clip import heads, linear, norm
from vlm_jax.importers.release import CLIP_MEAN, CLIP_STD, Hints, Release, Shapes, count_layers, grid_of, read_json, shape_of
from vlm_jax.models import bert as tower
from vlm_jax.models import vit
from vlm_jax.models.sizes import sizes
from vlm_jax.weight_rules import Rule

IGNORED = (r".*\.position_ids",)
ENCODER, DECODER = "text_encoder", "text_decoder.bert"
TABLE, HEAD = "embeddings.word_embeddings.weight", "text_decoder.cls.predictions"
A_PICTURE_OF = (1037, 3861, 1997)     # in bert-base-uncased, whose table with [DEC] and [ENC] has 30,524 rows
FACE = (("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"), ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
        ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"), ("visual_encoder.blocks", "vision_model.encoder.layers"),
        ("visual_encoder.norm", "vision_model.post_layernorm"), (".attn.qkv", ".self_attn.qkv"), (".attn.proj", ".self_attn.projection"),
        (".norm1", ".layer_norm1"), (".norm2", ".layer_norm2"))


# ---- rules -------------------------------------------------------------------------------------

def to_face(name: str) -> str:
    """Hugging Face's name of an original tensor; only the image tower's differ."""
    if name.startswith("visual_encoder."):
        for old, new in FACE:
            name = name.replace(old, new)
    return name


def shared(weights: Mapping[str, float]) -> str:
    """Where a file of a model with these loss weights holds what encoder and decoder share; ``ties`` finds it again in the other."""
    return ENCODER if weights.get("itc") or weights.get("itm") else DECODER


def text_rules(where: str) -> tuple[Rule, ...]:
    """The text network: the decoder's self-attention, and all else from ``where``."""
    blocks, decoder = "text/blocks_cross", f"{DECODER}.encoder.layer.{{layer}}.attention"
    return (*bert.embeddings("text", f"{where}.embeddings"), *bert.attention(f"{blocks}/decoder_attn", decoder),
            *norm(f"{blocks}/decoder_norm1", f"{decoder}.output.LayerNorm"), *bert.layers(blocks, f"{where}.encoder.layer"))


def feature_rules(suffix: str = "") -> tuple[Rule, ...]:
    return (*linear("image_head", f"vision_proj{suffix}"), *linear("text_head", f"text_proj{suffix}"))


def model_rules(weights: Mapping[str, float]) -> tuple[Rule, ...]:
    return (*bert.timm_vit("image", "visual_encoder"), *text_rules(shared(weights)), *bert.language_head("lm_head", HEAD), *feature_rules(),
            *linear("itm_head", "itm_head"), ("temp", "temp", "scalar"))


def carry_rules(names: Collection[str]) -> tuple[Rule, ...]:
    """The slow copies and queues, as far as the file has them."""
    queue = [(f"carry/{ours}", theirs, how) for ours, theirs, how in (
        ("image_queue", "image_queue", "dense"), ("text_queue", "text_queue", "dense"), ("id_queue", "idx_queue", "id_row"), ("pointer", "queue_ptr", "one"),
        ("pointer", "ptr_queue", "one")) if not names or theirs in names]
    teacher = (*bert.timm_vit("image", "visual_encoder_m"), *text_rules(f"{ENCODER}_m"), *feature_rules("_m"))
    return (*queue, *((f"carry/teacher/{target}", source, how) for target, source, how in teacher if not names or "vision_proj_m.weight" in names))


def rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    return (*model_rules(sections["loss"]["weights"]), *carry_rules(shapes))


def face_rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    """Raises ConfigError for a model that is more or less than one of theirs."""
    weights = sections["loss"]["weights"]
    if bool(weights.get("lm")) == bool(weights.get("itm")):
        raise ConfigError(f"transformers' models caption (lm) or match (itc and itm), loss.weights has {', '.join(k for k, w in weights.items() if w)}; "
                          "nearest: a stage caption or retrieval, or --export=blip")
    return tuple((target, to_face(source), how) for target, source, how in model_rules(sections["loss"]["weights"]))


def ties(names: Collection[str]) -> dict[str, str]:
    """What the decoder shares with the encoder, and the language head with the token table."""
    out = {}
    if f"{HEAD}.bias" in names:
        both = f"{ENCODER}.{TABLE}" in names
        out = {f"{HEAD}.decoder.bias": f"{HEAD}.bias", f"{HEAD}.decoder.weight": f"{ENCODER if both else DECODER}.{TABLE}"}
        out |= {name.replace(ENCODER, DECODER, 1): name for name in names
                if name.startswith(f"{ENCODER}.") and ".attention." not in name and not name.endswith("position_ids")}
    return out


# ---- sizes -------------------------------------------------------------------------------------

def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    """Sizes from the tensors; heads from config.json or med_config.json beside the file, else 64 channels each."""
    config = read_json(folder, "config.json")
    stated = config.get("med_config") or read_json(folder, "med_config.json")
    return sections_of(shapes, hints, config.get("vision", {}).get("heads"), stated.get("num_attention_heads"))


def describe_face(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    """As ``describe``. Towers of the original, whose LayerNorms have 1e-6 whatever config.json says."""
    config = read_json(folder, "config.json")
    back = {to_face(name): name for name in original_names(shapes)}
    return sections_of({back.get(name, name): shape for name, shape in shapes.items()}, hints, config.get("vision_config", {}).get("num_attention_heads"),
                       config.get("text_config", {}).get("num_attention_heads"))


def original_names(shapes: Shapes) -> list[str]:
    """The original names of an image tower with as many layers as the file has."""
    layers = count_layers(shapes, "vision_model.encoder.layers.{layer}.layer_norm1.weight")
    templates = {source.partition("[")[0] for _, source, _ in bert.timm_vit("image", "visual_encoder")}
    return [t.replace("{layer}", str(i)) for t in templates for i in range(layers if "{layer}" in t else 1)]


def sections_of(shapes: Shapes, hints: Hints, image_heads: int | None, text_heads: int | None) -> dict[str, dict[str, Any]]:
    parts = {"itc": "vision_proj.weight" in shapes, "itm": "itm_head.weight" in shapes, "lm": f"{HEAD}.bias" in shapes}
    weights = {name: 1.0 for name, there in parts.items() if there}
    if not weights:
        raise ConfigError("the file has no head of BLIP (vision_proj, itm_head, text_decoder.cls): is it of this release?")
    width, _, patch, _ = shape_of(shapes, "visual_encoder.patch_embed.proj.weight")
    image = dict(patch=patch, width=width, layers=count_layers(shapes, "visual_encoder.blocks.{layer}.norm1.weight"),
                 heads=heads("image_heads", hints.image_heads, image_heads, width), mlp_dim=shape_of(shapes, "visual_encoder.blocks.0.mlp.fc1.weight")[0],
                 patch_bias=True, norms_at=("output",), eps=1e-6, init_scheme="bert")
    where = shared(weights)
    vocab, text_width = shape_of(shapes, f"{where}.{TABLE}")
    text = dict(width=text_width, layers=count_layers(shapes, f"{where}.encoder.layer.{{layer}}.crossattention.self.query.weight"),
                heads=heads("text_heads", hints.text_heads, text_heads, text_width),
                mlp_dim=shape_of(shapes, f"{where}.encoder.layer.0.intermediate.dense.weight")[0],
                positions=shape_of(shapes, f"{where}.embeddings.position_embeddings.weight")[0], dropout=0.1)
    mined: dict[str, Any] = {}
    if "image_queue" in shapes:
        mined = dict(targets="images", mined_by="student") if "idx_queue" in shapes else dict(negative_epsilon=1e-4)
        mined["queue"] = shape_of(shapes, "image_queue")[1]
    return dict(model=dict(image=image, text=text, embed=shapes["vision_proj.weight"][0] if parts["itc"] else 256, mean=CLIP_MEAN, std=CLIP_STD,
                           prompt=A_PICTURE_OF if parts["lm"] and vocab == 30_524 else (),
                           tokens=dict(vocab=vocab, bos=101, eos=102, pad=0, dec=vocab - 2, enc=vocab - 1)),
                data=dict(size=patch * grid_of(shape_of(shapes, "visual_encoder.pos_embed")[1]), length=min(30, text["positions"]), eval_augment="squash"),
                clamps=(("temp", 0.001, 0.5),) if parts["itc"] else (), loss=dict(mined, weights=weights))


def write_config(config: Any, folder: pathlib.Path, names: Collection[str]) -> None:
    """config.json: what the tensors cannot tell, under the names of the official code's configs."""
    image, text = sizes(vit.VARIANTS, **config.model.image), sizes(tower.VARIANTS, **config.model.text)
    (folder / "config.json").write_text(json.dumps(dict(
        image_size=config.data.size, vision=dict(width=image["width"], depth=image["layers"], heads=image["heads"]), embed_dim=config.model.get("embed", 256),
        med_config=dict(model_type="bert", hidden_act="gelu", layer_norm_eps=1e-12, hidden_size=text["width"], num_attention_heads=text["heads"],
                        intermediate_size=text["mlp_dim"], num_hidden_layers=text["layers"], vocab_size=config.model.tokens.vocab - 2,
                        max_position_embeddings=text.get("positions", 512), add_cross_attention=True, encoder_width=image["width"])), indent=1))


def write_face_config(config: Any, folder: pathlib.Path, names: Collection[str]) -> None:
    """config.json of a BlipForConditionalGeneration, BlipForImageTextRetrieval or BlipForQuestionAnswering, and preprocessor_config.json."""
    image, text, tokens = sizes(vit.VARIANTS, **config.model.image), sizes(tower.VARIANTS, **config.model.text), config.model.tokens

    def common(found, eps):
        return dict(hidden_size=found["width"], intermediate_size=found["mlp_dim"], num_hidden_layers=found["layers"], num_attention_heads=found["heads"],
                    hidden_act="gelu", layer_norm_eps=found.get("eps", eps))

    kind = "ConditionalGeneration" if f"{ENCODER}.{TABLE}" not in names else "QuestionAnswering" if f"{HEAD}.bias" in names else "ImageTextRetrieval"
    if kind == "QuestionAnswering" and image["width"] != text["width"]:
        raise ConfigError(f"--export=hf_blip_vqa: transformers' answer decoder looks at states as wide as the image's ({image['width']}), this one's at "
                          f"{text['width']}; nearest: --export=blip_vqa")
    embed = config.model.get("embed", 256)
    (folder / "config.json").write_text(json.dumps(dict(
        architectures=[f"BlipFor{kind}"], model_type="blip", torch_dtype="float32", projection_dim=embed, image_text_hidden_size=embed,
        vision_config=dict(common(image, 1e-6), model_type="blip_vision_model", image_size=config.data.size, patch_size=image["patch"]),
        text_config=dict(common(text, 1e-12), model_type="blip_text_model", encoder_hidden_size=image["width"], vocab_size=tokens.vocab,
                         max_position_embeddings=text.get("positions", 512), bos_token_id=tokens.dec, eos_token_id=tokens.eos, sep_token_id=tokens.eos,
                         pad_token_id=tokens.pad)), indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="BlipImageProcessor", processor_class="BlipProcessor", do_resize=True, size=dict(height=config.data.size, width=config.data.size),
        resample=3, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=list(config.model.mean), image_std=list(config.model.std),
        do_convert_rgb=True), indent=1))


RELEASE = Release("blip", "blip", describe, rules, IGNORED, ("model.safetensors", "weights.safetensors", "*.pth"), write_config,
                  resize="resize_positions_border", ties=ties)
FACE_RELEASE = Release("hf_blip", "blip", describe_face, face_rules, IGNORED, ("model.safetensors", "pytorch_model.bin"), write_face_config,
                       resize="resize_positions_border", ties=ties, given={"temp": 0.07}, library="transformers")
