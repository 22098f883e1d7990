"""ALBEF against stored outputs of the official code (salesforce/ALBEF b9727e4 on small random weights), and its invariants."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vlm_jax
from tests.tiny import config
from vlm_jax import partitioning, weight_rules
from vlm_jax import stage as stages
from vlm_jax.errors import ConfigError
from vlm_jax.importers import albef as layout
from vlm_jax.importers import cli, read
from vlm_jax.losses.masked import mask_tokens
from vlm_jax.losses.matching import matching, mine, pairs
from vlm_jax.losses.momentum import enqueue, lerp, make_queues, momentum_contrastive, other_groups
from vlm_jax.models import grounding
from vlm_jax.nn.rows import select
from vlm_jax.system import Context
from vlm_jax.train import init
from vlm_jax.train.state import merge

STORED = pathlib.Path(__file__).parent / "parity" / "official_outputs" / "albef_pretrain"
IO = dict(np.load(STORED / "io.npz"))
IMAGE, IDS, MASK = IO["in_images"].transpose(0, 2, 3, 1), IO["in_input_ids"].astype(np.int32), IO["in_attention_mask"].astype(bool)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    return cli.import_release("albef", str(STORED), tmp_path_factory.mktemp("albef") / "in", say=lambda line: None)


@pytest.fixture(scope="module")
def model(imported):
    return vlm_jax.load(imported)


def answers(model):
    out = model.predict["features"]({"image": IMAGE, "text": IDS, "text_mask": MASK})
    embeds = model.predict["embed"]({"image": IMAGE, "text": IDS, "text_mask": MASK})
    words = model.predict["mlm_logits"]({"image": IMAGE, "text": IO["in_mlm_input_ids"].astype(np.int32), "text_mask": MASK})["logits"]
    rows, columns = np.repeat(np.arange(4), 4), np.tile(np.arange(4), 4)
    pairs = model.predict["match"]({"image_features": out["image"][columns], "text_features": out["text"][rows], "text_mask": MASK[rows]})["match"]
    return {"out_image_embeds": out["image"], "out_text_states": out["text"][MASK], "out_fusion_states": out["fused"][MASK],
            "out_image_feat": embeds["image_embed"], "out_text_feat": embeds["text_embed"], "out_mlm_logits": words[MASK], "out_itm_logits_all": pairs.reshape(4, 4, 2)}


def furthest(found):
    """name -> largest difference from the official output, in units of its tolerance (1e-4; logits 1e-3)."""
    wanted = {k: IO[k][MASK] if k.endswith("states") or k == "out_mlm_logits" else IO[k] for k in found}
    return {k: float(np.abs(x - wanted[k]).max()) / (1e-3 if "logits" in k else 1e-4) for k, x in found.items()}


def test_towers_and_heads_are_the_official_ones(model):
    found = furthest(answers(model))
    assert max(found.values()) <= 1, found
    both = np.abs(IO["out_fusion_states"] - IO["out_multi_modal_states"])[MASK].max()      # and so are the modes' states among themselves
    assert both < 1e-5


@pytest.mark.parametrize("mistake, change", [
    ("bert eps", lambda m: m.text.update(eps=1e-5)), ("vit eps", lambda m: m.image.update(eps=1e-5)), ("one head", lambda m: m.text.update(heads=1)),
    ("no token types", lambda m: m.text.update(token_types=0))])
def test_a_planted_mistake_shows(imported, model, mistake, change):
    section = stages.ConfigDict(model.config.to_dict())
    with section.model.unlocked():
        change(section.model)
    wrong = stages.resolve(section, "wrong")
    leaves = stages.read_weights(imported)
    variables = merge({p: leaves[p].reshape(x.shape) for p, x in wrong.plan.shapes.items()}, {}, {})
    clone = type("Wrong", (), {"predict": stages.bind(wrong.system, variables, stages.partitioning.make_mesh("dp", devices=jax.devices()[:1]))})
    found = furthest(answers(clone))
    assert max(found.values()) > 5, (mistake, found)


@pytest.fixture(scope="module")
def learner(imported):
    """(stage, parameters, carry, run): ``run(parameters, carry, step)`` -> metrics, next carry and gradients at the stored batch, negatives and
    masks. The teacher's share is the stored one, but 0 at step 0."""
    section = stages.configs.from_json((imported / "config.json").read_text())
    section.loss.alpha, section.loss.alpha_ramp = float(IO["in_alpha"]), 1
    section.data.batch = 4
    stage = stages.resolve(section, "step")
    leaves, kept = stages.read_weights(imported), stages.read_carry(imported)
    carry = {"teacher": {p.removeprefix("teacher/"): x for p, x in kept.items() if p.startswith("teacher/")}, "id_queue": np.full(8, -100, np.int32),
             **{k: kept[k] for k in ("image_queue", "text_queue", "pointer")}}
    batch = {"image": IMAGE, "text": IDS, "text_mask": MASK, "image_id": np.arange(4), "masked_text": IO["in_mlm_input_ids"].astype(np.int32),
             "masked_at": IO["in_mlm_labels"] != -100, "negative_image": IO["in_neg_image_idx"], "negative_text": IO["in_neg_text_idx"]}
    batch = {k: jnp.asarray(x) for k, x in batch.items()}

    @jax.jit
    def run(params, carry, step):
        def loss(params):
            return stage.system.loss(merge(params, {}, {}), carry, batch, Context(jax.random.key(0), step, train=False))
        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return out.metrics, stage.system.next_carry(carry, out.update), grads

    return stage, {p: leaves[p] for p in stage.plan.shapes}, carry, run


@pytest.fixture(scope="module")
def stepped(learner):
    stage, params, carry, run = learner
    return stage, params, carry, jax.device_get(run(params, carry, jnp.int32(1)))


def test_a_batch_is_learned_by_heart(learner):
    """Matching is told apart, and masked words are known."""
    _, params, carry, run = learner
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    move = jax.jit(lambda grads, state, params: (lambda u, s: (optax.apply_updates(params, u), s))(*tx.update(grads, state, params)))
    state = tx.init(params)
    for _ in range(80):
        metrics, _, grads = run(params, carry, jnp.int32(0))
        params, state = move(grads, state, params)
    assert metrics["itm_accuracy"] == 1.0 and metrics["mlm"] < 0.5 and metrics["itm"] < 0.1, metrics


def test_a_step_has_the_official_losses_teacher_and_queues(stepped):
    _, _, carry, (metrics, after, grads) = stepped
    for name in ("itc", "itm", "mlm"):
        assert abs(metrics[name] - IO[f"out_loss_{name}"]) < 1e-4, name
    official = {n: t.read() for n, t in read.open_weights(STORED / "after_step.safetensors").items()}
    table = layout.student({"model": {"text": {"layers": 4, "cross_layers": 2}}}, official, "_m")
    teacher, _ = weight_rules.import_leaves(table, (".*",), {p: x.shape for p, x in carry["teacher"].items()}, official, "after")
    for path, x in teacher.items():
        np.testing.assert_allclose(after["teacher"][path], x, rtol=0, atol=1e-6, err_msg=path)
    for side in ("image", "text"):
        np.testing.assert_allclose(after[f"{side}_queue"], official[f"{side}_queue"].T, rtol=0, atol=1e-4)
    assert after["pointer"] == official["queue_ptr"][0] == 4 and list(after["id_queue"]) == [0, 1, 2, 3] + [-100] * 4
    assert all(np.isfinite(g).all() for g in grads.values()) and np.abs(grads["itm_head/kernel"]).max() > 0


def test_exporting_an_import_gives_the_source_back_bit_for_bit(imported, tmp_path):
    out = cli.export_release("albef", imported, tmp_path / "out", say=lambda line: None)
    source, back = read.open_weights(STORED / "weights.safetensors"), read.open_weights(out)
    ignored = json.loads((imported / "import.json").read_text())["ignored"]
    assert set(back) == set(source) - set(ignored) and all(name.endswith("position_ids") for name in ignored)
    for name, tensor in back.items():
        assert (tensor.dtype, tensor.shape, tensor.read().tobytes()) == (source[name].dtype, source[name].shape, source[name].read().tobytes()), name


def test_a_run_that_starts_from_it_goes_on_with_its_teacher(imported, stepped):
    stage, _, carry, _ = stepped
    tx, _ = stages.make_optimizer(stage)
    given = stages.read_weights(imported) | {f"carry/{p}": x for p, x in stages.read_carry(imported).items()}
    mesh = stages.partitioning.make_mesh("dp", devices=jax.devices()[:1])
    with stages.partitioning.use(mesh):
        state = init.create(stage.system, stage.plan, tx, mesh, jax.random.key(0), stage.spec, given)
    path = "text/blocks/attn/query/kernel"
    np.testing.assert_array_equal(state.carry["teacher"][path], carry["teacher"][path])
    assert np.abs(state.carry["teacher"][path] - state.params[path]).max() > 1e-3
    np.testing.assert_array_equal(state.carry["image_queue"], carry["image_queue"])


def test_copies_that_differ_are_refused(imported, tmp_path):
    tensors = {n: t for n, t in read.open_weights(STORED / "weights.safetensors").items()}
    tensors["text_encoder.cls.predictions.decoder.bias"] = tensors["text_encoder_m.cls.predictions.bias"]
    with pytest.raises(ConfigError, match="decoder.bias and .*predictions.bias are one tensor"):
        cli.check_ties(layout.ties(tensors), tensors)


def test_padding_and_the_image_do_not_reach_texts(model):
    longer = {"text": np.pad(IDS[:, :20], ((0, 0), (0, 5))), "text_mask": np.pad(MASK[:, :20], ((0, 0), (0, 5)))}
    short, padded = (model.predict["features"]({"image": IMAGE, **b}) for b in ({"text": IDS[:, :20], "text_mask": MASK[:, :20]}, longer))
    real = MASK[:, :20]
    for name in ("text", "fused"):
        np.testing.assert_allclose(padded[name][:, :20][real], short[name][real], atol=1e-5)


# ---- grounding

def test_heat_is_the_attention_times_its_gradient_where_that_is_positive(model):
    """Against weights computed in numpy and differences of the logit, at the first of the stored model's two fusing layers."""
    text, params = model.stage.system.model.text, model.variables["params"]["text"]
    found = model.predict["features"]({"image": IMAGE, "text": IDS, "text_mask": MASK})
    states, memory = found["text"], found["image"]
    shape = (text.heads, IDS.shape[1], memory.shape[1])

    def watched(nudge):
        fused, weights = grounding.upper_watched(text, params, states, MASK, memory, 0, nudge)
        return fused, model.stage.system.model.apply(model.variables, fused, method="match")[:, 1], weights

    fused, logits, weights = jax.device_get(jax.jit(watched)(jnp.zeros((4, *shape))))
    np.testing.assert_allclose(fused[MASK], found["fused"][MASK], atol=1e-5)
    np.testing.assert_allclose(logits, IO["out_itm_logits_all"][np.arange(4), np.arange(4), 1], atol=1e-4)
    own = jax.tree.map(lambda p: np.asarray(p[0], np.float64), params["blocks_cross"])

    def attention(p, x, y, mask):
        q, k, v = (np.einsum("bld,dhe->blhe", z, p[r]["kernel"]) + p[r]["bias"] for r, z in (("query", x), ("key", y), ("value", y)))
        scores = np.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(q.shape[-1]) + np.where(mask, 0, -1e9)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return shares, np.einsum("bhqk,bkhe,hed->bqd", shares, v, p["out"]["kernel"]) + p["out"]["bias"]

    x = states + attention(own["attn"], states, states, MASK[:, None, None])[1]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * own["norm1"]["scale"] + own["norm1"]["bias"]
    wanted = attention(own["cross"], x, memory.astype(np.float64), True)[0]
    real = np.broadcast_to(MASK[:, None, :, None], weights.shape)
    np.testing.assert_allclose(weights[real], wanted[real], atol=1e-5)
    # one weight at a time is moved, in all rows at once, for they do not meet
    step, each = 1e-2, jnp.eye(int(np.prod(shape))).reshape(-1, 1, *shape)
    up, down = (jax.device_get(jax.jit(lambda sign: jax.lax.map(lambda e: watched(sign * step * e)[1], each, batch_size=64))(sign)) for sign in (1.0, -1.0))
    slope = ((up - down) / (2 * step)).T.reshape(4, *shape)
    told = np.array([[0 < at < count - 1 for at in range(MASK.shape[1])] for count in MASK.sum(1)])      # no [CLS], no [SEP], no padding
    cam = (wanted * np.maximum(slope, 0) * told[:, None, :, None]).sum((1, 2))[:, 1:]
    heat = model.predict["ground"]({"image": IMAGE, "text": IDS, "text_mask": MASK})["heat"]
    np.testing.assert_allclose(heat, (cam / cam.max(1, keepdims=True)).reshape(heat.shape), atol=1e-2)
    np.testing.assert_allclose(heat.max((1, 2)), 1, atol=1e-6)
    # planted: gradients of any sign, or the texts' ends too, give other maps
    for wrong in (wanted * np.abs(slope) * told[:, None, :, None], wanted * np.maximum(slope, 0)):
        wrong = wrong.sum((1, 2))[:, 1:]
        assert np.abs((wrong / wrong.max(1, keepdims=True)).reshape(heat.shape) - heat).max() > 0.05
    for layer in (1, 3):      # the last one's states of words reach no matching logit
        with pytest.raises(ConfigError, match=f"layer={layer} cannot be looked into; nearest: 2"):
            model.predict["ground"]({"image": IMAGE, "text": IDS, "text_mask": MASK}, layer=layer)


# ---- losses

def rows_of(seed, count=6, width=8):
    x = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


QUEUES = make_queues(10, 8)


def test_without_a_teacher_it_is_plain_infonce_over_batch_and_queue():
    image, text, image_m, text_m = map(rows_of, range(4))
    loss, similar = momentum_contrastive(image, text, image_m, text_m, QUEUES, jnp.float32(0.1), 0.0)
    expected = 0
    for query, keys in ((image, np.concatenate([text_m, QUEUES["text_queue"]])), (text, np.concatenate([image_m, QUEUES["image_queue"]]))):
        logits = np.asarray(query, np.float64) @ keys.T.astype(np.float64) / 0.1
        expected -= (logits[np.arange(6), np.arange(6)] - np.log(np.exp(logits).sum(1))).mean() / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(similar["image_to_text"], image @ text_m.T / 0.1, rtol=1e-5)


def test_a_student_that_is_its_teacher_is_at_the_minimum():
    image, text = rows_of(0), rows_of(1)

    def loss(image, text):
        return momentum_contrastive(image, text, rows_of(0), rows_of(1), QUEUES, jnp.float32(0.3), 1.0)[0]

    for grad in jax.grad(loss, (0, 1))(image, text):
        np.testing.assert_allclose(grad, 0, atol=1e-6)
    logits = np.asarray(image @ jnp.concatenate([text, QUEUES["text_queue"]]).T / 0.3)
    other = np.asarray(text @ jnp.concatenate([image, QUEUES["image_queue"]]).T / 0.3)
    entropy = np.mean([-(p * np.log(p)).sum(1).mean() for p in (jax.nn.softmax(logits), jax.nn.softmax(other))])
    np.testing.assert_allclose(loss(image, text), entropy, rtol=1e-5)


def test_texts_of_one_image_are_positives_and_groups_do_not_meet():
    image, text, image_m, text_m = map(rows_of, range(4))
    ids = jnp.array([0, 0, 1, 2, 3, 4])
    shared = momentum_contrastive(image, text, image_m, text_m, QUEUES, jnp.float32(0.1), 0.0, ids=ids)[0]
    assert abs(shared - momentum_contrastive(image, text, image_m, text_m, QUEUES, jnp.float32(0.1), 0.0)[0]) > 1e-3
    halves = [momentum_contrastive(*(x[i:i + 3] for x in (image, text, image_m, text_m)), QUEUES, jnp.float32(0.1), 0.4)[0] for i in (0, 3)]
    together = momentum_contrastive(image, text, image_m, text_m, QUEUES, jnp.float32(0.1), 0.4, group=3)[0]
    np.testing.assert_allclose(together, np.mean(halves), rtol=1e-5)
    with pytest.raises(ValueError, match="group=4 does not divide the batch of 6"):
        other_groups(6, 4)


def test_teacher_and_queue_move_as_they_should():
    moved = lerp({"w": jnp.ones(3)}, {"w": jnp.zeros(3)}, 0.995)
    np.testing.assert_allclose(moved["w"], 0.995)
    queues = make_queues(5, 2)
    for step in range(3):       # 3 x 2 rows into 5: wraps
        rows = jnp.full((2, 2), step + 1.0)
        queues = enqueue(queues, rows, -rows, jnp.array([2 * step, 2 * step + 1]))
    assert queues["image_queue"][:, 0].tolist() == [3, 1, 2, 2, 3] and queues["id_queue"].tolist() == [5, 1, 2, 3, 4] and queues["pointer"] == 1
    with pytest.raises(ValueError, match="queue=5 is smaller than the batch of 6"):
        enqueue(queues, jnp.ones((6, 2)), jnp.ones((6, 2)), jnp.arange(6))


def test_negatives_follow_the_similarity_off_the_excluded():
    similarity = jnp.array(np.random.default_rng(0).normal(size=(4, 4)) * 2, jnp.float32)
    same = jnp.eye(4, dtype=bool) | jnp.array([[0, 1, 0, 0], [1, 0, 0, 0], [0] * 4, [0] * 4], bool)
    drawn = np.asarray(jax.vmap(lambda k: mine(k, similarity, same))(jax.random.split(jax.random.key(0), 20000)))
    wanted = np.where(same, 0, jax.nn.softmax(similarity))
    wanted = wanted / wanted.sum(1, keepdims=True)
    for row in range(4):
        found = np.bincount(drawn[:, row], minlength=4) / len(drawn)
        assert not found[np.asarray(same[row])].any()
        np.testing.assert_allclose(found, wanted[row], atol=0.015)
    sharp = jnp.where(jnp.eye(4, dtype=bool), 500.0, similarity)      # the own pair has all the mass
    assert not np.any(np.asarray(mine(jax.random.key(1), sharp, jnp.eye(4, dtype=bool))) == np.arange(4))
    assert mine(jax.random.key(1), similarity, jnp.ones((4, 4), bool)).tolist() == [-1] * 4
    even = np.asarray(jax.vmap(lambda k: mine(k, similarity, same, epsilon=1e4))(jax.random.split(jax.random.key(0), 4000)))
    np.testing.assert_allclose(np.bincount(even[:, 2], minlength=4) / 4000, [1 / 3, 1 / 3, 0, 1 / 3], atol=0.03)


def test_pairs_of_groups_are_those_of_the_whole_batch_in_another_order():
    x = jnp.arange(8) * 10
    image, text = jnp.array([1, 2, 0, -1, 6, 7, 4, 5]), jnp.array([3, -1, 1, 2, 5, 4, 7, 6])

    def told(group):
        found = pairs(image, text, group)
        return sorted(zip(*(np.asarray(a).tolist() for a in (select(x, found.text), select(x, found.image), found.label, found.weight)), strict=True))

    assert told(4) == told(0) and len(told(0)) == 24
    assert (70, 50, 0, True) in told(4) and (0, 10, 0, True) in told(4)


def test_what_is_picked_within_groups_stays_on_its_device():
    """Values and gradients of a pick from the whole batch; by the compiled program nothing is sent, where a pick from the whole batch sends all rows."""
    mesh = partitioning.make_mesh("dp")
    draw = np.random.default_rng(0)
    x, rows = jnp.asarray(draw.normal(size=(32, 5, 3)), jnp.float32), jnp.asarray(draw.integers(0, 4, (8, 12)))
    whole = (rows + 4 * jnp.arange(8)[:, None]).reshape(-1)
    weight = jnp.asarray(draw.normal(size=(96, 5, 3)), jnp.float32)

    with partitioning.use(mesh):
        placed = [jax.device_put(a, partitioning.sharding(mesh, ("batch", *("none",) * (a.ndim - 1)), a.shape)) for a in (x, rows, whole, weight)]
        programs = []
        for at in placed[1:3]:
            pull = jax.jit(lambda x, at, w: jax.vjp(lambda x: select(x, at) ** 2 * w, x)[1](jnp.ones((96, 5, 3)))[0], out_shardings=placed[0].sharding)
            programs.append(pull.lower(placed[0], at, placed[3]).compile())
        within, over_all = (np.asarray(program(placed[0], at, placed[3])) for program, at in zip(programs, placed[1:3], strict=True))
    np.testing.assert_allclose(within, over_all, atol=1e-5)
    np.testing.assert_array_equal(select(x, rows), x[whole])
    sends = [any(name in program.as_text() for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute")) for program in programs]
    assert sends == [False, True]


def test_matching_counts_what_counts():
    logits, labels = jnp.array([[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]]), jnp.array([1, 0, 1])
    loss, accuracy = matching(logits, labels, jnp.array([True, True, False]))
    np.testing.assert_allclose(loss, (np.log1p(np.exp(-2)) + np.log1p(np.exp(-1))) / 2, rtol=1e-5)
    assert accuracy == 1.0


def test_masking_has_berts_shares():
    ids = jnp.asarray(np.random.default_rng(0).integers(200, 1000, (400, 25)))
    eligible = jnp.arange(25)[None, :] < 20
    masked, chosen = mask_tokens(jax.random.key(0), ids, eligible & (jnp.arange(25) > 0), vocab=1000, mask_id=103)
    assert not chosen[:, 0].any() and not chosen[:, 20:].any() and not (masked != ids)[~np.asarray(chosen)].any()
    assert abs(float(chosen[:, 1:20].mean()) - 0.15) < 0.01
    kept, told = np.asarray(masked == ids)[np.asarray(chosen)].mean(), np.asarray(masked == 103)[np.asarray(chosen)].mean()
    assert abs(told - 0.8) < 0.04 and abs(kept - 0.1) < 0.03


# ---- the config

def test_the_papers_size_has_the_papers_count():
    section = config("albef", "base").stages.pretrain
    section.data.tokenizer = ""
    assert stages.resolve(section, "pretrain").plan.count() == 209_937_725
    section = config("albef", "base").stages.retrieval
    section.data.tokenizer = ""
    assert stages.resolve(section, "retrieval").plan.count() == 209_560_835


def test_what_does_not_fit_is_named():
    section = config("albef").stages.pretrain
    section.loss.negatives = "hrad"
    with pytest.raises(ConfigError, match="loss.negatives='hrad' is not known; nearest: 'hard'"):
        stages.resolve(section, "pretrain")
    section = config("albef").stages.pretrain
    section.loss.queue = 16
    with pytest.raises(ConfigError, match="loss.queue=16 is smaller than data.batch=32"):
        stages.resolve(section, "pretrain")
