"""An official model's stored files and answers against ours."""

import json
import pathlib

import numpy as np

import vlm_jax
from vlm_jax.importers import cli
from vlm_jax.importers.release import Hints

TOLERANCE = dict(image_embed=1e-4, text_embed=1e-4, logit_scale=1e-4, image=1e-4, text=1e-4, logits=1e-3,      # absolute, fp32
                 greedy=0, beam=0)     # ids that differ


def import_case(folder: pathlib.Path, out: pathlib.Path, **hints):
    case = json.loads((folder / "case.json").read_text())
    files = [f for f in folder.iterdir() if f.suffix in (".pt", ".bin")]
    src = files[0] if len(files) == 1 and case["release"] == "openai_clip" else folder
    return cli.import_release(case["release"], str(src), out, Hints(**case["hints"] | hints), say=lambda line: None)


def answers(model, io, embed_only: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """What ``model`` says to a case's inputs, by the names of its answers; ``embed_only`` these inputs' vectors alone."""
    batch = {"image": io["image_input"], "text": io["text_input"]}
    if embed_only:
        return dict(model.predict["embed"]({k: batch[k] for k in embed_only}))
    out = dict(model.predict["embed"](batch))
    features = model.predict["features"](batch)
    out |= {k: features[k] for k in ("image", "text") if k in io}
    if "logits" in io:
        out["logits"] = model.predict["caption_logits"](batch)["logits"]
        pixels, length = {"image": batch["image"]}, io["greedy"].shape[1]
        # open_clip forces an end onto the last place of a caption that has none; ours is cut there
        for name, options in (("greedy", {}), ("beam", dict(beams=3))):
            ids = model.predict["generate"](pixels, method=name, max_length=length, **options)["text"]
            out[name] = np.concatenate([ids[:, :-1], io[name][:, -1:]], 1)
    return out


def differences(model, io, embed_only: tuple[str, ...] = ()) -> dict[str, float]:
    """Largest absolute difference by answer."""
    ours = answers(model, io, embed_only)
    assert embed_only or set(ours) & set(io) == set(TOLERANCE) & set(io)
    return {name: float((ours[name] != io[name]).sum() if name in ("greedy", "beam") else np.abs(np.asarray(ours[name]) - io[name]).max())
            for name in TOLERANCE if name in io and name in ours}


def load_case(folder: pathlib.Path, out: pathlib.Path, **hints):
    """(model of ours, stored inputs and answers)."""
    io = dict(np.load(folder / "io.npz"))
    return vlm_jax.load(import_case(folder, out, **hints)), io


def within(found: dict[str, float]) -> bool:
    return all(value <= TOLERANCE[name] for name, value in found.items())


# ---- planted mistakes --------------------------------------------------------------------------

def planted(imported: pathlib.Path, io) -> dict[str, dict[str, float]]:
    """Differences by mistake: the imported model with one thing of its config swapped."""
    out = {}
    for name, (tower, change) in MISTAKES.items():
        config = json.loads((imported / "config.json").read_text())
        if not change(config["model"]):
            continue
        kept = (imported / "config.json").read_text()
        try:
            (imported / "config.json").write_text(json.dumps(config))
            out[name] = differences(vlm_jax.load(imported), io, (tower,))
        finally:
            (imported / "config.json").write_text(kept)
    return out


def _activation(model):
    swap = {"quick_gelu": "gelu", "gelu": "quick_gelu"}
    model["text"]["activation"] = swap[model["text"]["activation"]]
    return True


def _eps(model):
    model["text"]["eps"] = 1e-6 if model["text"]["eps"] > 1e-5 else 1e-3
    return True


def _class_mask(model):
    return "class_mask" in model["text"] and not model["text"].update(class_mask="exact")


def _pooling(model):
    if model["image"].get("tower") != "vit":
        return False
    model["image_pool"] = "mean" if model["image_pool"] == "class" else "class"
    return True


MISTAKES = {"activation": ("text", _activation), "eps": ("text", _eps), "class mask": ("text", _class_mask), "pooling": ("image", _pooling)}


# ---- the way back, and a training step ---------------------------------------------------------

def export_case(folder: pathlib.Path, imported: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    return cli.export_release(json.loads((folder / "case.json").read_text())["release"], imported, out, say=lambda line: None)


def step_differences(folder: pathlib.Path, imported: pathlib.Path) -> dict[str, float]:
    """One AdamW step from the same weights on the same batch, with the trainer's own step function: relative
    difference of the loss, the gradients' by the largest gradient, the new weights' by the learning rate."""
    import jax

    from vlm_jax import config as configs
    from vlm_jax import partitioning, weight_rules
    from vlm_jax import stage as stages
    from vlm_jax.system import Context
    from vlm_jax.train import init
    from vlm_jax.train.state import merge
    from vlm_jax.train.step import make_train_step

    case, stored, io = json.loads((folder / "case.json").read_text()), dict(np.load(folder / "step.npz")), dict(np.load(folder / "io.npz"))
    config = configs.from_json((imported / "config.json").read_text())
    config.optim = dict(name="adamw", schedule="constant", clamps=(), ema=0.0, max_bad_steps=10, **case["step"])
    config.data.batch = len(io["text_input"])
    stage = stages.resolve(config, "step")
    shapes = {name: x.shape for name, x in stored.items()}
    layout = cli.RELEASES[case["release"]]
    names = {n.partition("/")[2]: s for n, s in shapes.items() if n.startswith("grad/")}
    rules = layout.rules(configs.to_plain(stage.config), names)

    def ours(kind):      # stored torch arrays in our layout
        sources = {n.partition("/")[2]: x for n, x in stored.items() if n.startswith(kind + "/")}
        return weight_rules.import_leaves(rules, layout.ignored, {p: x.shape for p, x in stage.plan.shapes.items()}, sources, kind)[0]

    mesh = partitioning.make_mesh("dp", devices=jax.devices()[:1])
    with partitioning.use(mesh):
        tx, _ = stages.make_optimizer(stage)
        weights = stages.read_weights(imported)
        state = init.create(stage.system, stage.plan, tx, mesh, jax.random.key(0), stage.spec, weights)
        text = io["text_input"]
        batch = {"image": io["image_input"], "text": text, "text_mask": text != stage.config.model.tokens.pad}
        context = Context(jax.random.key(0), state.step, True)
        loss, grads = jax.jit(jax.value_and_grad(lambda params: stage.system.loss(merge(params, state.frozen, state.moving), {}, batch, context)[0]))(state.params)
        after, metrics = jax.jit(make_train_step(stage.system, tx, jax.random.key(0), 0.0))(state, batch)
    largest = max(float(np.abs(g).max()) for g in grads.values())
    gradient, update = 0.0, 0.0
    for path, theirs in ours("grad").items():
        gradient = max(gradient, float(np.abs(grads[path] - theirs).max()) / largest)
    for path, theirs in ours("after").items():
        # AdamW's first step is the gradient's sign: where that is rounding noise (key biases have no true gradient) so is the step
        told = np.abs(np.asarray(grads[path])) > 1e-4 * largest
        update = max(update, float((np.abs(after.params[path] - theirs) * told).max()) / case["step"]["lr"])
    return {"loss": abs(float(loss) - float(stored["loss"])) / abs(float(stored["loss"])), "gradient": gradient, "update": update}


STEP_TOLERANCE = {"loss": 1e-5, "gradient": 1e-5, "update": 1e-3}


def step_within(found: dict[str, float]) -> bool:
    return all(value <= STEP_TOLERANCE[name] for name, value in found.items())
