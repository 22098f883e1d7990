"""From a source to batches. The examples of training step s stand at positions s*batch ... (s+1)*batch - 1
of the order, and everything drawn for a position follows from (seed, position): resuming is a number.

Grain runs the reading: its dataset is the sequence of steps, its reader threads make one batch each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.data import ops
from vlm_jax.data.bad import BadDataError, BadSample, Ledger, Offence
from vlm_jax.data.batch import hash31, normalise_caption
from vlm_jax.data.engine import grain
from vlm_jax.data.lengths import Lengths, token_lengths
from vlm_jax.data.order import order_of
from vlm_jax.data.sources import key_of, name_of, read_text
from vlm_jax.data.tokenizers import Tokenizer
from vlm_jax.errors import nearest

MAX_ATTEMPTS = 64  # candidates tried for one position before the data counts as unusable
CAPTION_CHOICES = ("sample", "first")
EVAL_AUGMENT = "resize|center_crop"


class _Reader:
    """Turns single samples into rows; counts nothing, shares nothing, safe in many threads."""

    def __init__(self, source: Any, chain: ops.Chain, caption: str, max_pixels: int):
        if caption not in CAPTION_CHOICES:
            raise ValueError(f"caption={caption!r} is not a way to choose a caption{nearest(caption, CAPTION_CHOICES)}")
        self.source, self.chain, self.caption, self.max_pixels = source, chain, caption, max_pixels

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, str, dict[str, Any]]:
        """(uint8 [size, size, 3], caption, raw sample). Raises BadSample."""
        sample = self.source[index]
        texts = sample["text"]
        if not texts:
            raise BadSample("missing_caption")
        text = texts[0]
        if self.caption == "sample" and len(texts) > 1:
            bounds = np.cumsum(sample.get("text_weight", np.ones(len(texts))))
            text = texts[min(int(np.searchsorted(bounds, rng.random() * bounds[-1], "right")), len(texts) - 1)]
        image = sample["image"]
        if image is None:
            raise BadSample("missing_image")
        if isinstance(image, bytes):
            image = ops.decode(image, self.max_pixels)
        return self.chain(image, rng), text, sample

    def offence(self, index: int, error: BadSample) -> Offence:
        source = self.source
        if hasattr(source, "place"):
            source, index = source.place(index)
        return Offence(name_of(source), key_of(source, index), error.reason, error.detail, int(index))


class _Steps:
    """step -> (batch or None, samples seen, offences); pure."""

    def __init__(self, reader: _Reader, tokenizer: Tokenizer, order, *, batch: int, length: int, seed: int,
                 buckets: Sequence[int], lengths: Lengths | None):
        self.reader, self.tokenizer, self.order = reader, tokenizer, order
        self.batch, self.length, self.seed, self.lengths = batch, length, seed, lengths
        self.buckets = (*sorted(buckets), length)
        if self.buckets[0] < 2 or any(b >= length for b in self.buckets[:-1]):
            raise ValueError(f"buckets={tuple(buckets)} must lie between 2 and length={length}, which is always one")

    def __call__(self, step: int):
        positions = np.arange(step * self.batch, (step + 1) * self.batch)
        indices = self.order.index(positions)
        bucket = None if self.lengths is None else self.holding(int(self.lengths[indices].max()))
        size = self.reader.chain.size
        image = np.empty((self.batch, size, size, 3), np.uint8)
        texts, keys, offences, seen = [], [], [], 0
        for row, (position, index) in enumerate(zip(positions.tolist(), indices.tolist())):
            for attempt in range(1, MAX_ATTEMPTS + 1):
                if bucket is not None and self.holding(int(self.lengths[index])) > bucket:      # a replacement that the batch cannot hold
                    index = self.order.replacement(position, attempt)
                    continue
                seen += 1
                try:
                    image[row], text, sample = self.reader(index, np.random.default_rng((self.seed, position, attempt)))
                    break
                except BadSample as error:
                    offences.append(self.reader.offence(index, error))
                    index = self.order.replacement(position, attempt)
            else:
                return None, seen, offences
            texts.append(text)
            keys.append(sample["key"])
        text, mask, _ = self.tokenizer(texts, self.length)
        length = bucket or self.holding(int(mask.sum(axis=1).max()))
        return {"image": image, "text": text[:, :length], "text_mask": mask[:, :length],
                "caption_id": np.array([hash31(normalise_caption(t)) for t in texts], np.int32),
                "image_id": np.array([hash31(k) for k in keys], np.int32)}, seen, offences


    def holding(self, tokens: int) -> int:
        """The smallest bucket for a caption of ``tokens``; the last one cuts what is longer."""
        return next((b for b in self.buckets if b >= tokens), self.length)


class _Batches:
    """An iterator over a Grain dataset. ``ledger``: bad samples so far. ``close()`` ends the reader threads; leaving a
    ``with`` block does so too."""

    def __init__(self, dataset: grain.MapDataset, threads: int, prefetch: int, ledger: Ledger):
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch))
        self._iterator = iter(dataset.to_iter_dataset(options))
        self.ledger = ledger

    def __iter__(self):
        return self

    def close(self) -> None:
        self._iterator.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class TrainBatches(_Batches):
    """Yields (step, batch)."""

    def __init__(self, steps: _Steps, start: int, stop: int | None, threads: int, prefetch: int, ledger: Ledger):
        numbers = grain.MapDataset.range(start, sys.maxsize if stop is None else stop)
        super().__init__(numbers.map(steps), threads, prefetch, ledger)
        self._step = start

    def __next__(self) -> tuple[int, dict[str, np.ndarray]]:
        batch, seen, offences = next(self._iterator)
        self.ledger.add(seen, offences)  # in the order of the steps: a run stops at the same one every time
        if batch is None:
            raise BadDataError(self.ledger.report(f"step {self._step}: {MAX_ATTEMPTS} candidates in a row were bad"))
        step, self._step = self._step, self._step + 1
        return step, batch


def train_batches(source: Any, tokenizer: Tokenizer, *, batch: int, size: int, length: int, augment: str, seed: int,
                  start_step: int = 0, stop_step: int | None = None, threads: int = 2, prefetch: int = 4,
                  block: int = 1, window: int = 1, caption: str = "sample", bad_budget: float = 0.01,
                  quarantine_path: str | None = None, buckets: Sequence[int] = (),
                  max_pixels: int = ops.MAX_PIXELS) -> TrainBatches:
    """Batches of a run from ``start_step`` on (to ``stop_step``, or without end): an iterator of (step, batch).

    ``batch``: rows of the global batch; ``size``: pixels a side; ``length``: tokens; ``augment``: a chain
    (``ops.Chain``); ``threads``: reader threads (0 reads in the calling thread); ``prefetch``: batches made
    ahead; ``block``, ``window``: the shuffle (``order.Order``); ``caption``: "sample" draws one of several
    captions by their weights, "first" takes the first. A batch is a pure function of (seed, step): threads
    and restarts do not change it.

    ``buckets``: text is cropped to the smallest of these lengths, or ``length``, that holds the batch's longest
    caption. Which one follows from (seed, step) and the column of caption lengths (``lengths.token_lengths``), so that processes
    which read parts of a batch agree; a source without that column is told by all rows of the batch, once they are read.

    A bad sample is replaced by another, drawn from (seed, position, attempt), counted by reason, and written to
    ``quarantine_path``; past ``bad_budget`` (``bad.Ledger``) BadDataError is raised. Raises ValueError for a
    wrong argument.
    """
    if batch < 1 or size < 1 or length < 2 or seed < 0:
        raise ValueError(f"batch={batch}, size={size}, length={length}, seed={seed}: at least 1, 1, 2 and 0")
    reader = _Reader(source, ops.Chain(augment, size), caption, max_pixels)
    steps = _Steps(reader, tokenizer, order_of(source, seed, block, window), batch=batch, length=length, seed=seed,
                   buckets=buckets, lengths=token_lengths(source, tokenizer) if buckets else None)
    ledger = Ledger(bad_budget, quarantine_path=quarantine_path)
    return TrainBatches(steps, start_step, stop_step, threads, prefetch, ledger)


class EvalBatches(_Batches):
    """Yields (batch, meta); ``len()`` is the number of batches."""

    def __init__(self, read, count: int, threads: int, prefetch: int, ledger: Ledger):
        super().__init__(grain.MapDataset.range(0, count).map(read), threads, prefetch, ledger)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __next__(self) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        batch, meta, seen, offences = next(self._iterator)
        self.ledger.add(seen, offences)
        return batch, meta


def eval_batches(source: Any, tokenizer: Tokenizer, *, batch: int, size: int, length: int, augment: str = EVAL_AUGMENT,
                 limit: int | None = None, threads: int = 2, prefetch: int = 2, bad_budget: float = 0.01,
                 quarantine_path: str | None = None, max_pixels: int = ops.MAX_PIXELS) -> EvalBatches:
    """Every sample once (the first ``limit``), in index order: an iterator of (batch, meta).

    ``batch["mask"]`` is False in the rows that fill up the last batch and in those of bad samples, which are
    counted, not replaced (such rows are zero images and empty texts). ``text`` holds the first caption. ``meta``
    has one entry per True row, in order: {"key", "captions" (all of them), "label" (None without), "index"}.
    Bad samples count against ``bad_budget`` as in training.
    """
    reader = _Reader(source, ops.Chain(augment, size), "first", max_pixels)
    total = len(source) if limit is None else min(limit, len(source))

    def read(number: int):
        image = np.zeros((batch, size, size, 3), np.uint8)
        ids = np.zeros((2, batch), np.int32)
        mask, meta, offences, texts = np.zeros(batch, bool), [], [], []
        indices = range(number * batch, min((number + 1) * batch, total))
        for row, index in enumerate(indices):
            try:
                image[row], text, sample = reader(index, np.random.default_rng((0, index)))
            except BadSample as error:
                offences.append(reader.offence(index, error))
                continue
            mask[row] = True
            texts.append(text)
            ids[:, row] = hash31(normalise_caption(text)), hash31(sample["key"])
            meta.append({"key": sample["key"], "captions": list(sample["text"]), "label": sample.get("label"),
                         "index": index})
        text = np.full((batch, length), tokenizer.pad_id, np.int32)
        text_mask = np.zeros((batch, length), bool)
        if texts:
            text[mask], text_mask[mask], _ = tokenizer(texts, length)
        return ({"image": image, "text": text, "text_mask": text_mask, "caption_id": ids[0], "image_id": ids[1],
                 "mask": mask}, meta, len(indices), offences)

    ledger = Ledger(bad_budget, quarantine_path=quarantine_path)
    return EvalBatches(read, -(-total // batch), threads, prefetch, ledger)


def preview(source: Any, tokenizer: Tokenizer, *, size: int, length: int, augment: str = EVAL_AUGMENT,
            captions: int = 512) -> dict[str, Any]:
    """What a run is about to read, for the start-up table: the first readable sample and how captions fit.

    {"key", "image" uint8 [size,size,3], "caption", "ids" (real ones), "decoded" (the ids as text again),
    "samples" (in the source), "captions" (looked at), "tokens_mean", "tokens_max", "truncated" (share of the
    captions longer than ``length``)}.
    Captions are of up to ``captions`` samples spread evenly. Raises BadDataError where none of 64 samples can be read.
    """
    reader = _Reader(source, ops.Chain(augment, size), "first", ops.MAX_PIXELS)
    errors = []
    for index in range(min(MAX_ATTEMPTS, len(source))):
        try:
            image, caption, sample = reader(index, np.random.default_rng(0))
            break
        except BadSample as error:
            errors.append(str(error))
    else:
        raise BadDataError(f"none of the first {len(errors)} samples of {name_of(source)} can be read; "
                           f"the first: {errors[:1]}")
    tokens = []
    for i in np.unique(np.linspace(0, len(source) - 1, min(captions, len(source))).astype(np.int64)):
        try:
            tokens += [len(tokenizer.encode(t)) for t in read_text(source, int(i))]
        except BadSample:
            continue
    ids, mask, _ = tokenizer([caption], length)
    return {"key": sample["key"], "image": image, "caption": caption, "ids": ids[0][mask[0]].tolist(),
            "decoded": tokenizer.decode(ids[0]), "samples": len(source), "captions": len(tokens),
            "tokens_mean": float(np.mean(tokens)), "tokens_max": int(max(tokens)),
            "truncated": float(np.mean(np.array(tokens) > length))}
