"""vLLM's Ray executor on logical GPUs: the CPU's workers in the bundles of an engine. Imported in engines and workers.

vLLM asks Ray for devices by the platform's key, which the CPU lacks; with "GPU" for it everything else is vLLM's own.
"""

from typing import Any, cast

import ray
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2

cast(Any, type(current_platform)).ray_device_key = "GPU"


class LogicalWorker(ray_executor_v2.RayWorkerProc):
    """A worker whose process has the key above, since it imports this module."""


def use_logical_workers() -> None:
    cast(Any, ray_executor_v2).RayWorkerProc = LogicalWorker


def devices_of_workers(llm: Any) -> list[tuple[str, int]]:
    """(node id, GPU) of every worker, in the order of their ranks, as Ray tells each."""
    return llm.collective_rpc(_own_device)


def _own_device(worker: Any) -> tuple[str, int]:
    context = ray.get_runtime_context()
    [gpu] = context.get_accelerator_ids()["GPU"]
    return context.get_node_id(), int(gpu)
