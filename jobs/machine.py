"""Devices, cores, memory and disk of this machine, with a remedy for each that is too old or too small."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import psutil
from packaging.version import Version

from jobs.import_guard import set_up_command

_GIB = 2**30
DRIVERS = {"13": Version("580"), "12": Version("525.60")}
"""Oldest NVIDIA driver by CUDA's major version, of the table "minor version compatibility" in NVIDIA's guide."""
OLDEST_CAPABILITY = (8, 0)
"""Compute capability from which on the kernels for bfloat16, FlashAttention and grouped products exist: the A100's."""
OLDEST_NCCL = (2, 10)
"""First NCCL that sums bfloat16."""
_SHARED_GIB_A_DEVICE = 1.0
"""NCCL, vLLM's workers and Ray's object store keep their buffers in /dev/shm."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report of `alignyard doctor`."""

    subject: str
    state: str
    purpose: str = ""
    """The work that needs it, and the remedy."""
    missing: bool = False
    """It is absent, too old or too small, or has the wrong version."""
    required: bool = False
    """Nothing works without it."""


def machine() -> Iterator[Finding]:
    """Devices, cores, memory and disk."""
    import torch  # takes seconds, which --help must not

    drivers = _driver_versions()
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_devices:
        yield from devices(drivers)
    elif drivers:
        yield _unusable(drivers[0], torch.__version__, torch.version.cuda)
    else:
        yield Finding("GPU", "none: everything runs on the CPU")
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    yield Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Finding(
        "cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    yield Finding("memory", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free")
    yield shared_memory(num_devices)
    yield Finding("disk", f"{disk.free / _GIB:.0f} of {disk.total / _GIB:.0f} GiB free here")


def devices(drivers: list[str]) -> Iterator[Finding]:
    """Every GPU, the driver, CUDA, NCCL, and the access of GPUs to each other's memory."""
    import torch
    from torch.cuda import nccl

    count, kernels = torch.cuda.device_count(), torch.cuda.get_arch_list()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = (properties.major, properties.minor)
        purpose = ""
        if capability < OLDEST_CAPABILITY:
            purpose = "bfloat16 and grouped products, which need compute capability 8.0 (A100) or newer"
        elif not any(kernel.endswith(f"_{properties.major}0") for kernel in kernels):
            purpose = f"torch, whose kernels are for {', '.join(kernels)}: install a build for this GPU"
        elif free < 0.9 * total:
            purpose = "engines and ranks: other processes hold the rest of its memory, see nvidia-smi"
        state = f"{properties.name}, {free / _GIB:.0f} of {total / _GIB:.0f} GiB free, compute capability "
        yield Finding(f"GPU {index}", f"{state}{properties.major}.{properties.minor}", purpose, missing=bool(purpose))
    cuda = torch.version.cuda or "none"
    oldest = DRIVERS.get(cuda.partition(".")[0])
    if drivers and oldest:
        yield Finding(
            "driver",
            drivers[0],
            f"CUDA {cuda}: update it to {oldest} or newer",
            missing=Version(drivers[0]) < oldest,
            required=True,
        )
    yield Finding("CUDA", cuda)
    nccl_version = nccl.version()
    yield Finding(
        "NCCL",
        ".".join(map(str, nccl_version)),
        "sums in bfloat16: unset LD_PRELOAD and LD_LIBRARY_PATH, which put an old one before torch's",
        missing=nccl_version[:2] < OLDEST_NCCL,
        required=True,
    )
    yield _peer_access(count)


def shared_memory(num_devices: int) -> Finding:
    """The size of /dev/shm, which a container limits to 64 MiB by default."""
    disk = shutil.disk_usage("/dev/shm")
    needed = _SHARED_GIB_A_DEVICE * max(num_devices, 1)
    return Finding(
        "/dev/shm",
        f"{disk.free / _GIB:.1f} of {disk.total / _GIB:.1f} GiB free",
        f"buffers of NCCL, vLLM and Ray: give it {needed:.0f} GiB or more, by docker run --ipc=host or --shm-size",
        missing=disk.total < needed * _GIB,
    )


def _peer_access(count: int) -> Finding:
    import torch

    pairs = list(permutations(range(count), 2))
    blocked = [f"{a}-{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    state = f"no access between {', '.join(blocked[:8])}" if blocked else f"{len(pairs)} of {len(pairs)} pairs"
    return Finding(
        "peer access",
        state if pairs else "one GPU",
        "NCCL, which copies through the machine's memory now: see nvidia-smi topo -m, and switch PCIe's ACS off",
        missing=bool(blocked),
    )


def _unusable(driver: str, torch_version: str, cuda: str | None) -> Finding:
    """A GPU that the driver shows and torch can't use."""
    oldest = DRIVERS.get((cuda or "").partition(".")[0])
    if cuda is None:
        remedy = f"torch {torch_version} is a build for CPUs: {set_up_command('gpu')}"
    elif oldest and Version(driver) < oldest:
        remedy = f"driver {driver} is too old for CUDA {cuda}: update it to {oldest} or newer"
    else:
        remedy = "torch sees none: check CUDA_VISIBLE_DEVICES, and docker run --gpus all"
    return Finding("GPU", f"one that torch can't use (driver {driver})", remedy, missing=True, required=True)


def _driver_versions() -> list[str]:
    """The driver's version, once for each GPU that nvidia-smi shows; empty without GPU or driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def stopped_processes() -> dict[int, str]:
    """Names of the processes under this one that a signal stopped, by their numbers. Judging processes, and programs
    under them, are left out: their guards kill them at their limits."""
    stopped: dict[int, str] = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_STOPPED:
                continue
            if not any(
                "rewards.pool.supervise" in word for own in [process, *process.parents()] for word in own.cmdline()
            ):
                words = process.cmdline()
                stopped[process.pid] = words[words.index("-m") + 1] if "-m" in words[:4] else Path(words[0]).name
    return stopped
