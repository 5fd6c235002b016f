"""The figures of a reward model: how it scores answers that somebody else has put in order.

Legend: N answers, M pairs, better and worse.
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
"""Comparisons scored at once: what the ranks have to finish within their timeout."""
FLIPPED = 64
"""Comparisons that are scored a second time with their answers in reverse."""
BINS = 10
EVALUATION = "evaluation"
"""Folder of a stage with the records of its last evaluation."""

Score = Callable[[list[Tree]], list[list[float]]]
"""The scores of each tree's answers, as `Policy.scores` gives them."""


@dataclass(frozen=True, slots=True)
class ScoredComparison:
    """One comparison as the reward model sees it: of each answer, from best to worst, its score, the score the data
    gives (None where only the order is known) and its length in tokens."""

    row: str
    source: str
    domain: str
    scores: list[float]
    targets: list[float] | None
    lengths: list[int]

    @property
    def differences(self) -> list[float]:
        """Score of the better minus score of the worse answer, of every pair that has an order."""
        places = combinations(range(len(self.scores)), 2)
        targets = self.targets
        return [
            self.scores[better] - self.scores[worse]
            for better, worse in places
            if targets is None or targets[better] != targets[worse]
        ]

    @property
    def accuracy(self) -> float:
        """Share of its pairs in which the better answer scores higher; equal scores count half."""
        return float(np.mean([(d > 0) + 0.5 * (d == 0) for d in self.differences]))


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs on which the model is about equally sure: `confidence` is the mean of sigmoid(|difference|), `accuracy` the
    share in which it prefers the better answer."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class ComparisonResult:
    """Figures by name, and the comparisons behind them in the order of the data."""

    figures: dict[str, float]
    records: list[ScoredComparison]


def evaluate(comparisons: Comparisons, score: Score, loss: PairwiseLoss | PointwiseLoss) -> ComparisonResult:
    """Figures (see `comparison_figures`) and one record a comparison.

    `flip_gap_max` is a check: the largest |difference of a pair + its difference with the answers swapped in the input|
    over the first comparisons; anything but rounding says that an answer's score depends on its neighbours.
    """
    asked = [comparisons[index] for index in range(len(comparisons))]
    trees = [scored_tree(one.prompt_ids, one.answer_ids) for one in asked]
    parts = range(0, len(trees), COMPARISONS_PER_CALL)
    scores = [of_one for first in parts for of_one in score(trees[first : first + COMPARISONS_PER_CALL])]
    records = [_record(one, of_one) for one, of_one in zip(asked, scores, strict=True)]
    figures = comparison_figures(records, loss)
    flipped = score([scored_tree(one.prompt_ids, one.answer_ids[::-1]) for one in asked[:FLIPPED]])
    pairs = zip(scores, flipped, strict=False)
    gaps = [abs((a[0] - a[-1]) + (b[0] - b[-1])) for a, b in pairs if len(a) > 1]
    return ComparisonResult(figures | ({"flip_gap_max": max(gaps)} if gaps else {}), records)


def comparison_figures(
    records: Sequence[ScoredComparison], loss: PairwiseLoss | PointwiseLoss | None = None
) -> dict[str, float]:
    """Figures of scored comparisons; one is absent where nothing has what it is of, or nothing varies.

    Of the order: `accuracy`, the mean over comparisons, with `_low` and `_high`, the ends of its 95 % Wilson interval,
    overall and, where there are several, as `accuracy/source/NAME` and `accuracy/domain/NAME`; `margin_mean`, the
    difference of scores of a pair; `calibration_error`, see `reliability`. Of the scores: `score_mean`, `score_std`;
    `length_correlation`, Pearson's with the length in tokens, and `length_correlation_within`, after the means of each
    comparison are taken off both. Of the data's own scores: `target_correlation` and, for a pointwise `loss`,
    `squared_error_mean`, of sigmoid(score) for `bce`.
    """
    ordered = [record for record in records if record.differences]
    figures = _accuracy("accuracy", ordered)
    for kind in ("source", "domain"):
        names = sorted({getattr(record, kind) for record in ordered})
        for name in names if len(names) > 1 else []:
            figures |= _accuracy(f"accuracy/{kind}/{name}", [one for one in ordered if getattr(one, kind) == name])
    if ordered:
        figures["margin_mean"] = float(np.mean([np.mean(record.differences) for record in ordered]))
        bins = reliability(records)
        total = sum(each.pairs for each in bins)
        figures["calibration_error"] = sum(
            each.pairs / total * abs(each.confidence - each.accuracy) for each in bins if each.pairs
        )
    scores_N = np.concatenate([record.scores for record in records])
    figures |= {"score_mean": float(scores_N.mean()), "score_std": float(scores_N.std())}
    lengths_N = np.concatenate([record.lengths for record in records])
    figures |= _correlation("length_correlation", scores_N, lengths_N)
    several = [record for record in records if len(record.scores) > 1]
    if several:
        centred = [np.concatenate([_centred(of(record)) for record in several]) for of in (_scores, _lengths)]
        figures |= _correlation("length_correlation_within", *centred)
    return figures | _target_figures([record for record in records if record.targets is not None], loss)


def reliability(records: Sequence[ScoredComparison]) -> list[Bin]:
    """Pairs in bins of equal width by how sure the model is, sigmoid(|difference|) from 0.5 to 1 (Guo et al.,
    arXiv:1706.04599 eq. 3). The expected calibration error is the mean over pairs of |confidence - accuracy| of their
    bin."""
    differences_M = np.array([difference for record in records for difference in record.differences])
    confidence_M = 1 / (1 + np.exp(-np.abs(differences_M)))
    right_M = (differences_M > 0) + 0.5 * (differences_M == 0)
    place_M = np.minimum((confidence_M - 0.5) * 2 * BINS, BINS - 1).astype(int)
    bins: list[Bin] = []
    for place in range(BINS):
        inside_M = place_M == place
        confidence, accuracy = (float(x[inside_M].mean()) if inside_M.any() else 0.0 for x in (confidence_M, right_M))
        low, high = 0.5 + place / (2 * BINS), 0.5 + (place + 1) / (2 * BINS)
        bins.append(Bin(low, high, int(inside_M.sum()), confidence, accuracy))
    return bins


def write_records(folder: Path, name: str, result: ComparisonResult) -> None:
    """Writes `NAME.jsonl`, a comparison a line, and `NAME.reliability.jsonl`, a bin a line, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_lines(folder / f"{name}.jsonl", [asdict(record) for record in result.records])
    write_json_lines(folder / f"{name}.reliability.jsonl", [asdict(each) for each in reliability(result.records)])


def _record(one: TokenizedComparison, scores: list[float]) -> ScoredComparison:
    comparison = one.comparison
    lengths = [len(ids) for ids in one.answer_ids]
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


def _scores(record: ScoredComparison) -> list[float]:
    return record.scores


def _lengths(record: ScoredComparison) -> list[int]:
    return record.lengths


def _centred(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, float) - np.mean(np.asarray(values, float))
