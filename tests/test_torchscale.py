"""BEiT-3 against torchscale, the package that its authors run it on, on fresh random weights of sizes that no stored case has.

torchscale pins a timm and a fairscale that the [parity] extra cannot have beside open_clip, so it is no part of it. What it uses of them works in
newer ones: pip install --no-deps torchscale==0.3.0 fairscale==0.4.13, in an environment with [parity].
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import stage as stages
from vlm_jax.importers import cli, write
from vlm_jax.importers.release import Hints
from vlm_jax.system import run
from vlm_jax.systems.beit3 import Beit3
from vlm_jax.train.state import merge

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    WHY = "torchscale cannot be imported here: pip install --no-deps torchscale==0.3.0 fairscale==0.4.13"
    torch = pytest.importorskip("torch", reason=WHY)
    official = pytest.importorskip("torchscale.model.BEiT3", reason=WHY)
    EncoderConfig = pytest.importorskip("torchscale.architecture.config", reason=WHY).EncoderConfig

# (image, patch, width, heads, mlp, layers, vocabulary, rows of text positions, length)
SIZES = [(15, 5, 24, 3, 40, 3, 57, 17, 11), (21, 3, 20, 5, 28, 1, 33, 13, 7), (14, 7, 36, 2, 100, 5, 101, 30, 23)]


class Case:
    """torchscale's model with random weights in all leaves, what it answers, and ours with the same weights."""

    def __init__(self, folder, size):
        image, patch, width, heads, mlp, layers, vocab, rows, length = size
        torch.manual_seed(image)
        self.theirs = official.BEiT3(EncoderConfig(
            img_size=image, patch_size=patch, vocab_size=vocab, multiway=True, layernorm_embedding=False, normalize_output=True, no_output_layer=True,
            encoder_embed_dim=width, encoder_attention_heads=heads, encoder_ffn_embed_dim=mlp, encoder_layers=layers, max_source_positions=rows)).eval()
        with torch.no_grad():
            for name, p in self.theirs.named_parameters():
                std = p[0].numel() ** -0.5 if p.ndim > 1 and "embed" not in name else 0.3
                p.copy_(std * torch.randn(p.shape) + (p.ndim == 1 and name.endswith("weight")))
        rng = np.random.default_rng(0)
        self.image = rng.standard_normal((3, image, image, 3)).astype(np.float32)
        self.ids, self.real = rng.integers(3, vocab, (3, length)).astype(np.int32), np.arange(length) < np.array([length, 2, length // 2 + 1])[:, None]
        self.masked = rng.random((3, (image // patch) ** 2)) < 0.4
        weights = {f"beit3.{n}": p.detach().numpy() for n, p in self.theirs.state_dict().items()}
        self.head = rng.standard_normal((vocab, width)).astype(np.float32)
        write.write_safetensors(folder / "in.safetensors", {**weights, "mlm_head.weight": self.head, "mlm_head.bias": np.zeros(vocab, np.float32)})
        self.folder = cli.import_release("beit3", str(folder / "in.safetensors"), folder / "out", Hints(image_heads=heads), say=lambda line: None)
        self.section = stages.configs.from_json((self.folder / "config.json").read_text())
        self.leaves = stages.read_weights(self.folder)

    def official(self, image, text, masked=False):
        """[b, 1 + n + l, width] as a torch tensor."""
        return self.theirs(textual_tokens=torch.from_numpy(self.ids).long() if text else None,
                           visual_tokens=torch.from_numpy(self.image.transpose(0, 3, 1, 2).copy()) if image else None,
                           text_padding_position=~torch.from_numpy(self.real) if text else None,
                           vision_masked_position=torch.from_numpy(self.masked) if masked else None)["encoder_out"]

    def ours(self, image, text, masked=False, section=None, leaves=None):
        system = stages.resolve(section or self.section, "parity").system
        args = (self.image if image else None, self.ids if text else None, self.real if text else None, self.masked if masked else None)
        return jax.jit(lambda p: run(system.model, merge(p, {}, {}), Beit3.encode, *args))(leaves or self.leaves)

    def kept(self, states, image, text):
        """Rows that are no padding, as one array."""
        patches = self.masked.shape[1] + 1 if image else 0
        return np.asarray(states)[np.concatenate([np.ones((3, patches), bool), self.real] if text else [np.ones((3, patches), bool)], 1)]


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size[0]}px-{size[2]}")
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("torchscale"), request.param)


@pytest.mark.parametrize("image, text, masked", [(True, True, False), (True, True, True), (True, False, True), (False, True, False)])
def test_states_are_torchscales(case, image, text, masked):
    with torch.no_grad():
        wanted = case.kept(case.official(image, text, masked).numpy(), image, text)
    np.testing.assert_allclose(case.kept(case.ours(image, text, masked), image, text), wanted, atol=5e-5)


def test_gradients_are_torchscales(case):
    """Of the sum of squares of all states that are no padding."""
    shape = (3, case.masked.shape[1] + 1 + case.ids.shape[1], 1)
    rows = np.concatenate([np.ones((3, case.masked.shape[1] + 1), bool), case.real], 1).reshape(shape)
    case.theirs.zero_grad()
    (case.official(True, True, True) * torch.from_numpy(rows)).pow(2).mean().backward()
    system = stages.resolve(case.section, "parity").system

    def loss(params):
        return jnp.square(run(system.model, merge(params, {}, {}), Beit3.encode, case.image, case.ids, case.real, case.masked) * rows).mean()

    found = jax.device_get(jax.jit(jax.grad(loss))(case.leaves))
    theirs = dict(case.theirs.named_parameters())
    for path, name in (("text/token_embed/table", "text_embed.weight"), ("image/mask_embed", "vision_embed.mask_token"),
                       ("text/position_embed", "encoder.embed_positions.B.weight"), ("output_norm/text/scale", "encoder.layer_norm.B.weight")):
        wanted = theirs[name].grad.numpy().reshape(found[path].shape)
        np.testing.assert_allclose(found[path], wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=path)
    for path, name in (("mlp/image/up/kernel", "ffn.A.fc1.weight"), ("mlp/text/down/kernel", "ffn.B.fc2.weight")):
        for layer, own in enumerate(found[f"blocks/{path}"]):
            wanted = theirs[f"encoder.layers.{layer}.{name}"].grad.numpy().T
            np.testing.assert_allclose(own, wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=f"{path} {layer}")


@pytest.mark.parametrize("mistake", ["eps", "swapped", "heads"])
def test_a_planted_mistake_shows(case, mistake):
    section, leaves = stages.ConfigDict(case.section.to_dict()), dict(case.leaves)
    if mistake == "eps":
        section.model.tower.eps = 1e-2
    elif mistake == "swapped":
        other = {p: p.replace("/text/", "/new/").replace("/image/", "/text/").replace("/new/", "/image/") for p in leaves if p.startswith("blocks/mlp")}
        leaves |= {p: leaves[q] for p, q in other.items()}
    else:
        section.model.tower.heads = 1
        leaves = {p: x if "attn" not in p or "norm" in p else x.reshape(x.shape[0], 1, -1, x.shape[-1]) if p.endswith("out/kernel") else
                  x.reshape(*x.shape[:-2], 1, -1) if "out" not in p else x for p, x in leaves.items()}
    with torch.no_grad():
        wanted = case.kept(case.official(True, True).numpy(), True, True)
    assert np.abs(case.kept(case.ours(True, True, section=section, leaves=leaves), True, True) - wanted).max() > 1e-3
