"""The figures of a reward model by hand: order, calibration, length, and that they are of pairs with an order only."""

import json
import math
from pathlib import Path

import pytest

from configs.data import ComparisonData, FileSource
from configs.reward_model import PairwiseLoss, PointwiseLoss
from pipeline.data.comparisons import Comparisons
from pipeline.data.trees import Tree
from pipeline.evaluation.comparisons import (
    COMPARISONS_PER_CALL,
    ScoredComparison,
    comparison_figures,
    evaluate_comparisons,
    reliability_bins,
    write_records,
)
from pipeline.evaluation.statistics import wilson_interval
from pipeline.models.tokenizer import byte_tokenizer

PAIRWISE = PairwiseLoss(type="pairwise")


def scored(
    *scores: float,
    targets: list[float] | None = None,
    lengths: list[int] | None = None,
    domain: str = "",
    source: str = "",
) -> ScoredComparison:
    return ScoredComparison("row", source, domain, list(scores), targets, lengths or [5] * len(scores))


def test_accuracy_by_hand_ties_count_half() -> None:
    figures = comparison_figures([scored(2.0, 1.0), scored(0.0, 3.0), scored(1.0, 1.0), scored(1.0, 0.0)], PAIRWISE)
    assert figures["accuracy"] == 2.5 / 4
    assert (figures["accuracy_low"], figures["accuracy_high"]) == wilson_interval(2, 4)
    assert figures["margin_mean"] == (1 - 3 + 0 + 1) / 4


def test_ranked_answers_are_all_their_pairs_but_those_without_an_order() -> None:
    # a > b = c: (a, b) right, (a, c) wrong, (b, c) none
    assert scored(1.0, 0.0, 2.0, targets=[1.0, 0.0, 0.0]).accuracy == 0.5
    assert scored(1.0, 0.0, 2.0).accuracy == 1 / 3
    assert scored(3.0, 2.0, 1.0).differences == [1.0, 2.0, 1.0]


def test_a_comparison_weighs_the_same_however_many_answers_it_has() -> None:
    figures = comparison_figures([scored(3.0, 2.0, 1.0, 0.0), scored(0.0, 1.0)], PAIRWISE)
    assert figures["accuracy"] == 0.5


def test_accuracy_by_source_and_domain_where_there_are_several() -> None:
    records = [
        scored(1.0, 0.0, domain="math", source="a"),
        scored(0.0, 1.0, domain="math", source="a"),
        scored(1.0, 0.0, domain="chat", source="a"),
    ]
    figures = comparison_figures(records, PAIRWISE)
    assert figures["accuracy/domain/math"] == 0.5 and figures["accuracy/domain/chat"] == 1
    assert figures["accuracy/domain/chat_low"] == wilson_interval(1, 1)[0]
    assert not [name for name in figures if name.startswith("accuracy/source")]


def test_calibration_by_hand() -> None:
    # sigmoid(log 3) = 3/4, in the bin from 0.75 (its lower end counts) to 0.8; of the four pairs three are right.
    sure, wrong = scored(math.log(3) + 1e-9, 0.0), scored(0.0, math.log(3) + 1e-9)
    figures = comparison_figures([sure, sure, sure, wrong], PAIRWISE)
    assert figures["calibration_error"] == pytest.approx(0, abs=1e-6)
    assert comparison_figures([wrong], PAIRWISE)["calibration_error"] == pytest.approx(3 / 4)
    [used] = [each for each in reliability_bins([sure, sure, sure, wrong]) if each.pairs]
    assert (used.low, used.high, used.pairs, used.accuracy) == (0.75, pytest.approx(0.8), 4, 0.75)


def test_calibration_does_not_depend_on_which_answer_is_named_first() -> None:
    """A pair that is no more than even counts half: a coin that says so is calibrated."""
    assert comparison_figures([scored(0.0, 0.0)], PAIRWISE)["calibration_error"] == 0
    bins = reliability_bins([scored(1000.0, 0.0), scored(0.0, 1000.0)])
    assert bins[-1].pairs == 2 and bins[-1].accuracy == 0.5 and sum(each.pairs for each in bins) == 2


def test_correlation_with_length_overall_and_within_a_prompt() -> None:
    # Between prompts the longer scores more, within each the shorter does.
    records = [scored(10.0, 9.0, lengths=[100, 110]), scored(1.0, 0.0, lengths=[10, 20])]
    figures = comparison_figures(records, PAIRWISE)
    assert figures["length_correlation"] > 0.9
    assert figures["length_correlation_within"] == pytest.approx(-1)
    assert "length_correlation" not in comparison_figures([scored(1.0, 0.0)], PAIRWISE)  # one length: no figure


def test_scores_mean_and_deviation() -> None:
    figures = comparison_figures([scored(1.0, 3.0), scored(5.0, 7.0)], PAIRWISE)
    assert figures["score_mean"] == 4 and figures["score_std"] == pytest.approx(math.sqrt(5))


def test_pointwise_figures_by_hand() -> None:
    records = [scored(1.0, targets=[2.0]), scored(3.0, targets=[3.0]), scored(5.0, targets=[4.0])]
    figures = comparison_figures(records, PointwiseLoss(type="pointwise"))
    assert figures["squared_error_mean"] == pytest.approx(2 / 3) and figures["target_correlation"] == pytest.approx(1)
    assert "accuracy" not in figures and "calibration_error" not in figures
    bce = comparison_figures([scored(math.log(3), targets=[1.0])], PointwiseLoss(type="pointwise", kind="bce"))
    assert bce["squared_error_mean"] == pytest.approx(1 / 16)
    assert "squared_error_mean" not in comparison_figures(records, PAIRWISE)  # Bradley-Terry's scores have no scale


# -- from files to figures --------------------------------------------------------------------------------------------


def by_length(trees: list[Tree]) -> list[list[float]]:
    """A judge that likes it short."""
    return [[-float(len(branch.token_ids)) for branch in tree.branches] for tree in trees]


def pairs(file: Path, number: int) -> Comparisons:
    """RewardBench's form: in every third row the longer answer is the better one."""
    rows = [
        {
            "prompt": f"What is {i}?",
            "chosen": "a longer one" if i % 3 == 0 else "short",
            "rejected": "short" if i % 3 == 0 else "a longer one",
            "subset": "verbose" if i % 3 == 0 else "terse",
        }
        for i in range(number)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FileSource(type="file", paths=[str(file)])
    data = ComparisonData(source=source, form="pair", columns={"domain": "subset"})
    return Comparisons.load(data, byte_tokenizer())


def test_files_of_rewardbenchs_form_have_an_accuracy_by_subset(tmp_path: Path) -> None:
    result = evaluate_comparisons(pairs(tmp_path / "bench.jsonl", 9), by_length, PAIRWISE)
    assert result.figures["accuracy"] == pytest.approx(6 / 9)
    assert result.figures["accuracy/domain/terse"] == 1 and result.figures["accuracy/domain/verbose"] == 0
    assert result.figures["flip_gap_max"] == 0
    assert result.figures["length_correlation_within"] == pytest.approx(-1)
    write_records(tmp_path / "evaluation", "bench", result)
    lines = [json.loads(line) for line in (tmp_path / "evaluation" / "bench.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and lines[0]["row"].endswith("bench.jsonl:1") and lines[0]["lengths"] == [13, 6]
    bins = (tmp_path / "evaluation" / "bench.reliability.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["pairs"] for line in bins) == 9


def test_a_score_that_depends_on_the_answers_beside_it_shows(tmp_path: Path) -> None:
    def first_is_best(trees: list[Tree]) -> list[list[float]]:
        return [[-float(place) for place in range(len(tree.branches))] for tree in trees]

    result = evaluate_comparisons(pairs(tmp_path / "bench.jsonl", 3), first_is_best, PAIRWISE)
    assert result.figures["accuracy"] == 1 and result.figures["flip_gap_max"] == 2


def test_many_comparisons_are_scored_in_parts_and_stay_in_order(tmp_path: Path) -> None:
    parts: list[int] = []

    def counted(trees: list[Tree]) -> list[list[float]]:
        parts.append(len(trees))
        return by_length(trees)

    number = COMPARISONS_PER_CALL + 10
    result = evaluate_comparisons(pairs(tmp_path / "many.jsonl", number), counted, PAIRWISE)
    assert parts[:2] == [COMPARISONS_PER_CALL, 10]
    assert [record.domain == "verbose" for record in result.records] == [i % 3 == 0 for i in range(number)]
    assert result.figures["accuracy/domain/terse"] == 1
