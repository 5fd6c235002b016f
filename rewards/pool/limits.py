"""Limits of judging processes: memory, by their pools, and the time to start."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from configs.rewards import PoolName, RewardPoolConfig
from rewards.types import Placement

DEFAULT_START_SECONDS = 60.0
"""Longest a judging process may take to build its rewards, and then to set up one that sets no `start_seconds`.
Building takes 0.6 s for math and 2 s for reasoning_gym on an idle machine."""
RULE_MEMORY_GIB = 2.0
"""Default limit of the address space of a process that judges by rules. The others map files and start programs, which
have limits of their own: what counts is their resident memory."""
SANDBOX_MEMORY_GIB = 4.0
"""Default limit of the resident memory of a process that runs programs, without that of the programs."""
MODEL_MEMORY_SHARE = 0.5
"""Default limit of the resident memory of all processes of a reward that queries a model, as a share of the machine's
memory."""


def memory_limits(
    pool: PoolName, label: str, config: RewardPoolConfig, *, machine_gib: float
) -> tuple[float | None, float | None]:
    """The limits in GiB of address space and of resident memory of a process that judges in `pool`, on a machine of
    `machine_gib`; None for no limit. label: of a reward that queries a model."""
    if pool == "rule":
        return config.memory_gib.get(pool, RULE_MEMORY_GIB), None
    default = SANDBOX_MEMORY_GIB
    if pool == "model":
        default = machine_gib * MODEL_MEMORY_SHARE / config.workers.get(label, 1)
    return None, config.memory_gib.get(label if pool == "model" else pool, default)


def resident_bytes(pid: int) -> int:
    """The memory of a process that belongs to it alone, in bytes, swapped pages included; 0 for one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    fields = (line.split() for line in lines if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")))
    return sum(int(kib) * 1024 for _, kib, _ in fields)


def cpu_seconds(pid: int) -> float:
    """The processor time of a process so far; 0 for one that is gone."""
    with suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system
    return 0.0


def is_stalled(pid: int, seconds: float, computed: float) -> bool:
    """True for a process that did not judge for `seconds` because it got no processor: one that was stopped, or that is
    ready to run or waits for a page, and computed for less than half of the time. One that sleeps waits for itself."""
    with suppress(psutil.Error):
        status = psutil.Process(pid).status()
        is_held = status in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
        return status == psutil.STATUS_STOPPED or (is_held and computed < seconds / 2)
    return False


def start_limit(placements: Iterable[Placement]) -> float:
    """Seconds that one process may take to set up the rewards of `placements`."""
    limits = [placement.start_seconds or DEFAULT_START_SECONDS for placement in placements]
    return max(limits, default=DEFAULT_START_SECONDS)
