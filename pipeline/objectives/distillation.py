"""On-policy distillation: the student's divergence from a teacher on the text that the student sampled (DeepSeek-V4 eq.
29, arXiv:2606.19348).

    L = sum_i w_i D(pi_theta || pi_Ei),   D = sum_v pi_theta(v) (log pi_theta(v) - log pi_Ei(v)) at every sampled token

The prefixes count as given: no gradient passes through the choice of earlier tokens, in either form.

Legend: C rows of a chunk, V vocabulary, N trained tokens of the micro-batch.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.objectives.policy import LossOutput, mismatch


def reverse_kl(*, logits_CV: Tensor, teacher_logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """Compute D of each row over the whole vocabulary, and log pi_theta of the targets without a gradient, both float32
    [C], in nats. Both logits, float32 [C, V], are overwritten."""
    return cast(Any, _ReverseKL).apply(logits_CV, teacher_logits_CV, target_C)


class _ReverseKL(torch.autograd.Function):
    """Its gradient, pi_theta(v) (log pi_theta(v) - log pi_E(v) - D), is made in the forward pass, in the memory of the
    teacher's logits."""

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, teacher_logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_CV, gap_CV = (_normalised(x.detach()) for x in (logits_CV, teacher_logits_CV))
        target_logprobs_C = logprobs_CV.gather(1, target_C.unsqueeze(1)).squeeze(1)
        gap_CV.neg_().add_(logprobs_CV)
        probs_CV = logprobs_CV.exp_()
        divergence_C = torch.einsum("cv,cv->c", probs_CV, gap_CV)
        ctx.save_for_backward(gap_CV.sub_(divergence_C.unsqueeze(1)).mul_(probs_CV))
        ctx.mark_non_differentiable(target_logprobs_C)
        return divergence_C, target_logprobs_C

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_C: Tensor, _: Tensor
    ) -> tuple[Tensor, None, None]:
        (gradient_CV,) = ctx.saved_tensors
        return gradient_CV * grad_C.unsqueeze(1), None, None


def _normalised(logits_CV: Tensor) -> Tensor:
    """Turn logits into log-probabilities in place."""
    logits_CV.sub_(logits_CV.amax(1, keepdim=True))
    return logits_CV.sub_(logits_CV.exp().sum(1, keepdim=True).log_())


def sampled_divergence(*, logprobs_N: Tensor, teacher_logprobs_N: Tensor) -> Tensor:
    """Compute -A log pi_theta with A = log pi_E - log pi_theta held constant, float [N], from the sampled tokens alone.

    Its gradient has D's as expectation over the sampled token. Its value has no meaning.
    """
    return (logprobs_N.detach() - teacher_logprobs_N) * logprobs_N


class StudentTokens(NamedTuple):
    """The trained tokens of a micro-batch; tensors are float [N].

    logprobs_N: of the student. rollout_logprobs_N: of the engine that sampled. weights_N: weight of the aggregation
    times the teacher's w. sequence_N: int64 [N], the completion of each token, < num_sequences.
    """

    logprobs_N: Tensor
    rollout_logprobs_N: Tensor
    weights_N: Tensor
    sequence_N: Tensor
    num_sequences: int


def distillation_loss(term_N: Tensor, divergence_N: Tensor, tokens: StudentTokens, *, denominator: float) -> LossOutput:
    """Compute sum(weights * term) / denominator, a scalar, and its metrics.

    term_N: D of each token or its `sampled_divergence`, with a gradient. divergence_N: D or its estimate, to report.
    """
    gap_N = tokens.logprobs_N.detach() - tokens.rollout_logprobs_N
    sums, maxima = mismatch(gap_N, tokens.sequence_N, tokens.num_sequences)
    sums |= {
        "loss/reverse_kl_mean": divergence_N.detach().sum(),
        "loss/surprisal_mean": -tokens.logprobs_N.detach().sum(),
    }
    return LossOutput((tokens.weights_N * term_N).sum() / denominator, sums, maxima)
