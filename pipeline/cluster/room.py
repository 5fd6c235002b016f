"""Joining a Ray cluster, its nodes, and the wait until a stage's demand is free on them."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from configs.stages import AnyStage, Recipe
from pipeline.cluster.demand import Demand, Node, demand
from pipeline.errors import RunStopped

ROOM_SECONDS = 24 * 3600.0
"""Longest a stage waits for others to leave the devices it asks for."""
LOOK_SECONDS = 5.0


@contextmanager
def cluster() -> Iterator[None]:
    """A Ray cluster to run on: the one RAY_ADDRESS names, or a local one that ends with the block.

    Workers find this installation before any folder of the user's that has a room's name.
    """
    own = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])])}
    local: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"address": "local", "include_dashboard": False}
    ray.init(runtime_env={"env_vars": environment}, log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        yield
    finally:
        ray.shutdown()


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
