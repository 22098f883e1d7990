"""Pictures in folders, as people keep them: captions beside them or class folders, and what is left out by name."""

import io
import json
import os
import pickle

import pytest
from PIL import Image

from vlm_jax.data import folder
from vlm_jax.data.bad import BadSample
from vlm_jax.data.sources import left_out, open_source


def picture(shade=0, form="PNG"):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(out, form)
    return out.getvalue()


def fill(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"folder:{root}"


def keys(source):
    return [source.key(i) for i in range(len(source))]


def test_captions_beside_pictures(tmp_path):
    spec = fill(tmp_path / "my photos", {
        "b.jpg": picture(1, "JPEG"), "b.txt": "a dog\n  on two\tlines \n", "a.b.PNG": picture(2), "a.b.TXT": "\ufeffdotted",
        "Ferien 2024/Tag é/図.webp": picture(3, "WEBP"), "Ferien 2024/Tag é/図.txt": "ein Bär", "Ferien 2024/x.gif": picture(4, "GIF"),
        "Ferien 2024/x.txt": "y", ".hidden/c.jpg": b"", "__MACOSX/b.jpg": b"", "Thumbs.db": b"", ".DS_Store": b"", "._b.jpg": b""})
    source = open_source(spec)
    assert keys(source) == list(source.keys()) == ["a.b.PNG", "b.jpg", "Ferien 2024/x.gif", "Ferien 2024/Tag é/図.webp"]
    assert [source[i]["text"] for i in range(4)] == [["dotted"], ["a dog on two lines"], ["y"], ["ein Bär"]]
    assert source[1]["image"] == picture(1, "JPEG") and source.read_text(-1) == ["ein Bär"]
    assert not source.counts and left_out(source) == "" and source.classes is None and "label" not in source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert keys(copy) == keys(source) and copy[3] == source[3]
    again = open_source(spec + "/")
    assert again.name == source.name == spec and keys(again) == keys(source)


def test_captions_in_json_with_labels(tmp_path):
    spec = fill(tmp_path, {"a.jpg": picture(), "a.json": json.dumps({"title": ["one", "two"], "kind": "dog"}),
                           "b.jpg": picture(), "b.json": json.dumps({"title": "three", "kind": "cat"}), "b.txt": "plain"})
    source = open_source(spec, caption="json:title", label="json:kind")
    assert source[0]["text"] == ["one", "two"] and [source[i]["label"] for i in (0, 1)] == [1, 0] and source.classes == ["cat", "dog"]
    both = open_source(spec, caption="txt@1;json:title@3")
    assert both[1]["text"] == ["plain", "three"] and both[1]["text_weight"] == [1, 3] and len(both) == 2


def test_what_is_left_out_is_counted_and_named(tmp_path):
    spec = fill(tmp_path, {"a.jpg": picture(), "a.txt": "fine", "d/b.jpg": b"", "c.jpg": b"", "e.txt": "no picture", "z.txt": "nor here",
                           "IMG.HEIC": b"", "IMG.txt": "of another format", "notes.md": "?"})
    os.symlink("nowhere", tmp_path / "gone")
    open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb").close()
    source = open_source(spec)
    assert keys(source) == ["a.jpg"]
    assert source.counts == {"missing_caption": 2, "missing_image": 2, "unsupported_format": 1, "broken_link": 1, "name_not_utf8": 1}
    told = left_out(source)
    assert f"{tmp_path}/c.jpg has no caption ({tmp_path}/c.txt), and 1 more" in told
    assert f"{tmp_path}/e.txt has no image beside it, and 1 more" in told and "IMG.HEIC is in a format that is not read" in told
    told.encode()


def test_class_folders(tmp_path):
    spec = fill(tmp_path, {"tabby_cat/1.jpg": picture(1), "tabby_cat/deep/er/2.png": picture(2), "golden retriever/3.jpg": picture(3),
                           "a_empty/readme.md": "", "loose.jpg": picture(4)})
    source = open_source(spec)
    assert keys(source) == ["golden retriever/3.jpg", "tabby_cat/1.jpg", "tabby_cat/deep/er/2.png"]
    assert source.classes == ["a empty", "golden retriever", "tabby cat"] and [source[i]["label"] for i in range(3)] == [1, 2, 2]
    assert source[2] == {"key": "tabby_cat/deep/er/2.png", "image": picture(2), "text": ["a photo of a tabby cat"], "text_weight": [1.0],
                         "label": 2, "json": {"label": 2, "class_name": "tabby cat"}}
    assert source.counts == {"missing_class": 1, "empty_class": 1} and "loose.jpg is in no class folder" in left_out(source)
    several = open_source(spec, caption="the {}; a sketch of a {}@2")
    assert several.read_text(0) == several[0]["text"] == ["the golden retriever", "a sketch of a golden retriever"]
    assert several[0]["text_weight"] == [1, 2]


def test_the_caption_option_says_which_is_meant(tmp_path):
    spec = fill(tmp_path, {"cats/a.jpg": picture(), "cats/a.txt": "tom", "dogs/b.jpg": picture()})
    assert open_source(spec)[0]["text"] == ["tom"] and open_source(spec).counts == {"missing_caption": 1}
    classes = open_source(spec, caption="a photo of a {}")
    assert len(classes) == 2 and classes[1]["text"] == ["a photo of a dogs"]
    (tmp_path / "cats" / "a.txt").unlink()
    assert open_source(spec).classes == ["cats", "dogs"]
    with pytest.raises(ValueError, match=r"cats/a.jpg has no caption \(.*cats/a.txt\), and 1 more"):
        open_source(spec, caption="txt")
    for wrong in ("a {} and a {}", "a {class}", "a photo"):
        with pytest.raises(ValueError, match="exactly one {}|is not a field"):
            open_source(spec, caption=wrong)
    with pytest.raises(ValueError, match="no label"):
        open_source(f"csv:{fill(tmp_path, {'t.csv': 'image,text'}) and tmp_path}/t.csv", caption="a {}")


def test_folders_that_cannot_be_used_say_why(tmp_path):
    def message(name, files, kind=ValueError, **options):
        spec = fill(tmp_path / name, files)
        with pytest.raises(kind) as caught:
            open_source(spec, **options)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "holds no image: looked for .jpg .jpeg .png" in message("empty", {})
    assert "(other files there: 2 .heic, 1 without an extension)" in message("phone", {"a.HEIC": b"", "b.heic": b"", "LICENSE": b""})
    bare = message("bare", {"a.jpg": b"", "b.jpg": b"", "c.jpg": b"", "a.caption": "x"})
    assert "bare/a.jpg has no caption" in bare and "and 2 more. A folder needs a text" in bare and "1 .caption" in bare
    assert "has no caption" in message("album", {"one/a.jpg": b"", "one/b.jpg": b""})
    assert "open one of them, such as folder:" in message("splits", {"train/cat/a.jpg": b"", "val/cat/b.jpg": b""})
    assert "two class folders are called 'big dog'" in message("twins", {"big dog/a.jpg": b"", "big_dog/b.jpg": b""})
    assert "is in no class folder, and 1 more" in message("flat", {"a.jpg": b"", "b.jpg": b""}, caption="a {}")
    assert "a.txt is a file" in str(pytest.raises(FileNotFoundError, open_source, f"folder:{fill(tmp_path, {'a.txt': ''}) and tmp_path}/a.txt").value)
    with pytest.raises(FileNotFoundError, match="no folder .*phon; nearest: 'phone'"):
        open_source(f"folder:{tmp_path}/phon")
    with pytest.raises(ValueError, match="is a folder; nearest: 'folder:"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match="names no folder"):
        open_source("folder:")


def test_links_are_followed_and_loops_end(tmp_path):
    fill(tmp_path / "elsewhere", {"b.jpg": picture(), "b.txt": "linked"})
    spec = fill(tmp_path / "photos", {"a.jpg": picture(), "a.txt": "here", "sub/c.jpg": picture(), "sub/c.txt": "below"})
    os.symlink("../..", tmp_path / "photos" / "sub" / "up")
    os.symlink(".", tmp_path / "photos" / "self")
    os.symlink("knot", tmp_path / "photos" / "knot")
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "linked")
    source = open_source(spec)
    assert sorted(source[i]["text"][0] for i in range(len(source))) == ["below", "here", "linked"]
    assert keys(source)[:2] == ["a.jpg", "linked/b.jpg"] and source.counts == {"broken_link": 1}


def test_an_unreadable_folder_stops_and_is_named(tmp_path, monkeypatch):
    spec = fill(tmp_path, {"a/a.jpg": b"", "a/a.txt": "x", "b/b.jpg": b"", "c/c.jpg": b""})
    real = os.scandir
    monkeypatch.setattr(folder.os, "scandir", lambda path: real(path) if not str(path).endswith(("/b", "/c")) else real("/proc/1/no"))
    with pytest.raises(ValueError, match=r"cannot read .*/b \(No such file or directory\), and 1 more"):
        open_source(spec)


def test_files_that_vanish_or_do_not_fit_are_bad_samples(tmp_path):
    spec = fill(tmp_path, {f"{i}.jpg": picture() for i in range(4)} | {"0.txt": "x", "1.txt": " \n", "2.txt": b"caf\xe9", "3.txt": "y"})
    source = open_source(spec)
    (tmp_path / "0.jpg").unlink(), (tmp_path / "3.txt").unlink()
    reasons = []
    for i in range(4):
        with pytest.raises(BadSample) as caught:
            source[i]
        reasons.append(caught.value.reason)
    assert reasons == ["missing_image", "empty_caption", "caption_not_utf8", "missing_caption"]
