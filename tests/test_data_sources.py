"""Sources by name: fields, captions, labels, tables, TFDS, mixtures, and errors that name the nearest."""

import csv
import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data.bad import BadSample
from vlm_jax.data.batch import GLOSSARY, hash31, normalise_caption, validate
from vlm_jax.data.record import parse_captions
from vlm_jax.data.sources import Mixture, open_source, read_text


def picture(shade=0):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def tar_of(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for kind, content in {"png": picture(), **members}.items():
                content = content if isinstance(content, bytes) else content.encode()
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return f"tars:{path}"


def reason(source, i):
    with pytest.raises(BadSample) as caught:
        source[i]
    return caught.value.reason


def test_captions_come_from_the_named_fields(tmp_path):
    spec = tar_of(tmp_path / "a.tar", {
        "a": {"txt": "plain\n  text ",
              "json": json.dumps({"title": "a title", "tags": ["x", "y z", ""], "deep": {"er": "down"}})},
        "b": {"txt": "\ufeffbom", "json": json.dumps({"title": " "})}})
    source = open_source(spec)
    assert source[0]["text"] == ["plain text"] and source[1]["text"] == ["bom"]
    both = open_source(spec, caption="txt@1;json:title@3")
    assert both[0]["text"] == ["plain text", "a title"] and both[0]["text_weight"] == [1, 3]
    assert both[1]["text"] == ["bom"] and both[1]["text_weight"] == [1]
    assert both[0]["json"]["deep"] == {"er": "down"}
    tags = open_source(spec, caption="json:tags")
    assert tags[0]["text"] == ["x", "y z"] and tags[0]["text_weight"] == [0.5, 0.5]
    assert open_source(spec, caption="json:deep/er").read_text(0) == ["down"]
    assert reason(tags, 1) == "missing_caption"
    assert reason(open_source(spec, caption="json:title"), 1) == "empty_caption"


def test_captions_that_cannot_be_used_have_a_reason(tmp_path):
    spec = tar_of(tmp_path / "a.tar", {
        "latin": {"txt": b"caf\xe9"}, "empty": {"txt": b""}, "blank": {"txt": " \n\t"},
        "half": {"txt": "x", "json": '{"t": "\\ud83d"}'}, "cut": {"txt": "x", "json": '{"t": "ab'}})
    source = open_source(spec)
    assert [reason(source, i) for i in range(3)] == ["caption_not_utf8", "empty_caption", "empty_caption"]
    source = open_source(spec, caption="json:t")
    assert source.counts["missing_caption"] == 3
    assert [reason(source, i) for i in range(2)] == ["caption_not_utf8", "bad_json"]


@pytest.mark.parametrize("caption", ["", "json", "json:", "txt:field", "txt@0", "txt@x", "txt@-1"])
def test_wrong_caption_fields_are_refused(caption):
    with pytest.raises(ValueError, match="txt"):
        parse_captions(caption)


def test_labels_are_ids_with_names(tmp_path):
    rows = {f"k{i}": {"txt": "t", "json": json.dumps({"group": group, "id": i})}
            for i, group in enumerate(["dog", "cat", "dog"])}
    spec = tar_of(tmp_path / "a.tar", rows)
    source = open_source(spec, label="json:group")
    assert source.classes == ["cat", "dog"] and [source[i]["label"] for i in range(3)] == [1, 0, 1]
    numbers = open_source(spec, label="json:id")
    assert numbers.classes is None and [numbers[i]["label"] for i in range(3)] == [0, 1, 2]
    given = open_source(spec, label="json:group", classes=["dog", "bird"])
    assert given[0]["label"] == 0 and reason(given, 1) == "unknown_label"
    assert reason(open_source(spec, label="json:none"), 0) == "missing_label"
    assert "label" not in open_source(spec)[0] and open_source(spec).classes is None


def test_jsonl_and_csv(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture(5))
    lines = [{"image": "images/a.png", "text": "één", "n": 1},
             {"image": "images/a.png", "text": ["two", "deux"], "n": 0},
             {"image": "images/gone.png", "text": "three"}, {"text": "four"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\nnot json\n[1]\n")
    source = open_source(f"jsonl:{tmp_path}/d.jsonl", label="json:n")
    assert len(source) == 6
    assert source[0] == {"key": "images/a.png", "image": picture(5), "text": ["één"], "text_weight": [1.0],
                         "label": 1, "json": lines[0]}
    assert source[1]["text"] == ["two", "deux"] == read_text(source, 1)
    assert source[0]["key"] == source[1]["key"]  # one image with two rows keeps one image id
    assert [reason(source, i) for i in range(2, 6)] == ["missing_image", "missing_image", "bad_json", "bad_json"]
    assert source.key(4) == "row 4"
    with open(tmp_path / "d.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "title"], ["images/a.png", "a, \"b\"\nc"]])
    table = open_source(f"csv:{tmp_path}/d.csv", image="path", caption="json:title")
    assert len(table) == 1 and table[0]["text"] == ['a, "b" c'] and table[0]["image"] == picture(5)
    (tmp_path / "d.tsv").write_bytes(b"image\ttext\nimages/a.png\tcaf\xe9\n")
    assert reason(open_source(f"csv:{tmp_path}/d.tsv"), 0) == "caption_not_utf8"
    with pytest.raises(ValueError, match="no column 'titel'.*nearest: 'title'"):
        open_source(f"csv:{tmp_path}/d.csv", image="path", caption="json:titel")
    with pytest.raises(FileNotFoundError, match="nearest: 'd.jsonl'"):
        open_source(f"jsonl:{tmp_path}/d.json")


def test_tfds_is_read_without_tensorflow(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core import example_serializer
    features = tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["cat", "big_dog"]),
        "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64})})
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    features.save_config(str(folder))
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    writer = ArrayRecordWriter(str(folder / "tiny-train.array_record-00000-of-00001"), "group_size:1")
    for i in range(3):
        captions = [{"text": f"cap {i} {j}", "id": j} for j in range(2)]
        example = {"image": io.BytesIO(picture(i)), "label": i % 2, "captions": captions}
        writer.write(serializer.serialize_example(features.encode_example(example)))
    writer.close()
    (folder / "dataset_info.json").write_text(json.dumps({
        "fileFormat": "array_record", "name": "tiny", "version": "1.0.0", "moduleName": "tiny.tiny",
        "splits": [{"name": "train", "numBytes": "1", "shardLengths": ["3"],
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}]}))
    loaded = set(sys.modules)
    source = open_source("tfds:tiny:train", data_dir=str(tmp_path))
    assert len(source) == 3 and source.classes == ["cat", "big_dog"]
    sample = source[1]
    assert sample["text"] == ["cap 1 0", "cap 1 1"] and sample["label"] == 1 and sample["key"] == "tfds:tiny:train/1"
    assert np.asarray(Image.open(io.BytesIO(sample["image"])))[0, 0].tolist() == [1, 0, 0]
    assert open_source("tfds:tiny", data_dir=str(tmp_path), caption="json:class_name")[1]["text"] == ["big dog"]
    assert len(open_source("tfds:tiny:train[:2]", data_dir=str(tmp_path))) == 2
    assert "tensorflow" not in set(sys.modules) - loaded
    with pytest.raises(ValueError, match="no feature 'img'.*nearest: 'image'"):
        open_source("tfds:tiny", data_dir=str(tmp_path), image="img")


def test_mixtures(tmp_path):
    a = tar_of(tmp_path / "a.tar", {f"k{i}": {"txt": f"a{i}"} for i in range(3)})
    b = tar_of(tmp_path / "b.tar", {f"k{i}": {"txt": f"b{i}"} for i in range(5)})
    for mixture, weights in ((open_source(f"{a}@3; {b}@1"), [3, 1]), (open_source((f"{a}@0.5", f"{b}@1.5")), [0.5, 1.5]),
                             (open_source([a, b]), None), (open_source([open_source(a), b]), None)):
        assert isinstance(mixture, Mixture) and mixture.weights == weights
        assert [mixture[i]["text"][0] for i in range(8)] == ["a0", "a1", "a2", "b0", "b1", "b2", "b3", "b4"]
        assert mixture[-1]["text"] == ["b4"] == mixture.read_text(7) and mixture.key(3) == "b/k0"
    with pytest.raises(IndexError):
        mixture[8]
    for wrong in (f"{a}@1;{b}", f"{a}@0;{b}@1", ()):
        with pytest.raises(ValueError, match="WEIGHT"):
            open_source(wrong)


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    for spec, near in (("tar:/x.tar", "tars"), ("json:/x", "jsonl"), ("scene:train", "scenes"), ("/data/x.tar", "tars")):
        with pytest.raises(ValueError, match=f"nearest: '{near}'"):
            open_source(spec)
    with pytest.raises(ValueError, match="no option 'captions'; nearest: 'caption'"):
        open_source(tar_of(tmp_path / "a.tar", {"a": {"txt": "x"}}), captions="txt")


def test_glossary_checks_a_batch():
    good = {"image": np.zeros((2, 8, 8, 3), np.uint8), "text": np.zeros((2, 5), np.int32),
            "text_mask": np.ones((2, 5), bool), "caption_id": np.zeros(2, np.int32), "image_id": np.zeros(2, np.int32)}
    validate(good)
    validate({**good, "mask": np.ones(2, bool), "image": good["image"].astype(np.float32)})
    for change, message in (({"text": np.zeros((2, 5))}, "float64, expected int32"),
                            ({"text_mask": np.ones((2, 4), bool)}, "axis 'l' is 4"),
                            ({"caption_id": np.zeros((2, 1), np.int32)}, "expected axes"),
                            ({"image": np.zeros((2, 8, 8, 4), np.uint8)}, "axis 'c' is 4"),
                            ({"imag": good["image"]}, "nearest: 'image'"), ({"images": good["image"]}, "expected axes")):
        with pytest.raises(ValueError, match=message):
            validate({**good, **change})
    assert all(e.meaning for e in GLOSSARY.values())


def test_ids_are_stable_and_fit_int32():
    assert hash31("orange heart") == 1592387360
    values = [hash31(str(i)) for i in range(3000)]
    assert len(set(values)) == 3000 and 0 <= min(values) and max(values) < 2**31 and max(values) > 2**30
    assert normalise_caption("  A\u00a0 ﬁne  CAT\n") == "a fine cat"
