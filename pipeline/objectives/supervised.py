"""Masked cross-entropy: the mean over trained tokens of -log pi(token | what came before).

Beside it the loss of modules that predict further ahead.

Legend: N trained tokens of the micro-batch, K modules for multi-token prediction.
"""

from torch import Tensor

from pipeline.objectives.policy import LossOutput


def sft_loss(*, logprobs_N: Tensor, denominator: float) -> LossOutput:
    """-sum log pi / denominator; the denominator is the batch's global number of trained tokens."""
    loss = -logprobs_N.sum() / denominator
    return LossOutput(loss, {"loss/nll_mean": -logprobs_N.detach().sum()}, {})


def mtp_loss(*, logprobs_KN: Tensor, accepted_KN: Tensor, weights_N: Tensor, denominator: float) -> LossOutput:
    """1/K sum_k L_k with L_k = -sum weight log P_k / denominator (DeepSeek-V3 eq. 24-25, there with weights 1).

    The denominator is the main loss's, as printed: the first k tokens of a sequence, which module k doesn't predict,
    count as predicted without loss. `mtp/acceptance_k` is the share of trained tokens for which module k's likeliest
    token is the main model's.
    """
    loss = -(weights_N * logprobs_KN).sum() / (len(logprobs_KN) * denominator)
    accepted = {f"mtp/acceptance_{k}": of_N.sum() for k, of_N in enumerate(accepted_KN, start=1)}
    return LossOutput(loss, {"loss/mtp_mean": -logprobs_KN.detach().sum() / len(logprobs_KN)} | accepted, {})
