"""Rewards from verdicts, and what relates them, in hand-worked numbers."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pytest

from configs.rewards import RewardSpec
from pipeline.grpo.mix import mix, mix_metrics, shape_overlong
from pipeline.objectives.advantage import standardize
from rewards.types import Status, Verdict

LOST = Verdict(None, Status.INFRA_ERROR)
ABSTAIN = Verdict(None, Status.ABSTAIN)

Groups = list[list[dict[str, Verdict]]]
Normalize = Literal["none", "batch", "group"]


def specs(weights: Mapping[str, float], **gates: float) -> list[RewardSpec]:
    return [RewardSpec(name=name, weight=weight, gate=gates.get(name)) for name, weight in weights.items()]


def judged(**scores: list[list[float | Verdict | None]]) -> Groups:
    """Groups of verdicts from one table of scores per reward; None is a reward that did not judge."""
    tables = {
        label: [[v if isinstance(v, Verdict) or v is None else Verdict(v) for v in group] for group in table]
        for label, table in scores.items()
    }
    first = next(iter(tables.values()))
    return [
        [{label: v for label, table in tables.items() if (v := table[p][g]) is not None} for g in range(len(first[p]))]
        for p in range(len(first))
    ]


def test_weighted_sum() -> None:
    verdicts = judged(helpful=[[2.0, 0.0], [1.0, None]], safety=[[-1.0, 4.0], [None, 1.0]])
    mixed = mix(verdicts, specs({"helpful": 0.5, "safety": 2.0}), normalize="none")
    assert mixed.rewards_PG.dtype == np.float64
    np.testing.assert_array_equal(mixed.rewards_PG, [[-1.0, 8.0], [0.5, 2.0]])


@pytest.mark.parametrize("normalize", ["none", "batch", "group"])
def test_whatever_is_not_ok_leaves_the_completion_out(normalize: Normalize) -> None:
    verdicts = judged(a=[[1.0, ABSTAIN, 3.0]], b=[[LOST, 1.0, 1.0]])
    mixed = mix(verdicts, specs({"a": 1.0, "b": 1.0}), normalize=normalize)
    np.testing.assert_array_equal(np.isnan(mixed.rewards_PG), [[True, True, False]])
    assert mixed.rewards_PG[0, 2] == (4.0 if normalize == "none" else 0.0)


def test_a_reward_of_weight_zero_is_only_watched() -> None:
    mixed = mix(judged(a=[[1.0]], b=[[LOST]]), specs({"a": 1.0, "b": 0.0}), normalize="none")
    np.testing.assert_array_equal(mixed.rewards_PG, [[1.0]])


def test_totals_that_differ_by_rounding_are_equal() -> None:
    assert 0.1 * 3 != 0.3 * 1
    mixed = mix(judged(a=[[3.0, 0.0]], b=[[0.0, 1.0]]), specs({"a": 0.1, "b": 0.3}), normalize="none")
    assert mixed.rewards_PG[0, 0] == mixed.rewards_PG[0, 1] == 0.3


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ([[{"a": Verdict(1.0)}], [{"a": Verdict(1.0)}, {"a": Verdict(1.0)}]], r"\[1, 2\]"),
        ([], "same number"),
        ([[{}]], "without a verdict"),
        ([[{"c": Verdict(1.0)}]], "'c'.* configured: a"),
    ],
)
def test_misaligned_verdicts_are_refused(verdicts: Groups, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mix(verdicts, specs({"a": 1.0}), normalize="none")


def test_a_gate_caps_what_the_others_gave() -> None:
    verdicts = judged(format=[[1.0, 0.5, 0.0, 0.0]], math=[[1.0, 1.0, 1.0, -2.0]])
    mixed = mix(verdicts, specs({"format": 0.1, "math": 1.0}, format=0.5), normalize="none")
    np.testing.assert_allclose(mixed.rewards_PG, [[1.1, 1.05, 0.0, -2.0]])


def test_a_gate_does_not_take_a_punishment_away() -> None:
    verdicts = judged(safety=[[0.0, 0.0]], toxicity=[[3.0, -3.0]])
    mixed = mix(verdicts, specs({"safety": 1.0, "toxicity": -0.5}, safety=0.5), normalize="none")
    np.testing.assert_array_equal(mixed.rewards_PG, [[-1.5, 0.0]])


def test_two_gates_cap_each_other_and_one_that_did_not_judge_caps_nothing() -> None:
    verdicts = judged(a=[[0.2, 0.2]], b=[[0.3, None]], c=[[1.0, 1.0]])
    weights = {"a": 1.0, "b": 1.0, "c": 1.0}
    np.testing.assert_array_equal(mix(verdicts, specs(weights, a=0.5, b=0.5), normalize="none").rewards_PG, [[0, 0.2]])
    np.testing.assert_array_equal(mix(verdicts, specs(weights, b=0.5), normalize="none").rewards_PG, [[0.3, 1.2]])


def test_a_gate_without_weight_gates_and_where_it_failed_nobody_knows() -> None:
    verdicts = judged(safety=[[0.0, 1.0, LOST]], math=[[1.0, 1.0, 1.0]])
    mixed = mix(verdicts, specs({"safety": 0.0, "math": 1.0}, safety=0.5), normalize="none")
    np.testing.assert_array_equal(mixed.rewards_PG, [[0.0, 1.0, np.nan]])


def test_batch_normalisation_by_hand() -> None:
    """a: mean 2, variance 22/4; b: mean 0.5, std 0.5, over the two it judged."""
    verdicts = judged(a=[[0.0, 1.0], [1.0, 6.0]], b=[[0.0, 1.0], [None, None]])
    mixed = mix(verdicts, specs({"a": 1.0, "b": 2.0}), normalize="batch")
    z = np.array([[-2, -1], [-1, 4]]) / np.sqrt(5.5)
    np.testing.assert_allclose(mixed.rewards_PG, z + np.array([[-2, 2], [0, 0]]), atol=1e-12)


def test_group_normalisation_by_hand() -> None:
    """First group, of two: a has mean 2 and std 1, b no spread. Second: variances 8/3 about 2, and 2 about 1."""
    verdicts = judged(a=[[1.0, 3.0, LOST], [0.0, 4.0, 2.0]], b=[[5.0, 5.0, 7.0], [0.0, 0.0, 3.0]])
    mixed = mix(verdicts, specs({"a": 1.0, "b": 0.5}), normalize="group")
    a = [-np.sqrt(1.5), np.sqrt(1.5), 0]
    b = [-np.sqrt(0.5), -np.sqrt(0.5), np.sqrt(2)]
    expected = [[-1.0, 1.0, np.nan], [x + 0.5 * y for x, y in zip(a, b, strict=True)]]
    np.testing.assert_allclose(mixed.rewards_PG, expected, atol=1e-12)


def test_gdpo_tells_apart_what_the_sum_does_not() -> None:
    """The paper's point: two binary rewards, sums 0 and 1 against 0 and 2, are one thing to GRPO and two to GDPO."""
    verdicts = judged(a=[[0.0, 1.0], [0.0, 1.0]], b=[[0.0, 0.0], [0.0, 1.0]])
    summed = mix(verdicts, specs({"a": 1.0, "b": 1.0}), normalize="none").rewards_PG
    np.testing.assert_array_equal(standardize(summed, axis=1), [[-1, 1], [-1, 1]])
    decoupled = mix(verdicts, specs({"a": 1.0, "b": 1.0}), normalize="group").rewards_PG
    np.testing.assert_array_equal(decoupled, [[-1, 1], [-2, 2]])


def random_verdicts(seed: int) -> dict[str, list[list[float | Verdict | None]]]:
    generator = np.random.default_rng(seed)
    return {
        label: [[LOST if generator.random() < 0.1 else float(generator.normal()) for _ in range(6)] for _ in range(5)]
        for label in ("a", "b", "c")
    }


@pytest.mark.parametrize("normalize", ["none", "batch", "group"])
def test_the_order_within_a_group_does_not_matter(normalize: Normalize) -> None:
    weighted = specs({"a": 0.3, "b": 1.0, "c": -2.0}, a=-0.5)
    verdicts = judged(**random_verdicts(0))
    order = [3, 1, 5, 0, 2, 4]
    permuted = [[group[g] for g in order] for group in verdicts]
    before, after = (mix(each, weighted, normalize=normalize).rewards_PG for each in (verdicts, permuted))
    np.testing.assert_allclose(after, before[:, order], atol=1e-11)


@pytest.mark.parametrize("normalize", ["batch", "group"])
def test_shift_and_scale_of_a_reward_do_not_matter(normalize: Normalize) -> None:
    tables = random_verdicts(1)
    moved = [[v if isinstance(v, Verdict) or v is None else 7.0 + 0.01 * v for v in group] for group in tables["b"]]
    weighted = specs({"a": 0.3, "b": 1.0, "c": -2.0})
    before, after = (
        mix(judged(**each), weighted, normalize=normalize).rewards_PG for each in (tables, tables | {"b": moved})
    )
    np.testing.assert_allclose(after, before, atol=1e-9)


@pytest.mark.parametrize("normalize", ["batch", "group"])
def test_a_completion_that_is_left_out_moves_no_other(normalize: Normalize) -> None:
    weighted = specs({"a": 1.0, "b": 1.0})
    small, large = (
        mix(judged(a=[[0.0, 1.0, 5.0, score]], b=[[1.0, 1.0, 0.0, LOST]]), weighted, normalize=normalize).rewards_PG
        for score in (0.0, 1e6)
    )
    np.testing.assert_array_equal(small, large)


@pytest.mark.parametrize("scores", [[0.1] * 7, [0.1 + 0.2] * 3, [np.nan, 2.0], [np.nan] * 2, [1e-200, 2e-200]])
def test_without_spread_a_reward_contributes_exactly_nothing(scores: list[float]) -> None:
    np.testing.assert_array_equal(standardize(scores, axis=0), np.zeros(len(scores)))


def statistics_of(verdicts: Groups, specs: list[RewardSpec], lengths_PG: list[list[int]]) -> dict[str, float]:
    return mix_metrics(mix(verdicts, specs, normalize="none"), lengths_PG)


def test_correlations_by_hand() -> None:
    """Over a's 1, 2, 3 the lengths 10, 30, 20 correlate at 1/2; b falls as a grows, where both are ok."""
    verdicts = judged(a=[[1.0, 2.0], [3.0, LOST]], b=[[3.0, 2.0], [LOST, 9.0]], c=[[5.0, 5.0], [5.0, 5.0]])
    metrics = statistics_of(verdicts, specs({"a": 1.0, "b": 0.0, "c": 1.0}), [[10, 30], [20, 99]])
    assert metrics["reward/a/corr_length"] == pytest.approx(0.5)
    assert metrics["reward/a/corr/b"] == pytest.approx(-1.0)
    # a constant correlates with nothing, and each pair is said once
    assert not {"reward/c/corr_length", "reward/a/corr/c", "reward/b/corr/a"} & set(metrics)


def test_rewards_that_never_judge_the_same_completion_do_not_correlate() -> None:
    metrics = statistics_of(judged(a=[[1.0, None]], b=[[None, 1.0]]), specs({"a": 1.0, "b": 1.0}), [[1, 2]])
    assert not [name for name in metrics if "corr" in name]


def test_correlation_agrees_with_numpy() -> None:
    generator = np.random.default_rng(2)
    a, b = generator.normal(size=(2, 4, 8))
    lengths = generator.integers(1, 100, size=(4, 8))
    metrics = mix_metrics(mix(judged(a=a.tolist(), b=b.tolist()), specs({"a": 1, "b": 1}), normalize="group"), lengths)
    assert metrics["reward/a/corr/b"] == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert metrics["reward/b/corr_length"] == pytest.approx(np.corrcoef(b.ravel(), lengths.ravel())[0, 1])


def test_gated_rate_by_hand() -> None:
    verdicts = judged(format=[[0.0, 0.4, 0.5, LOST]], math=[[1.0, 1.0, 1.0, 1.0]])
    metrics = statistics_of(verdicts, specs({"format": 1.0, "math": 1.0}, format=0.5), [[1, 1, 1, 1]])
    assert metrics["reward/format/gated_rate"] == pytest.approx(2 / 3)
    assert "reward/math/gated_rate" not in metrics


def test_collapsed_rate_by_hand() -> None:
    """(1, 0), (0, 1), (1, 1): three pairs differ, one has equal sums. The other groups say nothing."""
    verdicts = judged(a=[[1.0, 0.0, 1.0], [1.0, 1.0, LOST]], b=[[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    lengths = [[1, 1, 1], [1, 1, 1]]
    assert statistics_of(verdicts, specs({"a": 1.0, "b": 1.0}), lengths)["reward/total/collapsed_rate"] == 1 / 3
    assert statistics_of(verdicts, specs({"a": 1.0, "b": 2.0}), lengths)["reward/total/collapsed_rate"] == 0.0
    # told apart by a reward that is only watched, or by what a gate takes away on purpose: no collapse
    assert "reward/total/collapsed_rate" not in statistics_of(verdicts[1:], specs({"a": 1.0, "b": 1.0}), lengths[1:])
    watched = judged(a=[[1.0, 1.0]], b=[[0.0, 1.0]])
    assert "reward/total/collapsed_rate" not in statistics_of(watched, specs({"a": 1.0, "b": 0.0}), [[1, 1]])
    gated = judged(a=[[0.0, 1.0]], b=[[0.0, 0.0]])
    gating = specs({"a": 1.0, "b": 1.0}, b=0.5)
    assert "reward/total/collapsed_rate" not in statistics_of(gated, gating, [[1, 1]])


def test_overlong_shaping_by_hand() -> None:
    """DAPO's own setting: 16384 + 4096 tokens."""
    lengths_PG = np.array([[1, 16384, 17408], [18432, 20480, 30000]])
    np.testing.assert_array_equal(
        shape_overlong(lengths_PG, max_tokens=20480, shaping_tokens=4096), [[0, 0, -0.25], [-0.5, -1, -1]]
    )
    assert not shape_overlong([20480], max_tokens=20480, shaping_tokens=0).any()


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None])
def test_no_verdict_without_a_finite_score_is_ok(score: float | None) -> None:
    with pytest.raises(ValueError):
        Verdict(score)


def test_no_failed_verdict_has_a_score() -> None:
    with pytest.raises(ValueError):
        Verdict(0.0, Status.TIMEOUT)
