"""Votes by hand: the orders in which answers are shown, the way back, sums of votes, and the meta model's filter."""

from collections import Counter
from typing import Any

import pytest

from configs.rewards import RewardSpec
from rewards.judging.rubric import Vote
from rewards.judging.verdict import VerdictReward
from rewards.judging.votes import best_answer, draw_ballots, tally, voted_scores
from rewards.plugins.build import build_reward
from rewards.types import Status, Task


def test_every_second_vote_is_the_one_before_backwards() -> None:
    for size in (2, 3, 5):
        ballots = draw_ballots(size, 8, 6, "key")
        assert len(ballots) == 6 and all(sorted(ballot) == list(range(size)) for ballot in ballots)
        assert all(ballots[vote + 1] == ballots[vote][::-1] for vote in (0, 2, 4))
    assert draw_ballots(5, 5, 4, "key") == draw_ballots(5, 5, 4, "key") != draw_ballots(5, 5, 4, "other")
    firsts = Counter(draw_ballots(2, 2, 2, str(key))[0][0] for key in range(200))
    assert 70 < firsts[0] < 130  # at even odds, beyond four standard deviations on either side


def test_a_long_order_is_cut_and_its_last_ballot_filled_up() -> None:
    [first, second] = draw_ballots(3, 2, 1, "key")
    order = [first[0], first[1], second[0]]
    assert sorted(order) == [0, 1, 2] and second == [order[2], order[0]]
    assert draw_ballots(1, 1, 3, "key") == [[0], [0], [0]]
    assert [len(ballot) for ballot in draw_ballots(4, 2, 2, "key")] == [2, 2, 2, 2]


def test_votes_by_hand() -> None:
    """Answer 0 is shown last in the first vote, first in the second: it has 9 and 6, mean 7.5. Answer 1 has 2 and 8,
    mean 5; answer 2 has 4 and 1, mean 2.5."""
    assert voted_scores([[2, 1, 0], [0, 1, 2]], [[4, 2, 9], [6, 8, 1]]) == [7.5, 5.0, 2.5]


def test_the_meta_model_keeps_its_best_votes_by_hand() -> None:
    """Three votes with meta scores 0.2, 0.9, 0.5: the best two are the second and third, so answer 0 has (3 + 8)/2 and
    answer 1 has (7 + 4)/2. The first vote, which says the opposite, does not count."""
    ballots, scores = [[0, 1], [1, 0], [0, 1]], [[10, 1], [7, 3], [8, 4]]
    assert voted_scores(ballots, scores, [0.2, 0.9, 0.5], keep=2) == [5.5, 5.5]
    assert voted_scores(ballots, scores, [0.2, 0.9, 0.5], keep=1) == [3.0, 7.0]
    assert voted_scores(ballots, scores, [0.5, 0.5, 0.5], keep=1) == [10.0, 1.0]  # of equal ones the earlier
    assert voted_scores(ballots, scores, [0.2, 0.9, 0.5], keep=3) == voted_scores(ballots, scores) == [7.0, 4.0]


def test_one_missing_vote_fails_the_group() -> None:
    good: Vote = ([7.0, 3.0], "the first [[7, 3]]")
    verdicts = tally(2, [[1, 0], [0, 1]], [good, "no marks"])
    assert [verdict.status for verdict in verdicts] == [Status.INFRA_ERROR] * 2 and verdicts[0].detail == "no marks"
    first, second = tally(2, [[1, 0]], [good])
    assert (first.score, second.score) == (3.0, 7.0) and "the first" in first.detail


def test_only_a_strictly_highest_score_is_best() -> None:
    assert [best_answer(scores) for scores in ([3, 9, 1], [9, 9, 1], [5], [1, 9, 9])] == [1, None, 0, None]


FORM: dict[str, Any] = {"form": "mark", "lowest": 1.0, "highest": 10.0}


@pytest.mark.parametrize(
    ("verdict", "score", "outcome"),
    [
        ("the second [[2, 9]]", 1.0, "right"),
        ("the first [[9, 2]]", -1.0, "wrong"),
        ("equal [[9, 9]]", -1.0, "tie"),
        ("the second", -1.0, "no verdict"),
        ("[[9]]", -1.0, "no verdict"),
        ("[[2, 11]]", -1.0, "no verdict"),
    ],
)
def test_a_verdict_is_rewarded_by_the_truth(verdict: str, score: float, outcome: str) -> None:
    task = Task("which?", {"best": 2, "answers": 2, "form": FORM})
    given = VerdictReward().score(task, verdict)
    assert (given.score, given.outcome) == (score, outcome)
    assert VerdictReward(wrong=0.0).score(task, verdict).score == max(score, 0.0)


def test_a_single_answer_must_get_its_label() -> None:
    task = Task("is it right?", {"label": 10.0, "answers": 1, "form": FORM})
    assert [VerdictReward().score(task, text).score for text in ("[[10]]", "[[9]]", "10")] == [1.0, -1.0, -1.0]


@pytest.mark.parametrize("truth", [None, "2", {"best": 2}, {"answers": 2, "form": FORM}, {"best": 1, "answers": 2}])
def test_other_truths_are_refused(truth: Any) -> None:
    reward: Any = build_reward(RewardSpec(name="verdict"))
    with pytest.raises(ValueError, match="preferences"):
        reward.check(Task("which?", truth))
    reward.check(Task("which?", {"best": 2, "answers": 2, "form": FORM}))
