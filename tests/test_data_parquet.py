"""Parquet tables in the layout of Hugging Face data sets, and others: columns found or named, row groups read by many threads."""

import io
import json
import pickle
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm_jax.data import parquet
from vlm_jax.data.bad import BadSample
from vlm_jax.data.sources import open_source

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(shade=0):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def write(path, columns, features=None, **options):
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return f"parquet:{path}"


def images(shades, kind=IMAGE):
    return pa.array([{"bytes": picture(i), "path": None} for i in shades], kind)


def test_a_hugging_face_data_set(tmp_path):
    features = {"photo": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["tabby_cat", "dog"]}}
    for shard in range(2):
        write(tmp_path / f"train-0000{shard}-of-00002.parquet",
              {"photo": images(range(5 * shard, 5 * shard + 5)), "label": pa.array([0, 1, 0, 1, -1]), "thumb": [b"x"] * 5,
               "id": list(range(5))}, features, row_group_size=2)
    source = open_source(f"parquet:{tmp_path}/train-{{00000..00001}}-of-00002.parquet")
    assert len(source) == 10 and source.classes == ["tabby_cat", "dog"]
    assert source[7] == {"key": "train-00001-of-00002/2", "image": picture(7), "text": ["a photo of a tabby cat"], "text_weight": [1.0],
                         "label": 0, "json": {"label": 0, "id": 2}}
    assert list(source.keys())[4:6] == ["train-00000-of-00002/4", "train-00001-of-00002/0"] and source.read_text(-2) == ["a photo of a dog"]
    with pytest.raises(BadSample, match="unknown_label"):
        source[4]
    assert open_source(f"parquet:{tmp_path}/*.parquet", caption="the {};json:id")[1]["text"] == ["the dog"]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[8]["image"] == picture(8)


def test_captions_of_the_usual_names_and_shapes(tmp_path):
    def first(columns, **options):
        return open_source(write(tmp_path / "a.parquet", {"image": images([0]), **columns}), **options)[0]

    assert first({"text": ["a\n text"], "caption": ["no"]})["text"] == ["a text"]
    assert first({"Caption": ["a caption"]})["text"] == ["a caption"]
    assert first({"captions": [["one", "two"]]})["text_weight"] == [0.5, 0.5]
    assert first({"sentences": [[{"raw": "one", "id": 1}, {"raw": "two", "id": 2}]]})["text"] == ["one", "two"]
    assert first({"text": pa.array(["kept as a dictionary"]).dictionary_encode()})["text"] == ["kept as a dictionary"]
    assert first({"text": [b"in bytes"]})["text"] == ["in bytes"]
    assert first({"meta": [{"title": "deep"}]}, caption="json:meta/title")["text"] == ["deep"]
    assert first({"label": ["big_dog"]})["text"] == ["a photo of a big dog"]
    assert "label" not in first({"text": ["x"], "label": [0.5]})      # a score is no class
    with pytest.raises(ValueError, match=r"no column holds captions \(looked for text, caption.*its columns are image, alt"):
        first({"alt": ["x"]})
    with pytest.raises(BadSample, match="empty_caption"):
        first({"text": pa.array([" "])})
    with pytest.raises(BadSample, match="missing_caption"):
        first({"text": pa.array([None], pa.string())})


def test_images_in_bytes_and_beside_the_file(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a é.png").write_bytes(picture(5))
    plain = open_source(write(tmp_path / "plain.parquet", {"n": [1], "png": [picture(3)], "text": ["x"]}))
    assert plain[0]["image"] == picture(3) and plain[0]["key"] == "plain/0"
    paths = open_source(write(tmp_path / "paths.parquet", {"file_name": ["pictures/a é.png", "pictures/gone.png", None], "text": ["x", "y", "z"]}))
    assert paths[0]["image"] == picture(5) and list(paths.keys()) == ["pictures/a é.png", "pictures/gone.png", "row 2"]
    both = open_source(write(tmp_path / "both.parquet", {"image": pa.array([{"bytes": None, "path": "pictures/a é.png"}, None], IMAGE),
                                                         "text": ["x", "y"]}))
    assert both[0]["image"] == picture(5)
    for source, i in ((paths, 1), (paths, 2), (both, 1)):
        with pytest.raises(BadSample, match="missing_image"):
            source[i]


def test_files_of_one_name_have_keys_of_their_own(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split / "0000.parquet", {"image": images([0]), "text": [split]})
    source = open_source(f"parquet:{tmp_path}/*/0000.parquet")
    assert list(source.keys()) == ["test/0000/0", "train/0000/0"]


def test_what_does_not_fit_is_named(tmp_path):
    good = write(tmp_path / "a-0.parquet", {"image": images([0]), "caption": ["x"], "label": [1]})
    for wrong, message in (({"caption": "json:captoin"}, "no column 'captoin'; nearest: 'caption'"), ({"image": "img"}, "no column 'img'; nearest: 'image'"),
                           ({"label": "json:lable"}, "no column 'lable'; nearest: 'label'"), ({"image": "label"}, "'label' is int64.*nearest: 'image'"),
                           ({"img": "x"}, "no option 'img'; nearest: 'image'")):
        with pytest.raises(ValueError, match=message):
            open_source(good, **wrong)
    for i in (1, 2):
        write(tmp_path / f"a-{i}.parquet", {"image": images([0]), "text": ["x"]})
    with pytest.raises(ValueError, match="a-1.parquet has no column 'caption', and 1 more"):
        open_source(f"parquet:{tmp_path}/a-*.parquet")
    with pytest.raises(ValueError, match="no column holds images"):
        open_source(write(tmp_path / "n.parquet", {"n": [1], "text": ["x"]}))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="broken.parquet is not a Parquet file"):
        open_source(f"parquet:{tmp_path}/broken.parquet")
    with pytest.raises(FileNotFoundError, match=r"is a folder; nearest: '.*/\*.parquet'"):
        open_source(f"parquet:{tmp_path}")
    with pytest.raises(ValueError, match="has no rows"):
        open_source(write(tmp_path / "none.parquet", {"image": images([]), "text": pa.array([], pa.string())}))


def test_threads_share_row_groups_and_memory_is_bounded(tmp_path, monkeypatch):
    groups, rows = 12, 20
    content = np.random.default_rng(0).integers(0, 256, (groups * rows, 1000), np.uint8)
    spec = write(tmp_path / "a.parquet", {"image": pa.array([row.tobytes() for row in content]), "text": [f"t{i}" for i in range(len(content))]},
                 row_group_size=rows)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 3 * rows * 1100)
    source, errors = open_source(spec), []
    reads = []
    source._tables.make = lambda wanted, make=source._tables.make: reads.append(wanted) or make(wanted)

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, len(content), 60).tolist():
            sample = source[i]
            if sample["image"] != content[i].tobytes() or sample["text"] != [f"t{i}"] or source.read_text(i) != [f"t{i}"]:
                errors.append(i)

    threads = [threading.Thread(target=read, args=(s,)) for s in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not errors
    assert sum(f.result().nbytes for f in source._tables.held.values()) <= 3 * rows * 1100
    source._tables.held.clear(), reads.clear()
    [source[i] for i in range(len(content))]
    assert len(reads) == groups


def test_a_group_that_several_threads_want_is_decoded_once():
    made, started, go = [], threading.Event(), threading.Event()

    def make(argument):
        made.append(argument)
        started.set()
        assert go.wait(10)
        if argument == "bad":
            raise OSError("broken")
        return np.zeros(8)

    kept, got = parquet._Kept(make, 100), []

    def ask(argument):
        try:
            got.append(len(kept(argument)))
        except OSError:
            got.append("broken")

    for argument, result in (("good", 8), ("bad", "broken")):
        threads = [threading.Thread(target=ask, args=(argument,)) for _ in range(4)]
        threads[0].start()
        assert started.wait(10)
        [t.start() for t in threads[1:]]
        go.set()
        [t.join() for t in threads]
        assert got == [result] * 4 and made.count("good") == 1 and list(kept.held) == ["good"]
        got.clear(), started.clear(), go.clear()


def test_a_broken_row_group_is_a_bad_sample(tmp_path):
    spec = write(tmp_path / "a.parquet", {"image": images(range(8)), "text": [f"t{i}" for i in range(8)]}, row_group_size=4, use_dictionary=False)
    path = tmp_path / "a.parquet"
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start:start + 60] = b"\xff" * 60
    path.write_bytes(data)
    source = open_source(spec)
    assert source[3]["image"] == picture(3)
    for _ in range(2):
        with pytest.raises(BadSample, match="broken_row_group"):
            source[5]
