"""Waiting for what other processes do."""

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], timeout_s: float, explain: Callable[[], object] = str) -> None:
    """Wait until a condition holds; a failed test says what `explain` returns."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)
