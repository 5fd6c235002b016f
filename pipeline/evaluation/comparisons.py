"""Figures of a reward model, or of a policy's implicit rewards: scores of answers whose order is known.

Shape suffixes: N answers, M pairs of a better and a worse answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from configs.reward_model import PairwiseLoss, PointwiseLoss
from pipeline.data.comparisons import Comparisons, TokenizedComparison
from pipeline.data.trees import Tree, scored_tree
from pipeline.disk.files import write_json_lines
from pipeline.evaluation.statistics import wilson_interval

COMPARISONS_PER_CALL = 256
"""Comparisons in one call of the ranks, which must finish it within their timeout."""
FLIPPED = 64
"""Comparisons that are scored a second time with their answers in reverse."""
BINS = 10

ScoreTrees = Callable[[list[Tree]], list[list[float]]]
"""Scores each tree's answers, as `Policy.scores` does."""


@dataclass(frozen=True, slots=True)
class ScoredComparison:
    """One comparison with the reward model's scores, its answers from best to worst."""

    row: str
    source: str
    domain: str
    scores: list[float]
    targets: list[float] | None
    """Scores in the data; None where only the order is known."""
    lengths: list[int]
    """Tokens of each answer."""

    @property
    def differences(self) -> list[float]:
        """Score of the better less the worse answer, for every pair with an order."""
        targets = self.targets
        return [
            self.scores[better] - self.scores[worse]
            for better, worse in combinations(range(len(self.scores)), 2)
            if targets is None or targets[better] != targets[worse]
        ]

    @property
    def accuracy(self) -> float:
        """Share of pairs with the higher score for the better answer; equal scores count half."""
        return float(np.mean([(d > 0) + 0.5 * (d == 0) for d in self.differences]))


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Pairs of about equal confidence."""

    low: float
    high: float
    pairs: int
    confidence: float
    """Mean of sigmoid(|difference|)."""
    accuracy: float
    """Share of pairs whose better answer the model prefers."""


@dataclass(frozen=True, slots=True)
class ComparisonResult:
    """Figures by name, and the comparisons behind them in the order of the data."""

    figures: dict[str, float]
    records: list[ScoredComparison]


def evaluate_comparisons(
    comparisons: Comparisons, score: ScoreTrees, loss: PairwiseLoss | PointwiseLoss
) -> ComparisonResult:
    """Score all comparisons and return their figures (see `comparison_figures`) and records.

    `flip_gap_max` checks that an answer's score does not depend on its neighbours: the largest |difference of a pair +
    its difference with the answers reversed in the input| over the first comparisons, which should be rounding alone.
    """
    tokenized = [comparisons[index] for index in range(len(comparisons))]
    trees = [scored_tree(comparison.prompt_ids, comparison.answer_ids) for comparison in tokenized]
    calls = range(0, len(trees), COMPARISONS_PER_CALL)
    scores = [answers for first in calls for answers in score(trees[first : first + COMPARISONS_PER_CALL])]
    records = [scored_comparison(*pair) for pair in zip(tokenized, scores, strict=True)]
    figures = comparison_figures(records, loss)
    flipped = score(
        [scored_tree(comparison.prompt_ids, comparison.answer_ids[::-1]) for comparison in tokenized[:FLIPPED]]
    )
    pairs = zip(scores, flipped, strict=False)
    gaps = [abs((a[0] - a[-1]) + (b[0] - b[-1])) for a, b in pairs if len(a) > 1]
    return ComparisonResult(figures | ({"flip_gap_max": max(gaps)} if gaps else {}), records)


def comparison_figures(
    records: Sequence[ScoredComparison], loss: PairwiseLoss | PointwiseLoss | None = None
) -> dict[str, float]:
    """Return the figures of scored comparisons. A figure without data, or a correlation without variance, is absent.

    Order: `accuracy`, the mean over comparisons, with its 95 % Wilson interval `_low` and `_high`, also as
    `accuracy/source/NAME` and `accuracy/domain/NAME` where there are several; `margin_mean`, the difference of scores
    of a pair; `calibration_error` (see `reliability_bins`). Scores: `score_mean`, `score_std`; `length_correlation`,
    Pearson's with the length in tokens, and `length_correlation_within`, less the means of each comparison. Data with
    scores: `target_correlation` and, for a pointwise `loss`, `squared_error_mean` (of sigmoid(score) for `bce`).
    """
    ordered = [record for record in records if record.differences]
    figures = _accuracy("accuracy", ordered)
    for part in ("source", "domain"):
        names = sorted({getattr(record, part) for record in ordered})
        for name in names if len(names) > 1 else []:
            of_part = [record for record in ordered if getattr(record, part) == name]
            figures |= _accuracy(f"accuracy/{part}/{name}", of_part)
    if ordered:
        figures["margin_mean"] = float(np.mean([np.mean(record.differences) for record in ordered]))
        bins = reliability_bins(records)
        total = sum(bin_.pairs for bin_ in bins)
        figures["calibration_error"] = sum(
            bin_.pairs / total * abs(bin_.confidence - bin_.accuracy) for bin_ in bins if bin_.pairs
        )
    scores_N = np.concatenate([record.scores for record in records])
    figures |= {"score_mean": float(scores_N.mean()), "score_std": float(scores_N.std())}
    lengths_N = np.concatenate([record.lengths for record in records])
    figures |= _correlation("length_correlation", scores_N, lengths_N)
    several = [record for record in records if len(record.scores) > 1]
    if several:
        centred_N = (
            np.concatenate([_centred(getattr(record, name)) for record in several]) for name in ("scores", "lengths")
        )
        figures |= _correlation("length_correlation_within", *centred_N)
    return figures | _target_figures([record for record in records if record.targets is not None], loss)


def reliability_bins(records: Sequence[ScoredComparison]) -> list[ReliabilityBin]:
    """Put pairs into bins of equal width by confidence, sigmoid(|difference|) from 0.5 to 1.

    The expected calibration error is the mean over pairs of |confidence - accuracy| of their bin (Guo et al.,
    arXiv:1706.04599 eq. 3).
    """
    differences_M = np.array([difference for record in records for difference in record.differences])
    confidence_M = 1 / (1 + np.exp(-np.abs(differences_M)))
    right_M = (differences_M > 0) + 0.5 * (differences_M == 0)
    bin_M = np.minimum((confidence_M - 0.5) * 2 * BINS, BINS - 1).astype(int)
    bins: list[ReliabilityBin] = []
    for index in range(BINS):
        inside_M = bin_M == index
        confidence, accuracy = (float(x[inside_M].mean()) if inside_M.any() else 0.0 for x in (confidence_M, right_M))
        low, high = 0.5 + index / (2 * BINS), 0.5 + (index + 1) / (2 * BINS)
        bins.append(ReliabilityBin(low, high, int(inside_M.sum()), confidence, accuracy))
    return bins


def write_records(folder: Path, name: str, result: ComparisonResult) -> None:
    """Write `NAME.jsonl`, a comparison a line, and `NAME.reliability.jsonl`, a bin a line, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_lines(folder / f"{name}.jsonl", [asdict(record) for record in result.records])
    write_json_lines(folder / f"{name}.reliability.jsonl", [asdict(bin_) for bin_ in reliability_bins(result.records)])


def scored_comparison(tokenized: TokenizedComparison, scores: list[float]) -> ScoredComparison:
    """Join a comparison with the scores of its answers."""
    comparison, lengths = tokenized.comparison, [len(ids) for ids in tokenized.answer_ids]
    return ScoredComparison(comparison.row, comparison.source, comparison.domain, scores, comparison.scores, lengths)


def _accuracy(name: str, records: Sequence[ScoredComparison]) -> dict[str, float]:
    if not records:
        return {}
    right = sum(record.accuracy for record in records)
    low, high = wilson_interval(round(right), len(records))
    return {name: right / len(records), f"{name}_low": low, f"{name}_high": high}


def _target_figures(records: Sequence[ScoredComparison], loss: PairwiseLoss | PointwiseLoss | None) -> dict[str, float]:
    if not records:
        return {}
    predicted_N = np.concatenate([record.scores for record in records])
    targets_N = np.concatenate([record.targets or [] for record in records])
    if not isinstance(loss, PointwiseLoss):
        return _correlation("target_correlation", predicted_N, targets_N)
    if loss.kind == "bce":
        predicted_N = 1 / (1 + np.exp(-predicted_N))
    error = float(np.square(predicted_N - targets_N).mean())
    return {"squared_error_mean": error} | _correlation("target_correlation", predicted_N, targets_N)


def _correlation(name: str, first_N: np.ndarray, second_N: np.ndarray) -> dict[str, float]:
    if not (np.ptp(first_N) and np.ptp(second_N)):
        return {}
    return {name: float(np.corrcoef(first_N, second_N)[0, 1])}


def _centred(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, float) - np.mean(np.asarray(values, float))
