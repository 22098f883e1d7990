"""What ``python -m vlm_jax.doctor`` looks at: the machine (``environment``) and data sets (``dataset``)."""

from __future__ import annotations

import dataclasses

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was looked at, how it stands, and what was seen. An error means that training cannot start."""
    area: str
    name: str
    status: str
    text: str
