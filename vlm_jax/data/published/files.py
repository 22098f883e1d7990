"""Finding a data set's files in the folder that a user names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from vlm_jax.data.bad import BadSample
from vlm_jax.data.record import IMAGE_KINDS, and_more
from vlm_jax.errors import nearest

FOLDERS = ("", "annotations", "Annotations", "questions")      # where archives unpack their tables
BASES = ("", "images", "../coco", "../coco/images")      # where they unpack their images; COCO may lie beside, for several sets
LOOKED_AT = 64      # records whose images are looked for when a source is opened


class Folder:
    """The folder of a data set. ``within``: more folders in it where its tables may lie. Raises FileNotFoundError where there is none."""

    def __init__(self, title: str, path: str, within: Sequence[str] = ()):
        self.title, self.path, self.within = title, os.path.expanduser(path).rstrip("/") or "/", (*FOLDERS, *within)
        if not os.path.isdir(self.path):
            parent = os.path.dirname(self.path) or "."
            beside = sorted(e.name for e in os.scandir(parent) if e.is_dir()) if os.path.isdir(parent) else []
            raise FileNotFoundError(f"{title}: no folder {path}{nearest(os.path.basename(self.path), beside) if beside else ''}")

    def find(self, names: str) -> str:
        """The path of a file, "a.json" or "a.json|b.json" for the first that is there. Raises FileNotFoundError naming what is there instead."""
        for name in names.split("|"):
            for folder in self.within:
                path = os.path.join(self.path, folder, name)
                if os.path.exists(path):
                    return path
        there = sorted({e.name for folder in self.within if os.path.isdir(os.path.join(self.path, folder))
                        for e in os.scandir(os.path.join(self.path, folder)) if e.name[0] != "." and not e.name.endswith(IMAGE_KINDS)})
        wanted = names.replace("|", " or ")
        raise FileNotFoundError(f"{self.title} needs {wanted} in {self.path}" + (nearest(names.split("|")[0], there[:200]) if there else
                                                                               "; the folder holds no table"))

    def optional(self, names: str) -> str | None:
        """The path of a file, or None."""
        try:
            return self.find(names)
        except FileNotFoundError:
            return None

    def image_root(self, folders: Sequence[str], length: int, names: Callable[[int], Sequence[str]]) -> str:
        """Where the images lie: the first of ``folders`` that has that of the first record, or of one of 63 others spread over all.

        ``names`` gives the names that a record's image, or its folder of frames, may have. Raises FileNotFoundError naming the first image that is
        missing and how many more.
        """
        roots = [os.path.normpath(os.path.join(self.path, base, folder)) for folder in folders for base in BASES]
        roots = [root for root in dict.fromkeys(roots) if os.path.isdir(root)]
        rows = np.unique(np.linspace(0, length - 1, min(LOOKED_AT, length)).astype(np.int64)).tolist()
        for row in rows:
            found = next((root for root in roots for name in names(row) if os.path.exists(os.path.join(root, name))), None)
            if found:
                return found
        told = ", ".join(dict.fromkeys(os.path.normpath(os.path.join(self.path, folder)) for folder in folders))
        raise FileNotFoundError(f"{self.title}: no image {names(rows[0])[0]}{and_more(len(rows))} of {len(rows)} that were looked for in {told}, its folder "
                                f"images, and the folder coco beside {self.path}; move or link the images there")


def read_image(root: str, name: str) -> bytes:
    """An image's bytes. Raises BadSample."""
    path = os.path.join(root, name)
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise BadSample("missing_image", path) from None
    except OSError as error:
        raise BadSample("unreadable_file", f"{path}: {error.strerror}") from None
