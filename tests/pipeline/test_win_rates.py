"""Win rates, length control and ratings on numbers worked by hand."""

import math

import numpy as np
import pytest

from pipeline.evaluation.win_rates import (
    PROMPT_RESAMPLES,
    bradley_terry,
    length_controlled_rate,
    logistic_fit,
    mean_preference,
    preference,
    quantiles,
    ratings,
    resamples,
    winner,
)


def ones(size: int) -> np.ndarray:
    return np.ones((1, size))


def test_a_score_on_the_judges_scale_is_a_share_of_a_win() -> None:
    assert [preference(score, 1, 5) for score in (1, 2, 3, 5)] == [0.0, 0.25, 0.5, 1.0]
    assert [preference(score, 1, -1) for score in (1, 0, -1)] == [0.0, 0.5, 1.0]  # a scale the other way round
    assert preference(7, 1, 5) == 1.0  # beyond its end
    assert [winner(2.0, 1.5, tie) for tie in (0.0, 0.4, 0.5)] == [1.0, 1.0, 0.5] and winner(1, 2, 0) == 0.0


def test_three_players_by_bradley_and_terry() -> None:
    # A beats B in 2 of 3 games, B beats C in 2 of 3, A beats C in 4 of 5: the log-odds ln 2, ln 2 and ln 4 agree, so
    # the strengths are ln 2, 0 and -ln 2 whatever the number of games.
    wins = np.array([[[0, 2, 4], [1, 0, 2], [1, 1, 0]]], float)
    assert bradley_terry(wins, ridge=0)[0] == pytest.approx([math.log(2), 0, -math.log(2)], abs=1e-6)
    # A cycle of equal wins: nobody is stronger.
    assert bradley_terry(np.array([[[0, 1, 0], [0, 0, 1], [1, 0, 0]]], float))[0] == pytest.approx([0, 0, 0], abs=1e-9)
    # Log-odds that disagree: A and B win 3 of 4 against C each, and A and B tie; by symmetry A = B, so C is ln 3 below.
    wins = np.array([[[0, 1, 3], [1, 0, 3], [1, 1, 0]]], float)
    fitted = bradley_terry(wins, ridge=0)[0]
    assert fitted[0] - fitted[2] == pytest.approx(math.log(3), abs=1e-6) and fitted[0] == pytest.approx(fitted[1])


def test_ratings_are_elo_with_the_first_baseline_at_1000() -> None:
    # Three prompts, two players: won, won, lost, odds of 2 to 1: 400 log10(2) = 120.41 points.
    rated = ratings(np.array([[1.0], [1.0], [0.0]]), ones(3), 2)[0]
    assert rated == pytest.approx([1120.41, 1000.0], abs=0.2)
    # A tie is half a win for both, and an unjudged pair none: 2.5 wins of 4 games, odds of 5 to 3, 400 log10(5/3).
    rated = ratings(np.array([[1.0], [1.0], [0.0], [0.5], [np.nan]]), ones(5), 2)[0]
    assert rated == pytest.approx([1088.74, 1000.0], abs=0.2)


def test_length_control_on_two_lengths() -> None:
    # Ten answers are longer by 7 and win 8 of 10; ten are shorter by 7 and win 5 of 10. tanh of +-7 / std is +-t. Two
    # parameters fit two shares exactly: theta + phi t = logit 0.8 = ln 4, theta - phi t = logit 0.5 = 0, so theta =
    # ln 2, and at equal length the win rate is sigmoid(ln 2) = 2/3. The raw one is 13/20.
    wins = np.array([1.0] * 8 + [0.0] * 2 + [1.0] * 5 + [0.0] * 5)
    gaps = np.array([7.0] * 10 + [-7.0] * 10)
    assert mean_preference(wins, ones(20))[0] == 0.65
    assert length_controlled_rate(wins, gaps, ones(20), ridge=0)[0] == pytest.approx(2 / 3, abs=1e-6)
    # Where length explains all of it, the controlled rate is a half: 0.8 for longer and 0.2 for shorter answers.
    wins = np.array([1.0] * 8 + [0.0] * 2 + [1.0] * 2 + [0.0] * 8)
    assert length_controlled_rate(wins, gaps, ones(20), ridge=0)[0] == pytest.approx(0.5, abs=1e-6)
    # Without a difference of length it is the win rate itself.
    assert length_controlled_rate(wins, np.zeros(20), ones(20), ridge=0)[0] == pytest.approx(0.5, abs=1e-6)


def test_difficulty_is_a_predictor_that_stays() -> None:
    # Shares of 0.8 (easy) and 0.5 (hard), no difference of length. The fit is
    # exact at both, and the mean over prompts is 0.65: the difficulty of a prompt is not set to zero.
    wins = np.array([1.0] * 8 + [0.0] * 2 + [1.0] * 5 + [0.0] * 5)
    difficulty = np.array([-1.0] * 10 + [1.0] * 10)
    rate = length_controlled_rate(wins, np.zeros(20), ones(20), difficulty, ridge=0)[0]
    assert rate == pytest.approx(0.65, abs=1e-6)


def test_a_fit_is_finite_where_one_side_always_wins() -> None:
    fitted = logistic_fit(np.ones((50, 1)), np.ones(50), ones(50))
    # 50 (1 - sigmoid(c)) = 0.001 c at the optimum.
    [[c]] = fitted
    assert 50 / (1 + math.exp(c)) == pytest.approx(1e-3 * c, rel=1e-4) and 8 < c < 10
    gaps = np.random.default_rng(0).normal(size=50)
    assert 0.99 < length_controlled_rate(np.ones(50), gaps, ones(50))[0] < 1.0


def test_each_row_of_weights_is_a_fit_of_its_own() -> None:
    features = np.random.default_rng(0).normal(size=(30, 3))
    targets = np.random.default_rng(1).random(30)
    weights = np.random.default_rng(2).integers(0, 3, size=(4, 30)).astype(float)
    together = logistic_fit(features, targets, weights)
    for row, alone in enumerate(together):
        repeated = np.repeat(np.arange(30), weights[row].astype(int))
        single = logistic_fit(features[repeated], targets[repeated], ones(len(repeated)))[0]
        assert alone == pytest.approx(single, abs=1e-7)


def test_the_bootstrap_repeats_by_its_seed_and_has_the_width_of_a_share() -> None:
    weights = resamples(200, seed=3)
    assert weights.shape == (PROMPT_RESAMPLES, 202) and (weights.sum(axis=1) == 202).all()
    assert (weights == resamples(200, seed=3)).all() and (weights != resamples(200, seed=4)).any()
    wins = np.array([1.0, 0.0] * 101)
    low, high = quantiles(mean_preference(wins, weights), 0.95)
    # Half of 202 won: 1.96 sqrt(0.25 / 202) = 0.069 to either side.
    assert low == pytest.approx(0.5 - 0.069, abs=0.01) and high == pytest.approx(0.5 + 0.069, abs=0.01)
