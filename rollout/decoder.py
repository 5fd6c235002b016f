"""Completions under way in one vLLM engine: added as they come, decoded step by step, withdrawn with their tokens.

vLLM only works inside `step`, since it runs in this process: between two steps weights may arrive. What it holds goes
on with the new ones then, over the keys and values that the old ones computed.
"""

import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerFast
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind

from rollout.kept import CapturedKept, ReturnedKept
from rollout.queue import CompletionKey, CompletionRequest, Progress
from rollout.routes import CapturedRoutes, ReturnedRoutes
from rollout.types import BEGUN, Begun, Completion, Routes

Finished = tuple[CompletionKey, Completion, Routes | None]


@dataclass
class _Running:
    """A request that vLLM works on, by the name that vLLM gave it, and the tokens that were reported."""

    request: CompletionRequest
    internal_name: str
    versions: list[tuple[int, int]]
    reported: int


class Decoder:
    """Decodes requests in vLLM's own loop.

    num_tokens, seconds: sampled tokens of finished completions, and time spent; a caller resets them.
    """

    def __init__(
        self,
        llm: LLM,
        tokenizer: PreTrainedTokenizerFast,
        stop_token_ids: Set[int],
        routes: ReturnedRoutes | CapturedRoutes | None,
        kept: ReturnedKept | CapturedKept | None,
    ) -> None:
        """stop_token_ids: ends of a completion, which are not part of its text."""
        self._llm, self._tokenizer, self._routes, self._kept = llm, tokenizer, routes, kept
        self._stop_token_ids = sorted(stop_token_ids)
        self._hidden_ids = {*stop_token_ids, cast(int | None, tokenizer.pad_token_id)}
        self._running: dict[str, _Running] = {}
        self._finished: list[Finished] = []  # while something else was computed
        self._prefilled: dict[str, RequestOutput] = {}
        self._last_report = time.monotonic()
        self.num_tokens, self.seconds = 0, 0.0

    @property
    def is_busy(self) -> bool:
        """True while completions are under way."""
        return bool(self._running or self._finished)

    def add(self, requests: Sequence[CompletionRequest], version: int) -> None:
        """Start completions under the weights of `version`. Without others under way, no prefix of earlier ones is
        reused."""
        if requests and not self._running:
            self.reset_prefix_cache()
            self._last_report = time.monotonic()
            for records in filter(None, (self._routes, self._kept)):
                records.clear()  # of aborted requests
        for request in requests:
            name, begun = ".".join(map(str, request.key)), request.begun
            token_ids = begun.token_ids if begun else []
            prompt = TokensPrompt(prompt_token_ids=request.prompt_ids + token_ids)
            internal_name = self._llm.llm_engine.add_request(name, prompt, self._params(request))
            running = _Running(request, internal_name, [*begun.versions] if begun else [], len(token_ids))
            _note_version(running.versions, len(token_ids), version)
            self._running[name] = running

    def advance(self, seconds: float) -> None:
        """Decode for `seconds`, a step at least, or until nothing is under way."""
        started = time.perf_counter()
        while self._running:
            self._step()
            if time.perf_counter() - started >= seconds:
                break
        self.seconds += time.perf_counter() - started

    def progress(self, room: int, report_seconds: float) -> Progress[Completion]:
        """Return what is finished, and every `report_seconds` the further tokens of what is not."""
        begun: dict[CompletionKey, Begun] = {}
        if time.monotonic() - self._last_report >= report_seconds:
            self._last_report = time.monotonic()
            for running in self._running.values():
                whole = self._begun(running)
                if whole and len(whole.token_ids) > running.reported:
                    places = slice(running.reported, None)
                    running.reported = len(whole.token_ids)
                    new = Begun(whole.token_ids[places], whole.logprobs[places], whole.versions)
                    begun[running.request.key] = new
        finished, self._finished = self._finished, []
        return Progress(finished, begun, room)

    def room(self, max_num_seqs: int) -> int:
        """Return how many completions to send: what vLLM can decode at once, and a few that wait for the next end."""
        waiting: int = self._llm.llm_engine.engine_core.engine_core.scheduler.get_request_counts()[1]  # pyright: ignore
        ahead = max(max_num_seqs // 8, 1)
        return 0 if waiting > ahead else max_num_seqs + ahead - len(self._running)

    def withdraw(self) -> dict[CompletionKey, Begun]:
        """Abort everything under way; return what was begun, each from its first token."""
        begun = {running.request.key: self._begun(running) for running in self._running.values()}
        self.drop({key.ticket for key in begun})
        return {key: tokens for key, tokens in begun.items() if tokens}

    def drop(self, tickets: Set[int]) -> None:
        """Abort the completions of requests."""
        names = [name for name, running in self._running.items() if running.request.key.ticket in tickets]
        self._llm.llm_engine.abort_request(names)
        for name in names:
            del self._running[name]
        self._finished = [finished for finished in self._finished if finished[0].ticket not in tickets]

    def use_version(self, version: int) -> None:
        """Note that tokens sampled from now on are of the weights of `version`."""
        for running in self._running.values():
            begun = self._begun(running)
            _note_version(running.versions, len(begun.token_ids) if begun else 0, version)

    def prefill(self, prompts: list[list[int]], *, use_prefix_cache: bool) -> list[RequestOutput]:
        """Compute the prompts' log-probabilities, in their order, beside what is under way. With the prefix cache,
        tokens of cached blocks have none."""
        params = SamplingParams(
            max_tokens=1,
            **self._greedy(),
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=not use_prefix_cache,
        )
        names = [f"prefill {index}" for index in range(len(prompts))]
        for name, prompt_ids in zip(names, prompts, strict=True):
            self._llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=prompt_ids), params)
        try:
            while len(self._prefilled) < len(names):
                self._step()
            return [self._prefilled[name] for name in names]
        finally:
            self._llm.llm_engine.abort_request(names)
            self._prefilled.clear()

    def reset_prefix_cache(self) -> None:
        """Forget computed prefixes. Completions must not be under way."""
        was_reset = self._llm.reset_prefix_cache()
        assert was_reset, "prefixes are in use: finish or close the stream first"

    def _step(self) -> None:
        for output in cast(list[RequestOutput], self._llm.llm_engine.step()):
            running = self._running.pop(output.request_id, None)
            if running is None:
                self._prefilled[output.request_id] = output
            else:
                self._finished.append(self._completed(running, output))

    def _completed(self, running: _Running, output: RequestOutput) -> Finished:
        request, sample = running.request, output.outputs[0]
        if sample.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended completion {request.key} by '{sample.finish_reason}'")
        begun = request.begun or Begun([], [], ())
        token_ids = begun.token_ids + list(sample.token_ids)
        routes_TLK = self._routes.pop(output) if self._routes else None
        kept_tokens = self._kept.pop(output) if self._kept else None
        self.num_tokens += len(sample.token_ids)
        versions = [span for span in running.versions if span[0] < len(token_ids)]
        prompt = slice(None, len(request.prompt_ids))
        completion = Completion(
            token_ids=token_ids,
            logprobs=begun.logprobs + cast(FlatLogprobs, sample.logprobs).logprobs,
            text=_decode(self._tokenizer, token_ids, self._hidden_ids),
            finish_reason=cast(Literal["stop", "length"], sample.finish_reason),
            policy_version=versions[0][1],
            routed_experts=None if routes_TLK is None else routes_TLK[len(request.prompt_ids) :],
            kept_tokens=kept_tokens,
            updates=tuple(versions[1:]),
        )
        is_first = request.key.sample == 0 and routes_TLK is not None
        return request.key, completion, routes_TLK[prompt] if is_first else None  # pyright: ignore

    def _begun(self, running: _Running) -> Begun | None:
        """Return the tokens of a completion under way, from its first; None where there are none, and where its kept
        tokens are recorded, so that it must be started anew."""
        if self._kept:
            return None
        state: Any = self._llm.llm_engine.output_processor.request_states[running.internal_name]
        sampled: list[int] = state.detokenizer.output_token_ids
        before = running.request.begun or Begun([], [], ())
        if not sampled:
            return running.request.begun
        logprobs: list[float] = state.logprobs_processor.logprobs.logprobs
        return Begun(before.token_ids + sampled, before.logprobs + logprobs, tuple(running.versions))

    def _params(self, request: CompletionRequest) -> SamplingParams:
        sampling, begun = request.sampling, len(request.begun.token_ids) if request.begun else 0
        random = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        return SamplingParams(
            **random if sampling.temperature else self._greedy(),
            seed=request.seed,
            max_tokens=sampling.max_tokens - begun,
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=[] if sampling.ignore_eos else self._stop_token_ids,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={BEGUN: begun},
        )

    def _greedy(self) -> dict[str, Any]:
        """Parameters that sample the likeliest token. An engine that returns kept tokens takes no temperature or top_k
        of 0."""
        return {"temperature": 1.0, "top_k": 1} if isinstance(self._kept, ReturnedKept) else {"temperature": 0.0}


def _note_version(versions: list[tuple[int, int]], place: int, version: int) -> None:
    """Note that tokens from `place` on are of `version`, in the place of a version that sampled none."""
    if versions and versions[-1][0] == place:
        versions.pop()
    if not versions or versions[-1][1] != version:
        versions.append((place, version))


def _decode(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int], hidden_ids: Set[int | None]) -> str:
    """Decode a completion without `hidden_ids`, its end and padding tokens. Other special tokens stay in the text: a
    judge must see a <think>, and a completion that opens another turn."""
    text_ids = [token_id for token_id in token_ids if token_id not in hidden_ids]
    return str(tokenizer.decode(text_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
