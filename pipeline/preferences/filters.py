"""Which comparisons are kept, and why the others are not.

Each filter says of every comparison that is left the reason to drop it, or None. They work in an order of their own, by
a hash of content and seed: neither what is dropped nor the order of what is kept depends on the order of the rows.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from configs.preferences import PairFilters
from pipeline.data.comparisons import Comparison
from pipeline.preferences.similarity import near_duplicates
from pipeline.preferences.split import prompt_key

Reasons = list[str | None]


@dataclass(frozen=True, slots=True)
class Filtered:
    """What is kept, and each of the others with the reason it was dropped for."""

    kept: list[Comparison]
    dropped: list[tuple[str, Comparison]]


def filtered(
    comparisons: Sequence[Comparison], filters: PairFilters, shares: Mapping[str, float], seed: int
) -> Filtered:
    """`comparisons` through every filter in turn, then cut down to the `shares` of their domains, if there are any.

    Raises ValueError where `shares` leaves out a domain that is there, or names one of which nothing is left.
    """
    steps: list[Callable[[list[Comparison]], Reasons]] = [
        lambda left: _narrow(left, filters.min_margin),
        lambda left: _uneven(left, filters.max_length_ratio),
        _exact_duplicates,
        lambda left: _surplus(left, filters.pairs_per_prompt),
        lambda left: _near_duplicates(left, filters.max_similarity),
    ]
    if filters.balance_length:
        steps.append(_unbalanced)
    if shares:
        steps.append(lambda left: _past_share(left, shares))
    left = sorted(comparisons, key=lambda one: (_digest(one, seed), one.source, one.row))
    dropped: list[tuple[str, Comparison]] = []
    for step in steps:
        reasons = step(left)
        dropped += [(reason, one) for reason, one in zip(reasons, left, strict=True) if reason is not None]
        left = [one for reason, one in zip(reasons, left, strict=True) if reason is None]
    return Filtered(left, dropped)


def is_longer(comparison: Comparison) -> int:
    """1 where the best answer has more characters than the worst, -1 where it has fewer, else 0."""
    better, worse = len(comparison.answers[0]), len(comparison.answers[-1])
    return (better > worse) - (better < worse)


def _narrow(left: list[Comparison], min_margin: float) -> Reasons:
    def reason(margin: float | None) -> str | None:
        if margin is None or 0 < margin >= min_margin:
            return None
        return "equal scores" if margin == 0 else "margin"

    return [reason(one.margin) for one in left]


def _uneven(left: list[Comparison], max_ratio: float | None) -> Reasons:
    def too_uneven(one: Comparison) -> bool:
        lengths = sorted((len(one.answers[0]), len(one.answers[-1])))
        return max_ratio is not None and lengths[1] > max_ratio * lengths[0]

    return ["length ratio" if too_uneven(one) else None for one in left]


def _exact_duplicates(left: list[Comparison]) -> Reasons:
    seen: set[tuple[str, str]] = set()
    reasons: Reasons = []
    for one in left:
        content = one.domain, _digest(one)
        reasons.append("exact duplicate" if content in seen else None)
        seen.add(content)
    return reasons


def _surplus(left: list[Comparison], per_prompt: int) -> Reasons:
    ranks: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, one in enumerate(left):
        ranks[one.domain, prompt_key(one.messages)].append(index)
    kept: set[int] = set()
    for of_prompt in ranks.values():
        kept.update(sorted(of_prompt, key=lambda index: -(left[index].margin or 0.0))[:per_prompt])
    return [None if index in kept else "more of one prompt" for index in range(len(left))]


def _near_duplicates(left: list[Comparison], max_similarity: float) -> Reasons:
    texts = [" ".join([*(message["content"] for message in one.messages), *one.answers]) for one in left]
    duplicate = near_duplicates(texts, [prompt_key(one.messages) for one in left], max_similarity)
    return ["near-duplicate" if found else None for found in duplicate]


def _unbalanced(left: list[Comparison]) -> Reasons:
    surplus: Counter[str] = Counter()
    for one in left:
        surplus[one.domain] += is_longer(one)

    def reasons() -> Iterator[str | None]:
        for one in left:
            drop = is_longer(one) == 1 and surplus[one.domain] > 0
            surplus[one.domain] -= drop
            yield "length balance" if drop else None

    return list(reasons())


def _past_share(left: list[Comparison], shares: Mapping[str, float]) -> Reasons:
    counts = Counter(one.domain for one in left)
    for domain in counts.keys() - shares.keys():
        raise ValueError(f"shares: {counts[domain]} comparisons are of domain '{domain}', which has no share; give one")
    for domain in shares.keys() - counts.keys():
        raise ValueError(
            f"shares.{domain}: no comparison of this domain is left, so none of any; it has {dict(counts)}"
        )
    total = min(counts[domain] / share for domain, share in shares.items())
    places = Counter({domain: round(total * share) for domain, share in shares.items()})

    def reasons() -> Iterator[str | None]:
        for one in left:
            places[one.domain] -= 1
            yield "share of the domain" if places[one.domain] < 0 else None

    return list(reasons())


def _digest(comparison: Comparison, seed: int | None = None) -> str:
    content = [seed, comparison.messages, comparison.answers]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
