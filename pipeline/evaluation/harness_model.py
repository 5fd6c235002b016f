"""The engines as a model of the lm-evaluation-harness. Import it only where the harness is installed."""

from collections.abc import Sequence
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerFast

from configs.sampling import SamplingConfig
from pipeline.evaluation.suites import Session, batched_likelihoods, with_progress
from rollout.types import TokenLogprobs


class EngineModel(TemplateLM):
    """Generates and scores through `session.rollout`.

    A text starts with the token that begins a sequence, if the tokenizer has one, or as the chat template does. Engines
    do not stop at texts, so completions are cut at them afterwards.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, session: Session, *, chat: bool, window_tokens: int) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerFast = tokenizer
        self._session, self._window_tokens = session, window_tokens
        self._begin: list[int] = [] if chat or tokenizer.bos_token_id is None else [self.prefix_token_id]
        self.num_completions, self.num_truncated = 0, 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a completion."""
        return cast(int, self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        begin = cast(int | None, self.tokenizer.bos_token_id)
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """A key of the harness's cache, which is off."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render the conversation up to the assistant's turn, or within it without a generation prompt."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids, after the token that begins a sequence unless `add_special_tokens` is false."""
        token_ids: list[int] = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        return token_ids if add_special_tokens is False else self._begin + token_ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows that predict each token once."""
        windows = [
            [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(
                    self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self._window_tokens - 1,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scored = iter(self._likelihoods([pair for pairs in windows for pair in pairs]))
        return [sum(sum(next(scored).logprobs) for _ in pairs) for pairs in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a completion of each context, cut before the first of its `until`.

        A completion has at most `max_gen_toks` tokens, and at most the evaluation's `max_tokens`.
        """
        texts: dict[int, str] = {}
        arguments = [cast(tuple[str, dict[str, Any]], request.args) for request in requests]
        samplings = [self._sampling(options) for _, options in arguments]
        for sampling in dict.fromkeys(samplings):
            indices = [index for index, own in enumerate(samplings) if own == sampling]
            prompts = [self.tok_encode(arguments[index][0]) or [self.prefix_token_id] for index in indices]
            stream = self._session.rollout.generate(prompts, sampling, 1, self._session.seed)
            for group in with_progress(stream, "lm_eval", len(prompts)):
                index, [completion] = indices[group.index], group.completions
                stops = arguments[index][1].get("until") or []
                texts[index], stopped = _until(completion.text, [stops] if isinstance(stops, str) else stops)
                self.num_completions += 1
                self.num_truncated += completion.finish_reason == "length" and not stopped
        return [texts[index] for index in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scored = self._likelihoods([(context, continuation) for _, context, continuation in requests])
        return [(sum(likelihood.logprobs), all(rank == 1 for rank in likelihood.ranks)) for likelihood in scored]

    def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[TokenLogprobs]:
        sequences = [context + continuation for context, continuation in pairs]
        starts = [len(context) for context, _ in pairs]
        return list(batched_likelihoods(self._session.rollout, sequences, starts, "lm_eval"))

    def _sampling(self, options: dict[str, Any]) -> SamplingConfig:
        """Return the task's sampling settings, greedy by default."""
        most = self._session.sampling.max_tokens
        max_tokens = min(int(options.get("max_gen_toks", most)), most)
        temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
        if temperature == 0:
            return SamplingConfig(temperature=0.0, max_tokens=max_tokens)
        top_p, top_k = float(options.get("top_p", 1.0)), max(int(options.get("top_k", 0)), 0)
        return SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens)


def _until(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Cut `text` before the first stop in it; return it and whether there was one."""
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))], bool(ends)
