"""What crosses the door of an engine: what was asked and said, and what weights arrived.

Token ids are the truth: text is for people and checkers only.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

NO_ROUTE = -1
"""In the place of an expert where none is known: the trainer's own gate decides for that token and layer."""
Routes = NDArray[np.int16]
"""Experts that tokens were sent to, [T, L, K]: L mixture layers in depth order (leading dense layers have no place), K
experts a token in no particular order; all K are NO_ROUTE where none is known."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer.

    token_ids: [T] ids as sampled, the end token included when finish_reason is "stop".
    logprobs: [T] log-probability of each id under the rollout policy, in nats.
    text: decoded, without the tokens that end or pad a completion; other special tokens stand in it as text.
    policy_version: which weights spoke: 0 before the first update, then the number of the sync.
    routed_experts: the experts each id went to when it was read. -1 for the last, which the engine never read; None
    where routes are not recorded.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: Literal["stop", "length"]
    policy_version: int
    routed_experts: Routes | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its G completions. `index` is the prompt's place in the request; `routed_experts` are those of the
    prompt's ids as the first completion saw them (what a completion did not take from its siblings' cached blocks it
    computed for itself)."""

    index: int
    prompt_ids: list[int]
    completions: list[Completion]
    routed_experts: Routes | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What the policy thinks of the last tokens of a sequence.

    logprobs: [T] log-probability of each, in nats, given all before it.
    ranks: [T] its place among all tokens by probability; 1 is what a greedy policy would have said.
    """

    logprobs: list[float]
    ranks: list[int]


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One line of the manifest: `dtype` is torch's name without the prefix, `checksum` is XXH3 of the bytes,
    which reads them five times as fast as zlib's CRC."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    checksum: int


class SyncError(Exception):
    """A weight sync that is not what was announced. The message names the tensor."""
