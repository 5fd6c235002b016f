"""Near-duplicates by the exact Jaccard similarity of word trigrams, found through their rarest trigrams.

Two sets of similarity above t share more than t times the larger set's size. Sorted alike, they therefore share one of
their first |set| - ceil(t |set|) + 1 elements (the prefix filter of Chaudhuri, Ganti and Kaushik, ICDE 2006). With the
rarest trigrams first, few other sets share one of these, and a set is compared with those alone: no pair is missed, and
100,000 comparisons take seconds.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")


def near_duplicates(texts: Sequence[str], groups: Sequence[str], max_similarity: float) -> list[bool]:
    """Return for each text whether its similarity to an earlier text that was not flagged exceeds `max_similarity`.

    The similarity of two texts is the number of word trigrams in both over the number in either, ignoring case and
    punctuation; a text of fewer than three words is one trigram. Texts of one group are never compared. With
    max_similarity = 1 no text is flagged.
    """
    if max_similarity >= 1 or not texts:
        return [False] * len(texts)
    needed = max_similarity / (1 + max_similarity)  # shared trigrams over the sum of both sizes
    sets = _ranked(_trigrams(texts))
    sizes = [len(trigrams) for trigrams in sets]
    beyond = [max(math.ceil(max_similarity * size - 1e-9) - 1, 0) for size in sizes]  # trigrams behind the prefix
    postings: defaultdict[int, list[int]] = defaultdict(list)
    flags: list[bool] = []
    for number, (trigrams, size) in enumerate(zip(sets, sizes, strict=True)):
        prefix = trigrams[: size - beyond[number]].tolist()
        in_prefixes = Counter(chain.from_iterable(postings.get(trigram, ()) for trigram in prefix))
        flag = any(
            # Every shared trigram of the prefix that ends first is in the other prefix too.
            count + max(beyond[number], beyond[other]) > needed * (size + sizes[other])
            and groups[other] != groups[number]
            and _similarity(trigrams, sets[other]) > max_similarity
            for other, count in in_prefixes.items()
        )
        flags.append(flag)
        if not flag:
            for trigram in prefix:
                postings[trigram].append(number)
    return flags


def _similarity(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def _trigrams(texts: Sequence[str]) -> list[NDArray[np.uint64]]:
    """Return the distinct trigrams of each text, as 64-bit hashes."""
    numbers: dict[str, int] = {}
    sets: list[NDArray[np.uint64]] = []
    for text in texts:
        words = _WORD.findall(text.casefold())
        words += [""] * (3 - len(words))
        ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.uint64)
        sets.append(np.unique(_mix(_mix(_mix(ids[:-2]) + ids[1:-1]) + ids[2:])))
    return sets


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of splitmix64, a bijection."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _ranked(sets: list[NDArray[np.uint64]]) -> list[NDArray[np.int64]]:
    """Replace every trigram by its rank, from the rarest to the most common, and sort each set."""
    _, inverse, counts = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    bounds = np.cumsum([len(trigrams) for trigrams in sets])[:-1]
    return [np.sort(part) for part in np.split(rank[inverse], bounds)]
