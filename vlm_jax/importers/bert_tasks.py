"""What ALBEF and BLIP were fine-tuned into: answers to questions, classes of texts beside one image or two."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.importers import albef, bert, blip
from vlm_jax.importers.open_clip import linear, norm
from vlm_jax.importers.release import CLIP_MEAN, CLIP_STD, Hints, Release, Shapes, count_layers, grid_of, read_json, shape_of
from vlm_jax.models.bert import AVERAGED
from vlm_jax.weight_rules import Rule

WEIGHTS = ("model.safetensors", "weights.safetensors", "*.pth")
HEAD = "text_decoder{}.cls.predictions"
ENTAILMENT, STATEMENT = ("contradiction", "neutral", "entailment"), ("False", "True")     # ALBEF dataset/ve_dataset.py, nlvr_dataset.py


# ---- answers -----------------------------------------------------------------------------------

def answer_rules(names: Collection[str], lower: int, suffix: str = "") -> tuple[Rule, ...]:
    """The question's BERT has ``lower`` layers without cross-attention."""
    where, decoder = albef.prefix(names, f"text_encoder{suffix}"), albef.prefix(names, f"text_decoder{suffix}")
    layer = f"{decoder}.encoder.layer"
    return (*bert.timm_vit("image", f"visual_encoder{suffix}"), *bert.embeddings("text", f"{where}.embeddings"),
            *bert.layers("text/blocks", f"{where}.encoder.layer"), *bert.layers("text/blocks_cross", f"{where}.encoder.layer", lower),
            *bert.embeddings("decoder", f"{decoder}.embeddings"), *bert.attention("decoder/blocks_cross/decoder_attn", f"{layer}.{{layer}}.attention"),
            *norm("decoder/blocks_cross/decoder_norm1", f"{layer}.{{layer}}.attention.output.LayerNorm"), *bert.layers("decoder/blocks_cross", layer),
            *bert.language_head("lm_head", HEAD.format(suffix)))


def rules_of_answers(sections: Mapping[str, Any], shapes: Shapes) -> tuple[Rule, ...]:
    lower, names = albef.lower_layers(sections["model"]["text"]), shapes or WRITTEN
    return (*answer_rules(names, lower), *taught(answer_rules(names, lower, "_m"), shapes, "visual_encoder_m.cls_token"))


WRITTEN = ("text_encoder.embeddings.word_embeddings.weight", "text_encoder_m.embeddings.word_embeddings.weight")     # how an export names its texts


def taught(rules: tuple[Rule, ...], shapes: Shapes, sign: str) -> tuple[Rule, ...]:
    """The same rules for the slow copies, where the file has them."""
    return tuple((f"carry/teacher/{target}", source, how) for target, source, how in rules) if not shapes or sign in shapes else ()


def ties_of_answers(names: Collection[str]) -> dict[str, str]:
    out = {}
    for suffix in ("", "_m"):
        head, decoder = HEAD.format(suffix), albef.prefix(names, f"text_decoder{suffix}")
        if f"{head}.bias" in names:
            out |= {f"{head}.decoder.weight": f"{decoder}.embeddings.word_embeddings.weight", f"{head}.decoder.bias": f"{head}.bias"}
    return out


def describe_answers(shapes: Shapes, folder: pathlib.Path, hints: Hints, family: str) -> dict[str, dict[str, Any]]:
    image, text, tokens = towers(shapes, folder, hints, family)
    decoder, _ = albef.text_section(shapes, albef.prefix(shapes, "text_decoder"), stated(folder, family), hints)
    distilled = {"alpha": 0.4} if "visual_encoder_m.cls_token" in shapes else {}
    of = dict(albef=dict(loss=dict(distilled, rank_by="first_and_sequence"), model=dict(answer_ends=2)),
              blip=dict(loss=dict(rank_by="sequence", label_smoothing=0.1), model={}))[family]
    data = dict(data_of(shapes, image, text, 35 if family == "blip" else 30), answers=10, answer_length=10)
    return dict(model=dict(image=image, text=text, decoder={k: v for k, v in decoder.items() if k != "cross_layers"}, mean=CLIP_MEAN, std=CLIP_STD,
                           paper=PAPERS[family], tokens=tokens, **of["model"]), data=data, clamps=(), loss=dict(of["loss"], weights=dict(answer=1.0)))


# ---- classes -----------------------------------------------------------------------------------

def classify_rules(names: Collection[str], family: str, text: Mapping[str, Any], suffix: str = "") -> tuple[Rule, ...]:
    where = albef.prefix(names, f"text_encoder{suffix}")
    layer, lower = f"{where}.encoder.layer", albef.lower_layers(text)
    rules = [*bert.timm_vit("image", f"visual_encoder{suffix}"), *bert.embeddings("text", f"{where}.embeddings"), *bert.layers("text/blocks", layer),
             *linear("head/dense", f"cls_head{suffix}.0"), *linear("head/out", f"cls_head{suffix}.2"), *linear("head", "ta_head"), *linear("image_head", f"vision_proj{suffix}")]
    if family == "blip":
        for stack, first in (("blocks_cross", 0), ("blocks_merge", AVERAGED)):
            rules += [*twins(f"text/{stack}", f"{layer}.{{layer+{first}}}"), *bert.layers(f"text/{stack}", layer, first)]
    elif text.get("pairing") == "alternate":
        for which, offset in (("first", 0), ("second", 1)):
            rules += [(target.replace("text/pair", f"text/blocks_pair/{which}"), source.replace("{layer+0}", f"{{layer*2+{lower + offset}}}"), how)
                      for target, source, how in bert.layers("text/pair", layer)]
    else:
        rules += bert.layers("text/blocks_cross", layer, lower)
    return tuple(rules)


def twins(target: str, layer: str) -> tuple[Rule, ...]:
    """Two cross-attentions, each with an output of its own, and what joins them."""
    source = f"{layer}.crossattention"
    rules = [(path, name.replace(".self.", f".self{i}.").replace(".output.dense.", f".output.dense{i}."), how)
             for i, role in enumerate(("cross", "cross_other")) for path, name, how in bert.attention(f"{target}/{role}", source)]
    return (*rules, *linear(f"{target}/merge", f"{source}.output.merge_layer"))


def describe_classes(shapes: Shapes, folder: pathlib.Path, hints: Hints, family: str, pairs: bool) -> dict[str, dict[str, Any]]:
    assigned = "ta_head.weight" in shapes
    image, text, tokens = towers(shapes, folder, hints, family)
    if pairs and family == "albef":
        crossed = text["cross_layers"]
        if crossed % 2:
            raise ConfigError(f"{crossed} layers with cross-attention are no pairs: is it a model of two images (--release=albef_ve)?")
        text |= dict(pairing="alternate", cross_layers=crossed // 2, layers=text["layers"] - crossed // 2)
    elif pairs:
        text |= dict(pairing="twin")
    classes = shape_of(shapes, "ta_head.weight" if assigned else "cls_head.2.weight")[0]
    alpha = {"alpha": 0.4} if "cls_head_m.0.weight" in shapes else {}
    data = data_of(shapes, image, text, 40 if family == "blip" else 30)
    if not assigned:
        names = {2: STATEMENT, 3: ENTAILMENT}.get(classes, tuple(map(str, range(classes))))
        data |= dict(classes=names, **(dict(images=2) if pairs else {}))
    model = dict(image=image, text=text, classes=classes, mean=CLIP_MEAN, std=CLIP_STD, paper=PAPERS[family], tokens=tokens)
    if assigned:
        model |= dict(head="linear", embed=shape_of(shapes, "vision_proj.weight")[0])
    return dict(model=model, data=data, clamps=(), loss=dict(alpha, weights=dict(cls=1.0), **(dict(targets="assignment") if assigned else {})))


def rules_of_classes(sections: Mapping[str, Any], shapes: Shapes, family: str) -> tuple[Rule, ...]:
    text, names = sections["model"]["text"], shapes or WRITTEN
    return (*classify_rules(names, family, text), *taught(classify_rules(names, family, text, "_m"), shapes, "cls_head_m.0.weight"))


def ties_of_pairs(names: Collection[str]) -> dict[str, str]:
    """The second layer of a pair looks at its image with the first one's keys and values."""
    out = {}
    for suffix in ("", "_m"):
        where = f"{albef.prefix(names, f'text_encoder{suffix}')}.encoder.layer."
        crossed = sorted(int(n.removeprefix(where).split(".")[0]) for n in names if n.startswith(where) and n.endswith(".crossattention.self.query.weight"))
        out |= {f"{where}{second}.crossattention.self.{role}.{leaf}": f"{where}{first}.crossattention.self.{role}.{leaf}"
                for first, second in zip(crossed[::2], crossed[1::2]) for role in ("key", "value") for leaf in ("weight", "bias")}
    return out


# ---- both --------------------------------------------------------------------------------------

PAPERS = {"albef": "2107.07651", "blip": "2201.12086"}


def stated(folder: pathlib.Path, family: str) -> Mapping[str, Any]:
    """The text's configuration beside the file, if any."""
    config, (inside, beside) = read_json(folder, "config.json"), {"albef": ("bert_config", "config_bert.json"), "blip": ("med_config", "med_config.json")}[family]
    return config.get(inside) or config.get("text_config") or read_json(folder, beside)


def towers(shapes: Shapes, folder: pathlib.Path, hints: Hints, family: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """(image section, text section, tokens)."""
    config = read_json(folder, "config.json")
    image_heads = config.get("vision_heads") or (config.get("vision") or {}).get("heads") or (config.get("vision_config") or {}).get("num_attention_heads")
    width, _, patch, _ = shape_of(shapes, "visual_encoder.patch_embed.proj.weight")
    image = dict(patch=patch, width=width, layers=count_layers(shapes, "visual_encoder.blocks.{layer}.norm1.weight"),
                 heads=albef.heads("image_heads", hints.image_heads, image_heads, width),
                 mlp_dim=shape_of(shapes, "visual_encoder.blocks.0.mlp.fc1.weight")[0], patch_bias=True, norms_at=("output",), eps=1e-6, init_scheme="bert")
    if family == "blip":
        image["drop_path"] = 0.1
        shapes = {name.replace(".self0.", ".self."): shape for name, shape in shapes.items()}
    text, found = albef.text_section(shapes, albef.prefix(shapes), stated(folder, family), hints)
    tokens = found["tokens"]
    if family == "blip":
        tokens = {k: v for k, v in tokens.items() if k != "mask"} | dict(dec=tokens["vocab"] - 2, enc=tokens["vocab"] - 1)
    return image, text, tokens


def data_of(shapes: Shapes, image: Mapping[str, Any], text: Mapping[str, Any], length: int) -> dict[str, Any]:
    return dict(size=image["patch"] * grid_of(shape_of(shapes, "visual_encoder.pos_embed")[1]), length=min(length, text["positions"]), eval_augment="squash")


def releases(family: str, write_config: Callable[..., None], ignored: tuple[str, ...]) -> tuple[Release, ...]:
    """The fine-tuned layouts of a family."""
    def layout(name, system, describe, rules, ties, ignored=ignored):
        return Release(f"{family}_{name}", system, describe, rules, ignored, WEIGHTS, write_config, resize="resize_positions_border", ties=ties)

    def classes(name, pairs, ties=lambda names: {}):
        return layout(name, "bert_classify", lambda shapes, folder, hints: describe_classes(shapes, folder, hints, family, pairs),
                      lambda sections, shapes: rules_of_classes(sections, shapes, family), ties,
                      (*ignored, r"text_proj\..*", "temp"))      # pretrain_model_nlvr.pth has them and never uses them
    made = [layout("vqa", "bert_vqa", lambda shapes, folder, hints: describe_answers(shapes, folder, hints, family), rules_of_answers, ties_of_answers)]
    if family == "albef":
        return (*made, classes("ve", False), classes("nlvr", True, ties_of_pairs))
    return (*made, classes("nlvr", True))


def face_release() -> Release:
    """Hugging Face's BlipForQuestionAnswering."""
    def describe(shapes, folder, hints):
        back = {blip.to_face(name): name for name in blip.original_names(shapes)}
        return describe_answers({back.get(name, name): shape for name, shape in shapes.items()}, folder, hints, "blip")

    def rules(sections, shapes):
        return tuple((target, blip.to_face(source), how) for target, source, how in answer_rules(shapes or WRITTEN, 0))

    return Release("hf_blip_vqa", "bert_vqa", describe, rules, blip.IGNORED, blip.FACE_RELEASE.weights_files, blip.write_face_config,
                   resize="resize_positions_border", ties=ties_of_answers, library=blip.FACE_RELEASE.library, task="visual-question-answering")


def tell(shapes: Shapes, family: str) -> str:
    """Which layout of a family ("albef", "blip", "hf_blip") a file has, by its tensors."""
    if any(name.startswith("text_decoder.") for name in shapes) and "text_encoder.cls.predictions.bias" not in shapes and "vision_proj.weight" not in shapes:
        return f"{family}_vqa" if any(name.startswith("text_encoder.") for name in shapes) else family
    if "ta_head.weight" in shapes or family == "blip" and any(".crossattention.self0." in name for name in shapes):
        return f"{family}_nlvr"
    if "cls_head.2.weight" in shapes:
        return f"{family}_nlvr" if shape_of(shapes, "cls_head.2.weight")[0] == 2 else f"{family}_ve"
    return family


RELEASES = (*releases("albef", albef.write_config, albef.IGNORED), *releases("blip", blip.write_config, blip.IGNORED), face_release())
