"""Wall-clock seconds by phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up seconds by phase.

    Example:
        watch = Stopwatch()
        with watch("train"):
            train()
        watch.lap()  # {"time/train_seconds": 1.5, "time/step_seconds": 1.6}
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._started = time.monotonic()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the block's seconds to `phase`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - started

    def lap(self) -> dict[str, float]:
        """`time/<phase>_seconds` and `time/step_seconds` since the last lap; starts the next lap."""
        now = time.monotonic()
        metrics = {f"time/{phase}_seconds": seconds for phase, seconds in self._seconds.items()}
        metrics["time/step_seconds"] = now - self._started
        self._seconds, self._started = {}, now
        return metrics
