"""Starting a stage's training ranks, engines and judges on a Ray cluster, and ending them with the stage.

Ranks and engines are colocated: they share the same devices and take turns.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import ray

from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import RolloutConfig
from pipeline.cluster.demand import options
from pipeline.cluster.room import cluster
from pipeline.train.spec import TrainSpec
from pipeline.train.worker import TrainingRanks
from rewards.plugins import absolute
from rewards.pool import RewardPool
from rollout.checkpoint import refuse_head_size
from rollout.pool import RolloutPool

_start_cluster: ContextVar[Callable[[], None] | None] = ContextVar("_start_cluster", default=None)


@contextmanager
def cluster_when_needed(ready: Callable[[], None]) -> Iterator[None]:
    """A cluster that starts with the first handle that `start_all` makes in the block, and ends with the block; `ready`
    is called in between. What is refused before that, such as bad rows, is refused without one."""

    def start() -> None:
        _start_cluster.set(None)
        stack.enter_context(cluster())
        ready()

    with ExitStack() as stack:
        token = _start_cluster.set(start)
        try:
            yield
        finally:
            _start_cluster.reset(token)


def start_ranks(spec: TrainSpec) -> TrainingRanks:
    """Training ranks with `spec`'s model; on GPUs a rank takes half of one, so that an engine fits beside it.

    Raises ValueError for a setting that has no effect on this cluster's devices.
    """
    if spec.trainer.offload and not ray.cluster_resources().get("GPU"):
        raise ValueError("trainer.offload has no effect without a GPU; remove it")
    return TrainingRanks(spec, resources=_devices())


def start_rollout(
    model: Path, config: RolloutConfig, *, dtype: str, seed: int, ends: Sequence[int] = (), with_routes: bool = False
) -> RolloutPool:
    """Engines that speak with the weights in `model` until one of `ends`, which the chat template puts at the end of a
    turn (`pipeline.data.chat.turn_ends`), and that return the experts of each token `with_routes`. Raises
    ValueError for a model that engines on this cluster's devices can't compute."""
    if not ray.cluster_resources().get("GPU"):
        refuse_head_size(model)
    return RolloutPool(model, config, dtype, seed, resources=_devices(), ends=ends, with_routes=with_routes)


def start_rewards(specs: list[RewardSpec], config: RewardPoolConfig) -> RewardPool:
    """Judges. A reward's file is named by its whole path, since workers have a folder of their own."""
    return RewardPool([absolute(spec) for spec in specs], config)


@contextmanager
def start_all(*starts: Callable[[], Any]) -> Iterator[list[Any]]:
    """Start handles side by side, since each spends its time importing; close them all at the end, however it comes."""
    start_cluster = _start_cluster.get()
    if start_cluster is not None:
        start_cluster()
    with ExitStack() as stack:
        with ThreadPoolExecutor(len(starts)) as threads:
            futures = [threads.submit(start) for start in starts]
        for future in futures:
            if future.exception() is None:
                stack.callback(future.result().close)
        yield [future.result() for future in futures]  # raises what the first failed start raised


def _devices() -> dict[str, Any]:
    """What one rank or engine asks Ray for; whether that is to be had, `await_room` has found out."""
    return options(gpus=ray.cluster_resources().get("GPU", 0) >= 1)
