"""The embedded data set ``scenes``: procedural pictures with captions, questions and boxes, by index.

    source = open_scenes("train")      # also val, test, heldout_pair, heldout_triple, objects, longtail, noisy
    source = open_scenes("train/vqa")  # of any split: SPLIT/vqa, SPLIT/entailment, SPLIT/pairs, SPLIT/instruct, SPLIT/caption+count, SPLIT/text
    source[0]                          # {"key", "image" [64, 64, 3], "text": [caption], "json": ...}

The description of a scene is in `scene`, its picture in `scene_picture`, its words in `scene_text`,
the tasks in `scene_tasks`, instructions in `scene_instruct`.

    python -m vlm_jax.data.scenes show --out=page.png            # a page of pictures with captions
    python -m vlm_jax.data.scenes speed                          # samples a second on one core
    python -m vlm_jax.data.scenes tokenizer --out=scenes.model   # rebuilds the committed SentencePiece models
    python -m vlm_jax.data.scenes tokenizer --out=scenes_instruct.model --instruct
"""

from __future__ import annotations

import argparse
import io
import pathlib
import re
import string
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import Any

from vlm_jax.data import scene_instruct, scene_tasks, templates
from vlm_jax.data.fingerprint import digest, spread
from vlm_jax.data.scene import (
    CLASSES,
    RELATIONS,
    SPLITS,
    Scene,
    Thing,
    class_of,
    make_scene,
    stream,
)
from vlm_jax.data.scene_picture import boxes, render, render_batch
from vlm_jax.data.scene_text import (
    SYNONYMS,
    Facts,
    Question,
    canonical,
    caption,
    is_false,
    judge,
    lie,
    parse,
    questions,
    swaps,
)
from vlm_jax.errors import nearest

__all__ = ["CLASSES", "RELATIONS", "SPLITS", "Facts", "Question", "Scene", "Scenes", "Thing", "TOKENIZER", "VIEWS",
           "boxes", "canonical", "caption", "judge", "make_scene", "open_scenes", "parse", "questions", "render",
           "render_batch", "swaps", "train_tokenizer", "vocabulary"]

INSTRUCT = "instruct"
TOKENIZER = pathlib.Path(__file__).parent / "assets" / "scenes.model"
LENGTHS = {"train": 10_000_000, "val": 1000, "test": 1000, "heldout_pair": 1000, "heldout_triple": 1000,
           "objects": 1050, "longtail": 10_000_000}
TRAINING = ("train", "longtail")
VIEWS = ("boxes", "questions")
TASKS = ("vqa", "entailment", "pairs")
NOISY, NOISE = "noisy", 0.3     # the training scenes with that share of false captions, as alt texts of the web have them


class Scenes:
    """Random access to the samples of one split; see `open_scenes`."""

    def __init__(self, split: str, size: int, count: int, canonical_share: float, views: Sequence[str], noise: float):
        self.split, self.size, self.count, self.noise = split, size, count, noise
        self.canonical_share, self.views = canonical_share, tuple(views)
        self.name = f"scenes:{NOISY if noise else split}" + ":canonical" * (canonical_share == 1)
        if split == "objects":
            self.classes = list(CLASSES)

    def __len__(self) -> int:
        return self.count

    def scene(self, i: int) -> Scene:
        if not 0 <= i < self.count:
            raise IndexError(f"scenes:{self.split} has no sample {i}; it has {self.count}")
        return make_scene(i, self.split)

    def fingerprint(self) -> str:
        """Of what the generator puts into some scenes and says of them: the same on every machine."""
        drawn = [[_facts(thing) for thing in self.scene(i).objects] for i in spread(len(self))]
        said = [self.caption(i, self.scene(i))[0] for i in spread(len(self))]
        return digest(self.split, self.size, self.count, drawn, said)

    def key(self, i: int) -> str:
        return f"{self.split}/{i:08d}"

    def caption(self, i: int, scene: Scene) -> tuple[str, str]:
        """(the sample's one caption, what is wrong with it: "" nothing, "other" it is of another scene, "lie")."""
        rng = stream(self.split, i, "noise")
        if rng.random() >= self.noise:
            return caption(scene, canonical_share=self.canonical_share), ""
        if rng.random() < 0.5:
            return lie(scene, rng, self.canonical_share), "lie"
        while True:
            text = caption(make_scene(int(rng.random() * LENGTHS[self.split]), self.split), canonical_share=self.canonical_share)
            if is_false(scene, text):
                return text, "other"

    def _texts(self, i: int, scene: Scene) -> list[str]:
        if self.split in TRAINING or self.noise:
            return [self.caption(i, scene)[0]]
        return [caption(scene, canonical_share=0.0), canonical(scene)][self.canonical_share == 1:]

    def read_text(self, i: int) -> list[str]:
        """The captions of sample `i`, without its picture."""
        return self._texts(i, self.scene(i))

    def __getitem__(self, i: int) -> dict[str, Any]:
        scene = self.scene(i)
        sample: dict[str, Any] = {"key": self.key(i), "image": render(scene, self.size)}
        sample["json"] = {"objects": [_facts(thing) for thing in scene.objects]}
        sample["text"] = self._texts(i, scene)
        if self.noise:
            sample["json"]["noise"] = self.caption(i, scene)[1]
        if self.split == "objects":
            sample["label"] = class_of(scene)
        if "boxes" in self.views:
            sample["json"]["boxes"] = boxes(scene, self.size).tolist()
        if "questions" in self.views:
            sample["json"]["questions"] = [question._asdict() for question in questions(scene)]
        return sample

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(self.count))

    def judge(self, i: int, text: str) -> dict[str, bool]:
        """What caption `text` gets right of sample `i`; see `scene_text.judge`."""
        return judge(self.scene(i), text)

    def swaps(self, i: int) -> dict[str, tuple[str, str]]:
        """For each kind of exchange between two objects of sample `i`: a true caption and a false one; see `scene_text.swaps`."""
        return swaps(self.scene(i))

    def phrase(self, i: int) -> tuple[str, tuple[float, float, float, float]] | None:
        """The first object of sample `i` whose colour and shape no other has, "a red circle", and its tight box x0, y0, x1, y1 in shares of the
        picture's sides; None where there is none."""
        scene = self.scene(i)
        kinds = [(thing.colour, thing.shape) for thing in scene.objects]
        for (colour, shape), box in zip(kinds, boxes(scene, 1), strict=True):
            if kinds.count((colour, shape)) == 1:
                return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}", tuple(float(v) for v in box)
        return None


class SceneTasks(Scenes):
    """Questions about the scenes of a split, or statements; see `open_scenes`."""

    def __init__(self, split: str, task: str, size: int, count: int):
        super().__init__(split, size, count, 0.5, (), 0.0)
        self.task, self.name = task, f"scenes:{split}/{task}"
        self.classes = {"entailment": list(scene_tasks.ENTAILMENT), "pairs": list(scene_tasks.PAIRS)}.get(task)

    def caption(self, i: int, scene: Scene) -> tuple[str, str]:
        if self.task == "vqa":
            return scene_tasks.question(scene).question, ""
        return (scene_tasks.statement(scene)[0] if self.task == "entailment" else self.pair(i).statement), ""

    def _texts(self, i: int, scene: Scene) -> list[str]:
        return [self.caption(i, scene)[0]]

    def pair(self, i: int) -> scene_tasks.Pair:
        return scene_tasks.pair(self.split, i, self.count)

    def read_answers(self, i: int) -> list[str]:
        return [scene_tasks.question(self.scene(i)).answer] if self.task == "vqa" else []

    def __getitem__(self, i: int) -> dict[str, Any]:
        scene, key = self.scene(i), self.key(i)
        if self.task == "pairs":
            pair = self.pair(i)
            sides = {"left": pair.left, "right": pair.right}
            images = [render(side, self.size) for side in sides.values()]
            return {"key": "+".join(self.key(side.index) for side in sides.values()), "image": images[0], "images": images, "text": [pair.statement],
                    "label": pair.label, "json": {name: [_facts(thing) for thing in side.objects] for name, side in sides.items()}}
        sample = {"key": key, "image": render(scene, self.size), "json": {"objects": [_facts(thing) for thing in scene.objects]}}
        if self.task == "entailment":
            text, label = scene_tasks.statement(scene)
            return {**sample, "text": [text], "label": label}
        asked = scene_tasks.question(scene)
        return {**sample, "text": [asked.question], "all_answers": [asked.answer], "answers": [asked.answer], "answer_weights": [1.0],
                "kind": asked.kind, "question_id": i}


class SceneInstructions(Scenes):
    """Instructions about the scenes of a split; see `open_scenes`."""

    def __init__(self, split: str, task: str, size: int, count: int):
        super().__init__(split, size, count, 0.5, (), 0.0)
        self.tasks, self.name = scene_instruct.ALL if task == INSTRUCT else tuple(task.split("+")), f"scenes:{split}/{task}"

    def asked(self, i: int) -> tuple[str, Scene, scene_instruct.Asked]:
        self.scene(i)      # the index is checked
        return scene_instruct.instruction(self.split, i, self.tasks)

    def caption(self, i: int, scene: Scene) -> tuple[str, str]:
        """What is asked and replied, in one line."""
        _, _, asked = self.asked(i)
        return " ".join(part for turn in (asked.turns or ((asked.prompt, asked.replies[0]),)) for part in turn), ""

    def read_text(self, i: int) -> list[str]:
        """All that a sample says, one text each."""
        _, _, asked = self.asked(i)
        return [part for turn in asked.turns for part in turn] or [*filter(None, [asked.prompt]), *asked.replies]

    def read_answers(self, i: int) -> list[str]:
        return list(self.asked(i)[2].replies)

    def __getitem__(self, i: int) -> dict[str, Any]:
        task, scene, asked = self.asked(i)
        sample: dict[str, Any] = {"key": self.key(i), "kind": task, "question_id": i, "json": {"objects": [_facts(thing) for thing in scene.objects]}}
        if task != "text":
            sample["image"] = render(scene, self.size)
        if asked.frames:
            frames = scene_instruct.Frames(asked.frames.scene, asked.frames.mover, asked.frames.start, asked.frames.end, self.size)
            sample |= {"frames": frames, "image": frames[0]}
        if asked.turns:
            return {**sample, "turns": list(asked.turns)}
        sample |= {"prompt": asked.prompt, "text": list(asked.replies)} | ({"task": asked.task} if asked.task else {})
        sample |= {"slots": dict(asked.slots)} if asked.slots else {}
        return sample | ({"choices": list(asked.choices), "label": asked.label} if asked.choices else {})


def _facts(thing: Thing) -> dict[str, Any]:
    return {"shape": thing.shape, "colour": thing.colour, "fill": thing.fill, "size": thing.size,
            "material": thing.material, "x": thing.x, "y": thing.y, "radius": thing.radius}


def open_scenes(split: str, size: int = 64, count: int | None = None, canonical_share: float = 0.5,
                views: Sequence[str] = (), noise: float = 0.0) -> Scenes:
    """A split of the data set as a source of samples.

    A sample has key; image, uint8 [size, size, 3]; text; json (`objects`, and each of `views`: "boxes" in
    pixels, "questions"). In "train", text is one caption, canonical with probability `canonical_share`; in the
    other splits it is a free wording and then the canonical one (a share of 1: the canonical one alone). "longtail" trains
    too. "objects" adds label, and the source has `classes`. `judge(i, text)` checks a caption, `swaps(i)` has false ones.

    With `noise` a sample has one caption, and that share of them is false: of another scene, or a fluent lie, half each, by the
    index. json then says which (`noise`: "", "other", "lie"), for those who score a filter: batches do not carry it.
    "noisy" is "train" with a noise of 0.3.

    "SPLIT/TASK" is a task about the scenes of a split (`scene_tasks` says how they are made): "vqa" one question of each scene, with its
    `answers` and `kind`; "entailment" a statement with its label, one of ``ENTAILMENT``; "pairs" two scenes, `images`, and a statement about
    both that is true or not; "instruct" an instruction of any kind about one picture, with `prompt` and `text`, or `turns`; single tasks of
    `scene_instruct`, or several joined by "+", the same of those alone. `canonical_share`, `views` and `noise` are of the captions and have no use there.

    Raises ValueError for an unknown split or view, and for a size, count or share out of range.
    """
    split, slash, task = split.partition("/")
    told = INSTRUCT if task == INSTRUCT else "+".join(name for name in task.split("+") if name in scene_instruct.TASKS)
    if slash and task not in TASKS and (not task or task != told):
        wrong = next(name for name in task.split("+") if name not in scene_instruct.TASKS)
        raise ValueError(f"scenes task {wrong!r} is not known{nearest(wrong, (*TASKS, INSTRUCT, *scene_instruct.TASKS))}")
    if slash and (views or noise or split == NOISY):
        raise ValueError(f"scenes {split}/{task}: views={tuple(views)} and noise={noise:g} are of captions; nearest: '{SPLITS[0]}/{task}'")
    if split == NOISY:
        split, noise = "train", noise or NOISE
    if split not in SPLITS:
        raise ValueError(f"scenes split {split!r} is not known{nearest(split, (*SPLITS, NOISY))}")
    for view in views:
        if view not in VIEWS:
            raise ValueError(f"scenes views: {view!r} is not known{nearest(view, VIEWS)}")
    count = LENGTHS[split] if count is None else count
    if size < 32:
        raise ValueError(f"scenes size {size}: shapes need 32 pixels or more")
    if count < 1:
        raise ValueError(f"scenes count {count}: must be 1 or more")
    if not 0 <= canonical_share <= 1:
        raise ValueError(f"scenes canonical_share {canonical_share}: must be from 0 to 1")
    if not 0 <= noise < 1:
        raise ValueError(f"scenes noise {noise}: must be from 0 to below 1")
    if slash and task in TASKS:
        return SceneTasks(split, task, size, count)
    if slash:
        source = SceneInstructions(split, task, size, count)
        alone = [name for name in source.tasks if name in scene_instruct.PAIRED]
        if alone and split in ("objects", "longtail"):
            raise ValueError(f"scenes {split}/{alone[0]} is about two objects, and its scenes hold one; nearest: 'train/{alone[0]}'")
        kinds = {"video": "images=8", "text": "images=0"}
        for name in set(kinds) & set(source.tasks):
            if len(source.tasks) > 1:
                raise ValueError(f"scenes {split}/{task}: {name!r} has batches of its own ({kinds[name]}); nearest: '{split}/{name}'")
        return source
    return Scenes(split, size, count, canonical_share, views, noise)


# ---- the tokenizer

def vocabulary(count: int = 4000) -> list[str]:
    """Every word of the captions, questions and answers of the first `count` training scenes, sorted."""
    words = {word for synonyms in SYNONYMS.values() for word in synonyms}
    for i in range(count):
        scene = make_scene(i, "train")
        texts = [canonical(scene), *(caption(scene, seed, canonical_share=0.0) for seed in range(3))]
        texts += [text for question in questions(scene) for text in question[1:]]
        words |= {word for text in texts for word in re.findall("[a-z]+", text)}
    return sorted(words)


def instruct_vocabulary(count: int = 4000) -> list[str]:
    """The words of `vocabulary`, of the templates for scenes, and of the instructions of the first `count` training scenes, sorted."""
    words = set(vocabulary(count))
    for task, listed in templates.TEMPLATES.items():
        if task.startswith("scenes_"):
            words |= {word for template in listed for word in re.findall("[a-z]+", re.sub(r"\{\w+\}", "", template.text))}
    for task in scene_instruct.TASKS:
        source = open_scenes(f"train/{task}")
        words |= {word for i in range(count // 4) for text in source.read_text(i) for word in re.findall("[a-z]+", text)}
    return sorted(words)


def train_tokenizer(words: Sequence[str] | None = None, letters: str = string.digits + string.ascii_lowercase + ",.;?'-") -> bytes:
    """A SentencePiece model in which each of `words` (by default those of `vocabulary`) is one token; letters and bytes do the rest.

    The ids: pad 0, bos 1, eos 2, unk 3, then the words, 256 bytes, letters and punctuation.
    """
    import sentencepiece

    words = ["\u2581" + word for word in (vocabulary() if words is None else words)]
    # Given the words there is nothing to learn: the corpus only says which characters are pieces.
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([letters]), model_writer=model, model_type="unigram",
        user_defined_symbols=words, vocab_size=4 + len(words) + 256 + len(letters) + 1,
        byte_fallback=True, normalization_rule_name="identity", character_coverage=1.0, hard_vocab_limit=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, num_threads=1, minloglevel=2)
    return model.getvalue()


def train_instruct_tokenizer() -> bytes:
    """The same for instructions: their words and signs too."""
    return train_tokenizer(instruct_vocabulary(), string.digits + string.ascii_lowercase + ",.;:?'-()")


# ---- the command line

def contact_sheet(split: str, rows: int, columns: int, size: int, scale: int):
    """A PIL image of pictures, enlarged, with the canonical and a free caption under each."""
    from PIL import Image, ImageDraw

    side, text_height = size * scale, 132
    page = Image.new("RGB", (columns * (side + 12) + 12, rows * (side + text_height) + 12), "white")
    draw = ImageDraw.Draw(page)
    source = open_scenes(split, size, rows * columns)
    for i in range(rows * columns):
        left, top = 12 + i % columns * (side + 12), 12 + i // columns * (side + text_height)
        scene = source.scene(i)
        picture = Image.fromarray(render(scene, size)).resize((side, side), Image.Resampling.NEAREST)
        page.paste(picture, (left, top))
        for n, text in enumerate((canonical(scene), caption(scene, canonical_share=0.0))):
            lines = "\n".join(textwrap.wrap(text, side // 6))
            draw.text((left, top + side + 4 + 52 * n), lines, fill=("black", "steelblue")[n], spacing=2)
    return page


def measure(count: int, size: int) -> dict[str, float]:
    """Processor time of one core: samples and pictures a second, and microseconds of each part."""
    source = open_scenes("train", size)
    for i in range(256):  # tables are built on first use
        source[i]
    scenes = [source.scene(i) for i in range(count)]
    parts = {"sample": source.__getitem__, "scene": source.scene, "picture": lambda i: render(scenes[i], size),
             "caption": lambda i: caption(scenes[i]), "questions": lambda i: questions(scenes[i]),
             "boxes": lambda i: boxes(scenes[i], size)}
    seconds = {}
    for name, part in parts.items():
        start = time.process_time()
        for i in range(count):
            part(i)
        seconds[name] = (time.process_time() - start) / count
    return {"samples_per_second": 1 / seconds["sample"],
            "pictures_per_second": 1 / (seconds["scene"] + seconds["picture"]),
            **{f"{name}_us": 1e6 * each for name, each in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.data.scenes", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="a page of pictures with captions")
    show.add_argument("--out", required=True)
    show.add_argument("--split", default="test", choices=SPLITS)
    show.add_argument("--rows", type=int, default=4)
    show.add_argument("--columns", type=int, default=6)
    show.add_argument("--size", type=int, default=64)
    speed = commands.add_parser("speed", help="samples a second on one core")
    speed.add_argument("--count", type=int, default=4000)
    speed.add_argument("--size", type=int, default=64)
    tokenizer = commands.add_parser("tokenizer", help="rebuild the SentencePiece model")
    tokenizer.add_argument("--out", required=True)
    tokenizer.add_argument("--instruct", action="store_true", help="that of instructions")
    args = parser.parse_args()
    if args.command == "show":
        contact_sheet(args.split, args.rows, args.columns, args.size, scale=max(1, 192 // args.size)).save(args.out)
    elif args.command == "speed":
        for name, value in measure(args.count, args.size).items():
            print(f"{name:20s} {value:8.0f}")
    else:
        pathlib.Path(args.out).write_bytes(train_instruct_tokenizer() if args.instruct else train_tokenizer())


if __name__ == "__main__":
    main()
