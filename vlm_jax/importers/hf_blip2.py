"""Hugging Face's BLIP-2 and InstructBLIP: ``Blip2ForConditionalGeneration`` (and ``Blip2Model``, which has the same tensors), ``Blip2ForImageTextRetrieval``,
``InstructBlipForConditionalGeneration``."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.importers import blip2, hf_llama, hf_t5
from vlm_jax.importers.hf_llama import WEIGHTS
from vlm_jax.importers.release import CLIP_MEAN, CLIP_STD, Hints, Release, Shapes, read_json, shape_of
from vlm_jax.models import language as languages
from vlm_jax.models import llama, opt, vit
from vlm_jax.models.qformer import VARIANTS
from vlm_jax.models.sizes import sizes
from vlm_jax.weight_rules import Rule

TYPES = ("blip-2", "instructblip")
# LAVIS's name of a part -> Hugging Face's; the first that fits a name's beginning. The language model's parts have one name for all families.
NAMES = (("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"), ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
         ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"), ("visual_encoder.blocks", "vision_model.encoder.layers"),
         ("ln_vision", "vision_model.post_layernorm"), ("Qformer.bert.encoder", "qformer.encoder"), ("vision_proj", "vision_projection"),
         ("text_proj", "text_projection"), *((f"{mapped}.", "language_projection.") for _, mapped in blip2.LANGUAGES.values()),
         *((prefix, "language_model.") for prefix, _ in blip2.LANGUAGES.values()))
# Where the Q-Former's embeddings are
EMBEDDINGS = {"blip-2": (("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm"), ("Qformer.bert.embeddings", "embeddings")),
              "instructblip": (("Qformer.bert.embeddings.LayerNorm", "qformer.embeddings.layernorm"), ("Qformer.bert.embeddings", "qformer.embeddings"))}
PARTS = ((".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."), (".attn.qkv", ".self_attn.qkv"), (".attn.proj", ".self_attn.projection"),
         ("attention.self.", "attention.attention."))
LANGUAGE = "language_model."
# Bias of the keys: there, and always zero; the softmax does not see it
KEY_BIAS, QUERY_BIAS = "image/blocks/attn/key/bias", "image/blocks/attn/query/bias"
# What stage 1 has and their model of retrieval lacks
STAGE_1 = ("temp", "lm_head/bias", *(f"lm_head/{leaf}" for leaf in ("dense/kernel", "dense/bias", "norm/scale", "norm/bias")))
# Ids that stand for the queries: the first behind the vocabulary, where the table is longer
IMAGE_TOKENS = {"opt": 50265, "t5": 32100, "llama": 32001}


# ---- rules -------------------------------------------------------------------------------------

def to_face(name: str, kind: str) -> str:
    """Hugging Face's name of a tensor of LAVIS."""
    start, new = next(((old, new) for old, new in (*EMBEDDINGS[kind], *NAMES) if name.startswith(old)), ("", ""))
    name = new + name[len(start):]
    if name.startswith(LANGUAGE):
        return name
    for old, new in PARTS:
        name = name.replace(old, new)
    return name


def to_lavis(shapes: Shapes, kind: str, family: str) -> dict[str, tuple[int, ...]]:
    """Tensor shapes under LAVIS's names, by which sizes are told."""
    prefix, mapped = blip2.LANGUAGES[family or "opt"]
    back = (*((new, old) for old, new in (*EMBEDDINGS[kind], *NAMES) if new not in (LANGUAGE, "language_projection.")),
            ("language_projection.", f"{mapped}."), (LANGUAGE, prefix))
    out = {}
    for name, shape in shapes.items():
        start, new = next(((old, new) for old, new in back if name.startswith(old)), ("", ""))
        found = new + name[len(start):]
        if not name.startswith(LANGUAGE):
            for ours, theirs in PARTS:
                found = found.replace(theirs, ours)
        out[found.replace("attn.qkv.bias", "attn.q_bias")] = shape
    return out


def kind_of(sections: Mapping[str, Any]) -> str:
    return "instructblip" if sections["model"].get("instruction_tokens") else "blip-2"


def rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    """Raises ConfigError for an eye that theirs is not."""
    image = sizes(vit.VARIANTS, **sections["model"]["image"])
    told = dict(stem=image.get("stem", "patch"), norms=tuple(image.get("norms_at", ("input", "output"))), activation=image.get("activation", "gelu"))
    if told != dict(stem="patch", norms=(), activation="gelu"):
        raise ConfigError(f"transformers' BLIP-2 has EVA's ViT, this eye has {told}; nearest: --export=blip2")
    kind, out = kind_of(sections), []
    for target, source, how in blip2.rules(sections, ()):
        if target in (QUERY_BIAS, QUERY_BIAS.replace("query", "value")):
            continue
        out.append((target, to_face(source, kind), how))
    biases = tuple((QUERY_BIAS.replace("query", role), f"vision_model.encoder.layers.{{layer}}.self_attn.qkv.bias[{i}/3]", "heads")
                   for i, role in enumerate(("query", "key", "value")))
    return (*biases, *out)


def ties(names: Collection[str]) -> dict[str, str]:
    out = {f"{LANGUAGE}lm_head.weight": f"{LANGUAGE}model.decoder.embed_tokens.weight"} if f"{LANGUAGE}model.decoder.embed_tokens.weight" in names else {}
    return out | {f"{LANGUAGE}{copy}": f"{LANGUAGE}{first}" for copy, first in hf_t5.ties(names).items()}


# ---- sizes -------------------------------------------------------------------------------------

def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    config = read_json(folder, "config.json")
    if config.get("model_type") not in TYPES:
        raise ConfigError(f"config.json: model_type={config.get('model_type')!r} is not supported; nearest: {TYPES[0]!r}")
    kind, words = config["model_type"], config.get("text_config") or {}
    family = words.get("model_type", "opt") if "language_projection.weight" in shapes else ""
    if family and family not in blip2.LANGUAGES:
        raise ConfigError(f"config.json: text_config.model_type={family!r} is not supported; nearest: {'opt'!r}")
    found, (vision, former) = to_lavis(shapes, kind, family), (config.get(f"{part}_config") or {} for part in ("vision", "qformer"))
    for section, name, value in ((vision, "vision", "gelu"), (former, "qformer", "gelu")):
        if section.get("hidden_act", value) != value:
            raise ConfigError(f"config.json: {name}_config.hidden_act={section['hidden_act']!r} is not supported; nearest: {value!r}")
    hints = Hints(**{**vars(hints), "image_heads": hints.image_heads or vision.get("num_attention_heads", 16)})
    eps = float(vision.get("layer_norm_eps", 1e-6))
    image, size = blip2.eva.tower(found, hints, blip2.EYE)
    normal = read_json(folder, "preprocessor_config.json") or read_json(folder, "processor_config.json").get("image_processor") or {}      # since version 5
    model = dict(image=dict(image, eps=eps), qformer=dict(blip2.former_section(found, former.get("num_attention_heads", 12), hints),
                                                          eps=float(former.get("layer_norm_eps", 1e-12))),
                 mean=tuple(normal.get("image_mean", CLIP_MEAN)), std=tuple(normal.get("image_std", CLIP_STD)), eps=eps)
    if config.get("image_token_index") is not None:
        model["image_token"] = config["image_token_index"]
    data = dict(size=size, eval_augment="squash", length=32)
    if not family:
        vocab = shape_of(found, blip2.WORDS)[0]
        return dict(model=dict(model, embed=shape_of(found, "vision_proj.weight")[0], tokens=dict(vocab=vocab, bos=101, eos=102, pad=0, dec=vocab - 1)),
                    data=dict(data, length=min(32, model["qformer"]["positions"])), clamps=(), loss=dict(weights=dict(itc=1.0, itm=1.0)))
    language, vocab = blip2.MODULES[family].tower(found, {"model_type": family, **words}, blip2.LANGUAGES[family][0])
    ends = {**words, **{k: v for k, v in read_json(folder, "generation_config.json").items() if v is not None}}
    pad = words.get("pad_token_id")
    if family == "opt":
        begin = words.get("bos_token_id", 2)
        tokens = dict(bos=begin, eos=begin, pad=1 if pad is None else pad)
        model["end"] = -1 if ends.get("eos_token_id", begin) == begin else ends["eos_token_id"]
    elif family == "t5":
        tokens = dict(eos=words.get("eos_token_id", 1), pad=pad or 0)
    else:      # prompts begin with the end: so their saved tokenizer says, and config.json does not
        tokens = dict(bos=blip2.VICUNA_BEGIN, eos=words.get("eos_token_id", 2), pad=pad if pad is not None and 0 <= pad < vocab else 0)
        model["first"] = words.get("bos_token_id", 1)
    if kind == "instructblip":
        model["instruction_tokens"] = dict(vocab=shape_of(found, blip2.WORDS)[0], bos=101, eos=102, pad=0)
        data |= blip2.asked(family, tokens)
    return dict(model=dict(model, language=language, tokens=dict(vocab=vocab, **tokens)), data=data, clamps=(), loss=dict(weights=dict(lm=1.0)))


# ---- configs -----------------------------------------------------------------------------------

def text_config(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(text_config, generation_config.json) of the language model."""
    tokens, section = config.model.tokens, config.model.language
    tower, family = languages.build(vocab=tokens.vocab, **section), section["family"]
    end = config.model.end if config.model.get("end", -1) >= 0 else tokens.eos
    first = config.model.first if config.model.get("first", -1) >= 0 else tokens.get("bos", 1)
    ends = dict(bos_token_id=first, eos_token_id=end, pad_token_id=tokens.pad)
    if isinstance(tower, opt.Opt):
        own = dict(hidden_size=tower.width, word_embed_proj_dim=tower.width, num_hidden_layers=tower.layers, num_attention_heads=tower.heads,
                   ffn_dim=tower.mlp_dim, max_position_embeddings=tower.positions, activation_function="relu", do_layer_norm_before=True,
                   tie_word_embeddings=True)
    elif isinstance(tower, llama.Llama):
        own = dict(hidden_size=tower.width, intermediate_size=tower.mlp_dim, num_hidden_layers=tower.layers, num_attention_heads=tower.heads,
                   num_key_value_heads=tower.heads, rms_norm_eps=tower.eps, rope_theta=tower.theta, max_position_embeddings=2048, hidden_act="silu",
                   tie_word_embeddings=False)
    else:
        own = dict(d_model=tower.width, d_kv=tower.head_dim, d_ff=tower.mlp_dim, num_layers=tower.layers,
                   num_decoder_layers=tower.decoder_layers or tower.layers, num_heads=tower.heads, relative_attention_num_buckets=tower.buckets,
                   relative_attention_max_distance=tower.max_distance, layer_norm_epsilon=tower.eps, feed_forward_proj="gated-gelu", is_gated_act=True,
                   dense_act_fn=next(theirs for theirs, ours in hf_t5.ACTIVATIONS.items() if ours == tower.activation), dropout_rate=0.1,
                   tie_word_embeddings=False, scale_decoder_outputs=False, is_encoder_decoder=True, decoder_start_token_id=tokens.pad)
        ends |= dict(bos_token_id=1, decoder_start_token_id=tokens.pad)      # as their conversion has it
    return dict(own, model_type=family, vocab_size=tokens.vocab, **ends), ends


def image_token(config: Any, family: str) -> int:
    """The id that stands for a query in texts of transformers: the import's own, the first behind the vocabulary, else one that no text has."""
    kept, vocab = config.model.get("image_token", -1), config.model.tokens.vocab
    if kept >= 0:
        return kept
    if family != "llama":
        return min(IMAGE_TOKENS[family], vocab - 1)
    return IMAGE_TOKENS[family] if vocab > IMAGE_TOKENS[family] else 0      # "<unk>", which a vocabulary with all bytes never gives


def write_config(config: Any, folder: pathlib.Path, names: Collection[str]) -> None:
    """config.json, generation_config.json, preprocessor_config.json, processor_config.json. There is one eps for the eye and the norm behind it."""
    model = config.model
    image, former = sizes(vit.VARIANTS, **model.image), sizes(VARIANTS, **model.qformer)
    kind = "instructblip" if model.get("instruction_tokens") else "blip-2"
    second = bool(model.get("language"))
    vision = dict(model_type=f"{kind.replace('-', '_')}_vision_model", hidden_size=image["width"], intermediate_size=image["mlp_dim"],
                  num_hidden_layers=image["layers"], num_attention_heads=image["heads"], image_size=config.data.size, patch_size=image["patch"],
                  hidden_act="gelu", layer_norm_eps=image.get("eps", 1e-6), qkv_bias=True)
    vocab = model.instruction_tokens.vocab if kind == "instructblip" else 30522 if second else model.tokens.vocab
    qformer = dict(model_type=f"{kind.replace('-', '_')}_qformer", hidden_size=former["width"], num_hidden_layers=former["layers"],
                   num_attention_heads=former["heads"], intermediate_size=former["mlp_dim"], cross_attention_frequency=former.get("cross_every", 2),
                   encoder_hidden_size=image["width"], vocab_size=vocab, max_position_embeddings=former.get("positions", 512), hidden_act="gelu",
                   layer_norm_eps=former.get("eps", 1e-12), pad_token_id=0, **({} if kind == "instructblip" else {"use_qformer_text_input": not second}))
    told = dict(model_type=kind, vision_config=vision, qformer_config=qformer, num_query_tokens=former["queries"], torch_dtype="float32")
    processor = "InstructBlipProcessor" if kind == "instructblip" else "Blip2Processor"
    if second:
        words, ends = text_config(config)
        token = image_token(config, words["model_type"])
        told |= dict(architectures=["InstructBlipForConditionalGeneration" if kind == "instructblip" else "Blip2ForConditionalGeneration"],
                     text_config=words, image_token_index=token)
        (folder / "generation_config.json").write_text(json.dumps(ends, indent=1))
    else:
        token = model.get("image_token", -1)
        told |= dict(architectures=["Blip2ForImageTextRetrieval"], image_text_hidden_size=model.get("embed", 256),
                     **({"image_token_index": token} if token >= 0 else {}))
    (folder / "config.json").write_text(json.dumps(told, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="BlipImageProcessor", processor_class=processor, do_resize=True, size=dict(height=config.data.size, width=config.data.size),
        resample=3, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=list(model.mean), image_std=list(model.std),
        do_convert_rgb=True), indent=1))
    queries = former["queries"] if second or token >= 0 else None
    (folder / "processor_config.json").write_text(json.dumps(dict(processor_class=processor, num_query_tokens=queries)))


IGNORED = (r".*\.position_ids", *(rf"language_model\.{name}" for name in (*hf_t5.IGNORED, *hf_llama.IGNORED)))
RELEASE = Release("hf_blip2", "blip2", describe, rules, IGNORED,
                  ("model.safetensors", *(name for name in WEIGHTS if name != "model.safetensors")), write_config, resize="resize_positions_border", ties=ties,
                  given={"temp": 0.07, **dict.fromkeys(STAGE_1[1:], 0.0)}, zeros={KEY_BIAS: QUERY_BIAS}, library="transformers", task="image-text-to-text")
