"""Environment variables, threads and a free port for processes that compute: engines and training ranks.

What depends on the machine is computed on the machine that the process is on, before it imports torch.
"""

import os
import random
import re
import socket
import time
from contextlib import suppress
from importlib import import_module
from typing import Any

import psutil

PORTS = range(20_000, 32_000)
"""Between the ports of Ray's workers and those that Linux gives to outgoing connections, so that a free port stays free
until the process that it was chosen for binds it."""

_RECENT_SECONDS = 300.0
_CREATE_STORE = "_create_c10d_store"


def num_threads(configured: int, *, sharers: int = 1) -> int:
    """CPU threads for each of `sharers` processes on a machine: `configured`, or for 0 an equal share of the cores that
    this process may use, at least 1."""
    return configured or max(len(os.sched_getaffinity(0)) // sharers, 1)


def start_environment() -> dict[str, str]:
    """Environment variables that an engine or a training rank must be started with, the same on every machine.

    Engines, ranks and judges share the same cores. OpenMP threads therefore spin for microseconds only: its default of
    endless spinning slows a step ten times on a busy core, no spinning by a sixth. glibc keeps freed memory in the
    process, in huge pages, instead of faulting it in again at every layer: a twentieth of a training step.
    """
    malloc = {"hugetlb": 1, "mmap_threshold": 2**30, "trim_threshold": 2**32, "top_pad": 2**26}
    return {
        "GOMP_SPINCOUNT": "10000",
        "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in malloc.items()),
    }


def compute_environment(threads: int) -> dict[str, str]:
    """The same with the number of OpenMP threads, which torch reads while it is imported."""
    return start_environment() | {"OMP_NUM_THREADS": str(threads)}


def network_environment(address: str) -> dict[str, str]:
    """Environment variables that make NCCL and gloo use this machine's interface with the IP `address`. Empty where no
    interface has it; a variable that the machine sets itself stays.

    Left alone, each library picks an interface by its own rules, which may be a container's bridge.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            # NCCL takes a name as a prefix unless it follows "=".
            variables = {"NCCL_SOCKET_IFNAME": f"={name}", "GLOO_SOCKET_IFNAME": name}
            return {key: value for key, value in variables.items() if key not in os.environ}
    return {}


def free_port() -> int:
    """Return a free TCP port of this machine. Raises OSError after twenty random ports in use."""
    for port in random.sample(PORTS, 20):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise OSError(f"none of twenty ports between {PORTS.start} and {PORTS.stop} is free")


def killed_by_kernel(pid: int) -> bool:
    """True where this machine's kernel says that it ended the process in the last minutes for lack of memory. Without
    the right to read its log, False."""
    record = re.compile(rf"\d+,\d+,(\d+),.*Killed process {pid} \(".encode())
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        while True:
            with suppress(BrokenPipeError):  # records were overwritten meanwhile
                found = record.match(os.read(log, 8192))
                if found and time.monotonic() - int(found[1]) / 1e6 < _RECENT_SECONDS:
                    return True
    except OSError:  # the end of the log
        return False
    finally:
        os.close(log)


def bind_stores() -> None:
    """Let a store of torch with a loopback address, by which the processes of a group find each other, listen at that
    address only.

    torch 2.13 listens at every address of the machine, and a store has no password: anyone who reaches its port could
    read and change its keys.
    """
    from torch._C._distributed_c10d import TCPStore

    rendezvous = import_module("torch.distributed.rendezvous")  # a function of the package has the same name
    original: Any = getattr(rendezvous, _CREATE_STORE)
    if original.__module__ == __name__:
        return

    def create_store(hostname: str, port: int, rank: int, world_size: int, timeout: Any, use_libuv: bool = True) -> Any:
        if rank != 0 or hostname not in ("127.0.0.1", "localhost"):
            return original(hostname, port, rank, world_size, timeout, use_libuv)
        listener = socket.create_server(("127.0.0.1", port)).detach()  # the store closes it
        options: dict[str, Any] = {"timeout": timeout, "multi_tenant": True, "use_libuv": use_libuv}
        return TCPStore("127.0.0.1", port, world_size, is_master=True, master_listen_fd=listener, **options)

    setattr(rendezvous, _CREATE_STORE, create_store)
