"""TCP sockets on which processes of this machine listen, read from the kernel's tables."""

import ipaddress
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_LISTEN = "0A"


def exposed(pids: Iterable[int]) -> list[str]:
    """The sockets of these processes, as `name address port`, that others than this machine can reach."""
    addresses: dict[str, tuple[str, int]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                host, _, port = fields[1].partition(":")
                addresses[f"socket:[{fields[9]}]"] = (_ip(host), int(port, 16))
    found: set[str] = set()
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):  # closed meanwhile
                    host, port = addresses.get(str(descriptor.readlink()), ("127.0.0.1", 0))
                    if not ipaddress.ip_address(host).is_loopback:
                        found.add(f"{name} {host} {port}")
    return sorted(found)


def _ip(text: str) -> str:
    """An address from the kernel's hexadecimal words, each in this machine's order of bytes."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
