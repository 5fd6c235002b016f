"""Rewards from verdicts, and their metrics, in hand-worked numbers."""

import numpy as np
import pytest

from rewards.metrics import summarize
from rewards.mix import mix, shape_overlong
from rewards.types import Status, Verdict

LOST = Verdict(None, Status.INFRA_ERROR)
ABSTAIN = Verdict(None, Status.ABSTAIN)


def test_weighted_sum() -> None:
    verdicts = [
        [{"helpful": Verdict(2.0), "safety": Verdict(-1.0)}, {"helpful": Verdict(0.0), "safety": Verdict(4.0)}],
        [{"helpful": Verdict(1.0)}, {"safety": Verdict(1.0)}],
    ]
    rewards_PG = mix(verdicts, {"helpful": 0.5, "safety": 2.0})
    assert rewards_PG.dtype == np.float64
    np.testing.assert_array_equal(rewards_PG, [[-1.0, 8.0], [0.5, 2.0]])


def test_whatever_is_not_ok_leaves_the_completion_out() -> None:
    verdicts = [
        [{"a": Verdict(1.0), "b": LOST}, {"a": ABSTAIN, "b": Verdict(1.0)}, {"a": Verdict(3.0), "b": Verdict(1.0)}]
    ]
    rewards_PG = mix(verdicts, {"a": 1.0, "b": 1.0})
    np.testing.assert_array_equal(rewards_PG, [[np.nan, np.nan, 4.0]])


def test_a_reward_of_weight_zero_is_only_watched() -> None:
    np.testing.assert_array_equal(mix([[{"a": Verdict(1.0), "b": LOST}]], {"a": 1.0, "b": 0.0}), [[1.0]])


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ([[{"a": Verdict(1.0)}], [{"a": Verdict(1.0)}, {"a": Verdict(1.0)}]], r"same number.*\[1, 2\]"),
        ([], "same number"),
        ([[{}]], "without a verdict"),
        ([[{"c": Verdict(1.0)}]], "no weight for reward 'c'"),
    ],
)
def test_misaligned_verdicts_are_refused(verdicts: list[list[dict[str, Verdict]]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mix(verdicts, {"a": 1.0})


def test_overlong_shaping_by_hand() -> None:
    """DAPO's own setting: 16384 + 4096 tokens."""
    lengths_PG = np.array([[1, 16384, 17408], [18432, 20480, 30000]])
    np.testing.assert_array_equal(
        shape_overlong(lengths_PG, max_tokens=20480, shaping_tokens=4096), [[0, 0, -0.25], [-0.5, -1, -1]]
    )
    assert not shape_overlong([20480], max_tokens=20480, shaping_tokens=0).any()


def test_summary_by_hand() -> None:
    judged = [
        Verdict(1.0, seconds=0.1),
        Verdict(0.5, seconds=0.3),
        Verdict(0.0, seconds=0.2),
        ABSTAIN,
        Verdict(None, Status.TIMEOUT, seconds=5.0),
        LOST,
        Verdict(1.5, seconds=0.1),
        Verdict(1.0, seconds=0.1),
    ]
    metrics = summarize({"code": judged, "math": [LOST], "idle": []})
    assert metrics["reward/code/mean"] == pytest.approx(4.0 / 5)
    assert metrics["reward/code/pass_rate"] == pytest.approx(3 / 5)
    assert metrics["reward/code/failure_rate"] == pytest.approx(2 / 8)
    assert metrics["reward/code/abstain_rate"] == pytest.approx(1 / 8)
    assert metrics["reward/code/seconds_p50"] == pytest.approx(0.1)
    assert metrics["reward/code/seconds_p99"] == pytest.approx(4.671)  # 0.3 + 0.93 * 4.7
    assert metrics["reward/math/failure_rate"] == 1.0
    assert "reward/math/mean" not in metrics
    assert not [key for key in metrics if key.startswith("reward/idle/")]


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None])
def test_no_verdict_without_a_finite_score_is_ok(score: float | None) -> None:
    with pytest.raises(ValueError):
        Verdict(score)


def test_no_failed_verdict_has_a_score() -> None:
    with pytest.raises(ValueError):
        Verdict(0.0, Status.TIMEOUT)
