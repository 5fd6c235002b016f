"""Figures of a step that differ most from the steps before."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from pipeline.reports.curves import metric_points
from pipeline.reports.files import MetricsRow

WINDOW = 20
"""Steps before that a step is compared with."""
LEAST_STEPS = 5
"""Fewest steps before, below which their spread says nothing."""
UNUSUAL = 3.5
"""Robust z-score from which on a figure counts as unusual (Iglewicz and Hoaglin, How to Detect and Handle Outliers,
1993)."""


@dataclass(frozen=True, slots=True)
class FigureJump:
    """A figure's median over the steps before, its value in the step, and the robust z-score of the value: infinite for
    a figure that had always been the same."""

    figure: str
    before: float
    value: float
    score: float


def figure_jumps(rows: Sequence[MetricsRow], step: int) -> list[FigureJump]:
    """Compare every figure of `step` with up to `WINDOW` steps before, largest score first.

    The score is (value - median) / (1.4826 x median absolute deviation), which a few outliers don't move. Where more
    than half of the values are equal, that deviation is 0, and 1.2533 times the mean absolute deviation stands in its
    place. Raises ValueError for a step that was not made, and for one with fewer than `LEAST_STEPS` before.
    """
    made = [int(row["step"]) for row in rows]
    if step not in made:
        raise ValueError(
            f"STEP={step} was not made: " + (f"steps are {made[0]} to {made[-1]}" if made else "no step was")
        )
    if made.index(step) < LEAST_STEPS:
        raise ValueError(f"STEP={step} has {made.index(step)} steps before it; take one with {LEAST_STEPS} or more")
    first = made[max(made.index(step) - WINDOW, 0)]
    jumps: list[FigureJump] = []
    for figure, points in metric_points(rows).items():
        before = [value for at, value in points if first <= at < step]
        now = [value for at, value in points if at == step]
        if figure == "step" or not now or len(before) < LEAST_STEPS:
            continue
        middle = median(before)
        deviations = [abs(value - middle) for value in before]
        spread = 1.4826 * median(deviations) or 1.2533 * fmean(deviations)
        change = now[0] - middle
        if change:
            score = change / spread if spread > 1e-9 * abs(middle) else math.copysign(math.inf, change)
            jumps.append(FigureJump(figure, middle, now[0], score))
    return sorted(jumps, key=lambda jump: -abs(jump.score))
