"""Low-rank adapters of linear layers: W' = W + s B A with s = alpha / r, of which A and B learn (arXiv:2106.09685).

A layer multiplies by W' itself, rounded to the precision of W, instead of adding B (A x) to W x as the paper's code and
`peft` do. So the policy's weights are those that a sync sends and an export holds, to the bit, in bfloat16 too. W' of
one layer exists at a time, and no gradient of W is computed (docs/decisions/0024-adapters-are-merged.md).

Legend: n tokens, K and N widths of a layer's input and output, r rank.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import PreTrainedModel

from configs.lora import LoraConfig

_IN_DECODER = re.compile(r"\.\d+\.")
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")
A, B = "lora_A", "lora_B"
"""Names of an adapter's two parameters, [r, K] and [N, r], in the layer whose weight they adapt."""


def adapted_layers(model: PreTrainedModel, lora: LoraConfig) -> dict[str, nn.Linear]:
    """Return the layers of `model` that get adapters, by name. Raises ValueError for a target that names none."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _IN_DECODER.search(name) and not _ROUTER.search(name)
    }
    if lora.targets == "all-linear":
        return linears
    chosen: dict[str, nn.Linear] = {}
    for target in lora.targets:
        layers = {name: module for name, module in linears.items() if f".{name}".endswith(f".{target}")}
        if not layers:
            ends = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(
                f"lora.targets: '{target}' names no linear layer of {type(model).__name__}'s decoder; choose from "
                f"{', '.join(ends)} (routers and routed experts have no adapters)"
            )
        chosen |= layers
    return chosen


def add_adapters(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Freeze `model` and give its layers adapters in place: A uniform within 1 / sqrt(K) as in `peft`, B zero.

    Raises ValueError for a target that names no layer.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for module in adapted_layers(model, lora).values():
        layer: Any = module
        width_N, width_K = layer.weight.shape
        a_rK = torch.empty(lora.rank, width_K).uniform_(-1, 1, generator=generator) / math.sqrt(width_K)
        layer.lora_A = nn.Parameter(a_rK.to(layer.weight.dtype))
        layer.lora_B = nn.Parameter(torch.zeros(width_N, lora.rank, dtype=layer.weight.dtype))
        layer.lora_scale = lora.alpha / lora.rank
        layer.forward = MethodType(_forward, layer)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let the layers of `model` compute with W alone within the block."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_scale")]
    scales = [layer.lora_scale for layer in layers]
    for layer in layers:
        layer.lora_scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.lora_scale = scale


def merge_adapters(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the adapters in `tensors`, named as in `model`, by their sum with the weight that they adapt."""
    merged = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in (A, B)}
    for stem in (name.removesuffix(A) for name in tensors if name.endswith(f".{A}")):
        layer: Any = model.get_submodule(stem.removesuffix("."))
        weight = stem + "weight"
        merged[weight] = merged_weight(tensors[weight], tensors[stem + A], tensors[stem + B], layer.lora_scale)
    return merged


def merged_weight(weight_NK: Tensor, a_rK: Tensor, b_Nr: Tensor, scale: float) -> Tensor:
    """Return W' = W + s B A, [N, K], summed in float32 and rounded to the precision of W."""
    return torch.addmm(weight_NK.float(), b_Nr.float(), a_rK.float(), alpha=scale).to(weight_NK.dtype)


class LoraProduct(torch.autograd.Function):
    """x W'^T + bias, with gradients of x, A and B: dA = s (G B)^T x and dB = s G^T (x A^T) for the gradient G [n, N].

    They are those of A and B in W' without its rounding. W' is computed again for the gradient of x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_NK: Tensor, a_rK: Tensor, b_Nr: Tensor, bias_N: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight_NK, a_rK, b_Nr)
        ctx.scale = scale
        return linear(x, merged_weight(weight_NK, a_rK, b_Nr, scale), bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_NK, a_rK, b_Nr = ctx.saved_tensors
        grad_x = grad @ merged_weight(weight_NK, a_rK, b_Nr, ctx.scale) if ctx.needs_input_grad[0] else None
        grad_nN, x_nK = grad.flatten(0, -2), x.flatten(0, -2)
        grad_a_rK = ctx.scale * ((grad_nN @ b_Nr).t() @ x_nK)
        grad_b_Nr = ctx.scale * (grad_nN.t() @ (x_nK @ a_rK.t()))
        return grad_x, None, grad_a_rK, grad_b_Nr, None, None


def _forward(layer: Any, x: Tensor) -> Tensor:
    if not layer.lora_scale:
        return linear(x, layer.weight, layer.bias)
    return LoraProduct.apply(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, layer.lora_scale)  # pyright: ignore
