"""From a source to batches. The examples of training step s stand at positions s*batch ... (s+1)*batch - 1
of the order, and everything drawn for a position follows from (seed, position): resuming is a number.

Grain runs the reading: its dataset is the sequence of steps, its reader threads make one batch each, or have it made by
a reader process each (data/reader.py).
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import ops
from vlm_jax.data.bad import BadDataError, BadSample, Ledger, Offence
from vlm_jax.data.batch import hash31, normalise_caption
from vlm_jax.data.clean import Clean
from vlm_jax.data.features import FeatureStore
from vlm_jax.data.layouts import PLAIN_TEXT, Layout, Said, Writer
from vlm_jax.data.lengths import Lengths, token_lengths
from vlm_jax.data.order import generators, order_of
from vlm_jax.data.reader import Readers
from vlm_jax.data.rows import PLAIN, Rows, swap_sides, told
from vlm_jax.data.sources import key_of, name_of, read_text
from vlm_jax.data.tokenizers import Tokenizer
from vlm_jax.errors import nearest

MAX_ATTEMPTS = 64  # candidates tried for one position before the data counts as unusable
TOGETHER = 64      # samples read before their pictures are decoded
ORDERED = 4096     # positions whose order is computed together
CAPTION_CHOICES = ("sample", "first")
EVAL_AUGMENT = "resize|center_crop"


def draw(image: np.ndarray, row: int, pictures: Sequence[Any], chain: ops.Chain, rng: np.random.Generator, max_pixels: int, moving: bool = False) -> None:
    """Writes the pictures of a sample into ``row`` of ``image``; those of a ``moving`` one are all turned and cut alike. Raises BadSample."""
    pixels, each = image.reshape(-1).data, image[0].size // max(1, len(pictures))
    for at, picture in enumerate(pictures, row * len(pictures)):
        if isinstance(picture, bytes):
            picture = ops.decode(picture, max_pixels)
        picture = chain.apply(picture, copy.deepcopy(rng) if moving else rng)
        pixels[at * each:(at + 1) * each] = picture.tobytes()     # numpy's assignment would let go of the interpreter


class _Reader:
    """Turns samples into rows; counts nothing, shares nothing, safe in many threads."""

    def __init__(self, source: Any, chain: ops.Chain, caption: str, max_pixels: int, rows: Rows, writer: Writer, training: bool = False,
                 features: FeatureStore | None = None):
        if caption not in CAPTION_CHOICES:
            raise ValueError(f"caption={caption!r} is not a way to choose a caption{nearest(caption, CAPTION_CHOICES)}")
        self.source, self.chain, self.caption, self.max_pixels, self.features = source, chain, caption, max_pixels, features
        self.writer, self.training, self.clean = writer, training, Clean(rows.text_clean, training)
        laid_out = writer.layout.name != "plain"
        if laid_out and rows.swap:
            raise ValueError(f"swap={rows.swap!r} is of captions in layout='plain', not {writer.layout.name!r}; nearest: swap=''")
        # candidates are chosen from in evaluation; training has the right one for its reply
        self.rows = dataclasses.replace(rows, candidates=True, **(dict(answers=0, answer_length=0) if training else {})) if laid_out else rows

    def fill(self, image: np.ndarray, rows: Sequence[int], indices: Sequence[int],
             rngs: Sequence[np.random.Generator]) -> list[tuple[Said, dict[str, Any]] | BadSample]:
        """Writes pictures into ``rows`` of ``image``, unless there are features instead; for each (what is said, raw sample), or what is wrong with it.

        All samples are read before the first picture is decoded: short loops stay in the processor's caches, and
        threads seldom wait for each other.
        """
        found: list[Any] = []
        for index, rng in zip(indices, rngs):
            try:
                if self.features is not None:
                    self.features.check(index)
                found.append(self.read(index, rng))
            except BadSample as error:
                found.append(error)
        for i, (row, rng) in enumerate(zip(rows, rngs)):
            if self.features is None and not isinstance(found[i], BadSample):
                try:
                    draw(image, row, self.rows.pictures(found[i][1]), self.chain, rng, self.max_pixels, self.rows.moving(found[i][1]))
                except BadSample as error:
                    found[i] = error
        return found

    def read(self, index: int, rng: np.random.Generator) -> tuple[Said, dict[str, Any]]:
        def choose(texts: Sequence[str], weights: Sequence[float] | None) -> str:
            if self.caption == "first" or len(texts) == 1:
                return texts[0]
            bounds = np.cumsum(np.ones(len(texts)) if weights is None else weights)
            return texts[min(int(np.searchsorted(bounds, rng.random() * bounds[-1], "right")), len(texts) - 1)]

        texts_alone = not (self.rows.images or self.rows.answers or self.rows.classes) and self.writer.layout.name == "plain"
        sample = {"key": key_of(self.source, index), "text": read_text(self.source, index)} if texts_alone else self.source[index]
        said = self.writer.say(sample, self.clean, choose, rng, self.training)
        pictures = self.rows.pictures(sample)
        self.rows.check(sample, self.training)
        if self.rows.swap and self.training and rng.random() < 0.5:
            said, sample = Said((("", swap_sides(said.reply)),)), {**sample, "images": pictures[::-1]}
        return said, sample

    def images(self, image: np.ndarray, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """What a batch of these samples has for eyes."""
        if self.features is not None:
            return self.features.take(indices)
        return {self.rows.image_key: image} if self.rows.images else {}

    def captions(self, sample: dict[str, Any]) -> list[str]:
        """All captions of a sample as they are read."""
        return [text for text in map(self.clean, sample.get("text") or ()) if text]

    def offence(self, index: int, error: BadSample) -> Offence:
        source = self.source
        if hasattr(source, "place"):
            source, index = source.place(index)
        return Offence(name_of(source), key_of(source, index), error.reason, error.detail, int(index))


class _Steps:
    """step -> (batch or None, samples seen, offences); pure."""

    def __init__(self, reader: _Reader, order, *, batch: int, seed: int, buckets: Sequence[int], lengths: Lengths | None,
                 mine: np.ndarray | None = None):
        self.reader, self.writer, self.order = reader, reader.writer, order
        self.batch, self.length, self.seed, self.lengths = batch, self.writer.longest, seed, lengths
        self.mine = np.arange(batch) if mine is None else mine      # rows of the batch that are read here
        self.buckets = (*sorted(buckets), self.length)
        length = self.length
        if self.buckets[0] < 2 or any(b >= length for b in self.buckets[:-1]):
            raise ValueError(f"buckets={tuple(buckets)} must lie between 2 and length={length}, which is always one")
        self.run = max(1, ORDERED // batch)      # steps whose order is computed together
        self._ordered: tuple[int, np.ndarray] = (-1, np.empty((0, 0), np.int64))     # the last such run

    def __call__(self, step: int):
        count, positions = len(self.mine), step * self.batch + self.mine
        indices = self._indices(step)
        bucket = None if self.lengths is None else self.holding(int(self.lengths[indices].max()))
        size = self.reader.chain.size
        asked, indices = self.reader.rows, indices[self.mine]
        image = np.empty(asked.image_shape(count if self.reader.features is None else 0, size), np.uint8)
        read = indices.copy()
        said, keys, samples, offences, seen = [None] * count, [""] * count, [None] * count, [], 0
        for start in range(0, count, TOGETHER):
            todo = dict(enumerate(indices[start:start + TOGETHER].tolist(), start))     # row -> the sample to try
            for attempt in range(1, MAX_ATTEMPTS + 1):
                rows = list(todo) if bucket is None or attempt == 1 else [      # a replacement may be one that the batch cannot hold
                    row for row, index in todo.items() if self.holding(int(self.lengths[index])) <= bucket]
                seen += len(rows)
                found = self.reader.fill(image, rows, [todo[row] for row in rows], generators(self.seed, positions[rows], attempt))
                for row, sample in zip(rows, found):
                    if isinstance(sample, BadSample):
                        offences.append((row, self.reader.offence(todo[row], sample)))
                    else:
                        said[row], keys[row], samples[row] = sample[0], sample[1]["key"], asked.keep(sample[1])
                        read[row] = todo.pop(row)
                if not todo:
                    break
                todo = {row: self.order.replacement(int(positions[row]), attempt) for row in todo}
            else:
                break
        offences = [offence for _, offence in sorted(offences, key=lambda pair: pair[0])]
        if todo:
            return None, seen, offences
        text = self.writer.arrays(said, training=True)
        length = bucket or self.holding(max(int(mask.sum(axis=1).max()) for key, mask in text.items() if mask.dtype == bool))
        return {**self.reader.images(image, read), **{key: value[:, :length] for key, value in text.items()},
                "caption_id": np.array([hash31(normalise_caption(s.reply)) for s in said], np.int32),
                "image_id": np.array([hash31(k) for k in keys], np.int32), **asked.arrays(samples, self.writer.replies)}, seen, offences

    def _indices(self, step: int) -> np.ndarray:
        run, row = divmod(step, self.run)
        ordered = self._ordered
        if ordered[0] != run:
            positions = np.arange(run * self.run * self.batch, (run + 1) * self.run * self.batch)
            ordered = self._ordered = (run, self.order.index(positions).reshape(self.run, self.batch))
        return ordered[1][row]

    def holding(self, tokens: int) -> int:
        """The smallest bucket for a text of ``tokens``; the last one cuts what is longer."""
        return next((b for b in self.buckets if b >= tokens), self.length)


class _Batches:
    """An iterator over ``read(number)`` for each of ``numbers``. ``ledger``: bad samples so far. ``close()`` ends the reader
    threads; leaving a ``with`` block does so too."""

    def __init__(self, read: Callable[[int], Any], numbers: range, threads: int, prefetch: int, ledger: Ledger):
        from vlm_jax.data.engine import grain      # which imports JAX: reader processes come to this module for _Steps alone
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch))
        dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(read)
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

    def __init__(self, steps: _Steps, start: int, stop: int | None, threads: int, workers: int, prefetch: int, ledger: Ledger):
        self.readers = Readers(steps, workers) if workers else None
        numbers = range(start, sys.maxsize if stop is None else stop)
        super().__init__(self.readers or steps, numbers, workers or threads, prefetch, ledger)
        self._step = start

    def close(self) -> None:
        if self.readers:
            self.readers.close()
        super().close()

    def __next__(self) -> tuple[int, dict[str, np.ndarray]]:
        if self.readers:
            self.readers.check()
        batch, seen, offences = next(self._iterator)
        self.ledger.add(seen, offences)  # in the order of the steps: a run stops at the same one every time
        if batch is None:
            raise BadDataError(self.ledger.report(f"step {self._step}: {MAX_ATTEMPTS} candidates in a row were bad"))
        step, self._step = self._step, self._step + 1
        return step, batch


def train_batches(source: Any, tokenizer: Tokenizer, *, batch: int, size: int, length: int, augment: str, seed: int,
                  start_step: int = 0, stop_step: int | None = None, threads: int = 2, workers: int = 0, prefetch: int = 4,
                  block: int = 1, window: int = 1, caption: str = "sample", bad_budget: float = 0.01,
                  quarantine_path: str | None = None, buckets: Sequence[int] = (),
                  max_pixels: int = ops.MAX_PIXELS, rows: Rows = PLAIN, layout: Layout = PLAIN_TEXT,
                  instruction_tokenizer: Tokenizer | None = None, features: FeatureStore | None = None,
                  mine: np.ndarray | None = None) -> TrainBatches:
    """Batches of a run from ``start_step`` on (to ``stop_step``, or without end): an iterator of (step, batch).

    ``batch``: rows of the global batch; ``size``: pixels a side; ``length``: tokens; ``augment``: a chain
    (``ops.Chain``); ``threads``: reader threads (0 reads in the calling thread); ``workers``: reader processes instead
    of threads; ``prefetch``: batches made ahead; ``block``, ``window``: the shuffle (``order.Order``); ``caption``:
    "sample" draws one of several captions by their weights, "first" takes the first. A batch is a pure function of
    (seed, step): threads, processes and restarts do not change it. ``rows``: what batches hold beside image and text. ``layout``: how text lies
    in them (``layouts.Layout``); ``length`` is then that of a reply. ``features``: what batches hold instead of images.

    Threads share one interpreter, which decoding and resizing let go of: they do for photographs. Processes pay where
    pictures are small, so that Python is much of the work (docs/results.md), or many threads wait for each other; each has its
    own copy of what the source holds in memory. One that dies is a RuntimeError that names its exit status.

    ``mine``: the rows of each batch that are read, in order, where other processes read the others; a row is the same whoever reads it.

    ``buckets``: text is cropped to the smallest of these lengths, or ``length``, that holds the batch's longest
    caption. Which one follows from (seed, step) and the column of caption lengths (``lengths.token_lengths``), so that processes
    which read parts of a batch agree; a source without that column is told by all rows of the batch, once they are read, and so are other
    layouts than "plain": their bucket holds the longest of text, prompt and instruction.

    A bad sample is replaced by another, drawn from (seed, position, attempt), counted by reason, and written to
    ``quarantine_path``; past ``bad_budget`` (``bad.Ledger``) BadDataError is raised. Raises ValueError for a
    wrong argument.
    """
    if batch < 1 or size < 1 or length < 2 or seed < 0 or workers < 0:
        raise ValueError(f"batch={batch}, size={size}, length={length}, seed={seed}, workers={workers}: at least 1, 1, 2, 0 and 0")
    if rows.swap and buckets:
        raise ValueError(f"swap={rows.swap!r} changes how long texts are, which buckets={tuple(buckets)} must know; nearest: buckets=()")
    writer = Writer(layout, tokenizer, length, instruction_tokenizer)
    reader = _Reader(source, ops.Chain(augment, size), caption, max_pixels, rows, writer, training=True, features=features)
    column = buckets and layout.name == "plain"
    steps = _Steps(reader, order_of(source, seed, block, window), batch=batch, seed=seed, buckets=buckets,
                   lengths=token_lengths(source, tokenizer, rows.text_clean) if column else None, mine=mine)
    if buckets and steps.lengths is None and len(steps.mine) < batch:
        raise ValueError(f"buckets={tuple(buckets)}: {name_of(source)} has no column of text lengths (layout {layout.name!r}), so that a process which reads a "
                         "part of the batch cannot tell its longest; nearest: buckets=()")
    ledger = Ledger(bad_budget, quarantine_path=quarantine_path)
    return TrainBatches(steps, start_step, stop_step, threads, workers, prefetch, ledger)


class PictureBatches(_Batches):
    """Yields (numbers, image, bad): pictures lie in the first rows of ``image`` in the order of ``numbers``; ``bad``: what is wrong with some of them."""

    def __next__(self) -> tuple[list[int], np.ndarray, dict[int, BadSample]]:
        return next(self._iterator)


def picture_batches(source: Any, wanted: Mapping[int, int], *, batch: int, size: int, augment: str, rows: Rows, threads: int = 2,
                    max_pixels: int = ops.MAX_PIXELS) -> PictureBatches:
    """The pictures alone of samples, ``wanted``: number -> sample, in batches of ``batch``; the last one is filled up with black."""
    chain, numbers = ops.Chain(augment, size), list(wanted)

    def read(at: int) -> tuple[list[int], np.ndarray, dict[int, BadSample]]:
        mine = numbers[at * batch:(at + 1) * batch]
        image, bad = np.zeros(rows.image_shape(batch, size), np.uint8), {}
        for row, number in enumerate(mine):
            try:
                draw(image, row, rows.pictures(source[wanted[number]]), chain, np.random.default_rng(0), max_pixels)
            except BadSample as error:
                bad[number] = error
        return mine, image, bad

    return PictureBatches(read, range(-(-len(numbers) // batch)), threads, 2, Ledger(1.0))


class EvalBatches(_Batches):
    """Yields (batch, meta); ``len()`` is the number of batches."""

    def __init__(self, read, count: int, threads: int, prefetch: int, ledger: Ledger):
        super().__init__(read, range(count), threads, prefetch, ledger)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __next__(self) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        batch, meta, seen, offences = next(self._iterator)
        self.ledger.add(seen, offences)
        return batch, meta


def eval_batches(source: Any, tokenizer: Tokenizer | None, *, batch: int, size: int, length: int, augment: str = EVAL_AUGMENT,
                 limit: int | None = None, threads: int = 2, prefetch: int = 2, bad_budget: float = 0.01,
                 quarantine_path: str | None = None, max_pixels: int = ops.MAX_PIXELS, rows: Rows = PLAIN, layout: Layout = PLAIN_TEXT,
                 instruction_tokenizer: Tokenizer | None = None, mine: np.ndarray | None = None) -> EvalBatches:
    """Every sample once (the first ``limit``), in index order: an iterator of (batch, meta).

    ``batch["mask"]`` is False in the rows that fill up the last batch and in those of bad samples, which are
    counted, not replaced (such rows are zero images and empty texts). ``text`` holds the first caption (there is none without a tokenizer). ``meta``
    has one entry per True row, in order: {"key", "captions" (all of them, as they are read), "label" (None without), "index"}, and where the
    sample has them "answers" (as given, with repeats), "kind" (of question), "question_id" and "choices". ``rows``: what batches hold beside image and
    text; a sample without answers or label has weights of 0 and -1. ``layout``: how text lies in them; "captions" are then the replies, "question"
    the prompt, and replies are the answers where there are no others.
    Bad samples count against ``bad_budget`` as in training. ``mine``: the rows of each batch that are read, as in training.
    """
    writer = Writer(layout, tokenizer, length, instruction_tokenizer)
    reader = _Reader(source, ops.Chain(augment, size), "first", max_pixels, rows, writer)
    total = len(source) if limit is None else min(limit, len(source))
    mine = np.arange(batch) if mine is None else mine
    count = len(mine)

    def read(number: int):
        image = np.zeros(rows.image_shape(count, size), np.uint8)
        ids, samples, said = np.zeros((2, count), np.int32), [None] * count, [None] * count
        mask, meta, offences = np.zeros(count, bool), [], []
        indices = [i for i in (number * batch + mine).tolist() if i < total]
        found = reader.fill(image, range(len(indices)), indices, generators(0, np.array(indices), 1))
        for row, (index, sample) in enumerate(zip(indices, found)):
            if isinstance(sample, BadSample):
                offences.append(reader.offence(index, sample))
                continue
            said[row], sample = sample
            mask[row] = True
            ids[:, row] = hash31(normalise_caption(said[row].reply)), hash31(sample["key"])
            samples[row] = reader.rows.keep(sample)
            captions = reader.captions(sample)
            own = {}
            if layout.name != "plain":
                captions = [said[row].reply] if sample.get("prompt") is None and sample.get("answers") or not captions else captions
                own = {"question": said[row].prompt, "answers": captions}
            meta.append({"key": sample["key"], "captions": captions, "label": sample.get("label"), "index": index, **own, **told(sample)})
        return ({**reader.images(image, indices), **(writer.arrays(said, training=False) if tokenizer is not None else {}), "caption_id": ids[0], "image_id": ids[1],
                 "mask": mask, **reader.rows.arrays(samples, writer.replies)}, meta, len(indices), offences)

    ledger = Ledger(bad_budget, quarantine_path=quarantine_path)
    return EvalBatches(read, -(-total // batch), threads, prefetch, ledger)


def preview(source: Any, tokenizer: Tokenizer, *, size: int, length: int, augment: str = EVAL_AUGMENT,
            captions: int = 512, rows: Rows = PLAIN, layout: Layout = PLAIN_TEXT, instruction_tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """What a run is about to read, for the start-up table: the first readable sample and how captions fit.

    {"key", "image" uint8 [size,size,3] (several side by side; None without), "caption", "ids" (real ones), "decoded" (the ids as text again),
    "samples" (in the source), "captions" (looked at), "tokens_mean", "tokens_max", "truncated" (share of the
    captions longer than ``length``)}.
    Captions are of up to ``captions`` samples spread evenly. Raises BadDataError where none of 64 samples can be read.
    """
    writer = Writer(layout, tokenizer, length, instruction_tokenizer)
    reader = _Reader(source, ops.Chain(augment, size), "first", ops.MAX_PIXELS, rows, writer, training=True)
    errors = []
    image = np.empty(rows.image_shape(1, size), np.uint8)
    for index in range(min(MAX_ATTEMPTS, len(source))):
        found, = reader.fill(image, [0], [index], generators(0, np.zeros(1, int), 1))
        if not isinstance(found, BadSample):
            said, sample = found
            break
        errors.append(str(found))
    else:
        raise BadDataError(f"none of the first {len(errors)} samples of {name_of(source)} can be read; "
                           f"the first: {errors[:1]}")
    counts = []
    for i in np.unique(np.linspace(0, len(source) - 1, min(captions, len(source))).astype(np.int64)):
        try:
            each = map(Said.alone, map(reader.clean, read_text(source, int(i)))) if layout.name == "plain" else [
                reader.read(int(i), generators(0, np.array([i]), 1)[0])[0]]
            counts += map(writer.count, each)
        except BadSample:
            continue
    tokens, cut = zip(*counts, strict=True)
    text = writer.arrays([said], training=True)
    ids = text["text"][0][text["text_mask"][0]]
    if "prompt" in text:
        ids = np.concatenate([text["prompt"][0][text["prompt_mask"][0]], ids])
    shown = image[0] if rows.images == 1 else np.concatenate(image[0], axis=1) if rows.images else None
    return {"key": sample["key"], "image": shown, "caption": " ".join(filter(None, (said.prompt, said.reply))), "ids": ids.tolist(),
            "decoded": writer.read_back(ids.tolist()), "samples": len(source), "captions": len(tokens),
            "tokens_mean": float(np.mean(tokens)), "tokens_max": int(max(tokens)),
            "truncated": float(np.mean(cut))}
