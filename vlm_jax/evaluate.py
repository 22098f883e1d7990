"""Scores a trained or imported model on data of one's own.

python -m vlm_jax.evaluate DIR zeroshot --data=folder:TEST [--templates=clip80]
python -m vlm_jax.evaluate DIR probe    --data=folder:TEST --train=folder:TRAIN
python -m vlm_jax.evaluate DIR retrieval --data=tars:val.tar
python -m vlm_jax.evaluate DIR rerank   --data=tars:val.tar [--k=128 --score=match+cosine]
python -m vlm_jax.evaluate DIR matching --data=scenes:test
python -m vlm_jax.evaluate DIR caption  --data=folder:TEST
python -m vlm_jax.evaluate DIR grounding --data=scenes:test
python -m vlm_jax.evaluate DIR vqa      --data=jsonl:TEST.json --candidates=answer_list.json [--method=generate]
python -m vlm_jax.evaluate DIR choice   --data=scenes:test/choice [--rule=NAME] [--verbalisers='no|false,yes|true']
python -m vlm_jax.evaluate DIR classify --data=jsonl:TEST.json
python -m vlm_jax.evaluate DIR codebook --data=folder:TEST

Prints each score with chance and a 95% interval; --out=DIR keeps them, and every item's prediction.
"""

from __future__ import annotations

import argparse
import inspect
import json
import pathlib
import sys
from typing import Any

from vlm_jax.errors import ConfigError

OPTIONS = {"templates": "zeroshot", "k": "rerank", "score": "rerank", "candidates": "vqa", "method": "vqa", "rule": "choice",
           "verbalisers": "choice"}      # flags that one kind has


def evaluate(model: Any, kind: str, data: Any, *, train: Any = "", examples: int = 0, batch: int = 64, label: str = "", caption: str = "",
             images: int = 0, template: str = "", **options: Any) -> Any:
    """Runs one evaluation of a loaded model (``vlm_jax.load``) over a source: an ``evals.Evaluation`` with scores and items.

    kind: of ``evals.KINDS``; data, train: sources (vlm_jax/data/sources.py), ``train`` for a probe, and for the most frequent answers;
    images, template: frames of a video, and the wording of prompts, instead of those of training; options: the kind's own, such as
    ``templates``. Raises ConfigError.
    """
    from vlm_jax import config as configs
    from vlm_jax import evals
    from vlm_jax.data import sources

    if kind not in evals.KINDS:
        return evals.run(kind, {}, (), tokenizer=None)      # says which there are
    own = model.stage.data      # how answers and labels were read in training
    fields = {k: v for k, v in (("label", label), ("caption", caption), ("answer", own.answer), ("classes", kind == "classify" and own.classes)) if v}

    def opened(spec, where):
        if not spec:
            raise ConfigError(f"{where} is missing: a source, such as folder:DIR or tars:FILE.tar")
        return configs.call(sources.open_source, {}, where, spec, **fields)

    source, fitted = opened(data, "--data"), {}
    takes = inspect.signature(evals.KINDS[kind]).parameters
    if "train_source" in takes and (train or "train_batches" in takes):
        fitted["train_source"] = opened(train, "--train")
        if "train_batches" in takes:
            fitted["train_batches"] = model.stage.eval_batches(fitted["train_source"], batch, None)
    elif train:
        raise ConfigError(f"--train={train!r} has no use in {kind!r}; nearest: 'probe'")
    if kind not in evals.WITHOUT_TEXTS:
        model.ids("")     # says what is missing where there is no tokenizer
    return evals.run(kind, model.predict, model.stage.eval_batches(source, batch, examples or None, images, template), tokenizer=model.stage.replies,
                     source=source, **fitted, **options)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="work directory of a run, or an imported model")
    parser.add_argument("kind", choices=("zeroshot", "probe", "retrieval", "rerank", "matching", "caption", "grounding", "vqa", "choice", "classify",
                                         "codebook"))
    parser.add_argument("--data", required=True, help="what to score on: folder:DIR, tars:FILES, parquet:FILES, jsonl:FILE, csv:FILE, ...")
    parser.add_argument("--train", default="", help="probe: what to fit on; vqa: what to count answers in")
    parser.add_argument("--label", default="", help="the label's field, such as json:label (class folders have it by themselves)")
    parser.add_argument("--caption", default="", help="the caption's field, such as txt or json:title")
    parser.add_argument("--template", default="", help="the wording of prompts, such as 'Question: {q} Short answer:'")
    parser.add_argument("--images", type=int, default=0, help="images of a row, or frames of a video")
    parser.add_argument("--templates", default="", help="zeroshot: prompt templates by name (vlm_jax/evals/prompts.py), photo by default")
    parser.add_argument("--k", type=int, default=0, help="rerank: candidates of a query, 128 by default")
    parser.add_argument("--score", default="", help="rerank: match (default) or match+cosine")
    parser.add_argument("--candidates", default="", help="vqa: the answers to choose from: a file, one a line, or train:3128 (default) with --train")
    parser.add_argument("--method", default="", help="vqa: rank (default) or generate")
    parser.add_argument("--rule", default="", help="choice: how candidates are scored, by a name of the system's")
    parser.add_argument("--verbalisers", default="", type=lambda text: tuple(tuple(part.split("|")) for part in filter(None, text.split(","))),
                        help="choice: the words that stand for each class, 'no|false,yes|true'")
    parser.add_argument("--examples", type=int, default=0, help="score the first so many samples (default: all)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", default="", help="directory for scores.json and predictions.jsonl")
    args = parser.parse_args(argv)
    try:
        from vlm_jax import evals
        from vlm_jax.console import Console
        from vlm_jax.loading import load
        options = {}
        for name, kind in OPTIONS.items():
            value = getattr(args, name)
            if value and args.kind != kind:
                raise ConfigError(f"--{name}={value} has no use in {args.kind!r}; nearest: {kind!r}")
            options |= {name: value} if value else {}
        found = evaluate(load(args.directory), args.kind, args.data, train=args.train, examples=args.examples, batch=args.batch,
                         label=args.label, caption=args.caption, images=args.images, template=args.template, **options)
        Console().scores(found.scores)
        if args.out:
            out = pathlib.Path(args.out)
            out.mkdir(parents=True, exist_ok=True)
            (out / "scores.json").write_text(json.dumps(found.scores, indent=1))
            evals.write_items(out / "predictions.jsonl", found.items)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 43
    return 0


if __name__ == "__main__":
    sys.exit(main())
