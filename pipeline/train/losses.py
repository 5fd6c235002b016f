"""The loss of a micro-batch: the spec's objective, given its columns."""

from typing import Any

import torch
from torch import Tensor

from configs.grpo import ObjectiveConfig
from configs.reward_model import PairwiseLoss, PointwiseLoss
from pipeline.data.trees import MicroBatch
from pipeline.models.logprobs import Ahead
from pipeline.objectives.policy import LossOutput, grpo_loss
from pipeline.objectives.preference import pairwise_loss, pointwise_loss
from pipeline.objectives.supervised import mtp_loss, sft_loss


def batch_loss(
    objective: ObjectiveConfig | PairwiseLoss | PointwiseLoss | None,
    row: MicroBatch,
    values_N: Tensor,
    denominator: float,
) -> LossOutput:
    """The loss of `row` under `objective`, None for supervised training. `values_N` are the log-probabilities of its
    trained tokens, or a reward model's scores."""
    if values_N.numel() == 0:  # a rank that only takes part: its gradient is zero, not absent
        return LossOutput(values_N.sum(), {}, {})
    if objective is None:
        return sft_loss(logprobs_N=values_N, denominator=denominator)
    device = values_N.device
    columns = {name: torch.from_numpy(values.copy()).to(device) for name, values in row.columns.items()}
    sequence_N = torch.from_numpy(row.sequence_N.copy()).to(device)
    if isinstance(objective, PairwiseLoss | PointwiseLoss):
        return _preference_loss(objective, values_N, columns["targets"], sequence_N, row.num_sequences, denominator)
    return grpo_loss(
        logprobs_N=values_N,
        policy_logprobs_N=columns.get("policy_logprobs", values_N.detach()),
        rollout_logprobs_N=columns["rollout_logprobs"],
        ref_logprobs_N=columns.get("ref_logprobs"),
        advantages_N=columns["advantages"],
        weights_N=columns["weights"],
        sequence_N=sequence_N,
        num_sequences=row.num_sequences,
        denominator=denominator,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        ratio=objective.ratio,
        surrogate=objective.surrogate,
        kl_coef=objective.kl_coef,
        importance_cap=objective.importance_cap,
    )


def loss_with_mtp(
    objective: ObjectiveConfig | PairwiseLoss | PointwiseLoss | None,
    row: MicroBatch,
    answer: Ahead,
    denominator: float,
    weight: float,
) -> LossOutput:
    """The loss of `row` and, times `weight`, that of its modules for multi-token prediction on the same tokens, each
    token with the weight that `objective` gives it."""
    loss, sums, maxima = batch_loss(objective, row, answer.logprobs_N, denominator)
    weights_N = torch.ones_like(answer.logprobs_N)
    if objective is not None:
        weights_N = torch.from_numpy(row.columns["weights"].copy()).to(weights_N.device)
    ahead, ahead_sums, _ = mtp_loss(
        logprobs_KN=answer.mtp_logprobs_KN,
        accepted_KN=answer.accepted_KN,
        weights_N=weights_N,
        denominator=denominator,
    )
    return LossOutput(loss + weight * ahead, sums | ahead_sums, maxima)


def _preference_loss(
    objective: PairwiseLoss | PointwiseLoss,
    scores_N: Tensor,
    targets_N: Tensor,
    comparison_N: Tensor,
    num_comparisons: int,
    denominator: float,
) -> LossOutput:
    batch: dict[str, Any] = {
        "scores_N": scores_N,
        "targets_N": targets_N,
        "comparison_N": comparison_N,
        "num_comparisons": num_comparisons,
        "denominator": denominator,
    }
    if isinstance(objective, PairwiseLoss):
        return pairwise_loss(**batch, margin=objective.margin, center=objective.center)
    return pointwise_loss(**batch, kind=objective.kind)
