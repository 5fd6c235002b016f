"""A gate's rules as pure functions of per-item figures: each holds, fails, or is undecided.

Two evaluations are compared item by item, so that an item's own difficulty cancels. A rule is undecided where the
interval of the mean over items leaves both possible. Intervals are a percentile bootstrap (Efron, 1979), or Wilson's
for a threshold on a share. With few or identical items a bootstrap is too narrow, so two pseudo-items are added, one on
either side. For paired shares that is the adjustment of Bonett and Price (Statistics in Medicine 31, 2012): one
discordant pair each way.

Items `ROW#1`, `ROW#2`, ... belong to one row (the turns of a conversation, a prompt's instructions) and depend on each
other. The bootstrap therefore draws whole rows (Davison and Hinkley, Bootstrap Methods, 1997, section 3.8), and the
pseudo-items are rows. An item with any other name is a row of its own.

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
from pipeline.evaluation.win_rates import quantiles

_Array = NDArray[np.float64]
RuleOutcome = Literal["holds", "fails", "undecided"]

LOWER_IS_BETTER = (
    "bits_per_byte",
    "brier_score",
    "byte_perplexity",
    "calibration_error",
    "likelihood_diff",
    "mean_length",
    "nll_mean",
    "order_flip_rate",
    "over_refusal_rate",
    "pct_stereotype",
    "perplexity",
    "position_bias",
    "ter",
    "truncated_rate",
    "unjudged_rate",
    "word_perplexity",
)
"""Figures that improve by falling, by the last part of their name. All others improve by rising."""

WIN_RATE = "win_rate"
"""Part of the names of figures whose items lie between 0, lost, and 1, won."""
RESAMPLES = 10_000
RESAMPLES_PER_DRAW = 100
PART_OF_A_ROW = re.compile(r"(.+)#\d+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Ruling:
    """The outcome of one rule and the figures behind it."""

    rule: Rule
    candidate: float
    """The figure over the items that both evaluations judged; for a threshold, over all of the candidate's."""
    parent: float | None
    """The parent's figure; None for a threshold."""
    difference: float | None
    """Candidate less parent; None for a threshold."""
    low: float
    """Lower end of the interval of `difference`, or of a threshold's figure."""
    high: float
    outcome: RuleOutcome
    samples: int
    """Items behind the figures."""
    unpaired: int = 0
    """Items left out because only one evaluation judged them."""
    samples_needed: int | None = None
    """Items that would decide an undecided rule, with as many a row as now; None where no number would."""


def apply_rule(
    rule: Rule, candidate: Mapping[str, SuiteResult], parent: Mapping[str, SuiteResult], *, confidence: float, seed: int
) -> Ruling:
    """Apply `rule` to two evaluations, given by suite.

    confidence: of the intervals. seed: of the bootstrap. Raises ValueError for a figure that the evaluations lack, or
    that has no items to compare, with the figures that can be used.

    Example:
        rule = ImproveRule(type="improve", figure="sums/accuracy")
        apply_rule(rule, candidate, parent, confidence=0.95, seed=0).outcome  # "holds", "fails" or "undecided"
    """
    if isinstance(rule, ThresholdRule):
        return _threshold(rule, candidate, confidence, seed)
    candidate_items, parent_items = _items(rule, candidate), _items(rule, parent)
    shared = sorted(candidate_items.keys() & parent_items.keys())
    if not shared:
        raise ValueError(f"rule on '{rule.figure}': candidate and parent have no judged item in common to compare by")
    candidate_N, parent_N = (np.array([items[item] for item in shared]) for items in (candidate_items, parent_items))
    difference = float((candidate_N - parent_N).mean())
    rows = Rows.of(shared, candidate_N - parent_N)
    wider = rows.with_pseudo_rows(0.0, 1.0 if WIN_RATE in rule.figure else _reach(candidate_N, parent_N))
    low, high = bootstrap(wider, confidence, seed)
    estimate = _Estimate(difference, low, high, wider.spread, len(shared), len(rows.sums_R))
    outcome, needed = _decide(rule, estimate, confidence)
    return Ruling(
        rule,
        candidate=float(candidate_N.mean()),
        parent=float(parent_N.mean()),
        difference=difference,
        low=low,
        high=high,
        outcome=outcome,
        samples=len(shared),
        unpaired=len(candidate_items.keys() ^ parent_items.keys()),
        samples_needed=needed,
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that the bootstrap resamples: the sum and the number of each row's items."""

    sums_R: _Array
    sizes_R: _Array

    @classmethod
    def of(cls, names: Sequence[str], values_N: _Array) -> "Rows":
        """Group items into rows by their names, in the order of each row's first item."""
        row_names = [part[1] if (part := PART_OF_A_ROW.fullmatch(name)) else name for name in names]
        indices = {row: index for index, row in enumerate(dict.fromkeys(row_names))}
        rows_N = np.array([indices[row] for row in row_names])
        return cls(np.bincount(rows_N, weights=values_N).astype(float), np.bincount(rows_N).astype(float))

    def with_pseudo_rows(self, centre: float, reach: float) -> "Rows":
        """Add a row `reach` above `centre` and one as far below, both of the mean size."""
        size = float(self.sizes_R.mean())
        sums = [(centre - reach) * size, (centre + reach) * size]
        return Rows(np.concatenate([self.sums_R, sums]), np.concatenate([self.sizes_R, [size, size]]))

    @property
    def spread(self) -> float:
        """Standard deviation over rows of (sum - mean * size) / mean size: over items, where each is a row."""
        mean = self.sums_R.sum() / self.sizes_R.sum()
        return float(((self.sums_R - mean * self.sizes_R) / self.sizes_R.mean()).std())

    @property
    def effective(self) -> float:
        """Lower bound of independent items: (sum of n)^2 / sum of n^2 over the rows' sizes n.

        It is exact where the items of a row are all equal (Kish, Survey Sampling, 1965).
        """
        return float(self.sizes_R.sum() ** 2 / (self.sizes_R**2).sum())


@dataclass(frozen=True, slots=True)
class _Estimate:
    """A mean over items and its interval."""

    value: float
    low: float
    high: float
    spread: float
    """Standard deviation over independent samples."""
    items: int
    independent: float
    """Independent samples that the items are worth."""


def bootstrap(rows: Rows, confidence: float, seed: int) -> tuple[float, float]:
    """Return the percentile interval of the mean over items, from 10,000 resamples of rows.

    It is exact where all rows have the same mean.
    """
    means_R = rows.sums_R / rows.sizes_R
    if (means_R == means_R[0]).all():  # resampled means would differ by rounding
        return float(means_R[0]), float(means_R[0])
    rng = np.random.default_rng(seed)
    shape = (RESAMPLES_PER_DRAW, len(means_R))
    draws = (rng.integers(len(means_R), size=shape) for _ in range(RESAMPLES // RESAMPLES_PER_DRAW))
    means_B = np.concatenate([rows.sums_R[draw].sum(axis=1) / rows.sizes_R[draw].sum(axis=1) for draw in draws])
    low, high = np.quantile(means_B, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def samples_needed(spread: float, distance: float, *, samples: float, confidence: float) -> int | None:
    """Return how many independent samples move the interval off the bound, with the same figure and spread.

    n = (z s / d)^2, with s the standard deviation over samples, d the distance from the figure to the bound and z the
    normal quantile of the confidence: then d is half the width of the interval, z s / sqrt(n). The result exceeds
    `samples` and is at least `min_rows`. None at distance 0, where no number decides.
    """
    if distance == 0:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return max(math.ceil((z * spread / distance) ** 2), math.floor(samples) + 1, min_rows(confidence))


def min_rows(confidence: float) -> int:
    """Return the rows needed to decide at all: fewer could agree by chance (sign test, 2^-n <= (1 - c) / 2)."""
    return math.ceil(math.log2(2 / (1 - confidence)))


def lower_is_better(figure: str) -> bool:
    """Return whether `SUITE/FIGURE` improves by falling."""
    return figure.rpartition("/")[2].partition(",")[0] in LOWER_IS_BETTER


def value_of(figure: str, evaluation: Mapping[str, SuiteResult]) -> float:
    """Return `SUITE/FIGURE` of an evaluation. Raises ValueError with the suite's figures for an unknown one."""
    suite, _, name = figure.partition("/")
    figures = evaluation[suite].figures
    if name not in figures:
        raise ValueError(f"figure '{figure}': suite '{suite}' has no such figure; it has {', '.join(figures)}")
    return figures[name]


def _threshold(rule: ThresholdRule, evaluation: Mapping[str, SuiteResult], confidence: float, seed: int) -> Ruling:
    suite, _, name = rule.figure.partition("/")
    figure = value_of(rule.figure, evaluation)
    items = evaluation[suite].items.get(name)
    sign, bound, _ = _bound(rule)
    resampled = evaluation[suite].resampled.get(name)
    if resampled:
        low, high = quantiles(np.array(resampled), confidence)
        # The suite resampled its prompts, of which it has as many as items of any figure.
        prompts = max(map(len, evaluation[suite].items.values()))
        spread = float(np.std(resampled)) * math.sqrt(prompts)
        outcome, needed = _decide(rule, _Estimate(figure, low, high, spread, prompts, prompts), confidence)
        return Ruling(rule, figure, None, None, low, high, outcome, prompts, samples_needed=needed)
    if not items:  # the interval of a figure without items is a point
        return Ruling(rule, figure, None, None, figure, figure, "holds" if sign * figure >= bound else "fails", 0)
    values_N = np.array(list(items.values()))
    rows, figure = Rows.of(list(items), values_N), float(values_N.mean())
    if np.isin(values_N, (0, 1)).all():
        independent = rows.effective
        low, high = wilson_interval(figure * independent, independent, confidence)
        spread = math.sqrt(max(abs(bound) * (1 - abs(bound)), 0.0))  # Wilson's is the deviation at the bound
    else:
        independent = float(len(rows.sums_R))
        centre, reach = (0.5, 0.5) if WIN_RATE in name else (figure, float(np.abs(values_N - figure).max()))
        wider = rows.with_pseudo_rows(centre, reach)
        low, high = bootstrap(wider, confidence, seed)
        spread = wider.spread
    estimate = _Estimate(figure, low, high, spread, len(items), independent)
    outcome, needed = _decide(rule, estimate, confidence)
    return Ruling(rule, figure, None, None, low, high, outcome, len(items), samples_needed=needed)


def _bound(rule: Rule) -> tuple[int, float, bool]:
    """Return (sign, bound, strict): a rule wants sign * x >= bound of its difference or figure x, or > if strict."""
    if isinstance(rule, ThresholdRule):
        return (1, rule.at_least, False) if rule.at_least is not None else (-1, -(rule.at_most or 0.0), False)
    sign = -1 if lower_is_better(rule.figure) else 1
    return (sign, rule.margin, True) if isinstance(rule, ImproveRule) else (sign, -rule.tolerance, False)


def _decide(rule: Rule, estimate: _Estimate, confidence: float) -> tuple[RuleOutcome, int | None]:
    """Return the outcome by the interval's ends, and the items needed where it is undecided."""
    sign, bound, strict = _bound(rule)
    worst, best = sorted((sign * estimate.low, sign * estimate.high))
    if estimate.independent >= min_rows(confidence):
        if worst > bound or (worst == bound and not strict):
            return "holds", None
        if best < bound or (best == bound and strict):
            return "fails", None
    distance = abs(sign * estimate.value - bound)
    needed = samples_needed(estimate.spread, distance, samples=estimate.independent, confidence=confidence)
    return "undecided", needed and math.ceil(needed * estimate.items / estimate.independent)


def _items(rule: ImproveRule | HoldRule, evaluation: Mapping[str, SuiteResult]) -> Mapping[str, float]:
    suite, _, name = rule.figure.partition("/")
    items = evaluation[suite].items
    if not items.get(name):
        usable = ", ".join(f"{suite}/{figure}" for figure in items if items[figure]) or "(none)"
        raise ValueError(
            f"rule '{rule.type}' on '{rule.figure}': this figure has no items to compare two evaluations by; suite "
            f"'{suite}' has items of: {usable}"
        )
    return items[name]


def _reach(candidate_N: _Array, parent_N: _Array) -> float:
    """Return the distance of the pseudo-items from 0: 1 for shares, else the largest difference of the items.

    So a hundred equal answers do not prove equal shares. Only a figure that is no share, equal on all items, has a
    point as its interval.
    """
    shares = np.isin(candidate_N, (0, 1)).all() and np.isin(parent_N, (0, 1)).all()
    return 1.0 if shares else float(np.abs(candidate_N - parent_N).max())
