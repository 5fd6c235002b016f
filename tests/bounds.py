"""Bounds on the processor time of a test's own work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def processor_seconds(at_most: float) -> Iterator[None]:
    """Fail if the block takes this process more than `at_most` seconds of processor time. Other processes do not count,
    and the bounds are at least ten times what a 2.6 GHz server core needs: they catch work that grows with the square
    of the input, which takes minutes, and not a slow machine."""
    began = time.process_time()
    yield
    assert time.process_time() - began < at_most
