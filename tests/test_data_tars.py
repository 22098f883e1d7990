"""Tars of every kind of damage: what is whole is read, what is not is counted, nothing is half-read."""

import io
import json
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import tars
from vlm_jax.data.sources import open_source
from vlm_jax.data.tars import TarIndex, TarSource, expand_braces, open_index


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path / "cache"))


def picture(shade, side=8):
    out = io.BytesIO()
    Image.new("RGB", (side, side), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def add(tar, name, content=b"", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def write(path, samples, **options):
    with tarfile.open(path, "w", **options) as tar:
        for key, members in samples.items():
            for kind, content in members.items():
                add(tar, f"{key}.{kind}", content if isinstance(content, bytes) else content.encode())
    return str(path)


def pairs(n, start=0):
    return {f"k{i:03}": {"png": picture(i), "txt": f"caption {i}", "json": json.dumps({"title": f"title {i}"})}
            for i in range(start, start + n)}


def test_reads_every_sample_of_several_shards(tmp_path):
    for shard in range(3):
        write(tmp_path / f"s-{shard:05}.tar", pairs(4, 4 * shard))
    source = open_source(f"tars:{tmp_path}/s-{{00000..00002}}.tar")
    assert len(source) == 12 and not source.counts
    for i in range(12):
        sample = source[i]
        assert sample["key"] == f"s-{i // 4:05}/k{i:03}" == source.key(i)
        assert sample["text"] == [f"caption {i}"] == source.read_text(i)
        assert sample["image"] == picture(i)
    assert source[-1]["key"] == source[11]["key"]
    with pytest.raises(IndexError, match="12 samples"):
        source[12]
    assert [s["key"] for s in map(TarSource(f"{tmp_path}/s-*").__getitem__, range(12))] == \
        [source.key(i) for i in range(12)]


def test_interleaved_members_are_joined_by_key(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in ("txt", "png"):
            for i in range(3):
                add(tar, f"dir/k{i}.{kind}", picture(i) if kind == "png" else b"c%d" % i)
                add(tar, f"filler{i}{kind}.bin", bytes(40_000))
    source = TarSource(str(path))
    assert [(s["key"], s["text"], s["image"]) for s in map(source.__getitem__, range(3))] == \
        [(f"a/dir/k{i}", [f"c{i}"], picture(i)) for i in range(3)]
    assert source.counts == {"missing_image": 6}


def test_incomplete_and_duplicate_samples_are_counted(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "one.png", picture(1)), add(tar, "one.txt", b"first")
        add(tar, "one.txt", b"second")                    # the first stays
        add(tar, "two.png", picture(2))                   # no caption
        add(tar, "three.txt", b"no image")
        add(tar, "README", b"?"), add(tar, "._one.txt", b"resource fork")
        add(tar, "four.JPG", picture(4)), add(tar, "four.txt", b"fourth")
        add(tar, "one.png", picture(9))
    source = TarSource(str(path))
    assert [source[i]["text"] for i in range(len(source))] == [["first"], ["fourth"]]
    assert source[0]["image"] == picture(1)
    assert source.counts == {"duplicate": 2, "missing_caption": 1, "missing_image": 1, "no_extension": 2}


def test_unsafe_members_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "../up.png", picture(1)), add(tar, "a/../../up.txt", b"x"), add(tar, "/etc/top.txt", b"x")
        add(tar, "soft.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="k.png")
        add(tar, "null.png", type=tarfile.CHRTYPE), add(tar, "pipe.txt", type=tarfile.FIFOTYPE)
        add(tar, "folder.png", type=tarfile.DIRTYPE)
        add(tar, "./k.png", picture(3)), add(tar, "./k.txt", b"fine")
    source = TarSource(str(path))
    assert [source.key(i) for i in range(len(source))] == ["a/k"]
    assert source.counts == {"unsafe_name": 3, "link": 2, "device": 2}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, form):
    long, prefixed = "n" * (90 if form == tarfile.USTAR_FORMAT else 300), "d" * 120 + "/" + "f" * 60
    keys = [long, prefixed, "été", "👩‍🚀"]
    path = write(tmp_path / "a.tar", {k: {"png": picture(1), "txt": k} for k in keys}, format=form)
    source = TarSource(path)
    assert [source.key(i) for i in range(4)] == [f"a/{k}" for k in keys]
    assert [source.read_text(i) for i in range(4)] == [[k] for k in keys]
    bad = tmp_path / "b.tar"
    with tarfile.open(bad, "w", format=form, errors="surrogateescape", encoding="utf-8") as tar:
        add(tar, "ok.png", picture(1)), add(tar, "ok.txt", b"ok"), add(tar, "l\udce9.txt", b"latin")
    assert TarSource(str(bad)).counts == {"name_not_utf8": 1}


def test_truncated_tar_gives_what_is_whole(tmp_path):
    whole = open(write(tmp_path / "a.tar", pairs(5)), "rb").read()
    ends = [int(m.offset_data + m.size) for m in tarfile.open(tmp_path / "a.tar")]
    for cut, samples, reason in ((ends[8] + 600, 3, "truncated"), (ends[10] - 1, 3, "truncated"),
                                 (ends[6] - 3, 2, "truncated"), (520, 0, "truncated")):
        path = tmp_path / f"cut{cut}.tar"
        path.write_bytes(whole[:cut])
        index = open_index(str(path))
        full = sum(count for names, count in index.sets if {"png", "txt"} <= set(names))
        assert full == samples and index.counts == {reason: 1}, cut
    path = tmp_path / "unended.tar"  # cut between two members: nothing is broken, but it does not end
    path.write_bytes(whole[:-(-ends[8] // 512) * 512])
    assert open_index(str(path)).counts == {"no_end_mark": 1} and open_index(str(path)).samples == 3
    broken = bytearray(whole)
    broken[-(-ends[8] // 512) * 512 + 10] ^= 255
    path.write_bytes(broken)
    assert open_index(str(path)).counts == {"corrupt_header": 1} and open_index(str(path)).samples == 3
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no sample.*no_end_mark"):
        TarSource(str(path))


def test_random_bytes_never_crash_the_scan(tmp_path):
    whole = bytearray(open(write(tmp_path / "a.tar", pairs(3), format=tarfile.PAX_FORMAT), "rb").read())
    rng = np.random.default_rng(0)
    for trial in range(150):
        damaged = whole.copy()
        for at in rng.integers(0, len(whole), 20):
            damaged[at] = rng.integers(0, 256)
        path = tmp_path / "b.tar"
        path.write_bytes(damaged)
        index = tars.build_index(str(path), tars.stamp_of(str(path)))
        (tmp_path / "i.idx").write_bytes(index)
        loaded = TarIndex(str(tmp_path / "i.idx"))
        for row in range(loaded.samples):
            assert all(o + s <= len(damaged) for o, s in loaded.members(row).values())


def test_index_is_built_once_and_again_when_the_tar_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", pairs(3))
    built = []
    real = tars.build_index
    monkeypatch.setattr(tars, "build_index", lambda *a: built.append(a[0]) or real(*a))
    assert len(TarSource(path)) == 3 and os.path.exists(path + ".idx")
    assert len(TarSource(path)) == 3 and len(built) == 1
    write(path, pairs(5))
    assert len(TarSource(path)) == 5 and len(built) == 2
    content = open(path + ".idx", "rb").read()
    for damage in (content[:50], content[:-1], b"", content[:16] + b"x" * (len(content) - 16)):  # a crash while writing
        open(path + ".idx", "wb").write(damage)
        assert len(TarSource(path)) == 5
    assert len(built) == 6
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]


def test_read_only_folder_is_left_alone(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    path = write(folder / "a.tar", pairs(2))
    folder.chmod(0o555)
    try:
        assert len(TarSource(path)) == 2
        assert os.listdir(folder) == ["a.tar"]  # also for root, whom no permission bit stops
        cached = os.listdir(tmp_path / "cache" / "index")
        assert len(cached) == 1 and cached[0].startswith("a.tar.")
    finally:
        folder.chmod(0o755)


def test_threads_pickle_and_many_files_share_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "OPEN_FILES", 2)
    for shard in range(6):
        write(tmp_path / f"{shard}.tar", pairs(3, 3 * shard))
    source = TarSource(f"{tmp_path}/*.tar")
    expected = [f"caption {i}" for i in range(18)]
    errors = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 18, 200).tolist():
            if source[i]["text"] != [expected[i]]:
                errors.append(i)

    threads = [threading.Thread(target=read, args=(s,)) for s in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not errors and len(source._files) <= 2
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i]["text"][0] for i in range(18)] == expected


def test_remote_tars(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for shard in range(2):
        local = write(tmp_path / f"r{shard}.tar", pairs(3, 3 * shard))
        memory.pipe(f"/bucket/r{shard}.tar", open(local, "rb").read())
    for pattern in ("memory://bucket/r{0,1}.tar", "memory://bucket/r*.tar"):
        source = TarSource(pattern)
        assert [source[i]["text"] for i in (5, 0)] == [["caption 5"], ["caption 0"]]
        assert source[4]["image"] == picture(4)
    with pytest.raises(FileNotFoundError):
        TarSource("memory://bucket/none*.tar")


def test_names_expand_and_misses_name_the_nearest(tmp_path):
    assert expand_braces("a-{08..11}.tar") == [f"a-{i:02}.tar" for i in range(8, 12)]
    assert expand_braces("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    with pytest.raises(ValueError, match="counts down"):
        expand_braces("{3..1}")
    write(tmp_path / "train-00000.tar", pairs(1))
    with pytest.raises(FileNotFoundError, match="nearest: 'train-00000.tar'"):
        TarSource(f"{tmp_path}/trian-00000.tar")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        TarSource(f"{tmp_path}/*.tgz")
    import gzip
    (tmp_path / "z.tar").write_bytes(gzip.compress((tmp_path / "train-00000.tar").read_bytes()))
    with pytest.raises(ValueError, match="compressed"):
        TarSource(f"{tmp_path}/z.tar")


def test_command_builds_indices(tmp_path, capsys):
    for shard in range(2):
        write(tmp_path / f"{shard}.tar", pairs(2))
    tars.main([f"{tmp_path}/{{0,1}}.tar", "--processes=1"])
    assert "2 tars, 4 samples" in capsys.readouterr().out
    assert os.path.exists(tmp_path / "1.tar.idx")
