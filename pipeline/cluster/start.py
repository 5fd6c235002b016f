"""Start the training ranks, rollout engines and judges of a stage on a Ray cluster, and end them with the stage.

On a cluster with GPUs every actor gets the devices of the stage's placement (`pipeline.cluster.bundles`), and engines
start before ranks. Without GPUs all start at once and take turns on the cores of all nodes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs.model import AnyDtype
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import RolloutConfig
from pipeline.cluster.bundles import StageDevices
from pipeline.cluster.demand import CPU_SHARE
from pipeline.cluster.placement import StagePlacement, spread
from pipeline.cluster.room import announced, cluster, nodes
from pipeline.train.spec import TrainSpec
from pipeline.train.worker import TrainingRanks
from rewards.plugins.names import absolute
from rewards.pool.workers import RewardPool
from rewards.types import Placement
from rollout.checkpoint import refuse_head_size, resolve_dtype
from rollout.device import DeviceState
from rollout.pool import RolloutPool

_start_cluster: ContextVar[Callable[[], None] | None] = ContextVar("_start_cluster", default=None)
_devices: ContextVar[StageDevices | None] = ContextVar("_devices", default=None)


@contextmanager
def cluster_when_needed(wait: Callable[[], StagePlacement | None]) -> Iterator[None]:
    """Join or start a cluster at the block's first `start_all`, call `wait`, and leave it with the block. Input that is
    refused before, such as bad rows, costs no cluster.

    wait: returns the stage's placement when its devices are free; None on a cluster without GPUs.
    """

    def start() -> None:
        _start_cluster.set(None)
        stack.enter_context(cluster())
        if (placement := wait()) is not None:
            devices = StageDevices(placement)
            stack.callback(devices.close)
            _devices.set(devices)

    with ExitStack() as stack:
        tokens = _start_cluster.set(start), _devices.set(None)
        try:
            yield
        finally:
            _start_cluster.reset(tokens[0])
            _devices.reset(tokens[1])


def start_ranks(spec: TrainSpec) -> TrainingRanks:
    """Start the training ranks, on GPUs after the stage's engines.

    Raises ValueError for trainer.offload on a cluster without GPUs.
    """
    if spec.trainer.offload and not _has_gpus():
        raise ValueError("trainer.offload has no effect without a GPU; remove it")
    if (devices := _devices.get()) is None:
        resources = _without_placement(spec.trainer.num_ranks, 1)
    else:
        if devices.placement.of("engine"):
            devices.engines_started.result()
        resources = devices.ranks()
    with announced(f"starting {spec.trainer.num_ranks} training rank{'s' if spec.trainer.num_ranks > 1 else ''}"):
        return TrainingRanks(spec, resources=resources)


def start_rollout(
    model: Path,
    config: RolloutConfig,
    *,
    dtype: AnyDtype,
    seed: int,
    stop_token_ids: Sequence[int] = (),
    with_routes: bool = False,
    with_kept: bool = False,
) -> RolloutPool:
    """Start the rollout engines on the checkpoint `model`; where ranks share their devices, they sleep at the end.

    stop_token_ids: the chat template's ends of a turn (`pipeline.data.chat.turn_ends`). with_routes: record each
    token's experts. with_kept: record the tokens that top_k and top_p keep. Raises ValueError for a model that engines
    on this cluster's devices can't compute, and for records of engines of several processes on CPUs.
    """
    if not _has_gpus():
        refuse_head_size(model)
        if (with_routes or with_kept) and config.tensor_parallel_size > 1:
            remedy = "routing_replay to none or policy" if with_routes else "remove sampling.top_k and sampling.top_p"
            raise ValueError(
                f"rollout.tensor_parallel_size={config.tensor_parallel_size}: without GPUs an engine records "
                f"{'routes' if with_routes else 'kept tokens'} in a single process only; set it to 1, or {remedy}"
            )
    devices = _devices.get()
    resources = devices.engines() if devices else _without_placement(config.num_engines, config.tensor_parallel_size)
    try:
        with announced(f"starting {config.num_engines} vLLM engine{'s' if config.num_engines > 1 else ''}"):
            pool = RolloutPool(
                model,
                config,
                resolve_dtype(dtype, model),
                seed,
                resources=resources,
                stop_token_ids=stop_token_ids,
                with_routes=with_routes,
                with_kept=with_kept,
            )
        if devices and any(engine.share < 1 for engine in devices.placement.of("engine")):
            pool.to(DeviceState.ASLEEP)
    except Exception as error:
        if devices and not devices.engines_started.done():
            devices.engines_started.set_exception(error)
        raise
    if devices and not devices.engines_started.done():
        devices.engines_started.set_result(None)
    return pool


def start_rewards(
    specs: list[RewardSpec],
    config: RewardPoolConfig,
    placements: Mapping[str, Placement] | None = None,
    *,
    suite: str = "",
) -> RewardPool:
    """Start the judges. Files of rewards become absolute paths, since workers have their own working directory.

    placements: those of `rewards.pool.guard.Judges`, where it has built the rewards already. suite: the suite that they
    judge in; empty for a stage's own rewards.
    """
    devices = _devices.get()
    resources = devices.judges(suite) if devices else None
    with announced(f"starting the judges of {', '.join(spec.label for spec in specs)}"):
        return RewardPool([absolute(spec) for spec in specs], config, placements=placements, resources=resources)


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
            futures = [threads.submit(copy_context().run, start) for start in starts]
        for future in futures:
            if future.exception() is None:
                stack.callback(future.result().close)
        yield [future.result() for future in futures]  # raises the error of the first start that failed


def _has_gpus() -> bool:
    return ray.cluster_resources().get("GPU", 0) >= 1


def _without_placement(count: int, num_gpus: int) -> list[dict[str, Any]]:
    """Ray options of `count` ranks or engines: on GPUs outside a stage, such as a benchmark's; else on all nodes by
    their cores. Ray alone would fill a node by half before it takes the next, ten processes at our CPU_SHARE."""
    if _has_gpus():
        return [{"num_cpus": 1, "num_gpus": num_gpus}] * count
    # Soft: a process that replaces a lost one starts elsewhere where its node is gone.
    return [
        CPU_SHARE | {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=True)}
        for node in spread(count, nodes())
    ]
