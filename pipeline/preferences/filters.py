"""Filters of comparisons, which count every dropped one by its reason.

A filter returns for each comparison the reason to drop it, or None. The comparisons are first sorted by a hash of
content and seed, so the order of the rows decides neither the dropped ones nor the order of the result.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from configs.preferences import PairFilters
from pipeline.data.comparisons import Comparison
from pipeline.preferences.similarity import near_duplicates
from pipeline.preferences.split import prompt_key

Reasons = list[str | None]


@dataclass(frozen=True, slots=True)
class FilterResult:
    """The comparisons kept, and each dropped one with its reason."""

    kept: list[Comparison]
    dropped: list[tuple[str, Comparison]]


def filter_comparisons(
    comparisons: Sequence[Comparison], filters: PairFilters, shares: Mapping[str, float], seed: int
) -> FilterResult:
    """Apply every filter in turn, then cut domains down to their `shares`, if any.

    Raises ValueError where `shares` leaves out a domain, or names one without comparisons.
    """
    steps: list[Callable[[list[Comparison]], Reasons]] = [
        partial(_narrow_margins, min_margin=filters.min_margin),
        partial(_uneven_lengths, max_ratio=filters.max_length_ratio),
        _exact_duplicates,
        partial(_prompt_surplus, most=filters.pairs_per_prompt),
        partial(_near_duplicates, max_similarity=filters.max_similarity),
    ]
    if filters.balance_length:
        steps.append(_length_surplus)
    if shares:
        steps.append(partial(_past_share, shares=shares))
    kept_comparisons = sorted(
        comparisons, key=lambda comparison: (_digest(comparison, seed), comparison.source, comparison.row)
    )
    dropped: list[tuple[str, Comparison]] = []
    for step in steps:
        outcomes = list(zip(step(kept_comparisons), kept_comparisons, strict=True))
        dropped += [(reason, comparison) for reason, comparison in outcomes if reason is not None]
        kept_comparisons = [comparison for reason, comparison in outcomes if reason is None]
    return FilterResult(kept_comparisons, dropped)


def longer_answer(comparison: Comparison) -> int:
    """Return 1 where the best answer has more characters than the worst, -1 where it has fewer, else 0."""
    better, worse = len(comparison.answers[0]), len(comparison.answers[-1])
    return (better > worse) - (better < worse)


def _narrow_margins(comparisons: list[Comparison], min_margin: float) -> Reasons:
    def reason(margin: float | None) -> str | None:
        if margin is None or 0 < margin >= min_margin:
            return None
        return "equal scores" if margin == 0 else "margin"

    return [reason(comparison.margin) for comparison in comparisons]


def _uneven_lengths(comparisons: list[Comparison], max_ratio: float | None) -> Reasons:
    def is_uneven(comparison: Comparison) -> bool:
        shorter, longer = sorted((len(comparison.answers[0]), len(comparison.answers[-1])))
        return max_ratio is not None and longer > max_ratio * shorter

    return ["length ratio" if is_uneven(comparison) else None for comparison in comparisons]


def _exact_duplicates(comparisons: list[Comparison]) -> Reasons:
    contents: set[tuple[str, str]] = set()
    reasons: Reasons = []
    for comparison in comparisons:
        content = comparison.domain, _digest(comparison)
        reasons.append("exact duplicate" if content in contents else None)
        contents.add(content)
    return reasons


def _prompt_surplus(comparisons: list[Comparison], most: int) -> Reasons:
    indices: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, comparison in enumerate(comparisons):
        indices[comparison.domain, prompt_key(comparison.messages)].append(index)
    kept_indices: set[int] = set()
    for of_prompt in indices.values():
        kept_indices.update(sorted(of_prompt, key=lambda index: -(comparisons[index].margin or 0.0))[:most])
    return [None if index in kept_indices else "more of one prompt" for index in range(len(comparisons))]


def _near_duplicates(comparisons: list[Comparison], max_similarity: float) -> Reasons:
    texts = [" ".join([*(message["content"] for message in row.messages), *row.answers]) for row in comparisons]
    groups = [prompt_key(row.messages) for row in comparisons]
    return ["near-duplicate" if duplicate else None for duplicate in near_duplicates(texts, groups, max_similarity)]


def _length_surplus(comparisons: list[Comparison]) -> Reasons:
    surplus: Counter[str] = Counter()
    for comparison in comparisons:
        surplus[comparison.domain] += longer_answer(comparison)
    reasons: Reasons = []
    for comparison in comparisons:
        drop = longer_answer(comparison) == 1 and surplus[comparison.domain] > 0
        surplus[comparison.domain] -= drop
        reasons.append("length balance" if drop else None)
    return reasons


def _past_share(comparisons: list[Comparison], shares: Mapping[str, float]) -> Reasons:
    counts = Counter(comparison.domain for comparison in comparisons)
    for domain in counts.keys() - shares.keys():
        raise ValueError(f"shares: {counts[domain]} comparisons are of domain '{domain}', which has no share; give one")
    for domain in shares.keys() - counts.keys():
        raise ValueError(
            f"shares.{domain}: no comparison of this domain is left, only {dict(counts)}; remove its share"
        )
    total = min(counts[domain] / share for domain, share in shares.items())
    places = Counter({domain: round(total * share) for domain, share in shares.items()})
    reasons: Reasons = []
    for comparison in comparisons:
        places[comparison.domain] -= 1
        reasons.append("share of the domain" if places[comparison.domain] < 0 else None)
    return reasons


def _digest(comparison: Comparison, seed: int | None = None) -> str:
    content = [seed, comparison.messages, comparison.answers]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
