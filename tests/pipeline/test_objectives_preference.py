"""The objectives of reward models against numbers worked by hand, and the properties the equations have."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.objectives.policy import LossOutput
from pipeline.objectives.preference import ScoredAnswers, ordered_pairs, pairwise_loss, pointwise_loss

NAN = float("nan")
KINDS = ["pairwise", "regression", "bce"]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairwise(
    scores: Tensor, comparison: list[int], targets: Tensor | None = None, margin: float = 0.0, center: float = 0.0
) -> LossOutput:
    """Divided by the comparisons there are."""
    targets = torch.full_like(scores, NAN) if targets is None else targets
    answers = ScoredAnswers(scores, targets, torch.tensor(comparison), max(comparison) + 1)
    return pairwise_loss(answers, denominator=float(answers.num_comparisons), margin=margin, center=center)


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def test_equal_scores_cost_log_2_and_are_half_right() -> None:
    loss, sums, _ = pairwise(tensor(0.3, 0.3), [0, 0])
    assert loss.item() == pytest.approx(math.log(2))
    assert sums["reward_model/accuracy"].item() == 0.5 and sums["reward_model/margin_mean"].item() == 0


def test_a_pair_by_hand() -> None:
    # sigmoid(log 3) = 3/4
    loss, sums, _ = pairwise(tensor(math.log(3) + 1, 1.0), [0, 0])
    assert loss.item() == pytest.approx(-math.log(3 / 4))
    assert sums["reward_model/margin_mean"].item() == pytest.approx(math.log(3))
    assert sums["reward_model/score_mean"].item() == pytest.approx(1 + math.log(3) / 2)


def test_the_gradient_of_a_pair_is_the_chance_that_the_model_gives_the_wrong_order() -> None:
    scores = tensor(math.log(3), 0.0).requires_grad_()
    pairwise(scores, [0, 0]).loss.backward()
    torch.testing.assert_close(scores.grad, tensor(-1 / 4, 1 / 4))


def test_k_ranked_answers_are_all_their_pairs_and_weigh_as_much_as_one() -> None:
    # a > b > c with scores 1, 0, 0: pairs (a, b), (a, c) are right, (b, c) is a tie; then a wrong pair.
    loss, sums, _ = pairwise(tensor(1.0, 0.0, 0.0, 0.0, 2.0), [0, 0, 0, 1, 1])
    of_three = (2 * softplus(-1.0) + math.log(2)) / 3
    assert loss.item() == pytest.approx((of_three + softplus(2.0)) / 2)
    assert sums["reward_model/accuracy"].item() == pytest.approx((1 + 1 + 0.5) / 3)
    assert sums["reward_model/margin_mean"].item() == pytest.approx(2 / 3 - 2)


def test_equal_targets_make_no_pair_and_unknown_ones_do() -> None:
    comparison = torch.tensor([0, 0, 0, 1, 1])
    better, worse = ordered_pairs(targets_N=tensor(1, 0, 0, NAN, NAN), comparison_N=comparison)
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 1), (0, 2), (3, 4)]


def test_a_margin_asks_for_more_where_the_data_says_how_much() -> None:
    targets = tensor(5.0, 1.0, NAN, NAN)
    loss, _, _ = pairwise(tensor(2.0, 0.0, 2.0, 0.0), [0, 0, 1, 1], targets, margin=0.5)
    # the first is short of nothing: 2 - 0.5 * 4 = 0
    assert loss.item() == pytest.approx((math.log(2) + softplus(-2.0)) / 2)


def test_centering_pulls_both_scores_to_zero_and_nothing_else_sees_a_shift() -> None:
    loss, _, _ = pairwise(tensor(3.0, 1.0), [0, 0], center=0.1)
    assert loss.item() == pytest.approx(softplus(-2.0) + 0.1 * 16)
    scores = tensor(1.0, -0.5, 0.2, 0.1)
    torch.testing.assert_close(pairwise(scores, [0, 0, 1, 1]).loss, pairwise(scores + 7, [0, 0, 1, 1]).loss)


def test_large_differences_stay_finite() -> None:
    scores = tensor(-2000.0, 2000.0).requires_grad_()
    loss = pairwise(scores, [0, 0]).loss
    loss.backward()
    assert loss.item() == 4000 and torch.equal(scores.grad, tensor(-1.0, 1.0))


def pointwise(kind: str, scores: Tensor, targets: Tensor, comparison: list[int], denominator: float) -> LossOutput:
    answers = ScoredAnswers(scores, targets, torch.tensor(comparison), max(comparison) + 1)
    return pointwise_loss(answers, denominator=denominator, kind=kind)  # type: ignore[arg-type]


def test_regression_by_hand() -> None:
    # two answers of one comparison share its weight: (4 + 1) / 2 and 9
    loss, sums, _ = pointwise("regression", tensor(1.0, 0.0, 5.0), tensor(3.0, 1.0, 2.0), [0, 0, 1], 2.0)
    assert loss.item() == pytest.approx((2.5 + 9) / 2)
    assert sums["reward_model/squared_error_mean"].item() == pytest.approx(2.5 + 9)


def test_bce_by_hand() -> None:
    # sigmoid(log 3) = 3/4 against 1, and against 0.5
    loss, sums, _ = pointwise("bce", tensor(math.log(3), math.log(3)), tensor(1.0, 0.5), [0, 1], 2.0)
    expected = -math.log(3 / 4) - 0.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4)
    assert loss.item() == pytest.approx(expected / 2)
    assert sums["reward_model/squared_error_mean"].item() == pytest.approx(1 / 16 + 1 / 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_a_batch_in_parts_has_the_loss_gradient_and_metrics_of_the_whole(kind: str, parts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    answers = [2, 3, 4, 2, 2, 5, 3, 2]
    scores = torch.randn(sum(answers), generator=generator, dtype=torch.float64)
    targets = torch.cat([torch.linspace(1, 0, n, dtype=torch.float64) for n in answers])

    def of(scores: Tensor, targets: Tensor, comparison: list[int]) -> LossOutput:
        if kind != "pairwise":
            return pointwise(kind, scores, targets, comparison, denominator=8.0)
        of_part = ScoredAnswers(scores, targets, torch.tensor(comparison), max(comparison) + 1)
        return pairwise_loss(of_part, denominator=8.0, margin=0.3, center=0.05)

    whole, split = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    expected = of(whole, targets, [c for c, n in enumerate(answers) for _ in range(n)])
    expected.loss.backward()
    sums: dict[str, Tensor] = {}
    total, per = torch.zeros((), dtype=torch.float64), 8 // parts
    for part in range(parts):
        mine = answers[part * per : (part + 1) * per]
        first = sum(answers[: part * per])
        place = slice(first, first + sum(mine))
        output = of(split[place], targets[place], [c for c, n in enumerate(mine) for _ in range(n)])
        output.loss.backward()
        total += output.loss.detach()
        sums = {name: sums.get(name, 0.0) + value for name, value in output.sums.items()}
    torch.testing.assert_close(total, expected.loss.detach())
    torch.testing.assert_close(split.grad, whole.grad)
    for name, value in expected.sums.items():
        torch.testing.assert_close(sums[name], value)
