"""The actors of rollout engines: their start, their calls, and the replacement of those that were lost.

Every call has a timeout, and every error names the engine.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
import rich
from ray._private.state import actors
from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError, RayError, RayTaskError

from configs.sampling import RolloutConfig
from rollout.process import compute_environment, killed_by_kernel, num_threads, start_environment
from rollout.queue import Progress
from rollout.types import Completion, CompletionColumns, GroupAddress, Routes, StoredCompletion, narrow_routes

START = "its start"
"""Name of the calls that start an engine, which have a limit of their own."""


MEMORY_REMEDY = (
    "lack of memory: lower rollout.kv_cache_gib, rollout.max_num_seqs or trainer.micro_batch_tokens, or shard further"
)
LOST_DATA = "what it was to read was lost with the node that held it"


class RolloutError(Exception):
    """An engine timed out or died. The message names it."""


class EngineLost(RolloutError):
    """The process of an engine ended."""


class DataLost(RolloutError):
    """Completions or weights in the object store of a node were lost with it, before all had read them."""


class EngineActor:
    """A `RolloutEngine` in its own process, as a Ray actor."""

    def node_id(self) -> str:
        """Return Ray's id of the node that this process is on."""
        return ray.get_runtime_context().get_node_id()

    def start(self, sharers: int, model: Path, config: RolloutConfig, *args: Any, **kwargs: Any) -> list[str]:
        """Build the engine, one of `sharers` on this node; return the names of its workers' devices. Raises as
        RolloutEngine does."""
        threads = num_threads(config.threads, sharers=sharers)
        # Ray sets OMP_NUM_THREADS=1 for an actor with less than one CPU.
        os.environ |= compute_environment(threads)
        if "VLLM_RAY_BUNDLE_INDICES" in os.environ:
            # Ray hides all devices from an actor that claims none; vLLM's driver refuses to start without them.
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        from rollout.engine import RolloutEngine  # vLLM belongs in this process only

        self._engine = RolloutEngine(model, config.model_copy(update={"threads": threads}), *args, **kwargs)
        return self._engine.receiver.devices()

    def advance(self, *request: Any) -> Iterator[Progress[StoredCompletion] | CompletionColumns | Routes]:
        """Stream the engine's report without the tokens of finished completions, then the columns of each, followed by
        its prompt's routes where the report has a place for them.

        Columns and routes stay in this node's object store. They are the caller's, so that they survive this process.
        """
        progress: Progress[Completion] = self._engine.advance(*request)
        finished = [(key, done.stored(), None if routes is None else ...) for key, done, routes in progress.finished]
        report: Any = replace(progress, finished=finished)
        yield report
        for _, completion, routes in progress.finished:
            yield completion.columns()
            if routes is not None:
                yield narrow_routes(routes)

    def connect(self, addresses: list[GroupAddress], first_number: int) -> None:
        """Join the ranks' groups; the engine's workers are `first_number` and those that follow."""
        self._engine.receiver.connect(addresses, first_number)

    def receive(self, *buckets: Any) -> None:
        """Load buckets straight from the object store."""
        self._engine.receiver.receive(buckets)

    def call(self, method: str, *args: Any) -> Any:
        """Call another method of the engine by name."""
        return getattr(self._engine, method)(*args)


class EngineActors:
    """The processes of `config.num_engines` engines.

    devices: names of the devices of each engine's workers. num_replaced: engines that were replaced so far.
    """

    actor: type = EngineActor

    def __init__(
        self,
        config: RolloutConfig,
        resources: Sequence[Mapping[str, Any]] | None,
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
    ) -> None:
        """Start the engines, each a RolloutEngine of `arguments` and `options`, and wait until all are ready.

        resources: see RolloutPool.
        """
        self._config = config
        own = resources or [{"num_cpus": 0.1}] * config.num_engines
        self._actors = [ray.remote(self.actor).options(**_with_environment(each)) for each in own]
        self._has_devices = any("scheduling_strategy" in each and each.get("num_gpus") is not None for each in own)
        self._arguments, self._options = arguments, options
        self._lost: dict[int, EngineLost] = {}
        self.num_replaced = 0
        self._engines: list[Any] = [None] * len(own)
        self._nodes = [""] * len(own)
        self.devices: list[list[str]] = [[]] * len(own)
        self._start(range(len(own)))

    def close(self) -> None:
        """Kill the engines' processes."""
        engines, self._engines = self._engines, []
        for engine in engines:
            ray.kill(engine)

    def _replace(self) -> list[int]:
        """Start an engine for each that was lost, and return their numbers. Raises RolloutError where more were lost
        than `max_replacements`, EngineLost for one whose devices left the cluster with their node."""
        numbers = sorted(self._lost)
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for number in numbers:
            if self._has_devices and self._nodes[number] not in nodes:
                raise EngineLost(f"{self._lost[number]}\nits devices left the cluster with their node")
        if self.num_replaced + len(numbers) > self._config.max_replacements:
            cause = self._lost[numbers[0]]
            raise RolloutError(
                f"{cause}\n{self.num_replaced} engines were replaced before, and "
                f"rollout.max_replacements={self._config.max_replacements} allows no more"
            ) from cause
        for number in numbers:
            allowed = f"rollout.max_replacements={self._config.max_replacements}"
            text = f"{self._lost[number]}; it is replaced, and its completions go on ({allowed})"
            rich.get_console().print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
            ray.kill(self._engines[number])  # the process may live where only its connection was lost
            del self._lost[number]
        self._start(numbers)
        self.num_replaced += len(numbers)
        return numbers

    def _start(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._engines[number] = self._actors[number].remote()
        for number in numbers:
            self._nodes[number] = self._get(self._engines[number].node_id.remote(), number, START)
        started = [
            self._engines[number].start.remote(
                self._nodes.count(self._nodes[number]),
                *self._arguments,
                **self._options,
                name=f"rollout engine {number}",
            )
            for number in numbers
        ]
        for number, call in zip(numbers, started, strict=True):
            self.devices[number] = self._get(call, number, START)

    def _call_all(self, method: str, *args: Any) -> list[Any]:
        return self._gather([engine.call.remote(method, *args) for engine in self._engines], f"'{method}'")

    def _gather(self, refs: list[Any], call: str) -> list[Any]:
        return [self._get(ref, number, call) for number, ref in enumerate(refs)]

    def _get(self, ref: Any, number: int, call: str) -> Any:
        """Return a call's value. Raises RolloutError naming the engine when it times out or the engine died."""
        setting = "start_timeout_seconds" if call == START else "timeout_seconds"
        seconds: float = getattr(self._config, setting)
        try:
            return ray.get(ref, timeout=seconds)
        except GetTimeoutError as error:
            raise RolloutError(
                f"rollout {self._name(number)}: no end of {call} for {seconds:g} s; raise rollout.{setting} if it "
                "needs longer"
            ) from error
        except RayTaskError as error:
            if is_out_of_memory(error):
                raise RolloutError(f"rollout engine {number}, {call}: {MEMORY_REMEDY} ({error.cause})") from error
            if isinstance(error.cause, ObjectLostError):
                raise DataLost(f"rollout engine {number}, {call}: {LOST_DATA}") from error
            raise error.cause from error  # the engine's own error, without Ray's wrapper
        except RayError as error:
            self._lost[number] = EngineLost(f"rollout engine {number} was lost in {call}: {death(error)}")
            raise self._lost[number] from error

    def _name(self, number: int) -> str:
        return f"engine {number} ({actor_process(self._engines[number]._actor_id)})"


def actor_process(actor_id: ray.ActorID) -> str:
    """Name an actor's process and its machine, and on this machine the state that the kernel gives: "stopped" for one
    that was sent SIGSTOP, "running" or "sleeping" for one that computes or waits."""
    entry: dict[str, Any] = actors(actor_id.hex())
    pid, address = entry.get("Pid", 0), entry.get("Address", {}).get("IPAddress", "")
    if not pid:
        return "not placed yet"
    state = ""
    if address == ray.util.get_node_ip_address():
        with suppress(psutil.NoSuchProcess):
            state = f", {psutil.Process(pid).status()}"
    return f"process {pid} on {address}{state}"


def death(error: RayError) -> str:
    """Describe the end of an actor's process in a line, of the dozen that Ray's error has."""
    found = dict(re.findall(r"^\s*(pid|ip): (\S+)$", str(error), re.MULTILINE))
    process = f"process {found.get('pid', '?')} on {found.get('ip', '?')}"
    if isinstance(error, OutOfMemoryError) or killed_by_kernel(int(found.get("pid", 0))):
        return f"{process} was ended for {MEMORY_REMEDY}"
    cause = str(error).splitlines()[-1]
    if "worker process has died" in cause:
        return f"{process} ended without a word, as after a kill or a lack of memory"
    return f"{process} ended: {cause}"


def is_out_of_memory(error: RayTaskError) -> bool:
    """True where a call failed for lack of memory of a device or of the process."""
    return type(error.cause).__name__ in ("OutOfMemoryError", "MemoryError")


def _with_environment(options: Mapping[str, Any]) -> dict[str, Any]:
    """Add the variables that every engine's process starts with to its Ray options."""
    variables = start_environment() | {
        # Silence vLLM's and torch's messages at import; errors are still shown.
        "PYTHONWARNINGS": "ignore::FutureWarning:vllm.triton_utils.dispatcher",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # Ray sends what is smaller than this through the driver, by default up to 100 KiB; see EngineActor.advance.
        "RAY_max_direct_call_object_size": "4096",
    }
    own = options.get("runtime_env", {}).get("env_vars", {})
    return {**options, "runtime_env": {"env_vars": variables | own}}
