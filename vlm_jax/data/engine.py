"""Grain, the engine behind the pipeline, also where array_record has no build.

Grain imports array_record for a file format that nothing here reads, on every system but Windows. Where it cannot be
imported, Grain gets a stand-in for the two names it asks for, which refuses to be used.
"""

from __future__ import annotations

import sys
import types

try:
    from array_record.python import array_record_data_source  # noqa: F401
except ImportError:
    class Absent:
        def __init__(self, *_, **__):
            raise ImportError("array_record is not installed: ArrayRecord files cannot be read")

    NAME = "array_record.python.array_record_data_source"
    sys.modules[NAME] = types.ModuleType(NAME)
    sys.modules[NAME].ArrayRecordDataSource, sys.modules[NAME].PathLikeOrFileInstruction = Absent, object
    try:
        import grain
    finally:
        del sys.modules[NAME]      # others must see that it is absent
else:
    import grain

__all__ = ["grain"]
