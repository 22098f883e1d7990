"""OPT, LLaMA and T5 against transformers on small random weights (tests/parity/hugging_face.py), their caches, masks, meshes and adapters."""

import functools
import json
import math
import pathlib
import shutil
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests.tiny import tiny
from vlm_jax import partitioning, weight_rules
from vlm_jax import stage as stages
from vlm_jax.data import tokenizers
from vlm_jax.errors import ConfigError
from vlm_jax.importers import cli, read, tokenizer_files, write
from vlm_jax.losses.captioning import captioning
from vlm_jax.models import language, t5
from vlm_jax.models.decoder import positions_of
from vlm_jax.nn import lora
from vlm_jax.train import init
from vlm_jax.train.state import merge, unbox

STORED = pathlib.Path(__file__).parent / "parity" / "official_outputs"
FAMILIES = ("hf_opt", "hf_llama", "hf_t5")
IO = {name: dict(np.load(STORED / name / "io.npz")) for name in FAMILIES}
NEW = 7


def quiet(line):
    pass


def batch_of(name, prefix=False):
    io = IO[name]
    return {"text": io["in_ids"], "text_mask": io["in_mask"], **({"prefix": io["in_prefix"]} if prefix else {}),
            **({"target": io["in_target"]} if name == "hf_t5" else {})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name -> imported directory, made once."""
    return functools.cache(lambda name: cli.import_release(name, str(STORED / name), tmp_path_factory.mktemp(name) / "in", say=quiet))


@pytest.fixture(scope="module")
def opened(folder):
    return functools.cache(lambda name: vlm_jax.load(folder(name)))


def tower_of(model, **changes):
    """(the language model alone, its variables)."""
    return model.stage.system.model.language.clone(parent=None, **changes), {"params": model.variables["params"]["language"]}


def whole(tower, ids, mask=None, positions=None):
    """Logits of a decoder, or of T5's decoder beside its encoder."""
    x = tower.embed(ids)
    return tower.logits(tower(x, mask, x) if isinstance(tower, t5.T5) else tower(x, mask, positions))


def shapes_of(tower):
    return nn.unbox(jax.eval_shape(lambda key: tower.init(key, jnp.zeros((1, 2), jnp.int32), method=whole), jax.random.key(0)))["params"]


# ---- sizes -------------------------------------------------------------------------------------

@pytest.mark.parametrize("family, variant, count", [
    ("opt", "2.7b", 2_651_596_800), ("opt", "6.7b", 6_658_473_984), ("llama", "7b", 6_738_415_616), ("llama", "13b", 13_015_864_320),
    ("llama", "llama2_7b", 6_738_415_616), ("t5", "xl", 2_849_757_184), ("t5", "xxl", 11_135_332_352)])
def test_parameter_counts_are_the_published_ones(family, variant, count):
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes_of(language.build(family=family, variant=variant)))) == count


def test_vicunas_extra_row_counts():
    assert shapes_of(language.build(family="llama", variant="7b", vocab=32001))["lm_head"]["kernel"].shape == (4096, 32001)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="family='lama' .*nearest: 'llama'"):
        language.build(family="lama")
    with pytest.raises(ValueError, match="variant='7B' .*nearest: '7b'"):
        language.build(family="llama", variant="7B")


# ---- parity ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FAMILIES)
def test_states_and_logits_behind_a_prefix_and_padding_are_the_official_ones(name, opened):
    model, io, batch = opened(name), IO[name], batch_of(name, prefix=True)
    seen = np.concatenate([np.ones(io["in_prefix"].shape[:2], bool), io["in_mask"]], 1)
    found = {**model.predict["features"](batch), **model.predict["logits"](batch)}
    if name == "hf_t5":
        assert np.abs(found["text"] - io["out_prefix_memory"])[seen].max() < 1e-4
        assert np.abs(found["target"] - io["out_prefix_states"]).max() < 1e-4 and np.abs(found["logits"] - io["out_prefix_logits"]).max() < 1e-3
    else:
        assert np.abs(found["text"] - io["out_prefix_states"])[seen].max() < 1e-4
        assert np.abs(found["logits"] - io["out_prefix_logits"])[seen].max() < 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_continuations_behind_a_prefix_are_the_official_ones(name, opened):
    found = opened(name).predict["generate"]({k: x for k, x in batch_of(name, prefix=True).items() if k != "target"}, max_new=NEW, min_new=NEW)
    np.testing.assert_array_equal(found["text"][:, -NEW:], IO[name]["out_prefix_greedy"])


@pytest.mark.parametrize("name", ("hf_opt", "hf_t5"))      # both kinds of cache, whose rows the beams permute
def test_beams_behind_a_prefix_are_the_official_ones(name, opened):
    batch = {k: x for k, x in batch_of(name, prefix=True).items() if k != "target"}
    found = opened(name).predict["generate"](batch, max_new=NEW, min_new=NEW, method="beam", beams=3)["text"][:, -NEW:]
    np.testing.assert_array_equal(found, IO[name]["out_prefix_beam"])
    assert (found != IO[name]["out_prefix_greedy"]).any()


def test_greedy_continuations_of_padded_texts_are_the_official_ones(opened):
    found = opened("hf_llama").predict["generate"](batch_of("hf_llama"), max_new=NEW, min_new=NEW)["text"]
    np.testing.assert_array_equal(found, np.concatenate([IO["hf_llama"]["in_ids"], IO["hf_llama"]["out_greedy"]], 1))


def logit_error(name, model, positions=None, **changes):
    """Largest difference of a changed tower's logits from the official ones, of padded texts alone."""
    tower, variables = tower_of(model, **changes)
    batch, io = batch_of(name), IO[name]

    def logits(tower):
        x = tower.embed(batch["text"])
        if name == "hf_t5":
            return tower.logits(tower(x, batch["text_mask"], tower.embed(batch["target"])))
        return tower.logits(tower(x, batch["text_mask"], positions))

    found = jax.jit(lambda v: tower.apply(v, method=logits))(variables)
    return np.abs(found - io["out_logits"])[io["in_mask"] if name != "hf_t5" else ...].max()


@pytest.mark.parametrize("name, mistake", [
    ("hf_opt", dict(eps=1e-2)), ("hf_opt", dict(activation="gelu")), ("hf_opt", dict(positions=np.arange(10)[None])), ("hf_llama", dict(eps=1e-6)),
    ("hf_llama", dict(theta=1e4)), ("hf_llama", dict(activation="gelu")), ("hf_t5", dict(eps=1e-6)), ("hf_t5", dict(max_distance=20))])
def test_a_planted_mistake_shows(name, mistake, opened):
    if "positions" in mistake:      # counted from the left, padding included
        mistake = {"positions": jnp.tile(mistake["positions"], (3, 1))}
    assert logit_error(name, opened(name), **mistake) > (1e-3 if mistake.keys() != {"max_distance"} else 1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_padded_texts_are_the_official_ones(name, opened):
    assert logit_error(name, opened(name)) < 1e-3


def test_blip_2_runs_t5_with_the_exact_gelu(opened):
    tower, variables = tower_of(opened("hf_t5"), activation="gelu")
    batch, io = batch_of("hf_t5"), IO["hf_t5"]
    found = jax.jit(lambda v: tower.apply(v, method=lambda m: m.logits(m(m.embed(batch["text"]), batch["text_mask"], m.embed(batch["target"])))))(variables)
    assert np.abs(found - io["out_exact_gelu_logits"]).max() < 1e-3 < np.abs(found - io["out_logits"]).max()


def test_buckets_of_relative_positions_are_the_official_ones():
    for direction in ("both", "causal"):
        np.testing.assert_array_equal(t5.relative_buckets(jnp.arange(-200, 201), direction), IO["hf_t5"][f"out_buckets_{direction}"])


# ---- padding and caches ------------------------------------------------------------------------

@pytest.mark.parametrize("name", FAMILIES[:2])
def test_padding_on_either_side_changes_no_real_logit(name, opened):
    tower, variables = tower_of(opened(name))
    io = IO[name]
    left, lengths = io["in_mask"], io["in_mask"].sum(1)
    right = np.arange(10) < lengths[:, None]
    ids = np.zeros_like(io["in_ids"])
    ids[right] = io["in_ids"][left]
    run = jax.jit(lambda ids, mask: tower.apply(variables, ids, mask, method=whole))
    np.testing.assert_allclose(run(ids, right)[right], run(io["in_ids"], left)[left], atol=2e-5)


def test_opts_padding_reads_row_1_and_text_row_2_on(opened):
    tower, variables = tower_of(opened("hf_opt"))
    mask = jnp.array([[False, True, True], [True, True, False]])
    table = jnp.arange(32.0)[:, None] * jnp.ones((1, 24))
    places = tower.apply({"params": {**variables["params"], "position_embed": table}}, jnp.zeros((2, 3, 24)),
                         method=lambda m, x: m.place(x, positions_of(mask))[0])
    np.testing.assert_array_equal(places[..., 0], [[1, 2, 3], [2, 3, 1]])
    prefix = positions_of(jnp.ones((1, 33), bool))      # 32 queries: the first token behind them reads row 34
    assert prefix[0, 32] + 2 == 34


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_filled_in_parts_gives_the_states_of_the_whole(name, opened):
    tower, variables = tower_of(opened(name))
    io = IO[name]

    def both(m):
        x, mask = m.embed(io["in_ids"]), jnp.asarray(io["in_mask"])
        if name == "hf_t5":
            y, memory = m.embed(io["in_target"]), m.encode(x, mask)
            first, cache = m.extend(y[:, :5], m.init_cache(3, 15, 10), memory, mask)
            second, _ = m.extend(y[:, 5:], cache)
            return m.decode(y, memory, mask), jnp.concatenate([first, second], 1)
        first, cache = m.extend(x[:, :5], m.init_cache(3, 13), mask[:, :5])
        second, _ = m.extend(x[:, 5:], cache, mask[:, 5:])
        return m(x, mask), jnp.concatenate([first, second], 1)

    once, parts = jax.jit(lambda v: tower.apply(v, method=both))(variables)
    real = ... if name == "hf_t5" else io["in_mask"]
    np.testing.assert_allclose(parts[real], once[real], atol=2e-5)


# ---- meshes, dtypes, adapters ------------------------------------------------------------------

SMALL = dict(vocab=32, width=16, layers=2, heads=2, mlp_dim=32, remat="full")


def test_losses_are_equal_on_every_mesh():
    towers = [language.build(family="opt", **SMALL, positions=16), language.build(family="llama", **SMALL), language.build(family="t5", **SMALL, head_dim=8)]
    ids = np.random.default_rng(0).integers(0, 32, (8, 9)).astype(np.int32)
    boxed = [jax.eval_shape(lambda key, t=t: t.init(key, jnp.zeros((1, 2), jnp.int32), method=whole), jax.random.key(0)) for t in towers]
    named = [unbox(b) for b in boxed]
    rng = np.random.default_rng(1)
    params = [{p: (0.3 * rng.normal(size=x.shape)).astype(np.float32) for p, x in found.items()} for found, _, _ in named]

    def loss(params, batch):
        total = 0.0
        for tower, leaves in zip(towers, params, strict=True):
            def nll(m, ids):
                x = m.embed(ids[:, :-1])
                states = m(x, None, x) if isinstance(m, t5.T5) else m(x)
                return captioning(states, m.vocabulary(), ids[:, 1:], jnp.ones(ids[:, 1:].shape, bool))[0]
            total += tower.apply(merge(leaves, {}, {}), batch["text"], method=nll)
        return total / ids.size

    found = {}
    for devices, rules in ((1, "dp"), (4, "fsdp"), (8, "fsdp_tp")):
        mesh = partitioning.make_mesh(rules, devices=jax.devices()[:devices])
        with partitioning.use(mesh):
            placed = [{p: jax.device_put(x, partitioning.sharding(mesh, axes[p], x.shape)) for p, x in leaves.items()}
                      for leaves, (_, _, axes) in zip(params, named, strict=True)]
            value, grads = jax.jit(jax.value_and_grad(loss))(placed, partitioning.place({"text": ids}, mesh))
        found[devices] = float(value), jax.device_get(grads)
        split = [p for p, x in placed[1].items() if not x.sharding.is_fully_replicated]
        assert devices == 1 or {"blocks/attn/query/kernel", "blocks/mlp/gate/kernel", "lm_head/kernel"} <= set(split)
    for devices in (4, 8):
        np.testing.assert_allclose(found[devices][0], found[1][0], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found[devices][1], found[1][1])


@pytest.mark.parametrize("family", ("opt", "t5"))
def test_units_are_dropped_where_a_key_is_given(family):
    tower = language.build(family=family, **SMALL, dropout=0.1, **(dict(head_dim=8) if family == "t5" else dict(positions=16)))
    rng = np.random.default_rng(0)
    params = {"params": jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes_of(tower))}
    ids = jnp.arange(8)[None]
    with_key = jax.jit(lambda key: tower.apply(params, ids, method=whole, rngs={"dropout": key}))
    plain = jax.jit(lambda: tower.apply(params, ids, method=whole))()
    one, again, other = with_key(jax.random.key(0)), with_key(jax.random.key(0)), with_key(jax.random.key(1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - plain).max() > 1e-3
    np.testing.assert_array_equal(plain, jax.jit(lambda: tower.clone(dropout=0.0).apply(params, ids, method=whole))())


def test_bfloat16_weights_are_kept_and_computed_in(folder, opened, tmp_path):
    half = cli.import_release("hf_llama", str(STORED / "hf_llama"), tmp_path / "half", say=quiet, dtype="bfloat16")
    leaves = stages.read_weights(half)
    assert {str(x.dtype) for x in leaves.values()} == {"bfloat16"}
    wanted = stages.read_weights(folder("hf_llama"))
    assert all(np.array_equal(x, wanted[p].astype(x.dtype)) for p, x in leaves.items())
    config = stages.configs.from_json((half / "config.json").read_text())
    config.model.dtype = "bfloat16"
    (half / "config.json").write_text(stages.configs.to_json(config))
    model, batch = vlm_jax.load(half), batch_of("hf_llama")
    assert {str(x.dtype) for x in jax.tree.leaves(model.variables)} == {"bfloat16"}
    found = model.predict["logits"](batch)["logits"]
    error = np.abs(found - IO["hf_llama"]["out_logits"])[batch["text_mask"]]
    assert found.dtype == np.float32 and 1e-3 < error.max() < 0.5
    with pytest.raises(ConfigError, match="--dtype='float16' is not known; nearest: 'bfloat16'"):
        cli.import_release("hf_llama", str(STORED / "hf_llama"), tmp_path / "no", say=quiet, dtype="float16")


def test_frozen_kernels_may_be_bfloat16():
    whole = tiny("clip")
    section = whole.stages.pretrain
    section.trainable, section.frozen_dtype = ("(?!text/).*", "text/.*norm.*"), "bfloat16"
    stage = stages.resolve(section, "pretrain")
    narrow = {p for p, x in stage.plan.shapes.items() if x.dtype == jnp.bfloat16}
    assert {"text/token_embed/table", "text/blocks/attn/query/kernel"} <= narrow <= set(stage.plan.frozen)
    assert {p.rpartition("/")[2] for p in narrow} == {"kernel", "table"} and all(p.startswith("text/") for p in narrow)
    tx, _ = stages.make_optimizer(stage)
    mesh = partitioning.make_mesh("dp", devices=jax.devices()[:1])
    given = {"text/token_embed/table": np.full(stage.plan.shapes["text/token_embed/table"].shape, 0.3, np.float32)}
    state = init.create(stage.system, stage.plan, tx, mesh, jax.random.key(0), stage.spec, given)
    told = init.abstract(stage.system, stage.plan, tx, mesh)      # what a checkpoint is restored into
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), told)
    assert float(state.frozen["text/token_embed/table"][0, 0]) == float(jnp.bfloat16(0.3))
    section.frozen_dtype = "float16"
    with pytest.raises(ConfigError, match="frozen_dtype='float16' is not known; nearest: 'bfloat16'"):
        stages.resolve(section, "pretrain")


def test_adapters_on_a_decoder_train_and_merge(folder):
    config = stages.configs.from_json((folder("hf_llama") / "config.json").read_text())
    plain = stages.resolve(config, "in")
    system = lora.adapt(plain.system, lora.Adapters(rank=2, targets=(*lora.TARGETS, ".*/lm_head/kernel")))
    fresh = jax.device_get(jax.jit(lambda key: unbox(system.init(key, plain.spec))[0])(jax.random.key(0)))
    base = stages.read_weights(folder("hf_llama"))
    adapters = {p: x for p, x in fresh.items() if p.endswith(("lora_a", "lora_b"))}
    rest = {p: base.get(p, x) for p, x in fresh.items() if p not in adapters}
    assert {p.split("/")[-2] for p in adapters} == {"query", "key", "value", "out", "gate", "up", "down", "lm_head"}
    batch = {**batch_of("hf_llama"), "text_mask": np.ones((3, 10), bool)}

    def logits(leaves):
        return plain.system.predict["logits"](merge(leaves, {}, {}), batch)["logits"]

    def loss(adapters):
        log_p = jax.nn.log_softmax(logits({**rest, **adapters})[:, :-1])
        return -jnp.take_along_axis(log_p, jnp.asarray(batch["text"])[:, 1:, None], 2).mean()

    step = jax.jit(lambda a: (loss(a), jax.tree.map(lambda x, g: x - 0.02 * g, a, jax.grad(loss)(a))))
    losses = []
    for _ in range(12):
        value, adapters = step(adapters)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.3
    trained = jax.device_get({**rest, **adapters})
    run = jax.jit(logits)
    merged = lora.merge(trained)
    assert set(merged) == set(base)
    np.testing.assert_allclose(run(merged), run(trained), atol=2e-4)
    assert np.abs(run(merged) - run(base)).max() > 1e-2


# ---- files -------------------------------------------------------------------------------------

def copy_of(name, target, change=None, **config):
    """The stored directory as one file, its tensors changed by ``change`` and its config.json updated."""
    tensors = {n: t.read() for n, t in read.open_weights(STORED / name).items()}
    target.mkdir()
    write.write_safetensors(target / "model.safetensors", change(tensors) if change else tensors)
    stated = json.loads((STORED / name / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**stated, **config}))
    return target


@pytest.mark.parametrize("name, change", [
    ("hf_opt", lambda t: {n.removeprefix("model."): x for n, x in t.items()} | {"lm_head.weight": t["model.decoder.embed_tokens.weight"]}),
    ("hf_llama", lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}),
    ("hf_t5", lambda t: t | {f"{s}.embed_tokens.weight": t["shared.weight"] for s in ("encoder", "decoder")}
     | {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((32, 3), np.float32)})])
def test_other_files_of_the_same_model(name, change, folder, tmp_path):
    """Shards or one file, with or without "model.", with what old releases wrote beside."""
    found = stages.read_weights(cli.import_release("", str(copy_of(name, tmp_path / "src", change)), tmp_path / "in", say=quiet))
    wanted = stages.read_weights(folder(name))
    assert set(found) == set(wanted) and all(np.array_equal(x, wanted[p]) for p, x in found.items())


@pytest.mark.parametrize("name, change, config, says", [
    ("hf_opt", None, dict(do_layer_norm_before=False), "do_layer_norm_before=False is not supported; nearest: True"),
    ("hf_opt", None, dict(activation_function="gelu"), "nearest: 'relu'"), ("hf_opt", None, dict(num_attention_heads=5), "5 heads do not divide .* nearest: 4"),
    ("hf_llama", None, dict(num_key_value_heads=1), "num_key_value_heads=1 is not supported; nearest: 3"),
    ("hf_llama", None, dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_scaling=.* nearest: None"),
    ("hf_llama", lambda t: {n: x for n, x in t.items() if n != "model.norm.weight"}, {}, "model.norm.weight"),
    ("hf_llama", lambda t: t | {"model.layers.0.extra.weight": np.ones(2, np.float32)}, {}, "1 tensors of the file have no place in the model"),
    ("hf_t5", None, dict(feed_forward_proj="relu"), "nearest: 'gated-gelu'"),
    ("hf_t5", lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"}, {}, "no lm_head.weight"),
    ("hf_t5", lambda t: {**t, "decoder.embed_tokens.weight": t["shared.weight"] + 1}, {}, "are one tensor in this layout, but differ")])
def test_what_is_no_such_model_is_refused(name, change, config, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        cli.import_release(name, str(copy_of(name, tmp_path / "src", change, **config)), tmp_path / "in", say=quiet)
    assert not (tmp_path / "in").exists()


class Drawn(dict):
    """Tensors that are made when they are asked for, as a file's are."""

    def __getitem__(self, name):
        return np.full(super().__getitem__(name), 1.0, np.float32)


def test_an_import_holds_one_tensor_beside_the_model():
    layers, width = 12, 128
    sources = Drawn({f"layers.{i}.weight": (width, width) for i in range(layers)}, table=(256, width))
    tracemalloc.start()
    try:
        leaves, _ = weight_rules.import_leaves((("kernel", "layers.{layer}.weight", "dense"), ("table", "table", "copy")), (),
                                               {"kernel": (layers, width, width), "table": (256, width)}, sources, "here")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    model = sum(x.nbytes for x in leaves.values())
    assert model < peak < model + 3 * 4 * width * width      # two drawn layers may meet


def test_tokenizers_lie_beside_the_files(tmp_path):
    scenes = pathlib.Path(tokenizers.ASSETS) / "scenes.model"
    for name, file in (("hf_llama", "tokenizer.model"), ("hf_t5", "spiece.model")):
        shutil.copy(scenes, tmp_path / file)
        assert tokenizer_files.beside(name, tmp_path)[0].encode("a red circle") == tokenizers.load("scenes").encode("a red circle")
    letters = {c: i + 4 for i, c in enumerate(["a", "b", "Ġ", "ab"])} | {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    found, name = tokenizer_files.beside("hf_opt", tmp_path)
    assert (found.bos_id, found.eos_id, found.pad_id, name) == (2, 2, 1, "vocab.json")
    assert found.encode("ab ba") == [2, 7, 6, 5, 4] and found.decode([2, 7, 6, 5, 4, 2, 1]) == "ab ba"
    longer = {"vocab": 12, "bos": 2, "eos": 2, "pad": 1}      # rows of the table beyond the vocabulary
    assert tokenizer_files.find("hf_opt", tmp_path, "", longer, "", quiet) is not None
    assert tokenizer_files.find("hf_opt", tmp_path, "", {**longer, "vocab": 6}, "", quiet) is None


def test_a_model_with_its_tokenizer_takes_strings(tmp_path):
    opt = copy_of("hf_opt", tmp_path / "opt")
    letters = {c: i + 4 for i, c in enumerate(["a", "b", "Ġ", "ab"])} | {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    (opt / "vocab.json").write_text(json.dumps(letters))
    (opt / "merges.txt").write_text("#version: 0.2\na b\n")
    model = vlm_jax.load(cli.import_release("hf_opt", str(opt), tmp_path / "in", say=quiet))
    ids, mask = model.ids("ab b")
    assert ids[0, :5].tolist() == [2, 7, 6, 5, 1] and mask[0].sum() == 4 and dict(model.config.model.tokens) == dict(vocab=96, bos=2, eos=2, pad=1)
    seq = copy_of("hf_t5", tmp_path / "t5")
    pieces = json.loads(tokenizer_files.open_opt_vocabulary(opt).content())
    pieces["added_tokens"] = [dict(pieces["added_tokens"][0], id=i, content=c) for i, c in ((0, "<pad>"), (1, "</s>"))]
    pieces["model"]["vocab"] = {"<pad>": 0, "</s>": 1, "a": 4, "b": 5, "Ġ": 6, "ab": 7}
    pieces["post_processor"] = dict(type="TemplateProcessing", single=[dict(Sequence=dict(id="A", type_id=0)), dict(SpecialToken=dict(id="</s>", type_id=0))],
                                    pair=[dict(Sequence=dict(id="A", type_id=0))], special_tokens={"</s>": dict(id="</s>", ids=[1], tokens=["</s>"])})
    (seq / "tokenizer.json").write_text(json.dumps(pieces))
    model = vlm_jax.load(cli.import_release("hf_t5", str(seq), tmp_path / "t5_in", say=quiet))
    assert model.ids("ab b")[0][0, :5].tolist() == [7, 6, 5, 1, 0] and dict(model.config.model.tokens) == dict(vocab=96, bos=None, eos=1, pad=0)


def test_a_language_model_is_no_other_tower(folder):
    section = stages.configs.from_json((folder("hf_opt") / "config.json").read_text())
    with section.model.unlocked():
        section.model.image = dict(variant="mini")
    with pytest.raises(ConfigError, match="either image or text or language"):
        stages.resolve(section, "in")
