"""Environment variables that depend on the machine."""

import psutil
import pytest

from rollout.process import network_environment


def test_the_interface_with_the_nodes_address_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    interface, addresses = next((name, found) for name, found in psutil.net_if_addrs().items() if found)
    found = network_environment(addresses[0].address)
    assert found == {"NCCL_SOCKET_IFNAME": f"={interface}", "GLOO_SOCKET_IFNAME": interface}
    assert network_environment("203.0.113.9") == {}  # no interface has it, as behind a router
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")  # what the machine itself sets stays
    assert network_environment(addresses[0].address) == {"GLOO_SOCKET_IFNAME": interface}
