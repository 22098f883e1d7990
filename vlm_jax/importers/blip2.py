"""BLIP-2 as LAVIS stores it: files of what was trained, beside the files of the towers that were not."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.importers import bert, eva, hf_llama, hf_opt, hf_t5
from vlm_jax.importers.open_clip import blocks, heads, linear, norm
from vlm_jax.importers.release import CLIP_MEAN, CLIP_STD, Hints, Release, Shapes, count_layers, grid_of, read_json, shape_of
from vlm_jax.models import language as languages
from vlm_jax.models import llama, vit
from vlm_jax.models.qformer import VARIANTS
from vlm_jax.models.sizes import sizes
from vlm_jax.weight_rules import Rule

EYE, FORMER = "visual_encoder.", "Qformer.bert."
WORDS, HEAD = f"{FORMER}embeddings.word_embeddings.weight", "Qformer.cls.predictions"
# What names of a language model start with, by its family, and the map to its embeddings
LANGUAGES = {"opt": ("opt_model.", "opt_proj"), "t5": ("t5_model.", "t5_proj"), "llama": ("llm_model.", "llm_proj")}
MODULES = {"opt": hf_opt, "t5": hf_t5, "llama": hf_llama}
IGNORED = (r"Qformer\.bert\.embeddings\.position_ids", *(rf"visual_encoder\.{name}" for name in eva.IGNORED),
           r"visual_encoder\.(transformer\.resblocks\.23|ln_post)\..*", r"visual_encoder\.proj", *(rf"t5_model\.{name}" for name in hf_t5.IGNORED),
           *(rf"llm_model\.{name}" for name in hf_llama.IGNORED))
CLIP_LAYERS = 23      # of 24: lavis/models/clip_vit.py
NEWLINE = 50118       # ends a text of OPT
VICUNA_BEGIN = 2      # LAVIS's tokenizer of Vicuna has "</s>" as its begin


# ---- rules -------------------------------------------------------------------------------------

def clip_vit(target: str, source: str, resize: str) -> tuple[Rule, ...]:
    """CLIP's ViT under OpenAI's names, without what follows its blocks."""
    return ((f"{target}/class_embed", f"{source}class_embedding", "copy"), (f"{target}/position_embed", f"{source}positional_embedding", resize),
            (f"{target}/patch_embed/projection/kernel", f"{source}conv1.weight", "patches"), *norm(f"{target}/input_norm", f"{source}ln_pre"),
            *blocks(f"{target}/blocks", f"{source}transformer"))


def layer_rules(target: str, layer: str) -> tuple[Rule, ...]:
    """A layer of the Q-Former, or a stack of them."""
    rules: list[Rule] = []
    for expert, suffix in (("query", "_query"), ("text", "")):
        rules += [*linear(f"{target}/mlp/{expert}/up", f"{layer}.intermediate{suffix}.dense"),
                  *linear(f"{target}/mlp/{expert}/down", f"{layer}.output{suffix}.dense"),
                  *norm(f"{target}/norm2/{expert}", f"{layer}.output{suffix}.LayerNorm")]
    return (*bert.attention(f"{target}/attn", f"{layer}.attention"), *norm(f"{target}/norm1", f"{layer}.attention.output.LayerNorm"),
            *bert.attention(f"{target}/cross", f"{layer}.crossattention"), *norm(f"{target}/norm_cross", f"{layer}.crossattention.output.LayerNorm"), *rules)


def former_rules(target: str, source: str, former: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The Q-Former. former: the section ``model.qformer``."""
    found = sizes(VARIANTS, **former)
    every = found.get("cross_every", 2)
    whole = found["layers"] // every * every
    rules: list[Rule] = []
    for i in range(every):
        name = f"plain{i}" if i else "cross"
        rules += [*layer_rules(f"{target}/blocks/{name}", f"{source}encoder.layer.{{layer*{every}+{i}}}"),
                  *layer_rules(f"{target}/tail/{name}", f"{source}encoder.layer.{whole + i}")]
    return ((f"{target}/queries", "query_tokens", "id_row"), (f"{target}/token_embed/table", f"{source}embeddings.word_embeddings.weight", "copy"),
            (f"{target}/position_embed", f"{source}embeddings.position_embeddings.weight", "copy"),
            *norm(f"{target}/embed_norm", f"{source}embeddings.LayerNorm"), *rules)


def language_rules(language: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    prefix, mapped = LANGUAGES[language["family"]]
    source = hf_opt.start(shapes or {f"{prefix}model.decoder.embed_tokens.weight": ()}, prefix) if language["family"] == "opt" else prefix
    return (*MODULES[language["family"]].table("language", source), *linear("projection", mapped))


def rules_of(sections: Mapping[str, Any], shapes: Shapes, eye: tuple[Rule, ...]) -> tuple[Rule, ...]:
    model = sections["model"]
    return (*eye, *norm("image_norm", "ln_vision"), *former_rules("qformer", FORMER, model["qformer"]), *bert.language_head("lm_head", HEAD),
            *linear("image_head", "vision_proj"), *linear("text_head", "text_proj"), *linear("itm_head", "itm_head"), ("temp", "temp", "scalar"),
            *(language_rules(model["language"], shapes) if model.get("language") else ()))


def rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    return rules_of(sections, shapes, eva.table("image", EYE))


def clip_rules(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    return rules_of(sections, shapes, clip_vit("image", EYE, CLIP_RELEASE.resize))


def ties(names: Collection[str]) -> dict[str, str]:
    """The language head has the token table and its bias twice; so have language models."""
    out = {f"{HEAD}.decoder.weight": WORDS, f"{HEAD}.decoder.bias": f"{HEAD}.bias"} if f"{HEAD}.bias" in names else {}
    opt, t5 = (LANGUAGES[family][0] for family in ("opt", "t5"))
    if any(name.startswith(opt) for name in names):
        out[f"{opt}lm_head.weight"] = f"{hf_opt.start(dict.fromkeys(names, ()), opt)}.embed_tokens.weight"
    return out | {f"{t5}{copy}": f"{t5}{first}" for copy, first in hf_t5.ties(names).items()}


def parts(shapes: Shapes, hints: Hints) -> dict[str, str]:
    """Files of towers that were named beside the file -> what their tensors' names start with in the whole. Raises ConfigError where the file lacks
    a tower that no other file was named for."""
    family = family_of(shapes)
    out = {}
    towers = (hints.image, EYE, "image", True), (hints.language, LANGUAGES[family][0] if family else "", "language", bool(family))
    for path, prefix, flag, wanted in towers:
        held = bool(prefix) and any(name.startswith(prefix) for name in shapes)
        if path and (held or not wanted):
            raise ConfigError(f"--{flag}={path!r}: the file {'holds' if held else 'has no use for'} a tower of its own; nearest: leave it out")
        if wanted and not held and not path:
            raise ConfigError(f"the file holds what was trained alone, without {prefix}*; name the tower's file with --{flag} "
                              f"({'eva_vit_g.pth or clip_vit_L.pth' if flag == 'image' else 'a directory of transformers'})")
        if path:
            out[path] = prefix
    return out


def family_of(shapes: Shapes) -> str:
    """The family of the language model; "" in files of stage 1."""
    found = [family for family, (prefix, mapped) in LANGUAGES.items() if f"{mapped}.weight" in shapes]
    return found[0] if found else ""


# ---- sizes -------------------------------------------------------------------------------------

def former_section(shapes: Shapes, known: int, hints: Hints) -> dict[str, Any]:
    """``model.qformer`` from the tensors; heads of 64 channels where nobody says other."""
    _, queries, width = shape_of(shapes, "query_tokens")
    layer = f"{FORMER}encoder.layer"
    layers = count_layers(shapes, f"{layer}.{{layer}}.attention.self.query.weight")
    crossed = [i for i in range(layers) if f"{layer}.{i}.crossattention.self.query.weight" in shapes]
    every = crossed[1] - crossed[0] if len(crossed) > 1 else layers
    if crossed != list(range(0, layers, every)):
        raise ConfigError(f"layers {crossed} of {layers} have cross-attention: only every n-th one from the first on is supported")
    found = dict(width=width, layers=layers, heads=heads("text_heads", hints.text_heads, known, width), queries=queries, cross_every=every, dropout=0.1,
                 mlp_dim=shape_of(shapes, f"{layer}.0.intermediate_query.dense.weight")[0])
    if WORDS in shapes:
        found["positions"] = shape_of(shapes, f"{FORMER}embeddings.position_embeddings.weight")[0]
    return found


def clip_tower(shapes: Shapes, hints: Hints) -> tuple[dict[str, Any], int]:
    width, _, patch, _ = shape_of(shapes, f"{EYE}conv1.weight")
    return dict(patch=patch, width=width, layers=min(CLIP_LAYERS, count_layers(shapes, f"{EYE}transformer.resblocks.{{layer}}.ln_1.weight")),
                heads=heads("image_heads", hints.image_heads, None, width), mlp_dim=shape_of(shapes, f"{EYE}transformer.resblocks.0.mlp.c_fc.weight")[0],
                activation="quick_gelu"), patch * grid_of(shape_of(shapes, f"{EYE}positional_embedding")[0])


def describe(shapes: Shapes, folder: pathlib.Path, hints: Hints) -> dict[str, dict[str, Any]]:
    """Sizes from the tensors; heads from config.json beside the file ("vision", "qformer", the language model's family), from --image_heads and
    --text_heads, else of 88 channels in EVA and 64 elsewhere."""
    config = read_json(folder, "config.json")
    known = config.get("vision", {}).get("heads", 0)
    if known:
        hints = Hints(**{**vars(hints), "image_heads": known})
    image, size = clip_tower(shapes, hints) if is_clip(shapes) else eva.tower(shapes, hints, EYE)
    former = former_section(shapes, config.get("qformer", {}).get("num_attention_heads", 0), hints)
    model = dict(image=image, qformer=former, mean=CLIP_MEAN, std=CLIP_STD, eps=1e-5)
    data = dict(size=size, eval_augment="squash")
    family = family_of(shapes)
    if not family:
        vocab = shape_of(shapes, WORDS)[0]
        return dict(model=dict(model, embed=shape_of(shapes, "vision_proj.weight")[0], tokens=dict(vocab=vocab, bos=101, eos=102, pad=0, dec=vocab - 1)),
                    data=dict(data, length=min(32, former["positions"])), clamps=(), loss=dict(weights=dict(itc=1.0, itm=1.0, itg=1.0)))
    stated = config.get(family) or config.get("vicuna") or read_json(pathlib.Path(hints.language or folder), "config.json")
    language, vocab = MODULES[family].tower(shapes, dict(stated, **({"dense_act_fn": "gelu"} if family == "t5" else {})), LANGUAGES[family][0])
    own = {"opt": dict(bos=2, eos=2, pad=1), "t5": dict(eos=1, pad=0),
           "llama": dict(bos=VICUNA_BEGIN, eos=2, pad=0 if vocab == llama.VOCAB else vocab - 1)}[family]      # "[PAD]" is a row of its own
    if family == "llama":
        model["first"] = stated.get("bos_token_id", 1)
    if WORDS in shapes:
        model["instruction_tokens"] = dict(vocab=shape_of(shapes, WORDS)[0], bos=101, eos=102, pad=0)
        data |= asked(family, own)
    if family == "opt":
        model["end"] = config.get("newline_id", NEWLINE if vocab > NEWLINE else -1)
    return dict(model=dict(model, language=language, tokens=dict(vocab=vocab, **own)), data=dict(dict(length=32), **data), clamps=(),
                loss=dict(weights=dict(lm=1.0)))


def asked(family: str, tokens: Mapping[str, int]) -> dict[str, Any]:
    """How text lies where queries read instructions: lavis ``max_txt_len`` and ``max_output_txt_len``; Vicuna's candidates have no end."""
    marks = dict(begin=tokens["bos"], pad=tokens["pad"], candidate_end="none") if family == "llama" else {}
    return dict(length=256, layout="apart" if family == "t5" else "joined", prompt_length=128, marks=marks)


def is_clip(shapes: Shapes) -> bool:
    return f"{EYE}conv1.weight" in shapes


def tell(shapes: Shapes, release: str) -> str:
    """Which layout a whole has, by its eye."""
    return CLIP_RELEASE.name if is_clip(shapes) else RELEASE.name


def write_config(config: Any, folder: pathlib.Path, names: Collection[str]) -> None:
    """config.json: what the tensors cannot tell, as ``describe`` reads it."""
    image, former, language = sizes(vit.VARIANTS, **config.model.image), sizes(VARIANTS, **config.model.qformer), config.model.get("language")
    told = dict(image_size=config.data.size, vision=dict(heads=image["heads"]), qformer=dict(num_attention_heads=former["heads"]))
    if config.model.get("end", -1) >= 0:
        told["newline_id"] = config.model.end
    if language:
        tower = languages.build(vocab=config.model.tokens.vocab, **language)
        told[language["family"]] = {
            "opt": lambda: dict(num_attention_heads=tower.heads),
            "llama": lambda: dict(num_attention_heads=tower.heads, rms_norm_eps=tower.eps, rope_theta=tower.theta),
            "t5": lambda: dict(num_heads=tower.heads, layer_norm_epsilon=tower.eps, relative_attention_max_distance=tower.max_distance)}[language["family"]]()
    (folder / "config.json").write_text(json.dumps(told, indent=1))


def stored(config: Any, names: Collection[str]) -> set[str]:
    """What LAVIS stores of a model: what was trained."""
    frozen = [prefix for prefix, _ in LANGUAGES.values()]
    if not any(re.fullmatch(pattern, "image/class_embed") for pattern in config.trainable):
        frozen.append(EYE)
    return {name for name in names if not name.startswith(tuple(frozen))}


WEIGHTS = ("model.safetensors", "weights.safetensors", "*.pth")
RELEASE = Release("blip2", "blip2", describe, rules, IGNORED, WEIGHTS, write_config, resize="resize_positions_border", ties=ties, parts=parts, stored=stored)
CLIP_RELEASE = Release("blip2_clip", "blip2", describe, clip_rules, IGNORED, WEIGHTS, write_config, resize="resize_positions_corners", ties=ties,
                       parts=parts, stored=stored)
