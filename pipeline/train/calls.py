"""Calls of all training ranks: made together, waited for with a time limit, and their errors told apart."""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError
from safetensors import SafetensorError

from pipeline.errors import RankLost, RunStopped
from rollout.actors import LOST_DATA, MEMORY_REMEDY, DataLost, actor_process, death, is_out_of_memory

NOTICE_SECONDS = 10.0
"""Longest that Ray takes to notice that the process of a rank ended."""
WRITING = ("begin_save", "end_save", "save_hf")
"""Methods of TrainEngine that write a checkpoint."""
STARTING = ("address", "build", "open_group")
"""Methods of the start, which have a time limit of their own."""
READING = ("build", "load", "load_teacher")
"""Methods that read one."""


class RankCalls:
    """Calls of all ranks.

    meanwhile: called with the calls that are waited for and the longest time in seconds; returns when they are done or
    the time is over. busy_seconds: time in which the ranks were at work.
    """

    def __init__(self, ranks: list[Any], timeout: float) -> None:
        self._ranks, self._timeout = ranks, timeout
        self.meanwhile: Callable[[list[Any], float], None] | None = None
        self.busy_seconds = 0.0
        self._nodes: list[str] = []  # of the ranks, once they have started

    def refuse_lost_node(self) -> None:
        """Raise RankLost where a rank's node has left the cluster, without a call to ranks that may be at work."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for number, node in enumerate(self._nodes):
            if node not in alive:
                raise RankLost(f"training rank {number} was lost with its node")

    def _get(self, calls: list[Any], method: str, timeout: float | None = None) -> list[Any]:
        started, timeout = time.monotonic(), self._timeout if timeout is None else timeout
        if self.meanwhile is not None:
            self.meanwhile(calls, timeout)
        try:
            return _results(calls, method, timeout, started)
        finally:
            self.busy_seconds += time.monotonic() - started

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self._each(method, [args] * len(self._ranks))

    def _each(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        calls = [actor.call.remote(method, *args) for actor, args in zip(self._ranks, arguments, strict=True)]
        return self._get(calls, method)


def _results(calls: list[Any], method: str, timeout: float, started: float) -> list[Any]:
    try:
        return ray.get(calls, timeout=max(0.0, started + timeout - time.monotonic()))
    except GetTimeoutError as error:
        setting = "start_timeout_seconds" if method in STARTING else "timeout_seconds"
        _, late = ray.wait(calls, num_returns=len(calls), timeout=0)
        names = ", ".join(f"rank {calls.index(call)} ({actor_process(call.task_id().actor_id())})" for call in late)
        raise RunStopped(
            f"training ranks did not finish '{method}' within {timeout:g} s; late: {names}; raise trainer.{setting} if "
            "it needs longer"
        ) from error
    except RayTaskError as error:
        if isinstance(error.cause, ValueError) and method in READING:  # bad input: the engine's own error
            raise error.cause from error
        if isinstance(error.cause, OSError | SafetensorError) and method in WRITING:  # a full disk, above all
            raise RunStopped(
                f"a training rank could not write in '{method}': {error.cause}; make room, and the same command "
                "resumes from the last checkpoint"
            ) from error
        if (lost := _death(calls)) is not None:  # the others then fail too, since they wait for it
            raise RankLost(f"a training rank died in '{method}': {death(lost)}") from lost
        if isinstance(error.cause, ObjectLostError):
            raise DataLost(f"a training rank failed in '{method}': {LOST_DATA}") from error
        cause = f"{MEMORY_REMEDY} ({error.cause})" if is_out_of_memory(error) else error
        raise RunStopped(f"a training rank failed in '{method}': {cause}") from error
    except RayError as error:
        raise RankLost(f"a training rank died in '{method}': {death(error)}") from error


def _death(calls: list[Any]) -> RayActorError | None:
    """Return the error of a call whose rank died; None where all ranks live."""
    ready, _ = ray.wait(calls, num_returns=len(calls), timeout=NOTICE_SECONDS)
    for call in ready:
        try:
            ray.get(call)
        except RayActorError as error:
            return error
        except RayError:
            continue
    return None
