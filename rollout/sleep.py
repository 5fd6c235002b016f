"""Take an engine's memory off its device and back with vLLM's sleep mode; on a simulated device, lose it as there.

The engine goes round in one order. Sleep of level 2 discards the KV cache, and the weights too, since the next sync
replaces them: vLLM keeps only a model's buffers (v1/worker/gpu_worker.py 0.32, `sleep`). So after its sleep an engine
wakes for weights, loads them, and then wakes for its KV cache (entrypoints/llm.py 0.32, `wake_up`).
"""

import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from rollout.device import DeviceError, DeviceState, Ledger, Move

_ORIGIN = {DeviceState.WEIGHTS: DeviceState.ASLEEP, DeviceState.AWAKE: DeviceState.WEIGHTS}
"""The state from which an engine enters each but sleep, which it enters from any."""


class EngineMemory:
    """The memory of one engine on its device. The engine is awake at first, with the weights of its checkpoint.

    ledger: of a simulated device, else None.
    """

    def __init__(self, llm: Any, name: str, *, weight_bytes: int, on_cpu: bool) -> None:
        """llm: vLLM's LLM. On a CPU nothing moves, except on a simulated device."""
        self._llm, self._name, self._on_cpu = llm, name, on_cpu
        self._has_weights = True
        self.ledger = Ledger.of_environment(name)
        self._sizes = {"weights": weight_bytes} | (self._llm.collective_rpc(working_sizes)[0] if self.ledger else {})
        self._enter(DeviceState.AWAKE)

    def loaded(self) -> None:
        """Note that the weights were loaded. Raises DeviceError on a simulated device where some were not."""
        lost = [*chain(*self._llm.collective_rpc(lost_weights))] if self.ledger else []
        if lost:
            raise DeviceError(f"{self._name} lost {len(lost)} tensors in its sleep that no sync loaded: {lost}")
        self._has_weights = True

    def to(self, old: DeviceState, new: DeviceState) -> Move:
        """Move from state `old` to `new`. Raises DeviceError for another order, and before the weights are loaded."""
        if old == new:
            return Move(0.0, 0)
        if _ORIGIN.get(new, old) != old:
            raise DeviceError(f"{self._name} can't go from '{old}' to '{new}', only from '{_ORIGIN[new]}'")
        if new == DeviceState.AWAKE and not self._has_weights:
            raise DeviceError(f"{self._name} lost its weights in its sleep: call `load_weights` before it wakes")
        started, free_bytes = time.monotonic(), self._free_bytes()
        simulated_bytes = self._enter(new)
        if not self._on_cpu and new == DeviceState.ASLEEP:
            self._llm.sleep(level=2)
        elif not self._on_cpu:
            self._llm.wake_up(tags=["weights" if new == DeviceState.WEIGHTS else "kv_cache"])
        elif self.ledger and new == DeviceState.ASLEEP:
            self._llm.collective_rpc(discard_memory)
        if new == DeviceState.AWAKE and (self.ledger or not self._on_cpu):
            self._llm.collective_rpc(clear_kv_cache)
        self._has_weights &= new != DeviceState.ASLEEP
        moved = [abs(after - before) for after, before in zip(self._free_bytes(), free_bytes, strict=True)]
        return Move(time.monotonic() - started, simulated_bytes or max(moved))

    def _enter(self, state: DeviceState) -> int:
        """Enter the memory of `state` into the ledger of a simulated device; return the bytes that come or leave."""
        if self.ledger is None:
            return 0
        kinds = {DeviceState.AWAKE: [*self._sizes], DeviceState.WEIGHTS: ["weights"], DeviceState.ASLEEP: []}[state]
        return self.ledger.hold({kind: size if kind in kinds else 0 for kind, size in self._sizes.items()})

    def _free_bytes(self) -> list[int]:
        """Return the free bytes of each worker's device."""
        return [0] if self._on_cpu else self._llm.collective_rpc(free_bytes_of_worker)


def free_bytes_of_worker(_: Any) -> int:
    """Return the free bytes of this process's device."""
    return torch.accelerator.get_memory_info()[0]


def working_sizes(worker: Any) -> dict[str, int]:
    """Return the bytes that the engine would hold on a device beside its weights: its KV cache and its logits."""
    config = worker.vllm_config
    return {
        "KV cache": sum(tensor.nbytes for tensor in worker.model_runner.kv_caches),
        "logits": 4 * config.scheduler_config.max_num_seqs * config.model_config.get_vocab_size(),
    }


def discard_memory(worker: Any) -> None:
    """Overwrite weights and KV cache with NaN, and take away the copies of weights that the CPU's products packed."""
    for tensor in (*(tensor for _, tensor in _weights(worker)), *worker.model_runner.kv_caches):
        tensor.fill_(float("nan"))
    for module in worker.get_model().modules():
        if hasattr(module, "cpu_linear"):
            module.cpu_linear = _lost_linear


def _lost_linear(*_: Any) -> torch.Tensor:
    raise DeviceError("a product was computed with weights that were lost in a sleep")


def clear_kv_cache(worker: Any) -> None:
    """Fill the KV cache with zeros, as at the start. Memory that comes back may hold NaN, and a kernel that multiplies
    slots without a token by a probability of 0, as the CPU's does, would spread it."""
    for tensor in worker.model_runner.kv_caches:
        tensor.zero_()


def lost_weights(worker: Any) -> list[str]:
    """Return the names of the model's tensors that no sync has loaded since its last sleep."""
    modules = worker.get_model().named_modules()
    packed = [f"{name}.weight" for name, module in modules if getattr(module, "cpu_linear", None) is _lost_linear]
    return packed + [name for name, tensor in _weights(worker) if tensor.float().isnan().any()]


def _weights(worker: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what sleep of level 2 discards: parameters, and tensors that modules keep as plain attributes."""
    model = worker.get_model()
    others = {tensor.untyped_storage().data_ptr() for tensor in (*model.buffers(), *worker.model_runner.kv_caches)}
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *vars(module).items()):
            is_weight = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() > 0
            if is_weight and tensor.untyped_storage().data_ptr() not in others:
                yield f"{prefix}.{name}", tensor.data
