"""Save and load the training state independently of ranks, ZeRO stage and expert parallelism.

Each rank writes what it holds of the float32 weights and AdamW's two moments, as pieces of the model's own tensors, and
reads the pieces of what it has to hold. See docs/decisions/0005-state-without-layout.md and 0036.

This file and `sleep.py` depend on internals of DeepSpeed's optimizers.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from pipeline.train.expert_parallel import place_in_fused
from pipeline.train.moments import BF16MomentsAdamW
from pipeline.weights.fill import layers
from pipeline.weights.pieces import BUFFER, WEIGHT, PieceReader, PieceWriter

_MOMENTS = ("exp_avg", "exp_avg_sq")


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


class StateWriter:
    """Writes a rank's part of the training state while the rank goes on: only the copy to the host is waited for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._written: Future[dict[str, str]] | None = None

    def begin(self, engine: Any, folder: Path, step: int) -> None:
        """Copy what this rank of the DeepSpeed `engine` holds after `step` updates, and let it be written into
        `folder`."""
        pieces, facts = _held_pieces(engine), {"step": step, "ranks": torch.distributed.get_world_size()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # for the copies
        self._written = self._thread.submit(pieces.write, folder, torch.distributed.get_rank(), facts)

    def result(self, patience: float | None) -> dict[str, str] | None:
        """Return the checksums of this rank's files, by name; None if they are not written within `patience` seconds.
        Raises what writing raised."""
        assert self._written is not None, "nothing is being written"
        wait([self._written], patience)
        return self._written.result() if self._written.done() else None


def _held_pieces(engine: Any) -> PieceWriter:
    """Copy what this rank has to write; see `_own_part`. The first rank writes the buffers."""
    _link_moments(engine)
    pieces = PieceWriter()
    for name, tensor in _distinct(engine.module).items():
        if not isinstance(tensor, nn.Parameter):
            if torch.distributed.get_rank() == 0:
                pieces.add(name, tuple(tensor.shape), 0, {BUFFER: tensor.flatten()})
        elif tensor.requires_grad:
            place = place_in_fused(engine.module, name, getattr(tensor, "ds_shape", tensor.shape))
            first, length = _own_part(engine, tensor)
            values = {kind: _read_part(engine, tensor, kind) for kind in (WEIGHT, *_MOMENTS)} if length else {}
            for start, own, run in place.runs(first, length):
                parts = {kind: part[own - first : own - first + run] for kind, part in values.items()}
                pieces.add(place.name, place.shape, start, parts)
    return pieces


def load_state(engine: Any, folder: Path) -> int:
    """Load the state from `folder` with all ranks, and return the step after which it was written.

    Raises ValueError for a folder without a state, and for another model's state.
    """
    reader = PieceReader(folder)
    step: int = reader.facts["step"]
    _create_moments(engine, step)
    distinct = _distinct(engine.module)
    for layer in layers(engine.module):
        with gathered_to_write([tensor for tensor in layer.values() if isinstance(tensor, nn.Parameter)]):
            for name in filter(distinct.__contains__, layer):
                _read(engine, reader, name, distinct[name])
    return step


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state dict, one that has several names under the first."""
    tensors = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensor for name, tensor in tensors.items() if first[id(tensor)] == name}


def _read(engine: Any, reader: PieceReader, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, nn.Parameter):
        tensor.copy_(reader.whole(BUFFER, name))
    elif tensor.requires_grad:
        place = place_in_fused(engine.module, name, tensor.shape)
        if (shape := reader.shapes.get(place.name)) != place.shape:
            raise ValueError(
                f"checkpoint of another model: its {place.name} has the shape {shape}, and the model's {place.shape}; "
                "remove the stage's checkpoints, or begin anew with --fresh"
            )

        def read(kind: str, first: int, length: int) -> Tensor:
            runs = [reader.read(kind, place.name, start, run) for start, _, run in place.runs(first, length)]
            return torch.cat(runs) if runs else torch.empty(0)

        first, length = _own_part(engine, tensor) if engine.zero_optimization() else (0, tensor.numel())
        for kind in (WEIGHT, *_MOMENTS):
            _write_part(engine, tensor, kind, read(kind, first, length))
        tensor.data.copy_(read(WEIGHT, 0, tensor.numel()).view(tensor.shape))


def _own_part(engine: Any, parameter: Any) -> tuple[int, int]:
    """Return the start and the length of the elements of a parameter, flat, that this rank writes: those whose master
    weights ZeRO leaves to it; without ZeRO, where every rank holds all, an equal share."""
    size = parameter.numel()
    if not engine.zero_optimization():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return size * rank // ranks, size * (rank + 1) // ranks - size * rank // ranks
    if engine.zero_optimization_partition_weights():
        part, size = parameter.ds_tensor.ds_numel, parameter.ds_numel
        start = min(part * torch.distributed.get_rank(parameter.ds_process_group), size)
        return start, min(part, size - start)  # the last rank's part may be padded
    if parameter._hp_mapping is None:
        return 0, 0
    address = parameter._hp_mapping.lp_fragment_address
    return address.start, address.numel


def _read_part(engine: Any, parameter: Tensor, kind: str) -> Tensor:
    """Return the master weight or a moment of this rank's own part of a parameter, flat."""
    start, length = _own_part(engine, parameter)
    if not engine.zero_optimization():
        return _unsharded(engine, parameter, kind).flatten()[start : start + length]
    if engine.zero_optimization_partition_weights():
        own = (
            safe_get_local_fp32_param(parameter) if kind == WEIGHT else safe_get_local_optimizer_state(parameter, kind)
        )
        return cast(Tensor, own)[:length]
    mapping: Any = parameter
    return mapping._hp_mapping.get_hp_fragment(None if kind == WEIGHT else kind)


def _write_part(engine: Any, parameter: Any, kind: str, values: Tensor) -> None:
    """Set the master weight or a moment of this rank's own part of a parameter; without ZeRO, of all of it."""
    if not engine.zero_optimization():
        _unsharded(engine, parameter, kind).copy_(values.view(parameter.shape))
    elif engine.zero_optimization_partition_weights():
        padded = nn.functional.pad(values, (0, parameter.ds_tensor.numel() - len(values)))
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)
    elif len(values):
        parameter._hp_mapping.get_hp_fragment(None if kind == WEIGHT else kind).data.copy_(values)


def _unsharded(engine: Any, parameter: Tensor, kind: str) -> Tensor:
    """Return a master weight or moment without ZeRO: of the parameter, or of DeepSpeed's float32 copy of it."""
    master = parameter
    if hasattr(engine.optimizer, "fp32_groups"):
        pairs = zip(chain(*engine.optimizer.fp16_groups), chain(*engine.optimizer.fp32_groups), strict=True)
        [master] = [copy for own, copy in pairs if own is parameter]
    return master.data if kind == WEIGHT else engine.basic_optimizer.state[master][kind]


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
