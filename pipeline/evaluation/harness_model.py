"""Our engines as a model of the lm-evaluation-harness. Imported only where the harness is installed and asked for."""

from collections.abc import Sequence
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerFast

from configs.sampling import SamplingConfig
from pipeline.evaluation.suites import Session, likelihoods, watched
from rollout.types import TokenLogprobs


class EngineModel(TemplateLM):
    """Speaks and scores through `session.rollout`.

    A text begins with the token that begins a sequence, where the tokenizer has one; in the chat template, with what
    the template puts there. What the engines can't do, stopping at a text, is done after: the completion is cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, session: Session, *, chat: bool, window_tokens: int) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerFast = tokenizer
        self._session, self._window_tokens = session, window_tokens
        self._begin: list[int] = [] if chat or tokenizer.bos_token_id is None else [self.prefix_token_id]
        self.num_spoken, self.num_truncated = 0, 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a completion."""
        return cast(int, self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is predicted from."""
        begin = cast(int | None, self.tokenizer.bos_token_id)
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Asked for together with the chat template; names nothing, since nothing is cached."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, up to where the assistant begins to speak, or goes on with what it has begun."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of `string`; behind the token that begins a sequence unless `add_special_tokens` is false."""
        token_ids: list[int] = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        return token_ids if add_special_tokens is False else self._begin + token_ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of which each predicts what the ones before did not."""
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
        answers = iter(self._likelihoods([pair for of_text in windows for pair in of_text]))
        return [sum(sum(next(answers).logprobs) for _ in of_text) for of_text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A completion of each context, cut before the first of its `until`; at most `max_gen_toks` tokens long, and
        at most the evaluation's `max_tokens`."""
        texts: dict[int, str] = {}
        asked = [cast(tuple[str, dict[str, Any]], request.args) for request in requests]
        settings = [self._sampling(wishes) for _, wishes in asked]
        for sampling in dict.fromkeys(settings):
            places = [place for place, own in enumerate(settings) if own == sampling]
            prompts = [self.tok_encode(asked[place][0]) or [self.prefix_token_id] for place in places]
            stream = self._session.rollout.generate(prompts, sampling, 1, self._session.seed)
            for group in watched(stream, "lm_eval", len(prompts)):
                place, [completion] = places[group.index], group.completions
                stops = asked[place][1].get("until") or []
                texts[place], stopped = _until(completion.text, [stops] if isinstance(stops, str) else stops)
                self.num_spoken += 1
                self.num_truncated += completion.finish_reason == "length" and not stopped
        return [texts[place] for place in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers = self._likelihoods([(context, continuation) for _, context, continuation in requests])
        return [(sum(answer.logprobs), all(rank == 1 for rank in answer.ranks)) for answer in answers]

    def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[TokenLogprobs]:
        sequences = [context + continuation for context, continuation in pairs]
        starts = [len(context) for context, _ in pairs]
        return list(likelihoods(self._session.rollout, sequences, starts, "lm_eval"))

    def _sampling(self, wishes: dict[str, Any]) -> SamplingConfig:
        """The task's own way of sampling; greedy unless it says otherwise."""
        ours = self._session.sampling.max_tokens
        max_tokens = min(int(wishes.get("max_gen_toks", ours)), ours)
        temperature = float(wishes.get("temperature", 1.0)) if wishes.get("do_sample") else 0.0
        if temperature == 0:
            return SamplingConfig(temperature=0.0, max_tokens=max_tokens)
        top_p, top_k = float(wishes.get("top_p", 1.0)), max(int(wishes.get("top_k", 0)), 0)
        return SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens)


def _until(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first of the stops that is in it, and whether one is."""
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))], bool(ends)
