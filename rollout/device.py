"""The states of the processes that share a device, training ranks and rollout engines, and a simulated device.

Ranks and engines take turns. Each method of theirs names the states in which it may be called, and refuses any other on
every device: on a CPU nothing moves, so nothing else would show a mistake in their order.
"""

import fcntl
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast

SIMULATED = "ALIGNYARD_SIMULATED_DEVICE"
"""Environment variable of tests, `FOLDER:BYTES`. A CPU then counts as devices of so many bytes: ranks and engines move
away when they sleep, and enter what they hold in a ledger in this folder."""


class DeviceState(StrEnum):
    """Memory that a training rank or a rollout engine holds on its device."""

    ASLEEP = "asleep"
    """None."""
    WEIGHTS = "weights"
    """The weights in the model's dtype: to send, to load, to export, and of a rank to compute log-probabilities."""
    AWAKE = "awake"
    """Everything: a rank's optimizer, gradients and reference too, an engine's KV cache."""


class DeviceError(RuntimeError):
    """A call in the wrong state, or a device that is too small. The message names the owners of the memory."""


class Move(NamedTuple):
    """A change of state: the seconds it took, and the bytes that came to the device or left it."""

    seconds: float
    num_bytes: int

    def metrics(self, owner: str, state: DeviceState) -> dict[str, float]:
        """Return `device/OWNER_STATE_seconds` and `device/OWNER_STATE_gib`; empty where nothing moved, as on a CPU."""
        if not self.num_bytes:
            return {}
        prefix = f"device/{owner}_{state}"
        return {f"{prefix}_seconds": self.seconds, f"{prefix}_gib": self.num_bytes / 2**30}


class _Occupant(Protocol):
    name: str
    state: DeviceState


_Method = TypeVar("_Method", bound=Callable[..., Any])


def needs(*states: DeviceState) -> Callable[[_Method], _Method]:
    """Decorate a method that needs one of `states`; in another state its call raises DeviceError."""

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def checked(self: _Occupant, *args: Any, **kwargs: Any) -> Any:
            if self.state not in states:
                needed = " or ".join(f"'{state}'" for state in states)
                raise DeviceError(
                    f"{self.name} is in state '{self.state}', and '{method.__name__}' needs {needed}: move it with `to`"
                )
            return method(self, *args, **kwargs)

        checked.needed_states = states  # pyright: ignore[reportAttributeAccessIssue]
        return cast(_Method, checked)

    return decorate


class Ledger:
    """Bytes that each process holds on a simulated device. Processes share it through a folder.

    Example:
        ledger = Ledger(Path("ledger"), budget=2**30, owner="rank 0")
        ledger.hold({"weights": 2**20})
    """

    def __init__(self, folder: Path, budget: int, owner: str) -> None:
        """owner: name of this process; the number that it ends with is its device's."""
        self._folder, self._budget, self._owner = folder / f"device-{owner.split()[-1]}", budget, owner
        self._folder.mkdir(parents=True, exist_ok=True)
        self._entry = self._folder / f"{os.getpid()}.json"
        self._held: dict[str, int] = {}

    @classmethod
    def of_environment(cls, owner: str) -> "Ledger | None":
        """Return the ledger that the variable SIMULATED names; None where it is not set, as outside of tests."""
        folder, _, budget = os.environ.get(SIMULATED, "").rpartition(":")
        return cls(Path(folder), int(budget), owner) if folder else None

    def hold(self, num_bytes: Mapping[str, int]) -> int:
        """Enter the bytes that this process holds from now on, by kind; a kind that is not given keeps its entry.
        Returns the bytes that came or left.

        Raises DeviceError, naming every owner with the bytes it holds, if the device would hold more than its budget.
        """
        with self._locked():
            held = self._held | dict(num_bytes)
            owners = [*self._others(), (self._owner, held)]
            total = sum(sum(kinds.values()) for _, kinds in owners)
            with (self._folder / "entries.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps({"owner": self._owner, "held": held, "total": total}) + "\n")
            if total > self._budget:
                holdings = "; ".join(f"{owner} holds {_holding(kinds)}" for owner, kinds in owners)
                raise DeviceError(
                    f"{self._folder.name} of {self._budget / 2**20:.1f} MiB would hold {total / 2**20:.1f} MiB: "
                    f"{holdings}"
                )
            change = sum(held.values()) - sum(self._held.values())
            self._held = held
            self._entry.write_text(json.dumps({"owner": self._owner, "held": held}), encoding="utf-8")
            return abs(change)

    @contextmanager
    def holding(self, kind: str, num_bytes: int) -> Iterator[None]:
        """Hold `num_bytes` of `kind` within the block."""
        self.hold({kind: num_bytes})
        yield
        self.hold({kind: 0})

    def _others(self) -> list[tuple[str, dict[str, int]]]:
        """Return the owner and the holdings of each other living process."""
        entries = [path for path in self._folder.glob("*.json") if path != self._entry]
        living = [path for path in entries if Path("/proc", path.stem).exists()]
        records: list[Any] = [json.loads(path.read_text(encoding="utf-8")) for path in living]
        return [(record["owner"], record["held"]) for record in records]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _holding(kinds: Mapping[str, int]) -> str:
    parts = [f"{num_bytes / 2**20:.1f} MiB of {kind}" for kind, num_bytes in kinds.items() if num_bytes]
    return ", ".join(parts) or "nothing"
