"""Measure how much of a model's results is rounding, by perturbing the last bits of every layer.

Two correct programs that sum in another order differ in the last bits of each result. How far this moves the output
depends on the model: its depth, its precision, and how close its router's choices are. Here the second program is
simulated by random perturbations (stochastic arithmetic: Vignes, 1993). A bound that is a multiple of their effect
holds on every processor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def perturbed_rounding(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Perturb the output of each module that has weights of its own, within the block.

    The perturbation is uniform, up to one unit in the last place of the output's root mean square. The same `seed`
    gives the same numbers; torch's global generators are not used.
    """
    generators: dict[torch.device, torch.Generator] = {}
    owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    hooks = [module.register_forward_hook(partial(_perturb, generators, seed)) for module in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _perturb(
    generators: dict[torch.device, torch.Generator], seed: int, _module: nn.Module, _args: Any, output: Any
) -> Tensor | None:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None  # a router's tuple, whose input is already perturbed
    if output.device not in generators:
        generators[output.device] = torch.Generator(output.device).manual_seed(seed)
    noise = torch.empty(output.shape, device=output.device).uniform_(-1, 1, generator=generators[output.device])
    exact = output.detach().float()
    scale = exact.square().mean(dim=-1, keepdim=True).sqrt_() * torch.finfo(output.dtype).eps
    return (exact + noise * scale).to(output.dtype)
