"""Turns of talk about an image: LLaVA-Instruct and VisDial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.data.bad import BadSample
from vlm_jax.data.json_index import scan
from vlm_jax.data.published.choices import chosen
from vlm_jax.data.published.reader import Listed, Parts, Reader


class Llava(Listed):
    """[{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}]. The mark <image> goes, wherever it stands."""

    def keep(self, key: Any, value: Any) -> bool:
        if not value.get("image"):
            self.leave_out("no_image", f"conversation {value.get('id')} of {self.files[0]} has no image")
        return bool(value.get("image"))

    def images(self, i: int) -> Sequence[str]:
        name = self.rows[i]["image"]
        return f"train2017/{name}", name, f"train2014/COCO_train2014_{name}"

    def row(self, i: int) -> Mapping[str, Any]:
        value = self.rows[i]
        said = [(turn["from"], turn["value"].replace("<image>", "").strip()) for turn in value["conversations"]]
        if len(said) % 2 or not said or any(who != ("human", "gpt")[k % 2] for k, (who, _) in enumerate(said)):
            raise BadSample("bad_turns", f"conversation {value.get('id')} is no exchange of human and gpt")
        turns = [(prompt, reply) for (_, prompt), (_, reply) in zip(said[::2], said[1::2])]
        return {"turns": turns, "question_id": value.get("id")}


class VisDial(Reader):
    """{"data": {"questions": [], "answers": [], "dialogs": [{"image_id", "caption", "dialog": [{"question", "answer", "answer_options", "gt_index"}]}]}}.

    A sample is one turn; its history is the caption and the turns before. Its row has the 100 candidates as ``choices``, and in the one turn a
    dialogue that people judged (visdial_1.0_val_dense_annotations.json [{"image_id", "round_id", "gt_relevance"}], where it is there) ``relevance``.
    Turns without candidates are left out.
    """

    def index(self) -> None:
        counts: list[int] = []

        def take(_, value):
            turns = sum("gt_index" in turn for turn in value["dialog"])
            if turns < len(value["dialog"]):
                self.leave_out("no_candidates", f"the dialogue of image {value['image_id']} of {self.files[0]} has turns without the index of the right "
                                                "one among candidates", len(value["dialog"]) - turns)
            counts.append(turns)
            return True

        found = scan(self.files[0], {"data/questions": lambda _, value: True, "data/answers": lambda _, value: True, "data/dialogs": take})
        self.questions, self.answers, self.rows = found["data/questions"], found["data/answers"], found["data/dialogs"]
        self.parts, self.judged, self.relevance = Parts(counts), {}, None
        dense = self.folder.optional(f"visdial_1.0_{self.split}_dense_annotations.json")
        if dense:
            def take_judged(number, value):
                self.judged[value["image_id"], value["round_id"] - 1] = number
                return True
            self.relevance = scan(dense, {"": take_judged})[""]

    def __len__(self) -> int:
        return len(self.parts)

    def images(self, i: int) -> Sequence[str]:
        name = f"{self.rows[self.parts[i][0]]['image_id']:012d}.jpg"
        if self.split == "train":      # COCO's
            return f"train2014/COCO_train2014_{name}", f"val2014/COCO_val2014_{name}"
        name = f"VisualDialog_{self.split}2018_{name}"
        return f"VisualDialog_{self.split}2018/{name}", name

    def row(self, i: int) -> Mapping[str, Any]:
        record, number = self.parts[i]
        value = self.rows[record]
        turns = [turn for turn in value["dialog"] if "gt_index" in turn]
        history = [value["caption"].strip().rstrip(".") + "."]
        for turn in turns[:number]:
            history.append(f"{_question(self.questions[turn['question']])} {self.answers[turn['answer']]}.")
        turn = turns[number]
        row = chosen(_question(self.questions[turn["question"]]), [self.answers[k] for k in turn["answer_options"]], turn["gt_index"],
                     question_id=f"{value['image_id']}/{number + 1}", slots={"history": " ".join(history)})
        judged = self.judged.get((value["image_id"], number))
        return {**row, "relevance": self.relevance[judged]["gt_relevance"]} if judged is not None else row


def _question(text: str) -> str:
    """VisDial's questions have no sign at their end."""
    return text if text.rstrip().endswith("?") else f"{text.rstrip()}?"
