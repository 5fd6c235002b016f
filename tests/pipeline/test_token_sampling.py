"""Log-probabilities of the distribution that tokens were sampled from: at a temperature, and over the kept tokens."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.data.trees import Branch, Tree, micro_batch
from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel, TargetLogprobs, TokenSampling
from tests.pipeline.small_models import small_config


def target_logprobs(
    logits_CV: Tensor, target_C: Tensor, temperature_C: Tensor | None = None, kept_CK: Tensor | None = None
) -> Tensor:
    """On a copy, since the memory of the logits is overwritten."""
    values_C: Any = TargetLogprobs.apply(logits_CV * 1.0, target_C, temperature_C, kept_CK)
    return values_C


def dense_logprobs(
    logits_CV: Tensor, target_C: Tensor, temperature_C: Tensor | None = None, kept_CK: Tensor | None = None
) -> Tensor:
    """Log-probabilities of torch's own softmax over the vocabulary, minus infinity for tokens that are not kept."""
    if temperature_C is not None:
        logits_CV = logits_CV / temperature_C[:, None]
    if kept_CK is not None:
        kept_CV = torch.zeros_like(logits_CV, dtype=torch.bool)
        for kept_V, kept_K in zip(kept_CV, kept_CK, strict=True):
            kept_V[kept_K[kept_K >= 0]] = True
        logits_CV = logits_CV.masked_fill(~kept_CV, -torch.inf)
    return logits_CV.log_softmax(1).gather(1, target_C[:, None]).squeeze(1)


def test_logprobs_of_a_token_by_hand() -> None:
    """Odds of 1 : 2 : 4. At temperature 1/2 they are 1 : 4 : 16, so the second has 4/21; among the last two kept tokens
    it has 4/20, and 2/6 at temperature 1."""
    logits_CV, second = torch.tensor([[1.0, 2.0, 4.0]]).log(), torch.tensor([1])
    half, kept = torch.tensor([0.5]), torch.tensor([[2, 1, -1]])
    values = [target_logprobs(logits_CV, second, *x) for x in ((), (half,), (half, kept), (None, kept))]
    assert torch.cat(values).exp().tolist() == pytest.approx([2 / 7, 4 / 21, 4 / 20, 2 / 6])


@pytest.mark.parametrize("temperature", [None, 0.7, 1.3])
@pytest.mark.parametrize("num_kept", [None, 5, 1])
def test_values_and_gradients_are_those_of_a_dense_softmax(temperature: float | None, num_kept: int | None) -> None:
    random = torch.Generator().manual_seed(0)
    logits_CV = torch.randn(6, 11, generator=random, requires_grad=True)
    kept_CK = torch.stack([torch.randperm(11, generator=random) for _ in range(6)])[:, :num_kept]
    target_C = kept_CK[:, 0].clone()
    if num_kept is None:
        options: dict[str, Tensor] = {}
    else:
        kept_CK[::2, 3:] = -1  # kept sets of different sizes
        options = {"kept_CK": kept_CK}
    if temperature is not None:
        options["temperature_C"] = torch.full((6,), temperature)
    weights_C = torch.randn(6, generator=random)
    values, gradients = zip(
        *(
            (values_C, torch.autograd.grad((values_C * weights_C).sum(), logits_CV)[0])
            for values_C in (f(logits_CV, target_C, **options) for f in (target_logprobs, dense_logprobs))
        ),
        strict=True,
    )
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)
    assert num_kept is None or not gradients[0][0][~torch.isin(torch.arange(11), kept_CK[0])].any()


def test_chunks_and_a_model_give_the_dense_gradient() -> None:
    """The gradient of all weights, in chunks of 3 tokens, is that of a softmax over the model's own logits."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(small_config("llama"), dtype=torch.float32)
    row = micro_batch([Tree([5, 6, 7], [Branch([9, 8, 7, 6]), Branch([10, 11, 12, 13, 14])])])
    token_ids_T, source_N, target_N = (torch.from_numpy(x) for x in (row.token_ids_T, row.source_N, row.target_N))
    kept_NK = torch.stack([torch.randperm(264)[:7] for _ in target_N])
    kept_NK[:, 0] = target_N
    kept_NK[1:, 1:][kept_NK[1:, 1:] == target_N[1:, None]] = -1  # a token is kept once
    kept_NK[0, 1:] = -1
    temperature_N = torch.linspace(0.5, 1.5, len(target_N))
    plain = deepcopy(causal_lm)
    model = LogprobModel(causal_lm, chunk_tokens=3)
    layout = Layout(row.lengths, row.parents)
    values_N = model(token_ids_T, layout, source_N, target_N, sampling=TokenSampling(temperature_N, kept_NK))
    values_N.sum().backward()
    sequences = [([5, 6, 7, 9, 8, 7, 6], 4), ([5, 6, 7, 10, 11, 12, 13, 14], 5)]
    logits = [plain(torch.tensor([ids]), use_cache=False).logits[0, -last - 1 : -1] for ids, last in sequences]
    expected_N = dense_logprobs(torch.cat(logits), target_N, temperature_N, kept_NK)
    expected_N.sum().backward()
    torch.testing.assert_close(values_N, expected_N, atol=1e-4, rtol=1e-4)
    for ours, parameter in zip(causal_lm.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, parameter.grad, atol=1e-4, rtol=1e-3)
    assert values_N[0].item() == 0.0  # a single kept token is certain
