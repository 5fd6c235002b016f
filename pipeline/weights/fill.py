"""Fill a model on the meta device from its checkpoint, a decoder layer at a time.

With several ranks, each tensor is read by one of them, and sent to all: a cluster reads each byte of a checkpoint once.
What is done with a layer before the next is read, such as sharding it, is up to the caller, so a rank needs memory for
two layers beside what it keeps: the tensors as they are stored, and those that the model makes of them, such as fused
experts.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from pipeline.weights.reader import CheckpointReader

_LAYER = re.compile(r"(?:\w+\.)*?\d+(?=\.|$)")
_ALIGNMENT = 16
"""Bytes to whose multiples the tensors of a buffer begin."""


def _layer_of(name: str) -> str:
    """Return the part of a tensor's name that names its decoder layer; empty for one outside of all layers."""
    layer = _LAYER.match(name)
    return layer[0] if layer else ""


def layers(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of the state dict by decoder layer; tensors outside of all layers form a group too."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(_layer_of(name), {})[name] = tensor
    yield from groups.values()


def fill(
    model: PreTrainedModel,
    reader: CheckpointReader,
    device: torch.device,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Give all tensors of `model` that are on the meta device the checkpoint's values, on `device`; move the others
    there.

    `model` comes from `pipeline.weights.load`. `keep` is called after each layer and each tensor outside
    of the layers; it may shard and free what is there. Every rank of a process group must take part.
    """
    conversions = model._weight_conversions
    for tensor in chain(model.parameters(), model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    for names in _parts(model, reader):
        with reader:
            _set(model, _received(reader, names, device), device)
        keep()
    model._weight_conversions = conversions
    left = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    assert not left, f"the checkpoint has no {left[:5]}"


def _parts(model: PreTrainedModel, reader: CheckpointReader) -> Iterable[list[str]]:
    """Return the names of the tensors that `model` takes from the checkpoint, by layer, in the model's order.

    Of a weight with several names, such as a tied head's, the first that the checkpoint holds is taken.
    """
    mapping = deepcopy(get_model_conversion_mapping(model))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    own = model.state_dict(keep_vars=True)
    sources: dict[str, list[str]] = {name: [] for name in own}
    for name in reader.shapes:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        target = renamed if renamed in own else name
        if target in own and own[target].is_meta:
            sources[target].append(name)
    parts: dict[str, list[str]] = {}
    taken: set[int] = set()
    for target, names in sources.items():
        if names and id(own[target]) not in taken:
            taken.add(id(own[target]))
            parts.setdefault(_layer_of(target) or target, []).extend(names)
    return parts.values()


def _received(reader: CheckpointReader, names: list[str], device: torch.device) -> dict[str, Tensor]:
    """Return tensors of the checkpoint on every rank, each read by one."""
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if size == 1:
        return {name: reader.read(name) for name in names}
    total, before = sum(map(reader.num_bytes, names)), 0
    shares: list[list[str]] = [[] for _ in range(size)]  # runs of about equally many bytes
    for name in names:
        shares[before * size // max(total, 1)].append(name)
        before += reader.num_bytes(name)
    received: dict[str, Tensor] = {}
    for rank, share in enumerate(shares):
        starts, end = [], 0
        for name in share:
            starts.append(end)
            end += -(-reader.num_bytes(name) // _ALIGNMENT) * _ALIGNMENT
        buffer = torch.empty(end, dtype=torch.uint8, device=device)
        for name, start in zip(share, starts, strict=True):
            place = buffer[start : start + reader.num_bytes(name)]
            received[name] = place.view(reader.dtypes[name]).view(reader.shapes[name])
            if rank == torch.distributed.get_rank():
                received[name].copy_(reader.read(name))
        if end:
            torch.distributed.broadcast(buffer, rank)
    return {name: received[name] for name in names}


def _set(model: PreTrainedModel, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Convert tensors of the checkpoint as `transformers` does, and set them in `model`, at every name of a tensor that
    has several."""
    before: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    load: Any = convert_and_load_state_dict_in_model
    mapping: Any = get_model_conversion_mapping(model)
    dtype = model.dtype
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=mapping,
    )
    info, _ = load(model, tensors, config, None)
    tensors.clear()
    assert not (info.mismatched_keys or info.conversion_errors), (info.mismatched_keys, info.conversion_errors)
    _tie(model, before)
    for module in model.modules():  # views would keep what was received in memory
        for parameter in module.parameters(recurse=False):
            if _is_part(parameter):
                parameter.data = parameter.data.clone()
        for name, buffer in module._buffers.items():
            if buffer is not None and _is_part(buffer):
                module._buffers[name] = buffer.clone()


def _is_part(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.untyped_storage().nbytes() > tensor.nbytes


def _tie(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Put a parameter that has replaced another at all of the other's names, as trainable as that was."""
    replaced: dict[int, Tensor] = {}
    for name, old in before.items():
        if (new := model.get_parameter(name)) is not old:
            replaced[id(old)] = new.requires_grad_(old.requires_grad)
    for name, old in before.items():
        if id(old) in replaced:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, replaced[id(old)])
