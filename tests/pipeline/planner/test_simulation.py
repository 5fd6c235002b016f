"""The simulation of engines and ranks, against times worked out by hand."""

from dataclasses import replace

import pytest

from pipeline.planner.simulation import SimulatedFleet, Workload, simulate

EVEN = Workload([100], 40, 10, lambda held: 0.1, train_seconds=0.01, sync_seconds=2.0)
"""40 completions of 100 tokens: an engine takes 10 s for ten of them; a device trains the step in 40 s."""


def test_in_turns_by_hand() -> None:
    """Four engines sample 10 s, two rank devices train 20 s, the sync takes 2 s; two engines need two waves."""
    result = simulate(EVEN, SimulatedFleet(engines=4, rank_devices=2), steps=5)
    assert result.step_seconds == pytest.approx(32)
    assert result.ranks_idle == pytest.approx(12 / 32) and result.engines_idle == pytest.approx(22 / 32)
    assert result.lag == 0 and result.failures == 0
    assert simulate(EVEN, SimulatedFleet(engines=2, rank_devices=2), steps=5).step_seconds == pytest.approx(42)


def test_with_a_lag_the_slower_side_decides() -> None:
    """Training takes 20 s and sampling 10: ranks wait for nothing but the sync. With one rank device for 40 engines'
    work it is the same; with eight, engines decide: 10 s of sampling and 2 s of the sync."""
    result = simulate(EVEN, SimulatedFleet(engines=4, rank_devices=2, max_lag=1), steps=10)
    assert result.step_seconds == pytest.approx(22) and result.ranks_idle == pytest.approx(2 / 22)
    assert result.lag == 1, "all was sampled before the update"
    result = simulate(EVEN, SimulatedFleet(engines=4, rank_devices=8, max_lag=1), steps=50)
    assert result.step_seconds == pytest.approx(12, rel=0.02) and result.engines_idle < 0.2
    assert 0 < result.lag < 1, "an update comes in the middle of sampling"


def test_begun_tokens_are_computed_again_and_it_costs() -> None:
    free = simulate(EVEN, SimulatedFleet(engines=4, rank_devices=8, max_lag=1), steps=20)
    paid = simulate(
        replace(EVEN, prefill_seconds=0.002), SimulatedFleet(engines=4, rank_devices=8, max_lag=1), steps=20
    )
    assert free.step_seconds < paid.step_seconds < free.step_seconds + 2, "ten of at most 100 tokens, at 2 ms"


def test_one_slow_engine_delays_steps_in_turns_more_than_those_with_a_lag() -> None:
    work = Workload([100], 400, 10, lambda held: 0.1, train_seconds=0.01)
    slow = {"slow_share": 0.25, "slow_speed": 0.5}
    delays = [
        simulate(work, SimulatedFleet(4, 4, max_lag=lag, **slow), 20).step_seconds
        / simulate(work, SimulatedFleet(4, 4, max_lag=lag), 20).step_seconds
        for lag in (0, 1)
    ]
    assert 1.0 < delays[1] < 1.25 and delays[0] > 1.02, "it takes less from the queue, and is never halved"


def test_failures_cost_restarts_and_the_step() -> None:
    fleet = SimulatedFleet(engines=4, rank_devices=4, max_lag=1, failure_seconds=2000.0, restart_seconds=60.0)
    result, without = simulate(EVEN, fleet, 200), simulate(EVEN, replace(fleet, failure_seconds=float("inf")), 200)
    assert result.failures > 10 and without.failures == 0
    assert result.step_seconds > 1.2 * without.step_seconds
    assert simulate(EVEN, fleet, 200) == result, "a function of its seed"
