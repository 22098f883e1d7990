"""Published data sets in their authors' files: a few records of each, as published, with what is odd in them."""

import csv
import io
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data.bad import BadSample
from vlm_jax.data.batch import validate
from vlm_jax.data.json_index import scan
from vlm_jax.data.layouts import Layout
from vlm_jax.data.pipeline import eval_batches, train_batches
from vlm_jax.data.published import SETS
from vlm_jax.data.rows import Rows
from vlm_jax.data.sources import left_out, open_source
from vlm_jax.data.templates import TEMPLATES, fill, slots_of
from vlm_jax.data.tokenizers import load

SHADES = {}


def picture(root, name):
    """A picture of a shade of its own."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (SHADES.setdefault(name, len(SHADES)) % 256, 0, 0)).save(out, "PNG")
    path.write_bytes(out.getvalue())
    return out.getvalue()


def write(root, name, value):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in value))
    else:
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def published(root, name, split, **options):
    source = open_source(f"published:{name}:{split}:{root}", **options)
    assert pickle.loads(pickle.dumps(source)).key(0) == source.key(0) and len(source.fingerprint()) == 64
    assert [source.key(i) for i in range(len(source))] == list(source.keys())
    return source


def prompts(sample):
    """What the templates of its task make of a sample; each of its slots is there."""
    return [fill(template, slots_of(sample)) for template in TEMPLATES[sample["task"]]]


def reason(source, i):
    with pytest.raises(BadSample) as caught:
        source[i]
    return caught.value.reason


# ---- captions

def karpathy(folder, split, name, *texts, **more):
    return {"filename": name, "imgid": 3, "split": split, "sentids": list(range(len(texts))),
            "sentences": [{"tokens": text.lower().split(), "raw": text, "imgid": 3, "sentid": k} for k, text in enumerate(texts)], **more}


def test_karpathys_files(tmp_path):
    picture(tmp_path / "coco", "val2014/COCO_val2014_000000000042.jpg")
    images = [karpathy("", "test", "COCO_val2014_000000000042.jpg", "A man  rides.", "Ein Hügel", filepath="val2014", cocoid=42),
              karpathy("", "restval", "COCO_val2014_000000000073.jpg", "A bike.", filepath="val2014", cocoid=73)]
    write(tmp_path, "captions/dataset_coco.json", {"images": images, "dataset": "coco"})      # the images lie beside, in coco
    source = published(tmp_path / "captions", "coco_caption", "test")
    assert len(source) == 1 and source.key(0) == "val2014/COCO_val2014_000000000042.jpg"
    sample = source[0]
    assert sample["text"] == ["A man rides.", "Ein Hügel"] == source.read_text(0) and sample["text_weight"] == [0.5, 0.5]
    assert sample["task"] == "caption" and "answers" not in sample and "prompt" not in sample and sample["question_id"] == 42
    with pytest.raises(FileNotFoundError, match="no image val2014/COCO_val2014_000000000073.jpg of 1 that were looked for"):
        published(tmp_path / "captions", "coco_caption", "restval")
    with pytest.raises(ValueError, match="holds no row of the split 'train'"):
        published(tmp_path / "captions", "coco_caption", "train")

    shade = picture(tmp_path, "flickr30k-images/1.jpg")
    write(tmp_path, "dataset_flickr30k.json", {"images": [karpathy("", "test", "1.jpg", "Two dogs.")], "dataset": "flickr30k"})
    flickr = published(tmp_path, "flickr30k", "test")
    assert flickr.key(0) == "1.jpg" and flickr[0]["image"] == shade and flickr[0]["question_id"] == 3


def test_pairs_of_capfilt(tmp_path):
    picture(tmp_path, "a/1.jpg")
    write(tmp_path, "annotation.json", [{"image": "a/1.jpg", "caption": "a hill"}, {"image": "a/2.jpg", "caption": "a sea"}])
    source = published(tmp_path, "capfilt", "train")
    assert len(source) == 2 and source[0]["text"] == ["a hill"] and reason(source, 1) == "missing_image"
    write(tmp_path, "annotation.json", [{"url": "http://x/1.jpg", "caption": "a hill"}, {"url": "http://x/2.jpg", "caption": "a sea"}])
    with pytest.raises(ValueError, match=r"http://x/1.jpg' without the path of an image .*, and 1 more"):
        published(tmp_path, "capfilt", "train")


OCR = {"data": [{"image_id": "i1", "ocr_tokens": ["STOP", " ", *map(str, range(40))], "ocr_info": [{"word": "STOP"}]},
                {"image_id": "i2", "ocr_tokens": [], "ocr_info": []}]}


def test_textcaps_gathers_an_images_captions_and_words(tmp_path):
    rows = [{"dataset_name": "textcaps", "set_name": "val", "image_id": image, "image_name": image, "image_path": f"train/{image}.jpg", "caption_id": k,
             "caption_str": text, "reference_strs": ["A stop sign.", "Sign."]} for k, (image, text) in
            enumerate([("i1", "A stop sign."), ("i2", "A wall."), ("i1", "Sign.")])]
    write(tmp_path, "TextCaps_0.1_val.json", {"dataset_type": "val", "data": rows})
    for image in ("i1", "i2"):
        picture(tmp_path, f"train_images/{image}.jpg")
    plain = published(tmp_path, "textcaps", "val")
    assert len(plain) == 2 and plain[0]["text"] == ["A stop sign.", "Sign."] and plain[0]["task"] == "caption"
    write(tmp_path, "TextVQA_Rosetta_OCR_v0.2_val.json", OCR)
    source = published(tmp_path, "textcaps", "val")
    first, second = source[0], source[1]
    assert first["task"] == "caption_ocr" and prompts(first)[0].startswith("OCR tokens: STOP, 0, 1, ") and ", 28. " in prompts(first)[0]
    assert second["text"] == ["A wall."] and second["task"] == "caption" and source.key(1) == "i2.jpg"


def test_nocaps_has_domains(tmp_path):
    images = [{"id": k, "open_images_id": f"o{k}", "height": 4, "width": 4, "coco_url": "", "file_name": f"o{k}.jpg", "license": 0, "domain": domain}
              for k, domain in enumerate(["in-domain", "out-domain", "out-domain"])]
    captions = [{"image_id": k % 2, "id": k, "caption": f"caption {k}"} for k in range(4)]
    write(tmp_path, "nocaps_val_4500_captions.json", {"info": {"year": 2018}, "licenses": [], "images": images, "annotations": captions})
    for k in range(3):
        picture(tmp_path, f"val/o{k}.jpg")
    source = published(tmp_path, "nocaps", "val")
    assert len(source) == 3 and source[1]["text"] == ["caption 1", "caption 3"] and source[1]["kind"] == "out-domain"
    assert reason(source, 2) in ("missing_caption", "empty_caption")
    assert published(tmp_path, "nocaps", "in-domain")[0]["text"] == ["caption 0", "caption 2"]


# ---- questions

TEN = ["two"] * 6 + ["2", "2", "three", "a red one"]


def vqa(root, prefix="v2_", split="train", extra=()):
    picture(root, f"{split}2014/COCO_{split}2014_000000000009.jpg")
    questions = [{"image_id": 9, "question": "How many cats?", "question_id": 9000}, {"image_id": 9, "question": "Why?", "question_id": 9001}, *extra]
    answers = [{"question_type": "how many", "multiple_choice_answer": "two", "image_id": 9, "answer_type": "number", "question_id": 9000,
                "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k + 1} for k, a in enumerate(TEN)]},
               {"question_type": "why", "multiple_choice_answer": "sun", "image_id": 9, "answer_type": "other", "question_id": 9001,
                "answers": [{"answer": "sun", "raw_answer": "the sun", "answer_confidence": "yes", "answer_id": 1}]}]
    head = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {"name": "CC"}, "data_subtype": f"{split}2014"}
    write(root, f"{prefix}OpenEnded_mscoco_{split}2014_questions.json", {**head, "questions": questions})
    write(root, f"{prefix}mscoco_{split}2014_annotations.json", {**head, "annotations": answers[::-1]})      # in another order


@pytest.mark.parametrize("name, prefix", [("vqav2", "v2_"), ("okvqa", "")])
def test_vqas_two_files(tmp_path, name, prefix):
    vqa(tmp_path, prefix, extra=[{"image_id": 10, "question": "Whose?", "question_id": 10_000}])
    source = published(tmp_path, name, "train")
    assert len(source) == 2 and "no answers to question 10000" in left_out(source)
    sample = source[0]
    assert sample["prompt"] == "How many cats?" and sample["text"] == sample["answers"] == source.read_text(0)
    assert sample["all_answers"] == TEN == source.read_answers(0)
    assert sample["answers"] == ["two", "2", "three", "a red one"] and sample["answer_weights"] == sample["text_weight"] == [0.6, 0.2, 0.1, 0.1]
    assert sample["kind"] == "number" and sample["question_id"] == 9000 and source.key(1) == "train2014/COCO_train2014_000000000009.jpg"
    assert prompts(sample)[4] == "Question: How many cats? Short answer:" and source[1]["answers"] == ["sun"]
    plain = published(tmp_path, name, "train", caption="json:question")[0]
    assert plain["text"] == ["How many cats?"] and plain["answers"][0] == "two" and "prompt" not in plain and "task" not in plain
    turned = published(tmp_path, f"vqg_{name}", "train")
    assert turned[0]["text"] == ["How many cats?"] and "answers" not in turned[0] and "prompt" not in turned[0] and not turned.read_answers(0)
    assert prompts(turned[0])[0] == "Given the image, generate a question whose answer is: two. Question:"


def test_a_record_with_other_fields_is_bad_and_the_first_one_refused(tmp_path):
    vqa(tmp_path)
    path = tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json"
    questions = json.loads(path.read_text())
    del questions["questions"][1]["image_id"]
    path.write_text(json.dumps(questions))
    source = published(tmp_path, "vqav2", "train")
    assert source.key(1) == "row 1" and reason(source, 1) == "bad_record" and source[0]["prompt"] == "How many cats?"
    del questions["questions"][0]["image_id"]
    path.write_text(json.dumps(questions))
    with pytest.raises(ValueError, match="is not as VQAv2 is published: KeyError 'image_id'"):
        published(tmp_path, "vqav2", "train")


def test_test_questions_have_no_answers(tmp_path):
    picture(tmp_path, "COCO_test2015_000000000001.jpg")      # images in no folder of their own
    write(tmp_path, "v2_OpenEnded_mscoco_test-dev2015_questions.json",
          {"questions": [{"image_id": 1, "question": "Is it?", "question_id": 1000}], "data_subtype": "test2015"})
    source = published(tmp_path, "vqav2", "test-dev")
    assert source[0]["prompt"] == "Is it?" and source[0]["text"] == [] and "answers" not in source[0] and source.read_answers(0) == []


def test_vizwiz(tmp_path):
    said = [{"answer": a, "answer_confidence": "maybe"} for a in ["unanswerable"] * 7 + ["no"] * 3]
    write(tmp_path, "Annotations/val.json", [{"image": "VizWiz_val_00000001.jpg", "question": "What is this?", "answers": said,
                                              "answer_type": "unanswerable", "answerable": 0}])
    write(tmp_path, "Annotations/test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "Colour?"}])
    picture(tmp_path, "val/VizWiz_val_00000001.jpg")
    picture(tmp_path, "test/VizWiz_test_00000000.jpg")
    sample = published(tmp_path, "vizwiz", "val")[0]
    assert sample["answers"] == ["unanswerable", "no"] and sample["answer_weights"] == [0.7, 0.3] and sample["kind"] == "unanswerable"
    assert "answers" not in published(tmp_path, "vizwiz", "test")[0]


def test_aokvqa_in_words_by_choice_and_turned_round(tmp_path):
    row = {"split": "train", "image_id": 299207, "question_id": "22Mex", "question": "What is the man by the bags awaiting?",
           "choices": ["skateboarder", "train", "delivery", "cab"], "correct_choice_idx": 3, "direct_answers": ["ride", "cab", "cab", "bus"],
           "difficult_direct_answer": True, "rationales": ["A train would not be on the street."]}
    write(tmp_path, "aokvqa_v1p0_train.json", [row])
    picture(tmp_path.parent, f"{tmp_path.name}/images/train2017/000000299207.jpg")
    words = published(tmp_path, "aokvqa", "train")[0]
    assert words["answers"][0] == "cab" and words["answer_weights"][0] == 0.5 and words["kind"] == "difficult"
    choice = published(tmp_path, "aokvqa_choice", "train")[0]
    assert choice["choices"] == row["choices"] and choice["label"] == 3 and choice["text"] == ["cab"] and choice["prompt"] == row["question"]
    assert prompts(choice)[0] == f"Question: {row['question']} Options: (a) skateboarder (b) train (c) delivery (d) cab. Answer:"
    assert slots_of(published(tmp_path, "vqg_aokvqa", "train")[0])["a"] == "cab"
    write(tmp_path, "aokvqa_v1p0_test.json", [{k: v for k, v in row.items() if k not in ("correct_choice_idx", "direct_answers", "rationales")}])
    picture(tmp_path, "images/test2017/000000299207.jpg")
    assert "answers" not in published(tmp_path, "aokvqa", "test")[0]


def test_scienceqa_keeps_what_has_an_image(tmp_path):
    def problem(**more):
        return {"question": "Which is solid?", "choices": ["air", "ice"], "answer": 1, "hint": "", "image": "image.png", "task": "closed choice",
                "grade": "grade4", "subject": "natural science", "topic": "t", "category": "c", "skill": "s", "lecture": "l", "solution": "s",
                "split": "test", **more}

    write(tmp_path, "problems.json", {"1": problem(image=None), "2": problem(), "3": problem(hint="Ice is cold."), "4": problem(split="train"),
                                      "5": problem(answer=7), "6": problem(image=None)})
    for number in "235":
        picture(tmp_path, f"images/test/{number}/image.png")
    source = published(tmp_path, "scienceqa", "test")
    assert len(source) == 3 and left_out(source).endswith("problems.json has no image, and 1 more") and "problem 1 " in left_out(source)
    assert source[0]["task"] == "choice" and source[0]["label"] == 1 and source[0]["kind"] == "natural science"
    assert prompts(source[1])[0] == "Context: Ice is cold. Question: Which is solid? Options: (a) air (b) ice. Answer:"
    assert reason(source, 2) == "unknown_label" and source.key(1) == "test/3/image.png"


def test_ocrvqa_is_a_sample_a_question(tmp_path):
    book = {"imageURL": "http://x/51.gif", "title": "T", "authorName": "A", "genre": "Cookbooks", "questions": ["Who?", "What?"], "answers": ["A", "T"],
            "split": 1}
    write(tmp_path, "dataset.json", {"0761": book, "0762": {**book, "split": 3, "imageURL": "http://x/2.jpg"}, "0763": {**book, "questions": [], "answers": []},
                                     "0764": book})
    picture(tmp_path, "images/0761.jpg")      # fetched as .gif, turned into a .jpg
    picture(tmp_path, "images/0762.jpg")
    source = published(tmp_path, "ocrvqa", "train")
    assert [source[i]["prompt"] for i in range(2)] == ["Who?", "What?"] and source[1]["answers"] == ["T"] and len(source) == 4
    assert source[1]["question_id"] == "0761/1" and source.key(0) == source.key(1) == "0761.gif" and reason(source, 2) == "missing_image"
    assert len(published(tmp_path, "ocrvqa", "test")) == 2


def test_textvqa_and_gqa(tmp_path):
    row = {"question": "what is the brand?", "image_id": "i1", "image_classes": ["Belt"], "flickr_original_url": "u", "flickr_300k_url": "u", "image_width": 4,
           "image_height": 4, "answers": ["nous les gosses"] * 10, "question_tokens": ["what"], "question_id": 34602, "set_name": "val"}
    write(tmp_path, "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [row]})
    write(tmp_path, "TextVQA_Rosetta_OCR_v0.2_val.json", OCR)
    picture(tmp_path, "train_images/i1.jpg")
    sample = published(tmp_path, "textvqa", "val")[0]
    assert sample["task"] == "vqa_ocr" and prompts(sample)[1].startswith("OCR tokens: STOP, 0,") and prompts(sample)[1].endswith("Question: what is the brand?")
    assert sample["answers"] == ["nous les gosses"] and len(sample["all_answers"]) == 10

    item = {"question": "Is it red?", "imageId": "n161313", "answer": "no", "fullAnswer": "No, it is not.", "isBalanced": True, "groups": {},
            "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"}, "entailed": "", "equivalent": "", "semantic": []}
    write(tmp_path, "questions1.2/testdev_balanced_questions.json", {"20968379": item})
    picture(tmp_path, "images/n161313.jpg")
    sample = published(tmp_path, "gqa", "testdev")[0]
    assert sample["prompt"] == "Is it red?" and sample["answers"] == ["no"] and sample["kind"] == "verify" and sample["question_id"] == "20968379"


# ---- choices and statements

def test_vsr_and_hateful_memes(tmp_path):
    write(tmp_path, "splits/zeroshot/test.jsonl", [
        {"image": "000000050403.jpg", "image_link": "u", "caption": "The bear is in front of the person.", "label": label, "relation": "in front of",
         "annotator_id": 31, "vote_true_validator_id": [2], "vote_false_validator_id": []} for label in (1, 0)])
    picture(tmp_path, "images/000000050403.jpg")
    source = published(tmp_path, "vsr", "test")
    assert source.classes == ["no", "yes"] == [words[0] for words in SETS["vsr"].labels]
    assert [source[i]["label"] for i in range(2)] == [1, 0] and source[1]["text"] == ["no"]
    assert source[0]["prompt"].startswith("The bear") and 'statement true or false? "The bear' in prompts(source[0])[0]
    assert published(tmp_path, "vsr", "test", caption="json:question")[0]["text"] == ["The bear is in front of the person."]      # to classify

    memes = [{"id": 42953, "img": "img/42953.png", "label": 0, "text": "its their character"}, {"id": 2, "img": "img/2.png", "text": "no label"}]
    write(tmp_path, "dev_seen.jsonl", memes)
    picture(tmp_path, "img/42953.png")
    source = published(tmp_path, "hateful_memes", "val")
    assert len(source) == 1 and "no label for img/2.png" in left_out(source)
    assert source[0]["choices"] == ["no", "yes"] and '"its their character"' in prompts(source[0])[0] and source[0]["question_id"] == 42953


def test_iconqa_is_a_folder_a_problem(tmp_path):
    for number, content in {"10": {"question": "How many?", "choices": ["4", "7"], "answer": 1, "ques_type": "choose_txt", "grade": "K"}, "9": "{"}.items():
        folder = tmp_path / "iconqa/test/choose_txt" / number
        picture(folder, "image.png")
        (folder / "data.json").write_text(content if isinstance(content, str) else json.dumps(content))
    picture(tmp_path / "iconqa/test/choose_img/3", "image.png")      # choices that are pictures are another task
    source = published(tmp_path, "iconqa", "test")
    assert [source.key(i) for i in range(2)] == ["test/choose_txt/9/image.png", "test/choose_txt/10/image.png"]
    assert source[1]["text"] == ["7"] and source[1]["choices"] == ["4", "7"] and reason(source, 0) == "bad_json"


# ---- dialogues

def test_llava_instruct(tmp_path):
    def talk(*values, image="000000033471.jpg"):
        return {"id": "000000033471", "image": image, "conversations": [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(values)]}

    picture(tmp_path, "train2017/000000033471.jpg")
    write(tmp_path, "conversation_58k.json", [talk("<image>\nWhat colour?", "Red.", "And there?", "Blue."), talk("Odd", "even", "odd\n<image>"),
                                              talk("What?", "That.", image=None)])
    source = published(tmp_path, "llava_conversation", "train")
    assert len(source) == 2 and "has no image" in left_out(source)
    assert source[0]["turns"] == [("What colour?", "Red."), ("And there?", "Blue.")]
    assert source[0]["text"] == [] and "task" not in source[0] and reason(source, 1) == "bad_turns"
    for name, file in (("llava_detail", "detail_23k.json"), ("llava_reasoning", "complex_reasoning_77k.json")):
        write(tmp_path, file, [talk("Describe it.\n<image>", "A bus.")])
        assert published(tmp_path, name, "train")[0]["turns"] == [("Describe it.", "A bus.")]


def test_visdial(tmp_path):
    def turn(question, answer, right):
        return {"question": question, "answer": answer, "answer_options": [k % 3 for k in range(right, right + 100)], "gt_index": 0}

    dialogue = {"image_id": 185565, "caption": "a man on a bench.", "dialog": [turn(0, 0, 0), turn(1, 2, 2), {"question": 1, "answer": 1}]}
    write(tmp_path, "visdial_1.0_val.json", {"split": "val", "version": "1.0", "data": {
        "questions": ["is he old", "is it sunny?"], "answers": ["yes", "no", "can't tell"], "dialogs": [dialogue]}})
    write(tmp_path, "visdial_1.0_val_dense_annotations.json", [{"image_id": 185565, "round_id": 2, "gt_relevance": [0.5] * 100}])
    picture(tmp_path, "VisualDialog_val2018/VisualDialog_val2018_000000185565.jpg")
    source = published(tmp_path, "visdial", "val")
    assert len(source) == 2 and "turns without the index" in left_out(source)
    first, second = source[0], source[1]
    assert first["prompt"] == "is he old?" and len(first["choices"]) == 100 and first["text"] == ["yes"] and slots_of(first)["history"] == "a man on a bench."
    assert second["slots"]["history"] == "a man on a bench. is he old? yes." and second["choices"][second["label"]] == "can't tell"
    assert second["json"]["relevance"] == [0.5] * 100 and "relevance" not in first["json"]
    assert prompts(second)[0] == "Dialog history: a man on a bench. is he old? yes.\nQuestion: is it sunny? Short answer:"


# ---- videos

def test_video_questions(tmp_path):
    frames = [picture(tmp_path, f"msrvtt/frames/video7010/frame{k}.jpg") for k in (1, 2, 10)]
    write(tmp_path, "msrvtt/test_qa.json", [{"answer": "couch", "category_id": 14, "id": 158581, "question": "what are three people sitting on?",
                                             "video_id": 7010}, {"answer": "x", "category_id": 1, "id": 2, "question": "who?", "video_id": 7011}])
    source = published(tmp_path / "msrvtt", "msrvtt_qa", "test")
    sample = source[0]
    assert list(sample["frames"]) == frames and sample["image"] is None and source.key(0) == "video7010"
    assert sample["answers"] == ["couch"] and sample["kind"] == "what" and sample["task"] == "video" and reason(source, 1) == "missing_image"

    write(tmp_path, "msvd/val_qa.json", [{"answer": "man", "id": 1, "question": "who plays?", "video_id": 1201}])
    (tmp_path / "msvd/youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1201\n")
    picture(tmp_path, "msvd/frames/-4wsuPCjDBc_5_15/0.png")
    source = published(tmp_path / "msvd", "msvd_qa", "val")
    assert source.key(0) == "vid1201" and len(source[0]["frames"]) == 1

    with open(tmp_path / "test.csv", "w", newline="") as file:
        csv.writer(file).writerows([["video_id", "start", "end", "question", *(f"answer{k}" for k in range(1, 6))],
                                    ["ab", "3", "9", "What, then?", "pan", "pan", "pot", "lid", "pan"]])
    picture(tmp_path, "frames/ab_3_9/0.png")
    source = published(tmp_path, "ivqa", "test")
    assert source[0]["answers"] == ["pan", "pot", "lid"] and source[0]["answer_weights"] == [0.6, 0.2, 0.2] and source.key(0) == "ab_3_9"


# ---- the table, errors, batches

def test_the_table_is_that_of_the_paper():
    held = {side: [name for name, entry in SETS.items() if entry.held == side] for side in ("in", "out")}
    assert len(held["out"]) == 13 and len(held["in"]) == 13 + 1 and "aokvqa_choice" in held["in"]      # A-OKVQA has two forms
    assert len({entry.group for entry in SETS.values()}) == 11
    for entry in SETS.values():
        assert not entry.task or entry.task in TEMPLATES
        assert set(entry.splits) <= set(entry.images) and (entry.samples > 0) == (entry.held == "in" and entry.task != "choice")
    with open(os.path.join(os.path.dirname(__file__), "..", "docs", "data_sets.md"), encoding="utf-8") as file:
        page = file.read()
    for name, entry in SETS.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {entry.held} |" in line and f"| {entry.metric} |" in line


def test_errors_name_what_is_there(tmp_path):
    vqa(tmp_path)
    for spec, said in [("published:vqa2:train:x", "'vqa2' is no published set; nearest: 'vqav2'"),
                       (f"published:vqav2:trian:{tmp_path}", "VQAv2 has no split 'trian'; nearest: 'train'"),
                       ("published:vqav2:train", "names no folder; write published:vqav2:train:DIR"),
                       (f"published:vqav2:train:{tmp_path}#vall", "'vall' is not a side")]:
        with pytest.raises(ValueError, match=said):
            open_source(spec)
    with pytest.raises(ValueError, match="have no option 'label'"):
        open_source(f"published:vqav2:train:{tmp_path}", label="json:label")
    with pytest.raises(FileNotFoundError, match="VQAv2 needs v2_OpenEnded_mscoco_val2014_questions.json in .*nearest: 'v2_OpenEnded_mscoco_train2014_ques"):
        open_source(f"published:vqav2:val:{tmp_path}")
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}x; nearest: '{tmp_path.name}'"):
        open_source(f"published:vqav2:train:{tmp_path}x")
    for content, said in [
            ('{"questions": [', "cannot be read as JSON from byte 15 of 15"), ('{"question": []}', "holds no 'questions'; nearest: 'question'"),
            ('{"questions": []}', "holds no row of the split 'train'"), ("", "is empty"),
            ('{"questions": [{"id": 3}]}', "is not as VQAv2 is published: KeyError 'question_id'")]:
        (tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            open_source(f"published:vqav2:train:{tmp_path}")


def test_splits_and_batches(tmp_path):
    for number in range(40):
        picture(tmp_path, f"train2014/COCO_train2014_{number:012d}.jpg")
    questions = [{"image_id": k, "question": f"is it {word}", "question_id": 10 * k} for k, word in zip(range(40), ["red", "a circle"] * 20)]
    write(tmp_path, "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions})
    write(tmp_path, "v2_mscoco_train2014_annotations.json", {"annotations": [
        {"question_id": 10 * k, "answer_type": "yes/no", "answers": [{"answer": "yes"}, {"answer": "yes"}, {"answer": "no"}]} for k in range(40)]})
    spec = f"published:vqav2:train:{tmp_path}"
    sides = [open_source(f"{spec}#{side}:30", caption="json:question") for side in ("train", "val")]
    assert len(sides[0]) + len(sides[1]) == 40 and sides[1].read_answers(0) == ["yes", "yes", "no"]
    tokenizer, rows, options = load("scenes"), Rows(answers=2, answer_length=4), dict(batch=4, size=8, length=8, augment="squash", threads=0)
    with train_batches(sides[0], tokenizer, seed=0, rows=rows, **options) as batches:      # for systems that read questions as texts
        _, batch = next(batches)
    validate(batch)
    assert batch["answer_mask"].any(-1).all() and np.allclose(batch["answer_weight"], [2 / 3, 1 / 3])
    with eval_batches(sides[1], tokenizer, rows=rows, **options) as batches:
        batch, meta = next(batches)
    assert meta[0]["answers"] == ["yes", "yes", "no"] and meta[0]["kind"] == "yes/no" and meta[0]["captions"][0].startswith("is it")


def text_of(tokenizer, ids, mask):
    return tokenizer.decode(ids[mask].tolist())


def test_instructions_as_batches(tmp_path):
    vqa(tmp_path)
    picture(tmp_path, "img/1.png")
    write(tmp_path, "dev.jsonl", [{"id": 1, "img": "img/1.png", "label": 1, "text": "red circle"}])
    write(tmp_path, "detail_23k.json", [{"id": "9", "image": "COCO_train2014_000000000009.jpg", "conversations": [
        {"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": "a square"}]}])
    picture(tmp_path, "train2017/COCO_train2014_000000000009.jpg")
    picture(tmp_path, "frames/video7/1.jpg")
    write(tmp_path, "test_qa.json", [{"answer": "blue", "category_id": 1, "id": 5, "question": "what colour?", "video_id": 7}])
    tokenizer, layout = load("scenes"), Layout("joined", prompt_length=48, templates="task")
    options = dict(batch=1, size=8, length=8, augment="squash", threads=0, layout=layout)
    said = {}
    for name, split in (("okvqa", "train"), ("vqg_vqav2", "train"), ("llava_detail", "train"), ("hateful_memes", "val"), ("msrvtt_qa", "test")):
        if name == "okvqa":
            vqa(tmp_path, "")
        source, rows = open_source(f"published:{name}:{split}:{tmp_path}"), Rows(images=2 if SETS[name].video else 1, answers=2, answer_length=4)
        with train_batches(source, tokenizer, seed=0, rows=rows, **options) as batches:
            _, batch = next(batches)
        validate(batch)
        assert batch["target_mask"].any() and (not SETS[name].video or batch["images"].shape == (1, 2, 8, 8, 3))
        with eval_batches(source, tokenizer, rows=rows, **options) as batches:
            batch, (meta,) = next(batches)
        validate(batch)
        said[name] = meta
        if "choices" in meta:
            ids, mask = batch["answer"][0], batch["answer_mask"][0]
            assert batch["label"].tolist() == [1] and [text_of(tokenizer, ids[k], mask[k]) for k in range(2)] == ["no", "yes"]
    assert said["okvqa"]["question"] == "How many cats?" and said["okvqa"]["answers"] == TEN and said["llava_detail"]["captions"] == ["a square"]
    assert said["vqg_vqav2"]["question"].endswith("whose answer is: two. Question:") and said["vqg_vqav2"]["captions"] == ["How many cats?"]
    assert '"red circle"' in said["hateful_memes"]["question"] and said["msrvtt_qa"]["question"] == "Question: what colour? Short answer:"


def test_places_in_json_are_found_across_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_jax.data.json_index.WINDOW", 8)
    values = [12345678901, 2.5, "aé\"}]x" * 4, {"k": [1, {"é": None}]}, [], True, "日本"]
    for ascii_only in (True, False):
        (tmp_path / "a.json").write_text("\ufeff" + json.dumps({"info": {"a": [1]}, "data": {"x": values, "y": dict(zip("aébcdef", values))}}, indent=1,
                                                               ensure_ascii=ascii_only), encoding="utf-8")
        found = scan(str(tmp_path / "a.json"), {"data/x": lambda number, value: number != 1, "data/y": lambda key, value: True})
        assert [found["data/x"][i] for i in range(6)] == values[:1] + values[2:] and found["data/x"].nbytes == 6 * 12
        assert dict(map(found["data/y"].item, range(7))) == dict(zip("aébcdef", values))
    os.truncate(tmp_path / "a.json", 80)
    with pytest.raises(BadSample, match="a.json at byte"):      # it is no longer what was scanned
        pickle.loads(pickle.dumps(found["data/x"]))[3]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n  {"a": 2}')
    found = scan(str(tmp_path / "a.jsonl"), {"": lambda number, value: True})[""]
    assert [found[i] for i in range(2)] == [{"a": 1}, {"a": 2}] == [found.select([0, 1])[i] for i in range(2)]
