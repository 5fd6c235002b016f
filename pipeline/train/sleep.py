"""Move a rank's memory to the host and back, by kind: its weights, optimizer, gradients and reference.

A tensor's storage is copied to the host and freed in place, as PyTorch's FSDP frees gathered weights. So every view of
it stays valid, such as DeepSpeed's flat buffers and its links from weights to their moments. DeepSpeed's own
`offload_states` breaks some of them: docs/decisions/0012-storages-move.md.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rollout.device import DeviceState, Ledger, Move

Storage = torch.UntypedStorage

KINDS = {
    DeviceState.AWAKE: ("weights", "optimizer", "gradients", "buckets", "reference"),
    DeviceState.WEIGHTS: ("weights",),
    DeviceState.ASLEEP: (),
}
"""Kinds of memory on the device in each state."""
_DISPOSABLE = ("gradients", "buckets")
"""Kinds whose content is not needed between steps."""


class Residence:
    """The memory of one rank on its device. The rank is awake at first.

    On a CPU the device is the host already, so nothing moves, except on a simulated device.
    """

    def __init__(self, engine: Any, reference: nn.Module | None, device: torch.device, ledger: Ledger | None) -> None:
        """engine: the rank's DeepSpeed engine."""
        self._engine, self._reference, self._device, self._ledger = engine, reference, device, ledger
        self._away: dict[str, list[_Away]] = {}
        self._moves = device.type != "cpu" or ledger is not None
        self.record()

    def record(self) -> None:
        """Enter the memory on a simulated device into its ledger. AdamW creates its moments in the first step."""
        if self._ledger is not None:
            self._ledger.hold({kind: _num_bytes(storages) for kind, storages in self._storages().items()})

    def replace_reference(self, reference: nn.Module | None) -> None:
        """Take another frozen model, or none, for the reference's memory. The rank is awake."""
        self._reference = reference
        self.record()

    def working(self, kind: str, num_bytes: int) -> AbstractContextManager[None]:
        """Enter memory that is needed within the block only."""
        return self._ledger.holding(kind, num_bytes) if self._ledger else nullcontext()

    def to(self, state: DeviceState) -> Move:
        """Let the memory leave that `state` does not need, then bring what it needs to the device."""
        if not self._moves:
            return Move(0.0, 0)
        started = time.monotonic()
        leaving = {
            kind: storages
            for kind, storages in self._storages().items()
            if kind not in KINDS[state] and kind not in self._away
        }
        num_bytes = sum(map(_num_bytes, leaving.values()))
        for kind, storages in leaving.items():
            self._away[kind] = [_Away.leave(storage, keep=kind not in _DISPOSABLE) for storage in storages]
            if self._device.type == "cpu" and kind != "buckets":  # of gigabytes, which nobody writes on a CPU
                for away in self._away[kind]:
                    away.spoil()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # frees the blocks that PyTorch would keep, so that the engine can have them
        arriving = {kind: self._away[kind] for kind in KINDS[state] if kind in self._away}
        sizes = {kind: sum(away.num_bytes for away in parts) for kind, parts in arriving.items()}
        if self._ledger is not None:
            self._ledger.hold(dict.fromkeys(leaving, 0) | sizes)
        for kind, parts in arriving.items():
            for away in parts:
                away.arrive(zero=kind == "gradients")
            del self._away[kind]
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return Move(time.monotonic() - started, num_bytes + sum(sizes.values()))

    def _storages(self) -> dict[str, list[Storage]]:
        """Return the rank's storages on its device by kind, each once."""
        engine = self._engine
        attributes = {} if engine.optimizer is engine.basic_optimizer else vars(engine.optimizer)
        buckets = [value for name, value in attributes.items() if "ipg" in name]
        gradients = [value for name, value in attributes.items() if "grad" in name]
        tensors = {
            "weights": _of_module(engine.module),
            "reference": _of_module(self._reference) if self._reference else iter(()),
            "buckets": _reachable(buckets),
            "gradients": chain(
                _reachable(gradients), (p.grad for p in engine.module.parameters() if p.grad is not None)
            ),
            "optimizer": _reachable([engine.basic_optimizer.state, attributes]),
        }
        seen: set[int] = set()
        storages: dict[str, list[Storage]] = {kind: [] for kind in tensors}
        for kind, of_kind in tensors.items():
            for tensor in of_kind:
                storage = tensor.untyped_storage()
                if tensor.device == self._device and storage.nbytes() and storage._cdata not in seen:
                    seen.add(storage._cdata)
                    storages[kind].append(storage)
        return storages


@dataclass(frozen=True, slots=True)
class _Away:
    """A storage that was freed, with its content on the host."""

    storage: Storage
    num_bytes: int
    content: Tensor | None

    @classmethod
    def leave(cls, storage: Storage, *, keep: bool) -> "_Away":
        """Free the storage; `keep` copies its content."""
        num_bytes, content = storage.nbytes(), None
        if keep:
            content = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
            content.copy_(_bytes(storage), non_blocking=True)
        if storage.resizable():  # on a CPU, weights may lie in a mapped file
            storage.resize_(0)
        return cls(storage, num_bytes, content)

    def spoil(self) -> None:
        """Fill the storage with NaN, for tests, since PyTorch ends the process that reads a freed storage of a CPU."""
        self._allocate()
        _bytes(self.storage).fill_(0xFF)

    def arrive(self, *, zero: bool) -> None:
        """Allocate the storage again, with its content; `zero` fills one without."""
        self._allocate()
        if self.content is not None:
            _bytes(self.storage).copy_(self.content, non_blocking=True)
        elif zero:
            _bytes(self.storage).zero_()

    def _allocate(self) -> None:
        if self.storage.resizable():
            self.storage.resize_(self.num_bytes)


def _bytes(storage: Storage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _num_bytes(storages: Iterable[Storage]) -> int:
    return sum(storage.nbytes() for storage in storages)


def _of_module(module: nn.Module) -> Iterator[Tensor]:
    """Yield the module's weights and buffers; under ZeRO-3 also this rank's part of each weight."""
    for tensor in chain(module.parameters(), module.buffers()):
        yield tensor.data
        part: Tensor | None = getattr(tensor, "ds_tensor", None)
        if part is not None:
            yield part.data


def _reachable(root: object) -> Iterator[Tensor]:
    """Yield the tensors in containers and in DeepSpeed's objects below `root`, with their gradients."""
    stack, seen = [root], set[int]()
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
            if value.grad is not None:
                yield value.grad
        elif isinstance(value, Mapping):
            stack.extend(value.values())
        elif isinstance(value, list | tuple | set | deque):
            stack.extend(value)
        elif type(value).__module__.startswith("deepspeed.runtime") and not isinstance(value, nn.Module):
            stack.extend(vars(value).values() if hasattr(value, "__dict__") else ())
