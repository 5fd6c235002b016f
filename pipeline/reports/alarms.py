"""Alarms of a run of GRPO or distillation: figures that call for a person, or that stop the run.

Alarms of a step test one of its figures. Drift alarms compare the newest `DRIFT_STEPS` steps with as many at the start,
and the alarm of reward hacking looks for trends in the newest `TREND_STEPS`. They depend on the rows of `metrics.jsonl`
alone, so a resumed run raises the same alarms as one that was never killed.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from configs.distill import DistillConfig
from configs.grpo import AlarmName, GRPOConfig
from pipeline.errors import RunStopped
from pipeline.reports.files import MetricsRow

TRUNCATED_RATE = 0.9
"""Share of truncated completions above which hardly any completion ends by itself."""
CUT_SHORT = (
    "nearly all completions were cut off at sampling.max_tokens; raise it or, if the samples show that the policy goes "
    "on after its answer, train it to end a turn as its chat template does (docs/sft.md)"
)
DRIFT_STEPS = 10
"""Steps over which drift alarms average, at the start and now."""
TREND_STEPS = 30
"""Steps in which trends are looked for."""
RISING_T, FALLING_T = 3.0, 4.5
"""Standard errors of a slope from which on a series counts as rising or falling. Noise falls by 4.5 once in 20,000
windows; it rises by 3 more often, but so does every window of a healthy run."""


@dataclass(frozen=True, slots=True)
class StepAlarm:
    """Raised by a step whose `figure` is above `limit`. `text` may hold {value}, and {worst}: the rate of abstentions
    or failures that is highest."""

    name: AlarmName
    figure: str
    limit: float
    text: str


@dataclass(frozen=True, slots=True)
class DriftAlarm:
    """Raised where `test` holds for the means of `figure` at the start and now. `text` may hold {start} and {now}."""

    name: AlarmName
    figure: str
    test: Callable[[float, float], bool]
    text: str


STEP_ALARMS = (
    StepAlarm(
        "completions cut short",
        "rollout/truncated_rate",
        TRUNCATED_RATE,
        "{value:.0%} (rollout/truncated_rate): " + CUT_SHORT,
    ),
    StepAlarm(
        "collapsed rewards",
        "reward/total/collapsed_rate",
        0.2,
        "{value:.0%} of the pairs of completions in a group that differ in a reward got the same total and so the same "
        "advantage (reward/total/collapsed_rate); choose other weights, or mixing=group",
    ),
    StepAlarm(
        "completions left out",
        "reward/total/left_out_rate",
        0.2,
        "{value:.0%} of the completions got no reward and teach nothing (most of all {worst}); if some rows can't be "
        "judged by every reward, name the rewards of each row in a column and set prompts.reward: column:NAME",
    ),
)
DRIFT_ALARMS = (
    DriftAlarm(
        "length drift",
        "rollout/length/mean",
        lambda start, now: not start / 2 < now < start * 2,
        "completions went from {start:.0f} to {now:.0f} tokens (rollout/length/mean); see if a reward pays for length "
        "(reward/*/corr_length), or give the reward `length` a weight",
    ),
    DriftAlarm(
        "entropy collapse",
        "rollout/entropy_mean",
        lambda start, now: now <= start * 0.1,
        "entropy fell from {start:.3g} to {now:.3g} nats a token (rollout/entropy_mean): the answers of a group become "
        "the same and teach nothing; raise objective.clip_high or kl_coef, or lower the learning rate",
    ),
    DriftAlarm(
        "repetition",
        "rollout/repetition_rate",
        lambda start, now: now > start + 0.2,
        "{now:.0%} of the 4-grams of a completion occurred in it before, {start:.0%} at the start "
        "(rollout/repetition_rate); look at the samples for the reward that pays for it",
    ),
)


class Alarms:
    """The alarms of one run. Each warns once; one that `config.stop_on` names stops the run.

    Example:
        alarms = Alarms(config, print)
        alarms.resume(read_metrics(folder))
        alarms.check(step, metrics)
    """

    def __init__(self, config: GRPOConfig | DistillConfig, warn: Callable[[str], None]) -> None:
        self._config = config
        rewards = config.rewards if isinstance(config, GRPOConfig) else []
        self._held_out = [spec.label for spec in rewards if spec.weight == 0 and spec.gate is None]
        self._warn = warn
        self._raised: set[str] = set()
        self._first: list[MetricsRow] = []
        self._newest: deque[MetricsRow] = deque(maxlen=TREND_STEPS)

    def resume(self, rows: Sequence[MetricsRow]) -> None:
        """Check the steps of an earlier, killed run without repeating its warnings.

        Raises RunStopped as `check` does: a run that an alarm stopped goes on only without it in `stop_on`.
        """
        warn, self._warn = self._warn, lambda _: None
        for row in rows:
            self.check(int(row["step"]), row)
        self._warn = warn

    def length_controlled(self, metrics: MetricsRow) -> dict[str, float]:
        """See the function `length_controlled`; lengths are compared with the first step's."""
        first = self._first[0] if self._first else metrics
        return length_controlled(metrics, first["rollout/length/mean"])

    def check(self, step: int, metrics: MetricsRow) -> None:
        """Test the figures of one more step and warn. Raises RunStopped for an alarm in `stop_on`."""
        row = {**metrics, "step": step}
        self._newest.append(row)
        if len(self._first) < DRIFT_STEPS:
            self._first.append(row)
        texts = alarms(metrics, ignore_eos=self._config.sampling.ignore_eos) | self._trends()
        for name, text in texts.items():
            if name not in self._raised:
                self._raised.add(name)
                self._warn(f"  alarm: {name}: {text}; this warning is not repeated")
        for name in self._config.stop_on:
            if name in texts:
                raise RunStopped(
                    f"step {step}: {name}: {texts[name]}. Take '{name}' out of stop_on to go on, or start anew with "
                    "other settings"
                )

    def _trends(self) -> dict[str, str]:
        texts: dict[str, str] = {}
        window, newest = list(self._newest), list(self._newest)[-DRIFT_STEPS:]
        if len(window) == TREND_STEPS and (text := reward_hacking(window, self._held_out)):
            texts["reward hacking"] = text
        if newest[0]["step"] > DRIFT_STEPS:  # else a step would be compared with itself
            for alarm in DRIFT_ALARMS:
                start, now = (fmean(row.get(alarm.figure, math.nan) for row in rows) for rows in (self._first, newest))
                if not math.isnan(now - start) and alarm.test(start, now):
                    texts[alarm.name] = alarm.text.format(start=start, now=now)
        return texts


def length_controlled(metrics: MetricsRow, first_mean_length: float) -> dict[str, float]:
    """Return `reward/total/length_controlled`: the step's mean reward at the mean length l_1 of the first step.

    mean r - b (mean l - l_1), where b is `reward/total/length_slope`: the slope of the reward in the length within the
    step's groups. Empty where b is not defined.
    """
    if "reward/total/length_slope" not in metrics:
        return {}
    longer = metrics["rollout/length/mean"] - first_mean_length
    return {"reward/total/length_controlled": _reward(metrics) - metrics["reward/total/length_slope"] * longer}


def alarms(metrics: MetricsRow, *, ignore_eos: bool = False) -> dict[str, str]:
    """The step alarms that a step raises, as text by name. With `ignore_eos` every completion is truncated on purpose,
    so no alarm is raised for it."""
    rates = {key: value for key, value in metrics.items() if key.endswith(("/abstain_rate", "/failure_rate"))}
    worst = max(rates, key=lambda key: rates[key], default="reward/total/left_out_rate")
    return {
        alarm.name: alarm.text.format(value=value, worst=worst)
        for alarm in STEP_ALARMS
        if (value := metrics.get(alarm.figure, 0.0)) > alarm.limit
        and not (ignore_eos and alarm.name == "completions cut short")
    }


def reward_hacking(window: Sequence[MetricsRow], held_out: Sequence[str]) -> str | None:
    """Describe a total reward that rises while a held-out reward, or the reward at constant length, falls.

    held_out: labels of the rewards without weight and gate. Slopes are judged by `slope_t`; a series that fewer than
    half of the steps have is passed over. The slope in the length of a single step is mostly noise, so the reward at
    constant length takes the mean slope of the window.
    """
    steps, totals = [row["step"] for row in window], [_reward(row) for row in window]
    rewards = _points(steps, totals)
    if len(rewards) < TREND_STEPS // 2 or not slope_t(rewards) >= RISING_T:
        return None
    series = {
        f"reward/{label}/mean": [row.get(f"reward/{label}/mean", math.nan) for row in window] for label in held_out
    }
    slopes = [row["reward/total/length_slope"] for row in window if "reward/total/length_slope" in row]
    if slopes:
        lengths = [row["rollout/length/mean"] for row in window]
        series["the reward at constant length (reward/total/length_controlled)"] = [
            total - fmean(slopes) * (length - lengths[0]) for total, length in zip(totals, lengths, strict=True)
        ]
    for name, values in series.items():
        points = _points(steps, values)
        if len(points) >= TREND_STEPS // 2 and slope_t(points) <= -FALLING_T:
            return (
                f"over {len(window)} steps the reward rose from {_ends(rewards)}, while {name} fell from "
                f"{_ends(points)}: the policy may exploit a fault of the reward; look at the samples, raise kl_coef, "
                "or mend the reward"
            )
    return None


def slope_t(points: Sequence[tuple[float, float]]) -> float:
    """Slope of (x, y) points by least squares, in its standard errors: the t statistic with len(points) - 2 degrees of
    freedom. Infinite on a straight line, 0 on a flat one."""
    x, y = np.array(points, dtype=np.float64).T
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / (x * x).sum()
    residual = ((y - slope * x) ** 2).sum()
    if residual <= 1e-20 * (y * y).sum():  # rounding alone
        return math.copysign(math.inf, slope) if slope else 0.0
    return float(slope / math.sqrt(residual / (len(x) - 2) / (x * x).sum()))


def _reward(row: MetricsRow) -> float:
    return row.get("reward/total/mean", math.nan)


def _points(steps: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    return [(step, value) for step, value in zip(steps, values, strict=True) if not math.isnan(value)]


def _ends(points: Sequence[tuple[float, float]]) -> str:
    """Means of the first and the last third, since single steps are noise."""
    third = max(len(points) // 3, 1)
    first, last = (fmean(value for _, value in part) for part in (points[:third], points[-third:]))
    return f"{first:.3g} to {last:.3g}"
