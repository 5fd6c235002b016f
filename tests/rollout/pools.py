"""An engine in a Ray of its own, for the tests of a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from pipeline.cluster.room import quoted_interpreter
from rollout.pool import RolloutPool
from tests.rollout import tiny


@contextmanager
def engine_pool(checkpoint: Path) -> Iterator[RolloutPool]:
    """A pool of one engine on the checkpoint of a tiny model."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=quoted_interpreter())
    pool = RolloutPool(checkpoint, tiny.CONFIG, "float32", seed=0)
    close = pool.close  # a test may replace it
    yield pool
    close()
    ray.shutdown()
