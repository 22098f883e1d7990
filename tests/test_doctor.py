"""The doctor, on a machine as it is, on data with every kind of fault, and on configs."""

import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from tests.tiny import ROOT, tiny
from vlm_jax import doctor, forecast
from vlm_jax.checks import ERROR, OK, WARNING, dataset, environment
from vlm_jax.data import tokenizers
from vlm_jax.data.sources import open_source
from vlm_jax.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path / "cache"))


def photograph(seed, side=64, kind="PNG", quality=75):
    """A smooth picture that no other seed resembles."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.BICUBIC).save(out, kind, quality=quality)
    return out.getvalue()


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return f"tars:{path}"


def pair(i, caption, picture=None):
    return [(f"k{i:02}.png", picture or photograph(i)), (f"k{i:02}.txt", caption.encode())]


@pytest.fixture
def faulty(tmp_path):
    """Twelve whole pairs, two of them the same picture, two nearly so, and one of each fault."""
    members = [m for i in range(8) for m in pair(i, f"a red circle above the square {i}")]
    members += pair(8, "ein Hund, der im Park läuft", photograph(3)) + pair(9, "собака бежит по парку", photograph(4, 80, "JPEG", 40))
    members += pair(10, "公園を走る犬と自転車に乗る人 <|endoftext|>") + pair(11, "a red circle above the square 1")
    members += pair(12, "cut off", photograph(12)[:900]) + pair(13, "a page", b"<html>404</html>") + pair(14, "", photograph(14))
    members += [("k01.txt", b"again"), ("lonely.txt", b"no picture"), ("alone.png", photograph(20)), ("README", b"x")]
    return write(tmp_path / "faulty.tar", members)


def test_every_fault_of_a_data_set_is_counted(faulty, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    numbers, findings = dataset.examine(open_source(faulty), tokenizers.load(f"bert:{tmp_path}/vocab.txt"), length=20, samples=0)
    assert numbers["samples"] == 15 and numbers["left_out"] == {"duplicate": 1, "no_extension": 1, "missing_image": 1, "missing_caption": 1}
    bad = {reason: entry["count"] for reason, entry in numbers["unreadable"].items()}
    assert sum(bad.values()) == 3 and bad["not_an_image"] == 1 and bad["empty_caption"] == 1
    assert "faulty/k13" in numbers["unreadable"]["not_an_image"]["first"]
    assert numbers["duplicates"] | {"largest": None} == {"pictures": 12, "exact": 1, "near": 2, "groups": 2, "largest": None, "largest_size": 2}
    assert sorted(numbers["duplicates"]["largest"]) == [["faulty/k03", "faulty/k08"], ["faulty/k04", "faulty/k09"]]
    assert numbers["captions"]["scripts"] == pytest.approx({"latin": 10 / 12, "cyrillic": 1 / 12, "han": 1 / 12})
    assert numbers["captions"]["markup"] == {"<|endoftext|>": 1} and numbers["captions"]["repeated"] == pytest.approx(1 / 12)
    assert numbers["tokens"]["cut"] > 0.5 and numbers["tokens"]["losing"] == pytest.approx(2 / 12) and {"с", "о", "公"} <= set(numbers["tokens"]["lost"])
    status = {f.name: f.status for f in findings}
    assert status["unreadable"] == ERROR and status["left out"] == status["control words"] == status["tokens"] == WARNING
    assert status["pictures"] == OK and any("k13" in f.text for f in findings)


def test_what_a_budget_allows_is_a_warning_alone(faulty):
    status = {f.name: f.status for f in dataset.examine(open_source(faulty), bad_budget=0.5)[1]}
    assert status["unreadable"] == WARNING and "tokens" not in status


def test_a_part_of_the_data_is_spread_over_it(tmp_path):
    source = open_source(write(tmp_path / "a.tar", [m for i in range(30) for m in pair(i, f"caption {i}")]))
    numbers, _ = dataset.examine(source, samples=4)
    assert numbers["read"] == 4 and numbers["samples"] == 30 and numbers["captions"]["most_common"]["count"] == 1


def test_near_duplicates_survive_size_and_compression_and_nothing_else_is_near():
    hashes = [dataset.difference_hash(Image.open(io.BytesIO(photograph(seed)))) for seed in range(40)]
    assert dataset.near_groups(hashes) == []
    again = [dataset.difference_hash(Image.open(io.BytesIO(photograph(seed, side, "JPEG", 60)))) for seed, side in ((5, 100), (9, 48))]
    assert sorted(dataset.near_groups(hashes + again)) == [[5, 40], [9, 41]]
    flat = [dataset.difference_hash(Image.new("RGB", (32, 32), (shade, 0, 0))) for shade in range(3)]
    assert dataset.near_groups(flat) == [[0, 1, 2]]
    crowd = [1 << i for i in range(1, 100)]      # each one bit from zero: a chain is one group
    assert dataset.near_groups([0, *crowd]) == [list(range(100))]


@pytest.mark.parametrize("text,script", [("a dog", "latin"), ("собака", "cyrillic"), ("犬 dog", "latin"), ("犬が公園", "han"), ("كلب", "arabic"),
                                         ("123 !", "none"), ("", "none")])
def test_scripts(text, script):
    assert dataset.script_of(text) == script


def test_letters_that_a_vocabulary_cannot_say_are_lost_whatever_their_case():
    assert dataset.lost_letters("Ein Hund läuft 5", "ein hund läuft 5") == set()
    assert dataset.lost_letters("собака", "⁇") == set("собака")
    assert dataset.lost_letters("ﬁne Ａ", "fine a") == set()


def test_versions_are_held_against_the_bounds(monkeypatch):
    found = list(environment.versions())
    assert [f.status for f in found] == [OK] and "jax" in found[0].text
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "optax" else real(name))
    found, = environment.versions()
    assert found.status == ERROR and "optax 0.1 is installed, vlm_jax needs >=0.2.8" in found.text
    assert environment.parse_requirement('jax[cuda13]<0.12,>=0.10; extra == "cuda"') == ("jax", "<0.12,>=0.10", True)
    assert environment.parse_requirement("fsspec") == ("fsspec", "", False)


def test_jax_that_hangs_or_dies_is_told(monkeypatch):
    monkeypatch.setattr(environment, "LIST_DEVICES", "import time; time.sleep(60)")
    found = environment.devices("", {1: "x"}, seconds=0.3)
    assert found.status == ERROR and "none within 0.3 s" in found.text and "hold the chip" in found.text
    monkeypatch.setattr(environment, "LIST_DEVICES", "raise RuntimeError('The TPU is already in use by process with pid 7')")
    assert "already in use by process with pid 7" in environment.devices("", {}).text
    cpu = "print('DEVICES{\"platform\": \"cpu\", \"kind\": \"cpu\", \"count\": 1, \"limit\": null, \"used\": null}')"
    monkeypatch.setattr(environment, "LIST_DEVICES", cpu)
    assert environment.devices("", {}).status == OK
    assert environment.devices("gpu", {}).status == WARNING       # the tests themselves ask for the CPU
    monkeypatch.delenv("JAX_PLATFORMS")
    assert environment.devices("gpu", {}).status == ERROR


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system has no /proc")
def test_who_holds_a_chip(tmp_path, monkeypatch):
    chip = tmp_path / "accel0"
    chip.write_bytes(b"")
    monkeypatch.setattr(environment, "ACCELERATORS", environment.re.compile(str(tmp_path) + r"/accel\d+"))
    process = subprocess.Popen([sys.executable, "-c", f"f = open({str(chip)!r}); print(1, flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    holders = environment.who_holds()
    process.communicate(b"\n")
    assert list(holders) == [process.pid] and str(chip) in holders[process.pid] and "python" in holders[process.pid]
    assert "by process" in next(environment.held(holders)).text


def test_room_is_looked_at(tmp_path, monkeypatch):
    assert environment.memory().status in (OK, WARNING) and environment.available_memory() != 0
    assert environment.disk("work directory", str(tmp_path / "not" / "there")).status in (OK, WARNING)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: environment.shutil._ntuple_diskusage(1e12, 1e12, 1e6))
    assert environment.disk("work directory", str(tmp_path)).status == ERROR
    monkeypatch.setattr(environment, "available_memory", lambda: None)
    assert environment.memory().status == OK


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_cache_that_others_may_write_is_told(tmp_path, monkeypatch):
    tmp_path.chmod(0o777)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert any(f.status == WARNING and "plant programs" in f.text for f in environment.caches())
    tmp_path.chmod(0o700)
    assert not any("plant programs" in f.text for f in environment.caches())


@pytest.fixture
def well(monkeypatch):
    """A machine on which all is well, whatever this one is like; JAX is not started once more."""
    monkeypatch.setattr(environment, "examine", lambda *_: [environment.finding("devices", "here")])


def test_exit_codes_and_json(faulty, tmp_path, well, capsys):
    assert doctor.main(["--json"]) == 0 and json.loads(capsys.readouterr().out)["can_start"] is True
    assert doctor.main([f"--data={faulty}", "--json"]) == 43
    told = json.loads(capsys.readouterr().out)
    assert told["can_start"] is False and told["data"]["samples"] == 15
    assert {"area": "environment", "name": "devices", "status": "ok", "text": "here"} in told["findings"]
    assert doctor.main([f"--data=tars:{tmp_path}/fault.tar"]) == 43
    out = capsys.readouterr().out
    assert "nearest: 'faulty.tar'" in out and "training cannot start: open" in out
    assert doctor.main(["--data="]) == 43 and "names no source" in capsys.readouterr().out
    assert doctor.main(["--config=configs/clop.py"]) == 43 and "clip.py" in capsys.readouterr().out


def test_a_config_is_forecast_with_what_pays(well, capsys, tmp_path):
    config = tmp_path / "one.py"
    config.write_text("from tests.tiny import tiny\ndef get_config(arg=''):\n    whole = tiny('clip')\n    stage = whole.stages.pretrain\n"
                      "    stage.model.text = dict(tower='cbow', variant='mini', width=32)\n    stage.model.image.update(stem='patch', remat='full')\n"
                      "    stage.model.image_pool = 'mean'\n    stage.data.batch = 64\n    return whole\n")
    assert doctor.main([f"--config={config}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["forecast"]
    assert told["parameters"] > 1000 and told["flops"] > 1e6 and told["step_seconds"] > 0 and told["fits"] and told["chip"] == "measured"
    assert len(told["suggestions"]) == 2 and "remat=none" in told["suggestions"][0] and "data.batch=1024" in told["suggestions"][1]


def test_compile_only_says_what_a_step_needs():
    said = []
    found, = forecast.compile_only(tiny("clip", batch=64), say=said.append, name="tiny")
    text = "\n".join(said)
    assert f"parameters: {found.parameters:,}" in text and "batch 64 on 8 x cpu" in text and "collective: all-reduce" in text
    assert found.limit_bytes is None and found.fits is None and found.step_seconds is None      # a CPU has no published peaks
    with pytest.raises(ConfigError, match="does not divide over 8 devices; nearest: 8"):
        forecast.compile_only(tiny("clip", batch=7))
    with pytest.raises(ConfigError, match="--stage='pretrian'.*nearest: 'pretrain'"):
        forecast.compile_only(tiny("clip"), only="pretrian")


def test_the_real_machine_is_examined_in_seconds():
    began = time.process_time()
    names = {f.name for f in environment.examine()}
    assert {"versions", "devices", "host memory", "work directory", "temporary files"} <= names and time.process_time() - began < 5


WITHOUT = """
import collections, shutil, sys
from tests import without_posix
without_posix.withhold()
shutil.disk_usage = lambda path: collections.namedtuple("usage", "total used free")(10**12, 0, 10**12)      # Windows has one of its own
from vlm_jax import doctor
code = doctor.main(["--data=scenes:train", "--samples=8"])
assert not {name.partition(".")[0] for name in sys.modules} & without_posix.MODULES
sys.exit(code)
"""


def test_it_needs_nothing_that_only_posix_has():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "training can start" in done.stdout, done.stderr[-2000:]
