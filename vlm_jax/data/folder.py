"""Images in folders: with a text beside each, or sorted into folders by class.

    photos/a.jpg  photos/a.txt  photos/2024/b.png  photos/2024/b.txt      captions
    photos/golden_retriever/a.jpg  photos/tabby cat/b.jpg                 classes

Captions it is where any image has its text (``a.txt`` beside ``a.jpg``), else classes where the folders in ``photos`` hold the
images. The option ``caption`` decides where both could be meant: a field ("txt", "json:title" of ``a.json``) says captions, a
template ("a photo of a {}") classes. Hidden files and folders, ``__MACOSX`` and the like are left alone.
"""

from __future__ import annotations

import array
import collections
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data.bad import BadSample
from vlm_jax.data.record import IMAGE_KINDS, TEMPLATE, RecordSource, and_more, parse_captions, parse_field
from vlm_jax.errors import nearest

IGNORED = ("__MACOSX", "@eaDir", "lost+found", "Thumbs.db", "desktop.ini")      # what systems leave behind, beside hidden names
OTHER_IMAGES = ("heic", "heif", "avif", "jxl", "tif", "tiff", "svg", "psd", "dng", "cr2", "cr3", "nef", "arw", "raf")
SPLITS = ("train", "val", "valid", "validation", "test", "dev", "eval")


class _Listing(NamedTuple):
    """A folder: its path below the root ("" for the root), its files and folders by name, and names that cannot be read."""
    path: str
    files: list[str]
    folders: list[str]
    broken: list[str]
    error: str


def walk(root: str) -> Iterator[_Listing]:
    """The folders of ``root``: itself, then those in it by name, each followed by its own. Links are followed; a folder that is
    reached twice is read once."""
    stack, seen = [""], set()
    while stack:
        path = stack.pop()
        files, folders, broken = [], [], []
        try:
            stat = os.stat(os.path.join(root, path))
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(os.path.join(root, path)) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == "." or name in IGNORED:
                        continue
                    try:
                        if entry.is_file():
                            files.append(name)
                        elif entry.is_dir():
                            folders.append(name)
                        elif entry.is_symlink():
                            broken.append(name)
                    except OSError:      # a link to itself
                        broken.append(name)
        except OSError as error:
            yield _Listing(path, [], [], [], error.strerror or str(error))
            continue
        yield _Listing(path, sorted(files), sorted(folders), sorted(broken), "")
        stack += [f"{path}/{name}" if path else name for name in sorted(folders, reverse=True)]


class FolderSource(RecordSource):
    """The images below a folder, in the order of their folders and names. Key = path below it, with "/".

    With captions, a text file is one caption, its white space made single spaces; several captions of an image are a list in
    its JSON file. With classes, the label is the number of the class folder among all of them, sorted, empty ones too; ``classes``
    are their names with spaces for "_", and ``caption`` is a template, or several joined by ";", each a caption.

    What is left out is counted ("missing_caption", "missing_class": an image beside the class folders, "missing_image": a text
    without its image, "unsupported_format", "broken_link", "name_not_utf8").
    Raises FileNotFoundError where there is no such folder, ValueError where a folder cannot be read or holds nothing usable.
    """

    def __init__(self, path: str, caption: str | None = None, label: str | None = None, classes: Sequence[str] | None = None,
                 answer: str | None = None):
        if not path:
            raise ValueError("folder: names no folder; write folder:PATH")
        self.path = path = os.path.expanduser(path).rstrip("/") or "/"
        if not os.path.isdir(path):
            parent = os.path.dirname(path) or "."
            beside = sorted(e.name for e in os.scandir(parent) if e.is_dir()) if os.path.isdir(parent) else []
            raise FileNotFoundError(f"{path} is a file, not a folder" if os.path.exists(path) else
                                    f"no folder {path}{nearest(os.path.basename(path), beside) if beside else ''}")
        by_class = caption is not None and "{" in caption
        super().__init__(f"folder:{path}", caption or "txt", "json:label" if by_class else label, classes, answer)
        captioned = self._read_folders()
        if not by_class and (caption is not None or label or captioned.any()):
            self._keep_captioned(captioned)
            return
        top = sorted({folder.partition("/")[0] for folder in self._folders} - {""})
        if not by_class:
            self._check_classes(top)
            self.captions, self.label = parse_captions(TEMPLATE), parse_field("json:label")
        self._keep_classes(top)

    # ---- what is there

    def _read_folders(self) -> np.ndarray:
        """Fills the table of images; returns which have a caption, bool [n]."""
        ends = [end for kind in set(self._caption_kinds()) for end in ("." + kind, "." + kind.upper())]
        names, name_end, folder_of, captioned = bytearray(), array.array("q"), array.array("i"), array.array("b")
        self._folders: list[str] = []
        self._other_kinds: collections.Counter[str] = collections.Counter()
        self._lonely: collections.Counter[str] = collections.Counter()      # texts without an image; of each folder the first
        unreadable = []
        for listing in walk(self.path):
            if listing.error:
                unreadable.append(f"{self._full(listing.path)} ({listing.error})")
            for name in listing.broken:
                self._leave_out("broken_link", f"{self._full(listing.path, name)} is a link to nothing")
            number = len(self._folders)
            self._folders.append(listing.path)
            texts, stems = {name[:-len(end)] for name in listing.files for end in ends if name.endswith(end)}, set()
            for name in listing.files:
                stem, dot, kind = name.rpartition(".")
                kind = kind.lower()
                if kind in IMAGE_KINDS and stem:
                    stems.add(stem)
                    try:
                        listing.path.encode()
                        names += name.encode()
                    except UnicodeEncodeError:
                        self._leave_out("name_not_utf8", f"{self._full(listing.path, name)!r} has a name that is not UTF-8")
                        continue
                    name_end.append(len(names))
                    folder_of.append(number)
                    captioned.append(stem in texts)
                else:
                    self._other_kinds[kind if stem else ""] += 1
                    if kind in OTHER_IMAGES:
                        stems.add(stem)
                        self._leave_out("unsupported_format", f"{self._full(listing.path, name)} is in a format that is not read")
            if texts - stems:
                self._lonely[self._full(listing.path, min(texts - stems))] += len(texts - stems)
        if unreadable:
            raise ValueError(f"{self.name}: cannot read {unreadable[0]}{and_more(len(unreadable))}")
        if not name_end:
            raise ValueError(f"{self.name} holds no image: looked for {' '.join('.' + k for k in IMAGE_KINDS)} in it and its folders"
                             f"{self._told_others()}")
        self._names, self._name_end = bytes(names), np.frombuffer(name_end, np.int64)
        self._folder_of = np.frombuffer(folder_of, np.int32)
        self._rows = np.arange(len(self._folder_of))
        return np.frombuffer(captioned, np.bool_)

    def _keep_captioned(self, captioned: np.ndarray) -> None:
        self._class_of = None
        missing = np.flatnonzero(~captioned)
        if len(missing):
            self._leave_out("missing_caption", self._no_caption(int(missing[0])), len(missing))
        if len(missing) == len(captioned):
            raise ValueError(f"{self.name}: {self.first['missing_caption']}{and_more(len(missing))}{self._told_others()}")
        for stem, count in self._lonely.items():
            self._leave_out("missing_image", f"{stem}.{self._caption_kinds()[0]} has no image beside it", count)
        self._rows = np.flatnonzero(captioned)

    def _check_classes(self, top: list[str]) -> None:
        """Raises ValueError unless the folder looks like one of class folders."""
        filled = {self._folders[i].partition("/")[0] for i in np.unique(self._folder_of)} - {""}
        if len(filled) < 2:
            raise ValueError(f"{self.name}: {self._no_caption(0)}{and_more(len(self._rows))}. A folder needs a text beside each image, or "
                             f"else two or more folders with the images of a class each{self._told_others()}")
        if {name.lower() for name in filled} <= set(SPLITS):
            raise ValueError(f"{self.name}: its folders are {', '.join(top)}; open one of them, such as folder:{self._full(top[0])}")

    def _keep_classes(self, top: list[str]) -> None:
        names, number = [name.replace("_", " ") for name in top], {name: i for i, name in enumerate(top)}
        self._class_of = np.array([number.get(folder.partition("/")[0], -1) for folder in self._folders], np.int32)
        of_row = self._class_of[self._folder_of]
        self._rows, loose = np.flatnonzero(of_row >= 0), np.flatnonzero(of_row < 0)
        if len(loose):
            self._leave_out("missing_class", f"{self._full(self._path(int(loose[0])))} is in no class folder", len(loose))
        if not len(self._rows):
            raise ValueError(f"{self.name}: {self.first['missing_class']}{and_more(len(loose))}; the caption "
                             f"{'; '.join(str(f) for f, _ in self.captions)!r} needs a folder with the images of each class")
        for i in sorted(set(range(len(top))) - set(of_row.tolist())):
            self._leave_out("empty_class", f"{self._full(top[i])} holds no image")
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"{self.name}: two class folders are called {twice[0]!r} (\"_\" counts as a space){and_more(len(twice))}")
        if self._classes is not None and len(self._classes) != len(top):
            raise ValueError(f"{self.name} has {len(top)} class folders, but classes names {len(self._classes)}")
        self._classes = self._classes or names

    def _leave_out(self, reason: str, what: str, count: int = 1) -> None:
        self.counts[reason] += count
        self.first.setdefault(reason, what)

    # ---- messages

    def _full(self, *parts: str) -> str:
        return os.path.join(self.path, *filter(None, parts))

    def _no_caption(self, row: int) -> str:
        path = self._full(self._path(row))
        wanted = " or ".join(f"{path.rpartition('.')[0]}.{kind}" for kind in dict.fromkeys(self._caption_kinds()))
        return f"{path} has no caption ({wanted})"

    def _told_others(self) -> str:
        found = [f"{n} .{kind}" if kind else f"{n} without an extension" for kind, n in self._other_kinds.most_common(5)]
        return f" (other files there: {', '.join(found)})" if found else ""

    # ---- samples

    def _path(self, row: int) -> str:
        start = int(self._name_end[row - 1]) if row else 0
        name = self._names[start:int(self._name_end[row])].decode()
        folder = self._folders[self._folder_of[row]]
        return f"{folder}/{name}" if folder else name

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        return self._path(int(self._rows[i]))

    def record(self, i: int, kinds: tuple[str, ...] | None = None) -> dict[str, Any]:
        row = int(self._rows[i])
        path = self._full(self._path(row))
        record: dict[str, Any] = {}
        if kinds is None:
            image = _read(path)
            if image is None:
                raise BadSample("missing_image", path)
            record["image"] = image
            kinds = tuple(field.kind for field in self.fields())
        if self._class_of is not None:
            label = int(self._class_of[self._folder_of[row]])
            return {**record, "json": {"label": label, "class_name": self._classes[label]}}
        stem = path.rpartition(".")[0]
        for kind in kinds:
            content = _read(f"{stem}.{kind}")
            content = _read(f"{stem}.{kind.upper()}") if content is None else content
            if content is not None:
                record[kind] = content
        return record


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError as error:
        raise BadSample("unreadable_file", f"{path}: {error.strerror}") from None

