"""A gate's rules as pure functions of per-item figures: holds, fails, or undecided where the interval leaves both open.

Two evaluations are compared item by item, so that what makes an item hard for both cancels out. Intervals are of the
mean over items: a percentile bootstrap (Efron, 1979), or Wilson's for a threshold on a share. A bootstrap alone is too
sure of few items and certain of equal ones, so two items more stand in every one, one either side; of paired shares
that is the adjustment of Bonett and Price (Statistics in Medicine 31, 2012), one discordant pair each way.

Shape suffixes: N items, B resamples.
"""

import math
from collections.abc import Mapping
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


@dataclass(frozen=True, slots=True)
class Ruling:
    """What became of one rule.

    candidate, parent: the figure over the items that both evaluations judged; a threshold has no parent and takes all
    of the candidate's. low, high: the interval of `difference`, candidate less parent, or of a threshold's figure.
    samples: items it rests on. unpaired: items left out since only one of the two judged them. samples_needed: of an
    undecided rule, how many items would decide it; None where no number would.
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
    differences_N = _with_two_more(candidate_N - parent_N, 0.0, _reach(candidate_N, parent_N))
    low, high = bootstrap(differences_N, confidence, seed)
    outcome, needed = _decide(
        rule,
        estimate=float((candidate_N - parent_N).mean()),
        low=low,
        high=high,
        spread=float(differences_N.std()),
        samples=len(shared),
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


def bootstrap(values_N: Floats, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean of `values_N` over 10,000 resamples; exact where all values are equal."""
    if (values_N == values_N[0]).all():  # rounding in the means would make an interval of it
        return float(values_N[0]), float(values_N[0])
    rng = np.random.default_rng(seed)
    size = len(values_N)
    means_B = np.concatenate(
        [values_N[rng.integers(size, size=(CHUNK, size))].mean(axis=1) for _ in range(RESAMPLES // CHUNK)]
    )
    low, high = np.quantile(means_B, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def samples_needed(spread: float, distance: float, *, samples: int, confidence: float) -> int | None:
    """Items at which an interval around the same figure, with the same spread, would no longer reach the bound.

    n = (z s / d)^2, where s is the standard deviation over items, d the distance from the figure to the bound and z the
    normal quantile of the confidence: half the width of the interval, z s / sqrt(n), is then d. At least one more than
    `samples`, and never fewer than `fewest`; None at distance 0, where no number would decide.
    """
    if distance == 0:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return max(math.ceil((z * spread / distance) ** 2), samples + 1, fewest(confidence))


def fewest(confidence: float) -> int:
    """Items below which no rule is decided: fewer could all agree by chance (the sign test, 2^-n <= (1 - c) / 2)."""
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
    figure = float(values_N.mean())
    if np.isin(values_N, (0, 1)).all():
        low, high = wilson_interval(int(values_N.sum()), len(values_N), confidence)
        _, bound, _ = _wanted(rule)
        spread = math.sqrt(max(abs(bound) * (1 - abs(bound)), 0.0))  # Wilson turns the score test round: at the bound
    else:
        wider_N = _with_two_more(values_N, figure, float(np.abs(values_N - figure).max()))
        low, high = bootstrap(wider_N, confidence, seed)
        spread = float(wider_N.std())
    outcome, needed = _decide(
        rule, estimate=figure, low=low, high=high, spread=spread, samples=len(items), confidence=confidence
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
    rule: Rule, *, estimate: float, low: float, high: float, spread: float, samples: int, confidence: float
) -> tuple[Outcome, int | None]:
    """The outcome by the interval's ends, and the samples needed where it is undecided."""
    sign, bound, strict = _wanted(rule)
    worst, best = sorted((sign * low, sign * high))
    if samples >= fewest(confidence):
        if worst > bound or (worst == bound and not strict):
            return "holds", None
        if best < bound or (best == bound and strict):
            return "fails", None
    distance = abs(sign * estimate - bound)
    return "undecided", samples_needed(spread, distance, samples=samples, confidence=confidence)


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


def _with_two_more(values_N: Floats, centre: float, reach: float) -> Floats:
    return np.concatenate([values_N, [centre - reach, centre + reach]])
