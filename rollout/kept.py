"""Record the tokens that top_k and top_p keep for each sampled token (DeepSeek-V3.2 section 3.1, arXiv:2512.02556).

On accelerators vLLM returns them. On the CPU it can't, since its model runner that does needs Triton; there we read
them from the sampler's log-probabilities, which are minus infinity for all other tokens.

Shape suffixes: R rows of a step, V vocabulary, T tokens of a completion.
"""

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from rollout.types import KeptTokens


class ReturnedKept:
    """Kept tokens that vLLM returns with each output, and not before: a completion under way can't be continued."""

    def pop(self, output: Any, begun: int) -> KeptTokens:
        """Return the kept tokens of a finished request, vLLM's RequestOutput, which began with `begun` tokens."""
        assert not begun, "a completion with kept tokens is not continued"
        return _joined([np.array(x, np.int32) for x in output.outputs[0].sampling_mask.token_ids])

    def clear(self) -> None:
        """Do nothing: vLLM returns the tokens with the output."""


class CapturedKept:
    """Kept tokens read from the sampler of an engine in this process, at every step."""

    def __init__(self, worker: Any) -> None:
        sampler = worker.model_runner.sampler.topk_topp_sampler
        self._sample, sampler.forward = sampler.forward, self._step
        self._kept: defaultdict[str, dict[int, np.ndarray]] = defaultdict(dict)  # by request and place of the token

    def pop(self, output: Any, begun: int) -> KeptTokens | None:
        """Return the kept tokens of a finished request, vLLM's RequestOutput, which began with `begun` tokens; None
        where nothing was cut off."""
        kept = self.of(output.request_id, begun, len(output.outputs[0].token_ids))
        self._kept.pop(output.request_id, None)
        return kept

    def of(self, name: str, begun: int, count: int) -> KeptTokens | None:
        """Return those of the `count` sampled tokens of a request under way, which began with `begun` tokens."""
        kept = self._kept.get(name)
        return None if kept is None else _joined([kept[place] for place in range(begun, begun + count)])

    def clear(self) -> None:
        """Drop the tokens of aborted requests."""
        self._kept.clear()

    def _step(self, logits: torch.Tensor, generators: dict[int, Any], k: Any, p: Any) -> Any:
        sampled, logprobs_RV = self._sample(logits, generators, k, p)
        if k is not None or p is not None:
            row_M, token_M = torch.nonzero(logprobs_RV > -torch.inf, as_tuple=True)
            ends = torch.bincount(row_M, minlength=len(logprobs_RV)).cumsum(0)[:-1].numpy()
            for row, kept in enumerate(np.split(token_M.numpy().astype(np.int32), ends)):
                # A prompt that is computed in parts samples a token with each, at the same place.
                self._kept[generators[row].request][generators[row].place] = kept
        return sampled, logprobs_RV


def kept_of(llm: Any) -> ReturnedKept | CapturedKept:
    """Start recording the kept tokens of vLLM's `llm`, which needs return_sampling_mask on an accelerator."""
    returns_kept = llm.llm_engine.model_config.return_sampling_mask
    return ReturnedKept() if returns_kept else llm.collective_rpc(CapturedKept)[0]


def _joined(kept: list[np.ndarray]) -> KeptTokens:
    return KeptTokens(np.concatenate(kept), np.array([len(tokens) for tokens in kept], np.int32))
