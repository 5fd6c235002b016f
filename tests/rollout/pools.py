"""An engine in a Ray of its own, for the tests of a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from pipeline.cluster.room import quoted_interpreter
from rollout.pool import RolloutPool
from rollout.types import Completion, CompletionColumns, Group, StoredGroup
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


def whole(group: StoredGroup) -> Group:
    """The group with its tokens, fetched from the object store."""
    columns: list[CompletionColumns] = ray.get([done.columns for done in group.completions], timeout=60)
    completions = [
        Completion(
            own.token_ids.tolist(),
            own.logprobs.tolist(),
            done.text,
            done.finish_reason,
            done.policy_version,
            own.routed_experts,
            own.kept_tokens,
        )
        for done, own in zip(group.completions, columns, strict=True)
    ]
    routes = None if group.routed_experts is None else ray.get(group.routed_experts, timeout=60)
    return Group(group.index, group.prompt_ids, completions, routes)
