"""The whole training state on disk, free of the layout it was trained in.

A file for each layer holds float32 weights, AdamW's two moments and buffers, whole, under the model's own names:
whatever the number of ranks, the ZeRO stage or the expert parallelism that wrote it, any other reads it. Each rank
writes its share of the layers, and reads of each layer what it holds. See docs/decisions/0005-state-without-layout.md.

This file and `sleep.py` use the names that DeepSpeed gives its optimizers' insides.
"""

import json
from collections.abc import Iterator
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

WEIGHT, BUFFER = "weight", "buffer"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step.json"


def layers(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The state dict's tensors in groups of one decoder layer, and what is in none as a group of its own."""
    groups: dict[str, dict[str, Tensor]] = {}
    persistent = model.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        layer = next(
            (".".join(name.split(".")[: i + 1]) for i, part in enumerate(name.split(".")) if part.isdigit()), ""
        )
        groups.setdefault(layer, {})[name] = tensor
    yield from groups.values()


def save_state(engine: Any, folder: Path, step: int) -> dict[str, str]:
    """Write the state after `step` updates into `folder`; every rank of the DeepSpeed `engine` takes part.

    Returns the checksums of the files that this rank wrote, by name.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    _find_moments(engine)
    folder.mkdir(parents=True, exist_ok=True)
    checksums: dict[str, str] = {}

    def finish(file: Path) -> None:
        checksums[file.name] = checksum(file)
        fsync(file)

    for index, layer in enumerate(layers(engine.module)):
        trained = {name: tensor for name, tensor in layer.items() if tensor.requires_grad}
        written = {f"{BUFFER}/{name}": each.cpu() for name, each in layer.items() if not isinstance(each, nn.Parameter)}
        for kind in (WEIGHT, *MOMENTS):
            whole = as_fused(engine.module, {name: _whole(engine, tensor, kind) for name, tensor in trained.items()})
            if index % size == rank:
                written |= {f"{kind}/{name}": tensor.to("cpu", copy=True) for name, tensor in whole.items()}
        if index % size == rank:
            file = folder / f"layer-{index}.safetensors"
            save_file(written, file)
            finish(file)
    if rank == 0:
        write_atomic(folder / STEP, json.dumps({"step": step}))
        finish(folder / STEP)
    torch.distributed.barrier()
    return checksums


def load_state(engine: Any, folder: Path) -> int:
    """Take the state over from `folder`; every rank takes part. Returns the step it was written after.

    Raises ValueError when the folder holds no state, or that of another model.
    """
    step: int = read_json(folder / STEP, f"remove '{folder}' to start from an earlier state")["step"]
    _make_moments(engine, step)
    for index, layer in enumerate(layers(engine.module)):
        gathered = deepspeed.zero.GatheredParameters(
            [tensor for tensor in layer.values() if isinstance(tensor, nn.Parameter)], modifier_rank=0
        )
        path = folder / f"layer-{index}.safetensors"
        try:
            with safe_open(path, "pt") as file, gathered:
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
        tensor.copy_(file.get_tensor(f"{BUFFER}/{name}"))
    elif tensor.requires_grad:
        fused, part = place_in_fused(engine.module, name)
        for kind in (WEIGHT, *MOMENTS):
            _put(engine, tensor, kind, file.get_slice(f"{kind}/{fused}")[part])
        tensor.data.copy_(file.get_slice(f"{WEIGHT}/{fused}")[part])


def _whole(engine: Any, parameter: Tensor, kind: str) -> Tensor:
    """float32, of the parameter's whole shape: its master weight or a moment."""
    if not engine.zero_optimization():
        return _unsharded(engine, parameter, kind).float()
    if kind == WEIGHT:
        return cast(Tensor, safe_get_full_fp32_param(parameter))
    return cast(Tensor, safe_get_full_optimizer_state(parameter, kind))


def _put(engine: Any, parameter: Any, kind: str, whole: Tensor) -> None:
    """The reverse of _whole."""
    if not engine.zero_optimization():
        _unsharded(engine, parameter, kind).copy_(whole)
    elif engine.zero_optimization_partition_weights():
        # By hand: DeepSpeed's own setter of the whole fails where the last rank's part is padded.
        part = parameter.ds_tensor.numel()
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        flat = nn.functional.pad(whole.flatten(), (0, part * (rank + 1)))[part * rank : part * (rank + 1)]
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, flat)
        else:
            safe_set_local_optimizer_state(parameter, flat, kind)
    elif kind == WEIGHT:
        safe_set_full_fp32_param(parameter, whole)
    else:
        safe_set_full_optimizer_state(parameter, whole, kind)


def _unsharded(engine: Any, parameter: Tensor, kind: str) -> Tensor:
    """Without ZeRO the master weight is the parameter, or in bfloat16 a copy that DeepSpeed keeps."""
    master = parameter
    if hasattr(engine.optimizer, "fp32_groups"):
        pairs = zip(chain(*engine.optimizer.fp16_groups), chain(*engine.optimizer.fp32_groups), strict=True)
        [master] = [copy for own, copy in pairs if own is parameter]
    return master.data if kind == WEIGHT else engine.basic_optimizer.state[master][kind]


def _make_moments(engine: Any, step: int) -> None:
    """Moments to be filled, which AdamW makes only at its first step, and its count of steps."""
    inner, zero = engine.basic_optimizer, engine.optimizer
    dtype = torch.bfloat16 if isinstance(inner, BF16MomentsAdamW) else torch.float32
    masters = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO-3 keeps them out of the groups
    for master in masters or chain(*(group["params"] for group in inner.param_groups)):
        state = inner.state[master]
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=master.device)).fill_(step)
        for moment in MOMENTS:
            state.setdefault(moment, torch.zeros_like(master, dtype=dtype, requires_grad=False))
    _find_moments(engine)


def _find_moments(engine: Any) -> None:
    """ZeRO-1 and -2 look for every group's moments after the first group's first step, when there are no others."""
    zero = engine.optimizer
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
