import contextlib

import pytest

from tests.faults import runs


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while runs.STARTED:
        with contextlib.suppress(ProcessLookupError):
            runs.STARTED.pop().kill()
