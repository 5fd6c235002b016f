"""The machines of a stage: training ranks, engines and judges, placed on one Ray cluster.

Where they live is decided here and nowhere else: a stage's driver holds handles. Ranks and engines are colocated: they
share the same devices and take turns.
"""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import RolloutConfig
from configs.stages import GRPOConfig
from pipeline.checkpoints import Checkpoints
from pipeline.sync import sync_weights
from pipeline.train.engine import TrainSpec
from pipeline.train.worker import Policy
from rewards.plugins import absolute
from rewards.pool import RewardPool
from rollout.pool import RolloutPool


@contextmanager
def cluster() -> Iterator[None]:
    """A Ray cluster to run on: the one RAY_ADDRESS names, or a local one that ends with the block.

    Workers find this installation before any folder of the user's that has a room's name.
    """
    own = str(Path(__file__).parents[1])
    environment = {"PYTHONPATH": os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])])}
    local: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"address": "local", "include_dashboard": False}
    ray.init(runtime_env={"env_vars": environment}, log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Fleet:
    """The handles of a GRPO stage."""

    policy: Policy
    rollout: RolloutPool
    rewards: RewardPool
    checkpoints: Checkpoints
    config: GRPOConfig
    probe: list[list[int]]

    def sync_weights(self, version: int) -> dict[str, float]:
        """Send the policy to the engines as `version` and prove that it arrived (pipeline.sync)."""
        with self.policy.awake(), self.rollout.awake():
            return sync_weights(self.policy, self.rollout, self.config.sync, probe=self.probe, version=version)


def start_policy(spec: TrainSpec) -> Policy:
    """Training ranks with `spec`'s model; on GPUs a rank takes half of one, so that an engine fits beside it.

    Raises ValueError for a setting that has no effect on this cluster's devices.
    """
    if spec.trainer.offload_optimizer and not ray.cluster_resources().get("GPU"):
        raise ValueError("trainer.offload_optimizer has no effect without a GPU; remove it")
    return Policy(spec, resources=_devices(spec.trainer.num_ranks))


def start_rollout(model: Path, config: RolloutConfig, *, dtype: str, seed: int) -> RolloutPool:
    """Engines that speak with the weights in `model`."""
    return RolloutPool(model, config, dtype, seed, resources=_devices(config.num_engines * config.tensor_parallel_size))


def start_rewards(specs: list[RewardSpec], config: RewardPoolConfig) -> RewardPool:
    """Judges. A reward's file is named by its whole path, since workers have a folder of their own."""
    return RewardPool([absolute(spec) for spec in specs], config)


@contextmanager
def start_all(*starts: Callable[[], Any]) -> Iterator[list[Any]]:
    """Start handles side by side, since each spends its time importing; close them all at the end, however it comes."""
    with ExitStack() as stack:
        with ThreadPoolExecutor(len(starts)) as threads:
            futures = [threads.submit(start) for start in starts]
        for future in futures:
            if future.exception() is None:
                stack.callback(future.result().close)
        yield [future.result() for future in futures]  # raises what the first failed start raised


def _devices(count: int) -> dict[str, Any]:
    """What each of `count` actors asks Ray for: half a GPU, since ranks and engines share them in pairs. On a machine
    without GPUs almost nothing: they take turns on all cores.

    Raises ValueError when the cluster has fewer GPUs than actors, which Ray would wait for without a word.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus == 0:
        return {"num_cpus": 0.1}
    if count > gpus:
        raise ValueError(f"{count} GPUs asked for, the cluster has {gpus}; lower num_ranks or num_engines")
    return {"num_cpus": 1, "num_gpus": 0.5}
