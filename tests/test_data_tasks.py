"""Questions with answers, pairs of images, labels and cleaned text: from published annotation files and from scenes to batches."""

import collections
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vlm_jax.data import scene_tasks, scenes, tokenizers
from vlm_jax.data.bad import BadDataError, BadSample
from vlm_jax.data.batch import GLOSSARY, validate
from vlm_jax.data.clean import Clean
from vlm_jax.data.lengths import token_lengths
from vlm_jax.data.pipeline import eval_batches, preview, train_batches
from vlm_jax.data.rows import Rows, swap_sides
from vlm_jax.data.scene_text import NUMBERS, PLACES, judge, parse
from vlm_jax.data.sources import Mixture, open_source, read_answers
from vlm_jax.errors import ConfigError
from vlm_jax.stage import resolve

OPTIONS = dict(batch=4, size=8, length=16, augment="squash", seed=1, threads=0)
TEN = ["two"] * 6 + ["2"] * 2 + ["three", "a red one"]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load("scenes")


def write(folder, name, rows, as_list):
    """An annotation file as it is published (one list) or as lines, with a picture for each image that it names."""
    for row in rows:
        for image in row.get("images", [row.get("image")]):
            path = folder / (image if "." in image else f"{image}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            if "missing" not in image:
                out = io.BytesIO()
                Image.new("RGB", (9, 9), (sum(map(ord, image)) % 251, 9, 9)).save(out, "PNG")
                path.write_bytes(out.getvalue())
    text = json.dumps(rows, indent=1, ensure_ascii=False) if as_list else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return f"jsonl:{folder / name}"


VQA = [{"question_id": 7, "question": "How many cats are there?", "answer": TEN, "image": "val/a.png", "dataset": "vqa", "answer_type": "number"},
       {"question_id": 8, "question": "Café – what colour?", "answer": ["red"] * 10, "image": "val/a.png", "dataset": "vqa", "answer_type": "other"},
       {"question_id": 9, "question": "is it a star", "answer": "no", "image": "vg/1.png", "dataset": "vg"}]
NLVR = [{"sentence": "The left image shows two dogs.", "label": label, "images": [f"dev/{i}-0.png", f"dev/{i}-1.png"]}
        for i, label in enumerate(["True", "False", True, False, "1", 0])]
VE = [{"image": f"{i}", "sentence": "A man is outside.", "label": label} for i, label in enumerate(["entailment", "neutral", "contradiction"])]


@pytest.mark.parametrize("as_list", [True, False])
def test_questions_keep_their_answers_by_weight(tmp_path, as_list):
    source = open_source(write(tmp_path, "vqa.json", VQA, as_list), answer="json:answer@0.5")
    assert len(source) == 3 and source.key(1) == "val/a.png" and list(source.keys())[2] == "vg/1.png"
    first = source[0]
    assert first["text"] == ["How many cats are there?"] and first["all_answers"] == TEN
    assert first["answers"] == ["two", "2", "three", "a red one"] and first["answer_weights"] == [0.6, 0.2, 0.1, 0.1]
    assert first["kind"] == "number" and first["question_id"] == 7
    assert source[1]["text"] == ["Café – what colour?"] and source[1]["answer_weights"] == [1.0]
    assert source[2]["answers"] == ["no"] and source[2]["answer_weights"] == [0.5] and "kind" not in source[2]
    assert read_answers(source, 0) == TEN and read_answers(Mixture([source, source], None), 5) == ["no"]
    plain = open_source(f"jsonl:{tmp_path / 'vqa.json'}")      # the usual name; an answer that stands alone weighs 1
    assert plain[2]["answer_weights"] == [1.0]
    assert [source[i]["image"] for i in range(2)] == [(tmp_path / "val/a.png").read_bytes()] * 2


def test_official_records_of_answers_and_cells_of_tables(tmp_path):
    spec = write(tmp_path, "v.jsonl", [{"image": "a.png", "question": "what", "answers": [{"answer": "x", "answer_id": 1}, {"answer": 3}]}], False)
    assert open_source(spec)[0]["all_answers"] == ["x", "3"]
    (tmp_path / "t.csv").write_text('images,sentence,label,answer\n"[""a.png"", ""a.png""]",both,True,"[""x"", ""y"", ""y""]"\n')
    row = open_source(f"csv:{tmp_path / 't.csv'}", classes=("no", "yes"))[0]
    assert len(row["images"]) == 2 and row["key"] == "a.png+a.png" and row["label"] == 1
    assert row["answers"] == ["y", "x"] and row["answer_weights"] == [2 / 3, 1 / 3]


def test_a_list_that_breaks_off_is_refused_and_rows_that_are_no_objects_are_bad(tmp_path):
    (tmp_path / "cut.json").write_text('[{"image": "a.png", "text": "x"}, {"image": ')
    with pytest.raises(ValueError, match="cut.json cannot be read as JSON from byte 34 of 44 on"):
        open_source(f"jsonl:{tmp_path / 'cut.json'}")
    (tmp_path / "odd.json").write_text(' \n[ {"image": "a.png", "text": "x, ] y"} , 3 ]')
    source = open_source(f"jsonl:{tmp_path / 'odd.json'}")
    assert len(source) == 2 and source.read_text(0) == ["x, ] y"]
    with pytest.raises(BadSample, match="bad_json"):
        source.read_text(1)
    (tmp_path / "none.json").write_text("[]")
    assert len(open_source(f"jsonl:{tmp_path / 'none.json'}")) == 0


def test_pairs_and_labels_of_published_files(tmp_path):
    pairs = open_source(write(tmp_path, "nlvr.json", NLVR, True), classes=("False", "True"))
    assert [pairs[i]["label"] for i in range(6)] == [1, 0, 1, 0, 1, 0]
    assert pairs[0]["key"] == "dev/0-0.png+dev/0-1.png" and len(pairs[0]["images"]) == 2 and pairs[0]["images"][0] == pairs[0]["image"]
    entail = open_source(write(tmp_path, "ve.json", VE, True), classes=("contradiction", "neutral", "entailment"))
    assert [entail[i]["label"] for i in range(3)] == [2, 1, 0] and entail[0]["image"] == (tmp_path / "0.jpg").read_bytes()
    with pytest.raises(BadSample, match="unknown_label"):
        open_source(f"jsonl:{tmp_path / 've.json'}", classes=("yes", "no"))[0]
    with pytest.raises(ValueError, match="'json:answer' or"):
        open_source(f"jsonl:{tmp_path / 've.json'}", answer="json:a;json:b")
    with pytest.raises(ValueError, match="no column 'lable'.*nearest: 'label'"):
        open_source(f"jsonl:{tmp_path / 've.json'}", answer="json:lable")
    lost = open_source(write(tmp_path, "lost.json", [{**NLVR[0], "images": ["dev/0-0.png", "missing.png"]}], True))
    with pytest.raises(BadSample, match="missing_image: missing.png"):
        lost[0]


# batches

def test_batches_hold_answers_likeliest_first(tmp_path, tokenizer):
    source = open_source(write(tmp_path, "vqa.json", VQA, True), answer="json:answer@0.5")
    rows = Rows(answers=3, answer_length=4)
    with train_batches(source, tokenizer, **OPTIONS, rows=rows) as batches:
        step, batch = next(batches)
    validate(batch)
    assert batch["answer"].shape == (4, 3, 4) and set(batch) <= set(GLOSSARY)
    for row in range(4):
        question = tokenizer.decode(batch["text"][row])
        got = [tokenizer.decode(ids) for ids, mask in zip(batch["answer"][row], batch["answer_mask"][row]) if mask.any()]
        if question.startswith("How"):
            assert got[:2] == ["two", "2"] and batch["answer_weight"][row].tolist() == pytest.approx([0.6, 0.2, 0.1])
        else:
            absent = batch["answer_weight"][row] == 0
            assert len(got) == 1 and absent.tolist() == [False, True, True]
            assert (batch["answer"][row][absent] == tokenizer.pad_id).all() and not batch["answer_mask"][row][absent].any()
    assert (batch["answer"][:, 0, 0] == tokenizer.bos_id).all()
    with train_batches(source, tokenizer, **OPTIONS) as plain:      # asking for answers changes nothing else
        other = next(plain)[1]
    assert other.keys() == batch.keys() - {"answer", "answer_mask", "answer_weight"}
    assert all(np.array_equal(other[key], batch[key]) for key in other)
    with train_batches(source, tokenizer, **OPTIONS, rows=rows, start_step=0, stop_step=2, workers=1) as apart:
        assert all(np.array_equal(batch[key], value) for key, value in next(apart)[1].items())


def test_evaluation_tells_all_answers_and_what_is_missing(tmp_path, tokenizer):
    spec = write(tmp_path, "vqa.json", [*VQA, {"question": "how many", "image": "val/a.png"}], True)
    rows = Rows(answers=2, answer_length=4, classes=3)
    with eval_batches(open_source(spec), tokenizer, batch=6, size=8, length=16, rows=rows) as batches:
        (batch, meta), = batches
    validate(batch)
    assert batch["mask"].sum() == 4 and meta[0]["answers"] == TEN and meta[0]["kind"] == "number" and meta[0]["question_id"] == 7
    assert "answers" not in meta[3] and batch["answer_weight"][3:].max() == 0 and batch["label"].tolist() == [-1] * 6
    with train_batches(open_source(f"{spec}"), tokenizer, **{**OPTIONS, "batch": 8}, rows=rows, bad_budget=1.0) as batches, \
            pytest.raises(BadDataError, match="missing_label"):
        next(batches)


def test_pairs_are_batches_of_several_images_that_change_sides(tokenizer):
    class Pairs:
        name = "pairs"

        def __len__(self):
            return 64

        def __getitem__(self, i):
            left, right = np.full((8, 8, 3), i, np.uint8), np.full((8, 8, 3), 100 + i, np.uint8)
            return {"key": str(i), "images": [left, right], "text": ["a left b right" if i % 2 else "above"], "label": i % 2}

    def batch(**fields):
        with train_batches(Pairs(), tokenizer, **{**OPTIONS, "batch": 64}, rows=Rows(images=2, classes=2, **fields)) as batches:
            return next(batches)[1]

    plain, swapped = batch(), batch(swap="sides")
    validate(plain)
    assert plain["images"].shape == (64, 2, 8, 8, 3) and "image" not in plain
    number = plain["images"][:, 0, 0, 0, 0]
    assert (plain["images"][:, 1, 0, 0, 0] == 100 + number).all() and plain["label"].tolist() == (number % 2).tolist()
    moved = swapped["images"][:, 0, 0, 0, 0] >= 100
    assert 20 < moved.sum() < 44 and np.array_equal(swapped["label"], plain["label"])
    for row in range(64):
        words = tokenizer.decode(swapped["text"][row])
        assert words == ("above" if number[row] % 2 == 0 else "a right b left" if moved[row] else "a left b right")
    assert swap_sides("left, left of the right") == "left, right of the left"
    with eval_batches(Pairs(), tokenizer, batch=8, size=8, length=16, rows=Rows(images=2, swap="sides"), limit=8) as batches:
        found, = batches
    assert (found[0]["images"][:, 0, 0, 0, 0] == np.arange(8)).all()
    shown = preview(Pairs(), tokenizer, size=8, length=16, rows=Rows(images=2))
    assert shown["image"].shape == (8, 16, 3)
    with train_batches(open_source("scenes:train"), tokenizer, **OPTIONS, rows=Rows(images=2), bad_budget=1.0) as batches, \
            pytest.raises(BadDataError, match="image_count: 1 instead of images=2"):
        next(batches)


# cleaning

@pytest.mark.parametrize("name,text,expected", [
    ("albef", "A man's dog, <person>-like!  Really?\n", "a mans dog person like really"),
    ("albef", "and/or~ it's; #1", "and or its 1"),
    ("albef_question", "What's  the dog-breed? ", "whats  the dog breed"),
    ("blip", 'A man\'s dog, "so-called" (big)... ok?', "a man's dog, so-called big ok?"),
    ("blip_question", "What's the dog-breed? Yes! ", "what's the dog-breed? yes"),
    ("", "As It Is!", "As It Is!")])
def test_text_is_cleaned_as_the_releases_do(name, text, expected):
    assert Clean(name)(text) == expected


def test_cleaning_keeps_so_many_words():
    long = " ".join("abcdefghij"[i % 10] for i in range(60))
    kept = {(name, training): len(Clean(name, training)(long).split()) for name in ("albef", "albef_question", "blip_question") for training in (True, False)}
    assert kept == {("albef", True): 30, ("albef", False): 30, ("albef_question", True): 30, ("albef_question", False): 50,
                    ("blip_question", True): 50, ("blip_question", False): 50}
    assert len(Clean("blip(40)")(long).split()) == 40
    for wrong, said in (("blib", "text_clean='blib' is not a way to clean text; nearest: 'blip'"), ("blip(0)", "keeps no word; nearest: 'blip")):
        with pytest.raises(ValueError) as caught:
            Clean(wrong)
        assert said in str(caught.value)


def test_training_evaluation_preview_and_buckets_read_cleaned_text(tmp_path, tokenizer):
    spec = write(tmp_path, "vqa.json", [{"image": "a.png", "question": "A BIG, red (circle)?"}, {"image": "b.png", "question": "?!"}], True)
    source, rows = open_source(spec), Rows(text_clean="albef_question")
    with train_batches(source, tokenizer, **OPTIONS, rows=rows, bad_budget=1.0) as batches:
        assert [tokenizer.decode(ids) for ids in next(batches)[1]["text"]] == ["a big red circle"] * 4      # the other has nothing left
    with eval_batches(source, tokenizer, batch=2, size=8, length=16, rows=rows, bad_budget=1.0) as batches:
        (batch, meta), = batches
    assert meta[0]["captions"] == ["a big red circle"] and tokenizer.decode(batch["text"][0]) == "a big red circle" and len(meta) == 1
    shown = preview(source, tokenizer, size=8, length=16, rows=rows)
    assert shown["caption"] == "a big red circle" and shown["tokens_max"] == 6
    assert token_lengths(source, tokenizer, "albef_question")[np.arange(2)].tolist() == [6, 2]


# the data section

def stage_of(**data):
    config = tiny.tiny("clip").stages.pretrain
    config.data = {**config.data.to_dict(), **data}
    return resolve(config, "pretrain")


def test_a_stage_says_the_shapes_of_what_it_asks_for(tmp_path):
    stage = stage_of(answers=3, answer_length=5, images=2, classes=("False", "True"), swap="sides", buckets=())
    assert {key: value.shape for key, value in stage.spec.items() if key in ("images", "answer", "answer_mask", "answer_weight", "label")} == {
        "images": (8, 2, 48, 48, 3), "answer": (8, 3, 5), "answer_mask": (8, 3, 5), "answer_weight": (8, 3), "label": (8,)}
    assert "image" not in stage.spec
    plain = stage_of()
    assert set(plain.spec) == {"image", "text", "text_mask", "caption_id", "image_id"}
    pairs = write(tmp_path, "nlvr.json", NLVR, True)
    stage = stage_of(train=pairs, eval=pairs, images=2, classes=("False", "True"), batch=4, size=16)
    with stage.train_batches(stage.open(pairs), 0, 1, tmp_path / "q.jsonl") as batches:
        (_, batch), = batches
    assert {key: (value.shape[1:], str(value.dtype)) for key, value in batch.items()} == {
        key: (value.shape[1:], str(value.dtype)) for key, value in stage.spec.items()}
    meta = [m for b in stage.eval_batches(stage.open(pairs), 4, None) for m in b["meta"] if m]
    assert [m["label"] for m in meta] == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("data,message", [
    (dict(answers=2), "answers=2 needs answer_length.*nearest: 8"),
    (dict(answer_length=4), "answer_length=4 has no use.*nearest: answers=1"),
    (dict(answers=-1), "answers=-1 must be at least 0"),
    (dict(images=-1), "images=-1.*nearest: 1"),
    (dict(images=3, swap="sides"), "swap='sides' is for two images a row, not images=3; nearest: images=2"),
    (dict(images=2, swap="side"), "swap='side'.*nearest: 'sides'"),
    (dict(images=2, swap="sides", buckets=(8,)), r"swap='sides'.*buckets=\(8,\)"),
    (dict(classes=("a",)), "classes names 1 class"),
    (dict(classes=("a", "b", "a")), "names 'a' twice"),
    (dict(text_clean="albeff"), "text_clean='albeff'.*nearest: 'albef'")])
def test_what_does_not_go_together_is_refused_before_compile(data, message):
    with pytest.raises(ConfigError, match=r"stages\.pretrain\.data: .*" + message):
        stage_of(**data)

# scenes

def says(scene, what):
    """Whether "a red star", "an object", "three objects" is in a scene: read from the words and the facts alone."""
    words = what.split()
    if words[-1] in ("object", "objects") and words[0] in NUMBERS:
        return len(scene.objects) == NUMBERS.index(words[0])
    wanted = [word for word in words if word not in ("a", "an", "object")]
    return any(all(word in (thing.shape, thing.colour, thing.fill) for word in wanted) for thing in scene.objects)


def test_statements_about_a_scene_have_their_label_by_the_facts():
    forms = {"": ("contradiction", "entailment"), "and": ("contradiction", "neutral"), "or": ("neutral", "entailment")}
    places = "|".join(words for synonyms in PLACES.values() for words in synonyms)
    seen, unseen = collections.Counter(), re.compile(rf" (and|or) an? \w+ \w+ (?:{places}) the picture$")
    for split in ("train", "test", "heldout_pair"):
        source = open_source(f"scenes:{split}/entailment")
        assert source.classes == ["contradiction", "neutral", "entailment"]
        for i in range(200):
            text, label = scene_tasks.statement(source.scene(i))
            match = unseen.search(text)
            claim, form = (text[:match.start()], match.group(1)) if match else (text, "")
            short = re.fullmatch(r"there is (.*) in the picture", claim)
            true = says(source.scene(i), short.group(1)) if short else judge(source.scene(i), claim)["exact"]
            assert short or parse(claim).understood
            assert source.classes[label] == forms[form][true], text
            seen[form, label, bool(short)] += 1
    assert len(seen) == 12 and min(seen.values()) >= 15      # each form is true and false, short and a caption


def test_statements_about_pairs_have_their_label_by_the_facts():
    seen = collections.Counter()
    for split in ("train", "val", "heldout_pair"):
        source = open_source(f"scenes:{split}/pairs")
        for i in range(150):
            left, right, text, label = source.pair(i)
            assert i in (left.index, right.index) and left.index != right.index
            sides = {"left": left, "right": right}
            both = re.fullmatch(r"there (?:is|are) (.*) in the left picture (and|or) in the right picture", text)
            one = re.fullmatch(r"there (?:is|are) (.*) in the (left|right) picture", text) or re.fullmatch(r"the (left|right) picture shows (.*)", text)
            if both:
                form, found = both.group(2), [says(side, both.group(1)) for side in (left, right)]
                truth = all(found) if form == "and" else any(found)
            else:
                what, side = sorted(one.groups(), key=lambda words: words in ("left", "right"))
                form = "no" if what.startswith("no ") else "one"
                truth = says(sides[side], what.replace("no ", "a ", 1)) != (form == "no")
            assert truth == label, text
            seen[form, label] += 1
    assert len(seen) == 8 and min(seen.values()) >= 20


def test_scene_tasks_are_pure_samples_within_thirty_known_ids(tokenizer):
    words = set(scenes.vocabulary(300))
    for task, keys in (("vqa", {"answers", "all_answers", "answer_weights", "kind", "question_id"}), ("entailment", {"label"}), ("pairs", {"label", "images"})):
        source, again = open_source(f"scenes:val/{task}"), open_source(f"scenes:val/{task}")
        assert source.name == f"scenes:val/{task}" and len(source) == 1000 and source.fingerprint() == again.fingerprint()
        for i in (7, 3, 40):
            sample, other = source[i], again[i]
            assert sample.keys() == {"key", "image", "text", "json"} | keys
            assert all(np.array_equal(sample[k], other[k]) for k in ("image", "text", "key"))
        for i in range(100):
            text = source.caption(i, source.scene(i))[0]
            assert len(tokenizer.encode(text)) <= 30 and not set(re.findall("[a-z]+", text)) - words
    asked = [open_source("scenes:train/vqa")[i] for i in range(100)]
    kinds = {s["kind"] for s in asked}
    assert len(kinds) == 8 and all(s["answers"] == s["all_answers"] == read_answers(open_source("scenes:train/vqa"), s["question_id"]) for s in asked)
    assert any((q.question, q.answer) == (asked[0]["text"][0], asked[0]["answers"][0]) for q in scenes.questions(open_source("scenes:train").scene(0)))


def test_scene_tasks_make_batches(tokenizer):
    pair = open_source("scenes:test/pairs")
    with eval_batches(pair, tokenizer, batch=4, size=32, length=30, limit=4, rows=Rows(images=2, classes=2)) as batches:
        (batch, meta), = batches
    validate(batch)
    assert batch["images"].shape == (4, 2, 32, 32, 3) and batch["label"].tolist() == [m["label"] for m in meta]
    with train_batches(open_source("scenes:train/vqa"), tokenizer, **{**OPTIONS, "length": 30}, rows=Rows(answers=1, answer_length=10)) as batches:
        assert (next(batches)[1]["answer_weight"] == 1).all()


@pytest.mark.parametrize("spec,message", [
    ("train/vqaa", "task 'vqaa'.*nearest: 'vqa'"), ("trian/vqa", "split 'trian'.*nearest: 'train'"), ("noisy/pairs", "noisy/pairs.*nearest: 'train/pairs'"),
    ("train/", "task ''")])
def test_a_misspelt_scene_task_names_the_nearest(spec, message):
    with pytest.raises(ValueError, match=message):
        open_source(f"scenes:{spec}")


def test_classes_in_another_order_than_the_source_are_refused():
    with pytest.raises(ConfigError, match=r"classes=\('entailment', .*nearest: \('contradiction', 'neutral', 'entailment'\)"):
        stage_of(classes=("entailment", "neutral", "contradiction")).open("scenes:train/entailment")
    assert stage_of(classes=("False", "True"), images=2).open("scenes:val/pairs").classes == ["False", "True"]
