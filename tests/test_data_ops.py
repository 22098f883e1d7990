"""Decoding every kind of image, and the operations of a chain."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlm_jax.data.bad import BadSample
from vlm_jax.data.ops import OPS, ORIENTATION, Chain, decode, to_image


def encode(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gradient(width=40, height=30):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8))


def rgb(data):
    return np.asarray(decode(data).convert("RGB"))


def test_plain_formats_agree():
    image = gradient()
    expected = np.asarray(image)
    assert (rgb(encode(image)) == expected).all()
    assert (rgb(encode(image, "WEBP", lossless=True)) == expected).all()
    assert np.abs(rgb(encode(image, "JPEG", quality=95)).astype(int) - expected).mean() < 3
    assert (rgb(encode(image.convert("L"))) == np.asarray(image.convert("L"))[..., None]).all()
    assert (rgb(encode(image.convert("1")))[..., 0] == np.asarray(image.convert("1")) * 255).all()


def test_cmyk_keeps_its_colours():
    red = Image.new("RGB", (16, 16), (250, 10, 20)).convert("CMYK")
    pixel = rgb(encode(red, "JPEG", quality=95))[8, 8].astype(int)
    assert np.abs(pixel - (250, 10, 20)).max() < 12
    cropped = Chain("resize|center_crop", 8)(decode(encode(red, "JPEG")), None)[4, 4].astype(int)
    assert np.abs(cropped - (250, 10, 20)).max() < 12


def test_sixteen_bits_are_rounded_to_eight():
    wide = np.array([[0, 257, 128 * 257, 65535, 300]], np.uint16)
    assert rgb(encode(Image.fromarray(wide)))[0, :, 0].tolist() == [0, 1, 128, 255, 1]


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 0, 0, 255), (200, 0, 0, 0), (0, 0, 0, 128)])
    for data in (encode(image), encode(image, "WEBP", lossless=True, exact=True)):
        assert rgb(data)[0].tolist() == [[200, 0, 0], [255, 255, 255], [127, 127, 127]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert rgb(encode(grey))[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 9, 9, 9])
    palette.putdata([0, 1])
    assert rgb(encode(palette, "PNG", transparency=1))[0].tolist() == [[0, 0, 255], [255, 255, 255]]
    assert rgb(encode(palette))[0].tolist() == [[0, 0, 255], [9, 9, 9]]
    assert rgb(encode(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3)))[0, 0].tolist() == [255] * 3


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (6, 6), c) for c in ((255, 0, 0), (0, 255, 0))]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
        assert rgb(data)[3, 3].tolist() == [255, 0, 0], kind


def test_one_pixel_fits_every_size():
    data = encode(Image.new("RGB", (1, 1), (10, 20, 30)))
    for chain in ("resize|center_crop", "squash", "random_resized_crop|flip", "pad|resize",
                  "random_crop|rand_augment(2,9,p=1)"):
        out = Chain(chain, 16)(decode(data), np.random.default_rng(0))
        assert out.shape == (16, 16, 3) and out.dtype == np.uint8
    assert (Chain("squash", 4)(decode(data), None) == (10, 20, 30)).all()


def header_only_png(width, height):
    import struct
    import zlib
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0")
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
                                           for c in (head, data, b"IEND"))


JPEG = encode(gradient(200, 200), "JPEG")


@pytest.mark.parametrize("data,reason", [
    (b"", "empty_image"),
    (b"<!DOCTYPE html><html>404</html>", "not_an_image"),
    (JPEG[:len(JPEG) // 2], "truncated_image"),
    (encode(gradient(200, 200))[:300], "truncated_image"),
    (encode(gradient(), "WEBP")[:-40], "broken_image"),
    (JPEG[:20], "not_an_image"),
    (header_only_png(60_000, 60_000), "too_many_pixels"),
    (header_only_png(9_000, 9_000), "too_many_pixels"),
    (header_only_png(0, 5), "not_an_image"),
    (bytes(1000), "not_an_image"),
    (encode(gradient(), "TIFF"), "not_an_image"),
])
def test_unreadable_images_have_a_reason(data, reason):
    with pytest.raises(BadSample) as caught:
        decode(data)
    assert caught.value.reason == reason


def test_pixel_limit_is_an_option():
    data = encode(gradient(40, 30))
    decode(data, max_pixels=1200)
    with pytest.raises(BadSample, match="^too_many_pixels: 40 x 30, at most 1199"):
        decode(data, max_pixels=1199)


def test_random_damage_is_always_a_bad_sample_or_an_image():
    rng = np.random.default_rng(0)
    files = [encode(gradient(), k) for k in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]
    for trial in range(200):
        data = bytearray(files[trial % len(files)])
        for at in rng.integers(0, len(data), 8):
            data[at] = rng.integers(0, 256)
        try:
            assert decode(bytes(data)).mode in ("RGB", "L", "CMYK")
        except BadSample as error:
            assert error.reason in ("truncated_image", "broken_image", "not_an_image", "too_many_pixels")


def test_clip_preprocessing_is_resize_then_crop_then_rgb():
    image = gradient(101, 67)
    out = Chain("resize(32)|center_crop(32)", 32)(image, None)
    scaled = image.resize((int(32 * 101 / 67), 32), Image.Resampling.BICUBIC)
    left = round((scaled.width - 32) / 2)
    assert (out == np.asarray(scaled.crop((left, 0, left + 32, 32)))).all()
    assert (Chain("resize|center_crop", 32)(np.asarray(image), None) == out).all()


def test_random_chains_are_pure_in_their_generator():
    chain = Chain("random_resized_crop(24, scale=0.3..1)|flip|color_jitter(p=1)|grayscale|rand_augment(2,7)", 24)
    outs = [chain(gradient(), np.random.default_rng(s)) for s in (1, 1, 2, 3)]
    assert (outs[0] == outs[1]).all() and (outs[0] != outs[2]).any() and (outs[2] != outs[3]).any()


def test_random_resized_crop_keeps_its_ranges(monkeypatch):
    boxes = []
    real = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, filter, box: boxes.append(box) or real(self, size, filter, box))
    image = Image.new("RGB", (100, 80))
    for seed in range(200):
        OPS["random_resized_crop"](image, np.random.default_rng(seed), 8, scale=(0.2, 0.6), ratio=(0.5, 2.0))
    sizes = np.array([(r - l, b - t) for l, t, r, b in boxes])
    areas, ratios = sizes.prod(1) / 8000, sizes[:, 0] / sizes[:, 1]
    assert 0.18 < areas.min() < 0.25 and 0.5 < areas.max() < 0.62
    assert 0.47 < ratios.min() < 0.7 and 1.5 < ratios.max() < 2.1
    assert all(l >= 0 and t >= 0 and r <= 100 and b <= 80 for l, t, r, b in boxes)
    boxes.clear()
    OPS["random_resized_crop"](Image.new("RGB", (500, 3)), np.random.default_rng(0), 8, scale=(1.0, 1.0))
    l, t, r, b = boxes[0]
    assert (t, b) == (0, 3) and r - l == 4 and abs(l + r - 500) <= 1  # the fallback: centred, widest allowed


def test_random_resized_crop_is_the_crop_resized():
    image, rng = gradient(120, 90), np.random.default_rng(5)
    out = np.asarray(OPS["random_resized_crop"](image, rng, 30, scale=(0.3, 0.3), ratio=(1.0, 1.0)))
    _, _, x, y = np.random.default_rng(5).random(4)
    side = round((0.3 * 120 * 90) ** 0.5)
    left, top = int(x * (121 - side)), int(y * (91 - side))
    cropped = np.asarray(image.crop((left, top, left + side, top + side)).resize((30, 30), Image.Resampling.BICUBIC))
    assert (out[2:-2, 2:-2] == cropped[2:-2, 2:-2]).all() and np.abs(out.astype(int) - cropped).max() < 16   # edges apart


def test_flip_and_pad_and_squash():
    image = gradient(4, 2)
    flipped = np.asarray(OPS["flip"](image, np.random.default_rng(0), p=1.0))
    assert (flipped == np.asarray(image)[:, ::-1]).all()
    padded = np.asarray(OPS["pad"](image, None, fill=9))
    assert padded.shape == (4, 4, 3) and (padded[1:3] == np.asarray(image)).all() and (padded[[0, 3]] == 9).all()
    assert OPS["squash"](image, None, 5).size == (5, 5)


def test_rand_augment_never_inverts():
    white = Image.new("RGB", (16, 16), (255, 255, 255))
    means = [np.asarray(OPS["rand_augment"](white, np.random.default_rng(s), 2, 7, p=1.0)).mean() for s in range(60)]
    assert min(means) > 60 and len({round(m) for m in means}) > 3


def test_random_erasing_fills_a_rectangle_with_noise():
    shares = []
    for seed in range(60):
        image = Image.new("RGB", (50, 40), (255, 255, 255))
        out = np.asarray(OPS["random_erasing"](image, np.random.default_rng(seed), p=0.5, mean=0.4, std=0.1))
        changed = (out < 255).any(-1)
        rows, columns = changed.any(1), changed.any(0)
        assert (out[~changed] == 255).all() and changed.sum() >= 0.99 * rows.sum() * columns.sum() and np.asarray(image).min() == 255
        shares.append(changed.mean())
        if changed.sum() > 100:
            assert abs(out[changed].mean() / 255 - 0.4) < 0.03 and abs(out[changed].std() / 255 - 0.1) < 0.02
    shares = np.array(shares)
    assert 0.3 < (shares == 0).mean() < 0.7 and shares[shares > 0].min() > 0.01 and 0.2 < shares.max() < 0.36


@pytest.mark.parametrize("text,message", [
    ("resise(64)", "'resise'.*nearest: 'resize'"),
    ("resize(64)|centre_crop(64)", "nearest: 'center_crop'"),
    ("random_resized_crop(64, scales=0.8..1)", "'scales'.*nearest: 'scale'"),
    ("rand_augment(2)", "lacks the argument 'm'"),
    ("resize(64, 3)", "takes 1 arguments"),
    ("resize(size=64, size=64)", "given twice"),
    ("resize(64)", "192 x 64|64 x 192"),
    ("resize(64)|center_crop(32)", "32 x 32, not size=64"),
    ("flip", "not size=64"),
    ("resize 64", "not an operation"),
])
def test_wrong_chains_are_refused_at_once(text, message):
    with pytest.raises(ValueError, match=message):
        Chain(text, 64)


def test_to_image_takes_what_people_have(tmp_path):
    image = gradient()
    (tmp_path / "a.png").write_bytes(encode(image))
    for picture in (image, np.asarray(image), encode(image), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert (np.asarray(to_image(picture)) == np.asarray(image)).all()
    with pytest.raises(ValueError, match="float64"):
        to_image(np.zeros((3, 3, 3)))


@pytest.mark.parametrize("value", range(1, 9))
def test_photographs_of_a_turned_camera_are_turned_upright(value):
    """As Pillow's own exif_transpose does."""
    exif = Image.Exif()
    exif[ORIENTATION] = value
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.uint8)).save(out, "PNG", exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(out.getvalue())))
    np.testing.assert_array_equal(np.asarray(decode(out.getvalue())), np.asarray(wanted))
    assert wanted.size == ((24, 16) if value < 5 else (16, 24))
