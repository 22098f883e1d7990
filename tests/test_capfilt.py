"""CapFilt's bookkeeping, with stand-ins for captioner and filter: what is kept, dropped and counted, and that units do not matter."""

import types

import numpy as np
import pytest

from vlm_jax import capfilt
from vlm_jax.data import pack
from vlm_jax.data.sources import open_source
from vlm_jax.errors import ConfigError


class Stand:
    """Knows an image by its mean: captions say "level N", and a text matches an image of its level."""
    config = types.SimpleNamespace(system="stand")
    predict = {"generate": None}

    def __init__(self):
        self.predict = {"generate": None, "match": self.match}

    def images(self, images):
        return np.stack([np.full((2, 2, 3), int(np.asarray(x).mean()), np.uint8) for x in images])

    def ids(self, texts):
        texts = [texts] if isinstance(texts, str) else texts
        ids = np.array([[int(t.split()[-1]) if t.split() and t.split()[-1].isdigit() else -1] for t in texts], np.int32)
        return ids, np.ones(ids.shape, bool)

    def match(self, batch):
        right = batch["image"][:, 0, 0, 0].astype(int) == batch["text"][:, 0]
        return {"match": np.stack([np.where(right, -2.0, 2.0), np.where(right, 2.0, -2.0)], 1)}

    def caption(self, images, batch, key, **options):
        import jax
        draws = np.asarray(jax.random.uniform(key, (len(images),)))
        return [f"a picture of level {int(np.asarray(x).mean()) + (u < 0.3)}" for x, u in zip(images, draws)]      # wrong now and then


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Forty pictures of one grey each; every third web text is of another."""
    from PIL import Image
    folder = tmp_path_factory.mktemp("web")
    for i in range(40):
        Image.new("RGB", (4, 4), (5 * i,) * 3).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"level {5 * i + (i % 3 == 0)}")
    return open_source(f"folder:{folder}")


def texts_of(out):
    source = open_source(f"tars:{out}")
    return {source.key(i): source[i]["text"] for i in range(len(source))}


def test_matching_texts_are_kept_and_the_rest_is_counted(noisy, tmp_path):
    made = capfilt.Bootstrapped(noisy, Stand(), Stand(), batch=8, seed=3)
    packed = pack.pack(made, str(tmp_path / "out"), shard=16)
    told = capfilt.count(tmp_path / "out", packed.left_out.get("nothing_kept", (0, ""))[0], 0.5)
    assert told["images"] == 40 and told["web"] == {"kept": 26, "dropped": 14, "dropped_share": 14 / 40}      # the planted ones, all of them
    assert 0 < told["synthetic"]["dropped"] < 25 and sum(told["images_by_texts_kept"].values()) == 40
    kept = texts_of(tmp_path / "out" / "*.tar")
    assert len(kept) == 40 - told["images_by_texts_kept"]["0"]
    for key, texts in kept.items():
        assert texts and all(int(t.split()[-1]) == 5 * int(key[:2]) for t in texts), (key, texts)
    page = capfilt.show(tmp_path / "out", {"threshold": 0.5, **told})
    assert "26 kept, 14 dropped" in page.read_text()


def test_units_draw_what_one_run_draws(noisy, tmp_path):
    whole = capfilt.Bootstrapped(noisy, Stand(), Stand(), batch=8, seed=3)
    pack.pack(whole, str(tmp_path / "whole"))
    for unit, (first, count) in enumerate(((0, 24), (24, 16))):
        pack.pack(capfilt.Bootstrapped(noisy, Stand(), Stand(), first=first, count=count, batch=8, seed=3), str(tmp_path / "units" / str(unit)))
    assert texts_of(tmp_path / "whole" / "*.tar") == texts_of(tmp_path / "units" / "*" / "*.tar")
    pack.pack(capfilt.Bootstrapped(noisy, Stand(), Stand(), batch=8, seed=4), str(tmp_path / "other"))
    assert texts_of(tmp_path / "whole" / "*.tar") != texts_of(tmp_path / "other" / "*.tar")


def test_models_that_cannot_are_refused(noisy, capsys):
    mute = Stand()
    mute.predict = {"match": None}
    with pytest.raises(ConfigError, match="--captioner is a 'stand', which has no 'generate'"):
        capfilt.Bootstrapped(noisy, mute, Stand())
    assert capfilt.main(["--captioner=a", "--filter=b", "--data=folder:x", "--out=o", "--unit=2/2"]) == 43
    assert "--unit='2/2' is not I/N with I below N" in capsys.readouterr().err
