"""One vLLM engine in this process: groups of completions out, new weights in.

vLLM is set up so that a weight sync can be proven and a run can be resumed to the bit: no child process, no
asynchronous scheduling, a seed for each completion, no cached prefix from an earlier call, float32 kernels on the
CPU. On the CPU vLLM is patched first (`rollout.cpu`). `rollout.version` has the releases that are accepted.
"""

import math
import os
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

from configs.sampling import RolloutConfig, SamplingConfig
from rollout.broadcast import AnyBucket
from rollout.checkpoint import checkpoint_shapes, eos_ids
from rollout.device import DeviceState, Move, needs
from rollout.kept import kept_of
from rollout.memory import memory_arguments
from rollout.process import num_threads
from rollout.queue import CompletionKey, CompletionRequest, GenerationQueue, Progress
from rollout.requests import refuse_equal_completions, refuse_prompts, refuse_starts
from rollout.sleep import EngineMemory
from rollout.types import Begun, Completion, Group, ReceivedWeights, TensorRecord, TokenLogprobs
from rollout.version import refuse_untested_vllm
from rollout.weights import to_buckets

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# vLLM reads these while it is imported.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm
from vllm import LLM, RequestOutput
from vllm.config import WeightTransferConfig
from vllm.logprobs import FlatLogprobs
from vllm.platforms import current_platform

from rollout.decoder import Decoder  # isort: skip
from rollout.routes import routes_of  # isort: skip
from rollout.transfer import BACKEND, SyncWorker, WeightReceiver  # isort: skip


_BUCKET_MIB = 128
"""MiB of a checkpoint's weights that are read at a time."""


class RolloutEngine:
    """Sample completions from a policy and score tokens under it. A process holds one engine at a time, since vLLM
    keeps global state.

    Example:
        engine = RolloutEngine(folder, RolloutConfig(max_model_len=512), "float32", seed=0)
        for group in engine.generate([[1, 5, 9]], SamplingConfig(max_tokens=64), num_completions=4, seed=0):
            print([completion.text for completion in group.completions])
    """

    def __init__(
        self,
        model: Path,
        config: RolloutConfig,
        dtype: str,
        seed: int,
        *,
        stop_token_ids: Sequence[int] = (),
        with_routes: bool = False,
        with_kept: bool = False,
        name: str = "rollout engine 0",
    ) -> None:
        """Load the checkpoint folder `model` in `dtype` ("float32", "bfloat16"). The engine is awake at first.

        stop_token_ids: tokens that end a turn in the chat template. A completion ends at any of them, at the
            tokenizer's end token, and at those of generation_config.json.
        with_routes, with_kept: record the experts of each token, the tokens that top_k and top_p keep (see Completion).
        name: of the engine in errors.

        Raises ValueError for a folder without safetensors or a setting that this machine cannot serve, RuntimeError for
        a vLLM that was not tested (rollout.version).
        """
        shapes = checkpoint_shapes(model)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
        all_ends = {*stop_token_ids, *eos_ids(model), cast(int | None, tokenizer.eos_token_id)}
        stop_ids = {token_id for token_id in all_ends if token_id is not None}
        # Before vLLM starts: it replaces set_num_threads by a function that does nothing.
        torch.set_num_threads(num_threads(config.threads))
        arguments = engine_arguments(model, config, dtype, seed)
        arguments["enable_return_routed_experts"] = with_routes and not current_platform.is_cpu()
        arguments["return_sampling_mask"] = with_kept and not current_platform.is_cpu()
        self._llm = LLM(**arguments, weight_transfer_config=WeightTransferConfig(backend=BACKEND))
        self._llm.collective_rpc("pack_head")
        records = routes_of(self._llm) if with_routes else None, kept_of(self._llm) if with_kept else None
        self._decoder = Decoder(self._llm, tokenizer, stop_ids, *records)
        self.policy_version = 0  # number of the sync whose weights are loaded; 0 before the first
        self.name, self.state, self._config = name, DeviceState.AWAKE, config
        num_bytes = getattr(torch, dtype).itemsize * sum(map(math.prod, shapes.values()))
        self._memory = EngineMemory(self._llm, name, weight_bytes=num_bytes, on_cpu=current_platform.is_cpu())
        self.receiver = WeightReceiver(self._llm, shapes, self._memory.ledger)
        _round_to_fp8_without_amx(self, self._llm, config, _tensors_of(model, shapes))

    @needs(DeviceState.AWAKE)
    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
    ) -> Iterator[Group]:
        """Sample `num_completions` answers to each prompt; yield each group as soon as its last completion finishes.

        A completion is a function of the weights, the prompt and (seed, place, index in the group), whatever else the
        engine samples (docs/numerics.md says when to the bit). Log-probabilities are those of the distribution that was
        sampled from, after temperature, top_k and top_p. Closing the iterator aborts the request.

        Raises ValueError for a prompt that is empty or leaves no room for `max_tokens` in `max_model_len`, and for
        several completions at temperature 0, which would be equal.
        """
        refuse_equal_completions(sampling, num_completions)
        refuse_prompts(prompts, sampling.max_tokens, self._config.max_model_len)
        return self._groups(prompts, sampling, num_completions, seed)

    def _groups(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
    ) -> Iterator[Group]:
        queue = GenerationQueue[Completion](num_engines=1)
        ticket, is_last, room = queue.add(prompts, sampling, num_completions, seed), False, self._config.max_num_seqs
        try:
            while not is_last:
                progress = self.advance(queue.take(0, room))
                queue.receive(0, progress)
                room = progress.room
                groups, is_last = queue.pop(ticket)
                yield from groups
        finally:
            self.drop([ticket])

    @needs(DeviceState.AWAKE)
    def advance(
        self, requests: list[CompletionRequest], seconds: float = 0.0, report_seconds: float = math.inf
    ) -> Progress[Completion]:
        """Start `requests`, decode for `seconds`, a step at least, or until all is finished, and report; every
        `report_seconds` also the tokens of completions that are not finished."""
        self.receiver.refuse_partial(self.name)
        self._decoder.add(requests, self.policy_version)
        self._decoder.advance(seconds)
        return self._decoder.progress(self._decoder.room(self._config.max_num_seqs), report_seconds)

    @needs(*DeviceState)
    def withdraw(self) -> dict[CompletionKey, Begun]:
        """Abort the completions under way, and return those of them that have tokens."""
        return self._decoder.withdraw()

    @needs(*DeviceState)
    def drop(self, tickets: Collection[int]) -> None:
        """Abort the completions of requests."""
        self._decoder.drop({*tickets})

    @needs(DeviceState.AWAKE)
    def prompt_logprobs(self, prompts: list[list[int]]) -> list[list[float]]:
        """Log-probabilities in nats of each prompt's tokens after the first, from a prefill pass without any cache."""
        outputs = self._prefill(prompts, use_prefix_cache=False)
        return [cast(FlatLogprobs, output.prompt_logprobs).logprobs for output in outputs]

    @needs(DeviceState.AWAKE)
    def continuation_logprobs(self, sequences: list[list[int]], starts: list[int]) -> list[TokenLogprobs]:
        """Log-probabilities and ranks of each sequence's tokens from its start (1 or more) on.

        A common beginning of several sequences is computed once, in whole cache blocks: put sequences with the same
        context next to each other. Raises ValueError for a start outside the sequence, or one longer than
        `max_model_len` allows.
        """
        refuse_starts(sequences, starts, self._config.max_model_len)
        self._decoder.reset_prefix_cache()
        outputs = self._prefill(sequences, use_prefix_cache=True)
        # vLLM leaves uninitialised memory for tokens that it predicted from a cached block: compute those again.
        incomplete = [i for i, output in enumerate(outputs) if not _is_scored_from(output, starts[i])]
        again = self._prefill([sequences[i] for i in incomplete], use_prefix_cache=False)
        for i, output in zip(incomplete, again, strict=True):
            outputs[i] = output
        scores = [cast(FlatLogprobs, output.prompt_logprobs) for output in outputs]
        return [
            TokenLogprobs(score.logprobs[start - 1 :], cast(list[int], score.ranks[start - 1 :]))
            for score, start in zip(scores, starts, strict=True)
        ]

    @needs(DeviceState.WEIGHTS, DeviceState.AWAKE)
    def load_weights(self, buckets: Iterable[AnyBucket], version: int) -> list[TensorRecord]:
        """Load a whole set of weights as `version`; return their manifest. Raises SyncError as WeightReceiver does."""
        self.begin_sync()
        for bucket in buckets:
            self.receiver.receive([bucket])
        return self.end_sync(version).records

    @needs(DeviceState.WEIGHTS, DeviceState.AWAKE)
    def begin_sync(self) -> None:
        """Prepare `receiver`. Until `end_sync` the engine generates nothing, also after an error."""
        self.receiver.begin()

    @needs(DeviceState.WEIGHTS, DeviceState.AWAKE)
    def end_sync(self, version: int) -> ReceivedWeights:
        """Use the received weights as `version`. Raises SyncError naming a tensor that did not arrive."""
        received = self.receiver.end()
        self._memory.loaded()
        self.policy_version = version
        self._decoder.use_version(version)
        return received

    @needs(*DeviceState)
    def to(self, state: DeviceState) -> Move:
        """Move from awake to asleep, which loses the weights; then to weights; and, once they are loaded, to awake.
        Another order raises DeviceError (see rollout.sleep)."""
        assert state == self.state or not self._decoder.is_busy, "finish or close the stream first"
        if state == DeviceState.AWAKE:
            self.receiver.refuse_partial(self.name)
        move = self._memory.to(self.state, state)
        self.state = state
        return move

    def _prefill(self, prompts: list[list[int]], *, use_prefix_cache: bool) -> list[RequestOutput]:
        self.receiver.refuse_partial(self.name)
        return self._decoder.prefill(prompts, use_prefix_cache=use_prefix_cache)


def engine_arguments(model: Path, config: RolloutConfig, dtype: str, seed: int) -> dict[str, Any]:
    """Patch vLLM where this machine needs it, and return the arguments of its LLM. Raises as RolloutEngine does."""
    refuse_untested_vllm(vllm.__version__, on_cpu=current_platform.is_cpu())
    if "weights" in config.fp8 and dtype != "bfloat16":
        raise ValueError(
            f"rollout.fp8: 'weights' are quantised from model.dtype=bfloat16 only, not from {dtype}; set that, with "
            "sync.max_mean_gap and sync.max_gap from a measurement (docs/numerics.md), or remove it"
        )
    arguments = {
        "model": str(model),
        "dtype": dtype,
        "seed": seed,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": current_platform.is_cpu(),  # there, compilation costs a start and gains nothing
        "distributed_executor_backend": _executor(config),
        "worker_extension_cls": f"{SyncWorker.__module__}.{SyncWorker.__name__}",
        "async_scheduling": False,
        "logprobs_mode": "processed_logprobs",  # of sampled tokens; those of prompts are always the model's own
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "quantization": "fp8_per_block" if "weights" in config.fp8 else None,
        "kv_cache_dtype": "fp8" if "kv_cache" in config.fp8 else "auto",
        "hf_overrides": {"head_dtype": "float32"} if dtype == "bfloat16" else {},  # as the trainer's head
    }
    if not current_platform.is_cpu():
        # With tensor parallelism each device holds whole experts instead of a slice of every one.
        is_parallel = config.tensor_parallel_size > 1
        has_experts = is_parallel and any(".experts." in name for name in checkpoint_shapes(model))
        arguments |= {"enable_sleep_mode": True, "enable_expert_parallel": has_experts}
        return arguments | memory_arguments(model, config, dtype, current_platform.get_device_total_memory())
    from rollout.cpu import cpu_arguments  # names modules of one release of vLLM

    return arguments | cpu_arguments(model, config)


def _tensors_of(folder: Path, names: Container[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the tensors `names` of a checkpoint, one by one."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as source:
            yield from ((name, source.get_tensor(name)) for name in source.keys() if name in names)  # noqa: SIM118


def _round_to_fp8_without_amx(
    engine: RolloutEngine, llm: LLM, config: RolloutConfig, weights: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Let an engine on a CPU that can't multiply in FP8 round what it loads, and load its own `weights` so."""
    if "weights" not in config.fp8 or not current_platform.is_cpu():
        return
    from rollout.cpu import rounds_to_fp8  # names modules of one release of vLLM

    if rounds_to_fp8(config):
        llm.collective_rpc("round_to_fp8")
        engine.load_weights(to_buckets(weights, _BUCKET_MIB), version=0)


def _executor(config: RolloutConfig) -> str:
    """vLLM's executor: none for one device; Ray's where a placement group holds the engine's devices
    (pipeline.cluster.bundles); else processes on the devices that this one sees."""
    if config.tensor_parallel_size == 1:
        return "uni"
    return "ray" if "VLLM_RAY_BUNDLE_INDICES" in os.environ else "mp"


def _is_scored_from(output: RequestOutput, start: int) -> bool:
    """Return whether the log-probabilities from the token at `start` on were computed."""
    ranks = cast(FlatLogprobs, output.prompt_logprobs).ranks[start - 1 :]
    return (output.num_cached_tokens or 0) < start and all(rank is not None and rank > 0 for rank in ranks)
