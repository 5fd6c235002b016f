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
from rollout.types import BEGUN, Begun, Completion, KeptTokens, Routes

Finished = tuple[CompletionKey, Completion, Routes | None]


@dataclass
class _Running:
    """A request that vLLM works on, with vLLM's state of it, and the number of its tokens that were reported."""

    request: CompletionRequest
    state: Any
    versions: list[tuple[int, int]]
    reported: int

    @property
    def name(self) -> str:
        return ".".join(map(str, self.request.key))

    @property
    def sampled(self) -> list[int]:
        """Tokens that this engine has sampled."""
        return self.state.detokenizer.output_token_ids

    def begun(self, recorder: ReturnedKept | CapturedKept | None) -> Begun | None:
        """Return the tokens of the completion from its first, with the kept tokens of `recorder`; None where there are
        none, and where vLLM tells kept tokens at the end only, so that the completion must be started anew."""
        if isinstance(recorder, ReturnedKept):
            return None
        before, sampled = self.request.begun, [*self.sampled]
        if not sampled:
            return before
        kept = recorder.of(self.name, len(before.token_ids) if before else 0, len(sampled)) if recorder else None
        begun = Begun(sampled, [*self.state.logprobs_processor.logprobs.logprobs], tuple(self.versions), kept)
        return before.joined(begun) if before else begun


class Decoder:
    """Decodes requests in vLLM's own loop.

    A progress has the tokens of finished and of withdrawn completions, and the time spent, since the last one.
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
        self._num_tokens, self._seconds, self._num_wasted = 0, 0.0, 0

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
            begun = request.begun or Begun([], [], ())
            running = _Running(request, None, [*begun.versions], len(begun.token_ids))
            prompt = TokensPrompt(prompt_token_ids=request.prompt_ids + begun.token_ids)
            internal_name = self._llm.llm_engine.add_request(running.name, prompt, self._params(request))
            running.state = self._llm.llm_engine.output_processor.request_states[internal_name]
            _note_version(running.versions, len(begun.token_ids), version)
            self._running[running.name] = running

    def advance(self, seconds: float) -> None:
        """Decode for `seconds`, a step at least, or until nothing is under way."""
        started = time.perf_counter()
        while self._running:
            self._step()
            if time.perf_counter() - started >= seconds:
                break
        self._seconds += time.perf_counter() - started

    def progress(self, room: int, report_seconds: float) -> Progress[Completion]:
        """Return what is finished, and every `report_seconds` the further tokens of what is not."""
        begun: dict[CompletionKey, Begun] = {}
        if time.monotonic() - self._last_report >= report_seconds:
            self._last_report = time.monotonic()
            for running in self._running.values():
                whole = running.begun(self._kept)
                if whole and len(whole.token_ids) > running.reported:
                    begun[running.request.key] = whole.since(running.reported)
                    running.reported = len(whole.token_ids)
        progress = Progress(self._finished, begun, room, self._num_tokens, self._seconds, self._num_wasted)
        self._finished, self._num_tokens, self._seconds, self._num_wasted = [], 0, 0.0, 0
        return progress

    def room(self, max_num_seqs: int) -> int:
        """Return how many completions to send: what vLLM can decode at once, and a few that wait for the next end."""
        waiting: int = self._llm.llm_engine.engine_core.engine_core.scheduler.get_request_counts()[1]  # pyright: ignore
        ahead = max(max_num_seqs // 8, 1)
        return 0 if waiting > ahead else max_num_seqs + ahead - len(self._running)

    def withdraw(self) -> dict[CompletionKey, Begun]:
        """Abort everything under way; return what was begun, each from its first token. The rest is sampled anew."""
        begun: dict[CompletionKey, Begun] = {}
        for running in self._running.values():
            tokens, sampled = running.begun(self._kept), len(running.sampled)
            self._num_tokens += sampled
            if tokens:
                begun[running.request.key] = tokens
            else:
                self._num_wasted += sampled
        self._num_wasted += sum(completion.num_tokens for _, completion, _ in self._finished)
        self._abort(list(self._running))
        self._finished = []
        return begun

    def drop(self, tickets: Set[int]) -> None:
        """Abort the completions of requests."""
        self._abort([name for name, running in self._running.items() if running.request.key.ticket in tickets])
        self._finished = [finished for finished in self._finished if finished[0].ticket not in tickets]

    def use_version(self, version: int) -> None:
        """Note that tokens sampled from now on are of the weights of `version`."""
        for running in self._running.values():
            begun = running.begun(self._kept)
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

    def _abort(self, names: list[str]) -> None:
        self._llm.llm_engine.abort_request(names)
        for name in names:
            del self._running[name]

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
        kept_tokens = self._kept.pop(output, len(begun.token_ids)) if self._kept else None
        if begun.kept_tokens and kept_tokens:
            kept_tokens = KeptTokens.joined([begun.kept_tokens, kept_tokens])
        self._num_tokens += len(sample.token_ids)
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
