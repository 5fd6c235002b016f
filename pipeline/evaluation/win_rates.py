"""Win rates, length control and ratings of compared answers, as pure functions.

Intervals come from a bootstrap over prompts. As in a gate, two pseudo-prompts are added to what is resampled, one won
and one lost, so that a few equal outcomes do not count as proof.

Shape suffixes: N prompts, B resamples, K features, P players, M pairs of players.
"""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]

PROMPT_RESAMPLES = 1000
RIDGE = 1e-3
"""Weight of the coefficients' squares, which keeps them finite where one side wins every comparison."""
STEPS, LONGEST_STEP, PRECISION = 100, 2.0, 1e-9
ELO = 400 / np.log(10)
"""Points of a rating for a log-odds of 1: 400 points are odds of 10 to 1."""
ANCHOR = 1000.0
"""Rating of the first baseline."""


def preference(score: float, lowest: float, highest: float) -> float:
    """Convert a judge's score to the share of a win of the second answer: 0 at `lowest`, 1 at `highest`, within [0, 1].

    Example:
        preference(3, 1, 5)  # 0.5, a tie
    """
    return min(max((score - lowest) / (highest - lowest), 0.0), 1.0)


def winner(first: float, second: float, tie: float) -> float:
    """Return 1.0 where `first` is higher by more than `tie`, 0.0 where `second` is, else 0.5."""
    return 0.5 if abs(first - second) <= tie else float(first > second)


def resamples(prompts: int, seed: int) -> _Array:
    """Draw, PROMPT_RESAMPLES times, how often each of `prompts` and of two pseudo-prompts is in a resample; shape
    (B, N + 2)."""
    size = prompts + 2
    return np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=PROMPT_RESAMPLES).astype(float)


def mean_preference(preferences_N: _Array, weights_BN: _Array) -> _Array:
    """Return the weighted mean of preferences, (B,): the win rate with ties as halves."""
    return weights_BN @ preferences_N / weights_BN.sum(axis=1)


def logistic_fit(features_NK: _Array, targets_BN: _Array, weights_BN: _Array, ridge: float = RIDGE) -> _Array:
    """Fit a logistic regression to targets in [0, 1] by Newton's method, once for each row of weights; shape (B, K).

    Maximises sum_n w_n (y_n log s_n + (1 - y_n) log(1 - s_n)) - ridge/2 |c|^2 with s_n = sigmoid(x_n c). Without ridge,
    directions that no feature determines stay 0. targets_BN: (B, N) or (N,).
    """
    coefficients_BK = np.zeros((len(weights_BN), features_NK.shape[1]))
    products_NKK = np.einsum("nk,nl->nkl", features_NK, features_NK)
    for _ in range(STEPS):
        shares_BN = 1 / (1 + np.exp(-coefficients_BK @ features_NK.T))
        slope_BK = (weights_BN * (targets_BN - shares_BN)) @ features_NK - ridge * coefficients_BK
        curvature_BKK = np.tensordot(weights_BN * shares_BN * (1 - shares_BN), products_NKK, axes=1)
        curvature_BKK += ridge * np.eye(features_NK.shape[1])
        step_BK = (np.linalg.pinv(curvature_BKK, hermitian=True) @ slope_BK[..., None])[..., 0]
        # A full step may overshoot where the outcomes are nearly separable.
        step_BK *= np.minimum(1, LONGEST_STEP / np.maximum(np.abs(step_BK).max(axis=1, keepdims=True), PRECISION))
        coefficients_BK += step_BK
        if np.abs(step_BK).max() < PRECISION:
            break
    return coefficients_BK


def length_controlled_rate(
    preferences_N: _Array,
    length_gaps_N: _Array,
    weights_BN: _Array,
    difficulty_N: _Array | None = None,
    ridge: float = RIDGE,
) -> _Array:
    """Return the win rate that answers of the baseline's length would have, (B,) (Dubois et al., arXiv:2404.04475 eq.
    2).

    Fits logit q = theta + phi tanh(gap / std(gap)) + psi difficulty, then takes the mean of q at gap 0. length_gaps_N:
    characters of the answer less those of the baseline's.
    """
    spread = float(np.std(length_gaps_N, ddof=1)) if len(length_gaps_N) > 1 else 0.0
    columns = [np.ones_like(preferences_N), np.tanh(length_gaps_N / spread) if spread else np.zeros_like(preferences_N)]
    if difficulty_N is not None:
        columns.append(difficulty_N)
    features_NK = np.stack(columns, axis=1)
    coefficients_BK = logistic_fit(features_NK, preferences_N, weights_BN, ridge)
    features_NK[:, 1] = 0.0
    rates_BN = 1 / (1 + np.exp(-coefficients_BK @ features_NK.T))
    return (weights_BN * rates_BN).sum(axis=1) / weights_BN.sum(axis=1)


def bradley_terry(wins_BPP: _Array, ridge: float = RIDGE) -> _Array:
    """Fit strengths with P(i beats j) = sigmoid(strength_i - strength_j), mean 0, from wins[i, j] of i over j; shape
    (B, P) (Bradley and Terry, 1952). Ties are half a win for both."""
    players = wins_BPP.shape[1]
    pairs = np.array(list(combinations(range(players), 2)))
    won_BM, lost_BM = wins_BPP[:, pairs[:, 0], pairs[:, 1]], wins_BPP[:, pairs[:, 1], pairs[:, 0]]
    games_BM = won_BM + lost_BM
    features_MP = np.eye(players)[pairs[:, 0]] - np.eye(players)[pairs[:, 1]]
    return logistic_fit(features_MP, won_BM / np.maximum(games_BM, PRECISION), games_BM, ridge)


def ratings(preferences_NM: _Array, weights_BN: _Array, players: int) -> _Array:
    """Return Elo ratings of all players, (B, P), with player 1 (the first baseline) at 1000.

    preferences_NM: preference for i over j on each prompt, for the pairs i < j in order; NaN where unjudged.
    """
    wins_BPP = np.zeros((len(weights_BN), players, players))
    for column, (i, j) in enumerate(combinations(range(players), 2)):
        judged_N = ~np.isnan(preferences_NM[:, column])
        wins_BPP[:, i, j] = weights_BN[:, judged_N] @ preferences_NM[judged_N, column]
        wins_BPP[:, j, i] = weights_BN[:, judged_N] @ (1 - preferences_NM[judged_N, column])
    strengths_BP = bradley_terry(wins_BPP)
    return ANCHOR + ELO * (strengths_BP - strengths_BP[:, 1:2])


def quantiles(values_B: _Array, confidence: float) -> tuple[float, float]:
    """Return the ends of the percentile interval of resampled values."""
    low, high = np.quantile(values_B, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
