"""Losses of reward models: Bradley-Terry on the pairs of a comparison, and regression to target scores.

    L = mean over comparisons ( mean over its pairs ( -log sigmoid(r_better - r_worse - margin) ) )

K ranked answers make all pairs (InstructGPT, arXiv:2203.02155 eq. 1). Tensors are flat over the scored answers of a
micro-batch, those of a comparison from best to worst. The denominator is counted over all micro-batches and ranks, so
the split of a batch can't change its gradient.

Legend: N scored answers of the micro-batch, M pairs, C comparisons of the micro-batch.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from pipeline.objectives.policy import LossOutput


class ScoredAnswers(NamedTuple):
    """The scored answers of a micro-batch, those of a comparison from best to worst.

    scores_N, targets_N: float [N], of the model and of the data. comparison_N: int64 [N], < num_comparisons.
    """

    scores_N: Tensor
    targets_N: Tensor
    comparison_N: Tensor
    num_comparisons: int


def ordered_pairs(*, targets_N: Tensor, comparison_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the better and the worse answer of every pair, int64 [M] each.

    Answers of a comparison are ordered from best to worst. Equal targets make no pair. A target is NaN when only the
    order is known; NaN equals nothing.
    """
    same_comparison_NN = comparison_N[:, None] == comparison_N[None, :]
    differ_NN = targets_N[:, None] != targets_N[None, :]
    better_M, worse_M = (same_comparison_NN & differ_NN).triu(diagonal=1).nonzero(as_tuple=True)
    return better_M, worse_M


def pairwise_loss(
    answers: ScoredAnswers,
    *,
    denominator: float,
    margin: float,
    center: float,
) -> LossOutput:
    """Compute -log sigmoid(r_better - r_worse - margin (t_better - t_worse)) + center (r_better + r_worse)^2.

    NaN targets have no margin (margin: Llama 2, arXiv:2307.09288 eq. 2; centering: arXiv:2312.09244 eq. 2). The
    denominator is the batch's global number of
    comparisons. Metrics are sums over comparisons of means over their pairs; equal scores have accuracy 1/2.
    """
    scores_N, targets_N, comparison_N, num_comparisons = answers
    better_M, worse_M = ordered_pairs(targets_N=targets_N, comparison_N=comparison_N)
    weights_M = comparison_weights(comparison_N[better_M], num_comparisons)
    difference_M = scores_N[better_M] - scores_N[worse_M]
    margin_M = margin * (targets_N[better_M] - targets_N[worse_M]).nan_to_num(nan=0.0)
    loss_M = -logsigmoid(difference_M - margin_M) + center * (scores_N[better_M] + scores_N[worse_M]).square()
    difference_M = difference_M.detach()
    accuracy_M = (difference_M > 0) + 0.5 * (difference_M == 0)
    sums = {
        "reward_model/accuracy": (weights_M * accuracy_M).sum(),
        "reward_model/margin_mean": (weights_M * difference_M).sum(),
        "reward_model/score_mean": (comparison_weights(comparison_N, num_comparisons) * scores_N.detach()).sum(),
    }
    return LossOutput((weights_M * loss_M).sum() / denominator, sums, {})


def pointwise_loss(
    answers: ScoredAnswers,
    *,
    denominator: float,
    kind: Literal["regression", "bce"],
) -> LossOutput:
    """Compute (r - t)^2 for `regression`, and for `bce` the cross-entropy of sigmoid(r) to a target between 0 and 1.

    The denominator is the batch's global number of comparisons; the answers of a comparison share its weight. Metrics
    are sums over comparisons of means over their answers.
    """
    scores_N, targets_N, comparison_N, num_comparisons = answers
    weights_N = comparison_weights(comparison_N, num_comparisons)
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


def comparison_weights(comparison_N: Tensor, num_comparisons: int) -> Tensor:
    """Compute 1 / count of each element's comparison, float of the same shape."""
    return 1 / torch.bincount(comparison_N, minlength=num_comparisons)[comparison_N]
