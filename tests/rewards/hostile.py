"""Checkers that fail in every way, for the tests of what guards against them."""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from configs.rewards import RewardSpec
from rewards.types import Reward, Status, Task, Verdict


def _hang(*_: object) -> None:
    time.sleep(3600)


def _hang_in_c(*_: object) -> None:
    sum(iter(int, 1))  # never ends and never returns to the interpreter's signal checks


def _eat_memory(*_: object) -> None:
    bytearray(64 << 30)


def _print(*_: object) -> float:
    print("a reward prints", flush=True)
    os.write(1, b"\x00\x01 raw bytes too\n")
    sys.stderr.write("and complains\n")
    return 0.5


def _once(task: Task, _: str) -> float:
    """Hangs for the first process that tries; the next finds the mark."""
    try:
        os.close(os.open(task.truth, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return 0.25
    time.sleep(3600)
    raise AssertionError


BEHAVIOURS: dict[str, Callable[[Task, str], Any]] = {
    "hang": _hang,
    "hang_in_c": _hang_in_c,
    "eat_memory": _eat_memory,
    "raise": lambda *_: 1 // 0,
    "raise_base": lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()),
    "exit": lambda *_: sys.exit(3),
    "kill_itself": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
    "nan": lambda *_: float("nan"),
    "inf": lambda *_: float("inf"),
    "nan_verdict": lambda *_: Verdict(float("nan")),
    "too_large": lambda *_: 10**400,
    "none": lambda *_: None,
    "string": lambda *_: "1.0",
    "two_scores": lambda *_: [1.0, 0.0],
    "print": _print,
    "once": _once,
    "abstain": lambda *_: Verdict(None, Status.ABSTAIN, "no opinion"),
    "length": lambda _, completion: len(completion),
    "pid": lambda *_: os.getpid(),
}


class Hostile:
    def __init__(self, behaviour: str) -> None:
        self._behaviour = BEHAVIOURS[behaviour]

    def score(self, task: Task, completion: str) -> float | Verdict:
        return self._behaviour(task, completion)


def build(spec: RewardSpec) -> Reward:
    if spec.name not in BEHAVIOURS:
        raise ValueError(f"unknown behaviour '{spec.name}'")
    return Hostile(spec.name)


def specs(*names: str) -> list[RewardSpec]:
    return [RewardSpec(name=name) for name in names]
