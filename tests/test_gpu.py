"""What only a GPU can show; skipped where there is none (the suite's own processes run on the CPU, so the checks have one of theirs)."""

import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU here: nvidia-smi is missing")

GRADIENTS = """
import jax, jax.numpy as jnp, numpy as np
from vlm_jax.nn import attention

def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)

assert attention.target() == "gpu"
for causal in attention.CAUSAL:
    for rows, keys in ((50, 50), (257, 257), (77, 77), (1, 36), (32, 257), (7, 4), (4, 7)):
        given = draw(0, 4, rows, 4, 64), draw(1, 4, keys, 4, 64), draw(2, 4, keys, 4, 64)
        weight = draw(3, 4, rows, 4, 64).astype(jnp.float32)
        def of(fn):
            return jax.jit(jax.grad(lambda *x: (fn(*x).astype(jnp.float32) * weight).sum(), (0, 1, 2)))
        fused = of(lambda *x: attention.attend(*x, causal=causal))(*given)
        plain = of(lambda *x: attention.attend_xla(*x, None, causal))(*(x.astype(jnp.float32) for x in given))
        for a, b in zip(fused, plain):
            apart = float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel()))
            assert apart < 0.01, (causal, rows, keys, apart)
"""


def test_gradients_of_cudnn_attention_at_even_and_odd_lengths():
    done = subprocess.run([sys.executable, "-c", GRADIENTS], env={**os.environ, "JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
