"""A tower's fields from its VARIANTS table and what a config says beside the name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import nearest


def sizes(variants: Mapping[str, Mapping[str, Any]], *, variant: str = "", **fields: Any) -> dict[str, Any]:
    """``variants[variant]`` updated with ``fields``, or ``fields`` alone. Raises ValueError for an unknown variant."""
    if not variant:
        return fields
    if variant not in variants:
        raise ValueError(f"variant={variant!r} is not known{nearest(variant, variants)}")
    return {**variants[variant], **fields}
