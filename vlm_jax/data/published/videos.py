"""Questions about videos: MSVD-QA, MSRVTT-QA, iVQA. The frames are images in a folder for each video, of the user's own making."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.data.published.questions import asked
from vlm_jax.data.published.reader import Listed, Reader


class VideoQa(Listed):
    """[{"id", "video_id", "question", "answer", ...}]. Frames of video 7 lie in a folder video7 (MSRVTT), vid7 (MSVD) or 7, those of MSVD also in one
    of the video's own name, which youtube_mapping.txt ("NAME vid7" a line) tells."""

    def index(self) -> None:
        super().index()
        self.names: dict[str, str] = {}
        mapping = self.folder.optional("youtube_mapping.txt")
        if mapping:
            with open(mapping, encoding="utf-8") as file:
                self.names = {number: name for name, number in (line.split() for line in file if line.strip())}

    def images(self, i: int) -> Sequence[str]:
        number = str(self.rows[i]["video_id"])
        names = [f"{kind}{number}" for kind in ("video", "vid")][::-1 if "MSVD" in self.entry.title else 1]
        return [*names, number, *([self.names[f"vid{number}"]] if f"vid{number}" in self.names else [])]

    def row(self, i: int) -> Mapping[str, Any]:
        value = self.rows[i]
        return asked(value["question"], [value["answer"]], question_id=value["id"], kind=value["question"].split()[0].lower())


class Ivqa(Reader):
    """A table: video_id,start,end,question,answer1 ... answer5 (with a header). Frames lie in a folder VIDEO_START_END or VIDEO."""

    def index(self) -> None:
        with open(self.files[0], encoding="utf-8", newline="") as file:
            self.rows = list(csv.DictReader(file))
        lacks = [name for name in ("video_id", "question", "answer1") if self.rows and name not in self.rows[0]]
        if lacks:
            raise ValueError(f"{self.files[0]} has no column {lacks[0]!r} (columns: {', '.join(self.rows[0])})")

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, i: int) -> Sequence[str]:
        value = self.rows[i]
        return ["_".join(value[name] for name in ("video_id", "start", "end") if value.get(name)), value["video_id"]]

    def row(self, i: int) -> Mapping[str, Any]:
        value = self.rows[i]
        return asked(value["question"], [value[name] for name in (f"answer{k}" for k in range(1, 6)) if value.get(name)], question_id=i)
