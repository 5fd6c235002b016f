"""Join or start a Ray cluster, list its nodes, and wait until a stage's resources are free."""

import getpass
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import ray
import rich
from ray._private import parameter, ray_constants
from ray._private import worker as ray_worker
from ray._private.state import available_resources_per_node
from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue]  it is compiled
from ray.exceptions import RayError
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from configs.stages import AnyStage, Recipe
from pipeline.cluster.actors import Node
from pipeline.cluster.demand import Demand, stage_demand
from pipeline.cluster.placement import StagePlacement
from pipeline.disk.home import replace_read_only_home, write_token
from pipeline.errors import RunStopped
from rollout.actors import RolloutError

MAX_WAIT_SECONDS = 24 * 3600.0
"""Longest that a stage waits for the resources it requests."""
_POLL_SECONDS = 5.0
_CONNECT_SECONDS = 3.0
_SILENT_SECONDS = 2.0
"""Longest time without a word on the work that is waited for."""
_TOO_LATE = r"node timed out during startup|The last \d+ lines of \S+dashboard.log"
"""Errors of `ray.init` where its node manager takes over 30 s (ray/_private/node.py), or its dashboard over
RAY_DASHBOARD_STARTUP_TIMEOUT_S (ray/_private/services.py)."""
_FOLDER_PREFIX = "ay-ray-"
_REMOVE = 'exec 3<&0; { cat <&3; n=0; while [ $n -lt 30 ]; do rm -rf "$1"; sleep 2; n=$((n + 1)); done; } &'
"""Waits for the end of its input, then removes a folder, for a minute: processes of Ray that had only begun to start
make it anew before they notice the end."""
_MAX_PARENT_BYTES = 18
"""Longest path of a folder for Ray's sessions. The path of a socket has 107 bytes at most, of which 89 go to
ay-ray-12345678/r/session_2026-01-01_00-00-00_000000_1234567/sockets/dash_TaskEventsHead."""


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
    runtime_env = {"env_vars": environment, **quoted_interpreter()}
    replace_read_only_home()
    with ray_cluster(include_dashboard=False, runtime_env=runtime_env):
        processes = ray_processes()
        try:
            yield
        except (RayError, RunStopped, RolloutError) as error:
            if lost := lost_processes(processes):
                raise RunStopped(f"{lost}; the same command resumes the run") from error
            raise


@contextmanager
def ray_cluster(*, include_dashboard: bool, **options: Any) -> Iterator[Any]:
    """Join the Ray cluster at RAY_ADDRESS, or start one of this machine alone, and leave it, or end it, with the block;
    yield Ray's context. include_dashboard: for a cluster that is started. options: further ones of `ray.init`."""
    options |= {"log_to_driver": False, "logging_level": logging.ERROR}
    silence_ray()
    if "RAY_ADDRESS" not in os.environ:
        with local_cluster(include_dashboard=include_dashboard, **options) as context:
            yield context
        return
    with announced("joining the Ray cluster"):
        context = ray.init(**options)
    try:
        yield context
    finally:
        ray.shutdown()


def silence_ray() -> None:
    """Keep what Ray prints about its own processes, such as the last 20 lines of a raylet's log, off the console: an
    error of ours names the process. Ray 2.60 prints it in spite of `log_to_driver=False` (`listen_error_messages` in
    ray/_private/worker.py), and its log files have it."""
    worker: Any = ray_worker
    worker.print_to_stdstream = lambda *_, **__: None


@contextmanager
def local_cluster(**options: Any) -> Iterator[Any]:
    """Start a Ray cluster of this machine alone, which ends with the block or with this process; yield Ray's context.

    Only this user reaches it: it listens on the loopback interface, every request needs the token, and its session and
    its processes' temporary files are in a folder that others can't open, removed with the cluster. options: those of
    `ray.init`. Call it in the main thread, since Ray's processes end with the thread that started them. Raises
    ValueError for a RAY_TMPDIR with too long a path.
    """
    write_token()
    with _private_folder() as folder:
        sessions, temporary = folder / "r", folder / "tmp"
        for path in (sessions, temporary):
            path.mkdir()
        environment = {
            "RAY_AUTH_MODE": "token",
            # Gives this machine the address 127.0.0.1, at which all of Ray's servers listen then.
            ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
            "VLLM_HOST_IP": "127.0.0.1",  # vLLM compares its own address with Ray's
            "TMPDIR": str(temporary),
        }
        if (kernels := _kernel_cache()) is not None:
            environment["TORCHINDUCTOR_CACHE_DIR"] = kernels
        with _environment(environment):
            try:
                with announced("starting Ray"):
                    context = ray.init(address="local", dashboard_port=0, _temp_dir=str(sessions), **options)
            except Exception as error:  # of no class of Ray's own
                if found := re.search(_TOO_LATE, str(error)):
                    raise RunStopped(
                        f"Ray did not start in the time that it gives itself ({found[0]}): this machine may be too "
                        "busy; the same command goes on"
                    ) from error
                raise
            yield context


@contextmanager
def _private_folder() -> Iterator[Path]:
    """Make a folder that only this user can open, removed at the end of the block or of this process."""
    folder = tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=_sessions_parent())
    # The shell reads the end of its input once this process is gone, whatever ended it.
    with subprocess.Popen(
        ["/bin/sh", "-c", _REMOVE, "sh", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ):
        try:
            yield Path(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """While the block runs, `ray.init` starts a cluster with these environment variables; it is shut down at the end.

    Ray reads some of them when it is imported. The agent that starts jobs takes any free port, for which `ray.init` has
    no argument: with the default port, the second cluster on a machine would start no jobs.
    """
    before = {name: os.environ.get(name) for name in variables}
    original: Any = parameter.RayParams
    spans_nodes = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(variables)
    try:
        Config.initialize("")
        ray_constants.ENABLE_RAY_CLUSTER = False
        parameter.RayParams = lambda **options: original(**options, dashboard_agent_listen_port=0)
        yield
    finally:
        ray.shutdown()
        parameter.RayParams, ray_constants.ENABLE_RAY_CLUSTER = original, spans_nodes
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        Config.initialize("")


def _sessions_parent() -> Path:
    """Return RAY_TMPDIR, or else the folder of temporary files, or /tmp where the path of that one is too long."""
    requested = os.environ.get("RAY_TMPDIR", "")
    if len(os.fsencode(requested)) > _MAX_PARENT_BYTES:
        raise ValueError(
            f"RAY_TMPDIR='{requested}' has more than {_MAX_PARENT_BYTES} bytes, too many for Ray's sockets in it; set "
            "it to a folder with a shorter path"
        )
    folder = requested or tempfile.gettempdir()
    return Path(folder if len(os.fsencode(folder)) <= _MAX_PARENT_BYTES else "/tmp")


def _kernel_cache() -> str | None:
    """Return the folder with this machine's compiled kernels, as torch names it where TMPDIR is not set; later runs use
    them again. None where others could put code into it."""
    if configured := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return configured
    try:
        folder = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat(follow_symlinks=False)
    except (OSError, KeyError):  # a user without a name, a folder that is none
        return None
    return str(folder) if status.st_uid == os.getuid() and not status.st_mode & 0o022 else None


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
