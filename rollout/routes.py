"""The experts that each token went to while the engine spoke, as vLLM's routers chose them.

On accelerators vLLM returns them. On the CPU it can't, since the model runner that does needs Triton; there the hook
that every router of vLLM has for the purpose is read here, in this process. What it hands over are the very indices
that go into the kernel of the experts, nothing is computed a second time.

Captured routes lie beside the KV cache, slot for slot: the route of a slot is the one that was taken when its keys and
values were computed. So tokens that come from a cached prefix have the route of whoever computed them, and what is
computed again after a preemption replaces what was there.

Legend: T tokens of a sequence, R rows of a step, S slots of the KV cache, L mixture layers in depth order (leading
dense layers have no place), K experts a token is sent to.
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
    """What vLLM returns of all layers, less the dense ones."""

    def __init__(self, layers: list[int]) -> None:
        self._layers = layers

    def take(self, output: RequestOutput) -> list[Routes]:
        """Of each completion of a finished request the routes [T, L, K] of its prompt and its own tokens."""
        returned = [cast(NDArray[Any], sample.routed_experts)[:, self._layers] for sample in output.outputs]
        return [_whole(routes_RLK, length) for routes_RLK, length in zip(returned, _lengths(output), strict=True)]

    def forget(self) -> None:
        """Nothing is kept between requests."""


class CapturedRoutes:
    """What the routers of an engine in this process choose, read with every step of its model runner."""

    def __init__(self, worker: Any) -> None:
        self._runner = worker.model_runner
        self._forward = self._runner._model_forward
        self._runner._model_forward = self._step
        layers = _mixtures(worker.get_model())
        routers = [cast(BaseRouter, layer.router) for layer in layers]
        self._chosen: list[torch.Tensor] = [torch.empty(0)] * len(routers)
        for place, router in enumerate(routers):
            router.set_capture_fn(partial(self._chosen.__setitem__, place))
        cache = self._runner.kv_cache_config
        if len(cache.kv_cache_groups) > 1:  # a group of windowed layers gives its blocks away while a request runs
            raise ValueError("routes can't be kept for a model whose layers cache in several ways; don't replay them")
        num_slots = cache.num_blocks * cache.kv_cache_groups[0].kv_cache_spec.block_size
        self._slots_SLK = np.full((num_slots, len(routers), routers[0].top_k), NO_ROUTE, np.int16)
        self._places: dict[str, int] = {}  # of each request of the last step, its row in what follows
        self._blocks, self._lengths = np.empty((0, 0), np.int64), np.empty(0, np.int64)
        self._left: dict[str, Routes] = {}  # the routes of those that were not in the step after: done or preempted

    def take(self, output: RequestOutput) -> list[Routes]:
        """Of each completion of a finished request the routes [T, L, K] of its prompt and its own tokens."""
        name, several = output.request_id, len(output.outputs) > 1
        keys = [f"{sample.index}_{name}" if several else name for sample in output.outputs]
        self._keep(self._places.keys() & keys)
        return [_whole(self._left.pop(key), length) for key, length in zip(keys, _lengths(output), strict=True)]

    def forget(self) -> None:
        """Lets go of what nobody took."""
        self._places, self._left = {}, {}

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._runner.input_batch
        names = [name.rpartition("-")[0] for name in batch.req_ids]  # vLLM adds a random end to what we called it
        self._keep(self._places.keys() - names)  # before their slots are another's
        output = self._forward(*args, **kwargs)
        starts = self._runner.query_start_loc.np[: len(names) + 1]
        rows = slice(int(starts[-1]))
        routes_RLK = torch.stack([ids_RK[rows] for ids_RK in self._chosen], dim=1).numpy()
        self._slots_SLK[batch.block_table[0].slot_mapping.np[rows]] = routes_RLK
        self._places = {name: place for place, name in enumerate(names)}
        self._blocks = batch.block_table[0].block_table.np[: len(names)].astype(np.int64)
        self._lengths = batch.num_computed_tokens_cpu[: len(names)] + np.diff(starts)
        return output

    def _keep(self, names: set[str]) -> None:
        size = self._runner.input_batch.block_table[0].block_size
        for name in names:
            place = self._places.pop(name)
            slots = self._blocks[place, :, None] * size + np.arange(size)
            self._left[name] = self._slots_SLK[slots.reshape(-1)[: self._lengths[place]]]


def routes_of(llm: LLM) -> ReturnedRoutes | CapturedRoutes:
    """Where the routes of `llm` come from; elsewhere than on the CPU it was made with enable_return_routed_experts.

    Raises ValueError for a model whose routes can't be recorded: a dense one, or, on the CPU, one with several kinds of
    cache.
    """
    layers: list[int] = llm.collective_rpc(_layers)[0]
    if not layers:
        raise ValueError("the model has no mixture layers, so no routes to record; set routing_replay=none")
    return llm.collective_rpc(CapturedRoutes)[0] if current_platform.is_cpu() else ReturnedRoutes(layers)


def _layers(worker: Any) -> list[int]:
    return [layer.layer_id for layer in _mixtures(worker.get_model())]


def _mixtures(model: torch.nn.Module) -> list[MoERunner]:
    return sorted(
        (module for module in model.modules() if isinstance(module, MoERunner)), key=lambda layer: layer.layer_id
    )


def _lengths(output: RequestOutput) -> list[int]:
    """Tokens of the prompt and of each completion together."""
    prompt = len(cast(list[int], output.prompt_token_ids))
    return [prompt + len(sample.token_ids) for sample in output.outputs]


def _whole(routes: NDArray[Any], length: int) -> Routes:
    """The routes [length, L, K] of a sequence of which the last tokens may have none."""
    whole = np.full((length, *routes.shape[1:]), NO_ROUTE, np.int16)
    whole[: len(routes)] = routes
    return whole
