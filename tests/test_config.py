"""Config strings, sections and what a typo costs."""

import pathlib
import subprocess
import sys
import time

import pytest

from vlm_jax import config as c
from vlm_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_arguments_are_declared_and_typed():
    arg = c.parse_arg("base,res=288", size=("small", "base", "large"), res=224)
    assert (arg.size, arg.res) == ("base", 288)
    assert c.parse_arg("", size=("small", "base"), res=224).size == "small"
    assert c.parse_arg("res=96", size=("small", "base"), res=224).res == 96
    arg = c.parse_arg("tuned,24gb", size=("", "base"), job=("", "tuned"), memory=("16gb", "24gb"))     # a choice says itself what it is of
    assert (arg.size, arg.job, arg.memory) == ("", "tuned", "24gb")


@pytest.mark.parametrize("text, names", [("bas", "'base'"), ("base,rez=3", "'res'"), ("size=huge", "choice"), ("res=big", "int")])
def test_a_wrong_argument_names_the_nearest(text, names):
    with pytest.raises(ConfigError, match=names):
        c.parse_arg(text, size=("small", "base", "large"), res=224)


def test_unread_keys_are_named_with_their_path():
    def reads(*, lr, steps=3):
        return lr * steps
    assert c.call(reads, {"lr": 2}, "stages.a.optim") == 6
    with pytest.raises(ConfigError, match=r"stages\.a\.optim\.lrr=2.*nearest: 'lr'"):
        c.call(reads, {"lrr": 2}, "stages.a.optim")


def test_stage_keys_are_exact():
    whole = c.stage(system="x", model={}, optim={}, data={}, steps=1)
    assert set(whole) == set(c.STAGE_KEYS)
    c.check_stage("a", whole)
    with pytest.raises(ConfigError, match=r"stages\.a\.optimizer.*nearest: 'optim'"):
        c.check_stage("a", {**whole, "optimizer": {}})
    with pytest.raises(ConfigError, match="'sytem' is not known"):
        c.stage(sytem="x", model={}, optim={}, data={}, steps=1)


def test_json_round_trip_and_changes():
    config = c.stages(("a",), a=c.stage(system="x", model=dict(layers=(1, 2)), optim=dict(lr=1e-3), data=dict(batch=4), steps=1))
    again = c.from_json(c.to_json(config))
    assert again.stages.a.model.layers == (1, 2)
    assert c.changes(config.stages.a, again.stages.a) == []
    again.stages.a.optim.lr, again.stages.a.steps = 2e-3, 9
    assert c.changes(config.stages.a, again.stages.a) == ["optim.lr: 0.001 -> 0.002"]
    assert c.changes({"model": {"image": {"width": 8}}}, {"model": {"image": {"remat": "full", "width": 9}}}) == ["model.image.width: 8 -> 9"]


def run_main(*args):
    return subprocess.run([sys.executable, "-m", "vlm_jax.main", *args], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_answers_without_jax():
    began = time.perf_counter()
    done = run_main("--help")
    assert "--config" in done.stdout + done.stderr
    heavy = subprocess.run([sys.executable, "-c", "import sys, vlm_jax.main; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"],
                           cwd=ROOT)
    assert heavy.returncode == 0, f"main imports jax before it parses flags ({time.perf_counter() - began:.1f} s)"


@pytest.mark.parametrize("args, words", [
    (["--config=configs/coca.py:bas"], ["bas", "'base'"]),
    (["--config=configs/coca.py", "--config.stages.pretrain.optim.lrr=1"], ["--config.stages.pretrain.optim.lrr", "nearest: 'lr'"]),
    (["--config=configs/coca.py", "--config.stages.pretrain.data.templates=vqa"], ["templates='vqa' has no use with layout='plain'"]),
    (["--config=configs/coca.py", "--config.stages.pretrain.optim.mu_dtype=bfloat16"], ["optim.mu_dtype: the config has no field 'mu_dtype'"]),
    (["--config=configs/coca.py", "--config.stages.pretrain.rules=fdsp"], ["fdsp", "'fsdp'"]),
    (["--config=configs/coca.py", "--config.stages.pretrain.data.train=tar:/x.tar"], ["tar", "'tars'"]),
    (["--config=configs/coca.py", "--stage=pretrian"], ["pretrian", "'pretrain'"]),
    (["--config=configs/coka.py"], ["--config=configs/coka.py", "nearest: 'configs/coca.py'"]),
    ([], ["--config"]),
])
def test_bad_configs_exit_43_and_name_the_nearest(args, words, tmp_path):
    done = run_main(*args, f"--workdir={tmp_path / 'run'}", "--platform=cpu")
    assert done.returncode == 43, done.stderr[-2000:]
    for word in words:
        assert word in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("body, words", [
    ("    return 1 / 0", "line 3: ZeroDivisionError: division by zero"), ("    return (", "line 3: SyntaxError"), ("    import nothing_here", "line 3: ModuleNotFoundError"),
    ("    return {}['abc']", "line 3: KeyError: 'abc'"), ("    import math\n    math.nope", "line 4: AttributeError: module 'math' has no attribute 'nope'"),
    ("    import json\n    json.dumps({1j: 2})", "line 4: TypeError: keys must be"), ("    raise RuntimeError('one\\ntwo: three')", "line 3: RuntimeError: one"),
    ("    try:\n        1 / 0\n    except ZeroDivisionError as e:\n        raise LookupError('outer') from e", "line 6: LookupError: outer"),
    ("    whole.stages = 'none'", "line 3: NameError: name 'whole' is not defined"),
    ("    import ml_collections\n    whole = ml_collections.ConfigDict({'a': 1})\n    whole.a = '5%'", "line 5: TypeError")])
def test_a_config_file_that_fails_is_named_with_its_line(body, words, tmp_path, capsys):
    from vlm_jax import main
    path = tmp_path / "mine.py"
    path.write_text(f"\ndef get_config(arg=''):\n{body}\n")
    assert main.main(["main", f"--config={path}:x"]) == 43
    said = capsys.readouterr().err
    assert f"mine.py, {words}" in said and "Traceback" not in said and said.count("\n") == 1, said


@pytest.mark.parametrize("present, line", [("gpu", '".[cuda]"'), ("tpu", '".[tpu]"')])
def test_an_accelerator_that_jax_does_not_see_stops_the_run(monkeypatch, present, line):
    from vlm_jax import main
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(main, "accelerator_present", lambda: present)
    with pytest.raises(ConfigError, match=line.replace("[", r"\[").replace(".", r"\.")):
        main.check_platform("")
    main.check_platform("cpu")      # asked for


def test_the_work_directory_follows_config_and_arguments():
    from vlm_jax.main import default_workdir
    assert default_workdir(["main", "--config=configs/coca.py"]) == "runs/coca"
    assert default_workdir(["main", "--config", "configs/clip.py:b32,res=288", "--stage=x"]) == "runs/clip-b32_res=288"
