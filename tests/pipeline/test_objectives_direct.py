"""DPO's losses: numbers by hand, invariance to the split of a batch, answers packed with others or alone."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.dpo import DpoLoss
from pipeline.data.trees import Floats, compared_tree, cut, micro_batch, values_in_order
from pipeline.objectives.direct import ComparedAnswers, answer_log_ratios, dpo_loss, pair_losses
from pipeline.objectives.policy import LossOutput
from pipeline.train.losses import batch_loss, metric_count
from tests.pipeline.sharding import shard

LOSSES: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"kind": "robust", "label_smoothing": 0.2},
    {"kind": "hinge"},
    {"kind": "ipo"},
    {"kind": "ipo", "length_normalized": True},
    {"length_normalized": True},
    {"reference_free": True, "beta": 2.0},
]
LOG3, NAN = math.log(3), float("nan")


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "difference", "value", "gradient"),
    [
        # beta h = log 3, so sigmoid is 3/4: -log 3/4; the gradient is -beta (1 - 3/4).
        ({"beta": 0.5}, 2 * LOG3, math.log(4 / 3), -0.125),
        # e = 0.1: 0.9 log 4/3 + 0.1 log 4; -beta 0.9 / 4 + beta 0.1 * 3/4.
        ({"beta": 0.5, "label_smoothing": 0.1}, 2 * LOG3, 0.9 * math.log(4 / 3) + 0.1 * math.log(4), -0.075),
        # e = 0.2: (0.8 log 4/3 - 0.2 log 4) / 0.6; (-beta 0.8 / 4 - beta 0.2 * 3/4) / 0.6.
        (
            {"kind": "robust", "beta": 0.5, "label_smoothing": 0.2},
            2 * LOG3,
            (0.8 * math.log(4 / 3) - 0.2 * math.log(4)) / 0.6,
            -0.175 / 0.6,
        ),
        ({"kind": "hinge", "beta": 0.5}, 1.0, 0.5, -0.5),  # 1 - 0.5 * 1
        ({"kind": "hinge", "beta": 0.5}, 3.0, 0.0, 0.0),  # beyond the hinge
        ({"kind": "ipo", "beta": 0.25}, 1.5, 0.25, -1.0),  # (1.5 - 2)^2, 2 (1.5 - 2)
        ({"kind": "ipo", "beta": 0.25}, 3.0, 1.0, 2.0),  # too far is pulled back
    ],
)
def test_losses_and_gradients_by_hand(
    settings: dict[str, Any], difference: float, value: float, gradient: float
) -> None:
    difference_M = tensor(difference).requires_grad_()
    loss_M = pair_losses(difference_M, DpoLoss.model_validate(settings))
    loss_M.sum().backward()
    assert loss_M.item() == pytest.approx(value)
    assert difference_M.grad is not None and difference_M.grad.item() == pytest.approx(gradient)


def test_robust_is_unbiased_where_orders_are_wrong() -> None:
    """Over orders that are wrong with probability e its mean is DPO's loss of the right order."""
    difference_M, error = tensor(-3.0, 0.5, 4.0), 0.3
    robust = DpoLoss(kind="robust", label_smoothing=error, beta=1.0)
    mean_M = (1 - error) * pair_losses(difference_M, robust) + error * pair_losses(-difference_M, robust)
    torch.testing.assert_close(mean_M, pair_losses(difference_M, DpoLoss(beta=1.0)))


def test_log_ratios_by_hand() -> None:
    # answers of 3 and 1 tokens: (-1 - -2) + (-2 - -2) + (-1 - -3) = 3 and -4 - -1 = -3
    tokens: dict[str, Any] = {
        "logprobs_N": tensor(-1, -2, -1, -4),
        "ref_logprobs_N": tensor(-2, -2, -3, -1),
        "sequence_N": torch.tensor([0, 0, 0, 1]),
        "num_answers": 2,
    }
    assert answer_log_ratios(**tokens, length_normalized=False).tolist() == [3, -3]
    assert answer_log_ratios(**tokens, length_normalized=True).tolist() == [1, -3]
    assert answer_log_ratios(**tokens | {"ref_logprobs_N": None}, length_normalized=False).tolist() == [-4, -4]


def test_the_two_normalisations_of_ipo_by_hand() -> None:
    """h is 3 - -3 = 6 of sums and 1 - -3 = 4 of means; beta 0.125 wants 4."""
    answers = ComparedAnswers(
        tensor(-1, -2, -1, -4),
        tensor(-2, -2, -3, -1),
        tensor(NAN, NAN, NAN, NAN),
        torch.tensor([0, 0, 0, 1]),
        torch.tensor([0, 0]),
    )
    summed = dpo_loss(answers, DpoLoss(kind="ipo", beta=0.125), denominator=1.0)
    averaged = dpo_loss(answers, DpoLoss(kind="ipo", beta=0.125, length_normalized=True), denominator=1.0)
    assert (summed.loss.item(), averaged.loss.item()) == (4, 0)
    # implicit rewards are beta times 3 and -3
    figures = {name.removeprefix("dpo/"): value.item() for name, value in summed.sums.items()}
    assert figures == {"accuracy": 1, "margin_mean": 0.75, "chosen_mean": 0.375, "rejected_mean": -0.375}


def test_three_ranked_answers_make_three_pairs_and_equal_scores_none() -> None:
    """One token each, log-ratios 0, 1, 3, so that every pair has the wrong order; the hinge of h is 1 - h."""
    logprobs_N, sequence_N = tensor(0, 1, 3), torch.arange(3)

    def loss(*targets: float) -> LossOutput:
        answers = ComparedAnswers(logprobs_N, None, tensor(*targets), sequence_N, torch.zeros(3, dtype=torch.int64))
        return dpo_loss(answers, DpoLoss(kind="hinge", beta=1.0, reference_free=True), denominator=1.0)

    assert loss(NAN, NAN, NAN).loss.item() == pytest.approx(3)  # h = -1, -3, -2: mean of 2, 4, 3
    assert loss(NAN, NAN, NAN).sums["dpo/accuracy"].item() == 0
    assert loss(2.0, 1.0, 1.0).loss.item() == pytest.approx(3)  # the first two pairs: 2 and 4
    assert loss(2.0, 2.0, 1.0).loss.item() == pytest.approx(3.5)  # the last two: 4 and 3


def trees_of(seed: int) -> list[tuple[list[int], list[list[int]], list[float], list[Floats]]]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(0, 50, (int(torch.randint(low, high, (), generator=generator)),)).tolist()

    rows: list[Any] = []
    for number_of_answers in (2, 3, 2, 4):
        answers = [ids(1, 7) for _ in range(number_of_answers)]
        targets = [NAN] * number_of_answers if number_of_answers == 3 else list(range(number_of_answers, 0, -1))
        reference = [torch.randn(len(answer), generator=generator).numpy() for answer in answers]
        rows.append((ids(2, 5), answers, targets, reference))
    return rows


@pytest.mark.parametrize("settings", LOSSES)
def test_packed_answers_have_the_loss_gradient_and_metrics_of_single_rows(settings: dict[str, Any]) -> None:
    """All comparisons in one row, in two rows and alone; log-probabilities stand in for the model's."""
    loss = DpoLoss.model_validate(settings)
    rows = trees_of(0)
    generator = torch.Generator().manual_seed(1)
    logprobs = [
        torch.randn(sum(map(len, answers)), generator=generator, dtype=torch.float64) for _, answers, _, _ in rows
    ]

    def over(*parts: list[int]) -> tuple[float, Tensor, dict[str, float], int]:
        leaves = [values.clone().requires_grad_() for values in logprobs]
        total, sums, count = 0.0, dict[str, float](), 0
        for part in parts:
            row = micro_batch([compared_tree(*rows[i][:3], None if loss.reference_free else rows[i][3]) for i in part])
            output = batch_loss(loss, row, torch.cat([leaves[i] for i in part]), denominator=4.0)
            output.loss.backward()
            total += output.loss.item()
            count += metric_count(loss, row)
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in output.sums.items()}
        gradients = [leaf.grad for leaf in leaves]
        return total, torch.cat([gradient for gradient in gradients if gradient is not None]), sums, count

    total, gradient, sums, count = over([0, 1, 2, 3])
    for parts in ([[0, 1], [2, 3]], [[3], [1], [0], [2]]):
        other = over(*parts)
        assert other[0] == pytest.approx(total, rel=1e-6)
        torch.testing.assert_close(other[1], gradient)
        assert other[2] == pytest.approx(sums, rel=1e-6)
        assert other[3] == count == 4
    assert bool((gradient != 0).any())


def test_a_comparison_is_never_cut() -> None:
    tree = compared_tree([1, 2], [[3, 4, 5], [6, 7, 8]])
    assert cut(tree, 4) == [tree]
    assert tree.num_values == 6


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_values_return_in_the_order_of_the_trees(num_ranks: int) -> None:
    """Each token's value is its id, in rows of 14 tokens on several ranks, which also have rows without a tree."""
    trees = [compared_tree(prompt, answers) for prompt, answers, _, _ in trees_of(3)]
    rows = shard(trees, num_ranks=num_ranks, micro_batch_tokens=14)
    results = [[row.target_N.astype(np.float32) for row in of_rank] for of_rank in rows]
    for tree, values_N in zip(trees, values_in_order(trees, results, 14), strict=True):
        assert values_N.tolist() == [token for branch in tree.branches for token in branch.token_ids]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kind": "robust"}, "set label_smoothing above 0"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "no effect on kind=ipo"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "no effect on kind=hinge"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
    ],
)
def test_settings_of_the_loss_without_effect(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DpoLoss.model_validate(settings)
