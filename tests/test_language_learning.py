"""A language model alone learns to predict what comes next; the stages of the embedded BLIP-2 and InstructBLIP fit onto each other."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import config
from vlm_jax import stage as stages
from vlm_jax import weight_rules
from vlm_jax.errors import ConfigError
from vlm_jax.system import Context
from vlm_jax.train.init import split_source
from vlm_jax.train.state import merge

STILL = Context(jax.random.key(0), jnp.int32(0), train=False)
LAYOUTS = {"opt": "joined", "llama": "joined", "t5": "apart"}


def stage_of(family, layout=None, **data):
    """A language model of one layer over 40 ids, for rows of six ids behind prompts of four."""
    section = config("blip2").stages.language
    with section.ignore_type():
        tower = dict(family=family, variant="mini", width=16, heads=2, layers=1, mlp_dim=16, **({"head_dim": 8} if family == "t5" else {}))
        section.model = dict(language=tower, tokens=dict(vocab=40, bos=1, eos=2, pad=0))
        section.data.update(batch=4, tokenizer="", train="", eval="", layout=layout or LAYOUTS[family], prompt_length=4, length=6, **data)
    return stages.resolve(section, "language")


def batch_of(stage):
    """Random ids, one row shorter than the others; in joined rows the last four are learned."""
    rng, batch = np.random.default_rng(0), {}
    for name, (shape, kind) in stage.data.text.shapes(4, 6).items():
        batch[name] = rng.integers(3, 40, shape).astype(np.int32) if kind == "int32" else np.ones(shape, bool)
    batch["text_mask"][1, -2:] = False
    if "target_mask" in batch:
        batch["target_mask"] = batch["text_mask"] & (np.arange(batch["text"].shape[1]) >= 6)
    return batch


def weights_of(stage):
    drawn = stage.system.init(jax.random.key(0), stage.spec)
    return jax.tree.map(lambda x: x.value if hasattr(x, "value") else x, drawn, is_leaf=lambda x: hasattr(x, "value"))


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_loss_is_the_mean_over_what_is_learned(family):
    stage, parts = stage_of(family), stage_of(family, microbatch=2)
    variables, batch = weights_of(stage), batch_of(stage)
    value, out = jax.jit(lambda v, b: stage.system.loss(v, {}, b, STILL))(variables, batch)
    if family == "t5":      # its own predict function: encoder's text, decoder's target behind padding
        rows = {"text": batch["prompt"], "text_mask": batch["prompt_mask"], "target": np.pad(batch["text"], ((0, 0), (1, 0)))[:, :-1]}
        ids, learned = batch["text"], batch["text_mask"]
    else:
        rows, ids, learned = batch, batch["text"][:, 1:], batch["target_mask"][:, 1:]
    logits = stage.system.predict["logits"](variables, rows)["logits"][:, :ids.shape[1]]
    each = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], 2)[..., 0]
    assert 0 < learned.sum() < learned.size and float(value) == pytest.approx(-float(each[learned].mean()), rel=1e-5)
    assert float(out.metrics["token_accuracy"]) == pytest.approx(float((logits.argmax(2) == ids)[learned].mean()))
    assert float(jax.jit(lambda v, b: parts.system.loss(v, {}, b, STILL)[0])(variables, batch)) == pytest.approx(float(value), rel=1e-5)


def test_an_encoder_without_a_prompt_and_a_tower_without_a_loss_are_refused():
    stage = stage_of("t5", "joined")
    with pytest.raises(ConfigError, match="data.layout='joined': the encoder .* nothing to read; nearest: 'apart'"):
        jax.eval_shape(lambda v, b: stage.system.loss(v, {}, b, STILL), merge(dict(stage.plan.shapes), {}, {}), batch_of(stage))
    section = stages.ConfigDict(stage_of("opt").config.to_dict())
    section.loss = dict(weights=dict(con=1.0))      # as imports have it
    with pytest.raises(ConfigError, match="a language model has loss.weights.lm"):
        stages.resolve(section, "language").system.loss({}, {}, {}, STILL)


def rules_of(section):
    """The rules of an ``init`` as they are told, an origin alone for every leaf."""
    given = (section.init,) if isinstance(section.init, str) else section.init
    return [(".*", f"{rule}:", "copy") if isinstance(rule, str) else tuple(rule) for rule in given]


@pytest.fixture(scope="module")
def resolved():
    """(config, its stages by name) by config; stages that both have are resolved once."""
    found, made = {}, {}
    for name in ("blip2", "instructblip"):
        whole = config(name)
        for key, section in whole.stages.items():
            if section.model != stages.INHERIT and str(section) not in made:
                made[str(section)] = stages.resolve(section, key)
        found[name] = whole, {key: made[str(section)] for key, section in whole.stages.items() if str(section) in made}
    return found


def test_each_stage_takes_its_weights_from_one_before_it(resolved):
    """Every leaf that is not fresh is a leaf of that stage, of the same shape; what is frozen was trained before."""
    for whole, known in resolved.values():
        for at, name in enumerate(whole.stage_order):
            section, plan = whole.stages[name], known[name].plan
            rules, taken = rules_of(section), {}
            for path, shape in plan.shapes.items():
                rule = weight_rules.first_match(rules, path)
                if rule is None or rule[1] == weight_rules.FRESH:
                    continue
                origin, template = split_source(rule[1])
                assert origin[1:] in whole.stage_order[:at], (name, path)
                assert known[origin[1:]].plan.shapes[template or path].shape == shape.shape, (name, path)
                taken[path] = origin
            assert set(plan.frozen) <= set(taken), name
    blip2, instruct = resolved["blip2"][0], resolved["instructblip"][0]
    assert len(instruct.stage_order) == 5 and "language_t5" not in instruct.stage_order
    for at, name in enumerate(instruct.stage_order[:4]):      # one work directory does for both
        assert blip2.stage_order[at] == name and stages.configs.to_json(blip2.stages[name]) == stages.configs.to_json(instruct.stages[name])


def test_scenes_hold_out_comparisons_and_videos(resolved):
    whole, known = resolved["instructblip"]
    trained = whole.stages.instruct.data.train
    assert "comparison" not in trained and "video" not in trained and "comparison" in whole.stages.instruct.evals.held_out.data
    assert known["instruct"].plan.count(trained=True) > known["generate"].plan.count(trained=True)      # the words that the queries read
