"""The reward that looks an answer up in its task's ranking."""

import pytest

from rewards.ranking import RankingReward
from rewards.types import Task

RANKED = ["gladly! 2 pens for you", "2 pens", "sorry, no pens from me", "so"]


@pytest.mark.parametrize(
    ("completion", "score", "outcome"),
    [
        ("gladly! 2 pens for you", 1.0, "place 1"),
        (" 2 pens\n", 0.75, "place 2"),
        ("so", 0.25, "place 4"),
        ("s", 0.0, "not ranked"),
        ("gladly! 2 pens for you for you", 0.0, "not ranked"),
        ("", 0.0, "not ranked"),
    ],
)
def test_the_score_falls_by_place_and_other_texts_get_nothing(completion: str, score: float, outcome: str) -> None:
    verdict = RankingReward().score(Task("lend 2 pens", RANKED), completion)
    assert verdict.score == score and verdict.outcome == outcome


@pytest.mark.parametrize("truth", [None, "a", [], ["a"], ["a", "a "], ["a", 1]])
def test_a_truth_that_ranks_nothing_is_refused(truth: object) -> None:
    with pytest.raises(ValueError, match="truth: needs"):
        RankingReward().check(Task("lend 2 pens", truth))


def test_a_ranking_is_accepted() -> None:
    RankingReward().check(Task("lend 2 pens", RANKED))
