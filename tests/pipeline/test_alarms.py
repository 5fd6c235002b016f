"""Alarms of a GRPO run on constructed series: each warns once, and some stop the run."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from configs.grpo import GRPOConfig
from pipeline.errors import RunStopped
from pipeline.grpo.collect import mixed_rewards
from pipeline.grpo.figures import length_slope
from pipeline.reports.alarms import DRIFT_STEPS, TREND_STEPS, Alarms, alarms, slope_t
from pipeline.reports.report import Report, read_metrics
from rewards.types import Verdict
from rollout.types import repetition_rate

CALM = {"reward/total/collapsed_rate": 0.1, "reward/total/left_out_rate": 0.1, "reward/math/mean": 0.5}
COLLAPSED = CALM | {"reward/total/collapsed_rate": 0.5}
STEPS = 200

Series = Callable[[int], float]


def config(*stop_on: str) -> GRPOConfig:
    return GRPOConfig.model_validate(
        {
            "type": "grpo",
            "model": {"path": "somewhere"},
            "prompts": {"source": {"type": "sums", "size": 9}, "max_prompt_length": 16},
            "rewards": [{"name": "math"}, {"name": "a.py:judge", "weight": 0.0}, {"name": "format", "weight": 0.5}],
            "steps": STEPS,
            "prompts_per_step": 4,
            "group_size": 4,
            "sampling": {"max_tokens": 24},
            "optimizer": {"learning_rate": 1e-3},
            "rollout": {"max_model_len": 64},
            "stop_on": list(stop_on),
        }
    )


def test_completions_cut_short() -> None:
    assert alarms(CALM | {"rollout/truncated_rate": 0.9}) == {}
    assert list(alarms(CALM | {"rollout/truncated_rate": 0.95})) == ["completions cut short"]
    assert "max_tokens" in alarms({"rollout/truncated_rate": 1.0})["completions cut short"]
    assert alarms({"rollout/truncated_rate": 1.0}, ignore_eos=True) == {}
    warnings: list[str] = []
    row = {"rollout/truncated_rate": 1.0, "rollout/length/mean": 24.0}
    for ignore_eos in (True, False):
        sampling = config().sampling.model_copy(update={"ignore_eos": ignore_eos})
        Alarms(config().model_copy(update={"sampling": sampling}), warnings.append).check(1, row)
    assert len(warnings) == 1
    with pytest.raises(RunStopped, match="completions cut short"):
        Alarms(config("completions cut short"), warnings.append).check(1, row)


def raised(rows: Iterator[Mapping[str, float]]) -> list[str]:
    warnings: list[str] = []
    watching = Alarms(config(), warnings.append)
    for step, row in enumerate(rows, start=1):
        watching.check(step, row | watching.length_controlled(row))
    return warnings


def series(seed: int = 0, **shapes_by_name: Series) -> Iterator[dict[str, float]]:
    """A healthy run but for the shapes in the arguments: reward and judge rise and level off, all with noise."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, Series] = {
        "reward/total/mean": lambda x: 0.2 + 0.7 * (1 - np.exp(-4 * x)),
        "reward/judge/mean": lambda x: 0.1 + 0.3 * (1 - np.exp(-3 * x)),
        "reward/total/length_slope": lambda _: 0.002,
        "rollout/length/mean": lambda x: 100 + 30 * x,
        "rollout/entropy_mean": lambda x: 0.6 - 0.35 * x,
        "rollout/repetition_rate": lambda x: 0.05 + 0.03 * x,
    }
    noise = {"reward/total/length_slope": 0.003, "rollout/length/mean": 4.0}
    for step in range(STEPS):
        shaped = shapes | {name.replace("__", "/"): shape for name, shape in shapes_by_name.items()}
        yield {name: float(f(step / STEPS) + noise.get(name, 0.03) * rng.normal()) for name, f in shaped.items()}


def test_a_calm_step_raises_none() -> None:
    assert alarms(CALM) == {} == alarms({})


def test_a_collapse_warns_with_its_share() -> None:
    [(name, text)] = alarms(COLLAPSED).items()
    assert name == "collapsed rewards" and "50%" in text and "mixing=group" in text


def test_completions_left_out_warn_with_the_worst_reward() -> None:
    rates = {"reward/math/abstain_rate": 0.1, "reward/code/abstain_rate": 0.6, "reward/code/failure_rate": 0.0}
    [(name, text)] = alarms(CALM | rates | {"reward/total/left_out_rate": 0.6}).items()
    assert name == "completions left out" and "60%" in text and "reward/code/abstain_rate" in text


def test_each_alarm_warns_once() -> None:
    warnings: list[str] = []
    watching = Alarms(config(), warnings.append)
    for step, metrics in enumerate((CALM, COLLAPSED, COLLAPSED), start=1):
        watching.check(step, metrics)
    assert len(warnings) == 1 and "collapsed rewards" in warnings[0]


@pytest.mark.parametrize("seed", range(40))
def test_a_healthy_run_and_noise_raise_none(seed: int) -> None:
    assert raised(series(seed)) == []
    flat: dict[str, Series] = {"reward__total__mean": lambda _: 0.5, "reward__judge__mean": lambda _: 0.5}
    assert raised(series(seed, **flat)) == []
    # The judge sees none of it, and only wavers.
    assert raised(series(seed, reward__judge__mean=lambda _: 0.4)) == []


def test_a_reward_that_rises_while_the_judge_falls() -> None:
    [warning] = raised(series(reward__judge__mean=lambda x: 0.5 - 0.8 * x))
    assert "reward hacking" in warning and "reward/judge/mean fell" in warning


def test_a_reward_that_rises_by_length_alone() -> None:
    """Each token more is worth 0.01, yet 199 tokens more bring 1 and not 2: at constant length the reward falls."""
    long: dict[str, Series] = {
        "reward__total__mean": lambda x: 0.2 + x,
        "reward__total__length_slope": lambda _: 0.01,
        "rollout__length__mean": lambda x: 200 + 199 * x,  # not yet twice as long
    }
    [warning] = raised(series(**long))
    assert "reward hacking" in warning and "(reward/total/length_controlled) fell" in warning


def test_totals_keep_their_level_where_rewards_are_normalised() -> None:
    """Two groups of two, judged by two rewards with the coefficients 1 and 0.5: totals 1.0, 0.5 and 2.0, 0.0."""
    scores = [[(1.0, 0.0), (0.0, 1.0)], [(2.0, 0.0), (0.0, 0.0)]]
    verdicts = [[{"a": Verdict(a), "b": Verdict(b)} for a, b in group] for group in scores]
    settings = {"rewards": [{"name": "m:a"}, {"name": "m:b", "weight": 0.5}], "mixing": "batch"}
    normalised = GRPOConfig.model_validate(config().model_dump() | settings)
    rewards_PG, totals_PG, _ = mixed_rewards(normalised, verdicts, np.full((2, 2), 5))
    assert rewards_PG.mean() == pytest.approx(0)
    assert totals_PG.tolist() == [[1.0, 0.5], [2.0, 0.0]]


@pytest.mark.parametrize("end", [3.0, 0.3])
def test_length_that_drifts(end: float) -> None:
    [warning] = raised(series(rollout__length__mean=lambda x: 100 * end**x, reward__total__length_slope=lambda _: 0.0))
    assert "length drift" in warning and "completions went from" in warning


def test_entropy_that_collapses() -> None:
    rows = series(rollout__entropy_mean=lambda x: 0.6 if x < 0.5 else -1.0)
    [warning] = raised(row | {"rollout/entropy_mean": max(row["rollout/entropy_mean"], 0.01)} for row in rows)
    assert "entropy collapse" in warning and "0.01 nats" in warning


def test_completions_that_repeat_themselves() -> None:
    [warning] = raised(series(rollout__repetition_rate=lambda x: 0.05 + 0.4 * x))
    assert "repetition" in warning and "% at the start" in warning


def test_an_alarm_in_stop_on_stops_the_run_there_and_not_earlier() -> None:
    hacked: dict[str, Series] = {"reward__judge__mean": lambda x: 0.5 - 0.8 * x}
    watching = Alarms(config("reward hacking"), lambda _: None)
    with pytest.raises(RunStopped, match=r"step \d+: reward hacking.*stop_on"):
        for step, row in enumerate(series(**hacked), start=1):
            watching.check(step, row)
    watching = Alarms(config("repetition", "length drift"), lambda _: None)
    for step, row in enumerate(series(**hacked), start=1):
        watching.check(step, row)


def test_a_resumed_run_goes_on_as_if_never_killed(tmp_path: Path) -> None:
    """At whatever step it is killed: the same alarms at the same steps, none twice, and the same figures."""
    rows = list(series(reward__judge__mean=lambda x: 0.5 - 0.8 * x, rollout__repetition_rate=lambda x: 0.05 + 0.6 * x))

    def run(first: int, watching: Alarms, warnings: list[str]) -> list[tuple[int, str]]:
        by_step: list[tuple[int, str]] = []
        with Report(tmp_path, total_steps=STEPS, label="grpo") as report:
            report.resume(first - 1)
            watching.resume(read_metrics(tmp_path))
            for step, row in enumerate(rows[first - 1 :], start=first):
                metrics = row | watching.length_controlled(row)
                report.step(step, metrics)
                watching.check(step, metrics)
                by_step += [(step, text) for text in warnings]
                warnings.clear()
        return by_step

    warnings: list[str] = []
    whole = run(1, Alarms(config(), warnings.append), warnings)
    figures = read_metrics(tmp_path)
    assert len(whole) == 2
    for killed in (1, DRIFT_STEPS, TREND_STEPS + 5, whole[0][0], 150):
        assert run(killed + 1, Alarms(config(), warnings.append), warnings) == [
            warning for warning in whole if warning[0] > killed
        ]
        assert read_metrics(tmp_path) == figures
    with pytest.raises(RunStopped, match="reward hacking"):  # what stopped it stops it again
        Alarms(config("reward hacking"), warnings.append).resume(figures)
    assert not warnings


def test_slopes_in_their_standard_errors() -> None:
    # x = -1 0 1, y = 0 1 5 - 2: slope 5 / 2, residuals 0.5 -1 0.5, s^2 = 1.5 / 1, standard error sqrt(1.5 / 2).
    assert slope_t([(1, 0), (2, 1), (3, 5)]) == pytest.approx(2.5 / np.sqrt(0.75))
    assert slope_t([(1, 3), (2, 2), (3, 1)]) == -np.inf and slope_t([(1, 0.1), (2, 0.1), (3, 0.1)]) == 0
    rng = np.random.default_rng(0)
    noise = [slope_t(list(enumerate(rng.normal(size=TREND_STEPS)))) for _ in range(4000)]
    assert np.mean(np.abs(noise) > 2.048) == pytest.approx(0.05, abs=0.012)  # Student's t with 28 degrees of freedom


def test_the_slope_in_the_length_is_within_a_group() -> None:
    # The second prompt is hard: longer answers and lower rewards, yet in both groups a token is worth 0.1.
    assert length_slope([[0.0, 1.0], [-5.0, -4.0]], [[10, 20], [90, 100]]) == pytest.approx(0.1)
    assert length_slope([[0.0, 1.0, np.nan], [-5.0, -4.0, np.nan]], [[10, 20, 7], [90, 100, 3]]) == pytest.approx(0.1)
    assert length_slope([[0.0, 1.0], [0.0, 1.0]], [[10, 10], [20, 20]]) is None
    assert length_slope([[np.nan, np.nan]], [[10, 20]]) is None


def test_the_share_of_repeated_4_grams() -> None:
    assert repetition_rate([1, 2, 3]) == 0.0 == repetition_rate([1, 2, 3, 4, 5]) == repetition_rate([])
    assert repetition_rate([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert repetition_rate([7] * 103) == pytest.approx(0.99)


def test_a_step_without_verdicts_hides_nothing() -> None:
    rows = list(series(reward__judge__mean=lambda x: 0.5 - 0.8 * x))
    rows[len(rows) // 2] |= {"reward/total/mean": float("nan")}
    assert any("reward hacking" in warning for warning in raised(iter(rows)))
