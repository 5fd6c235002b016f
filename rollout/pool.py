"""Engines as Ray actors, each with its own copy of the policy, behind one handle that looks like one engine.

Prompts are dealt over the engines in turn, and groups come back in the order they finish, so that judging them overlaps
with the writing of the others. No call waits longer than its timeout, and none that fails leaves the engine unnamed.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from configs.sampling import RolloutConfig, SamplingConfig
from rollout.process import compute_environment, num_threads
from rollout.types import Group, Likelihood, TensorRecord


class RolloutError(Exception):
    """An engine that did not answer in time, or died. The message names it."""


class EngineActor:
    """An `Engine` in a process of its own. The pool runs it as a Ray actor."""

    def __init__(
        self, model: Path, config: RolloutConfig, dtype: str, seed: int, *, ends: Sequence[int], with_routes: bool
    ) -> None:
        from rollout.engine import Engine  # vLLM belongs in this process only

        self._engine = Engine(model, config, dtype, seed, ends=ends, with_routes=with_routes)

    def generate(self, *request: Any) -> Iterator[Group]:
        """Streams the engine's groups."""
        yield from self._engine.generate(*request)

    def load_weights(self, refs: list["ray.ObjectRef[Any]"], version: int) -> list[TensorRecord]:
        """Reads the buckets where they lie in the object store, and loads them."""
        return self._engine.load_weights(ray.get(refs), version)

    def call(self, method: str, *args: Any) -> Any:
        """Any other method of the engine, by name."""
        return getattr(self._engine, method)(*args)


class RolloutPool:
    """The policy as a speaker: `config.num_engines` engines, asked and updated together."""

    def __init__(
        self,
        model: Path,
        config: RolloutConfig,
        dtype: str,
        seed: int,
        resources: dict[str, Any] | None = None,
        *,
        ends: Sequence[int] = (),
        with_routes: bool = False,
    ) -> None:
        """Starts the engines on the checkpoint folder `model` and waits until all are ready.

        `resources` are the Ray options of one engine's actor, such as `{"num_gpus": 0.5}`. By default it asks for a
        sliver of a CPU, since it shares its cores with the trainer, in turns. A completion ends at any of `ends` too
        (see Engine). With routes, groups come with the experts that each token went to.

        Raises what `Engine` raises for a bad checkpoint or setting, RolloutError when an engine does not start.
        """
        options = {"num_cpus": 0.1} if resources is None else resources
        self._timeout_seconds = config.timeout_seconds
        # Ray imposes a single OpenMP thread on an actor with less than one CPU, unless it is told otherwise.
        threads = num_threads(config.threads, sharers=config.num_engines)
        config = config.model_copy(update={"threads": threads})
        environment = {"env_vars": _engine_environment(threads)}
        actor: Any = ray.remote(EngineActor).options(**options, runtime_env=environment)
        self._engines: list[Any] = [
            actor.remote(model, config, dtype, seed, ends=list(ends), with_routes=with_routes)
            for _ in range(config.num_engines)
        ]
        self._gather([engine.call.remote("metrics") for engine in self._engines], "its start")

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
    ) -> Iterator[Group]:
        """Samples `num_completions` answers to each prompt; yields each group as it finishes, its index the prompt's.

        The same weights, request, seed and number of engines give the same groups to the bit, in whatever order.

        Raises ValueError for a prompt that is too long, RolloutError when nothing finishes in time or an engine dies.
        """
        deadline = time.monotonic() + self._timeout_seconds
        streams: dict[Any, int] = {}
        for number, engine in enumerate(self._engines[: len(prompts)]):
            # An engine's own seed, so that no two draw the same numbers.
            own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            request = (prompts[number :: len(self._engines)], sampling, num_completions, own_seed)
            streams[engine.generate.options(num_returns="streaming").remote(*request)] = number
        while streams:
            # Counted down over the whole request; what is ready comes even after a reader took long.
            ready: list[Any]
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(map(str, sorted(streams.values())))
                raise RolloutError(f"rollout engine {late}: not finished within {self._timeout_seconds:g} s{_REMEDY}")
            number = streams[ready[0]]
            try:
                group = self._get(next(ready[0]), number, "a generation")
            except StopIteration:
                del streams[ready[0]]
            else:
                yield replace(group, index=group.index * len(self._engines) + number)

    def load_weights(self, refs: list["ray.ObjectRef[Any]"], version: int) -> list[TensorRecord]:
        """Gives every engine the `Bucket`s that `refs` name in the object store; returns the manifest they loaded.

        Raises SyncError naming the tensor that is damaged, missing or unknown, RolloutError as `generate` does.
        """
        manifests = self._gather(
            [engine.load_weights.remote(refs, version) for engine in self._engines], "load_weights"
        )
        assert all(manifest == manifests[0] for manifest in manifests), "one set of buckets, one manifest"
        return manifests[0]

    def prompt_logprobs(self, prompts: list[list[int]]) -> list[list[list[float]]]:
        """Of every engine, the log-probability of each prompt token after the first."""
        return self._ask_all("prompt_logprobs", prompts)

    def likelihoods(self, sequences: list[list[int]], starts: list[int]) -> list[Likelihood]:
        """What the policy thinks of each sequence's tokens from its start on; see `Engine.likelihoods`.

        An engine gets sequences that stand together, since they may share their beginning.
        """
        size = -(-len(sequences) // len(self._engines))
        parts = [slice(first, first + size) for first in range(0, len(sequences), size)] if sequences else []
        calls = [
            engine.call.remote("likelihoods", sequences[part], starts[part])
            for engine, part in zip(self._engines, parts, strict=False)
        ]
        return [likelihood for part in self._gather(calls, "'likelihoods'") for likelihood in part]

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The engines hold their memory inside the block and leave it to the trainer after. They start awake."""
        self._ask_all("wake")
        yield
        # Not after an error: the engine may be what failed, and waiting for it again would hide the reason.
        self._ask_all("sleep")

    def metrics(self) -> dict[str, float]:
        """What the engines spent since the last call: tokens per second added up, seconds of the slowest."""
        per_engine = self._ask_all("metrics")
        reduce = {key: sum if key.endswith("per_second") else max for key in per_engine[0]}
        return {key: reduce[key](metrics[key] for metrics in per_engine) for key in reduce}

    def close(self) -> None:
        """Ends the engines' processes."""
        for engine in self._engines:
            ray.kill(engine)
        self._engines = []

    def _ask_all(self, method: str, *args: Any) -> list[Any]:
        return self._gather([engine.call.remote(method, *args) for engine in self._engines], f"'{method}'")

    def _gather(self, refs: list[Any], call: str) -> list[Any]:
        return [self._get(ref, number, call) for number, ref in enumerate(refs)]

    def _get(self, ref: Any, number: int, call: str) -> Any:
        """The value of a call. Raises RolloutError, naming the engine, when it takes too long or the engine is gone."""
        try:
            return ray.get(ref, timeout=self._timeout_seconds)
        except GetTimeoutError as error:
            raise RolloutError(
                f"rollout engine {number}: no end of {call} for {self._timeout_seconds:g} s{_REMEDY}"
            ) from error
        except RayTaskError as error:
            raise error.cause from error  # the engine's own words, without Ray's around them
        except RayError as error:
            raise RolloutError(f"rollout engine {number} was lost in {call}: {error}") from error


_REMEDY = "; raise rollout.timeout_seconds if it needs longer"


def _engine_environment(threads: int) -> dict[str, str]:
    return compute_environment(threads) | {
        # What vLLM and torch say of themselves while they are imported; errors are still shown.
        "PYTHONWARNINGS": "ignore::FutureWarning:vllm.triton_utils.dispatcher",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def vllm_alone_seconds(
    model: Path,
    config: RolloutConfig,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    num_completions: int,
    *,
    repeats: int,
    latent: bool,
) -> list[float]:
    """Seconds of vLLM's own `LLM.generate` in a process of its own: the yardstick of the benchmarks.

    latent: with DeepSeek's attention over the latent cache, as vLLM comes; else expanded, as our engine runs it on the
    CPU. Needs a running Ray.
    """
    environment = {
        "OMP_NUM_THREADS": str(num_threads(config.threads)),
        "VLLM_MLA_DISABLE": str(int(not latent)),
    }
    measure: Any = ray.remote(_measure_vllm).options(num_cpus=0.1, runtime_env={"env_vars": environment})
    request = (model, config, prompts, sampling, num_completions, repeats)
    return ray.get(measure.remote(*request), timeout=config.timeout_seconds)


def _measure_vllm(*request: Any) -> list[float]:
    from rollout.engine import vllm_alone  # vLLM belongs in this process only

    return vllm_alone(*request)
