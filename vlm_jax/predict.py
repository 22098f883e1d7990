"""Uses a trained or imported model from the command line.

python -m vlm_jax.predict DIR zeroshot IMG... --labels=a,b,c [--templates=photo]
python -m vlm_jax.predict DIR caption IMG... [--method=beam --beams=4]
python -m vlm_jax.predict DIR reply IMG... --prompt="Question: how many dogs are there? Short answer:" [--method=beam --beams=5]
python -m vlm_jax.predict DIR retrieve FOLDER --query="..." [--top=5]
python -m vlm_jax.predict DIR embed FILES... --out=x.npy
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np

from vlm_jax.data.record import IMAGE_KINDS
from vlm_jax.errors import ConfigError

IMAGES = tuple("." + kind for kind in IMAGE_KINDS)


def zeroshot(model, args) -> None:
    from vlm_jax.evals import zeroshot as evaluation
    from vlm_jax.evals.rank import similarity
    labels = [x.strip() for x in args.labels.split(",") if x.strip()]
    if len(labels) < 2:
        raise ConfigError(f"--labels={args.labels!r} names {len(labels)} classes; give at least two, separated by commas")
    weights, _ = evaluation.class_embeddings(model.embed_text, labels, args.templates)
    scale = model.predict["embed"]({"image": model.images(args.inputs[0])})["logit_scale"]
    logits = scale * similarity(model.embed_image(args.inputs), weights)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    odds /= odds.sum(1, keepdims=True)
    for path, row in zip(args.inputs, odds):
        print(path + "\t" + "  ".join(f"{labels[i]} {row[i]:.1%}" for i in np.argsort(-row)))


def _decoding(args) -> dict:
    return {"method": args.method} | ({"beams": args.beams} if args.method == "beam" else {})


def caption(model, args) -> None:
    for path, text in zip(args.inputs, model.caption(args.inputs, **_decoding(args))):
        print(f"{path}\t{text}")


def reply(model, args) -> None:
    if not args.prompt:
        raise ConfigError("--prompt is missing: what is asked of the images")
    for path, text in zip(args.inputs, model.reply(args.inputs, args.prompt, **_decoding(args))):
        print(f"{path}\t{text}")


def retrieve(model, args) -> None:
    if not args.query:
        raise ConfigError("--query is missing: the text to search for")
    folder = pathlib.Path(args.inputs[0])
    files = sorted(str(f) for f in folder.rglob("*") if f.suffix.lower() in IMAGES)
    if not files:
        raise ConfigError(f"{str(folder)!r} holds no image ({', '.join(IMAGES)})")
    from vlm_jax.evals.rank import similarity
    scores = similarity(model.embed_image(files), model.embed_text(args.query))[:, 0]
    for i in np.argsort(-scores)[:args.top]:
        print(f"{scores[i]:.4f}\t{files[i]}")


def embed(model, args) -> None:
    if not args.out:
        raise ConfigError("--out is missing: the .npy file to write")
    np.save(args.out, model.embed_image(args.inputs))
    print(f"{args.out}: {' x '.join(map(str, np.load(args.out, mmap_mode='r').shape))}")


TASKS = {"zeroshot": zeroshot, "caption": caption, "reply": reply, "retrieve": retrieve, "embed": embed}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.predict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="work directory of a run, or an imported model")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("inputs", nargs="+", help="image files; for retrieve a folder of them")
    parser.add_argument("--labels", default="", help="zeroshot: class names, separated by commas")
    parser.add_argument("--templates", default="photo", help="zeroshot: prompt templates by name (vlm_jax/evals/prompts.py)")
    parser.add_argument("--prompt", default="", help="reply: what is asked, in the words that the model was trained with")
    parser.add_argument("--query", default="", help="retrieve: the text to search for")
    parser.add_argument("--top", type=int, default=5, help="retrieve: how many to show")
    parser.add_argument("--out", default="", help="embed: .npy file to write, float32 [files, e]")
    parser.add_argument("--method", default="greedy", choices=["greedy", "beam", "sample"], help="caption, reply: decoding")
    parser.add_argument("--beams", type=int, default=4, help="caption, reply: beams of --method=beam")
    args = parser.parse_args(argv)
    try:
        for path in args.inputs:
            if not pathlib.Path(path).exists():
                raise ConfigError(f"{path!r} does not exist")
        from vlm_jax.loading import load
        TASKS[args.task](load(args.directory), args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 43
    return 0


if __name__ == "__main__":
    sys.exit(main())
