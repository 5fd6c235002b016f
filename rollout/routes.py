"""Record the experts that vLLM's routers choose for each token during sampling.

On accelerators vLLM returns the routes. On the CPU it can't, since its model runner that does needs Triton; there we
read the capture hook of each router, which passes the indices that the expert kernel uses.

Captured routes are stored by slot of the KV cache, in the step that computes the slot's keys and values. A token from
a cached prefix therefore has the route of the request that computed it, and a token computed again after a preemption
overwrites its old route.

Shape suffixes: T tokens of a sequence, R rows of a step, S slots of the KV cache, L mixture layers in depth order
(leading dense layers are left out), K experts of a token.
"""

from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from vllm import LLM, RequestOutput
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.platforms import current_platform

from rollout.types import NO_ROUTE, Routes


class ReturnedRoutes:
    """Routes that vLLM returns with each output, without those of dense layers."""

    def __init__(self, layers: list[int]) -> None:
        self._layers = layers

    def pop(self, output: RequestOutput) -> Routes:
        """Routes [T, L, K] of the prompt and the completion of a finished request."""
        return _padded(cast(NDArray[Any], output.outputs[0].routed_experts)[:, self._layers], _length(output))

    def clear(self) -> None:
        """Do nothing: vLLM returns routes with the output."""


class CapturedRoutes:
    """Routes read from the routers of an engine in this process, at every step of its model runner."""

    def __init__(self, worker: Any) -> None:
        self._runner = worker.model_runner
        self._forward = self._runner._model_forward
        self._runner._model_forward = self._step
        routers = [cast(BaseRouter, layer.router) for layer in _mixture_layers(worker.get_model())]
        self._experts_LRK: list[torch.Tensor] = [torch.empty(0)] * len(routers)
        for index, router in enumerate(routers):
            router.set_capture_fn(partial(self._experts_LRK.__setitem__, index))
        cache = self._runner.kv_cache_config
        if len(cache.kv_cache_groups) > 1:  # layers with windowed attention free their blocks while a request runs
            raise ValueError("routes can't be kept for a model whose layers cache in several ways; don't replay them")
        num_slots = cache.num_blocks * cache.kv_cache_groups[0].kv_cache_spec.block_size
        self._slots_SLK = np.full((num_slots, len(routers), routers[0].top_k), NO_ROUTE, np.int16)
        # Requests of the last step, each with its row in the blocks and lengths below.
        self._rows: dict[str, int] = {}
        self._blocks, self._lengths = np.empty((0, 0), np.int64), np.empty(0, np.int64)
        self._saved: dict[str, Routes] = {}  # routes of requests that have finished or were preempted

    def pop(self, output: RequestOutput) -> Routes:
        """Routes [T, L, K] of the prompt and the completion of a finished request."""
        self._save(self._rows.keys() & {output.request_id})
        return _padded(self._saved.pop(output.request_id), _length(output))

    def clear(self) -> None:
        """Drop the routes of aborted requests."""
        self._rows, self._saved = {}, {}

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._runner.input_batch
        names = [name.rpartition("-")[0] for name in batch.req_ids]  # vLLM appends a random suffix
        self._save(self._rows.keys() - names)  # before another request overwrites their slots
        output = self._forward(*args, **kwargs)
        starts = self._runner.query_start_loc.np[: len(names) + 1]
        rows = slice(int(starts[-1]))
        routes_RLK = torch.stack([experts_RK[rows] for experts_RK in self._experts_LRK], dim=1).numpy()
        self._slots_SLK[batch.block_table[0].slot_mapping.np[rows]] = routes_RLK
        self._rows = {name: row for row, name in enumerate(names)}
        self._blocks = batch.block_table[0].block_table.np[: len(names)].astype(np.int64)
        self._lengths = batch.num_computed_tokens_cpu[: len(names)] + np.diff(starts)
        return output

    def _save(self, names: set[str]) -> None:
        block_size = self._runner.input_batch.block_table[0].block_size
        for name in names:
            row = self._rows.pop(name)
            slots = self._blocks[row, :, None] * block_size + np.arange(block_size)
            self._saved[name] = self._slots_SLK[slots.reshape(-1)[: self._lengths[row]]]


def routes_of(llm: LLM) -> ReturnedRoutes | CapturedRoutes:
    """Start recording the routes of `llm`, which needs enable_return_routed_experts on an accelerator.

    Raises ValueError for a dense model and, on the CPU, for one with several kinds of KV cache.
    """
    layers: list[int] = llm.collective_rpc(_layers)[0]
    if not layers:
        raise ValueError("the model has no mixture layers, so no routes to record; set routing_replay=none")
    return llm.collective_rpc(CapturedRoutes)[0] if current_platform.is_cpu() else ReturnedRoutes(layers)


def _layers(worker: Any) -> list[int]:
    return [layer.layer_id for layer in _mixture_layers(worker.get_model())]


def _mixture_layers(model: torch.nn.Module) -> list[MoERunner]:
    return sorted(
        (module for module in model.modules() if isinstance(module, MoERunner)), key=lambda layer: layer.layer_id
    )


def _length(output: RequestOutput) -> int:
    """Number of tokens of the prompt with its completion."""
    return len(cast(list[int], output.prompt_token_ids)) + len(output.outputs[0].token_ids)


def _padded(routes: NDArray[Any], length: int) -> Routes:
    """Pad routes with NO_ROUTE to [length, L, K]."""
    padded = np.full((length, *routes.shape[1:]), NO_ROUTE, np.int16)
    padded[: len(routes)] = routes
    return padded
