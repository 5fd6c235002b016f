"""What a step's verdicts and pools look like in numbers, by hand."""

import pytest

from rewards.pool.metrics import JobTimes, summarize, summarize_workers
from rewards.types import Status, Verdict


def test_scores_and_failures() -> None:
    verdicts = [
        Verdict(1.0, seconds=0.1),
        Verdict(0.0, seconds=0.2),
        Verdict(0.5, seconds=0.3),
        Verdict(None, Status.TIMEOUT, seconds=5.0),
        Verdict(None, Status.INFRA_ERROR, seconds=0.3),
        Verdict(None, Status.ABSTAIN, seconds=0.3),
    ]
    metrics = summarize({"math": verdicts, "silent": [], "broken": verdicts[3:4]})
    assert metrics["reward/math/mean"] == pytest.approx(0.5)
    assert metrics["reward/math/std"] == pytest.approx((1 / 6) ** 0.5)  # of 1, 0 and 1/2
    assert metrics["reward/math/pass_rate"] == pytest.approx(1 / 3)
    assert metrics["reward/math/failure_rate"] == pytest.approx(2 / 6)
    assert metrics["reward/math/abstain_rate"] == pytest.approx(1 / 6)
    assert metrics["reward/math/seconds_p50"] == pytest.approx(0.3)
    assert metrics["reward/math/seconds_p99"] == pytest.approx(0.3 + 0.95 * 4.7)
    assert not [key for key in metrics if "outcome" in key or "silent" in key]
    assert "reward/broken/mean" not in metrics and metrics["reward/broken/failure_rate"] == 1.0


def test_outcomes_are_shares_of_the_scored() -> None:
    verdicts = [
        Verdict(0.0, outcome="compile error"),
        Verdict(0.0, outcome="compile error"),
        Verdict(1.0, outcome="passed"),
        Verdict(0.25),
        Verdict(None, Status.INFRA_ERROR, outcome="passed"),
    ]
    metrics = summarize({"code": verdicts})
    assert {key: value for key, value in metrics.items() if "outcome" in key} == {
        "reward/code/outcome/compile_error_rate": 0.5,
        "reward/code/outcome/passed_rate": 0.25,
    }


def test_a_pool_of_two_workers() -> None:
    passages = [
        JobTimes(10.0, 10.0, 12.0),
        JobTimes(10.0, 10.0, 11.0),
        JobTimes(10.0, 11.0, 13.0),  # waits for the second worker
        JobTimes(10.5, 12.0, 14.0),  # waits for the first
    ]
    metrics = summarize_workers("sandbox", passages, workers=2, replaced=1)
    assert metrics == {
        "reward_pool/sandbox/queue_depth_max": 2.0,  # from 10.5 to 11
        "reward_pool/sandbox/latency_p50": pytest.approx(2.5),  # of 1, 2, 3 and 3.5
        "reward_pool/sandbox/latency_p99": pytest.approx(3.5 - 0.03 * 0.5),
        "reward_pool/sandbox/utilisation": pytest.approx(7 / (2 * 4)),
        "reward_pool/sandbox/replaced": 1.0,
    }
    assert summarize_workers("sandbox", [], workers=2, replaced=0) == {}


def test_nothing_waits_for_a_free_worker() -> None:
    passages = [JobTimes(float(n), float(n), n + 1.0) for n in range(3)]
    metrics = summarize_workers("rule", passages, workers=1, replaced=0)
    assert metrics["reward_pool/rule/queue_depth_max"] == 0.0
    assert metrics["reward_pool/rule/utilisation"] == 1.0
