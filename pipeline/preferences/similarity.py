"""Near-duplicates by the exact Jaccard similarity of word trigrams, found through the rarest of them.

Two sets whose similarity is above t share more than t times the larger one's size. So if both are sorted alike, they
share one of their first |set| - ceil(t |set|) + 1 elements (the prefix filter of Chaudhuri, Ganti and Kaushik, ICDE
2006). Sorted with the rarest trigrams first, few others share one of these, and only with those is a set compared: no
pair is missed, and 100,000 comparisons take seconds.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

WORD = re.compile(r"\w+")


def near_duplicates(texts: Sequence[str], groups: Sequence[str], max_similarity: float) -> list[bool]:
    """Per text whether its similarity to an earlier one that is no near-duplicate itself is above `max_similarity`.

    Texts of one group are not compared with each other. The similarity of two texts is the number of word trigrams they
    share over the number that either has; case and punctuation don't count, and a text of fewer than three words is one
    trigram. With max_similarity = 1 there is none.
    """
    if max_similarity >= 1 or not texts:
        return [False] * len(texts)
    needed = max_similarity / (1 + max_similarity)  # of both sizes together, what must be shared
    sets = _ranked(_trigrams(texts))
    sizes = [len(trigrams) for trigrams in sets]
    beyond = [max(math.ceil(max_similarity * size - 1e-9) - 1, 0) for size in sizes]  # trigrams behind the prefix
    postings: defaultdict[int, list[int]] = defaultdict(list)
    duplicate: list[bool] = []
    for number, (trigrams, size) in enumerate(zip(sets, sizes, strict=True)):
        prefix = trigrams[: size - beyond[number]].tolist()
        in_prefixes = Counter(chain.from_iterable(postings.get(trigram, ()) for trigram in prefix))
        found = any(
            # Of the prefix that ends first, every shared trigram is in the other prefix too.
            count + max(beyond[number], beyond[other]) > needed * (size + sizes[other])
            and groups[other] != groups[number]
            and _similarity(trigrams, sets[other]) > max_similarity
            for other, count in in_prefixes.items()
        )
        duplicate.append(found)
        if not found:
            for trigram in prefix:
                postings[trigram].append(number)
    return duplicate


def _similarity(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def _trigrams(texts: Sequence[str]) -> list[NDArray[np.uint64]]:
    """The different trigrams of each text, as hashes of 64 bits."""
    numbers: dict[str, int] = {}
    sets: list[NDArray[np.uint64]] = []
    for text in texts:
        words = WORD.findall(text.casefold())
        words += [""] * (3 - len(words))
        ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.uint64)
        sets.append(np.unique(_mix(_mix(_mix(ids[:-2]) + ids[1:-1]) + ids[2:])))
    return sets


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64, which takes different values to different ones."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _ranked(sets: list[NDArray[np.uint64]]) -> list[NDArray[np.int64]]:
    """The sets with every trigram as its rank among all, from the rarest to the most common, sorted."""
    _, inverse, counts = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    bounds = np.cumsum([len(trigrams) for trigrams in sets])[:-1]
    return [np.sort(part) for part in np.split(rank[inverse], bounds)]
