"""Attention by lengths, as off the CPU: no mask is made, and values and gradients are those of the CPU's form.

The kernels need a GPU. In their place stands what they document: a loop over sequences that refuses what they refuse.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MistralConfig

from pipeline.data.trees import Branch, Tree, micro_batch
from pipeline.models import attention
from pipeline.models.attention import Layout, packed_attention
from pipeline.models.logprobs import LogprobModel

LAYOUT = Layout((6, 4, 9, 4, 11, 3, 0, 1, 7), (-1, 0, 0, 0, -1, -1, 5, 5, 5))
"""A prompt with branches of equal and of other lengths, a conversation, and a prompt with an empty branch."""
HEADS = {"grouped": (4, 2, 16, 16), "one key": (4, 1, 8, 8), "mla": (3, 3, 24, 16)}
"""H, G, D, V."""


def loop(
    query_THD: Tensor, key_RHD: Tensor, value_RHV: Tensor, starts_q: Tensor, starts_k: Tensor, **kind: Any
) -> Tensor:
    """One sequence after the other: query i of n sees the keys up to i + (number of keys) - n, at most `window`."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True):
        q_i, k_j = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0), torch.arange(k1 - k0)[None]
        visible = (k_j <= q_i) & (k_j > q_i - kind["window"])
        scores = torch.einsum("ihd,jhd->hij", query_THD[q0:q1], key_RHD[k0:k1]) * kind["scale"]
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hij,jhv->ihv", weights, value_RHV[k0:k1]))
    return torch.cat(outputs)


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *lengths: Any,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`: half precision, one width, a multiple of 8; grouped keys as they are."""
    group = query.shape[1] // key.shape[1]
    assert query.dtype != torch.float32 and query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and (group == 1 or enable_gqa)
    assert all(x.stride(-1) == 1 for x in (query, key, value)) and window_size[1] == 0
    window = window_size[0] + 1 if window_size[0] >= 0 else 10**9
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    return loop(query, key, value, *lengths[:2], window=window, scale=scale)


def efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: None, starts_q: Tensor, starts_k: Tensor, *rest: Any, **kind: Any
) -> tuple[Tensor, ...]:
    """`aten._efficient_attention_forward`: a key for each query head; 2 is causal from the lower right corner."""
    _, _, dropout, mask_type, with_logsumexp = rest
    assert (bias, dropout, mask_type) == (None, 0.0, 2) and query.shape[2] == key.shape[2] == value.shape[2]
    assert with_logsumexp
    window, unused = kind["window_size"] or 10**9, torch.empty(0)
    out = loop(query[0], key[0], value[0], starts_q, starts_k, window=window, scale=kind["scale"])[None]
    return out, unused, unused, unused


def efficient_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kind: Any) -> list[Any]:
    """`aten._efficient_attention_backward`, which sees the window only if it is told."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        out, *_ = efficient(*leaves, rest[0], *rest[2:6], 0.0, rest[10], True, **kind)
        return [*torch.autograd.grad(out, leaves, grad), None]


@pytest.fixture
def by_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention._ATTENTION, "cpu", attention._by_lengths)
    monkeypatch.setattr(attention, "varlen_attn", flash)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", efficient)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_backward", efficient_backward)


def attend(tensors: list[Tensor], window: int | None) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, _ = packed_attention(nn.Module(), *leaves, None, scaling=0.3, layout=LAYOUT, sliding_window=window)
    assert out.shape == (1, sum(LAYOUT.lengths), tensors[0].shape[1], tensors[2].shape[3])
    out.square().sum().backward()
    return [out, *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["flash", "efficient"])
@pytest.mark.parametrize("window", [None, 1, 5, 8])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_all_forms_agree(
    heads: tuple[int, int, int, int], window: int | None, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, width, value_width = heads
    shapes = ((queries, width), (keys, width), (keys, value_width))
    tensors = [torch.randn(1, n, sum(LAYOUT.lengths), w, dtype=dtype, generator=generator) for n, w in shapes]
    expected = attend(tensors, window)
    request.getfixturevalue("by_lengths")
    for found, values in zip(attend(tensors, window), expected, strict=True):
        torch.testing.assert_close(found, values, rtol=0, atol=1e-5)


SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "grouped": LlamaConfig(**SMALL, num_key_value_heads=2),
    "windows": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=64),
    "mla": DeepseekV3Config(
        **SMALL, num_key_value_heads=4, first_k_dense_replace=2, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        kv_lora_rank=16, q_lora_rank=16,
    ),
}  # fmt: skip


class Sizes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._efficient_attention_backward.default:  # torch 2.13's meta kernel lacks an argument
            return [*(torch.empty_like(x) for x in args[1:4]), None]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.shapes.add(tuple(value.shape))
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_mask_and_no_scores_are_made_off_the_cpu(
    config: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, forward and backward, no tensor has queries and keys: two sides of 300 and more."""
    # transformers reads the position ids, which have no values here
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    row = micro_batch([Tree([1] * 700, [Branch([2] * 300), Branch([3] * 300), Branch([4] * 310)])])
    model = LogprobModel(AutoModelForCausalLM.from_config(config, dtype=dtype)).to("meta")
    tensors = (torch.from_numpy(x).to("meta") for x in (row.token_ids_T, row.source_N, row.target_N))
    token_ids_T, source_N, target_N = tensors
    with Sizes() as sizes:
        model(token_ids_T, Layout(row.lengths, row.parents), source_N, target_N).sum().backward()
    assert len(sizes.shapes) > 20
    assert not {shape for shape in sizes.shapes if sum(side >= 300 for side in shape) > 1}
