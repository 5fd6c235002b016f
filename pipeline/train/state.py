"""Save and load the training state independently of ranks, ZeRO stage and expert parallelism.

Each layer has a file with its full float32 weights, AdamW's two moments and buffers, under the model's own names. Each
rank writes its share of the layers, and reads its part of every layer. See docs/decisions/0005-state-without-layout.md.

This file and `sleep.py` depend on internals of DeepSpeed's optimizers.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.disk.checksums import checksum
from pipeline.disk.files import fsync, read_json, write_atomic
from pipeline.train.expert_parallel import as_fused, place_in_fused
from pipeline.train.moments import BF16MomentsAdamW

_WEIGHT, _BUFFER = "weight", "buffer"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP_FILE = "step.json"


def layers(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of the state dict by decoder layer; tensors outside of all layers form a group too."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        layer = re.match(r"(?:\w+\.)*?\d+(?=\.|$)", name)
        groups.setdefault(layer[0] if layer else "", {})[name] = tensor
    yield from groups.values()


def gathered(layer: Mapping[str, Tensor], *, zero_stage: int) -> AbstractContextManager[Any]:
    """Gather the parameters of `layer` on every rank within the block, if ZeRO-3 shards them."""
    if zero_stage < 3:
        return nullcontext()
    return deepspeed.zero.GatheredParameters([x for x in layer.values() if isinstance(x, nn.Parameter)])


def gathered_to_write(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Gather what ZeRO-3 shards of `parameters` within the block; all ranks keep what rank 0 has written at its end."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def trained_tensors(model: nn.Module, *, zero_stage: int) -> dict[str, Tensor]:
    """Copy all weights that are trained to the host of every rank; every rank takes part."""
    trained: dict[str, Tensor] = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with gathered(trained, zero_stage=zero_stage):
        return {name: weight.detach().to("cpu", copy=True) for name, weight in trained.items()}


def copy_weights(source: nn.Module, target: nn.Module, *, zero_stage: int) -> None:
    """Copy weights and buffers of `source` into those of `target` that have the same names, a layer at a time.

    Every rank takes part; both are sharded alike.
    """
    targets = target.state_dict(keep_vars=True)
    for layer in layers(source):
        pairs = {name: (tensor, targets[name]) for name, tensor in layer.items() if name in targets}
        parameters = [into for _, into in pairs.values() if isinstance(into, nn.Parameter)]
        with gathered(layer, zero_stage=zero_stage), gathered_to_write(parameters):
            for tensor, into in pairs.values():
                into.data.copy_(tensor.data)


def save_state(engine: Any, folder: Path, step: int) -> dict[str, str]:
    """Write the state after `step` updates into `folder`; every rank of the DeepSpeed `engine` takes part.

    Returns the checksums of this rank's files, by name.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    _link_moments(engine)
    folder.mkdir(parents=True, exist_ok=True)
    checksums: dict[str, str] = {}

    def finish(file: Path) -> None:
        checksums[file.name] = checksum(file)
        fsync(file)

    for index, layer in enumerate(layers(engine.module)):
        parameters = {name: tensor for name, tensor in layer.items() if tensor.requires_grad}
        tensors = {f"{_BUFFER}/{name}": x.cpu() for name, x in layer.items() if not isinstance(x, nn.Parameter)}
        for kind in (_WEIGHT, *_MOMENTS):
            values = {name: _read_full(engine, tensor, kind) for name, tensor in parameters.items()}
            values = as_fused(engine.module, values)
            if index % size == rank:
                tensors |= {f"{kind}/{name}": tensor.to("cpu", copy=True) for name, tensor in values.items()}
        if index % size == rank:
            file = folder / f"layer-{index}.safetensors"
            save_file(tensors, file)
            finish(file)
    if rank == 0:
        write_atomic(folder / _STEP_FILE, json.dumps({"step": step}))
        finish(folder / _STEP_FILE)
    torch.distributed.barrier()
    return checksums


def load_state(engine: Any, folder: Path) -> int:
    """Load the state from `folder` with all ranks, and return the step after which it was written.

    Raises ValueError for a folder without a state, and for another model's state.
    """
    step: int = read_json(folder / _STEP_FILE, f"remove '{folder}' to start from an earlier state")["step"]
    _create_moments(engine, step)
    for index, layer in enumerate(layers(engine.module)):
        parameters = gathered_to_write([tensor for tensor in layer.values() if isinstance(tensor, nn.Parameter)])
        path = folder / f"layer-{index}.safetensors"
        try:
            with safe_open(path, "pt") as file, parameters:
                for name, tensor in layer.items():
                    _read(engine, file, name, tensor)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"'{path}' is not of the training state of this model ({error}); remove '{folder}' to start from an "
                "earlier state"
            ) from error
    return step


def _read(engine: Any, file: Any, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, nn.Parameter):
        tensor.copy_(file.get_tensor(f"{_BUFFER}/{name}"))
    elif tensor.requires_grad:
        fused, part = place_in_fused(engine.module, name)
        for kind in (_WEIGHT, *_MOMENTS):
            _write_full(engine, tensor, kind, file.get_slice(f"{kind}/{fused}")[part])
        tensor.data.copy_(file.get_slice(f"{_WEIGHT}/{fused}")[part])


def _read_full(engine: Any, parameter: Tensor, kind: str) -> Tensor:
    """Return the master weight or a moment of a parameter, float32 in its full shape."""
    if not engine.zero_optimization():
        return _unsharded(engine, parameter, kind).float()
    if kind == _WEIGHT:
        return cast(Tensor, safe_get_full_fp32_param(parameter))
    return cast(Tensor, safe_get_full_optimizer_state(parameter, kind))


def _write_full(engine: Any, parameter: Any, kind: str, values: Tensor) -> None:
    """Set the master weight or a moment of a parameter from its full shape."""
    if not engine.zero_optimization():
        _unsharded(engine, parameter, kind).copy_(values)
    elif engine.zero_optimization_partition_weights():
        # DeepSpeed's safe_set_full_* fail if the last rank's part is padded, so each rank sets its part.
        part = parameter.ds_tensor.numel()
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        flat = nn.functional.pad(values.flatten(), (0, part * (rank + 1)))[part * rank : part * (rank + 1)]
        if kind == _WEIGHT:
            safe_set_local_fp32_param(parameter, flat)
        else:
            safe_set_local_optimizer_state(parameter, flat, kind)
    elif kind == _WEIGHT:
        safe_set_full_fp32_param(parameter, values)
    else:
        safe_set_full_optimizer_state(parameter, values, kind)


def _unsharded(engine: Any, parameter: Tensor, kind: str) -> Tensor:
    """Return a master weight or moment without ZeRO: of the parameter, or of DeepSpeed's float32 copy of it."""
    master = parameter
    if hasattr(engine.optimizer, "fp32_groups"):
        pairs = zip(chain(*engine.optimizer.fp16_groups), chain(*engine.optimizer.fp32_groups), strict=True)
        [master] = [copy for own, copy in pairs if own is parameter]
    return master.data if kind == _WEIGHT else engine.basic_optimizer.state[master][kind]


def _create_moments(engine: Any, step: int) -> None:
    """Create empty moments, which AdamW creates only at its first step, and set its step count."""
    inner, zero = engine.basic_optimizer, engine.optimizer
    dtype = torch.bfloat16 if isinstance(inner, BF16MomentsAdamW) else torch.float32
    masters = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO-3 keeps master weights outside of the groups
    for master in masters or chain(*(group["params"] for group in inner.param_groups)):
        state = inner.state[master]
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=master.device)).fill_(step)
        for moment in _MOMENTS:
            state.setdefault(moment, torch.zeros_like(master, dtype=dtype, requires_grad=False))
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Let ZeRO-1 and -2 link all moments; they do so after the first group's first step, when others don't exist."""
    zero = engine.optimizer
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
