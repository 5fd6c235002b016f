"""The loss of a micro-batch: the objective of the spec on the columns of the row."""

import torch
from torch import Tensor

from configs.distill import DistillObjective
from configs.dpo import DpoLoss
from configs.grpo import ObjectiveConfig
from configs.reward_model import PairwiseLoss, PointwiseLoss
from pipeline.data.trees import Floats, MicroBatch
from pipeline.models.logprobs import MtpLogprobs, TaughtTokens
from pipeline.objectives.direct import ComparedAnswers, dpo_loss
from pipeline.objectives.distillation import StudentTokens, distillation_loss, sampled_divergence
from pipeline.objectives.policy import LossOutput, PolicyTokens, grpo_loss
from pipeline.objectives.preference import ScoredAnswers, pairwise_loss, pointwise_loss
from pipeline.objectives.supervised import mtp_loss, sft_loss
from pipeline.train.spec import Objective


def batch_loss(
    objective: Objective,
    row: MicroBatch,
    output: Tensor | MtpLogprobs | TaughtTokens,
    denominator: float,
    mtp_weight: float = 0.0,
) -> LossOutput:
    """Compute the loss of `row` from the model's output: log-probabilities of its trained tokens, or scores, [N].
    TaughtTokens have the divergence from a teacher too.

    The loss of MTP modules on the same tokens is added with `mtp_weight`; tokens have the weights of `objective`.
    """
    if isinstance(output, TaughtTokens):
        return _distillation_loss(row, output, denominator)
    if not isinstance(output, MtpLogprobs):
        return _main_loss(objective, row, output, denominator)
    loss, sums, maxima = _main_loss(objective, row, output.logprobs_N, denominator)
    weights_N = torch.ones_like(output.logprobs_N)
    if objective is not None:
        weights_N = _tensor(row.columns["weights"], weights_N.device)
    mtp, mtp_sums, _ = mtp_loss(
        logprobs_KN=output.mtp_logprobs_KN,
        accepted_KN=output.accepted_KN,
        weights_N=weights_N,
        denominator=denominator,
    )
    return LossOutput(loss + mtp_weight * mtp, sums | mtp_sums, maxima)


def _main_loss(objective: Objective, row: MicroBatch, values_N: Tensor, denominator: float) -> LossOutput:
    if values_N.numel() == 0:  # a row without trained tokens still needs a gradient, of zero
        return LossOutput(values_N.sum(), {}, {})
    if objective is None:
        return sft_loss(logprobs_N=values_N, denominator=denominator)
    columns = {name: _tensor(values, values_N.device) for name, values in row.columns.items()}
    sequence_N = torch.from_numpy(row.sequence_N.copy()).to(values_N.device)
    if isinstance(objective, ObjectiveConfig):
        tokens = PolicyTokens(
            logprobs_N=values_N,
            policy_logprobs_N=columns.get("policy_logprobs", values_N.detach()),
            rollout_logprobs_N=columns["rollout_logprobs"],
            ref_logprobs_N=columns.get("ref_logprobs"),
            advantages_N=columns["advantages"],
            weights_N=columns["weights"],
            sequence_N=sequence_N,
            num_sequences=row.num_sequences,
            kl_coef_N=columns.get("kl_coef"),
            entropy_coef_N=columns.get("entropy_coef"),
            entropy_baseline_N=columns.get("entropy_baseline"),
            no_lag_N=columns.get("no_lag"),
        )
        return grpo_loss(tokens, objective, denominator=denominator)
    if isinstance(objective, DpoLoss):
        compared = ComparedAnswers(
            logprobs_N=values_N,
            ref_logprobs_N=columns.get("ref_logprobs"),
            targets_N=columns["targets"],
            sequence_N=sequence_N,
            comparison_S=torch.from_numpy(row.comparison_S).to(values_N.device),
        )
        return dpo_loss(compared, objective, denominator=denominator)
    if isinstance(objective, DistillObjective):
        return _distillation_loss(row, values_N, denominator)
    answers = ScoredAnswers(values_N, columns["targets"], sequence_N, row.num_sequences)
    if isinstance(objective, PairwiseLoss):
        return pairwise_loss(answers, denominator=denominator, margin=objective.margin, center=objective.center)
    return pointwise_loss(answers, denominator=denominator, kind=objective.kind)


def metric_count(objective: Objective, row: MicroBatch) -> int:
    """Count what the metrics of `row` are means over: comparisons of a reward model and of DPO, else trained tokens."""
    if isinstance(objective, DpoLoss):
        return int(row.comparison_S.max(initial=-1)) + 1
    if isinstance(objective, PairwiseLoss | PointwiseLoss):
        return row.num_sequences
    return len(row.target_N)


def _distillation_loss(row: MicroBatch, output: TaughtTokens | Tensor, denominator: float) -> LossOutput:
    """Compute the loss in its full form from TaughtTokens, and else in its sampled form."""
    if isinstance(output, TaughtTokens):
        logprobs_N, divergence_N = output
        term_N = divergence_N
    else:
        teacher_logprobs_N = _tensor(row.columns["ref_logprobs"], output.device)
        logprobs_N, divergence_N = output, output - teacher_logprobs_N
        term_N = sampled_divergence(logprobs_N=output, teacher_logprobs_N=teacher_logprobs_N)
    if logprobs_N.numel() == 0:
        return LossOutput(term_N.sum(), {}, {})
    device = logprobs_N.device
    tokens = StudentTokens(
        logprobs_N,
        _tensor(row.columns["rollout_logprobs"], device),
        _tensor(row.columns["weights"], device),
        torch.from_numpy(row.sequence_N.copy()).to(device),
        row.num_sequences,
    )
    return distillation_loss(term_N, divergence_N, tokens, denominator=denominator)


def _tensor(values_N: Floats, device: torch.device) -> Tensor:
    return torch.from_numpy(values_N.copy()).to(device)
