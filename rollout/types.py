"""Records that an engine returns: groups of completions, log-probabilities, and the manifest of a weight sync.

Training uses token ids only; text is for judges and people. The tokens of a completion go as columns from the
engine's node to the ranks; the driver of both holds a reference to them, with the text and figures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

NO_ROUTE = -1
"""Stands for an unknown expert: the trainer's own gate then routes that token in that layer."""
BEGUN = "begun"
"""Key of a request's number of tokens that it continues from, in vLLM's `SamplingParams.extra_args`."""
Transport = Literal["store", "shared", "broadcast"]
"""Ways of buckets from ranks to engines: through Ray's object store; through memory of a device that both share
(rollout.device_memory); or by NCCL from the ranks' devices to the engines' (rollout.broadcast)."""
Routes = NDArray[np.int16 | np.int8]
"""Experts that tokens were routed to, [T, L, K]: L mixture layers in depth order (leading dense layers are left out), K
experts a token in no particular order; all K are NO_ROUTE where the route is unknown."""


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """Tokens that top_k and top_p kept for each of T sampled tokens: it was one of them, and had their probabilities'
    share.

    token_ids: int32 [M], those of one sampled token after the other. counts: int32 [T], their numbers, M in all.
    """

    token_ids: NDArray[np.int32]
    counts: NDArray[np.int32]

    @classmethod
    def joined(cls, parts: Sequence["KeptTokens"]) -> "KeptTokens":
        """Join the kept tokens of several completions."""
        return cls(np.concatenate([x.token_ids for x in parts]), np.concatenate([x.counts for x in parts]))

    def since(self, place: int) -> "KeptTokens":
        """Return those of the sampled tokens from `place` on."""
        return KeptTokens(self.token_ids[self.counts[:place].sum() :], self.counts[place:])

    def padded(self) -> NDArray[np.int32]:
        """Return the kept tokens of each sampled token in a row, int32 [T, K], padded with -1."""
        padded_TK = np.full((len(self.counts), self.counts.max(initial=1)), -1, np.int32)
        padded_TK[np.arange(padded_TK.shape[1]) < self.counts[:, None]] = self.token_ids
        return padded_TK


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer.

    token_ids: [T] ids as sampled, the end token included when finish_reason is "stop".
    logprobs: [T] log-probability of each id in the distribution that it was sampled from, in nats.
    text: decoded, without the tokens that end or pad a completion; other special tokens stand in it as text.
    policy_version: number of the sync whose weights sampled its first token; 0 before the first.
    updates: (place of a token, version) of each later sync whose weights sampled the tokens from there on.
    routed_experts: experts of each id, [T, L, K]. NO_ROUTE for the last id, which the engine never reads; None where
        routes are not recorded.
    kept_tokens: those of each id; None where top_k and top_p keep all, or they are not recorded.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: Literal["stop", "length"]
    policy_version: int
    routed_experts: Routes | None = field(default=None, compare=False)
    kept_tokens: KeptTokens | None = field(default=None, compare=False)
    updates: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def stored(self) -> "StoredCompletion":
        """Return the completion without its tokens, which `columns` returns."""
        return StoredCompletion(
            self.text,
            self.finish_reason,
            self.policy_version,
            self.num_tokens,
            math.fsum(self.logprobs),
            repetition_rate(self.token_ids),
            None if self.kept_tokens is None else len(self.kept_tokens.token_ids),
            self.updates,
        )

    def columns(self) -> "CompletionColumns":
        """Return the tokens as columns."""
        token_ids, logprobs = np.asarray(self.token_ids, np.int32), np.asarray(self.logprobs, np.float32)
        routes = None if self.routed_experts is None else narrow_routes(self.routed_experts)
        versions = ((0, self.policy_version), *self.updates)
        return CompletionColumns(token_ids, logprobs, routes, self.kept_tokens, versions)


@dataclass(frozen=True, slots=True)
class CompletionColumns:
    """Tokens of a completion as columns: token_ids int32 [T], logprobs float32 [T], the rest as in Completion.

    versions: (place of a token, version of the weights that sampled it and those after it).
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    routed_experts: Routes | None = None
    kept_tokens: KeptTokens | None = None
    versions: tuple[tuple[int, int], ...] = ((0, 0),)

    @property
    def token_versions(self) -> NDArray[np.int64]:
        """Version of the weights that sampled each token, [T]."""
        versions = np.empty(len(self.token_ids), np.int64)
        for place, version in self.versions:
            versions[place:] = version
        return versions


@dataclass(frozen=True, slots=True)
class StoredCompletion:
    """A completion whose tokens lie in the object store, as its driver knows it.

    text, finish_reason, policy_version, updates: see Completion. logprob_sum: in nats.
    repetition_rate: see the function.
    num_kept: the sum of KeptTokens.counts; None where they are not recorded.
    columns: reference to its CompletionColumns, on the node that sampled it.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    policy_version: int
    num_tokens: int
    logprob_sum: float
    repetition_rate: float
    num_kept: int | None = None
    updates: tuple[tuple[int, int], ...] = ()
    columns: Any = field(default=None, compare=False)

    @property
    def version_counts(self) -> list[tuple[int, int]]:
        """(version, tokens that its weights sampled) of each version, in the order of the tokens."""
        starts = [(0, self.policy_version), *self.updates, (self.num_tokens, -1)]
        return [(version, end - start) for (start, version), (end, _) in pairwise(starts)]


AnyCompletion = TypeVar("AnyCompletion", Completion, StoredCompletion)


@dataclass(frozen=True, slots=True)
class Begun:
    """Tokens of a completion that has not ended.

    token_ids, logprobs, kept_tokens: of T tokens, as those of a Completion. versions: (place of a token, version of the
    weights that sampled it and those after it), of the whole completion so far.
    """

    token_ids: list[int]
    logprobs: list[float]
    versions: tuple[tuple[int, int], ...]
    kept_tokens: KeptTokens | None = None

    def joined(self, further: "Begun") -> "Begun":
        """Append the tokens that follow."""
        kept = [each.kept_tokens for each in (self, further) if each.kept_tokens is not None]
        return Begun(
            self.token_ids + further.token_ids,
            self.logprobs + further.logprobs,
            further.versions,
            KeptTokens.joined(kept) if kept else None,
        )

    def since(self, place: int) -> "Begun":
        """Return the tokens from `place` on."""
        kept = None if self.kept_tokens is None else self.kept_tokens.since(place)
        return Begun(self.token_ids[place:], self.logprobs[place:], self.versions, kept)


@dataclass(frozen=True)
class AnyGroup(Generic[AnyCompletion]):
    """A prompt and its G completions.

    index: place of the prompt in the request.
    routed_experts: experts of the prompt's ids, as the first completion computed or found them in the prefix cache; in
        a StoredGroup a reference to them. None where routes are not recorded.
    """

    index: int
    prompt_ids: list[int]
    completions: list[AnyCompletion]
    routed_experts: Any = field(default=None, compare=False)


Group = AnyGroup[Completion]
StoredGroup = AnyGroup[StoredCompletion]


def narrow_routes(experts_TLK: Routes) -> Routes:
    """Return routes as int8 where all experts are below 128."""
    return experts_TLK if experts_TLK.max(initial=0) > 127 else experts_TLK.astype(np.int8)


_GRAM = 4
"""Length of the n-grams whose repetition is counted, in tokens."""


def repetition_rate(token_ids: Sequence[int]) -> float:
    """Share of a completion's 4-grams of token ids that occur earlier in it; 0 for fewer than 4 tokens."""
    grams = list(zip(*(token_ids[shift:] for shift in range(_GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of the last T tokens of a sequence.

    logprobs: [T] log-probability of each token, in nats, given all tokens before it.
    ranks: [T] place of each token among all by probability; 1 is the greedy choice.
    """

    logprobs: list[float]
    ranks: list[int]


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One line of a sync's manifest.

    dtype: torch's name without the prefix.
    checksum: XXH3 of the bytes, five times as fast as zlib's CRC.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    checksum: int


@dataclass(frozen=True, slots=True)
class ReceivedWeights:
    """Result of a sync in an engine.

    records: the manifest, in order of arrival.
    held_bytes: the most bytes of buckets that a worker held at a time.
    seconds: time that loading took.
    """

    records: list[TensorRecord]
    held_bytes: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupAddress:
    """Address at which the group of a rank meets, and its number of processes."""

    host: str
    port: int
    world_size: int


class SyncError(Exception):
    """The tensors of a weight sync are not those that were sent. The message names one."""
