"""Brings official weights in, and takes ours out.

python -m vlm_jax.importers.cli --release=openai_clip --src=ViT-B-32.pt --out=DIR
python -m vlm_jax.importers.cli --release=open_clip --src=hf:laion/CLIP-ViT-B-32-laion2B-s34B-b79K --out=DIR
python -m vlm_jax.importers.cli --export=hf_clip --src=DIR --out=DIR2 [--push=hf:OWNER/NAME]

An imported directory is what vlm_jax.load, vlm_jax.predict and a config's init= take:

    DIR/config.json      a stage config with the model's sizes
       /checkpoints/     the weights, fp32 (or bf16, by --dtype)
       /tokenizer/       where the source, an installed package or --tokenizer gave one
       /import.json      release, every tensor's dtype and shape, what was ignored
       /provenance.json  source files with their SHA-256, licence (vlm_jax/provenance.py)

An export's model card (README.md) carries the licence on.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax import config as configs
from vlm_jax import provenance, weight_rules
from vlm_jax.data import tokenizers
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.importers import (
    albef,
    beit3,
    bert_tasks,
    blip,
    blip2,
    card,
    eva,
    hf_bert,
    hf_blip2,
    hf_clip,
    hf_llama,
    hf_opt,
    hf_t5,
    hub,
    open_clip,
    open_clip_coca,
    openai_clip,
    read,
    timm_vit,
    tokenizer_files,
    vlmo,
    vqkd,
    write,
)
from vlm_jax.importers.release import Hints, Release, read_json, settle

RELEASES = {r.name: r for r in (openai_clip.RELEASE, open_clip.RELEASE, open_clip_coca.RELEASE, hf_clip.RELEASE, albef.RELEASE,
                                blip.RELEASE, blip.FACE_RELEASE, *bert_tasks.RELEASES, hf_bert.RELEASE, timm_vit.RELEASE, eva.RELEASE,
                                hf_opt.RELEASE, hf_llama.RELEASE, hf_t5.RELEASE, blip2.RELEASE, blip2.CLIP_RELEASE, hf_blip2.RELEASE,
                                vqkd.RELEASE, beit3.RELEASE, vlmo.RELEASE, vlmo.BEIT_RELEASE)}
EXPORTS = {name: r for name, r in RELEASES.items() if r.write_config}
# Layouts of a name's family, told apart by their tensors
FAMILIES = {**dict.fromkeys(("albef", "blip", "hf_blip"), bert_tasks.tell), "blip2": blip2.tell}
RECORD = "import.json"
INDEX = "model.safetensors.index.json"      # in the files that a loader looks for: it reads shards
DTYPES = ("float32", "bfloat16")


class Floats(collections.abc.Mapping):
    """The file's tensors in one dtype, read one at a time."""

    def __init__(self, tensors: Mapping[str, read.Tensor], dtype: np.dtype):
        self.tensors, self.dtype = tensors, dtype

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name].read().astype(self.dtype)

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def import_release(release: str, src: str, out: str | pathlib.Path, hints: Hints | None = None, tokenizer: str = "",
                   licence: str = "", say=print, dtype: str = "float32") -> pathlib.Path:
    """Imports a release's file or directory (or "hf:OWNER/NAME[@REVISION]") into the directory ``out``.

    ``release`` "" finds out from the config files of a hub snapshot. ``licence``: of the weights, where the source does not
    state it. ``dtype``: of the stored weights, a name in ``DTYPES``; "bfloat16" halves what a large tower needs that is called
    or frozen. Raises ConfigError: nothing is written then.
    """
    out, hints = pathlib.Path(out), hints or Hints()
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out={str(out)!r} is not empty: name a new directory")
    source: dict[str, Any] = {"path": src}
    if src.startswith("hf:"):
        path, source["commit"] = hub.snapshot(src)
    else:
        path = pathlib.Path(src)
    if not path.exists():
        raise ConfigError(f"--src={src!r} does not exist")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype={dtype!r} is not known{nearest(dtype, DTYPES)}")
    folder = path if path.is_dir() else path.parent
    release = release or guess_release(folder)
    if release not in RELEASES:
        raise ConfigError(f"--release={release!r} is not known{nearest(release, RELEASES)}")
    layout = RELEASES[release]
    if src.startswith("hf:"):
        path = hub.weights(src, source["commit"], layout.weights_files)
    stated, link = card.stated_licence(folder, hub.parse(src)[0] if "commit" in source else "", source.get("commit", ""))
    licence = settle("licence", provenance.join_licences([licence]), None if stated in card.UNNAMED else stated,
                     layout.licence or stated or provenance.UNKNOWN)
    tensors = read.open_weights(path, prefer=layout.weights_files)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    own, files = list(tensors), read.files_of(path, prefer=layout.weights_files)
    for part, prefix in layout.parts(shapes, hints).items():
        tensors |= {prefix + name: tensor for name, tensor in read.open_weights(part, prefer=hf_llama.WEIGHTS).items()}
        files += read.files_of(part, prefer=hf_llama.WEIGHTS)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if release in FAMILIES:
        release = FAMILIES[release](shapes, release)
        layout = RELEASES[release]
    sections = layout.describe(shapes, folder, hints)
    if hints.size:
        sections["data"]["size"] = hints.size
    found = other = None
    if "tokens" in sections["model"]:
        words, beside = release, folder
        if "language" in sections["model"]:
            words, beside = f"hf_{sections['model']['language']['family']}", pathlib.Path(hints.language or folder)
        found = tokenizer_files.find(words, beside, tokenizer, sections["model"]["tokens"], sections["model"].get("text", {}).get("end", ""), say)
    if "instruction_tokens" in sections["model"]:
        other = tokenizer_files.of_instructions(folder, sections["model"]["instruction_tokens"], say)
        if other is not None:
            sections["data"] |= dict(instruction_tokenizer="instruction_tokenizer", instruction_length=sections["data"]["prompt_length"])
            sections["model"]["instruction_tokens"] |= dict(bos=other.bos_id, eos=other.eos_id, pad=other.pad_id)
    config = stage_config(layout, sections, found)
    import jax

    from vlm_jax import stage as stages
    from vlm_jax.train import checkpoint

    stage = stages.resolve(config, "import", found, other)
    table = layout.rules(sections, shapes)
    carry = {f"carry/{p}": x for p, x in stages.carry_shapes(stage).items() if any(re.fullmatch(rule[0], f"carry/{p}") for rule in table)}
    targets = {p: x.shape for p, x in {**stage.plan.shapes, **stage.plan.moving, **carry}.items()}
    tied = check_ties(layout.ties(shapes), tensors)
    given = {p: value for p, value in layout.given.items() if (weight_rules.first_match(table, p) or (0, "", ""))[1] not in tensors}
    held = {p: shape for p, shape in targets.items() if p not in given}
    leaves, ignored = weight_rules.import_leaves(table, layout.ignored, held, Floats({n: t for n, t in tensors.items() if n not in tied}, write.dtype_of(dtype)), f"{release}: {src}")
    leaves |= {p: np.full(targets[p], value, np.float32) for p, value in given.items() if p in targets}
    out.mkdir(parents=True, exist_ok=True)
    with checkpoint.Checkpointer(out / "checkpoints", keep=1) as keeper:
        keeper.save(0, {"params": {p: leaves[p] for p in stage.plan.shapes}, "moving": {p: leaves[p] for p in stage.plan.moving},
                        "carry": {p.removeprefix("carry/"): leaves[p].astype(x.dtype) for p, x in carry.items()}}, lent=True)
    for name, kept in (("tokenizer", found), ("instruction_tokenizer", other)):
        if kept is not None:
            kept.save(str(out / name))
    source = {"release": release, **source, "sha256": {f.name: sha256(f) for f in files}}
    provenance.write(out, {"system": config.system, "papers": list(stage.system.papers), "licence": licence,
                           **({"licence_link": link} if link else {}), "source": source, "starts": [provenance.start(jax.devices())]})
    record = {"release": release, **({"own": sorted(own)} if len(own) < len(tensors) else {}), "resize": layout.resize,
              "hints": {k: v for k, v in dataclasses.asdict(hints).items() if v},
              "ignored": sorted(ignored),
              "tensors": {name: [str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())}}
    (out / RECORD).write_text(json.dumps(record, indent=1))
    (out / "config.json").write_text(configs.to_json(stage.config))      # last: a directory with it is whole
    count = sum(int(np.prod(x.shape, dtype=np.int64)) for x in stage.plan.shapes.values())
    say(f"{out}: {release}, {count:,} parameters from {len(tensors) - len(ignored)} tensors"
        + (f" ({len(ignored)} ignored: {', '.join(sorted(ignored)[:3])}{', ...' if len(ignored) > 3 else ''})" if ignored else ""))
    say(f"licence: {provenance.licence_line({'licence': licence})}" + ("; state it with --licence" if licence == provenance.UNKNOWN else ""))
    return out


def check_ties(ties: Mapping[str, str], tensors: Mapping[str, read.Tensor]) -> set[str]:
    """The second copies in a file. Raises ConfigError where one is not equal to its first."""
    found = {copy for copy in ties if copy in tensors}
    for copy in sorted(found):
        if not np.array_equal(tensors[copy].read(), tensors[ties[copy]].read(), equal_nan=True):
            raise ConfigError(f"{copy} and {ties[copy]} are one tensor in this layout, but differ in the file")
    return found


def guess_release(folder: pathlib.Path) -> str:
    """The release of a directory, by its config files. Raises ConfigError."""
    model = read_json(folder, open_clip.CONFIG).get("model_cfg", {})
    if model:
        return "open_clip_coca" if "multimodal_cfg" in model else "open_clip"
    types = dict(clip="hf_clip", blip="hf_blip", bert="hf_bert", opt="hf_opt", llama="hf_llama", t5="hf_t5", **dict.fromkeys(hf_blip2.TYPES, "hf_blip2"))
    found = types.get(read_json(folder, "config.json").get("model_type"))
    if found:
        return found
    raise ConfigError(f"{folder} does not say which release it is; name it with --release ({', '.join(RELEASES)})")


def stage_config(layout: Release, sections: Mapping[str, Mapping[str, Any]], tokenizer: Any) -> Any:
    """The stage config of an imported model: its sizes, and a plain recipe that a config's own replaces."""
    own = "loss" in sections      # a layout that says all of it
    model = dict(sections["model"], dtype="auto", **({} if own else {"scale": 1 / 0.07}))
    if tokenizer is not None:
        marks = sections["data"].get("marks", {})
        model["tokens"] = dict(model["tokens"], bos=marks.get("begin", tokenizer.bos_id), eos=tokenizer.eos_id, pad=marks.get("pad", tokenizer.pad_id))
    loss = sections.get("loss") or dict(weights=dict(con=1.0, cap=2.0) if layout.system == "coca" else dict(con=1.0))
    if "bias" in model:
        loss["kind"] = "sigmoid"     # what such models were trained with
    return configs.ConfigDict(configs.stage(
        system=layout.system, model=model, loss=loss,
        optim=dict(name="adamw", lr=1e-5, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2, schedule="cosine", warmup="5%",
                   clamps=sections.get("clamps", (("logit_scale", 0.0, 4.605170185988092),)), ema=0.0, max_bad_steps=10),
        data=dict(train="", eval="", batch=min(64, loss.get("queue", 64)), tokenizer="", augment="random_resized_crop(scale=0.9..1)", **sections["data"]),
        steps=1000))


def export_release(release: str, src: str | pathlib.Path, out: str | pathlib.Path, licence: str = "", say=print) -> pathlib.Path:
    """Writes a trained or imported directory in a release's own layout: safetensors, configs, tokenizer, model card.

    ``licence``: of what was trained here; it joins those of the weights taken over, and replaces an unknown one.

    Tensors of an import that training did not touch keep the source's dtype where that loses nothing, so that
    exporting an import gives the source's bytes. Raises ConfigError for what that layout cannot hold.
    """
    if release not in EXPORTS:
        raise ConfigError(f"--export={release!r} is not known{nearest(release, EXPORTS)}")
    out = pathlib.Path(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out={str(out)!r} is not empty: name a new directory")
    from vlm_jax import stage as stages

    layout, folder = EXPORTS[release], stages.newest_stage(pathlib.Path(src))
    config = configs.from_json((folder / "config.json").read_text())
    if config.system != layout.system:
        fitting = [name for name, r in EXPORTS.items() if r.system == config.system]
        raise ConfigError(f"--export={release}: {folder} is a {config.system!r}{nearest(release, fitting) if fitting else ''}")
    record_of, record = read_json(folder, RECORD), provenance.read(folder)
    known = record_of.get("tensors", {}) if record_of.get("release") == release else {}
    leaves = stages.read_weights(folder) | {f"carry/{p}": x for p, x in stages.read_carry(folder).items()}
    sections = configs.to_plain(config)
    table = layout.rules(sections, {name: tuple(shape) for name, (_, shape) in known.items()})
    leaves = {p: x for p, x in leaves.items() if not p.startswith("carry/") or any(re.fullmatch(rule[0], p) for rule in table)}
    unheld = sorted(set(layout.given) & set(leaves))
    leaves = {p: x for p, x in leaves.items() if p not in unheld}
    leaves |= {p: np.zeros_like(leaves[like]) for p, like in layout.zeros.items() if like in leaves}
    arrays = weight_rules.export_leaves(table, leaves, f"--export={release}")
    arrays |= {copy: arrays[first] for copy, first in layout.ties(arrays).items() if first in arrays and (not known or copy in known)}
    arrays |= {name: np.zeros_like(arrays[like]) for name, like in layout.blank.items()}
    kept = record_of.get("own", known) if known else layout.stored(config, arrays)
    arrays = {name: x for name, x in arrays.items() if name in kept}
    arrays = {name: as_stored(x, *known.get(name, ("float32", list(x.shape)))) for name, x in arrays.items()}
    out.mkdir(parents=True, exist_ok=True)
    layout.write_config(config, out, arrays)
    tokenizer, other = (tokenizers.load(str(folder / name)) if (folder / name).exists() else None for name in ("tokenizer", "instruction_tokenizer"))
    tokenizer_files.write(release, tokenizer, config.data.length, out, say)
    if other is not None:
        (out / tokenizer_files.OF_INSTRUCTIONS).mkdir()
        tokenizer_files.write(release, other, config.data.instruction_length, out / tokenizer_files.OF_INSTRUCTIONS, say)
    files = write.write_safetensors(out / layout.weights_files[0], arrays, write.SHARD if INDEX in layout.weights_files else 0)
    taken = [name for name in provenance.split_licences(provenance.licence_of(record)) if not (licence and name in card.UNNAMED)]
    licence = provenance.join_licences([*taken, licence])
    card.write_card(out, layout, config, record, licence, read_json(folder, "DONE"))
    say(f"{out}: {release}, {len(arrays)} tensors in {files}" + (f"; left out, as that layout has no place for it: {', '.join(unheld)}" if unheld else ""))
    say(f"licence in {card.CARD}: " + (provenance.licence_line({"licence": licence}) if licence else "none; state one with --licence"))
    return out


def as_stored(x: np.ndarray, dtype: str, shape: list[int]) -> np.ndarray:
    """In the source's dtype and shape, where the values survive it."""
    narrow = x.astype(write.dtype_of(dtype))
    same = narrow.astype(x.dtype)
    x = narrow if np.array_equal(same, x, equal_nan=True) else x
    return x.reshape(shape) if x.size == np.prod(shape, dtype=int) else x


def sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def imported(origin: str, folder: pathlib.Path, say=print) -> pathlib.Path:
    """The directory under ``folder`` that holds the import of "hf:OWNER/NAME[@REVISION]"; imports it once."""
    out = folder / hub.folder_name(origin)
    if not (out / "config.json").exists():
        shutil.rmtree(out, ignore_errors=True)      # of a run that was killed meanwhile
        import_release("", origin, out, say=say)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.importers.cli", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--release", default="", help=f"import this layout: {', '.join(RELEASES)} (a hub snapshot tells by itself)")
    what.add_argument("--export", default="", help=f"export to this layout: {', '.join(EXPORTS)}")
    parser.add_argument("--src", required=True, help="import: file, directory or hf:OWNER/NAME[@REVISION]; export: our directory")
    parser.add_argument("--out", default="", help="directory to write; new or empty")
    parser.add_argument("--tokenizer", default="", help="import: a tokenizer, as data.tokenizer takes it (clip, clip:PATH, hf:PATH, sentencepiece:PATH)")
    parser.add_argument("--activation", default="", help=f"import: {', '.join(open_clip.ACTIVATIONS)}, where no config file tells (default gelu; OpenAI quick_gelu)")
    for name in ("image_heads", "text_heads", "decoder_heads", "pooler_heads"):
        parser.add_argument(f"--{name}", type=int, default=0, help="import: where no config file tells (default: 64 channels a head; pooler 8)")
    parser.add_argument("--image", default="", help="import: the eye's own file, where a release stores what was trained alone (eva_vit_g.pth)")
    parser.add_argument("--language", default="", help="import: the language model's directory, in the same case")
    parser.add_argument("--dtype", default="float32", help=f"import: of the stored weights, {' or '.join(DTYPES)}")
    parser.add_argument("--size", type=int, default=0, help="import: pixels, positions resized with the release's own kernel (default: the file's)")
    parser.add_argument("--licence", default="", help="import: of the weights, where the source does not state it; export: of what was trained here, "
                        "beside the licences of the weights taken over (an SPDX id or a name)")
    parser.add_argument("--push", default="", help="export: upload the result to hf:OWNER/NAME")
    args = parser.parse_args(argv)
    try:
        if not args.out:
            raise ConfigError("--out is missing: the directory to write")
        if args.export:
            if args.push:
                hub.parse(args.push)     # before anything is written
            out = export_release(args.export, args.src, args.out, args.licence)
            if args.push:
                print(f"pushed to {hub.push(out, args.push)}")
        else:
            if not args.release and not args.src.startswith("hf:"):
                raise ConfigError(f"--release or --export is missing: one of {', '.join(RELEASES)}")
            if args.push:
                raise ConfigError("--push uploads an export; give --export as well")
            hints = Hints(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Hints)})
            import_release(args.release, args.src, args.out, hints, args.tokenizer, args.licence, dtype=args.dtype)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 43
    return 0


if __name__ == "__main__":
    sys.exit(main())
