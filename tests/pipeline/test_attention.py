"""Packed = unpacked: a packed row gives every segment what the model gives it alone, with its prompt before it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PreTrainedModel

from pipeline.data.trees import Branch, Tree, micro_batch
from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel
from tests.rollout import tiny

LLAMA = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
DEEPSEEK = DeepseekV3Config.from_json_file("configs/models/tiny.json")
YARN = DeepseekV3Config(
    **json.loads(Path("configs/models/tiny.json").read_text())
    | {"max_position_embeddings": 40, "rope_scaling": tiny.YARN | {"original_max_position_embeddings": 4}}
)


def model_of(config) -> PreTrainedModel:
    torch.manual_seed(0)
    config.vocab_size = 97
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def trees() -> list[Tree]:
    """Two prompts with branches of equal and of different lengths, and a conversation between them."""
    return [
        Tree(ids(5, 0), [Branch(ids(4, 1)), Branch(ids(7, 2)), Branch(ids(4, 3))]),
        Tree(ids(9, 4), root_mask=[0, 0, 1, 1, 0, 0, 1, 1, 1]),
        Tree(ids(3, 5), [Branch(ids(1, 6)), Branch(ids(7, 7))]),
    ]


def unpacked_logprobs(model: PreTrainedModel) -> list[torch.Tensor]:
    """`transformers` alone, one plain sequence at a time."""
    result = []
    for tree in trees():
        sequences = [(tree.root_ids + branch.token_ids, len(tree.root_ids)) for branch in tree.branches]
        masks = [[t >= first for t in range(len(ids))] for ids, first in sequences]
        if tree.root_mask is not None:
            sequences, masks = [(tree.root_ids, 0)], [[bool(m) for m in tree.root_mask]]
        for (ids_T, _), mask in zip(sequences, masks, strict=True):
            logprobs = model(torch.tensor([ids_T])).logits[0].log_softmax(-1)
            result.append(torch.stack([logprobs[t - 1, ids_T[t]] for t in range(len(ids_T)) if mask[t]]))
    return result


def test_past_its_window_yarn_says_something_else() -> None:
    """Else the agreement below would prove nothing."""
    plain, stretched = (unpacked_logprobs(model_of(config)) for config in (DEEPSEEK, YARN))
    assert max((a - b).abs().max() for a, b in zip(plain, stretched, strict=True)) > 1e-3


@pytest.mark.parametrize("config", [LLAMA, DEEPSEEK, YARN], ids=["llama", "deepseek_v3", "yarn"])
def test_packed_is_unpacked(config) -> None:
    model = model_of(config)
    expected = unpacked_logprobs(model)
    sum(part.sum() for part in expected).backward()
    expected_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    row = micro_batch(trees())
    packed = LogprobModel(model, chunk_tokens=4)
    logprobs_N = packed(
        torch.from_numpy(row.token_ids_T),
        Layout(row.lengths, row.parents),
        torch.from_numpy(row.source_N),
        torch.from_numpy(row.target_N),
    )
    logprobs_N.sum().backward()

    assert row.num_sequences == len(expected) == 6
    for sequence, values in enumerate(expected):
        torch.testing.assert_close(logprobs_N[row.sequence_N == sequence], values, rtol=0, atol=5e-6)
    for name, parameter in model.named_parameters():
        if name in expected_gradients:
            torch.testing.assert_close(parameter.grad, expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name)


def test_positions_continue_the_parents() -> None:
    layout = Layout((3, 2, 3, 2), (-1, 0, 0, -1))
    assert layout.position_ids_T.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1]


def test_a_parent_must_come_before_and_be_a_root() -> None:
    with pytest.raises(ValueError, match="segment 0"):
        Layout((2, 2), (1, -1))
    with pytest.raises(ValueError, match="segment 2"):
        Layout((2, 2, 2), (-1, 0, 1))


def test_no_padding_is_laid_out() -> None:
    row = micro_batch(trees())
    assert len(row.token_ids_T) == sum(tree.num_tokens for tree in trees()) == sum(row.lengths)
