"""What a row of a batch holds beside one image and its text: answers or candidates, a label, several images, a video's frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import ops
from vlm_jax.data.bad import BadSample
from vlm_jax.data.clean import Clean
from vlm_jax.data.tokenizers import Tokenizer
from vlm_jax.errors import nearest

SWAPS = ("", "sides")
_OTHER = {"left": "right", "right": "left"}


@dataclasses.dataclass(frozen=True)
class Rows:
    """The keys of a batch, by what a stage's data section asks for (``config.Data`` says what the fields mean); the defaults ask for nothing.

    classes: how many there are, 0 for no ``label``. candidates: the answers of a row are its ``choices``, of which ``label`` is the right one.
    Raises ValueError for values that do not go together.
    """
    answers: int = 0
    answer_length: int = 0
    images: int = 1
    classes: int = 0
    swap: str = ""
    text_clean: str = ""
    candidates: bool = False

    def __post_init__(self):
        if self.answers < 0:
            raise ValueError(f"answers={self.answers} must be at least 0; nearest: 0")
        if self.answers and self.answer_length < 2:
            raise ValueError(f"answers={self.answers} needs answer_length, the ids of an answer, of at least 2, not {self.answer_length}; nearest: 8")
        if self.answer_length and not self.answers:
            raise ValueError(f"answer_length={self.answer_length} has no use without answers={self.answers}; nearest: answers=1")
        if self.images < 0:
            raise ValueError(f"images={self.images} must be at least 0, which is text alone; nearest: 1")
        if self.candidates and self.answers and self.classes:
            raise ValueError(f"answers={self.answers} are candidates where prompts and replies are laid out, and label is the right one, not one of "
                             f"{self.classes} classes; nearest: classes=()")
        if self.classes == 1:
            raise ValueError("classes names 1 class; nearest: 2 or more, or () for batches without labels")
        if self.swap not in SWAPS:
            raise ValueError(f"swap={self.swap!r} is not known{nearest(self.swap, SWAPS[1:])}")
        if self.swap and self.images != 2:
            raise ValueError(f"swap={self.swap!r} is for two images a row, not images={self.images}; nearest: images=2")
        Clean(self.text_clean)

    def image_shape(self, batch: int, size: int) -> tuple[int, ...]:
        """Of the images; (batch, 0, size, size, 3) for none."""
        return (batch, size, size, 3) if self.images == 1 else (batch, self.images, size, size, 3)

    @property
    def image_key(self) -> str:
        return "image" if self.images == 1 else "images"

    def pictures(self, sample: Mapping[str, Any]) -> Sequence[Any]:
        """The images of a raw sample; of a video, or an animation, so many frames. Raises BadSample where there are not as many as asked for."""
        if self.images == 0:
            return ()
        if self.images == 1:
            found = [sample.get("image") if sample.get("frames") is None else sample["frames"][0]]
        else:
            found = sample.get("images") or [sample.get("image")]
            if sample.get("frames") is not None:
                found = [sample["frames"][i] for i in spread_frames(len(sample["frames"]), self.images)]
            elif len(found) == 1 and isinstance(found[0], bytes):
                found = ops.decode_frames(found[0], lambda count: spread_frames(count, self.images))
            if len(found) != self.images:
                raise BadSample("image_count", f"{len(found)} instead of images={self.images}")
        if any(picture is None for picture in found):
            raise BadSample("missing_image")
        return found

    def moving(self, sample: Mapping[str, Any]) -> bool:
        """Whether the images of a row are frames of one video."""
        return self.images > 1 and not sample.get("images")

    def check(self, sample: Mapping[str, Any], training: bool) -> None:
        """Raises BadSample where a sample lacks what training asks for, or has a label beyond the classes."""
        label = sample.get("label")
        if self.classes and label is not None and not 0 <= label < self.classes:
            raise BadSample("unknown_label", f"label={label} of {self.classes} classes")
        if training and self.classes and label is None:
            raise BadSample("missing_label")
        if self.candidates:
            if self.answers and len(sample.get("choices") or ()) > self.answers:
                raise BadSample("too_many_choices", f"{len(sample['choices'])}, more than answers={self.answers}")
        elif training and self.answers and not sample.get("answers"):
            raise BadSample("missing_answer")

    def keep(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """What ``arrays`` reads of a raw sample."""
        return {key: sample[key] for key in ("answers", "answer_weights", "label", "choices") if key in sample}

    def arrays(self, samples: Sequence[Mapping[str, Any] | None], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        """The keys of a batch with these rows; None is a row without a sample."""
        out: dict[str, np.ndarray] = {}
        if self.answers:
            shape = (len(samples), self.answers, self.answer_length)
            ids, mask, weight = np.full(shape, tokenizer.pad_id, np.int32), np.zeros(shape, bool), np.zeros(shape[:2], np.float32)
            key = "choices" if self.candidates else "answers"
            given = [list((sample or {}).get(key) or ())[:self.answers] for sample in samples]
            texts = [text for row in given for text in row]
            if texts:
                at = np.arange(self.answers) < np.array([len(row) for row in given])[:, None]
                ids[at], mask[at], _ = tokenizer(texts, self.answer_length)
                if not self.candidates:
                    weight[at] = [w for sample, row in zip(samples, given) if row for w in sample["answer_weights"][:len(row)]]
            out |= {"answer": ids, "answer_mask": mask} | ({} if self.candidates else {"answer_weight": weight})
        if self.classes or (self.candidates and self.answers):
            labels = [(sample or {}).get("label") for sample in samples]
            out["label"] = np.array([-1 if label is None else label for label in labels], np.int32)
        return out


PLAIN = Rows()


def swap_sides(text: str) -> str:
    """The words left and right exchanged."""
    return " ".join(_OTHER.get(word, word) for word in text.split(" "))


def spread_frames(count: int, wanted: int) -> list[int]:
    """The numbers of ``wanted`` frames of ``count``: the first of as many equal parts. Few frames are repeated."""
    return [i * count // wanted for i in range(wanted)]


def told(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation is told of a sample's question: every answer as given, its kind and number, what could be chosen."""
    found = {"answers": "all_answers", "kind": "kind", "question_id": "question_id", "choices": "choices"}
    return {name: sample[key] for name, key in found.items() if key in sample}
