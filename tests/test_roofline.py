"""What a program asks of a chip, counted in traced and compiled programs whose needs are known; topologies that are not there."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import scaling
from tests.tiny import ROOT, config, tiny
from vlm_jax import forecast, memory, partitioning, roofline
from vlm_jax.errors import ConfigError
from vlm_jax.losses.contrastive import contrastive

LIBTPU = importlib.util.find_spec("libtpu") is not None


def traced(fn, *shapes):
    return jax.jit(fn).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))


def layers(weights, x):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None)), x, weights)[0].sum()


@pytest.mark.parametrize("fn,shapes,products", [
    (lambda a, b: a @ b, [(4, 8), (8, 16)], 4 * 8 * 16),
    (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), [(3, 4, 8), (3, 8, 2)], 3 * 4 * 8 * 2),
    (layers, [(5, 8, 8), (4, 8)], 5 * 4 * 8 * 8),
    (jax.grad(layers), [(5, 8, 8), (4, 8)], 4 * 5 * 4 * 8 * 8),        # forwards, again for the backward, and two gradients
    (lambda x, k: jax.lax.conv(x, k, (2, 2), "VALID"), [(2, 3, 8, 8), (5, 3, 2, 2)], 2 * 5 * 4 * 4 * 3 * 2 * 2),
    (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x), [(4, 4)], 4 * 4 * 4),
])
def test_products_are_counted_in_loops_and_branches(fn, shapes, products):
    assert roofline.flops(traced(fn, *shapes).jaxpr.jaxpr) == 2 * products


@pytest.mark.parametrize("devices", [1, 8])
def test_products_of_the_contrastive_loss_do_not_depend_on_the_mesh(devices):
    mesh, rows, width = partitioning.make_mesh(devices=jax.devices()[:devices]), 4096, 64
    with partitioning.use(mesh):
        found = traced(jax.value_and_grad(lambda *a: contrastive(*a)[0], argnums=(0, 1, 2)), (rows, width), (rows, width), ())
    assert roofline.flops(found.jaxpr.jaxpr) == 4 * 2 * rows * rows * width


def test_exchanges_of_a_compiled_loop_are_counted_each_turn():
    mesh = partitioning.make_mesh("fsdp", devices=jax.devices())
    with partitioning.use(mesh):
        weights = jax.ShapeDtypeStruct((6, 64, 32), jnp.float32, sharding=partitioning.sharding(mesh, ("layers", "embed", "none"), (6, 64, 32)))
        x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=partitioning.sharding(mesh, ("batch", "none"), (16, 64)))
        step = jax.jit(lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ partitioning.shard(w, "none", "none") @ w.T), None), x, w)[0].sum())
        program = step.lower(weights, x).compile()
    traffic, found = roofline.read_program(program.as_text(), 8)
    gathered = found["all-gather"]
    assert gathered.count % 6 == 0 and gathered.sent >= 6 * 7 / 8 * 64 * 32 * 4
    assert sum(c.count for name, c in found.items() if name != "all-gather") <= 7
    assert traffic > 6 * 64 * 32 * 4


# As TPU programs are written: a product with its weights passed round the ring, unrolled once; a gather in parts beside a product.
TPU = """HloModule jit_step, is_scheduled=true

%cond (p.1: (bf16[8,4], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(4)
  %p.1 = (bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p.1), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p.2: (bf16[8,4], u32[])) -> (bf16[8,4], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %p.2 = (bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) parameter(0)
  %w = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.2), index=0
  %j = u32[]{:T(128)} get-tuple-element(%p.2), index=1
  %send = (bf16[8,4]{1,0:S(1)}, bf16[8,4]{1,0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %sent = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%send)
  %next = u32[]{:T(128)} add(%j, %two)
  ROOT %t = (bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) tuple(%sent, %next)
}

%part.1 (q.1: bf16[8,4]) -> bf16[64,4] {
  %q.1 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.1 = bf16[64,4]{1,0:T(8,128)(2,1)} all-gather(%q.1), channel_id=7, replica_groups=mesh['axis_0'=8,'axis_1'=4] {'axis_0'}, dimensions={0}
}

%part.2 (q.2: bf16[8,4]) -> bf16[64,4] {
  %q.2 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.2 = bf16[64,4]{1,0:T(8,128)(2,1)} all-gather(%q.2), channel_id=7, replica_groups=mesh['axis_0'=8,'axis_1'=4] {'axis_0'}, dimensions={0}
}

%update (u.1: f32[12,100], u.2: f32[1,100], u.3: s32[]) -> f32[12,100] {
  %u.1 = f32[12,100]{1,0} parameter(0)
  %u.2 = f32[1,100]{1,0} parameter(1)
  %u.3 = s32[] parameter(2)
  ROOT %dus = f32[12,100]{1,0} dynamic-update-slice(%u.1, %u.2, %u.3, %u.3)
}

ENTRY %main (a: bf16[8,4], b: f32[12,100], c: f32[1,100], d: s32[]) -> f32[12,100] {
  %a = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[12,100]{1,0} parameter(1)
  %c = f32[1,100]{1,0} parameter(2)
  %d = s32[] parameter(3)
  %zero = u32[]{:T(128)} constant(0)
  %start = (bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) tuple(%a, %zero)
  %loop = (bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) while(%start), condition=%cond, body=%body, metadata={op_name="a(b)"}
  %fusion.1 = bf16[64,4]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%part.1
  %fusion.2 = bf16[64,4]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%part.2
  %sum = f32[1,100]{1,0} all-reduce(%c), channel_id=9, replica_groups=[2,16]<=[32], to_apply=%cond
  ROOT %out = f32[12,100]{1,0} fusion(%b, %sum, %d), kind=kLoop, calls=%update
}
"""


def test_a_tpu_program_is_read_as_it_runs():
    traffic, found = roofline.read_program(TPU, 32)
    assert found["collective-permute"] == roofline.Collective(2, 2 * 8 * 4 * 2)      # 4 compared with a counter that grows by 2
    assert found["all-gather"] == roofline.Collective(1, 7 * 8 * 4 * 2)              # two parts of one, over an axis of 8
    assert found["all-reduce"] == roofline.Collective(1, 2 * 15 / 16 * 400)          # groups of 16
    # two gathers, the sum, of the update the slice alone with its place, and twice the counter with its comparison; S(1) is no memory
    assert traffic == 2 * (64 + 512) + (400 + 400) + (400 + 4 + 400) + 2 * (12 + 9)


@pytest.mark.parametrize("groups,size", [
    ("{{0,1,2,3},{4,5,6,7}}", 4), ("[2,16]<=[32]", 16), ("[16,2]<=[2,16]T(1,0)", 2), ("mesh['a'=8,'b'=4] {'a'}", 8), ("mesh['a'=8,'b'=4] {'a','b'}", 32),
    ("mesh['a'=16,'b'=1,'c'=2], device_ids=([2,16]T(1,0)) {'a'}", 16), ("mesh['a'=32,'b'=1] {'a':(1)4}", 4), ("mesh['a'=32]", 32), ("{}", 32),
])
def test_sizes_of_groups(groups, size):
    assert roofline.group_size(f", channel_id=1, replica_groups={groups}, use_global_device_ids=true, metadata={{op_name=\"x\"}}", 32) == size


def test_sizes_of_shapes():
    assert roofline.size("(f32[2,3]{1,0}, /*index=1*/bf16[4]{0:T(8)S(1)}, pred[])") == 24 + 8 + 1
    assert roofline.size("(f32[2,3]{1,0}, bf16[4]{0:T(8)S(1)}, pred[])", memory_alone=True) == 25
    assert roofline.size("f8e4m3fn[10]{0}") == 10


def test_a_step_takes_as_long_as_its_slowest_part():
    chip = roofline.CHIPS["TPU v5 lite"]
    seconds = roofline.Demand(197e12, 0.82e12 * 2, {"all-reduce": roofline.Collective(3, 100e9)}).seconds(chip)
    assert seconds == pytest.approx({"compute": 1.0, "memory": 2.0, "network": 0.5})


@pytest.mark.parametrize("topology,word", [
    ("v5p", "neither a TPU slice nor machines with GPUs; nearest: v5p:4x4x4"), ("v5p:8x8", "3 dimensions; nearest: v5p:4x4x4"),
    ("v5q:4x4", "nearest: 'v5"), ("v5e:4x4x4", "2 dimensions"), ("b300:8", "valid: v5e, v5p, v6e, tpu7x, a100, h100"), ("h100:2x8x8", "h100:4x8"),
])
def test_a_topology_that_is_none(topology, word):
    with pytest.raises(ConfigError, match=word):
        forecast.absent_devices(topology)


@pytest.mark.skipif(LIBTPU, reason="libtpu is installed")
def test_without_the_compiler_its_installation_is_named():
    with pytest.raises(ConfigError, match=r"pip install -e \"\.\[tpu\]\""):
        forecast.absent_devices("v5e:2x4")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU that is not here."""
    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0


def test_a_mesh_may_divide_an_axis_of_a_torus():
    chips = [Chip(i, tuple(map(int, at))) for i, at in enumerate(np.ndindex(4, 4, 4))]
    mesh = partitioning.make_mesh("fsdp_tp", tensor=2, fsdp=32, devices=chips)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 32, "tensor": 2} and len({c.id for c in mesh.devices.flat}) == 64


ABSENT = """
import jax, jax.numpy as jnp
from vlm_jax import forecast, memory, partitioning, roofline
for topology, rules, shape in (("v5e:2x4", "fsdp", (1, 8, 1)), ("v5e:2x2*2", "fsdp", (2, 4, 1)), ("v5p:2x2x2", "fsdp_tp", (1, 4, 2))):
    mesh = partitioning.make_mesh(rules, devices=forecast.absent_devices(topology))
    assert tuple(mesh.shape.values()) == shape, mesh
assert memory.limit_of(mesh) == int(95.74 * 2**30)
with partitioning.use(mesh):
    x = jax.ShapeDtypeStruct((1024, 512), jnp.float32, sharding=partitioning.sharding(mesh, ("batch", "none"), (1024, 512)))
    traced = jax.jit(lambda x: x.sum(0)).trace(x)
    need = roofline.demand(traced, traced.lower().compile(), 8)
assert need.collectives["all-reduce"].sent > 0, need
try:
    forecast.absent_devices("v5e:3x5")
except forecast.ConfigError as error:
    print("refused:", error)
"""


CUDA = any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13)) if importlib.util.find_spec("jax_plugins") else False
GPUS = """
import jax, jax.numpy as jnp
from vlm_jax import forecast, memory, partitioning, roofline
for topology, count in (("h100:2x8", 16), ("a100:8", 8)):
    mesh = partitioning.make_mesh("fsdp", devices=forecast.absent_devices(topology))
    assert mesh.devices.size == count and memory.limit_of(mesh) == 60e9, mesh
    with partitioning.use(mesh):
        x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16, sharding=partitioning.sharding(mesh, ("batch", "none"), (1024, 512)))
        traced = jax.jit(lambda x: x.T @ x).trace(x)
    need = roofline.demand(traced, memory.compiled(traced, mesh), count)
    assert need.flops == 2 * 1024 * 512 * 512 / count and need.sent > 0, need
mesh = partitioning.make_mesh(devices=forecast.absent_devices("rtx4090:1"))
assert mesh.devices.size == 1 and memory.limit_of(mesh) == 18e9, mesh
"""


@pytest.mark.skipif(not CUDA, reason="JAX's CUDA plugin is not installed (pip install -e .[cuda]): no program is compiled for a GPU")
def test_programs_are_compiled_for_gpus_that_are_not_there():
    done = subprocess.run([sys.executable, "-c", GPUS], capture_output=True, text=True,
                          env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(CUDA, reason="the CUDA plugin is installed")
def test_without_the_gpu_compiler_its_installation_is_named():
    with pytest.raises(ConfigError, match=r"pip install -e \"\.\[cuda\]\""):
        forecast.absent_devices("h100:8")


@pytest.mark.skipif(not LIBTPU, reason="libtpu is not installed (pip install -e .[tpu]): no program is compiled for a TPU")
def test_programs_are_compiled_for_chips_that_are_not_there():
    done = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True,
                          env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0 and "refused: --topology='v5e:3x5'" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("name,arg,parameters", [("clip", "l14", 427_616_513), ("coca", "2b", None), ("albef", "base", None), ("clip", "small", None)])
def test_published_sizes_need_neither_data_nor_tokenizer(name, arg, parameters):
    whole = config(name, arg)
    stage = forecast.open_stage(whole, whole.stage_order[0])
    assert stage.plan.count() == parameters or parameters is None
    assert stage.data.train == "" and stage.examples == forecast.EXAMPLES


@pytest.mark.parametrize("name,arg,stage,dtype,trained", [
    ("blip2", "finetune,24gb", "caption", "bfloat16", 107_133_696), ("blip2", "flant5xl,finetune,16gb,tune=lora", "vqa", "int8", 18_874_368),
    ("instructblip", "finetune,16gb,bert=vocab.txt", "vqa", "int8", 188_837_376)])
def test_recipes_for_one_card_read_kept_features_beside_narrow_weights(name, arg, stage, dtype, trained):
    found = forecast.open_stage(config(name, arg), stage)
    assert found.plan.count(trained=True) == trained and "image" not in found.step_spec and found.step_spec["image_states"].shape == (64, 1, 257, 1408)
    for tower in ("image", "language"):
        kernels = [p for p in found.plan.frozen if p.startswith(f"{tower}/blocks/") or p.startswith(f"{tower}/decoder/blocks/")]
        kernels = [found.plan.shapes[p].dtype.name for p in kernels if p.endswith("/kernel")]
        assert kernels and set(kernels) == {dtype}


def test_what_the_step_does_not_read_is_counted():
    found = forecast.open_stage(config("blip2", "finetune,24gb"), "caption")
    traced = memory.trace_step(found, partitioning.make_mesh(devices=jax.devices()[:1]))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(traced.lower().in_avals))
    assert held > sum(x.size * x.dtype.itemsize for x in found.plan.shapes.values())


def test_a_vocabulary_of_unknown_size_is_asked_for():
    whole = tiny("clip", tokenizer="sentencepiece:/not/there.model")
    with pytest.raises(ConfigError, match="tokens.vocab=32000"):
        forecast.open_stage(whole, "pretrain")


def test_main_takes_a_topology_with_compile_only_alone():
    done = subprocess.run([sys.executable, "-m", "vlm_jax.main", "--config=tests/tiny.py:clip", "--topology=v5e:2x4"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 43 and "no use without --compile_only" in done.stderr


def test_rows_of_the_scaling_table_are_distinct_and_known():
    rows = list(scaling.rows())
    assert len({row.key for row in rows}) == len(rows) > 40
    for topology in {row.topology for row in rows}:
        generation, shape = topology.split(":")
        assert shape.partition("*")[0].count("x") + 1 == forecast.GENERATIONS[generation]


def test_the_scaling_table_says_what_does_not_fit():
    record = dict(table="recipe", config="clip.py:l14", topology="v5e:2x4", batch=0)
    whole = dict(record, devices=8, batch=64, peak_bytes=2e9, limit_bytes=16e9, flops=1e12, collectives={"all-reduce": [3, 1e9]},
                 seconds=dict(compute=0.1, memory=0.2, network=0.05), step_seconds=0.2)
    text = scaling.table([whole, dict(record, too_large="RESOURCE_EXHAUSTED: Used 20G of 15.75G hbm.")])
    assert "| clip.py:l14 | v5e:2x4 | 8 | 64 | 2 GB | 16 GB | 1 | 1 GB | 200 ms | memory | 320 |" in text and "too large: Used 20G" in text


@pytest.mark.parametrize("rules,count,slices,given,sizes", [
    ("dp", 8, 1, {}, (8, 1, 1)), ("fsdp", 8, 1, {}, (1, 8, 1)), ("fsdp_tp", 8, 1, {}, (1, 4, 2)), ("fsdp_tp", 7, 1, {}, (1, 7, 1)),
    ("fsdp", 512, 1, {}, (4, 128, 1)), ("fsdp", 512, 2, {}, (4, 128, 1)), ("fsdp_tp", 512, 1, {}, (2, 128, 2)), ("fsdp", 192, 1, {}, (2, 96, 1)),
    ("fsdp", 512, 1, {"data": 1}, (1, 512, 1)), ("fsdp", 512, 1, {"fsdp": 256}, (2, 256, 1)), ("fsdp_tp", 8, 1, {"data": 2, "fsdp": 1}, (2, 1, 4)),
])
def test_sizes_of_meshes(rules, count, slices, given, sizes):
    assert tuple(partitioning.mesh_sizes(rules, count, slices, **given).values()) == sizes


def test_slices_share_the_data_axis():
    with pytest.raises(ValueError, match="mesh.data=3 does not divide over 2 slices; nearest: 2"):
        partitioning.mesh_sizes("fsdp", 12, 2, data=3)


@pytest.mark.parametrize("name,arg", [("clip", "l14"), ("coca", "2b"), ("albef", "base"), ("clip", "bigg14")])
def test_state_of_a_device_does_not_grow_with_the_devices(name, arg):
    """Elements of parameters that a device holds: on 8 times the devices no more than on a few."""
    whole = config(name, arg)
    plan = forecast.open_stage(whole, whole.stage_order[0]).plan

    def held(count):
        sizes = partitioning.mesh_sizes("fsdp", count)
        return sum(x.size // roofline.math.prod(sizes[a] for part in partitioning.spec(plan.axes[p], x.shape, sizes) if part
                                                for a in ((part,) if isinstance(part, str) else part)) for p, x in plan.shapes.items())

    assert held(1024) <= held(512) <= held(128) <= held(64) < plan.count() / 25
