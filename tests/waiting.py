"""Waits of tests for what another process or thread does."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object]) -> None:
    """Return once `condition()` is true. It has no limit of its own, since a machine may be slow: pytest's ends a test
    that waits in vain."""
    while not condition():
        time.sleep(0.02)
