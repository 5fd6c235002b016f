"""Direct preference optimization: losses of a policy on compared answers, with a reference in place of a reward model.

    h = log pi/pi_ref(better) - log pi/pi_ref(worse)
    L = mean over comparisons ( mean over its pairs ( loss of h ) )

The answers' implicit rewards are beta log pi/pi_ref (DPO, arXiv:2305.18290 eq. 5-7). K ranked answers make all pairs.
The denominator is counted over all micro-batches and ranks, so the split of a batch can't change its gradient.

Legend: N trained tokens of the micro-batch, S answers, M pairs, C comparisons of the micro-batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from configs.dpo import DpoLoss
from pipeline.objectives.policy import LossOutput
from pipeline.objectives.preference import comparison_weights, ordered_pairs


class ComparedAnswers(NamedTuple):
    """The answers of a micro-batch, token by token, those of a comparison from best to worst.

    logprobs_N: float [N], of the policy, with a gradient. ref_logprobs_N: float [N], of the reference, None without
    one. targets_N: float [N], the data's score of the token's answer, NaN if only the order is known. sequence_N: int64
    [N], the answer of each token, < S. comparison_S: int64 [S], the comparison of each answer, < C.
    """

    logprobs_N: Tensor
    ref_logprobs_N: Tensor | None
    targets_N: Tensor
    sequence_N: Tensor
    comparison_S: Tensor


def answer_log_ratios(
    *, logprobs_N: Tensor, ref_logprobs_N: Tensor | None, sequence_N: Tensor, num_answers: int, length_normalized: bool
) -> Tensor:
    """Compute log pi/pi_ref of each answer, float [S]: the sum over its tokens, or their mean if `length_normalized`.

    Without a reference it is log pi.
    """
    log_ratio_N = logprobs_N if ref_logprobs_N is None else logprobs_N - ref_logprobs_N
    sums_S = log_ratio_N.new_zeros(num_answers).index_add(0, sequence_N, log_ratio_N)
    return sums_S / torch.bincount(sequence_N, minlength=num_answers) if length_normalized else sums_S


def pair_losses(difference_M: Tensor, loss: DpoLoss) -> Tensor:
    """Compute the loss of each pair from h, float [M].

    `sigmoid`: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e = label_smoothing (DPO eq. 7, cDPO). `robust`:
    (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e), whose mean over orders that are wrong with
    probability e is DPO's loss of the right order (arXiv:2403.00409 eq. 7). `hinge`: max(0, 1 - beta h) (SLiC,
    arXiv:2305.10425). `ipo`: (h - 1/(2 beta))^2 (arXiv:2310.12036 eq. 17).
    """
    logit_M = loss.beta * difference_M
    if loss.kind == "hinge":
        return torch.relu(1 - logit_M)
    if loss.kind == "ipo":
        return (difference_M - 1 / (2 * loss.beta)).square()
    smoothing = loss.label_smoothing
    right_M, wrong_M = (1 - smoothing) * -logsigmoid(logit_M), smoothing * -logsigmoid(-logit_M)
    return right_M + wrong_M if loss.kind == "sigmoid" else (right_M - wrong_M) / (1 - 2 * smoothing)


def dpo_loss(answers: ComparedAnswers, loss: DpoLoss, *, denominator: float) -> LossOutput:
    """Compute the sum over comparisons of the mean loss of their pairs, divided by `denominator`, a scalar.

    The denominator is the batch's global number of comparisons. Metrics are sums over comparisons of means over their
    pairs: `dpo/chosen_mean` and `rejected_mean`, the implicit rewards of the better and the worse answer, their
    difference `margin_mean`, and `accuracy`, in which equal rewards count 1/2.
    """
    comparison_S = answers.comparison_S
    log_ratio_S = answer_log_ratios(
        logprobs_N=answers.logprobs_N,
        ref_logprobs_N=answers.ref_logprobs_N,
        sequence_N=answers.sequence_N,
        num_answers=len(comparison_S),
        length_normalized=loss.length_normalized,
    )
    lengths_S = torch.bincount(answers.sequence_N, minlength=len(comparison_S))
    targets_S = answers.targets_N[lengths_S.cumsum(0) - 1]
    better_M, worse_M = ordered_pairs(targets_N=targets_S, comparison_N=comparison_S)
    weights_M = comparison_weights(comparison_S[better_M], len(comparison_S))
    losses_M = pair_losses(log_ratio_S[better_M] - log_ratio_S[worse_M], loss)
    rewards_S = loss.beta * log_ratio_S.detach()
    chosen_M, rejected_M = rewards_S[better_M], rewards_S[worse_M]
    right_M = (chosen_M > rejected_M) + 0.5 * (chosen_M == rejected_M)
    sums = {
        "dpo/accuracy": (weights_M * right_M).sum(),
        "dpo/margin_mean": (weights_M * (chosen_M - rejected_M)).sum(),
        "dpo/chosen_mean": (weights_M * chosen_M).sum(),
        "dpo/rejected_mean": (weights_M * rejected_M).sum(),
    }
    return LossOutput((weights_M * losses_M).sum() / denominator, sums, {})
