"""Prompt templates for zero-shot classification, by name."""

from __future__ import annotations

from vlm_jax.errors import ConfigError, nearest

# The 80 of CLIP's ImageNet evaluation (openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet).
_CLIP80 = """a bad photo of a {}.|a photo of many {}.|a sculpture of a {}.|a photo of the hard to see {}.|
a low resolution photo of the {}.|a rendering of a {}.|graffiti of a {}.|a bad photo of the {}.|
a cropped photo of the {}.|a tattoo of a {}.|the embroidered {}.|a photo of a hard to see {}.|
a bright photo of a {}.|a photo of a clean {}.|a photo of a dirty {}.|a dark photo of the {}.|a drawing of a {}.|
a photo of my {}.|the plastic {}.|a photo of the cool {}.|a close-up photo of a {}.|
a black and white photo of the {}.|a painting of the {}.|a painting of a {}.|a pixelated photo of the {}.|
a sculpture of the {}.|a bright photo of the {}.|a cropped photo of a {}.|a plastic {}.|a photo of the dirty {}.|
a jpeg corrupted photo of a {}.|a blurry photo of the {}.|a photo of the {}.|a good photo of the {}.|
a rendering of the {}.|a {} in a video game.|a photo of one {}.|a doodle of a {}.|a close-up photo of the {}.|
a photo of a {}.|the origami {}.|the {} in a video game.|a sketch of a {}.|a doodle of the {}.|a origami {}.|
a low resolution photo of a {}.|the toy {}.|a rendition of the {}.|a photo of the clean {}.|
a photo of a large {}.|a rendition of a {}.|a photo of a nice {}.|a photo of a weird {}.|a blurry photo of a {}.|
a cartoon {}.|art of a {}.|a sketch of the {}.|a embroidered {}.|a pixelated photo of a {}.|itap of the {}.|
a jpeg corrupted photo of the {}.|a good photo of a {}.|a plushie {}.|a photo of the nice {}.|
a photo of the small {}.|a photo of the weird {}.|the cartoon {}.|art of the {}.|a drawing of the {}.|
a photo of the large {}.|a black and white photo of a {}.|the plushie {}.|a dark photo of a {}.|itap of a {}.|
graffiti of the {}.|a toy {}.|itap of my {}.|a photo of a cool {}.|a photo of a small {}.|a tattoo of the {}."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
    "clip7": ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
              "a {} in a video game.", "art of the {}.", "a photo of the small {}."),
    "clip80": tuple(t.strip() for t in _CLIP80.split("|")),
    "scene": ("a {}", "the {}", "one {}", "a picture of a {}"),
}


def templates(name: str | tuple[str, ...]) -> tuple[str, ...]:
    """The templates of a name, or the given ones; each has one ``{}``. Raises ConfigError otherwise."""
    if isinstance(name, str):
        if name not in TEMPLATES:
            raise ConfigError(f"templates={name!r} is not known{nearest(name, TEMPLATES)}")
        return TEMPLATES[name]
    for template in name:
        if template.count("{}") != 1:
            raise ConfigError(f"templates: {template!r} has not exactly one {{}}; nearest: 'a photo of a {{}}.'")
    if not name:
        raise ConfigError("templates=() gives no prompt; nearest: 'plain'")
    return tuple(name)
