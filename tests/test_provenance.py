"""Where a model comes from: the record of a run and of an import, and a licence that no step may lose."""

import json
import pathlib
import shlex
import shutil
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
import yaml

import vlm_jax
from tests.tiny import ROOT, get_config
from tests.tiny import config as whole_config
from vlm_jax import config as configs
from vlm_jax import provenance, run
from vlm_jax import stage as stages
from vlm_jax.data import fingerprint, scenes, sources
from vlm_jax.errors import ConfigError
from vlm_jax.importers import card, cli

STORED = ROOT / "tests" / "parity" / "stored"
NON_COMMERCIAL = "---\nlicense: cc-by-nc-4.0\nlicense_link: LICENSE\n---\n# A model\n"


def quiet(line):
    pass


def front(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def source_with(folder, text):
    """A CLIPModel's directory with a card of its own."""
    shutil.copytree(STORED / "hf_new_end", folder)
    (folder / "README.md").write_text(text)
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    return cli.import_release("hf_clip", str(source_with(folder / "source", NON_COMMERCIAL)), folder / "out", say=quiet)


class Stopped(Exception):
    pass


def stop(*args):
    raise Stopped


@pytest.fixture(scope="module")
def trained(imported, tmp_path_factory):
    """A run of one step from the import's image tower: (stage directory, its record, the record of a resumption that is
    stopped where the step would be compiled)."""
    workdir = tmp_path_factory.mktemp("run")
    config = get_config("clip")
    stage = config.stages.pretrain
    stage.model = configs.from_json((imported / "config.json").read_text()).model
    stage.model.tokens = dict(vocab=-1, bos=-1, eos=-1, pad=-1)
    with stage.ignore_type():
        stage.init = (("image/.*|image_head/.*", f"{imported}:", "copy"), (".*", "fresh", "copy"))
    stage.data.update(size=24, augment="squash", eval_augment="squash")
    evals, stage.evals, stage.steps = stage.evals, {}, 1
    assert run.run(config, workdir) == 0
    first = provenance.read(workdir / "1_pretrain")
    stage.evals, stage.steps = evals, 2
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(run, "compiled_by_shape", stop)
        run.run(config, workdir)
    return workdir / "1_pretrain", first, provenance.read(workdir / "1_pretrain")


# ---- what a record holds -----------------------------------------------------------------------

def test_a_run_records_what_made_it(trained):
    _, record, resumed = trained
    assert record["system"] == "clip" and record["papers"] == ["2103.00020"]
    start = record["starts"][0]
    assert set(start) == {"step", "date", "command", "code", "versions", "devices", "data"}
    assert shlex.split(start["command"])[1:] == sys.orig_argv[1:] and "/" not in shlex.split(start["command"])[0]
    assert start["date"].endswith("+00:00") and start["code"]["version"] == vlm_jax.__version__
    assert set(start["versions"]) == {"python", *provenance.LIBRARIES} and start["versions"]["numpy"] == np.__version__
    assert provenance.UNKNOWN not in start["versions"].values()
    assert start["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "mesh": {"data": 8, "fsdp": 1, "tensor": 1}}
    train = scenes.open_scenes("train")
    assert start["data"]["train"] == {"spec": "scenes:train", "samples": len(train), "fingerprint": train.fingerprint()}
    assert set(start["data"]) == {"train"} and set(resumed["starts"][1]["data"]) == {"train", "evals.retrieval"}
    assert resumed["starts"][1]["data"]["evals.retrieval"]["samples"] == 1000


def test_a_resumed_run_adds_a_start_and_keeps_the_rest(trained):
    _, first, second = trained
    assert [s["step"] for s in second["starts"]] == [0, 1] and second["starts"][:1] == first["starts"]
    assert {k: v for k, v in second.items() if k != "starts"} == {k: v for k, v in first.items() if k != "starts"}


def test_weights_taken_over_come_with_their_record(trained, imported):
    _, record, _ = trained
    origin, = record["origins"]
    assert origin == {"origin": str(imported), "sha256": provenance.weights_hash(imported), "provenance": provenance.read(imported)}
    source = origin["provenance"]["source"]
    assert source["release"] == "hf_clip" and source["sha256"] == {"model.safetensors": cli.sha256(STORED / "hf_new_end" / "model.safetensors")}
    assert record["licence"] == origin["provenance"]["licence"] == "cc-by-nc-4.0" and provenance.sources(record) == [origin["provenance"]]


def test_the_report_shows_it(trained):
    folder, first, _ = trained
    page = (folder / "report" / "report.html").read_text()
    for shown in ("cc-by-nc-4.0 (non-commercial)", "arXiv 2103.00020", "scenes:train, 10,000,000 samples", f"jax {first['starts'][0]['versions']['jax']}"):
        assert shown in page


def test_a_run_from_nothing_has_no_licence_and_one_without_a_record_an_unknown_one(tmp_path, imported):
    entry = {"step": 0}
    fresh = provenance.record_start(tmp_path, entry, system="clip", papers=(), origins={})
    assert fresh["licence"] is None and fresh["origins"] == []
    (tmp_path / "old").mkdir()
    both = provenance.record_start(tmp_path / "old", entry, system="clip", papers=(), origins={"a": imported, "b": tmp_path / "nowhere"})
    assert both["licence"] == "cc-by-nc-4.0 AND unknown"
    (tmp_path / "old" / "provenance.json").unlink()      # a run that a version without records began
    assert provenance.record_start(tmp_path / "old", {"step": 5}, system="clip", papers=(), origins=None)["licence"] == "unknown"
    (tmp_path / "old" / "provenance.json").write_text("{}")
    with pytest.raises(ConfigError, match="no record of provenance"):
        provenance.read(tmp_path / "old")


def test_the_code_revision(tmp_path):
    def git(*args):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@localhost", *args], check=True, capture_output=True)

    package = tmp_path / "vlm_jax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "notes").write_text("")
    git("init")
    git("add", "notes")
    git("commit", "-m", "zero")
    assert provenance.revision(package) == {"version": vlm_jax.__version__}      # installed inside a checkout that does not track it
    git("add", ".")
    git("commit", "-m", "one")
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    clean = {"version": vlm_jax.__version__, "commit": head, "modified": False}
    (tmp_path / "notes").write_text("of other things than the code")
    assert provenance.revision(package) == clean and len(head) == 40
    (package / "new.py").write_text("")
    assert provenance.revision(package) == {**clean, "modified": True}
    (package / "new.py").unlink()
    (package / "__init__.py").write_text("changed = True")
    assert provenance.revision(package) == {**clean, "modified": True}


def test_a_command_can_be_typed_again():
    argv = ["/home/someone/bin/python", "-m", "vlm_jax.main", "--config=a.py", "--config.stages.pretrain.data.train=tars:{0..1}.tar; b"]
    assert provenance.command(argv) == "python -m vlm_jax.main --config=a.py '--config.stages.pretrain.data.train=tars:{0..1}.tar; b'"


# ---- fingerprints ------------------------------------------------------------------------------

def test_copies_have_the_same_fingerprint_and_other_data_another(tmp_path):
    def write(folder, texts):
        folder.mkdir()
        for i, text in enumerate(texts):
            (folder / f"{i}.txt").write_text(text)
            (folder / f"{i}.jpg").write_bytes(b"jpg")
        with tarfile.open(folder / "a.tar", "w") as tar:
            for file in sorted(folder.glob("*.[tj]*[tg]")):
                tar.add(file, file.name)
        (folder / "a.jsonl").write_text("".join(json.dumps({"image": f"{i}.jpg", "text": t}) + "\n" for i, t in enumerate(texts)))
        return folder

    def prints(folder):
        specs = (f"tars:{folder}/a.tar", f"jsonl:{folder}/a.jsonl", f"tars:{folder}/a.tar@1; jsonl:{folder}/a.jsonl@3")
        return [fingerprint.fingerprint(sources.open_source(spec)) for spec in specs]

    first, other = (prints(write(tmp_path / name, texts)) for name, texts in (("first", "abc"), ("other", ("a", "b", "longer"))))
    shutil.copytree(tmp_path / "first", tmp_path / "copy", copy_function=shutil.copyfile)      # other times of change
    assert prints(tmp_path / "copy") == first and len({*first, *other}) == 6
    assert scenes.open_scenes("val").fingerprint() == scenes.open_scenes("val").fingerprint() != scenes.open_scenes("test").fingerprint()

    class Plain(list):
        """A source that knows nothing of fingerprints."""
        def key(self, i):
            return self[i]
    assert fingerprint.fingerprint(Plain("abc")) == fingerprint.fingerprint(Plain("abc")) != fingerprint.fingerprint(Plain("abd"))
    assert fingerprint.describe(("scenes:val@1", Plain("ab")), Plain("abc"))["spec"] == "scenes:val@1; Plain"


# ---- licences ----------------------------------------------------------------------------------

def test_loading_names_the_licence_and_warns_of_non_commercial_weights(trained, imported, caplog):
    for folder in (imported, trained[0]):
        with caplog.at_level("INFO", "vlm_jax"), pytest.warns(provenance.NonCommercialWeights, match="cc-by-nc-4.0, from .*source") as found:
            model = vlm_jax.load(folder)
        assert found[0].filename == __file__ and model.licence == "cc-by-nc-4.0" and model.provenance == provenance.read(folder)
        assert f"{folder}: licence of the weights: cc-by-nc-4.0 (non-commercial)" in caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", provenance.NonCommercialWeights)
        vlm_jax.load(imported)


def test_a_licence_travels_into_the_model_card_and_back(trained, tmp_path):
    told, folder = [], tmp_path / "1_pretrain"
    shutil.copytree(trained[0], folder)
    scores = {"a/top1": 0.5, "a/top1/ci_low": 0.4, "a/top1/ci_high": 0.6, "a/top1/chance": 0.1, "a/n": 8}
    (folder / "DONE").write_text(json.dumps({"step": 7, "scores": scores}))
    out = cli.export_release("hf_clip", folder, tmp_path / "out", say=told.append)
    assert told[-1] == "licence in README.md: cc-by-nc-4.0 (non-commercial)"
    assert front(out) == {"license": "cc-by-nc-4.0", "library_name": "transformers", "pipeline_tag": "zero-shot-image-classification",
                          "tags": ["vlm_jax", "clip"]}
    text = (out / "README.md").read_text()
    for said in ("Not for commercial use", "7 steps of 8 images", "train: scenes:train, 10,000,000 samples", "https://arxiv.org/abs/2103.00020",
                 "| a/top1 | 0.5 | 0.400 to 0.600 | chance 0.1 |\n| a/n | 8 |  |  |", "- source, licence cc-by-nc-4.0: model.safetensors"):
        assert said in text, said
    assert str(pathlib.Path.home()) not in text and str(tmp_path.parent) not in text
    with pytest.raises(ConfigError, match="--licence=mit, but the release has cc-by-nc-4.0"):
        cli.import_release("hf_clip", str(out), tmp_path / "again", licence="MIT", say=quiet)
    again = provenance.read(cli.import_release("hf_clip", str(out), tmp_path / "again", say=quiet))
    assert again["licence"] == "cc-by-nc-4.0"


def test_an_export_adds_a_licence_and_drops_none(trained, imported, tmp_path):
    out = cli.export_release("open_clip", trained[0], tmp_path / "a", licence="Apache-2.0", say=quiet)
    assert front(out)["license"] == ["cc-by-nc-4.0", "apache-2.0"] and front(out)["library_name"] == "open_clip"
    assert card.stated_licence(out) == ("cc-by-nc-4.0 AND apache-2.0", "")
    shutil.copytree(imported, tmp_path / "old")
    (tmp_path / "old" / "provenance.json").unlink()
    assert front(cli.export_release("hf_clip", tmp_path / "old", tmp_path / "b", say=quiet))["license"] == "unknown"
    assert front(cli.export_release("hf_clip", tmp_path / "old", tmp_path / "c", licence="mit", say=quiet))["license"] == "mit"
    record = json.loads((imported / "provenance.json").read_text())
    (tmp_path / "old" / "provenance.json").write_text(json.dumps({"system": "clip", "papers": [], "licence": None, "origins": [], "starts": record["starts"]}))
    own = cli.export_release("hf_clip", tmp_path / "old", tmp_path / "d", say=quiet)
    assert "license" not in front(own) and "No weights were taken over" in (own / "README.md").read_text()


@pytest.mark.parametrize("text, repository, wanted", [
    ("---\nlicense: MIT\n---\n", "", "mit"),
    ("---\r\nlicense: [apache-2.0, cc-by-nc-4.0]\r\n---\r\n", "", "apache-2.0 AND cc-by-nc-4.0"),
    ("---\nlicense: other\nlicense_name: apple-amlr\n---\n", "", "apple-amlr"),
    ("---\nlicense: other\n---\n", "facebook/opt-2.7b", "opt"),
    ("---\nlicense: mit\n---\n", "Salesforce/blip2-opt-2.7b", "mit AND opt"),
    ("---\nlicense: other\n---\n", "lmsys/vicuna-7b-v1.5", "other"),
    ("# no front matter", "openai/clip-vit-base-patch32", "mit"),
    ("---\nlicense: unknown\n---\n", "", None), ("---\nlicense: {a: b}\n---\n", "", None), ("---\n- [\n---\n", "", None),
    ("---\nlicense: !!python/object/apply:os.abort []\n---\n", "", None), ("license: mit", "", None)])
def test_what_a_card_states(text, repository, wanted, tmp_path):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert card.stated_licence(tmp_path, repository, "abc")[0] == wanted


def test_a_licence_of_its_own_keeps_its_name_and_its_text(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: Tiny Research\nlicense_link: LICENSE.md\n---\n")
    licence, link = card.stated_licence(tmp_path, "tiny/clip", "abc")
    assert (licence, link) == ("tiny research", "https://huggingface.co/tiny/clip/blob/abc/LICENSE.md")
    assert card.licence_fields(licence, ["", link]) == {"license": "other", "license_name": "tiny-research", "license_link": link}


@pytest.mark.parametrize("licence", ["cc-by-nc-4.0", "CC-BY-NC-SA-4.0", "mit AND cc-by-nc-4.0", "llama-1", "opt", "apple-amlr",
                                     "polyform-noncommercial-1.0.0", "fair-noncommercial-research-license", "tiny-and-cc-by-nc-2.0"])
def test_non_commercial_licences(licence):
    assert provenance.non_commercial(licence)


@pytest.mark.parametrize("licence", [None, "unknown", "mit", "apache-2.0", "cc-by-4.0", "llama2", "ncsa", "mit AND openrail++", "mpl-2.0"])
def test_other_licences(licence):
    assert not provenance.non_commercial(licence)


@pytest.mark.parametrize("given, wanted", [("", "mit"), ("cc-by-nc-4.0", "cc-by-nc-4.0")])
def test_a_release_has_the_licence_of_its_authors_unless_told_otherwise(given, wanted, tmp_path):
    src = STORED / "openai_vit_script" / "model.pt"
    argv = ["--release=openai_clip", f"--src={src}", f"--out={tmp_path / 'out'}", *([f"--licence={given}"] if given else [])]
    hints = json.loads((src.parent / "case.json").read_text())["hints"]
    assert cli.main([*argv, *(f"--{k}={v}" for k, v in hints.items())]) == 0
    assert provenance.read(tmp_path / "out")["licence"] == wanted


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
def test_every_stage_cites_a_paper(name):
    for stage, section in whole_config(name).stages.items():
        if section.model != stages.INHERIT and stages.INHERIT not in section.model.values():      # the model of another stage, or a part of one
            assert stages.resolve(section, stage).system.papers, stage


# ---- the project's own -------------------------------------------------------------------------

def test_the_project_states_its_own_licence_and_how_to_cite_it():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Copyright 2026 The vlm_jax authors" in text and "END OF TERMS AND CONDITIONS" in text
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0" and citation["authors"] == [{"name": "The vlm_jax authors"}]
    assert str(citation["version"]) == vlm_jax.__version__ and f'version="{vlm_jax.__version__}"' in (ROOT / "setup.py").read_text()
