"""Rules on constructed evaluations: what is better is promoted, noise is not, and few items decide nothing."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from configs.gate import HoldRule, ImproveRule, Rule, ThresholdRule
from pipeline.evaluation.suites import SuiteResult
from pipeline.gates import rules
from pipeline.gates.rules import Rows, Ruling, apply_rule, bootstrap, min_rows, samples_needed

IMPROVE = ImproveRule(type="improve", figure="sums/pass@1_greedy")
HOLD = HoldRule(type="hold", figure="sums/pass@1_greedy", tolerance=0.05)


def evaluation(values: Sequence[float], name: str = "pass@1_greedy") -> dict[str, SuiteResult]:
    items = {f"row {index}": float(value) for index, value in enumerate(values)}
    figures = {name: float(np.mean(values)), "unjudged_rate": 0.25}
    return {"sums": SuiteResult(figures, {name: items})}


def ruled(
    rule: Rule, candidate: Sequence[float], parent: Sequence[float], name: str = "pass@1_greedy", seed: int = 0
) -> Ruling:
    return apply_rule(rule, evaluation(candidate, name), evaluation(parent, name), confidence=0.95, seed=seed)


def drawn(share: float, size: int, seed: int) -> list[float]:
    return [float(x) for x in np.random.default_rng(seed).random(size) < share]


@pytest.fixture
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """For simulations of hundreds of gates: their ends are rougher by chance, to neither side."""
    monkeypatch.setattr(rules, "RESAMPLES", 2000)


def test_a_true_improvement_holds() -> None:
    ruling = ruled(IMPROVE, drawn(0.7, 200, 1), drawn(0.4, 200, 2))
    assert ruling.outcome == "holds" and ruling.low > 0 and ruling.samples == 200 and ruling.samples_needed is None
    assert ruling.parent is not None and ruling.difference == pytest.approx(ruling.candidate - ruling.parent)
    assert ruled(IMPROVE.model_copy(update={"margin": 0.5}), drawn(0.7, 200, 1), drawn(0.4, 200, 2)).outcome == "fails"


def test_a_regression_fails_both_rules() -> None:
    candidate, parent = drawn(0.4, 200, 1), drawn(0.7, 200, 2)
    assert ruled(IMPROVE, candidate, parent).outcome == "fails" == ruled(HOLD, candidate, parent).outcome


@pytest.mark.usefixtures("_fewer_resamples")
@pytest.mark.parametrize("size", [20, 200])
def test_noise_is_promoted_no_more_often_than_stated(size: int) -> None:
    """Two evaluations of one and the same model: 95 % of intervals hold 0, so 2.5 % lie above it."""
    outcomes = [
        ruled(IMPROVE, drawn(0.5, size, 2 * i), drawn(0.5, size, 2 * i + 1), seed=i).outcome for i in range(400)
    ]
    promoted = outcomes.count("holds") / len(outcomes)
    assert promoted <= 0.025 + 2.5 * math.sqrt(0.025 * 0.975 / len(outcomes))
    assert outcomes.count("undecided") / len(outcomes) >= 0.93


@pytest.mark.usefixtures("_fewer_resamples")
def test_an_improvement_of_the_size_of_its_margin_is_promoted_no_more_often_than_stated() -> None:
    rule = IMPROVE.model_copy(update={"margin": 0.2})
    held = [ruled(rule, drawn(0.6, 150, 2 * i), drawn(0.4, 150, 2 * i + 1), seed=i).outcome for i in range(300)]
    assert held.count("holds") / len(held) <= 0.025 + 2.5 * math.sqrt(0.025 * 0.975 / len(held))


@pytest.mark.usefixtures("_fewer_resamples")
def test_a_loss_of_the_size_of_the_tolerance_is_let_pass_no_more_often_than_stated() -> None:
    rng = np.random.default_rng(0)
    rule = HoldRule(type="hold", figure="sums/score_mean", tolerance=0.5)
    outcomes: list[str] = []
    for i in range(300):
        parent = rng.normal(0, 2, 40)
        outcomes.append(ruled(rule, list(parent + rng.normal(-0.5, 1, 40)), list(parent), "score_mean", i).outcome)
    assert outcomes.count("holds") / len(outcomes) <= 0.025 + 2.5 * math.sqrt(0.025 * 0.975 / len(outcomes))


def test_pairing_sees_what_two_averages_do_not() -> None:
    """Hard and easy items differ by far more than the two models do; each item is a little better."""
    rng = np.random.default_rng(0)
    parent = rng.normal(0, 10, 50)
    candidate = parent + rng.normal(0.5, 0.2, 50)
    rule = ImproveRule(type="improve", figure="sums/score_mean")
    assert ruled(rule, list(candidate), list(parent), "score_mean").outcome == "holds"
    assert ruled(rule, list(rng.permutation(candidate)), list(parent), "score_mean").outcome == "undecided"


def test_too_few_items_are_undecided_and_say_how_many_it_takes() -> None:
    candidate, parent = [1.0, 1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0]
    ruling = ruled(IMPROVE, candidate, parent)
    assert ruling.outcome == "undecided" and ruling.difference == pytest.approx(0.6)
    # Differences 1 1 0 0 1 and the two more, 1 and -1: mean 3/7, mean square 5/7, s^2 = 26/49; (1.96 s / 0.6)^2 = 5.7.
    assert ruling.samples_needed == 6
    ruling = ruled(IMPROVE, drawn(0.55, 40, 1), drawn(0.5, 40, 7))
    assert ruling.outcome == "undecided"
    assert ruling.samples_needed is not None and ruling.samples_needed > 40


def test_with_the_samples_it_asks_for_the_same_difference_is_decided() -> None:
    candidate, parent = [1.0, 1.0, 1.0, 0.0] + [0.0] * 12, [0.0, 0.0, 0.0, 1.0] + [0.0] * 12  # 3 better, 1 worse
    few = ruled(IMPROVE, candidate, parent)
    assert few.outcome == "undecided" and few.samples_needed is not None
    times = -(-few.samples_needed // 16)
    assert ruled(IMPROVE, candidate * times, parent * times).outcome == "holds"
    assert ruled(IMPROVE, candidate * (times // 2), parent * (times // 2)).outcome == "undecided"


def test_samples_needed_by_hand() -> None:
    # (1.959964 * 0.5 / 0.1)^2 = 96.04
    assert samples_needed(0.5, 0.1, samples=50, confidence=0.95) == 97
    assert samples_needed(0.5, 0.1, samples=200, confidence=0.95) == 201  # the bootstrap said no; one more at least
    assert samples_needed(0.5, 0.0, samples=50, confidence=0.95) is None
    assert min_rows(0.95) == 6 and min_rows(0.9) == 5 and min_rows(0.99) == 8


def test_equal_differences() -> None:
    # Both right everywhere: no proof that the next one would be, so the share may still have fallen a little.
    assert ruled(HOLD, [1.0] * 20, [1.0] * 20).outcome == "undecided"
    assert ruled(HOLD, [1.0] * 100, [1.0] * 100).outcome == "holds"
    assert ruled(IMPROVE, [1.0] * 100, [1.0] * 100).outcome == "undecided"
    # Better on every item, but on a handful only.
    assert ruled(IMPROVE, [1.0] * 4, [0.0] * 4).outcome == "undecided"
    assert ruled(IMPROVE, [1.0] * 10, [0.0] * 10).outcome == "holds"
    # A figure that is no share, the same to the last digit on every item: it is the same model.
    values = [0.3, 1.7, 2.2, 0.1, 0.9, 1.1]
    same = ruled(HoldRule(type="hold", figure="sums/nll_mean", tolerance=0), values, values, "nll_mean")
    assert (same.low, same.high, same.outcome) == (0.0, 0.0, "holds")
    assert ruled(ImproveRule(type="improve", figure="sums/nll_mean"), values, values, "nll_mean").outcome == "fails"


def test_lower_is_better_where_the_table_says_so() -> None:
    rng = np.random.default_rng(0)
    parent = rng.normal(3, 0.5, 60)
    better = list(parent - rng.normal(0.3, 0.1, 60))
    improve = ImproveRule(type="improve", figure="sums/bits_per_byte", margin=0.1)
    hold = HoldRule(type="hold", figure="sums/bits_per_byte", tolerance=0.1)
    ruling = ruled(improve, better, list(parent), "bits_per_byte")
    assert ruling.outcome == "holds" and ruling.difference is not None and ruling.difference < 0
    assert ruling.low < ruling.difference < ruling.high < -0.1  # the interval is of the difference, not of the gain
    assert ruled(hold, list(parent), better, "bits_per_byte").outcome == "fails"


def test_thresholds_on_shares_take_wilsons_interval() -> None:
    rule = ThresholdRule(type="threshold", figure="sums/pass@1_greedy", at_least=0.8)
    ruling = ruled(rule, [1.0] * 90 + [0.0] * 10, [0.0] * 100)
    assert (ruling.low, ruling.high) == (pytest.approx(0.82563, abs=1e-5), pytest.approx(0.94477, abs=1e-5))
    assert ruling.outcome == "holds" and ruling.parent is None and ruling.difference is None
    assert ruled(rule, [1.0] * 70 + [0.0] * 30, [0.0]).outcome == "fails"
    few = ruled(rule, [1.0] * 9 + [0.0], [0.0])
    # Wilson's is the score test turned round: (1.96)^2 * 0.8 * 0.2 / 0.1^2 = 61.5
    assert few.outcome == "undecided" and few.samples_needed == 62
    assert ruled(rule, [1.0] * 56 + [0.0] * 6, [0.0]).outcome == "holds"
    at_most = ThresholdRule(type="threshold", figure="sums/pass@1_greedy", at_most=0.2)
    assert ruled(at_most, [1.0] * 5 + [0.0] * 95, [0.0]).outcome == "holds"
    assert ruled(at_most, [1.0] * 50 + [0.0] * 50, [0.0]).outcome == "fails"


def test_thresholds_on_other_figures() -> None:
    rng = np.random.default_rng(0)
    values = list(rng.normal(2.0, 0.5, 50))
    rule = ThresholdRule(type="threshold", figure="sums/score_mean", at_most=2.5)
    ruling = ruled(rule, values, [0.0], "score_mean")
    assert ruling.outcome == "holds" and ruling.low < float(np.mean(values)) < ruling.high < 2.5
    assert ruled(rule.model_copy(update={"at_most": 2.0}), values, [0.0], "score_mean").outcome == "undecided"
    assert ruled(rule, [2.0] * 3, [0.0], "score_mean").outcome == "undecided"
    # One without items is compared as it is.
    rate = ThresholdRule(type="threshold", figure="sums/unjudged_rate", at_most=0.3)
    ruling = ruled(rate, values, [0.0], "score_mean")
    assert (ruling.candidate, ruling.outcome, ruling.samples) == (0.25, "holds", 0)
    assert ruled(rate.model_copy(update={"at_most": 0.2}), values, [0.0], "score_mean").outcome == "fails"


def test_items_that_only_one_judged_are_left_out_and_counted() -> None:
    candidate, parent = evaluation([1.0] * 30), evaluation([0.0] * 20)
    ruling = apply_rule(IMPROVE, candidate, parent, confidence=0.95, seed=0)
    assert (ruling.samples, ruling.unpaired) == (20, 10)
    with pytest.raises(ValueError, match="judged item"):
        other = {"sums": SuiteResult({"pass@1_greedy": 1.0}, {"pass@1_greedy": {"elsewhere": 1.0}})}
        apply_rule(IMPROVE, candidate, other, confidence=0.95, seed=0)


def test_a_figure_that_cannot_be_compared_is_refused_with_those_that_can() -> None:
    rule = HoldRule(type="hold", figure="sums/unjudged_rate", tolerance=0.1)
    with pytest.raises(ValueError, match=r"'sums/unjudged_rate'.*: sums/pass@1_greedy"):
        ruled(rule, [1.0] * 9, [1.0] * 9)
    with pytest.raises(ValueError, match=r"'sums/pass@9'.* pass@1_greedy, unjudged_rate"):
        ruled(ThresholdRule(type="threshold", figure="sums/pass@9", at_least=0.5), [1.0] * 9, [1.0] * 9)


def test_the_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, 400)
    rows = Rows(values, np.ones(400))
    low, high = bootstrap(rows, 0.95, seed=3)
    assert (low, high) == bootstrap(rows, 0.95, seed=3) != bootstrap(rows, 0.95, seed=4)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02) and high == pytest.approx(
        values.mean() + half, abs=0.02
    )
    assert bootstrap(Rows(np.array([0.1] * 3), np.ones(3)), 0.95, seed=0) == (0.1, 0.1)


def of_rows(rows: Sequence[Sequence[float]], *, named: bool = True) -> dict[str, SuiteResult]:
    """An evaluation with several items a row; without names that say so, each item looks like a row."""
    mark = "#" if named else "."
    items = {f"row {row}{mark}{place}": value for row, values in enumerate(rows) for place, value in enumerate(values)}
    return {"sums": SuiteResult({"pass@1_greedy": float(np.mean(list(items.values())))}, {"pass@1_greedy": items})}


def test_rows_are_drawn_whole_by_hand() -> None:
    rows = Rows.of(["a#0", "b", "a#1", "/c#/d.jsonl:2", "a#2"], np.array([1.0, 0.0, 2.0, 7.0, 6.0]))
    assert rows.sums_R.tolist() == [9.0, 0.0, 7.0] and rows.sizes_R.tolist() == [3.0, 1.0, 1.0]
    assert rows.effective == pytest.approx(25 / 11)
    # Rows of sum and size (3, 3) and (0, 1): the mean is 3/4. Drawn twice with replacement they give 1, 3/4 (twice) and
    # 0 of four draws; so 3/4 are the quantiles from 0.25 to 0.75, and the ends of a 95 % interval are 0 and 1.
    rows = Rows.of(["a#0", "a#1", "a#2", "b#0"], np.array([1.0, 1.0, 1.0, 0.0]))
    assert bootstrap(rows, 0.4, seed=0) == (0.75, 0.75) and bootstrap(rows, 0.95, seed=0) == (0.0, 1.0)
    assert rows.spread == pytest.approx(0.375)  # (3 - 3/4 * 3) / 2 and (0 - 3/4) / 2: one 3/8 above, one 3/8 below
    wider = rows.with_pseudo_rows(0.0, 1.0)
    assert wider.sums_R.tolist() == [3, 0, -2, 2] and wider.sizes_R.tolist() == [3, 1, 2, 2]


@pytest.mark.usefixtures("_fewer_resamples")
def test_items_that_depend_on_each_other_are_not_taken_for_many() -> None:
    """Four items a row, all alike, from one and the same model: named as what they are, noise is promoted no more often
    than stated; taken for items of their own, far more often."""
    promoted = {True: 0, False: 0}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        candidate, parent = ([[value] * 4 for value in (rng.random(30) < 0.5).astype(float)] for _ in range(2))
        for named in promoted:
            results = (of_rows(rows, named=named) for rows in (candidate, parent))
            promoted[named] += apply_rule(IMPROVE, *results, confidence=0.95, seed=seed).outcome == "holds"
    assert promoted[True] / 200 <= 0.025 + 2.5 * math.sqrt(0.025 * 0.975 / 200) < 0.1 < promoted[False] / 200


def test_a_row_decides_as_one_item_however_often_it_is_counted() -> None:
    few = ([1.0] * 8 + [0.0] * 4, [0.0] * 8 + [1.0] + [0.0] * 3)
    alone = apply_rule(IMPROVE, *(of_rows([[value] for value in side]) for side in few), confidence=0.95, seed=0)
    fivefold = apply_rule(IMPROVE, *(of_rows([[value] * 5 for value in side]) for side in few), confidence=0.95, seed=0)
    assert (fivefold.low, fivefold.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    assert (fivefold.samples, alone.samples) == (60, 12) and fivefold.outcome == alone.outcome
    # Five rows decide nothing, though they have 20 items.
    ruling = apply_rule(IMPROVE, of_rows([[1.0] * 4] * 5), of_rows([[0.0] * 4] * 5), confidence=0.95, seed=0)
    assert ruling.outcome == "undecided" and ruling.samples == 20 and ruling.samples_needed == 24


def test_thresholds_on_rows_of_several_items() -> None:
    rule = ThresholdRule(type="threshold", figure="sums/pass@1_greedy", at_least=0.8)

    def held(rows: list[list[float]]) -> Ruling:
        return apply_rule(rule, of_rows(rows), {}, confidence=0.95, seed=0)

    # 100 rows, 90 of them right: Wilson's interval of 90 in 100, though there are 300 items.
    ruling = held([[1.0] * 3] * 90 + [[0.0] * 3] * 10)
    assert (ruling.low, ruling.high) == (pytest.approx(0.82563, abs=1e-5), pytest.approx(0.94477, abs=1e-5))
    assert ruling.samples == 300 and ruling.outcome == "holds"
    # 10 rows of 3 at 0.9: 62 rows would tell (see above), which are 185 items; rounded up from 61.46 rows, 186.
    few = held([[1.0] * 3] * 9 + [[0.0] * 3])
    assert few.outcome == "undecided" and few.samples_needed == 186
    values = [[value, value + 0.01] for value in np.random.default_rng(0).normal(0.9, 0.1, 40)]
    assert 0.8 < held(values).low < held(values).candidate < held(values).high
    assert held(values).outcome == "holds"
