"""What the readers of formats share: rows by number, and rows of one image put together."""

from __future__ import annotations

import array
import collections
import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlm_jax.data.json_index import scan
from vlm_jax.data.record import and_more

if TYPE_CHECKING:
    from vlm_jax.data.published.files import Folder


class DataSet(NamedTuple):
    """title: as its authors call it. task: of ``templates.TEMPLATES``, "" where the data set has its own instructions.
    splits: for each split the names of its files, "a|b" for the first that is there. images: for each split the folders that its images may lie in.
    within: more folders that its files may lie in. group, held: InstructBLIP's group of tasks, and whether it trains on the set ("in") or is tested on
    it unseen ("out"). evaluator, metric: what it is measured by. samples: what the paper counts, for the shares of a mixture; 0 where it has no count.
    labels: the words that may stand for each label, its name first. video: images are folders of frames.
    """
    title: str
    reader: type[Reader]
    task: str
    splits: Mapping[str, tuple[str, ...]]
    images: Mapping[str, tuple[str, ...]]
    group: str
    held: str
    evaluator: str
    metric: str
    samples: int = 0
    within: tuple[str, ...] = ()
    labels: tuple[tuple[str, ...], ...] = ()
    video: bool = False


class Reader:
    """One split of a data set. Subclasses index its files when they are made, and read a row of them.

    A row: {"text": captions, or the reply; where there are any "question" with "answers" as given, or "choices" with "label"; "turns"; "slots",
    "task" where it is not the table's, "kind", "question_id"}.
    """

    def __init__(self, entry: DataSet, split: str, folder: Folder):
        self.entry, self.split, self.folder = entry, split, folder
        self.counts: collections.Counter[str] = collections.Counter()
        self.first: dict[str, str] = {}
        self.files = [folder.find(name) for name in entry.splits[split]]
        self.index()

    def index(self) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def image(self, i: int) -> str:
        """The name of a row's image, or of its folder of frames."""
        return self.images(i)[0]

    def images(self, i: int) -> Sequence[str]:
        """The names that it may have, the published one first."""
        return (self.image(i),)

    def row(self, i: int) -> Mapping[str, Any]:
        raise NotImplementedError

    def leave_out(self, reason: str, what: str, count: int = 1) -> None:
        """Counts what is left out; ``what`` names the first of it."""
        self.counts[reason] += count
        self.first.setdefault(reason, what)

    def refuse_empty(self, what: str = "") -> None:
        """Raises ValueError where no row is left."""
        if not len(self):
            left = "; ".join(self.first[reason] + and_more(count) for reason, count in self.counts.items())
            raise ValueError(f"{self.entry.title}: {self.files[0]} holds no row of the split {self.split!r}{what}{f' ({left})' if left else ''}")


class Listed(Reader):
    """Rows that are the values of one list or object of the file, ``rows``; ``at`` is its name (``json_index.scan``)."""
    at = ""

    def keep(self, key: Any, value: Any) -> bool:
        """Whether a value is a row of the split; called for all of them in order."""
        return True

    def index(self) -> None:
        self.rows = scan(self.files[0], {self.at: self.keep})[self.at]

    def __len__(self) -> int:
        return len(self.rows)


class Groups:
    """Rows that belong together: ``groups[i]`` are the numbers of the rows of the i-th key, in the order of the keys' first rows. 12 bytes a row."""

    def __init__(self, keys: Iterable[Hashable]):
        number: dict[Hashable, int] = {}
        of = np.frombuffer(array.array("i", (number.setdefault(key, len(number)) for key in keys)), np.int32)
        self.order = np.argsort(of, kind="stable")
        self.start = np.concatenate([[0], np.cumsum(np.bincount(of, minlength=len(number)))]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.order[self.start[i]:self.start[i + 1]]


class Parts:
    """Several samples of one record: ``parts[i]`` is (number of the record, number in it) of the i-th sample. 8 bytes a record."""

    def __init__(self, counts: Iterable[int]):
        self.start = np.array([0, *itertools.accumulate(counts)], np.int64)

    def __len__(self) -> int:
        return int(self.start[-1])

    def __getitem__(self, i: int) -> tuple[int, int]:
        record = int(np.searchsorted(self.start, i, "right")) - 1
        return record, i - int(self.start[record])


def match(ids: Sequence[int], others: Sequence[int]) -> np.ndarray:
    """int32 [n]: the place of each id among ``others``, -1 where it is not there."""
    ids, others = np.frombuffer(ids, np.int64), np.frombuffer(others, np.int64)
    if len(ids) == len(others) and (ids == others).all():
        return np.arange(len(ids), dtype=np.int32)
    if not len(others):
        return np.full(len(ids), -1, np.int32)
    order = np.argsort(others, kind="stable")
    at = np.minimum(np.searchsorted(others, ids, sorter=order), len(others) - 1)
    return np.where(others[order[at]] == ids, order[at], -1).astype(np.int32)
