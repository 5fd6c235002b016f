"""Actors with the methods of ranks, engines and judges that start in a moment and report the devices Ray gave them."""

import os
import time
from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rollout.device import DeviceState, Move

Devices = list[tuple[str, int]]


def own_devices() -> Devices:
    """The devices of this process, as (node id, GPU)."""
    node = ray.get_runtime_context().get_node_id()
    return [(node, int(gpu)) for gpu in ray.get_gpu_ids()]


@ray.remote(num_cpus=0)
class EngineWorker:
    def devices(self) -> Devices:
        return own_devices()


class LightEngine:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.asleep = 0.0

    def node_id(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def start(self, sharers: int, *_: Any, **__: Any) -> list[str]:
        """Start workers as RayExecutorV2._init_executor of vllm 0.32.0 does (v1/executor/ray_executor_v2.py)."""
        self.sharers, self.workers = sharers, []
        group, indices = get_current_placement_group(), os.environ.get("VLLM_RAY_BUNDLE_INDICES", "")
        for index in map(int, indices.split(",") if indices else []):
            share = float(os.environ["VLLM_RAY_PER_WORKER_GPUS"])
            strategy = PlacementGroupSchedulingStrategy(group, index)
            self.workers.append(EngineWorker.options(num_gpus=share, scheduling_strategy=strategy).remote())
        return []

    def call(self, method: str, *args: Any) -> Any:
        self.calls.append(method)
        return getattr(self, method)(*args)

    def to(self, state: DeviceState) -> Move:
        if state == DeviceState.ASLEEP:
            self.asleep = time.time()
        return Move(0.0, 0)

    def devices(self) -> Devices:
        own = own_devices()
        return own + [device for worker in self.workers for device in ray.get(worker.devices.remote(), timeout=60)]

    def data(self) -> bytes:
        """Bytes that lie in this node's object store."""
        return bytes(2**20)

    def report(self, *_: Any) -> dict[str, Any]:
        return {"sharers": self.sharers, "calls": self.calls, "asleep": self.asleep}


class LightRank:
    def __init__(self) -> None:
        self.started = time.time()

    def address(self) -> tuple[str, str, int]:
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), 1

    def build(self, spec: Any, environment: dict[str, str], sharers: int) -> str:
        self.rank, self.sharers = int(environment["RANK"]), sharers
        return ""

    def call(self, method: str, *_: Any, **__: Any) -> Any:
        return {
            "devices": own_devices,
            "rank": lambda: self.rank,
            "sharers": lambda: self.sharers,
            "started": lambda: self.started,
        }[method]()


class LightJudge:
    def __init__(self, *_: Any) -> None: ...

    def start(self) -> None: ...

    def devices(self) -> Devices:
        return own_devices()

    def alive(self) -> None: ...

    def close(self) -> None: ...
