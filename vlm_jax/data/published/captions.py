"""Images with captions: Karpathy's files, pairs, TextCaps and NoCaps. One sample an image, with all of its captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_jax.data.json_index import scan
from vlm_jax.data.published.reader import Groups, Listed, Reader


class Karpathy(Listed):
    """{"images": [{"filename", "filepath" (COCO's), "split", "sentences": [{"raw"}], ...}]}."""

    at = "images"

    def keep(self, key: Any, value: Any) -> bool:
        return value["split"] == self.split

    def image(self, i: int) -> str:
        value = self.rows[i]
        return "/".join(filter(None, (value.get("filepath"), value["filename"])))

    def row(self, i: int) -> Mapping[str, Any]:
        value = self.rows[i]
        return {"text": [sentence["raw"] for sentence in value["sentences"]], "question_id": value.get("cocoid", value.get("imgid"))}


class Pairs(Listed):
    """[{"image", "caption"}]. What has an address in the place of the image ("url") is left out: nothing is fetched."""

    def keep(self, key: Any, value: Any) -> bool:
        if "image" not in value:
            self.leave_out("missing_image", f"{self.files[0]} has {value.get('url', 'a row')!r} without the path of an image (\"image\"); "
                                            "fetch them (img2dataset) and read tars:")
        return "image" in value

    def image(self, i: int) -> str:
        return self.rows[i]["image"]

    def row(self, i: int) -> Mapping[str, Any]:
        return {"text": self.rows[i]["caption"]}


class TextCaps(Reader):
    """{"data": [{"image_id", "caption_str", "reference_strs", ...}]}, a caption each; with Rosetta's words beside, where they are."""

    def index(self) -> None:
        ids: list[str] = []

        def take(_, value):
            ids.append(value["image_id"])
            return True

        self.rows = scan(self.files[0], {"data": take})["data"]
        self.groups, self.words = Groups(ids), OcrWords(self)

    def __len__(self) -> int:
        return len(self.groups)

    def image(self, i: int) -> str:
        return f"{self.rows[self.groups[i][0]]['image_id']}.jpg"

    def row(self, i: int) -> Mapping[str, Any]:
        values = [self.rows[k] for k in self.groups[i]]
        texts = [value["caption_str"] for value in values if value.get("caption_str")] or values[0].get("reference_strs", [])
        ocr = self.words[values[0]["image_id"]]
        return {"text": texts, "question_id": values[0]["image_id"], **({"task": "caption_ocr", "slots": {"ocr": ocr}} if ocr else {})}


class OcrWords:
    """{"data": [{"image_id", "ocr_tokens", ...}]} of the file TextVQA_Rosetta_OCR_v0.2_SPLIT.json: the words read in an image; [] without the file."""

    def __init__(self, reader: Reader):
        path = reader.folder.optional(f"TextVQA_Rosetta_OCR_v0.2_{reader.split}.json")
        self.number: dict[str, int] = {}
        self.rows = scan(path, {"data": lambda i, value: self.number.setdefault(value["image_id"], len(self.number)) == len(self.number) - 1}
                         )["data"] if path else None

    def __getitem__(self, image_id: str) -> list[str]:
        number = self.number.get(image_id)
        return [] if number is None else [word for word in self.rows[number]["ocr_tokens"] if word.strip()]


class NoCaps(Reader):
    """{"images": [{"id", "file_name", "domain", ...}], "annotations": [{"image_id", "caption", ...}]}. A split may be one domain."""

    def index(self) -> None:
        ids, of = [], []

        def take_image(_, value):
            if self.split not in ("val", value["domain"]):
                return False
            ids.append(value["id"])
            return True

        def take_caption(_, value):
            of.append(value["image_id"])
            return True

        found = scan(self.files[0], {"images": take_image, "annotations": take_caption})
        self.rows, self.captions, groups = found["images"], found["annotations"], Groups(of)
        number = {of[groups[g][0]]: g for g in range(len(groups))}
        self.of, self.groups = [number.get(i, -1) for i in ids], groups

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> str:
        return self.rows[i]["file_name"]

    def row(self, i: int) -> Mapping[str, Any]:
        value, group = self.rows[i], self.of[i]
        texts = [self.captions[k]["caption"] for k in self.groups[group]] if group >= 0 else []
        return {"text": texts, "kind": value["domain"], "question_id": value["id"]}
