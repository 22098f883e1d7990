"""VQ-KD, BEiT v2's image tokenizer: patches become codes from which a teacher's features can be read (arXiv 2208.06366; microsoft/unilm ``beit2``).

The teacher is the image tower of a CLIP; DINO's are out of scope. Its leaves lie under ``teacher/`` and are to be left out of ``trainable``.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from vlm_jax import config as configs
from vlm_jax.errors import ConfigError
from vlm_jax.losses.terms import weigh
from vlm_jax.models import vit
from vlm_jax.models.sizes import sizes
from vlm_jax.models.teacher import PatchTeacher, build_teacher
from vlm_jax.nn import codebook
from vlm_jax.nn.chunk import chunked
from vlm_jax.nn.initializers import by_depth
from vlm_jax.nn.pixels import compute_dtype, normalise
from vlm_jax.nn.unit import unit
from vlm_jax.system import Batch, Context, Output, System, Variables, run

BOOK = "codebook"      # the collection that the codes live in
ADOPT = (("teacher/image/position_embed", "image/position_embed", "resize_positions"), ("teacher/((image|image_head)/.*)", r"\1", "copy"))


class Vqkd(nn.Module):
    """encoder: a ViT over the image; decoder: a ViT over the grid of code vectors, a patch each.

    codes, code_width: of the codebook, unit vectors. features: width of what is decoded, the teacher's.
    """
    encoder: vit.ViT
    decoder: vit.ViT
    codes: int
    code_width: int
    features: int
    teacher: PatchTeacher | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: Any = jnp.float32

    def setup(self):
        self.encoder_head = codebook.TaskLayer(self.code_width)                      # fp32 at any compute dtype
        self.decoder_head = codebook.TaskLayer(self.features, self.dtype)
        for name, value in codebook.empty(self.codes, self.code_width).items():
            self.variable(BOOK, name, lambda value=value: value)

    def encode(self, image: jax.Array) -> jax.Array:
        """image [b, h, w, 3] -> unit vectors fp32 [b, n, code_width], a row for each patch, row by row."""
        tokens = self.encoder(normalise(image, self.mean, self.std))
        return unit(self.encoder_head(tokens[:, int(self.encoder.class_token):]))

    def decode(self, vectors: jax.Array) -> jax.Array:
        """Vectors of the codes [b, n, code_width] -> fp32 [b, n, features]."""
        side = self.decoder.image_size
        tokens = self.decoder(vectors.reshape(-1, side, side, self.code_width))
        return self.decoder_head(tokens[:, int(self.decoder.class_token):]).astype(jnp.float32)

    def teach(self, image: jax.Array) -> jax.Array:
        """image [b, h, w, 3] -> the teacher's features fp32 [b, n, features], from pixels in its own colours."""
        pixels = normalise(image, self.mean, self.std) * jnp.asarray(self.std) + jnp.asarray(self.mean)
        return jax.lax.stop_gradient(self.teacher(jnp.clip(pixels, 0, 1)))

    def __call__(self, image: jax.Array):
        taught = () if self.teacher is None else self.teach(image)
        return self.decode(self.encode(image)), taught


def build_model(*, encoder: dict, decoder: dict, codes: int, code_width: int, size: int, features: int = 0, teacher: dict | None = None, mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5), dtype: str = "auto") -> Vqkd:
    """The module of a config's ``model`` section. teacher: the ``model`` section of a CLIP ("init": of the one that the stage starts from), None for a
    tokenizer that is not trained any more, which says ``features`` itself."""
    dtype = compute_dtype(dtype)
    encoder = vit.ViT(**sizes(vit.VARIANTS, image_size=size, dtype=dtype, **encoder))
    side = size // encoder.patch
    decoder = vit.ViT(**{**sizes(vit.VARIANTS, dtype=dtype, **decoder), "image_size": side, "patch": 1})
    taught = None
    if teacher is not None:
        if not isinstance(teacher, dict):
            raise ConfigError(f"model.teacher={teacher!r} is not the model section of a CLIP; nearest: 'init', with init=DIR")
        section = {k: v for k, v in teacher.items() if k != "dtype"}
        taught = configs.call(build_teacher, section, "model.teacher", size=size, compute=dtype)
        if taught.image.image_size // taught.image.patch != side:
            raise ConfigError(f"model.teacher.image.patch={taught.image.patch} gives another grid than model.encoder.patch={encoder.patch}; "
                              f"nearest: {encoder.patch}")
        if features not in (0, taught.embed):
            raise ConfigError(f"model.features={features}, but the teacher's are {taught.embed} wide; nearest: {taught.embed}")
        features = taught.embed
    if not features:
        raise ConfigError("model.features=0: without model.teacher it must say how wide the decoded features are; nearest: 512")
    return Vqkd(encoder, decoder, codes, code_width, features, taught, tuple(mean), tuple(std), dtype)


def build_loss(*, weights: dict, decay: float = 0.99) -> dict[str, Any]:
    """The ``loss`` section. weights: of ``rec``, 1 - cosine to the teacher, and ``commit``, the distance to the codes. decay: of the codebook's averages."""
    if not 0 < decay < 1:
        raise ConfigError(f"loss.decay={decay} must be between 0 and 1; nearest: 0.99")
    return dict(weights=weights, decay=decay)


def build(config: Any) -> System:
    """The System of a resolved stage config. Raises ConfigError."""
    model = configs.call(build_model, config.model, "model", size=config.data.size)
    o = configs.call(build_loss, config.loss, "loss")
    microbatch, apply = config.data.microbatch, functools.partial(run, model)

    def init(key, spec):
        variables = model.init(key, jnp.zeros((1, *spec["image"].shape[1:]), jnp.float32))
        params = dict(variables["params"])
        for tower in ("encoder", "decoder"):
            if getattr(model, tower).init_scheme == "beit":
                params[tower] = {**params[tower], "blocks": by_depth(params[tower]["blocks"])}
        return {**variables, "params": params}

    def loss(variables: Variables, carry, batch: Batch, context: Context):
        if model.teacher is None:
            raise ConfigError("model.teacher is missing: there is nothing to learn from; nearest: model.teacher='init', with init=DIR of a CLIP")
        z = chunked(lambda rows, _: apply(variables, Vqkd.encode, rows["image"]), microbatch)({"image": batch["image"]})
        rows, book = jax.lax.stop_gradient(z).reshape(-1, model.code_width), dict(variables[BOOK])
        if context.train:
            start = codebook.draw(context.key("kmeans"), len(rows), model.codes) if "kmeans_start" not in batch else batch["kmeans_start"]
            book = codebook.begin(book, rows, start)
        ids = codebook.look_up(rows, book["table"])
        found = book["table"][ids].reshape(z.shape)
        commit = jnp.square(found - z).mean()

        def cosines(rows, _):
            decoded = apply(variables, Vqkd.decode, rows["vectors"])
            return (unit(decoded) * unit(apply(variables, Vqkd.teach, rows["image"]))).sum(-1)

        straight = z + jax.lax.stop_gradient(found - z)
        cosine = chunked(cosines, microbatch)({"vectors": straight, "image": batch["image"]}).mean()
        total, raw = weigh({"rec": 1 - cosine, "commit": commit}, o["weights"])
        if context.train:
            book = codebook.follow(book, rows, ids, o["decay"])
        metrics = {**raw, "usage": codebook.usage(book["count"], o["decay"]), "perplexity": codebook.perplexity(book["count"])}
        return total, Output(metrics, moving=traverse_util.flatten_dict({BOOK: book}, sep="/") if context.train else {})

    def tokens(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """ids int32 [b, n], the code of each patch in raster order; similarity fp32 [b, n], its cosine; codes, how many there are."""
        z, table = apply(variables, Vqkd.encode, batch["image"]), variables[BOOK]["table"]
        ids = codebook.look_up(z, table)
        return {"ids": ids, "similarity": (z * table[ids]).sum(-1), "codes": jnp.int32(model.codes)}

    def reconstruct(variables: Variables, batch: Batch, *, key=None) -> dict[str, jax.Array]:
        """What ``tokens`` says; decoded fp32 [b, n, features], read from the codes (``ids`` of the batch where it has some); with a teacher target
        fp32 [b, n, features], its own features, and cosine [b, n] between them."""
        out = {"ids": batch["ids"]} if "ids" in batch else tokens(variables, batch)
        out["decoded"] = apply(variables, Vqkd.decode, variables[BOOK]["table"][out["ids"]])
        if model.teacher is not None and "image" in batch:
            out["target"] = apply(variables, Vqkd.teach, batch["image"])
            out["cosine"] = (unit(out["decoded"]) * unit(out["target"])).sum(-1)
        return out

    return System(model, init, loss, {"tokens": tokens, "reconstruct": reconstruct}, papers=("2208.06366",), adopt={"clip": ADOPT})
