"""A tower alone: a ViT (arXiv 2010.11929) or a BERT (arXiv 1810.04805) as published, for other stages to start from.

Its leaves have the paths that a system of both towers gives them (``image/...``, ``text/...``, ``lm_head/...``), so that the rules
of an ``init`` are short. It is called, not trained.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config as configs
from vlm_jax.errors import ConfigError
from vlm_jax.models import bert, vit
from vlm_jax.models.sizes import sizes
from vlm_jax.nn.pixels import compute_dtype, normalise
from vlm_jax.system import Batch, System, Variables, run


class SingleTower(nn.Module):
    """image: a ViT, or text: a BERT, with the head of masked modelling where ``with_lm_head``."""
    image: vit.ViT | None
    text: bert.Bert | None
    with_lm_head: bool = False
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: Any = jnp.float32

    def setup(self):
        if self.with_lm_head:
            self.lm_head = bert.LanguageHead(self.text.vocab, self.text.width, self.text.eps, self.dtype)

    def encode_image(self, image: jax.Array) -> jax.Array:
        """image [b, h, w, 3] -> tokens [b, n, width]."""
        return self.image(normalise(image, self.mean, self.std))

    def encode_text(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """ids [b, l] -> states [b, l, width]."""
        return self.text(ids, mask)

    def predict_tokens(self, states: jax.Array) -> jax.Array:
        """States -> logits [b, l, vocab]."""
        return self.lm_head(states) @ self.lm_head.vocabulary(self.text.table())

    def __call__(self, image: jax.Array, ids: jax.Array):
        if self.image is not None:
            return self.encode_image(image)
        states = self.encode_text(ids, jnp.ones(ids.shape, bool))
        return self.lm_head(states) if self.with_lm_head else states


def build_model(*, size: int, image: dict | None = None, text: dict | None = None, tokens: dict | None = None, lm_head: bool = False,
                mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), dtype: str = "auto") -> SingleTower:
    """The module of a config's ``model`` section: it has ``image``, or ``text`` and ``tokens``."""
    if (image is None) == (text is None):
        raise ConfigError("model: a tower alone is either image or text")
    dtype = compute_dtype(dtype)
    if image is not None:
        return SingleTower(vit.ViT(**sizes(vit.VARIANTS, image_size=size, dtype=dtype, **image)), None, mean=tuple(mean), std=tuple(std), dtype=dtype)
    return SingleTower(None, bert.Bert(**sizes(bert.VARIANTS, vocab=tokens["vocab"], dtype=dtype, **text)), lm_head, dtype=dtype)


def build(config: Any) -> System:
    """The System of a resolved stage config. Raises ConfigError."""
    model = configs.call(build_model, config.model, "model", size=config.data.size)

    def init(key, spec):
        return model.init(key, jnp.zeros((1, *spec["image"].shape[1:]), jnp.float32), jnp.zeros((1, *spec["text"].shape[1:]), jnp.int32))

    def loss(variables: Variables, carry, batch: Batch, context):
        raise ConfigError("a tower alone has no loss: name its directory in the init of another system's stage, such as configs/albef.py:base")

    def features(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """image [b, n, width], tokens; or text [b, l, width], states."""
        if model.image is not None:
            return {"image": run(model, variables, SingleTower.encode_image, batch["image"])}
        return {"text": run(model, variables, SingleTower.encode_text, batch["text"], batch["text_mask"])}

    def mlm_logits(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """logits fp32 [b, l, vocab] of every position of a (masked) text."""
        return {"logits": run(model, variables, SingleTower.predict_tokens, features(variables, batch)["text"]).astype(jnp.float32)}

    return System(model, init, loss, {"features": features, **({"mlm_logits": mlm_logits} if model.with_lm_head else {})},
                  papers=("2010.11929",) if model.image is not None else ("1810.04805",))
