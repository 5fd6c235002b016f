"""Small stand-ins for a model on the meta device, on which a start-up check can compute.

What is checked is a family's code and a configuration, which don't depend on the values of weights.
"""

from collections.abc import Iterator
from copy import copy, deepcopy
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

M = TypeVar("M", bound=nn.Module)
_SMALL = 2**20
"""Elements of a parameter up to which it begins with its family's initialisation."""
_NOISE = 1_000_003
"""Random numbers that are repeated in every parameter; a prime, so that no two experts get the same."""


def stand_in(module: M) -> M:
    """Return a copy of a small module on the CPU that has random weights, its buffers zero, and its class's forward."""
    generator = torch.Generator().manual_seed(0)
    probe = copy(module)
    probe.__dict__.pop("forward", None)
    probe._parameters = {
        name: weight
        if weight is None
        else nn.Parameter(torch.randn(weight.shape, generator=generator).to(weight.dtype))
        for name, weight in module._parameters.items()
    }
    probe._buffers = {
        name: buffer if buffer is None else torch.zeros_like(buffer, device="cpu")
        for name, buffer in module._buffers.items()
    }
    return probe


def cut_down(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the first decoder layer of each kind of `model`, and random weights, on the CPU.

    `model` is on the meta device and stays as it is. Layers are of one kind if they differ in their number only. A
    family whose layers are not found keeps all.

    Example: DeepSeek-V3 becomes a model of two layers, one with experts.
    """
    small = deepcopy(model)
    config: Any = small.config.get_text_config()
    for name, layers in small.base_model.named_modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == config.num_hidden_layers:
            _keep_kinds(small, name, layers, config)
            break
    small.to_empty(device="cpu")
    small.tie_weights()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        _fill_at_random(small)
    return small.eval()


def _keep_kinds(model: PreTrainedModel, name: str, layers: nn.ModuleList, config: Any) -> None:
    by_layer = {
        key: value
        for key, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == len(layers)
    }
    kinds: dict[Any, int] = {}
    for number, layer in enumerate(layers):
        kinds.setdefault((*_kind(layer), *(str(value[number]) for value in by_layer.values())), number)
    kept = list(kinds.values())
    parent, _, leaf = name.rpartition(".")
    setattr(model.base_model.get_submodule(parent), leaf, nn.ModuleList(layers[number] for number in kept))
    config.num_hidden_layers = len(kept)
    for key, value in by_layer.items():
        setattr(config, key, [value[number] for number in kept])


def _kind(layer: nn.Module) -> Iterator[str]:
    """Describe a layer's modules, their settings and their weights, but for its number."""
    yield repr(layer)
    for module in layer.modules():
        settings = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        settings.pop("layer_idx", None)
        yield str(sorted(settings.items()))
        yield str([(name, tuple(weight.shape)) for name, weight in module.named_parameters(recurse=False)])


def _fill_at_random(model: PreTrainedModel) -> None:
    """Initialise small tensors as the family does, and add noise to all, so that a wrong use of any shows."""
    for buffer in model.buffers():
        buffer.zero_()
    for parameter in model.parameters():
        parameter.zero_()
        parameter._is_hf_initialized = parameter.numel() > _SMALL  # pyright: ignore[reportAttributeAccessIssue]
    for module in model.modules():
        module._is_hf_initialized = False  # pyright: ignore[reportArgumentType]
    model.initialize_weights()
    noise = torch.randn(_NOISE)
    begin = 0
    for parameter in model.parameters():
        scale = 0.05 if parameter.dim() < 2 else 0.5 / parameter.shape[-1] ** 0.5
        flat = parameter.view(-1)
        while len(flat):
            part = noise[begin : begin + len(flat)]
            flat[: len(part)].add_(part.to(flat.dtype), alpha=scale)
            flat, begin = flat[len(part) :], (begin + len(part)) % _NOISE
