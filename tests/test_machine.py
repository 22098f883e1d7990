"""The right build, dtype and kernel for a machine, and a CPU run without what only POSIX has."""

import ast
import logging
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest

from vlm_jax.nn import attention, pixels
from vlm_jax.nn.pixels import choose_dtype, compute_dtype

ROOT = pathlib.Path(__file__).resolve().parents[1]


def requirements(monkeypatch):
    """What setup.py hands to setuptools."""
    import setuptools
    seen = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: seen.update(kwargs))
    monkeypatch.chdir(ROOT)
    exec(compile(ast.parse((ROOT / "setup.py").read_text()), "setup.py", "exec"), {})
    return seen


def test_every_build_of_jax_has_the_tested_bounds(monkeypatch):
    seen = requirements(monkeypatch)
    lines = [*seen["install_requires"], *(line for extra in seen["extras_require"].values() for line in extra)]
    found = {m[1]: m[2] for m in (re.fullmatch(r"(jax(?:\[\w+\])?)([<>=].*)", line) for line in lines) if m}
    assert found.keys() == {"jax", "jax[cuda13]", "jax[cuda12]", "jax[tpu]"}
    assert len(set(found.values())) == 1 and re.fullmatch(r">=0\.\d+,<0\.\d+", found["jax"])
    for extra in ("cuda", "cuda12", "tpu"):
        assert len(seen["extras_require"][extra]) == 1


@pytest.mark.parametrize("name,backend,capability,dtype,word", [
    ("auto", "cpu", None, "float32", "CPU"),
    ("auto", "tpu", None, "bfloat16", "TPU"),
    ("auto", "gpu", 9.0, "bfloat16", "native"),
    ("auto", "gpu", 8.0, "bfloat16", "native"),
    ("auto", "gpu", 7.5, "float32", "7.5"),
    ("auto", "gpu", 7.0, "float32", "loss scaling"),
    ("auto", "gpu", None, "bfloat16", "native"),        # not CUDA: every GPU of AMD's that JAX supports has it
    ("bfloat16", "gpu", 7.5, "bfloat16", "configured"),
    ("float32", "tpu", None, "float32", "configured"),
])
def test_dtype(name, backend, capability, dtype, word):
    chosen, reason = choose_dtype(name, backend, capability)
    assert chosen == dtype and word in reason


def test_float16_is_no_dtype_of_a_model():
    with pytest.raises(ValueError, match="float16.*nearest: 'bfloat16'"):
        choose_dtype("float16", "gpu", 7.5)


def test_an_old_gpu_is_told_once_and_gets_plain_attention(monkeypatch, caplog):
    pixels._log_once.cache_clear()
    monkeypatch.setattr(attention, "target", lambda: "gpu")
    monkeypatch.setattr(attention, "cuda_capability", lambda: 7.5)
    with caplog.at_level(logging.WARNING, "vlm_jax.dtype"):
        assert compute_dtype("auto") == compute_dtype("auto") == jnp.float32
    assert len(caplog.records) == 1 and "7.5" in caplog.text
    for dtype in (jnp.float32, jnp.bfloat16):
        assert attention.choose("gpu", dtype, 64, 257, 257, False, 7.5)[0] == "xla"


def test_training_needs_nothing_that_only_posix_has(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.without_posix", "--config=tests/tiny.py:clip", f"--workdir={tmp_path}", "--platform=cpu",
               "--config.stages.pretrain.steps=3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "1_pretrain" / "checkpoints" / "3" / "manifest.json").exists() and (tmp_path / "1_pretrain" / "DONE").exists()
