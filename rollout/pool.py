"""Rollout engines as Ray actors, each with its own copy of the policy, behind a handle with an engine's interface.

Prompts are distributed round-robin, and groups come back in the order they finish, so that judging overlaps with
sampling. Every call has a timeout, and every error names the engine.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from configs.sampling import RolloutConfig, SamplingConfig
from rollout.device import DeviceState, Move
from rollout.process import compute_environment, num_threads, start_environment
from rollout.types import Group, GroupAddress, ReceivedWeights, TokenLogprobs


class RolloutError(Exception):
    """An engine timed out or died. The message names it."""


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

    def generate(self, *request: Any) -> Iterator[Group]:
        """Stream the engine's groups."""
        yield from self._engine.generate(*request)

    def connect(self, addresses: list[GroupAddress], first_number: int) -> None:
        """Join the ranks' groups; the engine's workers are `first_number` and those that follow."""
        self._engine.receiver.connect(addresses, first_number)

    def receive(self, *buckets: Any) -> None:
        """Load buckets straight from the object store."""
        self._engine.receiver.receive(buckets)

    def call(self, method: str, *args: Any) -> Any:
        """Call another method of the engine by name."""
        return getattr(self._engine, method)(*args)


class RolloutPool:
    """`config.num_engines` rollout engines, driven together.

    Example:
        pool = RolloutPool(folder, RolloutConfig(max_model_len=512, num_engines=2), "float32", seed=0)
        groups = list(pool.generate(prompts, SamplingConfig(max_tokens=64), num_completions=8, seed=0))
        pool.close()
    """

    def __init__(
        self,
        model: Path,
        config: RolloutConfig,
        dtype: str,
        seed: int,
        resources: Sequence[Mapping[str, Any]] | None = None,
        *,
        stop_token_ids: Sequence[int] = (),
        with_routes: bool = False,
        with_kept: bool = False,
    ) -> None:
        """Start the engines on the checkpoint folder `model` and wait until all are ready.

        resources: Ray options of each engine's actor, such as `[{"num_gpus": 0.5}]`. The default requests a tenth of a
            CPU each, since engine and trainer take turns on the same cores.
        stop_token_ids, with_routes, with_kept: see RolloutEngine.

        Raises as RolloutEngine does for a bad checkpoint or setting, RolloutError when an engine does not start.
        """
        self._timeout_seconds = config.timeout_seconds
        self._engines: list[Any] = [
            ray.remote(EngineActor).options(**_with_environment(options)).remote()
            for options in resources or [{"num_cpus": 0.1}] * config.num_engines
        ]
        nodes = self._gather([engine.node_id.remote() for engine in self._engines], "its start")
        request = (model, config, dtype, seed)
        options = {"stop_token_ids": list(stop_token_ids), "with_routes": with_routes, "with_kept": with_kept}
        started = [
            engine.start.remote(nodes.count(node), *request, **options, name=f"rollout engine {number}")
            for number, (engine, node) in enumerate(zip(self._engines, nodes, strict=True))
        ]
        per_engine = self._gather(started, "its start")
        self.devices: list[list[str]] = per_engine  # names of the devices of each engine's workers

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
    ) -> Iterator[Group]:
        """Sample `num_completions` answers to each prompt; yield each group as it finishes, with its prompt's index.

        The same weights, request and seed give the same groups, in varying order, with any number of engines
        (docs/numerics.md says when to the bit).

        Raises ValueError for a prompt that is too long, RolloutError when the timeout passes or an engine dies.
        """
        deadline = time.monotonic() + self._timeout_seconds
        streams: dict[Any, int] = {}
        for number, engine in enumerate(self._engines[: len(prompts)]):
            places = range(len(prompts))[number :: len(self._engines)]
            request = ([prompts[place] for place in places], sampling, num_completions, seed, places)
            streams[engine.generate.options(num_returns="streaming").remote(*request)] = number
        while streams:
            # The deadline is for the whole request. Finished groups are yielded even past it, after a slow caller.
            ready: list[Any]
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(map(str, sorted(streams.values())))
                raise RolloutError(f"rollout engine {late}: not finished within {self._timeout_seconds:g} s{_REMEDY}")
            number = streams[ready[0]]
            try:
                yield self._get(next(ready[0]), number, "a generation")
            except StopIteration:
                del streams[ready[0]]

    def connect(self, addresses: list[GroupAddress]) -> None:
        """Join the ranks' groups with every worker: those of engine 0 are numbers 1 and so on."""
        first_numbers = accumulate((len(devices) for devices in self.devices[:-1]), initial=1)
        pairs = zip(self._engines, first_numbers, strict=True)
        self._gather([engine.connect.remote(addresses, first) for engine, first in pairs], "'connect'")

    def load_weights(self, buckets: Iterable[Sequence["ray.ObjectRef[Any]"]], version: int) -> ReceivedWeights:
        """Load a whole set of weights into every engine, one after the other of `buckets`: references to `Bucket`s in
        the object store, which may be freed when the next are asked for.

        Raises SyncError naming the tensor that is damaged, missing, unknown or sent twice, RolloutError as `generate`
        does. After an error the engines refuse everything but another whole set.
        """
        self._call_all("begin_sync")
        for refs in buckets:
            self._gather([engine.receive.remote(*refs) for engine in self._engines], "'receive' of weights")
        received: list[ReceivedWeights] = self._call_all("end_sync", version)
        records = received[0].records
        assert all(each.records == records for each in received), "one set of buckets, one manifest"
        return ReceivedWeights(records, max(each.held_bytes for each in received))

    def prompt_logprobs(self, prompts: list[list[int]]) -> list[list[list[float]]]:
        """Each engine's log-probabilities of each prompt's tokens after the first."""
        return self._call_all("prompt_logprobs", prompts)

    def continuation_logprobs(self, sequences: list[list[int]], starts: list[int]) -> list[TokenLogprobs]:
        """Score each sequence's tokens from its start on (see RolloutEngine.continuation_logprobs).

        Neighbouring sequences go to the same engine, since they may share a context.
        """
        size = -(-len(sequences) // len(self._engines))
        parts = [slice(first, first + size) for first in range(0, len(sequences), size)] if sequences else []
        calls = [
            engine.call.remote("continuation_logprobs", sequences[part], starts[part])
            for engine, part in zip(self._engines, parts, strict=False)
        ]
        return [logprobs for part in self._gather(calls, "'continuation_logprobs'") for logprobs in part]

    def to(self, state: DeviceState) -> dict[str, float]:
        """Move every engine on to `state` (see RolloutEngine.to). Returns `device/engines_STATE_seconds` of the slowest
        engine and `device/engines_STATE_gib` of the one that moved most; empty where nothing moved, as on CPUs."""
        moves: list[Move] = self._call_all("to", state)
        return Move(max(x.seconds for x in moves), max(x.num_bytes for x in moves)).metrics("engines", state)

    def metrics(self) -> dict[str, float]:
        """The engines' metrics since the last call: the sum of tokens per second, the seconds of the slowest."""
        per_engine = self._call_all("metrics")
        reduce = {key: sum if key.endswith("per_second") else max for key in per_engine[0]}
        return {key: reduce[key](metrics[key] for metrics in per_engine) for key in reduce}

    def close(self) -> None:
        """Kill the engines' processes."""
        for engine in self._engines:
            ray.kill(engine)
        self._engines = []

    def _call_all(self, method: str, *args: Any) -> list[Any]:
        return self._gather([engine.call.remote(method, *args) for engine in self._engines], f"'{method}'")

    def _gather(self, refs: list[Any], call: str) -> list[Any]:
        return [self._get(ref, number, call) for number, ref in enumerate(refs)]

    def _get(self, ref: Any, number: int, call: str) -> Any:
        """Return a call's value. Raises RolloutError naming the engine when it times out or the engine died."""
        try:
            return ray.get(ref, timeout=self._timeout_seconds)
        except GetTimeoutError as error:
            raise RolloutError(
                f"rollout engine {number}: no end of {call} for {self._timeout_seconds:g} s{_REMEDY}"
            ) from error
        except RayTaskError as error:
            raise error.cause from error  # the engine's own error, without Ray's wrapper
        except RayError as error:
            raise RolloutError(f"rollout engine {number} was lost in {call}: {error}") from error


_REMEDY = "; raise rollout.timeout_seconds if it needs longer"


def _with_environment(options: Mapping[str, Any]) -> dict[str, Any]:
    """Add the variables that every engine's process starts with to its Ray options."""
    variables = start_environment() | {
        # Silence vLLM's and torch's messages at import; errors are still shown.
        "PYTHONWARNINGS": "ignore::FutureWarning:vllm.triton_utils.dispatcher",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    own = options.get("runtime_env", {}).get("env_vars", {})
    return {**options, "runtime_env": {"env_vars": variables | own}}


def vllm_baseline_seconds(
    model: Path,
    config: RolloutConfig,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    num_completions: int,
    *,
    repeats: int,
    latent: bool,
) -> list[float]:
    """Seconds of vLLM's own `LLM.generate` in a separate process, as the benchmarks' baseline. Needs a running Ray.

    latent: attend over DeepSeek's latent cache, vLLM's default; otherwise expanded, as RolloutEngine does on the CPU.
    """
    environment = {
        "OMP_NUM_THREADS": str(num_threads(config.threads)),
        "VLLM_MLA_DISABLE": str(int(not latent)),
        "VLLM_PLUGINS": "",  # without rollout.plugin
    }
    measure: Any = ray.remote(_measure_vllm).options(num_cpus=0.1, runtime_env={"env_vars": environment})
    request = (model, config, prompts, sampling, num_completions, repeats)
    return ray.get(measure.remote(*request), timeout=config.timeout_seconds)


def _measure_vllm(*request: Any) -> list[float]:
    from rollout.baseline import time_plain_vllm  # vLLM belongs in this process only

    return time_plain_vllm(*request)
