"""One vLLM engine in this process: groups of completions out, new weights in.

vLLM is set up so that a sync can be proven and a run can be resumed to the bit: no child process, no asynchronous
scheduling, one seeded generator per call, no cached prefix from an earlier call, float32 kernels on the CPU.
On the CPU it is mended first (`rollout.cpu`), which is why its version is guarded.
"""

import os
import time
from collections.abc import Generator, Iterable, Iterator, Sequence, Set
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedTokenizerFast

from configs.sampling import RolloutConfig, SamplingConfig
from rollout.checkpoint import checkpoint_shapes, eos_ids
from rollout.process import num_threads
from rollout.types import Completion, Group, Likelihood, TensorRecord
from rollout.weights import Bucket, open_buckets

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# vLLM reads these while it is imported.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt
from vllm.logprobs import FlatLogprobs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from rollout.cpu import cpu_arguments, mend_tied_head  # isort: skip  after vLLM is set up
from rollout.routes import CapturedRoutes, ReturnedRoutes, routes_of  # isort: skip

EXAMINED_VLLM = "0.32.0"
"""The version whose kernels, reload path and seeding were read and measured."""


class Engine:
    """A policy that speaks. A process holds one at a time, since vLLM keeps global state.

    It keeps to this process and its default random generator, which every `generate` seeds anew: whoever draws from
    it between two groups of a stream changes what follows.
    """

    def __init__(
        self,
        model: Path,
        config: RolloutConfig,
        dtype: str,
        seed: int,
        *,
        ends: Sequence[int] = (),
        with_routes: bool = False,
    ) -> None:
        """Loads the checkpoint folder `model` in `dtype` ("float32", "bfloat16"). With routes, groups come with the
        experts that each token went to (see Completion). A completion ends at any of `ends`, the tokens that end a turn
        in the chat template, at the tokenizer's own end, and at those of generation_config.json.

        Raises ValueError for a folder without safetensors or a setting this machine cannot serve, RuntimeError for
        a vLLM other than the one examined.
        """
        self._expected = checkpoint_shapes(model)
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
        self._ends = _stops(self._tokenizer, model, ends)
        self._silent_ids = {*self._ends, cast(int | None, self._tokenizer.pad_token_id)}
        self._max_model_len = config.max_model_len
        # Before vLLM starts: it replaces set_num_threads by a function that does nothing.
        torch.set_num_threads(num_threads(config.threads))
        arguments = engine_arguments(model, config, dtype, seed)
        arguments["enable_return_routed_experts"] = with_routes and not current_platform.is_cpu()
        self._llm = LLM(**arguments)
        self._routes = routes_of(self._llm) if with_routes else None
        self._policy_version = 0
        self._awake = True
        self._tokens, self._generate_seconds, self._sync_seconds = 0, 0.0, 0.0

    @property
    def policy_version(self) -> int:
        """Number of the sync whose weights the engine speaks with; 0 before the first."""
        return self._policy_version

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
    ) -> Iterator[Group]:
        """Samples `num_completions` answers to each prompt and yields each group as soon as all of its are finished.

        The same weights, request and seed give the same ids and log-probabilities to the bit, whatever the engine did
        before. Log-probabilities are the policy's own, before temperature, top_p and top_k. Leaving the iterator
        early ends the request.

        Raises ValueError when a prompt is empty or leaves no room for `max_tokens` in `max_model_len`, and when more
        than one completion is asked of temperature 0, which has only one.
        """
        self._check_ready()
        if sampling.temperature == 0 and num_completions > 1:
            raise ValueError(
                f"num_completions={num_completions} at sampling.temperature=0 would say the same thing again; "
                "ask for 1, or raise the temperature"
            )
        longest = self._max_model_len - sampling.max_tokens
        for index, prompt_ids in enumerate(prompts):
            if not 1 <= len(prompt_ids) <= longest:
                raise ValueError(
                    f"prompt {index} has {len(prompt_ids)} tokens, allowed are 1 to {longest} (rollout.max_model_len="
                    f"{self._max_model_len} less sampling.max_tokens={sampling.max_tokens}): raise max_model_len or "
                    "shorten the prompt"
                )
        params = SamplingParams(
            n=num_completions,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=[] if sampling.ignore_eos else self._ends,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return self._groups(prompts, params, seed)

    def prompt_logprobs(self, prompts: list[list[int]]) -> list[list[float]]:
        """Log-probability in nats of each prompt token after the first, from a forward pass with the present weights.

        The pass is the one that reads prompts (prefill); nothing is taken from a cache.
        """
        outputs = self._read(prompts, shared=False)
        return [cast(FlatLogprobs, output.prompt_logprobs).logprobs for output in outputs]

    def likelihoods(self, sequences: list[list[int]], starts: list[int]) -> list[Likelihood]:
        """What the policy thinks of each sequence's tokens from its start (1 or more) on.

        Sequences that begin alike are computed once as far as whole blocks of the cache go, so what shares a long
        context belongs together. Raises ValueError where there is nothing to score or no room in `max_model_len`.
        """
        _refuse_starts(sequences, starts, self._max_model_len)
        self._forget_prefixes()
        outputs = self._read(sequences, shared=True)
        # vLLM says nothing of a token that it predicted from a cached block: there its answer is uninitialised memory.
        cut = [i for i, output in enumerate(outputs) if not _reaches(output, starts[i])]
        for i, output in zip(cut, self._read([sequences[i] for i in cut], shared=False), strict=True):
            outputs[i] = output
        return [_likelihood(output, start) for output, start in zip(outputs, starts, strict=True)]

    def load_weights(self, buckets: Iterable[Bucket], version: int) -> list[TensorRecord]:
        """Takes a whole set of weights, under checkpoint names, and returns the manifest of what was loaded.

        All or nothing: every payload is checked against its record, and the names against the checkpoint the engine
        started from, before the first is loaded. The payloads are not copied on the way.

        Raises SyncError naming the tensor that is damaged, missing, unknown or of another shape.
        """
        self._check_ready()
        started = time.perf_counter()
        records, tensors = open_buckets(buckets, self._expected)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        if current_platform.is_cpu():
            self._llm.collective_rpc(mend_tied_head)
        self._forget_prefixes()
        self._policy_version = version
        self._sync_seconds += time.perf_counter() - started
        return records

    def sleep(self) -> None:
        """Leaves the accelerator's memory to the trainer, the weights kept on the host. On the CPU nothing moves."""
        if self._awake and not current_platform.is_cpu():
            self._llm.sleep(level=1)
        self._awake = False

    def wake(self) -> None:
        """Takes the memory back. Needed before anything else is asked of a sleeping engine."""
        if not self._awake and not current_platform.is_cpu():
            self._llm.wake_up()
        self._awake = True

    def metrics(self) -> dict[str, float]:
        """What was spent since the last call: `rollout/tokens_per_second` (sampled tokens), `.../generate_seconds`
        and `rollout/sync_seconds`. Seconds in which the reader of a stream kept the engine waiting are not counted."""
        seconds = self._generate_seconds
        measured = {
            "rollout/tokens_per_second": self._tokens / seconds if seconds else 0.0,
            "rollout/generate_seconds": seconds,
            "rollout/sync_seconds": self._sync_seconds,
        }
        self._tokens, self._generate_seconds, self._sync_seconds = 0, 0.0, 0.0
        return measured

    def _read(self, prompts: list[list[int]], *, shared: bool) -> list[RequestOutput]:
        """The prompts' own log-probabilities; shared: from the first token that no cached block holds."""
        self._check_ready()
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=not shared,
        )
        return sorted(self._outputs(prompts, params), key=lambda output: int(output.request_id))

    def _groups(self, prompts: list[list[int]], params: SamplingParams, seed: int) -> Iterator[Group]:
        self._forget_prefixes()
        self._llm.collective_rpc(_seed_worker, args=(seed,))
        started = time.perf_counter()
        with closing(self._outputs(prompts, params)) as outputs:
            for output in outputs:
                texts = [_text(self._tokenizer, sample.token_ids, self._silent_ids) for sample in output.outputs]
                group = _group(output, texts, self._routes, self._policy_version)
                self._tokens += sum(len(completion.token_ids) for completion in group.completions)
                self._generate_seconds += time.perf_counter() - started
                yield group
                started = time.perf_counter()

    def _outputs(self, prompts: list[list[int]], params: SamplingParams) -> Generator[RequestOutput, None, None]:
        """The engine's own loop: each request as it finishes, named by its place in `prompts`."""
        engine = self._llm.llm_engine
        assert not engine.has_unfinished_requests(), "two requests at once: finish or close the first stream"
        if self._routes:
            self._routes.forget()
        names = [str(index) for index in range(len(prompts))]
        for name, prompt_ids in zip(names, prompts, strict=True):
            engine.add_request(name, TokensPrompt(prompt_token_ids=prompt_ids), params)
        try:
            while engine.has_unfinished_requests():
                yield from cast(list[RequestOutput], engine.step())
        finally:
            engine.abort_request(names)

    def _forget_prefixes(self) -> None:
        forgotten = self._llm.reset_prefix_cache()
        assert forgotten, "prefixes are in use: finish or close the stream first"

    def _check_ready(self) -> None:
        if not self._awake:
            raise RuntimeError("the engine sleeps; wake it before anything is asked of it")


def _stops(tokenizer: PreTrainedTokenizerFast, model: Path, ends: Sequence[int]) -> list[int]:
    """The ids at which a completion ends."""
    own = cast(int | None, tokenizer.eos_token_id)
    return sorted({*ends, *eos_ids(model)} | (set() if own is None else {own}))


def _text(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int], silent_ids: Set[int | None]) -> str:
    """The ids as text, without `silent_ids`, which end a completion or pad it. Other special tokens are part of the
    text: a judge must see a <think>, and an answer that goes on with a turn of its own."""
    text_ids = [token_id for token_id in token_ids if token_id not in silent_ids]
    return str(tokenizer.decode(text_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _group(
    output: RequestOutput,
    texts: list[str],
    recorded: ReturnedRoutes | CapturedRoutes | None,
    policy_version: int,
) -> Group:
    prompt_ids = list(cast(list[int], output.prompt_token_ids))
    routes = recorded.take(output) if recorded else [None] * len(texts)
    completions: list[Completion] = []
    for sample, text, routes_TLK in zip(output.outputs, texts, routes, strict=True):
        if sample.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a completion of prompt {output.request_id} by '{sample.finish_reason}'")
        completions.append(
            Completion(
                token_ids=list(sample.token_ids),
                logprobs=cast(FlatLogprobs, sample.logprobs).logprobs,
                text=text,
                finish_reason=cast(Literal["stop", "length"], sample.finish_reason),
                policy_version=policy_version,
                routed_experts=None if routes_TLK is None else routes_TLK[len(prompt_ids) :],
            )
        )
    of_prompt = None if routes[0] is None else routes[0][: len(prompt_ids)]
    return Group(int(output.request_id), prompt_ids, completions, of_prompt)


def vllm_alone(
    model: Path,
    config: RolloutConfig,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    num_completions: int,
    repeats: int,
) -> list[float]:
    """Seconds of `LLM.generate` with vLLM's own defaults, in this process, float32; the first, slower run left out."""
    torch.set_num_threads(num_threads(config.threads))
    llm = LLM(
        model=str(model),
        dtype="float32",
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
        enforce_eager=current_platform.is_cpu(),
        distributed_executor_backend="uni",
        attention_backend="CPU_MLA" if current_platform.is_cpu() else None,  # another fails in float32 on some CPUs
    )
    params = SamplingParams(
        n=num_completions,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        ignore_eos=sampling.ignore_eos,
    )
    seconds: list[float] = []
    for _ in range(repeats + 1):
        llm.reset_prefix_cache()
        started = time.perf_counter()
        llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def engine_arguments(model: Path, config: RolloutConfig, dtype: str, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's LLM, which is mended where it needs it. Raises as Engine does."""
    if vllm.__version__ != EXAMINED_VLLM:
        raise RuntimeError(
            f"vLLM {vllm.__version__} is installed, but rollout/ was made for {EXAMINED_VLLM}: install that, "
            "or look again at its mends (the tests in tests/rollout show whether they are still needed)"
        )
    if "weights" in config.fp8 and dtype != "bfloat16":
        raise ValueError(
            f"rollout.fp8: 'weights' are quantised from model.dtype=bfloat16 only, not from {dtype}; set that, with "
            "sync.max_mean_gap and sync.max_gap raised to what is measured, or remove it"
        )
    arguments = {
        "model": str(model),
        "dtype": dtype,
        "seed": seed,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel_size,
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        "enforce_eager": current_platform.is_cpu(),  # there, compilation costs a start and gains nothing
        "distributed_executor_backend": "uni" if config.tensor_parallel_size == 1 else "mp",
        "async_scheduling": False,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "quantization": "fp8_per_block" if "weights" in config.fp8 else None,
        "kv_cache_dtype": "fp8" if "kv_cache" in config.fp8 else "auto",
    }
    if not current_platform.is_cpu():
        several = config.tensor_parallel_size > 1  # then each device holds whole experts, not a slice of every one
        has_experts = several and any(".experts." in name for name in checkpoint_shapes(model))
        return arguments | {"enable_sleep_mode": True, "enable_expert_parallel": has_experts}
    return arguments | cpu_arguments(model, config)


def _refuse_starts(sequences: list[list[int]], starts: list[int], max_model_len: int) -> None:
    for place, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        if not 1 <= start < len(sequence) < max_model_len:
            raise ValueError(
                f"sequence {place} has {len(sequence)} tokens and is scored from {start} on: it must be shorter than "
                f"rollout.max_model_len={max_model_len}, and the start within it, but not at 0"
            )


def _likelihood(output: RequestOutput, start: int) -> Likelihood:
    answer = cast(FlatLogprobs, output.prompt_logprobs)
    return Likelihood(answer.logprobs[start - 1 :], cast(list[int], answer.ranks[start - 1 :]))


def _reaches(output: RequestOutput, start: int) -> bool:
    """Whether the log-probabilities from the token at `start` on were computed."""
    ranks = cast(FlatLogprobs, output.prompt_logprobs).ranks[start - 1 :]
    return (output.num_cached_tokens or 0) < start and all(rank is not None and rank > 0 for rank in ranks)


def _seed_worker(worker: object, seed: int) -> None:
    torch.manual_seed(seed)
