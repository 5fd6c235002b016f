"""The machines of a stage: training ranks, engines and judges, placed on one Ray cluster.

Where they live is decided here: a stage's driver holds handles. Ranks and engines are colocated: they share the same
devices and take turns.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from configs.grpo import GRPOConfig
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import RolloutConfig
from configs.stages import AnyStage, Recipe
from pipeline.checkpoints import Checkpoints
from pipeline.demand import Demand, Node, demand, options
from pipeline.errors import RunStopped
from pipeline.sync import sync_weights
from pipeline.train.spec import TrainSpec
from pipeline.train.worker import Policy
from rewards.plugins import absolute
from rewards.pool import RewardPool
from rollout.checkpoint import refuse_head_size
from rollout.pool import RolloutPool

ROOM_SECONDS = 24 * 3600.0
"""Longest a stage waits for others to leave the devices it asks for."""
LOOK_SECONDS = 5.0


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


def nodes() -> list[Node]:
    """The machines of the cluster that are alive."""
    free = available_resources_per_node()
    return [
        Node(
            node["NodeManagerHostname"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            free.get(node["NodeID"], {}).get("CPU", 0.0),
            free.get(node["NodeID"], {}).get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def await_room(config: AnyStage, recipe: Recipe | None, tell: Callable[[str], None]) -> None:
    """Return when what the stage of `recipe` asks of the cluster is free; why it waits, and for whom, is told when that
    changes.

    Raises ValueError with the reason when the cluster can never give it, RunStopped when it was not free for a day.
    """
    asked, told, deadline = demand(config, recipe), "", time.monotonic() + ROOM_SECONDS
    never = asked.never(nodes())
    if never:
        raise ValueError(never)
    while reason := asked.busy(nodes()):
        reason = f"waiting for room: {reason}{_holders(asked)}"
        if time.monotonic() > deadline:
            raise RunStopped(f"{reason}; gave up after {ROOM_SECONDS / 3600:g} hours, the same command goes on")
        if reason != told:
            tell(reason)
            told = reason
        time.sleep(LOOK_SECONDS)


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
    if spec.trainer.offload and not ray.cluster_resources().get("GPU"):
        raise ValueError("trainer.offload has no effect without a GPU; remove it")
    return Policy(spec, resources=_devices())


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


def _holders(asked: Demand) -> str:
    """Whose actors claim what the stage waits for."""
    scarce = "GPU" if asked.gpus and ray.cluster_resources().get("GPU") else "CPU"
    try:
        actors: list[Any] = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
    except (RayStateApiException, ConnectionError):
        return "; the cluster runs no dashboard that could say who holds them"
    held: dict[str, float] = {}
    for actor in actors:
        amount = (actor.required_resources or {}).get(scarce, 0.0)
        if amount:
            name = f"{actor.class_name} of Ray job {actor.job_id}"
            held[name] = held.get(name, 0.0) + amount
    return "; held by " + ", ".join(f"{name} ({amount:g} {scarce})" for name, amount in held.items()) if held else ""
