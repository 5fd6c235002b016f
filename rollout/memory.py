"""Device memory of an engine, and vLLM's arguments that keep it to that.

vLLM 0.32 starts only where its share of a device (`gpu_memory_utilization`, 0.92 unless given) is free, even with a KV
cache of a fixed size (`request_memory` in v1/worker/utils.py), so an engine beside others asks for what it will own.
"""

import os
from math import prod
from pathlib import Path
from typing import Any

from configs.sampling import RolloutConfig
from rollout.checkpoint import checkpoint_shapes, vocab_size

RUNTIME_BYTES = 2 * 2**30
"""Bytes of a process on a GPU beside tensors: kernels, communicators, graphs."""
USABLE_SHARE = 0.92
"""Share of a device's memory to use; fragmentation takes the rest."""
GPU_SHARE = "VLLM_RAY_PER_WORKER_GPUS"
"""Environment variable with an engine's part of each of its GPUs; below 1 a training rank has the other part."""


def engine_bytes(model: Path, config: RolloutConfig, dtype: str) -> dict[str, float]:
    """Return the bytes that an awake engine holds on each of its devices, by component; no KV cache where its size is
    `auto`."""
    shards, width = config.tensor_parallel_size, 4 if dtype == "float32" else 2
    weights = sum(prod(shape) for shape in checkpoint_shapes(model).values())
    return {
        "weights": weights * (1 if "weights" in config.fp8 else width) / shards,
        "KV cache": 0.0 if config.kv_cache_gib == "auto" else config.kv_cache_gib * 2**30,
        "logits": config.max_num_seqs * vocab_size(model) * 4 / shards,
        "runtime": RUNTIME_BYTES,
    }


def cache_gib(config: RolloutConfig) -> float:
    """Return the size of an engine's KV cache on the CPU. Raises ValueError for `auto`."""
    if config.kv_cache_gib == "auto":
        raise ValueError("rollout.kv_cache_gib=auto is a share of a GPU's memory, and there is none; set it to GiB")
    return config.kv_cache_gib


def memory_arguments(model: Path, config: RolloutConfig, dtype: str, device_bytes: int) -> dict[str, Any]:
    """Return vLLM's arguments for a device of `device_bytes`: the share that the engine will own, and the size of its
    KV cache, which for `auto` is what weights and a sleeping rank leave of that share.

    Raises ValueError for an engine that is larger than the device.
    """
    parts = engine_bytes(model, config, dtype)
    beside = RUNTIME_BYTES if float(os.environ.get(GPU_SHARE, "1")) < 1 else 0
    usable = USABLE_SHARE * device_bytes - beside
    if (needed := sum(parts.values())) > usable:
        details = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
        raise ValueError(
            f"an engine needs {needed / 2**30:.1f} GiB of a device with {usable / 2**30:.1f} to use ({details}): raise "
            "rollout.tensor_parallel_size, or lower rollout.kv_cache_gib"
        )
    if config.kv_cache_gib == "auto":
        return {"gpu_memory_utilization": usable / device_bytes}
    return {"gpu_memory_utilization": needed / device_bytes, "kv_cache_memory_bytes": int(parts["KV cache"])}
