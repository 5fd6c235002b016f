"""Refuse a run whose folder, checkpoints or plug-ins a node of the cluster doesn't see, before anything is launched.

Ranks write into the run's folder on their own node, engines read checkpoints there, and reward workers import plug-ins.
Each other node is asked by a task, a second on a node without an idle worker; a cluster of one node is asked nothing.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.disk.files import write_atomic
from pipeline.errors import RunStopped

ANSWER_SECONDS = 120.0
"""Longest that a node may take to answer: a busy one starts a worker first."""
_VISIBLE_SECONDS = 5.0
"""Longest that a network file system may take to show a new file to another node."""
_TOKEN = ".shared-"


def refuse_unshared(folder: Path, inputs: Sequence[Path] = ()) -> None:
    """Raise ValueError where a node of the joined cluster doesn't share `folder`, can't write to it, or lacks one of
    `inputs`, naming the path, the node and the remedy; RunStopped for a node that doesn't answer.

    Example:
        refuse_unshared(Path("/shared/runs/demo"), [Path("/models/base")])
    """
    own_node = ray.get_runtime_context().get_node_id()
    nodes = {n["NodeID"]: n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != own_node}
    if not nodes:
        return
    token = uuid4().hex
    file = folder / f"{_TOKEN}{token}"
    write_atomic(file, token)
    look: Any = ray.remote(num_cpus=0, max_retries=0)(look_from_node)
    answers = {
        node: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            str(file), token, node, [str(path) for path in inputs]
        )
        for node in nodes
    }
    try:
        for node, ref in answers.items():
            answer = _answer(ref, node, nodes[node])
            if answer is not None and (reason := answer or _why_unseen(file.with_name(f"{file.name}-{node}"), token)):
                raise ValueError(f"node {nodes[node]} {reason}")
    finally:
        for path in folder.glob(f"{file.name}*"):
            path.unlink(missing_ok=True)


def look_from_node(file: str, token: str, node: str, inputs: Sequence[str]) -> str:
    """Return the reason for which this node can't take part, and leave an answer beside `file` where it can."""
    path = Path(file)
    if _why_unseen(path, token):
        return (
            f"doesn't share the run's folder '{path.parent}'; mount the same storage there on every node, or set "
            "runs_dir to a folder that all of them share"
        )
    for name in inputs:
        if not Path(name).exists():
            return (
                f"has no '{name}', which its processes read; give it the absolute path of a place that all nodes share"
                + (", or start the run by --address, which takes plug-ins along" if name.endswith(".py") else "")
            )
    try:
        write_atomic(path.with_name(f"{path.name}-{node}"), token)
    except OSError as error:
        return (
            f"can't write to the run's folder '{path.parent}' ({error.strerror}); mount it writable for the user that "
            "Ray runs as there, or set runs_dir to a folder that is"
        )
    return ""


def _answer(ref: Any, node_id: str, name: str) -> str | None:
    """Return the node's answer, None where it has left the cluster. Raises RunStopped for none."""
    try:
        return ray.get(ref, timeout=ANSWER_SECONDS)
    except GetTimeoutError as error:
        raise RunStopped(
            f"node {name} started no process within {ANSWER_SECONDS:g} s; `ray status` and its logs in /tmp/ray say "
            "why; remove it from the cluster or mend it, and the same command goes on"
        ) from error
    except RayError as error:
        if not any(node["Alive"] and node["NodeID"] == node_id for node in ray.nodes()):
            return None
        found = [line.strip() for line in str(error).splitlines() if "ModuleNotFoundError" in line]
        reason = found[-1] if found else str(error)
        return f"runs none of our tasks ({reason}); install alignyard there, in the version of the other nodes"


def _why_unseen(file: Path, token: str) -> str:
    """Return the reason for which `file` doesn't hold `token`; empty where it does, at the latest after some time."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while True:
        try:
            seen = file.read_text(encoding="utf-8")
        except OSError as error:
            seen = f"({error.strerror})"
        if seen == token:
            return ""
        if time.monotonic() > deadline:
            return f"writes '{file}' elsewhere {seen[:40]}; mount the same storage on every node"
        time.sleep(0.2)
