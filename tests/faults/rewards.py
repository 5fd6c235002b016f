"""Rewards that fail, as plug-ins of a run, and one that runs a program for each completion."""

import hashlib
from pathlib import Path
from typing import Any

from rewards.sandbox.box import Sandbox
from rewards.sandbox.process import Limits
from rewards.types import Task


def huge(task: Task, completion: str) -> float:
    return 1e200


def nan_for_some(task: Task, completion: str) -> float:
    return float("nan") if hashlib.sha256(completion.encode()).digest()[0] < 128 else 0.0


class Leak:
    pool = "model"

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def score(self, task: Task, completion: str) -> float:
        self._kept.append(bytearray(b"\1") * 2**30)
        return 0.0


class Program:
    """Pays for completions whose program ends by itself."""

    pool = "sandbox"

    def setup(self) -> None:
        self._sandbox = Sandbox()

    def score(self, task: Task, completion: str) -> float:
        result = self._sandbox.run(["/bin/sleep", "1"], folder=Path("/usr/share"), limits=Limits(seconds=5))
        return float(result.exit_code == 0)
