"""The reward that looks for an answer's form in its task's ranking."""

import pytest

from rewards.rules.ranking import RankingReward
from rewards.types import Task

FORMS = ["gladly! 2 pens for you", r"gladly! \d [a-z]+ for you", "2 pens", "sorry.*"]


@pytest.mark.parametrize(
    ("completion", "score", "outcome"),
    [
        ("gladly! 2 pens for you", 1.0, "place 1"),
        ("gladly! 3 pens for you", 0.75, "place 2"),
        (" 2 pens\n", 0.5, "place 3"),
        ("<think>2 pens?</think>\n2 pens", 0.5, "place 3"),
        ("<think>gladly! 2 pens for you", 0.0, "no form"),
        ("sorry, no", 0.25, "place 4"),
        ("2 pens for you", 0.0, "no form"),
        ("so", 0.0, "no form"),
        ("", 0.0, "no form"),
    ],
)
def test_the_score_falls_by_place_and_other_texts_get_nothing(completion: str, score: float, outcome: str) -> None:
    verdict = RankingReward().score(Task("lend 2 pens", FORMS), completion)
    assert verdict.score == score and verdict.outcome == outcome


@pytest.mark.parametrize("truth", [None, "a", [], ["a"], ["a", "a"], ["a", 1], ["a", "("]])
def test_a_truth_that_ranks_nothing_is_refused(truth: object) -> None:
    with pytest.raises(ValueError, match="truth: "):
        RankingReward().check(Task("lend 2 pens", truth))


def test_a_ranking_is_accepted() -> None:
    RankingReward().check(Task("lend 2 pens", FORMS))


def test_scores_are_shares_written_as_decimals() -> None:
    """`min_score: 0.2` keeps the last of five places."""
    forms = ["a", "b", "c", "d", "e"]
    assert [RankingReward().score(Task("", forms), form).score for form in forms] == [1.0, 0.8, 0.6, 0.4, 0.2]
