"""Masked cross-entropy: the mean over trained tokens of -log pi(token | earlier tokens); the loss of MTP modules.

Legend: N trained tokens of the micro-batch, K modules for multi-token prediction.
"""

from torch import Tensor

from pipeline.objectives.policy import LossOutput


def sft_loss(*, logprobs_N: Tensor, denominator: float) -> LossOutput:
    """Compute -sum log pi / denominator, with the batch's global number of trained tokens as denominator."""
    loss = -logprobs_N.sum() / denominator
    return LossOutput(loss, {"loss/nll_mean": -logprobs_N.detach().sum()}, {})


def mtp_loss(*, logprobs_KN: Tensor, accepted_KN: Tensor, weights_N: Tensor, denominator: float) -> LossOutput:
    """Compute 1/K sum_k L_k with L_k = -sum weight log P_k / denominator (DeepSeek-V3 eq. 24-25, with weights 1).

    The denominator is the main loss's, as in the paper: the first k tokens of a sequence, which module k doesn't
    predict, count with loss 0. `mtp/acceptance_k` is the share of trained tokens for which module k and the main model
    have the same most likely token.
    """
    loss = -(weights_N * logprobs_KN).sum() / (len(logprobs_KN) * denominator)
    accepted = {f"mtp/acceptance_{k}": accepted_N.sum() for k, accepted_N in enumerate(accepted_KN, start=1)}
    return LossOutput(loss, {"loss/mtp_mean": -logprobs_KN.detach().sum() / len(logprobs_KN)} | accepted, {})
