"""Experts of a mixture on the CPU: `transformers`' sums with fewer passes over memory.

Beside the matrix products, the time goes into reading and writing rows of tokens. So pairs of a token and one of its
experts are sorted by expert, each expert gathers its tokens and multiplies, and one pass weights and adds the outputs
of each token. The backward pass recomputes everything but the pre-activations. Registered with `transformers` under the
name SORTED, for models whose experts have the usual form. Other experts and other devices use the default.

A pair whose expert is E, one more than there are, was dropped (pipeline.train.balancer): it sorts last and is not
computed.

Legend: T tokens, K experts a token is sent to, S pairs that are computed, sorted by expert, E experts, n tokens of one
expert, D model width, I width of an expert, F = 2 I its gate and up projections side by side.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, silu
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

SORTED = "alignyard_sorted"
_SKIPS = "skips_dropped"
EXPERT_PARALLEL_FAMILIES = ("deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe", "mixtral")
"""Model types whose experts can be sharded: their layers' outputs and gradients were compared with `transformers`'."""


def sorted_experts(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the output [T, D] of a layer's experts, with `transformers`' signature.

    hidden_states [T, D], top_k_index int64 [T, K], top_k_weights [T, K].
    """
    parameters: Any = experts
    tensors = (hidden_states, top_k_weights, parameters.gate_up_proj)
    on_cpu = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    if not (on_cpu and has_usual_form(experts)):
        module: Any = _Skipping(experts) if getattr(experts, _SKIPS, False) else experts
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    return _Experts.apply(  # pyright: ignore[reportReturnType]
        hidden_states, top_k_weights, parameters.gate_up_proj, parameters.down_proj, top_k_index
    )


def skip_dropped(model: nn.Module) -> None:
    """Let the experts of `model` expect dropped pairs."""
    for module in model.modules():
        if hasattr(module, "_apply_gate"):
            setattr(module, _SKIPS, True)


def sorted_pairs(index_TK: Tensor, num_experts: int) -> tuple[Tensor, list[int], Tensor]:
    """Sort the pairs of a token and an expert by expert.

    Returns int64 [S], the flat index of each pair that is computed; the number of pairs of each expert, [E]; and int64
    [T, K], the place of each pair among the sorted ones, S for a dropped one.

    Example: `sorted_pairs(torch.tensor([[1, 2], [0, 1]]), 2)` is [2, 0, 3], [1, 2], [[1, 3], [0, 2]].
    """
    flat = index_TK.flatten()
    counts = torch.bincount(flat, minlength=num_experts + 1).tolist()
    num_kept = len(flat) - counts.pop()
    order_S = flat.argsort(stable=True)[:num_kept]
    place_TK = torch.full_like(flat, num_kept).scatter_(0, order_S, torch.arange(num_kept, device=flat.device))
    return order_S, counts, place_TK.view_as(index_TK)


def has_usual_form(experts: Any) -> bool:
    """Return True for gate and up projections side by side, silu, no bias, and all experts in this process."""
    plain = experts.has_gate and experts.is_concatenated and not (experts.has_bias or experts.is_transposed)
    default_gate = type(experts)._apply_gate.__module__ == grouped_mm_experts_forward.__module__
    usual_activation = isinstance(getattr(experts, "act_fn", None), nn.SiLU | SiLUActivation)
    return plain and default_gate and usual_activation and not experts._is_expert_parallel


def _rows(like: Tensor, num_rows: int, width: int) -> Tensor:
    """Return uninitialised rows, and one of zeros after them, the place of dropped pairs."""
    rows = like.new_empty(num_rows + 1, width)
    rows[num_rows] = 0
    return rows


class _Skipping:
    """Experts as `transformers` sees them where pairs were dropped: as if other processes had their experts."""

    _is_expert_parallel = True

    def __init__(self, experts: nn.Module) -> None:
        self._experts = experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


class _Experts(torch.autograd.Function):
    """out[t] = sum_k weight[t, k] down(silu(gate(x)) * up(x)) with the matrices of expert index[t, k]."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_TK: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor, index_TK: Tensor
    ) -> Tensor:
        num_experts, width_F, width_D = gate_up_EFD.shape
        order_S, counts, place_TK = sorted_pairs(index_TK, num_experts)
        token_S = order_S // index_TK.shape[1]
        hidden_SF, output_SD = hidden_TD.new_empty(len(order_S), width_F), _rows(hidden_TD, len(order_S), width_D)
        pairs = (values.split(counts) for values in (token_S, hidden_SF, output_SD[:-1]))
        weights = (gate_up_EFD.mT.unbind(), down_EDI.mT.unbind())
        for token_n, hidden_nF, output_nD, gate_up_DF, down_ID in zip(*pairs, *weights, strict=True):
            x_nD = hidden_TD.index_select(0, token_n)
            gate_nI, up_nI = torch.mm(x_nD, gate_up_DF, out=hidden_nF).chunk(2, dim=1)
            torch.mm(silu(gate_nI).mul_(up_nI), down_ID, out=output_nD)
        ctx.save_for_backward(hidden_TD, weight_TK, gate_up_EFD, down_EDI, order_S, token_S, place_TK, hidden_SF)
        ctx.counts = counts
        return embedding_bag(place_TK, output_SD, mode="sum", per_sample_weights=weight_TK)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_TD: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_TK, gate_up_EFD, down_EDI, order_S, token_S, place_TK, hidden_SF = ctx.saved_tensors
        weight_S1 = weight_TK.flatten()[order_S].unsqueeze(1)
        grad_weight_S1, grad_hidden_SD = (_rows(hidden_TD, len(order_S), width) for width in (1, hidden_TD.shape[1]))
        grad_weight_S = grad_weight_S1.flatten()
        grad_gate_up_EFD, grad_down_EDI = torch.empty_like(gate_up_EFD), torch.empty_like(down_EDI)
        by_pair = (token_S, weight_S1, hidden_SF, grad_weight_S[:-1], grad_hidden_SD[:-1])
        by_expert = (gate_up_EFD, down_EDI, grad_gate_up_EFD, grad_down_EDI)
        pairs = zip(*(values.split(ctx.counts) for values in by_pair), strict=True)
        for pair, expert in zip(pairs, zip(*map(torch.unbind, by_expert), strict=True), strict=True):
            token_n, weight_n1, hidden_nF, grad_weight_n, grad_hidden_nD = pair
            gate_up_FD, down_DI, grad_gate_up_FD, grad_down_DI = expert
            gate_nI, up_nI = hidden_nF.chunk(2, dim=1)
            grad_nD = grad_TD.index_select(0, token_n)
            active_nI = silu(gate_nI)
            inner_nI = active_nI * up_nI
            grad_inner_nI = grad_nD @ down_DI
            torch.linalg.vecdot(grad_inner_nI, inner_nI, out=grad_weight_n)
            torch.mm(grad_nD.T, inner_nI.mul_(weight_n1), out=grad_down_DI)
            grad_inner_nI.mul_(weight_n1)
            grad_nF = torch.empty_like(hidden_nF)
            grad_gate_nI, grad_up_nI = grad_nF.chunk(2, dim=1)
            torch.mul(grad_inner_nI, active_nI, out=grad_up_nI)
            torch.ops.aten.silu_backward(grad_inner_nI.mul_(up_nI), gate_nI, grad_input=grad_gate_nI)
            torch.mm(grad_nF.T, hidden_TD.index_select(0, token_n), out=grad_gate_up_FD)
            torch.mm(grad_nF, gate_up_FD, out=grad_hidden_nD)
        grad_hidden_TD = embedding_bag(place_TK, grad_hidden_SD, mode="sum")
        return grad_hidden_TD, grad_weight_S[place_TK], grad_gate_up_EFD, grad_down_EDI, None


ALL_EXPERTS_FUNCTIONS.register(SORTED, sorted_experts)
