"""BLIP's ``.pth`` files (salesforce/BLIP ``models/``) and Hugging Face's BlipModels: tables of rules."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from vlm_jax.importers import bert
from vlm_jax.importers.open_clip import linear, norm
from vlm_jax.weight_rules import Rule

IGNORED = (r".*\.position_ids",)
ENCODER, DECODER = "text_encoder", "text_decoder.bert"


def shared(weights: Mapping[str, float]) -> str:
    """Where a file of a model with these loss weights holds what encoder and decoder share (and what ``ties`` finds again in the other)."""
    return ENCODER if weights.get("itc") or weights.get("itm") else DECODER


def timm_rules(suffix: str = "") -> tuple[Rule, ...]:
    return bert.timm_vit("image", f"visual_encoder{suffix}")


def hf_vision_rules() -> tuple[Rule, ...]:
    """Hugging Face's names of timm's layout."""
    renamed = (("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"), ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
               ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"), (".attn.qkv", ".self_attn.qkv"), (".attn.proj", ".self_attn.projection"),
               (".norm1", ".layer_norm1"), (".norm2", ".layer_norm2"), ("visual_encoder.blocks", "vision_model.encoder.layers"), ("visual_encoder.norm", "vision_model.post_layernorm"))

    def rename(source):
        for old, new in renamed:
            source = source.replace(old, new)
        return source

    return tuple((target, rename(source), how) for target, source, how in timm_rules())


def text_rules(where: str) -> tuple[Rule, ...]:
    """The text network: the decoder's self-attention, and all else from ``where``."""
    blocks, decoder = "text/blocks_cross", f"{DECODER}.encoder.layer.{{layer}}.attention"
    return (*bert.embeddings("text", f"{where}.embeddings"), *bert.attention(f"{blocks}/decoder_attn", decoder),
            *norm(f"{blocks}/decoder_norm1", f"{decoder}.output.LayerNorm"), *bert.layers(blocks, f"{where}.encoder.layer"))


def head_rules(suffix: str = "") -> tuple[Rule, ...]:
    return (*linear("image_head", f"vision_proj{suffix}"), *linear("text_head", f"text_proj{suffix}"))


def model_rules(weights: Mapping[str, float], image: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (*image, *text_rules(shared(weights)), *bert.language_head("lm_head", "text_decoder.cls.predictions"), *head_rules(),
            *linear("itm_head", "itm_head"), ("temp", "temp", "scalar"))


def carry_rules(names: Collection[str]) -> tuple[Rule, ...]:
    """The slow copies and queues, as far as the file has them."""
    queue = [(f"carry/{ours}", theirs, how) for ours, theirs, how in (
        ("image_queue", "image_queue", "dense"), ("text_queue", "text_queue", "dense"), ("id_queue", "idx_queue", "id_row"), ("pointer", "queue_ptr", "one"),
        ("pointer", "ptr_queue", "one")) if not names or theirs in names]
    teacher = (*timm_rules("_m"), *text_rules(f"{ENCODER}_m"), *head_rules("_m"))
    return (*queue, *((f"carry/teacher/{target}", source, how) for target, source, how in teacher if not names or "vision_proj_m.weight" in names))


def ties(names: Collection[str]) -> dict[str, str]:
    """Name of a second copy -> the tensor that it equals: what the decoder shares with the encoder, and the head with the token table."""
    out = {}
    head, table = "text_decoder.cls.predictions", "embeddings.word_embeddings.weight"
    if f"{head}.bias" in names:
        out |= {f"{head}.decoder.bias": f"{head}.bias", f"{head}.decoder.weight": f"{ENCODER if f'{ENCODER}.{table}' in names else DECODER}.{table}"}
    for name in names:
        if name.startswith(f"{ENCODER}.") and ".attention." not in name and not name.endswith("position_ids"):
            out[name.replace(ENCODER, DECODER, 1)] = name
    return out if any(name.startswith(f"{DECODER}.") for name in names) or f"{head}.bias" in names else {}
