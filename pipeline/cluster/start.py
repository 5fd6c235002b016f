"""Start the training ranks, rollout engines and judges of a stage on a Ray cluster, and end them with the stage.

Ranks and engines are colocated: they take turns on the same devices.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import ray

from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import RolloutConfig
from pipeline.cluster.demand import actor_resources
from pipeline.cluster.room import cluster
from pipeline.train.spec import TrainSpec
from pipeline.train.worker import TrainingRanks
from rewards.plugins.names import absolute
from rewards.pool.workers import RewardPool
from rewards.types import Placement
from rollout.checkpoint import refuse_head_size
from rollout.pool import RolloutPool

_start_cluster: ContextVar[Callable[[], None] | None] = ContextVar("_start_cluster", default=None)


@contextmanager
def cluster_when_needed(wait: Callable[[], None]) -> Iterator[None]:
    """Join or start a cluster at the block's first `start_all`, call `wait`, and leave it with the block. Input that is
    refused before, such as bad rows, costs no cluster."""

    def start() -> None:
        _start_cluster.set(None)
        stack.enter_context(cluster())
        wait()

    with ExitStack() as stack:
        token = _start_cluster.set(start)
        try:
            yield
        finally:
            _start_cluster.reset(token)


def start_ranks(spec: TrainSpec) -> TrainingRanks:
    """Start the training ranks; on GPUs each takes half of one, which leaves the other half to an engine.

    Raises ValueError for trainer.offload on a cluster without GPUs.
    """
    if spec.trainer.offload and not ray.cluster_resources().get("GPU"):
        raise ValueError("trainer.offload has no effect without a GPU; remove it")
    return TrainingRanks(spec, resources=_devices())


def start_rollout(
    model: Path,
    config: RolloutConfig,
    *,
    dtype: str,
    seed: int,
    stop_token_ids: Sequence[int] = (),
    with_routes: bool = False,
) -> RolloutPool:
    """Start the rollout engines on the checkpoint `model`.

    stop_token_ids: the chat template's ends of a turn (`pipeline.data.chat.turn_ends`). with_routes: record each
    token's experts. Raises ValueError for a model that engines on this cluster's devices can't compute.
    """
    if not ray.cluster_resources().get("GPU"):
        refuse_head_size(model)
    return RolloutPool(
        model, config, dtype, seed, resources=_devices(), stop_token_ids=stop_token_ids, with_routes=with_routes
    )


def start_rewards(
    specs: list[RewardSpec], config: RewardPoolConfig, placements: Mapping[str, Placement] | None = None
) -> RewardPool:
    """Start the judges. Files of rewards become absolute paths, since workers have their own working directory.

    placements: those of `rewards.pool.guard.Judges`, where it has built the rewards already.
    """
    return RewardPool([absolute(spec) for spec in specs], config, placements=placements)


@contextmanager
def start_all(*starts: Callable[[], Any]) -> Iterator[list[Any]]:
    """Start handles in parallel, since each mostly imports; close them all when the block ends or raises.

    Example:
        with start_all(lambda: start_ranks(spec), lambda: start_rewards(specs, pool)) as (ranks, rewards):
            ...
    """
    start_cluster = _start_cluster.get()
    if start_cluster is not None:
        start_cluster()
    with ExitStack() as stack:
        with ThreadPoolExecutor(len(starts)) as threads:
            futures = [threads.submit(start) for start in starts]
        for future in futures:
            if future.exception() is None:
                stack.callback(future.result().close)
        yield [future.result() for future in futures]  # raises the error of the first start that failed


def _devices() -> dict[str, Any]:
    """Ray resources of one rank or engine on this cluster."""
    return actor_resources(gpus=ray.cluster_resources().get("GPU", 0) >= 1)
