"""How much of a model's results is rounding: the same pass, with the last bits of every layer drawn anew.

Two correct programs that multiply in another order, on another processor or with other kernels, differ in the last bits
of each result, and how far that moves the end result depends on the model: its depth, its precision, how near its
router's choices are. Here the second program is simulated, so the scale can be measured where only one is at hand
(stochastic arithmetic: Vignes, 1993). A bound that is a multiple of it holds on every processor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def rounded_anew(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Within the block, perturb the output of each module with weights of its own by up to one unit in the last place
    of the output's root mean square. The same `seed` gives the same numbers; no other generator is touched."""
    generators: dict[torch.device, torch.Generator] = {}
    owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    hooks = [module.register_forward_hook(partial(_perturb, generators, seed)) for module in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _perturb(
    generators: dict[torch.device, torch.Generator], seed: int, _module: nn.Module, _args: Any, answer: Any
) -> Tensor | None:
    if not isinstance(answer, Tensor) or not answer.is_floating_point():
        return None  # a router's tuple: its input is perturbed already
    if answer.device not in generators:
        generators[answer.device] = torch.Generator(answer.device).manual_seed(seed)
    noise = torch.empty(answer.shape, device=answer.device).uniform_(-1, 1, generator=generators[answer.device])
    exact = answer.detach().float()
    scale = exact.square().mean(dim=-1, keepdim=True).sqrt_() * torch.finfo(answer.dtype).eps
    return (exact + noise * scale).to(answer.dtype)
