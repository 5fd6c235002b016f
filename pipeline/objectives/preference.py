"""The objectives of reward models: Bradley-Terry on the pairs of a comparison, and regression to given scores.

    L = mean over comparisons ( mean over its pairs ( -log sigmoid(r_better - r_worse - margin) ) )

with one pair for two answers and all of them for K ranked ones (InstructGPT, arXiv:2203.02155 eq. 1). Every tensor is
flat over the scored answers of a micro-batch, those of a comparison from best to worst; the denominator is counted over
all micro-batches and ranks, so the way a batch is split can't change its gradient.

Legend: N scored answers of the micro-batch, M pairs, C comparisons of the micro-batch.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from pipeline.objectives.policy import LossOutput


def ordered_pairs(*, targets_N: Tensor, comparison_N: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the better and of the worse answer of every pair, int64 [M] each.

    Answers of one comparison are compared in their order. Equal targets have no order and make no pair; NaN, where only
    the order is known, equals nothing.
    """
    together_NN = comparison_N[:, None] == comparison_N[None, :]
    differ_NN = targets_N[:, None] != targets_N[None, :]
    better_M, worse_M = (together_NN & differ_NN).triu(diagonal=1).nonzero(as_tuple=True)
    return better_M, worse_M


def pairwise_loss(
    *,
    scores_N: Tensor,
    targets_N: Tensor,
    comparison_N: Tensor,
    num_comparisons: int,
    denominator: float,
    margin: float,
    center: float,
) -> LossOutput:
    """-log sigmoid(r_better - r_worse - margin (t_better - t_worse)) + center (r_better + r_worse)^2, a scalar.

    scores_N are the model's, targets_N the data's or NaN, which wants no margin (Llama 2, arXiv:2307.09288 eq. 2, has
    the margin; arXiv:2312.09244 eq. 2 the centering). The denominator is the batch's global number of comparisons, and
    metrics are sums over comparisons of means over their pairs; equal scores count half as accurate.
    """
    better_M, worse_M = ordered_pairs(targets_N=targets_N, comparison_N=comparison_N)
    of_M = comparison_N[better_M]
    weights_M = 1 / torch.bincount(of_M, minlength=num_comparisons)[of_M]
    difference_M = scores_N[better_M] - scores_N[worse_M]
    wanted_M = margin * (targets_N[better_M] - targets_N[worse_M]).nan_to_num(nan=0.0)
    loss_M = -logsigmoid(difference_M - wanted_M) + center * (scores_N[better_M] + scores_N[worse_M]).square()
    difference_M = difference_M.detach()
    right_M = (difference_M > 0) + 0.5 * (difference_M == 0)
    sums = {
        "reward_model/accuracy": (weights_M * right_M).sum(),
        "reward_model/margin_mean": (weights_M * difference_M).sum(),
        "reward_model/score_mean": (_weights(comparison_N, num_comparisons) * scores_N.detach()).sum(),
    }
    return LossOutput((weights_M * loss_M).sum() / denominator, sums, {})


def pointwise_loss(
    *,
    scores_N: Tensor,
    targets_N: Tensor,
    comparison_N: Tensor,
    num_comparisons: int,
    denominator: float,
    kind: Literal["regression", "bce"],
) -> LossOutput:
    """`regression`: (r - t)^2. `bce`: the cross-entropy of sigmoid(r) to a target between 0 and 1. A scalar.

    The denominator is the batch's global number of comparisons: an answer that is compared with others shares its
    weight with them. Metrics are sums over comparisons of means over their answers.
    """
    weights_N = _weights(comparison_N, num_comparisons)
    score_N = scores_N.detach()
    predicted_N = score_N if kind == "regression" else score_N.sigmoid()
    if kind == "regression":
        loss_N = (scores_N - targets_N).square()
    else:
        loss_N = binary_cross_entropy_with_logits(scores_N, targets_N, reduction="none")
    sums = {
        "reward_model/squared_error_mean": (weights_N * (predicted_N - targets_N).square()).sum(),
        "reward_model/score_mean": (weights_N * score_N).sum(),
    }
    return LossOutput((weights_N * loss_N).sum() / denominator, sums, {})


def _weights(comparison_N: Tensor, num_comparisons: int) -> Tensor:
    """1 / the answers of its comparison, float [N]."""
    return 1 / torch.bincount(comparison_N, minlength=num_comparisons)[comparison_N]
