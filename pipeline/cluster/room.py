"""Join a Ray cluster, list its nodes, and wait until a stage's resources are free."""

import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import ray
import rich
from ray._private import worker as ray_worker
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from configs.stages import AnyStage, Recipe
from pipeline.cluster.actors import Node
from pipeline.cluster.demand import Demand, stage_demand
from pipeline.cluster.placement import StagePlacement
from pipeline.disk.home import replace_read_only_home
from pipeline.errors import RunStopped
from rollout.actors import RolloutError

MAX_WAIT_SECONDS = 24 * 3600.0
"""Longest that a stage waits for the resources it requests."""
_POLL_SECONDS = 5.0
_CONNECT_SECONDS = 3.0
_SILENT_SECONDS = 2.0
"""Longest time without a word on the work that is waited for."""


@contextmanager
def announced(work: str) -> Iterator[None]:
    """Print `work` where the block takes more than two seconds, and the seconds that it took."""
    console, started = rich.get_console(), time.monotonic()

    def show(text: str) -> None:
        console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    timer = Timer(_SILENT_SECONDS, show, [f"{work} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := time.monotonic() - started) > _SILENT_SECONDS:
        show(f"{work}: {seconds:.0f} s")


@contextmanager
def cluster() -> Iterator[None]:
    """Join the Ray cluster at RAY_ADDRESS, or start a local one that ends with the block.

    PYTHONPATH puts this installation before any folder of the user's named like one of our packages. Raises RunStopped
    where the block fails because a process of Ray was lost: the block's own error names a rank or engine lost with it.
    """
    home = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])}
    local: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"address": "local", "include_dashboard": False}
    runtime_env = {"env_vars": environment, **quoted_interpreter()}
    replace_read_only_home()
    with announced("starting Ray" if local else "joining the Ray cluster"):
        ray.init(runtime_env=runtime_env, log_to_driver=False, logging_level=logging.ERROR, **local)
    silence_ray()
    processes = ray_processes()
    try:
        yield
    except (RayError, RunStopped, RolloutError) as error:
        if lost := lost_processes(processes):
            raise RunStopped(f"{lost}; the same command resumes the run") from error
        raise
    finally:
        ray.shutdown()


def silence_ray() -> None:
    """Keep what Ray prints about its own processes, such as the last 20 lines of a raylet's log, off the console: an
    error of ours names the process. Ray 2.60 prints it in spite of `log_to_driver=False` (`listen_error_messages` in
    ray/_private/worker.py), and its log files have it."""
    worker: Any = ray_worker
    worker.print_to_stdstream = lambda *_, **__: None


def ray_processes() -> dict[str, tuple[str, int]]:
    """Addresses of the processes of Ray that no process here can do without, by their names: its head, and the node
    manager of this machine."""
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    managers = {
        f"node manager (raylet) of {node['NodeManagerHostname']}": (node["NodeManagerAddress"], node["NodeManagerPort"])
        for node in ray.nodes()
        if node["NodeID"] == context.get_node_id()
    }
    return {"head process (gcs_server)": (host, int(port))} | managers


def lost_processes(processes: Mapping[str, tuple[str, int]]) -> str:
    """Name those of `processes` that refuse a connection, in a sentence; empty for none."""
    lost: list[str] = []
    for name, address in processes.items():
        try:
            socket.create_connection(address, _CONNECT_SECONDS).close()
        except ConnectionRefusedError:
            lost.append(name)
        except OSError:  # a slow answer, as on a busy machine
            continue
    return f"Ray's {' and its '.join(lost)} ended, and with it what ran there" if lost else ""


def quoted_interpreter() -> dict[str, str]:
    """The part of a Ray runtime environment that quotes the path of this Python, where the path has blanks or the like.

    Ray 2.60 puts the path unquoted into a shell command (`exec_worker` in ray/_private/runtime_env/context.py), so
    workers would never start.
    """
    path = shlex.quote(sys.executable)
    return {} if path == sys.executable else {"py_executable": path}


def nodes() -> list[Node]:
    """List the cluster's live nodes."""
    free = available_resources_per_node()
    listed = [
        Node(
            node["NodeManagerHostname"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            free.get(node["NodeID"], {}).get("CPU", 0.0),
            free.get(node["NodeID"], {}).get("GPU", 0.0),
            node_id=node["NodeID"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(listed, key=lambda node: (node.name, node.node_id))


def wait_for_resources(config: AnyStage, recipe: Recipe | None, report: Callable[[str], None]) -> StagePlacement | None:
    """Return the stage's placement when its resources are free, None without GPUs; report the reason to wait, and the
    holders, at each change.

    Raises ValueError when the cluster never has as many, RunStopped after a day of waiting.
    """
    demand, reported, deadline = stage_demand(config, recipe), "", time.monotonic() + MAX_WAIT_SECONDS
    if impossible := demand.why_impossible(nodes()):
        raise ValueError(impossible)
    while reason := demand.why_wait(found := nodes()):
        reason = f"waiting for room: {reason}{_holders(demand)}"
        if time.monotonic() > deadline:
            raise RunStopped(f"{reason}; gave up after {MAX_WAIT_SECONDS / 3600:g} hours, the same command goes on")
        if reason != reported:
            report(reason)
            reported = reason
        time.sleep(_POLL_SECONDS)
    return demand.place(found) if any(node.gpus for node in found) else None


def _holders(demand: Demand) -> str:
    """Name the actors that hold the scarce resource."""
    scarce = "GPU" if demand.gpus and ray.cluster_resources().get("GPU") else "CPU"
    try:
        actors: list[Any] = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
    except (RayStateApiException, ConnectionError):
        return "; the cluster runs no dashboard that could say who holds them"
    amounts: dict[str, float] = {}
    for actor in actors:
        amount = (actor.required_resources or {}).get(scarce, 0.0)
        if amount:
            name = f"{actor.class_name} of Ray job {actor.job_id}"
            amounts[name] = amounts.get(name, 0.0) + amount
    holders = ", ".join(f"{name} ({amount:g} {scarce})" for name, amount in amounts.items())
    return f"; held by {holders}" if holders else ""
