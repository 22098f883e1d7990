"""Videos as folders of their frames."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from vlm_jax.data.bad import BadSample
from vlm_jax.data.record import IMAGE_KINDS


class Frames(Sequence):
    """The images in a folder, in the order of the numbers in their names; each is read when it is asked for. Raises BadSample where there are none."""

    def __init__(self, folder: str):
        try:
            names = [name for name in os.listdir(folder) if name.rpartition(".")[2].lower() in IMAGE_KINDS and name[0] != "."]
        except OSError:
            names = []
        if not names:
            raise BadSample("missing_image", f"{folder} holds no frame")
        self.paths = [os.path.join(folder, name) for name in sorted(names, key=_natural)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> bytes:
        try:
            with open(self.paths[i], "rb") as file:
                return file.read()
        except OSError as error:
            raise BadSample("unreadable_file", f"{self.paths[i]}: {error.strerror}") from None


def _natural(name: str) -> list[tuple[int, str]]:
    """"frame10" comes behind "frame9"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]
