"""Memory, speed and links of devices, from data sheets or measurements, and clusters of them."""

import re
from dataclasses import dataclass, replace

from configs.base import neighbour

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """One device and its share of a machine. Bandwidths are bytes a second, one way."""

    name: str
    memory: int
    """Bytes."""
    flops: dict[str, float]
    """Dense FLOP/s of matrix products by dtype."""
    bandwidth: float
    """Bandwidth of its own memory."""
    link: float
    """Bandwidth to another device of the same machine."""
    network: float
    """Bandwidth to a device of another machine."""
    host_link: float
    """Bandwidth to the memory of its machine."""
    host_memory: int
    """Its share of the machine's memory, in bytes."""
    host_bandwidth: float
    """Its share of the bandwidth of the machine's memory."""
    per_machine: int
    runtime: int
    """Bytes of a process beside tensors: kernels, communicators, DeepSpeed's own."""
    is_cpu: bool
    """True for a CPU. Its figures were measured, so programs reach all of them; those of a data sheet are peaks."""
    source: str


def _hopper(name: str, memory: int, flops: float, bandwidth: float, link: float, source: str) -> Device:
    return Device(
        name, memory * GIB, {"bfloat16": flops, "float32": 67e12}, bandwidth, link, 50e9, 64e9, 256 * GIB, 70e9, 8,
        runtime=2 * GIB, is_cpu=False, source=source,
    )  # fmt: skip


DEVICES = {
    device.name.lower(): device
    for device in (
        _hopper("H100", 80, 989e12, 3.35e12, 450e9, "NVIDIA H100 SXM data sheet; 8 x 400 Gb/s InfiniBand (DGX H100)"),
        _hopper("H200", 141, 989e12, 4.8e12, 450e9, "NVIDIA H200 SXM data sheet; network as DGX H100"),
        _hopper("H800", 80, 989e12, 3.35e12, 200e9, "as H100, NVLink at 400 GB/s (arXiv:2412.19437 section 3.1)"),
        _hopper("H20", 96, 148e12, 4.0e12, 450e9, "vendors' tables, for want of a data sheet; network as DGX H100"),
        Device(
            "A100", 80 * GIB, {"bfloat16": 312e12, "float32": 19.5e12}, 2.04e12, 300e9, 25e9, 32e9, 128 * GIB, 45e9, 8,
            runtime=2 * GIB, is_cpu=False,
            source="NVIDIA A100 80 GB SXM data sheet; 8 x 200 Gb/s InfiniBand (DGX A100)",
        ),
        Device(
            "cpu", 24 * GIB, {"bfloat16": 20e9, "float32": 157e9}, 14e9, 14e9, 1e9, 14e9, 24 * GIB, 14e9, 1,
            runtime=80 * 2**20, is_cpu=True,
            source="measured: 2 cores with AVX2, a matrix product and a copy of memory",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cluster:
    """Machines of one kind of device."""

    count: int
    device: Device

    def crosses(self, size: int) -> bool:
        """Return whether a group of `size` neighbouring devices spans machines."""
        return size > self.device.per_machine

    def rate(self, size: int) -> float:
        """Return bytes a second and device, one way, within a group of `size` devices."""
        return self.device.network if self.crosses(size) else self.device.link

    def __str__(self) -> str:
        return f"{self.count} x {self.device.name}"


def cluster_of(text: str) -> Cluster:
    """Parse a cluster: `96xH20`, on machines as they are sold, or `2x4xH100`, two machines of four devices. Raises
    ValueError for anything else, with the devices that are known.

    Example:
        cluster_of("8xH100").device.memory // GIB  # 80
    """
    names = [device.name for device in DEVICES.values()]
    parsed = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x([a-zA-Z]\w*)", text)
    if parsed is None:
        raise ValueError(
            f"--cluster {text}: write a number and a device, as in 96xH20, or machines, devices of each and a device, "
            f"as in 2x8xH100; known: {', '.join(names)}"
        )
    if parsed[3].lower() not in DEVICES:
        raise ValueError(f"--cluster {text}: no figures for '{parsed[3]}'; {neighbour(parsed[3], names)}")
    device, count = DEVICES[parsed[3].lower()], int(parsed[2])
    if parsed[1] is None:
        return Cluster(count, device)
    return Cluster(int(parsed[1]) * count, replace(device, per_machine=count))
