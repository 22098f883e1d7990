"""The data sets of InstructBLIP (arXiv 2305.06500, table 1 and appendix C): what each is called, needs, asks and is measured by."""

from __future__ import annotations

from collections.abc import Mapping

from vlm_jax.data.published import captions, choices, dialogues, questions, videos
from vlm_jax.data.published.reader import DataSet


def _each(splits: str, *names: str) -> dict[str, tuple[str, ...]]:
    """{split: names with the split in the place of {}}."""
    return {split: tuple(name.replace("{}", split) for name in names) for split in splits.split()}


_HERE = _each("train val test test-dev", "")
_VQA = {**{split: (f"v2_OpenEnded_mscoco_{split}2014_questions.json", f"v2_mscoco_{split}2014_annotations.json") for split in ("train", "val")},
        "test": ("v2_OpenEnded_mscoco_test2015_questions.json",), "test-dev": ("v2_OpenEnded_mscoco_test-dev2015_questions.json",)}
_OKVQA = {split: (f"OpenEnded_mscoco_{split}2014_questions.json", f"mscoco_{split}2014_annotations.json") for split in ("train", "val")}
_AOKVQA = _each("train val test", "aokvqa_v1p0_{}.json")
_TEXT_IMAGES = {"train": ("train_images", "train_val_images/train_images"), "val": ("train_images", "train_val_images/train_images"),
                "test": ("test_images",)}
_FRAMES = _each("train val test", "frames", "videos", "")


def _train(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {split: names[split] for split in ("train", "val")}


SETS: Mapping[str, DataSet] = {
    # trained on
    "coco_caption": DataSet("COCO Caption", captions.Karpathy, "caption", _each("train restval val test", "dataset_coco.json"),
                            _each("train restval val test", ""), "captioning", "in", "caption", "CIDEr-D", 82_000),
    "capfilt": DataSet("Web CapFilt", captions.Pairs, "caption",
                       {"train": ("annotation.json|ccs_synthetic_filtered_large.json|ccs_synthetic_filtered.json|ccs_filtered.json",)},
                       _HERE, "captioning", "in", "caption", "CIDEr-D", 14_000_000),
    "textcaps": DataSet("TextCaps", captions.TextCaps, "caption", _each("train val test", "TextCaps_0.1_{}.json"), _TEXT_IMAGES,
                        "captioning with reading", "in", "caption", "CIDEr-D", 21_000),
    "vqav2": DataSet("VQAv2", questions.Vqa, "vqa", _VQA, _HERE,
                     "question answering", "in", "vqa", "accuracy", 82_000),
    "okvqa": DataSet("OK-VQA", questions.Vqa, "vqa", _OKVQA, _HERE, "question answering with knowledge", "in", "vqa", "accuracy", 9_000),
    "aokvqa": DataSet("A-OKVQA", questions.AokVqa, "vqa", _AOKVQA, _HERE, "question answering with knowledge", "in", "vqa", "accuracy", 17_000),
    "aokvqa_choice": DataSet("A-OKVQA, multiple choice", choices.AokVqaChoice, "choice", _train(_AOKVQA), _HERE,
                             "question answering with knowledge", "in", "choice", "accuracy"),
    "ocrvqa": DataSet("OCR-VQA", questions.OcrVqa, "vqa", _each("train val test", "dataset.json"), _each("train val test", "images", ""),
                      "question answering with reading", "in", "vqa", "accuracy", 800_000),
    "vqg_vqav2": DataSet("VQAv2, questions sought", questions.Vqa, "vqg", _train(_VQA), _HERE, "question generation", "in", "caption", "CIDEr-D", 82_000),
    "vqg_okvqa": DataSet("OK-VQA, questions sought", questions.Vqa, "vqg", _OKVQA, _HERE, "question generation", "in", "caption", "CIDEr-D", 9_000),
    "vqg_aokvqa": DataSet("A-OKVQA, questions sought", questions.AokVqa, "vqg", _train(_AOKVQA), _HERE, "question generation", "in", "caption",
                          "CIDEr-D", 17_000),
    "llava_conversation": DataSet("LLaVA-Instruct, conversation", dialogues.Llava, "", {"train": ("conversation_58k.json",)}, _HERE,
                                  "conversation", "in", "caption", "CIDEr-D", 58_000),
    "llava_detail": DataSet("LLaVA-Instruct, detail", dialogues.Llava, "", {"train": ("detail_23k.json",)}, _HERE,
                            "conversation", "in", "caption", "CIDEr-D", 23_000),
    "llava_reasoning": DataSet("LLaVA-Instruct, reasoning", dialogues.Llava, "", {"train": ("complex_reasoning_77k.json",)}, _HERE,
                               "conversation", "in", "caption", "CIDEr-D", 77_000),

    # tested on, unseen
    "nocaps": DataSet("NoCaps", captions.NoCaps, "caption", _each("val in-domain near-domain out-domain", "nocaps_val_4500_captions.json"),
                      _each("val in-domain near-domain out-domain", "val", ""), "captioning", "out", "caption", "CIDEr-D"),
    "flickr30k": DataSet("Flickr30K", captions.Karpathy, "caption", _each("train val test", "dataset_flickr30k.json"),
                         _each("train val test", "flickr30k-images", "flickr30k_images", ""), "captioning", "out", "caption", "CIDEr-D"),
    "vizwiz": DataSet("VizWiz", questions.VizWiz, "vqa", _each("train val test", "{}.json"), _each("train val test", "{}", ""),
                      "question answering", "out", "vqa", "accuracy"),
    "scienceqa": DataSet("ScienceQA, with images", choices.ScienceQa, "choice", _each("train val test", "problems.json"), _each("train val test", ""),
                         "question answering with knowledge", "out", "choice", "accuracy", within=("data/scienceqa", "scienceqa")),
    "textvqa": DataSet("TextVQA", questions.TextVqa, "vqa", _each("train val test", "TextVQA_0.5.1_{}.json"), _TEXT_IMAGES,
                       "question answering with reading", "out", "vqa", "accuracy"),
    "gqa": DataSet("GQA", questions.Gqa, "vqa", {split: (f"{name}_questions.json",) for split, name in (
        ("train", "train_balanced"), ("val", "val_balanced"), ("testdev", "testdev_balanced"), ("test", "test_balanced"), ("testdev-all", "testdev_all"))},
        _each("train val testdev test testdev-all", "images", ""), "visual reasoning", "out", "vqa", "accuracy", within=("questions1.2",)),
    "vsr": DataSet("VSR", choices.Vsr, "statement", _each("train dev test", "{}.jsonl"), _each("train dev test", "", "trainval2017", "../../images"),
                   "visual reasoning", "out", "choice", "accuracy", within=("splits/zeroshot", "zeroshot", "data/splits/zeroshot"), labels=choices.NO_YES),
    "iconqa": DataSet("IconQA, choices in words", choices.IconQa, "choice", _each("train val test", "{}/choose_txt"),
                      _each("train val test", "", "iconqa", "iconqa_data/iconqa"), "visual reasoning", "out", "choice", "accuracy",
                      within=("iconqa", "iconqa_data/iconqa")),
    "msvd_qa": DataSet("MSVD-QA", videos.VideoQa, "video", _each("train val test", "{}_qa.json"), _FRAMES, "video question answering", "out", "vqa",
                       "accuracy", video=True),
    "msrvtt_qa": DataSet("MSRVTT-QA", videos.VideoQa, "video", _each("train val test", "{}_qa.json"), _FRAMES, "video question answering", "out", "vqa",
                         "accuracy", video=True),
    "ivqa": DataSet("iVQA", videos.Ivqa, "video", _each("train val test", "{}.csv"), _FRAMES, "video question answering", "out", "vqa", "accuracy",
                    video=True),
    "visdial": DataSet("VisDial", dialogues.VisDial, "dialogue", _each("train val", "visdial_1.0_{}.json"), _HERE,
                       "visual dialogue", "out", "choice", "MRR"),
    "hateful_memes": DataSet("HatefulMemes", choices.HatefulMemes, "hateful",
                             {**_each("train dev_seen dev_unseen test_seen test_unseen", "{}.jsonl"), "val": ("dev.jsonl|dev_seen.jsonl",)},
                             _each("train val dev_seen dev_unseen test_seen test_unseen", ""), "classification", "out", "choice", "AUC",
                             labels=choices.NO_YES),
}
