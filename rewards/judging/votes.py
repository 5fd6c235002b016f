"""Votes of a judge: the orders in which verdicts see the answers, and each answer's score from all its verdicts
(SPCT, arXiv:2504.02495).

A ballot is the answers that one verdict sees: their indices, in the order shown.
"""

import random
from collections.abc import Sequence

from rewards.judging.rubric import Vote, excerpt
from rewards.types import Status, Verdict

ALONE = Verdict(None, Status.ABSTAIN, "one answer has no other to be compared with", outcome="alone")


def draw_ballots(size: int, compare: int, votes: int, key: str) -> list[list[int]]:
    """Draw the ballots of `votes` votes on `size` answers, of which a ballot shows `compare` or, if fewer, all.

    Every second vote has the order of the vote before it backwards. So in an even number of votes on a whole group the
    mean place of each answer is the middle, and a judge that prefers a place favours none. An order longer than
    `compare` is cut; its last ballot is filled up from the order's beginning. key: seed of the orders.
    """
    generator = random.Random(key)
    ballots: list[list[int]] = []
    order: list[int] = []
    for vote in range(votes):
        order = order[::-1] if vote % 2 else generator.sample(range(size), size)
        width = min(compare, size)
        for first in range(0, size, width):
            ballots.append([order[place % size] for place in range(first, first + width)])
    return ballots


def voted_scores(
    ballots: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    meta_scores: Sequence[float] | None = None,
    keep: int | None = None,
) -> list[float]:
    """Return the score of each answer: the mean over its verdicts (SPCT eq. 5 divided by k), by the answer's index.

    ballots, scores [V][answers shown]: verdict v gives scores[v][p] to the answer ballots[v][p].
    meta_scores [V]: the meta reward model's score of each verdict; of an answer's verdicts only the `keep` that score
    highest count, the earlier ones of equal (SPCT's meta RM).
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for verdict, (ballot, verdict_scores) in enumerate(zip(ballots, scores, strict=True)):
        for index, score in zip(ballot, verdict_scores, strict=True):
            found.setdefault(index, []).append((meta_scores[verdict] if meta_scores else 0.0, score))
    means: list[float] = []
    for index in sorted(found):
        kept = sorted(found[index], key=lambda pair: -pair[0])[:keep]
        means.append(sum(score for _, score in kept) / len(kept))
    return means


def tally(
    size: int,
    ballots: Sequence[Sequence[int]],
    votes: Sequence[Vote | str],
    meta_scores: Sequence[float] | None = None,
    keep: int | None = None,
) -> list[Verdict]:
    """Return the verdict on each of `size` answers; its detail is the first vote's text.

    votes: for each ballot the vote, or the reason why there is none. One missing vote fails the group, since fewer
    votes than asked for would be another reward.
    """
    scores = [vote[0] for vote in votes if not isinstance(vote, str)]
    if len(scores) < len(votes):
        reason = next(vote for vote in votes if isinstance(vote, str))
        return [Verdict(None, Status.INFRA_ERROR, reason)] * size
    firsts: dict[int, str] = {}
    for ballot, vote in zip(ballots, votes, strict=True):
        for index in ballot:
            firsts.setdefault(index, excerpt(vote[1]))
    means = voted_scores(ballots, scores, meta_scores, keep)
    return [Verdict(score, detail=firsts[index]) for index, score in enumerate(means)]


def best_answer(scores: Sequence[float]) -> int | None:
    """Return the index of the answer that scores strictly highest; None where two are equal."""
    best = max(range(len(scores)), key=lambda index: scores[index])
    return best if sum(score == scores[best] for score in scores) == 1 else None
