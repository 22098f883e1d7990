"""Import from and push to a hub: a stand-in on loopback that keeps what it was asked for. huggingface_hub itself is the real one."""

import base64
import contextlib
import hashlib
import http.server
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import pytest
import yaml

import vlm_jax
from tests.parity import compare
from tests.tiny import ROOT, get_config
from vlm_jax import config as configs
from vlm_jax import provenance, run
from vlm_jax import stage as stages
from vlm_jax.errors import ConfigError
from vlm_jax.importers import cli, hub, read, write

pytest.importorskip("huggingface_hub")
STORED = ROOT / "tests" / "parity" / "stored"
NEVER = {"pytorch_model.bin": b"a pickle", "modeling_clip.py": b"raise SystemExit", "onnx/model.safetensors": b"of a folder",
         "onnx/README.md": b"of a folder"}
CARD = {"README.md": b"---\nlicense: mit\n---\nwords"}


# ---- a hub on loopback -------------------------------------------------------------------------

class Hub(http.server.ThreadingHTTPServer):
    """Repositories as dicts of bytes, by commit; ``asked`` is what was requested, as "METHOD path"."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.refs, self.commits, self.blobs, self.asked, self.created, self.may_write = {}, {}, {}, [], [], True
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.01))
        self.thread.start()

    def stop(self):
        if self.thread.is_alive():
            self.shutdown()
            self.thread.join()
            self.server_close()

    def commit(self, repo, files, revision="main"):
        sha = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs.setdefault(repo, {})[revision] = sha
        return sha

    def fetched(self):
        """The files whose bytes or headers were asked for."""
        return {path.split("/resolve/")[1].split("/", 1)[1] for _, path in (line.split() for line in self.asked) if "/resolve/" in path}


class Handler(http.server.BaseHTTPRequestHandler):
    """HTTP/1.0: every answer closes its connection, so that a stopped hub answers nobody."""

    def log_message(self, *args):
        pass

    def answer(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self):
        url = urllib.parse.urlsplit(self.path)
        parts = [urllib.parse.unquote(p) for p in url.path.strip("/").split("/")]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"{self.command} {urllib.parse.unquote(url.path)}")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.route(parts, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def route(self, parts, body):
        store = self.server
        if parts[0] == "api" and parts[1:] == ["repos", "create"]:
            asked = json.loads(body)
            if not store.may_write:
                return self.answer({"error": "You don't have the rights"}, 403)
            name = f"{asked['organization']}/{asked['name']}"
            store.created.append((name, asked.get("visibility") or asked.get("private")))
            if name not in store.refs:
                store.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            return self.answer({"url": f"{store.url}/{name}"})
        if parts == ["api", "validate-yaml"]:
            front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            wrong = "license" in front and front["license"] not in ("mit", "other", "cc-by-nc-4.0")
            return self.answer({"errors": [{"message": '"license" must be one of'}] * wrong, "warnings": []}, 400 if wrong else 200)
        if parts[0] == "lfs":
            store.blobs[parts[1]] = body
            return self.answer()
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            objects = [dict(o, actions={"upload": {"href": f"{store.url}/lfs/{o['oid']}"}}) for o in json.loads(body)["objects"]]
            return self.answer({"transfer": "basic", "objects": objects})
        if parts[:2] == ["api", "models"]:
            repo, action, rest = "/".join(parts[2:4]), parts[4] if parts[4:] else "revision", parts[5:] or ["main"]
        elif parts[2:3] == ["resolve"]:
            repo, action, rest = "/".join(parts[:2]), "resolve", parts[3:]
        else:
            return self.answer(status=404)
        if repo not in store.refs:
            return self.answer(status=401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        sha = store.refs[repo].get(rest[0], rest[0])
        if sha not in store.refs[repo].values():
            return self.answer(status=404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        files = store.commits[sha]
        if action == "revision":
            return self.answer({"id": repo, "sha": sha, "siblings": [{"rfilename": f} for f in files]})
        if action == "tree":
            return self.answer([dict(type="file", path=f, size=len(b), oid=hashlib.sha1(b).hexdigest()) for f, b in files.items()])
        if action == "resolve":
            name = "/".join(rest[1:])
            if name not in files:
                return self.answer(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return self.answer(files[name], ETag=f'"{hashlib.sha256(files[name]).hexdigest()}"', X_Repo_Commit=sha)
        if action == "preupload":
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in json.loads(body)["files"]}
            return self.answer({"files": [dict(path=f, shouldIgnore=False, uploadMode=mode) for f, mode in modes.items()]})
        assert action == "commit", parts
        added = dict(files)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                added[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                added[line["value"]["path"]] = store.blobs[line["value"]["oid"]]
        sha = store.commit(repo, added, rest[0])
        return self.answer({"success": True, "commitOid": sha, "commitUrl": f"{store.url}/{repo}/commit/{sha}"})


def forget_library():
    for name in [n for n in sys.modules if n.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


@pytest.fixture
def use_hub(tmp_path, monkeypatch):
    """use_hub(url, offline): huggingface_hub anew, since it reads the environment once, when it is imported."""
    known = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "huggingface_hub"}
    logger = logging.getLogger("huggingface_hub")      # every import gives it one handler more
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))

    def use(url, offline=False, home=tmp_path / "hf_home"):
        for name in [n for n in os.environ if n.startswith(("HF_", "HUGGINGFACE_")) or n.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)
        for name, value in dict(HF_ENDPOINT=url, HF_HOME=str(home), HF_HUB_OFFLINE=str(int(offline)), HF_TOKEN="hf_none",
                                HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1").items():
            monkeypatch.setenv(name, value)
        forget_library()
        logger.handlers = []

    yield use
    forget_library()
    sys.modules.update(known)


@pytest.fixture
def server(use_hub):
    server = Hub()
    use_hub(server.url)
    yield server
    server.stop()


def files_of(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def hf_clip(name="hf_new_end"):
    """A CLIPModel's repository: what counts is config.json and model.safetensors."""
    return {**{n: b for n, b in files_of(STORED / name).items() if n in ("config.json", "model.safetensors")}, **NEVER, **CARD}


def open_clip(tmp_path, name="open_clip_custom_text"):
    """open_clip's repository, and the same gigabytes in the other layout (as if)."""
    write.write_safetensors(tmp_path / "weights", {n: t.read() for n, t in read.open_weights(STORED / name).items()})
    return {**hf_clip(), "open_clip_pytorch_model.bin": b"a pickle", "open_clip_model.safetensors": (tmp_path / "weights").read_bytes(),
            "open_clip_config.json": (STORED / name / "open_clip_config.json").read_bytes()}


def sharded(tmp_path):
    """A CLIPModel's repository in two shards, and open_clip's layout beside it (as if)."""
    tensors, files = read.open_weights(STORED / "hf_new_end"), hf_clip()
    del files["model.safetensors"]
    where = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(sorted(tensors))}
    for shard in sorted(set(where.values())):
        write.write_safetensors(tmp_path / shard, {n: tensors[n].read() for n in where if where[n] == shard})
        files[shard] = (tmp_path / shard).read_bytes()
    return {**files, "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": where}).encode(),
            "open_clip_model.safetensors": b"as if"}


def same_answers(folder, name):
    return compare.within(compare.differences(vlm_jax.load(folder), dict(np.load(STORED / name / "io.npz"))))


def refused(src, out, capsys, *args):
    """The one line that an import ends with."""
    assert cli.main([f"--src={src}", f"--out={out}", *args]) == 43
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and src in said and not out.exists()
    return said


# ---- import ------------------------------------------------------------------------------------

@pytest.mark.parametrize("release", ["", "--release=open_clip", "--release=hf_clip"])
def test_only_the_releases_own_files_are_fetched(release, server, tmp_path):
    commit = server.commit("tiny/both", open_clip(tmp_path))
    assert cli.main(["--src=hf:tiny/both", f"--out={tmp_path / 'out'}", *filter(None, [release])]) == 0
    weights, name = ("model.safetensors", "hf_new_end") if "hf" in release else ("open_clip_model.safetensors", "open_clip_custom_text")
    assert server.fetched() == {"config.json", "open_clip_config.json", "README.md", weights}
    asked = [line for line in server.asked if "/resolve/" in line]
    assert asked.index(f"GET /tiny/both/resolve/{commit}/{weights}") == len(asked) - 1      # what describes comes first
    source = provenance.read(tmp_path / "out")["source"]
    assert source["commit"] == commit and source["path"] == "hf:tiny/both" and set(source["sha256"]) == {weights}
    assert same_answers(tmp_path / "out", name)


def test_shards_come_with_their_index(server, tmp_path):
    server.commit("tiny/shards", sharded(tmp_path))
    assert cli.main(["--src=hf:tiny/shards", f"--out={tmp_path / 'out'}"]) == 0
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    assert server.fetched() == {"config.json", "README.md", *shards}
    assert set(provenance.read(tmp_path / "out")["source"]["sha256"]) == shards
    assert same_answers(tmp_path / "out", "hf_new_end")


def test_a_revision_is_honoured_and_the_cache_serves_without_the_hub(server, use_hub, tmp_path, capsys):
    old, new = server.commit("tiny/clip", hf_clip("hf_old_end"), "v1"), server.commit("tiny/clip", hf_clip())
    for i, (path, commit) in enumerate((("hf:tiny/clip", new), ("hf:tiny/clip@v1", old), (f"hf:tiny/clip@{old}", old))):
        for how in ("online", "stopped", "offline"):
            out = tmp_path / f"{how}{i}"
            if how == "stopped":
                use_hub("http://127.0.0.1:9")      # discard: nobody listens
            elif how == "offline":
                use_hub(server.url, offline=True)
                server.asked.clear()
            assert cli.main([f"--src={path}", f"--out={out}"]) == 0, capsys.readouterr().err
            assert provenance.read(out)["source"]["commit"] == commit
            if how == "offline":
                assert not server.asked
        use_hub(server.url)
        weights = [stages.read_weights(tmp_path / f"{how}{i}") for how in ("online", "stopped", "offline")]
        assert all(np.array_equal(weights[0][p], w[p]) for w in weights[1:] for p in weights[0])
    assert same_answers(tmp_path / "stopped0", "hf_new_end") and same_answers(tmp_path / "offline1", "hf_old_end")
    use_hub(server.url, offline=True)
    assert "neither the hub nor its cache" in refused("hf:tiny/clip@v2", tmp_path / "none", capsys)


def test_half_a_cache_is_not_taken_for_the_whole(server, use_hub, tmp_path, capsys):
    server.commit("tiny/both", open_clip(tmp_path))
    assert cli.main(["--src=hf:tiny/both", f"--out={tmp_path / 'out'}", "--release=hf_clip"]) == 0
    use_hub(server.url, offline=True)      # a hub that breaks off here is tried for 23 s by huggingface_hub
    said = refused("hf:tiny/both", tmp_path / "none", capsys)
    assert "neither the hub nor its cache" in said


def test_any_safetensors_where_the_usual_name_is_not_there(server, use_hub, tmp_path, capsys):
    files = open_clip(tmp_path)
    for name in ("config.json", "model.safetensors"):
        del files[name]
    files["weights.safetensors"] = files.pop("open_clip_model.safetensors")
    server.commit("tiny/odd", files)
    assert cli.main(["--src=hf:tiny/odd", f"--out={tmp_path / 'out'}"]) == 0
    assert server.fetched() == {"open_clip_config.json", "README.md", "weights.safetensors"}
    server.stop()
    assert cli.main(["--src=hf:tiny/odd", f"--out={tmp_path / 'again'}"]) == 0


# ---- what is refused ---------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["hf:clip", "hf:a/b/c", "hf:/b", "hf:a/", "hf:a/b@", "hf:a b/c", "hf:../..", "hf:a/b--c", "hf:a/.b"])
def test_a_bad_path(path, server, tmp_path, capsys):
    assert "nearest: hf:OWNER/NAME" in refused(path, tmp_path / "out", capsys)
    with pytest.raises(ConfigError, match="nearest: hf:OWNER/NAME"):
        cli.imported(path, tmp_path / "imported" / "here")
    assert not server.asked and tmp_path.exists()


def test_what_the_hub_does_not_have(server, tmp_path, capsys):
    server.commit("tiny/pickles", {n: b for n, b in hf_clip().items() if n != "model.safetensors"})
    assert "no such model, or it is private" in refused("hf:tiny/nowhere", tmp_path / "out", capsys)
    assert "name one of its branches, tags or commits" in refused("hf:tiny/pickles@v9", tmp_path / "out", capsys)
    assert "name one of its branches, tags or commits" in refused("hf:tiny/pickles@" + "0" * 40, tmp_path / "out", capsys)
    assert "holds no safetensors file" in refused("hf:tiny/pickles", tmp_path / "out", capsys)
    assert server.fetched() == {"config.json", "README.md"}


def test_no_hub_and_no_cache_is_exit_43(use_hub, tmp_path, capsys):
    use_hub("http://127.0.0.1:9")
    said = refused("hf:tiny/clip", tmp_path / "out", capsys)
    assert "connect and try again" in said and "refused" in said
    # a run from that origin, as a process of its own
    done = subprocess.run([sys.executable, "-m", "vlm_jax.main", "--config=tests/tiny.py:clip", f"--workdir={tmp_path / 'run'}",
                           "--platform=cpu", "--config.stages.pretrain.init=('hf:tiny/clip',)"],
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 43, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: hf:tiny/clip: neither the hub nor its cache")


# ---- push --------------------------------------------------------------------------------------

def test_a_push_uploads_the_export_and_it_comes_back(server, tmp_path, capsys):
    server.commit("tiny/clip", hf_clip())
    assert cli.main(["--src=hf:tiny/clip", f"--out={tmp_path / 'in'}"]) == 0
    assert cli.main(["--export=hf_clip", f"--src={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--push=hf:me/mine"]) == 0
    commit = server.refs["me/mine"]["main"]
    assert f"pushed to {server.url}/me/mine/commit/{commit}" in capsys.readouterr().out
    assert [(name, str(kind)) for name, kind in server.created] in ([("me/mine", "private")], [("me/mine", "True")])
    pushed = {n: b for n, b in server.commits[commit].items() if n != ".gitattributes"}
    front = yaml.safe_load(pushed["README.md"].split(b"---")[1])
    assert front["license"] == "mit" and front["base_model"] == ["tiny/clip"]
    assert pushed == files_of(tmp_path / "out") and pushed["model.safetensors"] == hf_clip()["model.safetensors"]
    assert cli.main(["--src=hf:me/mine", f"--out={tmp_path / 'again'}"]) == 0
    assert same_answers(tmp_path / "again", "hf_new_end")


def test_a_push_that_fails_leaves_the_export_and_says_how_to_go_on(server, use_hub, tmp_path, capsys):
    server.commit("tiny/clip", hf_clip())
    assert cli.main(["--src=hf:tiny/clip", f"--out={tmp_path / 'in'}"]) == 0
    export = ["--export=hf_clip", f"--src={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"]
    assert cli.main([*export, "--push=mine"]) == 43 and not (tmp_path / "out").exists()
    server.may_write = False
    assert cli.main([*export, "--push=hf:me/mine"]) == 43
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--push=hf:me/mine" in said and "log in" in said and f"hf upload me/mine {tmp_path / 'out'}" in said
    server.stop()
    with pytest.raises(ConfigError, match=f"--push=hf:me/mine: .*refused.*hf upload me/mine {tmp_path / 'out'}"):
        hub.push(tmp_path / "out", "hf:me/mine")
    assert files_of(tmp_path / "out")["model.safetensors"] == hf_clip()["model.safetensors"]


# ---- init of a config --------------------------------------------------------------------------

class Stopped(Exception):
    pass


def given_at_start(config, workdir, monkeypatch):
    """The weights that a run of ``config`` starts from; it is stopped where its first program would be compiled."""
    given = {}

    def create(system, plan, tx, mesh, key, spec, weights, ema):
        given.update(weights)
        raise Stopped

    monkeypatch.setattr(run.init, "create", create)
    with pytest.raises(Stopped):
        run.run(config, workdir)
    return given


@pytest.mark.parametrize("init", ["hf:tiny/clip", ("hf:tiny/clip@v1",), (("image/.*", "hf:tiny/clip:", "copy"), (".*", "fresh", "copy"))],
                         ids=["string", "revision", "rules"])
def test_init_from_the_hub(init, server, use_hub, tmp_path, monkeypatch):
    server.commit("tiny/clip", hf_clip(), "v1" if "@v1" in str(init) else "main")
    wanted_from = cli.import_release("hf_clip", str(STORED / "hf_new_end"), tmp_path / "wanted", say=lambda line: None)
    wanted = stages.read_weights(wanted_from)
    config = get_config("clip")
    stage, stored = config.stages.pretrain, configs.from_json((wanted_from / "config.json").read_text())
    stage.model, stage.evals = stored.model, {}
    with stage.ignore_type():      # as configs.stage(init="hf:...") makes it
        stage.init = init
    if "fresh" in str(init):
        wanted = {p: x for p, x in wanted.items() if p.startswith("image/")}
    stage.data.update(size=24, length=12, train="scenes:train", eval="scenes:test", augment="squash", eval_augment="squash", tokenizer="")
    given = given_at_start(config, tmp_path / "run", monkeypatch)
    assert set(given) == set(wanted) and all(np.array_equal(given[p], wanted[p]) for p in wanted)
    folder, = (tmp_path / "run" / "imported").iterdir()
    assert provenance.read(folder)["source"]["path"].startswith("hf:tiny/clip")
    # again without hub and cache: what was imported stays
    server.stop()
    use_hub("http://127.0.0.1:9", home=tmp_path / "other_home")
    again = given_at_start(config, tmp_path / "run", monkeypatch)
    assert all(np.array_equal(again[p], given[p]) for p in wanted)
    # what a killed import left is no import: it is made anew, which here needs the hub
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="hf:tiny/clip.*neither the hub nor its cache"):
        run.run(config, tmp_path / "run")


def test_a_killed_import_is_made_anew(server, tmp_path):
    server.commit("tiny/clip", hf_clip())
    folder = cli.imported("hf:tiny/clip", tmp_path, say=lambda line: None)
    (folder / "config.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    assert cli.imported("hf:tiny/clip", tmp_path, say=lambda line: None) == folder
    assert same_answers(folder, "hf_new_end")


def test_paths():
    assert hub.parse("hf:a/b") == ("a/b", None) and hub.parse("hf:a-1/b.c_d@refs/pr/1") == ("a-1/b.c_d", "refs/pr/1")
