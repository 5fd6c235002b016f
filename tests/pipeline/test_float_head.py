"""A bfloat16 model's logits are float32, as the engines' are; its gradients stay products of bfloat16."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel, use_float_head
from pipeline.models.packed import hidden_states

IDS_T = torch.arange(3, 43)
LAYOUT = Layout((40,), (-1,))
SOURCE_N, TARGET_N = torch.arange(39), IDS_T[1:]


def llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)  # logits of 10 and more, as of a trained model
    return model


def exact(model: LlamaForCausalLM) -> Tensor:
    """Log-probabilities from the model's own hidden states and a head in float64."""
    hidden_TD = hidden_states(model, IDS_T, LAYOUT)[SOURCE_N].double()
    logprobs_NV = (hidden_TD @ model.get_output_embeddings().weight.double().t()).log_softmax(-1)
    return logprobs_NV.gather(1, TARGET_N[:, None])[:, 0]


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_not_rounded_to_bfloat16(tied: bool) -> None:
    model = llama(tied=tied)
    with torch.no_grad():
        logprobs_N = LogprobModel(model)(IDS_T, LAYOUT, SOURCE_N, TARGET_N)
        assert (logprobs_N - exact(model)).abs().max() < 1e-4  # 3e-2 with logits in bfloat16


def test_the_gradient_is_that_of_the_head() -> None:
    gradients: list[list[Tensor]] = []
    for forward in (True, False):
        model = llama(tied=True)
        packed = LogprobModel(model)
        if not forward:
            model.get_output_embeddings().forward = nn.Linear.forward.__get__(model.get_output_embeddings())
        packed(IDS_T, LAYOUT, SOURCE_N, TARGET_N).sum().backward()
        gradients.append(
            [parameter.grad.float().flatten() for parameter in model.parameters() if parameter.grad is not None]
        )
    assert len(gradients[0]) == len(gradients[1]) == len(list(model.parameters()))
    assert all(cosine_similarity(a, b, dim=0) > 0.999 for a, b in zip(*gradients, strict=True))


def test_a_bias_is_added_and_float32_is_left_alone() -> None:
    model = llama(tied=False)
    head = model.lm_head = nn.Linear(64, 97, dtype=torch.bfloat16)
    hidden_TD = torch.randn(5, 64).bfloat16()
    use_float_head(model)
    assert torch.allclose(
        head(hidden_TD), nn.functional.linear(hidden_TD.float(), head.weight.float(), head.bias.float())
    )
    assert head(hidden_TD).dtype == torch.float32
    whole = llama(tied=False).float()
    use_float_head(whole)
    assert "forward" not in vars(whole.lm_head)
