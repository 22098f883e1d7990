"""How prompt and reply lie in a batch: from a raw sample to what is said of it, and from that to ids and masks (data/batch.py has the keys).

Each text of a template is encoded by itself, so that its ids are its span: no length of a second tokenisation decides what is learned, and no
token lies across prompt and reply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data import templates
from vlm_jax.data.bad import BadSample
from vlm_jax.data.clean import Clean
from vlm_jax.data.templates import Template
from vlm_jax.data.tokenizers import Tokenizer
from vlm_jax.errors import nearest

LAYOUTS = ("plain", "joined", "apart")
ENDS = ("eos", "none")
PREFIXES = ("", "words")
BY_TASK = "task"     # data.templates: each sample's own


@dataclasses.dataclass(frozen=True)
class Marks:
    """What stands around prompts and replies where a language model was trained with other marks than its tokenizer's own.

    begin: the id that a prompt begins with, -1 for the tokenizer's own. pad: the id of padding, -1 for the tokenizer's own.
    before: text between a prompt and its reply (" " for a byte-level BPE, whose words hold the space before them). after: text behind a reply ("\\n").
    end: "eos": a reply ends in the tokenizer's end; "none": in ``after``. candidate_end: the same of candidates that are ranked.
    """
    begin: int = -1
    pad: int = -1
    before: str = ""
    after: str = ""
    end: str = "eos"
    candidate_end: str = "eos"

    def __post_init__(self):
        for name in ("begin", "pad"):
            if getattr(self, name) < -1:
                raise ValueError(f"marks.{name}={getattr(self, name)} is no id; nearest: -1")
        for name in ("end", "candidate_end"):
            if getattr(self, name) not in ENDS:
                raise ValueError(f"marks.{name}={getattr(self, name)!r} is not known{nearest(getattr(self, name), ENDS)}")
        if self.end == "none" and not self.after:
            raise ValueError("marks.end='none' with marks.after='' gives replies no end; nearest: end='eos'")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What of a stage's data section says how text lies in a batch (``config.Data`` says what the fields mean). Raises ValueError for values that do not
    go together."""
    name: str = "plain"
    prompt_length: int = 0
    instruction_length: int = 0
    templates: str | tuple[str, ...] = ""
    eval_template: str = ""
    prefix: str = ""
    marks: Marks = Marks()

    def __post_init__(self):
        if self.name not in LAYOUTS:
            raise ValueError(f"layout={self.name!r} is not known{nearest(self.name, LAYOUTS)}")
        if self.prefix not in PREFIXES:
            raise ValueError(f"prefix={self.prefix!r} is not known{nearest(self.prefix, PREFIXES[1:])}")
        if self.name == "plain":
            for field in dataclasses.fields(self)[1:]:
                if getattr(self, field.name) != field.default:
                    raise ValueError(f"{field.name}={getattr(self, field.name)!r} has no use with layout='plain'; nearest: layout='joined'")
        elif self.prompt_length < 1:
            raise ValueError(f"layout={self.name!r} needs prompt_length, the ids of a prompt with its begin, of at least 1, not {self.prompt_length}; "
                             "nearest: 1, or 32")
        if self.instruction_length < 0:
            raise ValueError(f"instruction_length={self.instruction_length} must be at least 0; nearest: 0")
        self.listed()
        self.evaluation()

    def listed(self) -> tuple[Template, ...]:
        """The templates of all samples; () where there are none, or each sample has its own."""
        return () if self.templates in ("", (), BY_TASK) else templates.parse(self.templates)

    def evaluation(self) -> tuple[Template, ...]:
        return templates.parse((self.eval_template,)) if self.eval_template else ()

    def columns(self, length: int) -> int:
        """Ids of a row of ``text``."""
        return self.prompt_length + length if self.name == "joined" else length

    def shapes(self, batch: int, length: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """The keys of a training batch: shape and type."""
        out = {"text": ((batch, self.columns(length)), "int32"), "text_mask": ((batch, self.columns(length)), "bool")}
        if self.name == "joined":
            out["target_mask"] = out["text_mask"]
        if self.name == "apart":
            out |= {"prompt": ((batch, self.prompt_length), "int32"), "prompt_mask": ((batch, self.prompt_length), "bool")}
        if self.instruction_length:
            out |= {"instruction": ((batch, self.instruction_length), "int32"), "instruction_mask": ((batch, self.instruction_length), "bool")}
        return out


PLAIN_TEXT = Layout()


class Said(NamedTuple):
    """What a row says: (prompt, reply) in turn, the last reply being that which is asked for. In the plain layout one turn without a prompt."""
    turns: tuple[tuple[str, str], ...]

    @classmethod
    def alone(cls, text: str) -> Said:
        return cls((("", text),))

    @property
    def prompt(self) -> str:
        """All that stands before the last reply."""
        return " ".join(filter(None, [part for turn in self.turns[:-1] for part in turn] + [self.turns[-1][0]]))

    @property
    def reply(self) -> str:
        return self.turns[-1][1]

    @property
    def instruction(self) -> str:
        """What is asked, without the replies in between."""
        return " ".join(filter(None, (prompt for prompt, _ in self.turns)))


class Replies(Tokenizer):
    """The tokenizer of replies alone, for those who write candidates or read what was generated: no begin is written, the end is that of the layout."""
    kind = "replies"

    def __init__(self, inner: Tokenizer, marks: Marks, keeps_end: bool):
        self.inner, self.marks, self.keeps_end = inner, marks, keeps_end
        self.vocab_size = inner.vocab_size
        self.bos_id = inner.bos_id if marks.begin < 0 else marks.begin      # what is generated may begin with it
        self.pad_id = inner.pad_id if marks.pad < 0 else marks.pad
        self.eos_id = inner.eos_id
        if marks.end == "none":
            alone, behind = inner.body(marks.after), inner.body("a" + marks.after)
            if not alone or alone[-1] != behind[-1]:
                raise ValueError(f"marks.after={marks.after!r} is no end: the tokenizer has no id for it behind a word; nearest: end='eos'")
            self.eos_id = alone[-1]
        if self.eos_id is None:
            raise ValueError("marks.end='eos', but the tokenizer has no end; nearest: end='none' with after='\\n'")

    def __reduce__(self):
        return Replies, (self.inner, self.marks, self.keeps_end)

    def body(self, text: str, follows: bool = True) -> list[int]:
        """A reply's ids. follows: there is a prompt before it."""
        return self.inner.body((self.marks.before if follows else "") + text + self.marks.after)

    def encode(self, text: str) -> list[int]:
        return self.body(text) + [self.eos_id] * (self.marks.candidate_end == "eos" and self.marks.end == "eos")

    def __call__(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray, int]:
        rows = [self.encode(text) for text in texts]
        return *padded([self.cut(row, length) for row in rows], length, self.pad_id), sum(len(row) > length for row in rows)

    def cut(self, row: list[int], length: int) -> list[int]:
        """The first ``length`` ids; with "apart" an end stays the last one."""
        if len(row) <= length:
            return row
        return row[:length - 1] + row[-1:] if self.keeps_end and row[-1] == self.eos_id else row[:length]

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids]
        ids = ids[ids[:1] == [self.bos_id]:]      # which may be the end too
        return self.inner.decode(ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids)

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


class Writer:
    """A layout with its tokenizers. Raises ValueError where they do not go together."""

    def __init__(self, layout: Layout, tokenizer: Tokenizer, length: int, instruction_tokenizer: Tokenizer | None = None):
        if bool(layout.instruction_length) != (instruction_tokenizer is not None):
            raise ValueError(f"instruction_length={layout.instruction_length} and the instruction tokenizer go together; nearest: "
                             + ("instruction_tokenizer='scenes'" if layout.instruction_length else "instruction_length=32"))
        self.layout, self.tokenizer, self.length, self.other = layout, tokenizer, length, instruction_tokenizer
        self.replies: Tokenizer = tokenizer
        if layout.name == "plain":
            return
        self.front, self.back = tokenizer.frame
        if layout.marks.begin >= 0:
            self.front = [layout.marks.begin]
        self.back = self.back if layout.name == "apart" else []
        framed = len(self.front) + len(self.back)
        if layout.prompt_length < framed:
            raise ValueError(f"prompt_length={layout.prompt_length} does not hold the tokenizer's marks of a prompt; nearest: {framed}")
        if instruction_tokenizer is not None and layout.instruction_length < len(sum(instruction_tokenizer.frame, [])):
            raise ValueError(f"instruction_length={layout.instruction_length} does not hold its tokenizer's marks; nearest: "
                             f"{len(sum(instruction_tokenizer.frame, []))}")
        self.replies = Replies(tokenizer, layout.marks, layout.name == "apart")
        self.listed, self.evaluation = layout.listed(), layout.evaluation()

    @property
    def longest(self) -> int:
        """Ids of the longest array of a row."""
        return max(shape[1] for shape, _ in self.layout.shapes(1, self.length).values())

    # ---- what is said

    def say(self, sample: Mapping[str, Any], clean: Clean, choose: Any, rng: np.random.Generator, training: bool) -> Said:
        """What a raw sample says. ``choose(texts, weights)`` takes one of several texts. Raises BadSample."""
        if self.layout.name == "plain":
            return Said.alone(self._chosen(sample.get("text"), sample.get("text_weight"), clean, choose, "caption"))
        if sample.get("turns"):
            turns = tuple((clean(prompt), clean(reply)) for prompt, reply in sample["turns"])
            if self.layout.name == "apart" and training:
                turns = turns[:1 + int(rng.random() * len(turns))]
            return Said(turns)
        texts, weights = sample.get("text"), sample.get("text_weight")
        prompt = sample.get("prompt")
        if prompt is None and not sample.get("task") and sample.get("answers"):
            prompt, texts, weights = self._chosen(texts, weights, Clean(""), choose, "prompt"), sample["answers"], sample.get("answer_weights")
        if not texts and sample.get("choices") and sample.get("label") is not None and 0 <= sample["label"] < len(sample["choices"]):
            texts, weights = [sample["choices"][sample["label"]]], None
        reply = self._chosen(texts, weights, clean, choose, "reply") if training or texts else ""
        prompt, fitting = clean(prompt or ""), self._templates(sample, training)
        if fitting:
            slots, first = templates.slots_of({**sample, "prompt": prompt}), fitting[0]
            fitting = [template for template in fitting if all(slot in slots for slot in template.slots)]
            if not fitting:
                raise BadSample("missing_slot", f"no template can be filled with {sorted(slots)}; the first is {first.text!r}")
            prompt = templates.fill(fitting[min(int(rng.random() * len(fitting)), len(fitting) - 1) if training else 0], slots)
        elif self.layout.prefix and training and not prompt and (words := reply.split(" "))[1:]:
            at = 1 + int(rng.random() * (len(words) - 1))
            prompt, reply = " ".join(words[:at]), " ".join(words[at:])
        return Said(((prompt, reply),))

    def _templates(self, sample: Mapping[str, Any], training: bool) -> tuple[Template, ...]:
        """The wordings of a sample, the one of evaluation first; () where its prompt stands as it is."""
        own, task = self.listed, sample.get("task")
        if self.layout.templates == BY_TASK:
            if not task:
                return ()
            own = templates.parse(task)
        return own if training else self.evaluation + own

    @staticmethod
    def _chosen(texts: Any, weights: Any, clean: Clean, choose: Any, what: str) -> str:
        if not texts:
            raise BadSample(f"missing_{what}")
        text = clean(choose(texts, weights))
        if not text and clean.rule is not None:
            raise BadSample(f"empty_{what}", "nothing is left of it by text_clean")
        return text

    # ---- ids

    def arrays(self, rows: Sequence[Said | None], training: bool) -> dict[str, np.ndarray]:
        """The text of a batch; None is a row without a sample. Training has what is learned, evaluation ``prompt`` too."""
        pad, length, layout = self.replies.pad_id, self.length, self.layout
        if layout.name == "plain":
            ids, mask = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), bool)
            real = [i for i, said in enumerate(rows) if said is not None]
            if real:
                ids[real], mask[real], _ = self.tokenizer([rows[i].reply for i in real], length)
            return {"text": ids, "text_mask": mask}
        out: dict[str, np.ndarray] = {}
        if layout.name == "joined":
            joined = [self._joined(said) if said else ([], []) for said in rows]
            out["text"], out["text_mask"] = padded([ids for ids, _ in joined], layout.columns(length), pad)
            out["target_mask"] = padded([learned for _, learned in joined], layout.columns(length), 0)[0].astype(bool)
        else:
            out["text"], out["text_mask"] = padded([self.replies.cut(self._reply(said.reply), length) if said else [] for said in rows], length, pad)
        if not training or layout.name == "apart":
            prompts = [self._prompt(said) if said else [] for said in rows]
            out["prompt"], out["prompt_mask"] = padded(prompts, layout.prompt_length, pad, left=layout.name == "joined")
        if self.other is not None:
            front, back = self.other.frame
            rows_of = [_framed(front, self.other.body(said.instruction), back, layout.instruction_length) if said else [] for said in rows]
            out["instruction"], out["instruction_mask"] = padded(rows_of, layout.instruction_length, self.other.pad_id)
        return out

    def count(self, said: Said) -> tuple[int, bool]:
        """(ids of all that a row says, whether some are cut)."""
        if self.layout.name == "plain":
            ids = len(self.tokenizer.encode(said.reply))
            return ids, ids > self.length
        prompts, replies = [len(self.tokenizer.body(prompt)) for prompt, _ in said.turns], [len(self._reply(reply)) for _, reply in said.turns]
        ids, framed = len(self.front) + len(self.back) + sum(prompts) + sum(replies), len(self.front) + len(self.back)
        asked = ids - replies[-1] if self.layout.name == "apart" else framed + max(prompts)
        return ids, asked > self.layout.prompt_length or max(replies) > self.length or ids > self.layout.prompt_length + self.length

    def read_back(self, ids: Sequence[int]) -> str:
        """The text of a row's ids, whatever begins or ends in between."""
        marks = () if self.layout.name == "plain" else (*self.front, *self.back, self.replies.eos_id)
        return self.tokenizer.decode([i for i in ids if i not in marks])

    def _reply(self, reply: str, follows: bool = True) -> list[int]:
        return self.replies.body(reply, follows) + [self.replies.eos_id] * (self.layout.marks.end == "eos")

    def _joined(self, said: Said) -> tuple[list[int], list[int]]:
        """(ids, 1 where learned)."""
        ids, learned = list(self.front), [0] * len(self.front)
        for at, (prompt, reply) in enumerate(said.turns):
            room = self.layout.prompt_length - len(self.front) * (at == 0)
            asked, told = _last(self.tokenizer.body(prompt), room) if prompt else [], self._reply(reply, bool(prompt or at))[:self.length]
            ids += asked + told
            learned += [0] * len(asked) + [1] * len(told)
        columns = self.layout.columns(self.length)
        return ids[:columns], learned[:columns]

    def _prompt(self, said: Said) -> list[int]:
        body: list[int] = []
        if self.layout.name == "joined":
            for at, (prompt, reply) in enumerate(said.turns):
                body += self.tokenizer.body(prompt) if prompt else []
                body += self._reply(reply, bool(prompt or at)) if at + 1 < len(said.turns) else []
        else:
            body = self.tokenizer.body(said.prompt) if said.prompt else []
        return _framed(self.front, body, self.back, self.layout.prompt_length)


def _last(ids: list[int], count: int) -> list[int]:
    return ids[max(0, len(ids) - count):]


def _framed(front: list[int], body: list[int], back: list[int], length: int) -> list[int]:
    """The marks of a text around its last ids."""
    return [*front, *_last(body, length - len(front) - len(back)), *back]


def padded(rows: Sequence[Sequence[int]], length: int, pad: int, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [n,length], mask bool [n,length]) of rows that are no longer, padded on the right, or on the left."""
    ids, mask = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        at = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = row, True
    return ids, mask
