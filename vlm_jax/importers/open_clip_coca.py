"""open_clip's CoCa (``open_clip/coca_model.py``; laion/CoCa-ViT-B-32 and -L-14 and their COCO fine-tunes)."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.importers import open_clip
from vlm_jax.importers.release import Hints, Release, Shapes, count_layers, refuse_options, settle, shape_of
from vlm_jax.models import multimodal
from vlm_jax.weight_rules import Rule

DECODER_OPTIONS = {**open_clip.TEXT_OPTIONS, "mlp_ratio": (4, 4.0), "dim_head": None, "n_queries": None, "attn_pooler_heads": None}


def rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    """Decoder layers are a self block and a cross block; both, and both poolings of image tokens, as stored."""
    cross, layer = "decoder/blocks/cross", "text_decoder.cross_attn.{layer}"
    model = sections["model"]
    width = model["embed"]
    weights = "joined" if model["image"]["width"] == width else "apart"     # torch joins them where keys are as wide as queries
    return (*open_clip.vit_rules(),
            ("caption_pooler/query", "visual.attn_pool.query", "copy"), *open_clip.norm("caption_pooler/norm_query", "visual.attn_pool.ln_q"),
            *open_clip.norm("caption_pooler/norm_kv", "visual.attn_pool.ln_k"),
            *open_clip.attention("caption_pooler/attn", "visual.attn_pool.attn", weights=weights),
            *open_clip.norm("memory_norm", "visual.ln_post"), ("image_head/kernel", "visual.proj", "copy"),
            *open_clip.text_rules("text."), *open_clip.blocks("decoder/blocks", "text_decoder"),
            *open_clip.norm(f"{cross}_norm1", f"{layer}.ln_1"), *open_clip.norm(f"{cross}_norm_kv", f"{layer}.ln_1_kv"),
            *open_clip.attention(cross, f"{layer}.attn"), *open_clip.norm(f"{cross}_norm2", f"{layer}.ln_2"),
            *open_clip.linear(f"{cross}_mlp/up", f"{layer}.mlp.c_fc"), *open_clip.linear(f"{cross}_mlp/down", f"{layer}.mlp.c_proj"),
            *open_clip.norm("decoder/final_norm", "text_decoder.ln_final"), ("decoder/vocab_kernel", "text_decoder.text_projection", "copy"),
            *open_clip.SCALE_RULES)


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    model, preprocess = open_clip.read_config(folder)
    vision, section, multi = (model.get(f"{k}_cfg", {}) for k in ("vision", "text", "multimodal"))
    refuse_options(multi, DECODER_OPTIONS, f"{open_clip.CONFIG}: multimodal_cfg")
    if "text_decoder.text_projection" not in shapes:
        raise ConfigError("the file has no 'text_decoder.text_projection': not a CoCa of open_clip; nearest: --release=open_clip")
    if "visual.attn_pool.query" not in shapes:
        raise ConfigError("the file has no 'visual.attn_pool.query': CoCa without attentional pooling is not supported "
                          "(no weights of it were released)")
    known = {True: "quick_gelu", False: "gelu"}[bool(model.get("quick_gelu", False))] if model else None
    activation = open_clip.check_activation(settle("activation", hints.activation, known, "gelu"))
    image, pixels = open_clip.image_section(shapes, hints, activation, vision)
    words, found = open_clip.text_section(shapes, hints, activation, section, "text.")
    if section.get("no_causal_mask"):
        raise ConfigError(f"{open_clip.CONFIG}: text_cfg.no_causal_mask=True is not supported in CoCa; nearest: False")
    width, vocab = shape_of(shapes, "text_decoder.text_projection")
    layers = count_layers(shapes, "text_decoder.resblocks.{layer}.ln_1.weight")
    mlp_dim = shape_of(shapes, "text_decoder.resblocks.0.mlp.c_fc.weight")[0]
    open_clip.check_config(multi, "multimodal_cfg", width=width, layers=layers)
    if vocab != found["vocab"]:
        raise ConfigError(f"the decoder predicts {vocab} ids, the text tower embeds {found['vocab']}")
    known_heads = multi.get("heads") or open_clip.published_heads(multimodal.VARIANTS, width, layers, mlp_dim)
    queries, embed = shape_of(shapes, "visual.attn_pool.query")
    pooler_heads = settle("pooler_heads", hints.pooler_heads, vision.get("attn_pooler_heads", 8 if vision else 0), 8)
    if embed % pooler_heads:
        raise ConfigError(f"--pooler_heads={pooler_heads} does not divide the pooler's width {embed}")
    normal, chain = open_clip.preprocessing(preprocess)
    return dict(model=dict(image={k: v for k, v in image.items() if k != "tower"}, text=dict(words, class_mask="shifted"),
                           decoder=dict(layout="double", width=width, layers=layers, mlp_dim=mlp_dim, activation=activation,
                                        heads=open_clip.heads("decoder_heads", hints.decoder_heads, known_heads, width)),
                           poolers=dict(layout="open_clip", queries=queries, heads=pooler_heads), embed=embed, norm="layernorm", **normal,
                           beam_rule="open_clip", tokens=open_clip.tokens(vocab, section)),
                data=dict(size=pixels, length=found["length"], eval_augment=chain))


def write_config(config: Any, folder: pathlib.Path, names: Collection[str]) -> None:
    model = config.model
    if model.poolers.layout != "open_clip" or model.decoder.get("layout") != "double":
        raise ConfigError(f"open_clip's CoCa has no model.poolers.layout={model.poolers.layout!r} with decoder layout "
                          f"{model.decoder.get('layout', 'single')!r}; nearest: 'open_clip' with 'double'")
    if model.text.get("class_mask", "shifted") != "shifted":
        raise ConfigError(f"open_clip's CoCa reads its weights with model.text.class_mask='shifted', these were trained with {model.text.class_mask!r}")
    words = {**multimodal.VARIANTS.get(model.decoder.get("variant", ""), {}), **model.decoder}
    found = open_clip.model_cfg(config)
    found["vision_cfg"] |= dict(attentional_pool=True, attn_pooler_queries=model.poolers.queries, attn_pooler_heads=model.poolers.heads,
                                output_tokens=True)
    found["text_cfg"] |= dict(embed_cls=True, output_tokens=True)
    found["multimodal_cfg"] = dict(context_length=config.data.length, vocab_size=model.tokens.vocab, width=words["width"], heads=words["heads"],
                                   layers=words["layers"], attn_pooler_heads=model.poolers.heads)
    (folder / open_clip.CONFIG).write_text(json.dumps(dict(model_cfg=found | dict(custom_text=True),
                                                           preprocess_cfg=open_clip.preprocess_cfg(config)), indent=1))


RELEASE = Release("open_clip_coca", "coca", describe, rules, open_clip.IGNORED, open_clip.WEIGHTS, write_config,
                  library="open_clip", task="image-to-text")
