"""Questions with answers in words: VQA's two files and the sets that follow it, VizWiz, A-OKVQA, OCR-VQA, TextVQA, GQA; and the same turned round."""

from __future__ import annotations

import array
import collections
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.data.json_index import scan
from vlm_jax.data.published.captions import OcrWords
from vlm_jax.data.published.reader import Listed, Parts, Reader, match


def asked(question: str, answers: Sequence[str], **more: Any) -> dict[str, Any]:
    """The row of a question; without answers where nobody was asked."""
    return {"question": question, **({"answers": list(answers)} if answers else {}), **more}


def turned(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of an answer to which the question is sought: the one given most often, the first of equals."""
    (answer, _), = collections.Counter(row["answers"]).most_common(1)
    return {"text": row["question"], "slots": {"a": answer}, "question_id": row["question_id"]}


class Vqa(Reader):
    """{"questions": [{"image_id", "question", "question_id"}], "data_subtype"} and {"annotations": [{"question_id", "answers": [{"answer"}],
    "answer_type", ...}]}. 28 bytes a question."""

    def index(self) -> None:
        ids, others = array.array("q"), array.array("q")

        def take_into(found):
            def take(_, value):
                found.append(value["question_id"])
                return True
            return take

        self.rows, self.answers, self.of = scan(self.files[0], {"questions": take_into(ids)})["questions"], None, None
        if len(self.files) > 1:
            self.answers = scan(self.files[1], {"annotations": take_into(others)})["annotations"]
            self.of = match(ids, others)
            lonely = (self.of < 0).nonzero()[0]
            if len(lonely):
                self.leave_out("missing_answer", f"{self.files[1]} has no answers to question {ids[lonely[0]]} of {self.files[0]}", len(lonely))
                self.rows, self.of = self.rows.select((self.of >= 0).nonzero()[0]), self.of[self.of >= 0]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, i: int) -> Sequence[str]:
        folder = {"train": "train2014", "val": "val2014"}.get(self.split, "test2015")
        name = f"COCO_{folder}_{self.rows[i]['image_id']:012d}.jpg"
        return f"{folder}/{name}", name

    def row(self, i: int) -> Mapping[str, Any]:
        value = self.rows[i]
        said = self.answers[self.of[i]] if self.answers is not None else {}
        row = asked(value["question"], [a["answer"] for a in said.get("answers", ())], question_id=value["question_id"],
                    **({"kind": said["answer_type"]} if "answer_type" in said else {}))
        return turned(row) if self.entry.task == "vqg" else row


class VizWiz(Listed):
    """[{"image", "question", "answers": [{"answer", "answer_confidence"}], "answer_type", "answerable"}]; the test has no answers."""

    def image(self, i: int) -> str:
        return self.rows[i]["image"]

    def row(self, i: int) -> Mapping[str, Any]:
        value = self.rows[i]
        return asked(value["question"], [a["answer"] for a in value.get("answers", ())], question_id=value["image"],
                     **({"kind": value["answer_type"]} if "answer_type" in value else {}))


class AokVqa(Listed):
    """[{"image_id", "question_id", "question", "choices", "correct_choice_idx", "direct_answers", "rationales", ...}]; the test has no answers."""

    def images(self, i: int) -> Sequence[str]:
        name = f"{self.rows[i]['image_id']:012d}.jpg"
        return f"{self.split}2017/{name}", name

    def row(self, i: int) -> Mapping[str, Any]:
        value = self.rows[i]
        row = asked(value["question"], value.get("direct_answers", ()), question_id=value["question_id"],
                    kind="difficult" if value.get("difficult_direct_answer") else "plain")
        return turned(row) if self.entry.task == "vqg" else row


class OcrVqa(Listed):
    """{id: {"imageURL", "title", "authorName", "genre", "questions": [], "answers": [], "split": 1 | 2 | 3}}; images are ID.KIND as in their address."""

    def keep(self, key: Any, value: Any) -> bool:
        if int(value["split"]) != {"train": 1, "val": 2, "test": 3}[self.split] or not value["questions"]:
            return False
        self.asked.append(len(value["questions"]))
        return True

    def index(self) -> None:
        self.asked = array.array("i")
        super().index()
        self.parts = Parts(self.asked)

    def __len__(self) -> int:
        return len(self.parts)

    def images(self, i: int) -> Sequence[str]:
        name, value = self.rows.item(self.parts[i][0])
        return name + os.path.splitext(value["imageURL"])[1], f"{name}.jpg"

    def row(self, i: int) -> Mapping[str, Any]:
        record, number = self.parts[i]
        name, value = self.rows.item(record)
        return asked(value["questions"][number], [str(value["answers"][number])], question_id=f"{name}/{number}")


class TextVqa(Listed):
    """{"data": [{"question_id", "question", "image_id", "answers": [...], ...}]}, with Rosetta's words beside, where they are."""

    at = "data"

    def index(self) -> None:
        super().index()
        self.words = OcrWords(self)

    def image(self, i: int) -> str:
        return f"{self.rows[i]['image_id']}.jpg"

    def row(self, i: int) -> Mapping[str, Any]:
        value = self.rows[i]
        row, ocr = asked(value["question"], value.get("answers", ()), question_id=value["question_id"]), self.words[value["image_id"]]
        return {**row, "task": "vqa_ocr", "slots": {"ocr": ocr}} if ocr else row


class Gqa(Listed):
    """{id: {"question", "imageId", "answer", "types": {"structural", ...}, ...}}."""

    def image(self, i: int) -> str:
        return f"{self.rows[i]['imageId']}.jpg"

    def row(self, i: int) -> Mapping[str, Any]:
        name, value = self.rows.item(i)
        return asked(value["question"], [value["answer"]] if "answer" in value else [], question_id=name,
                     **({"kind": value["types"]["structural"]} if value.get("types") else {}))
