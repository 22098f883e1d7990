"""Wordings of instructions, by task.

``origin`` says whose a wording is: "paper" is the table of templates in the appendix of arXiv 2305.06500, as the paper has it, grammar and
all; "ours" is written for this project, where the paper names a task and lists nothing. A template's slots are filled by ``fill``:

=========== =============================================================================================
{q}         the question, or what else a sample asks
{a}         the answer, where the question is what is to be written
{choices}   what may be chosen from, "(a) red (b) blue"
{history}   earlier turns, or what was said of the picture
{ocr}       words that were read in the picture, "stop, main st", at most 30
=========== =============================================================================================

The first template of a task is the one of evaluation unless ``data.eval_template`` names another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlm_jax.errors import nearest

SLOTS = ("q", "a", "choices", "history", "ocr")
OCR_MOST = 30      # words that were read; as in the official code
_SLOT = re.compile(r"\{(\w*)\}")


class Template(NamedTuple):
    """A wording and whose it is: "paper" or "ours"."""
    text: str
    origin: str = "ours"

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(_SLOT.findall(self.text))


def _paper(*texts: str) -> tuple[Template, ...]:
    return tuple(Template(text, "paper") for text in texts)


def _ours(*texts: str) -> tuple[Template, ...]:
    return tuple(Template(text) for text in texts)


_CAPTION = _paper(
    "A short image caption:", "A short image description:", "A photo of", "An image that shows", "Write a short description for the image.",
    "Write a description for the photo.", "Provide a description of what is presented in the photo.", "Briefly describe the content of the image.",
    "Can you briefly explain what you see in the image?", "Could you use a few words to describe what you perceive in the photo?",
    "Please provide a short depiction of the picture.", "Using language, provide a short account of the image.",
    "Use a few words to illustrate what is happening in the picture.")
_VQA = _paper(
    "{q}", "Question: {q}", "{q} A short answer to the question is", "Q: {q} A:", "Question: {q} Short answer:",
    "Given the image, answer the following question with no more than three words. {q}",
    "Based on the image, respond to this question with a short answer: {q}. Answer:",
    "Use the provided image to answer the question: {q} Provide your answer as short as possible:",
    'What is the answer to the following question? "{q}"', 'The question "{q}" can be answered using the image. A short answer is')
_VQG = _paper(
    "Given the image, generate a question whose answer is: {a}. Question:", "Based on the image, provide a question with the answer: {a}. Question:",
    'Given the visual representation, create a question for which the answer is "{a}".',
    "From the image provided, craft a question that leads to the reply: {a}. Question:",
    "Considering the picture, come up with a question where the answer is: {a}.",
    "Taking the image into account, generate an question that has the answer: {a}. Question:")


def _after_ocr(templates: Sequence[Template]) -> tuple[Template, ...]:
    """The words read in the picture come behind the picture: section 3 of the paper says so and lists no wording."""
    return tuple(Template("OCR tokens: {ocr}. " + t.text) for t in templates)


TEMPLATES: Mapping[str, tuple[Template, ...]] = {
    "caption": _CAPTION,
    "caption_ocr": _after_ocr(_CAPTION),
    "vqa": _VQA,
    "vqa_ocr": _after_ocr(_VQA),
    "vqg": _VQG,
    "choice": _ours(
        "Question: {q} Options: {choices}. Answer:", "{q} Choose from: {choices}. Answer:", "Question: {q} Which of these is right? {choices}. Short answer:",
        "Look at the image and choose. {q} {choices}. The answer is"),
    "choice_context": _ours(
        "Context: {history} Question: {q} Options: {choices}. Answer:", "{history} {q} Choose from: {choices}. Answer:"),
    "choice_rationale": _ours(
        "Question: {q} Options: {choices}. Answer and say why:", "{q} Choose from: {choices}. Give the answer and the reason for it:"),
    "dialogue": _ours(
        "Dialog history: {history}\nQuestion: {q} Short answer:", "{history} Question: {q} Short answer:", "Given what was said, {history} answer: {q}"),
    "statement": _ours(
        'Based on the image, is this statement true or false? "{q}" Answer:', "Is this true of the image: {q} Answer yes or no:"),
    "hateful": _ours(
        "This is an image with: \"{ocr}\" written on it. Is it hateful? Answer:", 'Question: Is this image with the words "{ocr}" hateful? Answer yes or no:'),
    "detail": _ours(
        "Describe the image in detail.", "Write a detailed description of the image.", "What can be seen in the image? Describe everything."),
    "video": _ours(
        "Question: {q} Short answer:", "{q}", "Watch the frames and answer. {q} Short answer:"),

    # the embedded scenes: lower case, few words
    "scenes_caption": _ours("a short caption", "describe the picture in short", "write a short caption of the picture", "what does the picture show"),
    "scenes_detail": _ours("describe the picture in detail", "a detailed description", "write all that can be seen in the picture"),
    "scenes_vqa": _ours("question: {q} short answer:", "{q}?", "q: {q} a:", "look at the picture and answer the question: {q} answer:",
                        "{q}? a short answer to the question is"),
    "scenes_vqg": _ours("write a question with the answer: {a} question:", "what question has the answer {a}?",
                        "look at the picture and write a question with the answer: {a} question:"),
    "scenes_choice": _ours("question: {q} choose from: {choices} answer:", "{q}? {choices} the answer is"),
    "scenes_video": _ours("question: {q} short answer:", "{q}?", "look at all pictures and answer the question: {q} answer:"),
}


def parse(given: str | Sequence[str]) -> tuple[Template, ...]:
    """The templates of a task by its name, or texts of one's own. Raises ValueError for an unknown task or slot."""
    if isinstance(given, str):
        if given not in TEMPLATES:
            raise ValueError(f"templates={given!r} is no task{nearest(given, TEMPLATES)}")
        return TEMPLATES[given]
    found = tuple(Template(str(text)) for text in given)
    for template in found:
        for slot in template.slots:
            if slot not in SLOTS:
                raise ValueError(f"templates: {template.text!r} has the slot {{{slot}}}{nearest(slot, SLOTS)}")
    return found


def rendered_choices(choices: Sequence[str]) -> str:
    """["red", "blue"] -> "(a) red (b) blue"."""
    return " ".join(f"({_letter(i)}) {text}" for i, text in enumerate(choices))


def _letter(i: int) -> str:
    return (_letter(i // 26 - 1) if i >= 26 else "") + "abcdefghijklmnopqrstuvwxyz"[i % 26]


def slots_of(sample: Mapping[str, Any]) -> dict[str, str]:
    """What a raw sample can fill: its own ``slots``, its ``prompt`` as {q}, its ``choices``. Words of {ocr} may be a list, turns of {history} too."""
    found: dict[str, Any] = {"q": sample.get("prompt"), **(sample.get("slots") or {})}
    if sample.get("choices") and "choices" not in found:
        found["choices"] = rendered_choices(sample["choices"])
    if isinstance(found.get("ocr"), (list, tuple)):
        found["ocr"] = ", ".join(map(str, found["ocr"][:OCR_MOST]))
    if isinstance(found.get("history"), (list, tuple)):
        found["history"] = " ".join(part if isinstance(part, str) else " ".join(part) for part in found["history"])
    return {name: str(value) for name, value in found.items() if value is not None and str(value)}


def fill(template: Template, slots: Mapping[str, str]) -> str:
    """A template with its slots filled, nothing else changed."""
    return _SLOT.sub(lambda match: slots[match.group(1)], template.text)
