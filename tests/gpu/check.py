"""The list of checks of `make test-gpu`, and the process in which one of them runs.

A check is a function that takes an empty folder and returns a sentence with its figures. It fails by an exception, and
is skipped by Skip. It says which row of docs/gpu.md it shows.
"""

import importlib
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any


class Skip(Exception):
    """The reason that a check can't run on this machine."""


@dataclass(frozen=True)
class Check:
    """One check: its function, the row of docs/gpu.md that it shows, and the most seconds that it may take."""

    name: str
    row: str
    seconds: int
    module: str
    packages: Sequence[str] = ()
    """Packages that it needs besides torch, transformers and deepspeed."""

    @property
    def function(self) -> str:
        return self.name.replace("-", "_")


_TRAINING, _KERNELS, _ENGINES = (f"tests.gpu.{name}" for name in ("training", "kernels", "engines"))
CHECKS = [
    Check("device", "the machine", 60, _KERNELS),
    Check("histogram", "determinism", 60, _KERNELS),
    Check("determinism", "determinism", 90, _TRAINING),
    Check("attention", "attention of packed rows", 60, _KERNELS),
    Check("experts", "experts by grouped products", 60, _KERNELS),
    Check("fp8-products", "FP8 on Hopper (`trainer.fp8`)", 60, _KERNELS),
    Check("update", "NCCL instead of gloo", 90, _TRAINING),
    Check("gradient-sums", "bfloat16", 90, _TRAINING),
    Check("states", "ranks leave their device", 120, _TRAINING),
    Check("checkpoints", "checkpoints of a policy that moves", 120, _TRAINING),
    Check("resume", "the training state of a large model", 90, _TRAINING),
    Check("offload", "`trainer.offload` to the machine's memory", 90, _TRAINING),
    Check("mtp", "modules for multi-token prediction in bfloat16", 90, _TRAINING),
    Check("fp8-training", "FP8 on Hopper (`trainer.fp8`)", 90, _TRAINING),
    Check("engine", "vLLM sleep mode", 150, _ENGINES, ("vllm", "ray")),
    Check("grpo", "a rank and an engine on one GPU", 240, _ENGINES, ("vllm", "ray", "datasets")),
    Check("engine-fp8", "FP8 in the engines (`rollout.fp8`)", 150, _ENGINES, ("vllm", "ray")),
    Check("routes", "`routing_replay: rollout`", 150, _ENGINES, ("vllm", "ray", "pytest")),
    Check("offload-nvme", "`trainer.offload.nvme`", 120, _TRAINING),
]
"""In the order in which they run: what others rest on, then what decides most."""


def run_check(check: Check, folder: Path) -> dict[str, Any]:
    """Run the check in this process, and return its verdict and detail."""
    _provide_xxhash()
    try:
        for package in check.packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise Skip(f"needs {package} ({error}): make setup EXTRA=gpu") from error
        detail = getattr(importlib.import_module(check.module), check.function)(folder)
    except Skip as reason:
        return {"verdict": "skipped", "detail": str(reason)}
    except Exception as error:  # noqa: BLE001  every failure is a verdict
        traceback.print_exc()
        return {"verdict": "failed", "detail": f"{type(error).__name__}: {error}"}
    return {"verdict": "passed", "detail": detail}


def _provide_xxhash() -> None:
    """Let hashlib stand in for xxhash on a machine without it: a check compares checksums with its own only."""
    try:
        import xxhash  # noqa: F401
    except ImportError:
        stand_in: Any = ModuleType("xxhash")
        stand_in.xxh3_128 = lambda: blake2b(digest_size=16)
        stand_in.xxh3_64_intdigest = lambda data: int.from_bytes(blake2b(data, digest_size=8).digest(), "big")
        sys.modules["xxhash"] = stand_in
