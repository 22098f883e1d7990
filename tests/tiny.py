"""Tiny stages of the real configs, shared by the tests so that compiled programs are shared too."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def config(name, arg=""):
    """The config of configs/<name>.py:<arg>, unlocked."""
    spec = importlib.util.spec_from_file_location(f"configs_{name}", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def tiny(name, **data):
    """The embedded preset of a family with towers of width 32: a step takes milliseconds."""
    whole = config(name)
    stage = whole.stages.pretrain
    for tower in ("image", "text", "decoder"):
        if tower in stage.model:
            with stage.model[tower].unlocked():
                stage.model[tower].update(width=32, heads=2, mlp_dim=64, layers=2)
    if "poolers" in stage.model:
        stage.model.poolers.update(queries=4, heads=2)
    stage.model.embed = 16
    stage.data.update({"batch": 8, **data})
    stage.optim = dict(name="adamw", lr=3e-3, schedule="cosine", warmup="25%", weight_decay=0.1, clip_norm=1.0,
                       clamps=stage.optim.clamps, ema=0.0, max_bad_steps=10)     # Muon takes long to compile
    stage.evals = {}
    stage.steps = 8
    return whole


def get_config(arg=""):
    """``--config=tests/tiny.py:coca``: the same, for runs in processes of their own; "clip,twice" has a second stage that goes on from the
    first one's best weights."""
    name, _, twice = arg.partition(",")
    whole = tiny(name or "coca")
    stage = whole.stages.pretrain
    stage.data.prefetch = 2
    stage.checkpoint.every = 2
    stage.log.every = 1
    stage.evals = dict(retrieval=dict(kind="retrieval", examples=16, batch=8, every=0,
                                      options=dict(queries=2, shown=3)))     # drawing takes longer than the steps
    if twice:
        stage.select = dict(metric="retrieval/text_to_image/mean_rank")
        stage.evals.retrieval.every = 4
        whole.stages.again = type(stage)({**stage, "init": "@pretrain"})
        whole.stage_order = ("pretrain", "again")
    return whole
