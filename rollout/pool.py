"""Rollout engines as Ray actors, each with its own copy of the policy, behind a handle with an engine's interface.

Engines pull completions from a queue as they have room, and groups come back in the order they finish, so that judging
overlaps with sampling. Every call has a timeout, and every error names the engine. An engine that was lost is replaced,
and its completions are continued from their last known tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import ray

from configs.sampling import RolloutConfig, SamplingConfig
from rollout.device import DeviceState, Move
from rollout.process import num_threads
from rollout.pull import PullingEngines
from rollout.types import GroupAddress, ReceivedWeights, TokenLogprobs


class RolloutPool(PullingEngines):
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
        options = {"stop_token_ids": list(stop_token_ids), "with_routes": with_routes, "with_kept": with_kept}
        super().__init__(config, resources, (model, config, dtype, seed), options)

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
        self._sync_seconds = max(each.seconds for each in received)
        return ReceivedWeights(records, max(each.held_bytes for each in received), self._sync_seconds)

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
        """The engines' metrics since the last call: the sum of tokens per second, the seconds of the slowest, and where
        engines were replaced, their number, with the tokens and completions that were continued and begun anew."""
        rates = [tokens / seconds for tokens, seconds in zip(self._tokens, self._seconds, strict=True) if seconds]
        metrics = {
            "rollout/tokens_per_second": sum(rates),
            "rollout/generate_seconds": max(self._seconds),
            "rollout/sync_seconds": self._sync_seconds,
        }
        if self.num_replaced:
            metrics |= {
                "rollout/replaced_engines": float(self.num_replaced),
                "rollout/continued_tokens": float(self._queue.continued_tokens),
                "rollout/restarted_completions": float(self._queue.restarted_completions),
            }
        self._reset_counters()
        return metrics


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
