"""CapFilt: rewrites noisy captions (BLIP, arXiv 2201.12086, section 4.3).

python -m vlm_jax.capfilt --captioner=RUN_DIR --filter=RUN_DIR --data='tars:web-{0000..0999}.tar' --out=DIR [--unit=I/N]

For every image the captioner samples one text (nucleus 0.9); the filter keeps the web text and the sampled one where it gives a match a
probability of at least 0.5, so that an image keeps none, one or two. What is kept is written as indexed tars, whose samples hold the
kept texts (training draws one of them) and, under ``capfilt`` in KEY.json, every text with its probability. Captioner and filter are
two runs, fine-tuned apart from one pre-trained model: shared parameters would let the filter trust what the captioner says.

A tar is a unit of work, a pure function of the data, the two models and --seed: the same command again keeps those that are whole.
--unit=I/N takes the I-th of N runs of samples (from 0), into DIR/I: for a Slurm array or an indexed job. Train on 'tars:DIR/*.tar' (or
'tars:DIR/*/*.tar') mixed with the human pairs.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import sys
import threading
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError

PROBABILITY = 0.5      # salesforce/BLIP issues 46, 54
BATCHES_KEPT = 4       # packing reads a few samples ahead


class Bootstrapped:
    """A source whose captions went through captioner and filter: sample i is ``source[i]`` with the texts that were kept.

    captioner, filter: loaded models (``vlm_jax.load``) that predict "generate" and "match". Samples first ... first + count - 1 of the
    source. Texts of a sample follow from its number and ``seed``. Reading a sample of which nothing is kept raises BadSample.
    """

    def __init__(self, source: Any, captioner: Any, filter: Any, *, first: int = 0, count: int | None = None, batch: int = 32, seed: int = 0,
                 threshold: float = PROBABILITY, top_p: float = 0.9, min_length: int = 5, max_length: int = 20, repetition_penalty: float = 1.1):
        from vlm_jax.data.sources import name_of
        for name, model, needed in (("captioner", captioner, "generate"), ("filter", filter, "match")):
            if needed not in model.predict:
                raise ConfigError(f"--{name} is a {model.config.system!r}, which has no {needed!r} (it has {', '.join(model.predict)})")
            model.ids("")      # without a tokenizer there is nothing to say or to read
        self.source, self.captioner, self.filter, self.first = source, captioner, filter, first
        self.count = len(source) - first if count is None else count
        self.batch, self.seed, self.threshold = batch, seed, threshold
        self.options = dict(method="sample", top_p=top_p, min_length=min_length, max_length=max_length, repetition_penalty=repetition_penalty)
        self.name = f"capfilt of {name_of(source)}" + (f" from sample {first}" if first else "")
        self._made: collections.OrderedDict[int, list[Any]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.count

    def key(self, i: int) -> str:
        from vlm_jax.data.sources import key_of
        return key_of(self.source, self.first + i)

    def __getitem__(self, i: int) -> dict[str, Any]:
        number, row = divmod(i, self.batch)
        with self._lock:
            if number not in self._made:
                self._made[number] = self._make(number)
                while len(self._made) > BATCHES_KEPT:
                    self._made.popitem(last=False)
            found = self._made[number][row]
        if isinstance(found, Exception):
            raise found
        return found

    def _make(self, number: int) -> list[Any]:
        """A batch of samples, or what is wrong with each."""
        import jax

        from vlm_jax.data import ops
        from vlm_jax.data.bad import BadSample

        found: list[Any] = []
        for i in range(number * self.batch, min((number + 1) * self.batch, self.count)):
            try:
                sample = dict(self.source[self.first + i])
                image = sample["image"]
                if image is None:
                    raise BadSample("missing_image")
                sample["pixels"] = np.asarray(ops.decode(image).convert("RGB") if isinstance(image, bytes) else image)
                found.append(sample)
            except BadSample as error:
                found.append(error)
        good = [s for s in found if not isinstance(s, BadSample)]
        if good:
            shown = [s["pixels"] for s in good] + [good[-1]["pixels"]] * (self.batch - len(good))      # one compiled size
            key = jax.random.fold_in(jax.random.key(self.seed), self.first // self.batch + number)
            synthetic = self.captioner.caption(shown, batch=self.batch, key=key, **self.options)
            web = [s["text"][0] for s in good] + [good[-1]["text"][0]] * (self.batch - len(good))
            judged = self.match(shown, web), self.match(shown, synthetic)
        for row, sample in enumerate(good):
            said = {"web": [sample["text"][0], round(float(judged[0][row]), 4)], "synthetic": [synthetic[row], round(float(judged[1][row]), 4)]}
            texts = [text for text, probability in said.values() if probability >= self.threshold and text]
            del sample["pixels"]
            sample.pop("text_weight", None)
            sample |= {"text": list(dict.fromkeys(texts)), "json": {"capfilt": said}}
            if not texts:
                found[next(i for i, s in enumerate(found) if s is sample)] = BadSample("nothing_kept", f"web {said['web'][1]}, synthetic {said['synthetic'][1]}")
        return found

    def match(self, images: list[np.ndarray], texts: list[str]) -> np.ndarray:
        """The filter's probability that each text is of its image."""
        ids, mask = self.filter.ids(texts)
        logits = self.filter.predict["match"]({"image": self.filter.images(images), "text": ids, "text_mask": mask})["match"].astype(np.float64)
        return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))


def count(out: str | os.PathLike, left_out: int, threshold: float) -> dict[str, Any]:
    """What became of the texts in a directory of written tars: per branch how many were kept and dropped, and images by how many texts
    they kept. ``left_out``: images of which nothing was kept."""
    from vlm_jax.data.sources import open_source
    source = open_source(f"tars:{pathlib.Path(out) / '*.tar'}")
    kept, texts = collections.Counter(), collections.Counter({0: left_out})
    for i in range(len(source)):
        said = json.loads(source.record(i, ("json",))["json"])["capfilt"]
        branches = [name for name, (text, probability) in said.items() if probability >= threshold and text]
        kept.update(branches)
        texts[len(branches)] += 1
    total = sum(texts.values())
    return {"images": total, "images_by_texts_kept": {str(n): texts[n] for n in (0, 1, 2)},
            **{name: {"kept": kept[name], "dropped": total - kept[name], "dropped_share": 1 - kept[name] / max(total, 1)} for name in ("web", "synthetic")}}


def show(out: str | os.PathLike, told: dict[str, Any], examples: int = 24) -> pathlib.Path:
    """A page with the counts and pairs of both branches, kept and dropped."""
    from vlm_jax import report
    from vlm_jax.data import ops
    from vlm_jax.data.sources import open_source
    source = open_source(f"tars:{pathlib.Path(out) / '*.tar'}")
    shown = []
    for i in np.unique(np.linspace(0, len(source) - 1, min(examples, len(source))).astype(int)):
        sample = source[int(i)]
        (web, p), (synthetic, q) = (json.loads(source.record(int(i), ("json",))["json"])["capfilt"][name] for name in ("web", "synthetic"))
        shown.append({"image": np.asarray(ops.decode(sample["image"]).convert("RGB")), "generated": f"{synthetic} ({q:.2f})",
                      "reference": f"{web} ({p:.2f})", "ok": q >= told["threshold"]})
    notes = [f"{name}: {told[name]['kept']:,} kept, {told[name]['dropped']:,} dropped ({told[name]['dropped_share']:.1%})" for name in ("web", "synthetic")]
    return report.write_report(pathlib.Path(out) / "report", title="CapFilt", captions=shown,
                               notes=[*notes, "Under each image: the sampled text and the web's, with the filter's probability of a match."])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.capfilt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captioner", required=True, help="a run that was fine-tuned to caption")
    parser.add_argument("--filter", required=True, help="a run that was fine-tuned to match")
    parser.add_argument("--data", required=True, help="the noisy pairs (vlm_jax/data/sources.py)")
    parser.add_argument("--out", required=True, help="directory for the new tars")
    parser.add_argument("--unit", default="0/1", help="I/N: the I-th of N runs of samples")
    parser.add_argument("--shard", type=int, default=1000, help="samples in a tar")
    parser.add_argument("--batch", type=int, default=32, help="images captioned together")
    parser.add_argument("--threshold", type=float, default=PROBABILITY)
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--min_length", type=int, default=5, help="tokens, prompt included")
    parser.add_argument("--max_length", type=int, default=20, help="tokens, prompt included")
    parser.add_argument("--repetition_penalty", type=float, default=1.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        unit, _, units = args.unit.partition("/")
        if not (unit.isdigit() and units.isdigit() and int(unit) < int(units)):
            raise ConfigError(f"--unit={args.unit!r} is not I/N with I below N; nearest: 0/1")
        from vlm_jax import config as configs
        from vlm_jax.data import pack, sources
        from vlm_jax.loading import load
        source = configs.call(sources.open_source, {}, "--data", args.data)
        size = -(-len(source) // int(units))
        size += -size % args.batch      # a batch belongs to one unit: its draws do not depend on how many there are
        first = min(int(unit) * size, len(source))
        out = args.out if int(units) == 1 else os.path.join(args.out, unit)
        options = {name: getattr(args, name) for name in ("threshold", "top_p", "min_length", "max_length", "repetition_penalty", "seed", "batch")}
        made = Bootstrapped(source, load(args.captioner), load(args.filter), first=first, count=min(size, len(source) - first), **options)
        if not len(made):
            print(f"unit {args.unit} has no samples: {len(source):,} are fewer than its share")
            return 0
        packed = pack.pack(made, out, shard=args.shard, settings={"captioner": args.captioner, "filter": args.filter, **options}, say=print)
        told = {"threshold": args.threshold, **count(out, packed.left_out.get("nothing_kept", (0, ""))[0], args.threshold)}
        (pathlib.Path(out) / "capfilt.json").write_text(json.dumps(told, indent=1))
        for name in ("web", "synthetic"):
            print(f"{name}: {told[name]['kept']:,} kept, {told[name]['dropped']:,} dropped ({told[name]['dropped_share']:.1%})")
        print("images by texts kept: " + ", ".join(f"{n}: {c:,}" for n, c in told["images_by_texts_kept"].items()))
        print(f"pictures: {show(out, told)}\ntrain on them: --config.stages.NAME.data.train='tars:{out}/*.tar'")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 43
    return 0


if __name__ == "__main__":
    sys.exit(main())
