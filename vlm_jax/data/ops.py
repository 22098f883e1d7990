"""Image decoding and the operations of an augmentation chain, on Pillow.

A chain is written "random_resized_crop(64, scale=0.8..1)|flip|rand_augment(2,5)"; an operation's
``size`` is the pipeline's where it is not given. Operations take (image, rng, arguments) and return
an image. Geometry runs in the image's own mode; RGB comes at the end, after the crop, as CLIP's
preprocessing has it. Filters are bicubic with antialiasing (Pillow's own).
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vlm_jax.data.bad import BadSample
from vlm_jax.data.chain import parse_chain

MAX_PIXELS = 2**26
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
BICUBIC = Image.Resampling.BICUBIC
ORIENTATION = 0x0112     # EXIF's tag, and what undoes each of its values
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes JPEG, PNG, WebP, GIF or BMP to an image of mode RGB, L or CMYK.

    Of an animation the first frame; transparency is laid over white; 16-bit grey is rounded to 8. An image
    whose EXIF data say that the camera was turned is turned upright (the CLIP lineage's loaders leave it lying). Raises BadSample: "empty_image", "not_an_image",
    "too_many_pixels" (told from the header, before any pixel is decoded), "truncated_image", "broken_image".
    """
    with _opened(data, max_pixels) as image:
        return _upright(image)


def decode_frames(data: bytes, which: Callable[[int], Iterable[int]], max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
    """The frames ``which(how many there are)`` of an animation (GIF, WebP), as ``decode`` gives them; of a picture that does not move, itself alone.

    Raises BadSample as ``decode`` does.
    """
    frames = []
    with _opened(data, max_pixels) as image:
        count = getattr(image, "n_frames", 1)
        for number in which(count) if count > 1 else (0,):
            image.seek(number)
            frames.append(_upright(image).copy())      # the image itself goes on to the next frame
    return frames


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose pixels are not yet decoded; what is wrong with it, then or within, is a BadSample."""
    if not data:
        raise BadSample("empty_image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise BadSample("too_many_pixels", f"{image.width} x {image.height}, at most {max_pixels}")
        yield image
    except Image.UnidentifiedImageError:
        raise BadSample("not_an_image", f"starts with {data[:16]!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("too_many_pixels", str(error)) from None
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError ...
        raise BadSample("truncated_image" if "truncated" in str(error) else "broken_image", str(error)) from None


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    if "exif" in image.info and (turn := TURNS.get(image.getexif().get(ORIENTATION))) is not None:
        image = image.transpose(turn)
    return _flatten(image)


def to_image(picture: Any) -> Image.Image:
    """A path, encoded bytes, Pillow image or uint8 [h, w, 3] (or [h, w] grey) -> an image as ``decode`` gives.

    Raises BadSample, OSError for a file that cannot be read, ValueError for an array of another kind.
    """
    if isinstance(picture, Image.Image):
        return _flatten(picture)
    if isinstance(picture, bytes):
        return decode(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise ValueError(f"an image array of {picture.dtype} {picture.shape} is not uint8 [h, w, 3]")
        return _flatten(Image.fromarray(picture))
    with open(picture, "rb") as file:
        return decode(file.read())


def _flatten(image: Image.Image) -> Image.Image:
    """To RGB, L or CMYK: palettes resolved, transparency over white, 16 bits to 8."""
    if image.mode in ("RGB", "L", "CMYK") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


# ---- geometry ----------------------------------------------------------------------------------

def resize(image, rng, size: int):
    """Shortest side to ``size``; the longer one is rounded down, as torchvision does."""
    side = min(image.size)
    if side == size:
        return image
    return image.resize(tuple(size if s == side else max(1, int(size * s / side)) for s in image.size), BICUBIC)


def squash(image, rng, size: int):
    """To size x size, the aspect ignored."""
    return image if image.size == (size, size) else image.resize((size, size), BICUBIC)


def center_crop(image, rng, size: int):
    """The middle size x size; smaller images are padded with black."""
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def random_crop(image, rng, size: int):
    """A random size x size; an image with a shorter side is enlarged first."""
    if min(image.size) < size:
        image = resize(image, rng, size)
    left, top = (int(rng.integers(0, s - size + 1)) for s in image.size)
    return image.crop((left, top, left + size, top + size))


def random_resized_crop(image, rng, size: int, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """A crop of ``scale`` of the area and ``ratio`` width:height, resized to size x size; the crop is drawn by torchvision's
    rule. No copy of the crop is made: at its edges the filter reads the picture's own pixels beyond."""
    width, height = image.size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        u, v, x, y = rng.random(4).tolist()
        area = width * height * (scale[0] + (scale[1] - scale[0]) * u)
        aspect = math.exp(low + (high - low) * v)
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            break
    else:  # the largest centred crop of an allowed ratio
        aspect = min(max(width / height, ratio[0]), ratio[1])
        w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
        left, top = (width - w) // 2, (height - h) // 2
    return image.resize((size, size), BICUBIC, (left, top, left + w, top + h))


def pad(image, rng, fill: int = 255):
    """To a square of the longer side, centred on grey level ``fill``."""
    side = max(image.size)
    out = Image.new("RGB", (side, side), (fill,) * 3)
    out.paste(_rgb(image), ((side - image.width) // 2, (side - image.height) // 2))
    return out


def flip(image, rng, p: float = 0.5):
    """Left-right with probability ``p``."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < p else image


# ---- colour ------------------------------------------------------------------------------------

def color_jitter(image, rng, brightness: float = 0.32, contrast: float = 0.32, saturation: float = 0.32,
                 hue: float = 0.08, p: float = 0.8):
    """With probability ``p``, in random order: brightness, contrast, saturation (factors in 1 +- the number),
    hue (turns)."""
    if rng.random() >= p:
        return image
    image = _rgb(image)
    draws = rng.uniform(-1, 1, 4).tolist()
    for i in rng.permutation(4).tolist():
        if i == 3:
            if hue:
                h, s, v = image.convert("HSV").split()
                turn = round(draws[3] * hue * 256)
                image = Image.merge("HSV", (h.point([(x + turn) % 256 for x in range(256)]), s, v)).convert("RGB")
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
            image = enhance(image).enhance(max(0.0, 1 + draws[i] * (brightness, contrast, saturation)[i]))
    return image


def grayscale(image, rng, p: float = 0.2):
    """Grey with probability ``p``."""
    return image.convert("L") if rng.random() < p else image


def _affine(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128,) * 3)


_RAND_AUGMENT = {  # (image, level in 0..1, sign)
    "identity": lambda im, level, sign: im,
    "autocontrast": lambda im, level, sign: ImageOps.autocontrast(im),
    "equalize": lambda im, level, sign: ImageOps.equalize(im),
    "brightness": lambda im, level, sign: ImageEnhance.Brightness(im).enhance(0.1 + 1.8 * level),
    "sharpness": lambda im, level, sign: ImageEnhance.Sharpness(im).enhance(0.1 + 1.8 * level),
    "shear_x": lambda im, level, sign: _affine(im, (1, 0.3 * level * sign, 0, 0, 1, 0)),
    "shear_y": lambda im, level, sign: _affine(im, (1, 0, 0, 0.3 * level * sign, 1, 0)),
    "translate_x": lambda im, level, sign: _affine(im, (1, 0, 10 * level * sign, 0, 1, 0)),
    "translate_y": lambda im, level, sign: _affine(im, (1, 0, 0, 0, 1, 10 * level * sign)),
    "rotate": lambda im, level, sign: im.rotate(30 * level * sign, Image.Resampling.BILINEAR, fillcolor=(128,) * 3),
}


def rand_augment(image, rng, n: int, m: float, p: float = 0.5):
    """``n`` operations drawn from ALBEF's list (none inverts colours) at magnitude ``m`` of 10, each done
    with probability ``p``. Ranges at m = 10 are the release's: shear 0.3, translate 10 pixels, rotate 30 degrees."""
    image, names = _rgb(image), list(_RAND_AUGMENT)
    for i in rng.integers(0, len(names), n).tolist():
        if rng.random() < p:
            image = _RAND_AUGMENT[names[i]](image, m / 10, 1 if rng.random() < 0.5 else -1)
    return image


# ---- erasing

def random_erasing(image, rng, p: float = 0.25, area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), mean: float = 0.5, std: float = 0.5):
    """With probability ``p`` noise in a rectangle of ``area`` of the image and ``ratio`` height:width (arXiv 1708.04896, in timm's mode "pixel"): each
    value by itself from N(mean, std), of 1 = white, cut to what a pixel can be."""
    if rng.random() >= p:
        return image
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target = rng.uniform(*area) * image.width * image.height
        aspect = math.exp(rng.uniform(low, high))
        h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w < image.width and 0 < h < image.height:
            left, top = int(rng.integers(0, image.width - w + 1)), int(rng.integers(0, image.height - h + 1))
            noise = (255 * (mean + std * rng.standard_normal((h, w, 3)))).clip(0, 255).astype(np.uint8)
            image = _rgb(image).copy()
            image.paste(Image.fromarray(noise), (left, top))
            break
    return image


OPS: Mapping[str, Callable] = {f.__name__: f for f in (
    resize, squash, center_crop, random_crop, random_resized_crop, pad, flip, color_jitter, grayscale, rand_augment,
    random_erasing)}

FIXED = ("resize", "squash", "center_crop", "pad")


class Chain:
    """A parsed chain; calling it with (image, rng) gives uint8 [size, size, 3].

    ``image`` is a Pillow image or uint8 [h, w, 3]. Building it raises ValueError for unknown operations and
    arguments, and where a test picture (three times as wide as high, or the reverse) comes out in any shape
    but size x size.
    """

    def __init__(self, text: str, size: int):
        self.text, self.size = text, size
        self._calls = [(function, arguments) for _, function, arguments in parse_chain(text, OPS, 2, {"size": size})]
        for shape in ((3 * size, size), (size, 3 * size)):
            result = self.apply(Image.new("RGB", shape), np.random.default_rng(0))
            if result.size != (size, size):
                raise ValueError(f"augment={text!r} turns a {shape[0]} x {shape[1]} image into {result.width} x "
                                 f"{result.height}, not size={size} squared; end it with center_crop, squash or "
                                 f"a random crop")

    def __call__(self, image: Any, rng: np.random.Generator) -> np.ndarray:
        return np.asarray(self.apply(image, rng))

    @property
    def drawn(self) -> list[str]:
        """The operations that draw numbers: without any, a picture always comes out the same."""
        return [function.__name__ for function, _ in self._calls if function.__name__ not in FIXED]

    def apply(self, image: Any, rng: np.random.Generator) -> Image.Image:
        """The result as a Pillow image of mode RGB."""
        if isinstance(image, np.ndarray):
            image = to_image(image)
        for function, arguments in self._calls:
            image = function(image, rng, **arguments)
        return _rgb(image)
