"""The environment of a process that computes, and a port for several of them to meet at."""

import os
import random
import socket
from contextlib import suppress

PORTS = range(20_000, 32_000)
"""Below the ports that Linux hands out to outgoing connections, and above those of Ray's workers: a port of this range
that is free now stays free until the process that it was chosen for binds it."""


def num_threads(configured: int, *, sharers: int = 1) -> int:
    """CPU threads of one of `sharers` processes on a machine: as configured, or where that is 0 its part of the cores
    this process may use, at least 1."""
    return configured or max(len(os.sched_getaffinity(0)) // sharers, 1)


def compute_environment(threads: int) -> dict[str, str]:
    """Variables for an engine or a training rank with so many CPU threads.

    Engines and ranks take turns on the same cores, beside judges. A thread that waits spins for some microseconds only:
    OpenMP's default of spinning on costs a factor of ten as soon as somebody else wants the core, and not spinning at
    all costs a sixth of a step. Freed memory stays in the process instead of being faulted in again at every layer, and
    lies in huge pages: a twentieth of a training step.
    """
    malloc = {"hugetlb": 1, "mmap_threshold": 2**30, "trim_threshold": 2**32, "top_pad": 2**26}
    return {
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "10000",
        "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in malloc.items()),
    }


def free_port() -> int:
    """A TCP port of this machine that nothing is bound to. Raises OSError where twenty drawn ones are all taken."""
    for port in random.sample(PORTS, 20):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise OSError(f"none of twenty ports between {PORTS.start} and {PORTS.stop} is free")
