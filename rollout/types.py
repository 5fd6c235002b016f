"""What was asked and what was said. Token ids are the truth: text is for people and checkers only."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer.

    token_ids: [T] ids as sampled, the end token included when finish_reason is "stop".
    logprobs: [T] log-probability of each id under the rollout policy, in nats.
    text: decoded, without special tokens.
    policy_version: which weights spoke: 0 before the first update, then the number of the sync.
    routed_experts: reserved for routing replay; None where it was not recorded.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: Literal["stop", "length"]
    policy_version: int
    routed_experts: list[list[list[int]]] | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its G completions. `index` is the prompt's place in the request."""

    index: int
    prompt_ids: list[int]
    completions: list[Completion]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What the policy thinks of the last tokens of a sequence.

    logprobs: [T] log-probability of each, in nats, given all before it.
    ranks: [T] its place among all tokens by probability; 1 is what a greedy policy would have said.
    """

    logprobs: list[float]
    ranks: list[int]
