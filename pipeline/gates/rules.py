"""A gate's rules as pure functions of per-item figures: holds, fails, or undecided where the interval leaves both open.

Two evaluations are compared item by item, so that what makes an item hard for both cancels out. Intervals are of the
mean over items: a percentile bootstrap (Efron, 1979), or Wilson's for a threshold on a share. With few or
identical items the interval of a bootstrap is too narrow, so two pseudo-items are added, one on either side; for paired
shares that is the adjustment of Bonett and Price (Statistics in Medicine 31, 2012), one discordant pair each way.

Items `ROW#1`, `ROW#2`, ... are of one row (the turns of a conversation, a prompt's instructions) and depend on each
other. So whole rows are drawn, with all their items (Davison and Hinkley, Bootstrap Methods, 1997, section 3.8), and
the two pseudo-items are rows. An item named otherwise is a row of its own.

Shape suffixes: N items, R rows, B resamples.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from configs.gate import HoldRule, ImproveRule, Rule, ThresholdRule
from pipeline.evaluation.statistics import wilson_interval
from pipeline.evaluation.suites import SuiteResult

Floats = NDArray[np.float64]
Outcome = Literal["holds", "fails", "undecided"]

LOWER_IS_BETTER = (
    "bits_per_byte",
    "brier_score",
    "byte_perplexity",
    "likelihood_diff",
    "mean_length",
    "nll_mean",
    "over_refusal_rate",
    "pct_stereotype",
    "perplexity",
    "ter",
    "truncated_rate",
    "unjudged_rate",
    "word_perplexity",
)
"""Figures that improve by falling, by the last part of their name. Of every other one more is better."""

RESAMPLES = 10_000
CHUNK = 100
PART_OF_A_ROW = re.compile(r"(.+)#\d+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Ruling:
    """What became of one rule.

    candidate, parent: the figure over the items that both evaluations judged; a threshold has no parent and takes all
    of the candidate's. low, high: the interval of `difference`, candidate less parent, or of a threshold's figure.
    samples: items it rests on. unpaired: items left out since only one of the two judged them. samples_needed: of an
    undecided rule, how many items would decide it, with as many a row; None where no number would.
    """

    rule: Rule
    candidate: float
    parent: float | None
    difference: float | None
    low: float
    high: float
    outcome: Outcome
    samples: int
    unpaired: int = 0
    samples_needed: int | None = None


def judge(
    rule: Rule, candidate: Mapping[str, SuiteResult], parent: Mapping[str, SuiteResult], *, confidence: float, seed: int
) -> Ruling:
    """Apply `rule` to two evaluations, by suite. `confidence` is the intervals', `seed` the bootstrap's.

    Raises ValueError for a figure that the evaluations don't have, or that has no items to compare by, naming those
    that can be used.
    """
    if isinstance(rule, ThresholdRule):
        return _threshold(rule, candidate, confidence, seed)
    ours, theirs = _items(rule, candidate), _items(rule, parent)
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise ValueError(f"rule on '{rule.figure}': candidate and parent have no judged item in common to compare by")
    candidate_N, parent_N = (np.array([items[item] for item in shared]) for items in (ours, theirs))
    rows = Rows.of(shared, candidate_N - parent_N)
    wider = rows.with_two_more(0.0, _reach(candidate_N, parent_N))
    low, high = bootstrap(wider, confidence, seed)
    outcome, needed = _decide(
        rule,
        estimate=float((candidate_N - parent_N).mean()),
        low=low,
        high=high,
        spread=wider.spread,
        items=len(shared),
        independent=len(rows.sums_R),
        confidence=confidence,
    )
    return Ruling(
        rule,
        candidate=float(candidate_N.mean()),
        parent=float(parent_N.mean()),
        difference=float((candidate_N - parent_N).mean()),
        low=low,
        high=high,
        outcome=outcome,
        samples=len(shared),
        unpaired=len(ours.keys() ^ theirs.keys()),
        samples_needed=needed,
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """What is resampled: of each row the sum of its items and how many they are."""

    sums_R: Floats
    sizes_R: Floats

    @classmethod
    def of(cls, names: Sequence[str], values_N: Floats) -> "Rows":
        """The rows of items, in the order of the first item of each."""
        row_of = [found[1] if (found := PART_OF_A_ROW.fullmatch(name)) else name for name in names]
        place = {row: index for index, row in enumerate(dict.fromkeys(row_of))}
        rows_N = np.array([place[row] for row in row_of])
        return cls(np.bincount(rows_N, weights=values_N).astype(float), np.bincount(rows_N).astype(float))

    def with_two_more(self, centre: float, reach: float) -> "Rows":
        """Besides a row `reach` above `centre` and one as far below, each of the mean size."""
        size = float(self.sizes_R.mean())
        sums = [(centre - reach) * size, (centre + reach) * size]
        return Rows(np.concatenate([self.sums_R, sums]), np.concatenate([self.sizes_R, [size, size]]))

    @property
    def spread(self) -> float:
        """Standard deviation over rows of what a row does to the mean: (sum - mean size) / mean size; over items, where
        each is a row."""
        mean = self.sums_R.sum() / self.sizes_R.sum()
        return float(((self.sums_R - mean * self.sizes_R) / self.sizes_R.mean()).std())

    @property
    def effective(self) -> float:
        """Independent items that these are worth at least: (sum of n)^2 / sum of n^2 over the rows' sizes n, as many as
        if the items of a row were all the same (Kish, Survey Sampling, 1965)."""
        return float(self.sizes_R.sum() ** 2 / (self.sizes_R**2).sum())


def bootstrap(rows: Rows, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean over items, from 10,000 resamples of rows; exact where all rows have one mean."""
    means_R = rows.sums_R / rows.sizes_R
    if (means_R == means_R[0]).all():  # rounding in the means would make an interval of it
        return float(means_R[0]), float(means_R[0])
    rng = np.random.default_rng(seed)
    num_rows = len(means_R)
    drawn = (rng.integers(num_rows, size=(CHUNK, num_rows)) for _ in range(RESAMPLES // CHUNK))
    means_B = np.concatenate([rows.sums_R[of].sum(axis=1) / rows.sizes_R[of].sum(axis=1) for of in drawn])
    low, high = np.quantile(means_B, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def samples_needed(spread: float, distance: float, *, samples: float, confidence: float) -> int | None:
    """Independent samples at which an interval around the same figure, with the same spread, would no longer reach the
    bound.

    n = (z s / d)^2, where s is the standard deviation over samples, d the distance from the figure to the bound and z
    the normal quantile of the confidence: half the width of the interval, z s / sqrt(n), is then d. At least one more
    than `samples`, and never fewer than `fewest`; None at distance 0, where no number would decide.
    """
    if distance == 0:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return max(math.ceil((z * spread / distance) ** 2), math.floor(samples) + 1, fewest(confidence))


def fewest(confidence: float) -> int:
    """Rows below which no rule is decided: fewer could all agree by chance (the sign test, 2^-n <= (1 - c) / 2)."""
    return math.ceil(math.log2(2 / (1 - confidence)))


def lower_is_better(figure: str) -> bool:
    """Whether `SUITE/FIGURE` improves by falling."""
    return figure.rpartition("/")[2].partition(",")[0] in LOWER_IS_BETTER


def value_of(figure: str, evaluation: Mapping[str, SuiteResult]) -> float:
    """`SUITE/FIGURE` of an evaluation. Raises ValueError, with the figures there are."""
    suite, _, name = figure.partition("/")
    figures = evaluation[suite].figures
    if name not in figures:
        raise ValueError(f"figure '{figure}': suite '{suite}' has no such figure; it has {', '.join(figures)}")
    return figures[name]


def _threshold(rule: ThresholdRule, evaluation: Mapping[str, SuiteResult], confidence: float, seed: int) -> Ruling:
    """A figure without items is compared as it is: its interval is a point."""
    suite, _, name = rule.figure.partition("/")
    figure = value_of(rule.figure, evaluation)
    items = evaluation[suite].items.get(name)
    if not items:
        sign, bound, _ = _wanted(rule)
        return Ruling(rule, figure, None, None, figure, figure, "holds" if sign * figure >= bound else "fails", 0)
    values_N = np.array(list(items.values()))
    rows, figure = Rows.of(list(items), values_N), float(values_N.mean())
    if np.isin(values_N, (0, 1)).all():
        independent = rows.effective
        low, high = wilson_interval(figure * independent, independent, confidence)
        _, bound, _ = _wanted(rule)
        spread = math.sqrt(max(abs(bound) * (1 - abs(bound)), 0.0))  # Wilson turns the score test round: at the bound
    else:
        independent = float(len(rows.sums_R))
        wider = rows.with_two_more(figure, float(np.abs(values_N - figure).max()))
        low, high = bootstrap(wider, confidence, seed)
        spread = wider.spread
    outcome, needed = _decide(
        rule,
        estimate=figure,
        low=low,
        high=high,
        spread=spread,
        items=len(items),
        independent=independent,
        confidence=confidence,
    )
    return Ruling(rule, figure, None, None, low, high, outcome, len(items), samples_needed=needed)


def _wanted(rule: Rule) -> tuple[int, float, bool]:
    """What a rule asks of a difference or figure x: the sign that makes more better, the bound that sign * x may not
    be below, and whether it may not be at it either."""
    if isinstance(rule, ThresholdRule):
        return (1, rule.at_least, False) if rule.at_least is not None else (-1, -(rule.at_most or 0.0), False)
    sign = -1 if lower_is_better(rule.figure) else 1
    return (sign, rule.margin, True) if isinstance(rule, ImproveRule) else (sign, -rule.tolerance, False)


def _decide(
    rule: Rule,
    *,
    estimate: float,
    low: float,
    high: float,
    spread: float,
    items: int,
    independent: float,
    confidence: float,
) -> tuple[Outcome, int | None]:
    """The outcome by the interval's ends, and the items needed where it is undecided. `independent`: what the items are
    worth; `spread` is over so many."""
    sign, bound, strict = _wanted(rule)
    worst, best = sorted((sign * low, sign * high))
    if independent >= fewest(confidence):
        if worst > bound or (worst == bound and not strict):
            return "holds", None
        if best < bound or (best == bound and strict):
            return "fails", None
    distance = abs(sign * estimate - bound)
    needed = samples_needed(spread, distance, samples=independent, confidence=confidence)
    return "undecided", needed and math.ceil(needed * items / independent)


def _items(rule: ImproveRule | HoldRule, evaluation: Mapping[str, SuiteResult]) -> Mapping[str, float]:
    suite, _, name = rule.figure.partition("/")
    items = evaluation[suite].items
    if not items.get(name):
        usable = ", ".join(f"{suite}/{figure}" for figure in items if items[figure]) or "(none)"
        raise ValueError(
            f"rule '{rule.type}' on '{rule.figure}': this figure has no items that two evaluations could be compared "
            f"by; of suite '{suite}' these can be used: {usable}"
        )
    return items[name]


def _reach(candidate_N: Floats, parent_N: Floats) -> float:
    """How far from 0 the two items more lie: 1 for items that are all 0 or 1, else the largest difference there is. So
    a hundred equal answers are no proof of equal shares; only of another figure, all equal, is the interval a point."""
    shares = np.isin(candidate_N, (0, 1)).all() and np.isin(parent_N, (0, 1)).all()
    return 1.0 if shares else float(np.abs(candidate_N - parent_N).max())
