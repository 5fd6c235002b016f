"""Masked cross-entropy: the mean over trained tokens of -log pi(token | what came before).

Legend: N trained tokens of the micro-batch.
"""

from torch import Tensor

from pipeline.objectives.policy import LossOutput


def sft_loss(*, logprobs_N: Tensor, denominator: float) -> LossOutput:
    """-sum log pi / denominator; the denominator is the batch's global number of trained tokens."""
    loss = -logprobs_N.sum() / denominator
    return LossOutput(loss, {"loss/nll_mean": -logprobs_N.detach().sum()}, {})
