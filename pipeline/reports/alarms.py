"""Alarms: figures of a GRPO run that a person should know about without looking for them, or that stop the run.

Three alarms look at one step; the others at the newest `WINDOW` steps, or at the newest `SPAN` against the first
`SPAN`.
All they remember are figures of `metrics.jsonl`, so that a resumed run alarms as one never killed would have.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from statistics import fmean

import numpy as np

from configs.grpo import GRPOConfig
from pipeline.errors import RunStopped

COLLAPSED_RATE = 0.2
"""Share of unlike pairs with the same total from which on the mix of rewards hides what it is made of."""

LEFT_OUT_RATE = 0.2
"""Share of completions without a reward from which on a step learns from too little of what it sampled."""

TRUNCATED_RATE = 0.9
"""Share of a step's completions that are cut short above which hardly any ends by itself."""

CUT_SHORT = (
    "nearly all completions were cut off at sampling.max_tokens; raise it or, if the samples show that the policy goes "
    "on after its answer, train it to end a turn as its chat template does (docs/sft.md)"
)

WINDOW = 30
"""Steps that a trend is looked for in."""

RISING_T, FALLING_T = 3.0, 4.5
"""A series rises where its slope over the window is at least 3 standard errors above 0, and falls where it is 4.5 below
it: noise does the latter once in 20,000 windows, and while a run goes well every window rises."""

SPAN = 10
"""Steps at the start, and up to now, that are averaged before they are compared."""

LENGTH_FACTOR = 2.0
"""Completions this many times as long as at the start, or as short."""

ENTROPY_SHARE = 0.1
"""What is left of the start's entropy when sampling hardly finds another answer."""

REPETITION_RISE = 0.2
"""Rise since the start of the share of 4-grams that a completion has said before."""

LOOKED_AT = (
    "step",
    "reward/total/mean",
    "reward/total/length_slope",
    "reward/*/mean",
    "rollout/length/mean",
    "rollout/entropy_mean",
    "rollout/repetition_rate",
)
"""The figures that are remembered of a step, as patterns."""

Row = Mapping[str, float]


class Alarms:
    """The alarms of one run. Each is said once; one that `config.stop_on` names stops the run."""

    def __init__(self, config: GRPOConfig, tell: Callable[[str], None]) -> None:
        """`tell` says an alarm to a person."""
        self._stop_on = config.stop_on
        self._ignore_eos = config.sampling.ignore_eos
        self._held_out = [spec.label for spec in config.rewards if spec.weight == 0 and spec.gate is None]
        self._tell = tell
        self._said: set[str] = set()
        self._first: list[Row] = []
        self._newest: deque[Row] = deque(maxlen=WINDOW)

    def resume(self, rows: Sequence[Row]) -> None:
        """Remember the steps of an earlier, killed run; what it said is not said again.

        Raises RunStopped as `check` does: a run that an alarm stopped goes on only without it in `stop_on`.
        """
        tell, self._tell = self._tell, lambda _: None
        for row in rows:
            self.check(int(row["step"]), row)
        self._tell = tell

    def length_controlled(self, metrics: Row) -> dict[str, float]:
        """`reward/total/length_controlled`: the step's mean reward at the length that completions had at the start.

        mean r - b (mean l - l_1): b is the slope of the reward in the length within the step's groups
        (`reward/total/length_slope`), l_1 the mean length of the first step. Absent where b is not defined.
        """
        slope, length = metrics.get("reward/total/length_slope"), metrics["rollout/length/mean"]
        if slope is None:
            return {}
        at_start = self._first[0]["rollout/length/mean"] if self._first else length
        return {"reward/total/length_controlled": _reward(metrics) - slope * (length - at_start)}

    def check(self, step: int, metrics: Row) -> None:
        """Look at one more step, say what it raises, and raise RunStopped for what is to stop the run."""
        seen = {key: value for key, value in metrics.items() if any(fnmatchcase(key, name) for name in LOOKED_AT)}
        self._newest.append(seen | {"step": step})
        if len(self._first) < SPAN:
            self._first.append(seen)
        raised = alarms(metrics, ignore_eos=self._ignore_eos) | dict(self._of_run())
        for name, text in raised.items():
            if name not in self._said:
                self._said.add(name)
                self._tell(f"  alarm: {name}: {text}; said once")
        stopping = [name for name in self._stop_on if name in raised]
        if stopping:
            raise RunStopped(
                f"step {step}: {stopping[0]}: {raised[stopping[0]]}. Take '{stopping[0]}' out of stop_on to go on, or "
                "start anew with other settings"
            )

    def _of_run(self) -> Iterator[tuple[str, str]]:
        if len(self._newest) == WINDOW and (text := reward_hacking(list(self._newest), self._held_out)):
            yield "reward hacking", text
        newest = list(self._newest)[-SPAN:]
        if newest[0]["step"] > SPAN:  # none of them is one of the first
            for name, look in (
                ("length drift", length_drift),
                ("entropy collapse", entropy_collapse),
                ("repetition", repetition),
            ):
                if text := look(self._first, newest):
                    yield name, text


def alarms(metrics: Row, *, ignore_eos: bool = False) -> dict[str, str]:
    """The alarms that one step raises, as text by name. With `ignore_eos` every completion is cut short on purpose, so
    that none is raised for it."""
    raised: dict[str, str] = {}
    truncated = metrics.get("rollout/truncated_rate", 0.0)
    if truncated > TRUNCATED_RATE and not ignore_eos:
        raised["completions cut short"] = f"{truncated:.0%} (rollout/truncated_rate): {CUT_SHORT}"
    collapsed = metrics.get("reward/total/collapsed_rate", 0.0)
    if collapsed > COLLAPSED_RATE:
        raised["collapsed rewards"] = (
            f"of the pairs of completions in a group that the rewards tell apart, {collapsed:.0%} got the same total "
            "and so the same advantage (reward/total/collapsed_rate); choose other weights, or mixing=group"
        )
    left_out = metrics.get("reward/total/left_out_rate", 0.0)
    if left_out > LEFT_OUT_RATE:
        rates = {name: rate for name, rate in metrics.items() if name.endswith(("/abstain_rate", "/failure_rate"))}
        worst = max(rates, key=lambda name: rates[name], default="reward/total/left_out_rate")
        raised["completions left out"] = (
            f"{left_out:.0%} of the completions got no reward and teach nothing (most of all {worst}); a row that not "
            "every reward can judge names its own by prompts.reward: column:NAME"
        )
    return raised


def reward_hacking(window: Sequence[Row], held_out: Sequence[str]) -> str | None:
    """The total reward rises while a judge that it does not count, or the reward at constant length, falls.

    held_out: labels of the rewards that are only watched. Rises and falls are slopes by `slope_t`; a series that fewer
    than half the steps have says nothing. A single step's slope in the length is mostly noise, so the reward at
    constant length is taken with the mean slope of the window.
    """
    steps, totals = [row["step"] for row in window], [_reward(row) for row in window]
    judged = [(step, total) for step, total in zip(steps, totals, strict=True) if not math.isnan(total)]
    if len(judged) < WINDOW // 2 or not slope_t(judged) >= RISING_T:
        return None
    watched = {
        f"reward/{label}/mean": [row.get(f"reward/{label}/mean", math.nan) for row in window] for label in held_out
    }
    slopes = [row["reward/total/length_slope"] for row in window if "reward/total/length_slope" in row]
    if slopes:
        lengths = [row["rollout/length/mean"] for row in window]
        watched["the reward at constant length (reward/total/length_controlled)"] = [
            total - fmean(slopes) * (length - lengths[0]) for total, length in zip(totals, lengths, strict=True)
        ]
    risen = _ends([total for _, total in judged])
    for name, values in watched.items():
        points = [(step, value) for step, value in zip(steps, values, strict=True) if not math.isnan(value)]
        if len(points) >= WINDOW // 2 and slope_t(points) <= -FALLING_T:
            return (
                f"over {len(window)} steps the reward rose from {risen}, while {name} fell from "
                f"{_ends([value for _, value in points])}: the policy learns what the reward says, not what it means; "
                "look at the samples, raise kl_coef, or mend the reward"
            )
    return None


def length_drift(first: Sequence[Row], newest: Sequence[Row]) -> str | None:
    """Completions became LENGTH_FACTOR times as long as at the start, or as short."""
    start, now = _means("rollout/length/mean", first, newest)
    if start / LENGTH_FACTOR < now < start * LENGTH_FACTOR or math.isnan(now - start):
        return None
    return (
        f"completions went from {start:.0f} to {now:.0f} tokens (rollout/length/mean); look at whether a reward pays "
        "for length (reward/*/corr_length), or give the reward `length` a weight"
    )


def entropy_collapse(first: Sequence[Row], newest: Sequence[Row]) -> str | None:
    """Entropy fell to ENTROPY_SHARE of the start's or less."""
    start, now = _means("rollout/entropy_mean", first, newest)
    if not now <= start * ENTROPY_SHARE:
        return None
    return (
        f"entropy fell from {start:.3g} to {now:.3g} nats a token (rollout/entropy_mean): groups come to hold one "
        "answer and teach nothing; raise objective.clip_high or kl_coef, or lower the learning rate"
    )


def repetition(first: Sequence[Row], newest: Sequence[Row]) -> str | None:
    """The share of repeated 4-grams is REPETITION_RISE above the start's."""
    start, now = _means("rollout/repetition_rate", first, newest)
    if not now > start + REPETITION_RISE:
        return None
    return (
        f"of a completion's 4-grams {now:.0%} were said in it before, {start:.0%} at the start "
        "(rollout/repetition_rate); look at the samples, and at which reward pays for it"
    )


def slope_t(points: Sequence[tuple[float, float]]) -> float:
    """Slope of (x, y) points by least squares, in its standard errors: the t statistic with len(points) - 2 degrees of
    freedom. Infinite on a straight line, 0 on a flat one, NaN where a value is."""
    x, y = np.array(points, dtype=np.float64).T
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / (x * x).sum()
    rest = ((y - slope * x) ** 2).sum()
    if rest <= 1e-20 * (y * y).sum():  # rounding alone
        return math.copysign(math.inf, slope) if slope else 0.0
    return float(slope / math.sqrt(rest / (len(x) - 2) / (x * x).sum()))


def _reward(row: Row) -> float:
    return row.get("reward/total/mean", math.nan)


def _means(name: str, *rows: Sequence[Row]) -> tuple[float, ...]:
    return tuple(fmean(row.get(name, math.nan) for row in of_span) for of_span in rows)


def _ends(values: Sequence[float]) -> str:
    """Means of the first and the last third: single steps are noise."""
    third = max(len(values) // 3, 1)
    return f"{fmean(values[:third]):.3g} to {fmean(values[-third:]):.3g}"
