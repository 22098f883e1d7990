"""Public data sets as they are published, read from local files: "published:SET:SPLIT:DIR".

``table`` says what each needs and where it stands; ``captions``, ``questions``, ``choices``, ``dialogues`` and ``videos`` read their formats,
and ``source`` makes samples of them. Nothing is ever downloaded, and images are read one by one when a sample is.
"""

from vlm_jax.data.published.reader import DataSet
from vlm_jax.data.published.source import PublishedSource
from vlm_jax.data.published.table import SETS

__all__ = ["SETS", "DataSet", "PublishedSource"]
