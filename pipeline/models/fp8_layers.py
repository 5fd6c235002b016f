"""Linear layers and experts whose three products run in FP8 (DeepSeek-V3, arXiv:2412.19437, 3.3.1 to 3.3.3).

Forward pass (Fprop), gradient of the input (Dgrad) and gradient of the weight (Wgrad) multiply E4M3 numbers. Weights
keep their training precision and are quantised at every use. Inputs are stored in FP8 for Wgrad, which quantises them
again along the tokens. Only modules whose name matches LINEAR change: embeddings, head, norms, router, the attention
itself and the activation function keep the model's precision.

Scales are powers of two as in the paper: for inputs of the projection after the attention and of the experts' up
projection, and for gradients of the experts' down projection. The paper's E5M6 format of the first is not reproduced.

Legend: n tokens, K and N widths of a layer's input and output, D model width, I width of an expert, F = 2 I, E experts,
T tokens, k experts a token is sent to, S pairs sorted by expert.
"""

import re
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, silu
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pipeline.models.experts import has_usual_form, sorted_pairs
from pipeline.models.fp8 import BLOCK, TILE, Quantised, dequantise, matmul, quantise

FP8 = "alignyard_fp8"

LINEAR = re.compile(r"(?<!\beh)_proj(_with_mqa)?$|\.w[123]$")
"""Names of layers that use FP8: projections of attention and MLPs, but not `eh_proj` of MTP modules."""
_AFTER_ATTENTION = re.compile(r"\b(o|out)_proj$")


def use_fp8(model: PreTrainedModel) -> None:
    """Let the linear layers and experts of `model` multiply in FP8.

    Raises ValueError if no layer matches, and for experts of another form than gate, up and down with silu.
    """
    linears = {
        name: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear) and LINEAR.search(name)
    }
    experts: dict[str, Any] = {name: m for name, m in model.named_modules() if hasattr(m, "_apply_gate")}
    for name, module in experts.items():
        if not has_usual_form(module):
            raise ValueError(f"trainer.fp8: {name} ({type(module).__name__}) is not of the usual form; leave fp8 false")
    if not linears:
        raise ValueError(
            f"trainer.fp8 has no effect on {type(model).__name__}, which has no *_proj layers; leave it false"
        )
    for name, module in linears.items():
        forward = _forward_after_attention if _AFTER_ATTENTION.search(name) else _forward
        module.forward = MethodType(forward, module)
    if experts:
        model.set_experts_implementation(FP8)


def fp8_linear(x: Tensor, weight_NK: Tensor, *, power_of_two: bool = False) -> Tensor:
    """Compute x @ weight^T, [..., N], for x [..., K], in x's dtype; `power_of_two` concerns the scales of x."""
    return _Linear.apply(x.flatten(0, -2), weight_NK, power_of_two).unflatten(0, x.shape[:-1])  # pyright: ignore


def fp8_experts(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the output [T, D] of a layer's experts, with `transformers`' signature.

    hidden_states [T, D], top_k_index int64 [T, k], top_k_weights [T, k].
    """
    parameters: Any = experts
    order_S, counts, place_Tk = sorted_pairs(top_k_index, len(parameters.down_proj))
    x_SD = hidden_states[order_S // top_k_index.shape[1]]
    output_SD = sorted_experts_fp8(x_SD, [parameters.gate_up_proj], parameters.down_proj, counts)
    output_TkD = pad(output_SD, (0, 0, 0, 1))[place_Tk]  # zeros for dropped pairs
    return (output_TkD * top_k_weights.unsqueeze(2)).sum(1).to(hidden_states.dtype)


def sorted_experts_fp8(x_SD: Tensor, gate_up: Sequence[Tensor], down_EDI: Tensor, counts: list[int]) -> Tensor:
    """Compute down(silu(gate(x)) * up(x)), [S, D]; the first counts[0] rows are expert 0's, and so on.

    gate_up: the weights of gate and up, [E, F, D] or two of [E, I, D].
    """
    return _Experts.apply(x_SD, counts, down_EDI, *gate_up)  # pyright: ignore[reportReturnType]


def use_fp8_in_sharded_experts(model: nn.Module) -> None:
    """Let the experts of DeepSpeed's AutoEP multiply in FP8."""
    for module in model.modules():
        if type(module).__name__ == "GroupedExperts":
            module.forward = MethodType(_forward_sharded, module)


def _forward_sharded(experts: Any, x_SD: Tensor, counts_E: Tensor) -> Tensor:
    counts = counts_E.tolist()
    padding_SD = x_SD.new_zeros(len(x_SD) - sum(counts), x_SD.shape[1])
    out_SD = sorted_experts_fp8(x_SD[: sum(counts)], [experts.w1, experts.w3], experts.w2, counts)
    return torch.cat([out_SD, padding_SD])


def _forward(module: nn.Linear, x: Tensor, power_of_two: bool = False) -> Tensor:
    out = fp8_linear(x, module.weight, power_of_two=power_of_two)
    return out if module.bias is None else out + module.bias


def _forward_after_attention(module: nn.Linear, x: Tensor) -> Tensor:
    return _forward(module, x, power_of_two=True)


def _wgrad(grad_nN: Tensor, x_nK: Tensor, *, grad_power: bool = False, x_power: bool = False) -> Tensor:
    """Compute the gradient of a weight, float32 [N, K], summed over tokens in tiles of 128.

    It stays float32 for weights in bfloat16 whose `grad_dtype` is (pipeline.train.build).
    """
    grad, x = quantise(grad_nN.T, TILE, power_of_two=grad_power), quantise(x_nK.T, TILE, power_of_two=x_power)
    return matmul(grad, x, torch.float32)


class _Linear(torch.autograd.Function):
    """out = x @ weight^T."""

    @staticmethod
    def forward(ctx: Any, x_nK: Tensor, weight_NK: Tensor, power_of_two: bool) -> Tensor:
        x = quantise(x_nK, TILE, power_of_two=power_of_two)
        ctx.save_for_backward(x.data_MK, x.scale, weight_NK)
        ctx.power_of_two = power_of_two
        return matmul(x, quantise(weight_NK, BLOCK)).to(x_nK.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_nN: Tensor
    ) -> tuple[Tensor | None, ...]:
        data_nK, scale, weight_NK = ctx.saved_tensors
        grad_x_nK = matmul(quantise(grad_nN, TILE), quantise(weight_NK, BLOCK).transposed)
        x_nK = dequantise(Quantised(data_nK, scale, TILE))
        grad_weight_NK = _wgrad(grad_nN, x_nK, x_power=ctx.power_of_two)
        return grad_x_nK.to(grad_nN.dtype), grad_weight_NK, None


class _Experts(torch.autograd.Function):
    """out = down(silu(gate(x)) * up(x)), for the rows of one expert after the other.

    x and the inputs of the activation are stored in FP8; the backward pass recomputes its output. All experts are one
    function, because torch casts gradients to the type of a part of a weight, but not to that of a whole parameter.
    """

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, counts: list[int], down_EDI: Tensor, *gate_up: Tensor) -> Tensor:
        outputs: list[Tensor] = [x_SD[:0]]
        saved: list[Tensor] = []
        for expert, x_nD in _work(x_SD, counts):
            x = quantise(x_nD, TILE, power_of_two=True)
            hidden_nF = matmul(x, quantise(_joined(gate_up, expert), BLOCK))
            gate_nI, up_nI = hidden_nF.chunk(2, dim=1)
            hidden = quantise(hidden_nF, TILE)
            saved += [x.data_MK, x.scale, hidden.data_MK, hidden.scale]
            out_nD = matmul(quantise(silu(gate_nI) * up_nI, TILE), quantise(down_EDI[expert], BLOCK))
            outputs.append(out_nD.to(x_SD.dtype))
        ctx.save_for_backward(down_EDI, *gate_up, *saved)
        ctx.counts, ctx.num_weights = counts, len(gate_up)
        return torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_SD: Tensor
    ) -> tuple[Tensor | None, ...]:
        down_EDI, *rest = ctx.saved_tensors
        gate_up, saved = rest[: ctx.num_weights], rest[ctx.num_weights :]
        grad_down_EDI = torch.zeros_like(down_EDI, dtype=torch.float32)
        grad_gate_up = [torch.zeros_like(weight, dtype=torch.float32) for weight in gate_up]
        grad_x: list[Tensor] = [grad_SD[:0]]
        for (expert, grad_nD), i in zip(_work(grad_SD, ctx.counts), range(0, len(saved), 4), strict=True):
            x_data, x_scale, hidden_data, hidden_scale = saved[i : i + 4]
            grad = quantise(grad_nD, TILE, power_of_two=True)  # the form that is sent to the rank of the expert
            gate_nI, up_nI = dequantise(Quantised(hidden_data, hidden_scale, TILE)).chunk(2, dim=1)
            active_nI = silu(gate_nI)
            grad_inner_nI = matmul(grad, quantise(down_EDI[expert], BLOCK).transposed).float()
            grad_down_EDI[expert] = _wgrad(dequantise(grad), active_nI * up_nI, grad_power=True)
            grad_gate_nI = torch.ops.aten.silu_backward(grad_inner_nI * up_nI, gate_nI)
            grad_nF = torch.cat([grad_gate_nI, grad_inner_nI * active_nI], dim=1)
            grad_x_nD = matmul(quantise(grad_nF, TILE), quantise(_joined(gate_up, expert), BLOCK).transposed)
            grad_x.append(grad_x_nD.to(grad_SD.dtype))
            grad_FD = _wgrad(grad_nF, dequantise(Quantised(x_data, x_scale, TILE)), x_power=True)
            for weight_EXD, part_XD in zip(grad_gate_up, grad_FD.chunk(len(gate_up)), strict=True):
                weight_EXD[expert] = part_XD
        return torch.cat(grad_x), None, grad_down_EDI, *grad_gate_up


def _work(rows_SD: Tensor, counts: list[int]) -> list[tuple[int, Tensor]]:
    """Return (expert, its rows) for each expert that has any."""
    return [(expert, rows_nD) for expert, rows_nD in enumerate(rows_SD.split(counts)) if len(rows_nD)]


def _joined(gate_up: Sequence[Tensor], expert: int) -> Tensor:
    return torch.cat([weight_EXD[expert] for weight_EXD in gate_up])


ALL_EXPERTS_FUNCTIONS.register(FP8, fp8_experts)
