"""Figures of judged pairs of answers: win rates, length control, ratings, with the intervals of one bootstrap.

Shape suffixes: N prompts, M pairs of players, P players, B resamples. Player 0 is the checkpoint, the others are the
baselines; the last two columns of weights are those of the pseudo-prompts (see `win_rates`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from configs.pairwise import PairwiseSuite
from pipeline.evaluation.generation import rates
from pipeline.evaluation.suites import CompletionRecord, Items, SuiteResult
from pipeline.evaluation.win_rates import length_controlled_rate, mean_preference, quantiles, ratings, resamples
from rewards.types import Status, Task

_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Judged:
    """Preferences of the judge. NaN stands for a pair that could not be judged."""

    preferences_NM: _Array
    """Share of a win of player i over j, for the pairs i < j in order: 1 won, 0 lost, 0.5 tied."""
    flips: list[float]
    """For each pair judged in both orders 1.0 where the orders name different winners, else 0.0."""
    problems: dict[int, str]
    """The reason, by prompt, why a comparison could not be judged."""


@dataclass(frozen=True, slots=True)
class _Tally:
    """The figures so far, and the preferences that they are made of."""

    suite: PairwiseSuite
    tasks: Sequence[Task]
    weights_BN: _Array
    figures: dict[str, float] = field(default_factory=dict[str, float])
    items: dict[str, Items] = field(default_factory=dict[str, Items])
    resampled: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def add(self, name: str, value: float, values_B: _Array) -> None:
        """Add a figure with its interval; one without items keeps its resampled values."""
        self.figures[name] = value
        self.figures[f"{name}_low"], self.figures[f"{name}_high"] = quantiles(values_B, 0.95)
        if name not in self.items:
            self.resampled[name] = values_B.tolist()

    def add_rates(self, suffix: str, preferences_N: _Array, gaps_N: _Array, *, controlled: bool) -> None:
        """Add the win rate over the judged prompts, and the `controlled` one at equal lengths."""
        known_N = ~np.isnan(preferences_N)
        if not known_N.any():
            return
        known = np.flatnonzero(known_N)
        self.items[f"win_rate{suffix}"] = {self.tasks[n].row: float(preferences_N[n]) for n in known}
        known_N = np.append(known_N, [True, True])
        # The pseudo-prompts have no weight in the figure itself.
        weights_1N = np.append(np.ones(len(known)), [0.0, 0.0])[None]
        weights_BN = np.concatenate([weights_1N, self.weights_BN[:, known_N]])
        wins_N = np.append(preferences_N[known], [0.0, 1.0])
        value, *values_B = mean_preference(wins_N, weights_BN)
        self.add(f"win_rate{suffix}", float(value), np.array(values_B))
        if controlled:
            difficulty_N = None
            if self.suite.difficulty:
                own_N = np.array([float(self.tasks[n].metadata[self.suite.difficulty]) for n in known])
                difficulty_N = np.append(own_N, [own_N.mean()] * 2)
            gaps_N = np.append(gaps_N[known], [0.0, 0.0])
            value, *values_B = length_controlled_rate(wins_N, gaps_N, weights_BN, difficulty_N)
            self.add(f"length_controlled_win_rate{suffix}", float(value), np.array(values_B))


def pairwise_result(
    suite: PairwiseSuite,
    tasks: Sequence[Task],
    players: Sequence[Sequence[str]],
    judged: Judged,
    records: Sequence[CompletionRecord],
    seed: int,
) -> SuiteResult:
    """Return the figures, each with the ends of its 95 % interval. players: answers of each player, by prompt.

    `win_rate`: mean preference for the checkpoint, over all baselines; `win_rate_<category>`.
    `length_controlled_win_rate`: see `length_controlled_rate`. With several baselines also both `_against_<name>`, and
    `rating`, `rating_<name>`: see `ratings`. `order_flip_rate`: the share of pairs whose winner depends on their order.
    """
    names = list(suite.baselines)
    own_NP = judged.preferences_NM[:, : len(names)]  # the pairs of player 0 are the first ones
    tally = _Tally(suite, tasks, resamples(len(tasks), seed))
    lengths_PN = np.array([[len(answer) for answer in answers] for answers in players], float)
    mean_N = np.array([np.nan if np.isnan(own_P).all() else np.nanmean(own_P) for own_P in own_NP])
    gaps_N = lengths_PN[0] - lengths_PN[1:].mean(axis=0)
    tally.add_rates("", mean_N, gaps_N, controlled=suite.length_control)
    if len(names) > 1:
        for column, name in enumerate(names):
            gaps_N = lengths_PN[0] - lengths_PN[column + 1]
            tally.add_rates(f"_against_{name}", own_NP[:, column], gaps_N, controlled=suite.length_control)
        pseudo_2M = np.repeat([[0.0], [1.0]], judged.preferences_NM.shape[1], axis=1)
        weights_BN = np.concatenate([np.append(np.ones(len(tasks)), [0.0, 0.0])[None], tally.weights_BN])
        values_BP = ratings(np.concatenate([judged.preferences_NM, pseudo_2M]), weights_BN, len(players))
        for player, suffix in enumerate(["", *(f"_{name}" for name in names)]):
            tally.add(f"rating{suffix}", float(values_BP[0, player]), values_BP[1:, player])
    categories = [str(task.metadata.get(suite.category) or "") if suite.category else "" for task in tasks]
    for category in sorted({*categories} - {""}):
        inside_N = np.array([category == other for other in categories])
        tally.add_rates(f"_{category}", np.where(inside_N, mean_N, np.nan), gaps_N, controlled=False)
    if judged.flips:
        tally.figures["order_flip_rate"] = float(np.mean(judged.flips))
    scored = [_scored(record, own_NP[n], mean_N[n], names, judged.problems) for n, record in enumerate(records)]
    return SuiteResult(tally.figures | rates(scored), tally.items, scored, tally.resampled)


def _scored(
    record: CompletionRecord, own_P: _Array, mean: float, names: Sequence[str], problems: Mapping[int, str]
) -> CompletionRecord:
    if np.isnan(mean):
        return replace(record, status=Status.ABSTAIN, outcome="not judged", detail=problems.get(record.index, ""))
    outcome = "tied" if mean == 0.5 else "won" if mean > 0.5 else "lost"
    parts = {name: None if np.isnan(value) else float(value) for name, value in zip(names, own_P, strict=True)}
    return replace(record, score=float(mean), outcome=outcome, parts=parts if len(names) > 1 else {})
