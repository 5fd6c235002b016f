"""Measure how much of a model's results is rounding, by perturbing the last bits of every layer.

Two correct programs that sum in another order differ in the last bits of each result. How far this moves the output
depends on the model: its depth, its precision, and how close its router's choices are. Here the second program is
simulated by random perturbations (stochastic arithmetic: Vignes, 1993). A bound that is a multiple of their effect
holds on every processor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def perturbed_rounding(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Perturb the output of `forward` of each module that has weights of its own, within the block. Parts of a call
    count, such as the output head's chunks.

    The perturbation is uniform, up to one unit in the last place of the output's root mean square. The same `seed`
    gives the same numbers; torch's global generators are not used.
    """
    generators: dict[torch.device, torch.Generator] = {}
    owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    replaced = [vars(module).get("forward") for module in owners]  # a router's, for one; None is the class's method
    for module in owners:
        module.forward = partial(_perturbed, generators, seed, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(owners, replaced, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _perturbed(
    generators: dict[torch.device, torch.Generator],
    seed: int,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    output: Any = forward(*args, **kwargs)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return output  # a router's tuple, whose input is already perturbed
    if output.device not in generators:
        generators[output.device] = torch.Generator(output.device).manual_seed(seed)
    noise = torch.empty(output.shape, device=output.device).uniform_(-1, 1, generator=generators[output.device])
    exact = output.detach().float()
    scale = exact.square().mean(dim=-1, keepdim=True).sqrt_() * torch.finfo(output.dtype).eps
    return (exact + noise * scale).to(output.dtype)
