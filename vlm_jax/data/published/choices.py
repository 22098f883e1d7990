"""Questions with answers to choose from: A-OKVQA's other half, ScienceQA, IconQA; statements to be judged: VSR, HatefulMemes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.data.bad import BadSample
from vlm_jax.data.published.questions import AokVqa
from vlm_jax.data.published.reader import Listed, Reader

NO_YES = (("no", "false"), ("yes", "true"))      # the words that may stand for a label, its name first


def judged(statement: str, label: int, **more: Any) -> dict[str, Any]:
    """The row of a statement that is true or not."""
    return chosen(statement, [words[0] for words in NO_YES], label, **more)


def chosen(question: str, choices: Sequence[str], label: int, **more: Any) -> dict[str, Any]:
    """The row of a question whose answer is ``choices[label]``."""
    choices = [str(choice) for choice in choices]
    if not 0 <= label < len(choices):
        raise BadSample("unknown_label", f"label {label} of {len(choices)} choices")
    return {"question": question, "text": choices[label], "choices": choices, "label": label, **more}


class AokVqaChoice(AokVqa):
    """The same file as of the answers in words."""

    def row(self, i: int) -> Mapping[str, Any]:
        value = self.rows[i]
        return chosen(value["question"], value["choices"], value["correct_choice_idx"], question_id=value["question_id"])


class ScienceQa(Listed):
    """{id: {"question", "choices", "answer", "hint", "image", "split", "subject", ...}}. Problems without an image are left out."""

    def keep(self, key: Any, value: Any) -> bool:
        if value["split"] != self.split:
            return False
        if not value.get("image"):
            self.leave_out("no_image", f"problem {key} of {self.files[0]} has no image")
        return bool(value.get("image"))

    def image(self, i: int) -> str:
        name, value = self.rows.item(i)
        return f"{value['split']}/{name}/{value['image']}"

    def row(self, i: int) -> Mapping[str, Any]:
        name, value = self.rows.item(i)
        row = chosen(value["question"], value["choices"], value["answer"], question_id=name, kind=value.get("subject", ""))
        hint = value.get("hint", "").strip()
        return {**row, "task": "choice_context", "slots": {"history": hint}} if hint else row


class IconQa(Reader):
    """A folder for each problem, SPLIT/choose_txt/ID, with data.json {"question", "choices", "answer", ...} and image.png."""

    def index(self) -> None:
        with os.scandir(self.files[0]) as entries:
            self.names = sorted((e.name for e in entries if e.name[0] != "." and e.is_dir()), key=lambda name: (len(name), name))

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int) -> str:
        return f"{self.split}/choose_txt/{self.names[i]}/image.png"

    def row(self, i: int) -> Mapping[str, Any]:
        path = os.path.join(self.files[0], self.names[i], "data.json")
        try:
            with open(path, encoding="utf-8") as file:
                value = json.load(file)
        except (OSError, ValueError) as error:
            raise BadSample("bad_json", f"{path}: {error}") from None
        return chosen(value["question"], value["choices"], int(value["answer"]), question_id=self.names[i])


class Vsr(Listed):
    """{"image", "caption", "label": 0 | 1, "relation", ...} a line: whether the caption is true of the image."""

    def image(self, i: int) -> str:
        return self.rows[i]["image"]

    def row(self, i: int) -> Mapping[str, Any]:
        value = self.rows[i]
        return judged(value["caption"], int(value["label"]), relation=value.get("relation"))


class HatefulMemes(Listed):
    """{"id", "img", "label": 0 | 1, "text"} a line: whether the meme with these words is hateful. The first release's test has no labels."""

    def keep(self, key: Any, value: Any) -> bool:
        if "label" not in value:
            self.leave_out("missing_label", f"{self.files[0]} has no label for {value.get('img')}")
        return "label" in value

    def image(self, i: int) -> str:
        return self.rows[i]["img"]

    def row(self, i: int) -> Mapping[str, Any]:
        value = self.rows[i]
        return judged(value["text"], int(value["label"]), question_id=value["id"], slots={"ocr": value["text"]})
